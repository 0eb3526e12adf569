"""The method's options through the estimator: views, tasks, priors, negatives, several embeddings an image."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import DCGANEncoder, StandardizedEncoder
from skdim.views import StandardAugmentation

OPTIONS = {
    "two views": {"augmentation": "standard"},
    "own views": {"augmentation": StandardAugmentation(crop=0.8, noise=0.1)},
    "occlusion": {"occlusion": True},
    "coordinates": {"coordinate_weight": 0.5},
    "coordinates only": {"coordinate_weight": 1.0, "local_weight": 0, "global_weight": 0, "prior_weight": 0},
    "several schemes": {"negatives": ("batch", "roll", "shuffle")},
    "schemes by critic": {"negatives": {"local": "roll", "global": ["batch", "shuffle"]}},
    "local samples": {"local_samples": 4},
    "uniform by noise": {"prior_matching": "noise"},
    "normal by noise": {"prior": "normal", "prior_matching": "noise"},
    "several globals": {"multiple_globals": True},
    "all at once": {
        "augmentation": "standard",
        "occlusion": True,
        "coordinate_weight": 0.5,
        "negatives": ("batch", "shuffle"),
        "local_samples": 8,
        "prior": "normal",
        "prior_matching": "noise",
        "multiple_globals": True,
    },
}


def small(**params):
    return DIMTransformer(
        **{"n_components": 8, "max_epochs": 2, "random_state": 0, "mi_units": 32, "global_weight": 0.5} | params
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_trains_to_the_same_bits_and_survives_a_pickle(digits, name):
    X = digits[0][:100]
    dim = small(batch_size=32, max_epochs=1, **OPTIONS[name]).fit(X)
    Z = dim.transform(X)
    assert Z.shape == (100, 8)
    assert np.isfinite(Z).all()
    assert np.array_equal(clone(dim).fit(X).transform(X), Z)
    assert np.array_equal(pickle.loads(pickle.dumps(dim)).transform(X), Z)
    plain = small(batch_size=32, max_epochs=1).fit(X).transform(X)
    assert not np.array_equal(Z, plain)


@pytest.mark.parametrize("name", ["own views", "schemes by critic"])
def test_options_can_be_searched(digits, name):
    X, y = digits
    ((parameter, value),) = OPTIONS[name].items()
    pipeline = make_pipeline(small(max_epochs=1), KNeighborsClassifier())
    default = getattr(small(), parameter)
    search = GridSearchCV(pipeline, {f"dimtransformer__{parameter}": [default, value]}, cv=2).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


# Two views


class Recorder:
    """An augmentation that notes what it is given and adds noise."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, generator):
        self.calls.append((images.clone(), generator))
        return images + torch.randn(images.shape, generator=generator)


def test_an_augmentation_gets_each_batch_twice_and_the_nets_generator(digits):
    X = digits[0]
    recorder = Recorder()
    dim = small(augmentation=recorder, batch_size=100, max_epochs=1).fit(X)
    trial, *calls = recorder.calls
    assert trial[0].shape == (2, 1, 8, 8)
    assert [images.shape for images, _ in calls] == [(100, 1, 8, 8)] * 6
    for (first, _), (second, _) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(first, second)
    assert all(generator is dim.net_.generator for _, generator in calls)
    seen = torch.cat([images for images, _ in calls[::2]]).flatten(1).sort(dim=0).values
    standardised = torch.from_numpy((X - dim.mean_) / dim.std_).float().sort(dim=0).values
    torch.testing.assert_close(seen, standardised, atol=1e-4, rtol=1e-4)


def test_two_views_make_the_embedding_insensitive_to_what_they_change(digits):
    X = digits[0].astype(np.float32)
    changed = X + np.random.default_rng(0).normal(0, 6, X.shape).astype(np.float32)

    def sensitivity(augmentation):
        dim = small(augmentation=augmentation, max_epochs=15, batch_size=50, prior_weight=0).fit(X)
        Z, Z_changed = dim.transform(X), dim.transform(changed)
        return ((Z - Z_changed) ** 2).sum() / ((Z - Z.mean(axis=0)) ** 2).sum()

    noise = StandardAugmentation(crop=1, color=0, horizontal_flip=False, grey=0, noise=1.0)
    assert sensitivity(noise) < 0.7 * sensitivity(None)


