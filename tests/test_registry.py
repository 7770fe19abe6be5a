"""The registry: what it finds, what it refuses, and that a broken package is a reason and not the end."""

import sys

import pytest

from kda_kernels import registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.triton import gate, gate_unfused, runtime

PROBLEM = Problem(Op.PREFILL, (70,), H=1, HV=1, K=32, V=32)


def test_every_kernel_answers_for_every_op():
    for kernel in registry.kernels():
        other = next(op for op in Op if op is not kernel.op)
        assert f"serves the op {kernel.op}" in kernel.unsupported(Problem(other, (1,), 1, 1))
        assert kernel.unsupported() is None or kernel.unsupported()


def test_choose_takes_the_first_of_ours_that_can():
    assert registry.choose(PROBLEM).name == "triton-prefill"


def test_choose_says_why_none_can(monkeypatch):
    for module in (gate, gate_unfused):
        monkeypatch.setattr(module, "unsupported_here", lambda: "the GPU is on holiday")
    with pytest.raises(UnavailableError, match="triton-gate: the GPU is on holiday; triton-gate-unfused: "):
        registry.choose(Problem(Op.GATE, (70,), H=1, HV=1))


def test_unknown_and_taken_names():
    with pytest.raises(InputError, match="kernel nonsense is unknown: there are cute-decode, triton-decode"):
        registry.get("nonsense")
    with pytest.raises(InputError, match="registered already"):
        registry.register(registry.get("triton-decode"))


def test_a_package_that_breaks_at_its_import_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('its package\\nis broken')")
    monkeypatch.syspath_prepend(tmp_path)
    kernel = registry.Kernel("broken", Op.PREFILL, "peer", "broken_peer", "a peer", ours=False)
    assert kernel.unsupported(PROBLEM) == "RuntimeError: its package is broken"
    assert "broken_peer" not in sys.modules


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.6", False)]
)
def test_an_interpreter_that_cannot_work_with_this_numpy_says_so(triton, numpy, fails, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    runtime._interpreter_fails.cache_clear()
    assert ("numpy<2.4" in (runtime.unsupported_here() or "")) == fails
    monkeypatch.undo()
    runtime._interpreter_fails.cache_clear()
