"""What ranks tell each other: once per batch what they are about to do, and once per layer their summaries."""

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kda_kernels.errors import InputError, UnavailableError, one_line
from kda_kernels.ranges import stage

SAID_BYTES = 4096  # of what a rank says of its call, as JSON
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 calls it by another name


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the tensors of a group's collectives lie: on this rank's GPU with NCCL, else on the CPU."""
    on_gpu = "nccl" in str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def agree(group: dist.ProcessGroup | None, said: dict[str, Any], same: Sequence[str], timeout: float) -> list[dict]:
    """What every rank says, in order of ranks; the host waits for it.

    Args:
        said: plain values. An "error" of any rank is raised on all of them.
        same: the names of those that must not differ between ranks.
        timeout: seconds that the others have to say theirs.

    Raises:
        InputError: ranks disagree, or one says "error"; the same message on every rank.
        UnavailableError: a rank ended, or did not answer in time.
    """
    text = json.dumps(said).encode()
    if len(text) > SAID_BYTES:
        text = json.dumps({"error": one_line(said.get("error", f"{len(text)} bytes to say"), 500)}).encode()
    device = device_of(group)
    mine = torch.frombuffer(bytearray(text.ljust(SAID_BYTES)), dtype=torch.uint8).to(device)
    everyone = torch.empty(dist.get_world_size(group) * SAID_BYTES, dtype=torch.uint8, device=device)
    wait(start_gather(everyone, mine, group), timeout)
    rows = [json.loads(bytes(row.tolist())) for row in everyone.cpu().view(-1, SAID_BYTES)]
    for rank, row in enumerate(rows):
        if "error" in row:
            raise InputError(f"context parallel: rank {rank} refuses its call: {row['error']}")
    for name in same:
        for rank, row in enumerate(rows):
            if row.get(name) != rows[0].get(name):
                found = f"is {row.get(name)} on rank {rank} and {rows[0].get(name)} on rank 0"
                raise InputError(name, found, "context parallel: it should be the same on all ranks")
    return rows


def start_gather(everyone: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Begins to gather `mine` of every rank, one behind the other, in `everyone`; both contiguous. Raises
    `UnavailableError`."""
    return _started(_gather, everyone.view(-1), mine.view(-1), group=group, async_op=True)


def start_send(state: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> dist.Work:
    """Begins to send a contiguous tensor to a rank of the group. Raises `UnavailableError`."""
    return _started(dist.isend, state, group=group, group_dst=rank)


def start_receive(state: torch.Tensor, rank: int, group: dist.ProcessGroup | None) -> dist.Work:
    """Begins to fill a contiguous tensor with what a rank of the group sends. Raises `UnavailableError`."""
    return _started(dist.irecv, state, group=group, group_src=rank)


def _started(begin: Callable[..., Any], *tensors: torch.Tensor, **how: Any) -> dist.Work:
    try:
        with stage("exchange"):
            return begin(*tensors, **how)
    except RuntimeError as error:
        raise _gone(error, None) from error


def wait(work: dist.Work, timeout: float | None = None) -> None:
    """Until it is done: the host for so many seconds; or, without a timeout and with NCCL, the current stream only.

    Raises:
        UnavailableError: it failed, as when another rank ended, or it took longer.
    """
    try:
        if timeout is None:
            work.wait()
        else:
            work.wait(timeout=datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        raise _gone(error, timeout) from error


def _gone(error: RuntimeError, timeout: float | None) -> UnavailableError:
    waited = "" if timeout is None else f" or did not answer within {timeout:g} s"
    return UnavailableError(f"context parallel: another rank failed{waited} ({one_line(str(error), 160)})")
