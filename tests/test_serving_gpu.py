"""The serving functions on a GPU as engines run them: compiled by Inductor, in graphs of a bucket, in little memory."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decode_inputs import make, with_pool

from kda_kernels.api import (
    Checkpoints,
    Convolution,
    GatedNorm,
    kda_conv,
    kda_decode,
    kda_prefill,
    kda_step,
    prefill_workspace_bytes,
)
from kda_kernels.cute.prefill import host as cute_prefill
from kda_kernels.problem import Gate, Op, Options
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge.bits import same_bits
from kdacli.judge.reference import Reference
from kdacli.judge.verdicts import judge

pytestmark = pytest.mark.gpu
SAFE = Options(Gate.SAFE, -5.0)
TOKENS = ("q", "k", "v", "g", "beta")
NAMES = (*TOKENS, "A_log", "dt_bias", "state", "state_indices", "cu_seqlens")
H = 12


@pytest.fixture(autouse=True, scope="module")
def needed():
    if (reason := cute_prefill.unsupported()) is not None:
        pytest.skip(reason)


def prompts(lens: list[int], slots: list[int], tokens: int | None = None, seed: int = 0) -> Inputs:
    """`tokens`: those behind the last sequence are NaN."""
    tail = 0 if tokens is None else tokens - sum(lens)
    inputs = with_pool(make(lens=[*lens, tail], H=H, HV=H, K=128, V=128, options=SAFE, seed=seed), slots)
    inputs.cu_seqlens = inputs.cu_seqlens[:-1].clone()
    for name in TOKENS:
        getattr(inputs, name)[:, sum(lens) :] = torch.nan
    return inputs


def steps(N: int = 4, seed: int = 0) -> Inputs:
    return with_pool(make(N=N, H=H, HV=H, K=128, V=128, options=SAFE, seed=seed), [4, 1, 6, 0][:N])


def call(inputs: Inputs, out: torch.Tensor | None = None, **further) -> torch.Tensor:
    given = {name: getattr(inputs, name) for name in NAMES}
    function = kda_decode if inputs.cu_seqlens is None else kda_prefill
    return function(**given, lower_bound=inputs.options.lower_bound, out=out, **further)


@pytest.mark.parametrize("inputs", [steps, functools.partial(prompts, [70, 1200], [4, 1])], ids=["decode", "prefill"])
def test_inductor_compiles_around_the_operators(inputs):
    """It may reuse a buffer or move a copy; the pool that the operator mutates is the caller's own."""
    found, expected = inputs(), inputs()
    pool = found.state
    compiled = torch.compile(lambda x: call(x) * 2, fullgraph=True)
    with torch.no_grad():
        assert same_bits(compiled(found), call(expected) * 2)
    assert found.state is pool and same_bits(pool, expected.state)


