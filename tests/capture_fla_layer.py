"""Captures tensors from a real KDA layer: FLA's KimiDeltaAttention as FLA initialises it, fed real text.

    python tests/capture_fla_layer.py [--device cuda] [--mode chunk] [--out tests/data/fla_layer.pt] [--tokens 200]
        [--heads 2] [--force]
    python tests/capture_fla_layer.py --device cpu --mode fused_recurrent ...

Needs `pip install "flash-linear-attention>=0.6"`, which brings transformers and einops. It runs one prefill and three
decode steps of the layer and writes what went into FLA's KDA functions and what came out, under FLA's own names, as
four calls of a dump that `kda compare` reads. The prefill is a call of `chunk_kda` in the layer's mode chunk, and of
`fused_recurrent_kda` in its mode fused_recurrent; the decode steps call `fused_recurrent_kda` in both.

With --device cpu no GPU is needed: FLA's Triton kernels (of KDA, of the convolutions and of the norm) run in Triton's
interpreter, and torch's matmuls on the CPU. Only mode fused_recurrent runs there. Triton 3.9's interpreter cuts float32
off to bf16 where a GPU rounds to nearest, which doubles the error of `o`; the dump's "meta" names the device and mode.

The layer: head size 128, safe gate with lower_bound -5, short convolutions, everything else FLA's default; weights and
activations bf16, A_log and dt_bias fp32 (as serving engines keep them); seed 0. The text: the opening of the Gettysburg
Address. The tokenizer: UTF-8 bytes, one token a byte, which needs no vocabulary from the network. The embedding:
`torch.nn.Embedding(256, hidden_size)` as torch initialises it, N(0, 1).
"""

import argparse
import datetime
import importlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdacli.autotuning import take_first

TEXT = Path(__file__).parent / "data" / "gettysburg.txt"
OUT = Path(__file__).parent / "data" / "fla_layer.pt"
HIDDEN_SIZE, HEAD_DIM, LOWER_BOUND, SEED, DECODE_STEPS = 256, 128, -5.0, 0, 3
MIN_PREFILL = 65  # up to 64 tokens FLA's layer takes its recurrent kernel instead of the chunk kernel
MAX_BYTES = 2_000_000


