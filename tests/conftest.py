"""Where there is no CUDA GPU: Triton's interpreter for the kernels, and a counted skip for the tests marked gpu."""

import os
from collections.abc import Iterator

import pytest
import torch


def require_masks() -> None:
    """Triton 3.9's interpreter refuses a mask of integers; here, that of older ones does."""
    from triton.runtime.interpreter import InterpreterBuilder

    def checked(method, position):
        def call(builder, *args):
            assert args[position].data.dtype == bool, "a mask is no bool: (...) != 0 makes it one"
            return method(builder, *args)

        return call

    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), position))


HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    import triton  # noqa: F401  before a test of --device cpu can put it into its interpreter for all that follow
else:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from kdacli.interpreter import quicken

    quicken()
    require_masks()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test sees the same random numbers in each run, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def compiled_here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled functions of this run only; skips where the file's KERNEL cannot run."""
    from kda_kernels import registry  # after Triton knows whether it interprets

    if (reason := registry.get(request.module.KERNEL).unsupported()) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDA_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield
