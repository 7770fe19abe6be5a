"""Profilers around `kda profile`, and ranges: programs that behave as nsys and ncu do, and real ones where they are."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import torch
from profile_stand_ins import SMALL, Kernel, load, rendered

from kda_kernels import ranges
from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Op, Problem
from kdacli.profile.cases.suites import TimedCase
from kdacli.profile.reporting import launches, tables
from kdacli.profile.tools import chrome, inner, ncu, nsys, nvtx, watched
from kdacli.profile.tools.trace import CALLS, Ranges, trace
from kdacli.profile.wanted import Profiler

# Ranges and the trace


@dataclasses.dataclass(frozen=True)
class Staged(Kernel):
    def run(self, inputs):
        with ranges.stage("chain"):
            return super().run(inputs)


def test_ranges_cost_nothing_until_enabled():
    opened = []

    class Range:
        def __init__(self, name):
            opened.append(name)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    with ranges.stage("a"):
        pass
    ranges.enable(Range)
    try:
        with ranges.stage("b"):
            pass
    finally:
        ranges.disable()
    with ranges.stage("c"):
        pass
    assert opened == ["b"]


def test_without_nvtx_only_nvidias_profilers_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with nvtx.open_range("case", nvtx.shape(SMALL)):
        assert not nvtx.structured()
    for name in ("nsys", "ncu"):
        with pytest.raises(UnavailableError, match="is not installed: pip install nvtx"):
            watched.prepared(Profiler(name, None, None), [])


def test_verify_needs_no_library_of_nvidias():
    hidden = "import sys; sys.modules |= dict.fromkeys(('nvtx', 'pynvml', 'cutlass', 'cuda'))\n"
    words = ["verify", "--op", "decode", "-N", "1", "-H", "1", "--kernel", "triton-decode"]
    code = f"{hidden}from kdacli.main import main; sys.argv[1:] = {words}; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1 check: 1 passed" in done.stdout, done.stdout + done.stderr


def test_nvtx_ranges_open_with_no_profiler():
    with nvtx.open_range("case"), nvtx.open_range("kernel"):
        pass


def test_the_traced_run_shows_stages_of_the_measured_calls_only(monkeypatch):
    opened = []

    @dataclasses.dataclass
    class Range:
        name: str
        payload: object

        def __enter__(self):
            opened.append(self.name)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(nvtx, "open_range", Range)
    kernels = [Staged("bad", error="boom"), Staged("good")]
    with pytest.raises(CheckFailedError, match="bad at S bench: RuntimeError: boom"):
        trace([TimedCase("S", SMALL, "bench")], load, kernels, lambda: None, lambda: None)
    calls = [nvtx.EVICT, "good", "chain"] * CALLS
    assert opened == ["S bench", nvtx.INPUTS, nvtx.WARM_UP, nvtx.WARM_UP, *calls]
    with ranges.stage("after"):
        pass
    assert "after" not in opened


def test_ranges_carry_the_shape(monkeypatch):
    """Where a tool listens, the payload names N, T and the heads; where none does, there is none to make."""
    monkeypatch.setattr(nvtx, "listening", lambda: True)
    payload = nvtx.shape(Problem(Op.PREFILL, (70, 30), 2, 4, K=32, V=16))
    if isinstance(payload, int):  # an nvtx without structures
        assert payload == 100
    else:
        assert {name: int(payload[name][0]) for name in payload.dtype.names} == {
            "N": 2, "T": 100, "H": 2, "HV": 4, "K": 32, "V": 16
        }  # fmt: skip
    monkeypatch.undo()
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
    trace([TimedCase("S", SMALL, "bench")], load, [Staged("ours")], lambda: None, lambda: None, shown)
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
        chrome.write(path, [TimedCase("S", SMALL, "bench")], load, [Staged("ours")], lambda: None)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("S bench") == names.count("warm-up") == 1
    assert names.count("ours") == names.count("chain") == 5  # the calls looked at; stages of the warm-up are hidden
    with pytest.raises(CheckFailedError, match="ours at S bench: RuntimeError: boom"):
        chrome.write(path, [TimedCase("S", SMALL, "bench")], load, [Staged("ours", error="boom")], lambda: None)


# Nsight Systems

NSYS_CSV = """NOTICE: Existing SQLite export found: kda-profile-1.sqlite
Processing [kda-profile-1.sqlite] with [cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
60.0,5000000,5,1000000.0,999000.0,990000,1010000,1000.0,kda:chain:chunk_chain_kernel
30.0,2500000,5,500000.0,499000.0,490000,510000,1000.0,"kda:evict:void reduce_kernel<512, 1>(int, int)"
5.0,"400,000",1,400000.0,400000.0,400000,400000,0.0,warm-up/chunk_chain_kernel
5.0,400000,1,400000.0,400000.0,400000,400000,0.0,"void evict_not<int, 2>(float *)"

Processing [kda-profile-1.sqlite] with [nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns),Total GPU Ops,Avg Range Lvl
kda:P1 bench,PushPop,9000000,9500000,1,9000000.0,12,0
kda:warm-up,PushPop,9000000,9500000,1,9000000.0,12,1
:evict,PushPop,9000000,9500000,1,9000000.0,12,1.0
kda:ours,PushPop,6000000,70000,5,1200000.0,15,1.0
kda:chain,PushPop,5000000,60000,5,1000000.0,5,2.0

"""


def test_kernels_of_an_nsys_summary():
    assert nsys.parse_kernels(NSYS_CSV) == [
        {"kernel": "kda:chain:chunk_chain_kernel", "launches": 5, "total_us": 5000.0, "median_us": 999.0},
        {"kernel": "void evict_not<int, 2>(float *)", "launches": 1, "total_us": 400.0, "median_us": 400.0},
    ]
    assert nsys.parse_kernels("SKIPPED: no CUDA kernel data\n") == []


def test_ranges_of_an_nsys_summary():
    """Means, without cases: theirs would count compiling, too."""
    ours = {"range": "ours", "instances": 5, "launches": 3.0, "gpu_us": 1200.0, "host_us": 14.0}
    chain = {"range": "chain", "instances": 5, "launches": 1.0, "gpu_us": 1000.0, "host_us": 12.0}
    assert nsys.parse_ranges(NSYS_CSV) == [ours, chain]
    older = "\n".join(
        line.rpartition(",")[0] if "Push" in line or "Style" in line else line for line in NSYS_CSV.splitlines()
    )
    assert [row["range"] for row in nsys.parse_ranges(older)] == ["P1 bench", "ours", "chain"]


def test_nsys_tables_show_both():
    text = rendered(tables.nsys_tables(nsys.parse_kernels(NSYS_CSV), nsys.parse_ranges(NSYS_CSV)))
    assert max(map(len, text.splitlines())) <= 100
    assert "kda:chain:chunk_chain_kernel" in text
    assert "ours" in text and "P1 bench" not in text
    assert "All 3 cases are taken together" in tables.nsys_notes(3, True)[0]
    assert "together" not in tables.nsys_notes(1, True)[0]
    assert tables.nsys_notes(1, True)[2].endswith("has its shape as payload.")
    assert "pip install -U nvtx" in tables.nsys_notes(1, False)[2]


def test_the_inner_run_gets_the_same_problem():
    words = ["profile", "--nsys", "-H", "4", "--json", "a.json", "--output=r", "--nsys-path", "x", "--gates", "weak"]
    assert inner.arguments(words) == ["profile", "-H", "4", "--gates", "weak"]


def test_a_report_gets_a_name_that_is_free(tmp_path):
    assert inner.report_path(".nsys-rep", None, tmp_path).name == "kda-profile-1.nsys-rep"
    (tmp_path / "kda-profile-1.qdstrm").touch()
    assert inner.report_path(".nsys-rep", None, tmp_path).name == "kda-profile-2.nsys-rep"
    assert inner.report_path(".nsys-rep", str(tmp_path / "mine")).name == "mine.nsys-rep"
    (tmp_path / "mine.nsys-rep").touch()
    with pytest.raises(InputError, match="exists"):
        inner.report_path(".nsys-rep", str(tmp_path / "mine"))


def test_nsys_is_found_or_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="install Nsight Systems"):
        nsys.find(places=())
    for version in ("2024.10.1", "2025.9.1", "2025.10.2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "nsys").touch(mode=0o755)
    assert nsys.find(places=(f"{tmp_path}/*/nothing", f"{tmp_path}/*/nsys")) == f"{tmp_path}/2025.10.2/nsys"
    assert nsys.find(f"{tmp_path}/2024.10.1/nsys") == f"{tmp_path}/2024.10.1/nsys"


FAKE_NSYS = r"""#!/bin/sh
if [ "$1" = stats ]; then cat "$(dirname "$0")/stats.csv"; exit 0; fi
while [ "$1" != -o ]; do shift; done
[ -n "$KDA_PROFILE_TRACE" ] || exit 9
echo "inner: $*"
touch "$2.$(cat "$(dirname "$0")/suffix")"
exit "$(cat "$(dirname "$0")/code")"
"""


@pytest.fixture
def fake_nsys(tmp_path):
    (tmp_path / "nsys").write_text(FAKE_NSYS)
    (tmp_path / "nsys").chmod(0o755)
    (tmp_path / "stats.csv").write_text(NSYS_CSV)

    def setup(suffix="nsys-rep", code=0):
        (tmp_path / "suffix").write_text(suffix)
        (tmp_path / "code").write_text(str(code))
        return str(tmp_path / "nsys"), tmp_path / "tables.nsys-rep"

    return setup


def test_a_run_under_nsys(fake_nsys, capfd):
    program, path = fake_nsys()
    nsys.profile(program, path, ["profile", "--nsys", "-H", "4"])
    kernels, found = nsys.stats(program, path)
    assert path.exists()
    assert len(kernels) == len(found) == 2
    said = capfd.readouterr()
    assert "-m kdacli profile -H 4" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("suffix", "code", "error", "message"),
    [
        ("qdstrm", 0, UnavailableError, "there is no QdstrmImporter beside it"),
        ("nothing", 7, CheckFailedError, "exit code 7"),
        ("nsys-rep", 1, CheckFailedError, "exit code 1"),
    ],
)
def test_a_run_under_nsys_that_fails(fake_nsys, suffix, code, error, message):
    program, path = fake_nsys(suffix, code)
    with pytest.raises(error, match=message):
        nsys.profile(program, path, ["profile"])


def test_an_importer_that_failed(fake_nsys, tmp_path):
    """As in Nsight Compute's copy on a machine without libdw and libelf."""
    program, path = fake_nsys("qdstrm")
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "QdstrmImporter").touch()
    (tmp_path / "bin").mkdir()
    for name in ("nsys", "suffix", "code"):
        (tmp_path / name).rename(tmp_path / "bin" / name)
    with pytest.raises(UnavailableError, match="QdstrmImporter, failed: see above"):
        nsys.profile(str(tmp_path / "bin" / "nsys"), path, ["profile"])


