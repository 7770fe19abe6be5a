"""Kinds of values on the command line: counts with a suffix, lists of lengths, dtypes."""

from collections.abc import Mapping
from typing import Any

import click

from kda_kernels.dtypes import FLOATS, Float

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


class Count(click.ParamType):
    """A whole number, with 8k for 8192 and 1M for 1048576."""

    name = "count"

    def __init__(self, minimum: int = 1, maximum: int = (1 << 31) - 1) -> None:
        self.minimum, self.maximum = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower()
        factor = _SUFFIXES.get(text[-1:], 1)
        digits = text[:-1] if factor > 1 else text
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
            self.fail(f"{value} is not a number such as 512, 8k or 1M", param, ctx)
        number = int(digits) * factor
        if not self.minimum <= number <= self.maximum:
            self.fail(f"{value} should lie between {self.minimum} and {self.maximum}", param, ctx)
        return number


class Lens(click.ParamType):
    """Lengths with commas between: 1300,547,0,2k."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        count = Count(minimum=0)
        return tuple(count.convert(part, param, ctx) for part in value.split(","))


class Part(click.ParamType):
    """2/8: the second of eight parts."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        part, _, parts = value.partition("/")
        if not all(text.isascii() and text.isdigit() and len(text) <= 6 for text in (part, parts)):
            self.fail(f"{value} is not a part such as 2/8", param, ctx)
        if not 1 <= int(part) <= int(parts):
            self.fail(f"{value}: the first number should lie between 1 and the second", param, ctx)
        return int(part), int(parts)


class DType(click.ParamType):
    """bf16, fp16 or fp32, or their long names; `known`: the table, where there are others."""

    def __init__(self, known: Mapping[str, Float] = FLOATS) -> None:
        self.known = {name: dtype.name for dtype in known.values() for name in (dtype.short, dtype.name)}
        self.name = "|".join(dtype.short for dtype in known.values())

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = value.lower().removeprefix("torch.")
        if name not in self.known:
            self.fail(f"{value} is no dtype for it: choose from {self.name.replace('|', ', ')}", param, ctx)
        return self.known[name]
