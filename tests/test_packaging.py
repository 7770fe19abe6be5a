"""What gets installed, and the set-up script."""

import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "kdacli", "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that pyproject.toml names, as pip would, from a copy without leftovers."""
    have = importlib.metadata.version("setuptools")
    if Version(have) < Version("77"):
        pytest.skip(f"setuptools is {have}: 77 or newer is needed to build")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tree)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tree)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tree.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    return email.message_from_bytes(read(wheel, ".dist-info/METADATA"))


def read(wheel: Path, suffix: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(suffix)]
        return archive.read(name)


def test_only_our_two_packages_are_installed(wheel):
    """Hugging Face's package has the import name `kernels`: ours must not be installed over it."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kdacli", "kda_kernels"}


def test_every_module_is_in_the_wheel(wheel):
    sources = {
        str(file.relative_to(root))
        for root, package in ((ROOT, "kdacli"), (ROOT / "kernels", "kda_kernels"))
        for file in (root / package).rglob("*.py")
    }
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == sources


def test_users_type_checkers_are_told_to_read_our_annotations(wheel):
    """The marker of PEP 561: without it a user's type checker takes everything of ours for Any."""
    assert {"kdacli/py.typed", "kda_kernels/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from kdacli.main import main; main()"
    words = [sys.executable, "-I", "-c", code, str(tmp_path), "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "kda 0.1.0\n"), done.stderr


def test_metadata(wheel, metadata):
    assert metadata["Name"] == "kdacli"
    assert metadata["Version"] == "0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.search(r"^kda = kdacli\.main:main$", read(wheel, "entry_points.txt").decode(), re.MULTILINE)
    for engine, group in (("sglang", "sglang.srt.plugins"), ("vllm", "vllm.general_plugins")):
        expected = f"[{group}]\nkda = kda_kernels.engines.{engine}:install\n"
        assert expected in read(wheel, "entry_points.txt").decode()


def test_dependencies_are_open_ranges(metadata):
    """They live beside an SGLang or vLLM release, which pins its own torch: at least, never exactly or at most."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {"torch", "triton", "numpy", "click", "rich", "nvtx", "safetensors"} <= {r.name for r in requirements}
    assert {spec.operator for r in requirements for spec in r.specifier} == {">="}


def stub(folder: Path, name: str, version: str, requires: Iterable[str] = ()) -> None:
    """A wheel that holds nothing, and asks for what `requires` says."""
    stem = f"{name.replace('-', '_')}-{version}"
    said = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {x}" for x in requires)]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(said))
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def resolved(folder: Path, *words: str) -> dict[str, str]:
    """What pip would install from the wheels of a folder, by name: the version."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [*pip, "--no-index", "--find-links", str(folder), *words], env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = (one["metadata"] for one in json.loads(done.stdout)["install"])
    return {canonicalize_name(one["name"]): one["version"] for one in found}


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")
@pytest.mark.parametrize("engine", ["sglang-0.5.23", "vllm-0.33.0"])
def test_pip_installs_the_same_versions_of_an_engines_packages_with_and_without_ours(wheel, metadata, engine, tmp_path):
    """Of the release's own requirements, as its wheel's metadata has them, in an index of empty wheels: each package
    in each version that anybody names, one far below and one far beyond."""
    lines = (ROOT / "tests" / "data" / f"requires-{engine}.txt").read_text().splitlines()
    versions: dict[str, set[str]] = {"triton": {"0.1", "3.8.0", "9999"}}
    for requirement in map(Requirement, (*lines, *metadata.get_all("Requires-Dist"))):
        named = {spec.version.replace("*", "0") for spec in requirement.specifier}
        versions.setdefault(canonicalize_name(requirement.name), {"0.1", "9999"}).update(named)
    for name, several in versions.items():
        for version in several if name != "kdacli" else ():
            torchs = ["triton==3.8.0"] if (name, version[:4]) == ("torch", "2.14") else []  # what torch 2.14 pins
            stub(tmp_path, name, version, torchs)
    name, version = engine.split("-")
    stub(tmp_path, name, version, lines)
    shutil.copy(wheel, tmp_path)
    alone = resolved(tmp_path, name)
    beside = resolved(tmp_path, name, "kdacli[cute,verify,plot,report]")
    assert alone["torch"].startswith("2.14") and {"kdacli", "nvidia-cutlass-dsl", "apache-tvm-ffi"} <= set(beside)
    assert {name: beside[name] for name in alone} == alone


def test_constraints_pin_every_dependency_within_its_range(metadata):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.name != "kdacli":  # its own extras
            assert requirement.specifier.contains(pins.pop(requirement.name)), requirement
    assert not pins, "nothing is pinned that is not a dependency"


def test_version_is_in_the_changelog():
    import kda_kernels
    import kdacli

    assert kda_kernels.__version__ == kdacli.__version__
    assert f"## [{kdacli.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def dev(*words: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, str(ROOT / "dev.py"), *words], env=env, capture_output=True, text=True)


def test_dev_without_venv_runs_kda_as_it_is(tmp_path):
    done = dev("--no-venv", "kda", "--version")
    assert (done.returncode, done.stdout) == (0, "kda 0.1.0\n"), done.stderr


def test_dev_passes_exit_codes_on():
    done = dev("--no-venv", "kda", "verfy")
    assert done.returncode == 2
    assert "verify" in done.stderr


def test_dev_refuses_what_it_does_not_know():
    assert dev("--no-venv", "install").returncode == 2
    done = dev("versions", "triton-1.0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "one of triton-3.5, " in done.stderr
    for words in (["--help"], ["v0.1.0", "v0.1.1"]):  # before anything is built
        done = dev("wheel", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "such as v0.1.0" in done.stderr


@pytest.fixture(scope="module")
def module():
    """dev.py."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_within_the_ranges(metadata, module):
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        found = [pins[requirement.name] for pins in module.VERSIONS.values() if requirement.name in pins]
        assert all(map(requirement.specifier.contains, found)), requirement
        if requirement.name in ("torch", "triton", "nvidia-cutlass-dsl"):  # the oldest that is promised is tested
            assert str(min(map(Version, found))).startswith(min(spec.version for spec in requirement.specifier))
    pins = module.constraints(module.VERSIONS["triton-3.5"]).splitlines()
    assert {"triton==3.5.0", "numpy==2.3.5", "click==8.5.1"} <= set(pins)


def test_tests_that_versions_leave_out_are_there(module):
    for name in module.ALIKE:
        assert list((ROOT / "tests").glob(f"test_{name}.py")), name


def test_ci_runs_the_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec python3 dev.py test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_workflows_run_what_everybody_can_run(metadata, module):
    """A step is an action or one command of dev.py, with each version and each Python that we promise."""
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    jobs = {name: job for file in files.values() for name, job in file["jobs"].items()}
    ran = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert ran == {
        "build": ['python dev.py wheel "$GITHUB_REF_NAME"'],
        "test": [".ci/run"],
        "pythons": ["python dev.py test"],
        "versions": ["python dev.py versions ${{ matrix.version }}"],
    }
    matrix = {
        axis: values for job in jobs.values() for axis, values in job.get("strategy", {}).get("matrix", {}).items()
    }
    assert matrix["version"] == list(module.VERSIONS)
    promised = re.findall(r":: (3\.\d+)$", "\n".join(metadata.get_all("Classifier")), re.MULTILINE)
    assert {*matrix["python"], jobs["test"]["steps"][1]["with"]["python-version"]} == set(promised)


def test_the_readmes_example_runs():
    """As printed, except that it runs where the tests do, with one head and prompts of a tenth."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for printed, here in (("H, K, V, slots = 12,", "H, K, V, slots = 1,"), ("170", "17"), ("100", "10")):
        example = example.replace(printed, here)
    if not torch.cuda.is_available():
        example = example.replace('"cuda"', '"cpu"')
    example += "assert o.shape == (1, 17, H, V) and o.isfinite().all() and pool[slot.long()].count_nonzero() > 0\n"
    example += "assert y.shape == (2, H, V) and y.isfinite().all() and windows[slot.long()].count_nonzero() > 0\n"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", example], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
