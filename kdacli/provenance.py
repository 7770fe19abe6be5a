"""Where a result comes from: machine, versions, commit and command. Whatever is not there is left out or None."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import kdacli
from kdacli.device import gpu_uuid

PACKAGES = (
    "torch",
    "triton",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "flash-linear-attention",
    "fla-core",
    "nvidia-cudnn-frontend",
    "vllm",
    "sglang",
    "flashinfer-python",
    "nvtx",
    "nvidia-ml-py",
    "numpy",
)
_TIMEOUT_S = 5


def collect(seed: int | None = None) -> dict[str, Any]:
    """The `provenance` object of every JSON report. Makes no CUDA context; takes well under a second."""
    return {
        "kda": kdacli.__version__,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions(),
        "gpu": gpu(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu() -> dict[str, Any] | None:
    """Name, driver, clocks now and at most (MHz), power limit (W), temperature (C) and what throttles the GPU.

    It is the GPU that CUDA shows this process first; None where it shows none.
    """
    if (uuid := gpu_uuid()) is None:
        return None
    fields = {
        "name": "name",
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "memory_clock_mhz": "clocks.mem",
        "memory_clock_max_mhz": "clocks.max.mem",
        "power_limit_w": "power.limit",
        "temperature_c": "temperature.gpu",
    }
    values = _nvidia_smi(uuid, *fields.values())
    if values is None:
        return None
    # The field has another name since driver 535; an unknown field fails the whole query, hence one of its own.
    reasons = _nvidia_smi(uuid, "clocks_event_reasons.active") or _nvidia_smi(uuid, "clocks_throttle_reasons.active")
    return {name: _number(v) for name, v in zip(fields, values, strict=True)} | {
        "throttle_reasons": reasons[0] if reasons else None
    }


def commit() -> dict[str, Any] | None:
    """Commit of the checkout that kda runs from, and whether it has changes.

    For an installed kda, or a copy without its history, the environment variable KDA_COMMIT may name it; else None.
    """
    if named := os.environ.get("KDA_COMMIT"):
        return {"id": named, "dirty": None}
    here = Path(__file__).resolve()
    if _run("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None  # not a checkout, or one of something else that merely contains this installation
    head = _run("git", "-C", str(here.parent), "rev-parse", "HEAD")
    status = _run("git", "-C", str(here.parent), "status", "--porcelain", "--untracked-files=no")
    return {"id": head.strip(), "dirty": bool(status)} if head else None


def command_line() -> str:
    """The command as typed, quoted for a shell; absolute paths are cut to their last part."""
    context = click.get_current_context(silent=True)
    words = context.meta.get("kdacli.args") if context else None
    is_script = words is None and sys.argv[0].endswith(".py") and not sys.argv[0].endswith("__main__.py")
    program = ["python3", _portable(sys.argv[0])] if is_script else ["kda"]
    return shlex.join([*program, *(_portable(word) for word in (sys.argv[1:] if words is None else words))])


def _portable(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and os.path.isabs(value):
        return option + equals + os.path.basename(value)
    return os.path.basename(word) if os.path.isabs(word) else word


def _nvidia_smi(uuid: str, *fields: str) -> list[str] | None:
    """Values of the fields."""
    out = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", uuid)
    values = [v.strip() for v in out.strip().splitlines()[0].split(",")] if out and out.strip() else []
    return values if len(values) == len(fields) else None


def _number(text: str) -> float | str | None:
    if text.startswith("["):  # [N/A], [Not Supported]
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _run(*command: str) -> str | None:
    """Its stdout; None if it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