def main() -> None:
    """Parses, captures, checks and writes."""
    parser = argparse.ArgumentParser(description="Capture tensors from FLA's KimiDeltaAttention layer.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--mode", choices=("chunk", "fused_recurrent"), default="chunk", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="dump to write (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of the prefill (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="heads of the layer (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite the dump")
    args = parser.parse_args()
    if args.device == "cpu" and args.mode == "chunk":
        sys.exit("FLA's chunk kernel does not run in Triton's interpreter: use --mode fused_recurrent")
    if args.out.exists() and not args.force:
        sys.exit(f"{args.out} exists: use --force to overwrite it")
    tokens = torch.tensor(list(TEXT.read_bytes()))
    if not MIN_PREFILL <= args.tokens <= len(tokens) - DECODE_STEPS:
        sys.exit(f"--tokens should be {MIN_PREFILL} to {len(tokens) - DECODE_STEPS}, which is all the text there is")
    os.environ["TRITON_INTERPRET"] = "1" if args.device == "cpu" else "0"  # before anything imports triton
    calls = capture(tokens, args.tokens, args.heads, args.device, args.mode)
    write({"calls": calls, "meta": provenance(args.tokens, args.device, args.mode)}, args.out)


def require(device: str) -> tuple[Any, Any]:
    """FLA's layer module and its cache module; ends the program with one line about what is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: use --device cpu --mode fused_recurrent")
    try:
        if device == "cpu":
            take_first()
        return importlib.import_module("fla.layers.kda"), importlib.import_module("fla.models.utils")
    except ImportError as error:
        sys.exit(f'{error}: pip install "flash-linear-attention>=0.6" (it brings transformers and einops)')


@torch.no_grad()
def capture(tokens: torch.Tensor, prefill: int, heads: int, device: str, mode: str) -> dict[str, dict[str, Any]]:
    """{"prefill": call, "decode_0": call, ...} of one layer over `tokens`, the first `prefill` of them at once."""
    layers, caches = require(device)
    torch.manual_seed(SEED)
    embedding = torch.nn.Embedding(256, HIDDEN_SIZE)
    layer = layers.KimiDeltaAttention(
        hidden_size=HIDDEN_SIZE,
        head_dim=HEAD_DIM,
        num_heads=heads,
        mode=mode,
        safe_gate=True,
        lower_bound=LOWER_BOUND,
        layer_idx=0,
    )
    A_log, dt_bias = layer.A_log.data, layer.dt_bias.data
    layer.to(device, torch.bfloat16).eval()
    layer.A_log, layer.dt_bias = (torch.nn.Parameter(x.to(device)) for x in (A_log, dt_bias))
    hidden = embedding(tokens).to(device, torch.bfloat16).unsqueeze(0)
    pieces = [hidden[:, :prefill], *hidden[:, prefill : prefill + DECODE_STEPS].split(1, dim=1)]
    cache, seen = caches.Cache(), []
    with recording(layers, seen):
        for piece in pieces:
            layer(piece, past_key_values=cache, use_cache=True)
    expected = [f"{mode}_kda"] + ["fused_recurrent_kda"] * DECODE_STEPS
    if (called := [call["meta"]["function"] for call in seen]) != expected:
        sys.exit(f"the layer called {called}: expected {expected}; is this another version of FLA?")
    share_states(seen)
    return dict(zip(["prefill", *(f"decode_{i}" for i in range(DECODE_STEPS))], seen, strict=True))


@contextmanager
def recording(module: Any, calls: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, the layer's calls of FLA's two KDA functions are appended to `calls`."""

    def recorder(name: str, function: Callable) -> Callable:
        def record(**given: Any) -> Any:  # the layer names every argument
            inputs = {k: v.detach().cpu().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
            options = {k: v for k, v in given.items() if isinstance(v, bool | int | float)}
            o, final_state = function(**given)
            outputs = {"o": o.cpu().clone(), "final_state": final_state.cpu().clone()}
            op = "prefill" if given["q"].shape[1] > 1 else "decode"
            meta = {"function": name}
            calls.append({"inputs": inputs, "options": options | {"op": op}, "outputs": outputs, "meta": meta})
            return o, final_state

        return record

    originals = {name: getattr(module, name) for name in ("chunk_kda", "fused_recurrent_kda")}
    try:
        for name, function in originals.items():
            setattr(module, name, recorder(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


def share_states(calls: list[dict[str, Any]]) -> None:
    """The layer hands each final state to the next call, and the parameters to all: each is stored once."""
    for before, after in zip(calls, calls[1:], strict=False):
        state = before["outputs"]["final_state"]
        if not torch.equal(after["inputs"]["initial_state"], state):
            sys.exit("a decode step started from another state than the call before it ended with")
        after["inputs"]["initial_state"] = state
        for name in ("A_log", "dt_bias"):
            after["inputs"][name] = before["inputs"][name]


def provenance(prefill: int, device: str, mode: str) -> dict[str, Any]:
    """Where the tensors come from, in plain values."""
    packages = ("torch", "triton", "flash-linear-attention", "fla-core", "transformers")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "layer": "fla.layers.KimiDeltaAttention(safe_gate=True, lower_bound=-5.0), as initialised",
        "text": f"{TEXT.name}, UTF-8 bytes as tokens, the first {prefill} prefilled",
        "script": Path(__file__).name,
        "seed": SEED,
        "device": gpu or f"CPU, Triton {found['triton']}'s interpreter",
        "mode": mode,
        "gpu": gpu,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **found,
    }


def write(dump: dict[str, Any], path: Path) -> None:
    """Writes the dump whole or not at all, and tells what it is."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        whole = Path(folder) / path.name
        torch.save(dump, whole)
        if (size := whole.stat().st_size) > MAX_BYTES:
            sys.exit(f"the dump has {size} bytes, more than {MAX_BYTES}: choose fewer --tokens or --heads")
        torch.load(whole, weights_only=True)  # raises if it holds anything but tensors and plain values
        os.replace(whole, path)
    for name, call in dump["calls"].items():
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in (call["inputs"] | call["outputs"]).items())
        print(f"{name}: {call['meta']['function']}: {shapes}")
    print(f"{path}: {size} bytes")


if __name__ == "__main__":
    main()
