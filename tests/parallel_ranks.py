"""`python tests/parallel_ranks.py RESULTS.json`: prefills over ranks, in four processes, each against the fp64 oracle.

Processes of their own, as ranks are; one start of them for all cases and group sizes, as it takes longer than they do.
The group of 4, those of 3 and of 2 first ranks are all in the same four processes. RESULTS holds, by the name of each
check, "" or what was wrong.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from kda_kernels import ranges
from kda_kernels.api import kda_prefill
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.parallel import ContextParallel, convolution_halo
from kdacli.interpreter import quicken
from kdacli.judge.bits import same_bits
from kdacli.parallel.checks import SOFTPLUS, Case, alone, arguments, drop_in, gathered, judged, part_of, prefilled

RANKS = 4
TIMEOUT = 5.0  # seconds that ranks wait for one that has ended


CASES = {
    "one long sequence, 2 ranks": Case((130,), (0, 64, 130)),
    "one long sequence, 3 ranks": Case((100,), (0, 40, 70, 100), SOFTPLUS),
    "one long sequence, 4 ranks": Case((160,), (0, 64, 100, 128, 160), dtype="bfloat16"),
    "cuts inside chunks, grouped value heads": Case((50, 30), (0, 33, 80), HV=2),
    "empty ranks, one of them inside a sequence": Case((70,), (0, 0, 40, 40, 70)),
    "many short sequences": Case((7, 0, 9, 30, 0, 3, 0), (0, 10, 10, 30, 49), SOFTPLUS),
    "cuts between sequences": Case((20, 30), (0, 20, 50)),
    "padding": Case((20, 30, 20), (0, 10, 40, 70), padding=1),
    "checkpoints": Case((192, 30), (0, 64, 192, 222), every=64),
    "checkpoints at offsets, new requests": Case((66, 130), (0, 130, 196), every=-64, fresh=True),
    "head sizes apart": Case((40,), (0, 20, 40), K=32, V=16),
    "heads too large for one call": Case((40,), (0, 20, 40), K=144, V=128),
    "chained, 3 ranks": Case((100,), (0, 40, 70, 100), SOFTPLUS, dtype="bfloat16", chained=True),
    "chained, empty ranks": Case((30, 40), (0, 0, 40, 40, 70), padding=1, chained=True),
    "chained, several sequences a rank": Case((7, 0, 9, 30, 0, 3, 0), (0, 10, 10, 30, 49), chained=True),
    "chained, checkpoints, new requests": Case((66, 130), (0, 130, 196), every=-64, fresh=True, chained=True),
    "more heads": Case((40,), (0, 20, 40), H=2, HV=2),
}


def check_case(case: Case, group) -> str:
    inputs = case.inputs()
    parts = prefilled(case, inputs, group, timeout=20)
    if dist.get_rank(group):  # the first one looks
        return ""
    verdicts, wrong = judged(case, inputs, parts)
    return "; ".join([wrong] * bool(wrong) + [str(verdict) for verdict in verdicts if not verdict.passed])


def all_have_final_states(group) -> str:
    case = Case((30, 20), (0, 20, 50))
    inputs = case.inputs()
    second = prefilled(case, inputs, group)[1].after
    everyone = prefilled(case, inputs, group, final_states="all")
    slots = inputs.state_indices
    same = [torch.equal(part.after[slots], second[slots]) for part in everyone]
    return "" if all(same) else f"final states differ: {same}"


def empty_ranks_change_no_bit(group) -> str:
    """The same parts on more ranks: on 2 of them, and with an empty one between, on 3."""
    few, more = Case((50,), (0, 20, 50)), Case((50,), (0, 20, 20, 50))
    found = []
    for case, ranks in ((few, [0, 1]), (more, [0, 1, 2])):
        inside = dist.get_rank(group) in ranks
        smaller = GROUPS[len(ranks)]
        found.append(prefilled(case, case.inputs(), smaller) if inside else None)
    if found[0] is None or found[1] is None:
        return ""
    a, b = (torch.cat([part.o for part in parts], 1) for parts in found)
    same = same_bits(a, b) and same_bits(found[0][-1].after, found[1][-1].after)
    return "" if same else "bits differ"


def chained_bits_are_those_of_one_rank(group) -> str:
    """Where cuts lie between chunks."""
    case = Case((130,), (0, 64, 130), chained=True)
    inputs = case.inputs()
    parts, whole = prefilled(case, inputs, group), alone(inputs)
    slots = inputs.state_indices
    same = same_bits(torch.cat([part.o for part in parts], 1), whole.o)
    return "" if same and same_bits(parts[1].after[slots], whole.final_state[slots]) else "bits differ"


def fla_context(case: Case, group) -> SimpleNamespace:
    """The fields of `fla.ops.cp.FLACPContext` for equal parts, as its documentation describes them."""
    rank, part = dist.get_rank(group), sum(case.lens) // case.ranks
    begin, at, ends, first, last = rank * part, 0, [0], None, None
    for length in case.lens:
        here = min(at + length, begin + part) - max(at, begin)
        if here > 0:
            ends.append(ends[-1] + here)
            first = at if first is None else first
            last = at + length
        at += length
    return SimpleNamespace(
        group=group, cu_seqlens=torch.tensor(ends, dtype=torch.int32), cu_seqlens_cpu=None,
        pre_num_ranks=rank - first // part, post_num_ranks=(last - 1) // part - rank,
        pre_num_conv_tokens=max(0, begin - first),
    )  # fmt: skip


def fla_drop_in(group) -> str:
    case = Case((20, 5, 65), (0, 30, 60, 90))
    verdicts, state = drop_in(case, fla_context(case, group), group, "cpu")
    chained = ContextParallel.of([0, 20, 25, 90], group, chained=True, cuts=case.cuts)
    verdicts += drop_in(case, chained, group, "cpu")[0]
    return "; ".join([str(v) for v in verdicts if not v.passed] + (["a state"] if state is not None else []))


def halo(group) -> str:
    """The last 3 tokens before a part, of its own sequence, also over parts of 1 and 0 tokens; and through FLA's."""
    rank, x = dist.get_rank(group), torch.arange(1.0, 21.0).view(1, 20, 1).expand(1, 20, 2).bfloat16()
    cuts = (0, 8, 9, 9, 20)
    context = ContextParallel.of([0, 7, 20], group, cuts=cuts)
    found = [convolution_halo(x[:, cuts[rank] : cuts[rank + 1]], context, 4)]
    equal = fla_context(Case((7, 13), (0, 5, 10, 15, 20)), group)
    found.append(convolution_halo(x[0, 5 * rank : 5 * rank + 5], equal, 4))
    wanted = ([[0, 0, 0], [0, 0, 8], [0, 0, 0], [0, 8, 9]], [[0, 0, 0], [3, 4, 5], [8, 9, 10], [13, 14, 15]])
    right = [h[:, 0].tolist() == w[rank] and h.shape == (3, 2) for h, w in zip(found, wanted, strict=True)]
    return "" if all(right) else f"rank {rank}: {[h[:, 0].tolist() for h in found]}"


