"""Which of our kernels runs a call of the public functions.

Decode, and all there is to its rule: `cute-decode` runs on a GPU of sm_90a or newer with the DSL installed, when K is a
multiple of 32, V of 16, the state is V-first and its slots are 16-byte aligned; `triton-decode` runs everything else.

Prefill: `cute-prefill` runs what it can (`kda_kernels.cute.prefill`: on sm_90a, with the DSL, bf16, K = V = 128, gates
bounded by -5, V-first states, rows that are multiples of 16 bytes), as it was faster in every shape measured;
`triton-prefill` runs everything else.

`decode_kernel` and `prefill_kernel` say which it is for given tensors, and whoever names a kernel gets that one or an
error.
"""

import functools
import sys

import torch

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.tensors import Inputs, Outputs

CUTE, TRITON = "cute-decode", "triton-decode"
CUTE_PREFILL, TRITON_PREFILL = "cute-prefill", "triton-prefill"
CUTE_MODULE = "kda_kernels.cute.decode"


def decode_kernel(inputs: Inputs) -> str:
    """The registry's name of the kernel that decodes these tensors."""
    q = inputs.q
    if not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (q, inputs.v)):
        return TRITON  # whose check says what is wrong
    if not (q.is_cuda and _cute_can(q.device, q.shape[-1], inputs.v.shape[-1])):
        return TRITON
    return CUTE if _cute().unsupported_tensors(inputs) is None else TRITON


def decode(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    *,
    final_state: torch.Tensor | None = None,
    kernel: str | None = None,
) -> Outputs:
    """Runs a checked problem with `kernel`, or the one that `decode_kernel` names.

    Args, Returns: as `kda_kernels.triton.decode.decode`.

    Raises:
        InputError: there is no such decode kernel, or it does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    kernel = kernel or decode_kernel(inputs)
    inputs = inputs.without_spare_slots()
    if kernel == CUTE:
        if not inputs.q.is_cuda:
            raise UnavailableError(f"{CUTE}: {_cute().unsupported_here() or 'the tensors lie on the CPU'}")
        return _cute().decode(inputs, out, final_state=final_state)
    if kernel != TRITON:
        raise InputError("kernel", f"is {kernel}", f"it should be {CUTE} or {TRITON}")
    from kda_kernels.triton.decode import decode as triton_decode

    return triton_decode(inputs, out, final_state=final_state)


def decode_again(inputs: Inputs, out: torch.Tensor) -> bool:
    """`decode` in place, if this call is just like the one before: an engine's every step. False: nothing was done."""
    return CUTE_MODULE in sys.modules and _cute().again(inputs, out)


def prefill_kernel(inputs: Inputs, out: torch.Tensor | None = None) -> str:
    """The registry's name of the kernel that prefills these checked tensors, with `out` as in `prefill`."""
    if not (inputs.q.is_cuda and _cute_prefill_can(inputs.q.device)):
        return TRITON_PREFILL
    return CUTE_PREFILL if _cute_prefill().unsupported_tensors(inputs, out) is None else TRITON_PREFILL


def prefill(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    *,
    chunk_indices: torch.Tensor | None = None,
    return_intermediate_states: bool = False,
    kernel: str | None = None,
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """Runs a checked problem with `kernel`, or the one that `prefill_kernel` names.

    Args, Returns: as `kda_kernels.triton.prefill.prefill`; cute-prefill needs no `chunk_indices`.

    Raises:
        InputError: there is no such prefill kernel, or it does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    kernel = kernel or prefill_kernel(inputs, out)
    inputs = inputs.without_spare_slots()
    if kernel == CUTE_PREFILL:
        return _cute_prefill().prefill(inputs, out, return_intermediate_states=return_intermediate_states)
    if kernel != TRITON_PREFILL:
        raise InputError("kernel", f"is {kernel}", f"it should be {CUTE_PREFILL} or {TRITON_PREFILL}")
    from kda_kernels.triton.prefill import prefill as triton_prefill

    return triton_prefill(
        inputs, chunk_indices=chunk_indices, out=out, return_intermediate_states=return_intermediate_states
    )


@functools.cache
def _cute_can(device: torch.device, K: int, V: int) -> bool:
    cute = _cute()
    return cute.unsupported_here(device) is None and cute.unsupported_shape(K, V) is None


@functools.cache
def _cute():
    from kda_kernels.cute import decode as module

    return module


@functools.cache
def _cute_prefill_can(device: torch.device) -> bool:
    return _cute_prefill().unsupported_here(device) is None


@functools.cache
def _cute_prefill():
    from kda_kernels.cute import prefill as module

    return module
