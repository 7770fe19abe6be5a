"""`kda compile`: real compilations by Triton and ptxas, with no GPU, in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kda_kernels.cute import cache as cute_cache
from kda_kernels.cute.decode import host as cute_decode
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.errors import InputError
from kda_kernels.problem import Gate, Op, Options, Problem
from kdacli.compile import arch, pool, report, sass, toolchain, worker
from kdacli.main import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Triton's cache, of this module alone: the user's is neither filled nor believed."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def python(*words: str) -> subprocess.CompletedProcess:
    """Runs this Python with the checkout on its path, and with whatever conftest said to Triton."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)


def kda(*words: str) -> Result:
    """The command in this process; its workers are others."""
    return CliRunner().invoke(cli, list(words))


def test_gate_kernel_compiles_for_two_architectures():
    """Even where this process interprets Triton's kernels, `kda compile` compiles them."""
    variants = ["--variant", "gate_cumsum safe", "--variant", "* none"]
    words = ["compile", "--kernel", "triton-gate", *variants, "--arch", "sm_90a", "--arch", "sm_80", "--json", "-"]
    done = kda(*words, "--jobs", "1")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    rows = report["rows"]
    assert report["schema"] == "kda.compile/1"
    assert [row["arch"] for row in rows] == ["sm_80", "sm_90a"] * 2
    for row in rows:
        assert 16 <= row["registers"] <= 255
        assert row["limited_by"] in ("warps", "registers")
        assert not row["cached"]
        assert row["spill_bytes"] == row["spill_store_bytes"] + row["spill_load_bytes"]
        assert row["binary_bytes"] > 1000
        assert 0 < row["compile_s"] < 300
        assert row["sass"]["instructions"] > 50
        assert row["sass"]["LDG"] > 0
        assert row["sass"]["STG"] > 0
        assert row["sass"]["HGMMA"] + row["sass"]["HMMA"] == 0, "the gate is no matrix product"
        assert "safe" not in row["variant"] or row["sass"]["MUFU"] > 0, "a sigmoid needs exp"
    assert "triton-gate" in done.stderr, "the table goes to stderr when JSON goes to stdout"
    assert "4 compiled, 0 taken from the cache" in done.stderr
    again = kda(*words, "--jobs", "1")
    assert "0 compiled, 4 taken from the cache" in again.stderr
    untimed = [{**row, "cached": None, "compile_s": None} for row in rows]
    assert [{**row, "cached": None} for row in json.loads(again.stdout)["rows"]] == untimed, "the cache says the same"


def test_a_problem_is_compiled_as_it_would_be_launched():
    """fp16 activations, two value heads a query head, K = 64; a kernel with `variants`, and one without."""
    shape = ["-H", "4", "--v-heads", "8", "--head-dim", "64", "--v-head-dim", "32", "--dtype", "fp16", "-T", "200"]
    kernels = ["--kernel", "triton-decode", "--kernel", "triton-gate-unfused", "--jobs", "1"]
    done = kda("compile", *kernels, *shape, "--gate", "softplus", "--arch", "sm_90a", "--json", "-")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["kernel"], row["variant"]) for row in rows] == [
        ("triton-decode", "decode"),
        ("triton-gate-unfused", "gate_cumsum"),
        ("triton-gate-unfused", "chunk_indices"),
        ("triton-gate-unfused", "gate_cumsum #2"),
    ]
    for row in rows:
        problem = Problem.from_dict(row["problem"])
        assert (problem.dtype, problem.g_dtype, problem.state_dtype) == ("float16", "float16", "float32")
        assert (problem.H, problem.HV, problem.K, problem.V) == (4, 8, 64, 32)
        assert problem.op == row["kernel"].removeprefix("triton-").removesuffix("-unfused")
        assert row["registers"] > 0
        assert row["arch"] == "sm_90a"
    assert "H=4 HV=8 K=64 V=32 float16" in " ".join(done.stderr.split())


