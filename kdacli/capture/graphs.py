"""Calls in CUDA graphs: copies of their tensors become part of the graph, and chosen replays are written out.

A call under graph capture runs later, at each replay, and Python sees none of it. So at capture the graph is given
copies of its inputs and outputs into buffers of the recorder's, which only chosen replays make. After one the buffers
go to pinned host memory on a stream of their own, which the next chosen replay waits for, and a thread writes the dump.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

from kda_kernels.errors import one_line
from kda_kernels.triton.runtime import interpreted
from kdacli.capture import steps, taken
from kdacli.capture.arguments import Call, mark_padding
from kdacli.capture.settings import Settings
from kdacli.capture.switched import Copy, Switch
from kdacli.dumps.strides import copies, room_for

Meta = dict[str, Any]


class _InGraph:
    """How `taken` keeps tensors here: on their device; of pools, a row for each index, padding included.

    Attributes:
        copies: that fill what it gave room to.
    """

    def __init__(self) -> None:
        self.copies: list[Copy] = []

    def whole(self, tensors: taken.Tensors) -> taken.Tensors:
        made: taken.Tensors = {}
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            made |= room_for(here, device, fill=False)
        self.copies += [Copy(made[name], tensor) for name, tensor in tensors.items()]
        return made

    def rows(self, pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        indices = indices.flatten()
        room = pool.new_empty((len(indices), *pool.shape[1:]))
        self.copies.append(Copy(room, pool, indices))
        return room

    def make(self, switch: Switch | None) -> None:
        """Makes the copies part of the graph: those of tensors on its GPU where the switch is on."""
        there = []
        for copy in self.copies:
            if switch is not None and copy.source.device == switch.cell.device:
                there.append(copy)
            else:
                copy.now()
        if switch is not None:
            switch.copy(there)


@dataclasses.dataclass
class GraphCall:
    """One call of a graph: copies in memory that only the recorder knows, which each replay fills.

    Attributes:
        null_slot: of its pool. switch: of its graph's copies; None without a GPU.
        bytes: of them. hosts: how often they are on the host, too; spare: those of them that are free to be filled.
    """

    call: Call
    meta: Meta
    null_slot: int | None
    switch: Switch | None
    bytes: int
    inputs: taken.Tensors = dataclasses.field(default_factory=dict)
    outputs: taken.Tensors = dataclasses.field(default_factory=dict)
    hosts: int = 0
    spare: list["GraphCall"] = dataclasses.field(default_factory=list)

    def begin(self) -> None:
        """The call is about to run, under capture."""
        keeper = _InGraph()
        self.inputs = taken.before(self.call, keeper)
        keeper.make(self.switch)

    def finish(self, result: Any) -> None:
        """The call returned `result`, still under capture."""
        keeper = _InGraph()
        self.outputs = taken.after(self.call, result, keeper)
        keeper.make(self.switch)
        self.call = dataclasses.replace(self.call, tensors={}, out=None)  # their memory is the graph's to use again

    @functools.cached_property
    def memory(self) -> dict[Any, torch.Tensor]:
        """Each storage once, whole; of a call that is finished. Kept, as a replay that is written waits for it."""
        tensors = (*self.inputs.values(), *self.outputs.values())
        return {_storage(tensor): tensor.new_empty(0).set_(tensor.untyped_storage()) for tensor in tensors}

    def pinned(self) -> "GraphCall":
        """Room for the same on the host."""
        self.hosts += 1
        room = {at: torch.empty(m.shape, dtype=m.dtype, pin_memory=m.is_cuda) for at, m in self.memory.items()}

        def placed(tensors: taken.Tensors) -> taken.Tensors:
            return {
                name: room[_storage(t)].as_strided(t.shape, t.stride(), t.storage_offset())
                for name, t in tensors.items()
            }

        return dataclasses.replace(self, inputs=placed(self.inputs), outputs=placed(self.outputs))

    def fill(self, host: "GraphCall") -> None:
        """Copies all to `host`, which holds it once the current stream has come so far."""
        for mine, theirs in zip(self.memory.values(), host.memory.values(), strict=True):
            theirs.copy_(mine, non_blocking=True)


def _storage(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


@dataclasses.dataclass
class _Graph:
    """A graph with calls that are recorded.

    Attributes:
        number: of all such graphs. replays: so far.
    """

    number: int
    calls: list[GraphCall]
    switch: Switch | None
    replays: int = 0

    def switched_on(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.switch is None else self.switch.on()

    def sending(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.switch is None else self.switch.sending()


class Graphs:
    """The graphs of one process whose calls are recorded.

    Args:
        settings: which replays, and how much memory.
        write: writes one dump. tell: says something to the user, once for each kind.
    """

    def __init__(
        self, settings: Settings, write: Callable[[taken.Recorded], None], tell: Callable[[str, str], None]
    ) -> None:
        self.replays, self.limit, self.write, self.tell = frozenset(settings.replays), settings.graph_bytes, write, tell
        self._used = self._pinned = 0  # bytes on the GPU, and on the host
        self._capturing = threading.local()  # `calls` and `switch`: of the graph that a thread captures
        self._numbers = itertools.count()
        self._known: weakref.WeakKeyDictionary[Any, _Graph] = weakref.WeakKeyDictionary()
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event, GraphCall, GraphCall, Meta]] = queue.SimpleQueue()
        self._captures, self._unwritten, self._gate = 0, 0, threading.Lock()
        self._undo = [(name, vars(torch.cuda.CUDAGraph)[name]) for name in ("capture_begin", "capture_end", "replay")]
        for name, original in self._undo:
            setattr(torch.cuda.CUDAGraph, name, self._around(original, getattr(self, f"_{name}")))
        threading.Thread(target=self._write_all, name="kda-capture", daemon=True).start()

    @property
    def _pending(self) -> list[GraphCall]:
        """The calls of the graph that this thread captures."""
        return vars(self._capturing).setdefault("calls", [])

    def has_room(self, need: int) -> bool:
        return self._used + need <= self.limit

    def begin(self, call: Call, meta: Meta, need: int, null_slot: int | None) -> GraphCall:
        """Copies the inputs of a call under capture, which takes `need` bytes."""
        self._used += need
        found = GraphCall(call, meta, null_slot, self._capturing.switch, need)
        found.begin()
        self._pending.append(found)
        return found

    def numbered(self, target: str) -> int:
        """How many calls of `target` the graph that is being captured has so far."""
        return sum(call.meta["target"] == target for call in self._pending)

    def close(self, seconds: float = 60.0) -> None:
        """Waits for what is to be written, and leaves torch as it was."""
        ends = time.monotonic() + seconds
        while self._unwritten and time.monotonic() < ends:
            time.sleep(0.01)
        for name, original in self._undo:
            setattr(torch.cuda.CUDAGraph, name, original)

    def _around(self, original: Callable, ours: Callable) -> Callable:
        def method(graph: Any, *args: Any, **kwargs: Any) -> Any:
            return ours(graph, lambda: original(graph, *args, **kwargs))

        return method

    def _capture_begin(self, graph: Any, original: Callable) -> Any:
        with self._gate:  # while a stream is captured, no thread may ask the GPU anything
            self._captures += 1
        self._pending.clear()
        self._capturing.switch = None
        if torch.cuda.is_initialized() and not interpreted():
            try:
                self._capturing.switch = Switch()
            except Exception as error:  # then every replay makes the copies
                self.tell(
                    f"every replay of a graph is slowed down, not those chosen alone: {one_line(error, 200)}", "switch"
                )
        return original()

    def _capture_end(self, graph: Any, original: Callable) -> Any:
        try:
            return original()
        finally:
            with self._gate:
                self._captures -= 1
            try:
                if calls := [*self._pending]:
                    self._keep(graph, calls)
            except Exception as error:
                self._known.pop(graph, None)
                self.tell(f"a graph is not recorded: {one_line(error, 200)}", "")
            self._pending.clear()

    def _keep(self, graph: Any, calls: list[GraphCall]) -> None:
        """The graph is captured, with these calls in it."""
        found = self._known[graph] = _Graph(next(self._numbers), calls, self._capturing.switch)
        weakref.finalize(graph, self._forget, calls).atexit = False
        for call in calls:
            self._pinned += call.bytes
            call.spare.append(call.pinned())
        if found.switch is not None:
            found.switch.ready()

    def _forget(self, calls: list[GraphCall]) -> None:
        """Their graph is no more."""
        self._used -= sum(call.bytes for call in calls)
        self._pinned -= sum(call.bytes * call.hosts for call in calls)

    def _replay(self, graph: Any, original: Callable) -> Any:
        found = self._known.get(graph)
        if found is None:
            return original()
        found.replays += 1
        if found.replays not in self.replays:
            return original()
        with found.switched_on():
            result = original()
        self._stage(found)
        return result

    def _stage(self, graph: _Graph) -> None:
        """Sends what the buffers hold to the host, as far as there is room."""
        for call in graph.calls:
            if not call.spare and self._pinned + call.bytes <= self.limit:
                self._pinned += call.bytes
                call.spare.append(call.pinned())
            if not call.spare:
                why = "those before are still being written, and --graph-bytes allows no more"
                self.tell(f"replay {graph.replays} of graph {graph.number} is not written: {why}", "replay")
                continue
            host = call.spare.pop()
            event = torch.cuda.Event()
            with graph.sending():
                call.fill(host)
                event.record()
            with self._gate:
                self._unwritten += 1
            # with the call, whose memory must last until it is sent
            self._queue.put((event, call, host, host.meta | {"graph": graph.number, "replay": graph.replays}))

    def _write_all(self) -> None:
        while True:
            event, call, host, meta = self._queue.get()
            while not self._over(event):
                time.sleep(0.002)
            del call
            try:
                recorded = _recorded(host, meta)
                host.spare.append(host)
                self.write(recorded)
            except Exception as error:  # the next one may be smaller
                self.tell(f"not recorded: {one_line(error, 200)}", "")
            finally:
                with self._gate:
                    self._unwritten -= 1

    def _over(self, event: torch.cuda.Event) -> bool:
        with self._gate:
            return not self._captures and event.query()


def _recorded(call: GraphCall, meta: Meta) -> taken.Recorded:
    """A replay; pools have one slot for each index that is no padding."""
    inputs, outputs = copies(call.inputs), copies(call.outputs)
    steps.joined(inputs)
    mark_padding(inputs, call.null_slot)
    slots_of = {
        "state_indices": ("state", "final_state", "conv_states", "state_scales"),
        "token_state_indices": ("token_states",),
    }
    for name, pools in slots_of.items():
        if (indices := inputs.get(name)) is None:
            continue
        used = indices.flatten() >= 0
        if name == "state_indices":
            meta["slots"] = indices.flatten()[used].tolist()
        inputs[name] = torch.where(indices < 0, -1, (used.cumsum(0) - 1).view(indices.shape)).to(indices.dtype)
        for kept in (inputs, outputs):
            kept |= {pool: kept[pool][used] for pool in pools if pool in kept}
    return taken.Recorded(inputs, outputs, call.call.options, meta)
