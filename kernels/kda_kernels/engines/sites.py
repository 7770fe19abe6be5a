"""A function of an engine's that ours stands in for, and whether it does in the release that is installed.

The engine's sources are read, not imported: that takes milliseconds, and starts nothing.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kda_kernels.errors import one_line

Parse = Callable[[Path], list[ast.stmt]]


@dataclass(frozen=True)
class Site:
    """One call site.

    Attributes:
        models: whose layers call it; the sites of a model are replaced together or not at all.
        what: what it computes, in a word or two.
        target: "module:function" or "module:Class.method" of the engine.
        ours: the same of what runs instead; "" where there is nothing.
        why_not: the reason where `ours` is "".
        patched: whether the function itself is replaced; else ours is reached through another site that is.
        defined: the module that defines it, where the one of `target` imports it: then it is replaced there alone.
    """

    models: str
    what: str
    target: str
    ours: str = ""
    why_not: str = ""
    patched: bool = True
    defined: str = ""

    def reason(self, root: Path | None, parse: Parse) -> str | None:
        """Why ours does not run there; None if it does.

        Args:
            root: the folder that holds the engine's package; None: where it is installed.
            parse: what reads a file.
        """
        if not self.ours:
            return self.why_not
        engine = self.target.partition(".")[0]
        if (absent := absence(engine, root)) is not None:
            return absent
        root = root or _installed(engine)
        assert root is not None
        try:
            theirs = self._parameters(root, parse)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{engine}'s source cannot be read: {one_line(error)}"
        if theirs is None:
            return f"{engine} {version(root / engine)} has no {self.target}"
        if unknown := _not_taken(theirs, parameters(Path(__file__).parents[2], self.ours, parse) or ()):
            return f"{engine} {version(root / engine)} passes {', '.join(unknown)}, which ours does not know"
        return None

    def _parameters(self, root: Path, parse: Parse) -> tuple[str, ...] | None:
        """Of the function; None if it is not there, or not imported where it should be."""
        if not self.defined:
            return parameters(root, self.target, parse)
        module, _, name = self.target.partition(":")
        body = parse(root.joinpath(*module.split(".")).with_suffix(".py"))
        imported = (alias.asname or alias.name for x in body if isinstance(x, ast.ImportFrom) for alias in x.names)
        return parameters(root, f"{self.defined}:{name}", parse) if name in imported else None


def reasons(sites: Sequence[Site], root: Path | None = None) -> dict[Site, str | None]:
    """Of each site why ours does not run there, or None. Where one of a model's fails, so do its others."""
    parse = functools.cache(lambda file: ast.parse(file.read_text()).body)  # once each: sites share files
    found = {site: site.reason(root, parse) for site in sites}
    for site, reason in list(found.items()):
        failed = next((x for x in sites if x.ours and x.models == site.models and found[x] is not None), None)
        if reason is None and failed is not None and failed != site:
            found[site] = f"not without {failed.target.rpartition(':')[2]}, which cannot be replaced"
    return found


@functools.cache
def version(package: Path) -> str:
    """What a package says of itself in its sources."""
    file = package / "_version.py"
    said = re.search(r"^__version__ .*['\"](.+)['\"]", file.read_text() if file.is_file() else "", re.MULTILINE)
    return said[1] if said else "(of no known version)"


def absence(engine: str, root: Path | None) -> str | None:
    """Why an engine is not read at all; None if it is there, in the folder `root` or installed."""
    if root is not None:
        return None if (root / engine).is_dir() else f"{engine} is not in {root}"
    return f"{engine} is not installed" if _installed(engine) is None else None


def _installed(package: str) -> Path | None:
    """The folder that holds it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]).parent if folders else None


def parameters(root: Path, target: str, parse: Parse) -> tuple[str, ...] | None:
    """Names of the parameters of a function in the sources below `root`; None if it is not there.

    A package is searched in its own files: what its __init__ only imports is found beside it.
    """
    module, _, name = target.partition(":")
    path = root.joinpath(*module.split("."))
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        if file.is_file() and (found := _definition(parse(file), name.split("."))) is not None:
            every = (*found.args.posonlyargs, *found.args.args, found.args.vararg, *found.args.kwonlyargs)
            names = tuple(x.arg for x in every if x is not None)
            return names + (("**",) if found.args.kwarg is not None else ())
    return None


def _definition(body: Iterable[ast.stmt], names: Sequence[str]) -> ast.FunctionDef | None:
    found = next((x for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name == names[0]), None)
    if isinstance(found, ast.ClassDef):
        return _definition(found.body, names[1:]) if names[1:] else None
    return found if found is not None and len(names) == 1 else None


def _not_taken(theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Parameters of theirs that ours lacks, or has in another order."""
    named = [name for name in theirs if name not in ("self", "**")]
    return [name for name in named if name not in ours] or (
        [] if [name for name in ours if name in named] == named else named
    )
