"""After a failure the next call is clean: one that is refused leaves nothing behind."""

import dataclasses
from collections.abc import Iterator

from kdacli.verify.checks.memory import modified, own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject, differing

REASON = "a server goes on after a bad request: a call that raised must leave no lock, no state and no half-made cache"


def check(subject: Subject) -> Iterator[str]:
    """beta as int64, which no kernel takes (and which, unnoticed, is read within bounds); then the case again."""
    bad = dataclasses.replace(subject.inputs, beta=subject.inputs.beta.nan_to_num().long())
    copy = own_memory(bad)
    try:
        subject.kernel.run(copy)
    except Exception:
        touched = [name for name in modified(bad, copy) if name != "state"]
        before, after = bad.state, copy.state
        if before is not None and after is not None and not after.nan_to_num().equal(before.nan_to_num()):
            touched.append("state")
        for name in touched:
            yield f"{name} was modified by a call that raised"
    else:
        raise NotApplicableError("an integer beta, which should be refused, was taken")
    for name in differing(subject.outputs, subject.run()):
        yield f"{name} changed after a call that raised"
