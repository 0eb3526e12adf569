import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from skdim import DIMTransformer
from skdim.model import MAX_PAIR_ELEMENTS, InfoMaxModel

# What the compiler warns of is its own affair: what it imports, TF32, gradients of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore")

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
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"global_weight": 0.5, "negatives": ("batch", "roll", "shuffle")},
        {"discriminator": "concat", "negatives": "shuffle", "mi_estimator": "jsd", "multiple_globals": True},
        {"prior_matching": "noise", "coordinate_weight": 1.0},
        {"local_samples": 3, "augmentation": "standard", "negatives": "shuffle"},
        {"occlusion": True, "encoder": "resnet_folded", "max_epochs": 1},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_two_graphs_without_breaks_serve_all_batches_and_draw_as_eager_training_does(params):
    compiled = fit(**params, compile=True)
    assert counters["stats"]["unique_graphs"] == 2  # the encoder's, and that of the terms
    assert not counters["graph_break"]
    assert compiled.loss_curve_ == fit(**params).loss_curve_


@pytest.mark.usefixtures("front_end")
def test_scores_in_chunks_compile_too(monkeypatch):
    monkeypatch.setitem(MAX_PAIR_ELEMENTS, "cpu", 64)
    assert fit(compile=True).loss_curve_ == fit().loss_curve_
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_generated_code_trains_to_the_same_losses(device):
    params = {"device": device, "prior_matching": "noise", "coordinate_weight": 1.0, "local_samples": 3}
    params |= {"augmentation": "standard", "negatives": ("batch", "shuffle")}
    compiled = fit(**params, compile=True)
    np.testing.assert_allclose(compiled.loss_curve_, fit(**params).loss_curve_, rtol=1e-3)
    copied = copy.deepcopy(compiled)
    assert np.array_equal(copied.transform(IMAGES), compiled.transform(IMAGES))
