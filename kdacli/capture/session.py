"""Starts a capture in this process: `capture` for a program's own code, `start` for the processes of `kda capture`."""

import atexit
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kda_kernels.engines.patches import Patches
from kda_kernels.errors import InputError
from kdacli.capture import journal
from kdacli.capture.settings import GIB, Settings
from kdacli.capture.sites import ENGINES, resolve


@contextmanager
def capture(
    *targets: str,
    out: str | Path,
    calls: int = 1,
    skip: int = 0,
    every: int = 1,
    ranks: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    max_bytes: int = GIB,
    whole_pool: bool = False,
    replays: Sequence[int] = (),
    graph_bytes: int = GIB,
    names: dict[str, str] | None = None,
    force: bool = False,
) -> Iterator[list[Path]]:
    """Inside, calls of `targets` are written to `out` as dumps; yields the list of files, which grows.

        with capture("fla.ops.kda:chunk_kda", out="dumps", calls=3) as files:
            model(tokens)

    Args:
        targets: "module:function", "module:Class.method", or an engine: fla, sglang, vllm. Modules named so are
            imported; those of an engine are recorded once something imports them.
        out, calls, skip, every, ranks, layers, max_bytes, whole_pool, replays, graph_bytes, names: see `Settings`.
        force: replace what an earlier capture wrote into `out`.

    Raises:
        InputError: a setting makes no sense, a target is not there, or `out` is not empty.
    """
    from kdacli.capture.recorder import Recorder

    settings = Settings(
        targets=tuple(targets),
        out=str(Path(out).absolute()),
        calls=calls,
        skip=skip,
        every=every,
        ranks=None if ranks is None else tuple(ranks),
        layers=None if layers is None else tuple(layers),
        max_bytes=max_bytes,
        whole_pool=whole_pool,
        replays=tuple(replays),
        graph_bytes=graph_bytes,
        names=dict(names or {}),
    )
    prepare(settings.out, force)
    named = [target for target in targets if target not in ENGINES]
    try:
        for target in named:
            importlib.import_module(target.partition(":")[0])
    except ImportError as error:
        raise InputError(f"a target cannot be imported: {error}") from error
    recorder = Recorder(settings)
    patches = Patches(recorder.sites, recorder.wrap, recorder.missing, outermost=True)
    patches.install()
    try:
        if absent := [target for target in named if target not in patches.found]:
            raise InputError(f"target {absent[0]} is not there, or is no function")
        yield recorder.files
    finally:
        patches.remove()
        recorder.end()


def prepare(out: str | Path, force: bool = False) -> None:
    """Makes the folder of a capture.

    Raises:
        InputError: there is something in it and `force` is not set, or it cannot be made.
    """
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            if not force:
                raise InputError(f"{out} is not empty: name another folder, or use --force to replace a capture in it")
            journal.clear(path)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error


def start() -> None:
    """Begins what the environment asks for, if anything. Never raises: it runs at the start of every process."""
    try:
        if (settings := Settings.from_environment()) is not None:
            _Lazy(settings).install()
    except Exception as error:
        journal.note(f"cannot record in this process: {type(error).__name__}: {error}")


class _Lazy:
    """A capture that imports torch only once a target's module has been imported."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.recorder: Any = None

    def install(self) -> None:
        targets = [site.target for site in resolve(self.settings.targets)]
        Patches(targets, self._wrap, self._missing, outermost=True).install()

    def _wrap(self, function: Any, target: str) -> Any:
        try:
            if self.recorder is None:
                from kdacli.capture.recorder import Recorder

                self.recorder = Recorder(self.settings)
                atexit.register(self.recorder.end)
            return self.recorder.wrap(function, target)
        except Exception as error:
            journal.note(f"cannot record {target}: {type(error).__name__}: {error}")
            return function

    def _missing(self, target: str) -> None:
        journal.record(self.settings.out, "missing", target=target)
