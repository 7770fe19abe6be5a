"""From `path.py:function` or `package.module:function` to the function."""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from kda_kernels.errors import InputError, KdaError, UnavailableError, one_line

_loaded: dict[Path, tuple[tuple[int, int], ModuleType]] = {}  # by file: its time and size, and what it became


def find(spec: str) -> Callable[..., Any]:
    """The function that `spec` names; the module is imported, again only if its file has changed.

    Raises:
        InputError: no such file, module or function, or the module cannot be imported.
        UnavailableError: the module imports something that is not installed.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise InputError(f"kernel {spec} names no function: it should be {(where or name).strip(':')}:FUNCTION")
    is_file = where.endswith(".py") or "/" in where
    module = _from_file(Path(where)) if is_file else _from_name(where)
    return attribute(module, name, where)


def attribute(module: Any, name: str, where: str) -> Callable[..., Any]:
    """The function `name`, which may have dots, of a module called `where`. Raises `InputError`."""
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{where} has no function {name}: it has {_functions(module)}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} of {where} is of type {type(found).__name__}: it should be a function")
    return found


def _functions(module: ModuleType) -> str:
    """The public functions that a module defines itself."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(names) or "none"


def _from_file(path: Path) -> ModuleType:
    """Imports a file under a name of its own, so that it shadows no other module whatever it is called.

    Its folder goes to the end of sys.path, and stays there for what it imports later.
    """
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: it should be a Python file")
    path = path.resolve()
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    if path in _loaded and _loaded[path][0] == stamp:
        return _loaded[path][1]
    _search_last(path.parent)
    name = f"_kda_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path.name} is no Python file: its name should end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, pickle and torch.compile look a function's module up there
    try:
        with _importing(str(path)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _loaded[path] = (stamp, module)
    return module


def _from_name(name: str) -> ModuleType:
    """Imports an installed module, or one in the current folder."""
    _search_last(Path.cwd())
    try:
        with _importing(None):
            return importlib.import_module(name)
    except UnavailableError as error:
        missing = getattr(error.__cause__, "name", None)
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise InputError(
                f"there is no module {missing}: it should be an installed one, one in {Path.cwd()}, or a file path.py"
            ) from None
        raise


def _search_last(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextlib.contextmanager
def _importing(file: str | None) -> Iterator[None]:
    """Turns what an import raises into one line with the place. What it prints goes to stderr: stdout may be JSON."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KdaError:
        raise
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{_place(error, file)}{error}: install it first") from error
    except SystemExit as error:
        why = "it calls sys.exit when it is imported: only its `if __name__ == '__main__'` part should"
        raise InputError(f"{_place(error, file)}{why}") from error
    except Exception as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        hint = "; give it as package.module:function" if "relative import" in message else ""
        raise InputError(f"{_place(error, file)}{type(error).__name__}: {one_line(message)}{hint}") from error


def _place(error: BaseException, file: str | None) -> str:
    """`kernel.py, line 12: `, the innermost line of `file` (None: of any file) where the error passed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: "
    frames: list[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if (f.filename == file if file else "importlib" not in f.filename and f.lineno)]
    frames = [f for f in frames if f.filename != __file__]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
