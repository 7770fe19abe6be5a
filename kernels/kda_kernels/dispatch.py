"""Which of our decode kernels runs a call of the public functions: CuTe DSL's where it can, else Triton's.

The rule, and all there is to it: `cute-decode` runs on a GPU of sm_90a or newer with the DSL installed, when K is a
multiple of 32, V of 16, the state is V-first and its slots are 16-byte aligned; `triton-decode` runs everything else.
`decode_kernel` says which it is for given tensors, and whoever names a kernel gets that one or an error.
"""

import functools
import os
import sys

import torch

from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.tensors import Inputs, Outputs

CUTE, TRITON = "cute-decode", "triton-decode"
CUTE_MODULE = "kda_kernels.cute.decode"
CHECK_VALUES = os.environ.get("KDA_CHECK_VALUES") == "1"  # what tensors hold is checked, too; see `kda_kernels.checks`


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
    token_states: torch.Tensor | None = None,
    kernel: str | None = None,
) -> Outputs:
    """Runs a checked problem with `kernel`, or the one that `decode_kernel` names.

    Args, Returns: as `kda_kernels.triton.decode.decode`.

    Raises:
        InputError: there is no such decode kernel, or it does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    kernel = kernel or decode_kernel(inputs)
    if kernel == CUTE:
        if not inputs.q.is_cuda:
            raise UnavailableError(f"{CUTE}: {_cute().unsupported_here() or 'the tensors lie on the CPU'}")
        return _cute().decode(inputs, out, final_state=final_state, token_states=token_states)
    if kernel != TRITON:
        raise InputError(f"kernel is {kernel}: it should be {CUTE} or {TRITON}")
    from kda_kernels.triton.decode import decode as triton_decode

    return triton_decode(inputs, out, final_state=final_state, token_states=token_states)


def decode_again(inputs: Inputs, out: torch.Tensor, token_states: torch.Tensor | None) -> bool:
    """`decode` in place, if this call is just like the one before: an engine's every step. False: nothing was done."""
    return CUTE_MODULE in sys.modules and _cute().again(inputs, out, None, token_states)


@functools.cache
def _cute_can(device: torch.device, K: int, V: int) -> bool:
    cute = _cute()
    return cute.unsupported_here(device) is None and cute.unsupported_shape(K, V) is None


@functools.cache
def _cute():
    from kda_kernels.cute import decode as module

    return module