def test_a_report_with_nothing_in_it(fake_nsys):
    program, path = fake_nsys()
    path.with_name("stats.csv").write_text("SKIPPED: no data\n")
    with pytest.raises(CheckFailedError, match="SKIPPED: no data"):
        nsys.stats(program, path)


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


@pytest.mark.parametrize("columns", ["80", "100", "160"])
def test_the_tables_of_launches_fit(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    where = ("P1 bench", "triton-prefill", "chain")
    rows = ncu.summarise([("chunk_chain_kernel", where, METRICS), ("k2", where[:2], METRICS)])
    text = rendered(launches.tables(rows))
    assert max(map(len, text.splitlines())) <= int(columns)
    for part in ("triton-prefill at P1 bench", "92%", "DRAM", "960 B", "2.5M"):
        assert part in text


def test_a_reader_beside_ncu_is_found(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "ncu_report", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    (tmp_path / "ncu").touch()
    with pytest.raises(UnavailableError, match="there is no package ncu-report, .*: pip install ncu-report"):
        ncu.reader(str(tmp_path / "ncu"), ())
    folder = tmp_path / "extras" / "python"
    folder.mkdir(parents=True)
    (folder / "ncu_report.py").write_text("raise ImportError('undefined symbol: x')\n")
    with pytest.raises(UnavailableError, match="ImportError: undefined symbol: x"):
        ncu.reader(str(tmp_path / "ncu"), ())
    (folder / "ncu_report.py").write_text("def load_report(path): return 42 \n")
    assert ncu.reader(str(tmp_path / "ncu"), ()).load_report("x") == 42
    monkeypatch.delitem(sys.modules, "ncu_report")


FAKE_NCU = r"""#!/bin/sh
echo "$KDA_PROFILE_TRACE: $*"
while [ "$1" != -o ]; do shift; done
[ -e "$(dirname "$0")/broken" ] || touch "$2.ncu-rep"
exit "$(cat "$(dirname "$0")/code")"
"""


@pytest.fixture
def fake_ncu(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncu_report", FakeReader("ncu_report"))
    (tmp_path / "ncu").write_text(FAKE_NCU)
    (tmp_path / "ncu").chmod(0o755)
    (tmp_path / "code").write_text("0")
    return str(tmp_path / "ncu"), tmp_path / "report.ncu-rep"


def test_a_run_under_ncu(fake_ncu, capfd, monkeypatch):
    program, path = fake_ncu
    rows = ncu.profile(program, path, ["profile", "--ncu", "-H", "4", "--ncu-path", "x", "--json=r.json"])
    assert [(row["case"], row["kernel"], row["stage"], row["dram"]) for row in rows] == [
        ("P1 bench", "ours", "chain", 91.5)
    ]
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("ncu: --profile-from-start off --clock-control none")
    assert said.err.rstrip().endswith("-m kdacli profile -H 4")
    monkeypatch.setattr(sys.modules["ncu_report"], "load_report", lambda path: [])
    with pytest.raises(CheckFailedError, match="saw no kernel"):
        ncu.profile(program, path, ["profile"])


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


@pytest.mark.gpu
def test_gpu_nsight_compute_end_to_end(tmp_path):
    """A real ncu, where there is one: our kernels and nothing of what is around them, with the main metrics."""
    try:
        ncu.reader(ncu.find())
    except UnavailableError as error:
        pytest.skip(str(error))
    dest = tmp_path / "n.json"
    words = [sys.executable, "-m", "kdacli", "profile", "--ncu", "--kernel", "triton-decode", "-N", "64", "-H", "32"]
    words += ["--output", str(tmp_path / "n"), "--json", str(dest)]
    env = inner.environment("")
    del env[inner.TRACE_ENV]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    launches = json.loads(dest.read_text())["ncu"]["launches"]
    assert launches
    for key in ("us", "dram", "l2", "sm", "occupancy", "registers", "bank_conflicts", "local_bytes", "read_bytes"):
        assert all(row[key] is not None for row in launches), key
    assert all(row["stalls"] for row in launches)
    assert {row["kernel"] for row in launches} == {"triton-decode"}
