"""Launch configurations of Triton kernels: by head size, and by architecture, each forced on whatever runs here."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from kda_kernels import registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Parts, Problem
from kda_kernels.reference import oracle
from kda_kernels.triton import prefill, runtime
from kda_kernels.triton.decode import DecodeConfig
from kda_kernels.triton.prefill import MAX_WGMMA_WARPS
from kda_kernels.triton.prefill_config import PrefillConfig
from kda_kernels.variant import SHARED_KIB
from kdacli.synthetic import make_inputs

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    *("prefill-kimi-k3", "prefill-kimi-linear", "prefill-fp16", "prefill-serving"),
    *("decode-kimi-k3", "decode-serving"),
)


@pytest.mark.parametrize(("K", "V"), [(64, 96), (96, 192), (128, 64), (192, 256), (256, 128)])
@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE, Op.STEP])
def test_head_sizes_of_models(op, K, V):
    parts = Parts() if op is Op.STEP else None
    inputs = make_inputs(
        Problem(op, (17,) if op is Op.PREFILL else (1,), 1, 1, K, V, pool_slots=2, parts=parts), device=DEVICE
    )
    expected, written = oracle.recurrence(inputs), inputs.fresh()
    o = registry.get(f"triton-{op}").run(written).o
    for got, right in ((o, expected.o), (written.state, expected.final_state)):
        difference = got.double().cpu() - right.cpu()
        assert difference.nan_to_num().norm() < 8e-3 * right.nan_to_num().norm()  # nobody's slots hold NaN
        assert torch.equal(got.isnan().cpu(), right.isnan().cpu())


def forced(monkeypatch, arch: str) -> tuple[PrefillConfig, DecodeConfig]:
    """What a few chains of heads of 128 are launched with."""
    monkeypatch.setenv("KDA_TRITON_ARCH", arch)
    generation, shared = (look.__wrapped__(CPU) for look in (runtime.generation, runtime.shared_memory))
    prefill = PrefillConfig.choose(256, 128, 128, shared=shared, generation=generation)
    return prefill, DecodeConfig.choose(4096, 128, 128, generation=generation)


def test_an_architecture_can_be_forced(monkeypatch):
    found = {arch: forced(monkeypatch, arch) for arch in SHARED_KIB}
    assert {prefill.halve_always for prefill, _ in found.values()} == {True, False}
    assert found["sm_80"] != found["sm_86"] != found["sm_90a"] != found["sm_100a"] != found["gfx942"]
    assert found["sm_86"][1].registers == 168 and found["sm_90a"][1].registers is None
    with pytest.raises(InputError, match="KDA_TRITON_ARCH is sm_81: it should be one of sm_80"):
        forced(monkeypatch, "sm_81")


def test_hopper_is_given_four_warps():
    """Its own products are wrong with eight (docs/versions.md)."""
    chains, sizes, shared = (1, 32, 96, 4096), (16, 64, 128, 256), (65536, 232448)
    shapes = itertools.product(chains, sizes, sizes, (2, 4), (78, 132), shared)
    assert {PrefillConfig.choose(*shape, generation=9).chain_warps for shape in shapes} == {MAX_WGMMA_WARPS}


@pytest.fixture
def wgmma(monkeypatch):
    """Sets whether products are Hopper's own, whatever runs here."""

    yield lambda there: monkeypatch.setattr(prefill, "has_wgmma", lambda device=None: there)
    runtime.generation.cache_clear()


def test_eight_warps_are_not_launched_with_hoppers_products(wgmma, monkeypatch):
    inputs = make_inputs(Problem(Op.PREFILL, (3,), 1, 1, 16, 16), device=DEVICE)
    config = PrefillConfig(BV=16, chain_warps=8)
    wgmma(True)
    with pytest.raises(UnavailableError, match="8 warps is wrong with wgmma: set TRITON_OVERRIDE_ARCH=sm80"):
        prefill.prefill(inputs, config=config)
    for arch in SHARED_KIB:
        monkeypatch.setenv("KDA_TRITON_ARCH", arch)
        runtime.generation.cache_clear()
        refused = "8 warps is wrong" in (prefill.unsupported() or "")
        assert refused == (arch not in ("sm_90a", "sm_100a", "sm_103a"))
    wgmma(False)
    assert "8 warps is wrong" not in (prefill.unsupported() or "")


@pytest.mark.gpu
def test_whose_products_triton_compiles_for(monkeypatch):
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert runtime.has_wgmma.__wrapped__() == hopper
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    assert not runtime.has_wgmma.__wrapped__()


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100a", "sm_120a", "gfx942", "gfx950"])
def test_configurations_of_other_gpus_are_right(arch):
    """With the products of sm_80 (mma.sync), as sm_86 and sm_120a have them; sm_100a's with those of the GPU here."""
    words = ["--kernel", "triton-prefill", "--kernel", "triton-decode"]
    words += [word for case in CASES for word in ("--case", case)]
    env = {**os.environ, "KDA_TRITON_ARCH": arch}
    env |= {} if arch == "sm_100a" else {"TRITON_OVERRIDE_ARCH": "sm80"}
    command = [sys.executable, "-m", "kdacli", "verify", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES)} checks: {len(CASES)} passed" in done.stdout
