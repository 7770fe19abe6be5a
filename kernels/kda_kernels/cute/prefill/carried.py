"""Sequences that are cut between ranks, in the fused prefill for Hopper.

Both are the launch that cuts a sequence into segments (`prefill/host.py`). Where it began on a former rank its first
segment has no tokens: all are units, which run once from no state and once from the identity.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.cute.prefill import host
from kda_kernels.cute.prefill.config import CHUNK, Part
from kda_kernels.cute.prefill.plan import CARRIED_SCAN, CARRIED_START, plan
from kda_kernels.ints import cdiv
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs
from kda_kernels.triton.carried_states import carry_states, prefixes_of
from kda_kernels.triton.runtime import multiprocessors, on_device
from kda_kernels.triton.segment_outputs import add_segment_outputs
from kda_kernels.triton.segment_scan import Segments, scan_segments

MOST_UNITS = 128
Functions = dict[Part, Callable[..., Any]]  # compiled, of one kind of call


@functools.lru_cache(maxsize=4096)
def units_of(tokens: int, HV: int, sms: int) -> int:
    """Segments of so many tokens that make the time of a part least, as `plan` counts it."""
    chunks = cdiv(tokens, CHUNK)

    def cost(units: int) -> float:
        return cdiv(2 * HV * units, sms) * (cdiv(chunks, units) + CARRIED_START) + units * CARRIED_SCAN

    return min(range(1, min(chunks, MOST_UNITS) + 1), key=cost)


def begun_split(tokens: int, HV: int, sms: int) -> tuple[int, int] | None:
    """Tokens of the first and of other segments of a sequence that begins here; None: it is a single chunk.

    As `plan` cuts it, but in one round, so that its final state is known before anything is added to outputs. What
    `plan` leaves whole is cut before its last chunk: then its state comes in fp32 from the scan, as that of others.
    """
    last = (cdiv(tokens, CHUNK) - 1) * CHUNK
    if not last:  # of a pool, a first segment without tokens hands no state on
        return None
    split = plan(1, tokens, HV, sms).split
    if split is None:
        return last, CHUNK
    rounds = split.rounds(1, tokens, False)
    return min(split.lead * rounds, last), split.segment * rounds


class _Cut:
    """The segments of one sequence, dense. Memory: 256 bytes per token and head of units, until outputs are whole."""

    def __init__(self, inputs: Inputs, o: torch.Tensor, lead: int, segment: int, functions: Functions) -> None:
        """Runs them. Raises: as `prefill.host.prefill`."""
        self.inputs, self.o, self.functions = inputs, o, functions
        (_, tokens, HV), K = o.shape[:3], inputs.q.shape[3]
        units = cdiv(max(0, tokens - lead), segment)
        size = HV * (K * K * (1 + 3 * units) + K * units * segment // 2)
        workspace = torch.empty(size, dtype=torch.float32, device=o.device)
        self.here = (lead, segment, 0, lead + units * segment)
        indices = inputs.state_indices
        pool = None if indices is None else inputs.state
        self.segments = Segments(workspace, pool, indices, None, 1, units, inputs.null_slot, *self.here)
        with stage("segments"):  # a first segment makes its checkpoints here, units when states before them are known
            later = not lead and inputs.checkpoints is not None
            self._launch(Part.CUT, inputs.changed(checkpoints=None) if later else inputs)

    def complete(self) -> None:
        """Outputs and checkpoints, once the states before units are there."""
        with stage("outputs"), on_device(self.o):
            add_segment_outputs(self.segments, self.o)
        if self.inputs.checkpoints is not None:
            with stage("checkpoints"):
                self._launch(Part.KEPT, self.inputs)

    def _launch(self, part: Part, inputs: Inputs) -> None:
        if (function := self.functions.get(part)) is None:
            function = self.functions[part] = host.function_of(part, inputs)
        host.launch_part(function, inputs, self.o, self.segments.workspace, self.segments.units, self.here)


class HopperBegun(_Cut):
    """See `kda_kernels.parallel.prefill.Begun`."""

    def __init__(self, inputs: Inputs, o: torch.Tensor, split: tuple[int, int], functions: Functions) -> None:
        """Args: checked inputs of one sequence, dense, whose pool is read, and not written; `begun_split` of it; the
        functions of calls like this one, which are added."""
        (_, tokens, HV), K = o.shape[:3], inputs.q.shape[3]
        super().__init__(inputs, o, *split, functions)
        end = torch.empty((1, HV, K, K), dtype=torch.float32, device=o.device)
        segments = Segments(self.segments.workspace, end, None, None, 1, self.segments.units, None, *self.here)
        with stage("scan"), on_device(o):
            scan_segments(segments, tokens, HV)
        self.summary = end.new_empty((HV, 2 * K, K))
        self.summary[:, :K] = end[0]

    def finish(self) -> None:
        self.complete()


class HopperCarried(_Cut):
    """See `kda_kernels.parallel.prefill.Carried`."""

    def __init__(self, inputs: Inputs, o: torch.Tensor, functions: Functions) -> None:
        """Args: checked inputs of one sequence, dense; the functions of calls like this one, which are added."""
        tokens, HV, K = o.shape[1], o.shape[2], inputs.q.shape[3]
        segment = cdiv(cdiv(tokens, units_of(tokens, HV, multiprocessors(o.device))), CHUNK) * CHUNK
        super().__init__(inputs, o, 0, segment, functions)
        prefixes = torch.empty((self.segments.units + 1, HV, 2 * K, K), dtype=torch.float32, device=o.device)
        with stage("prefixes"), on_device(o):
            prefixes_of(self.segments, prefixes)
        self.prefixes, self.summary = prefixes, prefixes[-1]

    def finish(self, summaries: torch.Tensor, ends: bool) -> None:
        with stage("scan"), on_device(self.o):
            carry_states(self.segments, self.prefixes, summaries, ends)
        self.complete()
