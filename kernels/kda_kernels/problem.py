"""What is to be computed, without the tensors: options of the operation, shapes, dtypes and layouts.

`Options` is what a model fixes (which gate, is beta a logit, ...). `Problem` adds the shapes and dtypes of one call
and is all that a kernel may look at to say whether it can run. Neither imports torch, so the command line can build,
print and serialise them in milliseconds.
"""

import dataclasses
import enum
import numbers
from collections.abc import Mapping
from typing import Any

from kda_kernels.dtypes import FLOATS, STATES
from kda_kernels.errors import InputError, one_line

CHUNK = 64  # tokens per chunk of the prefill pipeline
MAX_HEAD = 256  # most channels of a key or value head
SAFE_BOUND = -5.0  # lower_bound of Kimi K3, and what FLA's safe_gate promises of log decays

# What a call may ask for beyond the operation itself: fields of `kda_kernels.tensors.Inputs` that a kernel could
# overlook, so each kernel declares those that it has (`kda_kernels.registry.Kernel.features`); and two layouts.
FEATURES = frozenset(
    (
        *("null_slot", "has_initial_state", "num_accepted_tokens", "update_state", "token_states"),
        *("token_state_indices", "checkpoints", "batch_invariant", "workspace", "conv", "norm"),
        "rounding_seed",  # states of two bytes that are rounded stochastically
        "state_scales",  # a pool in int16
        "strided_indices",  # state_indices that are not contiguous
        "tail",  # tokens behind the last sequence of a packed batch
    )
)
_OF_FIELDS = {"conv", "norm", "state_scales", "rounding_seed"}  # features that other fields of a `Problem` tell
LAYOUTS = frozenset(("strided_indices", "tail"))
ROUNDINGS = ("nearest", "stochastic")
CONV_WIDTHS = (2, 3, 4)  # tokens that a convolution looks at


class Op(enum.StrEnum):
    """The operations a kernel can serve."""

    DECODE = "decode"  # fused recurrent update, meant for one or a few tokens per sequence
    STEP = "step"  # the same with the convolution of q, k and v before it and the gated norm of o behind it, or one
    PREFILL = "prefill"  # chunked form over whole prompts
    GATE = "gate"  # kda_gate_chunk_cumsum: activation + bias + chunk-local cumsum, the first stage of prefill

    @property
    def decodes(self) -> bool:
        """Whether it goes on from a state by one or a few tokens per sequence."""
        return self in (Op.DECODE, Op.STEP)


class Gate(enum.StrEnum):
    """How the tensor g becomes the log decay (<= 0)."""

    SOFTPLUS = "softplus"  # -exp(A_log) * softplus(g + dt_bias)
    SAFE = "safe"  # lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
    NONE = "none"  # g is the log decay already


