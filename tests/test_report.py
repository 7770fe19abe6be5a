"""`kda report`: what the page says, of records made here and of those in the repository, and how it looks."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from kdacli.main import cli
from kdacli.report import page, parts

RECORDS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.json"))
MADE = {
    "kda": "0",
    "command": "kda verify",
    "date": "2026-01-01",
    "seed": 0,
    "commit": None,
    "packages": {},
    "gpu": None,
}
TENSOR = {"tensor": "o", "error": "NaN", "bound": 1e-3, "passed": False, "note": "NaN, first at <token 7>"}
FAILED = {
    "op": "decode", "case": "c", "kernel": "<script>alert(1)</script>", "status": "fail", "tensors": [TENSOR],
    "properties": [{"name": "graph", "status": "pass", "notes": []}], "notes": [], "looks_like": ["it is transposed"],
    "reproduce": "kda verify --case c", "maps": ["o, sequence 0: 2 heads down", "      head 0 .-+*#N|."],
}  # fmt: skip


def verified(shard: str | None = None, **row):
    return {
        "schema": "kda.verify/1", "provenance": MADE, "device": "CPU", "shard": shard, "rows": [{**FAILED, **row}],
        "not_run": [], "searched": [], "seconds": {"checking": 1.0}, "complete": True, "summary": "1 check: 1 failed",
    }  # fmt: skip


def write(folder: Path, *records) -> list[str]:
    paths = [folder / f"{i}.json" for i in range(len(records))]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps(record))
    return [str(path) for path in paths]


def report(*args: str):
    return CliRunner(catch_exceptions=False).invoke(cli, ["report", *args])


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> Path:
    """A page of a committed record of each kind, and of a failure; the site's has all records (`test_documents`)."""
    folder, kinds = tmp_path_factory.mktemp("report"), dict[tuple, Path]()
    for path in sorted(RECORDS, key=lambda path: path.stem != "decode-h100"):
        record = json.loads(path.read_text())
        made, rows = record.get("provenance") or {}, record.get("rows") or []
        ops = frozenset(row.get("op") for row in rows if isinstance(row, dict))
        kinds.setdefault((record["schema"], ops, "--sweep" in str(made.get("command"))), path)
    records = [*write(folder, verified()), *map(str, kinds.values())]
    assert report(*records, "-o", str(folder / "all.html")).exit_code == 0
    return folder / "all.html"


def test_a_failure_is_shown_with_its_map_and_nothing_of_a_record_is_markup(every):
    html = every.read_text()
    assert "&lt;script&gt;alert(1)" in html and "<script" not in html
    assert "NaN, first at &lt;token 7&gt;" in html and "looks like: it is transposed" in html
    assert '<span class="l4">#</span><span class="l5">N</span>' in html
    assert "kda verify --case c" in html


def test_every_time_of_a_record_is_in_the_page(every):
    data = json.loads(next(path for path in RECORDS if path.stem == "decode-h100").read_text())
    html = every.read_text()
    for row in data["rows"]:
        assert f"{parts.fmt_us(row['low_us'])} to {parts.fmt_us(row['high_us'])}" in html