def test_a_graph_of_a_bucket_runs_fewer_tokens_and_sequences():
    """The split that was chosen at the capture is used for other lengths; rows past the end are zero."""
    static = prompts([1300, 748], [4, 1])
    o = torch.empty_like(static.v)
    call(static, o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(static, o)
    for seed, (lens, slots) in enumerate([([1300, 748], [4, 1]), ([2000, 0], [6, -1]), ([5, 700], [0, 3])], 1):
        now = prompts(lens, slots, 2048, seed)
        for name in NAMES:
            getattr(static, name).copy_(getattr(now, name))
        o.fill_(torch.nan)
        graph.replay()
        end = sum(lens)
        assert o[:, end:].eq(0).all()
        real = dataclasses.replace(now, **{name: getattr(now, name)[:, :end] for name in TOKENS})
        verdicts = judge(Reference(real, Op.PREFILL), Outputs(o[:, :end], static.state))
        assert len(verdicts) == 2 and all(verdict.passed for verdict in verdicts), (lens, verdicts)


LITTLE = """
import torch
from kda_kernels.reference.oracle import recurrence
from test_serving_gpu import call, prompts, steps
held = [prompts([2000, 3000], [4, 1]), steps()]
exact = [recurrence(inputs).o for inputs in held]
outs = [torch.empty_like(inputs.v) for inputs in held]
torch.cuda.empty_cache()
most = torch.cuda.memory_reserved() + (256 << 20)
torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
for inputs, expected, out in zip(held, exact, outs, strict=True):
    call(inputs, out)
    torch.cuda.synchronize()
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
"""


def test_first_calls_with_256_mb_left():
    """Of a process that has loaded no kernel of ours yet, and to which torch's allocator gives no more than that."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", LITTLE], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def decodes(N: int, **given) -> Callable[[], object]:
    x = steps(N)
    return functools.partial(call, x, torch.empty_like(x.v), **given)


def verifies(N: int, **given) -> Callable[[], object]:
    """Drafts of two tokens: the pool stays as it is, the states of tokens go to rows of a buffer."""
    x = with_pool(make(N=N, T=2, H=H, HV=H, K=128, V=128, options=SAFE), [4, 1, 6, 0][:N])
    given["token_states"] = x.state.new_empty(N, 2, *x.state.shape[1:])
    given["token_state_indices"] = torch.arange(N, device=x.q.device)
    return functools.partial(call, x, torch.empty_like(x.v), update_state=False, **given)


def fused_steps(N: int, **given) -> Callable[[], object]:
    x, D = steps(N), 3 * H * 128
    conv = Convolution(
        x.state.new_ones(D, 4).bfloat16(), None, x.state.new_zeros(7, 3, D).bfloat16(), tokens_first=True
    )
    norm = GatedNorm(x.g[:, 0], x.A_log.new_ones(128))
    mixed = torch.cat([t.flatten(1) for t in (x.q, x.k, x.v)], 1)
    same = {name: getattr(x, name) for name in ("A_log", "dt_bias", "state", "state_indices")}
    return functools.partial(
        kda_step, mixed, x.g[:, 0], x.beta[:, 0], **same, conv=conv, norm=norm, lower_bound=-5.0,
        out=x.v[:, 0].clone(), **given,
    )  # fmt: skip


def convolutions(N: int, kernel: str | None = None) -> Callable[[], object]:
    x = torch.randn(N * 512 + 70, 3 * H * 128, device="cuda").bfloat16()
    slots = torch.tensor([4, 1], device="cuda")
    conv = Convolution(x.new_ones(x.shape[1], 4), None, x.new_zeros(7, 3, x.shape[1]), slots, True)
    return functools.partial(kda_conv, x, conv, cu_seqlens=slots.new_tensor([0, N * 512, len(x)]), out=x.clone())


def prefills(N: int, part: int = 512, **given) -> Callable[[], object]:
    """N * 512 and 70 tokens: cute-prefill splits them."""
    x = prompts([N * part, 70], [4, 1])
    return functools.partial(call, x, torch.empty_like(x.v), cu_seqlens_cpu=x.cu_seqlens.cpu(), **given)


def many_prefills(N: int, **given) -> Callable[[], object]:
    """100 short prompts, most of them padding: cute-prefill's CTAs take several heads each."""
    x = prompts([10 * N] * 100, [4, 1] + [-1] * 98)
    return functools.partial(call, x, torch.empty_like(x.v), **given)


def with_room(N: int, **given) -> Callable[[], object]:
    size = prefill_workspace_bytes(N * 512 + 70, H, 2, kernel=given.get("kernel"))
    return prefills(N, **given, workspace=torch.empty(size, dtype=torch.uint8, device="cuda"))


def with_checkpoints(N: int, **given) -> Callable[[], object]:
    rows = torch.arange(2, device="cuda", dtype=torch.int32)
    kept = Checkpoints(torch.empty(2, H, 128, 128, device="cuda"), rows, torch.full_like(rows, 64))
    return prefills(N, **given, checkpoints=kept)


def in_int16(N: int, **given) -> Callable[[], object]:
    one = prefills(N, state_scales=torch.ones(7, H, 128, device="cuda"), **given)
    one.args[0].state = torch.zeros(7, H, 128, 128, dtype=torch.int16, device="cuda")
    return one


# By kind of call: its kernel, what makes one of N sequences or so, and the most tensors that it may allocate.
EAGER = {
    "decode": ("decode", decodes, 0),
    "verify": ("decode", verifies, 0),
    "step": ("step", fused_steps, 0),
    "conv": ("prefill", convolutions, 0),
    "whole": ("prefill", functools.partial(prefills, part=30), 0),
    "many": ("prefill", many_prefills, 1),
    "split": ("prefill", prefills, 1),
    "workspace": ("prefill", with_room, 0),
    "checkpoints": ("prefill", with_checkpoints, 1),
    "int16": ("prefill", in_int16, 3),
}


@pytest.mark.parametrize("backend", ["cute", "triton"])
@pytest.mark.parametrize("kind", EAGER)
def test_nothing_waits_for_the_gpu_nor_asks_it_for_memory(kind, backend):
    """Once calls of the kind have run; batches and lengths change. `docs/serving.md` says what is allocated."""
    op, make_call, allocations = EAGER[kind]
    calls = [make_call(N, kernel=None if backend == "cute" else f"triton-{op}") for N in (4, 3, 2)]
    with torch.inference_mode():
        for one in calls:
            one()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for one in calls:
                one()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    if backend == "cute":
        taken = after["allocation.all.allocated"] - before["allocation.all.allocated"]
        assert taken <= allocations * len(calls), taken
