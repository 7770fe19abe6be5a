"""Autotuned kernels in a configuration that somebody chose: which one, and what becomes of those that do not fit."""

import json

import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner
from triton.runtime.errors import OutOfResources

from kdacli import autotuning
from kdacli.main import cli

# The prefill of plain torch, copied by a kernel that is wrong in the last of its configurations.
MINE = """
import torch
import triton
import triton.language as tl
from kda_kernels.api import chunk_kda

@triton.autotune([triton.Config({"B": b}) for b in (64, 128, 32)], key=["n"])
@triton.jit
def copy(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    wrong = 3.0 if B == 32 else 1.0
    tl.store(y + i, tl.load(x + i, i < n).to(tl.float32) * wrong, i < n)

def prefill(q, k, v, g, beta, A_log, dt_bias, lower_bound, cu_seqlens=None):
    options = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, safe_gate=True, use_gate_in_kernel=True)
    fused = dict(use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    o, _ = chunk_kda(q, k, v, g, beta, cu_seqlens=cu_seqlens, **options, **fused)
    y = torch.empty_like(o)
    copy[lambda meta: (triton.cdiv(o.numel(), meta["B"]),)](o, y, o.numel())
    return y
"""
CASE = "prefill-any/lens=70/K=16/V=16/initial_state=no/final_state=no"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test takes is taken in that test alone."""
    monkeypatch.setattr(autotuning, "_taken", 0)
    monkeypatch.setattr(triton.runtime.autotuner.Autotuner, "run", autotuning._run)


@pytest.fixture
def scaled():
    """An autotuned kernel that writes its B over what it is given, and has four configurations."""

    @triton.autotune([triton.Config({"B": b}) for b in (16, 32, 64, 128)], key=["n"])
    @triton.jit
    def write(x, n, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(x + i, B, i < n)

    return write


def written(kernel) -> int:
    """The configuration's B."""
    x = torch.zeros(100, dtype=torch.int32)
    kernel[lambda meta: (triton.cdiv(100, meta["B"]),)](x, 100)
    assert (x == x[0]).all()
    return int(x[0])


@pytest.mark.parametrize(("number", "block"), [(0, 16), (1, 32), (3, 128), (4, 16), (6, 64)])
def test_the_one_that_is_taken(scaled, number, block):
    autotuning.take(number)
    assert written(scaled) == block
    assert scaled.best_config.kwargs == {"B": block}


def test_the_first_unless_somebody_chose(scaled):
    autotuning.take(2)
    autotuning.take_first()
    assert written(scaled) == 64


def test_pruning_comes_before(scaled):
    scaled.early_config_prune = lambda configs, nargs, **kwargs: [c for c in configs if c.kwargs["B"] > nargs["n"] // 2]
    autotuning.take(0)
    assert written(scaled) == 64
    autotuning.take(1)
    assert written(scaled) == 128


class Small:
    """A GPU with no room for blocks over 32, in front of a kernel."""

    def __init__(self, fn, most):
        self.fn, self.most = fn, most

    def run(self, *args, B, **kwargs):
        if self.most < B:
            raise OutOfResources(B, self.most, "shared memory")
        return self.fn.run(*args, B=B, **kwargs)


def test_one_that_does_not_fit_gives_way_to_the_next(scaled):
    scaled.fn = Small(scaled.fn, 32)
    autotuning.take(2)
    assert written(scaled) == 16
    assert scaled.best_config.kwargs == {"B": 16}


def test_where_none_fits_it_says_so(scaled):
    scaled.fn = Small(scaled.fn, 8)
    with pytest.raises(OutOfResources, match="shared memory, Required: 128, Hardware limit: 8"):
        written(scaled)


def test_what_else_goes_wrong_is_no_question_of_room(scaled):
    class Broken:
        def run(self, *args, **kwargs):
            raise ValueError("no")

    scaled.fn = Broken()
    with pytest.raises(ValueError, match="no"):
        written(scaled)


def test_the_hook_of_a_configuration_is_called(scaled):
    seen = []
    scaled.configs[1].pre_hook = seen.append
    autotuning.take(1)
    written(scaled)
    assert [(args["n"], args["B"]) for args in seen] == [(100, 32)]


class TestVerify:
    @pytest.fixture
    def check(self, tmp_path):
        (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")

        def check(*words):
            kernel = f"{tmp_path / 'mine.py'}:prefill"
            words = ["verify", "--device", "cpu", "--kernel", kernel, "--case", CASE, "--shrink", "0", *words]
            return CliRunner().invoke(cli, [*words, "--json", "-"])

        return check

    def test_without_a_gpu_to_time_on_a_kernel_runs(self, check):
        result = check()
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["triton_config"] is None

    @pytest.mark.parametrize("isolate", ["--isolate", "--no-isolate"])
    def test_the_configuration_that_is_wrong(self, check, isolate):
        assert check("--triton-config", "1", isolate).exit_code == 0
        result = check("--triton-config", "2", isolate)
        report = json.loads(result.stdout)
        assert result.exit_code == 1 and report["triton_config"] == 2
        (row,) = report["rows"]
        assert row["status"] == "fail" and row["reproduce"].endswith("--device cpu --triton-config 2")


def test_profile_takes_the_configuration_too(monkeypatch):
    taken = []
    monkeypatch.setattr(autotuning, "take", taken.append)
    monkeypatch.setattr("kdacli.commands.profile._measure", lambda *_: None)
    result = CliRunner().invoke(cli, ["profile", "--triton-config", "2", "--op", "prefill"])
    assert result.exit_code == 0 and taken == [2]
    result = CliRunner().invoke(cli, ["profile", "--triton-config", "2", "--from", "record.json"])
    assert result.exit_code != 0 and taken == [2]
