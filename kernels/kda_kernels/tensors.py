"""The tensors of one call, and what comes out of it: the one shape in which kernels, the oracle and dumps meet."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kda_kernels.problem import Options

_NO_FEATURES: frozenset[str] = frozenset()


class Dims(NamedTuple):
    """Sizes of one call: batch rows, tokens per row, sequences, query/key heads, value heads, head sizes."""

    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """States inside a prefill that are kept, so that a later prompt with the same beginning can start there.

    Exactly one of `offsets` and `every` is given. A position is a number of tokens of its sequence in this call, and a
    multiple of `kda_kernels.api.checkpoint_alignment()`: one that is not makes its row NaN. Where a position is 0 or
    less, or past the end of its sequence, nothing is written. Nothing is written for padding.

    Attributes:
        states: where they go, [R, HV, V, K], fp32, bf16 or fp16; slots may lie apart, and it may be the pool itself.
        rows: int32 or int64, [N] or [N, C], the row of each; a negative one is nowhere, and one >= R writes nothing.
        offsets: int32 or int64, as `rows`: the position of each.
        every: column j is the state after (j + 1) * every tokens.
    """

    states: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor | None = None
    every: int | None = None

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Checkpoints":
        """A copy with `fn` applied to each tensor."""
        offsets = None if self.offsets is None else fn(self.offsets)
        return Checkpoints(fn(self.states), fn(self.rows), offsets, self.every)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The causal convolution of q, k and v over tokens, each channel by itself, then SiLU: x -> x sigmoid(x).

    Channels are D = 2 H K + HV V: those of q, of k, then of v, head by head. A channel's token t becomes
    silu(bias + sum_j weight[j] x[t - W + 1 + j]), as in causal-conv1d, with x what q, k or v hold: the window is of raw
    numbers. The tokens before the call's first come from the sequence's state: its entries 0 .. W - 2, the oldest
    first, and zeros where has_initial_state is false. After the call the state holds the newest W - 1 raw tokens; of L
    entries those behind it are neither read nor written.

    With num_accepted_tokens it is as in vLLM's causal_conv1d_update: of a sequence with a accepted tokens the window
    begins at entry a - 1, and after S tokens the state holds the W - 2 entries from a on, and behind them all S tokens,
    so that L is W - 2 + S at least.

    Attributes:
        weight: [D, W], W = 2, 3 or 4, contiguous; the last column is for the token itself.
        bias: [D] or None.
        states: [P, D, L], or [P, L, D] with tokens_first, updated in place unless update_state is False; a slot is
            contiguous, slots may lie apart.
        indices: int32 or int64 [N], any stride: the slots of the sequences. None: as state_indices, of which those
            [N, C] mean their first column (vLLM); without them sequence n has slot n. A sequence is padding where
            either of its slots is negative or the null slot, and touches nothing where either is none of its pool.
        tokens_first: how states lie.
        rounded: what comes out of it is rounded to the dtype of the tokens, as where it is a kernel of its own. No
            kernel of ours does that; the judge grants it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    states: torch.Tensor
    indices: torch.Tensor | None = None
    tokens_first: bool = False
    rounded: bool = False

    @property
    def width(self) -> int:
        """Tokens that it looks at."""
        return self.weight.shape[1]

    @property
    def entries(self) -> tuple[int, int, int, int]:
        """D, L, and the strides from channel to channel and from token to token of its states."""
        (_, a, b), (_, step_a, step_b) = self.states.shape, self.states.stride()
        return (b, a, step_b, step_a) if self.tokens_first else (a, b, step_a, step_b)

    @property
    def by_channel(self) -> torch.Tensor:
        """The states as a view [P, D, L]."""
        return self.states.mT if self.tokens_first else self.states

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Convolution":
        """A copy with `fn` applied to each tensor."""
        bias, indices = (None if t is None else fn(t) for t in (self.bias, self.indices))
        return Convolution(fn(self.weight), bias, fn(self.states), indices, self.tokens_first, self.rounded)


@dataclasses.dataclass(frozen=True)
class GatedNorm:
    """The norm of o over the channels of each value head, and its gate, in fp32 before o is rounded, as FLA's
    FusedRMSNormGated with activation="sigmoid": o -> o / sqrt(mean(o^2) + eps) * weight * sigmoid(gate).

    Attributes:
        gate: [B, T, HV, V], any strides with a contiguous last dimension.
        weight: [V].
        eps: what keeps the norm of zeros from dividing by zero.
    """

    gate: torch.Tensor
    weight: torch.Tensor
    eps: float = 1e-5

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "GatedNorm":
        """A copy with `fn` applied to each tensor."""
        return GatedNorm(fn(self.gate), fn(self.weight), self.eps)


@dataclasses.dataclass
class Inputs:
    """Tensors of one KDA call.

    Shapes (B = 1 and T = total tokens for packed batches):
        q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV]
        A_log [HV]; dt_bias [HV * K] or [HV, K]; both None when the gate is given activated
        state: None; or [N, HV, V, K] ([N, HV, K, V] unless state_v_first), which is not modified; or, when
            state_indices is given, a pool [P, HV, V, K] that is updated in place; fp32, bf16 or fp16, a pool also int16
        state_indices: int32 or int64 [N], slots in the pool, or [N, C] with num_accepted_tokens; any strides. A
            negative one is padding: no read, no write, and the rows of o are zero. One >= P touches nothing, and the
            rows of o are NaN.
        cu_seqlens: int32 or int64 [N + 1] for packed batches, else None. T may exceed its last entry: the rows of o
            behind it are zero.

    What engines ask for beyond that, each a feature that a kernel declares (`kda_kernels.problem.FEATURES`):
        null_slot: a slot that is padding too, and that any number of sequences may carry.
        has_initial_state: bool [N]; where false, the state starts at zero and what its slot holds is not read.
        num_accepted_tokens: int32 or int64 [N], for speculative decoding, with state_indices [N, C]: sequence n loads
            its state from column num_accepted_tokens[n] - 1, and the state after its token t goes to column t. A
            sequence whose column to load from is padding is padding; to a column that is, nothing is written.
        update_state: False leaves the pool as it is: an engine's verify.
        token_states: fp32, bf16 or fp16, contiguous from HV on, written: the state after each token.
            [B, T, HV, V, K]; with token_state_indices [R, S, HV, V, K]. K-first states: [.., K, V].
        token_state_indices: int32 or int64 [N]: the state after token t of sequence n goes to
            token_states[token_state_indices[n], t]; nowhere if that is negative, and nothing is written if it is >= R.
        checkpoints: of a prefill, see `Checkpoints`.
        batch_invariant: the bits of a sequence depend on itself alone, not on its batch.
        workspace: uint8, `kda_kernels.api.prefill_workspace_bytes()` of it: the call allocates no other scratch memory.
        conv: q, k and v are what the projection wrote: see `Convolution`. They are normalised after it.
        norm: see `GatedNorm`.
        state_scales: fp32 [P, HV, V], slots may lie apart: of a V-first pool in int16 what its rows of K channels are
            multiplied by. Updated with the pool; checkpoints in int16 go to that pool only.
        rounding_seed: int64 [1]. Given, every state of two bytes that the call stores (in the pool, token_states or
            checkpoints) is rounded up or down at random, keyed by this seed, the slot that its sequence loads from and
            its token: see `kda_kernels.reference.stored`. K is a multiple of 8. None: rounded to nearest.

    And what a kernel may use or not:
        cu_seqlens_cpu: cu_seqlens on the host.
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
    null_slot: int | None = None
    has_initial_state: torch.Tensor | None = None
    num_accepted_tokens: torch.Tensor | None = None
    update_state: bool = True
    token_states: torch.Tensor | None = None
    token_state_indices: torch.Tensor | None = None
    checkpoints: Checkpoints | None = None
    batch_invariant: bool = False
    workspace: torch.Tensor | None = None
    cu_seqlens_cpu: torch.Tensor | None = None
    conv: Convolution | None = None
    norm: GatedNorm | None = None
    state_scales: torch.Tensor | None = None
    rounding_seed: torch.Tensor | None = None

    def fields(self) -> tuple:
        """All of them, in order: `Inputs(*fields)`. Repeated calls are passed on so, and `picker` takes some out."""
        return _FIELDS(self)

    def changed(self, **fields: Any) -> "Inputs":
        """`dataclasses.replace`, in a tenth of its time."""
        made = object.__new__(type(self))
        made.__dict__ = {**self.__dict__, **fields}
        return made

    @property
    def N(self) -> int:
        """Number of sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dims(self) -> Dims:
        """The sizes, of tensors that are checked."""
        B, T, H, K = self.q.shape
        HV, V = self.v.shape[2:]
        return Dims(B, T, self.N, H, HV, K, V)

    @property
    def pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The state pool and state_indices, of a call that has them."""
        assert self.state is not None and self.state_indices is not None
        return self.state, self.state_indices

    @property
    def scale(self) -> float:
        """The factor on q."""
        return self.options.scale_for(self.q.shape[3])

    def state_shape(self, slots: int) -> tuple[int, int, int, int]:
        """Of a state or a pool of so many slots."""
        _, _, HV, V = self.v.shape
        K = self.q.shape[3]
        return (slots, HV, V, K) if self.state_v_first else (slots, HV, K, V)

    def new_final_state(self) -> torch.Tensor:
        """Room for the final states of a call without a pool, in the dtype of its state; fp32 where none comes in."""
        dtype = torch.float32 if self.state is None else self.state.dtype
        return torch.empty(self.state_shape(self.N), dtype=dtype, device=self.q.device)

    def features(self) -> frozenset[str]:
        """What the call uses of `kda_kernels.problem.FEATURES`, as far as it can be told without reading a tensor."""
        indices = self.state_indices
        strided = isinstance(indices, torch.Tensor) and not indices.is_contiguous()
        if (
            not strided
            and (self.null_slot is None and self.has_initial_state is None and self.num_accepted_tokens is None)
            and (self.token_states is None and self.token_state_indices is None and self.checkpoints is None)
            and (self.workspace is None and self.update_state and self.conv is None and self.norm is None)
            and (self.state_scales is None and self.rounding_seed is None and not self.batch_invariant)
        ):  # nearly every call, and on the way of each
            return _NO_FEATURES
        given = (
            *("null_slot", "has_initial_state", "num_accepted_tokens", "token_states", "token_state_indices"),
            *("checkpoints", "workspace", "conv", "norm", "state_scales", "rounding_seed"),
        )
        used = {name for name in given if getattr(self, name) is not None}
        used |= {"update_state"} if not self.update_state else set()
        used |= {"batch_invariant"} if self.batch_invariant else set()
        used |= {"strided_indices"} if strided else set()
        return frozenset(used)

    def without_spare_slots(self) -> "Inputs":
        """The same call with as many state_indices as there are sequences. Of wrong tensors: itself."""
        indices = self.state_indices
        try:
            if indices is None or indices.shape[0] <= self.N:
                return self
        except (AttributeError, IndexError):  # no tensors, which the check of the kernel says
            return self
        return dataclasses.replace(self, state_indices=indices[: self.N])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by name; those of `checkpoints`, `conv` and `norm` not."""
        return {
            f.name: value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Inputs":
        """A copy with `fn` applied to each tensor, but cu_seqlens_cpu, which stays on the host."""
        fn = _once(fn)
        changed: dict[str, Any] = {name: fn(t) for name, t in self.tensors().items() if name != "cu_seqlens_cpu"}
        for name in ("checkpoints", "conv", "norm"):
            changed[name] = None if (part := getattr(self, name)) is None else part.map(fn)
        return dataclasses.replace(self, **changed)

    def map_tokens(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Inputs":
        """A copy with `fn` applied to what has a row for each token: q, k, v, g, beta, and the gate of a norm."""
        norm = None if self.norm is None else dataclasses.replace(self.norm, gate=fn(self.norm.gate))
        changed: dict[str, Any] = {name: fn(getattr(self, name)) for name in ("q", "k", "v", "g", "beta")}
        return dataclasses.replace(self, **changed, norm=norm)

    def to(self, device: torch.device | str) -> "Inputs":
        return self.map(lambda t: t.to(device))

    def fresh(self) -> "Inputs":
        """A copy whose state and state_scales, token_states, checkpoints and conv may be written, this one's untouched.

        Strides and gaps of each are kept, and checkpoints that go to the pool go to the copy of the pool.
        """

        copy = _once(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t))
        kept, conv = self.checkpoints, self.conv
        return dataclasses.replace(
            self,
            conv=None if conv is None else dataclasses.replace(conv, states=copy(conv.states)),
            state=None if self.state is None else copy(self.state),
            state_scales=None if self.state_scales is None else copy(self.state_scales),
            token_states=None if self.token_states is None else copy(self.token_states),
            checkpoints=None if kept is None else dataclasses.replace(kept, states=copy(kept.states)),
        )


_NAMES = [field.name for field in dataclasses.fields(Inputs)]
_FIELDS = operator.attrgetter(*_NAMES)


def picker(*names: str) -> Callable[[tuple], Any]:
    """What takes the fields with these names out of `Inputs.fields()`: two or more of them, in this order."""
    return operator.itemgetter(*map(_NAMES.index, names))


def hand_on(inputs: Inputs, o: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """What a call does whose sequences have no tokens: states come out as they came in, and o is zero.

    Args:
        final_state: None where there is a pool, or none is wanted.
    """
    o.zero_()
    if final_state is None:
        return
    if inputs.state is None:
        final_state.zero_()
    elif inputs.has_initial_state is None:
        final_state.copy_(inputs.state)
    else:
        final_state.copy_(inputs.state.where(inputs.has_initial_state[:, None, None, None], 0))


def _once(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn`, called once for each tensor: a pool that is also where checkpoints go stays one tensor."""
    done: dict[int, torch.Tensor] = {}
    return lambda t: done[id(t)] if id(t) in done else done.setdefault(id(t), fn(t))


@dataclasses.dataclass
class Outputs:
    """What a kernel returns.

    o: [B, T, HV, V] in the dtype of v. For the op `gate`: the chunk-local cumsum, float32 [B, T, HV, K].
    final_state: [N, HV, V, K] ([N, HV, K, V] unless state_v_first) in the dtype of the incoming state, fp32 if there
        was none; the pool itself when there is one; None if not asked for.
    token_states, checkpoints, conv_states, state_scales: where those of `Inputs` were written. Kernels may leave them
        out.
    """

    o: torch.Tensor
    final_state: torch.Tensor | None = None
    token_states: torch.Tensor | None = None
    checkpoints: torch.Tensor | None = None
    conv_states: torch.Tensor | None = None
    state_scales: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        return {f.name: t for f in dataclasses.fields(self) if (t := getattr(self, f.name)) is not None}
