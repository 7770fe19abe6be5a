"""`kda compare`: our kernels, and the dump itself, against the oracle; and tensors of a real layer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import oracle, plain_chunk
from kda_kernels.tensors import Outputs
from kdacli import comparison
from kdacli.dumps import load, load_all, save
from kdacli.dumps.strides import copy_with_strides
from kdacli.main import cli
from kdacli.synthetic import make_inputs

FLA_LAYER = Path(__file__).parent / "data" / "fla_layer.pt"
SAFE = Options(gate="safe", lower_bound=-5.0)
PREFILL = Problem(op="prefill", seq_lens=(17, 0, 33), H=1, HV=2, K=16, V=16, options=SAFE)
DECODE = Problem(op="decode", seq_lens=(1,) * 3, H=1, HV=2, K=16, V=16, options=SAFE, pool_slots=5, padding=1)


def kda(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def report(*args: object) -> tuple[dict, Result]:
    """The JSON of `kda compare ARGS --json -`."""
    result = kda("compare", *args, "--json", "-")
    assert result.stdout, result.stderr
    return json.loads(result.stdout), result


def recorded(problem: Problem, **changes):
    """Inputs, and what the oracle makes of them, rounded as a kernel rounds."""
    inputs = dataclasses.replace(make_inputs(problem, gates="init"), **changes)
    exact = oracle.recurrence(inputs)
    return inputs, Outputs(exact.o.to(inputs.v.dtype), exact.final_state.to(inputs.state.dtype))


@pytest.fixture
def prefill(tmp_path):
    save(path := tmp_path / "prefill.pt", *recorded(PREFILL), op="prefill")
    return path


@pytest.fixture
def decode(tmp_path):
    save(path := tmp_path / "decode.safetensors", *recorded(DECODE), op="decode")
    return path


def rows(result: dict, kernel: str | None) -> list[dict]:
    return [row for row in result["rows"] if row["kernel"] == kernel]


class TestGoodDump:
    def test_prefill(self, prefill):
        before = prefill.read_bytes()
        result, run = report(prefill)
        assert run.exit_code == 0, run.output
        assert result["schema"] == "kda.compare/1"
        assert {"provenance", "device", "dump"} <= result.keys()
        ran = {row["kernel"] for row in result["rows"]}
        assert {None, "triton-prefill", "torch-prefill"} <= ran
        assert all(row["passed"] and row["error"] <= row["bound"] for row in result["rows"])
        for kernel in ran:
            assert [row["tensor"] for row in rows(result, kernel)] == ["o", "final_state"]
        assert all(row["vs_dump"] is None for row in rows(result, None))
        assert all(0 < row["vs_dump"] < 2 * row["bound"] for row in rows(result, "triton-prefill"))
        assert rows(result, "torch-prefill")[0]["where"].keys() == {"sequence", "token", "head", "channel"}
        assert prefill.read_bytes() == before

    def test_decode_over_a_pool(self, decode):
        before = decode.read_bytes()
        result, run = report(decode)
        assert run.exit_code == 0, run.output
        assert {None, "triton-decode", "torch-decode"} <= {row["kernel"] for row in result["rows"]}
        assert all(row["passed"] for row in result["rows"])
        assert decode.read_bytes() == before

    def test_gate(self, tmp_path):
        inputs = make_inputs(dataclasses.replace(PREFILL, op=Op.GATE))
        save(tmp_path / "d.pt", inputs, Outputs(oracle.gate_cumsum(inputs).float()), op="gate")
        result, run = report(tmp_path / "d.pt")
        assert run.exit_code == 0, run.output
        assert {None, "triton-gate", "triton-gate-unfused"} <= {row["kernel"] for row in result["rows"]}
        assert {row["tensor"] for row in result["rows"]} == {"g_cumsum"}

    def test_what_does_not_run_is_told(self, prefill):
        result, _ = report(prefill)
        names = {row["kernel"] for row in result["rows"]} | {skip["kernel"] for skip in result["calls"][0]["not_run"]}
        assert {"triton-prefill", "torch-prefill", "fla-prefill"} <= names
        assert all(skip["reason"] for skip in result["calls"][0]["not_run"])
        assert "not run: fla-prefill: " in kda("compare", prefill).stdout

    def test_only_the_kernels_asked_for(self, prefill):
        result, _ = report(prefill, "--kernel", "torch-prefill")
        assert {row["kernel"] for row in result["rows"]} == {None, "torch-prefill"}
        assert result["calls"][0]["not_run"] == []

    def test_table_and_notes(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        inputs, outputs = recorded(PREFILL)
        torch.save(
            {"inputs": inputs.tensors(), "options": {"lower_bound": -5.0}, "outputs": outputs.tensors()},
            p := tmp_path / "d.pt",
        )
        run = kda("compare", p, "--kernel", "torch-prefill")
        assert run.exit_code == 0, run.output
        for words in (
            "the dump",
            "torch-prefill",
            "final_state",
            "vs dump",
            "note: op is not said: prefill",
            "4 results within",
        ):
            assert words in run.stdout

    def test_without_outputs(self, tmp_path):
        save(tmp_path / "d.pt", make_inputs(PREFILL), op="prefill")
        result, run = report(tmp_path / "d.pt", "--kernel", "torch-prefill")
        assert run.exit_code == 0, run.output
        assert {row["kernel"] for row in result["rows"]} == {"torch-prefill"}
        assert {row["vs_dump"] for row in result["rows"]} == {None}

    def test_without_a_final_state(self, tmp_path):
        inputs, outputs = recorded(PREFILL)
        save(tmp_path / "d.pt", inputs, dataclasses.replace(outputs, final_state=None), op="prefill")
        result, run = report(tmp_path / "d.pt", "--kernel", "torch-prefill")
        assert run.exit_code == 0, run.output
        assert [row["tensor"] for row in rows(result, None)] == ["o"]
        assert [row["vs_dump"] is None for row in rows(result, "torch-prefill")] == [False, True]


class TestFailures:
    @pytest.mark.parametrize(("tensor", "index"), [("o", (0, 40, 1, 3)), ("final_state", (2, 1, 5, 7))])
    def test_one_wrong_element_of_the_dump(self, tmp_path, tensor, index):
        inputs, outputs = recorded(PREFILL)
        outputs.tensors()[tensor][index] += 1.0
        save(tmp_path / "d.pt", inputs, outputs, op="prefill")
        result, run = report(tmp_path / "d.pt", "--kernel", "torch-prefill")
        assert run.exit_code == 1
        assert f"Error: the dump's {tensor} is wrong: " in run.stderr
        (wrong,) = [row for row in result["rows"] if not row["passed"]]
        assert (wrong["kernel"], wrong["tensor"]) == (None, tensor)
        place = {"sequence": "2", "head": "1"} | (
            {"token": "23", "channel": "3"} if tensor == "o" else {"v": "5", "k": "7"}
        )
        assert place == wrong["where"]
        assert f"FAIL the dump, {tensor}: " in kda("compare", tmp_path / "d.pt", "--kernel", "torch-prefill").stdout

    def test_a_wrong_kernel(self, prefill, monkeypatch):
        right = plain_chunk.run

        def wrong(inputs):
            outputs = right(inputs)
            outputs.o[:, -1] = 0
            return outputs

        monkeypatch.setattr(plain_chunk, "run", wrong)
        result, run = report(prefill, "--kernel", "torch-prefill")
        assert run.exit_code == 1
        assert run.stderr.startswith("Error: torch-prefill's o is wrong: ")
        assert [row["passed"] for row in rows(result, "torch-prefill")] == [False, True]

    def test_elements_that_were_never_written(self, prefill, monkeypatch):
        right = plain_chunk.run
        monkeypatch.setattr(
            plain_chunk, "run", lambda inputs: dataclasses.replace(right(inputs), o=torch.empty_like(inputs.v))
        )
        result, run = report(prefill, "--kernel", "torch-prefill")
        assert run.exit_code == 1
        assert "NaN" in rows(result, "torch-prefill")[0]["note"]

    def test_a_kernel_that_raises(self, prefill, monkeypatch):
        def crash(inputs):
            raise RuntimeError("out of\nregisters")

        monkeypatch.setattr(plain_chunk, "run", crash)
        result, run = report(prefill)
        assert run.exit_code == 1
        assert "torch-prefill's o is wrong: raised RuntimeError: out of registers" in run.stderr
        assert all(row["passed"] for row in rows(result, "triton-prefill"))

    def test_a_kernel_that_refuses_the_tensors(self, prefill, monkeypatch):
        def refuse(inputs):
            raise InputError("q has stride 7: it should be 1")

        monkeypatch.setattr(plain_chunk, "run", refuse)
        result, run = report(prefill)
        assert run.exit_code == 0
        assert {"kernel": "torch-prefill", "reason": "q has stride 7: it should be 1"} in result["calls"][0]["not_run"]
        run = kda("compare", prefill, "--kernel", "torch-prefill")
        assert run.exit_code == 3
        assert "torch-prefill cannot run prefill N=3 T=50 H=1 HV=2: q has stride 7" in run.stderr


class TestRefusals:
    def test_kernels(self, prefill, monkeypatch):
        def refused(code: int, words: str, *args: object) -> None:
            run = kda("compare", prefill, *args)
            assert run.exit_code == code
            assert words in run.stderr and run.stderr.count("\n") == 1
            assert run.stdout == ""

        refused(2, "kernel warp-speed is unknown: there are ", "--kernel", "warp-speed")
        refused(3, "triton-decode serves the op decode: the dump holds prefill", "--kernel", "triton-decode")
        monkeypatch.setattr(plain_chunk, "unsupported", lambda problem: "it is a Sunday")
        refused(
            3, "torch-prefill cannot run prefill N=3 T=50 H=1 HV=2 here: it is a Sunday", "--kernel", "torch-prefill"
        )
        refused(2, "has no call x", "--call", "x")

    def test_report_is_not_overwritten(self, prefill, tmp_path):
        (tmp_path / "r.json").write_text("precious")
        run = kda("compare", prefill, "--json", tmp_path / "r.json")
        assert (run.exit_code, (tmp_path / "r.json").read_text()) == (2, "precious")
        run = kda("compare", prefill, "--kernel", "torch-prefill", "--json", tmp_path / "r.json", "--force")
        assert run.exit_code == 0, run.output
        assert json.loads((tmp_path / "r.json").read_text())["schema"] == "kda.compare/1"


class TestSeveralCalls:
    @pytest.fixture
    def dump(self, prefill, decode, tmp_path):
        calls = {}
        for name, path in (("first", prefill), ("next", decode)):
            d = load(path)
            calls[name] = {
                "inputs": d.inputs.tensors(),
                "outputs": d.outputs.tensors(),
                "options": {"lower_bound": -5.0, "op": str(d.op)},
            }
        torch.save(calls, path := tmp_path / "both.pt")
        return path

    def test_each_by_the_kernels_of_its_op(self, dump):
        result, run = report(dump, "--kernel", "torch-decode", "--kernel", "torch-prefill")
        assert run.exit_code == 0, run.output
        assert {(row["call"], row["op"], row["kernel"]) for row in result["rows"]} == {
            ("first", "prefill", None),
            ("first", "prefill", "torch-prefill"),
            ("next", "decode", None),
            ("next", "decode", "torch-decode"),
        }

    def test_chosen(self, dump):
        result, run = report(dump, "--call", "next", "--kernel", "torch-decode")
        assert run.exit_code == 0, run.output
        assert {row["call"] for row in result["rows"]} == {"next"}


def test_time_on_a_cpu_is_told_beforehand(tmp_path, monkeypatch):
    save(tmp_path / "d.pt", make_inputs(PREFILL), op="prefill")
    short, long = (
        comparison.seconds_on_cpu(
            [
                comparison.Plan(
                    load(tmp_path / "d.pt"), problem, comparison.plan([load(tmp_path / "d.pt")])[0].kernels, []
                )
            ]
        )
        for problem in (PREFILL, dataclasses.replace(PREFILL, seq_lens=(8192,), H=96, HV=96))
    )
    assert short < 5 < 600 < long
    monkeypatch.setattr(comparison, "seconds_on_cpu", lambda plans: 300.0)
    run = kda("compare", tmp_path / "d.pt", "--kernel", "torch-prefill", "--device", "cpu")
    assert "about 5 minutes on this CPU" in run.stderr


def test_strides_are_kept_and_gaps_poisoned():
    wide = torch.randn(3, 4, 10)
    copy = copy_with_strides(wide[..., 2:6])
    assert copy.stride() == (40, 10, 1) and torch.equal(copy, wide[..., 2:6])
    assert copy.as_strided((2, 4, 6), (40, 10, 1), copy.storage_offset() + 4).isnan().all()
    broadcast = wide[:1].expand(3, 4, 10)
    assert copy_with_strides(broadcast).is_contiguous() and torch.equal(copy_with_strides(broadcast), broadcast)


class TestRealLayer:
    """Tensors of FLA's KimiDeltaAttention, captured on an H100 by tests/capture_fla_layer.py."""

    def test_the_capture_is_what_it_says(self):
        assert FLA_LAYER.is_file()
        assert FLA_LAYER.stat().st_size <= 2_000_000
        calls = load_all(FLA_LAYER)
        assert [dump.call for dump in calls] == ["prefill", "decode_0", "decode_1", "decode_2"]
        assert [dump.op for dump in calls] == [Op.PREFILL, Op.DECODE, Op.DECODE, Op.DECODE]
        assert calls[0].inputs.q.shape[1] >= 100
        assert all(dump.inputs.options == SAFE and dump.inputs.q.dtype is torch.bfloat16 for dump in calls)
        meta = calls[0].meta
        assert meta["mode"] == "chunk" and "H100" in meta["gpu"] and meta["gpu"] == meta["device"]
        functions = ["chunk_kda"] + ["fused_recurrent_kda"] * 3
        assert [dump.meta["function"] for dump in calls] == functions
        for before, after in zip(calls, calls[1:], strict=False):
            assert torch.equal(before.outputs.final_state, after.inputs.state)

    def test_ours_and_the_recorded_outputs_are_right(self):
        result, run = report(FLA_LAYER)
        assert run.exit_code == 0, run.output
        results = {(row["call"], row["kernel"]) for row in result["rows"]}
        for call in ("prefill", "decode_0", "decode_1", "decode_2"):
            op = call.split("_")[0]
            assert {(call, None), (call, f"triton-{op}"), (call, f"torch-{op}")} <= results
        assert all(row["passed"] for row in result["rows"])
