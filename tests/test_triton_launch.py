"""Launches past Triton's launcher: what goes where, with stand-ins for the kernel and for the GPU's driver."""

from types import SimpleNamespace

import pytest
from triton import knobs

from kda_kernels.triton import launch as module


class Compiled:
    """What a first launch returns; `calls`: how it was launched afterwards, and with what."""

    packed_metadata, function = "metadata", "function"

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(("run", *arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, *arguments))


class Kernel:
    """`calls`: launches that went through Triton."""

    def __init__(self):
        self.calls, self.made = [], []

    def __getitem__(self, grid):
        def launched(*arguments, **options):
            self.calls.append((grid, arguments, options))
            self.made.append(Compiled())
            return self.made[-1]

        return launched


@pytest.fixture
def kernel(monkeypatch):
    gpu = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 10 + device)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=gpu))
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def test_what_is_compiled_is_launched_by_itself(kernel):
    for value in (1, 2):
        module.launch(kernel, (5,), "kind", (value,), num_warps=4)
    assert kernel.calls == [((5, 1, 1), (1,), {"num_warps": 4})]
    assert kernel.made[0].calls == [("run", 5, 1, 1, 13, "function", "metadata", None, None, None, 2)]


def test_another_kind_is_another_launch_of_triton(kernel):
    for kind in ("one", "two", None, None):
        module.launch(kernel, (1, 2), kind, ())
    assert [call[0] for call in kernel.calls] == [(1, 2, 1), (1, 2, 1), (1, 2), (1, 2)]
    assert not any(made.calls for made in kernel.made)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_are_called(kernel, name):
    """By Triton, which makes what they are told."""
    hooks, heard = getattr(knobs.runtime, name), []
    module.launch(kernel, (1,), "kind", ())
    hooks.add(heard.append)
    try:
        module.launch(kernel, (1,), "kind", (7,))
    finally:
        hooks.remove(heard.append)
    assert kernel.made[0].calls == [((1, 1, 1), 7)]
