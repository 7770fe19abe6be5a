"""The one place where the tensors of a call are checked: shapes, dtypes, devices, strides and, if asked, values.

Every message names the argument, what it is and what it should be. The checks of shapes run on every eager call, so
they only read attributes; the checks of values read `cu_seqlens` and `state_indices`, which makes the host wait for a
GPU, so there they run on request.
"""

import os
from itertools import pairwise
from typing import NamedTuple

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Problem
from kda_kernels.tensors import Inputs

MAX_HEAD_DIM = 256
ACTIVATION_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
STATE_DTYPES = frozenset((torch.float32, torch.bfloat16))
INDEX_DTYPES = frozenset((torch.int32, torch.int64))


class Dims(NamedTuple):
    """Sizes of one call: batch rows, tokens a row, sequences, query/key heads, value heads, head sizes."""

    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int


def check_inputs(inputs: Inputs, *, values: bool | None = None) -> Dims:
    """Checks everything a kernel relies on, and returns the sizes.

    Args:
        inputs: the call.
        values: also check what `cu_seqlens` and `state_indices` hold, which synchronises a GPU. None: only for CPU
            tensors, or when the environment variable KDA_CHECK_VALUES is 1.

    Raises:
        InputError: the first violation found.
    """
    dims = _check_tokens(inputs)
    if inputs.A_log is not None or inputs.dt_bias is not None or inputs.options.gate is Gate.SOFTPLUS:
        _check_gate_parameters(inputs.A_log, inputs.dt_bias, inputs.options.gate, dims.HV, dims.K, inputs.q, "q")
    if inputs.state is not None or inputs.state_indices is not None:
        _check_state(inputs, dims)
    if _read_values(inputs.q) if values is None else values:
        if inputs.cu_seqlens is not None:
            _check_offsets(inputs.cu_seqlens, dims.T)
        if inputs.state_indices is not None:
            _check_slots(inputs.state_indices, inputs.state.shape[0])
    return dims


def check_gate(
    g: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    *,
    gate: Gate,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> None:
    """`check_inputs` for the gate stage on its own, which has no q, k and v.

    Args:
        g, A_log, dt_bias, cu_seqlens: as in `Inputs`.
        gate, lower_bound: as in `Options`.
        out: where the result goes: fp32, contiguous, in the shape of g.

    Raises:
        InputError: the first violation found.
    """
    if gate is Gate.SAFE and not (lower_bound is not None and lower_bound < 0):
        raise InputError(f"lower_bound is {lower_bound}: it should be negative, such as -5.0")
    _check_tensor("g", g, ACTIVATION_DTYPES, g, "g")
    if g.ndim != 4:
        raise _shape_error("g", g, "[B, T, HV, K]")
    B, T, HV, K = g.shape
    if HV < 1 or not 1 <= K <= MAX_HEAD_DIM:
        raise _shape_error("g", g, f"[B, T, HV, K] with at least 1 head of size 1 to {MAX_HEAD_DIM}")
    _check_last_stride("g", g)
    if A_log is not None or dt_bias is not None or gate is Gate.SOFTPLUS:
        _check_gate_parameters(A_log, dt_bias, gate, HV, K, g, "g")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, B, g, "g")
        if _read_values(g):
            _check_offsets(cu_seqlens, T)
    if out is not None:
        _check_tensor("out", out, frozenset((torch.float32,)), g, "g")
        if out.shape != g.shape:
            raise _shape_error("out", out, f"{list(g.shape)}, as g")
        _check_contiguous("out", out)


def problem_of(inputs: Inputs, op: Op) -> Problem:
    """The problem that these tensors pose to a kernel of `op`. Reads cu_seqlens and state_indices (synchronises a GPU).

    `param_dtype` is that of A_log, or of dt_bias where there is no A_log.

    Raises:
        InputError: see `check_inputs`.
    """
    dims = check_inputs(inputs, values=True)
    params = inputs.A_log if inputs.A_log is not None else inputs.dt_bias
    pooled = inputs.state_indices is not None
    return Problem(
        op=op,
        seq_lens=tuple(seq_lens(inputs, dims)),
        H=dims.H,
        HV=dims.HV,
        K=dims.K,
        V=dims.V,
        packed=inputs.cu_seqlens is not None,
        dtype=_name(inputs.q.dtype),
        g_dtype=_name(inputs.g.dtype),
        beta_dtype=_name(inputs.beta.dtype),
        param_dtype="float32" if params is None else _name(params.dtype),
        state_dtype="float32" if inputs.state is None else _name(inputs.state.dtype),
        initial_state=inputs.state is not None,
        final_state=inputs.output_final_state,
        pool_slots=inputs.state.shape[0] if pooled else None,
        padding=inputs.state_indices.tolist().count(-1) if pooled else 0,
        state_v_first=inputs.state_v_first,
        options=inputs.options,
    )


