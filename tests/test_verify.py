"""`kda verify`: good kernels pass, every kind of broken kernel fails with exit 1 and its case named."""

import dataclasses
import itertools
import json
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from click.testing import CliRunner, Result

from kda_kernels import registry
from kda_kernels.problem import FEATURES, Gate, Op, Problem
from kda_kernels.reference import oracle, plain_chunk, plain_recurrent
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs
from kdacli import dumps
from kdacli.judge import expect
from kdacli.main import cli
from kdacli.poisoned import poisoned_memory
from kdacli.synthetic import make_inputs
from kdacli.verify.cases.suites import cases_for, suite
from kdacli.verify.checks.check import Bench, check
from kdacli.verify.checks.continuity import PrefillThenDecode
from kdacli.verify.checks.guards import ZONE
from kdacli.verify.checks.memory import modified, own_memory
from kdacli.verify.properties import PROPERTIES
from kdacli.verify.transforms import TRANSFORMS
from kdacli.verify.transforms.layouts import far_pool

Run = Callable[[Inputs], Outputs]
CASES = suite("quick")
GOOD = {Op.PREFILL: plain_chunk.run, Op.DECODE: plain_recurrent.run}


def kda(*args: str) -> Result:
    """Shrinking has tests of its own, and takes time."""
    return CliRunner(env={"COLUMNS": "160"}).invoke(cli, ["verify", "--device", "cpu", "--shrink", "0", *args])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Kernel]:
    """Registers a kernel for one test: kernel(op, run, unsupported=..., name=...)."""

    def add(op: Op, run: Run, unsupported=lambda problem: None, name: str = "mine", ours: bool = True) -> Kernel:
        module = types.ModuleType(f"kernel_of_a_test_{name}")
        module.run, module.unsupported, module.FEATURES = run, unsupported, FEATURES - {"batch_invariant"}
        monkeypatch.setitem(sys.modules, module.__name__, module)
        made = Kernel(name, op, "test", module.__name__, "a kernel of a test", ours)
        monkeypatch.setitem(registry._KERNELS, name, made)
        return made

    return add


def statuses(result: Result) -> dict[str, str]:
    """Status by case, of a run with --json -."""
    return {row["case"]: row["status"] for row in json.loads(result.stdout)["rows"]}


# --- good kernels pass


@pytest.mark.parametrize("name", ["torch-prefill", "torch-decode"])
def test_plain_kernels_pass_every_case(name):
    result = kda("--kernel", name, "--verbose")
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    assert {line.split(": ")[-1] for line in result.output.splitlines() if "refused:" in line} == {
        "there is no GPU",
        "it does not support batch_invariant",
    }
    cases = [case for case in cases_for("cpu") if case.problem.op == registry.get(name).op]
    assert f"{len(cases)} checks: {len(cases)} passed" in result.output
    assert all(case.name in result.output for case in cases)


@pytest.mark.parametrize(
    ("kernel_name", "case"),
    [
        ("triton-decode", "decode-grouped"),
        ("triton-decode", "decode-pool-gaps"),
        ("triton-decode", "decode-mixed-dtypes"),
        ("triton-prefill", "prefill-pool"),
        ("triton-prefill", "prefill-conv-fp32"),
        ("triton-prefill", "prefill-cut-off"),
        ("triton-prefill", "prefill-then-decode"),
        ("triton-gate", "gate-row-strided"),
    ],
)
def test_triton_kernels_pass(kernel_name, case):
    result = kda("--kernel", kernel_name, "--case", case, "--device", "auto")
    assert result.exit_code == 0, result.output
    assert "1 check: 1 passed" in result.output
    assert ("its convolution rounds" in result.output) == ("conv" in case)


def test_shape_flags_take_the_place_of_the_table():
    result = kda("--kernel", "torch-prefill", "--lens", "65,0,7", "-H", "1", "--head-dim", "32", "--json", "-")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["status"] == "pass" and row["case"].startswith("prefill N=3 T=72 H=1")


