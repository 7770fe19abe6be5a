"""Resident blocks: against the tables of NVIDIA's occupancy calculator, by hand, and on a GPU against its driver."""

import ctypes

import pytest

from kdacli.compile import arch
from kdacli.compile.occupancy import resident

KIB = 1024


@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "blocks", "limit"),
    [
        ("sm_80", 32, 0, 8, 8, "warps"),  # 256 threads of 32 registers fill an A100
        ("sm_80", 64, 0, 8, 4, "registers"),
        ("sm_80", 33, 0, 8, 6, "registers"),  # 40 are given: 12 warps a partition, 48 in all
        ("sm_80", 16, 81 * KIB, 4, 2, "shared"),  # 2 * (81 + 1) = 164
        ("sm_80", 16, 82 * KIB, 4, 1, "shared"),
        ("sm_80", 16, 164 * KIB, 4, 0, "shared"),  # a block may have 163
        ("sm_86", 16, 0, 1, 16, "blocks"),
        ("sm_86", 16, 0, 32, 1, "warps"),  # 1024 threads of 1536
        ("sm_89", 16, 0, 1, 24, "blocks"),
        ("sm_90a", 255, 0, 1, 8, "registers"),  # two warps of 8192 registers a partition
        ("sm_90a", 128, 2048, 1, 16, "registers"),
        ("sm_90a", 255, 0, 4, 2, "registers"),
        ("sm_90a", 168, 227 * KIB, 4, 1, "shared"),
        ("sm_90a", 24, 0, 2, 32, "warps"),
        ("sm_90a", 255, 0, 16, 0, "registers"),  # 512 threads of 255 registers do not fit
        ("gfx942", 64, 0, 4, 8, "warps"),
        ("gfx942", 65, 0, 4, 7, "registers"),  # 72 are given: 7 waves a SIMD
        ("gfx942", 512, 0, 1, 4, "registers"),
        ("gfx942", 64, 32 * KIB, 4, 2, "shared"),
    ],
)
def test_resident_blocks(name, registers, shared, warps, blocks, limit):
    found = resident(arch.parse(name), registers=registers, shared_bytes=shared, num_warps=warps)
    assert found == (blocks, limit)


def test_tensor_memory_limits_too():
    found = resident(arch.parse("sm_100a"), registers=32, shared_bytes=0, num_warps=4, tensor_memory=256)
    assert found == (2, "tensor memory")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton-gate", "triton-decode"])
def test_the_driver_says_the_same(name):
    """cuOccupancyMaxActiveBlocksPerMultiprocessor of the loaded binary, for several sizes of shared memory."""
    import torch
    from triton.runtime import driver

    from kda_kernels import registry
    from kdacli.compile import sass, worker

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    cuda = ctypes.CDLL("libcuda.so.1")
    (there,) = arch.select([])
    for variant in worker.variants(registry.get(name), None, there):
        built = variant.build(there.name)
        registers = sass.resources(built.log)["registers"]
        entry = built.ptx.partition(".entry ")[2].partition("(")[0].strip()
        for shared in (built.shared_bytes, 40 * KIB, there.gpu.shared):
            loaded = driver.active.utils.load_binary(entry, built.cubin, shared, torch.cuda.current_device())
            blocks = ctypes.c_int()
            status = cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), ctypes.c_void_p(loaded[1]), 32 * built.num_warps, ctypes.c_size_t(shared)
            )
            assert status == 0
            said = resident(there, registers=registers, shared_bytes=shared, num_warps=built.num_warps)
            assert said[0] == blocks.value, (variant.name, shared)
