"""One call seen by the reference implementations: tokens in rows with the activations applied, and states in and out.

Dense and packed batches, grouped value heads, pools and plain states, V-first and K-first all end here, so that the
recurrence and the chunk form know one layout only.
"""

import dataclasses
from itertools import accumulate

import torch

from kda_kernels.checks import check_inputs, loaded_slots, seq_lens
from kda_kernels.reference.fused import convolved
from kda_kernels.reference.gate import beta_values, l2norm, log_decay
from kda_kernels.reference.stored import Stored
from kda_kernels.tensors import Dims, Inputs


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Which sequence it is, its first row, its number of tokens, and where in the state or pool its state is."""

    number: int
    start: int
    length: int
    slot: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """The call with every activation applied, in one dtype; R = B * T rows, of which sequences are consecutive pieces.

    Attributes:
        q, k: [R, HV, K], convolved and normalised if asked, q scaled, heads repeated for grouped value heads.
        v: [R, HV, V], convolved if asked. g: log decays [R, HV, K]. beta: [R, HV].
        sequences: those that have tokens and are not padding, the longest first.
    """

    dims: Dims
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    sequences: list[Sequence]

    def index(self, numbers: list[int]) -> torch.Tensor:
        """`numbers` as an index tensor on the device of the batch."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.q.device)


def prepare(inputs: Inputs, dtype: torch.dtype) -> Batch:
    """Applies the activations of `inputs` in `dtype`. Raises `InputError` (see `check_inputs`)."""
    dims = check_inputs(inputs, values=True)
    options, rows, group = inputs.options, dims.B * dims.T, dims.HV // dims.H
    norm = l2norm if options.qk_l2norm else torch.Tensor.to
    q, k, v = convolved(inputs, dims, dtype)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(rows, dims.H, dims.K).repeat_interleave(group, dim=1)

    return Batch(
        dims=dims,
        q=heads(norm(q, dtype) * inputs.scale),
        k=heads(norm(k, dtype)),
        v=v.to(dtype).reshape(rows, dims.HV, dims.V),
        g=log_decay(inputs.g, inputs.A_log, inputs.dt_bias, options, dtype).reshape(rows, dims.HV, dims.K),
        beta=beta_values(inputs.beta, options, dtype).reshape(rows, dims.HV),
        sequences=_sequences(inputs, dims),
    )


def _sequences(inputs: Inputs, dims: Dims) -> list[Sequence]:
    lens = seq_lens(inputs, dims)
    starts = [0, *accumulate(lens)][:-1]
    slots = range(dims.N) if inputs.state_indices is None else loaded_slots(inputs)
    every = (Sequence(*where) for where in zip(range(dims.N), starts, lens, slots, strict=True))
    return sorted((s for s in every if s.length > 0 and s.slot >= 0), key=lambda sequence: -sequence.length)


def load_states(inputs: Inputs, batch: Batch) -> torch.Tensor:
    """Initial states of `batch.sequences`, a new tensor [n, HV, V, K] in the dtype of the batch."""
    dims, n = batch.dims, len(batch.sequences)
    if inputs.state is None:
        return batch.q.new_zeros(n, dims.HV, dims.V, dims.K)
    slots = batch.index([s.slot for s in batch.sequences])
    scales = None if inputs.state_scales is None else inputs.state_scales[slots]
    states = Stored(inputs.state[slots], scales).values(batch.q.dtype)
    if inputs.has_initial_state is not None:
        empty = ~inputs.has_initial_state[batch.index([s.number for s in batch.sequences])]
        states[empty] = 0.0
    return states if inputs.state_v_first else states.mT.contiguous()
