"""What must hold of a kernel beside its values: one file for each property, and the table of all.

A property is a function of a `Subject` that yields what is wrong, in words, or a `Remark`, and raises
`NotApplicableError` where it cannot be checked: that is reported, and is no failure. Every case checks a few more that
cost little (see `kdacli.verify.checks`): inputs unmodified, guard zones untouched, no NaN left where nothing was
written, the same bits from a second call.
"""

import dataclasses
from collections.abc import Callable, Iterator

from kda_kernels.problem import Op, Problem
from kdacli.verify.properties import (
    after_error,
    after_nan,
    alone,
    drift,
    dtype_change,
    future,
    graph,
    k_first,
    neighbours,
    rounding,
    split,
    stray,
    streams,
    threads,
)
from kdacli.verify.properties.subject import NotApplicableError, Remark, Subject

__all__ = ["PROPERTIES", "NotApplicableError", "Property", "Remark", "Subject"]

_RECURRENT = (Op.PREFILL, Op.DECODE, Op.STEP)


@dataclasses.dataclass(frozen=True)
class Property:
    """A property.

    Attributes:
        reason: why a kernel must have it. check: see the package.
        ops: of which ops it can be asked.
        gpu_only: it is about something that only a GPU has.
        asked: problem of a case -> that of the calls it makes, where they differ in more than their sequences' lengths.
    """

    reason: str
    check: Callable[[Subject], Iterator[str]]
    ops: tuple[Op, ...] = tuple(Op)
    gpu_only: bool = False
    asked: Callable[[Problem], Problem] | None = None


PROPERTIES = {
    "neighbours": Property(neighbours.REASON, neighbours.check),
    "future": Property(future.REASON, future.check),
    "split": Property(split.REASON, split.check, _RECURRENT),
    "stray": Property(stray.REASON, stray.check, _RECURRENT),
    "alone": Property(alone.REASON, alone.check, _RECURRENT, asked=alone.asked),
    "k-first": Property(k_first.REASON, k_first.check, _RECURRENT, asked=k_first.asked),
    "rounding": Property(rounding.REASON, rounding.check, _RECURRENT, asked=rounding.asked),
    "drift": Property(drift.REASON, drift.check, (Op.DECODE,)),
    "dtype-change": Property(dtype_change.REASON, dtype_change.check, asked=dtype_change.asked),
    "after-nan": Property(after_nan.REASON, after_nan.check),
    "after-error": Property(after_error.REASON, after_error.check),
    "threads": Property(threads.REASON, threads.check),
    "streams": Property(streams.REASON, streams.check, gpu_only=True),
    "graph": Property(graph.REASON, graph.check, gpu_only=True),
}
