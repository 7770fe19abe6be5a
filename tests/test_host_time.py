"""benchmarks/host_time.py: what it calls are calls of changing shapes that compute; its times need a GPU."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kda_kernels import registry
from kda_kernels.problem import Op
from kda_kernels.reference.oracle import recurrence

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "host_time.py"
spec = importlib.util.spec_from_file_location("host_time", SCRIPT)
host_time = importlib.util.module_from_spec(spec)
sys.modules["host_time"] = host_time
spec.loader.exec_module(host_time)


@pytest.mark.parametrize("shapes", ["same", "length", "packed"])
def test_lengths_never_come_twice(shapes):
    found = host_time.lengths(shapes, 40, 8192)
    assert len(found) == 40
    assert all(1 <= sum(lens) <= 8192 and 1 <= len(lens) <= host_time.SEQUENCES and min(lens) > 0 for lens in found)
    pairs = itertools.pairwise(found)
    assert all((a == b) == (shapes == "same") for a, b in pairs)
    assert {len(lens) for lens in found} == ({1} if shapes != "packed" else {1, 2, 3, 4, 5, 6})


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
def test_what_is_timed_computes(op):
    """As an engine calls it, and by name, on views of one set of tensors."""
    if op is Op.PREFILL:
        calls = list(host_time.prefill_calls(1, "packed", 2, tokens=20, device="cpu"))
    else:
        calls = list(host_time.decode_calls(1, "batch", 2, batch=3, device="cpu"))
    out = torch.empty(3 if op is Op.DECODE else 1, 20, 1, 128, dtype=torch.bfloat16)
    for inputs in calls:
        expected = recurrence(inputs).o
        host_time.as_an_engine(inputs.fresh(), out)()
        rows, tokens = inputs.v.shape[:2]
        assert (out[:rows, :tokens].double() - expected).norm() < 0.02 * expected.norm()
        got = registry.get(f"torch-{op}").run(inputs.fresh()).o
        assert (got.double() - expected).norm() < 0.02 * expected.norm()


def test_rows_of_calls(monkeypatch):
    monkeypatch.setattr(host_time, "TURN", 1)
    calls = list(host_time.decode_calls(1, "batch", 4, batch=3, device="cpu"))
    ours, floor, pace, torch_decode = host_time.measure(Op.DECODE, 1, {"batch": calls}, [registry.get("torch-decode")])
    names = ("kda_decode", "torch add_", "python loop", "torch-decode")
    assert tuple(row.kernel for row in (ours, floor, pace, torch_decode)) == names
    for row in (ours, floor, pace, torch_decode):
        assert row.calls == 3 and 0 < row.p50_us <= row.p90_us <= row.max_us


@pytest.mark.gpu
def test_gpu_host_times(tmp_path):
    dest = tmp_path / "h.json"
    words = [sys.executable, str(SCRIPT), "--heads", "4", "--calls", "5", "--no-peers", "--json", str(dest)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(dest.read_text())["rows"]
    assert {row["shapes"] for row in rows} == {"same", "length", "packed", "batch", "queued"}
    assert {"kda_prefill", "kda_decode", "triton-prefill", "triton-decode"} <= {row["kernel"] for row in rows}
    assert not any(row["error"] for row in rows)
