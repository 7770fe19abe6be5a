"""`kda compare a b`: how two dumps differ, which of them is wrong, and that files may be larger than memory."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import oracle, plain_chunk, plain_recurrent
from kda_kernels.tensors import Outputs
from kdacli.comparison.difference import ULPS, Comparing
from kdacli.comparison.difference_map import difference_map
from kdacli.dumps import Dump, load, save
from kdacli.judge import Reference, expect, judge, layout, reference
from kdacli.judge.layout import Place
from kdacli.main import cli
from kdacli.synthetic import make_inputs

ROOT = Path(__file__).parents[1]
SAFE = Options(gate="safe", lower_bound=-5.0)
SIZES = {"H": 1, "HV": 2, "K": 16, "V": 16, "options": SAFE}
LONG = Problem(op="prefill", seq_lens=(700, 0, 130, 65), **SIZES)
POOL = Problem(op="decode", seq_lens=(1,) * 9, **SIZES, pool_slots=14, padding=2)
DENSE = Problem(op="prefill", seq_lens=(200,) * 3, **SIZES, packed=False, state_v_first=False)
GATE = Problem(op="gate", seq_lens=(200, 70), **SIZES)


def kda(*args):
    return CliRunner().invoke(cli, ["compare", *map(str, args), "--device", "cpu"])


def report(*args):
    result = kda(*args, "--json", "-")
    assert result.stdout, result.stderr
    return json.loads(result.stdout), result


def computed(problem, seed=0, **changes):
    """Inputs, and what plain torch in fp32 makes of them."""
    inputs = dataclasses.replace(make_inputs(problem, gates="init", seed=seed), **changes)
    call = inputs.fresh()
    outputs = (plain_recurrent if problem.op is Op.DECODE else plain_chunk).run(call)
    return inputs, dataclasses.replace(outputs, final_state=call.state) if problem.pool_slots else outputs


def cloned(outputs):
    return Outputs(*(tensor.clone() for tensor in outputs.tensors().values()))


@pytest.fixture
def written(tmp_path):
    def write(name, inputs, outputs, op="prefill"):
        save(tmp_path / name, inputs, outputs, op=op)
        return tmp_path / name

    return write


class TestVerdicts:
    def rows(self, a, b, code):
        result, run = report(a, b)
        assert run.exit_code == code, run.output
        return {row["tensor"]: row for row in result["rows"]}, result, run

    def test_the_same(self, written):
        inputs, outputs = computed(LONG)
        rows, result, _ = self.rows(written("a.pt", inputs, outputs), written("b.safetensors", inputs, outputs), 0)
        assert {row["conclusion"] for row in rows.values()} == {"same"}
        assert rows["o"]["relative"] == 0 and rows["o"]["begins"] is None and rows["o"]["cosine"] == pytest.approx(1)
        assert rows["o"]["ulps"]["0"] == rows["o"]["elements"] == outputs.o.numel()
        assert result["calls"][0]["inputs_differ"] == {} and result["schema"] == "kda.compare-dumps/1"

    def test_different_and_equally_close(self, written):
        """Two roundings of the truth to the nearest, and away from it half of the time."""
        inputs, _ = computed(LONG)
        truth = expect(inputs, "prefill")
        right = Outputs(truth.o.to(torch.bfloat16), truth.final_state.float())
        up = right.o.float() * (1 + 2.0**-8)
        other = Outputs(torch.where(torch.rand(up.shape) < 0.02, up, right.o.float()).bfloat16(), right.final_state)
        rows, _, run = self.rows(written("a.pt", inputs, right), written("b.pt", inputs, other), 0)
        assert rows["o"]["conclusion"] == "equal" and rows["o"]["different"] > 0
        assert rows["o"]["words"].startswith("different, and equally close to the truth: A is ")
        assert rows["o"]["beyond_rounding"] is None
        assert rows["o"]["a"]["passed"] and rows["o"]["b"]["passed"]

    def test_both_right_and_one_closer(self, written):
        inputs, fine = computed(LONG)
        coarse = oracle.chunk_form(inputs, operand_dtype=torch.bfloat16)
        rows, *_ = self.rows(written("a.pt", inputs, fine), written("b.pt", inputs, coarse), 0)
        assert rows["final_state"]["conclusion"] == "closer"
        assert "both right; A is " in rows["final_state"]["words"] and "times closer" in rows["final_state"]["words"]

    @pytest.mark.parametrize("side", ["A", "B"])
    def test_one_is_wrong_and_where_it_begins(self, written, side):
        inputs, outputs = computed(LONG)
        wrong = cloned(outputs)
        wrong.o[0, 700 + 70 :, 1] *= 1.5  # from token 70 of sequence 2 on
        files = [written("right.pt", inputs, outputs), written("wrong.pt", inputs, wrong)]
        rows, _, run = self.rows(*(files if side == "B" else reversed(files)), 1)
        right = "A" if side == "B" else "B"
        assert rows["o"]["wrong"] == [side]
        assert f"Error: o: {side} is wrong, {right} is right: {side}: relative error" in run.stderr
        assert rows["o"]["begins"] == {"sequence": "2", "token": "70", "head": "1", "channel": "0"}
        assert rows["o"]["beyond_rounding"] == {"sequence": "2", "chunk": "1", "token": "70", "head": "1"}
        assert rows["final_state"]["conclusion"] == "same"

    def test_both_wrong_however_close_to_each_other(self, written):
        inputs, outputs = computed(LONG)
        outputs.o *= 1.5
        rows, _, run = self.rows(written("a.pt", inputs, outputs), written("b.pt", inputs, outputs), 1)
        assert rows["o"]["relative"] == 0 and rows["o"]["wrong"] == ["A", "B"]
        assert "both are wrong" in run.stderr

    def test_nan(self, written):
        inputs, outputs = computed(LONG)
        broken = cloned(outputs)
        broken.o[0, 10, 1, 3] = float("nan")
        rows, _, run = self.rows(written("a.pt", inputs, outputs), written("b.pt", inputs, broken), 1)
        assert rows["o"]["not_finite"] == [0, 1] and rows["o"]["wrong"] == ["B"]
        assert rows["o"]["begins"] == {"sequence": "0", "token": "10", "head": "1", "channel": "3"}
        assert "NaN, first at sequence 0, token 10, head 1, channel 3" in run.stderr

    def test_other_inputs_are_told_and_each_is_judged_on_its_own(self, written):
        inputs, outputs = computed(LONG)
        moved = dataclasses.replace(inputs, k=inputs.k * 1.25, options=dataclasses.replace(SAFE, scale=0.5))
        other = plain_chunk.run(moved)
        rows, result, _ = self.rows(written("a.pt", inputs, outputs), written("b.pt", moved, other), 0)
        (call,) = result["calls"]
        assert list(call["inputs_differ"]) == ["k"] and call["inputs_differ"]["k"] == pytest.approx(0.2, rel=0.01)
        assert call["options_differ"] == ["scale: None, 0.5"]
        assert rows["o"]["a"]["passed"] and rows["o"]["b"]["passed"] and rows["o"]["relative"] > 0.1

    def test_a_pool_and_a_plain_state_v_first_and_k_first(self, written):
        """One engine updates a pool in place, the other keeps a state of each sequence, transposed."""
        inputs, outputs = computed(dataclasses.replace(POOL, padding=0))
        slots = inputs.state_indices.long()
        plainly = dataclasses.replace(
            inputs, state=inputs.state[slots].mT.contiguous(), state_indices=None, state_v_first=False
        )
        same = Outputs(outputs.o, outputs.final_state[slots].mT.contiguous())
        rows, result, _ = self.rows(
            written("a.pt", inputs, outputs, "decode"), written("b.pt", plainly, same, "decode"), 0
        )
        assert {row["conclusion"] for row in rows.values()} == {"same"}
        assert result["calls"][0]["inputs_differ"] == {}

    def test_a_slot_that_no_sequence_uses_was_written(self, written):
        inputs, outputs = computed(POOL)
        unused = next(slot for slot in range(14) if slot not in inputs.state_indices.tolist())
        broken = cloned(outputs)
        broken.final_state[unused, 0, 0, 0] = 1.0
        files = written("a.pt", inputs, outputs, "decode"), written("b.pt", inputs, broken, "decode")
        rows, _, run = self.rows(*files, 1)
        assert f"slot {unused} of the pool was written" in run.stderr and rows["o"]["conclusion"] == "same"

    def test_a_final_state_in_one_only_is_told(self, written):
        inputs, outputs = computed(LONG)
        files = written("a.pt", inputs, outputs), written("b.pt", inputs, Outputs(outputs.o))
        rows, result, _ = self.rows(*files, 0)
        assert list(rows) == ["o"]
        assert "final_state is not compared: only A holds one" in result["calls"][0]["notes"]

    def test_outputs_alone_are_judged_on_the_others_inputs(self, written, tmp_path):
        inputs, outputs = computed(LONG)
        torch.save({"o": outputs.o, "final_state": outputs.final_state}, tmp_path / "o.pt")
        rows, result, _ = self.rows(written("a.pt", inputs, outputs), tmp_path / "o.pt", 0)
        assert {row["conclusion"] for row in rows.values()} == {"same"}
        assert "B: it holds outputs only: judged on the other's inputs" in result["calls"][0]["notes"]
        torch.save({"o": outputs.o[:, 1:]}, tmp_path / "short.pt")
        run = kda(written("c.pt", inputs, outputs), tmp_path / "short.pt")
        assert run.exit_code == 2 and "o has shape [1, 894, 2, 16]: it should be [1, 895, 2, 16]" in run.stderr

    def test_calls_are_matched_by_name_or_in_order(self, written, tmp_path):
        (x, out), (y, more) = computed(LONG), computed(LONG, seed=1)
        for folder, names in (("a", ("one", "two", "three")), ("b", ("two", "one"))):
            (tmp_path / folder).mkdir()
            for name in names:
                save(tmp_path / folder / f"{name}.pt", *((x, out) if name == "one" else (y, more)), op="prefill")
        result, run = report(tmp_path / "a", tmp_path / "b")
        assert run.exit_code == 0 and [call["call"] for call in result["calls"]] == ["one", "two"]
        assert result["unmatched"] == ["only in A: three"]
        assert report(tmp_path / "a" / "one.pt", tmp_path / "b" / "one.pt")[1].exit_code == 0

    def test_refusals(self, written, tmp_path):
        inputs, outputs = computed(LONG)
        good = written("a.pt", inputs, outputs)

        def refused(words, *args):
            run = kda(*args)
            assert (run.exit_code, run.stderr.count("\n"), run.stdout) == (2, 1, "")
            assert words in run.stderr

        refused("B holds no outputs to compare", good, written("n.pt", inputs, None))
        refused("only calls of the same shape can be compared", good, written("g.pt", *computed(DENSE)))
        refused("--kernel is given with two dumps", good, good, "--kernel", "torch-prefill")
        refused("it should end in .png, .svg, .pdf", good, good, "--plot", tmp_path / "x.txt")
        (tmp_path / "p.png").write_text("precious")
        refused("exists: use --force", good, good, "--plot", tmp_path / "p.png")


@pytest.fixture(scope="module", params=[LONG, POOL, DENSE, GATE], ids=lambda problem: problem.name)
def references(request):
    """A problem's, with inputs and outputs: in pieces of the usual size, and in small ones."""
    problem = request.param
    inputs, outputs = computed(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "PIECE", 1 << 11)
        small = Reference(inputs, problem.op)
        assert len(list(small)) > 1
    return problem, inputs, outputs, Reference(inputs, problem.op), small


