"""Differences and verdicts in words, and as plain values for JSON."""

import math
from typing import Any

from kdacli.comparison.difference import ULPS, Difference
from kdacli.comparison.difference_map import difference_map
from kdacli.comparison.pair import Pair, PairRow
from kdacli.comparison.plot import bins

_SHORT = {"sequence": "seq", "token": "tok", "head": "h", "channel": "ch"}
COLUMNS = ("tensor", "relative", "max abs", "rms", "1-cos", "A error", "B error")


def at(where: dict[str, str]) -> str:
    """seq0 tok61 h0 ch32."""
    return " ".join(f"{_SHORT.get(name, name)}{value}" for name, value in where.items())


def cells(row: PairRow) -> tuple[object, ...]:
    """A row of the table of a pair, under `COLUMNS`."""
    d = row.difference
    numbers = (d.relative, d.max_abs, d.rms, 1 - d.cosine, row.a.error, row.b.error)
    return d.tensor, *(f"{number:.2e}" if math.isfinite(number) else str(number) for number in numbers)


def lines(difference: Difference, bound: float, width: int) -> list[str]:
    """What there is to say of one difference beside its size, and its heat map."""
    d = difference
    if not d.different:
        return []
    beyond = f"first {at(d.material)}" if d.material else "nowhere"
    found = [
        f"unequal: {_percent(d.different, d.count)} of {d.count} elements, first {at(d.begins or {})}",
        f"largest: {at(d.where)}",
        f"beyond rounding ({'states' if d.tensor == 'final_state' else 'tokens'} off by {d.threshold:.1e}): {beyond}",
    ]
    if any(d.not_finite):
        found.append(f"not finite: {d.not_finite[0]} in A, {d.not_finite[1]} in B")
    names = [*bins(), f">{ULPS[-1]}"]
    shares = [f"{name}: {_percent(n, d.count)}" for name, n in zip(names, d.ulps, strict=True) if n]
    coarse = d.dtypes[0] if len(set(d.dtypes)) == 1 else "the coarser dtype"
    found += _folded(f"ULPs of {coarse}", shares, width)
    if d.growth:
        g = d.growth
        found.append(f"{g.word} (power {g.power:+.2f} +- {2 * g.error:.2f}, {g.chunks} chunks)")
    return [*found, *difference_map(d, bound, width)]


def inputs_line(pair: Pair) -> str:
    """Whether both sides computed the same thing."""
    if not pair.inputs and not pair.options:
        return "inputs are the same in both"
    told = [f"{name} by {relative:.1e}" for name, relative in pair.inputs.items()]
    return f"inputs differ, each side is judged on its own: {', '.join([*told, *pair.options])}"


def pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "call": pair.name,
        "problem": pair.problem.to_dict(),
        "inputs_differ": pair.inputs,
        "options_differ": pair.options,
        "notes": pair.notes,
    }


def pair_row_json(pair: Pair, row: PairRow) -> dict[str, Any]:
    return {
        "op": pair.problem.op,
        "call": pair.name,
        "case": pair.problem.name,
        "tensor": row.difference.tensor,
        "conclusion": row.conclusion,
        "wrong": row.wrong,
        "words": row.words,
        "a": verdict_json(row.a),
        "b": verdict_json(row.b),
        **difference_json(row.difference),
    }


def verdict_json(verdict) -> dict[str, Any]:
    names = ("error", "bound", "worst", "worst_bound", "where", "passed", "note")
    return {name: getattr(verdict, name) for name in names}


def difference_json(d: Difference) -> dict[str, Any]:
    """All but the map, which is as large as the sequences are long."""
    return {
        "dtypes": d.dtypes,
        "elements": d.count,
        "different": d.different,
        "relative": d.relative,
        "max_abs": d.max_abs,
        "largest_at": d.where,
        "rms": d.rms,
        "cosine": d.cosine,
        "ulps": dict(zip([*bins(), f">{ULPS[-1]}"], d.ulps, strict=True)),
        "not_finite": d.not_finite,
        "begins": d.begins,
        "beyond_rounding": d.material,
        "beyond_rounding_threshold": d.threshold,
        "growth": d.growth,
    }


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.3g}%" if share == 0 or share >= 0.01 else "<0.01%"


def _folded(title: str, parts: list[str], width: int) -> list[str]:
    found, line = [], f"{title}:"
    for part in parts:
        if len(line) + len(part) + 2 > width:
            found.append(line)
            line = "   "
        line += f"  {part}"
    return [*found, line]
