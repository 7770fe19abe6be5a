#!/usr/bin/env python3
"""Sets kda up on a fresh machine and runs it: needs Python 3.11 or newer and pip, nothing else.

    python3 dev.py verify [ARGS...]   kda verify: every kernel that can run here against the fp64 oracle
    python3 dev.py test [ARGS...]     lint, formatting, types and the tests; ARGS go to pytest
    python3 dev.py kda ARGS...        any other kda command
    python3 dev.py picture            draw docs/kda.svg from a real run

The set-up is a virtual environment in .venv with what constraints.txt pins, made once and again when pyproject.toml or
constraints.txt changes. With --no-venv nothing is installed: the Python that runs this file must have the packages,
as on a GPU machine that reaches no package registry.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "kda-setup"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-venv", action="store_true", help="use this Python as it is and install nothing")
    parser.add_argument("command", choices=["verify", "test", "kda", "picture"])
    parser.add_argument("args", nargs=argparse.REMAINDER, help="passed on")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what a Python that is too old meets first
        return fail("this is Python {}.{}: kda needs 3.11 or newer".format(*sys.version_info[:2]))
    try:
        python = sys.executable if options.no_venv else set_up()
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


def set_up() -> str:
    """Path of the Python in .venv, which is made, or brought up to date, first."""
    python = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = fingerprint()
    if python.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return str(python)
    print("Setting up .venv: some minutes the first time", file=sys.stderr)
    own_pip = importlib.util.find_spec("ensurepip") is not None  # Debian's python3 comes without it
    if not python.exists():
        venv.create(VENV, with_pip=own_pip)
    pip = [str(python), "-m", "pip"] if own_pip else [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    install += [] if sys.stderr.isatty() else ["--quiet"]
    # stdout belongs to the command that comes after, which may print JSON there
    # torch by itself first: then nothing that follows can choose another one
    subprocess.run([*install, "torch"], check=True, stdout=sys.stderr)
    subprocess.run([*install, "-e", f"{ROOT}[dev]"], check=True, stdout=sys.stderr)
    STAMP.write_text(wanted)
    return str(python)


def fingerprint() -> str:
    """Changes whenever what is to be installed does."""
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


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
    workers = ["-n", "2", "--dist", "worksteal"] if has(python, "xdist") else []
    steps.append([python, "-m", "pytest", "-q", "-rs", *workers, *args])  # -rs: why tests are skipped
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
