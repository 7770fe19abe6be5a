"""Puts functions in the place of others: of modules that are loaded, and of others as soon as they are.

Imports no torch: this runs in every Python process of an engine, and of a program that `kda capture` looks at.
"""

import sys
import threading
from collections.abc import Callable, Collection, Iterable
from types import ModuleType
from typing import Any

Wrap = Callable[[Any, str], Any]  # (function, target) -> what stands in its place


class Patches:
    """Functions that are replaced together.

    Args:
        targets: "module:function" or "module:Class.method".
        wrap: called once for each function that was found.
        missing: called with a target whose module is there without it.
        outermost: wrap what others put in the place of a function; else these others wrap what is put there.
        only_there: targets that are replaced in the module named alone, not where else they were imported to.
    """

    def __init__(
        self,
        targets: Iterable[str],
        wrap: Wrap,
        missing: Callable[[str], None],
        *,
        outermost: bool = False,
        only_there: Collection[str] = (),
    ) -> None:
        self.wrap, self.missing, self.outermost, self.only_there = wrap, missing, outermost, only_there
        self._finding = threading.local()
        self.waiting: dict[str, list[str]] = {}
        for target in targets:
            self.waiting.setdefault(target.partition(":")[0], []).append(target)
        self.undo: list[tuple[Any, str, Any, Any]] = []
        self.found: set[str] = set()

    def install(self) -> None:
        """Patches what is loaded and waits for the rest."""
        for name in list(self.waiting):
            module = sys.modules.get(name)
            # A module that is being imported is patched here too early: its functions may not be there yet.
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self.loaded(module)
        if self.waiting:  # the first finder is the last to see a module, when the others have patched it
            before = (i + 1 for i, finder in enumerate(sys.meta_path) if getattr(finder, "outermost", False))
            sys.meta_path.insert(0 if self.outermost else max(before, default=0), self)

    def remove(self) -> None:
        """Puts everything back, wherever the replacement still stands."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for owner, name, original, replacement in self.undo:
            if vars(owner).get(name) is replacement:
                setattr(owner, name, original)
        self.undo.clear()

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        """Part of the import system: finds nothing itself, but has `loaded` called once a wanted module is there."""
        if name not in self.waiting or getattr(self._finding, "name", None) == name:
            return None
        self._finding.name = name  # other patches among the finders ask this one again
        try:
            spec = _first(name, path, target)
        finally:
            self._finding.name = None
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.loaded(module)

        loader.exec_module = exec_module  # on this one loader, whose type and methods stay what tools expect
        return spec

    def loaded(self, module: ModuleType) -> None:
        """Patches the targets of `module`, once."""
        for target in self.waiting.pop(module.__name__, []):
            *parents, name = target.partition(":")[2].split(".")
            owner: Any = module
            for parent in parents:
                owner = getattr(owner, parent, None)
            original = getattr(owner, name, None)
            if not callable(original) or isinstance(original, type):
                self.missing(target)
                continue
            held = vars(owner).get(name, original)  # as it is held: a staticmethod stays one
            replacement = self.wrap(original, target)
            put = staticmethod(replacement) if isinstance(held, staticmethod) else replacement
            self._replace(owner, name, held, put)
            if owner is module and target not in self.only_there:
                self._replace_references(original, replacement)
            self.found.add(target)

    def _replace_references(self, original: Any, replacement: Any) -> None:
        """Modules that ran `from module import function` before hold the function themselves."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or module.__name__.startswith(("kdacli.capture", __package__)):
                continue
            for name, value in list(vars(module).items()):
                if value is original:
                    self._replace(module, name, original, replacement)

    def _replace(self, owner: Any, name: str, original: Any, replacement: Any) -> None:
        setattr(owner, name, replacement)
        self.undo.append((owner, name, original, replacement))


def _first(name: str, path: Any, target: ModuleType | None) -> Any:
    """The module's spec by the first finder that has it."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, path, target)) is not None:
            return spec
    return None