def test_a_dump_is_compiled_as_its_problem(tmp_path):
    from kdacli import dumps
    from kdacli.synthetic import make_inputs

    problem = Problem(Op.GATE, (70, 3), H=2, HV=2, K=48, V=48, options=Options(gate=Gate.SAFE, lower_bound=-5.0))
    dumps.save(tmp_path / "dump.pt", make_inputs(problem), op=Op.GATE)
    words = ["--dump", str(tmp_path / "dump.pt"), "--arch", "sm_80", "--json", "-"]
    done = kda("compile", "--kernel", "triton-gate", "--jobs", "1", *words)
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout)["rows"][1]
    assert (row["kernel"], row["variant"]) == ("triton-gate", "gate_cumsum")
    assert Problem.from_dict(row["problem"]) == problem


def test_a_launch_finds_what_was_compiled(cache, monkeypatch):
    """The cache holds what a call on a GPU of that architecture looks for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shape = ["-H", "3", "-T", "100", "--gate", "softplus"]
    done = kda("compile", "--kernel", "triton-gate", *shape, "--arch", "sm_86", "--jobs", "1", "--json", "-")
    problem = json.loads(done.stdout)["rows"][0]["problem"]
    code = (
        "import json, sys\n"
        "from kda_kernels import registry\n"
        "from kda_kernels.problem import Problem\n"
        "from kdacli.compile import arch, recorder\n"
        "problem, where = Problem.from_dict(json.loads(sys.argv[1])), arch.parse(sys.argv[2])\n"
        "found = recorder.record(registry.get('triton-gate'), {'': problem}, where)\n"
        "print(json.dumps([[variant.name, variant.missing(where.name)] for variant in found]))\n"
    )
    for where, there in (("sm_86", True), ("sm_87", False)):
        launches = json.loads(python("-c", code, json.dumps(problem), where).stdout)
        assert [name for name, _ in launches] == ["chunk_indices", "gate_cumsum"]
        assert all((missing is None) == there for _, missing in launches)


def test_keys_do_not_depend_on_what_ran_before(monkeypatch):
    """In whatever order a process first launches our kernels, it looks for each in the same folder."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = (
        "import importlib, json, os, sys, triton\n"
        "for order in json.loads(sys.argv[1]):\n"
        "    if os.fork():\n"  # what follows runs in a process that has seen no kernel
        "        os.wait()\n"
        "        continue\n"
        "    named = [(importlib.import_module(f'kda_kernels.triton.{m}'), k) for m, k in map(str.split, order)]\n"
        "    print(json.dumps({k: getattr(module, k).cache_key for module, k in named}), flush=True)\n"
        "    os._exit(0)\n"
    )
    kernels = [
        "gate gate_cumsum_kernel", "chunk_indices chunk_indices_kernel", "decode_kernel decode_kernel",
        "chunk_factors chunk_factors_kernel", "chunk_factors_bounded chunk_factors_bounded_kernel",
        "chunk_inverse chunk_inverse_kernel", "chunk_chain chunk_chain_kernel", "convolution convolution_kernel",
    ]  # fmt: skip
    orders = [kernels, kernels[3:] + kernels[:3], kernels[::-1]]
    keys = [json.loads(line) for line in python("-c", code, json.dumps(orders)).stdout.splitlines()]
    assert len(keys) == 3 and len(keys[0]) == len(kernels)
    assert all(other == keys[0] for other in keys)


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
def test_cute_has_a_cache_of_its_own(tmp_path, monkeypatch):
    """Where it lies is said beside Triton's, and it is left alone where that is asked for."""
    mine = tmp_path / "kda"
    monkeypatch.setenv("KDA_CACHE_DIR", str(mine))
    words = ["compile", "--kernel", "cute-decode", "--variant", "softplus", "--arch", "sm_90a", "--jobs", "1"]
    left_alone = kda(*words, "--no-cache")
    assert left_alone.stdout.endswith("1 compiled; the cache was left alone\n"), left_alone.output
    assert not mine.exists()
    kept = kda(*words)
    assert kept.stdout.endswith(
        f"1 compiled, 0 taken from the cache: {cute_cache.directory()}\n".replace(str(Path.home()) + "/", "~/")
    ), kept.output
    (variant,) = (v for v in cute_decode.variants() if v.name == "softplus")
    assert variant.missing("sm_90a") is None, "a launch finds it"
    assert variant.missing("sm_100a") is not None
    monkeypatch.setenv("KDA_CACHE_DIR", "")
    assert variant.missing("sm_100a") is None, "nothing is kept"


