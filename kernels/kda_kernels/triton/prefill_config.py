"""The tuning choices of the prefill, from the shape and the GPU alone."""

import dataclasses
import functools

from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.problem import CHUNK


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Tuning choices. Figures behind them: docs/notes/prefill-triton.md.

    Attributes:
        BV: value channels per program of the chain. Narrow slices fill the GPU when there are few heads; wide ones
            reread qg, kg and kd less often when there are many.
        chain_warps, chain_stages: of the chain: 3 stages where they fit into shared memory.
        halve_always: `chunk_factors` for bounded gates too.
        KB, KH: of `chunk_factors_bounded` and `chunk_factors`: channels in registers at a time. More channels,
            or fewer registers, spill, and a spill costs more here than programs that are not resident.
        factor_warps: of both.
        inverse_registers: a limit that lets 16 of its warps share a SM of sm_90 instead of 8, for 100 bytes or so of
            spills. None: no limit, and no spills, where nobody has measured it.
    """

    BV: int = 64
    chain_warps: int = 4
    chain_stages: int = 3
    halve_always: bool = False
    KB: int = 64
    KH: int = 64
    factor_warps: int = 4
    inverse_registers: int | None = 128

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def choose(
        cls, chains: int, K: int, V: int, itemsize: int = 2, sms: int = 132, shared: int = 232448, generation: int = 9
    ) -> "PrefillConfig":
        """From sequences times heads, the bytes of an operand, the multiprocessors, the shared memory of a program.

        `generation` is `kda_kernels.triton.runtime.generation`: wgmma of sm_90 takes operands from shared memory; the
        products of sm_100 have tensor memory, which many at a time would use up; elsewhere operands lie in registers,
        and the bounded factors, which keep those of k, would spill.
        """
        widest = 64
        most = cls()
        if generation == 10:
            most = cls(KH=16, inverse_registers=None)
        elif generation != 9:
            widest, most = 32, cls(chain_warps=8, halve_always=True, KH=16, inverse_registers=None)
        BV = max(16, min(widest, next_power_of_2(V)))
        # a chain is a walk of one program: narrower slices, until most multiprocessors have one
        while BV > 16 and chains * cdiv(V, BV) < 0.7 * sms:
            BV //= 2
        for stages in (3, 2, 1):
            for width in (BV, BV // 2):
                if width >= 16 and chain_shared_bytes(K, width, stages, itemsize) <= shared:
                    return dataclasses.replace(most, BV=width, chain_stages=stages)
        return dataclasses.replace(most, BV=16, chain_stages=1)


def chain_shared_bytes(K: int, BV: int, stages: int, itemsize: int) -> int:
    """Shared memory of `chunk_chain`, as Triton 3.6 lays it out on sm_90a."""
    BK, C = max(16, next_power_of_2(K)), CHUNK
    operands = stages * (3 * C * BK + 2 * C * C) * itemsize
    return operands + min(stages, 2) * (C * BV * itemsize + (BK + C) * 4) + BK * BV * itemsize
