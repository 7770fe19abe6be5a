"""The fused prefill in CuTe DSL, for Hopper. Host half; `prefill_kernel` is the device half.

One kernel, one CTA a sequence and value head: chunk-local work and the chain over chunks meet in shared memory, and
nothing goes through a workspace. What it takes is in `CONTRACT` and `unsupported_tensors`; the rest is Triton's:
gates without a bound of -5 or more (softplus), fp16 and fp32 activations, sizes other than 128, K-first states.

Floor: q, k, v, g, beta and o moved once, 1.28 KB a token and value head: T=8192, H=96: 1.0 GB, 340 us at 3.0 TB/s.

Range: keys are multiplied by decays of up to exp(80) before products take them, and their norms divided out after
that. So |k| must stay under 3.4e38 / exp(80) = 6e3, whether L2 norms are made here or k comes normalised.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.cute.cache import CACHE
from kda_kernels.cute.prefill_config import THREADS, PrefillSpec
from kda_kernels.cute.runtime import architecture
from kda_kernels.cute.runtime import unsupported_here as no_cute_here
from kda_kernels.cute.variant import CuteVariant
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.peers.contract import Contract
from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Inputs, Outputs

ARCH = "sm_90a"  # wgmma is no other's
LEAST_BOUND = -5.0  # 16 tokens of it are exp(80): see `prefill_kernel`


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bounded(Contract):
    """A contract whose `least_bound` is also what activated gates must promise."""

    def _options(self, problem: Problem) -> Iterator[str]:
        yield from super()._options(problem)
        gate, bound = problem.options.gate, problem.options.lower_bound
        if gate is Gate.NONE and (bound is None or bound < self.least_bound):
            promised = "no bound" if bound is None else f"the bound {bound}"
            yield f"activated gates have {promised}: it takes {self.least_bound} or more"


CONTRACT = _Bounded(
    dtypes=("bfloat16",),
    g_dtypes=("bfloat16", "float32"),
    beta_dtypes=("bfloat16", "float32"),
    param_dtypes=("float32", "bfloat16"),
    square=True,
    gates=(Gate.SAFE, Gate.NONE),
    least_bound=LEAST_BOUND,
    beta_values=True,
    neg_eigval=True,
    l2norm=(True, False),
    padding=True,
    aligned=("q", "k", "v", "g", "state"),
)


def prefill(inputs: Inputs, out: torch.Tensor | None = None) -> Outputs:
    """Runs a checked problem.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first. q, k, v and g may have any strides that are
            multiples of 16 bytes, with a contiguous last dimension; nothing is copied. A pool is updated in place, and
            only in the slots of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, with strides as v; made here if not given.

    Returns:
        Outputs, with the pool itself as final_state when there is one. Products take bf16, sums and the state between
        chunks are fp32; the state is rounded to its own dtype once, after the last token.

    Raises:
        InputError: this kernel does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
    ht = _new_state(inputs) if inputs.state_indices is None and inputs.output_final_state else None
    launch(inputs, o, ht)
    final = ht if inputs.state_indices is None else inputs.state
    return Outputs(o, final if inputs.output_final_state else None)


def launch(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None = None) -> None:
    """`prefill` into tensors that are there already: `o`, and `ht` where there is no pool. Allocates nothing."""
    if (reason := unsupported_tensors(inputs, o)) is not None:
        raise InputError(f"cute-prefill: {reason}")
    q, options, state = inputs.q, inputs.options, inputs.state
    if not q.shape[0] * q.shape[1]:  # no token in the whole batch
        if ht is not None:
            ht.zero_() if state is None else ht.copy_(state)
        return
    function = _function(inputs, ht)
    arguments = (
        q, inputs.k, inputs.v, inputs.g, inputs.beta, _flat(inputs.A_log), _flat(inputs.dt_bias), o, state, ht,
        inputs.state_indices, inputs.cu_seqlens, q.shape[3] ** -0.5 if options.scale is None else options.scale,
        options.lower_bound or 0.0,
    )  # fmt: skip
    with stage("prefill"):
        try:
            function(*arguments)
        except (TypeError, ValueError) as error:  # nothing was launched
            raise InputError(f"cute-prefill: {' '.join(str(error).split())}") from None


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.view(-1)


