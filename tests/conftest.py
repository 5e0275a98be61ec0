"""Settings that must be in place before JAX or transformers are imported, and the figures that tests reach."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory):
    """What is fetched, unpacked or tokenized in tests goes into a directory of theirs, subprocesses included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def record_figure(request):
    """`record_figure(name, value)`: a number this test reached; shown by `pytest -v` and kept in a junit report."""
    return lambda name, value: request.node.user_properties.append((name, float(value)))


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.verbose >= 0:  # -q is among the default options, so -v makes it 0
        for report in terminalreporter.stats.get("passed", []):
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{report.nodeid}: {name} {value:.2e}")