def test_the_page_needs_nothing_else(every):
    html = every.read_text()
    assert len(html) < page.LARGEST
    assert not re.search(r'(src|href)="(?!data:|#)', html) and "@import" not in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_in_a_browser(every, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    # Text may be wider than its box only where the box scrolls.
    look = """<script>onload = () => { document.title = JSON.stringify({
      wide: document.documentElement.scrollWidth - innerWidth,
      cut: [...document.querySelectorAll("h1, h2, h3, p, li, td, svg")]
        .filter(e => e.getBoundingClientRect().right > innerWidth && !e.closest(".scroll")).length,
      drawn: [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height > 50).length
    }) }</script>"""
    framed = every.read_text().replace("</head>", f"{look}</head>")
    (tmp_path / "page.html").write_text(framed)
    (tmp_path / "frame.html").write_text(
        f"<iframe id=f src=page.html style='width:{width}px;height:900px'></iframe><p id=said></p>"
        "<script>f.onload = () => setTimeout(() => { said.textContent = f.contentDocument.title }, 100)</script>"
    )
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
    ]
    words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'chrome'}", "--dump-dom"]
    ran = subprocess.run(
        [browser, *words, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    found = json.loads(re.search(r'<p id="said">(.*?)</p>', ran.stdout).group(1))
    assert found["wide"] <= 0 and found["cut"] == 0
    assert found["drawn"] == every.read_text().count("<svg") > 10
    assert "CONSOLE" not in ran.stderr


def test_shards_are_one_run(tmp_path):
    one = write(tmp_path, verified("1/2"), verified("2/2", status="pass", case="d", tensors=[], looks_like=[]))
    assert report(*one, "-o", str(tmp_path / "r.html")).output.strip().endswith("1 sections of 2 records")
    assert "1 passed, 1 failed" in (tmp_path / "r.html").read_text()
    missing = report(one[1], "-o", str(tmp_path / "x.html"))
    assert missing.exit_code == 2 and "shard 1/2 is missing" in missing.output and not (tmp_path / "x.html").exists()


def test_shards_of_another_run_are_not_joined(tmp_path):
    """Of another suite, say: all but the shard and the files of the command has to be the same."""
    here, there = verified("1/2"), verified("2/2")
    here["provenance"] = {**MADE, "command": "kda verify --suite quick --shard 1/2 --json a.json"}
    there["provenance"] = {**MADE, "command": "kda verify --suite full --shard 2/2 --json b.json"}
    found = report(*write(tmp_path, here, there), "-o", str(tmp_path / "r.html"))
    assert found.exit_code == 2 and "shard 2/2 is missing" in found.output
    there["provenance"]["command"] = "kda verify --suite quick --shard 2/2 --json=b.json --force"
    assert report(*write(tmp_path, here, there), "-o", str(tmp_path / "r.html")).exit_code == 0


def test_a_replay_and_a_check_over_ranks(tmp_path):
    trace = {"trace": "layer 3", "steps": 2, "kernel": "k", "refused": None, "passed": True, "verdicts": []}
    row = {
        "op": "decode",
        "kernel": None,
        "tensor": "o",
        "calls": 2,
        "failed": 1,
        "error": 0.25,
        "bound": 1e-3,
        "call": "c7",
    }
    replayed = {
        "schema": "kda.verify-replay/1", "provenance": MADE, "dump": "dumps", "rows": [row], "broken": ["b.pt is torn"],
        "traces": [{**trace, "o": [1e-3, 2e-3], "states": [1e-7, "NaN"]}], "wrong": ["c7: o is off"], "notes": [],
    }  # fmt: skip
    over = {"case": "an empty rank", "tensor": "o", "error": 1e-3, "bound": 2e-3, "passed": True, "note": ""}
    ranks = {"schema": "kda.verify-cp/1", "provenance": MADE, "ranks": 4, "rows": [over]}
    assert report(*write(tmp_path, replayed, ranks), "-o", str(tmp_path / "r.html")).exit_code == 0
    html = (tmp_path / "r.html").read_text()
    assert "2 results are wrong" in html and "b.pt is torn" in html and "as recorded" in html and "2.50e-01" in html
    assert html.count("<svg") == 2 and "an empty rank" in html and "1 tensors passed" in html


def test_what_changed_since_a_baseline(tmp_path):
    old = json.loads(next(path for path in RECORDS if path.stem == "prefill-1m-h100").read_text())
    new = json.loads(json.dumps(old))
    new["rows"][0] |= {key: 1.5 * new["rows"][0][key] for key in ("median_us", "low_us", "high_us")}
    before, after = write(tmp_path, old, new)
    assert report(after, "--baseline", before, "-o", str(tmp_path / "r.html")).exit_code == 0
    html = (tmp_path / "r.html").read_text()
    assert "1 of ours slower or failed" in html and "1.500" in html


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1", "it is no JSON"),
        ('{"schema": "kda.verify/2"}', "its schema is kda.verify/2"),
        ('{"schema": "kda.verify/1", "rows": []}', "no whole record"),
        ('{"schema": "kda.profile/2", "rows": [{}]}', "no recording that can be read|cannot be read"),
    ],
)
def test_what_is_no_record(tmp_path, text, said):
    (tmp_path / "r.json").write_text(text)
    found = report(str(tmp_path / "r.json"), "-o", str(tmp_path / "r.html"))
    assert found.exit_code == 2 and re.search(said, found.output) and found.output.count("\n") == 1


def test_a_page_is_not_overwritten(tmp_path):
    (tmp_path / "r.html").write_text("mine")
    assert report(*write(tmp_path, verified()), "-o", str(tmp_path / "r.html")).exit_code == 2
    assert (tmp_path / "r.html").read_text() == "mine"
