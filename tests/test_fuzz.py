"""Malformed dumps and command lines, several hundred of them: one clear line, the right exit code, and nothing touched.

Each case is made from a good one by a change that makes it wrong for certain; what is random comes from one seed. None
gets as far as running a kernel.
"""

import collections
import dataclasses
import datetime
import decimal
import fractions
import json
import os
import pathlib
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from kda_kernels.problem import Options, Problem
from kdacli.dumps import names, save
from kdacli.dumps.save import said_options
from kdacli.main import cli
from kdacli.synthetic import make_inputs

RANDOM = random.Random(20261122)
SMALL = {"H": 1, "HV": 2, "K": 16, "V": 16, "options": Options(gate="safe", lower_bound=-5.0)}
PREFILL = make_inputs(Problem(op="prefill", seq_lens=(5, 0, 9), **SMALL))
DECODE = make_inputs(Problem(op="decode", seq_lens=(1, 1, 1), pool_slots=6, **SMALL))
COMMANDS = (("compare", "{}"), ("run", "--dump", "{}"), ("verify", "--dump", "{}"), ("kernels", "--dump", "{}"))

Write = Callable[[pathlib.Path], None]


def good(inputs=PREFILL) -> dict[str, Any]:
    """A flat dump that has everything."""
    op = "prefill" if inputs is PREFILL else "decode"
    return {**inputs.tensors(), "o": inputs.v.clone(), "final_state": inputs.state.clone(), **said_options(inputs, op)}


def test_what_the_cases_start_from_is_good(tmp_path):
    for name, inputs in (("prefill", PREFILL), ("decode", DECODE)):
        torch.save(good(inputs), tmp_path / f"{name}.pt")
        result = CliRunner().invoke(cli, ["run", "--dump", str(tmp_path / f"{name}.pt"), "--kernel", f"torch-{name}"])
        assert result.exit_code == 0, result.output


# --- dumps. Each generator yields (name of the file, what writes it).


def pt(tree: Any) -> Write:
    return lambda path: torch.save(tree, path)


def raw(data: bytes) -> Write:
    return lambda path: path.write_bytes(data) and None


def whole(suffix: str, folder: pathlib.Path) -> bytes:
    """The bytes of a good dump."""
    path = folder / f"whole{suffix}"
    save(path, PREFILL, op="prefill", force=True)
    data = path.read_bytes()
    path.unlink()
    return data


def damaged(suffix: str, damage: Callable[[bytes], bytes]) -> tuple[str, Write]:
    return f"damaged{suffix}", lambda path: path.write_bytes(damage(whole(suffix, path.parent))) and None


def truncations() -> Iterator[tuple[str, Write]]:
    for suffix in (".pt", ".safetensors"):
        for share in [RANDOM.random() for _ in range(14)]:
            yield damaged(suffix, lambda data, share=share: data[: 1 + int(share * (len(data) - 2))])
        for cut in (1, 2, 7, 20):
            yield damaged(suffix, lambda data, cut=cut: data[:-cut])


