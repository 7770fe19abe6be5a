"""What is to be captured, as plain values that travel to the program's processes in one environment variable.

Imports no torch.
"""

import dataclasses
import json
import os
from collections.abc import Mapping

from kda_kernels.errors import InputError
from kdacli.capture.sites import ENGINES, well_formed

VARIABLE = "KDA_CAPTURE"
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """One capture.

    Attributes:
        targets: engines (fla, sglang, vllm) or "module:function".
        out: the folder that the dumps go to, absolute.
        calls, skip, every: of each target's calls in one process, leave out the first `skip`, then take one in `every`,
            until `calls` are taken. With `layers`, each layer has its own count.
        ranks: those that record; None: all.
        layers: those that record; None: all.
        max_bytes: of all dumps together.
        whole_pool: write every slot of a state pool, not only those that the call uses.
        replays: of each CUDA graph, those whose calls are written, the first `calls` of each target; 1 is the first.
        graph_bytes: that copies of graphs' calls may take on a GPU, and again in pinned memory.
        names: {argument's name in the target: the name that kda gives it}, beside the table of aliases.

    Raises:
        InputError: a value that makes no sense.
    """

    targets: tuple[str, ...]
    out: str
    calls: int = 1
    skip: int = 0
    every: int = 1
    ranks: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    max_bytes: int = GIB
    whole_pool: bool = False
    replays: tuple[int, ...] = ()
    graph_bytes: int = GIB
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.targets:
            raise InputError(f"no target: it should be module:function, or {', '.join(ENGINES)}")
        for target in self.targets:
            if not well_formed(target):
                engines = ", ".join(ENGINES)
                raise InputError(f"target {target} is not module:function, as fla.ops.kda:chunk_kda, nor {engines}")
        for name, least in (("calls", 1), ("skip", 0), ("every", 1), ("max_bytes", 1), ("graph_bytes", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: it should be at least {least}")
        if any(number < 1 for number in self.replays):
            raise InputError(f"replays are {list(self.replays)}: the first is 1")

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls) -> "Settings | None":
        """What the environment says, None if it says nothing."""
        if not (text := os.environ.get(VARIABLE)):
            return None
        values = json.loads(text)
        for name in ("targets", "ranks", "layers", "replays"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)
