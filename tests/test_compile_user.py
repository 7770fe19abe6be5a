"""`kda compile --kernel path.py:function`: what a user's function launches, recorded with no GPU; other languages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kdacli.main import cli

ROOT = Path(__file__).resolve().parent.parent
MINE = """
import torch, triton, triton.language as tl
from kda_kernels.errors import UnavailableError
from kda_kernels.variant import Built

MAJOR = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0  # looked up at the import

@triton.autotune([triton.Config({"B": b}, num_warps=2, num_stages=1) for b in (256, 512)], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["B"] == 0})
@triton.jit
def scaled(x, y, n, by, B: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * by, mask=i < n)

@triton.jit
def halved(x, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + i, tl.load(x + i) * 0.5)

def prefill(q, k, v, g, beta, cu_seqlens=None, A_log=None, dt_bias=None, initial_state=None, lower_bound=None):
    assert q.is_cuda and q.device == torch.device("cuda", 0) and MAJOR == 8, MAJOR
    lens = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    o = torch.empty(v.shape, dtype=v.dtype, device="cuda")
    scaled[lambda m: (triton.cdiv(v.numel(), m["B"]),)](v, o, v.numel(), 2.0)
    for length in lens:
        halved[(length,)](o, B=64 if length > 100 else 128)
        halved[(length,)](o, B=64 if length > 100 else 128)
    return o

def fails(q, k, v, g, beta):
    raise RuntimeError("no such luck\\nat all")

def launches_nothing(q, k, v, g, beta):
    return torch.zeros_like(v)

launches_nothing.op = fails.op = "prefill"

class Assembled:
    name, num_warps = "by hand", 4

    def build(self, arch):
        if arch != "sm_90a":
            raise UnavailableError("needs sm_90a")
        return Built(cubin=open(CUBIN, "rb").read(), shared_bytes=4096, num_warps=4, ir={"mlir": "module {}"})

def other_chunk(q, k, v, g, beta):
    raise AssertionError("a function with variants is not called")

other_chunk.variants = lambda problem=None: [Assembled()]
"""


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Triton's cache, of this module alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "mine.py"
    path.write_text(MINE.replace("CUBIN", repr(str(path.with_name("a.cubin")))))
    return path


def kda(*words: str) -> Result:
    """The command in this process; its workers are others."""
    return CliRunner().invoke(cli, list(words))


def test_every_launch_and_every_configuration_is_compiled(mine, tmp_path):
    """For two architectures of which each is believed by the module's import; emitted files are of what they say."""
    words = ["--kernel", f"{mine}:prefill", "--lens", "200,50", "-H", "2", "--jobs", "1", "--json", "-"]
    done = kda("compile", *words, "--arch", "sm_86", "--emit", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["variant"] for row in rows] == [
        "scaled B=256,warps=2,stages=1",
        "scaled B=512,warps=2,stages=1",
        "halved",
        "halved #2",
    ]
    assert {(row["arch"], row["num_warps"], row["problem"]["H"]) for row in rows[:2]} == {("sm_86", 2, 2)}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(name for row in rows for name in row["files"])
    assert [name.rpartition(".")[2] for name in rows[2]["files"]] == ["cubin", "llir", "ptx", "sass", "ttgir", "ttir"]
    stem = "mine.py_prefill.halved.sm_86"
    assert ".target sm_86" in (tmp_path / "out" / f"{stem}.ptx").read_text()
    assert "EF_CUDA_SM86" in (tmp_path / "out" / f"{stem}.sass").read_text()
    assert (tmp_path / "out" / f"{stem}.cubin").stat().st_size == rows[2]["binary_bytes"]
    again = kda("compile", *words, "--arch", "sm_90a")
    assert again.exit_code == 2
    assert "raised AssertionError on tensors of zeros" in again.stderr
    assert again.stderr.rstrip().partition("recorded: ")[2].startswith("9"), "the module looked at a GPU of sm_90a"


