"""`kda_conv`: the convolution of whole prompts, of which `kda_prefill` then takes q, k and v.

For engines; `api` is where it is imported from.
"""

import torch

from kda_kernels import checks, ops  # noqa: F401  `ops` registers torch.ops.kda
from kda_kernels.boundary import forward_only_of, forward_only_traced
from kda_kernels.run import run_conv
from kda_kernels.tensors import Convolution


def kda_conv(
    mixed_qkv: torch.Tensor,
    conv: Convolution,
    *,
    cu_seqlens: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    null_slot: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The causal convolution of q, k and v over the tokens of whole prompts, then SiLU, in one launch.

    Sequences may be shorter than the window, and empty; the state of an empty one stays as it is.

    Args:
        mixed_qkv: [total tokens, D] with cu_seqlens, or [N, T, D]; fp32, fp16 or bf16, as the projection wrote it: rows
            may lie apart. D is any number of channels: 2 H K + HV V, or those of q, k or v alone.
        conv: see `Convolution`. Its states, which are updated in place, hold the last W - 1 raw tokens of each sequence
            afterwards. `indices` are the slots, and without them sequence n has slot n; a negative one is padding:
            nothing is read or written, and the rows of the result are zero. One >= P touches nothing, and its rows are
            NaN; on a CPU it is an `InputError`. States may be a slice of the channels of a wider pool.
        cu_seqlens: int32 or int64 [N + 1]. mixed_qkv may have more rows than its last entry says: those of the result
            are zero.
        has_initial_state: bool [N]; where false, the tokens before the first are zeros, and what the slot holds is not
            read.
        null_slot: a slot that is padding too, and that any number of sequences may carry.
        out: where the result goes, like mixed_qkv; rows may lie apart. Not mixed_qkv itself.

    Returns:
        The shape and dtype of mixed_qkv, sums in fp32. Views of it are what `kda_prefill` takes:
        `q, k, v = (x.unflatten(-1, (-1, 128))[None] for x in kda_conv(...).split([H * 128, H * 128, HV * 128], -1))`.

    Raises:
        InputError: an argument is wrong.
        UnavailableError: no GPU, and Triton's interpreter is not on.
    """
    tensors = (mixed_qkv, conv.weight, conv.bias)
    if checks.is_traced(mixed_qkv):
        o = torch.empty_like(mixed_qkv, memory_format=torch.contiguous_format) if out is None else out
        torch.ops.kda.conv(
            mixed_qkv, o, conv.weight, conv.bias, conv.states, conv.indices, cu_seqlens, has_initial_state, null_slot,
            conv.tokens_first,
        )  # fmt: skip
        return forward_only_traced(o, tensors)
    return forward_only_of(
        lambda: (run_conv(mixed_qkv, conv, cu_seqlens, has_initial_state, null_slot, out),), tensors
    )[0]
