"""A call's tensors as a peer wants them: parameters of another type, offsets of a dense batch, aligned addresses.

An engine prepares such things once, when it loads a model or plans a batch, so they are remembered from call to call
and do not count in a kernel's time.
"""

from collections.abc import Iterable

import torch

from kda_kernels.engines.derived import counted, derived
from kda_kernels.errors import InputError
from kda_kernels.tensors import Inputs, Outputs


def parameter(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, converted once."""
    return tensor if tensor.dtype == dtype else derived(tensor, lambda x: x.to(dtype), dtype)


def gate_parameters(
    inputs: Inputs, A_log: torch.dtype | None = None, dt_bias: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_log [HV] and dt_bias [HV, K] of a raw gate in the types named, or in their own.

    Raises:
        InputError: the call has none.
    """
    rate, bias = inputs.A_log, inputs.dt_bias
    if rate is None or bias is None:
        wanted = "this kernel should be given A_log and dt_bias"
        raise InputError("A_log" if rate is None else "dt_bias", "is missing", wanted)
    HV, K = inputs.v.shape[2], inputs.q.shape[3]
    return (
        parameter(rate, A_log or rate.dtype).view(HV),
        parameter(bias, dt_bias or bias.dtype).view(HV, K),
    )


def gathered_states(inputs: Inputs) -> torch.Tensor | None:
    """The initial states of a kernel that knows no pool: of one, its slots, in a new tensor."""
    if inputs.state is None or inputs.state_indices is None:
        return inputs.state
    return inputs.state[inputs.state_indices]


def scattered_states(inputs: Inputs, o: torch.Tensor, final_state: torch.Tensor | None) -> Outputs:
    """What such a kernel returned: its final states go back to the slots of a pool."""
    if inputs.state_indices is not None and final_state is not None:
        pool, indices = inputs.pool
        pool[indices] = final_state.to(pool.dtype)
        final_state = pool
    return Outputs(o, final_state if inputs.output_final_state else None)


def offsets(inputs: Inputs) -> torch.Tensor:
    """cu_seqlens, of a dense batch too: int32 [B + 1], 0, T, 2T, ..."""
    if inputs.cu_seqlens is not None:
        return inputs.cu_seqlens
    B, T = inputs.q.shape[:2]
    return counted(B + 1, inputs.q.device, T)


def require_aligned(inputs: Inputs, names: Iterable[str], size: int = 16) -> None:
    """Raises `InputError` where a tensor that a kernel reads in place does not start at a multiple of `size` bytes.

    The peers that ask for this copy strided tensors, or have them copied, so of them only contiguous ones matter; a
    pool they never copy.

    Args:
        names: of the tensors that matter, among those that there are.
    """
    for name, tensor in inputs.tensors().items():
        in_place = tensor.is_contiguous() or (name == "state" and inputs.state_indices is not None)
        if name in names and in_place and tensor.data_ptr() % size:
            wanted = f"its address should be a multiple of {size} bytes for this kernel"
            raise InputError(name, "is not aligned", wanted)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[N, heads * size] of [N, 1, heads, size] or [1, N, heads, size]; a view where there can be one."""
    return tensor.flatten(0, 1).flatten(1)


def side_by_side(*tokens: torch.Tensor) -> torch.Tensor:
    """The rows of q, k and v as one [N, ..]: the tensor they are slices of, or a new one."""
    q, k, v = map(rows_of, tokens)
    width, size = sum(x.shape[1] for x in (q, k, v)), q.element_size()
    row, starts = q.stride(0), (q.data_ptr(), k.data_ptr(), v.data_ptr())
    expected = (starts[0], starts[0] + q.shape[1] * size, starts[0] + (q.shape[1] + k.shape[1]) * size)
    shared = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    if shared and starts == expected and all(x.stride() == (row, 1) for x in (q, k, v)) and row >= width:
        return q.as_strided((q.shape[0], width), (row, 1))
    return torch.cat((q, k, v), dim=1)
