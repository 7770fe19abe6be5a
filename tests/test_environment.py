"""What environment variables may hold: a wrong one ends every command before it does anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kda_kernels.errors import InputError
from kdacli import environment
from kdacli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = re.findall(r"`([A-Z][A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text())
FREE = {"NO_COLOR", "COLUMNS"}  # of terminals, where everybody passes over what makes no sense
# their owners check them
OTHERS = {"CUTE_DSL_LIBS", "FLA_DISABLE_BACKEND_DISPATCH", "FLA_FLASH_KDA", "NCCL_HOSTID", "PYTHONPATH"}
WRONG = {
    **dict.fromkeys(("KDA_CAUSAL", "KDA_CHECK_VALUES", "KDA_SANITIZE", "KDA_VLLM", "TRITON_INTERPRET"), "yes"),
    **dict.fromkeys(("KDA_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"), __file__),
    **dict.fromkeys(("KDA_ENGINE_SOURCES", "KDA_FLASHKDA_LIB", "KDA_VLLM_LIB"), f"{__file__}/none"),
    **dict.fromkeys(("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"), "-1"),
    "CC": '"gcc',
    "KDA_COMMIT": "a\nb",
    "KDA_CUTE_CACHE_SIZE": "0",
    "KDA_TRITON_ARCH": "sm_81",
    "TRITON_OVERRIDE_ARCH": "sm_80",
}


def test_every_variable_has_a_rule():
    """Of those that documents name, and of those that the code reads."""
    read = set(DOCUMENTED)
    for folder in ("kdacli", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text()))
    internal = {name for name in read if name.startswith(("KDA_CAPTURE", "KDA_PROFILE"))}  # set by kda alone
    assert read - internal - FREE - OTHERS <= set(environment.RULES) == set(WRONG)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_ends_every_command(name, monkeypatch):
    monkeypatch.setenv(name, WRONG[name])
    for command in COMMANDS:
        done = CliRunner().invoke(cli, [command])
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith(f"Error: {name} is ") and done.stderr.count("\n") == 1
    monkeypatch.setenv(name, "")
    environment.check()


def test_a_process_of_its_own(monkeypatch):
    """Modules that read a variable when they are imported come after the look at it."""
    monkeypatch.setenv("KDA_CUTE_CACHE_SIZE", "many")
    done = subprocess.run([sys.executable, "-m", "kdacli", "verify"], capture_output=True, text=True, cwd=ROOT)
    expected = "Error: KDA_CUTE_CACHE_SIZE is many: it should be a whole number from 1 on\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize("module", ["checks", "cute.cache"])
def test_the_library_does_not_take_a_wrong_one_either(module, monkeypatch):
    monkeypatch.setenv("KDA_CAUSAL" if module == "checks" else "KDA_CUTE_CACHE_SIZE", "many")
    code = f"import kda_kernels.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "kernels")
    assert f"{InputError.__name__}: KDA_C" in done.stderr
