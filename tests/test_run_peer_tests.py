"""What stands in for peers' modules calls ours with the arguments in the right places."""

import importlib
import importlib.util
import sys

import torch
from decode_inputs import make, with_pool, with_state
from run_peer_tests import STAND_INS, main, stand_ins

from kda_kernels.problem import Gate, Options
from kda_kernels.reference.oracle import recurrence

OPTIONS = Options(Gate.SOFTPLUS)


def steps():
    return with_pool(make(N=3, H=2, HV=2, K=16, V=16, options=OPTIONS), [4, 1, 2])


def close(found, expected):
    return (found.double() - expected.o).norm() < 1e-2 * expected.o.norm()


def test_sglangs_names(monkeypatch):
    for name, module in stand_ins("sglang").items():
        monkeypatch.setitem(sys.modules, name, module)
    assert importlib.util.find_spec("sglang.srt") is not None, "others look whether it is installed"
    where = importlib.import_module("sglang.srt.layers.attention.fla.fused_recurrent")
    x = steps()
    expected = recurrence(x)
    mixed = torch.cat([t.flatten(1) for t in (x.q, x.k, x.v)], 1)
    found = where.fused_recurrent_kda_packed_decode(
        mixed, x.g.flatten(1), x.beta.flatten(1), x.A_log, x.dt_bias, None, x.state, torch.empty_like(x.v),
        x.state_indices, True,
    )  # fmt: skip
    assert close(found, expected)


def test_culas_names():
    update = STAND_INS["cula"]["cula.kda"]["fused_sigmoid_gating_delta_rule_update"]
    for layout in ("vk", "kv"):
        x = steps()
        expected = recurrence(x)
        state = x.state if layout == "vk" else x.state.mT.contiguous()
        found = update(
            x.A_log, x.g.flatten(2), x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.beta, state, x.state_indices,
            state_layout=layout,
        )  # fmt: skip
        assert close(found, expected)


def test_flashkdas_names():
    x = with_state(make(lens=[70], H=2, HV=2, K=16, V=16, options=Options(Gate.SAFE, -5.0)))
    expected, out = recurrence(x), torch.empty_like(x.v)
    final = torch.empty_like(x.state)
    STAND_INS["flashkda"]["flash_kda"]["fwd"](
        x.q, x.k, x.v, x.g, x.beta, None, out, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=-5.0,
        initial_state=x.state, final_state=final, cu_seqlens=x.cu_seqlens,
    )  # fmt: skip
    assert close(out, expected)
    assert (final.double() - expected.final_state).norm() < 1e-2 * expected.final_state.norm()


def test_wrong_use(capsys):
    assert main([]) == main(["triton", "file.py"]) == 2
    assert main(["cula", "no/such/file.py"]) == 2
    assert capsys.readouterr().err == "Error: no/such/file.py: no such file\n"
