"""Prefill over ranks: in processes (`parallel_ranks.py`), and what runs between exchanges by itself."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_prefill
import parallel_ranks as ranks
import pytest
import torch
from decode_inputs import DEVICE

from kda_kernels import checks, registry
from kda_kernels.cute.prefill import carried as prefill_carried
from kda_kernels.cute.prefill.config import Part as LaunchPart
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.parallel import ContextParallel, even_cuts, prefill
from kda_kernels.parallel import context as context_module
from kda_kernels.parallel.balance import balanced_cuts, begun_cost, carried_cost
from kda_kernels.parallel.context import LastCall, part_of_batch
from kda_kernels.problem import Op, Problem
from kda_kernels.triton import segment_outputs
from kda_kernels.triton.carried_states import carry_states, prefixes_of
from kda_kernels.triton.segment_scan import Segments
from kdacli.parallel import profile
from kdacli.parallel import ranks as ranks_of
from kdacli.parallel.checks import SOFTPLUS, Case, Part, judged, part_of
from kdacli.parallel.ranks import start
from kdacli.parallel.timing import Row
from kdacli.presets import PRESETS

K = 128


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    results = tmp_path_factory.mktemp("ranks") / "results.json"
    script = Path(ranks.__file__)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, str(script), str(results)], env=env, check=True, timeout=300)
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", [*ranks.CASES, *ranks.CHECKS])
def test_ranks(found, name):
    assert found[name] == ""


def test_what_a_rank_refuses_it_says_alone(capfd):
    """Not what started it; and the exit code is the rank's."""
    assert start(2, "cpu", ["run", "--nonsense"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("Error: No such option") for line in lines)


def test_ranks_share_gpus_where_they_may(monkeypatch):
    """NCCL, which refuses two ranks of a host on one, then takes each rank for a host."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks_of, "_launched", lambda ranks, words: ranks)
    with pytest.raises(UnavailableError, match="--cp 3 needs as many GPUs: there are 2"):
        start(3, "cuda", [])
    assert start(3, "cuda", [], shared=True) == 3
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("RANK", "7")
    with pytest.raises(UnavailableError, match="rank 2 of this machine needs a GPU of its own"):
        ranks_of._gpu(2, shared=False)
    for local_ranks, host in (("3", "rank 7"), ("2", None)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
        monkeypatch.delenv("NCCL_HOSTID", raising=False)
        assert ranks_of._gpu(2, shared=True) == 0
        assert os.environ.pop("NCCL_HOSTID", None) == host


def test_parts_are_even_in_chunks():
    assert even_cuts(1000, 3) == (0, 320, 640, 1000)
    assert even_cuts(50, 4) == (0, 0, 0, 0, 50)
    assert even_cuts(0, 2) == (0, 0, 0)


# on a GPU the prefixes of more heads are in programs of more rows; the interpreter has those of more rows anyway
@pytest.mark.parametrize("HV", [1] if DEVICE == "cpu" else [1, 12])
def test_states_between_ranks(HV):
    """Prefixes, chain and states before units, against products in fp64."""
    units, former = 3, 2
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    E, T = normal(units, HV, K, K), normal(units, HV, K, K) / K**0.5
    summaries = torch.cat((normal(former, HV, K, K), normal(former, HV, K, K) / K**0.5), 2)
    upper = T.bfloat16()
    both = torch.stack((upper, (T - upper).bfloat16()), 2).view(torch.float32).view(units, HV, K, K)
    workspace = torch.full(((1 + 3 * units) * HV * K * K,), float("nan"))
    workspace[(1 + units) * HV * K * K :] = torch.stack((E, both), 1).flatten()
    pool, slot = torch.full((3, HV, K, K), float("nan")), torch.tensor([1], dtype=torch.int32)
    given = [x.to(DEVICE) for x in (workspace, pool, slot, summaries)]
    segments = Segments(*given[:3], None, 1, units, None, 0, 64, 0, 64 * units)
    prefixes = torch.empty(units + 1, HV, 2 * K, K, device=DEVICE)
    prefixes_of(segments, prefixes)
    carry_states(segments, prefixes, given[3], True)
    states = [summaries[0, :, :K].double() @ summaries[1, :, K:].double() + summaries[1, :, :K].double()]
    for end, transition in zip(E.double(), T.double(), strict=True):
        states.append(states[-1] @ transition + end)
    starts = segments.workspace[HV * K * K : (1 + units) * HV * K * K].view(units, HV, K, K)
    for made, exact in zip((*starts, given[1][1]), states, strict=True):
        assert ((made.double().cpu() - exact).norm() / exact.norm()).item() < 2**-14
    assert given[1][[0, 2]].isnan().all()


def alone(cuts: tuple[int, ...], ends: list[int], rank: int) -> ContextParallel:
    """A rank's view of a group that there is not."""
    return ContextParallel(None, rank, len(cuts) - 1, **part_of_batch(tuple(ends), cuts, rank))


def one_after_another(case: Case, inputs) -> list[Part]:
    """All ranks of a case in this process; chained, each ends before the next begins."""
    calls, parts, sent = [], [], []
    for rank in range(case.ranks):
        local = inputs.fresh()
        context = case.context(rank)
        tokens = part_of(inputs, *case.cuts[rank : rank + 2])
        mine = dataclasses.replace(local, **tokens)
        o = torch.full_like(mine.v, float("nan"))
        on_hopper = prefill._on_hopper(prefill._local(mine, context), o, None)
        calls.append(prefill.Call(mine, context, o, None, LastCall(None, on_hopper)))
        kept = None if local.checkpoints is None else local.checkpoints.states
        parts.append(Part(o, inputs.state, local.state, kept))
    if case.chained:
        with (
            mock.patch.object(context_module, "start_send", lambda state, *to: sent.append(state.clone())),
            mock.patch.object(prefill, "start_receive", lambda state, *of: state.copy_(sent.pop(0))),
            mock.patch.object(context_module, "wait"),
            mock.patch.object(prefill, "wait"),
        ):
            for call in calls:
                call.run_chained()
    else:
        summaries = [call.start() for call in calls]
        for call in calls:
            call.run_others()
            call.finish(torch.stack(summaries))
    return [Part(*(None if x is None else x.cpu() for x in vars(part).values())) for part in parts]


@pytest.fixture
def on_hopper(monkeypatch):
    """A stand-in for what the compiler makes."""
    if torch.cuda.is_available():
        pytest.skip("stand-ins are for machines without a GPU")
    fake_prefill.install(monkeypatch)
    monkeypatch.setattr(registry, "_runs_on", lambda kernel, device: True)
    monkeypatch.setattr(prefill_carried, "on_device", lambda tensor: contextlib.nullcontext())
    for module in (prefill, prefill_carried):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(segment_outputs, "BT", 128)  # the interpreter takes as long for a small program


def test_the_host_half_for_hopper(on_hopper):
    """Of a first part of a single chunk, and of several."""
    case = Case((70, 150), (0, 20, 120, 220), K=128, V=128, dtype="bfloat16")
    inputs = case.inputs()
    on_gpu = dataclasses.replace(inputs, q=inputs.q.as_subclass(fake_prefill.OnGpu))
    parts = [dataclasses.replace(x, o=x.o.as_subclass(torch.Tensor)) for x in one_after_another(case, on_gpu)]
    verdicts, wrong = judged(case, inputs, parts)
    assert not wrong
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_like_the_last_is_not_checked_again(monkeypatch, on_hopper, rank):
    """It takes what the last one found, and makes of its own tensors what a first call makes; another dtype is seen."""
    case = Case((100,), (0, 40, 100), K=K, V=K)
    summary = torch.randn((2, 1, 2 * K, K), generator=torch.Generator().manual_seed(0)) / K
    monkeypatch.setattr(checks, "CHECK_VALUES", "0")
    monkeypatch.setattr(context_module, "agree", lambda *said: [])
    monkeypatch.setattr(prefill, "start_gather", lambda everyone, mine, group: everyone.copy_(summary))
    monkeypatch.setattr(prefill, "wait", lambda work: None)
    checked = mock.Mock(wraps=prefill._checked)
    monkeypatch.setattr(prefill, "_checked", checked)
    inputs = case.inputs()
    again = alone(case.cuts, [0, 100], rank)

    def run(context: ContextParallel, **changes: torch.Tensor) -> torch.Tensor:
        tokens = part_of(dataclasses.replace(inputs, **changes), *case.cuts[rank : rank + 2])
        mine = dataclasses.replace(inputs.fresh(), **tokens)
        mine.q = mine.q.as_subclass(fake_prefill.OnGpu)
        return prefill.prefill(mine, context).as_subclass(torch.Tensor)

    for changes, is_checked in (({}, True), ({"v": -inputs.v}, False), ({"beta": inputs.beta.float()}, True)):
        checked.reset_mock()
        made = run(again, **changes)
        assert checked.called == is_checked
        assert torch.equal(made, run(alone(case.cuts, [0, 100], rank), **changes))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case((3000,), (0, 1000, 1801, 3000)),
        Case((3000,), (0, 1000, 1801, 3000), SOFTPLUS, dtype="bfloat16"),
        Case((700, 1300, 400), (0, 500, 500, 1600, 2400), padding=1),
        Case((1024, 300), (0, 512, 1324), every=64),
        Case((300,), (0, 20, 300), fresh=True),
        Case((600,), (0, 333, 600), H=96, HV=96),
        Case((900,), (0, 400, 900), activations="float16"),
        Case((3000,), (0, 1000, 1801, 3000), dtype="bfloat16", chained=True),
        Case((700, 1324, 400), (0, 512, 512, 1212, 2424), padding=1, every=-64, fresh=True, chained=True),
    ],
    ids=[
        *("safe", "softplus, bf16", "padding, an empty rank", "checkpoints", "less than a chunk", "many heads", "fp16"),
        *("chained, bf16", "chained, padding, checkpoints, an empty rank"),
    ],
)
def test_on_a_gpu(case):
    few = {} if case.HV > 1 else {"H": 2, "HV": 4}
    case = dataclasses.replace(case, K=128, V=128, **few)
    inputs = case.inputs("cuda")
    verdicts, wrong = judged(case, inputs, one_after_another(case, inputs))
    assert not wrong
    assert all(v.passed for v in verdicts), verdicts
    assert len(verdicts) == 2 + (case.every is not None)


