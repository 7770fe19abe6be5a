"""Compares kernels with a dump (kernels.py), and dumps with each other (pair.py); both against the oracle.

`kdacli.judge` computes the truth in pieces and judges; difference.py adds up how far two results are apart, and
difference_map.py and plot.py draw it.
"""

from kdacli.comparison.kernels import (
    DUMP,
    Comparison,
    NotRun,
    Plan,
    Row,
    compare,
    plan,
    seconds_on_cpu,
    steps,
)

__all__ = ["DUMP", "Comparison", "NotRun", "Plan", "Row", "compare", "plan", "seconds_on_cpu", "steps"]
