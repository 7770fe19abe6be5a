"""Checks side by side, in several processes."""

import collections
import concurrent.futures
import queue
from collections.abc import Iterator, Sequence

from kda_kernels.registry import Kernel
from kdacli.compile.pool import cores
from kdacli.verify.cases.case import Case
from kdacli.verify.checks.check import Result, Table
from kdacli.verify.processes.isolated import IsolatedChecker

FEW = 100  # checks that one process has done before others would have begun
MOST = 4


def usual(device: str, checks: int) -> int:
    """How many processes a run of so many checks takes: on a GPU one, since they would share its memory."""
    return 1 if device == "cuda" or checks < FEW else min(cores(), MOST)


def check(
    table: Table, kernels: Sequence[Kernel], count: int, device: str, seed: int, limit: float, config: int | None
) -> Iterator[Result]:
    """The results of all cases, in the order of `table`.

    Where it is closed before its end, or interrupted, the processes end at once, whatever they are doing.

    Args:
        table: the cases, each with its kernels. kernels: all of them.
        count: processes. device, seed, limit, config: as of `IsolatedChecker`.

    Raises:
        NoStartError: as `IsolatedChecker`.
    """
    checkers = [IsolatedChecker(device, seed, limit, config) for _ in range(min(count, len(table)))]
    free: queue.SimpleQueue[IsolatedChecker] = queue.SimpleQueue()
    for checker in checkers:
        checker.prepare(kernels)
        free.put(checker)

    def one(case: Case, served: list[Kernel]) -> list[Result]:
        checker = free.get()
        try:
            return list(checker.check_case(case, served))
        finally:
            free.put(checker)

    threads = concurrent.futures.ThreadPoolExecutor(len(checkers))
    coming = collections.deque(threads.submit(one, case, served) for case, served in table)
    try:
        while coming:
            found = coming[0].result()
            coming.popleft()
            yield from found
    except KeyboardInterrupt:
        for future in coming:  # behind the case that was waited for, others were done
            if future.done() and future.exception() is None:
                yield from future.result()
        raise
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for checker in checkers:
            checker.end()
        threads.shutdown()
        for checker in checkers:
            checker.close()
