"""Every check of a call's tensors, by the message a user reads, and the views that have to pass."""

import dataclasses
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kda_kernels import checks
from kda_kernels.checks import check_gate, check_inputs, problem_of, require_features
from kda_kernels.errors import InputError, UnavailableError, one_line
from kda_kernels.problem import FEATURES, Gate, Op, Options
from kda_kernels.tensors import Checkpoints, Dims, Inputs

H, HV, K, V, T, P = 2, 4, 8, 6, 12, 5
INT = torch.int32


def packed(**changes) -> Inputs:
    """Three sequences of 5, 0 and 7 tokens with a pool of five slots."""
    inputs = Inputs(
        q=torch.randn(1, T, H, K),
        k=torch.randn(1, T, H, K),
        v=torch.randn(1, T, HV, V),
        g=torch.randn(1, T, HV, K),
        beta=torch.randn(1, T, HV),
        options=Options(),
        A_log=torch.randn(HV),
        dt_bias=torch.randn(HV * K),
        state=torch.randn(P, HV, V, K),
        state_indices=torch.tensor([3, 0, -1], dtype=INT),
        cu_seqlens=torch.tensor([0, 5, 5, 12], dtype=INT),
    )
    return dataclasses.replace(inputs, **changes)


def dense(**changes) -> Inputs:
    """Three sequences of four tokens with a plain state."""
    whole = packed()
    rows = {name: getattr(whole, name).unflatten(1, (3, 4))[0] for name in ("q", "k", "v", "g", "beta")}
    plain = {"cu_seqlens": None, "state_indices": None, "state": torch.randn(3, HV, V, K)}
    return dataclasses.replace(whole, **{**rows, **plain, **changes})


def refused(inputs: Inputs, message: str, values: bool | None = None) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_inputs(inputs, values=values)


def test_dims():
    assert check_inputs(packed()) == Dims(B=1, T=T, N=3, H=H, HV=HV, K=K, V=V)
    assert check_inputs(dense()) == Dims(B=3, T=4, N=3, H=H, HV=HV, K=K, V=V)


# --- shapes, dtypes, devices ---------------------------------------------------------------------------------------

SHAPES = [
    ({"q": torch.zeros(T, H, K)}, "q has shape [12, 2, 8]: it should be [B, T, H, K]"),
    ({"k": torch.zeros(1, T, H, 4)}, "k has shape [1, 12, 2, 4]: it should be [B, T, H, K] = [1, 12, 2, 8], as q"),
    ({"v": torch.zeros(1, 11, HV, V)}, "v has shape [1, 11, 4, 6]: it should be [B, T, HV, V] = [1, 12, HV, V], as q"),
    ({"v": torch.zeros(1, T, V)}, "v has shape [1, 12, 6]: it should be [B, T, HV, V]"),
    ({"g": torch.zeros(1, T, H, K)}, "g has shape [1, 12, 2, 8]: it should be [B, T, HV, K] = [1, 12, 4, 8]"),
    ({"beta": torch.zeros(1, T, H)}, "beta has shape [1, 12, 2]: it should be [B, T, HV] = [1, 12, 4], from v"),
    ({"A_log": torch.zeros(H)}, "A_log has shape [2]: it should be [HV] = [4]"),
    ({"dt_bias": torch.zeros(HV)}, "dt_bias has shape [4]: it should be [HV * K] = [32] or [HV, K] = [4, 8]"),
    ({"state": torch.zeros(P, HV, K, V)}, "state has shape [5, 4, 8, 6]: it should be [P, HV, V, K] = [P, 4, 6, 8]"),
    ({"state_v_first": False}, "state has shape [5, 4, 6, 8]: it should be [P, HV, K, V] = [P, 4, 8, 6]"),
    (
        {"state_indices": None},
        "state has shape [5, 4, 6, 8]: it should be [N, HV, V, K] = [3, 4, 6, 8], one for each sequence",
    ),
    (
        {"state_indices": torch.zeros(2, dtype=INT)},
        "state_indices has shape [2]: it should be [N] = [3], one slot for each sequence",
    ),
    ({"state_indices": torch.zeros(3, 1, dtype=INT)}, "state_indices has shape [3, 1]: it should be [N] = [3], one"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=INT)}, "cu_seqlens has shape [2, 2]: it should be of one dimension"),
    ({"cu_seqlens": torch.zeros(0, dtype=INT)}, "cu_seqlens is empty: it should hold N + 1 offsets, at least a 0"),
    ({"state": None}, "state_indices is given without a state: it should come with a state pool"),
    ({"A_log": None}, "A_log is missing: it should be [HV] = [4] for the softplus gate"),
    ({"options": Options(Gate.NONE)}, "A_log is given but the gate is none: it should be left out"),
    ({"options": Options(Gate.NONE), "A_log": None}, "dt_bias is given but the gate is none: it should be left out"),
]
DTYPES = [
    ({"q": torch.zeros(1, T, H, K).double()}, "q is float64: it should be bfloat16 or float16 or float32"),
    ({"k": torch.zeros(1, T, H, K).bfloat16()}, "k is bfloat16: it should be float32, as q"),
    ({"v": torch.zeros(1, T, HV, V).half()}, "v is float16: it should be float32, as q"),
    ({"g": torch.zeros(1, T, HV, K).long()}, "g is int64: it should be bfloat16 or float16 or float32"),
    ({"beta": torch.zeros(1, T, HV).bool()}, "beta is bool: it should be bfloat16 or float16 or float32"),
    ({"A_log": torch.zeros(HV).double()}, "A_log is float64: it should be bfloat16 or float16 or float32"),
    ({"dt_bias": torch.zeros(HV, K).int()}, "dt_bias is int32: it should be bfloat16 or float16 or float32"),
    ({"state": torch.zeros(P, HV, V, K).double()}, "state is float64: it should be bfloat16 or float16 or float32"),
    ({"state_indices": torch.zeros(3)}, "state_indices is float32: it should be int32 or int64"),
    ({"cu_seqlens": torch.zeros(4).short()}, "cu_seqlens is int16: it should be int32 or int64"),
    ({"v": [1.0]}, "v is of type list: it should be a torch.Tensor"),
    ({"g": torch.zeros(1, T, HV, K).to_sparse()}, "g has layout torch.sparse_coo: it should be an ordinary (strided)"),
]


