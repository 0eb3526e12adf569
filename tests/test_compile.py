import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from skdim import DIMTransformer
from skdim.model import InfoMaxModel

# Batches of 8, one image of which is drawn twice.
IMAGES = np.random.default_rng(0).integers(0, 256, (31, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def front_end(monkeypatch):
    """The compiler's front end alone, which finds and counts graphs, without code generation."""
    compile_model = InfoMaxModel.compile
    monkeypatch.setattr(InfoMaxModel, "compile", lambda self: compile_model(self, backend="eager"))
    torch._dynamo.reset()
    counters.clear()


def fit(**params):
    params = {"n_components": 4, "max_epochs": 2, "batch_size": 8, "mi_units": 8, "precision": "float32"} | params
    return DIMTransformer(**params, random_state=0).fit(IMAGES)


@pytest.mark.usefixtures("front_end")
def test_one_compilation_serves_all_batches():
    fit(compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
