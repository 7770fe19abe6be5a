"""One kernel bound to the tensors it is timed on, and the same call at shapes that it has not seen."""

import dataclasses
from collections.abc import Iterator

from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs

TOKENS = ("q", "k", "v", "g", "beta")


@dataclasses.dataclass(frozen=True)
class Call:
    kernel: Kernel
    inputs: Inputs

    def __call__(self) -> Outputs:
        return self.kernel.run(self.inputs)

    def smaller(self, most: int) -> Iterator["Call"]:
        """The call with 1, 2, ... fewer tokens in its last sequence, or fewer sequences where that is one of one token.

        Views of the same tensors (cu_seqlens is new), at most so many: none where nothing can be left out.
        """
        for fewer in range(1, most + 1):
            if (inputs := _without(self.inputs, fewer, self.kernel.op)) is None:
                return
            yield dataclasses.replace(self, inputs=inputs)


def _without(inputs: Inputs, fewer: int, op: Op) -> Inputs | None:
    """With so many tokens less, and the sequences that are then empty; None where too little is left."""
    B, T = inputs.q.shape[:2]
    if inputs.cu_seqlens is None and op is not Op.DECODE:
        return _cut(inputs, B, T - fewer) if fewer < T else None
    if inputs.cu_seqlens is None:
        return _rows(_cut(inputs, B - fewer, T), B - fewer) if fewer < B else None
    if fewer >= T:
        return None
    left = inputs.cu_seqlens.clamp(max=T - fewer)
    return dataclasses.replace(_cut(inputs, B, T - fewer), cu_seqlens=left)


def _cut(inputs: Inputs, rows: int, tokens: int) -> Inputs:
    return dataclasses.replace(inputs, **{name: getattr(inputs, name)[:rows, :tokens] for name in TOKENS})


def _rows(inputs: Inputs, sequences: int) -> Inputs:
    name = "state" if inputs.state_indices is None else "state_indices"
    whole = getattr(inputs, name)
    return inputs if whole is None else dataclasses.replace(inputs, **{name: whole[:sequences]})
