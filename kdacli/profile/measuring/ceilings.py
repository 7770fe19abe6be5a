"""What this GPU can do, measured in the same run as the kernels that are held against it."""

import dataclasses
from collections.abc import Callable

import torch

from kda_kernels.problem import Op
from kdacli.profile.measuring.timing import Budget, Statistics, Timed, interleave
from kdacli.profile.measuring.traffic import gbps

BUFFER_BYTES = 1 << 30
MATRIX = 8192  # rows and columns
BUDGET = Budget(seconds=0.2, min_samples=20, max_samples=100)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bandwidths in 1e9 bytes a second, bytes read and bytes written counted together.

    Attributes:
        copy_gbps: of a copy from one large buffer to another.
        inplace_gbps: of adding a number to a large buffer.
        least_us: what the smallest kernel costs when it is timed as the others are: no time can be under it.
        tensor_tflops: 1e12 operations a second of a large bf16 matrix product, a multiply-add counted as two.
    """

    copy_gbps: float
    inplace_gbps: float
    least_us: float
    tensor_tflops: float | None  # the oldest records lack it

    def of(self, op: Op) -> float:
        """The one that fits an op: decode updates a state in place, prefill and the gate read here and write there."""
        return self.inplace_gbps if op.decodes else self.copy_gbps


def measure(
    prepare: Callable[[Callable[[], object]], Timed],
    *,
    device: str = "cuda",
    num_bytes: int = BUFFER_BYTES,
    matrix: int = MATRIX,
) -> Ceilings:
    """Times a copy, an in-place update, an update of one element and a matrix product.

    Args:
        prepare: `GpuTimer.prepare`.
        device: where the buffers and matrices are made.
        num_bytes: size of each of the two buffers.
        matrix: rows and columns of each matrix. Its numbers are random: a product of zeros runs faster.
    """
    x = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    one = x[:1]
    a = torch.randn(matrix, matrix, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(a)
    timed = {
        "copy": prepare(lambda: y.copy_(x)),
        "inplace": prepare(lambda: x.add_(1.0)),
        "least": prepare(lambda: one.add_(1.0)),
        "product": prepare(lambda: torch.mm(a, a, out=product)),
    }
    samples, failed = interleave(timed, BUDGET)
    if failed:
        raise next(iter(failed.values()))
    median = {name: Statistics.of(s).median_us for name, s in samples.items()}
    return Ceilings(
        gbps(2 * x.nbytes, median["copy"]),
        gbps(2 * x.nbytes, median["inplace"]),
        median["least"],
        2 * matrix**3 / median["product"] / 1e6,
    )