def test_the_table_counts_all_layers(capsys):
    """Chained, the last rank ends a call later; and it is not wider than a terminal."""
    one, two = (
        Row("ours", 1 << 20, 12, n, (1,) * n, 20000 / n, 19000 / n, 21000 / n, 9, 16000 / n, 90.0, 14.0, 3 << 20)
        for n in (1, 2)
    )
    problem = Problem(Op.PREFILL, (1 << 20,), H=12, HV=12)
    one = dataclasses.replace(one, exchange_us=None)
    chained = dataclasses.replace(one, kernel="ours, chained", ranks=2, late=1, ahead_us=8000.0)
    profile._print(problem, "init", [one, two, chained], ["fla: no"], "kimi-k3", False)
    said = capsys.readouterr().out.splitlines()
    assert f"{PRESETS['kimi-k3'].kda_layers} KDA layers of kimi-k3" in said[0]
    assert said[5].split() == ["ours", "2", "10000", "10.0%", "2.00x", "8000", "2.00x", "552.0"]
    assert said[6].split() == ["ours,", "chained", "2", "20000", "10.0%", "1.00x", "8000", "2.00x", "560.0"]
    assert "3.15 MB takes 90.0 us alone" in said[-2] and said[-1] == "not timed: fla: no"
    assert max(map(len, said[:7])) <= 80


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
def test_what_ranks_launch_is_foreseen():
    """All kinds of it, in a process that compiles."""
    script = """
from kdacli.compile import arch, worker
worker.start(None, arch.ARCHS["sm_90a"])
from kdacli.parallel.rehearsal import Rehearsal
print(*(variant.name for variant in Rehearsal(2).variants(arch.ARCHS["sm_90a"])), sep="\\n")
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()
    assert len(set(names)) == len(names)
    assert {"prefixes", "chain", "apply", "segment_scan", "segment_outputs"} <= set(names)
    parts = {part for name in names for part in re.findall(r"part=<Part.(\w+)", name)}
    assert parts == {part.name for part in LaunchPart} - {"SUMMARY", "STAYING"}


def test_a_wrong_context_is_refused():
    context = alone((0, 60, 80), [0, 80], 1)
    inputs = Case((80,), (0, 60, 80), every=64).inputs()
    with pytest.raises(InputError, match=r"q has shape \[1, 80, 1, 16\]: it should be \[1, 20, H, K\]"):
        prefill._local(inputs, context)
    with pytest.raises(InputError, match="60 tokens of a sequence on former ranks: it should be a multiple of 64"):
        prefill._local(dataclasses.replace(inputs, **part_of(inputs, 60, 80)), context)
    zigzag = SimpleNamespace(group=object(), cu_seqlens=torch.tensor([0, 80]), layout="zigzag")
    with pytest.raises(InputError, match="cp_context has layout 'zigzag': only 'contiguous' is supported"):
        ContextParallel.of_fla(zigzag)


def test_balanced_parts_are_of_chunks_and_take_equally_long():
    for tokens, parts, heads in ((1 << 20, 2, 12), (1 << 20, 4, 12), (100_000, 3, 96), (50, 2, 1)):
        cuts = balanced_cuts(tokens, parts, heads, 132)
        assert (cuts[0], cuts[-1], len(cuts)) == (0, tokens, parts + 1)
        assert list(cuts) == sorted(cuts) and all(cut % 64 == 0 for cut in cuts[:-1])
    cuts = balanced_cuts(1 << 20, 2, 12, 132)
    first, second = begun_cost(cuts[1], 12, 132), carried_cost(cuts[2] - cuts[1], 12, 132)
    assert abs(first - second) < 0.02 * second
