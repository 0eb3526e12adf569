import os
from collections import Counter

# scikit-learn skips its array API check without this; it is read when SciPy is first imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
# Before torch 2.10, deterministic algorithms on CUDA ask for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:300], y[:300]


@pytest.fixture
def deterministic():
    """On CUDA the same bits each time, as on the CPU."""
    # On the CPU, where kernels are so anyway, it would fill all memory that is allocated.
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def colour_images():
    """Images (n, 3, 12, 10), uint8, whose colour tells their class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    X = rng.integers(0, 100, (60, 3, 12, 10), dtype=np.uint8)
    X[np.arange(60), y] += 100
    return X, y


COUNTS = Counter()


@pytest.fixture(scope="session")
def counted():
    """Add to a count that the summary of the tests prints: ``counted("files fuzzed", 300)``."""

    def count(name, n=1):
        COUNTS[name] += n

    return count


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.write_line(
            "skdim reliability: " + ", ".join(f"{name} {n:,}" for name, n in sorted(COUNTS.items()))
        )
