"""Other dtypes, same numbers: gates, betas and parameters widened to fp32, on shapes that were just run without."""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.problem import Problem
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "a compiled kernel kept by shape alone reads fp32 parameters as the bf16 it was built for: silent NaN"


def asked(problem: Problem) -> Problem:
    """The same with all that is widened as fp32."""
    return dataclasses.replace(problem, g_dtype="float32", beta_dtype="float32", param_dtype="float32")


def check(subject: Subject) -> Iterator[str]:
    """Widening changes no number, so the bounds of the case hold."""
    names = [n for n in ("g", "beta", "A_log", "dt_bias") if n in subject.inputs.tensors()]
    narrow = [n for n in names if getattr(subject.inputs, n).dtype is not torch.float32]
    if not narrow:
        raise NotApplicableError("all of g, beta, A_log and dt_bias are fp32 already")
    wide = {n: getattr(subject.inputs, n).float() for n in narrow}
    subject.require(asked(subject.problem))
    for wrong in subject.wrong(subject.run(dataclasses.replace(subject.inputs, **wide))):
        yield f"{', '.join(narrow)} as fp32, after the same shapes in less: {wrong}"
