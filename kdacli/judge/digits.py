"""Numbers that hold fewer digits than their dtype: a float32 state that was rounded to bf16, fp16 or tf32 on its way.

One such rounding of a final state is smaller than what products of bf16 operands make of it, so that no bound sees it.
But a state that is handed on from step to step, and rounded in each, drifts; who asks for float32 means to prevent it.
"""

import torch

from kdacli.judge.blocks import Blocks

ENOUGH = 64  # elements that all lack digits, where 1 of 2^13 does by chance
_LOW = (1 << 13) - 1  # what float32's mantissa has beyond the ten bits of fp16 and tf32


def note(blocks: Blocks, out: torch.Tensor, ref: torch.Tensor, plain: torch.Tensor) -> str:
    """What is wrong with `out`, in words; "" if nothing is.

    Args:
        out, ref, plain: the result, the reference, and what the plain implementation made. A digit is missing where
            reference and plain implementation both have it: a single product of short numbers is short.
    """
    out = blocks.rows(out)
    needed = _fine(blocks.rows(ref)) & _fine(blocks.rows(plain)) & out.ne(0)
    lacking = (blocks.sums(needed) >= ENOUGH) & (blocks.sums(needed & _fine(out)) == 0)
    if not bool(lacking.any()):
        return ""
    n, h = divmod(int(lacking.flatten().byte().argmax()), lacking.shape[1])
    return (
        f"{int(lacking.sum())} of {lacking.numel()} (sequence, head) blocks, first sequence {n}, head {h}, hold ten"
        " bits of mantissa at most: they were rounded to bf16, fp16 or tf32, and the kernel declares no carried_state"
    )


def _fine(rows: torch.Tensor) -> torch.Tensor:
    """Which elements, of values that float32 holds, need more than ten bits of mantissa."""
    return rows.float().view(torch.int32).bitwise_and_(_LOW).ne(0)
