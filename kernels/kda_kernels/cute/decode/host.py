"""The fused recurrent update in CuTe DSL, for Hopper and newer. Host half; `kernel` is the device half.

Floor: the states of all sequences read and written once, 2 * N * HV * K * V elements. H=96, N=32, fp32: 403 MB, 133 us
at 3.0 TB/s.

A call looks its compiled function up by dtypes, heads and options and hands it the tensors. That function (TVM-FFI's
entry, in C) checks every dtype, shape, stride, alignment and device before it launches, so nothing is checked twice;
only when it refuses are the tensors looked at in Python, to say in our words what is wrong.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kda_kernels import ranges
from kda_kernels.boundary import check_out
from kda_kernels.checks import check_inputs, require_features, values_checked
from kda_kernels.cute.cache import CACHE
from kda_kernels.cute.decode.config import MOST_BLOCKS, DecodeConfig, DecodeSpec
from kda_kernels.cute.runtime import architecture, unsupported_here
from kda_kernels.cute.variant import CuteVariant, named, pretended
from kda_kernels.errors import InputError, KdaError, UnavailableError, one_line
from kda_kernels.problem import MAX_HEAD, SAFE_BOUND, Gate, Op, Options, Problem
from kda_kernels.tensors import Convolution, GatedNorm, Inputs, Outputs, hand_on, picker
from kda_kernels.triton.runtime import multiprocessors
from kda_kernels.variant import H100, Gpu

FEATURES = frozenset(
    ("null_slot", "has_initial_state", "num_accepted_tokens", "update_state", "token_states", "token_state_indices")
) | {"strided_indices", "tail", "conv", "norm", "rounding_seed", "state_scales"}
_NO_PARTS: tuple = (None,) * 7


@dataclasses.dataclass(frozen=True)
class _Last:
    """What the last call was like, and the functions that calls like it take.

    Attributes:
        key: see `_sizes`. narrow, sms: what `DecodeConfig.choose` looks at. scale, bound: arguments of functions.
        functions: by config. for_count: the same by the number of sequences, as far as there were such calls.
    """

    key: tuple | None = None
    narrow: bool = False
    sms: int = 1
    scale: float = 0.0
    bound: float = 0.0
    functions: dict[DecodeConfig, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    for_count: dict[int, Callable[..., Any]] = dataclasses.field(default_factory=dict)


_OF_PARTS = picker("q", "v", "state_indices", "cu_seqlens", "num_accepted_tokens", "conv", "norm")


def _sizes(inputs: Inputs) -> tuple:
    """What a compiled function cannot see of its tensors, or is not compiled for, as `_launch` compares it: options,
    whether the pool is written, one token per sequence, H, K, HV, V, device, `_parts_of`, whether states are rounded to
    nearest."""
    (_, T, H, K), (_, _, HV, V) = inputs.q.shape, inputs.v.shape
    one_token, parts = inputs.cu_seqlens is None and T == 1, _parts_of(inputs.conv, inputs.norm, HV // H)
    nearest = inputs.rounding_seed is None
    return inputs.options, inputs.update_state, one_token, H, K, HV, V, inputs.q.device, parts, nearest


def _parts_of(conv: Convolution | None, norm: GatedNorm | None, group: int) -> tuple[int, bool] | None:
    """Value heads that share a convolution or a norm, and whether the former's states have tokens first."""
    if conv is not None:
        return group, conv.tokens_first
    return None if norm is None else (1, False)


def _config(key: tuple, N: int, narrow: bool, sms: int) -> DecodeConfig:
    _, _, one_token, _, K, HV, V, _, parts, _ = key
    if parts is not None:
        return DecodeConfig.choose_clustered(N * HV, K, V, narrow, one_token, sms, parts[0])
    return DecodeConfig.choose(N * HV, K, V, narrow, one_token, sms)


_last = _Last()


