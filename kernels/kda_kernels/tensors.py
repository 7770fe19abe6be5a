"""The tensors of one call, and what comes out of it: the one shape in which kernels, the oracle and dumps meet."""

import dataclasses

import torch

from kda_kernels.problem import Options


@dataclasses.dataclass
class Inputs:
    """Tensors of one KDA call.

    Shapes (B = 1 and T = total tokens for packed batches):
        q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV]
        A_log [HV]; dt_bias [HV * K] or [HV, K]; both None when the gate is given activated
        state: None; or [N, HV, V, K] ([N, HV, K, V] unless state_v_first), which is not modified; or, when
            state_indices is given, a pool [P, HV, V, K] that is updated in place
        state_indices: int32 or int64 [N], slots in the pool; -1 is padding (no read, no write, output zero)
        cu_seqlens: int32 or int64 [N + 1] for packed batches, else None
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    options: Options
    A_log: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    state: torch.Tensor | None = None
    state_indices: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    state_v_first: bool = True
    output_final_state: bool = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by name."""
        return {
            f.name: value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }

    def map(self, fn) -> "Inputs":
        """A copy with `fn` applied to each tensor."""
        return dataclasses.replace(self, **{name: fn(t) for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> "Inputs":
        return self.map(lambda t: t.to(device))

    def fresh(self) -> "Inputs":
        """A copy whose state may be written without touching this one's (strides and gaps of a pool are kept)."""
        if self.state is None:
            return self
        state = torch.empty_strided(
            self.state.shape, self.state.stride(), dtype=self.state.dtype, device=self.state.device
        ).copy_(self.state)
        return dataclasses.replace(self, state=state)


@dataclasses.dataclass
class Outputs:
    """What a kernel returns.

    o: [B, T, HV, V] in the dtype of v. For the op `gate`: the chunk-local cumsum, float32 [B, T, HV, K].
    final_state: [N, HV, V, K] ([N, HV, K, V] unless state_v_first) in the dtype of the incoming state, fp32 if there
        was none; the pool itself when there is one; None if not asked for.
    """

    o: torch.Tensor
    final_state: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in (("o", self.o), ("final_state", self.final_state)) if t is not None}
