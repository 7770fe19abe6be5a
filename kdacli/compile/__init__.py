"""Compiling Triton kernels ahead of time, for any architecture, with no GPU: what the compiler made of them."""
