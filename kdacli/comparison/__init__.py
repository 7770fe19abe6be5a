"""Compares kernels with a dump (kernels.py), and dumps with each other (pair.py); both against the oracle.

layout.py and walk.py read tensors and compute the truth in pieces, judging.py and difference.py add up what they find,
and heat.py and plot.py draw it.
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