@dataclasses.dataclass(frozen=True)
class Options:
    """The model's choices, the same for every call of a layer.

    Attributes:
        gate: which activation turns g into a log decay.
        lower_bound: bound of the safe gate (< 0; Kimi K3: -5). Required by, and only for, `Gate.SAFE`. With
            `Gate.NONE` it may be given as a promise that every g lies in [lower_bound, 0].
        beta_is_logit: apply sigmoid to beta.
        allow_neg_eigval: 2 * sigmoid(beta); needs `beta_is_logit`.
        qk_l2norm: normalise q and k inside the kernel: x * rsqrt(sum x^2 + 1e-6).
        scale: factor on q; None means K ** -0.5.
    """

    gate: Gate = Gate.SOFTPLUS
    lower_bound: float | None = None
    beta_is_logit: bool = True
    allow_neg_eigval: bool = False
    qk_l2norm: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate", Gate(self.gate))
        for name in ("lower_bound", "scale"):
            if (value := getattr(self, name)) is not None:
                if not isinstance(value, numbers.Real):
                    raise InputError(name, f"is of type {type(value).__name__}", "it should be a number")
                object.__setattr__(self, name, float(value))
        if self.gate is Gate.SAFE and self.lower_bound is None:
            raise InputError("lower_bound", "is missing", "the safe gate needs a negative number, such as -5.0")
        if self.gate is Gate.SOFTPLUS and self.lower_bound is not None:
            raise InputError("lower_bound", f"is {self.lower_bound}", "the softplus gate has none; leave it out")
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise InputError("lower_bound", f"is {self.lower_bound}", "it should be negative, such as -5.0")
        if self.allow_neg_eigval and not self.beta_is_logit:
            raise InputError(
                "allow_neg_eigval", "is set but beta is not a logit", "it needs use_beta_sigmoid_in_kernel"
            )

    @classmethod
    def of_switches(
        cls,
        use_gate: bool,
        lower_bound: float | None,
        *,
        promise: float | None = None,
        **options: Any,
    ) -> "Options":
        """The one rule which gate a call means, from FLA's switches.

        Args:
            use_gate: FLA's use_gate_in_kernel: g is raw. Without a lower_bound that is the softplus gate, else the
                safe one.
            lower_bound: of a raw gate.
            promise: without `use_gate`, the bound that every g is promised to keep.
            options: the other attributes.
        """
        if not use_gate:
            return cls(Gate.NONE, promise, **options)
        return cls(Gate.SOFTPLUS if lower_bound is None else Gate.SAFE, lower_bound, **options)

    def scale_for(self, K: int) -> float:
        """The factor on q for key heads of `K` channels."""
        return K**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step, or a prefill, does beside the recurrence: see `kda_kernels.tensors.Convolution` and `GatedNorm`.

    Attributes:
        width: tokens that the convolution looks at, 2 to 4; 0: there is none.
        bias: whether it has one. weight_dtype: of its weight and bias. state_dtype: of the states of the convolution.
        tokens_first: how they lie, [.., L, D] or [.., D, L].
        norm: whether o is normalised and gated. norm_dtype: of its weight; the gate is in the dtype of v.
    """

    width: int = 4
    bias: bool = False
    weight_dtype: str = "bfloat16"
    state_dtype: str = "bfloat16"
    tokens_first: bool = True
    norm: bool = True
    norm_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.width not in (0, *CONV_WIDTHS):
            raise InputError("width", f"is {self.width}", f"it should be one of {CONV_WIDTHS}, or 0 for none")
        for name in ("weight_dtype", "state_dtype", "norm_dtype"):
            if getattr(self, name) not in FLOATS:
                raise InputError(name, f"is {getattr(self, name)}", f"it should be one of {', '.join(FLOATS)}")
        absent = () if self.width else ("bias", "weight_dtype", "state_dtype", "tokens_first")
        for name in (*absent, *(() if self.norm else ("norm_dtype",))):  # what is not there differs in nothing
            object.__setattr__(self, name, type(self).__dataclass_fields__[name].default)

    @property
    def features(self) -> frozenset[str]:
        """Of `FEATURES`, those that it is."""
        return frozenset((*(["conv"] if self.width else []), *(["norm"] if self.norm else [])))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: what a kernel is asked whether it supports.

    Attributes:
        op: the operation.
        seq_lens: tokens of each sequence, in order; empty sequences are 0.
        H, HV: query/key heads and value heads; HV is a multiple of H.
        K, V: head sizes of keys and values.
        packed: True: tensors are [1, sum(seq_lens), ...] with cu_seqlens. False: [N, T, ...], all lengths equal.
        dtype: of q, k, v and the output. g_dtype, beta_dtype, param_dtype (A_log, dt_bias), state_dtype: as named.
            Of the states a pool may have int16 too, which is the feature "state_scales".
        state_rounding: of a pool, "nearest" or "stochastic", which is the feature "rounding_seed".
        initial_state: whether a state comes in; final_state: whether it goes out.
        pool_slots: None for a plain [N, HV, V, K] state that is not modified; else the slots of a state pool that is
            updated in place through state_indices.
        padding: how many of the sequences are padding: their state index is negative, or the null slot.
        state_v_first: [.., V, K] (ours) or [.., K, V].
        options: see `Options`.
        features: what the call uses of `FEATURES`; those that other fields tell need not be named.
        parts: of a step (all of them if not given) or a decode: what it does beside the recurrence. Of a prefill: the
            convolution before it.
    """

    op: Op
    seq_lens: tuple[int, ...]
    H: int
    HV: int
    K: int = 128
    V: int = 128
    packed: bool = True
    dtype: str = "bfloat16"
    g_dtype: str = "bfloat16"
    beta_dtype: str = "bfloat16"
    param_dtype: str = "float32"
    state_dtype: str = "float32"
    state_rounding: str = "nearest"
    initial_state: bool = True
    final_state: bool = True
    pool_slots: int | None = None
    padding: int = 0
    state_v_first: bool = True
    options: Options = dataclasses.field(default_factory=Options)
    features: frozenset[str] = frozenset()
    parts: Parts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", Op(self.op))
        object.__setattr__(self, "seq_lens", tuple(int(n) for n in self.seq_lens))
        object.__setattr__(self, "features", frozenset(self.features))
        for name in ("H", "HV", "K", "V"):
            if getattr(self, name) < 1:
                raise InputError(name, f"is {getattr(self, name)}", "it should be at least 1")
        if self.HV % self.H:
            raise InputError("HV", f"is {self.HV}", f"it should be a multiple of H = {self.H}")
        if any(n < 0 for n in self.seq_lens):
            raise InputError("seq_lens", f"holds {min(self.seq_lens)}", "lengths should be 0 or more")
        if not self.packed and len(set(self.seq_lens)) > 1:
            raise InputError("seq_lens", "differ but packed is False", "a dense batch needs equal lengths")
        for name in ("dtype", "g_dtype", "beta_dtype", "param_dtype", "state_dtype"):
            known = STATES if name == "state_dtype" else FLOATS
            if getattr(self, name) not in known:
                raise InputError(name, f"is {getattr(self, name)}", f"it should be one of {', '.join(known)}")
        self._check_stored()
        if self.pool_slots is not None and self.pool_slots < self.N - self.padding:
            needed = f"{self.N - self.padding} sequences need a slot each"
            raise InputError("pool_slots", f"is {self.pool_slots}", needed)
        if unknown := self.features - FEATURES:
            raise InputError("features", f"holds {min(unknown)}", f"there are {', '.join(sorted(FEATURES))}")
        if self.parts is not None and self.op is Op.GATE:
            raise InputError("parts", f"are given with the op {self.op}", "only a step and a prefill have them")
        if self.parts is not None and self.parts.norm and self.op is Op.PREFILL:
            raise InputError("norm", f"is given with the op {self.op}", "only a step has one")
        if self.op is Op.PREFILL and self.parts is not None and not self.parts.features:
            object.__setattr__(self, "parts", None)
        if self.parts is None and self.op is Op.STEP:
            object.__setattr__(self, "parts", Parts())
        own = frozenset() if self.parts is None else self.parts.features
        own |= {"state_scales"} if self.state_dtype == "int16" else set()
        own |= {"rounding_seed"} if self.state_rounding == "stochastic" else set()
        object.__setattr__(self, "features", (self.features - _OF_FIELDS) | own)

    def _check_stored(self) -> None:
        """What a pool may be stored in, and how it may be rounded."""
        if self.state_dtype == "int16" and self.pool_slots is None:
            raise InputError("state_dtype", "is int16", "it should be another where there is no state pool")
        if self.state_dtype == "int16" and not self.state_v_first:
            raise InputError("state_dtype", "is int16", "it should be another where states are K-first")
        if self.state_rounding not in ROUNDINGS:
            wanted = f"it should be {' or '.join(ROUNDINGS)}"
            raise InputError("state_rounding", f"is {self.state_rounding}", wanted)
        if self.state_rounding == "stochastic" and (self.pool_slots is None or self.state_dtype == "float32"):
            wanted = "only a pool in bfloat16, float16 or int16 is rounded so"
            raise InputError("state_rounding", f"is stochastic with states in {self.state_dtype}", wanted)
        if self.state_rounding == "stochastic" and self.K % 8:
            raise InputError("state_rounding", f"is stochastic with K = {self.K}", "K should be a multiple of 8")

    @property
    def N(self) -> int:
        """Number of sequences."""
        return len(self.seq_lens)

    @property
    def T(self) -> int:
        """Tokens in all sequences together."""
        return sum(self.seq_lens)

    @property
    def scale(self) -> float:
        """The factor on q."""
        return self.options.scale_for(self.K)

    @property
    def has_usual_scale(self) -> bool:
        """Whether the factor on q is K ** -0.5."""
        return self.scale == self.K**-0.5

    @property
    def name(self) -> str:
        """Short name for tables: decode H=96 N=32, prefill N=1 T=8192 H=96, ..."""
        heads = f"H={self.H}" if self.H == self.HV else f"H={self.H} HV={self.HV}"
        lens = set(self.seq_lens)
        if lens == {1}:
            return f"{self.op} {heads} N={self.N}"
        tokens = f"T={self.N}x{self.seq_lens[0]}" if len(lens) == 1 and self.N > 1 else f"T={self.T}"
        return f"{self.op} N={self.N} {tokens} {heads}"

    @property
    def state_name(self) -> str:
        """How a pool differs from the usual one in fp32, for tables: "bf16 state, stochastic", or nothing."""
        if self.state_dtype == "float32":
            return ""
        rounding = ", stochastic" if self.state_rounding == "stochastic" else ""
        return f"{STATES[self.state_dtype].short} state{rounding}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON; `from_dict` is its inverse."""
        out = dataclasses.asdict(self)
        out["op"], out["seq_lens"] = str(self.op), list(self.seq_lens)
        out["options"]["gate"] = str(self.options.gate)
        out["features"] = sorted(self.features)
        for name in ("features", "parts"):
            if not out[name]:
                del out[name]
        if self.state_rounding == "nearest":
            del out["state_rounding"]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Problem":
        """Raises `InputError` for unknown or missing fields."""
        try:
            data = dict(data)
            parts = Parts(**data["parts"]) if data.get("parts") else None
            return cls(**{**data, "options": Options(**data.get("options", {})), "parts": parts})
        except (TypeError, ValueError) as error:
            raise InputError(f"not a problem description: {one_line(str(error))}") from error