def seq_lens(inputs: Inputs, dims: Dims) -> list[int]:
    """Tokens of each sequence (reads cu_seqlens, which synchronises a GPU)."""
    if inputs.cu_seqlens is None:
        return [dims.T] * dims.N
    return [end - start for start, end in pairwise(inputs.cu_seqlens.tolist())]


def _check_tokens(inputs: Inputs) -> Dims:
    """q, k, v, g, beta and cu_seqlens."""
    q, k, v, g, beta, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.cu_seqlens
    for name, t in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        _check_tensor(name, t, ACTIVATION_DTYPES, q, "q")
    if q.ndim != 4:
        raise _shape_error("q", q, "[B, T, H, K]")
    B, T, H, K = shape = q.shape
    if k.shape != shape:
        raise _shape_error("k", k, f"[B, T, H, K] = {list(shape)}, as q")
    v_shape = v.shape
    if len(v_shape) != 4 or v_shape[0] != B or v_shape[1] != T:
        raise _shape_error("v", v, f"[B, T, HV, V] = [{B}, {T}, HV, V], as q")
    HV, V = v_shape[2], v_shape[3]
    if g.shape != (B, T, HV, K):
        raise _shape_error("g", g, f"[B, T, HV, K] = {[B, T, HV, K]}, from q and v")
    if beta.shape != (B, T, HV):
        raise _shape_error("beta", beta, f"[B, T, HV] = {[B, T, HV]}, from v")
    if H < 1:
        raise InputError("q has 0 heads: it should have at least 1")
    if HV < 1 or HV % H:
        raise InputError(f"v has {HV} heads: it should have a multiple of the {H} heads of q")
    if not 1 <= K <= MAX_HEAD_DIM:
        raise InputError(f"q has head size K = {K}: it should be 1 to {MAX_HEAD_DIM}")
    if not 1 <= V <= MAX_HEAD_DIM:
        raise InputError(f"v has head size V = {V}: it should be 1 to {MAX_HEAD_DIM}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype is not q.dtype:
            raise InputError(f"{name} is {_name(t.dtype)}: it should be {_name(q.dtype)}, as q")
    for name, t in (("q", q), ("k", k), ("v", v), ("g", g)):
        _check_last_stride(name, t)
    if cu_seqlens is None:
        return Dims(B, T, B, H, HV, K, V)
    _check_cu_seqlens(cu_seqlens, B, q, "q")
    return Dims(B, T, cu_seqlens.shape[0] - 1, H, HV, K, V)


def _check_gate_parameters(
    A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, gate: Gate, HV: int, K: int, owner: torch.Tensor, who: str
) -> None:
    """A_log and dt_bias: shapes, and that they are there exactly when the gate wants them."""
    if gate is Gate.NONE:
        given = "A_log" if A_log is not None else "dt_bias"
        raise InputError(
            f"{given} is given but the gate is none: it should be left out, or the gate be softplus or safe"
        )
    if A_log is not None:
        _check_tensor("A_log", A_log, ACTIVATION_DTYPES, owner, who)
        if A_log.numel() != HV:
            raise _shape_error("A_log", A_log, f"[HV] = [{HV}]")
        _check_contiguous("A_log", A_log)
    elif gate is Gate.SOFTPLUS:
        raise InputError(f"A_log is missing: it should be [HV] = [{HV}] for the softplus gate")
    if dt_bias is not None:
        _check_tensor("dt_bias", dt_bias, ACTIVATION_DTYPES, owner, who)
        if dt_bias.shape != (HV * K,) and dt_bias.shape != (HV, K):
            raise _shape_error("dt_bias", dt_bias, f"[HV * K] = [{HV * K}] or [HV, K] = {[HV, K]}")
        _check_contiguous("dt_bias", dt_bias)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, B: int, owner: torch.Tensor, who: str) -> None:
    _check_index_vector("cu_seqlens", cu_seqlens, owner, who)
    if B != 1:
        raise InputError(f"{who} has batch size {B}: it should be 1 with cu_seqlens, all tokens in one row")
    if cu_seqlens.shape[0] < 1:
        raise InputError("cu_seqlens is empty: it should hold N + 1 offsets, at least a 0")