def decode(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    *,
    final_state: torch.Tensor | None = None,
) -> Outputs:
    """Runs a problem: any number of tokens per sequence, though it is meant for 1 to 8.

    Args:
        inputs: see `Inputs`. Tokens may have any strides with a contiguous last dimension; nothing is copied. The
            state: V-first, each slot contiguous and 16-byte aligned. A pool is updated in place, and only in the slots
            of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, last dimension contiguous; made here if not given.
        config: tuning choices; None lets `DecodeConfig.choose` decide.
        final_state: without a pool, where the final states go, [N, HV, V, K] in fp32 or bf16; it may be `inputs.state`
            itself. None: a new tensor in the dtype of the state if `inputs.output_final_state`.

    Returns:
        Outputs. The arithmetic is fp32, and the state is rounded to its own dtype once, after the last token.

    Raises:
        InputError: a tensor is not as it should be.
    """
    require_features(inputs, FEATURES, "cute-decode")
    ht = None
    try:
        o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
        if inputs.state_indices is None:
            ht = inputs.new_final_state() if final_state is None and inputs.output_final_state else final_state
    except (AttributeError, IndexError, TypeError):  # not even tensors of four dimensions
        check_inputs(inputs)
        raise
    launch(inputs, o, ht, config)
    final = inputs.state if inputs.state_indices is not None else ht
    return Outputs(o, final if inputs.output_final_state else None)