@pytest.mark.parametrize(("changes", "message"), SHAPES + DTYPES, ids=lambda x: x if isinstance(x, str) else "")
def test_shapes_and_dtypes(changes, message):
    refused(packed(**changes), message)


def test_head_counts_and_sizes():
    def sizes(H=1, HV=1, K=1, V=1):
        rows = {"q": (H, K), "k": (H, K), "v": (HV, V), "g": (HV, K), "beta": (HV,)}
        tensors = {name: torch.zeros(1, T, *shape) for name, shape in rows.items()}
        return packed(**tensors, A_log=torch.zeros(HV), dt_bias=None, state=None, state_indices=None)

    refused(sizes(H=2, HV=3), "v has 3 heads: it should have a multiple of the 2 heads of q")
    refused(sizes(HV=0), "v has 0 heads: it should have a multiple of the 1 heads of q")
    refused(sizes(H=0), "q has 0 heads: it should have at least 1")
    refused(sizes(K=257), "q has head size K = 257: it should be 1 to 256")
    refused(sizes(V=0), "v has head size V = 0: it should be 1 to 256")
    assert check_inputs(sizes(K=256, V=1))[3:] == (1, 1, 256, 1)


def test_packed_needs_one_row():
    refused(
        dense(cu_seqlens=torch.tensor([0, 4], dtype=INT)),
        "q has batch size 3: it should be 1 with cu_seqlens, all tokens in one row",
    )


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Inputs) if f.name in packed().tensors()])
def test_devices(name):
    inputs = packed()
    moved = dataclasses.replace(inputs, **{name: getattr(inputs, name).to("meta")})
    if name == "q":
        refused(moved, "k is on cpu: it should be on meta, as q", values=False)
    else:
        refused(moved, f"{name} is on meta: it should be on cpu, as q")


# --- strides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
def test_last_dimension_must_be_contiguous(name):
    t = getattr(packed(), name)
    spread = torch.empty(*t.shape, 2)[..., 0]
    refused(packed(**{name: spread}), f"{name} has stride 2 in its last dimension: it should be 1")


@pytest.mark.parametrize("name", ["A_log", "dt_bias", "cu_seqlens"])
def test_small_vectors_must_be_contiguous(name):
    t = getattr(packed(), name)
    spread = torch.stack([t, t], -1)[:, 0]
    refused(packed(**{name: spread}), f"{name} has strides [2]: it should be contiguous; call .contiguous() on it")