def test_amds_compiler_takes_it_too_and_its_death_is_a_row(mine, tmp_path):
    """A kernel in plain Triton compiles; inline assembly of NVIDIA's is one row's error: LLVM dies or leaves it out."""
    plain = mine.with_name("plain.py")
    plain.write_text(MINE.replace("MAJOR == 8", "MAJOR == 9"))
    words = ["--lens", "64", "-H", "2", "--jobs", "1", "--arch", "gfx942", "--json", "-"]
    done = kda("compile", "--kernel", f"{plain}:prefill", *words)
    assert done.exit_code == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        assert 0 < row["registers"] < 512
        assert row["isa"]["instructions"] > 10
        assert row["spill_bytes"] == 0
        assert row["limited_by"] == "blocks" if row["num_warps"] == 1 else "warps"
    dead = mine.with_name("dead.py")
    assembly = 'tl.inline_asm_elementwise("ex2.approx.f32 $0, $1;", "=f,f", [tl.load(x + i)], tl.float32, True, 1)'
    dead.write_text(MINE.replace("MAJOR == 8", "MAJOR == 9").replace("tl.load(x + i) * 0.5", assembly))
    done = kda("compile", "--kernel", f"{dead}:prefill", "--variant", "halved", *words)
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["error"].endswith(" allocate output register for constraint 'f'")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "fails",
            "raised RuntimeError on tensors of zeros, so that its launches could not be recorded: no such luck at all",
        ),
        (
            "launches_nothing",
            "it launches no Triton kernel; a kernel that is not Triton's needs an attribute `variants`",
        ),
    ],
)
def test_what_cannot_be_recorded_is_said(mine, name, said):
    shape = ["-T", "64", "-H", "1", "--gate", "none", "--no-initial-state", "--arch", "sm_80", "--jobs", "1"]
    done = kda("compile", "--kernel", f"{mine}:{name}", *shape)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_variants_that_build_themselves(mine, tmp_path):
    """The protocol by which kernels that are not Triton's are compiled: no log, so registers come from the binary."""
    words = [
        "--kernel",
        "triton-gate",
        "--variant",
        "gate_cumsum none",
        "--arch",
        "sm_90a",
        "--jobs",
        "1",
        "--json",
        "-",
    ]
    done = kda("compile", *words, "--emit", str(tmp_path / "first"))
    (theirs,) = json.loads(done.stdout)["rows"]
    (cubin,) = (tmp_path / "first").glob("*.cubin")
    mine.with_name("a.cubin").write_bytes(cubin.read_bytes())
    words = ["--kernel", f"{mine}:other_chunk", "--arch", "sm_90a", "--arch", "sm_80", "--json", "-", "--jobs", "1"]
    done = kda("compile", *words, "--emit", str(tmp_path / "second"))
    assert done.exit_code == 0, done.stderr
    refused, row = json.loads(done.stdout)["rows"]
    assert refused["unsupported"] == "needs sm_90a"
    assert "registers" not in refused
    for what in ("registers", "stack_bytes", "spill_bytes", "binary_bytes", "sass"):
        assert row[what] == theirs[what]
    assert row["files"] == [f"mine.py_other_chunk.by_hand.sm_90a.{kind}" for kind in ("cubin", "mlir", "sass")]


@pytest.mark.gpu
def test_a_launch_takes_what_was_compiled_from_the_cache(tmp_path, monkeypatch):
    """`kda compile` in a process that sees no GPU, then the same problem on the GPU: not one compilation."""
    from kdacli.compile import arch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (here,) = arch.select([])
    shape = ["--op", "prefill", "--lens", "200,0,65", "-H", "3", "--gate", "safe", "--pool", "4"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "kdacli", "compile", *shape, "--arch", here.name, "--sms", str(here.gpu.sms)]
    done = subprocess.run(command, env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import triton\n"
        "hits = []\n"
        "triton.knobs.compilation.listener = lambda *, cache_hit, **said: hits.append(cache_hit)\n"
        "from kda_kernels import registry\n"
        "from kdacli import options, synthetic\n"
        "said = {'op': 'prefill', 'lens': (200, 0, 65), 'heads': 3, 'gate': 'safe', 'pool': 4}\n"
        "problem = options.problem_from(said)\n"
        "registry.get('triton-prefill').run(synthetic.make_inputs(problem, device='cuda'))\n"
        "print(hits)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == str([True] * 4), ran.stderr