def test_summary_has_a_line_for_each_cache():
    rows = [{"backend": k, "binary_bytes": 1, "cached": c} for k, c in (("a", True), ("b", False), ("c", False))]
    rows.append({"backend": "c", "error": "no"})
    assert report.summary(rows, {"a": "/x", "b": "/x", "c": None}) == [
        "1 compiled, 1 taken from the cache: /x",
        "1 compiled, 0 taken from the cache: nothing is kept, KDA_CACHE_DIR is empty",
    ]
    assert report.summary(rows, None) == ["3 compiled; the cache was left alone"]


def test_what_cannot_be_compiled_here_has_no_cache(monkeypatch):
    """Without CuTe DSL its kernels are refused, and nothing else of the command is lost."""
    monkeypatch.setattr("kda_kernels.cute.runtime.missing_packages", lambda: "nvidia-cutlass-dsl is not installed")
    assert worker.cache_folder("cute") is None
    rows = [{"backend": "a", "unsupported": "not installed"}, {"backend": "b", "binary_bytes": 1, "cached": False}]
    assert report.summary(rows, {"a": None, "b": "/x"}) == ["1 compiled, 0 taken from the cache: /x"]


def compile_first_gate_variant(cache: Path, where: str) -> dict:
    """The row that a worker returns; what it compiled stays in `cache`."""
    code = (
        "import dataclasses, json, sys\n"
        "from kda_kernels import registry\n"
        "from kdacli.compile import arch, worker\n"
        "known = arch.ARCHS['sm_80']\n"
        "worker.start(sys.argv[1], known)\n"
        "kernel = registry.get('triton-gate')\n"
        "found = worker.variants(kernel, None, known)\n"
        "worker.variants = lambda *asked: found\n"
        "there = dataclasses.replace(known, name=sys.argv[2])\n"
        "print(json.dumps(worker.compile_variant(kernel, None, found[0].name, there)))\n"
    )
    done = python("-c", code, str(cache), where)
    assert done.returncode == 0
    return json.loads(done.stdout)


def test_registers_agree_with_cuobjdump(tmp_path):
    """The log of ptxas against the resource table inside the binary, read by another tool."""
    row = compile_first_gate_variant(tmp_path, "sm_80")
    (cubin,) = tmp_path.rglob("*.cubin")
    assert row["binary_bytes"] == cubin.stat().st_size
    tool = toolchain.tool("cuobjdump")
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert row["registers"] == int(re.search(r"REG:(\d+)", usage)[1])
    assert row["stack_bytes"] == int(re.search(r"STACK:(\d+)", usage)[1])
    from_binary = sass.resources_of_binary(cubin.read_bytes(), tool, row["sass"])
    assert from_binary == {name: row[name] for name in sass.RESOURCES}, "what a kernel without a log gets"


