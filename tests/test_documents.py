"""The documents say what is so: every command in them can be typed, the tutorial runs, tables and links hold."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from kda_kernels.api import kda_decode
from kdacli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "README.md"]


def commands() -> list[tuple[str, str]]:
    """Every `kda` command of a code block or of a help text: where it stands, and its words."""
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    for name in COMMANDS:
        found = cli.get_command(click.Context(cli), name)
        assert found is not None
        texts[f"kda {name} --help"] = found.help or ""
    seen = {}
    for where, text in texts.items():
        text = text.replace("\\\n", " ")
        text = re.sub(r"^ *(?:- run: |srun bash -c '|torchrun .*-m )?kda(?:cli)? ", "  kda ", text, flags=re.M)
        for line in re.findall(r"^(?: {2,}|\$ |    \$ )\s*(?:\$ )?(kda [a-z].*)$", text, re.M):
            words = re.split(r"\s{2,}|\s+#|\s*[|>]", line.strip())[0]
            seen.setdefault(words, where)
    return sorted((where, words) for words, where in seen.items())


def typed(words: str) -> list[str]:
    """Behind `kda`, without what stands for something else."""
    words = re.sub(r"\$\{\{.*?\}\}|\$\(\(.*?\)\)|\$[A-Z_]+", "1", words)
    words = (
        re.sub(r"\.\.\.| &$", "", words)
        .replace("$i", "1")
        .replace("DIR", ".")
        .replace("records/shard-*", "shard-1")
        .replace("shard-*", "shard-1")
    )
    return shlex.split(words)[1:]


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda text: text)
def test_a_command_can_be_typed(where, words):
    """Its flags and their values are those of the command."""
    name, *rest = typed(words)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    command.make_context(f"kda {name}", rest)  # raises what the user would read


# How commands are changed, so that they compute little: of a flag that is given twice the last counts.
SMALL = "--lens 3 -H 1 --head-dim 16"
ONE_CASE = "--kernel torch-decode --case decode-neg-eigval"
EXAMPLE = ROOT / "examples" / "triton_kernel.py:decode"
GATE = "--kernel triton-gate --variant 'gate_cumsum*e*' --jobs 1"
LESS = [
    (r"^verify( --op decode --fail-fast)?$", rf"verify\1 {ONE_CASE}"),
    (r"^verify --suite stress --seconds 3600", "verify --suite stress --seconds 0 --kernel torch-decode --shard 1/99"),
    (r"^verify (?:--suite full )?--shard \S+(.*)", r"verify --kernel torch-decode --force --shard 1/50\1"),
    (r"^verify --kernel mine.py:decode", "verify --kernel mine.py:decode -N 1 -H 1 --head-dim 16 --pool 0"),
    (r"^verify --kernel (m\w+.py:prefill)( --suite full)?", rf"verify {SMALL} --pool 0 --kernel \1"),
    (r"^verify (.*--lens .*)", rf"verify \1 {SMALL}"),
    (r"^profile (.*--json .*)", r"profile \1 --force"),
    (r"^run --op decode (.*)", r"run --op decode \1 -N 1 --kernel torch-decode"),
    (r"^run --lens (.*)", r"run --lens \1 --force --kernel torch-prefill"),
    (r"^run$", "run --lens 3 -H 1"),
    (r"^compile( --(?:arch|json|baseline|model).*)?$", rf"compile\1 {GATE} --force"),
    (r"^compile --variant .* --emit", f"compile {GATE} --emit"),
    (r"^compile --kernel triton-decode", f"compile {GATE}"),
    (r"^compile --kernel mine.py:prefill .*", f"compile --kernel {EXAMPLE} -N 2 -H 1 --gate softplus"),
]
# What lacks something here: a GPU or a package (3), or an engine that never starts (1); a line says so.
NEEDED = r"profile(?! --from)|.*--kernel (fla|cudnn)-"
ELSEWHERE = ("verify --cp", "verify --cp 4", "profile --cp -T 1M -H 12")  # tests/test_parallel.py runs its cases
ENGINES = r"capture --target (sglang|vllm)"


# Of programs and engines that commands start: they are found first, and call what is captured.
CALL = "import torch\nx = torch.ones(1, 2, 1, 16)\n{}(x, x, x, -x, x[..., 0])\n"
FUNCTION = "def {}(q, k, v, g, beta):\n    return v, None\n"
PROGRAMS = {
    "fla/ops/kda.py": FUNCTION.format("chunk_kda"),
    "mine/kernels.py": FUNCTION.replace("g,", "gates,").format("kda"),
    "serve.py": "from fla.ops.kda import chunk_kda\n" + CALL.format("chunk_kda"),
    "train.py": "from mine.kernels import kda\n" + CALL.format("kda"),
    "bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    "bin/torchrun": "#!/bin/sh\nexec python train.py\n",
    "bin/vllm": "#!/bin/sh\n",
    "bin/sglang": "#!/bin/sh\n",
    "sglang/__init__.py": "",
    "mine/__init__.py": "",
    "mine.py": "from kda_kernels.api import chunk_kda as prefill, fused_recurrent_kda as decode\n",
    "mykernel.py": "from kda_kernels.api import chunk_kda as prefill\n",
}
RECORDS = {"prefill": "prefill-h100", "now": "prefill-h100", "profile": "gate-h100", "new": "decode-h100"}
RECORDS |= {"before": "compile-sm90a", "verify": "verify-h100", "shard-1": "prefill-memory-h100"}


def save_steps(folder: Path) -> None:
    """Two decode steps, the second from the states that the first left."""
    folder.mkdir()
    pool, slots = torch.zeros(3, 1, 16, 16), torch.tensor([2, 0], dtype=torch.int32)
    switches = {"use_gate_in_kernel": False, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    for number in range(2):
        tokens = {name: torch.randn(2, 1, 1, 16) for name in ("q", "k", "v")}
        tokens |= {"g": -torch.rand(2, 1, 1, 16), "beta": torch.randn(2, 1, 1), "state_indices": slots}
        inputs = {**tokens, "state": pool.clone()}
        o = kda_decode(**tokens, **switches, state=pool, kernel="torch-decode")
        call = {"inputs": inputs, "outputs": {"o": o, "final_state": pool.clone()}}
        call |= {"options": {**switches, "op": "decode"}, "meta": {"target": "step", "call_number": number}}
        torch.save(call, folder / f"{number}.pt")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A folder of the files that commands name."""
    here = tmp_path_factory.mktemp("documents")
    small = ["-H", "1", "--head-dim", "16", "--device", "cpu"]
    prefill = ["run", "--kernel", "torch-prefill", "--lens", "5,3", *small]
    decode = ["run", "--kernel", "torch-decode", "--op", "decode", "-N", "2", *small]
    for name, words in (("dump.pt", prefill), ("dump.safetensors", decode), ("step.pt", decode)):
        assert CliRunner().invoke(cli, [*words, "--save", str(here / name)]).exit_code == 0
    copies = {"a.pt": "dump.pt", "b.pt": "dump.pt", "tp8/rank0.pt": "dump.pt", "tp1/rank0.pt": "dump.pt"}
    copies |= {f"{folder}/{i}.pt": "step.pt" for folder in ("before", "after") for i in range(2)}
    for copy, name in copies.items():
        (here / copy).parent.mkdir(exist_ok=True)
        shutil.copy(here / name, here / copy)
    torch.save({"prefill": torch.load(here / "dump.pt")}, here / "serving.pt")
    save_steps(here / "dumps")
    for name, text in PROGRAMS.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    for name, record in RECORDS.items():
        shutil.copy(ROOT / "benchmarks" / f"{record}.json", here / f"{name}.json")
    (here / "benchmarks").symlink_to(ROOT / "benchmarks")
    return here


