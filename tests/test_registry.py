"""The registry: what it finds, what it refuses, and that a broken package is a reason and not the end."""

import dataclasses
import subprocess
import sys

import pytest

import kdacli  # noqa: F401  registers the peers
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


def kernel_of(code: str, tmp_path, monkeypatch, ours: bool = True) -> registry.Kernel:
    """A kernel whose module holds `code`."""
    (tmp_path / "planted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    monkeypatch.setattr(registry, "_failed", {})
    return registry.Kernel("planted", Op.PREFILL, "none", "planted", "for this test", ours=ours)


BROKEN = ["raise RuntimeError('its package\\nis broken')", "def unsupported(problem): return nonsense"]


@pytest.mark.parametrize("code", BROKEN, ids=["import", "unsupported"])
def test_an_error_in_our_own_code_is_no_reason(code, tmp_path, monkeypatch):
    kernel = kernel_of(code, tmp_path, monkeypatch)
    with pytest.raises((RuntimeError, NameError)):
        kernel.unsupported(PROBLEM)


def test_choose_does_not_pass_over_a_broken_kernel(monkeypatch):
    monkeypatch.setattr("kda_kernels.triton.prefill.unsupported_here", lambda: nonsense)  # noqa: F821
    with pytest.raises(NameError):
        registry.choose(PROBLEM)


@pytest.mark.parametrize("code", BROKEN, ids=["import", "unsupported"])
def test_an_error_in_a_peers_code_is_its_failure(code, tmp_path, monkeypatch):
    kernel = kernel_of(code, tmp_path, monkeypatch, ours=False)
    assert kernel.unsupported(PROBLEM) is None and kernel.failure.startswith(
        ("RuntimeError: its package is", "NameErr")
    )
    with pytest.raises((RuntimeError, NameError)):
        kernel.run(None)


def test_a_package_that_is_missing_is_a_reason(tmp_path, monkeypatch):
    kernel = kernel_of("import no_such_package", tmp_path, monkeypatch)
    assert kernel.unsupported(PROBLEM) == "ModuleNotFoundError: No module named 'no_such_package'"
    ours = kernel_of("from kda_kernels import no_such_module", tmp_path, monkeypatch)
    with pytest.raises(ImportError):
        ours.unsupported(PROBLEM)


def test_a_feature_that_a_kernel_does_not_have_is_a_reason():
    assert (
        registry.get("triton-gate").unsupported(
            dataclasses.replace(PROBLEM, op=Op.GATE, features={"tail", "null_slot"})
        )
        == "it does not support null_slot, tail"
    )


def test_the_library_knows_no_peers():
    code = "from kda_kernels import registry, api; print(*(k.name for k in registry.kernels() if not k.ours))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    assert any(not kernel.ours for kernel in registry.kernels()), "kdacli registers them"


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
