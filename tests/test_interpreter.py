"""Triton's interpreter made quick computes what it computes otherwise, and leaves `triton.language` as it was."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch
if sys.argv[1] == "quick":
    from kdacli.interpreter import quicken
    quicken()
import triton.language as tl
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import get
from kdacli.synthetic import make_inputs

before = (tl.load, tl.tensor.__add__, tl.core.range)
inputs = make_inputs(Problem(Op.PREFILL, (1, 70), H=1, HV=1, K=16, V=16))
outputs = get("triton-prefill").run(inputs)
assert sys.argv[1] == "slow" or before == (tl.load, tl.tensor.__add__, tl.core.range)
torch.save(outputs.tensors(), sys.argv[2])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
def test_the_same_bits_with_and_without(tmp_path):
    found = {}
    for how in ("quick", "slow"):
        subprocess.run([sys.executable, "-c", PROGRAM, how, str(tmp_path / how)], check=True, timeout=120)
        found[how] = torch.load(tmp_path / how)
    for name, tensor in found["slow"].items():
        assert torch.equal(tensor, found["quick"][name]), name
