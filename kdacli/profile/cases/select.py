"""Which kernels a case is timed with, and why the others are not."""

from collections.abc import Iterable, Sequence

from kda_kernels import registry
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel
from kdacli.profile.cases.suites import TimedCase
from kdacli.userkernels import resolve


def is_peer(kernel: Kernel) -> bool:
    """Whether it is somebody else's published kernel: neither ours nor a file of the user's."""
    return not kernel.ours and kernel.backend != "user"


def candidates(ops: Iterable[Op], names: Sequence[str] = (), peers: bool = True) -> list[Kernel]:
    """The kernels asked for; by default ours and the peers of the ops, plain torch only by name: it is no competitor.

    Args:
        ops: of the cases.
        names: as the user typed them: of the registry, or a function of his own (see `kdacli.userkernels`).
        peers: whether the defaults have them.

    Raises:
        InputError: a name is unknown, or serves another op.
    """
    ops = list(dict.fromkeys(ops))
    if names:
        op = ops[0] if len(ops) == 1 else None
        return [resolve(name, op=op if ":" in name else None) for name in dict.fromkeys(names)]
    return [k for op in ops for k in registry.kernels(op) if k.backend != "torch" and (k.ours or peers)]


def split(kernels: Sequence[Kernel], problem: Problem) -> tuple[list[Kernel], dict[str, str]]:
    """Those that can run `problem` here, and the reason of each one that cannot."""
    reasons = {kernel.name: kernel.unsupported(problem) for kernel in kernels}
    return [k for k in kernels if reasons[k.name] is None], {n: why for n, why in reasons.items() if why is not None}


def require_runnable(cases: Sequence[TimedCase], kernels: Sequence[Kernel]) -> None:
    """Raises `UnavailableError` with the reasons where no kernel can run any of the cases."""
    reasons: dict[str, str] = {}
    for case in cases:
        runnable, why = split(kernels, case.problem)
        if runnable:
            return
        reasons |= why
    raise UnavailableError("no kernel can run here: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
