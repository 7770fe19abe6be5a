"""Kernels that kill their process, break the GPU's context, or hang; and Ctrl-C: what was checked is reported."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from kda_kernels.errors import InputError
from kda_kernels.problem import Op
from kdacli.commands import verify
from kdacli.main import cli
from kdacli.userkernels import resolve
from kdacli.verify.cases import spec
from kdacli.verify.processes import workers
from kdacli.verify.processes.checker import Checker, ContextLostError
from kdacli.verify.processes.isolated import InnerError, IsolatedChecker, NoStartError

ROOT = Path(__file__).resolve().parent.parent

# A decode kernel that does worse than being wrong, by its number of tokens. There is no GPU context to break here, so
# what asks about it is told that there was one.
BAD = """
    import os
    import time

    from kda_kernels.problem import Options
    from kda_kernels.reference.oracle import recurrence
    from kda_kernels.tensors import Inputs
    from kdacli.verify.processes.checker import Checker

    def decode(q, k, v, g, beta, A_log, dt_bias, initial_state=None, cu_seqlens=None, lower_bound=None):
        tokens = q.shape[1]
        if tokens == 2:
            os.abort()
        if tokens == 3:
            os._exit(5)
        if tokens == 4:
            time.sleep(100)
        if tokens == 5:
            Checker.lost_context = lambda self: "CUDA error: misaligned address"
            raise RuntimeError("CUDA error: misaligned address\\nand more of it")
        options = Options("softplus" if lower_bound is None else "safe", lower_bound)
        out = recurrence(Inputs(q, k, v, g, beta, options, A_log, dt_bias, initial_state, cu_seqlens=cu_seqlens))
        return out.o.to(v.dtype) * (1.0 if tokens < 9 else 2.0), out.final_state.float()
    """
NOTES = {
    2: "killed its process: SIGABRT",
    3: "killed its process: exit code 5",
    4: "hung: there was no answer after 8 seconds",
    5: "crashed the GPU context: CUDA error: misaligned address",
}


@pytest.fixture
def bad(tmp_path) -> str:
    (tmp_path / "bad.py").write_text(textwrap.dedent(BAD))
    return f"{tmp_path}/bad.py:decode"


def case(*lens: int) -> str:
    return f"decode-any/lens={','.join(map(str, lens))}"


def words(kernel: str, *cases: str) -> list[str]:
    chosen = [word for name in cases for word in ("--case", name)]
    return ["verify", "--device", "cpu", "--kernel", kernel, *chosen]


def _given(*flags: str) -> dict:
    """What the command makes of these flags."""
    return verify.command.make_context("verify", list(flags)).params


@pytest.mark.parametrize(("flag", "lens"), [("--isolate", [1, 2, (1, 1, 1), 4, 6, 5, 7]), ("--workers=2", [2, 6, 5])])
def test_a_kernel_that_kills_its_process_fails_one_case(bad, tmp_path, flag, lens):
    """Whatever it does, the next case runs, in a process that is as good as new."""
    cases = [case(*n) if isinstance(n, tuple) else case(n) for n in lens]
    tokens = [sum(spec.parse(name).problem.seq_lens) for name in cases]
    wrong = [NOTES[n] for n in tokens if n in NOTES]
    xml = tmp_path / "bad.xml"
    more = [flag, "--limit", "8", "--json", "-", "--junit", str(xml)]
    result = CliRunner().invoke(cli, [*words(bad, *cases), *more])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["complete"] is True
    assert report["summary"] == f"{len(cases)} checks: {len(cases) - len(wrong)} passed, {len(wrong)} crashed"
    found = {row["case"]: row for row in report["rows"]}
    assert list(found) == cases
    for n, row in zip(tokens, found.values(), strict=True):
        assert row["status"] == ("error" if n in NOTES else "pass")
        assert row["notes"] == ([NOTES[n]] if n in NOTES else [])
    errors = [found.get("message") for found in ElementTree.parse(xml).iter("error")]
    assert sorted(errors) == sorted(wrong)


def test_nothing_is_different_for_a_good_kernel(tmp_path):
    """The same rows here and in a process apart, the explanations of failures included."""
    (tmp_path / "bad.py").write_text(textwrap.dedent(BAD))
    asked = [*words(f"{tmp_path}/bad.py:decode", case(1), case(8), case(10)), "--json", "-", "--save"]
    runs = []
    for flag in ("--isolate", "--no-isolate", "--workers=2"):
        result = CliRunner().invoke(cli, [*asked, str(tmp_path / flag), flag, "--shrink", "0"])
        assert result.exit_code == 1, result.output
        runs.append([row | {"seconds": 0, "saved": None} for row in json.loads(result.stdout)["rows"]])
        assert len(list((tmp_path / flag).iterdir())) == 1
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][2]["status"] == "fail" and runs[0][2]["smallest"] and runs[0][2]["looks_like"]


def test_a_case_that_crashes_on_the_way_to_the_smallest_is_said(bad):
    """Of 10 tokens wrong, the steps to fewer meet those that kill: the failure stays, and says so."""
    asked = [*words(bad, case(10)), "--isolate", "--limit", "20", "--shrink", "30"]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli, asked)
    assert result.exit_code == 1 and "1 check: 1 failed" in result.stdout
    assert "a simpler case, tried in search of the smallest, killed its process: " in result.stdout


def test_flags_and_search_are_isolated_too(bad):
    path = Path(bad.removesuffix(":decode"))
    path.write_text(path.read_text().replace("tokens < 9", "True"))  # nothing but crashes for the search to find
    kernel = resolve(bad)
    with IsolatedChecker("cpu", 0, 10.0) as checker:
        label, op = checker.give(_given("--lens", "2", "--packed", "--pool", "0"), Op.DECODE)
        assert op is Op.DECODE
        (result,) = checker.check_given([kernel])
        assert result.case == label and result.notes == (NOTES[2],)
        checker.give(_given("--lens", "1", "--packed", "--pool", "0"), Op.DECODE)
        (result,) = checker.check_given([kernel])
        assert result.status == "pass", result
        found = checker.search(kernel, 30.0)
        failed, result = found.failure
        assert result.crashed and failed.problem.T in NOTES and found.tried >= 1
        with pytest.raises(InputError, match="nowhere.pt"):
            checker.give(_given("--dump", "nowhere.pt"), Op.DECODE)
        with pytest.raises(InnerError, match="AttributeError"):
            list(checker._ask("no_such_method"))


def test_here_a_broken_context_ends_the_run(bad, monkeypatch):
    """Without a process of their own, the checks cannot go on; those before are kept."""
    kernel = resolve(bad)
    checker, seen = Checker("cpu", 0), []
    monkeypatch.setattr(Checker, "lost_context", Checker.lost_context)  # the kernel changes it
    with pytest.raises(ContextLostError, match="misaligned address"):
        for name in (case(1), case(5), case(6)):
            seen += checker.check_case(spec.parse(name), [kernel])
    assert [result.status for result in seen] == ["pass", "error"]
    assert seen[1].crashed and seen[1].notes == (NOTES[5],)


# --- a process that does not start


class Stumbling(IsolatedChecker):
    """Its first so many processes are killed before they have begun."""

    def __init__(self, times: int) -> None:
        self.times, self.started = times, 0
        super().__init__("cpu", 0, 30.0)

    def _start(self) -> None:
        super()._start()
        self.started += 1
        if self.started <= self.times:
            self._process.kill()
            self._process.join()


def test_one_false_start_is_no_kernels_fault(bad):
    with Stumbling(1) as checker:
        checker.prepare([resolve(bad)])
        (result,) = checker.check_case(spec.parse(case(1)), [resolve(bad)])
        assert result.status == "pass" and checker.started == 2


def test_two_false_starts_end_the_run_with_their_reason(bad):
    with Stumbling(9) as checker:
        with pytest.raises(NoStartError, match=r"cannot start: it ended before it had begun \(SIGKILL\)"):
            list(checker.check_case(spec.parse(case(1)), [resolve(bad)]))
        assert checker.started == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_that_finds_no_gpu_says_so(bad):
    with IsolatedChecker("cuda", 0, 30.0) as checker, pytest.raises(NoStartError, match="cannot start: no CUDA GPU"):
        checker.search(resolve(bad), 1.0)


def test_a_launcher_without_a_guard_is_one_line(bad, tmp_path):
    """What is spawned runs the main module again: one that calls the command there and then never gets to checking."""
    out = tmp_path / "out.json"
    asked = [*words(bad, case(1), case(6)), "--isolate", "--json", str(out)]
    (tmp_path / "launcher.py").write_text(f"from kdacli.main import cli\ncli({asked})")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    done = subprocess.run([sys.executable, tmp_path / "launcher.py"], env=env, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 3 and done.stdout == ""
    assert last == (
        "Error: the process that checks cannot start: it ended before it had begun (exit code 1); what it said stands"
        " above; --no-isolate checks without it"
    )
    assert done.stderr.count("finished its bootstrapping phase") == 2
    report = json.loads(out.read_text())
    assert report["rows"] == [] and report["complete"] is False


# --- Ctrl-C

# A process that a background job starts ignores SIGINT, unlike one in front of a terminal.
_WAKING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from kdacli.main import cli
sys.argv = sys.argv[1:]
cli()
"""
_SLEEP = "open(os.environ['KDA_TEST_FLAG'], 'w').close() or time.sleep(100)"


