"""How many blocks are resident on a multiprocessor at a time, and what keeps it from being more.

NVIDIA's arithmetic is that of its occupancy calculator (cuda_occupancy.h in the CUDA toolkit): registers are given to a
warp in units of 256, each of four partitions of a multiprocessor has a quarter of them, and shared memory is given in
units of 128 bytes, with 1 KiB more per block. AMD's is LLVM's (AMDGPU guide): a SIMD has 512 registers per lane, given
in units of 8 from accumulation and other registers together, and a work-group's LDS in units of 512 bytes.

It assumes that the multiprocessor is set to its largest share of shared memory, as the driver does when a block needs
it, and that the grid is large enough.
"""

from kdacli.compile.arch import REGISTERS, RESERVED_SHARED, TENSOR_MEMORY, Arch

PARTITIONS = 4


def resident(
    arch: Arch, *, registers: int, shared_bytes: int, num_warps: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """Blocks a multiprocessor, and the resource that limits them.

    Args:
        registers: per thread. shared_bytes, num_warps: per block. tensor_memory: columns per block (sm_100).

    Returns:
        (blocks, "warps", "blocks", "registers", "shared" or "tensor memory"); 0 blocks where one does not fit. Of
        limits that are equal the first of these is named: what is bound by the hardware no change of the others moves.
    """
    limits = {
        "warps": arch.max_warps // num_warps,
        "blocks": arch.max_blocks,
        "registers": _by_registers(arch, registers) // num_warps,
        "shared": _by_shared(arch, shared_bytes),
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    what = min(limits, key=limits.__getitem__)
    return limits[what], what


def _by_registers(arch: Arch, registers: int) -> int:
    """Warps whose registers fit into a multiprocessor."""
    if arch.amd:
        return min(512 // _round_up(max(registers, 1), 8) * PARTITIONS, arch.max_warps)
    a_warp = _round_up(max(registers, 1) * arch.warp, 256)
    return REGISTERS // PARTITIONS // a_warp * PARTITIONS


def _by_shared(arch: Arch, shared_bytes: int) -> int:
    """Blocks whose shared memory fits into a multiprocessor; one that no block may have fits not once."""
    if shared_bytes > arch.gpu.shared:
        return 0
    unit, reserved = (512, 0) if arch.amd else (128, RESERVED_SHARED)
    a_block = _round_up(shared_bytes + reserved, unit)
    return arch.shared_sm // a_block if a_block else arch.max_blocks


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
