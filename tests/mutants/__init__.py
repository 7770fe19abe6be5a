"""Deliberately wrong kernels, each one way this operation goes wrong, to show that `kda verify` has teeth.

`victim.py` is a correct kernel in steps, `decode.py`, `prefill.py` and `gate.py` spoil one step each, `score.py` counts
which of them a suite kills. `python -m tests.mutants --suite quick` prints the score.
"""
