"""The fused prefill in CuTe DSL, for Hopper. Host half; `prefill_kernel` is the device half.

One CTA runs a value head of a sequence: chunk-local work and the chain over chunks meet in shared memory, and nothing
goes through a workspace. Where there are too few of them, `prefill_plan` cuts sequences into segments: one launch runs
all of them, a scan (Triton's) makes the states between them, and what these add to the output comes in the end. They
stay whole where the states at the start of every 64 tokens are asked for.

What it takes is in `CONTRACT` and `unsupported_tensors`; the rest is Triton's: gates without a bound of -5 or more
(softplus), fp16 and fp32 activations, sizes other than 128, K-first states.

Floor: q, k, v, g, beta and o moved once, 1.28 KB a token and value head: T=8192, H=96: 1.0 GB, 340 us at 3.0 TB/s.

Range: keys are multiplied by decays of up to exp(80) before products take them, and their norms divided out after
that. So |k| must stay under 3.4e38 / exp(80) = 6e3, whether L2 norms are made here or k comes normalised.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.contract import Contract
from kda_kernels.cute.cache import CACHE
from kda_kernels.cute.prefill_config import THREADS, Part, PrefillSpec
from kda_kernels.cute.prefill_plan import Split, plan
from kda_kernels.cute.runtime import architecture
from kda_kernels.cute.runtime import unsupported_here as no_cute_here
from kda_kernels.cute.variant import CuteVariant
from kda_kernels.dtypes import name_of
from kda_kernels.errors import InputError, UnavailableError, one_line
from kda_kernels.problem import CHUNK as PAIR
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.runtime import multiprocessors, on_device
from kda_kernels.variant import H100, Gpu, Variant

ARCH = "sm_90a"  # wgmma is no other's
LEAST_BOUND = SAFE_BOUND  # 16 tokens of it are exp(80): see `prefill_kernel`


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bounded(Contract):
    """A contract whose `least_bound` is also what activated gates must promise."""

    def _options(self, problem: Problem) -> Iterator[str]:
        yield from super()._options(problem)
        gate, bound = problem.options.gate, problem.options.lower_bound
        if gate is Gate.NONE and (bound is None or bound < self.least_bound):
            promised = "no bound" if bound is None else f"the bound {bound}"
            yield f"activated gates have {promised}: it takes {self.least_bound} or more"


CONTRACT = _Bounded(
    dtypes=("bfloat16",),
    g_dtypes=("bfloat16", "float32"),
    beta_dtypes=("bfloat16", "float32"),
    param_dtypes=("float32", "bfloat16"),
    square=True,
    gates=(Gate.SAFE, Gate.NONE),
    least_bound=LEAST_BOUND,
    beta_values=True,
    neg_eigval=True,
    l2norm=(True, False),
    padding=True,
    aligned=("q", "k", "v", "g", "state"),
)


def prefill(
    inputs: Inputs, out: torch.Tensor | None = None, *, return_intermediate_states: bool = False
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """Runs a checked problem.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first. q, k, v and g may have any strides that are
            multiples of 16 bytes, with a contiguous last dimension; nothing is copied. A pool is updated in place, and
            only in the slots of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, with strides as v; made here if not given.
        return_intermediate_states: also return the state at the start of every 64 tokens, [B, NT, HV, K, V] in the
            dtype of k (NT over all sequences of a packed batch; this reads cu_seqlens on the host). Sequences are not
            split then. Nothing is written for padding.

    Returns:
        Outputs, with the pool itself as final_state when there is one. Products take bf16, sums and the state between
        chunks are fp32; the state is rounded to its own dtype once, after the last token.

    Raises:
        InputError: this kernel does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
    ht = inputs.new_final_state() if inputs.state_indices is None and inputs.output_final_state else None
    h = _room_for_states(inputs) if return_intermediate_states else None
    launch(inputs, o, ht, h)
    final = ht if inputs.state_indices is None else inputs.state
    outputs = Outputs(o, final if inputs.output_final_state else None)
    if h is None:
        return outputs
    from kda_kernels.triton.chunk_indices import in_order

    return outputs, in_order(h, inputs.cu_seqlens, inputs.q.shape[0])