def chained_halo(group) -> str:
    """The same, of two layers that follow each other: a part of one token hands on what came before it."""
    case, rank = Case((7, 13), (0, 8, 9, 9, 20), chained=True), dist.get_rank(group)
    inputs, mine = case.inputs(), slice(*case.cuts[rank : rank + 2])
    context = ContextParallel.of(inputs.cu_seqlens, group, cuts=case.cuts, chained=True, timeout=120)
    given = arguments(inputs, **part_of(inputs, mine.start, mine.stop))
    wrong = []
    for layer in range(2):
        x = torch.arange(1.0, 21.0).view(20, 1).expand(20, 2).bfloat16() + 32 * layer
        found = convolution_halo(x[mine], context, 4)[:, 0].tolist()
        kda_prefill(**given, group=context)
        wanted = [[0, 0, 0], [0, 0, 8], [0, 0, 0], [0, 8, 9]][rank]
        if found != [token and token + 32 * layer for token in wanted]:
            wrong.append(f"layer {layer}: {found}")
    return "; ".join(wrong)


def refused(call: Callable[[], object], kind: type[Exception], *words: str) -> str:
    start = time.monotonic()
    try:
        call()
    except kind as error:
        late = time.monotonic() - start > 2 * TIMEOUT
        return "after too long" if late else "".join(f"no {w!r} in {error}" for w in words if w not in str(error))
    return "no error"


def another_shape_ends_all(group) -> str:
    case, rank = Case((60,), (0, 30, 60)), dist.get_rank(group)
    inputs = case.inputs()
    context = ContextParallel.of(inputs.cu_seqlens, group, cuts=case.cuts, timeout=TIMEOUT)
    given = arguments(inputs, **part_of(inputs, *case.cuts[rank : rank + 2]))
    if rank == 1:
        given |= {"v": given["v"][..., :8], "state": inputs.state[:, :, :8].contiguous()}
    return refused(lambda: kda_prefill(**given, group=context), InputError, "on rank 1", "the same on all ranks")