def _new_state(inputs: Inputs) -> torch.Tensor:
    q, v = inputs.q, inputs.v
    N = q.shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    return torch.empty((N, v.shape[2], v.shape[3], q.shape[3]), dtype=dtype, device=q.device)


def _function(inputs: Inputs, ht: torch.Tensor | None) -> Callable[..., Any]:
    """The compiled function for these tensors."""
    q, options = inputs.q, inputs.options
    parts = (
        q, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias, inputs.state, ht, inputs.state_indices,
        inputs.cu_seqlens,
    )  # fmt: skip
    dtypes = tuple(None if x is None else x.dtype for x in parts)
    flags = options.gate, options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm
    key = ("prefill", flags, q.shape[2], inputs.v.shape[2], q.device, dtypes)
    if (function := CACHE.get(key)) is not None:
        return function
    if not q.is_cuda:
        raise UnavailableError(f"cute-prefill: {unsupported_here() or 'the tensors lie on the CPU'}")
    if (reason := unsupported_here(q.device)) is not None:
        raise UnavailableError(f"cute-prefill: {reason}")
    spec, arch = spec_of(inputs, ht), architecture(q.device)
    return CACHE.make(key, label(spec, arch), lambda: build(spec, arch))


def spec_of(inputs: Inputs, ht: torch.Tensor | None) -> PrefillSpec:
    """What the kernel has to be compiled for."""

    def name(x: torch.Tensor | None) -> str | None:
        return None if x is None else _name(x.dtype)

    options = inputs.options
    return PrefillSpec(
        H=inputs.q.shape[2], HV=inputs.v.shape[2], gate=options.gate, beta_is_logit=options.beta_is_logit,
        allow_neg_eigval=options.allow_neg_eigval, qk_l2norm=options.qk_l2norm, dtype=name(inputs.q),
        g=name(inputs.g), beta=name(inputs.beta), A_log=name(inputs.A_log), dt_bias=name(inputs.dt_bias),
        h0=name(inputs.state), ht=name(ht), index=name(inputs.state_indices), offsets=name(inputs.cu_seqlens),
    )  # fmt: skip


def label(spec: PrefillSpec, arch: str) -> str:
    return f"prefill {arch} {spec}"


def build(spec: PrefillSpec, arch: str, options: str = "") -> Any:
    """Compiles; needs the DSL, and no GPU. See `prefill_build.compile_prefill`."""
    from kda_kernels.cute.prefill_build import compile_prefill

    return compile_prefill(spec, arch, options)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and (reason := CONTRACT.refusal(problem)) is not None:
        return reason
    return unsupported_here()


def unsupported_here(device: torch.device | None = None) -> str | None:
    """Why this machine's current GPU, or `device`, cannot run it; None if it can."""
    if (reason := no_cute_here(device)) is not None:
        return reason
    if (have := torch.cuda.get_device_capability(device)) != (9, 0):
        return f"the GPU is sm_{have[0]}{have[1]}: this kernel is for {ARCH} only"
    return None


def unsupported_tensors(inputs: Inputs, out: torch.Tensor | None = None) -> str | None:
    """Why this kernel cannot run these checked tensors, on whatever machine; None if it can."""
    q, v, state = inputs.q, inputs.v, inputs.state
    has_state = state is not None or inputs.output_final_state
    reason = _unsupported_kind(
        inputs.options, q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.dtype, inputs.g.dtype, inputs.beta.dtype,
        tuple(x.dtype for x in (inputs.A_log, inputs.dt_bias) if x is not None),
        torch.float32 if state is None else state.dtype, has_state, inputs.state_v_first,
    )  # fmt: skip
    if reason is not None:
        return reason
    for name, x in (("q", q), ("k", inputs.k), ("v", v), ("g", inputs.g), ("out", out)):
        if x is not None and not _by_tma(x):
            return (
                f"{name} has strides {list(x.stride())} and begins {x.data_ptr() % 16} bytes behind a multiple of 16: "
                "all but the last stride should be multiples of 16 bytes, as the beginning, and none 0"
            )
    if state is not None and (state.data_ptr() % 16 or state.stride(0) * state.element_size() % 16):
        return "a slot of the state is not 16-byte aligned"
    return None


