"""The compiled functions of the fused prefill: which one a call takes, and those that `kda compile` builds ahead."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels.checks import CAUSAL
from kda_kernels.cute.cache import CACHE
from kda_kernels.cute.prefill.config import JOIN_WARPS, THREADS, Part, PrefillSpec
from kda_kernels.cute.prefill.plan import plan
from kda_kernels.cute.runtime import architecture
from kda_kernels.cute.runtime import unsupported_here as no_cute_here
from kda_kernels.cute.variant import CuteVariant, named, pretended
from kda_kernels.dtypes import torch_dtype
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.tensors import Inputs
from kda_kernels.variant import H100, Gpu, Variant

ARCH = "sm_90a"  # wgmma is no other's
STAY_UP_TO = {True: 512, False: 256}  # tokens of a sequence, in the mean, by whether gates are bounded; see `stays`


def function_of(part: Part, inputs: Inputs, ht: torch.Tensor | None = None) -> Callable[..., Any]:
    """The compiled function for these tensors. Raises `UnavailableError`."""
    q, kind = inputs.q, kind_of(part, inputs, ht)
    if (function := CACHE.get(("prefill", q.device, kind))) is not None:
        return function
    if not q.is_cuda:
        raise UnavailableError(f"cute-prefill: {unsupported_here() or 'the tensors lie on the CPU'}")
    if (reason := unsupported_here(q.device)) is not None:
        raise UnavailableError(f"cute-prefill: {reason}")
    spec, arch = spec_of(part, inputs, ht), architecture(q.device)
    return CACHE.make(("prefill", q.device, kind), label(spec, arch), lambda: build(spec, arch))


def spec_of(part: Part, inputs: Inputs, ht: torch.Tensor | None) -> PrefillSpec:
    """What the kernel has to be compiled for."""
    return PrefillSpec(*named(kind_of(part, inputs, ht)))


def kind_of(part: Part, inputs: Inputs, ht: torch.Tensor | None) -> tuple:
    """The fields of `PrefillSpec` as they can be looked up: torch's dtypes instead of their names."""
    q, options, kept = inputs.q, inputs.options, inputs.checkpoints
    comes = part is not Part.SUMMARY
    goes = (None, None, False) if kept is None else (kept.states.dtype, kept.rows.dtype, kept.every is not None)
    tensors = (
        q, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias, inputs.state if comes else None, ht,
        inputs.state_indices, inputs.cu_seqlens,
    )  # fmt: skip
    return (
        inputs.v.shape[2] // q.shape[2],
        options.gate, bounded(options, q.dtype), options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm,
        *(None if x is None else x.dtype for x in tensors),
        part, comes and inputs.has_initial_state is not None,
        *goes, inputs.batch_invariant, _sanitized(),
    )  # fmt: skip


def bounded(options: Options, dtype: torch.dtype) -> bool:
    """Whether no log decay is under the bound with which 16 tokens' decays, exp(+-80), stay inside bf16's range.

    No where bits must not depend on later tokens: decays measured from the middle of a chunk leave rounding before it.
    No for fp16, which does not hold exp(80).
    """
    bound = options.lower_bound
    if CAUSAL or dtype is not torch.bfloat16 or options.gate is Gate.SOFTPLUS or bound is None:
        return False
    return bound >= SAFE_BOUND


def _sanitized() -> bool:
    """Whether compute-sanitizer looks on; slower, and the same results."""
    return os.environ.get("KDA_SANITIZE") == "1"


def label(spec: PrefillSpec, arch: str) -> str:
    return f"prefill {arch} {spec}"


def build(spec: PrefillSpec, arch: str, options: str = "") -> Any:
    """Compiles; needs the DSL, and no GPU. See `build.compile_prefill`."""
    from kda_kernels.cute.prefill.build import compile_prefill

    return compile_prefill(spec, arch, options)