def a_wrong_argument_ends_all(group) -> str:
    case, rank = Case((60,), (0, 30, 60)), dist.get_rank(group)
    inputs = case.inputs()
    context = ContextParallel.of(inputs.cu_seqlens, group, cuts=case.cuts, timeout=TIMEOUT)
    given = arguments(inputs, **part_of(inputs, *case.cuts[rank : rank + 2]))
    if rank == 0:
        given["beta"] = given["beta"][:, 1:]
    return refused(lambda: kda_prefill(**given, group=context), InputError, "rank 0 refuses", "beta")


def other_lengths_end_all(group) -> str:
    ends = [0, 60 + dist.get_rank(group)]
    return refused(lambda: ContextParallel.of(ends, group, timeout=TIMEOUT), InputError, "cu_seqlens", "on rank 1")


def a_group_alone(group) -> str:
    """`group` may be a process group: the parts are as long as each rank's tokens."""
    case, rank = Case((60,), (0, 25, 60)), dist.get_rank(group)
    inputs = case.inputs()
    mine = part_of(inputs, *case.cuts[rank : rank + 2])
    o = kda_prefill(**arguments(inputs.fresh(), **mine), cu_seqlens=inputs.cu_seqlens, group=group)
    wanted = kda_prefill(**arguments(inputs.fresh()), cu_seqlens=inputs.cu_seqlens)
    error = (torch.cat(gathered(o, group), 1).float() - wanted.float()).norm() / wanted.float().norm()
    return "" if error < 1e-2 else f"error {error}"


def stages_are_ranges(group) -> str:
    case, opened = Case((40,), (0, 20, 40)), []
    ranges.enable(lambda name: contextlib.nullcontext(opened.append(name)))
    prefilled(case, case.inputs(), group)
    ranges.disable()
    mine = "carried sequence" if dist.get_rank(group) else "begun sequence"
    return "" if {mine, "exchange"} <= set(opened) else f"only {opened}"


def a_dead_rank_ends_all(group) -> str:
    """The last check: rank 3 ends without a word behind a call of all, as the others see in the next and in a new
    context."""
    case, rank = Case((80,), (0, 20, 40, 60, 80)), dist.get_rank(group)
    inputs = case.inputs()
    context = ContextParallel.of(inputs.cu_seqlens, group, cuts=case.cuts, timeout=120)  # ranks come from other checks
    given = arguments(inputs, **part_of(inputs, *case.cuts[rank : rank + 2]))
    kda_prefill(**given, group=context)
    if rank == RANKS - 1:
        os._exit(0)
    wrong = refused(lambda: kda_prefill(**given, group=context), UnavailableError, "another rank failed")
    return wrong or refused(
        lambda: ContextParallel.of([0, 400], group, timeout=TIMEOUT), UnavailableError, "another rank failed"
    )


CHECKS = {
    "all ranks have the final states": (2, all_have_final_states),
    "empty ranks change no bit": (4, empty_ranks_change_no_bit),
    "chained, one rank's bits": (2, chained_bits_are_those_of_one_rank),
    "FLA's context": (3, fla_drop_in),
    "the halo of a convolution": (4, halo),
    "the halo of a convolution, chained": (4, chained_halo),
    "a process group": (2, a_group_alone),
    "stages are ranges of a profiler": (2, stages_are_ranges),
    "another shape on one rank": (2, another_shape_ends_all),
    "a wrong argument on one rank": (2, a_wrong_argument_ends_all),
    "other lengths on one rank": (2, other_lengths_end_all),
    "a rank that ends": (4, a_dead_rank_ends_all),
}
GROUPS: dict[int, dist.ProcessGroup] = {}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    GROUPS.update({ranks: dist.new_group(list(range(ranks))) for ranks in (2, 3, 4)})
    found = {}
    checks = {name: (case.ranks, lambda group, case=case: check_case(case, group)) for name, case in CASES.items()}
    *others, last = (checks | CHECKS).items()
    others.sort(key=lambda check: -check[1][0])  # ranks of small groups wait for nobody
    for name, (ranks, check) in (*others, last):
        if rank < ranks:
            try:
                found[name] = check(GROUPS[ranks])
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
            Path(folder, f"{rank}.json").write_text(json.dumps(found))


def main(results: str) -> None:
    quicken()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=work, args=(rank, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            process.kill()
        wrong: dict[str, str] = {}
        for rank in range(RANKS):
            for name, text in json.loads(Path(folder, f"{rank}.json").read_text()).items():
                wrong[name] = "; ".join(filter(None, (wrong.get(name, ""), text and f"rank {rank}: {text}")))
        Path(results).write_text(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
