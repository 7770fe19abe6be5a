"""Is a result good enough? `verdicts` has the rule, `baseline` what it goes by, `blocks` the parts it looks at, and
`digits` what no bound sees.
"""

from kdacli.judge.verdicts import (
    ELEMENT_FACTOR,
    FACTOR,
    FLOOR,
    SMALLEST,
    UNIT_ROUNDOFF,
    Verdict,
    judge,
    said,
    state_dtype,
)

__all__ = ["ELEMENT_FACTOR", "FACTOR", "FLOOR", "SMALLEST", "UNIT_ROUNDOFF", "Verdict", "judge", "said", "state_dtype"]
