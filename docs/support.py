"""What runs where, as a Markdown table, from what the kernels themselves say: `python docs/support.py`.

Each kernel is asked about one problem after another, on a machine that pretends to have a GPU of each architecture.
With --write the tables between the marks in README.md and docs/index.md are made anew.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # what a GPU would run, not what this machine interprets

from kda_kernels import registry
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.registry import Kernel
from kdacli.compile import pretend
from kdacli.compile.arch import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
MARKS = ("<!-- support: python docs/support.py --write -->", "<!-- /support -->")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "gfx942", "gfx950")
SIZES = (16, 32, 48, 64, 96, 128, 192, 256)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STATES = {**DTYPES, "int16": "int16"}
OPTIONS = {
    "softplus": Options(),
    "safe": Options(Gate.SAFE, -5.0),
    "none": Options(Gate.NONE, -5.0),
    "none, no bound": Options(Gate.NONE),
}
COLUMNS = ("kernel", "GPUs", "gates", "head sizes K, V", "q, k, v, o", "states")


def table() -> str:
    rows = [_row(kernel) for kernel in registry.kernels() if kernel.ours and kernel.backend != "torch"]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(kernel: Kernel) -> list[str]:
    archs = [arch for arch in ARCHS if _runs(kernel, None, arch)]
    best = "sm_90a" if "sm_90a" in archs else archs[0]

    def has(make: Callable[[Any], Problem], values: Iterable[Any]) -> list[Any]:
        return [value for value in values if _runs(kernel, make(value), best)]

    base = _problem(kernel.op)
    gates = has(lambda name: dataclasses.replace(base, options=OPTIONS[name]), OPTIONS)
    keys = has(lambda size: dataclasses.replace(base, K=size), SIZES)
    values = has(lambda size: dataclasses.replace(base, V=size), SIZES)
    dtypes = has(lambda name: dataclasses.replace(base, dtype=DTYPES[name]), DTYPES)
    states = has(lambda name: dataclasses.replace(base, pool_slots=base.N, state_dtype=STATES[name]), STATES)
    where = "all of these" if len(archs) == len(ARCHS) else ", ".join(archs)
    return [
        f"`{kernel.name}`",
        where,
        "all" if len(gates) == len(OPTIONS) else ", ".join(gates),
        _sizes(keys) if keys == values else f"K {_sizes(keys)}; V {_sizes(values)}",
        ", ".join(dtypes),
        ", ".join(states) if kernel.op is not Op.GATE else "-",
    ]


def _sizes(found: list[int]) -> str:
    """A range where nothing in it is missing."""
    if len(found) > 1 and found == [size for size in SIZES if found[0] <= size <= found[-1]]:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _problem(op: Op) -> Problem:
    tokens = 1 if op is Op.DECODE else 128
    return Problem(op, (tokens,) * 4, H=4, HV=4, K=128, V=128, options=OPTIONS["safe"])


def _runs(kernel: Kernel, problem: Problem | None, arch: str) -> bool:
    with pretend.gpu(parse(arch)):
        return kernel.unsupported(problem) is None


def written(text: str) -> str:
    """A page with the table between its marks made anew."""
    before, rest = text.split(MARKS[0], 1)
    return f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{rest.split(MARKS[1], 1)[1]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for page in PAGES:
            page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
