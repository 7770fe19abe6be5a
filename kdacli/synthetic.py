"""Synthetic inputs: from a `Problem`, a gate regime, a kind of keys and a seed to tensors.

Gate regimes (what a time or an error of a KDA kernel depends on, so that both are told with theirs):

| name  | A_log  | dt_bias                                         | raw gate   | what it is                     |
| ----- | ------ | ----------------------------------------------- | ---------- | ------------------------------ |
| bench | U(0,1) | U(0,1)                                          | N(0,1)     | forgets within a few tokens    |
| init  | 0      | softplus^-1(dt), dt log-uniform in [1e-3, 1e-1] | N(0,1)     | FLA's safe-gate layer, as born |
| weak  | 0      | softplus^-1(dt), dt log-uniform in [1e-5, 1e-3] | 0.1 N(0,1) | long memory                    |

Keys: `random` are N(0,1). `near-collinear` are one direction a head plus 2% noise, normalised, with beta logits
N(4,1): the triangular matrix of a chunk is then as badly conditioned as serving has seen it.

Each tensor is drawn from a stream of its own, named after it: a seed gives the same q with or without a state.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kda_kernels.dtypes import torch_dtype
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Options, Parts, Problem
from kda_kernels.reference.stored import stored
from kda_kernels.tensors import Convolution, GatedNorm, Inputs

LARGE = 1 << 24  # elements
STATE_STD = 0.1  # between the ~0.05 of one delta update of a random key and the ~1 that a long memory grows to
COLLINEAR_NOISE = 0.02
_L2_EPS = 1e-6


class Regime(NamedTuple):
    """How the gate's parameters are drawn: A_log in U(0, A_log_max), dt_bias in U(0,1) or from dt, raw in N(0, std)."""

    A_log_max: float
    dt: tuple[float, float] | None
    raw_std: float


GATES = {
    "bench": Regime(1.0, None, 1.0),
    "init": Regime(0.0, (1e-3, 1e-1), 1.0),
    "weak": Regime(0.0, (1e-5, 1e-3), 0.1),
}
KEYS = ("random", "near-collinear")


def elements(problem: Problem) -> int:
    """Elements of all the tensors of a problem, the state or pool included."""
    token = 2 * problem.H * problem.K + problem.HV * (problem.K + problem.V + 1)
    slots = problem.N if problem.pool_slots is None else problem.pool_slots
    has_state = problem.initial_state or problem.pool_slots is not None
    return problem.T * token + has_state * slots * problem.HV * problem.K * problem.V


