import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import skdim.model
from skdim.coordinates import CoordinatePredictor
from skdim.discriminators import (
    Critic,
    GlobalConcatCritic,
    GlobalDotCritic,
    LocalConcatCritic,
    LocalDotCritic,
    PriorDiscriminator,
    PriorNoise,
)
from skdim.encoders import DCGANEncoder
from skdim.model import InfoMaxModel, _take_locations, build_model, contrast, draw_others
from skdim.objectives import OBJECTIVES, Objective

CRITICS = {
    "local-dot": LocalDotCritic,
    "local-concat": LocalConcatCritic,
    "global-dot": GlobalDotCritic,
    "global-concat": GlobalConcatCritic,
}
NEGATIVES = ["batch", "roll", "shuffle"]
FEATURE_SHAPE, N_COMPONENTS, N_UNITS = (3, 3, 2), 4, 5


def contrast_images(critic, objective, features, embedding, negatives, generator):
    maps, vectors = critic.encode(features, embedding)
    return contrast(critic, objective, maps, vectors[:, None], draw_others(negatives, len(maps), generator))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class PairCritic(Critic):
    """Scores a pair by the identity of image, location and embedding alone."""

    is_local = True
    pairs_cost_units = False

    def encode(self, features, embedding):
        return features.flatten(2).transpose(1, 2), embedding

    def pair(self, maps, vectors):
        raise NotImplementedError

    def score(self, maps, vectors):
        return self.pair(maps[:, None, :, 0], vectors)

    def score_all(self, maps, vectors):
        return self.pair(maps[None, ..., 0], vectors[:, None])


class CodeCritic(PairCritic):
    def pair(self, maps, vectors):
        return 1000 * vectors + maps


