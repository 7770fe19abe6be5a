"""Sequences that are cut, with any prefill kernel: values and the identity side by side."""

import dataclasses
from collections.abc import Callable

import torch

from kda_kernels.problem import MAX_HEAD
from kda_kernels.tensors import Checkpoints, Inputs

TOKENS = 8192  # whose outputs are summed at once, in fp32


class PlainBegun:
    """See `kda_kernels.parallel.prefill.Begun`: its outputs are complete already."""

    def __init__(self, end: torch.Tensor) -> None:
        """end: [1, HV, V, K], fp32."""
        _, HV, V, K = end.shape
        self.summary = torch.cat((end[0], end.new_zeros((HV, K, K))), 1)

    def finish(self) -> None:
        pass


class PlainCarried:
    """See `kda_kernels.parallel.prefill.Carried`.

    A state of V + K rows, of which the first V begin with nothing and see the values, and the others begin with the
    identity and see values of 0, ends as E above T; what such a token reads is o' and r. One call, unless head sizes
    are too large.
    """

    def __init__(
        self, inputs: Inputs, o: torch.Tensor, run: Callable[[Inputs, torch.Tensor], torch.Tensor | None]
    ) -> None:
        """Args: inputs of one sequence, dense; run: a prefill, whose pool is updated in place."""
        self.inputs, self.o = inputs, o
        v, (HV, V), K = inputs.v, inputs.v.shape[2:], inputs.q.shape[3]
        rows = torch.cat((v, v.new_zeros((*v.shape[:3], K))), 3)
        states = torch.cat((torch.zeros(V, K), torch.eye(K))).to(v.device).expand(1, HV, V + K, K).contiguous()
        kept = inputs.checkpoints
        count = 0 if kept is None else kept.rows.numel()
        self.kept = states.new_zeros((count, HV, V + K, K))
        self.read = torch.empty_like(rows)
        self.summary = states[0]
        for part in (slice(None),) if V + K <= MAX_HEAD else (slice(0, V), slice(V, V + K)):
            marks = None
            if kept is not None and kept.offsets is not None:
                table = torch.arange(count, device=v.device).view(kept.rows.shape)
                marks = Checkpoints(torch.empty_like(self.kept[:, :, part]), table, kept.offsets)
            state, read = states[:, :, part].contiguous(), torch.empty_like(rows[..., part])
            index = torch.zeros(1, dtype=torch.int32, device=v.device)
            run(
                dataclasses.replace(
                    inputs, v=rows[..., part].contiguous(), state=state, state_indices=index, null_slot=None,
                    checkpoints=marks,
                ),
                read,
            )  # fmt: skip
            states[:, :, part], self.read[..., part] = state, read
            if marks is not None:
                self.kept[:, :, part] = marks.states

    def finish(self, summaries: torch.Tensor, ends: bool) -> None:
        """Products are in fp64, which is exact enough whatever torch is told about fp32."""
        inputs, V = self.inputs, self.inputs.v.shape[3]
        before = summaries[0, :, :V].double()
        for summary in summaries[1:]:
            before = _after(before, summary)
        state = before.float()
        for begin in range(0, self.o.shape[1], TOKENS):
            at = slice(begin, begin + TOKENS)
            read = self.read[0, at].float()
            total = read[..., :V] + torch.einsum("thk,hvk->thv", read[..., V:], state)
            self.o[0, at] = total.to(self.o.dtype)
        if inputs.state_indices is not None:
            pool, indices = inputs.pool
            slot = int(indices[0])
            if slot < 0 or slot == inputs.null_slot:
                self.o.zero_()
                return
            if slot >= pool.shape[0]:
                self.o.fill_(float("nan"))
                return
            if ends:
                pool[slot] = _after(before, self.summary).to(pool.dtype)
        kept = inputs.checkpoints
        if kept is None or kept.offsets is None:
            return
        for i, (row, offset) in enumerate(
            zip(kept.rows.flatten().tolist(), kept.offsets.flatten().tolist(), strict=True)
        ):
            if 0 <= row < kept.states.shape[0] and 0 < offset <= self.o.shape[1]:
                kept.states[row] = _after(before, self.kept[i]).to(kept.states.dtype)


def _after(state: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
    """S T + E, fp64, of S [HV, V, K] and a summary [HV, V + K, K]."""
    V = state.shape[1]
    return torch.baddbmm(summary[:, :V].double(), state, summary[:, V:].double())
