"""The examples run, and what they compute is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, env=os.environ, capture_output=True, text=True)


def test_a_capture_of_the_serving_loop_is_within_tolerance(tmp_path):
    words = ["capture", "--target", "kda_kernels.api:kda_decode", "--calls", "2", "--out", str(tmp_path / "dumps")]
    taken = run("-m", "kdacli", *words, "--", sys.executable, "examples/capture.py")
    assert taken.returncode == 0, taken.stderr
    assert "prefill [1, 100, 2, 32]" in taken.stdout and "step 3" in taken.stdout
    compared = run("-m", "kdacli", "compare", str(tmp_path / "dumps"), "--kernel", "torch-decode")
    assert compared.returncode == 0, compared.stdout
    assert len(list((tmp_path / "dumps").glob("*.pt"))) == 2


def test_the_kernel_in_triton():
    done = run("-m", "kdacli", "verify", "--kernel", "examples/triton_kernel.py:decode", "--shrink", "0")
    assert done.returncode == 0, done.stdout
    assert "pass" in done.stdout


@pytest.mark.gpu
def test_the_kernel_in_cuda():
    pytest.importorskip("ninja", reason="torch builds extensions with ninja")
    words = ["-N", "3", "-H", "2", "--gate", "softplus", "--padding", "1"]
    done = run("-m", "kdacli", "verify", "--op", "decode", "--kernel", "examples/cuda_kernel.py:decode", *words)
    assert done.returncode == 0, done.stdout
    assert torch.cuda.is_available()
