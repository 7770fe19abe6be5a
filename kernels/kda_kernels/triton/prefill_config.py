"""The tuning choices of the prefill, from the shape and the GPU alone."""

import dataclasses

from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Dims


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tuning choices. Figures behind them: kernels/README.md.

    Attributes:
        BV: value channels a program of the chain. Narrow slices fill the GPU when there are few heads; wide ones reread
            qg, kg and kd less often when there are many.
        chain_warps, chain_stages: of the chain: 3 stages where they fit into shared memory.
        KB, factor_warps: of both factor kernels: channels in registers at a time, and warps. More than 64 channels, or
            fewer registers, spill, and a spill costs more here than programs that are not resident.
        inverse_registers: a limit that lets 16 of its warps share a SM instead of 8.
    """

    BV: int = 64
    chain_warps: int = 4
    chain_stages: int = 3
    KB: int = 64
    factor_warps: int = 4
    inverse_registers: int = 128

    @classmethod
    def choose(cls, dims: Dims, itemsize: int = 2, sms: int = 132, shared: int = 232448) -> "PrefillConfig":
        """From the shape, the bytes of an operand, the multiprocessors and the shared memory of a program."""
        chains = dims.N * dims.HV
        BV = max(16, min(64, next_power_of_2(dims.V)))
        # a chain is a walk of one program: narrower slices, until most multiprocessors have one
        while BV > 16 and chains * cdiv(dims.V, BV) < 0.7 * sms:
            BV //= 2
        for stages in (3, 2, 1):
            for width in (BV, BV // 2):
                if width >= 16 and chain_shared_bytes(dims.K, width, stages, itemsize) <= shared:
                    return cls(BV=width, chain_stages=stages)
        return cls(BV=16, chain_stages=1)


def chain_shared_bytes(K: int, BV: int, stages: int, itemsize: int) -> int:
    """Shared memory of `chunk_chain`, as Triton 3.6 lays it out on sm_90a."""
    BK, C = max(16, next_power_of_2(K)), CHUNK
    operands = stages * (3 * C * BK + 2 * C * C) * itemsize
    return operands + min(stages, 2) * (C * BV * itemsize + (BK + C) * 4) + BK * BV * itemsize
