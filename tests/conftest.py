"""What all tests share: a clean sys.path, a fixed seed, one thread, no CUDA tests without CUDA."""

import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - Inductor imports it, which fails after the standard distutils
from hypothesis import settings

# With the repository root on sys.path, kernels/ is found as top-level `kernels` and transformers
# takes it for the library of that name.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]

# Every graph that a test compiles is checked against its law, in child processes too.
os.environ["FXZERO_SPEC"] = "1"

# A calibration of this machine must not change what the tests see.
os.environ["FXZERO_CACHE"] = str(_ROOT / "tests" / "no-cache")

# Same examples on every run; test machines are too uneven for a deadline per example.
settings.register_profile("fxzero", deadline=None, derandomize=True)
settings.load_profile("fxzero")


# Triton reads it when it is imported: one process cannot serve both kinds of tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreter" in item.path.parts:
            item.add_marker("interpreter")


def pytest_collection_finish() -> None:
    """What was imported is no garbage: it need not be gone through after every trace."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    interpreted = item.get_closest_marker("interpreter") is not None
    if interpreted and not _INTERPRETED:
        pytest.skip("runs kernels in Triton's interpreter: make test-kernels")
    if _INTERPRETED and not interpreted:
        pytest.skip("kernels are interpreted here: run it without TRITON_INTERPRET")
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def pools():
    """Processes that train together, by their number: 1, 2 and 4."""
    from pool import Pool

    made = {world: Pool(world) for world in (1, 2, 4)}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture(autouse=True)
def _deterministic_torch() -> None:
    """Seed torch and keep it on one thread."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def remembering_solvers() -> object:
    """Makes solvers that remember equal problems: one search for the smallest peak serves all."""
    from fxzero.solver.search import Solver

    return functools.lru_cache(maxsize=8)(Solver)


@pytest.fixture
def shared_solvers(monkeypatch: pytest.MonkeyPatch, remembering_solvers: object) -> None:
    """Plans of equal problems share a solver, for tests that plan one model at many budgets."""
    monkeypatch.setattr("fxzero.graph_planner.Solver", remembering_solvers)