def unsupported_here(device: torch.device | None = None) -> str | None:
    """Why this machine's current GPU, or `device`, cannot run it; None if it can."""
    if (reason := no_cute_here(device)) is not None:
        return reason
    if (have := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"the GPU is sm_{have[0]}{have[1]}: this kernel is for {ARCH} only"
    return None


def cut_into(in_bf16: bool, kept: bool) -> tuple[Part, ...]:
    """The launches of sequences that are cut. In fp16 Triton's kernels join the segments."""
    launches = (Part.SPLIT, Part.JOIN) if in_bf16 else (Part.CUT,)
    return (*launches, Part.KEPT) if kept else launches


def stays(sequences: int, tokens: int, HV: int, sms: int, bounded: bool) -> bool:
    """Whether CTAs take one head of a sequence after another: there are more than multiprocessors, and they are short.

    A chunk takes longer in their loop; with long sequences that is more than what CTAs take to begin and to end.
    """
    return sequences * HV > sms and tokens <= STAY_UP_TO[bounded] * sequences


_SAFE = Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)


_POOL = Problem(Op.PREFILL, (2048,) * 8, H=32, HV=32, pool_slots=16, options=_SAFE)


_GIVEN = dataclasses.replace(_SAFE, gate=Gate.NONE)


# What `kda compile` builds where nothing is said: packed on a pool, dense with a state that comes and goes, gates that
# come activated, in fp32, those without a bound; states that leave on the way; 12 heads of one sequence, which is
# split; and many short sequences.
USUAL = {
    "safe": _POOL,
    "safe dense": dataclasses.replace(_POOL, packed=False, pool_slots=None),
    "activated": dataclasses.replace(_POOL, g_dtype="float32", options=_GIVEN),
    "softplus": dataclasses.replace(_POOL, options=Options(gate=Gate.SOFTPLUS)),
    "safe checkpoints": dataclasses.replace(_POOL, features=frozenset({"checkpoints"})),
    "safe split": dataclasses.replace(_POOL, seq_lens=(8192,), H=12, HV=12),
    "safe short": dataclasses.replace(_POOL, seq_lens=(64,) * 16),
}


def variants(problem: Problem | None = None, gpu: Gpu = H100) -> Iterator[Variant]:
    """What `kda compile` builds of CuTe's kernels: as a launch for `problem`, or those of `USUAL`, specialises them."""
    problems = USUAL if problem is None else {str(problem.options.gate): problem}
    for name, one in problems.items():
        in_turn = stays(one.N, one.T, one.HV, gpu.sms, bounded(one.options, torch_dtype(one.dtype)))
        parts: tuple[Part, ...] = (Part.STAYING if in_turn else Part.WHOLE,)
        if plan(one.N, one.T, one.HV, gpu.sms).split is not None:
            parts = cut_into(one.dtype == "bfloat16", "checkpoints" in one.features)
        yield _variant(name, problem_spec(one, parts[0]))
        for further in parts[1:]:
            yield _variant(f"{name} {further}", problem_spec(one, further))


def _variant(name: str, spec: PrefillSpec) -> CuteVariant:
    return CuteVariant(
        name,
        lambda arch, options: build(spec, arch, options),
        lambda arch: label(spec, arch),
        num_warps=sum(JOIN_WARPS) if spec.part is Part.JOIN else THREADS // 32,
        shared_bytes=None,
        only=ARCH,
    )


def k_first_options(options: Options) -> Options:
    """Of calls with K-first states, whose beta is given in place of its logit.

    FLA's tests want the same of both within 1e-4. Where beta is given, or up to 2, the inverse has two parts, else one.
    """
    if not options.beta_is_logit or options.allow_neg_eigval:
        return options
    return dataclasses.replace(options, beta_is_logit=False)


def problem_spec(problem: Problem, part: Part) -> PrefillSpec:
    if problem.features & {"rounding_seed", "state_scales"}:  # as `widened` calls it
        problem = dataclasses.replace(problem, state_dtype="float32", state_rounding="nearest")
    if not problem.state_v_first and (problem.initial_state or problem.final_state):
        options = k_first_options(problem.options)
        beta = problem.beta_dtype if options is problem.options else "float32"
        problem = dataclasses.replace(problem, options=options, beta_dtype=beta)
    inputs = pretended(problem)
    comes_out = problem.pool_slots is None and problem.final_state and part is not Part.KEPT
    return spec_of(part, inputs, inputs.new_final_state() if comes_out else None)
