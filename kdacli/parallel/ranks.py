"""Processes that are ranks: started by torchrun, or by this command itself on one machine."""

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import click

from kda_kernels.errors import InputError, KdaError, UnavailableError, one_line
from kdacli import output


def cp_option(what: str):
    """--cp, with or without a number of ranks."""
    return click.option(
        "--cp", type=click.IntRange(min=0), is_flag=False, flag_value=0, metavar="[RANKS]",
        help=f"{what} over ranks: those of torchrun, or so many processes that are started here.",
    )  # fmt: skip


def start(ranks: int, device: str, words: Sequence[str], shared: bool = False) -> int | None:
    """Runs this command line in so many processes of this machine, and returns the exit code of the first that failed,
    or 0; None: this is a rank.

    Args:
        shared: see `joined`.

    Raises:
        InputError: no number of ranks is known, or torchrun started another one.
        UnavailableError: fewer GPUs than ranks, which are not shared.
    """
    if "WORLD_SIZE" in os.environ:
        if ranks not in (0, int(os.environ["WORLD_SIZE"])):
            raise InputError(f"--cp is {ranks}, and torchrun started {os.environ['WORLD_SIZE']} ranks: leave one out")
        return None
    if device == "cuda":
        import torch

        have = torch.cuda.device_count()
        if ranks > have and not shared:
            raise UnavailableError(f"--cp {ranks} needs as many GPUs: there are {have}; torchrun spans machines")
        ranks = ranks or have
    if ranks < 1:
        raise InputError(
            "--cp says no number of ranks: --cp 4, or start this with torchrun --nproc-per-node 4 -m kdacli"
        )
    return _launched(ranks, words)


def _launched(ranks: int, words: Sequence[str]) -> int:
    """As `torchrun --standalone`, which would say behind what a rank says that it failed, and exit with 1 whatever it
    was. Raises `KdaError`: a rank was killed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each rank, as torchrun has it
    config = LaunchConfig(
        1, 1, ranks, run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "kdacli", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise KdaError(f"rank {rank} was killed by signal {-failure.exitcode}") from None
        return failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def is_first() -> bool:
    """Whether this is rank 0, or no rank: who looks after the files of a command."""
    return os.environ.get("RANK", "0") == "0"


def progress(rank: int, what: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """`output.progress`, which rank 0 alone shows."""
    return nullcontext(lambda label=None, steps=1: None) if rank else output.progress(what, total)


def _gpu(have: int, shared: bool) -> int:
    """This rank's, of so many; see `joined`."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= have and not shared:
        raise UnavailableError(f"rank {local} of this machine needs a GPU of its own: there are {have}")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > have:  # NCCL refuses a GPU to two ranks of one host
        os.environ["NCCL_HOSTID"] = f"rank {os.environ['RANK']}"
    return local % have


@contextmanager
def joined(device: str, shared: bool = False) -> Iterator[tuple[int, int]]:
    """(rank, ranks) of the default process group, NCCL on GPUs and gloo on CPUs, while it is there.

    What is wrong on all ranks is said by rank 0 alone.

    Args:
        shared: where a machine has fewer GPUs than ranks, several have one.

    Raises:
        UnavailableError: ranks do not find each other, or there is no GPU for this one.
    """
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(_gpu(torch.cuda.device_count(), shared))
    else:
        torch.set_num_threads(1)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:  # torch's for peers that are missing, and for variables that are
        raise UnavailableError(f"ranks do not find each other: {one_line(str(error), 160)}") from None
    try:
        yield dist.get_rank(), dist.get_world_size()
    except KdaError as error:
        if dist.get_rank() and "context parallel: " in str(error):  # as all ranks say that compare their calls
            from kdacli.main import exit_code

            raise SystemExit(exit_code(error)) from None
        raise
    finally:
        dist.destroy_process_group()
