"""Results as JUnit XML, which every CI system shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kda_kernels.errors import InputError, UnavailableError
from kdacli.verify.checks.check import Result
from kdacli.verify.failures.explanation import wrong_lines


def require() -> None:
    """Raises `UnavailableError` where the library that writes JUnit files is missing: call it before the work."""
    try:
        import junitparser  # noqa: F401
    except ImportError:
        raise UnavailableError("--junit needs junitparser: pip install junitparser") from None


def write(path: str, results: Sequence[Result], details: Mapping[tuple[str, str], str], complete: bool) -> None:
    """A test suite for each kernel, a test for each case; a refusal is a skipped test.

    Args:
        details: by (case, kernel): what is printed of a failure.
        complete: whether the run came to its end, which each suite has as a property.

    Raises:
        InputError: the file cannot be written.
    """
    import junitparser

    xml = junitparser.JUnitXml("kda verify")
    for kernel in dict.fromkeys(result.kernel for result in results):
        suite = junitparser.TestSuite(kernel)
        suite.add_property("complete", str(complete).lower())
        for result in results:
            if result.kernel == kernel:
                suite.add_testcase(_testcase(result, details.get((result.case, result.kernel), "")))
        xml.add_testsuite(suite)
    xml.update_statistics()
    try:
        xml.write(str(Path(path)), pretty=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _testcase(result: Result, detail: str):
    import junitparser

    test = junitparser.TestCase(result.case, classname=result.kernel, time=result.seconds)
    kinds = {"fail": junitparser.Failure, "error": junitparser.Error, "refused": junitparser.Skipped}
    if result.status in kinds:
        lines = wrong_lines(result) or [*result.notes]
        entry = kinds[result.status](lines[0])
        entry.text = detail or "\n".join(lines)
        test.result = [entry]
    return test