def launch(
    inputs: Inputs,
    o: torch.Tensor,
    ht: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """`decode` into tensors that are there already: `o`, and `ht` where there is no pool. Allocates nothing."""
    global _last
    try:
        call = inputs.fields()
        if config is None and again(call, o, ht):
            return
        q, options = inputs.q, inputs.options
        if not q.shape[0] * q.shape[1] or not inputs.N:
            check_inputs(inputs)
            return hand_on(inputs, o, ht)
        sms, key, N, narrow = multiprocessors(q.device), _sizes(inputs), inputs.N, _narrow(inputs, ht)
        chosen = _config(key, N, narrow, sms) if config is None else config
        function = _function(inputs, o, ht, chosen)
        scale, bound = options.scale_for(q.shape[-1]), options.lower_bound or 0.0
        last = _Last(key, narrow, sms, scale, bound, {chosen: function}, {N: function})
        _launch(last, call, o, ht)
    except KdaError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # what these tensors lead to
        _check_all(inputs, o, ht)
        if isinstance(error, (TypeError, ValueError)):
            raise InputError(f"cute-decode: {one_line(str(error))}") from None
        raise
    if config is None and N <= MOST_BLOCKS:
        if (_last.key, _last.narrow) == (key, narrow):
            last.functions.update({**_last.functions, chosen: function})
        _last = last


def again(call: tuple, o: torch.Tensor, ht: torch.Tensor | None = None) -> bool:
    """`launch`, if this call is like the last one: as many sequences as it likes. False: it is not; nothing was done.

    Options, heads and device are compared; what is not compared the function checks itself.

    Args:
        call: the fields of `Inputs` in their order; an object of them would take a tenth of this function's time.
    """
    try:
        _launch(_last, call, o, ht)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # other dtypes, say; or wrong: see `launch`
        return False
    return True


def _narrow(inputs: Inputs, ht: torch.Tensor | None) -> bool:
    """Whether states have 16 bits, and rows of them whole lines."""
    states = [x for x in (inputs.state, ht, inputs.token_states) if x is not None]
    return inputs.q.shape[3] % 64 == 0 and all(x.element_size() == 2 for x in states)


def _launch(last: _Last, call: tuple, o: torch.Tensor, ht: torch.Tensor | None) -> None:
    """A call like `last`, on the way of every step of an engine: spelled out, since calls of functions take time.

    Raises:
        Exception: it is another call, or the function does not take these tensors; nothing was launched.
    """
    (q, k, v, g, beta, options, A_log, bias, h0, indices, offsets, v_first, _, null_slot, started, accepted, update,
     kept, kept_rows, _, _, _, _, conv, norm, scales, seed) = call  # fmt: skip
    (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
    N, one_token = (B, T == 1) if offsets is None else (offsets.shape[0] - 1, False)
    parts = None if conv is None and norm is None else _parts_of(conv, norm, HV // H)
    key = (options, update, one_token, H, K, HV, V, q.device, parts, seed is None)
    if last.key != key:
        raise ValueError("another kind of call")
    function = last.for_count.get(N)
    if function is None:
        if N > MOST_BLOCKS:
            raise ValueError("more sequences than a launch has blocks")
        function = last.for_count[N] = last.functions[_config(key, N, last.narrow, last.sms)]
    # What the function cannot see: which way round a square state lies, sizes that differ by one, slots that overlap.
    if not v_first and (h0 is not None or ht is not None):
        raise ValueError("the state is K-first")
    if N < 1:
        raise ValueError("no sequence")
    if indices is not None:
        if h0 is None:
            raise ValueError("no pool")
        if not h0.is_contiguous() and h0.stride()[0] < HV * V * K and h0.shape[0] > 1:
            raise ValueError("slots overlap")
        if indices.shape[0] < N:
            raise ValueError("not one for each sequence")
        if scales is not None and scales.stride(0) < HV * V and scales.shape[0] > 1:
            raise ValueError("scales overlap")
    if offsets is not None:
        for x in (accepted, kept_rows, started, ht, h0 if indices is None else None):
            if x is not None and x.shape[0] != N:
                raise ValueError("not one for each sequence")
    if A_log is not None and A_log.ndim != 1:
        A_log = _flat(A_log)
    if bias is not None:
        if bias.ndim != 1 and bias.shape[-1] in (K, HV * K):
            bias = _flat(bias)
        if bias.ndim != 1 or bias.numel() != HV * K:
            raise ValueError("dt_bias is not one for each channel")
    filters, conv_bias, conv_states, conv_rows, weight, gate, eps = _NO_PARTS if parts is None else _parts(call, N)
    slot = -1 if null_slot is None else null_slot
    if ranges.enabled():
        function = _in_stage(function)
    function(
        q, k, v, g, beta, A_log, bias, o, h0, ht, indices, offsets, kept, accepted, kept_rows, started, filters,
        conv_bias, conv_states, conv_rows, weight, gate, scales, seed, slot, last.scale, last.bound, eps,
    )  # fmt: skip


def _in_stage(function: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*arguments: Any) -> None:
        with ranges.stage("decode"):
            function(*arguments)

    return launch


def _parts(call: tuple, N: int) -> tuple:
    """What a function takes for a convolution and a norm. Raises `ValueError` for what it cannot see."""
    q, v, indices, offsets, accepted, conv, norm = _OF_PARTS(call)
    convolution: tuple = _NO_PARTS[:4]
    ending: tuple = _NO_PARTS[:3]
    if conv is not None:
        states = conv.states
        P, *slot = states.shape
        drafts = q.shape[1] - 1 if accepted is not None and offsets is None else 0
        if conv.weight.shape[0] != 2 * q.shape[2] * q.shape[3] + v.shape[2] * v.shape[3]:
            raise ValueError("not a filter for each channel")
        if slot[not conv.tokens_first] < conv.width - 1 + drafts:
            raise ValueError("states of the convolution that are too short")
        if states.stride(1) != slot[1] or (P > 1 and states.stride(0) < slot[0] * slot[1]):
            raise ValueError("states of the convolution that overlap or have gaps")
        if conv.indices is not None and (conv.indices.shape[0] < N or indices is None):
            raise ValueError("indices of the convolution")
        convolution = conv.weight, conv.bias, states, conv.indices
    if norm is not None:
        if not norm.eps > 0:
            raise ValueError("eps")
        ending = norm.weight, norm.gate, norm.eps
    return *convolution, *ending


def _flat(parameter: torch.Tensor) -> torch.Tensor:
    """A_log of any shape, or dt_bias [.., HV, K], in one dimension, as the function takes it. Raises `ValueError`."""
    try:
        return parameter.view(-1)
    except RuntimeError as error:  # it lies in another order
        raise ValueError(error) from None


def _function(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None, config: DecodeConfig) -> Callable[..., Any]:
    """The compiled function for these tensors; where it is not in memory, they are checked first."""
    kind, device = _kind(inputs, ht, config), inputs.q.device
    if (function := CACHE.get(("decode", device, kind))) is not None:
        return function
    _check_all(inputs, o, ht)
    if (reason := unsupported_here(device)) is not None:
        raise UnavailableError(f"cute-decode: {reason}")
    spec, arch = spec_of(inputs, ht, config), architecture(device)
    return CACHE.make(("decode", device, kind), label(spec, arch), lambda: build(spec, arch))


def _kind(inputs: Inputs, ht: torch.Tensor | None, config: DecodeConfig) -> tuple:
    """The fields of `DecodeSpec` as they can be looked up: torch's dtypes instead of their names."""
    q, v, options, indices = inputs.q, inputs.v, inputs.options, inputs.state_indices
    return (
        v.shape[2] // q.shape[2], q.shape[3], v.shape[3],
        options.gate, options.beta_is_logit, options.allow_neg_eigval, options.qk_l2norm,
        *(None if x is None else x.dtype for x in (
            q, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias, inputs.state, ht, indices, inputs.cu_seqlens,
            inputs.token_states,
        )),
        inputs.cu_seqlens is None and q.shape[1] == 1, config,
        *(None if x is None else x.dtype for x in (inputs.num_accepted_tokens, inputs.token_state_indices)),
        inputs.has_initial_state is not None, inputs.update_state,
        indices is not None and indices.ndim == 1 and indices.stride(0) != 1, inputs.N > MOST_BLOCKS,
        *_kind_of_parts(inputs), inputs.rounding_seed is not None,
    )  # fmt: skip


def _kind_of_parts(inputs: Inputs) -> tuple:
    """`_kind`, from `DecodeSpec.taps` on."""
    conv, norm = inputs.conv, inputs.norm
    kind: tuple = (0, None, None, None, None, False, False)
    if conv is not None:
        of_channel = conv.width * conv.weight.element_size()  # bytes
        kind = (
            conv.width, *(None if x is None else x.dtype for x in (conv.weight, conv.bias, conv.states, conv.indices)),
            conv.tokens_first, of_channel in (8, 16) and conv.weight.data_ptr() % of_channel == 0,
        )  # fmt: skip
    return *kind, *((None, None) if norm is None else (norm.weight.dtype, norm.gate.dtype))


def _check_all(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None) -> None:
    """Everything that the function relies on, in the words that all our kernels use. Raises `InputError`."""
    check_inputs(inputs)
    if (reason := unsupported_tensors(inputs)) is not None:
        raise InputError(f"cute-decode: {reason}")
    check_out(o, inputs.v)
    if ht is not None:
        plain = Inputs(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, inputs.options, inputs.A_log, inputs.dt_bias
        )
        try:
            check_inputs(dataclasses.replace(plain, state=ht, cu_seqlens=inputs.cu_seqlens))
        except InputError as error:
            raise error.renamed({"state": "final_state"}) from None


def spec_of(inputs: Inputs, ht: torch.Tensor | None, config: DecodeConfig) -> DecodeSpec:
    """What the kernel has to be compiled for."""
    return DecodeSpec(*named(_kind(inputs, ht, config)))


def label(spec: DecodeSpec, arch: str) -> str:
    return f"decode {arch} {spec}"


def build(spec: DecodeSpec, arch: str, options: str = "") -> Any:
    """Compiles; needs the DSL, and no GPU. See `build.compile_decode`."""
    from kda_kernels.cute.decode.build import compile_decode

    return compile_decode(spec, arch, options)


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and (reason := _unsupported_problem(problem)) is not None:
        return reason
    return unsupported_here()


def _unsupported_problem(problem: Problem) -> str | None:
    if not problem.state_v_first and (problem.initial_state or problem.final_state):
        return "the state is K-first: this kernel's is V-first"
    return unsupported_shape(problem.K, problem.V) or _unsupported_cluster(
        problem.H, problem.HV, problem.K, problem.V, "conv" in problem.features, "norm" in problem.features
    )


def unsupported_shape(K: int, V: int) -> str | None:
    """Why this kernel has no state of V x K; None if it has."""
    if K % 32 or V % 16 or not (K <= MAX_HEAD and V <= MAX_HEAD):
        return f"K is {K} and V is {V}: K should be a multiple of 32, V of 16, and neither over {MAX_HEAD}"
    return None


def _unsupported_cluster(H: int, HV: int, K: int, V: int, conv: bool, norm: bool) -> str | None:
    """Why the CTAs that share a convolution or a norm do not fit a cluster; None if they do, or there is neither."""
    if not conv and not norm:
        return None
    group = HV // H if conv else 1
    if DecodeConfig.fitting(K, V, group):
        return None
    return f"{group} value heads of V x K = {V} x {K} share a key head: their states do not fit a cluster of CTAs"


def unsupported_tensors(inputs: Inputs, out: torch.Tensor | None = None) -> str | None:
    """Why this kernel cannot run these checked tensors, on whatever machine; None if it can. Any `out` will do."""
    if (reason := unsupported_shape(inputs.q.shape[3], inputs.v.shape[3])) is not None:
        return reason
    if not inputs.state_v_first and (inputs.state is not None or inputs.output_final_state):
        return "the state is K-first: this kernel's is V-first"
    if lacking := inputs.features() - FEATURES:
        return f"it does not support {min(lacking)}"
    _, _, H, K = inputs.q.shape
    _, _, HV, V = inputs.v.shape
    if reason := _unsupported_cluster(H, HV, K, V, inputs.conv is not None, inputs.norm is not None):
        return reason
    if inputs.conv is not None and inputs.conv.indices is not None and inputs.state_indices is None:
        return "the convolution has indices and the state has none"
    state = inputs.state
    if state is not None and (state.data_ptr() % 16 or state.stride(0) * state.element_size() % 16):
        return "a slot of the state is not 16-byte aligned"
    return None


def run(inputs: Inputs) -> Outputs:
    """Runs the inputs, which the compiled function checks; a pool in `inputs.state` is updated in place.

    With KDA_CHECK_VALUES=1 in the environment what cu_seqlens and state_indices hold is checked, too.
    """
    if values_checked(inputs.q):
        check_inputs(inputs)
    return decode(inputs)


def variants(problem: Problem | None = None, gpu: Gpu = H100) -> Iterator[CuteVariant]:
    """What `kda compile` builds: the kernel for `problem` as a launch on `gpu` specialises it.

    Without one: bf16, K = V = 128, 32 heads, one token each, a pool in place; the schedules of many and of few.
    """
    if problem is not None:
        yield _variant(str(problem.options.gate), problem, gpu)
        return
    usual = Problem(Op.DECODE, (1,) * 128, H=32, HV=32, packed=False, pool_slots=256)
    yield _variant("softplus", usual, gpu)
    yield _variant("softplus few", dataclasses.replace(usual, seq_lens=(1,), pool_slots=2), gpu)
    yield _variant("safe", dataclasses.replace(usual, options=Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)), gpu)
    yield _variant("softplus bf16-state", dataclasses.replace(usual, state_dtype="bfloat16"), gpu)
    yield _variant("softplus packed", dataclasses.replace(usual, packed=True), gpu)


def _variant(name: str, problem: Problem, gpu: Gpu) -> CuteVariant:
    spec = _problem_spec(problem, gpu)
    return CuteVariant(
        name,
        lambda arch, options: build(spec, arch, options),
        lambda arch: label(spec, arch),
        num_warps=spec.config.threads // 32,
        shared_bytes=spec.shared_bytes,
    )


def _problem_spec(problem: Problem, gpu: Gpu) -> DecodeSpec:
    inputs = pretended(problem)
    ht = inputs.new_final_state() if problem.pool_slots is None and problem.final_state else None
    return spec_of(inputs, ht, _config(_sizes(inputs), inputs.N, _narrow(inputs, ht), gpu.sms))
