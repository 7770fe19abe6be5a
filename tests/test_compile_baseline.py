"""`kda compile --baseline`: what counts as worse; and our own kernels against their committed baseline, with no GPU."""

import copy
import importlib.metadata
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kda_kernels.errors import InputError
from kdacli.compile import arch, baseline
from kdacli.main import cli

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "compile-sm90a.json"
OTHER_GPUS = ROOT / "benchmarks" / "compile-archs.json"  # what a default call launches on GPUs that are not Hopper
SASS = {"instructions": 100, "LDG": 10, "LDG.128": 8, "STG": 4, "STG.128": 4, "local": 0, "HGMMA": 2}
ROW = {
    "kernel": "k",
    "problem": None,
    "variant": "v",
    "arch": "sm_90a",
    "registers": 100,
    "spill_bytes": 0,
    "shared_bytes": 1024,
    "resident_blocks": 4,
    "limited_by": "registers",
    "binary_bytes": 5000,
    "compile_s": 1.5,
    "sass": SASS,
}


def changes(now: dict, *patterns: str) -> dict[str, tuple]:
    """What becomes of ROW, by number: before, now, is it fatal."""
    found = baseline.compare({"rows": [copy.deepcopy(ROW)]}, [now], patterns)
    return {c.what: (c.before, c.now, c.fatal is not None) for c in found}


def test_what_only_takes_longer_is_no_change():
    assert changes(ROW | {"compile_s": 99.0, "cached": True}) == {}


def test_numbers_are_changes_but_not_all_are_worse():
    assert changes(ROW | {"registers": 120, "binary_bytes": 4000}) == {
        "registers": (100, 120, False),
        "binary_bytes": (5000, 4000, False),
    }


@pytest.mark.parametrize(
    ("sass", "fatal"),
    [
        ({"LDG": 16, "LDG.128": 6}, True),  # two wide loads became eight narrow ones
        ({"LDG": 8, "LDG.128": 6}, False),  # two wide loads are gone
        ({"LDG": 14, "LDG.128": 12}, False),  # more, all wide
        ({"LDG": 14, "LDG.128": 8}, False),  # narrow ones came, none was lost
    ],
)
def test_a_lost_wide_load_is_worse(sass, fatal):
    found = changes(ROW | {"sass": SASS | sass})
    assert found.get("sass.LDG.128", (0, 0, False))[2] is fatal
    assert sum(f for _, _, f in found.values()) == fatal


def test_spills_and_local_memory_are_worse():
    assert changes(ROW | {"spill_bytes": 8})["spill_bytes"] == (0, 8, True)
    assert changes(ROW | {"spill_bytes": None})["spill_bytes"] == (0, None, True)
    assert changes(ROW | {"sass": SASS | {"local": 3}})["sass.local"] == (0, 3, True)


def test_rows_that_came_and_went():
    assert changes({"kernel": "k", "problem": None, "variant": "v", "arch": "sm_90a", "error": "no"}) == {
        "compiles": ("yes", "no", True)
    }
    two = [ROW, ROW | {"variant": "w"}]
    (gone,) = baseline.compare({"rows": two}, [ROW])
    assert (gone.variant, gone.what, gone.fatal is not None) == ("w", "there", True)
    assert baseline.compare({"rows": two}, [ROW], ["v"]) == [], "nobody asked for w"
    (new,) = baseline.compare({"rows": [ROW]}, two)
    assert (new.variant, new.what, new.fatal) == ("w", "there", None)
    assert baseline.compare({"rows": [*two, ROW | {"arch": "sm_80"}]}, two) == [], "nobody asked for sm_80"


def test_reports_that_have_nothing_in_common_are_refused():
    with pytest.raises(InputError, match="no row in common"):
        baseline.compare({"rows": [ROW]}, [ROW | {"arch": "sm_80"}])


def test_another_compiler_is_said():
    reports = [{"provenance": {"packages": {"triton": version, "torch": "2"}}} for version in ("3.6.0", "3.7.1")]
    (line,) = baseline.other_compilers(*reports)
    assert "made with triton 3.6.0, this with 3.7.1" in line
    assert baseline.other_compilers(reports[0], reports[0]) == []
    assert "(not recorded)" in baseline.other_compilers({}, reports[0])[0]


