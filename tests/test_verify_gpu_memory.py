"""Cases for which the GPU has too little memory: checked again with what was kept, and then whose fault it is."""

import dataclasses
import itertools
import json
import sys
import types

import pytest
import torch
from click.testing import CliRunner

from kda_kernels import registry
from kda_kernels.problem import Op
from kda_kernels.registry import Kernel
from kdacli.main import cli
from kdacli.verify.cases import spec
from kdacli.verify.checks import gpu_memory
from kdacli.verify.checks.check import NO_ROOM, Bench, check
from kdacli.verify.search import search

CASE = "decode-any/lens=1,1/K=16/V=16"
OTHERS = "other processes hold 61 of 79 GiB"


@pytest.fixture
def hungry(monkeypatch):
    """Registers the kernel `hungry`: torch-decode, but memory runs out in some of its calls, by number."""

    def make(*when: int) -> Kernel:
        calls = itertools.count(1)

        def run(inputs):
            if next(calls) in when:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.")
            return registry.get("torch-decode").run(inputs)

        module = types.ModuleType("a_hungry_kernel")
        module.run, module.unsupported = run, lambda problem: None
        monkeypatch.setitem(sys.modules, module.__name__, module)
        kernel = Kernel("hungry", Op.DECODE, "torch", module.__name__, "", ours=False)
        monkeypatch.setitem(registry._KERNELS, "hungry", kernel)
        return kernel

    return make


@pytest.fixture
def given_back(monkeypatch):
    """What was asked of `gpu_memory.give_back`."""
    asked = []
    monkeypatch.setattr(gpu_memory, "give_back", lambda *least: asked.append(least))
    return asked


def made(name=CASE) -> Bench:
    return Bench.of_case(spec.parse(name), 0, "cpu")


def test_it_is_checked_again(hungry, given_back):
    assert check(hungry(1), made()).status == "pass"
    assert given_back == [(0,)]


@pytest.mark.parametrize("held", [OTHERS, None])
def test_a_second_time_it_is_the_kernel_unless_others_hold_it(hungry, given_back, monkeypatch, held):
    monkeypatch.setattr(gpu_memory, "others", lambda: held)
    result = check(hungry(1, 2), made())
    if held:
        assert (result.status, result.notes) == ("refused", (f"{NO_ROOM}: {OTHERS}",))
    else:
        assert result.status == "error" and "Tried to allocate 5.00 GiB" in result.notes[0]
    assert (result.case, result.kernel, result.op) == (CASE, "hungry", Op.DECODE)


def test_properties_run_out_of_it_too(hungry, given_back):
    """The two calls of a check are well, the property's is not."""
    bench = dataclasses.replace(made("decode-any/lens=1,1,1/K=16/V=16"), properties=("neighbours",))
    result = check(hungry(3), bench)
    assert result.status == "pass" and [held.status for held in result.properties] == ["pass"]
    assert given_back == [(0,)]


def test_inputs_that_do_not_fit(hungry, given_back, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Bench, "of_case", full)
    hungry()
    words = ["verify", "--device", "cpu", "--kernel", "hungry", "--case", CASE, "--json", "-"]
    result = CliRunner().invoke(cli, words)
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["status"], row["notes"]) == ("refused", [NO_ROOM])
    assert len(given_back) == 2
    found = search(registry.get("hungry"), "cpu", 60, examples=5)
    assert (found.tried, found.refused, found.failure) == (5, 5, None)


def test_a_failure_that_cannot_be_looked_at(hungry, given_back, monkeypatch):
    """It stays a failure, without a smaller case."""
    hungry(*range(1, 9))

    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("kdacli.verify.failures.explanation.shrink", full)
    monkeypatch.setattr(gpu_memory, "others", lambda: None)  # whoever else is on this machine's GPU
    result = CliRunner().invoke(cli, ["verify", "--device", "cpu", "--kernel", "hungry", "--case", CASE])
    assert result.exit_code == 1
    assert "too little memory free to look closer" in result.output


@pytest.mark.gpu
def test_what_is_kept_is_given_back():
    kept = torch.empty(gpu_memory.KEPT + 1, dtype=torch.int8, device="cuda")
    gpu_memory.give_back(0)
    before = torch.cuda.memory_reserved()
    del kept
    gpu_memory.give_back()
    assert before - torch.cuda.memory_reserved() > gpu_memory.KEPT
