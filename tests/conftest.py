"""Where there is no CUDA GPU: Triton's interpreter for the kernels, and a counted skip for the tests marked gpu."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    import triton  # noqa: F401  before a test of --device cpu can put it into its interpreter for all that follow
else:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from kdacli.interpreter import quicken

    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