def test_a_compilers_refusal_is_a_row(tmp_path):
    """ptxas knows no sm_33: its one line comes back, not a traceback."""
    row = compile_first_gate_variant(tmp_path, "sm_33")
    assert set(row) == {"error"}
    assert "sm_33" in row["error"]
    assert "\n" not in row["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arch", "sm_91"], "arch is sm_91"),
        (["--arch", "hopper"], "arch is hopper"),
        (["--arch", "sm_80a"], "arch is sm_80a"),
        (["--sms", "0"], "--sms"),
        (["--strict"], "--strict is given without --baseline"),
        (["--baseline", "no-such.json"], "no-such.json cannot be read"),
        (["--baseline", __file__], "it is no JSON"),
        (["--emit", str(ROOT)], "holds files: use --force"),
        (["--variant", "no-such", "--kernel", "triton-gate"], "there are chunk_indices softplus, gate_cumsum softplus"),
        (["--kernel", "no-such"], "no-such"),
        (["--kernel", "torch-decode"], "nothing to compile"),
        (["--jobs", "0"], "--jobs"),
        (["--op", "decode", "--kernel", "triton-gate"], "kernel triton-gate serves the op gate, not decode"),
        (["--model", "kimi-k3", "-H", "8"], "--heads is given with --model"),
        (["--tp", "8"], "--tp is given without --model"),
        (["--gate", "softplus", "--lower-bound", "-5"], "the softplus gate has none"),
        (["--call", "a"], "--call is given without --dump"),
        (["--dump", "no-such.pt", "--dtype", "fp16"], "--dtype is given with --dump"),
        (["--kernel", "torch-decode", "-H", "8"], "nothing to compile"),
        (["--head-dim", "512", "--kernel", "triton-decode", "--jobs", "1"], "head size is 512"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(words, said):
    done = kda("compile", *words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_failed_compilation_exits_1(monkeypatch):
    """Exit code and lines of a report in which a variant was refused, and one in which it is not meant for it."""
    row = {"kernel": "k", "backend": "triton", "variant": "v", "arch": "sm_90a"}
    monkeypatch.setattr(pool, "plan", lambda *_: ([], {"k2": "no such package"}))
    monkeypatch.setattr(pool, "compile_targets", lambda *_: [row | {"error": "ptxas fatal   : no"}])
    words = ["compile", "--arch", "sm_90a", "--no-cache"]
    done = kda(*words)
    assert done.exit_code == 1
    assert "k v sm_90a: ptxas fatal   : no" in done.stdout
    assert "not compiled: k2: no such package" in done.stdout
    monkeypatch.setattr(pool, "compile_targets", lambda *_: [row | {"unsupported": "needs sm_100a"}])
    done = kda(*words)
    assert done.exit_code == 0
    assert "k v sm_90a: needs sm_100a" in done.stdout


def test_what_cannot_be_launched_fails(monkeypatch):
    """Of an autotuned kernel, if none of its configurations can: tuning passes over the others."""
    row = {"kernel": "k", "backend": "triton", "arch": "sm_90a", "binary_bytes": 1, "cached": False}
    large = {"note": "cannot be launched: needs 300000 bytes of shared memory, a block here has 232448"}
    tuned = [
        row | {"variant": f"f B={b},warps=4,stages=2", "tuned": True} | note for b, note in ((64, {}), (128, large))
    ]
    assert report.stuck(tuned) == []
    assert report.stuck([tuned[1]]) == [tuned[1]]
    assert report.stuck([row | {"variant": "g"} | large, row | {"variant": "g 2"}]) == [row | {"variant": "g"} | large]
    monkeypatch.setattr(pool, "plan", lambda *_: ([], {}))
    monkeypatch.setattr(report, "show", lambda *_: None)
    monkeypatch.setattr(pool, "compile_targets", lambda *_: [row | {"variant": "g"} | large])
    done = kda("compile", "--arch", "sm_90a", "--no-cache")
    assert done.exit_code == 1
    assert "1 of 1 cannot be launched" in done.stderr


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sm_90a", "sm_90a"),
        ("90", "sm_90a"),
        ("sm_86", "sm_86"),
        ("SM100", "sm_100a"),
        ("gfx942", "gfx942"),
        ("GFX950", "gfx950"),
    ],
)
def test_arch_names(given, name):
    assert arch.parse(given).name == name


@pytest.mark.parametrize("given", ["", "sm_", "sm_090x", "compute_90", "sm_33", "-1", "gfx900"])
def test_arch_names_refused(given):
    with pytest.raises(InputError, match="it should be one of sm_80"):
        arch.parse(given)


def test_multiprocessors_are_said():
    (there,) = arch.select(["sm_89"], sms=58)  # an L4
    assert (there.name, there.gpu.sms, there.gpu.shared) == ("sm_89", 58, 101376)


def test_shared_memory_that_no_block_can_have():
    ada = arch.parse("sm_89")
    assert ada.why_no_launch(99 * 1024) is None
    assert "needs 101377 bytes" in ada.why_no_launch(99 * 1024 + 1)
    assert "needs 544 columns of tensor memory" in arch.parse("sm_100a").why_no_launch(0, 544)


