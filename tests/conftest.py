"""Settings that must be in place before JAX or transformers are imported, and the figures that tests reach."""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch: matrices are so small that threads would wait for each other

# Compiling is most of the time of the quick tests, and what they compare does not depend on how hard LLVM tries: with
# these flags it takes a sixth. An XLA that does not know one of them ends each process with its name: drop it here.
QUICK_XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def pytest_configure(config):
    """What subprocesses and the workers of pytest-xdist take over from here.

    Quick tests compile quickly; with the slow ones, all compile as users' runs do. What takes long to compile is
    compiled once for all of them.
    """
    if config.option.markexpr == "not slow" and QUICK_XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{QUICK_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.mkdtemp(prefix="compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        config.add_cleanup(lambda: shutil.rmtree(compiled, ignore_errors=True))


# Begun first: what takes half a minute and more. Whatever worker is left with the last file then ends soon.
LONG_FILES = ("test_train", "test_several", "test_export", "test_family_parity", "test_invariance", "test_engine")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


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