@pytest.mark.parametrize("text", ["[]", '{"schema": "kda.compile/1"}', '{"schema": "kda.profile/1", "rows": []}'])
def test_what_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="no report of kda compile"):
        baseline.load(str(tmp_path / "x.json"))


def kda(*words: str) -> Result:
    """The command in this process; its workers are others."""
    return CliRunner().invoke(cli, list(words))


def same_compiler(name: str) -> None:
    """Skips where the numbers of the committed baseline would be another compiler's."""
    made_with = baseline.compilers(baseline.load(str(COMMITTED)))[name]
    try:
        here = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        here = "none"
    if here != made_with:
        pytest.skip(f"{COMMITTED.name} was made with {name} {made_with}, here is {here}")


MAIN = {
    "triton": {
        "triton-decode": ("decode softplus", "decode safe", "decode softplus bf16-state"),
        "triton-prefill": ("chunk_factors_bounded safe", "chunk_inverse safe", "chunk_chain safe"),
        "triton-gate": ("gate_cumsum safe",),
    },
    "nvidia-cutlass-dsl": {
        "cute-decode": ("softplus", "softplus few", "softplus bf16-state"),
        "cute-prefill": ("safe dense", "safe split", "softplus"),
    },
}


@pytest.mark.parametrize("compiler", MAIN)
def test_our_kernels_are_no_worse_than_their_baseline(tmp_path, monkeypatch, compiler):
    """A gate: whoever makes a kernel spill, or lose a wide access, sees it here. Meant: write the baseline anew, with
    kda compile --arch sm_90a --no-cache --json benchmarks/compile-sm90a.json --force
    """
    same_compiler(compiler)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    words = [word for kernel in MAIN[compiler] for word in ("--kernel", kernel)]
    words += [word for variants in MAIN[compiler].values() for name in variants for word in ("--variant", name)]
    done = kda("compile", *words, "--arch", "sm_90a", "--jobs", "2", "--baseline", str(COMMITTED), "--strict")
    assert done.exit_code == 0, done.stdout + done.stderr
    count = sum(map(len, MAIN[compiler].values()))
    assert f"{count} compiled, 0 taken from the cache: {tmp_path}" in done.stdout


def test_triton_is_no_worse_for_other_gpus(tmp_path, monkeypatch):
    """One kernel for two of them, as compiling all takes minutes: kda compile --baseline benchmarks/compile-archs.json
    --strict with its command compares all.
    """
    same_compiler("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ["--kernel", "triton-decode", "--variant", "decode safe", "--arch", "sm_80", "--arch", "gfx950"]
    done = kda("compile", *words, "--jobs", "2", "--baseline", str(OTHER_GPUS), "--strict")
    assert done.exit_code == 0, done.stdout + done.stderr
    assert "2 compiled, 0 taken from the cache" in done.stdout


def test_nothing_that_other_gpus_launch_spills():
    rows = json.loads(OTHER_GPUS.read_text())["rows"]
    assert {row["arch"] for row in rows} == {*arch.ARCHS} - {"sm_90a", "sm_87", "sm_121a"}
    assert [(row["variant"], row["arch"]) for row in rows if row.get("spill_bytes") != 0] == []


def test_a_worse_kernel_fails_the_gate(tmp_path, monkeypatch):
    """The same command, against a baseline that says the kernel had more wide loads once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words = ["compile", "--kernel", "triton-gate", "--variant", "gate_cumsum none", "--arch", "sm_90a", "--jobs", "1"]
    first = tmp_path / "first.json"
    assert kda(*words, "--json", str(first)).exit_code == 0
    report = json.loads(first.read_text())
    counts = report["rows"][0]["sass"]
    counts["LDG.128"] += 2
    counts["LDG"] -= 4
    report["provenance"]["packages"]["triton"] = "3.0.0"
    better = tmp_path / "better.json"
    better.write_text(json.dumps(report))
    done = kda(*words, "--baseline", str(better), "--strict", "--json", "-")
    assert done.exit_code == 1
    assert "made with triton 3.0.0" in done.stderr
    assert "2 16-byte accesses less, 6 narrower ones more" in done.stderr
    assert done.stderr.endswith(f"1 is worse than in {better}\n")
    (fatal,) = [change for change in json.loads(done.stdout)["changes"] if change["fatal"]]
    assert (fatal["what"], fatal["before"] - fatal["now"]) == ("sass.LDG.128", 2)
