"""Warps, CTAs and launches."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from ptx import copies, matrices  # noqa: F401  their instructions
from ptx.asynchronous import Barrier, Groups, Mbarrier, TensorMap
from ptx.errors import DeadlockError, PtxError
from ptx.instructions import prepare
from ptx.memory import ALL, ONES, PARAMETER_BYTES, PARAMETERS, GlobalMemory, Space
from ptx.parsing import Statement, parse

SHARED_BYTES = 232448  # of an H100's CTA
_PATIENCE = 4000  # turns in which no warp goes on, and nothing else happens, of a deadlock
_TURNS = (1, 3, 20, 100, 400)  # instructions that a warp runs before the next has its turn
_CHANGES, _ASLEEP = 0.02, (0, 1, 1, 3, 8)  # how often other warps get no turn, and how many; unless none else can go on
_CONTROL = ("bra", "ret")


class Kernel:
    """The one kernel of a PTX text. Attributes: parameter_bytes: of each parameter.

    Raises:
        NotImplementedError: it has an instruction that the simulator lacks; the message names it.
    """

    def __init__(self, text: str):
        self.code, self.parameter_bytes = parse(text)
        self.run: list[Callable | None] = [
            None if one.opcode.split(".")[0] in _CONTROL else prepare(one) for one in self.code
        ]

    def launch(
        self,
        memory: GlobalMemory,
        parameters: Sequence[bytes | TensorMap],
        *,
        ctas: int,
        threads: int,
        seed: int = 0,
        late: float = 0.5,
    ) -> None:
        """Runs CTAs one after another.

        Args:
            parameters: the bytes of each, or the tensor map that it is. Those that are not given are zeros.
            seed: of the order in which warps take turns.
            late: 0 to 1: how long asynchronous work takes, up to when somebody waits for it.

        Raises:
            DeadlockError, PtxError: see these.
        """
        space = np.zeros(PARAMETER_BYTES * len(self.parameter_bytes), np.uint8)
        maps = {}
        for n, parameter in enumerate(parameters):
            if isinstance(parameter, TensorMap):
                maps[n] = parameter
                continue
            if len(parameter) != self.parameter_bytes[n]:
                raise ValueError(f"parameter {n} has {self.parameter_bytes[n]} bytes, not {len(parameter)}")
            space[n * PARAMETER_BYTES :][: len(parameter)] = np.frombuffer(parameter, np.uint8)
        spaces = {"param": Space(space, PARAMETERS), "global": memory.space}
        for index in range(ctas):
            order = random.Random(1000 * seed + index)
            Cta(self, spaces, maps, index, ctas, threads // 32, order, late).finish()


class Warp:
    """Attributes: registers: by name. lanes: those that run now. products, stores: what it has issued.

    waits_for: the round of a named barrier at which it has arrived. groups: lanes by the instruction that they are at.
    """

    def __init__(self, cta: "Cta", index: int):
        self.cta, self.index = cta, index
        self.registers: dict[str, np.ndarray] = {}
        self.groups: dict[int, np.ndarray] = {0: ALL}
        self.lanes = ALL
        self.products, self.stores = Groups(), Groups()
        self.waits_for: int | None = None

    def step(self) -> bool:
        """Runs one instruction of the lanes that are furthest behind; False if they have to wait."""
        at = min(self.groups)
        here, statement, run = self.groups[at], self.cta.kernel.code[at], self.cta.kernel.run[at]
        self.lanes = here if statement.guard is None else here & self._guarded(statement)
        if run is not None and self.lanes.any() and run(self) is False:
            return False
        del self.groups[at]
        if run is not None:
            self._go(at + 1, here)
        else:
            if statement.target is not None:
                self._go(statement.target, self.lanes)
            self._go(at + 1, here & ~self.lanes)
        if not self.groups:
            self.stores.finish()
        return True

    def _guarded(self, statement: Statement) -> np.ndarray:
        guard = self.registers[statement.guard]
        return ~guard if statement.negated else guard

    def _go(self, to: int, lanes: np.ndarray) -> None:
        if lanes is not ALL:
            if not lanes.any():
                return
            lanes = lanes | self.groups[to] if to in self.groups else lanes
        self.groups[to] = ALL if lanes.all() else lanes

    def write(self, name: str, values: np.ndarray) -> None:
        """In the lanes that run."""
        if self.lanes is not ALL:
            before = self.registers.get(name)
            values = np.where(self.lanes, values, np.zeros_like(values) if before is None else before)
        self.registers[name] = values

    def active(self) -> np.ndarray:
        """Indices of the lanes that run."""
        return np.flatnonzero(self.lanes)

    def same(self, values: np.ndarray) -> int:
        """The one value that all lanes that run have."""
        first, *others = set(values[self.lanes].tolist())
        if others:
            raise PtxError("lanes of a warp wait for different barriers")
        return first

    def must_be_whole(self, statement: Statement) -> None:
        if self.lanes is not ALL:
            raise PtxError(f"not all lanes of warp {self.index} are at `{statement}`")


class Cta:
    """One CTA, its shared memory full of NaN. Attributes: loads: those under way. maps: tensor maps by parameter."""

    def __init__(
        self, kernel: Kernel, spaces, maps, index: int, of: int, warps: int, order: random.Random, late: float
    ):
        self.kernel, self.maps, self.index, self.of = kernel, maps, index, of
        self.spaces = spaces | {"shared": Space(np.full(SHARED_BYTES, ONES, np.uint8))}
        self.barriers: dict[int, Barrier] = defaultdict(Barrier)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.loads: list[Callable[[], None]] = []
        self.warps = [Warp(self, n) for n in range(warps)]
        self._order, self._late = order, late

    def mbarrier(self, address: int) -> Mbarrier:
        if address not in self.mbarriers:
            raise PtxError(f"no mbarrier was initialised at {address}")
        return self.mbarriers[address]

    def finish(self) -> None:
        """Runs until all warps are at their ends."""
        stuck, asleep = 0, []
        with np.errstate(all="ignore"):
            while running := [warp for warp in self.warps if warp.groups]:
                if self._order.random() < _CHANGES:
                    asleep = self._order.sample(self.warps, self._order.choice(_ASLEEP))
                awake = [warp for warp in running if warp not in asleep] if stuck < _PATIENCE // 20 else running
                warp, turn = self._order.choice(awake or running), self._order.choice(_TURNS)
                moved = warp.step()
                for _ in range(turn - 1):
                    if not (moved and warp.groups and warp.step()):
                        break
                stuck = 0 if moved else stuck + 1
                self._work(stuck > 40)
                if stuck > _PATIENCE:
                    raise DeadlockError(self._where(running))
            if self.loads:
                raise PtxError("a CTA ends while loads are under way")

    def _work(self, now: bool) -> None:
        """Some of what is under way; `now`: a load, if there is one."""
        chance = self._order.random
        if self.loads and (now or chance() > self._late):
            self.loads.pop(self._order.randrange(len(self.loads)))()
        for warp in self.warps:
            for groups in (warp.products, warp.stores):
                if chance() > 0.5 + 0.5 * self._late:
                    groups.progress()

    def _where(self, warps: list[Warp]) -> str:
        return "; ".join(f"warp {warp.index} waits at `{self.kernel.code[min(warp.groups)]}`" for warp in warps)
