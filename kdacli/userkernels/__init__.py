"""Users' own kernels: any function that computes KDA is a kernel for every command.

    kda verify  --kernel mykernel.py:prefill
    kda profile --kernel mypackage.kernels:decode --op decode
    kda compare dump.pt --kernel my-kernel        (a name in the packaging entry-point group `kda.kernels`)

The calling convention. The function is called with keyword arguments, and only with those its signature names:

    q, k, v, g, beta        as in `kda_kernels.tensors.Inputs`: [B, T, H, K], .., strided as they are; g and beta raw
    A_log, dt_bias          of a raw gate
    initial_state           [N, HV, V, K], not to be modified; or, with
    state_indices           int32 [N], a negative one is padding: a pool [P, HV, V, K], to be updated in place
    cu_seqlens              int32 [N + 1], of a packed batch, which has B = 1
    scale, lower_bound      numbers; lower_bound is that of the safe gate
    output_final_state, state_v_first, safe_gate, inplace_final_state (True with a pool), and the switches
    use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval: booleans, as in FLA

    null_slot, has_initial_state, num_accepted_tokens, update_state, token_states, token_state_indices, checkpoints,
    batch_invariant, workspace, cu_seqlens_cpu, state_scales, rounding_seed: what engines ask for beyond that, as in
    `Inputs`

so that a function with FLA's signature works as it is (one with **kwargs gets A_log and dt_bias in it, as FLA's
`chunk_kda` takes them). The names that dumps may have are accepted too: state, h0, ssm_state_indices, query_start_loc,
... What a call lacks is left out where the parameter has a default. Where it has none the function cannot do without:
`initial_state` without a default refuses problems that start from zero. A parameter `out` or `final_state` without a
default receives an empty tensor to write to.

A switch that is not named is taken to be on (allow_neg_eigval: off), unless the function has an attribute of that name:
`prefill.use_qk_l2norm_in_kernel = False` says that q and k must come normalised; so does `state_v_first = False` for
[N, HV, K, V]. A function without A_log gets log decays, so only problems with --gate none.

It returns o [B, T, HV, V], or (o, final_state, ..), of which nothing more is looked at; None if it was given `out`. For
the op `gate` it gets g, A_log, dt_bias, lower_bound, cu_seqlens and chunk_size (64), and returns the fp32 sums.

A function is asked for what engines ask for only where its signature names it; for the two layouts "strided_indices"
and "tail" (tokens behind the last sequence) its attribute `features` does: `prefill.features = {"tail"}`.

The op is that of --op, else the function's attribute `op` ("decode", "prefill" or "gate"), else what its name says:
prefill, chunk_..; decode, .._recurrent_.., .._update; gate_cumsum. Four more attributes may be there:
`supports(problem)`, which returns None, or the reason why the function cannot run a `kda_kernels.problem.Problem`;
`carried_state`, such as "bfloat16", the dtype in which it means to carry states from chunk to chunk although they are
float32: states are judged as such; `causal_in_bits`, that no bit of a result depends on a later token, which the
property `future` then holds it to; and `variants(problem=None)`, which yields what `kda compile` builds, see
`kda_kernels.variant`.
"""

from kdacli.userkernels.kernel import UserKernel
from kdacli.userkernels.resolve import installed, resolve

__all__ = ["UserKernel", "installed", "resolve"]
