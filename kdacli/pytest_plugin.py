"""The pytest plugin: another project runs a suite of `kda verify` on its kernel, one test a case.

    @pytest.mark.kda("mykernel.py:prefill", suite="quick", op="prefill")
    def test_my_prefill(kda_check):
        kda_check()

The marker takes what --kernel takes, and optionally suite ("quick"), op, cases (names, instead of a suite), seed (0),
device ("auto") and shrink (seconds for the smallest case of a failure, 2). A refusal is a skipped test with its reason.
Where no test asks for `kda_check`, nothing of kda is imported.
"""

from collections.abc import Callable
from typing import Any

import pytest

_DEFAULTS = {"suite": "quick", "op": None, "cases": (), "seed": 0, "device": "auto", "shrink": 2.0}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kda(kernel, suite='quick', ...): runs cases of kda verify; see kda_check")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the suite."""
    if "kda_check" not in metafunc.fixturenames:
        return
    kernel, chosen = _read(metafunc.definition.get_closest_marker("kda"))
    from kda_kernels.errors import KdaError
    from kdacli.device import pick_device
    from kdacli.verify.selection import get_kernel, select_table

    try:
        device = pick_device(chosen["device"])
        found = get_kernel(kernel, chosen["op"])
        cases = [case for case, _ in select_table(chosen["cases"], [found], device, chosen["suite"])]
    except KdaError as error:
        raise pytest.UsageError(f"kda: {error}") from error
    params = [(found, case, device, chosen) for case in cases]
    metafunc.parametrize("kda_check", params, indirect=True, ids=[case.name for case in cases])


@pytest.fixture
def kda_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Checks one case, and fails or skips the test that calls it."""
    kernel, case, device, chosen = request.param

    def check() -> None:
        __tracebackhide__ = True
        from kdacli.verify import report, runner, verdict

        bench = runner.Bench.of_case(case, chosen["seed"], device)
        result = runner.check(kernel, bench)
        if result.status == "refused":
            pytest.skip(f"{kernel.name}: {result.notes[0]}")
        if result.ok:
            return
        found = verdict.explain_case(kernel, case, result, chosen["seed"], device, chosen["shrink"])
        lines = [f"{kernel.name} failed {case.name}: {case.why}", *report.failure_lines(result, found)]
        again = verdict.command_for(found.smallest or case.name, kernel.name, chosen["seed"], device)
        pytest.fail("\n".join([*lines, f"again: {again}"]), pytrace=False)

    return check


def _read(marker: pytest.Mark | None) -> tuple[str, dict[str, Any]]:
    """The kernel and the options of a marker."""
    if marker is None or len(marker.args) > 1 or not (marker.args or "kernel" in marker.kwargs):
        raise pytest.UsageError('kda_check needs its marker with a kernel: @pytest.mark.kda("mine.py:prefill")')
    options = dict(marker.kwargs)
    kernel = marker.args[0] if marker.args else options.pop("kernel")
    if unknown := options.keys() - _DEFAULTS.keys():
        raise pytest.UsageError(
            f"the marker kda knows no {', '.join(sorted(unknown))}: there are {', '.join(_DEFAULTS)}"
        )
    return kernel, _DEFAULTS | options
