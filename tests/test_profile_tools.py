"""What `kda profile` draws, traces, reads from Nsight Compute and adds up; no GPU needed."""

import dataclasses
import json
import math
import subprocess
import sys
import types

import pytest
import torch

from kda_kernels import ranges
from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli import plots
from kdacli.commands.profile import command
from kdacli.presets import PRESETS
from kdacli.profile import chrome, halflife, inner, layer, ncu, nvtx, plot, report, report_ncu
from kdacli.profile.cases import cases_from
from kdacli.profile.columns import fitting
from kdacli.profile.suites import Case
from kdacli.profile.trace import Ranges, trace
from kdacli.synthetic import make_inputs

SMALL = Problem(Op.PREFILL, (64,), 1, 1, K=16, V=16)


# Half-lives of gates


def gates(half_life, tokens=100, heads=2, K=8):
    """Activated gates whose channels all have this half-life, but jitter from token to token."""
    problem = Problem(Op.PREFILL, (tokens,), heads, heads, K=K, V=8, g_dtype="float32", options=Options(gate=Gate.NONE))
    inputs = make_inputs(problem)
    mean = -math.log(2) / half_life
    jitter = torch.tensor([0.5, 1.5]).repeat(tokens // 2)[None, :, None, None]
    return dataclasses.replace(inputs, g=torch.full_like(inputs.g, mean) * jitter)


@pytest.mark.parametrize(("half_life", "at"), [(0.4, 0), (2.0, 1), (10.0, 2), (700.0, 5), (1e6, 8)])
def test_the_half_life_of_a_channel(half_life, at):
    found = halflife.half_lives(gates(half_life))
    assert found["p50"] == pytest.approx(half_life, rel=1e-4)
    assert found["counts"] == [16 if i == at else 0 for i in range(9)]
    assert found["tokens"] == 100


def test_half_lives_differ_by_channel_and_come_from_raw_gates():
    """Half of the channels forget in a token (dt_bias large), the others remember (dt_bias small)."""
    options = Options(gate=Gate.SAFE, lower_bound=-5.0)
    inputs = make_inputs(Problem(Op.PREFILL, (32,), 1, 1, K=8, V=8, options=options))
    bias = torch.tensor([20.0, -12.0]).repeat(4)
    inputs = dataclasses.replace(inputs, g=torch.zeros_like(inputs.g), A_log=torch.zeros(1), dt_bias=bias)
    found = halflife.half_lives(inputs)
    assert found["p10"] == pytest.approx(math.log(2) / 5, rel=1e-3)
    assert found["p90"] == pytest.approx(math.log(2) * math.exp(12) / 5, rel=1e-3)
    text = halflife.lines(found)
    assert "< 1   50%  ████" in text[1]
    assert ">= 16384   50%  ████" in text[-1]
    assert text[0].endswith("median 22563, 10th to 90th percentile 0.139 to 22563 (from 32 tokens).")
    assert max(map(len, text[1:])) <= 80


def test_gates_that_never_forget():
    inputs = gates(1.0)
    found = halflife.half_lives(dataclasses.replace(inputs, g=torch.zeros_like(inputs.g)))
    assert found["p50"] == math.inf
    assert found["counts"][-1] == 16


# Layers


def parsed(*words):
    return command.make_context("profile", list(words)).params


def test_the_cases_of_a_layer():
    cases, _ = cases_from(parsed("--layer", "kimi-k3", "--tp", "8", "-T", "32k", "-N", "64"))
    prefill, decode = (case.problem for case in cases)
    assert (prefill.op, prefill.N, prefill.T, prefill.H) == (Op.PREFILL, 1, 32768, 12)
    assert (decode.op, decode.N, decode.T, decode.H) == (Op.DECODE, 64, 64, 12)
    assert prefill.options == decode.options == Options(gate=Gate.SAFE, lower_bound=-5.0)
    assert [case.gates for case in cases] == ["init", "init"]
    cases, _ = cases_from(parsed("--layer", "kimi-linear", "--op", "decode", "--gates", "weak", "--gates", "bench"))
    assert [(c.problem.H, c.problem.options.gate, c.gates) for c in cases] == [
        (32, Gate.SOFTPLUS, "weak"), (32, Gate.SOFTPLUS, "bench")
    ]  # fmt: skip


def test_the_cost_of_a_models_layers():
    """69 layers of 100 us and 8192 tokens: 6.9 ms, 1187 tokens a ms."""
    row = {
        "op": "prefill", "gates": "init", "kernel": "k", "median_us": 100.0, "low_us": 99.0, "high_us": 102.0,
        "problem": {"seq_lens": [8192]},
    }  # fmt: skip
    found = layer.costs("kimi-k3", 8, [row, {"error": "boom"}])
    assert found["kda_layers"] == PRESETS["kimi-k3"].kda_layers == 69
    (cost,) = found["rows"]
    assert (cost["ms"], cost["low_ms"], cost["high_ms"]) == (
        pytest.approx(6.9),
        pytest.approx(6.831),
        pytest.approx(7.038),
    )
    assert cost["tokens_per_ms"] == pytest.approx(8192 / 6.9)
    (table,) = report.layer_tables(found)
    assert table.title.plain == "kimi-k3, TP 8, 69 KDA layers, prefill of 8192 tokens"
    assert [str(cell) for column in table.columns for cell in column.cells][3:5] == ["6.900", "0.103"]
    (table,) = report.layer_tables(layer.costs("kimi-k3", 8, [row | {"median_us": 324.0, "high_us": 324.4}]))
    assert [str(cell) for column in table.columns for cell in column.cells][3] == "22.36"


# Tables that fit


@pytest.mark.parametrize(("columns", "kept"), [("200", 4), ("100", 3), ("80", 2), ("30", 2)])
def test_columns_of_less_worth_go_first(columns, kept, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    names = ("kernel", "us", "x" * 70, "y" * 30)
    table, left_out = fitting("t", names, [["triton-decode", "1.0", "2", "3"]], ("y" * 30, "x" * 70))
    assert len(table.columns) == kept
    assert left_out == ["y" * 30, "x" * 70][: 4 - kept]


# Plots


def record(*rows):
    provenance = {"gpu": {"name": "H100"}, "date": "2026-11-22", "commit": None}
    return {"provenance": provenance, "rows": list(rows), "ceilings": {"copy_gbps": 2440.0, "inplace_gbps": 3020.0}}


def point(kernel, n, us, **extra):
    return {
        "op": "decode", "case": f"N={n}", "gates": "bench", "kernel": kernel, "point": {"N": n}, "median_us": us,
        "floor_us": us / 2, "tflops": 0.5, "bytes": 1_000_000,
        "problem": {"seq_lens": [1] * n, "H": 2, "state_dtype": "float32"},
    } | extra  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_sweep_is_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = str(tmp_path / f"p.{suffix}")
    plots.require(path)
    plot.draw(record(*(point(k, n, n + 3.0) for k in ("ours", "peer") for n in (1, 2, 4))), path)
    head = (tmp_path / f"p.{suffix}").read_bytes()
    assert head.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_curves_and_the_floor_are_in_the_picture():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = plot.series([point(k, n, n + 3.0) for k in ("ours", "peer") for n in (1, 2, 4)])
    panel = figure.subplots()
    plot._against(panel, found)
    assert [line.get_label() for line in panel.lines] == ["ours", "peer", "floor: bytes at the ceiling"]
    assert list(panel.lines[1].get_xdata()) == [1, 2, 4]
    assert list(panel.lines[1].get_ydata()) == [4.0, 5.0, 7.0]


def test_a_roofline():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    panel = figure.subplots()
    ceilings = {"copy_gbps": 2440.0, "inplace_gbps": 3020.0, "tensor_tflops": 800.0}
    plot.roofline(panel, [point("ours", 1, 10.0)], ceilings)
    ((x, y),) = panel.collections[0].get_offsets()
    assert (x, y) == (pytest.approx(0.5e12 * 10e-6 / 1e6), 0.5)  # operations in 10 us, over the bytes
    roof = panel.lines[0]
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 2.440)
    assert list(roof.get_ydata()[1:]) == [800.0, 800.0]  # flat from the ridge on
    assert roof.get_xdata()[1] == pytest.approx(800.0 / 2.440)
    with pytest.raises(InputError, match="no operations"):
        plot.roofline(panel, [point("gate", 1, 10.0, tflops=None)], {})


def test_a_picture_that_cannot_be(monkeypatch):
    with pytest.raises(InputError, match="should end in"):
        plots.require("x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r"pip install matplotlib, or kdacli\[plot\]"):
        plots.require("x.png")


# Ranges and the trace


@dataclasses.dataclass(frozen=True)
class Staged:
    name: str = "ours"
    error: str | None = None
    op: Op = Op.PREFILL

    def unsupported(self, problem):
        return None

    def run(self, inputs):
        with ranges.stage("chain"):
            if self.error:
                raise RuntimeError(self.error)
            return inputs.q + inputs.q


def load(case):
    return make_inputs(case.problem)


def test_ranges_carry_the_shape(monkeypatch):
    """Where a tool listens, the payload names N, T and the heads; where none does, there is none to make."""
    monkeypatch.setattr(nvtx, "_listening", lambda module: True)
    payload = nvtx.shape(Problem(Op.PREFILL, (70, 30), 2, 4, K=32, V=16))
    if isinstance(payload, int):  # an nvtx without structures
        assert payload == 100
    else:
        assert {name: int(payload[name][0]) for name in payload.dtype.names} == {
            "N": 2, "T": 100, "H": 2, "HV": 4, "K": 32, "V": 16
        }  # fmt: skip
    monkeypatch.undo()
    assert nvtx.shape(SMALL) is None
    monkeypatch.setattr(nvtx, "_nvtx", lambda: None)
    assert nvtx.shape(SMALL) is None


def test_a_trace_gives_call_and_stage_the_shape_of_the_case(monkeypatch):
    opened, measured = [], []

    @dataclasses.dataclass
    class Range:
        name: str
        payload: object

        def __enter__(self):
            opened.append((self.name, self.payload))

        def __exit__(self, *error):
            pass

    class Measured:
        def __enter__(self):
            measured.append(len(opened))

        def __exit__(self, *error):
            measured.append(len(opened))

    monkeypatch.setattr(nvtx, "shape", lambda problem: problem.T)
    shown = Ranges(Range, Measured, calls=1)
    trace([Case("S", SMALL, "bench")], load, [Staged()], lambda: None, lambda: None, shown)
    assert opened == [
        ("S bench", 64), ("inputs", None), ("warm-up", None), ("evict", None), ("ours", 64), ("chain", 64)
    ]  # fmt: skip
    assert measured == [4, 6]  # around the call and nothing else


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_timeline_is_written(tmp_path, monkeypatch):
    """On a CPU it has the ranges but no GPU activity, and that is said."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    path = tmp_path / "t.json"
    with pytest.raises(UnavailableError, match="no GPU activity"):
        chrome.write(path, [Case("S", SMALL, "bench")], load, [Staged()], lambda: None)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("S bench") == names.count("warm-up") == 1
    assert names.count("ours") == names.count("chain") == 5  # the calls looked at; stages of the warm-up are hidden
    with pytest.raises(CheckFailedError, match="ours at S bench: RuntimeError: boom"):
        chrome.write(path, [Case("S", SMALL, "bench")], load, [Staged(error="boom")], lambda: None)


# Nsight Compute

METRICS = {
    "gpu__time_duration.sum": 120_000.0,
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 91.5,
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": 40.0,
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": 22.0,
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active": 11.0,
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": 13.0,
    "sm__warps_active.avg.pct_of_peak_sustained_active": 48.0,
    "launch__registers_per_thread": 168.0,
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": 2_500_000.0,
    "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum": 10.0,
    "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum": 20.0,
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": 6.0,
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": 2.0,
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": 1.0,
}


def test_what_a_launch_is_limited_by():
    (found,) = ncu.summarise([("chain_kernel", ("P1 bench", "triton-prefill", "chain"), METRICS)])
    assert (found["case"], found["kernel"], found["stage"]) == ("P1 bench", "triton-prefill", "chain")
    assert (found["us"], found["dram"], found["l2"], found["sm"], found["tensor"]) == (120.0, 91.5, 40.0, 22.0, 13.0)
    assert (found["registers"], found["bank_conflicts"], found["local_bytes"]) == (168.0, 2_500_000.0, 960.0)
    assert found["stalls"] == {"long_scoreboard": 0.75, "barrier": 0.25}
    assert found["limit"] == "DRAM"
    slow = METRICS | {"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 30.0}
    (found,) = ncu.summarise([("k", (), slow)])
    assert (found["case"], found["stage"], found["limit"]) == (None, None, "latency (long_scoreboard)")
    (found,) = ncu.summarise([("k", ("P1 bench", "ours"), {})])
    assert (found["stage"], found["dram"], found["local_bytes"], found["limit"]) == (None, None, None, "unknown")


CSV = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Block Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","ns","register/thread"
"0","7","chunk_chain_kernel","(128, 1, 1)","1,234,000","168"
"1","7","void other<int, 2>(float *)","(64, 1, 1)","5000","n/a"
"""


def test_what_ncu_prints_as_csv():
    actions = ncu.parse_csv(CSV)
    assert [name for name, _, _ in actions] == ["chunk_chain_kernel", "void other<int, 2>(float *)"]
    first, second = ncu.summarise(actions)
    assert (first["us"], first["registers"]) == (1234.0, 168.0)
    assert (second["us"], second["registers"]) == (5.0, None)
    assert ncu.parse_csv("==ERROR== nothing\n") == []


class FakeReader(types.ModuleType):
    """Has the calls of `ncu_report` that are used."""

    class Metric:
        def __init__(self, value):
            self._value = value

        def value(self):
            return self._value

    class Range:
        def __init__(self, text):
            self.text = text

        def name(self):
            return self.text

    class Domain:
        def __init__(self, name, stack):
            self._name, self.stack = name, stack

        def name(self):
            return self._name

        def push_pop_ranges(self):
            return tuple(sorted(self.stack))

        def push_pop_range(self, i):
            return FakeReader.Range(self.stack[i])

    class State:
        def domains(self):
            return (3, 4)

        def domain_by_id(self, i):
            return FakeReader.Domain(*{3: ("other", ["z"]), 4: ("kda", ["P1 bench", "ours", "chain"])}[i])

    class Action:
        def name(self):
            return "chain_kernel"

        def metric_names(self):
            return (*METRICS, "device__attribute_display_name")

        def metric_by_name(self, name):
            return FakeReader.Metric(METRICS.get(name, "NVIDIA H100"))

        def nvtx_state(self):
            return FakeReader.State()

    def load_report(self, path):
        return [[self.Action()]]


def test_a_report_read_by_nvidias_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncu_report", FakeReader("ncu_report"))
    rows, note = ncu.stats("ncu", tmp_path / "r.ncu-rep")
    assert note is None
    assert (rows[0]["case"], rows[0]["kernel"], rows[0]["stage"]) == ("P1 bench", "ours", "chain")
    assert rows[0]["dram"] == 91.5


@pytest.mark.parametrize("columns", ["80", "100", "160"])
def test_the_tables_of_launches_fit(columns, monkeypatch):
    import io

    from kdacli.output import console

    monkeypatch.setenv("COLUMNS", columns)
    where = ("P1 bench", "triton-prefill", "chain")
    rows = ncu.summarise([("chunk_chain_kernel", where, METRICS), ("k2", where[:2], METRICS)])
    out = console()
    out.file = io.StringIO()
    for table, _ in report_ncu.tables(rows):
        out.print(table)
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= int(columns)
    for part in ("triton-prefill at P1 bench", "92%", "DRAM", "960 B", "2.5M"):
        assert part in text


def test_a_reader_beside_ncu_is_found(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ncu_report", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    (tmp_path / "ncu").touch()
    assert ncu.reader(str(tmp_path / "ncu"), ())[0] is None
    folder = tmp_path / "extras" / "python"
    folder.mkdir(parents=True)
    (folder / "ncu_report.py").write_text("raise ImportError('undefined symbol: x')\n")
    module, why = ncu.reader(str(tmp_path / "ncu"), ())
    assert (module, why) == (None, "ImportError: undefined symbol: x")
    (folder / "ncu_report.py").write_text("def load_report(path): return 42 \n")
    module, why = ncu.reader(str(tmp_path / "ncu"), ())
    assert (module.load_report("x"), why) == (42, None)
    monkeypatch.delitem(sys.modules, "ncu_report")


FAKE_NCU = r"""#!/bin/sh
if [ "$1" = --import ]; then cat "$(dirname "$0")/raw.csv"; exit 0; fi
echo "$KDA_PROFILE_TRACE: $*"
while [ "$1" != -o ]; do shift; done
[ -e "$(dirname "$0")/broken" ] || touch "$2.ncu-rep"
exit "$(cat "$(dirname "$0")/code")"
"""


@pytest.fixture
def fake_ncu(tmp_path):
    (tmp_path / "ncu").write_text(FAKE_NCU)
    (tmp_path / "ncu").chmod(0o755)
    (tmp_path / "raw.csv").write_text(CSV)
    (tmp_path / "code").write_text("0")
    return str(tmp_path / "ncu"), tmp_path / "report.ncu-rep"


def test_a_run_under_ncu(fake_ncu, capfd, monkeypatch):
    program, path = fake_ncu
    ncu.profile(program, path, ["profile", "--ncu", "-H", "4", "--ncu-path", "x", "--json=r.json"])
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("ncu: --profile-from-start off --clock-control none")
    assert said.err.rstrip().endswith("-m kdacli profile -H 4")
    monkeypatch.setattr(ncu, "reader", lambda program: (None, "no reader"))
    rows, note = ncu.stats(program, path)
    assert len(rows) == 2
    assert "no reader" in note
    path.with_name("raw.csv").write_text("")
    with pytest.raises(CheckFailedError, match="saw no kernel"):
        ncu.stats(program, path)


def test_a_run_under_ncu_that_fails(fake_ncu):
    program, path = fake_ncu
    path.with_name("code").write_text("3")
    with pytest.raises(CheckFailedError, match="exit code 3: the report is"):
        ncu.profile(program, path, ["profile"])
    path.unlink()
    path.with_name("broken").touch()
    with pytest.raises(CheckFailedError, match="wrote no report"):
        ncu.profile(program, path, ["profile"])


def test_ncu_is_found_or_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="install Nsight Compute"):
        ncu.find(places=())
    with pytest.raises(InputError, match="--ncu-path"):
        ncu.find(str(tmp_path / "none"))
    (tmp_path / "ncu").touch(mode=0o755)
    assert ncu.find() == str(tmp_path / "ncu")


@pytest.mark.parametrize(
    "words",
    [
        ("--ncu", "--nsys"),
        ("--ncu-path", "x"),
        ("--ncu", "--ncu-path", "no-such-program"),
        ("--ncu", "--plot", "x.png"),
        ("--nsys", "--baseline", "x.json"),
        ("--plot", "x.gif"),
        ("--plot", "no-such-directory/x.png"),
        ("--trace", "no-such-directory/x.json"),
        ("--from", "no-such-file.json"),
        ("--baseline", "no-such-file.json"),
    ],
)
def test_wrong_use_is_named(words):
    with pytest.raises(InputError):
        command.main(list(words), standalone_mode=False)


def test_help_stays_quick():
    """Nothing heavy is imported to print it."""
    heavy = "'torch', 'numpy', 'rich', 'triton', 'matplotlib'"
    code = f"import sys; import kdacli.commands.profile; print(sorted({{{heavy}}} & set(sys.modules)))"
    env = inner.environment("nsys")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[]\n"
