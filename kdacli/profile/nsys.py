"""Nsight Systems around a `kda profile`: find it, run it, read its summaries."""

import csv
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kda_kernels.errors import CheckFailedError, UnavailableError
from kdacli.profile import inner
from kdacli.profile.nvtx import SCAFFOLD

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
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def find(path: str | None = None, places: Sequence[str] = PLACES) -> str:
    """The nsys to use, see `inner.find`."""
    return inner.find("nsys", path, places, HOW_TO_GET)


def command(nsys: str, report: Path, words: Sequence[str]) -> list[str]:
    """The nsys command that profiles `kda <words>`."""
    flags = ["-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--force-overwrite=false"]
    return [nsys, "profile", *flags, "-o", str(report).removesuffix(SUFFIX), *inner.command(words)]


def profile(nsys: str, report: Path, words: Sequence[str], run: Run = subprocess.run) -> None:
    """Runs `kda <words>` under nsys; its output goes to stderr, since stdout is for our own report.

    Raises:
        UnavailableError: this nsys cannot write a report.
        CheckFailedError: the run inside failed.
    """
    done = run(command(nsys, report, words), env=inner.environment("nsys"), stdout=sys.stderr, check=False)
    raw = report.with_suffix(".qdstrm")
    if not report.exists():
        if raw.exists():
            raise UnavailableError(
                f"{nsys} recorded {raw} but cannot make a report of it: a copy as Nsight Compute has one lacks the "
                f"importer; {HOW_TO_GET}"
            )
        raise CheckFailedError(f"nsys ended with exit code {done.returncode} and wrote no report: its output is above")
    if done.returncode:
        raise CheckFailedError(f"the profiled run ended with exit code {done.returncode}: the report is {report}")


def stats(nsys: str, report: Path, run: Run = subprocess.run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kernels (kernel, launches, total_us, median_us) and ranges (range, instances, gpu_us, host_us) of a report.

    Left out is what kda does around the kernels: inputs, warm-up, eviction.

    Raises:
        CheckFailedError: nsys could not summarise the report.
    """
    reports = [word for name in (KERNELS, RANGES) for word in ("--report", name)]
    done = run(
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
    """The rows of nvtx_gpu_proj_sum: GPU time under each range, and the time its host code took."""
    return [
        {
            "range": row["Range"].removeprefix(":").removeprefix("kda:"),
            "instances": int(_number(row["Range Instances"])),
            "gpu_us": _number(row["Total Proj Time (ns)"]) / 1e3,
            "host_us": _number(row["Total Range Time (ns)"]) / 1e3,
        }
        for row in _table(text, ("Range", "Range Instances", "Total Proj Time (ns)", "Total Range Time (ns)"))
        if not _SCAFFOLD.match(row["Range"])
    ]


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
