"""The command line: what it imports, how it fails, what it writes; and the parts that every command prints with."""

import io
import json
import os
import re
import subprocess
import sys
import time

import click
import pytest
import torch
from click.testing import CliRunner, Result

from kda_kernels import registry
from kda_kernels.errors import CheckFailedError, InputError, UnavailableError
from kda_kernels.problem import Gate, Op
from kdacli import main, options, output, provenance
from kdacli.commands import kernels
from kdacli.commands.run import describe_tensor
from kdacli.compile import arch, pretend
from kdacli.main import COMMANDS, cli
from kdacli.values import Count

ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the package need not be installed to be tested
RUN = ["run", "--device", "cpu", "--kernel", "torch-decode"]
SMALL = ["-N", "2", "-H", "1", "--head-dim", "16"]


def kda(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def assert_one_line(result: Result, code: int, *fragments: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


# --- the group


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"], ["kernels", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom kdacli.main import cli\n"
        f"try:\n    cli.main({args!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'rich', 'safetensors') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name):
    assert isinstance(cli.get_command(click.Context(cli), name), click.Command)
    result = kda(name, "--help")
    assert result.exit_code == 0 and f"kda {name}" in result.output and len(result.output.splitlines()) > 10


def test_help_lists_every_command_and_the_exit_codes():
    text = kda("--help").output
    for name, entry in COMMANDS.items():
        assert f"  {name}" in text and entry.help in text
    assert "Exit codes" in text and "Examples" in text


def test_no_arguments_show_the_help_and_are_wrong_use():
    result = kda()
    assert result.exit_code == 2 and "Exit codes" in result.stderr


@pytest.mark.parametrize(
    "args, code, fragment",
    [
        (["vrify"], 2, "did you mean verify?"),
        (["zzz"], 2, "there are run, verify"),
        (["run", "--frobnicate"], 2, "--frobnicate"),
        (["run", "-T", "many"], 2, "many is not a number"),
        (["run", "-T", "0"], 2, "between 1 and"),
        (["run", "-N", "9" * 12], 2, "between 1 and"),
        (["run", "--lens", "4,,5"], 2, "--lens"),
        (["run", "--lens", "4,5", "-T", "9"], 2, "--tokens is given with --lens"),
        (["run", "--model", "kimi-k3", "-H", "4"], 2, "--heads is given with --model"),
        (["run", "--model", "kimi-k3", "--gate", "none"], 2, "--gate is given with --model"),
        (["run", "--model", "kimi-k3", "--tp", "7"], 2, "divide the model's 96 heads"),
        (["run", "--model", "gpt-2"], 2, "kimi-k3"),
        (["run", "--tp", "2"], 2, "--tp is given without --model"),
        (["run", "--dump", "x.pt", "--packed"], 2, "--packed is given with --dump"),
        (["run", "--call", "x"], 2, "--call is given without --dump"),
        (["run", "--dump", "there-is-no-such-file.pt"], 2, "there-is-no-such-file.pt"),
        (["run", "--gate", "softplus", "--lower-bound", "-5"], 2, "softplus gate has none"),
        (["run", "--lower-bound", "3"], 2, "should be negative"),
        (["run", "--scale", "nan"], 2, "finite"),
        (["run", "--beta-values", "--allow-neg-eigval"], 2, "--allow-neg-eigval is given with --beta-values"),
        (["run", "--dense", "--lens", "3,4"], 2, "dense batch needs equal"),
        (["run", "--op", "decode", "--padding", "99"], 2, "--padding is 99"),
        (["run", "--pool", "0", "--padding", "1"], 2, "need a pool"),
        (["run", "--op", "decode", "-N", "4", "--pool", "3"], 2, "pool_slots is 3"),
        (["run", "-H", "3", "--v-heads", "4"], 2, "multiple of H"),
        (["run", "--dtype", "fp8"], 2, "fp8 is no dtype"),
        (["run", "--state-dtype", "fp8"], 2, "choose from fp32, fp16, bf16"),
        (["run", "--kernel", "nope"], 2, "kernel nope is unknown"),
        (["run", "--json", "no/such/folder/x.json"], 2, "there is no directory"),
        (["run", "--json", "."], 2, "is a directory"),
        (["run", "--device", "cpu", "-T", "1M", "-H", "60k"], 3, "needs about"),
        (["run", "--device", "cpu", "--kernel", "torch-prefill", "--op", "decode"], 2, "serves the op prefill"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_gets_one_line(args, code, fragment):
    assert_one_line(kda(*args), code, fragment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_exit_3():
    assert_one_line(kda("run", "--device", "cuda"), 3, "no CUDA GPU")


@pytest.mark.parametrize(
    "error, code, fragment",
    [
        (InputError("a\nb"), 2, "Error: a b"),
        (UnavailableError("no such thing"), 3, "Error: no such thing"),
        (CheckFailedError("case x"), 1, "Error: case x"),
        (KeyError("boom"), 1, "Error: internal: KeyError: 'boom' (rerun with --debug"),
        (MemoryError("too much"), 3, "Error: out of memory"),
        (OSError(28, "No space left on device"), 3, "No space left"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_a_line_and_a_code(error, code, fragment, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("kdacli.device.pick_device", fail)
    result = kda("kernels")
    assert result.exit_code == code and fragment in result.stderr and "Traceback" not in result.output


def test_debug_shows_the_traceback_wherever_it_stands():
    for args in (["--debug", "run", "--kernel", "nope"], ["run", "--kernel", "nope", "--debug"]):
        result = kda(*args)
        assert result.exit_code == 2 and "Traceback" in result.stderr and "registry.py" in result.stderr


def test_a_reader_that_goes_away_is_no_failed_check():
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "kdacli", "--help"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENV)
    finally:
        os.close(write)
    assert done.returncode == 141 and done.stderr == ""


# --- the commands run and kernels


def test_kernels_answers_for_each_kernel():
    result = kda("kernels", "--json", "-")
    report = json.loads(result.stdout)
    assert report["schema"] == "kda.kernels/1" and result.exit_code == 0
    assert [row["kernel"] for row in report["rows"]] == [kernel.name for kernel in registry.kernels()]
    by_name = {row["kernel"]: row for row in report["rows"]}
    assert by_name["torch-decode"]["runs"] and by_name["torch-prefill"]["runs"]
    assert all(row["note"] for row in report["rows"])


@pytest.mark.parametrize(
    ("name", "answer"), [("sm_90a", "yes"), ("sm_100a", "only compiled for such a GPU, never run")]
)
def test_kernels_says_where_ours_have_never_run(name, answer):
    with pretend.gpu(arch.parse(name)):
        notes = {row["kernel"]: row["note"] for row in kernels.survey({"op": "decode"}, "cuda")}
    assert notes["triton-decode"].endswith(answer) and notes["torch-decode"] == "yes"


def test_kernels_answers_for_a_problem_and_an_op():
    rows = json.loads(kda("kernels", "--op", "decode", "--model", "kimi-k3", "--tp", "8", "--json", "-").stdout)["rows"]
    assert {row["op"] for row in rows} == {"decode"}
    assert {row["problem"].split(" N=")[0] for row in rows} == {"decode H=12"}
    text = kda("kernels", "--op", "gate").stdout
    assert "triton-gate" in text and "triton-decode" not in text


def test_a_missing_package_is_a_reason_and_an_error_of_ours_is_none(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("needs_more", "kda_kernels.no_such_module"):
        kernel = registry.Kernel("broken", Op.GATE, "none", module, "for this test")
        monkeypatch.setitem(registry._KERNELS, "broken", kernel)
        result = kda("kernels", "--op", "gate", "--json", "-")
        if module == "needs_more":
            row = json.loads(result.stdout)["rows"][-1]
            assert row["kernel"] == "broken" and not row["runs"] and "no_such_package" in row["note"]
        else:
            assert result.exit_code == 1 and "internal: ModuleNotFoundError" in result.stderr


def test_kernels_fails_where_a_peers_own_code_does(monkeypatch):
    broken = registry.Kernel("broken", Op.GATE, "none", "kda_kernels.no_such_module", "for this test", ours=False)
    monkeypatch.setitem(registry._KERNELS, "broken", broken)
    monkeypatch.setattr(registry, "_failed", {})
    result = kda("kernels", "--op", "gate", "--json", "-")
    row = json.loads(result.stdout)["rows"][-1]
    assert row["kernel"] == "broken" and not row["runs"] and "no_such_module" in row["note"]
    assert result.exit_code == 1 and "broken" in result.stderr


def test_run_says_what_came_out(tmp_path):
    saved, report_file = tmp_path / "out.pt", tmp_path / "out.json"
    result = kda(*RUN, *SMALL, "--seed", "3", "--save", str(saved), "--json", str(report_file))
    assert result.exit_code == 0, result.output
    assert "torch-decode on CPU" in result.stdout and "seed 3" in result.stdout
    report = json.loads(report_file.read_text())
    assert report["schema"] == "kda.run/1" and report["kernel"] == "torch-decode"
    assert report["provenance"]["seed"] == 3 and str(tmp_path) not in report_file.read_text()

    from kdacli import dumps

    dump = dumps.load(saved)
    rows = {row["name"]: row for row in report["rows"]}
    used = dump.inputs.state_indices.long()
    for name, tensor in (("o", dump.outputs.o), ("final_state", dump.outputs.final_state[used])):
        assert rows[name]["norm"] == pytest.approx(tensor.double().square().sum().sqrt().item(), rel=1e-9)
        assert (rows[name]["nan"], rows[name]["inf"]) == (0, 0)
        assert (rows[name]["min"], rows[name]["max"]) == (tensor.min().item(), tensor.max().item())
    again = kda("run", "--device", "cpu", "--kernel", "torch-decode", "--dump", str(saved), "--json", "-")
    assert json.loads(again.stdout)["rows"] == report["rows"], "the dump holds the state as it was before the call"


def test_run_takes_the_op_of_the_kernel_and_a_small_shape_on_a_cpu():
    result = kda("run", "--device", "cpu", "--kernel", "torch-prefill", "--head-dim", "16")
    assert "prefill N=1 T=256 H=2" in result.stdout and "small shape" in result.stdout


def test_json_on_stdout_stands_alone():
    result = kda(*RUN, *SMALL, "--json", "-")
    assert json.loads(result.stdout)["device"] == "CPU"


def test_files_are_kept_unless_forced(tmp_path):
    file = tmp_path / "mine.json"
    for option, kept in (("--json", file), ("--save", tmp_path / "mine.pt")):
        kept.write_text("mine")
        assert_one_line(kda(*RUN, *SMALL, option, str(kept)), 2, "--force")
        assert kept.read_text() == "mine"
    assert kda(*RUN, *SMALL, "--json", str(file), "--force").exit_code == 0
    assert json.loads(file.read_text())["schema"] == "kda.run/1"


def test_a_tensor_with_nan_and_inf_is_described_by_the_rest():
    row = describe_tensor("o", torch.tensor([[3.0, float("nan"), -4.0], [float("inf"), -float("inf"), 0.0]]))
    assert (row["nan"], row["inf"], row["norm"], row["min"], row["max"]) == (1, 2, 5.0, -4.0, 3.0)
    assert row["mean_abs"] == pytest.approx(7 / 3) and row["shape"] == "2x3"
    assert describe_tensor("o", torch.full((2,), torch.nan))["norm"] is None
    assert describe_tensor("o", torch.empty(0, 4))["max"] is None


# --- options


def test_a_model_sets_heads_and_gate():
    problem = options.problem_from({"model": "kimi-k3", "tp": 8, "tokens": 8192})
    assert (problem.H, problem.HV, problem.K, problem.V, problem.T) == (12, 12, 128, 128, 8192)
    assert (problem.options.gate, problem.options.lower_bound) == (Gate.SAFE, -5.0)
    assert options.problem_from({"model": "kimi-linear"}).options.gate is Gate.SOFTPLUS


def test_defaults_depend_on_op_and_device():
    assert options.problem_from({}).name == "prefill N=1 T=8192 H=96"
    assert options.problem_from({}, "cpu").name == "prefill N=1 T=256 H=2"
    decode = options.problem_from({"op": "decode"})
    assert (decode.name, decode.pool_slots, decode.packed) == ("decode H=96 N=32", 64, False)
    assert options.problem_from({}, default_op="gate").op is Op.GATE


def test_flags_reach_the_problem():
    flags = {
        "lens": (3, 0, 5), "heads": 2, "v_heads": 4, "head_dim": 64, "v_head_dim": 32, "dtype": "float16",
        "beta_dtype": "float32", "state_dtype": "bfloat16", "gate": "none", "no_l2norm": True, "beta_values": True,
        "scale": 0.5, "pool": 7, "padding": 1, "no_final_state": True, "state_k_first": True,
    }  # fmt: skip
    p = options.problem_from(flags)
    assert (p.seq_lens, p.H, p.HV, p.K, p.V, p.packed) == ((3, 0, 5), 2, 4, 64, 32, True)
    assert (p.dtype, p.g_dtype, p.beta_dtype, p.state_dtype) == ("float16", "float16", "float32", "bfloat16")
    assert (p.pool_slots, p.padding, p.final_state, p.state_v_first, p.scale) == (7, 1, False, False, 0.5)
    assert (p.options.gate, p.options.lower_bound) == (Gate.NONE, None)
    assert not p.options.qk_l2norm and not p.options.beta_is_logit


@pytest.mark.parametrize("text, number", [("512", 512), ("8k", 8192), ("8K", 8192), ("1M", 1 << 20)])
def test_counts(text, number):
    assert Count().convert(text, None, None) == number


# --- output and provenance


def render(table, width: int) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return buffer.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_cut_off(width):
    numbers = ["1.234567e-03", "-98765.4321", "12", "3190"]
    words = "a long explanation of why this kernel cannot run on this machine at all"
    text = render(
        output.table("T", ("kernel", "a", "b", "c", "d", "why [not]"), [("triton-x", *numbers, words)]), width
    )
    assert all(number in text for number in numbers) and "…" not in text and "why [not]" in text
    assert set(words.split()) <= set(text.split())
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    "text, expected",
    [
        (output.fmt_sci(0.00341), "3.41e-03"),
        (output.fmt_sci(float("nan")), "nan"),
        (output.fmt_sci(None), "-"),
        (output.fmt_us(4.206), "4.21"),
        (output.fmt_us(62.24), "62.2"),
        (output.fmt_us(3190.4), "3190"),
        (output.fmt_bytes(512), "512 B"),
        (output.fmt_bytes(67.1e6), "67.1 MB"),
        (output.fmt_bytes(3.02e12), "3.02 TB"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


def test_json_holds_what_json_cannot(tmp_path):
    file = tmp_path / "x.json"
    output.write_json({"a": float("nan"), "b": [float("inf"), -float("inf")], "c": torch.tensor(2), "d": Op.GATE}, file)
    parsed = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert parsed == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 2, "d": "gate"}
    with pytest.raises(InputError, match="--force"):
        output.write_json({}, file)
    assert json.loads(file.read_text()) == parsed and os.listdir(tmp_path) == ["x.json"]
    output.write_json({}, file, force=True)
    assert file.read_text() == "{}\n" and os.listdir(tmp_path) == ["x.json"]


def test_progress_appears_late_and_only_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seen = {}
    monkeypatch.setattr(output, "PROGRESS_DELAY_S", 0.1)
    for name, stream, wait in (("quick", Terminal(), 0), ("slow", Terminal(), 0.5), ("piped", io.StringIO(), 0.5)):
        monkeypatch.setattr(sys, "stderr", stream)
        with output.progress("working", total=2) as advance:
            advance("first")
            time.sleep(wait)
        seen[name] = stream.getvalue()
    assert "working: first" in seen["slow"] and "1/2" in seen["slow"]
    assert "working" not in seen["quick"] and seen["piped"] == ""


def test_the_command_line_is_told_without_this_machines_paths(tmp_path):
    context = click.Context(cli)
    context.meta["kdacli.args"] = [
        "run",
        "--dump",
        str(tmp_path / "my dump.pt"),
        f"--json={tmp_path}/x.json",
        "-T",
        "8k",
    ]
    with context:
        assert provenance.command_line() == "kda run --dump 'my dump.pt' --json=x.json -T 8k"


def test_a_script_is_told_by_its_own_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/host_time.py", "--no-peers"])
    assert provenance.command_line() == "python3 benchmarks/host_time.py --no-peers"


def test_provenance_holds_versions_and_survives_missing_tools(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = provenance.collect(seed=5)
    assert found["seed"] == 5 and found["gpu"] is None and found["commit"] is None
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    json.dumps(found)


def test_a_gpu_is_told_as_nvidia_smi_tells_it(monkeypatch):
    answers = {
        "name": "NVIDIA H100 80GB HBM3, 580.1, 1980, 1980, 2619, 2619, 700.00, 31\n",
        "clocks_throttle_reasons.active": "0x0000000000000001\n",
    }
    asked = []

    def run(*command):
        asked.append(command[-2:])
        return answers.get(command[1].split("=")[1].split(",")[0])

    monkeypatch.setattr(provenance, "_run", run)
    monkeypatch.setattr(provenance, "gpu_uuid", lambda: "GPU-12-34")
    gpu = provenance.gpu()
    assert set(asked) == {("-i", "GPU-12-34")}
    assert (gpu["name"], gpu["sm_clock_mhz"], gpu["power_limit_w"]) == ("NVIDIA H100 80GB HBM3", 1980.0, 700.0)
    assert gpu["throttle_reasons"] == "0x0000000000000001"


@pytest.mark.gpu
@pytest.mark.parametrize("visible", [None, "", "-1", "0", "0,-1"])
def test_the_gpu_in_use_is_the_one_that_torch_has(visible):
    """Asked in another process, since CUDA reads CUDA_VISIBLE_DEVICES once: empty and -1 hide every GPU."""
    code = "import torch; from kdacli import device, provenance; found = device.gpu_uuid(), provenance.gpu()\n"
    code += "gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)\n"
    code += "expected = ('GPU-' + str(gpu.uuid).removeprefix('GPU-'), gpu.name) if gpu else (None, None)\n"
    code += "assert (found[0], found[1] and found[1]['name']) == expected, (found, expected)"
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_explain_keeps_to_one_line():
    message, code = main.explain(RuntimeError("first\nsecond"))
    assert message == "Error: internal: RuntimeError: first second (rerun with --debug for the traceback)" and code == 1


@pytest.mark.parametrize("name", ["run", "verify", "profile", "compile", "kernels"])
def test_a_short_help_and_a_whole_one(name):
    """--help has the usual flags and says how many more there are; --help-all has every flag of the command."""
    short, whole = kda(name, "--help").output, kda(name, "--help-all").output
    command = cli.get_command(click.Context(cli), name)
    flags = {flag for p in command.params if isinstance(p, click.Option) and not p.hidden for flag in p.opts[:1]}
    assert all(re.search(rf"{flag}\b", whole) for flag in flags)
    left = int(re.search(r"(\d+) more flags: kda \w+ --help-all", short).group(1))
    shown = sum(bool(re.search(rf"^ +(-\w, )?{flag}\b", short, re.M)) for flag in flags)
    assert left >= len(flags) - shown > 10
    assert "Examples:" in short and len(short.splitlines()) < 75
