"""What `kda profile` times: suites, flags, sweeps' axes, and the kernels that can."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from profile_stand_ins import Kernel, load, wanted

from kda_kernels import registry
from kda_kernels.errors import InputError, UnavailableError
from kda_kernels.problem import Gate, Op, Options
from kdacli.commands.profile import command
from kdacli.profile.cases import axes, select
from kdacli.profile.cases.choose import cases_of, narrowing, sweep_cases
from kdacli.profile.cases.suites import suite
from kdacli.profile.measuring.traffic import traffic
from kdacli.profile.tools import inner


def problems(name):
    return {case.name: case.problem for case in suite(name)}


def test_suites_are_the_published_shapes():
    prefill = problems("prefill")
    shapes = {name: (p.N, p.T, p.H) for name, p in prefill.items()}
    assert shapes == {
        "P1": (1, 8192, 96), "P2": (1, 8192, 32), "P3": (1, 2048, 12), "P4": (1, 8192, 12),
        "P5": (8, 8192, 96), "P6": (6, 8192, 64), "P7": (1, 32768, 16),
    }  # fmt: skip
    for p in prefill.values():
        assert p.options == Options(gate=Gate.SAFE, lower_bound=-5.0)
        assert (p.packed, p.initial_state, p.final_state, p.state_dtype) == (True, True, True, "float32")
    softplus = problems("prefill-softplus")
    assert list(softplus) == [f"{name},softplus" for name in prefill]
    for p, q in zip(prefill.values(), softplus.values(), strict=True):
        assert dataclasses.replace(p, options=Options(gate=Gate.SOFTPLUS)) == q
    nvidia = problems("prefill-nvidia").values()
    assert " ".join(f"{p.T // p.N}/{p.H}/{p.N}" for p in nvidia) == (
        "2048/12/1 2048/16/1 4096/8/1 4096/12/1 8192/12/4 8192/16/1 1024/4/1 3072/10/1 8192/24/1 16384/16/8"
    )
    assert all(len(set(p.seq_lens)) == 1 and p.options.lower_bound == -5.0 for p in nvidia)
    decode = problems("decode")
    assert [(p.H, p.N) for p in decode.values()] == list(itertools.product((32, 96), (1, 8, 32, 128)))
    assert {p.options.gate for p in decode.values()} == {Gate.SOFTPLUS}
    assert all(p.pool_slots >= p.N and set(p.seq_lens) == {1} for p in decode.values())
    assert [(p.T, p.H) for p in problems("gate").values()] == [(8192, 32), (8192, 96)]
    half = problems("decode-bf16")
    assert {p.state_dtype for p in half.values()} == {"bfloat16"}
    assert list(half) == [f"{name},bf16" for name in decode]
    for p, q in zip(decode.values(), half.values(), strict=True):
        assert traffic(q).state == traffic(p).state / 2


def test_suite_in_each_gate_regime():
    assert [c.gates for c in suite("prefill")[:3]] == ["bench", "init", "weak"]
    assert {c.gates for c in suite("decode")} == {"bench"}
    assert [c.label for c in suite("gate", ("weak", "init"))] == [
        f"G:T=8192,H={heads} {gates}" for heads in (32, 96) for gates in ("weak", "init")
    ]


def test_a_case_for_each_regime_asked_for():
    cases, _ = cases_of(wanted("-T", "512", "-H", "4", "--gates", "weak", "--gates", "bench", "--gates", "weak"))
    assert [c.label for c in cases] == ["N=1 T=512 H=4 weak", "N=1 T=512 H=4 bench"]
    assert cases[0].problem.op is Op.PREFILL


def test_decode_alone_is_its_suite():
    cases, _ = cases_of(wanted("--op", "decode", "--gates", "weak"))
    assert [(c.name, c.gates) for c in cases] == [(name, "weak") for name in problems("decode")]
    (case,), _ = cases_of(wanted("--op", "decode", "-H", "4", "--state-dtype", "bf16"))
    assert case.name == "H=4 N=32 bf16 state"
    assert (case.problem.H, case.problem.N) == (4, 32)


def test_a_kernel_decides_the_op():
    cases, _ = cases_of(wanted("--kernel", "triton-decode"))
    assert [(c.problem.op, c.problem.N, c.gates) for c in cases] == [(Op.DECODE, 32, "bench")]


def test_the_cases_of_a_layer():
    cases, _ = cases_of(wanted("--layer", "kimi-k3", "--tp", "8", "-T", "32k", "-N", "64"))
    prefill, decode, step = (case.problem for case in cases)
    assert (prefill.op, prefill.N, prefill.T, prefill.H) == (Op.PREFILL, 1, 32768, 12)
    assert (decode.op, decode.N, decode.T, decode.H) == (Op.DECODE, 64, 64, 12)
    assert (step.op, step.N, step.H) == (Op.STEP, 64, 12) and step.features == {"conv", "norm"}
    assert prefill.options == decode.options == step.options == Options(gate=Gate.SAFE, lower_bound=-5.0)
    assert [case.gates for case in cases] == ["init"] * 3
    cases, _ = cases_of(wanted("--layer", "kimi-linear", "--op", "decode", "--gates", "weak", "--gates", "bench"))
    assert [(c.problem.H, c.problem.options.gate, c.gates) for c in cases] == [
        (32, Gate.SOFTPLUS, "weak"), (32, Gate.SOFTPLUS, "bench")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("--suite", "prefill", "-H", "4"),
        ("--suite", "decode-bf16", "--op", "prefill"),
        ("--sweep", "N=1..4", "--stages"),
        ("--suite", "prefill", "--op", "decode"),
        ("--suite", "prefill", "--dump", "x.pt"),
        ("--kernel", "nope"),
        ("--call", "x"),
        ("--output", "x"),
        ("--nsys-path", "x"),
        ("--nsys", "--nsys-path", "no-such-program"),
        ("--json", "no-such-directory/x.json"),
        ("--sweep", "N=1..4", "-N", "3"),
        ("--sweep", "N=1..4", "--lens", "1,1"),
        ("--sweep", "H=1..4", "--model", "kimi-k3"),
        ("--sweep", "N=1..4", "--suite", "decode"),
        ("--sweep", "N=1..4", "--sweep", "N=8"),
        ("--bump", "5"),
        ("--layer", "kimi-k3", "-H", "4"),
        ("--layer", "kimi-k3", "--op", "gate"),
        ("--layer", "kimi-k3", "--tp", "7"),
        ("--layer", "kimi-k3", "--sweep", "N=1..4"),
        ("--ncu", "--nsys"),
        ("--ncu-path", "x"),
        ("--ncu", "--ncu-path", "no-such-program"),
        ("--ncu", "--plot", "x.png"),
        ("--nsys", "--baseline", "x.json"),
        ("--plot", "x.gif"),
        ("--plot", "no-such-directory/x.png"),
        ("--trace", "no-such-directory/x.json"),
        ("--from", "no-such-file.json"),
        ("--baseline", "no-such-file.json"),
    ],
)
def test_wrong_use_is_named(words):
    with pytest.raises(InputError):
        command.main(list(words), standalone_mode=False)


def test_without_a_gpu_it_says_so():
    env = inner.environment("nsys") | {"CUDA_VISIBLE_DEVICES": ""}
    del env[inner.TRACE_ENV]
    words = [sys.executable, "-m", "kdacli", "profile", "--suite", "decode"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "GPU" in done.stderr


def test_help_stays_quick():
    """Nothing heavy is imported to print it."""
    heavy = "'torch', 'numpy', 'rich', 'triton', 'matplotlib'"
    code = f"import sys; import kdacli.commands.profile; print(sorted({{{heavy}}} & set(sys.modules)))"
    env = inner.environment("nsys")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "[]\n"


# Kernels


def test_default_candidates_leave_plain_torch_out():
    names = [k.name for k in select.candidates([Op.PREFILL, Op.PREFILL])]
    assert names[:2] == ["cute-prefill", "triton-prefill"]
    assert "fla-prefill" in names
    assert not any(name.startswith("torch") for name in names)
    assert all(k.ours for k in select.candidates([Op.GATE], peers=False))
    assert [k.name for k in select.candidates([Op.DECODE], ["torch-decode", "torch-decode"])] == ["torch-decode"]


def test_those_that_cannot_run_have_a_reason():
    problem = problems("prefill")["P3"]
    good, old = Kernel("good"), Kernel("old", reason="no GPU")
    assert select.split([old, good], problem) == ([good], {"old": "no GPU"})
    with pytest.raises(UnavailableError, match="old: no GPU"):
        select.require_runnable(suite("prefill"), [old])


def test_the_registry_offers_what_the_suites_need():
    for name in ("prefill", "decode", "gate"):
        assert any(k.ours for k in registry.kernels(name))


# Sweeps


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("T=1k..16k", (1024, 2048, 4096, 8192, 16384)),
        ("N=1..6:1", (1, 2, 3, 4, 5, 6)),
        ("N=1..10:4", (1, 5, 9, 10)),
        ("N=1..100:x10", (1, 10, 100)),
        ("N=3..20", (3, 6, 12, 20)),
        ("H=96,12,24,12", (12, 24, 96)),
        ("N=7", (7,)),
        ("N=5..5", (5,)),
    ],
)
def test_an_axis(text, values):
    assert axes.parse(text) == axes.Axis(text[0], values)


@pytest.mark.parametrize(
    "text", ["", "N", "K=1..2", "N=", "N=2..1", "N=1..", "N=1..4:x1", "N=1..4:0", "N=0..4", "N=1,,2", "N=1..4:y", "T=a"]
)
def test_an_axis_that_is_none(text):
    with pytest.raises(InputError, match="--sweep is"):
        axes.parse(text)


def test_the_first_axis_runs_fastest():
    points = axes.points([axes.parse("N=1,2"), axes.parse("H=4,8")])
    assert points == [{"N": 1, "H": 4}, {"N": 2, "H": 4}, {"N": 1, "H": 8}, {"N": 2, "H": 8}]
    with pytest.raises(InputError, match="each axis once"):
        axes.points([axes.parse("N=1,2"), axes.parse("N=3")])
    with pytest.raises(InputError, match="at most"):
        axes.points([axes.parse("T=1..6000:1")])


def test_cases_of_a_sweep():
    cases, _ = cases_of(wanted("--op", "decode", "--sweep", "N=1..4", "--sweep", "H=2,4", "--gates", "weak"))
    assert [c.point for c in cases[:3]] == [(("N", 1), ("H", 2)), (("N", 2), ("H", 2)), (("N", 4), ("H", 2))]
    assert [(c.problem.N, c.problem.H) for c in cases] == [(1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (4, 4)]
    assert {c.problem.pool_slots for c in cases} == {8}  # one pool for all: twice the most sequences
    assert {c.gates for c in cases} == {"weak"}
    assert len({c.label for c in cases}) == len(cases)
    cases, _ = cases_of(wanted("--sweep", "T=64..256", "-H", "2"))
    assert [(c.problem.op, c.problem.T) for c in cases] == [(Op.PREFILL, 64), (Op.PREFILL, 128), (Op.PREFILL, 256)]


def test_smaller_batches_are_the_first_rows_of_the_largest():
    """As if each had been made for itself, but with the larger pool: same rows, and every slot used is filled."""
    cases = sweep_cases(wanted("--op", "decode", "--sweep", "N=1..4", "-H", "1", "--head-dim", "16"))
    made = []

    def counted(case):
        made.append(case.problem.N)
        return load(case)

    narrowed = narrowing(cases, counted)
    whole = load(cases[-1])
    for case in cases:
        inputs, n = narrowed(case), case.problem.N
        assert inputs.q.shape[0] == inputs.state_indices.shape[0] == n
        assert torch.equal(inputs.v, whole.v[:n])
        assert inputs.state.shape[0] == case.problem.pool_slots
        assert not inputs.state[inputs.state_indices.long()].isnan().any()
    assert made == [4]
    packed = [dataclasses.replace(c, problem=dataclasses.replace(c.problem, packed=True)) for c in cases]
    assert narrowing(packed, load)(packed[0]).q.shape[:2] == (1, 1)