def add_noise_in_place(images, generator):
    return images.add_(torch.randn(images.shape, generator=generator))


def add_noise(images, generator):
    return images + torch.randn(images.shape, generator=generator)


def test_an_augmentation_may_work_in_place(digits):
    in_place, pure = (small(augmentation=each).fit(digits[0]) for each in (add_noise_in_place, add_noise))
    assert np.array_equal(in_place.transform(digits[0]), pure.transform(digits[0]))


def test_an_augmentation_that_draws_elsewhere_is_seeded_and_leaves_no_trace(digits):
    def draw(images, generator):
        return images + torch.randn_like(images)

    before = torch.get_rng_state()
    first, second = (small(augmentation=draw).fit_transform(digits[0]) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop", 0),
        ("crop", 1.5),
        ("crop", "a"),
        ("shift", -0.1),
        ("color", 2),
        ("grey", -1),
        ("noise", -1),
        ("noise", np.inf),
    ],
)
def test_shares_of_the_standard_augmentation_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a number in .*, got {value!r}"):
        StandardAugmentation(**{name: value})


@pytest.mark.parametrize("name", ["horizontal_flip", "vertical_flip"])
def test_flips_of_the_standard_augmentation_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        StandardAugmentation(**{name: "no"})


def test_shares_of_the_standard_augmentation_may_come_from_a_grid():
    assert [StandardAugmentation(crop=crop).crop for crop in np.linspace(0.5, 1, 3)] == [0.5, 0.75, 1.0]
    assert StandardAugmentation(crop=np.float32(0.5), color=np.int64(1)).color == 1


def shrink(images, generator):
    return images[:, :, 1:]


def to_double(images, generator):
    return images.double()


def to_nan(images, generator):
    return images * torch.nan


def to_list(images, generator):
    return list(images)


def drop_one(images, generator):
    return images[1:]


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (shrink, r"the shape, dtype and device .*\(2, 1, 8, 8\).* got \(\(2, 1, 7, 8\)"),
        (drop_one, r"got \(\(1, 1, 8, 8\)"),
        (to_double, "got .*torch.float64"),
        (to_nan, "augmentation returned NaN or infinite values"),
        (to_list, "must return a tensor of images, got list"),
        ("strong", "The 'augmentation' parameter of DIMTransformer must be"),
        (3, "The 'augmentation' parameter of DIMTransformer must be"),
    ],
)
def test_wrong_augmentations_are_refused_before_training(digits, augmentation, message):
    dim = small(augmentation=augmentation)
    with pytest.raises(ValueError, match=message):
        dim.fit(digits[0])
    assert not hasattr(dim, "encoder_")


# Tasks


@pytest.mark.parametrize("options", [{}, {"augmentation": StandardAugmentation(color=0)}, {"occlusion": True}])
def test_the_coordinate_loss_falls_below_chance(digits, options):
    dim = small(coordinate_weight=1.0, max_epochs=8, batch_size=50, **options).fit(digits[0])
    # 4 x 4 locations, so 4 rows and columns, and 7 offsets that are not equally likely.
    shares = np.array([1, 2, 3, 4, 3, 2, 1]) / 16
    chance = (np.log(4) - (shares * np.log(shares)).sum()) / 2
    assert dim.history_[-1]["coordinate"] < chance - 0.05
    assert set(dim.discriminators_) == {"local", "global", "prior", "coordinate"}
    total = sum(
        weight * dim.history_[-1][term]
        for term, weight in {"local": 1, "global": 0.5, "prior": 0.1, "coordinate": 1}.items()
    )
    assert dim.loss_curve_[-1] == pytest.approx(total, rel=1e-5)


def test_coordinates_need_two_locations():
    dim = small(coordinate_weight=1.0, image_shape=(2, 1, 1))
    with pytest.raises(ValueError, match=r"coordinate_weight=1.0 needs local features at two locations .* are 1 x 1"):
        dim.fit(np.random.default_rng(0).normal(size=(10, 2)))
    assert not hasattr(dim, "encoder_")


