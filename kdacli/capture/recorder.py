"""Stands in the place of a target: runs it unchanged, and writes a dump of the calls that were asked for.

Whatever goes wrong in here is told in one line and never reaches the program; what the target raises passes through.
"""

import functools
import os
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kda_kernels.errors import one_line
from kdacli.capture import arguments, journal, steps, taken
from kdacli.capture.graphs import Graphs
from kdacli.capture.settings import Settings
from kdacli.capture.sites import Site, resolve
from kdacli.dumps.save import write_pt
from kdacli.output import fmt_bytes

Finish = Callable[[Any, Exception | None], None]  # with what the call returned, or raised

_FRAMES = 24  # how far up the stack the layer is looked for
_LAYER_NAMES = ("layer_id", "layer_idx", "layer_name", "prefix")


class Recorder:
    """Records the calls of one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sites = {site.target: site for site in resolve(settings.targets)}
        self.files: list[Path] = []
        self.graphs = Graphs(settings, self._write_replay, self._tell_once) if settings.replays else None
        self.stopped = False
        self._seen: Counter[tuple[str, int | None]] = Counter()
        self._taken: Counter[tuple[str, int | None]] = Counter()
        self._lost: Counter[tuple[str, str]] = Counter()  # (target, reason)
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._inside = threading.local()

    def wrap(self, function: Callable, target: str) -> Callable:
        """`function`, recorded."""
        site = self.sites[target]
        journal.record(self.settings.out, "found", target=target)
        is_compiling = torch.compiler.is_compiling

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if is_compiling() or self.stopped or getattr(self._inside, "call", False):
                return function(*args, **kwargs)
            return self._call(site, function, args, kwargs)

        return recorded

    def _call(self, site: Site, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        finish = self._guarded(self._before, site, function, args, kwargs) or (lambda result, raised: None)
        self._inside.call = True  # of nested targets only the outermost call is recorded
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            self._guarded(finish, None, error)
            raise
        finally:
            self._inside.call = False
        self._guarded(finish, result, None)
        return result

    def _guarded(self, step: Callable, *args: Any) -> Any:
        try:
            with torch.no_grad():
                return step(*args)
        except Exception as error:
            self._tell_once(f"not recorded: {one_line(error, 200)}")
            return None

    def _before(self, site: Site, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Finish | None:
        """Copies the inputs, if this is a call to record; returns what is to be called with its outcome."""
        settings = self.settings
        rank = rank_of()
        if settings.ranks is not None and rank not in settings.ranks:
            return None
        in_graph = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if in_graph and self.graphs is None:
            self._tell_once(
                f"{site.target} is called under CUDA graph capture: --replays records replays of the graph; or turn"
                " graphs off in the engine (vLLM: --enforce-eager, SGLang: --disable-cuda-graph)",
                "graph",
            )
            return None
        layer = layer_of()
        if settings.layers is not None and layer not in settings.layers:
            if layer is None:
                self._tell_once(f"no layer to be found for {site.target}: --layers leaves its calls out", "no layer")
            return None
        try:
            call = arguments.read(site, *arguments.bind(function, args, kwargs), settings.names)
        except arguments.NotKdaError as reason:
            if str(reason):
                self._left_out(site, str(reason))
            return None
        meta = {
            "target": site.target,
            "rank": rank,
            "layer": layer,
            "pid": os.getpid(),
            "device": str(call.tensors["q"].device),
            "pool_slots": call.tensors["state"].shape[0] if call.pooled else None,
            "not_dumped": ", ".join(call.left_out) or None,
            "torch": str(torch.__version__),
        }
        meta = {name: value for name, value in meta.items() if value is not None}
        return self._in_graph(site, call, meta) if in_graph else self._eager(site, call, meta)

    def _eager(self, site: Site, call: arguments.Call, meta: dict[str, Any]) -> Finish | None:
        number = self._number(site.target, meta.get("layer"))
        if number is None or not self._room(taken.size(call, self.settings.whole_pool)):
            return None
        meta["call_number"] = number
        null_slot = call.options.pop("null_slot", site.null_slot)
        arguments.trim(call)
        arguments.mark_padding(call.tensors, null_slot)
        keeper = taken.OnHost(self.settings.whole_pool)
        inputs = taken.before(call, keeper)
        steps.joined(inputs)
        if call.pooled and not keeper.whole_pool:
            meta["slots"] = keeper.slots(inputs["state_indices"])
            inputs["state_indices"] = keeper.numbered(inputs["state_indices"])
        if "token_state_indices" in inputs:
            inputs["token_state_indices"] = keeper.numbered(inputs["token_state_indices"])

        def finish(result: Any, raised: Exception | None) -> None:
            if raised is not None:
                meta["raised"] = one_line(raised, 300)
            outputs = {} if raised else taken.after(call, result, keeper)
            self._write(taken.Recorded(inputs, outputs, call.options, meta))

        return finish

    def _in_graph(self, site: Site, call: arguments.Call, meta: dict[str, Any]) -> Finish | None:
        assert self.graphs is not None
        meta["call_number"] = self.graphs.numbered(site.target)
        if meta["call_number"] >= self.settings.calls:
            return None
        need = taken.size(call, whole_pool=False)
        if not self.graphs.has_room(need):
            limit = fmt_bytes(self.graphs.limit)
            self._tell_once(f"a call of {fmt_bytes(need)} in a graph would exceed --graph-bytes {limit}", "graph bytes")
            return None
        null_slot = call.options.pop("null_slot", site.null_slot)
        arguments.trim(call)
        found = self.graphs.begin(call, meta, need, null_slot)
        return lambda result, raised: None if raised else found.finish(result)

    def _write_replay(self, call: taken.Recorded) -> None:
        if self._room(sum(tensor.nbytes for tensor in (*call.inputs.values(), *call.outputs.values()))):
            self._guarded(self._write, call)

    def _left_out(self, site: Site, reason: str) -> None:
        """Counts a call that cannot be recorded, and writes the count down at every power of ten."""
        with self._lock:
            self._lost[site.target, reason] += 1
            calls = self._lost[site.target, reason]
        if _power_of_ten(calls):
            journal.record(self.settings.out, "left out", target=site.target, reason=reason, calls=calls)
        if calls == 1:
            journal.note(f"calls of {site.target} are counted and not recorded: {reason}")

    def _number(self, target: str, layer: int | None) -> int | None:
        """Counts a call; its number if it is to be taken."""
        settings, key = self.settings, (target, layer if self.settings.layers is not None else None)
        with self._lock:
            number = self._seen[key]
            self._seen[key] += 1
            since = number - settings.skip
            if since < 0 or since % settings.every or self._taken[key] >= settings.calls:
                return None
            self._taken[key] += 1
            return number

    def _room(self, need: int) -> bool:
        """Whether `need` bytes are within the limit, and on the disk."""
        settings = self.settings
        if shutil.disk_usage(settings.out).free < need + (need >> 4):
            self.stopped = True
            self._tell_once(f"stopped: {settings.out} has no room for another {fmt_bytes(need)}", "limit")
        elif not journal.reserve(settings.out, need, settings.max_bytes):
            self.stopped = True
            limit = fmt_bytes(settings.max_bytes)
            self._tell_once(f"stopped: a call of {fmt_bytes(need)} would exceed --max-bytes {limit}", "limit")
        return not self.stopped

    def _write(self, call: taken.Recorded) -> None:
        """Writes the dump of a call."""
        meta = call.meta
        with tempfile.TemporaryDirectory(dir=self.settings.out, prefix=journal.WRITING) as folder:
            write_pt(call._asdict(), part := Path(folder) / "dump.pt")
            path = self._place(part, meta)
        self.files.append(path)
        bytes_ = path.stat().st_size
        journal.record(self.settings.out, "written", target=meta["target"], file=path.name, bytes=bytes_)
        count = len(self.files)
        if count < 10 or _power_of_ten(count) or "raised" in meta:
            raised = ", of a call that raised" if "raised" in meta else ""
            journal.note(f"{path.name}, {fmt_bytes(bytes_)}, dump {count} of this process{raised}")

    def _place(self, part: Path, meta: dict[str, Any]) -> Path:
        """Gives the written file a name that no other has, at once: whoever is killed leaves a whole dump or none."""
        layer = f".layer{meta['layer']}" if "layer" in meta else ""
        replay = f".graph{meta['graph']}.replay{meta['replay']:04d}" if "replay" in meta else ""
        stem = f"{meta['target'].rpartition(':')[2]}.rank{meta['rank']}{layer}{replay}.call{meta['call_number']:04d}"
        own = f"{stem}.pid{os.getpid()}.pt"
        for name in (f"{stem}.pt", own):
            path = Path(self.settings.out) / name
            try:
                os.link(part, path)
                return path
            except FileExistsError:
                continue
            except OSError:  # a file system without links; nobody else takes this process's own name
                if name == own and not path.exists():
                    os.replace(part, path)
                    return path
        raise FileExistsError(f"{stem} was written twice by process {os.getpid()}")

    def end(self) -> None:
        """Records no more, also where somebody kept a wrapped function."""
        if self.graphs is not None:
            self.graphs.close()
        self.stopped = True

    def missing(self, target: str) -> None:
        """A module turned out not to have its target. An engine's other versions may."""
        journal.record(self.settings.out, "missing", target=target)

    def _tell_once(self, text: str, kind: str = "") -> None:
        with self._lock:
            if (kind or text) in self._told:
                return
            self._told.add(kind or text)
        journal.note(text)
        journal.record(self.settings.out, "note", text=text)


def _power_of_ten(count: int) -> bool:
    """When a count that may grow for long is told."""
    return str(count).strip("0") == "1"


def rank_of() -> int:
    """The rank of this process: of torch.distributed, or what a launcher such as torchrun says; else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def layer_of() -> int | None:
    """The layer that is running, as the modules and layers up the stack call it; None if none does."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        for holder in ("layer", "self"):
            thing = frame.f_locals.get(holder)
            for name in _LAYER_NAMES if thing is not None else ():
                if (number := _layer(getattr(thing, name, None))) is not None:
                    return number
        frame = frame.f_back
    return None


def _layer(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.search(r"layers?\.(\d+)", value) if isinstance(value, str) else None
    return int(found[1]) if found else None
