"""Which kernels and cases a run of `kda verify` is about, and what is left out and why."""

from collections.abc import Sequence

from kda_kernels import registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.userkernels import resolve
from kdacli.verify.adapt import adapted
from kdacli.verify.cases import spec
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.suites import cases_for
from kdacli.verify.checks.check import pairs


def get_kernel(name: str, op: Op | None = None) -> Kernel:
    """A kernel by its name in the registry, or a user's own: the one place where names become kernels here.

    Raises:
        InputError: see `kdacli.userkernels.resolve`.
    """
    return resolve(name, op)


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
        chosen = [get_kernel(name, op) for name in dict.fromkeys(names)]
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


def select_cases(names: Sequence[str], kernels: Sequence[Kernel], device: str, suite_name: str = "quick") -> list[Case]:
    """The cases named, or those of a suite that suit `device`, of the ops of `kernels`.

    Args:
        names: of cases in any suite, or with changes: see `kdacli.verify.cases.spec`.

    Raises:
        InputError: a name is unknown, or of an op that none of `kernels` serves.
    """
    served = {kernel.op for kernel in kernels}
    if not names:
        return [case for case in cases_for(device, suite_name) if case.problem.op in served]
    cases = [spec.parse(name) for name in dict.fromkeys(names)]
    for case in cases:
        if case.problem.op not in served:
            raise InputError(f"case {case.name} is of the op {case.problem.op}: no kernel chosen serves it")
    return cases


def select_table(
    names: Sequence[str], kernels: Sequence[Kernel], device: str, suite_name: str = "quick"
) -> list[tuple[Case, list[Kernel]]]:
    """The cases of `select_cases`, each with its kernels; those of a suite are fitted to what each kernel supports."""
    cases = select_cases(names, kernels, device, suite_name)
    return pairs(kernels, cases) if names else adapted(kernels, cases)