def flip(data: bytes, byte: int, bit: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def bit_flips() -> Iterator[tuple[str, Write]]:
    """In the pickle of a .pt (whose checksum must catch it), in the zip's signatures, in a .safetensors header."""
    for share, bit in [(RANDOM.random(), RANDOM.randrange(8)) for _ in range(20)]:

        def in_pickle(data: bytes, share: float = share, bit: int = bit) -> bytes:
            start, end = data.index(b"\x80\x02}"), data.index(b"PK\x07\x08")
            return flip(data, start + int(share * (end - start)), bit)

        yield damaged(".pt", in_pickle)
    for signature in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"):
        for byte in (0, 1, 2):
            bit = RANDOM.randrange(8)
            yield damaged(".pt", lambda data, s=signature, i=byte, b=bit: flip(data, data.rindex(s) + i, b))
    for byte in range(8):  # the length of the header
        bit = RANDOM.randrange(8)
        yield damaged(".safetensors", lambda data, i=byte, b=bit: flip(data, i, b))
    for offset in (b'{"', b'"dtype"', b'"shape":[', b'"data_offsets":['):
        bit = RANDOM.randrange(5)
        yield damaged(".safetensors", lambda data, at=offset, b=bit: flip(data, data.rindex(at), b))


class Local:
    """A class of somebody's own."""


def pickled_objects() -> Iterator[tuple[str, Write]]:
    things = (
        Local(),
        Local,
        os.system,
        print,
        numpy.arange(3),
        numpy.float32(1),
        pathlib.PurePosixPath("a"),
        decimal.Decimal("0.1"),
        fractions.Fraction(1, 3),
        datetime.date(2026, 11, 22),
        range(3),
        slice(1),
        re.compile("x"),
        ValueError("x"),
        random.Random(0),
        collections.deque([1]),
        torch.nn.Linear(2, 2),
        torch.Generator(),
        PREFILL,
        PREFILL.options,
    )
    for thing in things:
        yield "object.pt", pt({"q": thing})
        yield "object.pt", pt(good() | {"extra": thing})


def wrong_shapes() -> Iterator[tuple[str, Write]]:
    for inputs in (PREFILL, DECODE):
        for name, tensor in good(inputs).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            for dim in range(tensor.ndim):
                if name in ("state", "state_indices") and dim == 0 and inputs is DECODE:
                    continue  # a pool may have any number of slots, and more of them may be named than there are
                longer = torch.cat([tensor, tensor.narrow(dim, tensor.shape[dim] - 1, 1)], dim)
                yield "shape.pt", pt(good(inputs) | {name: longer})
            yield "shape.pt", pt(good(inputs) | {name: torch.tensor(1.0)})
            yield "shape.pt", pt(good(inputs) | {name: torch.zeros(2, 3, 4, 5, 6)})


def wrong_dtypes() -> Iterator[tuple[str, Write]]:
    wrong = (torch.complex64, torch.bool, torch.int16, torch.uint8, torch.float8_e5m2)
    for inputs in (PREFILL, DECODE):
        for name, tensor in good(inputs).items():
            if isinstance(tensor, torch.Tensor):
                for dtype in RANDOM.sample(wrong, 2):
                    yield "dtype.pt", pt(good(inputs) | {name: tensor.float().to(dtype)})
    for name in ("cu_seqlens", "state_indices"):
        yield "dtype.pt", pt(good(DECODE) | {name: good(DECODE)[name].float()})
    for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state"):
        yield "dtype.pt", pt(good() | {name: good()[name].double()})


def wrong_kinds() -> Iterator[tuple[str, Write]]:
    for name in (*names.REQUIRED, "state", "cu_seqlens", "o"):
        tensor = good()[name]
        for thing in (
            tensor.tolist(),
            "a tensor",
            3.5,
            {"data": tensor},
            (tensor, tensor),
            tensor.to("meta"),
            tensor.to_sparse(),
        ):
            if not (name == "o" and isinstance(thing, dict)):
                yield "kind.pt", pt(good() | {name: thing})


def wrong_names() -> Iterator[tuple[str, Write]]:
    for name in names.REQUIRED:
        without = {k: v for k, v in good().items() if k != name}
        yield "missing.pt", pt(without)
        yield (
            "missing.safetensors",
            lambda path, t=without: save_file({k: v for k, v in t.items() if isinstance(v, torch.Tensor)}, path),
        )
        yield "renamed.pt", pt(without | {RANDOM.choice(("my_", "x.", "_")) + name: good()[name]})
        yield "twice.pt", pt(good() | {names.INPUTS[name][1]: good()[name]})
    for name in ("A_log", "a_log"):
        yield "none.pt", pt({k: v for k, v in good().items() if k not in (name, "A_log", "lower_bound", "safe_gate")})
    yield "twice.pt", pt(good() | {"h0": good()["state"]})
    yield "twice.pt", pt(good() | {"ht": good()["state"]})
    yield "twice.pt", pt(good() | {"query_start_loc": good()["cu_seqlens"]})


def wrong_values() -> Iterator[tuple[str, Write]]:
    T, nan = 14, float("nan")
    for offsets in (
        *([0, 5, 4, T], [0, -1, 5, T], [1, 5, 5, T], [0, 5, 5, T + 1], [0, 20, 5, T], [-3, 0, 5, T]),
        *([T, 9, 5, 0], [0, 5, 5, -1], [0, 1 << 31, 5, T], [0, 5, T], [], [0], [[0, 5, 5, T]]),
        *([nan, nan, nan, nan], [0, 5, nan, T], [0.0, 5.0, 5.0, 14.0]),
    ):
        yield "cu_seqlens.pt", pt(good() | {"cu_seqlens": torch.tensor(offsets)})
    for slots in (
        *([0, 0, 1], [2, 1, 2], [5, 5, 5], [0, 6, 1], [0, 1, 1 << 31], [1, 2], []),
        *([[0], [1], [2]], [0.0, 1.0, 2.0], [nan, 0, 1], [True, False, True]),
    ):
        yield "indices.pt", pt(good(DECODE) | {"state_indices": torch.tensor(slots)})
    without = {k: v for k, v in good(DECODE).items() if k not in ("state", "final_state")}
    yield "pool.pt", pt(without)
    pool = torch.zeros(2 * 16 * 16 + 5).as_strided((6, 2, 16, 16), (1, 256, 16, 1))  # slots that overlap
    yield "pool.pt", pt(good(DECODE) | {"state": pool})
    yield "pool.pt", pt(good(DECODE) | {"state": DECODE.state.transpose(1, 2)})
    yield "strides.pt", pt(good() | {"q": PREFILL.q.transpose(1, 3).contiguous().transpose(1, 3)})
    same = good(DECODE)
    yield "after.pt", pt(same | {"final_state": same["state"]})


def wrong_options() -> Iterator[tuple[str, Write]]:
    bad = {
        "op": ("attention", 3, True, torch.zeros(2)),
        "scale": ("wide", float("nan"), float("inf"), 0.0, [1.0], torch.ones(2), True, 10**400),
        "lower_bound": (0.0, 5.0, -0.0, "low", float("-inf"), float("nan"), None, torch.tensor([-5.0, -5.0])),
        "use_gate_in_kernel": ("maybe", 2, -1, 0.5, [True], torch.tensor([True, False]), {"a": 1}),
        "use_qk_l2norm_in_kernel": ("l2", 7, float("nan")),
        "use_beta_sigmoid_in_kernel": ("sigmoid", 2.0),
        "allow_neg_eigval": ("-1", 17),
        "state_v_first": ("KV", 9),
        "safe_gate": ("very", 3),
        "output_final_state": ("perhaps", 4),
    }
    for name, values in bad.items():
        for value in values:
            yield "option.pt", pt(good() | {name: value})
    yield "option.pt", pt(good() | {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False})
    yield "option.pt", pt({"inputs": good(), "options": {"use_l2_norm": True}})
    yield "option.pt", pt({"inputs": good(), "options": {"allow_neg_eigval": False}})  # said twice
    v_last = dataclasses.replace(PREFILL, v=PREFILL.v[..., :8], state=PREFILL.state[:, :, :8])
    yield (
        "option.pt",
        pt(good() | v_last.tensors() | {"state_v_first": False, "o": v_last.v, "final_state": v_last.state}),
    )


def wrong_containers() -> Iterator[tuple[str, Write]]:
    q = PREFILL.q
    trees = (
        *(None, 1, "dump", q, [], {}, (), [1, 2], [q], [[good()]], {0: q}, {"q": q, 1: q}, {"calls": []}, {"calls": 3}),
        *(
            {"calls": {}},
            {"calls": {"a": 1}},
            {"calls": [good(), None]},
            {"inputs": {}},
            {"inputs": [q]},
            {"outputs": good()},
        ),
        *({"prefill": {}}, {"prefill": {"inputs": {}}}, {"meta": {"a": 1}}, {"options": {}}, {"a": {"b": {"c": q}}}),
        *(
            {"inputs": good(), "q": q},
            {"inputs": good(), "outputs": {"o": "none"}},
            {"inputs": {0: q}},
            {"a": 1, "b": "x"},
        ),
    )
    for tree in trees:
        yield "tree.pt", pt(tree)
    twice = {"inputs.q": q.clone(), "inputs.q.data": q.clone()}
    yield "tree.safetensors", lambda path: save_file(twice, path)
    yield "tree.safetensors", lambda path: save_file({"q": q.clone()}, path)
    yield "tree.safetensors", lambda path: save_file({}, path)


def wrong_files() -> Iterator[tuple[str, Write]]:
    header = json.dumps({"q": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    contents = (
        *(
            b"",
            b"\0",
            b"PK",
            b"PK\x03\x04",
            b"PK\x05\x06" + bytes(18),
            b"\x89PNG\r\n",
            b"#!/bin/sh\nexit 0\n",
            bytes(64),
        ),
        *(
            b'{"q": [1.0, 2.0]}',
            b"q,k,v\n1,2,3\n",
            pickle.dumps({"q": 1}),
            RANDOM.randbytes(100),
            RANDOM.randbytes(5000),
        ),
        *((1 << 60).to_bytes(8, "little"), len(header).to_bytes(8, "little") + header),
        len(header).to_bytes(8, "little") + header[:-3],
    )
    for data in contents:
        yield "file.pt", raw(data)
        yield "file.safetensors", raw(data)
    for name in ("dump.npz", "dump.json", "dump.pth", "dump", "dump.pt.gz", "dump.PT2"):
        yield name, pt(good())
    for name in ("folder.pt", "folder.safetensors"):
        yield name, lambda path: path.mkdir()
    for name in ("nowhere.pt", "nowhere.safetensors", "nowhere.txt"):
        yield name, lambda path: None
    yield "link.pt", lambda path: path.symlink_to("nowhere.pt")
    yield "pipe.pt", lambda path: os.mkfifo(path)
    yield "old.pt", lambda path: torch.save(good(), path, _use_new_zipfile_serialization=False)
    yield "script.pt", lambda path: torch.jit.script(torch.nn.Identity()).save(str(path))

    def other_zip(path: pathlib.Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b.txt", "c")

    yield "zip.pt", other_zip


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, more: int = 0) -> Write:
    """A file as torch.save writes it, of a pickle of any making and one storage."""

    def write(path: pathlib.Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("dump/data.pkl", pickled)
            archive.writestr("dump/byteorder", "little")
            archive.writestr("dump/data/0", bytes(64 + more))
            archive.writestr("dump/version", "3\n")

    return write


def nested(make: Callable[[Any], Any], levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = make(value)
    return value


class Calls:
    """Pickles as a call of `function`, again and again with the same argument."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile() -> Iterator[tuple[str, Write]]:
    """Small files that would take a reader gigabytes or hours."""

    def pickled(tree: Any) -> bytes:
        return pickle.dumps(tree, protocol=2)

    pairs = [(i, i) for i in range(4000)]
    twice = nested(lambda part: [part, part], 60)
    trees = (
        {"meta": {"a": twice}},
        {"meta": {"a": nested(lambda part: {"a": part, "b": part}, 60)}},
        {"calls": [{"meta": twice}]},
        {"meta": nested(lambda part: [part], 400)},
        {"meta": nested(lambda part: {"a": part}, 100)},
        {"meta": ["x" * 10_000] * 10_000},
        {"extra": Calls(bytearray, 1 << 40)},
        {"extra": [Calls(collections.OrderedDict, pairs) for _ in pairs]},
        {"meta": {"a": "\ud800"}},
        {"q\x1b[2J": 1.0},
        {"q" * 1000: 1.0},
        {"model.layers.0.q": 1.0, 3: 1.0},
    )
    round_ = [1]
    round_.append(round_)
    for tree in (*trees, {"meta": round_}):
        yield "hostile.pt", zipped(pickled(good_shell(tree)))
    tuples = b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # BINPUT, BINGET, TUPLE2: each holds the last twice
    yield "hostile.pt", zipped(b"\x80\x02}X\x01\x00\x00\x00x" + tuples + b"Ns.")  # as a key, which is hashed
    yield "deflated.pt", zipped(pickled({"meta": "x" * (1 << 24)}), zipfile.ZIP_DEFLATED)
    yield "deflated.pt", zipped(pickled({"meta": "x"}), zipfile.ZIP_BZIP2)
    wide = torch.zeros(1, dtype=torch.bfloat16).expand(1, 1 << 40, 1, 16)
    yield "wide.pt", pt(good() | {"q": wide, "k": wide, "v": wide})
    yield "wide.pt", pt(good() | {"extra": wide})
    shared = torch.zeros(1 << 20)
    yield "shared.pt", pt({"calls": [good() | {"extra": shared}] * 64})
    yield "deep.safetensors", lambda path: save_file({"a." * 5000 + "q": torch.zeros(1)}, path)

    def two_directories(path: pathlib.Path) -> None:
        """Of two zip files one after the other, readers may take either."""
        zipped(pickled({"meta": "x"}), zipfile.ZIP_DEFLATED)(path)
        first = path.read_bytes()
        pt(good())(path)
        path.write_bytes(first + path.read_bytes())

    yield "two.pt", two_directories
    yield "folder", dumper_file("step=0___rank=0___dump_index=x___name=q.pt")
    yield "folder", dumper_file(f"step=0___rank=0___dump_index={'9' * 200}___name=k.pt")


def good_shell(tree: dict) -> dict:
    """Plain values in the place of tensors: what is refused is refused before they would be missed."""
    return {"options": {"op": "prefill"}, **tree}


def dumper_file(name: str) -> Write:
    def write(path: pathlib.Path) -> None:
        path.mkdir()
        torch.save({"value": 1, "meta": {}}, path / name)

    return write


GENERATORS = (
    hostile,
    truncations,
    bit_flips,
    pickled_objects,
    wrong_shapes,
    wrong_dtypes,
    wrong_kinds,
    wrong_names,
    wrong_values,
    wrong_options,
    wrong_containers,
    wrong_files,
)
DUMPS = [
    pytest.param(COMMANDS[i % len(COMMANDS)], name, write, id=f"{generator.__name__}-{i}")
    for generator in GENERATORS
    for i, (name, write) in enumerate(generator())
]


def assert_refused(words: list[str], *codes: int) -> None:
    result = CliRunner().invoke(cli, words)
    said = f"kda {' '.join(words)}\nexit {result.exit_code}\n{result.output}"
    assert result.exit_code in codes, said
    assert "Traceback" not in result.output and "internal" not in result.output, said
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, said
    assert 15 < len(result.stderr) < 700, said
    assert result.stdout == "", said


def contents(folder: pathlib.Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")  # of torch, about the odd tensors that are written here
@pytest.mark.parametrize(("command", "name", "write"), DUMPS)
def test_dump(tmp_path, command, name, write):
    write(tmp_path / name)
    before = contents(tmp_path)
    assert_refused([word.format(tmp_path / name) for word in command], 2)
    assert contents(tmp_path) == before


# --- command lines

BAD_FLAGS = (
    *("-T 0", "-T -5", "-T abc", "-T 1e3", "-T 5.5", "-T 9k9", "-T 99999999999999999999", "-N 0", "-N many", "-N -1"),
    *("-H 0", "-H two", "--heads -3", "--v-heads 0", "--head-dim 0", "--head-dim big", "--v-head-dim -1"),
    *("--lens 1,,2", "--lens ,", "--lens -4", "--lens 3;4", "--lens a,b", "--lens 1.5"),
    *("--model gpt", "--model KIMI", "--tp 0 --model kimi-k3", "--tp 7 --model kimi-k3", "--tp -8 --model kimi-k3"),
    *("--tp 8", "--tp x", "--model kimi-k3 -H 4", "--model kimi-k3 --lower-bound -3", "--model kimi-k3 --gate none"),
    *("--dtype int8", "--dtype fp8", "--g-dtype x", "--state-dtype fp8", "--beta-dtype bf17", "--param-dtype half"),
    *("--gate hard", "--gate softplus --lower-bound -5", "--gate safe --lower-bound 5", "--lower-bound 0"),
    *(
        "--lower-bound low",
        "--scale wide",
        "--gates hot",
        "--keys collinear",
        "--seed -1",
        "--seed x",
        "--op attention",
    ),
    *("--lens 1,2 -T 3", "--lens 1,2 -N 2", "--dense --lens 1,2", "--padding 1 --pool 0", "--padding 9 -N 2 --pool 30"),
    *("--pool 1 -N 4", "--pool -1", "--padding -1", "--beta-values --allow-neg-eigval", "-H 4 --v-heads 6"),
    *("--dump", "--dump a.pt -T 4", "--dump a.pt --gates weak", "--device tpu", "--device cuda:0", "--kernel warp"),
    *("--json", "--json /no/such/folder/r.json", "--json .", "--nonsense", "-Z", "extra words", "--kernel", "--"),
)
OTHER_LINES = (
    *(
        "frobnicate",
        "verfy",
        "compare",
        "compare a.pt b.pt",
        "compare a.pt",
        "compare a.pt --call",
        "compare --dump a.pt",
    ),
    *("verify --case nope", "verify --case nope --list x", "verify --case", "run --save", "run --save /no/such/x.pt"),
    *(
        "run --save x.npz",
        "run --save .",
        "run --kernel warp",
        "compile --arch sm_1",
        "compile --arch banana",
        "compile --jobs 0",
    ),
    *("compile --kernel warp", "compile --arch", "profile --suite none", "profile --seconds -1", "profile --seconds x"),
    *("kernels extra", "kernels --op x", "--frobnicate", "-x run", "compare ''", "run run"),
)
LINES = [f"{command} {flags}" for command in ("run", "verify", "kernels", "profile") for flags in BAD_FLAGS]


@pytest.mark.parametrize("line", [line for line in (*LINES, *OTHER_LINES) if not line.endswith(" --")])
def test_command_line(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious.json").write_text("precious")
    assert_refused([word.strip("'") for word in line.split()], 2, 3)
    assert contents(tmp_path) == {"precious.json": b"precious"}


def test_there_are_enough():
    assert len(DUMPS) >= 200 and len(LINES) >= 100
