"""`benchmarks/prefill_grid.py` without a GPU: its inputs, and what it says of times."""

import importlib.util
from pathlib import Path

import torch

from kda_kernels.checks import check_inputs, problem_of
from kda_kernels.problem import Gate, Op
from kdacli.report import parts

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "prefill_grid.py"
SPEC = importlib.util.spec_from_file_location("prefill_grid", PATH)
assert SPEC is not None and SPEC.loader is not None
grid = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(grid)


def rows(times: dict[int, dict[str, float]]) -> list[dict]:
    return [{"T": T, "H": 3, "N": 1, "us": us} for T, us in times.items()]


def test_cells_are_views_of_one_set_of_tensors():
    made = grid.Grid("softplus", 96 * 32, device="cpu")
    for cell in (grid.Cell(16, 12, 4), grid.Cell(64, 48, 1)):
        inputs = made.inputs(cell)
        check_inputs(inputs)
        problem = problem_of(inputs, Op.PREFILL)
        assert problem.seq_lens == (cell.T,) * cell.N and problem.H == problem.HV == cell.H
        assert problem.options.gate is Gate.SOFTPLUS
        assert inputs.k.untyped_storage().data_ptr() == made.all.k.untyped_storage().data_ptr()
        assert torch.equal(inputs.q.flatten()[:128], made.all.q.flatten()[:128])


def test_where_another_kernel_is_ahead():
    found = list(grid.ahead(rows({16: {"a": 10.0, "b": 9.0}, 32: {"a": 10.0, "b": 9.9}, 64: {"b": 1.0}}), "a"))
    assert found == ["T=16 H=3 N=1: a 10.0 us, b 9.0 (0.90)"]


def test_what_sticks_out():
    times = {16: {"a": 10.0}, 32: {"a": 13.0}, 64: {"a": 16.0}, 128: {"a": 22.0}}
    assert list(grid.sticking_out(rows(times), "a")) == ["T=32 H=3 N=1: a 13.0 us, 8.3% over the line"]


def test_a_page_marks_where_another_kernel_is_ahead():
    ours = "cute-prefill"
    times = {
        16: {ours: 10.0, "b": 15.0, "c": 12.0},
        32: {ours: 10.0, "b": 9.0},
        64: {ours: 10.0, "b": 9.9},
        128: {"b": 1.0},
    }
    data = {"gate": "safe", "dtype": "bf16", "provenance": {}, "rows": rows(times)}
    data["rows"][3]["errors"] = {ours: "no memory"}
    (part,) = parts.prefill_grid(data)
    gains = [(row[0].text, row[1].text, row[1].style) for row in part.tables[0].rows]
    assert gains == [("16", "1.20", ""), ("32", "0.90", parts.BAD), ("64", "0.99", ""), ("128", "-", parts.FAINT)]
    assert part.verdict == parts.Cell("another is ahead by over 2% in 1 of 3", parts.BAD)
    assert part.lines[1].startswith("In 1 of 4 cells") and part.tables[-1].rows[3][-1].text == f"{ours} no memory"
