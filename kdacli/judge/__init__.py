"""Is a result good enough? `verdicts` has the rule, for all outputs of a call, and `tensor`, for one of them;
`reference` is what they go by, in pieces, and `layout` says where these lie.
"""

from kdacli.judge.reference import Reference, expect
from kdacli.judge.tensor import Verdict, said
from kdacli.judge.verdicts import CallJudge, judge

__all__ = ["CallJudge", "Reference", "Verdict", "expect", "judge", "said"]
