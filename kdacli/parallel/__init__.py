"""`--cp`: checks and times of prefills over the ranks of a process group, started by torchrun."""