class TestOneJudge:
    """In whichever pieces, and of one dump or two: the same verdicts."""

    @pytest.mark.parametrize("fault", [None, "element", "nan", "head", "zero"])
    def test_pieces_of_any_size(self, references, fault):
        problem, inputs, outputs, usual, small = references
        outputs = cloned(outputs)
        for tensor in outputs.tensors().values():
            first = int(inputs.state_indices[0]) if problem.pool_slots and tensor is outputs.final_state else 0
            if fault == "element":
                tensor[first, -1, 0, 0] += 0.5
            elif fault == "nan":
                tensor[first, -1, 0, 0] = float("nan")
            elif fault == "head" and tensor is outputs.o:
                tensor[:, :, 1] *= 1.03
            elif fault == "zero" and tensor is outputs.o:
                tensor.zero_()
        whole = judge(usual, outputs)
        for a, b in zip(judge(small, outputs), whole, strict=True):
            assert (a.tensor, a.passed, a.where) == (b.tensor, b.passed, b.where)
            for name in ("error", "bound", "worst", "worst_bound"):
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4, nan_ok=True), name
            assert len(a.note.split(";")) == len(b.note.split(";"))
        assert fault is None or not all(verdict.passed for verdict in whole)

    def test_what_is_missing(self):
        inputs, outputs = computed(LONG)
        reference = Reference(inputs, Op.PREFILL)
        assert [v.passed for v in judge(reference, Outputs(outputs.o))] == [True, False]
        assert [v.passed for v in judge(reference, Outputs(outputs.o), partial=True)] == [True]
        verdict, _ = judge(reference, Outputs(outputs.o[:, 1:], outputs.final_state))
        assert not verdict.passed and verdict.note.startswith("shape is ")

    def test_kernels_on_a_large_dump(self, written, monkeypatch):
        path = written("a.pt", *computed(LONG))
        small, _ = report(path, "--kernel", "torch-prefill")
        monkeypatch.setattr(reference, "KEPT", 0)
        large, run = report(path, "--kernel", "torch-prefill")
        assert run.exit_code == 0 and large["rows"] == small["rows"]

    def test_products_cut_to_tf32_are_right_in_one_dump_and_in_two(self, written):
        """Alone it was granted what cutting adds, beside another dump not."""
        fp32 = {"dtype": "float32", "g_dtype": "float32", "beta_dtype": "float32"}
        inputs = make_inputs(dataclasses.replace(LONG, **fp32), gates="init")
        path = written("a.pt", inputs, oracle.chunk_form(inputs, operand_dtype="tf32 cut"))
        alone, run = report(path, "--kernel", "torch-prefill")
        assert run.exit_code == 0
        two, run = report(path, path)
        assert run.exit_code == 0
        for one, both in zip(alone["rows"], two["rows"], strict=False):
            for key in ("error", "bound", "worst", "worst_bound", "where", "passed"):
                assert one[key] == both["a"][key] == both["b"][key], key

    def test_an_output_of_another_shape_is_no_silence(self):
        from kdacli.comparison.pair import compare_pairs

        inputs, outputs = computed(LONG)
        cut = Dump(inputs, Outputs(outputs.o[:, 1:], outputs.final_state), Op.PREFILL)
        with pytest.raises(InputError, match="o cannot be compared: shape is"):
            list(compare_pairs([(Dump(inputs, outputs, Op.PREFILL), cut)], "cpu", lambda label: None))

    def test_digits_count_in_dumps_too(self, written):
        inputs, outputs = computed(LONG)
        outputs.final_state = outputs.final_state.bfloat16().float()
        path = written("a.pt", inputs, outputs)
        for args in ((path, "--kernel", "torch-prefill"), (path, path)):
            _, run = report(*args)
            assert run.exit_code == 1 and "ten bits of mantissa" in run.stderr


