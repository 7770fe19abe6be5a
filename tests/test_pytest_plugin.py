"""The pytest plugin, in another project's tests: one test a case, failures explained, nothing where it is not asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
REPO = Path(__file__).resolve().parent.parent
ROOTS = (REPO, REPO / "kernels")

TESTS = """
import pytest


@pytest.mark.kda("{kernel}", op="decode", cases={cases!r}, device="cpu", shrink=0)
def test_kernel(kda_check):
    kda_check()


def test_other():
    # Triton is what it is without the plugin.
    import os
    from triton.runtime.autotuner import Autotuner

    assert "TRITON_INTERPRET" not in os.environ and Autotuner.run.__module__ == "triton.runtime.autotuner"
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """pytester with the plugin, which an installed kda would bring by its entry point."""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others take longer to import than these tests to run
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, ROOTS)))

    def run(kernel: str, cases: tuple[str, ...] = ("decode-fp32", "decode-weak-gates")):
        pytester.makepyfile(TESTS.format(kernel=kernel, cases=cases))
        return pytester.runpytest_subprocess("-p", "kdacli.pytest_plugin", "-p", "no:cacheprovider", "-rs", "-v")

    return run


def test_each_case_is_a_test(project):
    result = project("torch-decode")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*test_kernel?decode-fp32? PASSED*", "*test_kernel?decode-weak-gates? PASSED*"])


def test_a_failure_is_explained(project, pytester):
    pytester.makepyfile(mine="def decode(q, k, v, g, beta, initial_state):\n    return v * 0, initial_state")
    result = project("mine.py:decode", ("decode-any/packed=no/gate=none/lower_bound=none",))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*failed decode-any/*", "*again: kda verify --case*"])
    assert "Traceback" not in result.stdout.str()


def test_wrong_markers_are_told(project, pytester):
    result = project("nonsense")
    assert "nonsense is unknown" in result.stdout.str() + result.stderr.str()
    pytester.makepyfile("def test_kernel(kda_check):\n    kda_check()")
    result = pytester.runpytest_subprocess("-p", "kdacli.pytest_plugin")
    assert result.ret != 0 and "needs its marker" in result.stdout.str() + result.stderr.str()


def test_it_imports_nothing_heavy_until_asked():
    code = "import sys, kdacli.pytest_plugin; print([m for m in ('torch', 'triton', 'cutlass') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, ROOTS))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert found.stdout.strip() == "[]"
