"""The rewriting of FLA's test file, on a small file of the same kind."""

import pytest
from run_fla_tests import rewrite

FOREIGN_TESTS = """
import pytest
from fla.ops.kda import chunk_kda, naive_recurrent_kda
from fla.ops.kda.gate import naive_kda_gate

def helper(x):
    return chunk_kda(x)

def test_forward_and_backward(flag):
    x = make().requires_grad_()
    ref = naive_recurrent_kda(x)
    ref.sum().backward()
    ref_dx, x.grad = x.grad, None
    tri = helper(x)
    if flag:
        tri.sum().backward()
        scaled = ref_dx * 2
    assert_close("o", ref, tri)
    assert_close("dx", scaled, x.grad)
    if flag:
        assert_close("dx", ref_dx, scaled)
    else:
        assert_close("again", ref, tri)
    ref_dx = 1
    assert ref_dx

def test_of_theirs():
    naive_kda_gate()
"""


def test_rewriting_of_foreign_tests():
    source, dropped = rewrite(FOREIGN_TESTS)
    lines = [line.strip() for line in source.splitlines()]
    assert "from kda_kernels.api import chunk_kda" in lines
    assert "from fla.ops.kda import naive_recurrent_kda" in lines
    assert "from fla.ops.kda.gate import naive_kda_gate" in lines
    kept = lines[lines.index("def test_forward_and_backward(flag):") + 1 :]
    assert kept == [
        "x = make().requires_grad_()",
        "ref = naive_recurrent_kda(x)",
        "tri = helper(x)",
        "assert_close('o', ref, tri)",
        "if flag:",
        "pass",
        "else:",
        "assert_close('again', ref, tri)",
        "ref_dx = 1",
        "assert ref_dx",
    ]
    assert [what.split(": ", 1)[1] for what in dropped] == [
        "test_forward_and_backward: ref.sum().backward()",
        "test_forward_and_backward: ref_dx, x.grad = (x.grad, None)",
        "test_forward_and_backward: tri.sum().backward()",
        "test_forward_and_backward: scaled = ref_dx * 2",
        "test_forward_and_backward: assert_close('dx', scaled, x.grad)",
        "test_forward_and_backward: assert_close('dx', ref_dx, scaled)",
        "test_of_theirs: calls none of our functions",
    ]


def test_rewriting_refuses_files_without_our_functions():
    with pytest.raises(ValueError, match="imports none of"):
        rewrite("from fla.ops.gla import chunk_gla\ndef test(): chunk_gla()")
    with pytest.raises(ValueError, match="holds no test"):
        rewrite("from fla.ops.kda import chunk_kda\ndef helper(): chunk_kda()")
