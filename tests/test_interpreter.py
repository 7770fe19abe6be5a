"""Triton's interpreter made quick computes what it computes otherwise, and leaves `triton.language` as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kda_kernels.problem import Op, Problem
from kda_kernels.registry import get
from kda_kernels.tensors import Outputs
from kdacli.synthetic import make_inputs

SLOW = "import sys, torch, test_interpreter; torch.save(test_interpreter.outputs().tensors(), sys.argv[1])"


def outputs() -> Outputs:
    return get("triton-prefill").run(make_inputs(Problem(Op.PREFILL, (1, 66), H=1, HV=1, K=16, V=16)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_the_same_bits_with_and_without(tmp_path):
    """Here it is quick (see conftest.py), in a process of its own it is not."""
    import triton.language as tl
    from triton.runtime import interpreter

    assert interpreter._kda_quick
    before = (tl.load, tl.tensor.__add__, tl.core.range)
    quick = outputs().tensors()
    if hasattr(interpreter, "_LangPatchScope"):  # versions without it never restore anything
        assert before == (tl.load, tl.tensor.__add__, tl.core.range)
    path = [str(Path(__file__).parent), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    subprocess.run([sys.executable, "-c", SLOW, str(tmp_path / "slow")], check=True, timeout=120, env=env)
    for name, tensor in torch.load(tmp_path / "slow").items():
        assert torch.equal(tensor, quick[name]), name
