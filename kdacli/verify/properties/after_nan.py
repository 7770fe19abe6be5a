"""Nothing is left behind: a call whose numbers are all NaN does not show in the next one."""

from collections.abc import Iterator

from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import Subject, differing

REASON = "a workspace kept between calls, or read before it is written, carries one call's numbers into the next"


def check(subject: Subject) -> Iterator[str]:
    """NaN in all numbers, then the case again: the same bits as before."""
    poison = own_memory(subject.inputs)
    for name, tensor in poison.tensors().items():
        if tensor.is_floating_point():
            getattr(poison, name).fill_(float("nan"))
    subject.run(poison)
    for name in differing(subject.outputs, subject.run()):
        yield f"{name} changed after a call on inputs that were all NaN"
