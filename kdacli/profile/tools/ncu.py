"""Nsight Compute around a `kda profile`: find it, run it, read its report.

The report is read with `ncu_report`, NVIDIA's own reader: the package of that name, or the copy in extras/python of the
installation, which is a compiled module and may be of another Python.
"""

import glob
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kda_kernels.errors import CheckFailedError, UnavailableError, one_line
from kdacli.profile.tools import inner, nvtx

SUFFIX = ".ncu-rep"
# Where installers put it beside PATH; the newest of the first place that has one.
PLACES = (
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/cuda*/nsight-compute*/ncu",
    "/usr/local/cuda*/bin/ncu",
)
READERS = ("/opt/nvidia/nsight-compute/*/extras/python", "/usr/local/cuda*/nsight-compute*/extras/python")
HOW_TO_GET = "install Nsight Compute (https://developer.nvidia.com/nsight-compute), or name it with --ncu-path"
# ncu's own sections, which name the metrics that each architecture has, and what they lack.
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__t_sectors_pipe_lsu_mem_local_op_ld.sum",
    "l1tex__t_sectors_pipe_lsu_mem_local_op_st.sum",
    "lts__t_sector_hit_rate.pct",
)
LIMITED_FROM = 60.0  # percent of a unit's peak from which it counts as the limit, as in ncu's own rules
_SECTOR_BYTES = 32
_STALL = re.compile(r"^smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
_NO_STALL = {"selected", "not_selected"}  # a warp that issues, or one that could have
_TENSOR = re.compile(r"^sm__(inst_executed_pipe_tensor|pipe_tensor)\w*\.avg\.pct_of_peak_sustained_active$")
Action = tuple[str, tuple[str, ...], Mapping[str, float]]  # CUDA kernel, ranges from outside in, metrics in base units


def find(path: str | None = None, places: Sequence[str] = PLACES) -> str:
    """The ncu to use, see `inner.find`."""
    return inner.find("ncu", path, places, HOW_TO_GET)


def command(ncu: str, report: Path, words: Sequence[str]) -> list[str]:
    """The ncu command that profiles `kda <words>`: clocks left alone, only the launches between start and stop."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    flags = ["--profile-from-start", "off", "--clock-control", "none", "--nvtx", *sections]
    return [ncu, *flags, "--metrics", ",".join(METRICS), "-o", str(report).removesuffix(SUFFIX), *inner.command(words)]


def profile(ncu: str, report: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """Runs `kda <words>` under ncu; its output goes to stderr, since stdout is for our own report.

    Returns:
        The launches, see `summarise`.

    Raises:
        CheckFailedError: ncu wrote no report or one without a kernel, or the run inside failed.
        UnavailableError: there is nothing to read a report with.
    """
    module = reader(ncu)
    done = subprocess.run(command(ncu, report, words), env=inner.environment("ncu"), stdout=sys.stderr, check=False)
    if not report.exists():
        raise CheckFailedError(
            f"ncu ended with exit code {done.returncode} and wrote no report: its output is above (ERR_NVGPUCTRPERM "
            "means that it may not read the GPU's counters: run as root)"
        )
    if done.returncode:
        raise CheckFailedError(f"the profiled run ended with exit code {done.returncode}: the report is {report}")
    if not (rows := summarise(_actions(module, report))):
        raise CheckFailedError(f"Nsight Compute saw no kernel: {report} is empty")
    return rows


def reader(ncu: str, places: Sequence[str] = READERS) -> ModuleType:
    """NVIDIA's `ncu_report`. Raises `UnavailableError` where it cannot be loaded."""
    beside = [str(parent / "extras" / "python") for parent in Path(ncu).resolve().parents[:3]]
    installed = [path for place in places for path in sorted(glob.glob(place), key=inner.by_version, reverse=True)]
    why = "there is no package ncu-report, and no extras/python beside ncu"
    for path in (None, *beside, *installed):
        if path is not None and not Path(path, "ncu_report.py").exists() and not Path(path, "ncu_report").is_dir():
            continue
        try:
            return _import("ncu_report", path)
        except Exception as error:  # a compiled module can fail in any way
            if path is not None or not isinstance(error, ModuleNotFoundError):
                why = one_line(error)
    raise UnavailableError(f"--ncu cannot read reports, since {why}: pip install ncu-report")


def _import(name: str, path: str | None) -> ModuleType:
    if path is None:
        return importlib.import_module(name)
    sys.path.insert(0, path)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


def _actions(module: ModuleType, report: Path) -> list[Action]:
    """What `ncu_report` reads."""
    found: list[Action] = []
    for kernels in module.load_report(str(report)):
        for action in kernels:
            metrics = {}
            for name in action.metric_names():
                value = action.metric_by_name(name).value()
                if isinstance(value, int | float):
                    metrics[name] = float(value)
            found.append((action.name(), _ranges(action.nvtx_state()), metrics))
    return found


def _ranges(state: Any) -> tuple[str, ...]:
    """The push/pop ranges of our domain that a kernel was launched in, from outside in."""
    if state is None:
        return ()
    for domain in (state.domain_by_id(i) for i in state.domains()):
        if domain.name() == nvtx.DOMAIN:  # the index is the place on the stack; push_pop_ranges() sorts by name
            return tuple(domain.push_pop_range(i).name() for i in range(len(domain.push_pop_ranges())))
    return ()


def summarise(actions: Iterable[Action]) -> list[dict[str, Any]]:
    """One row for each launch.

    Keys: case, kernel, stage (of our ranges; None where unknown), cuda_kernel, us; dram, l2, sm, tensor, occupancy
    (percent of peak), occupancy_limit (the most the launch could reach), l2_hit, read_bytes, written_bytes, registers,
    shared_bytes, stalls (reason -> share of all stalled time, largest first), bank_conflicts, local_bytes (spills and
    local arrays: bytes between L1 and local memory), limit (what limits it). None for a metric that is not there.
    """
    return [_row(*action) for action in actions]


def _row(name: str, ranges: tuple[str, ...], metrics: Mapping[str, float]) -> dict[str, Any]:
    get = metrics.get
    local = [metrics[m] for m in METRICS if "mem_local" in m and m in metrics]
    case, kernel, stage = (*ranges, None, None, None)[:3]
    row = {
        "case": case,
        "kernel": kernel,
        "stage": ranges[-1] if len(ranges) > 3 else stage,
        "cuda_kernel": name,
        "us": get("gpu__time_duration.sum", 0.0) / 1e3,  # nanoseconds
        "dram": _first(metrics, "gpu__dram_throughput", "dram__throughput"),
        "l2": _first(metrics, "lts__throughput"),
        "sm": _first(metrics, "sm__throughput"),
        "tensor": max((v for m, v in metrics.items() if _TENSOR.match(m)), default=None),
        "occupancy": get("sm__warps_active.avg.pct_of_peak_sustained_active"),
        "occupancy_limit": get("sm__maximum_warps_per_active_cycle_pct"),
        "l2_hit": get("lts__t_sector_hit_rate.pct"),
        "read_bytes": get("dram__bytes_read.sum"),
        "written_bytes": get("dram__bytes_write.sum"),
        "registers": get("launch__registers_per_thread"),
        "shared_bytes": get("launch__shared_mem_per_block"),
        "stalls": _stalls(metrics),
        "bank_conflicts": get("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"),
        "local_bytes": sum(local) * _SECTOR_BYTES if local else None,
    }
    return row | {"limit": _limit(row)}


def _first(metrics: Mapping[str, float], *names: str) -> float | None:
    """Percent of peak of the first of these units that was measured."""
    keys = (f"{name}.avg.pct_of_peak_sustained_elapsed" for name in names)
    return next((metrics[key] for key in keys if key in metrics), None)


def _stalls(metrics: Mapping[str, float]) -> dict[str, float]:
    found = {m[1]: v for name, v in metrics.items() if (m := _STALL.match(name)) and m[1] not in _NO_STALL and v > 0}
    total = sum(found.values())
    return {reason: v / total for reason, v in sorted(found.items(), key=lambda item: -item[1])}


def _limit(row: Mapping[str, Any]) -> str:
    """The unit nearest to its peak, or latency where none is near."""
    units = {title: row[key] for title, key in (("DRAM", "dram"), ("L2", "l2"), ("SM", "sm"), ("tensor", "tensor"))}
    known = {title: value for title, value in units.items() if value is not None}
    if not known:
        return "unknown"
    title = max(known, key=lambda t: known[t])
    if known[title] >= LIMITED_FROM:
        return title
    return f"latency ({next(iter(row['stalls']))})" if row["stalls"] else "latency"
