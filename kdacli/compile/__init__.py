"""Compiling kernels ahead of time, for any architecture, with no GPU: what the compilers made of them."""
