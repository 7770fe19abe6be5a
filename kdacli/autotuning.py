"""Autotuned Triton kernels without their tuning: a configuration that somebody chose instead of the fastest.

Tuning needs a GPU to time on, so that in Triton's interpreter such a kernel could not run at all. And it hides: a check
of the configuration that was fastest today says nothing of the others, one of which another GPU, or another day, takes.
"""

import importlib.util
from typing import Any

_taken: int | None = None  # which configuration; None: kernels tune themselves


def take(number: int) -> None:
    """From now on, in this process, every autotuned kernel takes configuration `number` of its own and tunes nothing.

    Counted from 0, and round again in a kernel that has fewer, over what is left by the kernel's own pruning for the
    call. One that asks for more than the GPU has, which tuning would pass over, gives way to the next.
    """
    global _taken
    if _taken is None:
        from triton.runtime.autotuner import Autotuner

        Autotuner.run = _run
    _taken = number


def take_first() -> None:
    """`take(0)`, unless somebody chose, or there is no Triton here."""
    if _taken is None and importlib.util.find_spec("triton") is not None:
        take(0)


def _run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """What `Autotuner.run` does once a kernel is tuned."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    configs = tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs
    first = (_taken or 0) % len(configs)
    for config in (in_turn := [*configs[first:], *configs[:first]]):
        tuner.best_config = config
        if config.pre_hook is not None:
            config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
        try:
            returned = tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        except (OutOfResources, PTXASError, CompileTimeAssertionFailure):  # before anything is launched
            if config is in_turn[-1]:
                raise
        else:
            tuner.nargs = None
            return returned