def test_a_dump_takes_the_place_of_the_table(tmp_path, kernel):
    inputs = make_inputs(Problem(Op.DECODE, (1, 1), H=1, HV=1, K=16, V=16))
    dumps.save(tmp_path / "d.pt", inputs, None, op=Op.DECODE)
    assert kda("--dump", str(tmp_path / "d.pt"), "--kernel", "torch-decode").exit_code == 0
    kernel(Op.DECODE, lambda inputs: broken_scale(inputs, plain_recurrent.run))
    result = kda("--dump", str(tmp_path / "d.pt"), "--kernel", "mine")
    assert result.exit_code == 1 and "kda verify --device cpu --shrink 0 --dump d.pt --kernel mine" in result.output


# --- broken kernels fail


def broken_scale(inputs: Inputs, good: Run) -> Outputs:
    outputs = good(inputs)
    return dataclasses.replace(outputs, o=outputs.o * 1.02)


def broken_bias(inputs: Inputs, good: Run) -> Outputs:
    return good(dataclasses.replace(inputs, dt_bias=None))


def broken_tail(inputs: Inputs, good: Run) -> Outputs:
    """Tokens after the last whole chunk of the tensor are left as they were allocated."""
    outputs = good(inputs)
    o = torch.empty_like(outputs.o)
    whole = o.shape[1] // 64 * 64
    o[:, :whole] = outputs.o[:, :whole]
    return dataclasses.replace(outputs, o=o)


def broken_contiguity(inputs: Inputs, good: Run) -> Outputs:
    """q is read as if its rows were contiguous."""
    q = inputs.q
    strides = torch.empty(q.shape).stride()
    return good(dataclasses.replace(inputs, q=q.as_strided(q.shape, strides).nan_to_num()))


def broken_input(inputs: Inputs, good: Run) -> Outputs:
    outputs = good(inputs)
    inputs.g.zero_()
    return outputs


def broken_copy(inputs: Inputs, good: Run) -> Outputs:
    """A pool that is not contiguous is updated in a copy."""
    state = None if inputs.state is None else inputs.state.contiguous()
    return good(dataclasses.replace(inputs, state=state))


def broken_padding(inputs: Inputs, good: Run) -> Outputs:
    """Padding rows write to slot -1, which Python and some kernels take for the last one."""
    outputs = good(inputs)
    if inputs.state_indices is not None and bool((inputs.state_indices < 0).any()):
        inputs.state[-1] = 0.0
    return outputs


def broken_gap(inputs: Inputs, good: Run) -> Outputs:
    """Writes one element past each slot."""
    outputs = good(inputs)
    if inputs.state_indices is not None and inputs.state.stride(0) > inputs.state[0].numel():
        size = inputs.state[0].numel()
        inputs.state.as_strided((1,), (1,), inputs.state.storage_offset() + size).zero_()
    return outputs


def broken_layout(inputs: Inputs, good: Run) -> Outputs:
    """A K-first state is taken for a V-first one where the sizes allow it."""
    square = inputs.q.shape[-1] == inputs.v.shape[-1]
    return good(dataclasses.replace(inputs, state_v_first=inputs.state_v_first or square))


def broken_groups(inputs: Inputs, good: Run) -> Outputs:
    """Value head h reads query head h % H instead of h // (HV / H)."""
    repeat = inputs.v.shape[2] // inputs.q.shape[2]
    return good(dataclasses.replace(inputs, q=inputs.q.repeat(1, 1, repeat, 1), k=inputs.k.repeat(1, 1, repeat, 1)))


def broken_eigval(inputs: Inputs, good: Run) -> Outputs:
    return good(dataclasses.replace(inputs, options=dataclasses.replace(inputs.options, allow_neg_eigval=False)))


def broken_overflow(inputs: Inputs, good: Run) -> Outputs:
    """Divides by the decay of a token, which can underflow."""
    outputs = good(inputs)
    if inputs.options.gate is Gate.NONE:
        tiny = inputs.g.float().exp().amin(dim=(-1,), keepdim=True)
        outputs = dataclasses.replace(outputs, o=(outputs.o * tiny / tiny).to(outputs.o.dtype))
    return outputs


