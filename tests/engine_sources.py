"""The engines' released Python files, in a folder that KDA_ENGINE_SOURCES names; not part of the repository."""

import ast
import os
from pathlib import Path

import pytest

SOURCES = os.environ.get("KDA_ENGINE_SOURCES", "")
RELEASES = {"sglang": "sglang==0.5.23", "vllm": "vllm==0.33.0", "flashinfer": "flashinfer-python==0.7.2.post1"}


def folder(engine: str) -> Path:
    """Of the engine's package; without one the test is skipped, and says how to fetch it."""
    if not (Path(SOURCES or "/nonexistent") / engine).is_dir():
        release = RELEASES[engine]
        fetch = f"pip download --no-deps --only-binary :all: {release} && unzip -q {engine}*.whl -d FOLDER"
        pytest.skip(f"KDA_ENGINE_SOURCES names no folder with {release}: {fetch}")
    return Path(SOURCES) / engine


def parameters(file: Path, function: str) -> list[str]:
    """Names of the parameters of a function or "Class.method", in order, without self."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for name in function.split("."):
        found = next(x for x in ast.walk(ast.Module(body, [])) if getattr(x, "name", None) == name)
        body = found.body
    a = found.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x is not None]
    return [name for name in names if name != "self"]
