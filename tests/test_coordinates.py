import math

import numpy as np
import pytest
import torch

from skdim.coordinates import CoordinatePredictor


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def predictor(feature_shape=(3, 4, 5), seed=0):
    torch.manual_seed(seed)
    return CoordinatePredictor(feature_shape, 2, 6).double()


def batch(feature_shape=(3, 4, 5), n_images=3):
    rng = np.random.default_rng(0)
    return torch.tensor(rng.standard_normal((n_images, *feature_shape))), torch.tensor(
        rng.standard_normal((n_images, 2))
    )


def test_the_hidden_layers_equal_those_on_concatenations():
    model = predictor()
    features, embedding = batch()
    partner = torch.randperm(20, generator=seeded())
    place, offset = model(features, embedding, partner)
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    flat = features.flatten(2).numpy()
    place_weight = np.hstack([weights["place_features.weight"], weights["place_embedding.weight"]])
    offset_weight = np.hstack([weights[f"offset_{part}.weight"] for part in ("features", "partner", "embedding")])
    for n in range(3):
        y = embedding[n].numpy()
        for location, other in enumerate(partner.tolist()):
            hidden = np.maximum(
                0, place_weight @ np.concatenate([flat[n, :, location], y]) + weights["place_features.bias"]
            )
            expected = weights["place.weight"] @ hidden + weights["place.bias"]
            np.testing.assert_allclose(place[n, location].detach(), expected, rtol=1e-9)
            pair = np.concatenate([flat[n, :, location], flat[n, :, other], y])
            hidden = np.maximum(0, offset_weight @ pair + weights["offset_features.bias"])
            expected = weights["offset.weight"] @ hidden + weights["offset.bias"]
            np.testing.assert_allclose(offset[n, location].detach(), expected, rtol=1e-9)


def cross_entropy(logits, target):
    return math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]


@pytest.mark.parametrize("feature_shape", [(3, 4, 5), (3, 1, 6), (3, 2, 1)])
def test_loss_is_the_mean_of_four_cross_entropies(feature_shape):
    model = predictor(feature_shape)
    features, embedding = batch(feature_shape)
    _, height, width = feature_shape
    partner = torch.randperm(height * width, generator=seeded(3))
    loss = model.loss(features, embedding, partner)
    place, offset = (output.detach().numpy() for output in model(features, embedding, partner))
    losses = []
    for n in range(3):
        for location, other in enumerate(partner.tolist()):
            (row, column), (to_row, to_column) = divmod(location, width), divmod(other, width)
            losses += [
                cross_entropy(place[n, location, :height], row),
                cross_entropy(place[n, location, height:], column),
                cross_entropy(offset[n, location, : 2 * height - 1], to_row - row + height - 1),
                cross_entropy(offset[n, location, 2 * height - 1 :], to_column - column + width - 1),
            ]
    # The losses of trained models are float32.
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_pairs_change_from_batch_to_batch():
    model, generator = predictor(), seeded()
    losses = {model.loss(*batch(), torch.randperm(20, generator=generator)).item() for _ in range(5)}
    assert len(losses) == 5


def test_features_that_say_where_they_are_are_learned():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    features = torch.stack([rows, columns]).expand(16, -1, -1, -1)
    embedding = torch.randn(16, 2, generator=seeded())
    model = CoordinatePredictor((2, 4, 5), 2, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = seeded()
    losses = []
    for _ in range(200):
        loss = model.loss(features, embedding, torch.randperm(20, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    chance = np.mean([math.log(4), math.log(5), math.log(7), math.log(9)])
    assert losses[0] == pytest.approx(chance, abs=0.5)
    assert losses[-1] < 0.3


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    torch.manual_seed(0)
    model = CoordinatePredictor((3, 4, 5), 2, 6)
    features, embedding, partner = torch.randn(3, 3, 4, 5), torch.randn(3, 2), torch.randperm(20)
    exact = model.loss(features, embedding, partner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(features, embedding, partner)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
