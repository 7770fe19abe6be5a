"""The named changes of inputs that cases choose from: `layouts` change memory, `regimes` values,
and `serving` what is computed.
"""

from collections.abc import Callable

from kda_kernels.problem import Problem
from kda_kernels.tensors import Inputs
from kdacli.verify.transforms import layouts, regimes, serving

LAYOUTS: dict[str, Callable[[Inputs], Inputs]] = {
    "packed-projection": layouts.packed_projection,
    "padded-heads": layouts.padded_heads,
    "heads-first": layouts.heads_first,
    "every-second-token": layouts.every_second_token,
    "offset": layouts.offset,
    "int64-indices": layouts.int64_indices,
    "pool-with-gaps": layouts.pool_with_gaps,
    "far-pool": layouts.far_pool,
}
REGIMES: dict[str, Callable[[Inputs], Inputs]] = {
    "cut-off-gates": regimes.cut_off_gates,
    "forget-everything": regimes.forget_everything,
    "open-gates": regimes.open_gates,
    "mixed-gates": regimes.mixed_gates,
    "strong-gates": regimes.strong_gates,
    "sudden-gates": regimes.sudden_gates,
    "gate-range": regimes.gate_range,
    "repeated-keys": regimes.repeated_keys,
    "zero-keys": regimes.zero_keys,
    "huge-keys": regimes.huge_keys,
    "tiny-keys": regimes.tiny_keys,
    "extreme-betas": regimes.extreme_betas,
    "large-state": regimes.large_state,
    "scaled-heads": regimes.scaled_heads,
    "small-values": regimes.small_values,
}
SERVING: dict[str, Callable[[Inputs], Inputs]] = {
    "any-negative": serving.any_negative,
    "null-slot": serving.null_slot,
    "fresh-states": serving.fresh_states,
    "drafts": serving.drafts,
    "read-only": serving.read_only,
    "token-rows": serving.token_rows,
    "checkpoint-of-each": serving.checkpoint_of_each,
    "checkpoints-of-chunks": serving.checkpoints_of_chunks,
    "checkpoints-every": serving.checkpoints_every,
    "checkpoints-in-pool": serving.checkpoints_in_pool,
    "workspace": serving.workspace,
    "bucket": serving.bucket,
    "strided-indices": serving.strided_indices,
    "long-indices": serving.long_indices,
    "own-conv-slots": serving.own_conv_slots,
}
# What a problem must have for a change of it to mean anything.
NEED_POOL = frozenset(
    ("any-negative", "null-slot", "fresh-states", "drafts", "read-only", "checkpoints-in-pool", "strided-indices")
) | {"long-indices"}
NEED_PACKED = frozenset(("bucket",))
NEED_PADDING = frozenset(("any-negative", "null-slot"))
# Values before memory: a regime may make its tensor anew.
TRANSFORMS = REGIMES | SERVING | LAYOUTS


def possible(problem: Problem, names: tuple[str, ...]) -> bool:
    """Whether a problem has what these changes need."""
    pooled = problem.pool_slots is not None or NEED_POOL.isdisjoint(names)
    padded = problem.padding > 0 or NEED_PADDING.isdisjoint(names)
    return pooled and padded and (problem.packed or NEED_PACKED.isdisjoint(names))


def transformed(inputs: Inputs, names: tuple[str, ...]) -> Inputs:
    """`inputs` after the changes named, in the order of `TRANSFORMS`."""
    for name, transform in TRANSFORMS.items():
        if name in names:
            inputs = transform(inputs)
    return inputs
