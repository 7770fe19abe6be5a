"""`kda profile` from words to what is printed, written and returned."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest
from profile_stand_ins import SMALL, Kernel, load, method, wanted

from kda_kernels.errors import CheckFailedError, InputError
from kdacli.commands.profile import command
from kdacli.profile import timed
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.measuring.all_cases import records
from kdacli.profile.records.halflife import half_lives
from kdacli.profile.records.record import read
from kdacli.provenance import collect

RECORDS = Path(__file__).parent.parent / "benchmarks"


def run(*words):
    command.main(list(words), standalone_mode=False)


KERNELS = Kernel("ours"), Kernel("b", (20.0,))


def recorded(asked, *cases, kernels=KERNELS, **more):
    """What follows the timing."""
    whole = timed.recorded(asked, records(cases, load, kernels, method(), collect), len(cases), **more)
    timed.finish(whole, asked, read(asked.baseline) if asked.baseline else None)
    return whole


def test_a_run_prints_and_records(tmp_path, capsys):
    dest = tmp_path / "r.json"
    recorded(wanted("--json", str(dest)), TimedCase("S", SMALL, "init"), TimedCase("S", SMALL, "weak"))
    said = capsys.readouterr().out
    assert "0.50x" in said
    assert "cold" in said
    found = json.loads(dest.read_text())
    assert [(r["gates"], r["kernel"], r["median_us"]) for r in found["rows"]] == [
        ("init", "ours", 10.0), ("init", "b", 20.0), ("weak", "ours", 10.0), ("weak", "b", 20.0)
    ]  # fmt: skip
    assert found["complete"]
    assert set(found["provenance"]) >= {"gpu", "packages", "commit", "command", "seed"}
    with pytest.raises(InputError, match="exists"):
        run("--json", str(dest))


def test_json_alone_on_stdout(capsys):
    recorded(wanted("--json", "-"), TimedCase("S", SMALL, "init"), TimedCase("S", SMALL, "weak"))
    said = capsys.readouterr()
    assert len(json.loads(said.out)["rows"]) == 4
    assert "0.50x" in said.err


def test_what_a_dump_and_a_layer_add(tmp_path, capsys):
    case = TimedCase("S", SMALL, "dump")
    whole = recorded(wanted("--dump", "d.pt"), case, half_lives=half_lives(load(TimedCase("S", SMALL, "weak"))))
    said = capsys.readouterr().out
    assert "the dump's gates" in said
    assert "Half-life of the 16 channels" in said
    assert sum(whole.half_lives.counts) == 16
    whole = recorded(wanted("--layer", "kimi-k3", "--tp", "96"), TimedCase("S", SMALL, "init"))
    said = " ".join(capsys.readouterr().out.split())
    assert "kimi-k3, TP 96, 69 KDA layers, prefill of 64 tokens" in said
    assert whole.layer.rows[0].ms == pytest.approx(0.69)


def test_a_baseline_ends_with_1_on_a_regression(tmp_path, capsys):
    dest, case = tmp_path / "r.json", TimedCase("S", SMALL, "init")
    recorded(wanted("--json", str(dest)), case)
    recorded(wanted("--baseline", str(dest)), case)
    assert "2 timings: 2 same." in capsys.readouterr().out
    with pytest.raises(CheckFailedError, match="1 of 2 timings regressed: ours"):
        recorded(wanted("--baseline", str(dest)), case, kernels=[Kernel("ours", (20.0,)), Kernel("b", (20.0,))])
    assert "+100.0%" in capsys.readouterr().out


def test_a_recording_is_shown_and_compared_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    source = str(RECORDS / "decode-h100.json")
    whole = json.loads(Path(source).read_text())
    slower = copy.deepcopy(whole)
    for r in slower["rows"]:
        if (r["kernel"], r["case"]) == ("triton-decode", "D:H=96,N=32"):
            for key in ("median_us", "p10_us", "p90_us"):
                r[key] *= 1.05
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    run("--from", source)
    said = capsys.readouterr().out
    assert "D:H=96,N=128" in said
    assert "NVIDIA H100" in said
    run("--from", source, "--baseline", source)
    said = capsys.readouterr().out
    assert f"{len(whole['rows'])} timings: {len(whole['rows'])} same." in said
    assert max(map(len, said.splitlines())) <= 80
    with pytest.raises(CheckFailedError, match="triton-decode at D:H=96,N=32 bench"):
        run("--from", str(tmp_path / "slower.json"), "--baseline", source)
    assert "+5.0%" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--suite", "decode"), ("-H", "4"), ("--gates", "init"), ("--sweep", "N=1..4")])
def test_a_recording_is_not_timed(words):
    with pytest.raises(InputError, match="--from"):
        run("--from", str(RECORDS / "decode-h100.json"), *words)


@pytest.mark.gpu
def test_gpu_profile_end_to_end(tmp_path):
    """Our kernel of each op, at a small shape, from the command line to the record."""
    for name in ("triton-prefill", "triton-decode", "triton-gate"):
        dest = tmp_path / f"{name}.json"
        words = ["--kernel", name, "-H", "4", "--gates", "init", "--seconds", "0.05", "--json", str(dest), "--stages"]
        done = click.testing.CliRunner().invoke(command, words, catch_exceptions=False)
        assert done.exit_code == 0
        record = json.loads(dest.read_text())
        (row,) = record["rows"]
        assert record["complete"]
        assert (row["kernel"], row["mode"], row["cache"], row["gates"]) == (name, "graph", "cold", "init")
        assert row["median_us"] > 0
        assert row["stages"]


CHEAT = """
from kda_kernels.problem import Options
from kda_kernels.tensors import Inputs
from kda_kernels.triton import decode

