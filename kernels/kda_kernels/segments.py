"""What a stretch of tokens does to any state: for prefills that are split over CTAs, GPUs or calls."""

import dataclasses

import torch

from kda_kernels import registry
from kda_kernels.boundary import check, forward_only, options_of
from kda_kernels.problem import Op
from kda_kernels.tensors import Inputs


def kda_segment_summary(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    allow_neg_eigval: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence is affine in the state: a sequence turns the state S [V, K] into S @ transition + end.

    So stretches of a sequence can be worked on at once, by several GPUs for instance, which exchange just this: of two
    that follow each other, (E1, T1) and (E2, T2), the whole is (E1 @ T2 + E2, T1 @ T2).

    Args:
        k: [B, T, H, K]. v: [B, T, HV, V]. g: [B, T, HV, K]. beta: [B, T, HV]. The options are those of `kda_prefill`.
        cu_seqlens: [N + 1], with B = 1; without it N = B.

    Returns:
        end [N, HV, V, K], the final state of a sequence that begins with nothing, and transition [N, HV, K, K], both
        fp32. An empty sequence gives zeros and the identity.

    Raises:
        InputError: the tensors do not fit together.
    """
    options = options_of(
        use_gate_in_kernel, lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_qk_l2norm_in_kernel, None
    )
    inputs = Inputs(
        k, k, v, g, beta, options, A_log=A_log, dt_bias=dt_bias, cu_seqlens=cu_seqlens, output_final_state=True
    )
    check(inputs)
    return forward_only(lambda: _summary(inputs), inputs)


def _summary(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = registry.kernel_for(Op.PREFILL, inputs)
    if kernel.backend == "cute":
        return kernel.code.summaries(inputs)
    # any prefill can say it: once from nothing, once from the identity with values of 0
    end = registry.prefill(inputs, kernel=kernel.name).final_state
    K, v = inputs.k.shape[-1], inputs.v
    identity = torch.eye(K, device=v.device).expand(inputs.N, v.shape[2], K, K).contiguous()
    nothing = v.new_zeros((*v.shape[:3], K))
    moved = dataclasses.replace(inputs, v=nothing, state=identity)
    transition = registry.prefill(moved, kernel=kernel.name).final_state
    assert end is not None and transition is not None  # as output_final_state asks
    return end, transition
