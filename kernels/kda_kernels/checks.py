"""The one place where the tensors of a call are checked: shapes, dtypes, devices, strides and, if asked, values.

Every message names the argument, what it is and what it should be. The checks of shapes run on every eager call, so
they only read attributes; the checks of values read `cu_seqlens` and indices, which makes the host wait for a GPU, so
there they run on request.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from kda_kernels import environment
from kda_kernels.dtypes import name_of
from kda_kernels.errors import InputError
from kda_kernels.feature_checks import check_features, check_offsets, check_values, loaded_slots, seq_lens
from kda_kernels.problem import MAX_HEAD, Gate, Op, Parts, Problem
from kda_kernels.tensor_checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_contiguous,
    check_last_stride,
    check_states,
    check_tensor,
    layout,
    shape_error,
)
from kda_kernels.tensors import Dims, Inputs

# Whether what indices and lengths hold is checked: 1 always, 0 never, not set: on a CPU, where no GPU is waited for.
CHECK_VALUES = environment.read("KDA_CHECK_VALUES")
# Whether a prefill has to be causal to the last bit, also where gates are bounded and it costs time.
CAUSAL = environment.read("KDA_CAUSAL") == "1"

_dispatch_modes = torch._C._len_torch_dispatch_stack


def values_checked(owner: torch.Tensor) -> bool:
    """Whether the values of a call whose tensors lie where `owner` does are checked."""
    return owner.is_cpu if CHECK_VALUES is None else CHECK_VALUES == "1"


def check_inputs(inputs: Inputs, *, values: bool | None = None) -> Dims:
    """Checks everything a kernel relies on, and returns the sizes.

    Args:
        inputs: the call.
        values: also check what `cu_seqlens` and indices hold, which synchronises a GPU. None: as the environment
            variable KDA_CHECK_VALUES said when this was imported, see `CHECK_VALUES`.

    Raises:
        InputError: the first violation found.
    """
    dims = _check_tokens(inputs)
    if inputs.A_log is not None or inputs.dt_bias is not None or inputs.options.gate is Gate.SOFTPLUS:
        _check_gate_parameters(
            inputs.A_log,
            inputs.dt_bias,
            inputs.options.gate,
            dims.HV,
            dims.K,
            inputs.q,
            "k" if inputs.q is inputs.k else "q",
        )
    if inputs.state is not None or inputs.state_indices is not None:
        _check_state(inputs, dims)
    if inputs.cu_seqlens_cpu is not None:
        _check_on_host(inputs.cu_seqlens_cpu, inputs.cu_seqlens)
    if inputs.features():
        check_features(inputs, dims)
    if values_checked(inputs.q) if values is None else values:
        check_values(inputs, dims)
    return dims


def require_memory(t: torch.Tensor, name: str = "q") -> None:
    """Raises `InputError` for a tensor that no kernel can be called on: it has a shape, and no memory."""
    if is_traced(t):
        wanted = "kernels need memory; kda_decode and kda_prefill are operators, which can be traced"
        raise InputError(name, f"is a {type(t).__name__} on {t.device}, or is being traced", wanted)


def is_traced(t: torch.Tensor) -> bool:
    """Whether a call with `t` computes nothing: it is compiled or exported, or its tensors are fake or on meta."""
    if is_dynamo_compiling():
        return True
    if (kind := type(t)) is not torch.Tensor:
        if not isinstance(t, torch.Tensor):  # which a check will say
            return False
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return True
    if t.is_meta:
        return True
    return _dispatch_modes() > 0 and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def require_features(inputs: Inputs, has: Collection[str], who: str) -> None:
    """Raises `InputError` where a call uses a feature that the kernel called `who` does not have."""
    if lacking := inputs.features().difference(has):
        raise InputError(min(lacking), "is used", f"{who} does not support it")


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
        raise InputError("lower_bound", f"is {lower_bound}", "it should be negative, such as -5.0")
    check_tensor("g", g, FLOAT_DTYPES, g, "g")
    if g.ndim != 4:
        raise shape_error("g", g, "[B, T, HV, K]")
    require_memory(g, "g")
    B, T, HV, K = g.shape
    if HV < 1 or not 1 <= K <= MAX_HEAD:
        raise shape_error("g", g, f"[B, T, HV, K] with at least 1 head of size 1 to {MAX_HEAD}")
    check_last_stride("g", g)
    if A_log is not None or dt_bias is not None or gate is Gate.SOFTPLUS:
        _check_gate_parameters(A_log, dt_bias, gate, HV, K, g, "g")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, g, "g")
        if values_checked(g):
            check_offsets(cu_seqlens, T, exact=True)
    if out is not None:
        check_tensor("out", out, frozenset((torch.float32,)), g, "g")
        if out.shape != g.shape:
            raise shape_error("out", out, f"{list(g.shape)}, as g")
        check_contiguous("out", out)


def problem_of(inputs: Inputs, op: Op) -> Problem:
    """The problem that these tensors pose to a kernel of `op`. Reads cu_seqlens and state_indices (synchronises a GPU).

    `param_dtype` is that of A_log, or of dt_bias where there is no A_log.

    Raises:
        InputError: see `check_inputs`.
    """
    dims = check_inputs(inputs, values=True)
    params = inputs.A_log if inputs.A_log is not None else inputs.dt_bias
    pooled, lens = inputs.state_indices is not None, tuple(seq_lens(inputs, dims))
    return Problem(
        op=op,
        seq_lens=lens,
        H=dims.H,
        HV=dims.HV,
        K=dims.K,
        V=dims.V,
        packed=inputs.cu_seqlens is not None,
        dtype=name_of(inputs.q.dtype),
        g_dtype=name_of(inputs.g.dtype),
        beta_dtype=name_of(inputs.beta.dtype),
        param_dtype="float32" if params is None else name_of(params.dtype),
        state_dtype="float32" if inputs.state is None else name_of(inputs.state.dtype),
        state_rounding="nearest" if inputs.rounding_seed is None else "stochastic",
        initial_state=inputs.state is not None,
        final_state=inputs.output_final_state,
        pool_slots=inputs.pool[0].shape[0] if pooled else None,
        padding=loaded_slots(inputs).count(-1) if pooled else 0,
        state_v_first=inputs.state_v_first,
        options=inputs.options,
        features=inputs.features() | ({"tail"} if sum(lens) < dims.B * dims.T else set()),
        parts=_parts_of(inputs),
    )


def _parts_of(inputs: Inputs) -> Parts | None:
    """Of checked inputs."""
    conv, norm = inputs.conv, inputs.norm
    if conv is None and norm is None:
        return None
    convolved: dict[str, Any] = (
        {}
        if conv is None
        else {
            "bias": conv.bias is not None,
            "weight_dtype": name_of(conv.weight.dtype),
            "state_dtype": name_of(conv.states.dtype),
            "tokens_first": conv.tokens_first,
        }
    )
    normed: dict[str, Any] = {} if norm is None else {"norm_dtype": name_of(norm.weight.dtype)}
    return Parts(width=0 if conv is None else conv.width, norm=norm is not None, **convolved, **normed)


def _check_tokens(inputs: Inputs) -> Dims:
    """q, k, v, g, beta and cu_seqlens."""
    q, k, v, g, beta, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.cu_seqlens
    first = "k" if q is k else "q"  # a segment's summary has no q
    for name, t in ((first, q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        check_tensor(name, t, FLOAT_DTYPES, q, first)
    if q.ndim != 4:
        raise shape_error(first, q, "[B, T, H, K]")
    B, T, H, K = shape = q.shape
    if k.shape != shape:
        raise shape_error("k", k, f"[B, T, H, K] = {list(shape)}, as q")
    v_shape = v.shape
    if len(v_shape) != 4 or v_shape[0] != B or v_shape[1] != T:
        raise shape_error("v", v, f"[B, T, HV, V] = [{B}, {T}, HV, V], as {first}")
    HV, V = v_shape[2], v_shape[3]
    if g.shape != (B, T, HV, K):
        raise shape_error("g", g, f"[B, T, HV, K] = {[B, T, HV, K]}, from {first} and v")
    if beta.shape != (B, T, HV):
        raise shape_error("beta", beta, f"[B, T, HV] = {[B, T, HV]}, from v")
    if H < 1:
        raise InputError(first, "has 0 heads", "it should have at least 1")
    if HV < 1 or HV % H:
        raise InputError("v", f"has {HV} heads", f"it should have a multiple of the {H} heads of {first}")
    if not 1 <= K <= MAX_HEAD:
        raise InputError(first, f"has head size K = {K}", f"it should be 1 to {MAX_HEAD}")
    if not 1 <= V <= MAX_HEAD:
        raise InputError("v", f"has head size V = {V}", f"it should be 1 to {MAX_HEAD}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype is not q.dtype:
            raise InputError(name, f"is {name_of(t.dtype)}", f"it should be {name_of(q.dtype)}, as {first}")
    for name, t in ((first, q), ("k", k), ("v", v), ("g", g)):
        check_last_stride(name, t)
    if cu_seqlens is None:
        return Dims(B, T, B, H, HV, K, V)
    check_cu_seqlens(cu_seqlens, B, q, first)
    return Dims(B, T, cu_seqlens.shape[0] - 1, H, HV, K, V)


def _check_gate_parameters(
    A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, gate: Gate, HV: int, K: int, owner: torch.Tensor, who: str
) -> None:
    """A_log and dt_bias: shapes, and that they are there exactly when the gate wants them."""
    if gate is Gate.NONE:
        given = "A_log" if A_log is not None else "dt_bias"
        wanted = "it should be left out, or the gate be softplus or safe"
        raise InputError(given, "is given but the gate is none", wanted)
    if A_log is not None:
        check_tensor("A_log", A_log, FLOAT_DTYPES, owner, who)
        if A_log.numel() != HV:
            raise shape_error("A_log", A_log, f"[HV] = [{HV}]")
        check_contiguous("A_log", A_log)
    elif gate is Gate.SOFTPLUS:
        raise InputError("A_log", "is missing", f"it should be [HV] = [{HV}] for the softplus gate")
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, FLOAT_DTYPES, owner, who)
        if dt_bias.numel() != HV * K or dt_bias.shape[-1] not in (K, HV * K):
            raise shape_error("dt_bias", dt_bias, f"[HV * K] = [{HV * K}] or [HV, K] = {[HV, K]}")
        check_contiguous("dt_bias", dt_bias)


def check_cu_seqlens(cu_seqlens: torch.Tensor, B: int, owner: torch.Tensor, who: str) -> None:
    """Of a batch of B rows, that of `owner`, the argument called `who`. Raises `InputError`."""
    check_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, owner, who)
    if cu_seqlens.ndim != 1:
        raise shape_error("cu_seqlens", cu_seqlens, "of one dimension")
    check_contiguous("cu_seqlens", cu_seqlens)
    if B != 1:
        raise InputError(who, f"has batch size {B}", "it should be 1 with cu_seqlens, all tokens in one row")
    if cu_seqlens.shape[0] < 1:
        raise InputError("cu_seqlens", "is empty", "it should hold N + 1 offsets, at least a 0")


def _check_on_host(ends: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """cu_seqlens_cpu; what it holds is not looked at."""
    if cu_seqlens is None:
        raise InputError("cu_seqlens_cpu", "is given without cu_seqlens", "it should be the same on the host")
    check_tensor("cu_seqlens_cpu", ends, INDEX_DTYPES, ends, "")
    if not ends.is_cpu:
        raise InputError("cu_seqlens_cpu", f"is on {ends.device}", "it should be on cpu")
    if ends.shape != cu_seqlens.shape:
        raise shape_error("cu_seqlens_cpu", ends, f"{list(cu_seqlens.shape)}, as cu_seqlens")


def _check_state(inputs: Inputs, dims: Dims) -> None:
    """The plain state or the pool, and state_indices."""
    state, indices = inputs.state, inputs.state_indices
    if state is None:
        raise InputError("state_indices", "is given without a state", "it should come with a state pool")
    slots = "N" if indices is None else "P"
    check_states("state", state, inputs, slots, written=indices is not None)
    if state.dtype is torch.int16 and inputs.state_scales is None:
        raise InputError("state_scales", "is missing", "a pool in int16 should come with it")
    if indices is None:
        if state.shape[0] != dims.N:
            expected = f"{layout(inputs, slots)} = {list(inputs.state_shape(dims.N))}, one for each sequence"
            raise shape_error("state", state, expected)
        return
    check_tensor("state_indices", indices, INDEX_DTYPES, inputs.q, "q")
    columns = inputs.num_accepted_tokens is not None
    if indices.ndim != 1 + columns or indices.shape[0] < dims.N:
        expected = f"[N, C] = [{dims.N}, C], slots" if columns else f"[N] = [{dims.N}], one slot"
        raise shape_error("state_indices", indices, f"{expected} for each sequence")
