"""A sequence that began on a former rank, in the fused prefill for Hopper.

The launch that cuts a sequence into segments (`cute.prefill`), with a first segment of no tokens: all segments are
units, which run once from no state and once from the identity.
"""

import dataclasses
import functools

import torch

from kda_kernels.cute import prefill
from kda_kernels.cute.prefill_config import CHUNK, Part
from kda_kernels.cute.prefill_plan import SCAN, START
from kda_kernels.ints import cdiv
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs
from kda_kernels.triton.carried_states import carry_states, prefixes_of
from kda_kernels.triton.runtime import multiprocessors, on_device
from kda_kernels.triton.segment_outputs import add_segment_outputs
from kda_kernels.triton.segment_scan import Segments

MOST_UNITS = 128


@functools.lru_cache(maxsize=4096)
def units_of(tokens: int, HV: int, sms: int) -> int:
    """Segments of so many tokens that make the time of a part least, as `prefill_plan` counts it."""
    chunks = cdiv(tokens, CHUNK)

    def cost(units: int) -> float:
        return cdiv(2 * HV * units, sms) * (cdiv(chunks, units) + START) + units * SCAN

    return min(range(1, min(chunks, MOST_UNITS) + 1), key=cost)


class HopperCarried:
    """See `kda_kernels.parallel.prefill.Carried`. Memory: 256 bytes per token and head until `finish`."""

    def __init__(self, inputs: Inputs, o: torch.Tensor) -> None:
        """Args: checked inputs of one sequence, dense. Raises: as `cute.prefill.prefill`."""
        self.inputs, self.o = inputs, o
        (_, tokens, HV), K = o.shape[:3], inputs.q.shape[3]
        segment = cdiv(cdiv(tokens, units_of(tokens, HV, multiprocessors(o.device))), CHUNK) * CHUNK
        units = cdiv(tokens, segment)
        size = HV * (K * K * (1 + 3 * units) + K * units * segment // 2)
        workspace = torch.empty(size, dtype=torch.float32, device=o.device)
        self.here = (0, segment, 0, units * segment)
        final = None if inputs.state_indices is None else inputs.state
        self.segments = Segments(workspace, final, inputs.state_indices, None, 1, units, inputs.null_slot, *self.here)
        with stage("segments"):
            self._launch(Part.SPLIT, dataclasses.replace(inputs, checkpoints=None))
        self.prefixes = workspace.new_empty((units + 1, HV, 2 * K, K))
        with stage("prefixes"), on_device(o):
            prefixes_of(self.segments, self.prefixes)
        self.summary = self.prefixes[-1]

    def finish(self, summaries: torch.Tensor, ends: bool) -> None:
        with stage("scan"), on_device(self.o):
            carry_states(self.segments, self.prefixes, summaries, ends)
        with stage("outputs"), on_device(self.o):
            add_segment_outputs(self.segments, self.o)
        if self.inputs.checkpoints is not None:
            with stage("checkpoints"):
                self._launch(Part.KEPT, self.inputs)

    def _launch(self, part: Part, inputs: Inputs) -> None:
        prefill.launch_part(part, inputs, self.o, self.segments.workspace, self.segments.units, self.here)
