"""Which kernels and cases a run of `kda verify` is about, and what is left out and why."""

from collections.abc import Sequence

from kda_kernels import registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.verify.cases import CASES, Case, cases_for


def select_kernels(names: Sequence[str] = (), op: Op | None = None) -> tuple[list[Kernel], list[tuple[str, str]]]:
    """The kernels named, or all of ours that can run anything here; and the others, each with the reason.

    Args:
        names: peers are checked only when they are named.
        op: only kernels of this op.

    Raises:
        InputError: a name is unknown, or of another op.
        UnavailableError: a kernel that was named, or every kernel there is, cannot run here.
    """
    if names:
        chosen = [registry.get(name) for name in dict.fromkeys(names)]
        for kernel in chosen:
            if op is not None and kernel.op is not op:
                raise InputError(f"{kernel.name} is given with --op {op}: it serves {kernel.op}; leave one out")
            if (reason := kernel.unsupported()) is not None:
                raise UnavailableError(f"{kernel.name} cannot run here: {reason}")
        return chosen, []
    chosen, others = [], []
    for kernel in registry.kernels(op):
        reason = kernel.unsupported()
        if reason is None and not kernel.ours:
            reason = f"a peer: --kernel {kernel.name} checks it"
        if reason is None:
            chosen.append(kernel)
        else:
            others.append((kernel.name, reason))
    if not chosen:
        raise UnavailableError("no kernel can run here: " + "; ".join(f"{name}: {reason}" for name, reason in others))
    return chosen, others


def select_cases(names: Sequence[str], kernels: Sequence[Kernel], device: str) -> list[Case]:
    """The cases named, or those of the table that suit `device`, of the ops of `kernels`.

    Raises:
        InputError: a name is unknown, or of an op that none of `kernels` serves.
    """
    if not names:
        served = {kernel.op for kernel in kernels}
        return [case for case in cases_for(device) if case.problem.op in served]
    table = {case.name: case for case in CASES}
    for name in names:
        if name not in table:
            raise InputError(f"case {name} is unknown: kda verify --list shows them")
        if table[name].problem.op not in {kernel.op for kernel in kernels}:
            raise InputError(f"case {name} is of the op {table[name].problem.op}: no kernel chosen serves it")
    return [table[name] for name in dict.fromkeys(names)]
