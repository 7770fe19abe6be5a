"""Processes beside this one, forked from a server that has imported torch and nothing else: a start takes milliseconds
where an import of torch takes two seconds. No GPU is touched before the fork.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the first is not there on Windows
    from multiprocessing.context import ForkServerContext, SpawnContext


def context() -> "ForkServerContext | SpawnContext":
    """What makes the processes; where nothing can be forked, each imports torch itself."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch"])
    return found


class Start(NamedTuple):
    """What a process begins with. The server has the environment of its own start, and modules read it when they are
    imported: so the function is found once the environment is that of now.
    """

    environment: dict[str, str]
    function: bytes

    @classmethod
    def of(cls, function: Callable[..., None], *args: Any) -> "Start":
        """`function(*args, ...)`, to be called in the process."""
        return cls(dict(os.environ), pickle.dumps((function, args)))


def begin(start: Start, *args: Any) -> None:
    """Calls what `start` holds, with `args` behind its own."""
    os.environ.clear()
    os.environ.update(start.environment)
    function, first = pickle.loads(start.function)
    function(*first, *args)
