"""One kernel bound to the tensors it is timed on, and the same call at shapes that it has not seen."""

import dataclasses
from collections.abc import Iterator

from kda_kernels.checks import problem_of
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs


@dataclasses.dataclass(frozen=True)
class Call:
    kernel: Kernel
    inputs: Inputs

    def __call__(self) -> Outputs:
        return self.kernel.run(self.inputs)

    def smaller(self, most: int) -> Iterator["Call"]:
        """The call with 1, 2, ... fewer tokens in its last sequence, or fewer sequences where that is one of one token.

        Views of the same tensors (cu_seqlens is new), at most so many: none where nothing can be left out, and only
        those that the kernel says it can run.
        """
        for fewer in range(1, most + 1):
            if (inputs := _without(self.inputs, fewer, self.kernel.op)) is None:
                return
            if self.kernel.unsupported(problem_of(inputs, self.kernel.op)) is None:
                yield dataclasses.replace(self, inputs=inputs)


def _without(inputs: Inputs, fewer: int, op: Op) -> Inputs | None:
    """With so many tokens less, and the sequences that are then empty; None where too little is left."""
    B, T = inputs.q.shape[:2]
    if inputs.cu_seqlens is None and not op.decodes:
        return _cut(inputs, B, T - fewer) if fewer < T else None
    if inputs.cu_seqlens is None:
        return _rows(_cut(inputs, B - fewer, T), B - fewer) if fewer < B else None
    if fewer >= T:
        return None
    ends = {name: getattr(inputs, name) for name in ("cu_seqlens", "cu_seqlens_cpu")}
    left = {name: t.clamp(max=T - fewer) for name, t in ends.items() if t is not None}
    return dataclasses.replace(_cut(inputs, B, T - fewer), **left)


def _cut(inputs: Inputs, rows: int, tokens: int) -> Inputs:
    return inputs.map_tokens(lambda t: t[:rows, :tokens])


def _rows(inputs: Inputs, sequences: int) -> Inputs:
    """What belongs to the first sequences."""
    pooled, indexed = inputs.state_indices is not None, inputs.token_state_indices is not None
    names = ["state_indices" if pooled else "state", "token_state_indices" if indexed else "token_states"]
    names += ["has_initial_state", "num_accepted_tokens"]
    cut = {name: t[:sequences] for name in names if (t := getattr(inputs, name)) is not None}
    return dataclasses.replace(inputs, **cut)
