#!/usr/bin/env python3
"""Sets kda up on a fresh machine and runs it: needs Python 3.11 or newer and pip, nothing else.

    python3 dev.py verify [ARGS...]   kda verify: every kernel that can run here against the fp64 oracle
    python3 dev.py test [ARGS...]     lint, formatting, types and the tests; ARGS go to pytest
    python3 dev.py kda ARGS...        any other kda command
    python3 dev.py picture            draw docs/kda.svg from a real run
    python3 dev.py versions [NAME [ARGS...]]   kda verify, tests, and kda compile for every architecture, with other
                                      compilers: one of VERSIONS below, or all of them; ARGS go to pytest
    python3 dev.py wheel [TAG]        build dist/, and run what an installation of it alone has; TAG: of its version

The set-up is a virtual environment in .venv with what constraints.txt pins, made once and again when pyproject.toml or
constraints.txt changes; `versions` makes one in .venvs for each, `wheel` new ones. With --no-venv nothing is installed:
the Python that runs this file must have the packages, as on a GPU machine that reaches no package registry.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = "Scripts" if os.name == "nt" else "bin"
OWN_PIP = importlib.util.find_spec("ensurepip") is not None  # Debian's python3 comes without it
# The compilers that pyproject.toml admits, Triton beside a torch that asks for it. The rest is as in constraints.txt.
VERSIONS = {
    name: {"torch": torch, "triton": triton, "nvidia-cutlass-dsl": dsl, **others}
    for name, torch, triton, dsl, others in (
        # before 3.7 Triton's interpreter needs an older NumPy
        ("triton-3.5", "2.9.0", "3.5.0", "4.6.3", {"numpy": "2.3.5"}),
        ("triton-3.6", "2.11.0", "3.6.0", "4.7.1", {"numpy": "2.3.5", "setuptools": "81.0.0"}),
        ("triton-3.7", "2.13.0", "3.7.1", "4.8.1", {}),
        ("triton-3.8", "2.14.1", "3.8.0", "4.8.0", {}),
        ("triton-3.9", "2.15.0", "3.9.0", "4.8.1", {}),
    )
}
# Tests of the judge, of host code, dumps, screens and documents: they use no compiler, or a stand-in. `versions`
# leaves them out, and the baseline of compiled kernels, which holds for one compiler.
ALIKE = ("capture*", "compare*", "compile_baseline", "cute_*host", "documents", "dumps*", "engines", "judge", "mutants")
ALIKE += ("oracle", "packaging", "peers*", "profile*", "pytest_*", "report", "run_fla_tests", "verify", "verify_[b-z]*")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "gfx942", "gfx950")
UNKNOWN = {"triton-3.5": {"sm_103a"}}  # to the ptxas that comes with it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-venv", action="store_true", help="use this Python as it is and install nothing")
    parser.add_argument("command", choices=["verify", "test", "kda", "picture", "versions", "wheel"])
    parser.add_argument("args", nargs=argparse.REMAINDER, help="passed on")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what a Python that is too old meets first
        return fail("this is Python {}.{}: kda needs 3.11 or newer".format(*sys.version_info[:2]))
    try:
        if options.command in ("versions", "wheel"):
            return {"versions": versions, "wheel": wheel}[options.command](options.args)
        python = sys.executable if options.no_venv else set_up(VENV)
    except (OSError, subprocess.CalledProcessError) as error:
        return fail(f"the set-up did not finish: {error}")
    env = dict(os.environ)
    if options.no_venv:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    if options.command == "test":
        return test(python, env, options.args)
    if options.command == "picture":
        return run([python, str(ROOT / "docs" / "picture.py")], env)
    words = ["verify", *options.args] if options.command == "verify" else options.args
    return run([python, "-m", "kdacli", *words], env)


def set_up(folder: Path, pins: Mapping[str, str] | None = None) -> str:
    """Path of the Python of the virtual environment `folder`, which is made, or brought up to date, first.

    Args:
        pins: versions by package, instead of those in constraints.txt.
    """
    python = folder / BIN / "python"
    wanted = constraints(pins or {})
    stamp, constraint_file = folder / "kda-setup", folder / "constraints.txt"
    mark = hashlib.sha256((wanted + (ROOT / "pyproject.toml").read_text()).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == mark:
        return str(python)
    print(f"Setting up {folder.relative_to(ROOT)}: some minutes the first time", file=sys.stderr)
    if not python.exists():
        make(folder)
    constraint_file.write_text(wanted)
    # torch by itself first: then nothing that follows can choose another one
    install(python, "-c", str(constraint_file), "torch")
    install(python, "-c", str(constraint_file), "-e", f"{ROOT}[dev]")
    stamp.write_text(mark)
    return str(python)


def make(folder: Path) -> Path:
    """A new virtual environment, instead of the one that may be there; its Python."""
    venv.create(folder, with_pip=OWN_PIP, clear=True)
    return folder / BIN / "python"


def install(python: Path, *words: str) -> None:
    pip = [str(python), "-m", "pip"] if OWN_PIP else [sys.executable, "-m", "pip", "--python", str(python)]
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    # stdout belongs to the command that comes after, which may print JSON there
    command = [*pip, "install", "--disable-pip-version-check", *quiet, *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def constraints(pins: Mapping[str, str]) -> str:
    """constraints.txt with some versions replaced."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = ((line.partition("==")[0], line) for line in lines)
    return "".join(f"{name}=={pins[name]}\n" if name in pins else f"{line}\n" for name, line in named)


