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
    if kernel is None and chunk_indices is None and (outputs := _prefill_again(inputs, out, final_state)) is not None:
        return outputs
    check(inputs, names)
    check_out(out, inputs.v)
    check_final_state(final_state, inputs)
    check_chunk_indices(chunk_indices, inputs.cu_seqlens)
    return registry.prefill(inputs, out, final_state=final_state, chunk_indices=chunk_indices, kernel=kernel)


def _prefill_again(inputs: Inputs, out: torch.Tensor | None, final_state: torch.Tensor | None) -> Outputs | None:
    """A call like the one before, whose function checks it: a third of the host time. None: it is not."""
    if checks.CHECK_VALUES == "1" or inputs.rounding_seed is not None or inputs.state_scales is not None:
        return None
    pooled, wanted = inputs.state_indices is not None, inputs.output_final_state
    if final_state is not None and (pooled or not wanted):
        return None
    try:
        o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
        ht = inputs.new_final_state() if wanted and not pooled and final_state is None else final_state
    except (AttributeError, IndexError, RuntimeError, TypeError):  # these are no such tensors, as a check will say
        return None
    if not registry.prefill_again(inputs.fields(), o, ht):
        return None
    return Outputs(o, (inputs.state if pooled else ht) if wanted else None)