MEMORY = {}


def decode_once(q, k, v, g, beta, A_log, dt_bias, lower_bound, state, state_indices):
    key = q.data_ptr(), q.shape
    if key not in MEMORY:
        options = Options("safe", lower_bound)
        MEMORY[key] = decode.run(Inputs(q, k, v, g, beta, options, A_log, dt_bias, state, state_indices)).o
    return MEMORY[key].clone()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [[], ["--eager"]])
def test_gpu_a_kernel_that_remembers_its_outputs_is_wrong(mode, tmp_path):
    """From the command line, captured and eager: exit 1, and its row is marked."""
    (tmp_path / "cheat.py").write_text(CHEAT)
    kernel, dest = f"{tmp_path}/cheat.py:decode_once", tmp_path / "r.json"
    words = ["-m", "kdacli", "profile", "--op", "decode", "-N", "4", "-H", "4", "--seconds", "0.02"]
    words += ["--json", str(dest), "--kernel", "triton-decode", "--kernel", kernel, *mode]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 of 2 timings failed, 1 of them since the outputs are wrong" in done.stderr
    honest, cheat = json.loads(dest.read_text())["rows"]
    assert honest["output_error"] < 0.01 < 0.1 < cheat["output_error"]
    assert "wrong" in done.stdout


@pytest.mark.gpu
def test_gpu_sweep_end_to_end(tmp_path):
    dest, picture = tmp_path / "s.json", tmp_path / "s.svg"
    words = ["--kernel", "triton-decode", "--sweep", "N=1..32", "-H", "8", "--seconds", "0.02", "--json", str(dest)]
    done = click.testing.CliRunner().invoke(command, [*words, "--plot", str(picture)], catch_exceptions=False)
    assert done.exit_code == 0
    record = json.loads(dest.read_text())
    assert [row["point"]["N"] for row in record["rows"]] == [1, 2, 4, 8, 16, 32]
    (one,) = record["sweep"]
    assert one["line"]["slope"] > 0
    assert picture.exists()


@pytest.mark.gpu
def test_gpu_a_timeline_has_the_cuda_kernels(tmp_path):
    path = tmp_path / "t.json"
    words = ["--kernel", "triton-decode", "-N", "4", "-H", "4", "--seconds", "0.02", "--trace", str(path)]
    done = click.testing.CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum(event.get("name") == "triton-decode" and event.get("cat") == "user_annotation" for event in events) == 5
