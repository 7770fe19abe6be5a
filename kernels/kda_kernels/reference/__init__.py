"""Plain implementations: the fp64 oracle that every kernel is judged against, and slow kernels that run anywhere."""