def versions(args: list[str]) -> int:
    """Tests and compiles with each of `VERSIONS`, or with the one that `args` names. 0 if all of it passed."""
    if args and args[0] not in VERSIONS:
        return fail(f"version is {args[0]}: it should be one of {', '.join(VERSIONS)}", 2)
    failed = []
    for name in args[:1] or VERSIONS:
        print(
            f"{name}: " + ", ".join(f"{package} {version}" for package, version in VERSIONS[name].items()), flush=True
        )
        python = set_up(ROOT / ".venvs" / name, VERSIONS[name])
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        archs = [word for arch in ARCHS if arch not in UNKNOWN.get(name, ()) for word in ("--arch", arch)]
        report = ROOT / ".venvs" / f"{name}.json"
        steps = [
            [python, "-m", "kdacli", "verify"],
            [*pytest(python), *(f"--ignore-glob=tests/test_{name}.py" for name in ALIKE), *args[1:]],
            [python, "-m", "kdacli", "compile", *archs, "--no-cache", "--json", str(report), "--force"],
        ]
        failed += [name for step in steps if run(step, env, cwd=ROOT)]
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}", file=sys.stderr)
    return 1 if failed else 0


def wheel(args: list[str]) -> int:
    """Builds dist/, checks what a package index would refuse, and runs the wheel where nothing else of ours is."""
    if len(args) > 1 or not all(word.startswith("v") for word in args):
        return fail(f"the tag is {' '.join(args)}: it should be one word, such as v0.1.0", 2)
    dist = ROOT / "dist"
    if dist.exists() and any(dist.iterdir()):
        return fail("dist is not empty: move away what is there", 2)
    builder = make(ROOT / ".venvs" / "build")
    install(builder, "build", "twine")
    subprocess.run([builder, "-m", "build", str(ROOT)], check=True, stdout=sys.stderr)
    (built,) = dist.glob("*.whl")
    tag = "v" + built.name.split("-")[1]
    if args and args[0] != tag:
        return fail(f"the tag is {args[0]}: it should be {tag}", 1)
    alone = make(ROOT / ".venvs" / "alone")
    install(alone, "-c", str(ROOT / "constraints.txt"), str(built))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kda = str(alone.parent / "kda")
    with tempfile.TemporaryDirectory() as elsewhere:
        steps = [
            [str(builder), "-m", "twine", "check", "--strict", *map(str, dist.iterdir())],
            [kda, "kernels"],
            [kda, "verify", "--op", "decode", "-N", "2", "-H", "1", "--kernel", "triton-decode"],
        ]
        return max([run(step, env, cwd=Path(elsewhere)) for step in steps])


def pytest(python: str) -> list[str]:
    workers = ["-n", "2", "--dist", "worksteal"] if has(python, "xdist") else []
    return [python, "-m", "pytest", "-q", "-rs", *workers]  # -rs: why tests are skipped


def test(python: str, env: dict[str, str], args: list[str]) -> int:
    """Runs lint, format check, type check and tests, all of them even if an early one fails. 0 if every one passed."""
    steps = []
    if has(python, "ruff"):
        steps += [[python, "-m", "ruff", "check", "."], [python, "-m", "ruff", "format", "--check", "."]]
    else:
        print("ruff is not installed here: lint and formatting are not checked", file=sys.stderr)
    if has(python, "mypy"):
        steps.append([python, "-m", "mypy"])
    else:
        print("mypy is not installed here: types are not checked", file=sys.stderr)
    if not has(python, "pytest"):
        return fail("pytest is not installed here", 3)
    steps.append([*pytest(python), *args])
    env = {**env, "OMP_NUM_THREADS": "1"}
    return max([run(step, env, cwd=ROOT) for step in steps])


def has(python: str, module: str) -> bool:
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", probe]).returncode == 0


def run(command: list[str], env: dict[str, str], cwd: Path | None = None) -> int:
    try:
        code = subprocess.run(command, env=env, cwd=cwd).returncode
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code  # ended by a signal: the shell's convention


def fail(message: str, code: int = 3) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
