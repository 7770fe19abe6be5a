"""What a kernel's host half would launch: every Triton launch of one call, without a GPU, as a variant to compile.

The call runs for real, on tensors of zeros that say they are on a GPU (`pretend`), up to each launch. There Triton's
own binder has made the specialisation that it would compile or look up; it is written down, and nothing is launched.
So the variant is that of a launch by construction, cache key and all. An autotuned kernel gives one for each
configuration that its pruning leaves: which one would win only a GPU can tell.
"""

import contextlib
import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kda_kernels.errors import InputError, KdaError, UnavailableError, one_line
from kda_kernels.problem import Gate, Problem
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Checkpoints, Inputs
from kda_kernels.variant import step_arguments, stored_arguments
from kdacli.compile import pretend
from kdacli.compile.arch import Arch
from kdacli.compile.specialised import Specialised

HINT = "; a kernel that is not Triton's needs an attribute `variants` of the function, see kda_kernels/variant.py"


@dataclasses.dataclass(frozen=True)
class CuteFunction:
    """A function that a launch asks the cache of CuTe's for.

    Attributes:
        name: what the cache knows it by. make: asks for it, as the launch would.
    """

    name: str
    make: Callable[[], Any]

    def missing(self, arch: str) -> str | None:
        """See `kda_kernels.variant`. arch: that of the GPU on which it was asked for."""
        from kda_kernels.cute import cache

        return self.name if cache.lacks(self.name) else None

    def build(self, arch: str) -> None:
        """Into the cache; once, however many processes do."""
        self.make()


def unchanged(inputs: Inputs) -> Inputs:
    return inputs


def record(
    kernel: Kernel,
    problems: Mapping[str, Problem],
    arch: Arch,
    change: Callable[[Inputs], Inputs] = unchanged,
) -> list[Specialised]:
    """The Triton launches of `kernel` on a GPU of that architecture; equal ones once.

    Args:
        problems: what it is called on, by what the names of its launches end in.
        change: what is done to the contiguous tensors first: other strides, say.

    Raises:
        InputError: the kernel refuses the problem, or raises before it is through.
        UnavailableError: a package that it needs is missing.
    """
    found: dict[str, Specialised] = {}
    for label, problem in problems.items():
        with pretend.gpu(arch), caught(found, label):
            _call(kernel, problem, change, bool(found))
    return list(found.values())


def _call(kernel: Kernel, problem: Problem, change: Callable[[Inputs], Inputs], found: bool) -> None:
    """Runs it, for errors that say what became of that. `found`: it launched something before."""
    if reason := kernel.unsupported(problem):
        missing = kernel.unsupported() == reason
        raise (UnavailableError if missing else InputError)(f"kernel {kernel.name} cannot run this: {reason}")
    try:
        kernel.run(change(blank(problem)))
    except KdaError:
        raise
    except ImportError as error:
        raise UnavailableError(f"kernel {kernel.name}: {one_line(str(error))}") from error
    except Exception as error:  # anything that the user's code raises
        said = one_line(str(error), 200)
        raise InputError(
            f"kernel {kernel.name} raised {type(error).__name__} on tensors of zeros, so that its launches could "
            f"not be recorded: {said}{'' if found else HINT}"
        ) from error


