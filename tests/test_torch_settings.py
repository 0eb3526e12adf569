"""What a caller has set in torch for computations of his own has no say here."""

import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from skdim import DIMTransformer
from skdim.evaluation import (
    FineTunedClassifier,
    LinearProbe,
    MLPProbe,
    mutual_information_bound,
    reconstruction_ms_ssim,
    retrieval_scorer,
    total_correlation_bound,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
PARAMS = {"n_components": 4, "max_epochs": 3, "batch_size": 8, "mi_units": 8, "random_state": 0, "device": "cpu"}


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "default dtype": lambda: default_dtype(torch.float64),
    # No tensor there has values: it stands for another GPU.
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fit_and_what_comes_after_it_give_the_same_bits(setting, precision, tmp_path):
    usual = DIMTransformer(**PARAMS, precision=precision).fit(IMAGES)
    embeddings, blob = usual.transform(IMAGES), pickle.dumps(usual)
    usual.save(tmp_path / "dim.safetensors")
    with setting:
        unusual = DIMTransformer(**PARAMS, precision=precision).fit(IMAGES)
        found = [dim.transform(IMAGES) for dim in (unusual, usual, pickle.loads(blob))]
        loaded = DIMTransformer.load(tmp_path / "dim.safetensors", device="cpu")
        found.append(loaded.transform(IMAGES))
    assert unusual.loss_curve_ == usual.loss_curve_
    for Z in found:
        assert np.array_equal(Z, embeddings)
    with pytest.warns(UserWarning, match="new discriminators"):
        loaded.partial_fit(IMAGES)
    assert torch.get_default_dtype() == torch.float32


class Wrapped(torch.nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.linear = torch.nn.Linear(int(np.prod(image_shape)), n_components)

    def forward(self, images):
        return self.linear(images.flatten(1)), images


@pytest.mark.parametrize("params", [{"encoder": Wrapped}, {"prior": "normal", "prior_matching": "noise"}])
def test_transform_gives_the_same_bits_whatever_the_encoder(setting, params):
    dim = DIMTransformer(**(PARAMS | params)).fit(IMAGES)
    usual = dim.transform(IMAGES)
    with setting:
        assert np.array_equal(dim.transform(IMAGES), usual)


def test_evaluation_gives_the_same_figures(setting):
    X, y = IMAGES, np.arange(40) % 2
    dim = DIMTransformer(**PARAMS).fit(X)
    Z = dim.transform(X)

    def figures():
        probes = [LinearProbe(device="cpu", random_state=0), MLPProbe(max_epochs=2, device="cpu", random_state=0)]
        probes.append(FineTunedClassifier(dim, max_epochs=2, random_state=0))
        params = {"max_epochs": 2, "random_state": 0}
        return [
            probes[0].fit(Z, y).decision_function(Z).tolist(),
            probes[1].fit(Z, y).predict_proba(Z).tolist(),
            probes[2].fit(X, y).predict_proba(X).tolist(),
            mutual_information_bound(Z, Z, **params, device="cpu"),
            total_correlation_bound(Z, **params, device="cpu"),
            reconstruction_ms_ssim(dim, X, X, **params),
            retrieval_scorer(dim, X),
        ]

    expected = figures()
    with setting:
        assert figures() == expected


def test_the_callers_settings_stay_as_they_were():
    with default_dtype(torch.float64), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        DIMTransformer(**PARAMS).fit(IMAGES).transform(IMAGES)
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(1).device.type == "meta"
        assert torch.is_autocast_enabled("cpu")
