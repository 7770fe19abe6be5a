"""Whether a peer can run on this machine: its package, the GPU, and what fails when it is imported."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import operator
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class VllmLibrary:
    """A library of operators that vLLM ships: in an installed vllm, which is not imported for it, or where an
    environment variable says.

    Attributes:
        variable: that environment variable.
        stem: how the file's name begins.
        operators: "namespace.name" of each, in `torch.ops`.
    """

    variable: str
    stem: str
    operators: tuple[str, ...]

    @property
    def file(self) -> str | None:
        """None where there is none."""
        if said := os.environ.get(self.variable):
            return said
        spec = importlib.util.find_spec("vllm")
        folders = spec.submodule_search_locations or () if spec else ()
        found = (str(file) for folder in folders for file in sorted(Path(folder).glob(f"{self.stem}*.so")))
        return next(found, None)

    def missing(self) -> str | None:
        """Why there is no such library; None if there is one."""
        if said := os.environ.get(self.variable):
            return None if Path(said).is_file() else f"{self.variable} is {said}: there is no such file"
        how = f"pip install vllm, or set {self.variable} to its {self.stem}.abi3.so"
        if (reason := missing_package(("vllm",), how)) is not None:
            return reason
        older = f"vllm has no {self.stem}: 0.33.0 or newer is needed, or set {self.variable}"
        return older if self.file is None else None

    def not_loadable(self) -> str | None:
        """Why `load` would raise; None if it would not."""
        try:
            self.load()
        except UnavailableError as error:
            return str(error)
        return None

    def load(self) -> tuple[Any, ...]:
        """The operators. Raises `UnavailableError`."""
        return _operators(self.file, self.operators)


@functools.cache
def _operators(file: str | None, names: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        torch.ops.load_library(file)
        return tuple(operator.attrgetter(name)(torch.ops) for name in names)
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"{file} cannot be loaded: {one_line(error)}") from error


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


def without_sglang(modules: tuple[str, ...]) -> str | None:
    """Why kernels in these modules of SGLang cannot run here; None if they can."""
    return missing_package(("sglang",), "pip install sglang") or no_gpu("SGLang's kernels") or not_loadable(modules)
