"""The pytest plugin: another project runs a suite of `kda verify` on its kernel, one test a case.

    @pytest.mark.kda("mykernel.py:prefill", suite="quick", op="prefill")
    def test_my_prefill(kda_check):
        kda_check()

The marker takes what --kernel takes, and optionally suite ("quick"), op, cases (names, instead of a suite), seed (0),
device ("auto"), shrink (seconds for the smallest case of a failure, 2) and limit (seconds that a check may take, 300).
A refusal is a skipped test with its reason.

Kernels are imported and checked in a process apart: the run of the tests keeps its own Triton, interpreted or not, and
outlives a crash. Where no test asks for `kda_check`, neither torch nor Triton is imported.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kdacli.verify.processes.isolated import IsolatedChecker

_DEFAULTS = {"suite": "quick", "op": None, "cases": (), "seed": 0, "device": "auto", "shrink": 2.0, "limit": 300.0}
_CHECKERS = pytest.StashKey[dict[tuple[str, int, float], "IsolatedChecker"]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kda(kernel, suite='quick', ...): runs cases of kda verify; see kda_check")
    config.stash[_CHECKERS] = {}


def pytest_unconfigure(config: pytest.Config) -> None:
    for checker in config.stash.get(_CHECKERS, {}).values():
        checker.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the suite."""
    if "kda_check" not in metafunc.fixturenames:
        return
    kernel, chosen = _read(metafunc.definition.get_closest_marker("kda"))
    from kda_kernels.errors import KdaError
    from kdacli import environment
    from kdacli.device import choose_device
    from kdacli.verify.processes.isolated import IsolatedChecker, NoStartError

    checkers = metafunc.config.stash[_CHECKERS]
    try:
        environment.check()
        key = choose_device(chosen["device"]), chosen["seed"], chosen["limit"]
        if key not in checkers:
            checkers[key] = IsolatedChecker(*key)
        found, cases = checkers[key].select(kernel, chosen["op"], chosen["cases"], chosen["suite"])
    except (KdaError, NoStartError) as error:
        raise pytest.UsageError(f"kda: {error}") from error
    params = [(checkers[key], found, case, chosen) for case in cases]
    metafunc.parametrize("kda_check", params, indirect=True, ids=[case.name for case in cases])


@pytest.fixture
def kda_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Checks one case, and fails or skips the test that calls it."""
    checker, kernel, case, chosen = request.param

    def check() -> None:
        __tracebackhide__ = True
        from kdacli.verify.failures import explanation
        from kdacli.verify.reports import tables

        (result,) = checker.check_case(case, [kernel])
        if result.status == "refused":
            pytest.skip(f"{kernel.name}: {result.notes[0]}")
        if result.ok:
            return
        found, _ = checker.explain(kernel, case, result, chosen["shrink"], None, False)
        lines = [f"{kernel.name} failed {case.name}: {case.why}", *tables.failure_lines(result, found)]
        again = explanation.command_for(found.smallest or case.name, kernel.name, chosen["seed"], checker.device)
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
