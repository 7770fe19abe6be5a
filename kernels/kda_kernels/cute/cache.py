"""The one compile cache of all CuTe kernels: in memory by key, on disk by a hash of key, sources and compiler.

Asked for a key, it returns a function that takes torch tensors. A key is compiled once: threads that ask for it at the
same time wait for the first, and get its error if it fails; processes wait too (a lock file). What was compiled is
exported as an object file and, where there is a C compiler, linked into a shared library, which a later process loads
in milliseconds without importing the DSL. Files are written under another name and then renamed, and end with a digest
of what they hold: a damaged library would not fail to load, it would end the process.

    KDA_CACHE_DIR          where files lie (default: $XDG_CACHE_HOME/kda or ~/.cache/kda); empty: memory only
    KDA_CUTE_CACHE_SIZE    functions found in memory (default: 256); the one not asked for the longest goes first. Code
                           stays loaded, since a CUDA graph may still call it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kda_kernels import environment
from kda_kernels.errors import UnavailableError

EXPORTED = "kda_kernel"  # the function's name inside a file
DISK_FILES = 1024  # those not used for the longest go when there are more
UNUSED_DAYS = 30  # after which a file goes: other sources, or another compiler, no longer find it
LOCK_S = 900  # that a process waits for another one that compiles the same
DIGEST_BYTES = 32


@dataclasses.dataclass
class Entry:
    """One compiled function.

    Attributes:
        label: what it is, for people. function: takes torch tensors and numbers.
        origin: "compiled" in this process, or "disk". seconds: that this took.
        used: when it was last asked for, as a running number.
    """

    label: str
    function: Callable[..., Any]
    origin: str
    seconds: float
    used: int = 0


class CompileCache:
    """See the module. `get` is the hot path: one look into a dict."""

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity or int(environment.read("KDA_CUTE_CACHE_SIZE") or 256)
        self._entries: dict[Hashable, Entry] = {}
        self._clock = itertools.count(1)
        self._lock = threading.Lock()
        self._making: dict[Hashable, Future] = {}

    def get(self, key: Hashable) -> Callable[..., Any] | None:
        """The function for `key` if it is in memory."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = next(self._clock)
        return entry.function

    def make(self, key: Hashable, label: str, build: Callable[[], Any]) -> Callable[..., Any]:
        """The function for `key`: from memory, from disk, or from `build`, which compiles and returns what
        `cute.compile` returns.

        Args:
            key: whatever tells functions apart in memory.
            label: tells them apart on disk, so everything that `build` depends on must be in it.
        """
        with self._lock:
            if (function := self.get(key)) is not None:
                return function
            made = self._making.get(key)
            if mine := made is None:
                made = self._making[key] = Future()
        if not mine:
            return made.result()
        try:
            began = time.perf_counter()
            function, origin = _from_disk_or(build, label)
        except BaseException as error:
            self._made(key)
            made.set_exception(error)
            raise
        self._made(key, Entry(label, function, origin, time.perf_counter() - began, next(self._clock)))
        made.set_result(function)
        return function

    def _made(self, key: Hashable, entry: Entry | None = None) -> None:
        """`key` is no longer being made: here it is, or it failed and the next call tries again."""
        with self._lock:
            del self._making[key]
            if entry is not None:
                self._entries[key] = entry
                self._evict()

    def entries(self) -> list[Entry]:
        """What is in memory, the most recently used last."""
        return sorted(self._entries.values(), key=lambda entry: entry.used)

    def clear(self) -> None:
        """Forgets what is in memory; files stay."""
        with self._lock:
            for key in list(self._entries):
                self._retire(key)

    def _evict(self) -> None:
        while len(self._entries) > self.capacity:
            self._retire(min(self._entries, key=lambda k: self._entries[k].used))

    def _retire(self, key: Hashable) -> None:
        _RETIRED.append(self._entries.pop(key).function)


CACHE = CompileCache()
_RETIRED: list[Callable[..., Any]] = []  # CUDA graphs may hold their code
_COMPILING = threading.Lock()  # the DSL's compiler is not thread-safe


def directory() -> Path | None:
    """Where compiled functions are kept between processes; None: nowhere."""
    named = os.environ.get("KDA_CACHE_DIR")
    if named == "":
        return None
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kda"
    return base / "cute" / fingerprint()[:16]


@functools.cache
def fingerprint() -> str:
    """A hash of what a file depends on beside its key: these sources, the compiler, and the interface of calls."""
    parts = hashlib.sha256()
    folder = Path(__file__).parent
    for source in sorted(folder.rglob("*.py")):
        parts.update(str(source.relative_to(folder)).encode() + source.read_bytes())
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        parts.update(f"{package}={importlib.metadata.version(package)}".encode())
    parts.update(f"{sys.implementation.cache_tag} {sysconfig.get_platform()}".encode())
    return parts.hexdigest()


def compiled(build: Callable[[], Any]) -> Any:
    """`build()`, one at a time."""
    with _COMPILING:
        return build()


def keep(made: Any, label: str) -> None:
    """Puts what `cute.compile` returned on disk, unless it is there."""
    if (path := _path(label)) is not None:
        with _locked(path):
            if not any(path.with_suffix(suffix).exists() for suffix in (".so", ".o")):
                _store(made, path)


def lacks(label: str) -> bool:
    """Whether it is not on disk, and could be."""
    path = _path(label)
    return path is not None and not any(path.with_suffix(suffix).exists() for suffix in (".so", ".o"))


