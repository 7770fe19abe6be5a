"""Whether a peer can run on this machine: its package, the GPU, and what fails when it is imported."""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

import torch

from kda_kernels.errors import UnavailableError, one_line


def missing_package(packages: Sequence[str], how: str) -> str | None:
    """Why none of the top-level `packages` can be imported; None if one of them is there.

    Args:
        how: the rest of the sentence "NAME is not installed: ".
    """
    if any(importlib.util.find_spec(package) is not None for package in packages):
        return None
    return f"{packages[0]} is not installed: {how}"


def vllm_library(variable: str, stem: str) -> str | None:
    """The file of a library that vLLM ships, whose name begins with `stem`: in an installed vllm, which is not imported
    for it, or where the environment variable says; None where there is none.
    """
    if said := os.environ.get(variable):
        return said
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations or () if spec else ()
    return next((str(file) for folder in folders for file in sorted(Path(folder).glob(f"{stem}*.so"))), None)


def no_vllm_library(variable: str, stem: str) -> str | None:
    """Why there is no such library; None if there is one."""
    if said := os.environ.get(variable):
        return None if Path(said).is_file() else f"{variable} is {said}: there is no such file"
    if (reason := missing_package(("vllm",), f"pip install vllm, or set {variable} to its {stem}.abi3.so")) is not None:
        return reason
    found = vllm_library(variable, stem)
    return None if found else f"vllm has no {stem}: 0.33.0 or newer is needed, or set {variable}"


def wrong_gpu(who: str, majors: Collection[int], needs: str) -> str | None:
    """Why `who` cannot run on the current GPU; None if it can.

    Args:
        majors: of the compute capabilities it has kernels for.
        needs: the same in words: "Hopper (sm_90)".
    """
    if not torch.cuda.is_available():
        return f"no CUDA GPU: {who} needs {needs}"
    major, minor = torch.cuda.get_device_capability()
    return None if major in majors else f"the GPU is sm_{major}{minor}: {who} needs {needs}"


def no_gpu(who: str) -> str | None:
    """Why `who` cannot run for want of a GPU; None if there is one."""
    return None if torch.cuda.is_available() else f"no CUDA GPU: {who} need one"


def load(modules: Sequence[str]) -> ModuleType:
    """Imports the first of `modules` that there is. What it prints goes to stderr: stdout may be JSON.

    Raises:
        UnavailableError: none can be imported; it says what the first installed one fails with.
    """
    reasons = []
    for name in modules:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return importlib.import_module(name)
        except Exception as error:  # whatever a package's import throws, it is not there for us
            reasons.append(f"{name} cannot be imported: {one_line(error)}")
    raise UnavailableError(reasons[0] if reasons else f"{modules[0]} is not installed")


@functools.cache
def not_loadable(modules: tuple[str, ...]) -> str | None:
    """Why `load` would raise; None if it would not. Importing a peer takes seconds: ask the cheaper questions first."""
    try:
        load(modules)
    except UnavailableError as error:
        return str(error)
    return None