_calls = itertools.count()


def broken_race(inputs: Inputs, good: Run) -> Outputs:
    """The last bit of an element depends on when it is called."""
    outputs = good(inputs)
    if next(_calls) % 2 and outputs.o.numel():
        first = outputs.o.view(-1)[:1]
        first.copy_(first.nextafter(first + 1))
    return outputs


def broken_dtype(inputs: Inputs, good: Run) -> Outputs:
    outputs = good(inputs)
    return dataclasses.replace(outputs, o=outputs.o.float())


def broken_state(inputs: Inputs, good: Run) -> Outputs:
    """The final state is never returned."""
    return dataclasses.replace(good(inputs), final_state=None)


@pytest.mark.parametrize(
    ("op", "fault", "caught_by", "word"),
    [
        (Op.PREFILL, broken_scale, "prefill-lengths", "relative error"),
        (Op.DECODE, broken_scale, "decode-fp16", "relative error"),
        (Op.PREFILL, broken_bias, "prefill-kimi-linear", "relative error"),
        (Op.DECODE, broken_bias, "decode-kimi-k3", "relative error"),
        (Op.PREFILL, broken_tail, "prefill-fp32", "NaN, first at sequence 0, token 64"),
        (Op.PREFILL, broken_contiguity, "prefill-row-strided", "relative error"),
        (Op.DECODE, broken_contiguity, "decode-head-strided", "relative error"),
        (Op.DECODE, broken_input, "decode-fp32", "g was modified"),
        (Op.PREFILL, broken_copy, "prefill-pool", "relative error"),
        (Op.DECODE, broken_copy, "decode-pool-gaps", "relative error"),
        (Op.DECODE, broken_padding, "decode-kimi-k3", "slot"),
        (Op.DECODE, broken_gap, "decode-pool-gaps", "memory between the slots of the pool was modified"),
        (Op.DECODE, broken_layout, "decode-k-first-pool", "relative error"),
        (Op.PREFILL, broken_layout, "prefill-k-first-pool", "relative error"),
        (Op.DECODE, broken_groups, "decode-grouped", "blocks are off"),
        (Op.PREFILL, broken_groups, "prefill-grouped", "blocks are off"),
        (Op.PREFILL, broken_eigval, "prefill-neg-eigval", "relative error"),
        (Op.DECODE, broken_overflow, "decode-cut-off", "NaN"),
        (Op.DECODE, broken_race, "decode-fp32", "other bits of o"),
        (Op.PREFILL, broken_dtype, "prefill-fp16", "o is torch.float32: it should be torch.float16"),
        (Op.PREFILL, broken_state, "prefill-weak-gates", "missing"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_kernel_fails_and_the_case_is_named(kernel, op, fault, caught_by, word):
    kernel(op, lambda inputs: fault(inputs, GOOD[op]))
    result = kda("--kernel", "mine", "--op", str(op), "--case", caught_by)
    assert result.exit_code == 1, result.output
    assert f"FAIL {caught_by}, mine" in result.stdout and word in result.stdout
    assert f"kda verify --case {caught_by} --kernel mine --seed 0 --device cpu" in result.stdout
    assert result.stderr == f"Error: mine failed {caught_by}\n"


def test_a_run_without_arguments_finds_a_broken_kernel(kernel, monkeypatch):
    """The broken kernel beside the good ones, on a few cases of each op, and without Triton's: tests above run all."""
    few = [case for op in Op for case in cases_for("cpu", op=op)[:4]]
    monkeypatch.setattr("kdacli.verify.selection.cases_for", lambda *which: few)
    kernel(Op.DECODE, lambda inputs: broken_scale(inputs, plain_recurrent.run))
    unsupported = registry.Kernel.unsupported

    def but_tritons(self, *problem):
        return "left out" if self.backend == "triton" else unsupported(self, *problem)

    monkeypatch.setattr(registry.Kernel, "unsupported", but_tritons)
    result = kda("--workers", "1")  # no other process knows the kernel of this test
    decode = [case.name for case in few if case.problem.op is Op.DECODE]
    assert result.exit_code == 1, result.output
    assert f"mine failed {decode[0]} (and {len(decode) - 1} more)" in result.stderr
    assert result.stdout.count("FAIL decode-") == len(decode)
    assert "FAIL prefill" not in result.stdout and "torch-prefill" in result.stdout


def test_a_kernel_that_drops_the_state_between_prefill_and_decode_fails(kernel, monkeypatch):
    def forgetful(inputs: Inputs) -> Outputs:
        if inputs.state_indices is not None:
            inputs.state[inputs.state_indices.long()] = 0.0
        return plain_recurrent.run(inputs)

    kernel(Op.PREFILL, plain_chunk.run, name="p")
    kernel(Op.DECODE, forgetful, name="d")
    result = kda("--kernel", "p", "--case", "prefill-then-decode")
    assert result.exit_code == 1 and "FAIL prefill-then-decode, p+decode" in result.stdout


# --- kernels that raise, refuse, or are not there


def test_an_exception_is_one_line_and_the_next_case_runs(kernel):
    def run(inputs: Inputs) -> Outputs:
        if inputs.q.dtype is torch.float16:
            raise RuntimeError("illegal memory access\nsecond line")
        return plain_recurrent.run(inputs)

    kernel(Op.DECODE, run)
    result = kda("--kernel", "mine")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "RuntimeError: illegal memory access second line" in result.stdout
    cases = cases_for("cpu", op=Op.DECODE)
    fp16 = sum(case.problem.dtype == "float16" for case in cases)
    assert f"{len(cases)} checks: {len(cases) - fp16} passed, {fp16} crashed" in result.stdout


def test_fail_fast_stops_at_the_first_failure(kernel):
    kernel(Op.DECODE, lambda inputs: broken_scale(inputs, plain_recurrent.run))
    result = kda("--kernel", "mine", "--fail-fast")
    assert result.exit_code == 1 and "1 check: 1 failed" in result.stdout


def test_refused_cases_are_shown_and_are_no_failure(kernel):
    refuse = lambda problem: "head size 128 only" if problem and problem.K != 128 else None  # noqa: E731
    kernel(Op.DECODE, plain_recurrent.run, refuse)
    result = kda("--kernel", "mine", "--case", "decode-fp16", "--case", "decode-fp32")
    assert result.exit_code == 0
    assert "refused: mine, decode-fp16: head size 128 only" in result.stdout
    assert "2 checks: 1 passed, 1 refused" in result.stdout
    result = kda("--kernel", "mine", "--case", "decode-fp16")
    assert result.exit_code == 3 and "every kernel refused every case" in result.stderr
    hint = re.search(r"as a suite has it: kda verify (.*)\n", result.stdout)
    assert hint and kda(*shlex.split(hint[1])).exit_code == 0


def test_a_kernel_that_cannot_run_here_is_named_with_its_reason(kernel, monkeypatch):
    left = {name: kernel for name, kernel in registry._KERNELS.items() if name != "triton-decode"}
    monkeypatch.setattr(registry, "_KERNELS", left)
    kernel(Op.DECODE, plain_recurrent.run, lambda problem: "sm_100 only", name="blackwell")
    kernel(Op.DECODE, plain_recurrent.run, name="peer", ours=False)
    result = kda("--op", "decode", "--case", "decode-fp32", "--json", "-")
    assert result.exit_code == 0
    not_run = {row["kernel"]: row["reason"] for row in json.loads(result.stdout)["not_run"]}
    assert not_run["blackwell"] == "sm_100 only" and "--kernel peer" in not_run["peer"]
    result = kda("--kernel", "blackwell")
    assert result.exit_code == 3 and "blackwell cannot run here: sm_100 only" in result.stderr
    assert kda("--kernel", "peer", "--case", "decode-fp32").exit_code == 0


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["--kernel", "nonsense"], "kernel nonsense is unknown"),
        (["--case", "nonsense"], "case nonsense is unknown"),
        (["--kernel", "torch-decode", "--op", "prefill"], "torch-decode serves the op decode, not prefill"),
        (["--kernel", "torch-decode", "--case", "prefill-fp32"], "of the op prefill"),
        (["--case", "decode-fp32", "-T", "8"], "--case is given with --tokens"),
        (["--dump", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(args, fragment):
    result = kda(*args)
    assert result.exit_code == 2 and fragment in result.stderr, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


# --- reports


def test_json_report(tmp_path):
    path = tmp_path / "v.json"
    result = kda("--kernel", "torch-decode", "--case", "decode-kimi-k3", "--seed", "3", "--json", str(path))
    assert result.exit_code == 0 and "1 check: 1 passed" in result.stdout
    report = json.loads(path.read_text())
    assert report["schema"] == "kda.verify/1" and report["provenance"]["seed"] == 3
    (case,), (row,) = report["cases"], report["rows"]
    assert Problem.from_dict(case["problem"]).padding == 1
    assert [t["tensor"] for t in row["tensors"]] == ["o", "final_state"]
    assert all(0 < t["error"] < t["bound"] and t["passed"] for t in row["tensors"])
    assert kda("--json", str(path)).exit_code == 2  # never overwritten


def test_seed_changes_the_inputs():
    errors = set()
    for seed in ("0", "1"):
        result = kda("--kernel", "torch-decode", "--case", "decode-fp32", "--seed", seed, "--json", "-")
        errors.add(json.loads(result.stdout)["rows"][0]["tensors"][0]["error"])
    assert len(errors) == 2


def test_list_shows_the_cases_and_why():
    result = kda("--list", "--op", "gate")
    assert result.exit_code == 0
    for case in CASES:
        assert (case.name in result.stdout) == (case.problem.op is Op.GATE)


# --- the table of cases


def test_the_table_covers_what_kernels_get_wrong():
    assert len({case.name for case in CASES}) == len(CASES) and all(case.why for case in CASES)
    assert {name for case in suite("full") for name in case.transforms} == set(TRANSFORMS)
    assert {name for case in CASES for name in case.properties} == set(PROPERTIES)
    for op in (Op.PREFILL, Op.DECODE):
        cases = [case for case in cases_for("cpu") if case.problem.op is op]
        problems = [case.problem for case in cases]
        assert {p.options.gate for p in problems} == set(Gate)
        assert {case.gates for case in cases} == {"bench", "init", "weak"}
        assert {p.dtype for p in problems} == {"bfloat16", "float16", "float32"}
        assert {p.state_dtype for p in problems} == {"float32", "bfloat16", "float16", "int16"}
        for name in ("packed", "state_v_first", "initial_state", "final_state"):
            assert {getattr(p, name) for p in problems} == {True, False}, name
        for name in ("beta_is_logit", "allow_neg_eigval", "qk_l2norm"):
            assert {getattr(p.options, name) for p in problems} == {True, False}, name
        assert any(p.HV > p.H for p in problems) and any(p.padding for p in problems)
        assert any(0 in p.seq_lens for p in problems) and any(case.keys == "near-collinear" for case in cases)
    lengths = {n for case in CASES if case.problem.op is Op.PREFILL for n in case.problem.seq_lens}
    assert {0, 1, 15, 16, 17, 63, 64, 65} <= lengths


# --- its parts


@pytest.fixture
def pooled() -> Iterator[Inputs]:
    yield make_inputs(Problem(Op.PREFILL, (5, 3), H=1, HV=2, K=16, V=8, pool_slots=4))


@pytest.mark.parametrize("name", ["packed-projection", "padded-heads", "pool-with-gaps"])
def test_a_transform_changes_memory_and_not_values(pooled, name):
    changed = TRANSFORMS[name](pooled)
    strided = 0
    for field, tensor in pooled.tensors().items():
        other = changed.tensors()[field]
        assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))
        strided += not other.is_contiguous()
        if other.is_floating_point():
            whole = other.new_empty(0).set_(other.untyped_storage())
            assert other.is_contiguous() or whole.isnan().sum() > other.isnan().sum()
    assert strided


def test_the_far_pool_is_over_two_billion_elements_long(pooled):
    far = far_pool(pooled.map(lambda t: t.to("meta")))
    case = next(case for case in CASES if case.name == "decode-far-pool")
    assert far.state.stride(0) * (case.problem.pool_slots - 1) > 2**31


def test_cut_off_gates_forget_all_or_nothing(pooled):
    """Through the activation of the case, log decays are below -88 (a decay of 0 in fp32) or nearly 0."""
    changed = TRANSFORMS["cut-off-gates"](pooled)
    sums = oracle.gate_cumsum(changed)[0, :5]
    decays = torch.cat([sums[:1], sums.diff(dim=0)])
    forget, keep = decays < -88, decays > -1e-12
    assert (forget | keep).all() and forget[3].all() and 0 < keep.sum() < keep.numel()


def test_own_memory_keeps_strides_and_gaps_and_notices_writes(pooled):
    pooled = TRANSFORMS["pool-with-gaps"](TRANSFORMS["packed-projection"](pooled))
    copy = own_memory(pooled)
    for name, tensor in pooled.tensors().items():
        other = copy.tensors()[name]
        offset = other.storage_offset() - ZONE // tensor.element_size()
        assert other.stride() == tensor.stride() and offset == tensor.storage_offset()
        assert other.data_ptr() != tensor.data_ptr()
    assert copy.q.untyped_storage().data_ptr() == copy.k.untyped_storage().data_ptr()
    copy.state.zero_()  # the slots are the kernel's to write
    assert modified(pooled, copy) == []
    copy.state.as_strided((1,), (1,), copy.state.storage_offset() + copy.state[0].numel()).zero_()
    copy.beta[0, 0, 0] += 1
    assert modified(pooled, copy) == ["g", "beta", "memory between the slots of the pool"]  # g and beta share memory


def test_poisoned_memory_is_nan_and_only_inside():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all() and torch.empty_like(torch.zeros(9)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_prefill_then_decode_is_one_recurrence():
    case = next(case for case in CASES if case.name == "prefill-then-decode")
    bench = Bench.of_case(case, 0, "cpu")
    pair = PrefillThenDecode.of(registry.get("torch-prefill"), case.decode_steps)
    assert pair.decode.name == "torch-decode" and pair.unsupported(case.problem) is None
    call = own_memory(bench.inputs)
    outputs = pair.run(call)
    assert outputs.final_state.data_ptr() == call.state.data_ptr()
    used = call.state_indices.long()
    exact = expect(bench.inputs, Op.PREFILL)
    assert torch.allclose(outputs.o.double(), exact.o, rtol=1e-2, atol=1e-3)
    assert torch.allclose(call.state[used].double(), exact.final_state[used], rtol=1e-4, atol=1e-5)


def test_a_prefill_without_a_decode_kernel_is_refused(kernel):
    case = next(case for case in CASES if case.name == "prefill-then-decode")
    result = check(kernel(Op.PREFILL, plain_chunk.run), Bench.of_case(case, 0, "cpu"))
    assert result.status == "refused" and "no decode kernel of the backend test" in result.notes[0]


@pytest.mark.gpu
def test_every_kernel_passes_on_a_gpu():
    result = CliRunner().invoke(cli, ["verify", "--device", "cuda"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("columns", ["30", "50", "79"])
def test_a_narrow_pipe_loses_no_column(monkeypatch, columns):
    """What is narrower than 80 columns wraps lines itself: no name is cut, and none is gone."""
    monkeypatch.setenv("COLUMNS", columns)
    result = kda("--kernel", "torch-decode", "--case", "decode-fp16", "--case", "decode-mixed-dtypes")
    assert result.exit_code == 0
    assert all(f" {word} " in result.stdout for word in ("decode-mixed-dtypes", "torch-decode", "state", "verdict"))
