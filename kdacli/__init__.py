"""The command line of kda: compile, run, verify, profile and compare Kimi Delta Attention kernels."""

__version__ = "0.1.0"

from kdacli import peers  # noqa: F401  commands find the peers in the registry
