"""A call, checked and run: what the public functions share with the operators that stand for them when traced."""

from collections.abc import Mapping

import torch

from kda_kernels import checks, registry
from kda_kernels.boundary import check, check_chunk_indices, check_final_state, check_out
from kda_kernels.problem import Op
from kda_kernels.tensors import Inputs, Outputs


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
