"""One packed batch over the ranks of a `torch.distributed` group: exact context-parallel prefill."""

from kda_kernels.parallel.context import ContextParallel, convolution_halo, even_cuts

__all__ = ["ContextParallel", "convolution_halo", "even_cuts"]
