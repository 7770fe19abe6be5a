"""Other people's kernels, each within what it declares to support, against the oracle on a GPU.

pytest tests/test_peers_gpu.py -rs          -rs: why what is skipped is skipped
"""

import dataclasses

import pytest
import torch

from kda_kernels.checks import problem_of
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.registry import Kernel
from kdacli.synthetic import make_inputs

SAFE = Options(Gate.SAFE, -5.0)
SOFTPLUS = Options(Gate.SOFTPLUS)
PREFILL = Problem(Op.PREFILL, (70, 0, 130), 2, 2, options=SAFE)
DECODE = Problem(Op.DECODE, (1,) * 5, 4, 4, packed=False, pool_slots=9, options=SOFTPLUS)

# kernel -> problems that it declares to support, each a change to PREFILL or DECODE
CASES = {
    "flashkda-prefill": [
        {},
        {"seq_lens": (64, 64), "packed": False},
        {"initial_state": False},
        {"final_state": False},
        {"state_dtype": "bfloat16"},
        {"pool_slots": 7},
        {"param_dtype": "bfloat16"},
        {"options": dataclasses.replace(SAFE, lower_bound=-2.0, scale=0.5)},
    ],
    "cudnn-prefill": [
        {},
        {"seq_lens": (64, 64), "packed": False},
        {"initial_state": False},
        {"final_state": False},
        {"state_dtype": "bfloat16"},
        {"pool_slots": 7},
        {"H": 2, "HV": 4},
        {"g_dtype": "float32", "beta_dtype": "float32", "param_dtype": "bfloat16"},
        {"options": dataclasses.replace(SAFE, qk_l2norm=False, beta_is_logit=False, scale=0.5)},
        {"options": Options(Gate.NONE, -5.0)},
    ],
    "sglang-decode": [
        {"param_dtype": "bfloat16"},
        {"param_dtype": "bfloat16", "packed": True},
        {"param_dtype": "bfloat16", "H": 2, "HV": 4},
        {"param_dtype": "bfloat16", "seq_lens": (1,) * 40, "pool_slots": 50},
        {"param_dtype": "bfloat16", "seq_lens": (1,)},
    ],
    "sglang-packed-decode": [
        {},
        {"packed": True, "H": 2, "HV": 4},
        {"options": SAFE, "padding": 2, "state_dtype": "bfloat16"},
        {"seq_lens": (1,) * 40, "pool_slots": 50, "options": dataclasses.replace(SAFE, scale=0.5)},
    ],
    "sglang-prefill": [
        {"seq_lens": (70, 130)},
        {"seq_lens": (64, 64), "packed": False},
        {"seq_lens": (70, 130), "initial_state": False, "options": SOFTPLUS},
        {"seq_lens": (70, 130), "pool_slots": 7, "state_dtype": "bfloat16"},
        {"seq_lens": (70, 130), "g_dtype": "float32", "options": dataclasses.replace(SAFE, beta_is_logit=False)},
        {"seq_lens": (70, 130), "options": Options(Gate.NONE)},
    ],
    "cula-decode": [
        {},
        {"packed": True},
        {"H": 2, "HV": 4},
        {"seq_lens": (1,) * 40, "pool_slots": 50},
        {"seq_lens": (1,)},
        {"state_v_first": False},
        {"options": dataclasses.replace(SOFTPLUS, qk_l2norm=False, scale=0.5)},
    ],
    "flashinfer-decode": [
        {"state_dtype": "bfloat16"},
        {"state_dtype": "bfloat16", "options": SAFE},
        {"state_dtype": "bfloat16", "padding": 2},
    ],
    "flashinfer-prefill": [{"state_dtype": "bfloat16"}, {"state_dtype": "bfloat16", "pool_slots": 7}],
}


def kernel_of(name: str) -> Kernel:
    op = name.rpartition("-")[2]
    return Kernel(name, Op(op), "peer", f"kdacli.peers.{name.replace('-', '_')}", "", False)


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["bench", "init"])
@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in CASES.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_computes_the_operation(name, change, gates):
    kernel = kernel_of(name)
    if (reason := kernel.unsupported()) is not None:
        pytest.skip(reason)
    problem = dataclasses.replace(PREFILL if kernel.op is Op.PREFILL else DECODE, **change)
    assert kernel.unsupported(problem) is None
    inputs = make_inputs(problem, gates=gates, device="cuda")
    assert problem_of(inputs, kernel.op) == problem
    expected = recurrence(inputs)
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    outputs = kernel.run(inputs)
    for tensor, want in expected.tensors().items():
        have = getattr(outputs, tensor)
        if tensor == "final_state" and inputs.state_indices is not None:
            used = inputs.state_indices[inputs.state_indices >= 0].long()
            have, want = inputs.state[used], want[used]
        assert have.shape == want.shape
        error = ((have.double() - want).norm() / want.norm()).item()
        assert error <= 2e-2, f"{tensor} is off by {error:.2e}"
    for name, tensor in before.items():
        if name != "state" or inputs.state_indices is None:
            assert torch.equal(getattr(inputs, name), tensor), f"{name} was modified"
