"""Numbers that hold fewer digits than their dtype: a float32 tensor that was rounded to bf16, fp16 or tf32 on its way.

One such rounding of a final state is smaller than what products of bf16 operands make of it, so that no bound sees it.
But a state that is handed on from step to step, and rounded in each, drifts; who asks for float32 means to prevent it.
"""

import torch

ENOUGH = 64  # elements that all lack digits, where 1 of 2^13 does by chance
_LOW = (1 << 13) - 1  # what float32's mantissa has beyond the ten bits of fp16 and tf32


def fine(rows: torch.Tensor) -> torch.Tensor:
    """Which elements, of values that float32 holds, need more than ten bits of mantissa."""
    return rows.float().view(torch.int32).bitwise_and_(_LOW).ne(0)


def note(should: torch.Tensor, do: torch.Tensor) -> str:
    """What is wrong, in words; "" if nothing is.

    Args:
        should: [sequences, heads], how many elements of a block need their digits in the reference and in the plain
            implementation alike, and are not zero in the result. do: how many of these have them there.
    """
    lacking = (should >= ENOUGH) & (do == 0)
    if not bool(lacking.any()):
        return ""
    n, h = divmod(int(lacking.flatten().byte().argmax()), lacking.shape[1])
    return (
        f"{int(lacking.sum())} of {lacking.numel()} (sequence, head) blocks, first sequence {n}, head {h}, hold ten"
        " bits of mantissa at most: they were rounded to bf16, fp16 or tf32, and should be float32"
    )
