"""The command line of kda: compile, run, verify, profile and compare Kimi Delta Attention kernels."""

__version__ = "0.1.0"
