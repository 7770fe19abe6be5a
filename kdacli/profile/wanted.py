"""What the flags of `kda profile` ask for, as one object, and which of them contradict each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kda_kernels.errors import InputError
from kdacli import options
from kdacli.flags import SHAPE_FLAGS
from kdacli.profile.cases.axes import Axis


@dataclasses.dataclass(frozen=True)
class Profiler:
    """nsys or ncu, which watches the run; where its program lies and where its report goes, if that is said."""

    name: str
    path: str | None
    report: str | None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "Profiler | None":
        """Raises `InputError` for flags of a profiler that is not asked for, and for two profilers at once."""
        names = [name for name in ("nsys", "ncu") if params[name]]
        if len(names) == 2:
            raise InputError("--nsys is given with --ncu: one profiler at a time")
        for name in ("nsys", "ncu"):
            if params[f"{name}_path"] and name not in names:
                raise InputError(f"--{name}-path is for --{name}, which is not given")
        if params["tool_output"] and not names:
            raise InputError("--output is for --nsys or --ncu, and neither is given")
        return cls(names[0], params[f"{names[0]}_path"], params["tool_output"]) if names else None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be timed, how, and where the figures go.

    Attributes:
        kernels: as typed; empty: ours, and with `peers` the installed ones of others.
        suite: its name. sweep: its axes, if any. layer: the model whose layers are to be added up.
        regimes: of the gates; empty: the usual ones.
        shape: the flags of a problem and `op`, `dump` and `call`, as `kdacli.options` takes them; `gates` is the first
            of the regimes.
        seconds: to sample a kernel. cold: empty the L2 cache before each sample. graph: time a CUDA graph.
        stages: list the CUDA kernels of each call.
        bump: the percentage that a sweep's point may lie over its neighbours' line.
        baseline: the recording to compare with. source: the one to show instead of timing.
        plot, trace, json: files to write, or "-" for JSON on stdout. force: overwrite them.
        profiler: what watches the run, which then times nothing.
    """

    kernels: tuple[str, ...]
    peers: bool
    suite: str | None
    sweep: tuple[Axis, ...]
    layer: str | None
    regimes: tuple[str, ...]
    shape: Mapping[str, Any]
    seconds: float
    cold: bool
    graph: bool
    stages: bool
    bump: float | None
    baseline: str | None
    source: str | None
    plot: str | None
    trace: str | None
    json: str | None
    force: bool
    profiler: Profiler | None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "Wanted":
        """From the command's parameters. Raises `InputError` for flags that contradict each other."""
        regimes = tuple(dict.fromkeys(params["gates"]))
        shape = {name: params[name] for name in ("op", "dump", "call", *SHAPE_FLAGS)}
        found = cls(
            **{field.name: params[field.name] for field in dataclasses.fields(cls) if field.name in params},
            peers=not params["no_peers"],
            regimes=regimes,
            shape=shape | {"gates": regimes[0] if regimes else None},
            cold=not params["warm"],
            graph=not params["eager"],
            json=params["json_dest"],
            profiler=Profiler.of(params),
        )
        found._check()
        return found

    @property
    def op(self) -> str | None:
        return self.shape["op"]

    @property
    def dump(self) -> str | None:
        return self.shape["dump"]

    @property
    def seed(self) -> int:
        return self.shape["seed"] or 0

    def _check(self) -> None:
        there = {
            "--dump": self.dump, "--suite": self.suite, "--sweep": self.sweep, "--layer": self.layer,
            "--kernel": self.kernels, "--op": self.op, "--stages": self.stages, "--plot": self.plot,
            "--trace": self.trace, "--baseline": self.baseline, "--from": self.source, "--json": self.json,
        }  # fmt: skip
        given = [flag for flag, value in there.items() if value]

        def refuse(flags: tuple[str, ...], other: str) -> None:
            if both := [flag for flag in given if flag in flags]:
                raise InputError(f"{both[0]} is given with {other}: leave one out")

        if self.profiler:
            refuse(("--plot", "--trace", "--baseline", "--from"), f"--{self.profiler.name}, which times nothing")
        if self.source:
            not_timed = ("--kernel", "--suite", "--sweep", "--layer", "--dump", "--op", "--stages", "--trace", "--json")
            refuse(not_timed, "--from, which times nothing")
            if flags := options.given(self.shape):
                raise InputError(f"{flags[0]} is given with --from, which times nothing: leave one out")
        if self.sweep:
            refuse(("--stages", "--trace"), "--sweep, which has many shapes")
        what = [flag for flag in given if flag in ("--dump", "--suite", "--sweep", "--layer")]
        if len(what) > 1:
            raise InputError(f"{what[0]} is given with {what[1]}: leave one out")
        if self.bump is not None and not (self.sweep or self.source):
            raise InputError("--bump is for --sweep, which is not given")