def test_strided_views_that_work():
    row = torch.randn(1, T, 2 * H * K + HV * V + HV * K + HV + 3)
    q, k, v, g, beta, _ = row.split([H * K, H * K, HV * V, HV * K, HV, 3], -1)
    views = {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "g": g.unflatten(-1, (HV, K)),
        "beta": beta,
    }
    assert check_inputs(packed(**views)).T == T
    assert check_inputs(packed(q=torch.randn(1, 1, H, K).expand(1, T, H, K))).T == T
    assert check_inputs(packed(q=torch.randn(1, H, T, K).transpose(1, 2))).T == T
    assert check_inputs(packed(beta=torch.randn(1, HV, T).transpose(1, 2))).T == T
    assert check_inputs(packed(A_log=torch.randn(1, 1, HV, 1), dt_bias=torch.randn(HV, K))).T == T


def test_pool_strides():
    size = HV * V * K
    gaps = torch.randn(P, size + 7)[:, :size].view(P, HV, V, K)
    assert check_inputs(packed(state=gaps)).N == 3
    assert check_inputs(packed(state=torch.randn(P, 2, HV, V, K)[:, 1])).N == 3
    inner = "its last three dimensions should be contiguous; only the stride between slots is free"
    refused(packed(state=torch.randn(P, HV, K, V).mT), f"state has strides [192, 48, 1, 6]: {inner}")
    refused(packed(state=torch.randn(P, 2 * HV, V, K)[:, ::2]), f"state has strides [384, 96, 8, 1]: {inner}")
    shared = f"it should be at least HV * V * K = {size}, so that no two slots of the pool share memory"
    refused(packed(state=torch.randn(1, HV, V, K).expand(P, -1, -1, -1)), f"state has stride 0 between slots: {shared}")
    half = torch.randn(P * size).as_strided((P, HV, V, K), (size // 2, V * K, K, 1))
    refused(packed(state=half), f"state has stride {size // 2} between slots: {shared}")


def test_a_plain_state_is_only_read_so_its_rows_may_share_memory():
    assert check_inputs(dense(state=torch.randn(1, HV, V, K).expand(3, -1, -1, -1))).N == 3


# --- values --------------------------------------------------------------------------------------------------------

VALUES = [
    ("cu_seqlens", [1, 5, 5, 12], "cu_seqlens starts at 1: it should start at 0"),
    ("cu_seqlens", [0, 9, 5, 12], "cu_seqlens falls from 9 to 5 (at position 2): it should never decrease"),
    ("cu_seqlens", [0, 5, 5, 13], "cu_seqlens ends at 13: it should end at T = 12, the number of tokens"),
    (
        "state_indices",
        [1, 0, 7],
        "state_indices holds 7 (at position 2): it should be negative or a slot of the pool, 0 to 4",
    ),
    ("state_indices", [1, 0, 1], "state_indices holds 1 twice (at positions 0 and 2): each slot should belong to one"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("name", "held", "message"), VALUES)
def test_values(name, held, message, dtype):
    wrong = packed(**{name: torch.tensor(held, dtype=dtype)})
    refused(wrong, message)
    refused(wrong, message, values=True)
    assert check_inputs(wrong, values=False).N == 3


def test_padding_may_repeat_and_a_pool_may_be_empty():
    none = torch.tensor([-1, -1, -7])
    assert check_inputs(packed(state_indices=none)).N == 3
    no_slots = torch.zeros(0, HV, V, K)
    assert check_inputs(packed(state_indices=none, state=no_slots)).N == 3
    refused(
        packed(state=no_slots), "state_indices holds 3 (at position 0): it should be negative or a slot of the pool, of"
    )


@pytest.mark.gpu
def test_values_on_a_gpu_are_read_on_request_only(monkeypatch):
    wrong = packed(state_indices=torch.tensor([1, 0, 7], dtype=INT)).to("cuda")
    monkeypatch.setattr(checks, "CHECK_VALUES", None)
    assert check_inputs(wrong).N == 3
    refused(wrong, "state_indices holds 7", values=True)
    monkeypatch.setattr(checks, "CHECK_VALUES", "1")
    refused(wrong, "state_indices holds 7")


def test_shape_checks_call_no_operator():
    """They run on every eager call, and an operator would cost a multiple of all of them."""
    called = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    inputs = packed()
    with Seen():
        check_inputs(inputs, values=False)
        assert not called
        inputs.q.clone()
    assert called


# --- check_gate ----------------------------------------------------------------------------------------------------

GATES = [
    ({"lower_bound": None, "gate": Gate.SAFE}, "lower_bound is None: it should be negative, such as -5.0"),
    ({"lower_bound": 5.0, "gate": Gate.SAFE}, "lower_bound is 5.0: it should be negative, such as -5.0"),
    ({"g": torch.zeros(T, HV, K)}, "g has shape [12, 4, 8]: it should be [B, T, HV, K]"),
    ({"g": torch.zeros(1, T, HV, 257)}, "g has shape [1, 12, 4, 257]: it should be [B, T, HV, K] with at least 1 head"),
    ({"g": torch.zeros(1, T, HV, K).double()}, "g is float64: it should be bfloat16 or float16 or float32"),
    ({"g": torch.zeros(1, T, K, HV).mT}, "g has stride 4 in its last dimension: it should be 1"),
    ({"A_log": None}, "A_log is missing: it should be [HV] = [4] for the softplus gate"),
    ({"A_log": torch.zeros(HV, device="meta")}, "A_log is on meta: it should be on cpu, as g"),
    ({"dt_bias": torch.zeros(3)}, "dt_bias has shape [3]: it should be [HV * K] = [32] or [HV, K] = [4, 8]"),
    ({"gate": Gate.NONE}, "A_log is given but the gate is none: it should be left out"),
    ({"g": torch.zeros(2, T, HV, K)}, "g has batch size 2: it should be 1 with cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5: it should end at T = 12, the number of tokens"),
    ({"out": torch.zeros(1, T, HV, K).half()}, "out is float16: it should be float32"),
    ({"out": torch.zeros(1, T, HV, 4)}, "out has shape [1, 12, 4, 4]: it should be [1, 12, 4, 8], as g"),
    ({"out": torch.zeros(1, HV, T, K).transpose(1, 2)}, "out has strides [384, 8, 96, 1]: it should be contiguous"),
]


@pytest.mark.parametrize(("changes", "message"), GATES, ids=lambda x: x if isinstance(x, str) else "")
def test_check_gate(changes, message):
    inputs = packed()
    good = {name: getattr(inputs, name) for name in ("g", "A_log", "dt_bias", "cu_seqlens")}
    good |= {"gate": Gate.SOFTPLUS, "out": torch.zeros(1, T, HV, K)}
    check_gate(**good)
    with pytest.raises(InputError, match=re.escape(message)):
        check_gate(**{**good, **changes})


def test_check_gate_of_log_decays_and_without_parameters():
    check_gate(torch.zeros(2, T, HV, K), None, None, gate=Gate.NONE)
    check_gate(torch.zeros(2, T, HV, K), None, None, gate=Gate.SAFE, lower_bound=-5.0)


# --- problem_of ----------------------------------------------------------------------------------------------------


def test_problem_of_packed():
    problem = problem_of(packed(g=torch.zeros(1, T, HV, K).bfloat16()), Op.PREFILL)
    assert problem.op is Op.PREFILL
    assert (problem.seq_lens, problem.packed, problem.N) == ((5, 0, 7), True, 3)
    assert (problem.H, problem.HV, problem.K, problem.V) == (H, HV, K, V)
    assert (problem.dtype, problem.g_dtype, problem.state_dtype) == ("float32", "bfloat16", "float32")
    assert (problem.pool_slots, problem.padding, problem.initial_state) == (P, 1, True)


def test_problem_of_dense():
    inputs = dense(A_log=None, dt_bias=torch.zeros(HV, K).half(), options=Options(Gate.SAFE, lower_bound=-5.0))
    problem = problem_of(dataclasses.replace(inputs, state=None, output_final_state=False), Op.DECODE)
    assert (problem.seq_lens, problem.packed) == ((4, 4, 4), False)
    assert (problem.param_dtype, problem.pool_slots, problem.padding) == ("float16", None, 0)
    assert (problem.initial_state, problem.final_state) == (False, False)
    assert problem.options == inputs.options


def test_problem_of_checks_values_first():
    with pytest.raises(InputError, match="cu_seqlens ends at 13"):
        problem_of(packed(cu_seqlens=torch.tensor([0, 5, 5, 13])), Op.PREFILL)


def test_problem_of_names_the_features():
    used = problem_of(packed(**DRAFT, update_state=False, cu_seqlens=torch.tensor([0, 2, 2, 4])), Op.DECODE)
    assert used.features == {"num_accepted_tokens", "update_state", "tail"}
    assert problem_of(packed(null_slot=0, state_indices=torch.tensor([0, 3, 0])), Op.DECODE).padding == 2
    assert type(used).from_dict(used.to_dict()) == used
    with pytest.raises(InputError, match="features holds nonsense"):
        dataclasses.replace(used, features={"nonsense"})


# --- features ------------------------------------------------------------------------------------------------------

ONES = torch.ones(3, dtype=INT)
DRAFT = {"state_indices": torch.tensor([[0, 1], [2, 3], [-1, 4]]), "num_accepted_tokens": torch.tensor([1, 2, 1])}
KEEP = Checkpoints(torch.zeros(4, HV, V, K), torch.tensor([0, -1, 3]), torch.tensor([64, 0, 128]))


def keep(**changes) -> dict[str, Checkpoints]:
    return {"checkpoints": dataclasses.replace(KEEP, **changes)}


BUFFER = {"token_states": torch.zeros(4, 7, HV, V, K), "token_state_indices": torch.tensor([3, -1, 0])}
DENSE_STATES = torch.zeros(1, T, HV, V, K)
USED = [
    {"null_slot": 0},
    {"has_initial_state": torch.tensor([True, False, True])},
    {**DRAFT, "cu_seqlens": torch.tensor([0, 2, 2, 4])},
    {"update_state": False},
    {"token_states": DENSE_STATES},
    {"token_states": DENSE_STATES.half()},
    BUFFER,
    keep(),
    keep(offsets=None, every=64, rows=torch.tensor([[0, 1], [2, 3], [-1, -1]])),
    {"batch_invariant": True},
    {"workspace": torch.zeros(9, dtype=torch.uint8)},
    {"state_indices": torch.tensor([3, 9, 0, 9, -1, 9])[::2]},
]


@pytest.mark.parametrize("changes", USED, ids=lambda changes: "+".join(changes))
def test_features_are_seen_and_asked_for(changes):
    inputs = packed(**changes)
    assert check_inputs(inputs).N == 3
    used = {name for name in changes if name in FEATURES} or {"strided_indices"}
    assert inputs.features() == used
    require_features(inputs, FEATURES, "kernel")
    with pytest.raises(InputError, match=f"^{min(used)} is used: kernel does not support it"):
        require_features(inputs, FEATURES - used, "kernel")


def test_tokens_behind_the_last_sequence():
    inputs = packed(cu_seqlens=torch.tensor([0, 5, 5, 11]))
    assert check_inputs(inputs).T == T


def test_more_slots_than_sequences_are_the_rest_of_a_buffer():
    assert check_inputs(packed(state_indices=torch.tensor([3, 0, -1, 3, 99]))).N == 3


WRONG_FEATURES = [
    ({"state_indices": None, "state": None, "null_slot": 0}, "null_slot is given without a state pool: it should"),
    ({"state_indices": None, "state": None, "update_state": False}, "update_state is False without a state pool"),
    ({"state_indices": None, "state": None, "has_initial_state": ONES.bool()}, "has_initial_state is given without a"),
    ({"has_initial_state": ONES}, "has_initial_state is int32: it should be bool"),
    ({"has_initial_state": ONES[:2].bool()}, "has_initial_state has shape [2]: it should be [N] = [3], one for each"),
    ({"num_accepted_tokens": ONES}, "state_indices has shape [3]: it should be [N, C] = [3, C], slots for each"),
    ({**DRAFT, "num_accepted_tokens": ONES.float()}, "num_accepted_tokens is float32: it should be int32 or int64"),
    ({**DRAFT, "num_accepted_tokens": 0 * ONES}, "num_accepted_tokens holds 0 (at position 0): it should be 1 to 2"),
    (DRAFT, "state_indices has 2 columns: it should have a column for each of 7 tokens"),
    (
        {**DRAFT, "cu_seqlens": torch.tensor([0, 2, 4, 4]), "state_indices": torch.tensor([[0, 1], [2, 0], [-1, 4]])},
        "state_indices holds 0 twice (at positions 0 and 1): each slot should belong to one sequence",
    ),
    ({"token_state_indices": ONES}, "token_state_indices is given without token_states: it should name rows of them"),
    ({"token_states": DENSE_STATES[:, 1:]}, "token_states has shape [1, 11, 4, 6, 8]: it should be [1, 12, 4, 6, 8]"),
    ({"token_states": DENSE_STATES.double()}, "token_states is float64: it should be bfloat16 or float16 or float32"),
    ({"token_states": DENSE_STATES.to("meta")}, "token_states is on meta: it should be on cpu, as q"),
    (
        {"token_states": torch.zeros(1, T, HV, K, V).mT},
        "token_states has strides [2304, 192, 48, 1, 6]: it should be contiguous from HV on",
    ),
    (
        {**BUFFER, "token_states": torch.zeros(4, 6, HV, V, K)},
        "token_states has S = 6 rows per sequence: it should have",
    ),
    ({**BUFFER, "token_state_indices": 4 * ONES}, "token_state_indices holds 4: it should be negative or a row, of"),
    ({**BUFFER, "token_state_indices": ONES}, "token_state_indices holds 1 twice: each row should be written once"),
    (keep(rows=torch.zeros(2, dtype=INT)), "checkpoints.rows has shape [2]: it should be [N] = [3] or [N, C]"),
    (keep(every=64), "checkpoints has both of offsets and every: it should have one of them"),
    (keep(offsets=None), "checkpoints has neither of offsets and every: it should have one of them"),
    (keep(offsets=None, every=32), "checkpoints.every is 32: it should be a multiple of 64"),
    (keep(offsets=torch.tensor([64, 0, 65])), "checkpoints.offsets holds 65: they should be multiples of 64"),
    (keep(offsets=torch.zeros(3, 2, dtype=INT)), "checkpoints.offsets has shape [3, 2]: it should be [3], as"),
    (keep(rows=torch.tensor([0, -1, 4])), "checkpoints.rows holds 4: it should be negative or a row, of which there"),
    (keep(states=torch.zeros(4, HV, K, V)), "checkpoints.states has shape [4, 4, 8, 6]: it should be [R, HV, V, K]"),
    ({"workspace": torch.zeros(9)}, "workspace is float32: it should be uint8"),
    ({"cu_seqlens_cpu": torch.tensor([0, 5, 6, 12])}, "cu_seqlens_cpu differs from cu_seqlens: it should be the same"),
    ({"cu_seqlens_cpu": torch.tensor([0, 5, 12])}, "cu_seqlens_cpu has shape [3]: it should be [4], as cu_seqlens"),
    ({"cu_seqlens_cpu": torch.zeros(4)}, "cu_seqlens_cpu is float32: it should be int32 or int64"),
    ({"cu_seqlens_cpu": torch.zeros(4, dtype=INT, device="meta")}, "cu_seqlens_cpu is on meta: it should be on cpu"),
    ({"cu_seqlens_cpu": [0, 5, 5, 12]}, "cu_seqlens_cpu is of type list: it should be a torch.Tensor"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_FEATURES, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_features(changes, message):
    refused(packed(**changes), message)


def test_null_slot_may_repeat_and_what_a_sequence_stores_to_its_own_slots_too():
    assert check_inputs(packed(null_slot=2, state_indices=torch.tensor([2, 0, 2]))).N == 3
    same = torch.tensor([[0, 0], [2, 3], [-1, 3]])
    assert check_inputs(packed(**{**DRAFT, "state_indices": same}, cu_seqlens=torch.tensor([0, 2, 2, 4]))).N == 3


def test_copies_keep_a_pool_that_checkpoints_go_to_one_tensor():
    inputs = packed()
    inputs.checkpoints = Checkpoints(inputs.state, torch.tensor([1, 2, 4]), every=64)
    for copy in (inputs.fresh(), inputs.map(torch.clone)):
        assert copy.checkpoints.states is copy.state is not inputs.state


# --- errors --------------------------------------------------------------------------------------------------------


def test_an_input_error_has_fields_and_can_be_renamed():
    error = InputError("state", "is missing", "it should be a tensor")
    assert (error.argument, error.found, error.wanted) == ("state", "is missing", "it should be a tensor")
    assert str(error.renamed({"state": "initial_state"})) == "initial_state is missing: it should be a tensor"
    assert str(error.renamed({"q": "x"})) == str(pickle.loads(pickle.dumps(error))) == str(error)
    text = InputError("state of the art: none")
    assert text.argument is None and str(text.renamed({"state": "x"})) == "state of the art: none"


def test_one_line():
    assert one_line(ValueError("a\n  b")) == "ValueError: a b" and one_line(UnavailableError("a\nb")) == "a b"
    assert one_line(KeyError()) == "KeyError" and one_line("abc\tdefg", 7) == "abc ..."
