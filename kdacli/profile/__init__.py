"""`kda profile`: how long kernels take on a GPU, and how near that is to what its memory allows."""
