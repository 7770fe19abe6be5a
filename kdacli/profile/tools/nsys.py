"""Nsight Systems around a `kda profile`: find it, run it, read its summaries."""

import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kda_kernels.errors import CheckFailedError, UnavailableError
from kdacli.profile.tools import inner
from kdacli.profile.tools.nvtx import SCAFFOLD

SUFFIX = ".nsys-rep"
# Where installers put it beside PATH; the newest of the first place that has one.
PLACES = (
    "/opt/nvidia/nsight-systems/*/bin/nsys",
    "/opt/nvidia/nsight-systems/*/target-linux-x64/nsys",
    "/opt/nvidia/nsight-systems-cli/*/target-linux-x64/nsys",
    "/usr/local/cuda*/bin/nsys",
    "/opt/nvidia/nsight-compute/*/host/target-linux-x64/nsys",
)
HOW_TO_GET = "install Nsight Systems (https://developer.nvidia.com/nsight-systems), or name it with --nsys-path"
KERNELS, RANGES = "cuda_gpu_kern_sum:nvtx-name:base", "nvtx_gpu_proj_sum"
_SCAFFOLD = re.compile(rf"^(\w*:)?({'|'.join(SCAFFOLD)})\b")
CASE_LEVELS = ("0", "0.0")  # cases are the outermost ranges


def find(path: str | None = None, places: Sequence[str] = PLACES) -> str:
    """The nsys to use, see `inner.find`."""
    return inner.find("nsys", path, places, HOW_TO_GET)


def command(nsys: str, report: Path, words: Sequence[str]) -> list[str]:
    """The nsys command that profiles `kda <words>`."""
    flags = ["-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--force-overwrite=false"]
    return [nsys, "profile", *flags, "-o", str(report).removesuffix(SUFFIX), *inner.command(words)]


def importer(nsys: str) -> Path | None:
    """The program with which nsys makes a report of a recording: in a folder beside its own, or beside that one's."""
    own = Path(nsys).resolve().parent
    return next((found for place in (own.parent, own.parent.parent) for found in place.glob("*/QdstrmImporter")), None)


def profile(nsys: str, report: Path, words: Sequence[str]) -> None:
    """Runs `kda <words>` under nsys; its output goes to stderr, since stdout is for our own report.

    Raises:
        UnavailableError: this nsys cannot write a report.
        CheckFailedError: the run inside failed.
    """
    done = subprocess.run(command(nsys, report, words), env=inner.environment("nsys"), stdout=sys.stderr, check=False)
    raw = report.with_suffix(".qdstrm")
    if not report.exists():
        if raw.exists():
            found = importer(nsys)
            why = f"its importer, {found}, failed: see above" if found else "there is no QdstrmImporter beside it"
            raise UnavailableError(f"{nsys} recorded {raw} but made no report of it: {why}; {HOW_TO_GET}")
        raise CheckFailedError(f"nsys ended with exit code {done.returncode} and wrote no report: its output is above")
    if done.returncode:
        raise CheckFailedError(f"the profiled run ended with exit code {done.returncode}: the report is {report}")


def stats(nsys: str, report: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kernels (kernel, launches, total_us, median_us) and ranges (see `parse_ranges`) of a report.

    Left out is what kda does around the kernels: inputs, warm-up, eviction, and the cases that hold all of it.

    Raises:
        CheckFailedError: nsys could not summarise the report.
    """
    reports = [word for name in (KERNELS, RANGES) for word in ("--report", name)]
    done = subprocess.run(
        [nsys, "stats", *reports, "--format", "csv", "--output", "-", str(report)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    kernels, ranges = parse_kernels(done.stdout), parse_ranges(done.stdout)
    if not kernels and not ranges:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise CheckFailedError(f"nsys stats found neither kernels nor ranges in {report}: {said}")
    return kernels, ranges


def parse_kernels(text: str) -> list[dict[str, Any]]:
    """The rows of cuda_gpu_kern_sum in nsys' CSV output, times in microseconds."""
    return [
        {
            "kernel": row["Name"],
            "launches": int(_number(row["Instances"])),
            "total_us": _number(row["Total Time (ns)"]) / 1e3,
            "median_us": _number(row["Med (ns)"]) / 1e3,
        }
        for row in _table(text, ("Total Time (ns)", "Instances", "Med (ns)", "Name"))
        if not _SCAFFOLD.match(row["Name"])
    ]


def parse_ranges(text: str) -> list[dict[str, Any]]:
    """The rows of nvtx_gpu_proj_sum, those of cases left out: range, its instances, and means over them.

    gpu_us is from the start of an instance's first kernel to the end of its last, host_us what its host code took, and
    launches how much it started on the GPU.
    """
    times = ("Total Proj Time (ns)", "Total Range Time (ns)")
    rows = _table(text, ("Range", "Range Instances", *times, "Total GPU Ops"))
    return [
        _range(row) for row in rows if not _SCAFFOLD.match(row["Range"]) and row.get("Avg Range Lvl") not in CASE_LEVELS
    ]


def _range(row: dict[str, str]) -> dict[str, Any]:
    instances = int(_number(row["Range Instances"]))
    return {
        "range": row["Range"].removeprefix(":").removeprefix("kda:"),
        "instances": instances,
        "launches": _number(row["Total GPU Ops"]) / instances,
        "gpu_us": _number(row["Total Proj Time (ns)"]) / instances / 1e3,
        "host_us": _number(row["Total Range Time (ns)"]) / instances / 1e3,
    }


def _table(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """The first CSV table that has these columns: nsys puts notices between tables and ends each with an empty line."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        header = next(csv.reader([line]), [])
        if set(columns) <= set(header):
            end = next((j for j in range(i + 1, len(lines)) if not lines[j].strip()), len(lines))
            rows = [dict(zip(header, values, strict=False)) for values in csv.reader(lines[i + 1 : end])]
            return [row for row in rows if len(row) == len(header)]
    return []


def _number(text: str) -> float:
    return float(text.replace(",", ""))
