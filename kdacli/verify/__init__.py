"""Checking kernels against the fp64 oracle: the cases, what runs them, and what judges need to know of layouts."""