class WatchingEncoder(DCGANEncoder):
    def forward(self, images):
        self.inputs = [*getattr(self, "inputs", [])[-8:], images.detach().clone()]
        return super().forward(images)


def test_occlusion_hides_from_the_embedding_but_not_from_the_features(colour_images):
    X = np.random.default_rng(0).normal(size=(40, 1, 32, 32)).astype(np.float32)
    dim = small(encoder=WatchingEncoder, occlusion=True, batch_size=40, max_epochs=1, precision="float32").fit(X)
    whole, occluded = (images for images in dim.encoder_.inputs if len(images) == 40)
    hidden = occluded == 0
    assert torch.equal(occluded[~hidden], whole[~hidden])
    assert not (whole == 0).any()
    share = hidden.float().mean(dim=(1, 2, 3))
    # At least one field of 10 x 10 pixels, cut to 7 at a border.
    assert share.min() >= 49 / 1024
    assert share.max() < 1
    assert share.std() > 0


def test_occlusion_needs_features_that_see_a_part_only(digits):
    dim = small(occlusion=True, encoder="resnet")
    with pytest.raises(ValueError, match=r"occlusion=True needs local features that each see only a part"):
        dim.fit(digits[0])
    assert not hasattr(dim, "encoder_")


# Priors


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_noise_pulls_the_embedding_to_the_prior(digits, prior):
    def distances(prior_weight):
        """Largest gap between the distribution functions of the embedding's dimensions and the prior's, averaged."""
        dim = small(prior=prior, prior_matching="noise", prior_weight=prior_weight, global_weight=0, mi_units=256)
        Z = dim.set_params(max_epochs=60, batch_size=50).fit_transform(digits[0])
        distribution = norm.cdf if prior == "normal" else lambda z: z
        samples = Z if prior == "normal" else 1 / (1 + np.exp(-Z.astype(float)))
        return np.mean([kstest(column, distribution).statistic for column in samples.T])

    matched, unmatched = distances(0.1), distances(0.0)
    assert matched < 0.1
    assert matched < 0.6 * unmatched


def test_noise_needs_no_second_network_and_no_second_loss(digits):
    dim = small(prior="normal", prior_matching="noise").fit(digits[0])
    assert set(dim.discriminators_) == {"local", "global"}
    assert not {"prior", "prior_discriminator"} & set(dim.history_[0])
    assert isinstance(dim.encoder_, StandardizedEncoder)
    for change in ({"prior": "uniform"}, {"prior_matching": "adversarial"}, {"prior_weight": 0}):
        with pytest.raises(
            ValueError, match="Training cannot go on: multiple_globals, prior, prior_weight or prior_matching"
        ):
            clone(dim).fit(digits[0]).set_params(warm_start=True, **change).fit(digits[0])


def test_noise_alone_trains_nothing(digits):
    dim = small(prior_matching="noise", local_weight=0, global_weight=0)
    with pytest.raises(ValueError, match="global_weight and coordinate_weight are all 0, and prior_matching='noise'"):
        dim.fit(digits[0])


# Negatives and embeddings


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ((), "negatives must be one of"),
        (("batch", "all"), "negatives must be one of"),
        (["batch", 1], "negatives must be one of"),
        ({"local": "batch"}, r"must name the critics \['global', 'local'\]"),
        ({"local": "batch", "global": "roll", "prior": "roll"}, r"must name critics of \['global', 'local'\]"),
        ({"local": "batch", "global": "far"}, "negatives must be one of"),
        (["batch", ["roll"]], "negatives must be one of"),
        ({"local": 5, "global": "roll"}, "negatives must be one of"),
        ({"local": None, "global": "roll"}, "negatives must be one of"),
    ],
)
def test_wrong_negatives_are_refused(digits, negatives, message):
    dim = small(negatives=negatives)
    with pytest.raises(ValueError, match=message):
        dim.fit(digits[0])
    assert not hasattr(dim, "encoder_")