def _room_for_states(inputs: Inputs) -> torch.Tensor:
    """[slots, HV, K, V]: see `chunk_indices.max_chunks`."""
    from kda_kernels.triton.chunk_indices import max_chunks

    (B, T, _, K), (HV, V) = inputs.q.shape, inputs.v.shape[2:]
    slots = B * -(-T // PAIR) if inputs.cu_seqlens is None else max_chunks(T, inputs.N)
    return torch.empty((slots, HV, K, V), dtype=inputs.k.dtype, device=inputs.k.device)


def launch(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None = None, h: torch.Tensor | None = None) -> None:
    """`prefill` into tensors that are there already: `o`, `ht` where there is no pool, and `h` in its slots.

    Allocates `workspace_bytes`: nothing, unless sequences are split.
    """
    if (reason := unsupported_tensors(inputs, o)) is not None:
        raise InputError(f"cute-prefill: {reason}")
    B, T = inputs.q.shape[:2]
    if not B * T:  # no token in the whole batch
        if ht is not None:
            ht.zero_() if inputs.state is None else ht.copy_(inputs.state)
        return
    split = _split(inputs.N, B * T, inputs.v.shape[2], multiprocessors(inputs.q.device))
    if split is not None and h is None:
        _launch_split(split, inputs, o, ht)
        return
    with stage("prefill"):
        _call(Part.WHOLE, inputs, o, inputs.state, ht, h=h)


def _launch_split(split: Split, inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None) -> None:
    from kda_kernels.triton.segment_outputs import add_segment_outputs
    from kda_kernels.triton.segment_scan import scan_segments

    (B, T, HV, V), K, N = inputs.v.shape, inputs.q.shape[3], inputs.N
    indices, offsets = inputs.state_indices, inputs.cu_seqlens
    summaries, starts, reads = (
        torch.empty(shape, dtype=dtype, device=inputs.q.device)
        for shape, dtype in _workspaces(split, N, B * T, HV, V, K, offsets is not None)
    )
    final = ht if indices is None else inputs.state
    for i in range(split.rounds(N, B * T, offsets is not None)):
        here = (split.lead, split.segment, i * split.limit, split.limit)
        with stage("segments"):
            _call(Part.SPLIT, inputs, o, inputs.state, ht, summaries, starts, reads, *here)
        with stage("scan"), on_device(inputs.q):
            scan_segments(summaries, starts, final, indices, offsets, N, T, *here)
        with stage("outputs"), on_device(inputs.q):
            add_segment_outputs(reads, starts, o, indices, offsets, N, *here)


def summaries(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of checked tensors: see `kda_kernels.segments.kda_segment_summary`; q is not looked at.

    Raises:
        InputError, UnavailableError: as `prefill`.
    """
    if (reason := unsupported_tensors(inputs)) is not None:
        raise InputError(f"cute-prefill: {reason}")
    v, N = inputs.v, inputs.N
    both = torch.empty((2 * N, v.shape[2], v.shape[3], inputs.q.shape[3]), dtype=torch.float32, device=v.device)
    if not v.shape[0] * v.shape[1]:
        both.view(N, 2, *both.shape[1:]).copy_(torch.stack((torch.zeros_like(both[0]), _identity(both[0]))))
    else:
        with stage("summaries"):
            _call(Part.SUMMARY, inputs, v, None, None, both)
    return both[0::2], both[1::2]


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def workspace_bytes(N: int, T: int, HV: int, packed: bool = True, sms: int = H100.sms) -> int:
    """What a launch allocates for `N` sequences of `T` tokens together on a GPU of so many multiprocessors."""
    split = _split(N, T, HV, sms)
    if split is None:
        return 0
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in _workspaces(split, N, T, HV, 128, 128, packed))


def _split(N: int, T: int, HV: int, sms: int) -> Split | None:
    """How sequences are cut; None: they stay whole."""
    return plan(N, T, HV, sms).split


def _workspaces(
    split: Split, N: int, T: int, HV: int, V: int, K: int, packed: bool
) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of summaries, starts and reads: see `PrefillKernel.__call__`."""
    units = split.units(N, T, packed)
    yield (2 * units, HV, V, K), torch.float32
    yield (N + units, HV, V, K), torch.float32
    yield (units * split.segment, HV, K), torch.bfloat16


def _call(
    part: Part,
    inputs: Inputs,
    o: torch.Tensor,
    h0: torch.Tensor | None,
    ht: torch.Tensor | None,
    summaries: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    reads: torch.Tensor | None = None,
    lead: int = 0,
    segment: int = 0,
    begin: int = 0,
    limit: int = 0,
    h: torch.Tensor | None = None,
) -> None:
    """One launch; the arguments are those of `PrefillKernel.__call__`."""
    q, options = inputs.q, inputs.options
    arguments = (
        q, inputs.k, inputs.v, inputs.g, inputs.beta, _flat(inputs.A_log), _flat(inputs.dt_bias), o, h0, ht,
        inputs.state_indices, inputs.cu_seqlens, summaries, starts, reads, h,
        options.scale_for(q.shape[3]), options.lower_bound or 0.0,
        lead, segment, begin, limit,
    )  # fmt: skip
    function = _function(part, inputs, h0, ht, h is not None)
    try:
        function(*arguments)
    except (TypeError, ValueError) as error:  # nothing was launched
        raise InputError(f"cute-prefill: {one_line(str(error))}") from None


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.view(-1)


def _function(
    part: Part, inputs: Inputs, h0: torch.Tensor | None, ht: torch.Tensor | None, boundaries: bool = False
) -> Callable[..., Any]:
    """The compiled function for these tensors."""
    q, options = inputs.q, inputs.options
    parts = (
        q, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias, h0, ht, inputs.state_indices, inputs.cu_seqlens,
    )  # fmt: skip
    dtypes = tuple(None if x is None else x.dtype for x in parts)
    flags = options.gate, options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm
    key = ("prefill", part, boundaries, flags, q.shape[2], inputs.v.shape[2], q.device, dtypes)
    if (function := CACHE.get(key)) is not None:
        return function
    if not q.is_cuda:
        raise UnavailableError(f"cute-prefill: {unsupported_here() or 'the tensors lie on the CPU'}")
    if (reason := unsupported_here(q.device)) is not None:
        raise UnavailableError(f"cute-prefill: {reason}")
    spec, arch = spec_of(part, inputs, h0, ht, boundaries), architecture(q.device)
    return CACHE.make(key, label(spec, arch), lambda: build(spec, arch))


def spec_of(
    part: Part, inputs: Inputs, h0: torch.Tensor | None, ht: torch.Tensor | None, boundaries: bool = False
) -> PrefillSpec:
    """What the kernel has to be compiled for."""

    def name(x: torch.Tensor | None) -> str | None:
        return None if x is None else name_of(x.dtype)

    options = inputs.options
    return PrefillSpec(
        H=inputs.q.shape[2], HV=inputs.v.shape[2], gate=options.gate, beta_is_logit=options.beta_is_logit,
        allow_neg_eigval=options.allow_neg_eigval, qk_l2norm=options.qk_l2norm, dtype=name(inputs.q),
        g=name(inputs.g), beta=name(inputs.beta), A_log=name(inputs.A_log), dt_bias=name(inputs.dt_bias),
        h0=name(h0), ht=name(ht), index=name(inputs.state_indices), offsets=name(inputs.cu_seqlens), part=part,
        boundaries=boundaries, each_arrives=_sanitized(),
    )  # fmt: skip


def _sanitized() -> bool:
    """Whether compute-sanitizer looks on; slower, and the same results."""
    return os.environ.get("KDA_SANITIZE") == "1"


def label(spec: PrefillSpec, arch: str) -> str:
    return f"prefill {arch} {spec}"


def build(spec: PrefillSpec, arch: str, options: str = "") -> Any:
    """Compiles; needs the DSL, and no GPU. See `prefill_build.compile_prefill`."""
    from kda_kernels.cute.prefill_build import compile_prefill

    return compile_prefill(spec, arch, options)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and (reason := CONTRACT.refusal(problem)) is not None:
        return reason
    return unsupported_here()


def unsupported_here(device: torch.device | None = None) -> str | None:
    """Why this machine's current GPU, or `device`, cannot run it; None if it can."""
    if (reason := no_cute_here(device)) is not None:
        return reason
    if (have := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"the GPU is sm_{have[0]}{have[1]}: this kernel is for {ARCH} only"
    return None


def unsupported_tensors(inputs: Inputs, out: torch.Tensor | None = None) -> str | None:
    """Why this kernel cannot run these checked tensors, on whatever machine; None if it can."""
    q, v, state = inputs.q, inputs.v, inputs.state
    has_state = state is not None or inputs.output_final_state
    reason = _unsupported_kind(
        inputs.options, q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.dtype, inputs.g.dtype, inputs.beta.dtype,
        tuple(x.dtype for x in (inputs.A_log, inputs.dt_bias) if x is not None),
        torch.float32 if state is None else state.dtype, has_state, inputs.state_v_first,
    )  # fmt: skip
    if reason is not None:
        return reason
    if lacking := inputs.features() - CONTRACT.features:
        return f"it does not support {min(lacking)}"
    for name, x in (("q", q), ("k", inputs.k), ("v", v), ("g", inputs.g), ("out", out)):
        if x is not None and not _by_tma(x):
            return (
                f"{name} has strides {list(x.stride())} and begins {x.data_ptr() % 16} bytes behind a multiple of 16: "
                "all but the last stride should be multiples of 16 bytes, as the beginning, and none 0"
            )
    if state is not None and (state.data_ptr() % 16 or state.stride(0) * state.element_size() % 16):
        return "a slot of the state is not 16-byte aligned"
    return None


@functools.lru_cache(maxsize=256)
def _unsupported_kind(
    options: Options,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    g: torch.dtype,
    beta: torch.dtype,
    params: tuple[torch.dtype, ...],
    state: torch.dtype,
    has_state: bool,
    v_first: bool,
) -> str | None:
    """What `CONTRACT` says of such tensors."""
    for param in params or (torch.float32,):
        problem = Problem(
            Op.PREFILL, (1,), H=H, HV=HV, K=K, V=V, dtype=name_of(dtype), g_dtype=name_of(g), beta_dtype=name_of(beta),
            param_dtype=name_of(param), state_dtype=name_of(state), initial_state=has_state, final_state=has_state,
            state_v_first=v_first, options=options,
        )  # fmt: skip
        if (reason := CONTRACT.refusal(problem)) is not None:
            return reason
    return None


def _by_tma(x: torch.Tensor) -> bool:
    """Whether tiles of it can be moved by TMA, and rows of it 16 bytes at a time."""
    step = 16 // x.element_size()
    b, t, h, _ = x.stride()
    return not x.numel() or not (b % step or t % step or h % step or x.data_ptr() % 16) and b * t * h != 0


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place.

    With KDA_CHECK_VALUES=1 in the environment what cu_seqlens and state_indices hold is checked, too.
    """
    check_inputs(inputs)
    return prefill(inputs)


_SAFE = Options(gate=Gate.SAFE, lower_bound=LEAST_BOUND)
_POOL = Problem(Op.PREFILL, (2048,) * 8, H=32, HV=32, pool_slots=16, options=_SAFE)
_GIVEN = dataclasses.replace(_SAFE, gate=Gate.NONE)
# What `kda compile` builds where nothing is said: packed on a pool, dense with a state that comes and goes, gates that
# come activated, in fp32; and 12 heads of one sequence, which is split.
USUAL = {
    "safe": _POOL,
    "safe dense": dataclasses.replace(_POOL, packed=False, pool_slots=None),
    "activated": dataclasses.replace(_POOL, g_dtype="float32", options=_GIVEN),
    "safe split": dataclasses.replace(_POOL, seq_lens=(8192,), H=12, HV=12),
}


def variants(problem: Problem | None = None, gpu: Gpu = H100) -> Iterator[Variant]:
    """What `kda compile` builds of CuTe's kernels: as a launch for `problem`, or those of `USUAL`, specialises them."""
    problems = USUAL if problem is None else {str(problem.options.gate): problem}
    for name, one in problems.items():
        part = Part.WHOLE if _split(one.N, one.T, one.HV, gpu.sms) is None else Part.SPLIT
        yield _variant(name, _problem_spec(one, part))


def _variant(name: str, spec: PrefillSpec) -> CuteVariant:
    return CuteVariant(
        name,
        lambda arch, options: build(spec, arch, options),
        lambda arch: label(spec, arch),
        num_warps=THREADS // 32,
        shared_bytes=None,
        only=ARCH,
    )


def _problem_spec(problem: Problem, part: Part) -> PrefillSpec:
    """As `spec_of`, from a problem alone: int32 indices, parameters of one dtype."""
    options = problem.options
    params = None if options.gate is Gate.NONE else problem.param_dtype
    pooled = problem.pool_slots is not None
    state = problem.state_dtype if pooled or problem.initial_state else None
    h0, ht = state, None if pooled or not problem.final_state else state or "float32"
    return PrefillSpec(
        H=problem.H, HV=problem.HV, gate=options.gate, beta_is_logit=options.beta_is_logit,
        allow_neg_eigval=options.allow_neg_eigval, qk_l2norm=options.qk_l2norm, dtype=problem.dtype,
        g=problem.g_dtype, beta=problem.beta_dtype, A_log=params, dt_bias=params, h0=h0, ht=ht,
        index="int32" if pooled else None, offsets="int32" if problem.packed else None, part=part,
        each_arrives=_sanitized(),
    )  # fmt: skip
