"""What a peer declares to support, as data; and the first thing about a problem that it does not.

Each adapter holds one `Contract`, written down from the peer's own documentation, checks and compile-time types. What
is refused here never runs, so whatever does run and comes out wrong is the peer's error.
"""

import dataclasses
from collections.abc import Iterator

from kda_kernels.dtypes import FLOATS, STATES
from kda_kernels.problem import CONV_WIDTHS, Gate, Parts, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """One kernel's declared support.

    Attributes:
        dtypes, g_dtypes, beta_dtypes, param_dtypes, state_dtypes: names as in `Problem`, after what its adapter
            converts without loss.
        K: sizes of a key head. V_multiple: V is a multiple of it; square: V = K as well.
        grouped_heads: HV may exceed H. heads: the numbers of query/key heads that it has; None: any.
        gates: activations it has. least_bound: the lowest lower_bound.
        beta_values: takes beta activated, too. neg_eigval: has 2 * sigmoid.
        l2norm: values of the option that it has. any_scale: else K ** -0.5 only.
        k_first: takes [.., K, V] states, too.
        one_token: every sequence has exactly one token.
        carried_state: what it says that it carries states in from chunk to chunk, where that is less than their own
            dtype; states are judged as such.
        rounded_convolution: its convolution is a kernel of its own, which rounds what it gives to the dtype of q, k
            and v; results are judged as such.
        plain_state: takes a state that is not modified. pool: takes a pool, itself or through its adapter.
        padding: takes negative state indices.
        features: what it has of `kda_kernels.problem.FEATURES`.
        conv_widths, conv_dtypes, conv_state_dtypes: of a convolution: tokens it looks at, and dtypes of its weight and
            of its states; 0 among the widths: it does without one.
        aligned: names of the tensors whose addresses should be multiples of 16 bytes. A `Problem` says nothing of
            addresses: the adapter refuses them when it runs, by `given.require_aligned`.
        why: reasons to print in place of the plain ones: (field, reason).
    """

    dtypes: tuple[str, ...] = ("bfloat16",)
    g_dtypes: tuple[str, ...] = ("bfloat16",)
    beta_dtypes: tuple[str, ...] = ("bfloat16",)
    param_dtypes: tuple[str, ...] = tuple(FLOATS)
    state_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    carried_state: str | None = None
    rounded_convolution: bool = False
    K: tuple[int, ...] = (128,)
    V_multiple: int = 1
    square: bool = False
    grouped_heads: bool = True
    heads: tuple[int, ...] | None = None
    gates: tuple[Gate, ...] = tuple(Gate)
    least_bound: float | None = None
    beta_values: bool = False
    neg_eigval: bool = False
    l2norm: tuple[bool, ...] = (True,)
    any_scale: bool = True
    k_first: bool = False
    one_token: bool = False
    plain_state: bool = True
    pool: bool = True
    padding: bool = False
    features: frozenset[str] = frozenset()
    conv_widths: tuple[int, ...] = (0, *CONV_WIDTHS)
    conv_dtypes: tuple[str, ...] = tuple(FLOATS)
    conv_state_dtypes: tuple[str, ...] = tuple(FLOATS)
    aligned: tuple[str, ...] = ()
    why: tuple[tuple[str, str], ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """The first thing about `problem` that the kernel does not declare to support; None if there is none."""
        return next(self.refusals(problem), None)

    def refusals(self, problem: Problem) -> Iterator[str]:
        """Everything about `problem` that the kernel does not declare to support."""
        yield from self._dtypes(problem)
        yield from self._shapes(problem)
        yield from self._options(problem)
        yield from self._state(problem)
        if problem.parts is not None:
            yield from self._convolution(problem.parts)

    def _dtypes(self, problem: Problem) -> Iterator[str]:
        raw = problem.options.gate is not Gate.NONE
        for field, tensors, have in (
            ("dtypes", "q, k and v are", problem.dtype),
            ("g_dtypes", "g is", problem.g_dtype),
            ("beta_dtypes", "beta is", problem.beta_dtype),
            *((("param_dtypes", "A_log and dt_bias are", problem.param_dtype),) if raw else ()),
        ):
            if have not in (takes := getattr(self, field)):
                yield self._because(field, f"{tensors} {FLOATS[have].short}: it takes {_names(takes)}")

    def _shapes(self, problem: Problem) -> Iterator[str]:
        if problem.K not in self.K:
            yield f"K is {problem.K}: it takes {' or '.join(map(str, self.K))}"
        if self.heads is not None and problem.H not in self.heads:
            yield f"H is {problem.H}: it is compiled for {' or '.join(map(str, self.heads))}"
        if self.square and problem.V != problem.K:
            yield f"V is {problem.V}: it takes V = K only"
        if problem.V % self.V_multiple:
            yield f"V is {problem.V}: it takes multiples of {self.V_multiple}"
        if problem.HV != problem.H and not self.grouped_heads:
            yield self._because("grouped_heads", "it has no grouped heads: HV should be H")
        if problem.T == 0:
            yield "there are no tokens"
        if self.one_token and set(problem.seq_lens) != {1}:
            yield "it takes exactly one token per sequence"

    def _options(self, problem: Problem) -> Iterator[str]:
        options, bound, least = problem.options, problem.options.lower_bound, self.least_bound
        if options.gate not in self.gates:
            yield f"the gate is {options.gate}: it has {' or '.join(self.gates)} only"
        elif options.gate is Gate.SAFE and bound is not None and least is not None and bound < least:
            yield f"lower_bound is {bound}: it takes {least} or more"
        if not options.beta_is_logit and not self.beta_values:
            yield "it takes beta as a logit only"
        if options.allow_neg_eigval and not self.neg_eigval:
            yield self._because("neg_eigval", "it has no allow_neg_eigval")
        if options.qk_l2norm not in self.l2norm:
            yield "it always normalises q and k" if not options.qk_l2norm else "it does not normalise q and k"
        if not self.any_scale and not problem.has_usual_scale:
            yield f"scale is {problem.scale}: it has K ** -0.5 built in"

    def _state(self, problem: Problem) -> Iterator[str]:
        pooled = problem.pool_slots is not None
        stateful = pooled or problem.initial_state or problem.final_state
        if stateful and not problem.state_v_first and not self.k_first:
            yield "it takes V-first states only"
        # without an incoming state the final one is asked for in fp32
        dtype = problem.state_dtype if pooled or problem.initial_state else "float32"
        if stateful and dtype not in self.state_dtypes:
            yield f"the state is {STATES[dtype].short}: it takes {_names(self.state_dtypes)}"
        if pooled and not self.pool:
            yield "it has no state pool"
        if not pooled and not self.plain_state:
            yield "it updates a state pool in place, and nothing else"
        if problem.padding and not self.padding:
            yield self._because("padding", "it has no padding rows (index -1)")

    def _convolution(self, parts: Parts) -> Iterator[str]:
        if parts.width not in self.conv_widths:
            found = f"has width {parts.width}" if parts.width else "is missing"
            yield f"the convolution {found}: it takes {' or '.join(map(str, self.conv_widths))}"
        for what, dtype, takes in (
            ("weight", parts.weight_dtype, self.conv_dtypes),
            ("states", parts.state_dtype, self.conv_state_dtypes),
        ):
            if parts.width and dtype not in takes:
                yield f"the {what} of the convolution: {FLOATS[dtype].short}, where it takes {_names(takes)}"

    def _because(self, field: str, plain: str) -> str:
        return dict(self.why).get(field, plain)


def _names(dtypes: tuple[str, ...]) -> str:
    return " or ".join(FLOATS[name].short for name in dtypes)