def test_counts_of_a_disassembly():
    text = """
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R12, desc[UR10][R22.64] ;
        /*0020*/              @P1  LDG.E.64 R8, desc[UR10][R22.64+0x800] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R8.64] ;
        /*0040*/                   STS.128 [R22+UR8], R12 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0070*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0080*/                   STL [R1+0x4], R12 ;
        /*1090*/                   EXIT ;
    """
    counts = sass.count(text)
    assert counts.pop("instructions") == 10
    assert [counts.pop(name) for name in ("tensor", "bulk", "local")] == [1, 1, 1]
    assert {name: n for name, n in counts.items() if n} == {
        "LDG": 2, "LDG.128": 1, "LDGSTS": 1, "LDGSTS.128": 1, "STS": 1, "STS.128": 1, "BAR": 1, "HGMMA": 1,
        "UTMALDG": 1, "STL": 1,
    }  # fmt: skip


def test_resources_of_a_ptxas_log():
    log = """ptxas info    : Compiling entry function 'k' for 'sm_70'
    4232 bytes stack frame, 5084 bytes spill stores, 9052 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4232 bytes cumulative stack size, 392 bytes cmem[0]"""
    assert sass.resources(log) == {
        "registers": 32,
        "stack_bytes": 4232,
        "spill_bytes": 14136,
        "spill_store_bytes": 5084,
        "spill_load_bytes": 9052,
    }
    with pytest.raises(ValueError, match="registers"):
        sass.resources("ptxas info : 0 bytes gmem")


def test_a_model_without_lengths_is_what_serving_launches(cache):
    """Whatever the lengths and the number of sequences, a launch of ours finds its function, so that none compiles."""
    code = (
        "import dataclasses, json, os\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "from kda_kernels import registry\n"
        "from kda_kernels.problem import Op, Problem\n"
        "from kdacli.compile import arch, worker\n"
        "where, found = arch.parse('sm_90a'), {}\n"
        "def name(variant):\n"
        "    return variant.label('sm_90a') if hasattr(variant, 'label') else variant.key('sm_90a')\n"
        "verify = {'update_state', 'token_states', 'token_state_indices'}\n"
        "steps = [(1, set()), (2, {'num_accepted_tokens'}), (7, {'num_accepted_tokens'}), (3, verify)]\n"
        "kept = {'has_initial_state', 'checkpoints'}\n"
        "prompts = [(n, f) for n in (64, 1000, 8192) for f in (set(), kept, {'checkpoints'}, {'has_initial_state'})]\n"
        "for kernel in registry.kernels():\n"
        "    if kernel.backend not in ('cute', 'triton') or kernel.op is Op.GATE or not kernel.ours:\n"
        "        continue\n"
        "    any_length = Problem(kernel.op, (), H=12, HV=12)\n"
        "    worker.variant_names(kernel, any_length, where)  # the command has no reason to leave it out\n"
        "    keys = [name(variant) for variant in worker.variants(kernel, any_length, where)]\n"
        "    launched = set()\n"
        "    for tokens, used in steps if kernel.op.decodes else prompts:\n"
        "        for count in (1, 3, 11, 23, 45, 100, 400) if kernel.op.decodes else (1, 3, 40):\n"
        "            for packed in (True, False):\n"
        "                one = dataclasses.replace(any_length, seq_lens=(tokens,) * count, packed=packed,\n"
        "                                          pool_slots=900, features=frozenset(used))\n"
        "                launched |= {name(variant) for variant in worker.variants(kernel, one, where)}\n"
        "    found[kernel.name] = len(keys), len(set(keys)), len(launched), len(launched - set(keys))\n"
        "print(json.dumps(found))\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {f"{backend}-{op}" for backend in ("cute", "triton") for op in ("decode", "step", "prefill")}
    for kernel, (built, different, launched, missing) in found.items():
        assert built == different and launched and not missing, kernel


def test_a_step_of_drafts_compiles_in_triton(tmp_path, monkeypatch):
    """What its loop over tokens carries keeps one type, which the interpreter does not ask for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = (
        "from kda_kernels import registry\n"
        "from kda_kernels.problem import Op, Problem\n"
        "from kdacli.compile import arch, worker\n"
        "drafts = Problem(Op.STEP, (2,), 1, 1, K=16, V=16, packed=False, pool_slots=2,\n"
        "                 features=frozenset({'num_accepted_tokens'}))\n"
        "(variant,) = worker.variants(registry.get('triton-step'), drafts, arch.parse('sm_90a'))\n"
        "variant.build('sm_90a')\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
