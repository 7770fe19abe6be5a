"""What `kda verify` compiles ahead of its cases on a GPU, against what their launches ask for. No GPU is needed."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kdacli.compile import arch, pool
from kdacli.main import cli
from kdacli.verify import verification
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.check import pairs
from kdacli.verify.processes import ahead

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, caches: Path, *words: str) -> dict:
    """What a script of this folder prints, run in a process that compiles, with caches of its own."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    env |= {"TRITON_CACHE_DIR": str(caches / "triton"), "KDA_CACHE_DIR": str(caches / "kda")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / name), *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_was_compiled_ahead_is_found_by_launches(tmp_path):
    """Real compilations in two processes, of unaligned tensors and of what properties change too."""
    cases = ["gate-softplus", "gate-weak", "gate-activated", "gate-mixed-dtypes", "gate-offset"]
    found = script("compile_ahead.py", tmp_path, "sm_86", "triton-gate", "2", *cases)
    assert found == {"cases": 5, "before": 7, "after": 0}, "with the tables of chunks, for int32 and int64 offsets"


def test_few_are_left_to_their_launches(monkeypatch):
    """No processes are started for them."""
    started = []
    monkeypatch.setattr(ahead, "here", lambda: arch.ARCHS["sm_90a"])
    monkeypatch.setattr(ahead, "_build", lambda processes, where, wanted: started.append(wanted))
    monkeypatch.setattr(ahead, "lacking", lambda processes, where, calls: {})
    one = ahead.Call(registry.get("triton-gate"), cases_for("cuda", op=Op.GATE)[0].problem, ())
    for count in (0, ahead.FEW - 1, ahead.FEW):
        monkeypatch.setattr(ahead, "calls_of", lambda table, n=count: [one] * n)
        ahead.compile_ahead([])
    assert len(started) == 1


def test_what_is_wrong_is_left_to_the_run(monkeypatch):
    def unknown():
        raise InputError("arch is sm_91: it should be one of sm_80")

    monkeypatch.setattr(ahead, "here", unknown)
    ahead.compile_ahead(pairs([registry.get("triton-gate")], cases_for("cuda", op=Op.GATE)))


def test_the_command_compiles_ahead_on_a_gpu_only(monkeypatch):
    asked = []
    monkeypatch.setattr(verification, "compile_ahead", lambda *given: asked.append(given))
    words = ["verify", "--kernel", "torch-decode", "--case", "decode-fp16", "--json", "-"]
    assert CliRunner().invoke(cli, [*words, "--device", "cpu"]).exit_code == 0
    assert asked == []
    one = object.__new__(verification.Verification)
    kernel, case = registry.get("torch-decode"), cases_for("cpu", op=Op.DECODE)[0]
    one.wanted, one.table = types.SimpleNamespace(device="cuda"), [(case, [kernel])]
    one.compile(3)
    assert asked == [([(case, [kernel])], 3)]


@pytest.mark.parametrize(("words", "asked"), [([], [None]), (["--jobs", "2"], [2]), (["--jobs", "0"], [])])
def test_jobs(monkeypatch, words, asked):
    given = []
    monkeypatch.setattr(verification.Verification, "compile", lambda self, jobs: given.append(jobs))
    done = CliRunner().invoke(cli, ["verify", "--kernel", "torch-decode", "--case", "decode-fp16", *words])
    assert done.exit_code == 0, done.output
    assert given == asked


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 8), ("150000 100000", 2), ("10 100000", 1), ("", 8)])
def test_cores_of_a_container(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(pool, "Path", lambda name: types.SimpleNamespace(read_text=lambda encoding: limit))
    assert pool.cores() == cores
