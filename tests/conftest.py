"""What every test shares: the platform, run-time checks of all array annotations, and how Hypothesis searches."""

import collections
import gc
import importlib.metadata
import os
import pathlib
import time

# JAX reads this when it is imported, so it comes before anything that imports JAX; JAX_PLATFORMS from outside wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA on CPU: with as few as a small machine has cores, a simulated TPU of two cores and the warps of a
# simulated GPU wait for themselves.
os.environ.setdefault("NPROC", "8")

import hypothesis
import jax
import jaxtyping
import pytest
from devices import pytest_pyfunc_call, pytest_sessionfinish  # noqa: F401 (hooks of pytest, found by their names)
from jaxtyping import install_import_hook

# From here on every annotated shape and dtype is checked at each call. It only sees modules imported after it; this
# file is read before any test is.
install_import_hook(["moe_kernels", "limoe"], "beartype.beartype")

# The first call of a jitted function takes seconds, so no deadline. In CI the same examples every time: a failure there
# must come from the change. `--hypothesis-profile=long` looks further, by hand.
_common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", max_examples=30, **_common)
hypothesis.settings.register_profile("ci", max_examples=30, derandomize=True, database=None, **_common)
hypothesis.settings.register_profile("long", max_examples=1000, **_common)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def as_users_run_it():
    """The suite's import hook checks every annotation first; users do not have it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores: a quarter of the time a test waits, for a child process or a process that hangs."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Compile fast, except where the compilers of accelerators may be tried, which would be told too."""
    if "not aot" in config.option.markexpr:
        compile_fast()


def compile_fast() -> None:
    """Have XLA optimise nothing, here and in child processes: programs run for milliseconds in tests.

    With JAX 0.10 also emit fusions in the older of two ways; since 0.11, which CI tries too, there is no other way.
    """
    older = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11)
    flags = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * older
    os.environ.setdefault("XLA_FLAGS", flags)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one in the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Look for garbage in cycles less often, and never among what was imported: that took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


_started = pytest.StashKey[float]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """For the teardown."""
    item.stash[_started] = time.monotonic()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give back what was compiled before Linux refuses more memory maps (at 65,530, as a rule): XLA would crash.

    Not looked at after a test of a moment, which compiled hardly anything: to list the maps takes as long. A test that
    is skipped never started.
    """
    maps = pathlib.Path("/proc/self/maps")
    now = time.monotonic()
    if now - item.stash.get(_started, now) < 0.2:
        return
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A small training run that nothing disturbed, shared by all tests of the trainer."""
    from run_cases import ran

    return ran(tmp_path_factory.mktemp("finished") / "run", rendered=True)


@pytest.fixture(scope="session")
def expected(finished):
    """What that run ended with, for runs that must end with the same bits."""
    from run_cases import result

    return result(finished.folder)