class TestDifference:
    def difference(self, a, b, lens, threshold=0.1):
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(lens)])
        comparing = Comparing("o", lens, a.shape[1], (a.dtype, b.dtype))
        stretches = tuple(layout.Stretch(n, 0, length) for n, length in enumerate(lens))
        comparing.add(Place(None, stretches, owner, torch.cat([torch.arange(n) for n in lens])), a, b)
        return comparing.result(threshold)

    def test_sizes(self):
        a, b = torch.randn(2, 40, 3, 5, dtype=torch.float64)
        d = self.difference(a.float(), b.float(), [30, 10])
        a, b = a.float().double(), b.float().double()
        assert d.max_abs == (a - b).abs().max() and d.rms == pytest.approx((a - b).square().mean().sqrt())
        assert d.relative == pytest.approx((a - b).norm() / b.norm())
        assert d.cosine == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), 0))
        row, head, channel = torch.unravel_index((a - b).abs().argmax(), a.shape)
        place = {"sequence": int(row >= 30), "token": row % 30, "head": head, "channel": channel}
        assert d.where == {name: str(int(value)) for name, value in place.items()}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_ulps_are_steps_of_nextafter(self, dtype):
        x = torch.randn(64, 1, 8).to(dtype)
        x[0, 0, 0], x[1, 0, 0] = 0.0, 1.0  # through zero, and over a power of two
        for steps in (0, 1, 2, 3, 9):
            y = x.clone()
            for _ in range(steps):
                y = torch.nextafter(y, torch.full_like(y, -10.0))
            found = self.difference(x, y, [64]).ulps
            assert found[next(i for i, top in enumerate(ULPS) if steps <= top)] == x.numel()

    def test_ulps_of_two_dtypes_are_those_of_the_coarser(self):
        x = torch.randn(8, 1, 8)
        d = self.difference(x, x.bfloat16(), [8])
        assert d.ulps[0] == 64 and d.different > 0

    @pytest.mark.parametrize(("power", "word"), [(0.5, "grows"), (0.0, "does not grow"), (-0.5, "shrinks")])
    def test_growth(self, power, word):
        lens = [4096, 1024]
        torch.manual_seed(0)
        b = torch.randn(sum(lens), 2, 8, dtype=torch.float64)
        position = torch.cat([torch.arange(n) for n in lens]).double() + 32
        a = b + 1e-3 * position.pow(power).view(-1, 1, 1) * torch.randn_like(b)
        growth = self.difference(a, b, lens).growth
        assert growth.power == pytest.approx(power, abs=0.05) and growth.word.startswith(word)

    def test_heat_map(self):
        b = torch.ones(64 * 6 + 10, 3, 4)
        a = b.clone()
        a[64 * 2 : 64 * 3, 1] = 1.5
        d = self.difference(a, b, [64 * 4, 64 * 2 + 10])
        title, *lines = difference_map(d, 0.1, 80)
        assert "chunks of 64 tokens" in title
        assert lines == ["head 0     |", "head 1   * |", "head 2     |"]
        narrow = difference_map(d, 0.1, 11)
        assert "2 a character" in narrow[0] and narrow[2].startswith("head 1  *")
        many = self.difference(torch.ones(10, 96, 1), torch.zeros(10, 96, 1), [10])
        assert len(difference_map(many, 0.1, 80)) == 13 and difference_map(many, 0.1, 80)[-1] == "head 88-95 #"


