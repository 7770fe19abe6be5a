"""What the scripts in benchmarks/ say before they begin, on a machine with no GPU."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = sorted(Path(__file__).resolve().parent.parent.joinpath("benchmarks").glob("*.py"))
BEFORE_THE_FILE = {"capture": [], "convolution": [".", "--json"], "engine_layers": [".", "--json"]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_record_that_would_be_lost_and_a_gpu_that_is_not_there_are_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = tmp_path / "record.json"
    record.write_text("kept")

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", [script.name, *BEFORE_THE_FILE.get(script.stem, ["--json"]), str(record), *more]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    assert run() == (2, f"Error: {record} exists: use --force to overwrite it\n")
    assert run("--force") == (3, f"Error: {script.name} needs a CUDA GPU and there is none\n")
    assert record.read_text() == "kept"