def _check_state(inputs: Inputs, dims: Dims) -> None:
    """The plain state or the pool, and state_indices."""
    state, indices = inputs.state, inputs.state_indices
    if state is None:
        raise InputError("state_indices is given without a state: it should come with a state pool")
    _check_tensor("state", state, STATE_DTYPES, inputs.q, "q")
    slots = "N" if indices is None else "P"
    inner = (dims.HV, dims.V, dims.K) if inputs.state_v_first else (dims.HV, dims.K, dims.V)
    layout = f"[{slots}, HV, V, K]" if inputs.state_v_first else f"[{slots}, HV, K, V]"
    if state.ndim != 4 or state.shape[1:] != inner:
        raise _shape_error("state", state, f"{layout} = [{slots}, {', '.join(map(str, inner))}]")
    stride = state.stride()
    if not _inner_contiguous(inner, stride):
        raise InputError(
            f"state has strides {list(stride)}: its last three dimensions should be contiguous; "
            "only the stride between slots is free"
        )
    if indices is None:
        if state.shape[0] != dims.N:
            raise _shape_error("state", state, f"{layout} = {[dims.N, *inner]}, one for each sequence")
        return
    slot_size = dims.HV * dims.V * dims.K
    if state.shape[0] > 1 and stride[0] < slot_size:
        raise InputError(
            f"state has stride {stride[0]} between slots: it should be at least HV * V * K = {slot_size}, "
            "so that no two slots of the pool share memory"
        )
    _check_index_vector("state_indices", indices, inputs.q, "q")
    if indices.shape[0] != dims.N:
        raise _shape_error("state_indices", indices, f"[N] = [{dims.N}], one slot for each sequence")


def _read_values(owner: torch.Tensor) -> bool:
    return owner.is_cpu or os.environ.get("KDA_CHECK_VALUES") == "1"


def _check_offsets(cu_seqlens: torch.Tensor, T: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise InputError(f"cu_seqlens starts at {offsets[0]}: it should start at 0")
    for position, (start, end) in enumerate(pairwise(offsets), 1):
        if end < start:
            raise InputError(
                f"cu_seqlens falls from {start} to {end} (at position {position}): it should never decrease"
            )
    if offsets[-1] != T:
        raise InputError(f"cu_seqlens ends at {offsets[-1]}: it should end at T = {T}, the number of tokens")


def _check_slots(state_indices: torch.Tensor, slots: int) -> None:
    seen: dict[int, int] = {}
    for position, slot in enumerate(state_indices.tolist()):
        if not -1 <= slot < slots:
            where = f"0 to {slots - 1}" if slots else "of which there are none"
            raise InputError(
                f"state_indices holds {slot} (at position {position}): it should be -1 or a slot of the pool, {where}"
            )
        if slot >= 0 and seen.setdefault(slot, position) != position:
            raise InputError(
                f"state_indices holds {slot} twice (at positions {seen[slot]} and {position}): "
                "each slot should belong to one sequence"
            )


def _check_tensor(name: str, t: torch.Tensor, dtypes: frozenset[torch.dtype], owner: torch.Tensor, who: str) -> None:
    """Type, dtype, layout, and that `t` is on the device of `owner`, the argument called `who`."""
    if not isinstance(t, torch.Tensor):
        raise InputError(f"{name} is of type {type(t).__name__}: it should be a torch.Tensor")
    if t.dtype not in dtypes:
        raise InputError(f"{name} is {_name(t.dtype)}: it should be {' or '.join(sorted(map(_name, dtypes)))}")
    if t.layout is not torch.strided:
        raise InputError(f"{name} has layout {t.layout}: it should be an ordinary (strided) tensor")
    if t is not owner and t.device != owner.device:
        raise InputError(f"{name} is on {t.device}: it should be on {owner.device}, as {who}")


def _check_index_vector(name: str, t: torch.Tensor, owner: torch.Tensor, who: str) -> None:
    _check_tensor(name, t, INDEX_DTYPES, owner, who)
    if t.ndim != 1:
        raise _shape_error(name, t, "of one dimension")
    _check_contiguous(name, t)


def _check_last_stride(name: str, t: torch.Tensor) -> None:
    if t.stride(3) != 1 and t.shape[3] != 1:
        raise InputError(
            f"{name} has stride {t.stride(3)} in its last dimension: it should be 1; call .contiguous() on it"
        )


def _check_contiguous(name: str, t: torch.Tensor) -> None:
    if not t.is_contiguous():
        raise InputError(f"{name} has strides {list(t.stride())}: it should be contiguous; call .contiguous() on it")


def _inner_contiguous(inner: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether [HV, V, K] lies in memory without gaps; the stride of a dimension of size 1 means nothing."""
    expected = (inner[1] * inner[2], inner[2], 1)
    return stride[1:] == expected or all(
        size == 1 or have == want for size, have, want in zip(inner, stride[1:], expected, strict=True)
    )


def _shape_error(name: str, t: torch.Tensor, expected: str) -> InputError:
    return InputError(f"{name} has shape {list(t.shape)}: it should be {expected}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
