"""The documents say what is so: every command in them can be typed, the tutorial runs, tables and links hold."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

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
        for line in re.findall(r"^(?: {2,}|\$ |    \$ )\s*(?:\$ )?(kda [a-z].*)$", text, re.M):
            words = re.split(r"\s{2,}|\s+#|\s*[|>]", line.strip())[0]
            seen.setdefault(words, where)
    return sorted((where, words) for words, where in seen.items())


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda text: text)
def test_a_command_can_be_typed(where, words):
    """Its flags and their values are those of the command. What it would do is tested elsewhere."""
    words = re.sub(r"\.\.\.| &$", "", words).replace("$i", "1").replace("DIR", ".")
    _, name, *rest = shlex.split(words)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    command.make_context(f"kda {name}", rest)  # raises what the user would read


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