def _from_disk_or(build: Callable[[], Any], label: str) -> tuple[Callable[..., Any], str]:
    path = _path(label)
    if path is None:
        return compiled(build), "compiled"
    with _locked(path):
        if (function := _load(path)) is not None:
            return function, "disk"
        made = compiled(build)
        _store(made, path)
        return _load(path) or made, "compiled"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time has a file. Raises `UnavailableError` when it waited too long."""
    lock = FileLock(f"{path}.lock", timeout=LOCK_S)
    try:
        lock.acquire()
    except Timeout:
        raise UnavailableError(
            f"another process has compiled the same kernel for {LOCK_S} s: end it, or set KDA_CACHE_DIR to another "
            f"folder than that of {lock.lock_file}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _path(label: str) -> Path | None:
    """Where the function lies on disk, without its suffix; None if there is no such place."""
    where = directory()
    return where / hashlib.sha256(label.encode()).hexdigest()[:32] if where is not None and _ours(where) else None


def _ours(where: Path) -> bool:
    """Makes the folder. False, with a warning, if others may write to it: what lies there is run."""
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = where.stat()
    except OSError as error:
        warnings.warn(f"no compile cache on disk: {error}", RuntimeWarning, stacklevel=4)
        return False
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        warnings.warn(f"no compile cache on disk: others may write to {where}", RuntimeWarning, stacklevel=4)
        return False
    if not os.access(where, os.W_OK):
        warnings.warn(f"no compile cache on disk: {where} cannot be written to", RuntimeWarning, stacklevel=4)
        return False
    return True


def _store(made: Any, path: Path) -> None:
    """Exports what `cute.compile` returned: `path`.so where it can be linked, else `path`.o. A warning if it cannot be
    written: then it is in memory only."""
    objects, library = (Path(f"{path}.{os.getpid()}{suffix}") for suffix in (".o", ".so"))
    try:
        made.export_to_c(object_file_path=str(objects), function_name=EXPORTED)
        file = library if _link(objects, library) else objects
        with file.open("r+b") as stream:
            stream.write(_digest(stream.read()))
        os.replace(file, path.with_suffix(file.suffix))
    except OSError as error:
        warnings.warn(f"compile cache: {path.name} was not written ({error})", RuntimeWarning, stacklevel=4)
    finally:
        for file in (objects, library):
            with contextlib.suppress(OSError):
                file.unlink()
    _prune(path.parent.parent)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _link(objects: Path, library: Path) -> bool:
    """Whether there is a C compiler that makes a shared library of the object file."""
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    if not compiler:
        return False
    command = [*compiler, "-shared", "-o", str(library), str(objects)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # $CC is not there
        return False


def _load(path: Path) -> Callable[..., Any] | None:
    """The function in `path`.so or `path`.o; None if there is none, or none that loads: then it is made again."""
    for file in (path.with_suffix(".so"), path.with_suffix(".o")):
        if file.exists():
            try:
                _require_whole(file)
                os.utime(file)  # it is in use
                return _load_library(file) if file.suffix == ".so" else _load_object(file)
            except Exception as error:
                warnings.warn(f"compile cache: {file.name} does not load ({error}): made again", RuntimeWarning, 5)
                with contextlib.suppress(OSError):
                    file.unlink()
    return None


def _require_whole(file: Path) -> None:
    content = file.read_bytes()
    if _digest(content[:-DIGEST_BYTES]) != content[-DIGEST_BYTES:]:
        raise ValueError("it is damaged")


def _load_library(file: Path) -> Callable[..., Any]:
    import tvm_ffi

    load_runtime()
    return getattr(tvm_ffi.load_module(str(file)), EXPORTED)


def _load_object(file: Path) -> Callable[..., Any]:
    from cutlass.cute.runtime import load_module

    return load_module(str(file), enable_tvm_ffi=True)[EXPORTED]


@functools.cache
def load_runtime() -> None:
    """Makes the DSL's runtime library visible to the shared libraries that are linked against it, by name only."""
    import ctypes

    import tvm_ffi

    for library in (*_runtime_libraries(), tvm_ffi.libinfo.find_libtvm_ffi()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _runtime_libraries() -> Iterator[Path]:
    """libcute_dsl_runtime.so of the installed DSL, for CUDA 13 or 12."""
    if named := os.environ.get("CUTE_DSL_LIBS"):
        yield from (Path(p) for p in named.split(":") if p.endswith("libcute_dsl_runtime.so"))
        return
    root = importlib.metadata.distribution("nvidia-cutlass-dsl").locate_file("nvidia_cutlass_dsl")
    found = sorted(Path(str(root)).glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True)
    if not found:
        raise FileNotFoundError(f"no libcute_dsl_runtime.so under {root}")
    yield found[0]


def _prune(root: Path) -> None:
    """Removes files of all sources and compilers that are not used, and folders that are empty then."""
    files = sorted((f for f in root.glob("*/*") if f.suffix in (".so", ".o")), key=_used)
    since = time.time() - UNUSED_DAYS * 86400
    for i, file in enumerate(files):
        if i < len(files) - DISK_FILES or _used(file) < since:
            for gone in (file, Path(f"{file.with_suffix('')}.lock")):
                with contextlib.suppress(OSError):
                    gone.unlink()
            with contextlib.suppress(OSError):  # there are others in it
                file.parent.rmdir()


def _used(file: Path) -> float:
    """When, in seconds."""
    try:
        return file.stat().st_mtime
    except OSError:  # another process took it away
        return 0.0
