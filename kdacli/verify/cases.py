"""The cases of `kda verify`: one call each, with the reason why it is there. To add one, add an entry to `CASES`.

All but the last few are small enough for Triton's interpreter on two CPU cores; the large ones need a GPU.
"""

import dataclasses

from kda_kernels.problem import Gate, Op, Options, Problem

SOFTPLUS = Options()  # Kimi-Linear
SAFE = Options(gate=Gate.SAFE, lower_bound=-5.0)  # Kimi K3
NONE = Options(gate=Gate.NONE)
# Around 16 (a sub-chunk) and 64 (a chunk), with an empty sequence.
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and why it is there.

    Attributes:
        name: unique, for `kda verify --case`.
        why: what goes wrong in kernels that fail it.
        problem, gates, keys: what `kdacli.synthetic.make_inputs` draws from.
        transform: a name in `kdacli.verify.transforms.TRANSFORMS`, or None.
        decode_steps: for prefill: the last so many tokens of each sequence are decoded from the pool, one by one.
        gpu_only: too large for an interpreter.
    """

    name: str
    why: str
    problem: Problem
    gates: str = "bench"
    keys: str = "random"
    transform: str | None = None
    decode_steps: int = 0
    gpu_only: bool = False


def _case(
    name: str,
    op: Op,
    seq_lens: tuple[int, ...],
    why: str,
    *,
    options: Options = SAFE,
    dim: int = 64,
    heads: int = 1,
    v_heads: int | None = None,
    gates: str = "bench",
    keys: str = "random",
    transform: str | None = None,
    decode_steps: int = 0,
    gpu_only: bool = False,
    **fields,
) -> Case:
    """A case in few words; `fields` are those of `Problem`."""
    sizes = {"H": heads, "HV": v_heads or heads, "K": dim, "V": dim}
    problem = Problem(op, seq_lens, options=options, **{**sizes, **fields})
    return Case(f"{op}-{name}", why, problem, gates, keys, transform, decode_steps, gpu_only)


def _with(options: Options, **changes) -> Options:
    return dataclasses.replace(options, **changes)


_P, _D, _G = Op.PREFILL, Op.DECODE, Op.GATE
_FP32 = {"dtype": "float32", "g_dtype": "float32", "beta_dtype": "float32"}
_FP16 = {"dtype": "float16", "g_dtype": "float16", "beta_dtype": "float16"}
_MIXED = {"g_dtype": "float32", "beta_dtype": "float32", "param_dtype": "bfloat16", "state_dtype": "bfloat16"}
_NO_STATE = {"initial_state": False, "final_state": False}

CASES = (
    # prefill
    _case("lengths", _P, LENGTHS, "partial last chunks and empty sequences; padded rows are not zero after a gate"),
    _case("kimi-k3", _P, (70,), "a head of Kimi K3: safe gate, K = V = 128", dim=128, heads=2),
    _case("kimi-linear", _P, (40, 40), "softplus gate as initialised, dense batch", options=SOFTPLUS, dim=128,
          gates="init", packed=False),
    _case("weak-gates", _P, (150,), "long memory: the state carries most of the output", dim=128, gates="weak"),
    _case("collinear-init", _P, (100,), "a nearly singular chunk matrix: half-precision inverses gave NaN here",
          dim=128, gates="init", keys="near-collinear"),
    _case("collinear-weak", _P, (100,), "the same with long memory, and no bound", options=SOFTPLUS, dim=128,
          gates="weak", keys="near-collinear"),
    _case("activated", _P, (17, 50), "g is the log decay already: only its cumulative sum runs", options=NONE,
          g_dtype="float32"),
    _case("promised-bound", _P, (40,), "activated gates with a promised bound",
          options=_with(NONE, lower_bound=-5.0), g_dtype="float32"),
    _case("cut-off", _P, (80,), "log decays of -1000 beside 0: exp(-cumsum) overflows, a divided decay gives NaN",
          options=NONE, transform="cut-off-gates"),
    _case("cut-off-softplus", _P, (80,), "the same through the activation", options=SOFTPLUS,
          transform="cut-off-gates"),
    _case("neg-eigval", _P, (40,), "beta up to 2: negative eigenvalues", options=_with(SAFE, allow_neg_eigval=True)),
    _case("plain-values", _P, (40,), "beta values, no L2 norm, a scale of its own",
          options=_with(SAFE, beta_is_logit=False, qk_l2norm=False, scale=0.5)),
    _case("grouped", _P, (40,), "4 value heads for 2 query heads", heads=2, v_heads=4),
    _case("head-sizes", _P, (40,), "V differs from K, so a swapped layout shows", K=128, V=64),
    _case("fp16", _P, (80,), "fp16 activations", dim=128, **_FP16),
    _case("fp32", _P, (80,), "fp32 activations: tf32 products at worst", **_FP32),
    _case("mixed-dtypes", _P, (40,), "fp32 gates and beta, bf16 parameters and state, bf16 q, k, v", **_MIXED),
    _case("no-state", _P, (40,), "no state in, none out", **_NO_STATE),
    _case("pool", _P, (17, 64, 5), "a pool updated in place: permuted slots, a padding row, gaps between slots",
          pool_slots=5, padding=1, transform="pool-with-gaps"),
    _case("k-first", _P, (17, 64), "a state stored K-first", V=32, state_v_first=False),
    _case("k-first-pool", _P, (17, 64), "a pool stored K-first, updated in place", state_v_first=False, pool_slots=4),
    _case("row-strided", _P, (40,), "q, k, v as slices of one projection: reading them as contiguous is wrong", heads=2,
          transform="packed-projection"),
    _case("head-strided", _P, (40,), "heads with padding between them", heads=2, transform="padded-heads"),
    _case("then-decode", _P, (67, 9), "prefill, then decode from the same pool: one long recurrence",
          options=SOFTPLUS, gates="init", pool_slots=4, decode_steps=2),
    # decode
    _case("kimi-k3", _D, (1,) * 3, "a dense batch from a pool, with a padding row: safe gate, K = V = 128", dim=128,
          heads=2, packed=False, pool_slots=5, padding=1),
    _case("kimi-linear", _D, (1,) * 3, "a packed batch from a pool: softplus gate as initialised", options=SOFTPLUS,
          dim=128, heads=2, gates="init", pool_slots=4),
    _case("weak-gates", _D, (1,) * 2, "decays within 1e-3 of 1", dim=128, gates="weak"),
    _case("lengths", _D, (0, 1, 3), "several tokens a sequence, and none", options=SOFTPLUS, pool_slots=5),
    _case("dense-tokens", _D, (3, 3), "several tokens a sequence in a dense batch", packed=False, **_FP32),
    _case("collinear", _D, (6,), "the same key again and again", options=SOFTPLUS, gates="weak", keys="near-collinear"),
    _case("activated", _D, (3, 1), "g is the log decay already", options=NONE, g_dtype="float32"),
    _case("cut-off", _D, (5,), "log decays of -1000 beside 0", options=NONE, transform="cut-off-gates"),
    _case("cut-off-softplus", _D, (5,), "the same through the activation", options=SOFTPLUS,
          transform="cut-off-gates"),
    _case("neg-eigval", _D, (3,), "beta up to 2: negative eigenvalues", options=_with(SAFE, allow_neg_eigval=True)),
    _case("plain-values", _D, (3,), "beta values, no L2 norm, a scale of its own",
          options=_with(SAFE, beta_is_logit=False, qk_l2norm=False, scale=0.5)),
    _case("grouped", _D, (1, 1), "4 value heads for 2 query heads", heads=2, v_heads=4, pool_slots=3),
    _case("head-sizes", _D, (1, 2), "V differs from K, so a swapped layout shows", K=128, V=64),
    _case("fp16", _D, (1, 3), "fp16 activations", **_FP16),
    _case("fp32", _D, (1, 3), "fp32 throughout: nothing but sums may differ", dim=128, **_FP32),
    _case("mixed-dtypes", _D, (1, 3), "fp32 gates and beta, bf16 parameters and state, bf16 q, k, v: a kernel that "
          "baked other dtypes in reads NaN", **_MIXED),
    _case("no-state", _D, (2, 1), "no state in, none out", **_NO_STATE),
    _case("pool-gaps", _D, (1,) * 4, "gaps between slots, and two padding rows: .contiguous() would update a copy",
          packed=False, pool_slots=5, padding=2, transform="pool-with-gaps"),
    _case("pool-bf16", _D, (1,) * 2, "a bf16 pool, rounded once", dim=128, pool_slots=4, state_dtype="bfloat16"),
    _case("k-first", _D, (2, 1), "a state stored K-first", V=32, state_v_first=False),
    _case("k-first-pool", _D, (1, 1), "a pool stored K-first, updated in place", state_v_first=False, pool_slots=4),
    _case("row-strided", _D, (1, 2), "q, k, v as slices of one projection: reading them as contiguous is wrong",
          heads=2, transform="packed-projection"),
    _case("head-strided", _D, (1, 1), "heads with padding between them", heads=2, packed=False,
          transform="padded-heads"),
    # gate
    _case("lengths", _G, LENGTHS, "sums restart at every chunk and every sequence"),
    _case("softplus", _G, (65, 65), "dense batch, as initialised", options=SOFTPLUS, gates="init", packed=False,
          dim=128),
    _case("weak", _G, (70,), "log decays of 1e-5: softplus must not lose its tail", options=SOFTPLUS, gates="weak"),
    _case("activated", _G, (100,), "the cumulative sum alone", options=NONE, g_dtype="float32"),
    _case("cut-off", _G, (64,), "raw gates of 1000 and -1000", options=SOFTPLUS, transform="cut-off-gates"),
    _case("mixed-dtypes", _G, (64,), "fp32 raw gates, bf16 parameters", g_dtype="float32", param_dtype="bfloat16"),
    _case("row-strided", _G, (40,), "g as a slice of a projection", heads=2, transform="packed-projection"),
    # large: on a GPU
    *(
        _case(f"{gates}-2048", _P, (2048,), f"12 heads (Kimi K3, TP=8), {gates} gates", dim=128, heads=12, gates=gates,
              gpu_only=True)
        for gates in ("bench", "init", "weak")
    ),
    _case("serving", _P, (1300, 547, 2048, 963, 271, 3063), "a batch of prompts into a pool", options=SOFTPLUS, dim=128,
          heads=8, gates="init", pool_slots=20, gpu_only=True),
    _case("collinear-2048", _P, (2048,), "nearly singular chunks, one after the other", dim=128, heads=4, gates="weak",
          keys="near-collinear", gpu_only=True),
    _case("far-pool", _P, (65, 17, 80, 30, 3), "offsets over 2^31 elements wrap in 32 bits", dim=128, pool_slots=6,
          state_dtype="bfloat16", transform="far-pool", gpu_only=True),
    _case("serving", _D, (1,) * 128, "128 sequences, 32 heads", options=SOFTPLUS, dim=128, heads=32, gates="init",
          packed=False, pool_slots=160, padding=5, gpu_only=True),
    _case("far-pool", _D, (1,) * 5, "offsets over 2^31 elements wrap in 32 bits", dim=128, packed=False, pool_slots=6,
          state_dtype="bfloat16", transform="far-pool", gpu_only=True),
    _case("8192", _G, (8192,), "32 heads, 8192 tokens", dim=128, heads=32, gpu_only=True),
)  # fmt: skip


def cases_for(device: str) -> list[Case]:
    """The cases of a run with no arguments on `device`."""
    return [case for case in CASES if device == "cuda" or not case.gpu_only]