def make_inputs(
    problem: Problem, *, gates: str = "bench", keys: str = "random", seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Draws the tensors of `problem`.

    Numbers are drawn on the CPU and copied, so that a seed means the same inputs on every machine; from `LARGE`
    elements on they are drawn on `device` itself, since a CPU would need minutes, and then they depend on it.

    q, k, v are N(0,1); q and k are normalised beforehand when the kernel will not do it (`qk_l2norm` off). beta logits
    are N(0,1), values their sigmoids. With `Gate.NONE`, g is the log decay that the regime gives through the softplus
    gate, or through the safe gate when a lower_bound is promised. The state is 0.1 N(0,1), in a pool zero without
    `initial_state`. The slots of a pool are permuted, those that no sequence uses are NaN, and the padding rows are
    scattered over the batch. A convolution's weight and states and the output gate are normal, q, k and v then views of
    one projection.

    Raises:
        InputError: `gates` or `keys` is no known name.
    """
    if gates not in GATES:
        raise InputError("gates", f"is {gates}", f"it should be one of {', '.join(GATES)}")
    if keys not in KEYS:
        raise InputError("keys", f"is {keys}", f"it should be one of {', '.join(KEYS)}")
    parts = problem.parts or Parts(width=0, norm=False)
    if others := problem.features - parts.features - {"state_scales", "rounding_seed"}:
        raise InputError("features", f"are {', '.join(sorted(others))}", "synthetic inputs have none of them")
    draw = _Draw(seed, device, on_device=elements(problem) >= LARGE)
    B, T = (1, problem.T) if problem.packed else (problem.N, problem.T // max(problem.N, 1))
    options, dtype = problem.options, torch_dtype(problem.dtype)
    q = draw.normal("q", (B, T, problem.H, problem.K))
    k = _keys(draw, keys, (B, T, problem.H, problem.K))
    if not options.qk_l2norm and not parts.width:
        q, k = _normalise(q), _normalise(k)
    v = draw.normal("v", (B, T, problem.HV, problem.V))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if parts.width:
        q, k, v = _projection(q, k, v)
    beta = draw.normal("beta", (B, T, problem.HV)).add_(4.0 if keys == "near-collinear" else 0.0)
    g, A_log, dt_bias = _gate(draw, GATES[gates], options, (B, T, problem.HV, problem.K))
    param_dtype = torch_dtype(problem.param_dtype)
    state, state_indices, scales = _state(draw, problem)
    return Inputs(
        q=q,
        k=k,
        v=v,
        g=g.to(torch_dtype(problem.g_dtype)),
        beta=(beta if options.beta_is_logit else beta.sigmoid()).to(torch_dtype(problem.beta_dtype)),
        options=options,
        A_log=None if A_log is None else A_log.to(param_dtype),
        dt_bias=None if dt_bias is None else dt_bias.to(param_dtype),
        state=state,
        state_indices=state_indices,
        cu_seqlens=_cu_seqlens(problem.seq_lens, device) if problem.packed else None,
        state_v_first=problem.state_v_first,
        output_final_state=problem.final_state,
        conv=_convolution(draw, problem, parts, state_indices) if parts.width else None,
        norm=_norm(draw, parts, v) if parts.norm else None,
        state_scales=scales,
        rounding_seed=draw.integer("rounding_seed") if "rounding_seed" in problem.features else None,
    )


class _Draw:
    """Random float32 tensors; each name has a stream of its own."""

    def __init__(self, seed: int, device: str, on_device: bool) -> None:
        self.seed, self.device = seed, torch.device(device)
        self.source = self.device if on_device else torch.device("cpu")

    def _generator(self, name: str) -> torch.Generator:
        # torch's CPU generator looks at the low 32 bits of a seed only, hence a hash of just as many.
        digest = hashlib.blake2b(f"{name} {self.seed}".encode(), digest_size=4).digest()
        return torch.Generator(self.source).manual_seed(int.from_bytes(digest))

    def normal(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator(name), device=self.source).to(self.device)

    def uniform(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return torch.rand(*shape, generator=self._generator(name), device=self.source).to(self.device)

    def integer(self, name: str) -> torch.Tensor:
        """int64 [1], positive."""
        drawn = torch.randint(2**62, (1,), generator=self._generator(name), device=self.source)
        return drawn.to(self.device)

    def permutation(self, name: str, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self._generator(name), device=self.source).to(self.device)


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)


def _keys(draw: _Draw, kind: str, shape: tuple[int, int, int, int]) -> torch.Tensor:
    k = draw.normal("k", shape)
    if kind == "random":
        return k
    return _normalise(k.mul_(COLLINEAR_NOISE).add_(draw.normal("direction", shape[2:])))


def _gate(
    draw: _Draw, regime: Regime, options: Options, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """g, A_log and dt_bias; the latter two None when g is the log decay already."""
    HV, K = shape[2:]
    A_log = draw.uniform("A_log", (HV,)) * regime.A_log_max
    dt_bias = draw.uniform("dt_bias", (HV, K))
    if regime.dt is not None:
        low, high = regime.dt
        dt = low * (high / low) ** dt_bias
        dt_bias = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    g = draw.normal("g", shape).mul_(regime.raw_std)
    if options.gate is not Gate.NONE:
        return g, A_log, dt_bias
    x, A = g.add_(dt_bias), A_log.exp()[:, None]
    if options.lower_bound is None:
        return torch.nn.functional.softplus(x).mul_(-A), None, None
    return torch.sigmoid(x.mul_(A)).mul_(options.lower_bound), None, None


def _state(draw: _Draw, problem: Problem) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The initial state, or the pool, the slot of each sequence, and the scales of a pool in int16."""
    rows, columns = (problem.V, problem.K) if problem.state_v_first else (problem.K, problem.V)
    dtype = torch_dtype(problem.state_dtype)
    if problem.pool_slots is None:
        if not problem.initial_state:
            return None, None, None
        return draw.normal("state", (problem.N, problem.HV, rows, columns)).mul_(STATE_STD).to(dtype), None, None
    indices = draw.permutation("slots", problem.pool_slots)[: problem.N - problem.padding]
    if torch.equal(indices, torch.arange(len(indices), device=draw.device)):
        indices = indices.roll(1)  # a kernel that ignores the indices must not pass by luck
    used = draw.normal("state", (len(indices), problem.HV, rows, columns)).mul_(STATE_STD)
    held, scales = stored(used if problem.initial_state else torch.zeros_like(used), dtype)
    pool, scales = (None if x is None else _pool(problem.pool_slots, indices, x) for x in (held, scales))
    state_indices = torch.full((problem.N,), -1, dtype=torch.int32, device=draw.device)
    live = draw.permutation("padding", problem.N)[problem.padding :].sort().values
    state_indices[live] = indices.to(torch.int32)
    return pool, state_indices, scales


def nothing(t: torch.Tensor) -> float:
    """What lies in a pool where nobody should read: NaN; of integers the least, which no state is stored as."""
    return torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min


def _pool(slots: int, indices: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """`used` in the slots of a pool that holds `nothing` elsewhere."""
    pool = used.new_full((slots, *used.shape[1:]), nothing(used))
    pool[indices] = used
    return pool


def _projection(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views of one tensor [B, T, D] with the same values."""
    sizes = [x.shape[2] * x.shape[3] for x in tensors]
    parts = torch.cat([x.flatten(2) for x in tensors], 2).split(sizes, 2)
    return [part.unflatten(2, x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]


def _convolution(draw: _Draw, problem: Problem, parts: Parts, state_indices: torch.Tensor | None) -> Convolution:
    D, kept = 2 * problem.H * problem.K + problem.HV * problem.V, parts.width - 1
    weight = draw.normal("conv.weight", (D, parts.width)) * parts.width**-0.5
    if not problem.options.qk_l2norm:
        weight[: 2 * problem.H * problem.K] *= problem.K**-0.5  # keys of norm 1 or so, with which a state stays bounded
    weight_dtype, state_dtype = torch_dtype(parts.weight_dtype), torch_dtype(parts.state_dtype)
    bias = draw.normal("conv.bias", (D,)).to(weight_dtype) if parts.bias else None
    slots = problem.N if problem.pool_slots is None else problem.pool_slots
    used = (
        torch.arange(slots, device=draw.device) if state_indices is None else state_indices[state_indices >= 0].long()
    )
    shape = (kept, D) if parts.tokens_first else (D, kept)
    states = torch.full((slots, *shape), torch.nan, dtype=state_dtype, device=draw.device)
    states[used] = draw.normal("conv.states", (len(used), *shape)).to(state_dtype)
    return Convolution(weight.to(weight_dtype), bias, states, tokens_first=parts.tokens_first)


def _norm(draw: _Draw, parts: Parts, v: torch.Tensor) -> GatedNorm:
    weight = draw.normal("norm.weight", v.shape[3:]) * 0.1 + 1.0
    return GatedNorm(draw.normal("norm.gate", v.shape).to(v.dtype), weight.to(torch_dtype(parts.norm_dtype)))


def _cu_seqlens(seq_lens: Sequence[int], device: str) -> torch.Tensor:
    """int32 [N + 1]."""
    ends = torch.tensor([0, *seq_lens], dtype=torch.int64).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