def blank(problem: Problem) -> Inputs:
    """Contiguous zeros of the problem's shapes; only cu_seqlens and state_indices hold what they should."""

    def zeros(*shape: int, dtype: str) -> torch.Tensor:
        kind, size = getattr(torch, dtype), math.prod(shape)
        memory = mmap.mmap(-1, max(1, size * kind.itemsize))  # of a pool of gigabytes only what is touched is there
        return torch.frombuffer(memory, dtype=torch.uint8)[: size * kind.itemsize].view(kind).view(shape)

    longest = max(problem.seq_lens, default=0)
    B, T = (1, problem.T) if problem.packed else (problem.N, longest)
    H, HV, K, V, dtype = problem.H, problem.HV, problem.K, problem.V, problem.dtype
    raw, pool = problem.options.gate is not Gate.NONE, problem.pool_slots
    rows = (V, K) if problem.state_v_first else (K, V)
    slots = problem.N if pool is None else pool
    ends = torch.tensor([0, *problem.seq_lens]).cumsum(0).to(torch.int32)
    has = problem.features
    slot_table: torch.Tensor | None
    if "num_accepted_tokens" in has:
        slot_table = torch.full((problem.N, max(2, longest)), -1, dtype=torch.int32)
    else:
        slot_table = None if pool is None else _slots(problem)
    nowhere = torch.full((problem.N,), -1, dtype=torch.int32)
    kept = zeros(1, HV, *rows, dtype="float32")
    inputs = Inputs(
        q=zeros(B, T, H, K, dtype=dtype),
        k=zeros(B, T, H, K, dtype=dtype),
        v=zeros(B, T, HV, V, dtype=dtype),
        g=zeros(B, T, HV, K, dtype=problem.g_dtype),
        beta=zeros(B, T, HV, dtype=problem.beta_dtype),
        options=problem.options,
        A_log=zeros(HV, dtype=problem.param_dtype) if raw else None,
        dt_bias=zeros(HV, K, dtype=problem.param_dtype) if raw else None,
        state=zeros(slots, HV, *rows, dtype=problem.state_dtype) if problem.initial_state or pool is not None else None,
        state_indices=slot_table,
        cu_seqlens=ends if problem.packed else None,
        state_v_first=problem.state_v_first,
        output_final_state=problem.final_state,
        has_initial_state=torch.ones(problem.N, dtype=torch.bool) if "has_initial_state" in has else None,
        num_accepted_tokens=torch.ones(problem.N, dtype=torch.int32) if "num_accepted_tokens" in has else None,
        update_state="update_state" not in has,
        token_states=zeros(1, longest, HV, *rows, dtype="float32") if "token_states" in has else None,
        token_state_indices=nowhere if "token_state_indices" in has else None,
        checkpoints=Checkpoints(kept, nowhere, nowhere) if "checkpoints" in has else None,
    )
    return dataclasses.replace(inputs, **step_arguments(problem, zeros), **stored_arguments(problem, zeros))


def _slots(problem: Problem) -> torch.Tensor:
    """int32 [N], the padding rows last."""
    live = problem.N - problem.padding
    return torch.tensor([*range(live), *[-1] * problem.padding], dtype=torch.int32)


@contextlib.contextmanager
def caught(
    found: dict[str, Specialised], label: str = "", cute: dict[str, CuteFunction] | None = None
) -> Iterator[None]:
    """Triton's launches go into `found`, by what its cache knows them by, and not to a compiler; what CuTe's launches
    need goes into `cute`, if it is given.

    Args:
        label: what names in `found` end in.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    from kda_kernels.cute.cache import CompileCache

    config: list[str] = []
    make = CompileCache.make

    def note(
        fn: Any, key: Any, signature: dict, device: Any, constexprs: dict, options: Any, attrs: dict, warmup: bool
    ) -> None:
        name = " ".join(filter(None, [fn.__name__.removesuffix("_kernel"), label, *config]))
        seen = (dict(signature), dict(constexprs), dict(attrs), dict(options.__dict__))
        variant = Specialised(name, fn, *seen, tuned=bool(config))
        identity = f"{variant.source().hash()} {options.hash()}"
        if identity not in found:
            same = sum(v.name == name or v.name.startswith(f"{name} #") for v in found.values())
            found[identity] = dataclasses.replace(variant, name=f"{name} #{same + 1}") if same else variant

    def try_all(tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for choice in tuner.prune_configs(kwargs) if len(tuner.configs) > 1 else tuner.configs:
            config.append(_say(choice))
            try:
                tuner.fn.run(*args, **kwargs, **choice.all_kwargs())
            finally:
                config.pop()
        tuner.nargs = None

    def note_cute(cache: Any, key: Any, label: str, build: Callable[[], Any]) -> Callable[..., None]:
        if cute is not None:
            cute[label] = CuteFunction(label, functools.partial(make, cache, key, label, build))
        return lambda *tensors: None

    with contextlib.ExitStack() as stack:
        caught = [(JITFunction, "_do_compile", note), (Autotuner, "run", try_all)]
        caught += [(CompileCache, "get", lambda *key: None), (CompileCache, "make", note_cute)]
        for owner, method, replacement in caught:
            stack.enter_context(pretend.replaced(owner, method, replacement))
        yield


def _say(config: Any) -> str:
    """An autotuner's configuration: "BK=64,BV=32,warps=4,stages=2"."""
    words = [f"{name}={value}" for name, value in config.kwargs.items()]
    return ",".join([*words, f"warps={config.num_warps}", f"stages={config.num_stages}"])
