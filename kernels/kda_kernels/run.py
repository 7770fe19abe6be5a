"""A call, checked and run: what the public functions share with the operators that stand for them when traced."""

import functools
from collections.abc import Callable, Mapping

import torch

from kda_kernels import checks, registry
from kda_kernels.boundary import check, check_chunk_indices, check_final_state, check_out
from kda_kernels.checks import check_cu_seqlens, require_memory, values_checked
from kda_kernels.errors import InputError
from kda_kernels.feature_checks import BOOL, check_conv, check_conv_slots, check_offsets
from kda_kernels.problem import Op
from kda_kernels.tensor_checks import FLOAT_DTYPES, check_contiguous, check_tensor, shape_error
from kda_kernels.tensors import Convolution, Inputs, Outputs


def run_decode(
    inputs: Inputs,
    out: torch.Tensor | None,
    final_state: torch.Tensor | None = None,
    kernel: str | None = None,
    names: Mapping[str, str] | None = None,
    op: Op = Op.DECODE,
) -> Outputs:
    """Checks a call, with the caller's names for its arguments, and runs it; see `registry.decode`."""
    try:
        if kernel is None:
            kernel = registry.kernel_for(op, inputs).name
    except (AttributeError, IndexError, TypeError):  # these are no such tensors
        check(inputs, names)
        raise
    if kernel != "cute-decode" or checks.CHECK_VALUES == "1":  # whose function checks shapes, strides and dtypes itself
        check(inputs, names)
        check_out(out, inputs.v)
    return registry.decode(inputs, out, final_state=final_state, kernel=kernel, op=op)


def run_prefill(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    kernel: str | None = None,
    names: Mapping[str, str] | None = None,
    final_state: torch.Tensor | None = None,
) -> Outputs:
    """Checks a call, with the caller's names for its arguments, and runs it; see `registry.prefill`."""
    o, ht = out, final_state
    if kernel is None and chunk_indices is None and checks.CHECK_VALUES != "1":
        o, ht = _room(inputs, out, final_state)
        if o is not None and _is_again(inputs, o, ht):
            final = ht if inputs.state_indices is None else inputs.state
            return Outputs(o, final if inputs.output_final_state else None)
    check(inputs, names)
    check_out(out, inputs.v)
    check_final_state(final_state, inputs)
    check_chunk_indices(chunk_indices, inputs.cu_seqlens)
    return registry.prefill(inputs, o, final_state=ht, chunk_indices=chunk_indices, kernel=kernel)


def _room(
    inputs: Inputs, out: torch.Tensor | None, final_state: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where o and final states without a pool go; as given, where these are no such tensors, as a check will say."""
    try:
        o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
        if final_state is None and inputs.output_final_state and inputs.state_indices is None:
            return o, inputs.new_final_state()
        return o, final_state
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return out, final_state


def _is_again(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None) -> bool:
    """Whether it was a call like the one before, whose function checks it: a third of the host time."""
    if inputs.rounding_seed is not None or inputs.state_scales is not None:
        return False
    if ht is not None and not (inputs.output_final_state and inputs.state_indices is None):
        return False
    return registry.prefill_again(inputs.fields(), o, ht)


def run_conv(
    mixed_qkv: torch.Tensor,
    conv: Convolution,
    cu_seqlens: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    null_slot: int | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`kda_kernels.convolution.kda_conv` of tensors that have memory."""
    N = _check_conv(mixed_qkv, conv, cu_seqlens, has_initial_state, out)
    if values_checked(mixed_qkv):
        if cu_seqlens is not None:
            check_offsets(cu_seqlens, mixed_qkv.shape[0])
        slots = list(range(N)) if conv.indices is None else conv.indices[:N].tolist()
        live = [-1 if slot < 0 or slot == null_slot else slot for slot in slots]
        check_conv_slots(conv, live, "conv.indices")
    made = torch.empty_like(mixed_qkv, memory_format=torch.contiguous_format) if out is None else out
    _launch_convolution()(mixed_qkv, made, conv, conv.indices, cu_seqlens, has_initial_state, null_slot)
    return made


@functools.cache
def _launch_convolution() -> Callable[..., None]:
    """What needs Triton, which other calls may not; an import takes 2 us even where it has been made."""
    from kda_kernels.triton.convolution import launch_convolution

    return launch_convolution


def _check_conv(
    mixed_qkv: torch.Tensor,
    conv: Convolution,
    cu_seqlens: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    out: torch.Tensor | None,
) -> int:
    """The number of sequences. Raises `InputError`."""
    x, packed = mixed_qkv, cu_seqlens is not None
    check_tensor("mixed_qkv", x, FLOAT_DTYPES, x, "mixed_qkv")
    require_memory(x, "mixed_qkv")
    if x.ndim != 3 - packed or not x.shape[-1]:
        raise shape_error("mixed_qkv", x, "[total tokens, D] with cu_seqlens, [N, T, D] without")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, 1, x, "mixed_qkv")
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_conv(conv, x.shape[-1], N, conv.width - 1, x, "mixed_qkv")
    _check_entries(conv)
    if has_initial_state is not None:
        check_tensor("has_initial_state", has_initial_state, BOOL, x, "mixed_qkv")
        if has_initial_state.shape != (N,):
            raise shape_error("has_initial_state", has_initial_state, f"[N] = [{N}], one for each sequence")
        check_contiguous("has_initial_state", has_initial_state)
    for name, t in (("mixed_qkv", x), ("out", out)):
        if t is None:
            continue
        if t.shape != x.shape or t.dtype is not x.dtype or t.device != x.device:
            found = f"is {t.dtype} {list(t.shape)} on {t.device}"
            raise InputError(name, found, f"it should be {x.dtype} {list(x.shape)} on {x.device}, as mixed_qkv")
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise InputError(name, f"has stride {t.stride(-1)} in its last dimension", "it should be 1")
        if t.stride(-2) >= _MOST_APART and t.shape[-2] > 1:
            found = f"has stride {t.stride(-2)} between tokens"
            raise InputError(name, found, f"it should be under {_MOST_APART}")
    if out is not None and x.numel() and out.data_ptr() == x.data_ptr():
        raise InputError("out", "is mixed_qkv", "it should be memory of its own: tokens are read more than once")
    return N


_MOST_APART = 2**31 // 64  # elements: 32 bits hold the offsets of the tokens of a program


def _check_entries(conv: Convolution) -> None:
    """Of its states channels or tokens lie side by side, and the others apart. Raises `InputError`."""
    D, L, channel, token = conv.entries
    if not ((channel == 1 and (token >= D or L == 1)) or (token == 1 and (channel >= L or D == 1))):
        found = f"have stride {channel} between channels and {token} between tokens"
        raise InputError("conv.states", found, "one should be 1, and the other as large as that dimension at least")