@functools.lru_cache(maxsize=256)
def _unsupported_kind(
    options: Options,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    g: torch.dtype,
    beta: torch.dtype,
    params: tuple[torch.dtype, ...],
    state: torch.dtype,
    has_state: bool,
    v_first: bool,
) -> str | None:
    """What `CONTRACT` says of such tensors."""
    for param in params or (torch.float32,):
        problem = Problem(
            Op.PREFILL, (1,), H=H, HV=HV, K=K, V=V, dtype=_name(dtype), g_dtype=_name(g), beta_dtype=_name(beta),
            param_dtype=_name(param), state_dtype=_name(state), initial_state=has_state, final_state=has_state,
            state_v_first=v_first, options=options,
        )  # fmt: skip
        if (reason := CONTRACT.refusal(problem)) is not None:
            return reason
    return None


def _by_tma(x: torch.Tensor) -> bool:
    """Whether tiles of it can be moved by TMA, and rows of it 16 bytes at a time."""
    step = 16 // x.element_size()
    b, t, h, _ = x.stride()
    return not (b % step or t % step or h % step or x.data_ptr() % 16) and b * t * h != 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place.

    With KDA_CHECK_VALUES=1 in the environment what cu_seqlens and state_indices hold is checked, too.
    """
    check_inputs(inputs)
    return prefill(inputs)


def variants(problem: Problem | None = None) -> Iterator[CuteVariant]:
    """What `kda compile` builds: the kernel for `problem` as a launch specialises it.

    Without one: bf16, 32 heads; packed on a pool in place, dense with a state that comes and goes, and gates that come
    activated, in fp32.
    """
    if problem is not None:
        yield _variant(str(problem.options.gate), problem)
        return
    safe = Options(gate=Gate.SAFE, lower_bound=LEAST_BOUND)
    usual = Problem(Op.PREFILL, (2048,) * 4, H=32, HV=32, pool_slots=8, options=safe)
    yield _variant("safe", usual)
    yield _variant("safe dense", dataclasses.replace(usual, packed=False, pool_slots=None))
    given = dataclasses.replace(safe, gate=Gate.NONE)
    yield _variant("activated", dataclasses.replace(usual, g_dtype="float32", options=given))


def _variant(name: str, problem: Problem) -> CuteVariant:
    spec = _problem_spec(problem)
    return CuteVariant(
        name,
        lambda arch, options: build(spec, arch, options),
        lambda arch: label(spec, arch),
        num_warps=THREADS // 32,
        shared_bytes=None,
        only=ARCH,
    )


def _problem_spec(problem: Problem) -> PrefillSpec:
    """As `spec_of`, from a problem alone: int32 indices, parameters of one dtype."""
    options = problem.options
    params = None if options.gate is Gate.NONE else problem.param_dtype
    pooled = problem.pool_slots is not None
    state = problem.state_dtype if pooled or problem.initial_state else None
    return PrefillSpec(
        H=problem.H, HV=problem.HV, gate=options.gate, beta_is_logit=options.beta_is_logit,
        allow_neg_eigval=options.allow_neg_eigval, qk_l2norm=options.qk_l2norm, dtype=problem.dtype,
        g=problem.g_dtype, beta=problem.beta_dtype, A_log=params, dt_bias=params, h0=state,
        ht=None if pooled or not problem.final_state else state or "float32", index="int32" if pooled else None,
        offsets="int32" if problem.packed else None,
    )  # fmt: skip