RUN = [(where, words) for where, words in commands() if shlex.join(typed(words)) not in ELSEWHERE]


@pytest.mark.parametrize(("where", "words"), RUN, ids=lambda text: text)
def test_a_command_runs(where, words, named, tmp_path, monkeypatch):
    """On files as it names, with less to compute."""
    folder = shutil.copytree(named, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    given = shlex.join(typed(words))
    for pattern, less in LESS:
        given = re.sub(pattern, less, given)
    if re.match(NEEDED, given) and torch.cuda.is_available():
        pytest.skip("it would take minutes on a GPU; test_profile_*.py and test_peers_gpu.py run its like")
    if given.startswith("capture"):
        shutil.rmtree("dumps")
    done = CliRunner().invoke(cli, shlex.split(given))
    if re.match(ENGINES, given):
        assert done.exit_code == 1 and "nothing was recorded: the program never imported" in done.stderr
    elif re.match(NEEDED, given):
        assert done.exit_code == 3 and re.search(r"^Error: .*(GPU|is not installed|is not here)", done.stderr, re.M)
    else:
        assert done.exit_code == 0, given + done.output + done.stderr


def test_the_tutorial_word_by_word(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    wrong = re.search(r'```python title="mine.py"\n(.*?)```', text, re.S).group(1)
    mended = re.search(r"## Mended\n\n```python\n(.*?)```", text, re.S).group(1)
    lines = wrong.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("u = "))
    right = "".join(lines[:first]) + mended + "".join(lines[first + 2 :])

    def verify(source: str) -> subprocess.CompletedProcess:
        (tmp_path / "mine.py").write_text(source)
        words = ["verify", "--kernel", "mine.py:decode", "--shrink", "1"]
        return subprocess.run(
            [sys.executable, "-m", "kdacli", *words], cwd=tmp_path, env=os.environ, capture_output=True, text=True
        )

    failed = verify(wrong)
    assert failed.returncode == 1
    for said in re.findall(r"relative error (\d\.\d+e-\d+ > \d\.\d+e-\d+)", text):
        assert said in failed.stdout
    for error, case in re.findall(r"(\d\.\de-\d) in\s+`(decode-[a-z0-9-]+)`", text):
        found = re.search(rf"FAIL {case}/.*?final_state: relative error (\S+)", failed.stdout, re.S)
        assert f"{float(found.group(1)):.1e}".replace("e-0", "e-") == error
    assert verify(right).returncode == 0


def test_the_table_of_what_runs_where_is_what_kernels_say():
    made = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "support.py")], capture_output=True, text=True, check=True
    )
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert made.stdout.strip() in page.read_text(), f"python docs/support.py --write ({page.name})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_repository(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if (
            "://" not in target
            and not target.startswith("mailto:")
            and target not in ("speed.md", "cli.md", "../speed.md")
        ):
            found = (page.parent / target).exists() or target == "records/report.html" or target.startswith("cli.md")
            assert found, f"{page.name} links to {target}"


def test_every_environment_variable_is_documented():
    text, found = (ROOT / "docs" / "environment.md").read_text(), set()
    for folder in ("kdacli", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r'"(KDA_[A-Z_]+)"', path.read_text()))
    missing = [
        name for name in sorted(found) if name not in text and not name.startswith(("KDA_CAPTURE", "KDA_PROFILE"))
    ]
    assert len(found) > 5 and not missing


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'kdacli[docs]'")
    words = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run([sys.executable, "-m", "mkdocs", *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "records" / "report.html").stat().st_size > 100_000
    assert "cute-prefill" in (tmp_path / "site" / "speed" / "index.html").read_text()
    assert "--kernel" in (tmp_path / "site" / "cli" / "index.html").read_text()