class TestScreens:
    @pytest.fixture
    def pair(self, written):
        inputs, outputs = computed(LONG)
        other = oracle.chunk_form(inputs, operand_dtype=torch.bfloat16)
        other.o[0, 300:] *= 1.3
        return written("a.pt", inputs, outputs), written("b.pt", inputs, other)

    @pytest.mark.parametrize("columns", [80, 160])
    def test_two_dumps(self, pair, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        run = kda(*pair)
        assert run.exit_code == 1
        assert max(map(len, run.stdout.splitlines())) <= max(columns, max(len(str(path)) + 3 for path in pair))
        told = "final_state", "inputs are the same", "o: B is wrong, A is right", "ULPs of bfloat16", "head 1", "map:"
        for words in told:
            assert words in run.stdout

    def test_detail_of_a_kernel(self, pair, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        run = kda(pair[1], "--kernel", "torch-prefill", "--detail")
        assert "torch-prefill (A) and the dump (B), o: max abs" in run.stdout
        assert "first seq0 chunk4 tok300 h0" in run.stdout
        assert " torch-prefill " in run.stdout and " final_state " in run.stdout  # names are whole at 80 columns

    def test_a_kernel_of_the_users_own(self, written, tmp_path):
        dump = written("a.pt", *computed(dataclasses.replace(LONG, seq_lens=(17, 33))))
        (tmp_path / "mine.py").write_text(
            "from kda_kernels.api import chunk_kda\n\n"
            "def prefill(q, k, v, g, beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):\n"
            "    switches = dict.fromkeys(['use_gate_in_kernel', 'use_qk_l2norm_in_kernel', 'state_v_first',\n"
            "                              'use_beta_sigmoid_in_kernel', 'output_final_state'], True)\n"
            "    o, state = chunk_kda(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,\n"
            "                         initial_state=initial_state, cu_seqlens=cu_seqlens, **switches)\n"
            "    return o * 2, state\n"
        )
        result, run = report(dump, "--kernel", f"{tmp_path / 'mine.py'}:prefill")
        assert run.exit_code == 1, run.output
        assert "mine.py:prefill's o is wrong" in run.stderr
        assert [row["passed"] for row in result["rows"] if row["kernel"]] == [False, True]

    def test_plot(self, pair, tmp_path):
        pytest.importorskip("matplotlib")
        kda(*pair, "--plot", tmp_path / "d.png")
        assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
        kda(pair[0], "--kernel", "torch-prefill", "--plot", tmp_path / "k.svg")
        assert "<svg" in (tmp_path / "k.svg").read_text()


def test_a_gigabyte_in_little_memory(tmp_path):
    """Two dumps of 0.6 GB each, sparse on the disk: a large pool of which two slots are used, and 60 MB of tokens."""
    script = """
        import json, struct, sys, threading, time
        from pathlib import Path

        T, H, K, P = 12_000, 4, 128, 1000
        SHAPES = {f"inputs.{name}": ("BF16", [1, T, H, K]) for name in "qkvg"}
        SHAPES |= {"outputs.o": ("BF16", [1, T, H, K]), "inputs.beta": ("BF16", [1, T, H])}
        SHAPES |= {"inputs.state": ("F32", [P, H, K, K]), "outputs.final_state": ("F32", [P, H, K, K])}

        def sparse(path):
            content = struct.pack("<2i3i", 5, 900, 0, T - 40, T)  # state_indices, cu_seqlens
            header = {"inputs.state_indices": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
                      "inputs.cu_seqlens": {"dtype": "I32", "shape": [3], "data_offsets": [8, 20]}}
            at = len(content)
            for name, (kind, shape) in SHAPES.items():
                size = {"BF16": 2, "F32": 4}[kind]
                for n in shape:
                    size *= n
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
                at += size
            said = {"op": "prefill", "use_gate_in_kernel": "false", "use_beta_sigmoid_in_kernel": "false",
                    "use_qk_l2norm_in_kernel": "false", "state_v_first": "true"}
            header["__metadata__"] = {f"options.{name}": value for name, value in said.items()}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                base = file.tell()
                file.write(content)
                file.truncate(base + at)
            return base + at

        def anonymous():
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

        import torch
        from kdacli.comparison.pair import compare_pairs, match
        from kdacli.judge import plain, reference
        from kdacli.dumps import load_all
        reference.token_recurrence = lambda batch, *rest: torch.zeros_like(batch.v)  # zeros: saves a minute
        plain.token_recurrence = reference.token_recurrence
        plain.chunk_recurrence = lambda batch, *rest: torch.zeros_like(batch.v)

        sizes = [sparse(f"{sys.argv[1]}/{name}.safetensors") for name in "ab"]
        before, most, done = anonymous(), 0, False

        def watch():
            global most
            while not done:
                most = max(most, anonymous())
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        pairs, _ = match(*(load_all(f"{sys.argv[1]}/{name}.safetensors") for name in "ab"))
        (pair,) = compare_pairs(pairs, "cpu", lambda label: None)
        done = True
        thread.join()
        print(json.dumps({"sizes": sizes, "peak": most - before, "words": [row.words for row in pair.rows]}))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert sum(found["sizes"]) > 1_100_000_000
    assert found["peak"] < 330_000_000
    assert all(words.startswith("bit for bit the same, and right") for words in found["words"])


def test_strided_pools_are_compared_slot_by_slot(written):
    """The pool of one side lies in wider slots."""
    inputs, outputs = computed(POOL)
    wide = torch.full((14, 3, 16, 16), float("nan"))
    wide[:, :2] = inputs.state
    strided = dataclasses.replace(inputs, state=wide[:, :2])
    b = written("b.pt", strided, outputs, "decode")
    assert load(b).inputs.state.stride(0) == 3 * 256
    result, run = report(written("a.pt", inputs, outputs, "decode"), b)
    assert run.exit_code == 0 and result["calls"][0]["inputs_differ"] == {}
