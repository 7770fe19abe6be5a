"""The page itself: parts in a template. jinja2 and matplotlib are the extra `report`."""

from collections.abc import Sequence
from importlib import resources

from kda_kernels.errors import InputError, UnavailableError
from kdacli.report.parts import Part

LARGEST = 2_000_000  # bytes: what people attach to a pull request
_LEVELS = {".": "l0", ":": "l0", "-": "l1", "+": "l2", "*": "l3", "#": "l4", "N": "l5", "|": ""}


def require() -> None:
    """Raises `UnavailableError` where a package of the extra is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install 'kdacli[report]'") from error


def render(parts: Sequence[Part], title: str) -> str:
    """The whole page. Text from records is escaped: a record may come from anywhere.

    Raises:
        InputError: it would be larger than `LARGEST`.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"cells": map_cells, "machine": machine, "versions": versions}
    source = resources.files("kdacli.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    html = environment.from_string(source).render(parts=parts, title=title)
    if (size := len(html.encode())) > LARGEST:
        raise InputError(f"the page would have {size / 1e6:.1f} MB, over {LARGEST / 1e6:.0f} MB: give fewer records")
    return html


def map_cells(line: str) -> list[tuple[str, str]]:
    """A line of a heat map as (class, characters) runs; other lines as one run without a class."""
    label, _, grid = line.rpartition(" ")
    if not grid or not label.strip() or set(grid) - set(_LEVELS):
        return [("", line)]
    runs: list[tuple[str, str]] = [("", f"{label} ")]
    for char in grid:
        level = _LEVELS[char]
        if runs[-1][0] == level:
            runs[-1] = (level, runs[-1][1] + char)
        else:
            runs.append((level, char))
    return runs


def machine(made: dict[str, object]) -> str:
    """The GPU of a provenance, or that there was none."""
    gpu = made.get("gpu")
    return str(gpu.get("name")) if isinstance(gpu, dict) else "no GPU"


def versions(made: dict[str, object]) -> str:
    """Commit, date and packages of a provenance, in one line."""
    commit = made.get("commit")
    words = [f"kda {made.get('kda')}"]
    if isinstance(commit, dict):
        words.append(f"commit {str(commit.get('id'))[:10]}" + (" (changed)" if commit.get("dirty") else ""))
    packages = made.get("packages")
    if isinstance(packages, dict):
        words += [f"{name} {packages[name]}" for name in ("torch", "triton", "nvidia-cutlass-dsl") if name in packages]
    return ", ".join([str(made.get("date", ""))[:10], *words])
