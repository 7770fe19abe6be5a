"""What is timed: cases from flags and suites, and the kernels for them."""