class OwnImageCritic(PairCritic):
    def pair(self, maps, vectors):
        return torch.where((maps // 10).long() == vectors.long(), 1e4, 0.0)


def identities(n_images, n_locations):
    """Features that say 10 * image + location and embeddings that say image."""
    images = torch.arange(n_images, dtype=torch.float32)
    locations = torch.arange(n_locations, dtype=torch.float32)
    return (10 * images[:, None] + locations)[:, None, None, :], images[:, None]


def drawn_pairs(n_images, n_locations, negatives, generator):
    """(embedding, image, location) of each positive and of each negative, row by row."""
    seen = {"positive": [], "negative": [], "count": []}

    def reduce(scores, count):
        seen["negative"] += scores.tolist()
        seen["count"] += [count] * len(scores)
        return scores[:, 0]

    def loss(scores, reduced):
        seen["positive"] += scores.tolist()
        return scores.sum()

    contrast_images(CodeCritic(), Objective(reduce, loss), *identities(n_images, n_locations), negatives, generator)

    def decode(rows):
        codes = [[int(code) for code in row if code != -math.inf] for row in rows]
        return [[(code // 1000, code % 1000 // 10, code % 10) for code in row] for row in codes]

    positive, negative = decode(seen["positive"]), decode(seen["negative"])
    assert seen["count"] == [len(row) for row in negative]
    return positive, negative


def drawn_permutation(n_images, generator):
    """Image whose locations are the negatives of each embedding."""
    _, negative = drawn_pairs(n_images, 1, "shuffle", generator)
    return [image for ((_, image, _),) in negative]


def images_of_negatives(n_images, negatives, seed=0):
    if negatives == "batch":
        return [[j for j in range(n_images) if j != i] for i in range(n_images)]
    if negatives == "roll":
        return [[(i + 1) % n_images] for i in range(n_images)]
    return [[j] for j in drawn_permutation(n_images, seeded(seed))]


def score_of_pair(critic, location, vector):
    if isinstance(critic, LocalDotCritic | GlobalDotCritic):
        return (location * vector).sum() / math.sqrt(len(vector))
    _, second, _, third = critic.tail
    hidden = torch.relu(location + vector)
    hidden = torch.relu(second.weight @ hidden + second.bias)
    return third.weight[0] @ hidden + third.bias[0]


F_GAN = {
    "kl": (lambda t: t, lambda t: torch.exp(t - 1)),
    "rkl": (lambda t: -torch.exp(-t), lambda t: t - 1),
    "hellinger": (lambda t: 1 - torch.exp(-t), lambda t: torch.exp(t) - 1),
    "chi2": (lambda t: t, lambda t: t * t / 4 + t),
}


def loss_by_loops(critic, objective, features, embedding, others):
    maps, vectors = critic.encode(features, embedding)
    n_images, n_locations, _ = maps.shape
    positive = [
        [score_of_pair(critic, maps[i, location], vectors[i]) for location in range(n_locations)]
        for i in range(n_images)
    ]
    negative = [
        [score_of_pair(critic, maps[j, location], vectors[i]) for j in others[i] for location in range(n_locations)]
        for i in range(n_images)
    ]
    all_positive = [score for row in positive for score in row]
    all_negative = [score for row in negative for score in row]
    if objective == "jsd":
        return sum(torch.log(1 + torch.exp(-score)) for score in all_positive) / len(all_positive) + sum(
            torch.log(1 + torch.exp(score)) for score in all_negative
        ) / len(all_negative)
    if objective == "dv":
        mean_exp = sum(torch.exp(score) for score in all_negative) / len(all_negative)
        return torch.log(mean_exp) - sum(all_positive) / len(all_positive)
    if objective in F_GAN:
        positive_term, negative_term = F_GAN[objective]
        gain = sum(map(positive_term, all_positive)) / len(all_positive)
        return sum(map(negative_term, all_negative)) / len(all_negative) - gain
    assert objective == "infonce"
    terms = []
    for own, row in zip(positive, negative, strict=True):
        sum_exp = sum(torch.exp(score) for score in row)
        terms += [-torch.log(torch.exp(score) / (torch.exp(score) + sum_exp)) for score in own]
    return sum(terms) / len(terms)


def make_batch(critic_name, n_images, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    critic = CRITICS[critic_name](FEATURE_SHAPE, N_COMPONENTS, N_UNITS).to(dtype)
    rng = np.random.default_rng(seed)
    features = torch.tensor(rng.standard_normal((n_images, *FEATURE_SHAPE)), dtype=dtype, requires_grad=True)
    embedding = torch.tensor(rng.standard_normal((n_images, N_COMPONENTS)), dtype=dtype, requires_grad=True)
    return critic, features, embedding


def gradients(loss, critic, features, embedding):
    return torch.autograd.grad(loss.double(), [features, embedding, *critic.parameters()])


@pytest.mark.parametrize("n_images", [2, 4])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("critic_name", CRITICS)
def test_contrast_equals_loops_over_images_and_pairs(critic_name, objective, negatives, n_images):
    critic, features, embedding = make_batch(critic_name, n_images)
    loss = contrast_images(critic, OBJECTIVES[objective], features, embedding, negatives, seeded())[0]
    expected = loss_by_loops(critic, objective, features, embedding, images_of_negatives(n_images, negatives))
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    values = gradients(loss, critic, features, embedding)
    for value, wanted in zip(values, gradients(expected, critic, features, embedding), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)


# Which pairs are negatives


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("n_images", range(2, 10))
def test_each_embedding_keeps_its_row_and_meets_whole_images(n_images, negatives):
    n_locations = 3
    positive, negative = drawn_pairs(n_images, n_locations, negatives, seeded())
    others = images_of_negatives(n_images, negatives)
    for i in range(n_images):
        assert positive[i] == [(i, i, location) for location in range(n_locations)]
        assert sorted(negative[i]) == [(i, j, location) for j in others[i] for location in range(n_locations)]


@pytest.mark.parametrize("n_images", range(2, 10))
def test_shuffle_draws_permutations_without_fixed_points(n_images):
    generator = seeded()
    draws = [drawn_permutation(n_images, generator) for _ in range(60)]
    for permutation in draws:
        assert sorted(permutation) == list(range(n_images))
        assert all(image != i for i, image in enumerate(permutation))
    assert n_images == 2 or len({tuple(permutation) for permutation in draws}) > 1


def test_shuffle_is_equally_likely_to_draw_each_other_image():
    generator, n_images, n_draws = seeded(), 5, 1000
    counts = np.zeros((n_images, n_images))
    for _ in range(n_draws):
        counts[range(n_images), drawn_permutation(n_images, generator)] += 1
    expected = (1 - np.eye(n_images)) * n_draws / (n_images - 1)
    # Five standard deviations of a binomial count.
    assert np.abs(counts - expected).max() < 5 * math.sqrt(n_draws * 0.25 * 0.75)


def test_shuffle_is_fixed_by_the_generator():
    assert drawn_permutation(9, seeded(3)) == drawn_permutation(9, seeded(3))
    assert len({tuple(drawn_permutation(9, seeded(seed))) for seed in range(5)}) > 1


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("n_images", [2, 3, 6])
def test_own_image_never_stands_among_the_negatives(n_images, negatives, limit, monkeypatch):
    if limit is not None:
        monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", limit)
    # Positives score 1e4 and negatives 0; a single own score among the negatives would show in each loss.
    expected = {"infonce": 0.0, "jsd": math.log(2), "dv": -1e4}
    for seed in range(5):
        for name, value in expected.items():
            loss = contrast_images(
                OwnImageCritic(), OBJECTIVES[name], *identities(n_images, 4), negatives, seeded(seed)
            )[0]
            assert loss.item() == pytest.approx(value, abs=1e-6)


# Chunks


@pytest.mark.parametrize("limit", [1, 10, 100, 300])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("critic_name", CRITICS)
def test_chunks_change_neither_loss_nor_gradients(critic_name, objective, limit, monkeypatch):
    critic, features, embedding = make_batch(critic_name, n_images=5)
    whole = contrast_images(critic, OBJECTIVES[objective], features, embedding, "batch", seeded())[0]
    whole_gradients = gradients(whole, critic, features, embedding)
    monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", limit)
    chunked = contrast_images(critic, OBJECTIVES[objective], features, embedding, "batch", seeded())[0]
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    chunked_gradients = gradients(chunked, critic, features, embedding)
    for value, expected in zip(chunked_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("critic_name", CRITICS)
def test_chunks_work_without_gradients(critic_name, monkeypatch):
    critic, features, embedding = make_batch(critic_name, n_images=5, dtype=torch.float32)
    with torch.no_grad():
        whole = contrast_images(critic, OBJECTIVES["infonce"], features, embedding, "batch", seeded())[0]
        monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", 1)
        chunked = contrast_images(critic, OBJECTIVES["infonce"], features, embedding, "batch", seeded())[0]
    torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize(("critic_name", "numbers_a_pair"), [("local-dot", 1), ("local-concat", N_UNITS)])
def test_chunks_are_as_large_as_the_limit_allows_and_are_not_kept(critic_name, numbers_a_pair, monkeypatch):
    critic, features, embedding = make_batch(critic_name, n_images=5)
    elements_a_row = 5 * 6 * numbers_a_pair
    monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", 2 * elements_a_row + 1)
    rows = []
    score_all = critic.score_all

    def watched(maps, vectors):
        rows.append(len(vectors))
        return score_all(maps, vectors)

    monkeypatch.setattr(critic, "score_all", watched)
    loss = contrast_images(critic, OBJECTIVES["infonce"], features, embedding, "batch", seeded())[0]
    assert rows == [2, 2, 1]
    loss.backward()
    assert sorted(rows) == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_chunks_hold_the_same_pairs(negatives, monkeypatch):
    whole = drawn_pairs(7, 3, negatives, seeded())
    monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", 45)
    assert drawn_pairs(7, 3, negatives, seeded()) == whole


# The model


def build(terms, **options):
    options = {
        "discriminator": "dot",
        "mi_units": 8,
        "mi_estimator": "infonce",
        "negatives": "batch",
        "prior": "uniform",
        "prior_matching": "adversarial",
        "occlusion": None,
        "local_samples": None,
    } | options
    torch.manual_seed(0)
    encoder = DCGANEncoder((1, 16, 16), N_COMPONENTS)
    weights = {name: float(name in terms) for name in ("local", "global", "prior", "coordinate")}
    if isinstance(options["negatives"], str):
        options["negatives"] = dict.fromkeys(("local", "global"), (options["negatives"],))
    return build_model(encoder, (64, 8, 8), N_COMPONENTS, weights=weights, **options)


@pytest.mark.parametrize("discriminator", ["dot", "concat"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_model_returns_the_term_of_each_critic(discriminator, negatives):
    model = build({"local", "global", "prior"}, discriminator=discriminator, negatives=negatives)
    images = torch.tensor(np.random.default_rng(0).standard_normal((4, 1, 16, 16)), dtype=torch.float32)
    terms, _bounds, embedding = model([images], seeded())
    expected_embedding, features = model.encoder(images)
    torch.testing.assert_close(embedding, expected_embedding)
    assert set(terms) == {"local", "global"}
    generator = seeded()
    for name, critic in model.critics.items():
        expected = contrast_images(critic, OBJECTIVES["infonce"], features, embedding, negatives, generator)[0]
        torch.testing.assert_close(terms[name], expected)


def test_embeddings_are_of_occluded_images_and_features_of_whole_ones():
    def occlude(images, generator, group, n_views):
        return images.masked_fill(torch.arange(16) < 7, 0.0)

    model = build({"local"}, occlusion=occlude).eval()
    critic, seen = model.critics["local"], []
    encode = critic.encode

    def watched(features, embedding):
        seen.append((features, embedding))
        return encode(features, embedding)

    critic.encode = watched
    images = colour_batch(4)
    _, _, embedding = model([images], seeded())
    ((features, scored),) = seen
    torch.testing.assert_close(features, model.encoder(images)[1])
    torch.testing.assert_close(embedding, model.encoder(occlude(images, None, None, 1))[0])
    assert torch.equal(scored, embedding)
    assert not torch.allclose(embedding, model.encoder(images)[0])


def colour_batch(n_images, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal((n_images, 1, 16, 16)), dtype=torch.float32)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_of_two_views_features_of_each_meet_the_embeddings_of_the_other(negatives):
    model = build({"local", "global"}, negatives=negatives)
    views = [colour_batch(4, seed) for seed in range(2)]
    terms, _bounds, embedding = model(views, seeded())
    both, features = model.encoder(torch.cat(views))
    torch.testing.assert_close(embedding, both)
    generator = seeded()
    for name, critic in model.critics.items():
        maps, vectors = critic.encode(features, both)
        ways = [
            contrast(critic, OBJECTIVES["infonce"], maps[one], vectors[other, None], others)[0]
            for one, other in ((slice(4), slice(4, 8)), (slice(4, 8), slice(4)))
            for others in [draw_others(negatives, 4, generator)]
        ]
        torch.testing.assert_close(terms[name], sum(ways) / 2)


def test_several_schemes_of_negatives_are_averaged_for_each_critic():
    schemes = {"local": ("batch", "roll"), "global": ("roll",)}
    model = build({"local", "global"}, negatives=schemes)
    single = {scheme: build({"local", "global"}, negatives=scheme) for scheme in ("batch", "roll")}
    images = colour_batch(4)
    terms, bounds, _ = model([images], seeded())
    alone = {scheme: other([images], seeded()) for scheme, other in single.items()}
    for kind, values in enumerate((terms, bounds)):
        local, glob = ("local", "global") if kind == 0 else ("local_bound", "global_bound")
        mean = (alone["batch"][kind][local] + alone["roll"][kind][local]) / 2
        torch.testing.assert_close(values[local], mean)
        torch.testing.assert_close(values[glob], alone["roll"][kind][glob])


class MapEncoder(nn.Module):
    """Four embeddings an image, each seen in one quarter of it."""

    def __init__(self):
        super().__init__()
        self.local = nn.Conv2d(1, 3, 4, stride=4)
        self.embed = nn.Conv2d(3, N_COMPONENTS, 2, stride=2)

    def forward(self, images):
        features = self.local(images)
        return self.embed(features), features


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("critic_name", CRITICS)
def test_several_embeddings_an_image_are_each_told_from_other_images(critic_name, negatives, limit, monkeypatch):
    if limit is not None:
        monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", limit)
    torch.manual_seed(0)
    critic = CRITICS[critic_name]((3, 4, 4), N_COMPONENTS, N_UNITS).double()
    name = critic_name.split("-")[0]
    model = InfoMaxModel(
        MapEncoder().double(), {name: critic}, OBJECTIVES["infonce"], negatives={name: (negatives,)}
    ).eval()
    images = colour_batch(4).double()
    terms, _, embedding = model([images], seeded())
    maps_of, features = model.encoder(images)
    vectors = maps_of.flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding, vectors.flatten(0, 1))
    # One embedding an image at a time, the others left out, gives the mean over embeddings.
    losses = [
        contrast_images(critic, OBJECTIVES["infonce"], features, vectors[:, g], negatives, seeded())[0]
        for g in range(4)
    ]
    torch.testing.assert_close(terms[name], sum(losses) / 4)


def test_coordinates_are_told_from_the_other_views_mean_embedding():
    model = build({"coordinate"})
    model.encoder = MapEncoder()
    model.coordinates = CoordinatePredictor((3, 4, 4), N_COMPONENTS, 8)
    views = [colour_batch(5, seed) for seed in range(2)]
    terms, _, _ = model(views, seeded())
    partner = torch.randperm(16, generator=seeded())
    embeddings, features = zip(*(model.encoder(view) for view in views), strict=True)
    means = [embedding.mean(dim=(2, 3)) for embedding in embeddings]
    expected = [model.coordinates.loss(features[i], means[1 - i], partner) for i in range(2)]
    torch.testing.assert_close(terms["coordinate"], torch.stack(expected).mean())
    # Which of the embeddings it is does make a difference.
    others = [model.coordinates.loss(features[i], means[i], partner) for i in range(2)]
    assert not torch.allclose(terms["coordinate"], torch.stack(others).mean())


def test_sampled_locations_are_distinct_ones_of_the_same_image():
    model = build({"local"}, local_samples=5)
    codes = (100 * torch.arange(6)[:, None] + torch.arange(64)).float().view(6, 1, 8, 8)
    features = torch.cat([codes, -codes], dim=1)
    generator = seeded()
    draws = [_take_locations(features, model._draw_locations(features, 1, generator)) for _ in range(200)]
    for sampled in draws[:5]:
        assert sampled.shape == (6, 2, 5, 1)
        assert torch.equal(sampled[:, 1], -sampled[:, 0])
        for i, row in enumerate(sampled[:, 0, :, 0].tolist()):
            assert len(set(row)) == 5
            assert all(value // 100 == i for value in row)
    counts = np.bincount((torch.stack(draws)[:, :, 0].flatten().long() % 100).numpy(), minlength=64)
    expected = 200 * 6 * 5 / 64
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)


def test_sampled_locations_estimate_the_loss_of_all():
    images = colour_batch(6)
    model = build({"local"}, local_samples=16, mi_estimator="jsd").eval()
    every = build({"local"}, mi_estimator="jsd").eval()
    with torch.no_grad():
        expected = every([images], seeded())[0]["local"].item()
        generator = seeded()
        estimates = np.array([model([images], generator)[0]["local"].item() for _ in range(60)])
    assert estimates.std() > 0
    assert estimates.mean() == pytest.approx(expected, abs=4 * estimates.std() / math.sqrt(60))


@pytest.mark.parametrize("left_out", ["local", "global", "prior"])
def test_a_term_that_is_left_out_has_no_discriminator(left_out):
    model = build({"local", "global", "prior"} - {left_out})
    built = {*model.critics, *(["prior"] if model.prior is not None else [])}
    assert built == {"local", "global", "prior"} - {left_out}


class RecordingPrior(PriorDiscriminator):
    def __init__(self):
        super().__init__(2)
        self.samples = []

    def forward(self, samples):
        self.samples.append(samples)
        return 20 * (samples[:, 0] - 0.5)

    def logit_and_slope(self, samples):
        return self(samples), torch.tensor([20.0, 0.0]).expand_as(samples)


def prior_model(prior):
    return InfoMaxModel(nn.Identity(), {}, OBJECTIVES["jsd"], negatives={}, prior=prior)


def test_prior_discriminator_sees_uniform_samples_and_squashed_embeddings():
    prior = RecordingPrior()
    embedding = torch.tensor(5 * np.random.default_rng(0).standard_normal((2000, 2)), dtype=torch.float32)
    loss = prior_model(prior).prior_discriminator_loss(embedding, seeded())
    real, fake = torch.cat(prior.samples).split(2000)
    np.testing.assert_allclose(fake.numpy(), 1 / (1 + np.exp(-embedding.numpy())), rtol=1e-5)
    assert real.min() >= 0
    assert real.max() <= 1
    assert real.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert real.var().item() == pytest.approx(1 / 12, abs=0.005)
    logits = [20 * (samples[:, 0].double().numpy() - 0.5) for samples in (real, fake)]
    expected = np.log(1 + np.exp(-logits[0])).mean() + np.log(1 + np.exp(logits[1])).mean()
    assert loss.item() == pytest.approx(expected + 20**2, rel=1e-5)


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_prior_discriminator_pays_for_its_slope_at_samples_and_embeddings(prior):
    torch.manual_seed(0)
    model = prior_model(PriorDiscriminator(N_COMPONENTS, prior))
    embedding = 3 * torch.randn(40, N_COMPONENTS, generator=seeded())
    loss = model.prior_discriminator_loss(embedding, seeded())
    fake = model.prior.on_support(embedding)
    samples = np.concatenate([each.double().numpy() for each in (model.prior.sample_like(fake, seeded()), fake)])
    weights = [layer.weight.detach().double().numpy() for layer in model.prior.logit if isinstance(layer, nn.Linear)]
    biases = [layer.bias.detach().double().numpy() for layer in model.prior.logit if isinstance(layer, nn.Linear)]
    first = samples @ weights[0].T + biases[0]
    second = np.maximum(first, 0) @ weights[1].T + biases[1]
    real, fake = np.split(np.maximum(second, 0) @ weights[2][0] + biases[2], 2)
    slope = ((weights[2] * (second > 0)) @ weights[1] * (first > 0)) @ weights[0]
    expected = np.logaddexp(0, -real).mean() + np.logaddexp(0, fake).mean() + np.square(slope).sum(axis=1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_the_game_of_the_prior_brings_embeddings_to_it(prior):
    torch.manual_seed(0)
    model = prior_model(PriorDiscriminator(2, prior))
    embedding = nn.Parameter(2 + 0.3 * torch.randn(256, 2, generator=seeded()))
    generator = seeded()
    players = {
        torch.optim.Adam(model.prior.parameters(), lr=2e-3): lambda: model.prior_discriminator_loss(
            embedding, generator
        ),
        torch.optim.Adam([embedding], lr=0.04): lambda: model.prior_loss(embedding),
    }
    for _ in range(400):
        for player, loss in players.items():
            player.zero_grad()
            loss().backward()
            player.step()
    y = embedding.detach().double().numpy()
    cdf = scipy.stats.logistic.cdf if prior == "uniform" else scipy.stats.norm.cdf
    # The largest gap between the distribution functions: 0.8 and 0.9 at the start.
    assert all(scipy.stats.kstest(dimension, cdf).statistic < 0.15 for dimension in y.T)


def test_prior_loss_is_minus_log_of_the_probability_of_real():
    prior = RecordingPrior()
    embedding = torch.tensor([[0.3, 1.0], [-2.0, 0.0], [4.0, -1.0]])
    loss = prior_model(prior).prior_loss(embedding)
    squashed = 1 / (1 + np.exp(-embedding[:, 0].double().numpy()))
    probability = 1 / (1 + np.exp(-20 * (squashed - 0.5)))
    assert loss.item() == pytest.approx(-np.log(probability).mean(), rel=1e-5)


def test_prior_losses_at_chance():
    prior = PriorDiscriminator(N_COMPONENTS)
    for parameter in prior.parameters():
        nn.init.zeros_(parameter)
    model = prior_model(prior)
    embedding = torch.randn(6, N_COMPONENTS, generator=seeded())
    assert model.prior_discriminator_loss(embedding, seeded()).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert model.prior_loss(embedding).item() == pytest.approx(math.log(2), rel=1e-6)


def test_prior_game_is_adversarial():
    torch.manual_seed(0)
    model = prior_model(PriorDiscriminator(N_COMPONENTS))
    embedding = torch.randn(6, N_COMPONENTS, generator=seeded(), requires_grad=True)
    discriminator_loss = model.prior_discriminator_loss(embedding, seeded())
    gradient, *rest = torch.autograd.grad(discriminator_loss, [embedding, *model.parameters()], allow_unused=True)
    assert gradient is None
    assert any(value.abs().max() > 0 for value in rest)
    encoder_gradient, *rest = torch.autograd.grad(
        model.prior_loss(embedding), [embedding, *model.parameters()], allow_unused=True
    )
    assert all(gradient is None for gradient in rest)
    # Both losses are differences of the same logits, with opposite signs for the embeddings.
    logits = model.prior(torch.sigmoid(embedding))
    (logit_gradient,) = torch.autograd.grad(logits.sum(), [embedding])
    assert (encoder_gradient * logit_gradient <= 0).all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_prior_losses_stay_finite_for_huge_embeddings(scale):
    torch.manual_seed(0)
    model = prior_model(PriorDiscriminator(N_COMPONENTS))
    embedding = (scale * torch.randn(6, N_COMPONENTS, generator=seeded())).requires_grad_()
    loss = model.prior_discriminator_loss(embedding, seeded()) + model.prior_loss(embedding)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding.grad).all()


@pytest.mark.parametrize("negatives", ["batch", "roll", "shuffle"])
@pytest.mark.parametrize("mi_estimator", OBJECTIVES)
def test_gradcheck_of_the_chunked_loss(monkeypatch, mi_estimator, negatives):
    monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", 1)
    torch.manual_seed(0)
    critic = LocalDotCritic((3, 2, 2), 4, 5).double()
    features = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(features, embedding):
        generator = torch.Generator().manual_seed(0)
        return contrast_images(critic, OBJECTIVES[mi_estimator], features, embedding, negatives, generator)[0]

    assert torch.autograd.gradcheck(loss, (features, embedding))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("critic_name", ["local-concat", "global-concat"])
def test_gradcheck_of_concat_critics(critic_name, chunked, monkeypatch):
    if chunked:
        monkeypatch.setitem(skdim.model.MAX_PAIR_ELEMENTS, "cpu", 1)
    critic, features, embedding = make_batch(critic_name, n_images=3)

    def loss(features, embedding):
        return contrast_images(critic, OBJECTIVES["jsd"], features, embedding, "batch", seeded())[0]

    assert torch.autograd.gradcheck(loss, (features, embedding))


# Prior by noise


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_prior_noise_has_the_distribution_and_the_share_that_it_says(prior):
    embedding = torch.zeros(20_000, 2)
    noisy = PriorNoise(prior, 0.5)(embedding, seeded()).numpy()
    # On the prior's own scale of unit variance.
    assert noisy.mean() == pytest.approx(0, abs=0.01)
    assert noisy.std() == pytest.approx(0.5, rel=0.02)
    kurtosis = (noisy**4).mean() / (noisy**2).mean() ** 2
    assert kurtosis == pytest.approx({"uniform": 1.8, "normal": 3.0}[prior], rel=0.05)


def test_uniform_prior_noise_squashes_the_embedding():
    embedding = torch.tensor([[-100.0, 0.0, 100.0]])
    squashed = PriorNoise("uniform", 1e-9)(embedding, seeded())
    torch.testing.assert_close(squashed, torch.tensor([[-1.0, 0.0, 1.0]]) * 3**0.5)


def test_critics_see_the_noise_and_so_the_encoder_is_not_its_own_adversary():
    images = colour_batch(4)
    quiet, noisy = (build({"local", *extra}, prior_matching="noise") for extra in ((), ("prior",)))
    assert noisy.prior is None
    assert set(noisy.discriminators) == {"local"}
    terms = [model([images], seeded())[0]["local"] for model in (quiet, noisy)]
    assert set(noisy([images], seeded())[0]) == {"local"}
    assert not torch.allclose(*terms)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("critic_name", ["local-dot", "global-concat"])
def test_losses_of_bfloat16_scores_are_float32(critic_name, negatives):
    critic, features, embedding = make_batch(critic_name, n_images=4, dtype=torch.float32)
    for objective in OBJECTIVES.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps, vectors = critic.encode(features, embedding)
            assert critic.score_all(maps, vectors).dtype == torch.bfloat16
            loss, bound = contrast_images(critic, objective, features, embedding, negatives, seeded())
        assert loss.dtype == torch.float32
        assert bound is None or bound.dtype == torch.float32


def test_only_the_local_critic_sees_a_sample_of_the_locations():
    images = colour_batch(4)
    expected, sampled = (build({"local", "global"}, local_samples=m)([images], seeded())[0] for m in (None, 5))
    torch.testing.assert_close(sampled["global"], expected["global"])
    assert not torch.allclose(sampled["local"], expected["local"])


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_gradients_pass_through_the_noise(prior):
    model = build({"global", "prior"}, prior_matching="noise", prior=prior)
    model([colour_batch(4)], seeded())[0]["global"].backward()
    assert model.encoder.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_noise_is_added_in_float32(prior):
    embedding = torch.linspace(-3, 3, 50).bfloat16()[:, None]
    assert torch.equal(
        PriorNoise(prior, 0.5).on_support(embedding), PriorNoise(prior, 0.5).on_support(embedding.float())
    )


class TwoPathsEncoder(nn.Module):
    """Embedding and features that share no weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.local = nn.Linear(256, N_COMPONENTS), nn.Conv2d(1, 3, 4, stride=4)

    def forward(self, images):
        return self.embed(images.flatten(1)), self.local(images)


@pytest.mark.parametrize("occluded", [False, True])
@pytest.mark.parametrize("term", ["local", "global", "coordinate"])
def test_each_term_trains_embedding_and_features(term, occluded):
    occlusion = (lambda images, *others: images.masked_fill(torch.arange(16) < 7, 0.0)) if occluded else None
    model = build({term}, occlusion=occlusion)
    model.encoder = TwoPathsEncoder()
    shape = (3, 4, 4)
    if term == "coordinate":
        model.coordinates = CoordinatePredictor(shape, N_COMPONENTS, 8)
    else:
        model.critics[term] = {"local": LocalDotCritic, "global": GlobalDotCritic}[term](shape, N_COMPONENTS, 8)
    terms, _, _ = model([colour_batch(4)], seeded())
    terms[term].backward()
    for layer in (model.encoder.embed, model.encoder.local):
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().max() > 0
