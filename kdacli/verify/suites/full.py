"""The suite `full`: `quick`, more of every kind, and every two options together. Minutes on a CPU."""

from kda_kernels.problem import Op
from kdacli.verify.case import FP32, MIXED, NONE, SAFE, SOFTPLUS, change, row
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.suites.pairs import pair_cases
from kdacli.verify.suites.quick import QUICK

# Around every power of two that is anybody's tile or chunk, and around multiples of 16 and 64.
EDGES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81, 95, 96, 97, 127, 128, 129)
FEW_EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65)
LONG_EDGES = (0, 193, 0, 257, 191)
_P, _D, _G = Op.PREFILL, Op.DECODE, Op.GATE

FULL = (
    *QUICK,
    # prefill
    row("edges", _P, EDGES, "one more or one less than a tile of 8, 16, 32, 64 or 128", dim=16),
    row("edges-softplus", _P, FEW_EDGES, "the same where the gate has no bound", options=SOFTPLUS, dim=16,
        gates="init"),
    row("long-edges", _P, LONG_EDGES, "the same for chunks of 256, empty sequences between", dim=16,
        gates="weak"),
    row("nothing", _P, (0, 0), "a batch with no tokens at all: states pass through", dim=32, about="lens"),
    row("nobody", _P, (3, 4), "padding rows only: nothing is read, nothing written", dim=32, pool_slots=2,
        padding=2, about="padding"),
    row("batch", _P, tuple(range(14)), "many short sequences, some of them padding", dim=16, pool_slots=20,
        padding=3),
    row("zero-keys-fp32", _P, (40,), "zero keys in fp32", dim=32, transforms=("zero-keys",), **FP32),
    row("collinear-fp32", _P, (70,), "a nearly singular matrix, twice beta", gates="weak", keys="near-collinear",
        options=change(SAFE, allow_neg_eigval=True), dim=32, **FP32),
    row("gate-range-fp32", _P, (3, 66), "gates of every size in fp32, parameters in bf16", options=SOFTPLUS, dim=32,
        heads=5, transforms=("gate-range",), **(FP32 | {"param_dtype": "bfloat16"})),
    row("deep-bound", _P, (20,), "a bound below -5, which decays of -5 at most do not reach",
        options=change(SAFE, lower_bound=-12.0), dim=32, transforms=("gate-range",), about="lower_bound"),
    row("wide-heads", _P, (9,), "heads of 192: channels after the 128th", dim=192, about="K"),
    row("many-sequences", _P, (1,) * 34, "more sequences than a tile of 32", dim=16, pool_slots=50, padding=2,
        about="lens"),
    row("sudden-softplus", _P, (70,), "a state cut to e^-10 or so through the activation", options=SOFTPLUS, dim=32,
        gates="init", transforms=("sudden-gates", "large-state", "small-values")),
    row("neighbours-softplus", _P, (65, 64, 1), PROPERTIES["neighbours"].reason, options=SOFTPLUS, dim=32,
        gates="weak", pool_slots=6, properties=("neighbours",)),
    row("neighbours-dense", _P, (33, 33), PROPERTIES["neighbours"].reason, dim=32, packed=False,
        properties=("neighbours",)),
    row("future-softplus", _P, (10, 70), PROPERTIES["future"].reason, options=SOFTPLUS, dim=32, gates="init",
        properties=("future",)),
    row("future-activated", _P, (66,), PROPERTIES["future"].reason, options=NONE, g_dtype="float32", dim=32,
        properties=("future",)),
    row("split-softplus", _P, (129, 20), PROPERTIES["split"].reason, options=SOFTPLUS, dim=32, gates="weak",
        transforms=("mixed-gates",), properties=("split",)),
    row("split-no-state", _P, (70,), PROPERTIES["split"].reason, dim=32, initial_state=False,
        properties=("split",)),
    row("other-layout-pool", _P, (20, 5), PROPERTIES["k-first"].reason, options=SOFTPLUS, dim=32, pool_slots=3,
        state_dtype="bfloat16", properties=("k-first",)),
    row("then-decode-safe", _P, (66, 9, 4), "prefill, then four steps of decode from a pool with gaps", dim=32,
        gates="weak", pool_slots=5, decode_steps=4, transforms=("pool-with-gaps",)),
    row("at-once-softplus", _P, (65, 3), "16 threads, two streams, a graph's replay: each as if alone",
        options=SOFTPLUS, dim=32, properties=("threads", "streams", "graph", "after-nan")),
    *pair_cases(_P),
    # decode
    row("edges", _D, EDGES, "any number of tokens a sequence", dim=16, about="lens"),
    row("nothing", _D, (0, 0), "a batch with no tokens at all: states pass through", dim=32, about="lens"),
    row("nobody", _D, (1, 1), "padding rows only: nothing is read, nothing written", dim=32, pool_slots=2,
        padding=2, about="padding"),
    row("batch", _D, (1,) * 67, "a batch that no tile divides", dim=16, packed=False, pool_slots=80, padding=9,
        transforms=("pool-with-gaps",)),
    row("gate-range-fp32", _D, (1, 9), "gates of every size in fp32, parameters in bf16", options=SOFTPLUS, dim=32,
        heads=5, transforms=("gate-range",), **(FP32 | {"param_dtype": "bfloat16"})),
    row("deep-bound", _D, (1, 3), "a bound below -5, which decays of -5 at most do not reach",
        options=change(SAFE, lower_bound=-12.0), dim=32, transforms=("gate-range",), about="lower_bound"),
    row("wide-heads", _D, (1, 2), "heads of 192: channels after the 128th", dim=192, about="K"),
    row("neighbours-pool", _D, (1,) * 5, PROPERTIES["neighbours"].reason, options=SOFTPLUS, dim=32, packed=False,
        pool_slots=8, padding=1, properties=("neighbours",)),
    row("other-layout-pool", _D, (1, 1), PROPERTIES["k-first"].reason, options=SOFTPLUS, dim=32, pool_slots=3,
        state_dtype="bfloat16", packed=False, properties=("k-first",)),
    row("mixed-at-once", _D, (1, 1), "threads, streams, graphs with every dtype mixed", dim=32, packed=False,
        pool_slots=4, padding=1, properties=("threads", "streams", "graph", "after-nan", "after-error"), **MIXED),
    *pair_cases(_D),
    # gate
    row("edges", _G, EDGES, "one more or one less than a tile", dim=16),
    row("long-edges", _G, LONG_EDGES, "sums restart at every 64 tokens, whatever the length", options=SOFTPLUS,
        dim=16),
    row("nothing", _G, (0, 0), "a batch with no tokens at all", dim=32, about="lens"),
    row("deep-bound", _G, (20,), "a bound below -5", options=change(SAFE, lower_bound=-12.0), dim=32, heads=2,
        transforms=("gate-range",), about="lower_bound"),
    row("wide-heads", _G, (9,), "heads of 192: channels after the 128th", dim=192, about="K"),
    row("neighbours-dense", _G, (33, 33), PROPERTIES["neighbours"].reason, options=NONE, g_dtype="float32",
        dim=32, packed=False, properties=("neighbours",)),
    *pair_cases(_G),
    # large: on a GPU
    row("long", _P, (65537,), "one very long sequence: errors must not pile up, nor offsets wrap", dim=128,
        gates="init", gpu_only=True),
    row("wide", _P, (300, 20, 1100), "96 heads, softplus", options=SOFTPLUS, dim=128, heads=96, gates="weak",
        gpu_only=True),
    row("many", _P, tuple(17 * i % 200 for i in range(300)), "300 short prompts into a pool", dim=128, heads=2,
        pool_slots=400, padding=20, gpu_only=True),
    row("at-once-large", _P, (2048, 300), "16 threads, two streams, a graph's replay on a full GPU", dim=128,
        heads=8, pool_slots=4, properties=("threads", "streams", "graph"), gpu_only=True),
    row("at-once-large", _D, (1,) * 64, "16 threads, two streams, a graph's replay on a full GPU", dim=128,
        heads=32, packed=False, pool_slots=100, padding=3, properties=("threads", "streams", "graph"),
        gpu_only=True),
    row("wide", _D, (1,) * 32, "96 heads, one token each", dim=128, heads=96, packed=False, pool_slots=40,
        gpu_only=True),
)  # fmt: skip