@pytest.mark.parametrize("flag", ["--isolate", "--no-isolate", "--workers=2"])
def test_an_interrupted_run_reports_what_it_checked(bad, tmp_path, flag):
    """SIGINT reaches all processes of the terminal's group, as Ctrl-C does, while the second case sleeps. Of two
    workers the other has checked the third by then.
    """
    (tmp_path / "bad.py").write_text(textwrap.dedent(BAD).replace("time.sleep(100)", _SLEEP))
    out, xml = tmp_path / "bad.json", tmp_path / "bad.xml"
    more = [flag, "--json", str(out), "--junit", str(xml)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", _WAKING, "kda", *words(bad, case(1), case(4), case(6)), *more],
        env=env | {"COLUMNS": "160", "KDA_TEST_FLAG": str(tmp_path / "asleep")}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    done = ["pass"]
    if flag == "--workers=2":
        time.sleep(10)
        done *= 2
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.split() == ["Interrupted"]
    left = 3 - len(done)
    assert f"{len(done)} passed; ended early, {left} of 3 were not made" in stdout and case(1) in stdout
    report = json.loads(out.read_text())
    assert report["complete"] is False and [row["status"] for row in report["rows"]] == done
    suite = ElementTree.parse(xml).find("testsuite")
    assert suite.find("properties/property").attrib == {"name": "complete", "value": "false"}
    assert len(suite.findall("testcase")) == len(done)


# --- side by side


def test_the_first_failure_ends_them_all(bad):
    """The other sleeps for 100 seconds, and has a limit of 300."""
    began = time.monotonic()
    asked = [*words(bad, case(1), case(10), case(4)), "--workers", "2", "--fail-fast", "--shrink", "0", "--json", "-"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 1 and time.monotonic() - began < 60
    report = json.loads(result.stdout)
    assert [row["status"] for row in report["rows"]] == ["pass", "fail"]
    assert report["complete"] is False


@pytest.mark.parametrize(
    ("device", "checks", "count"), [("cpu", 99, 1), ("cpu", 100, 3), ("cpu", 5000, 3), ("cuda", 5000, 1)]
)
def test_how_many_are_usual(monkeypatch, device, checks, count):
    monkeypatch.setattr(workers, "cores", lambda: 3)
    assert workers.usual(device, checks) == count
    monkeypatch.setattr(workers, "cores", lambda: 64)
    assert workers.usual("cpu", checks) == (1 if checks < 100 else 4)


def test_many_in_this_process_are_no_answer(bad):
    result = CliRunner().invoke(cli, [*words(bad, case(1)), "--no-isolate", "--workers", "2"])
    assert result.exit_code == 2
    assert result.stderr == "Error: --workers 2 is given with --no-isolate: they are processes of their own\n"
    result = CliRunner().invoke(cli, ["verify", "--kernel", bad, "-T", "1", "--workers", "2"])
    assert result.exit_code == 2
    assert result.stderr == "Error: --workers is given with --tokens: they share the cases of a suite\n"