def test_a_dict_of_negatives_needs_only_the_critics_that_are_trained(digits):
    by_name = small(negatives={"local": "roll"}, global_weight=0).fit_transform(digits[0])
    assert np.array_equal(by_name, small(negatives="roll", global_weight=0).fit_transform(digits[0]))


def test_several_globals_are_averaged(digits):
    X = digits[0]
    dim = small(multiple_globals=True).fit(X)
    few = torch.from_numpy((X[:10] - dim.mean_) / dim.std_).float().view(-1, 1, 8, 8)
    with torch.no_grad():
        maps, _ = dim.encoder_(few)
    assert maps.shape == (10, 8, 2, 2)
    np.testing.assert_allclose(dim.transform(X[:10]), maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


class MapEncoder(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.local = nn.Conv2d(image_shape[0], 6, 2, stride=2)
        self.embed = nn.Conv2d(6, n_components, 2, stride=2)

    def forward(self, images):
        features = torch.relu(self.local(images))
        return self.embed(features), features


def test_an_own_encoder_may_return_a_map_of_embeddings(digits):
    Z = small(encoder=MapEncoder, max_epochs=1).fit_transform(digits[0])
    assert Z.shape == (300, 8)
    with pytest.raises(ValueError, match="let your encoder return an embedding of shape"):
        small(encoder=MapEncoder, multiple_globals=True).fit(digits[0])


# Signals and rows


@pytest.mark.parametrize("encoder", ["dcgan", "alexnet", "resnet", "resnet_folded", "stride1"])
def test_signals_of_several_channels_train(encoder):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3, 1, 24)).astype(np.float32)
    dim = small(encoder=encoder, max_epochs=1, batch_size=20, n_components=4)
    rows = clone(dim).set_params(image_shape=(3, 1, 24)).fit_transform(X.reshape(40, -1))
    three_axes = clone(dim).set_params(image_shape=(3, 1, 24)).fit(X[:, :, 0])
    assert three_axes.image_shape_ == (3, 1, 24)
    assert np.array_equal(three_axes.transform(X[:, :, 0]), rows)
    assert all(1 in layer.kernel_size for layer in three_axes.encoder_.modules() if isinstance(layer, nn.Conv2d))


def test_a_factory_with_arguments_builds_an_encoder(digits):
    dim = small(encoder=partial(DCGANEncoder, multiple_globals=True), max_epochs=0)
    by_name = small(multiple_globals=True, max_epochs=0)
    assert np.array_equal(dim.fit_transform(digits[0]), by_name.fit_transform(digits[0]))


@pytest.mark.parametrize("shape", [(5, 8, 6), (2, 4, 9), (1, 5, 20), (3, 2, 3)])
def test_narrow_images_train_in_any_precision_that_is_chosen_for_them(shape):
    # torch's bfloat16 convolutions to maps one pixel wide give NaN now and then on some processors.
    X = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    for seed in range(4):
        dim = small(random_state=seed, data_format="channels_first", max_epochs=1).fit(X)
        assert np.isfinite(dim.transform(X)).all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 5, 20), None),
        ((1, 8, 16), None),
        ((2, 7, 6), None),
        ((1, 8, 8), torch.bfloat16),
        ((1, 1, 40), torch.bfloat16),
    ],
)
def test_no_bfloat16_is_chosen_for_narrow_images_on_a_cpu(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    X = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    dim = small(device="cpu", data_format="channels_first", max_epochs=0).fit(X)
    assert dim.net_.autocast_dtype == dtype


def test_as_many_local_samples_as_there_are_or_more_are_all_locations(digits):
    dims = [small(local_samples=n, max_epochs=1).fit(digits[0]) for n in (None, 1000)]
    assert np.array_equal(*[dim.transform(digits[0]) for dim in dims])


def test_the_weight_of_the_prior_is_the_strength_of_the_noise(digits):
    losses = [
        small(prior_matching="noise", prior_weight=weight, max_epochs=1).fit(digits[0]).loss_curve_[0]
        for weight in (0.1, 0.1, 1.0)
    ]
    assert losses[0] == losses[1] != losses[2]
