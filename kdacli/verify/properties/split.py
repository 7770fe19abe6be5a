"""Prefill split anywhere is prefill whole: the state that goes out is the one that comes in."""

import dataclasses
from collections.abc import Iterator

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import CHUNK
from kda_kernels.tensors import Inputs, Outputs
from kdacli.verify.checks.continuity import tokens_of
from kdacli.verify.checks.memory import own_memory
from kdacli.verify.properties.subject import NotApplicableError, Subject

REASON = "engines cut long prompts wherever a batch is full: the state between must be what the tokens before made it"


def check(subject: Subject) -> Iterator[str]:
    """Runs each sequence in two calls, cut near 2/5 of it, then at its last chunk's edge (or before its last token).

    The result must be as good as that of one call has to be. The state between is held in its own dtype, so only fp32
    states are asked this.
    """
    inputs = subject.inputs
    if inputs.cu_seqlens is None:
        raise NotApplicableError("sequences are cut in packed batches only")
    if inputs.state is not None and inputs.state.dtype is not torch.float32:
        raise NotApplicableError("a state of less than fp32 is rounded at each cut")
    if inputs.conv is not None and inputs.conv.states.dtype not in (torch.float32, inputs.q.dtype):
        raise NotApplicableError("the tokens that a convolution keeps are rounded at each cut")
    lens = torch.tensor(seq_lens(inputs, check_inputs(inputs, values=True)), device=inputs.q.device)
    edge = torch.where(lens > CHUNK, (lens - 1) // CHUNK * CHUNK, lens - 1)
    for where, cut in (("at 2/5 of it", lens * 2 // 5), ("at its last chunk's edge", edge.clamp(min=0))):
        for wrong in subject.wrong(in_two(subject, inputs, lens, cut)):
            yield f"each sequence cut {where}: {wrong}"


def in_two(subject: Subject, inputs: Inputs, lens: torch.Tensor, cut: torch.Tensor) -> Outputs:
    """The first `cut` tokens of each sequence in one call, the rest in a second that starts from its states."""
    ends = lens.cumsum(0)
    start = own_memory(inputs)
    o, state, conv = torch.full_like(inputs.v, torch.nan), start.state, start.conv
    for first, last in ((torch.zeros_like(cut), cut), (cut, lens)):
        spans = zip((ends - lens + first).tolist(), (ends - lens + last).tolist(), strict=True)
        rows = torch.cat([torch.arange(start, end) for start, end in spans]).to(lens.device)
        part = tokens_of(inputs, rows, last - first)
        outputs = subject.run(dataclasses.replace(part, state=state, output_final_state=True, conv=conv))
        o[:, rows], state = outputs.o, outputs.final_state
        if conv is not None and outputs.conv_states is not None:
            conv = dataclasses.replace(conv, states=outputs.conv_states)
    return Outputs(o, state, conv_states=None if conv is None else conv.states)
