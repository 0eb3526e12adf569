import copy
import os
import pickle
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import kstest, logistic, norm
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientNormClipping,
    LRScheduler,
    PassthroughScoring,
)
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import DCGANEncoder, read_layers
from skdim.net import DIMNet

TERMS = ("local", "global", "prior")


class OwnEncoder(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 12, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.linear = nn.LazyLinear(n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        return self.linear(self.drop(features.flatten(1))), features


def small(**params):
    return DIMTransformer(**{"n_components": 8, "max_epochs": 2, "random_state": 0, "global_weight": 0.5} | params)


@pytest.mark.parametrize("encoder", ["dcgan", "stride1"])
@pytest.mark.parametrize("discriminator", ["dot", "concat"])
@pytest.mark.parametrize("mi_estimator", ["infonce", "jsd", "dv"])
@pytest.mark.parametrize("negatives", ["batch", "roll", "shuffle"])
def test_every_combination_trains(digits, encoder, discriminator, mi_estimator, negatives):
    dim = small(
        encoder=encoder,
        discriminator=discriminator,
        mi_estimator=mi_estimator,
        negatives=negatives,
        prior_weight=0.1,
        mi_units=16,
        batch_size=16,
        max_epochs=1,
    )
    Z = dim.fit(digits[0][:48]).transform(digits[0])
    assert Z.shape == (300, 8)
    assert np.isfinite(Z).all()


# 8 x 8 images have 4 x 4 locations; each embedding meets those of 15 other images, or of one.
@pytest.mark.parametrize(
    ("mi_estimator", "discriminator", "negatives", "chance"),
    [
        ("infonce", "dot", "batch", np.log(1 + 15 * 16)),
        ("infonce", "concat", "roll", np.log(1 + 16)),
        ("jsd", "dot", "batch", 2 * np.log(2)),
        ("jsd", "concat", "shuffle", 2 * np.log(2)),
        ("dv", "dot", "batch", 0.0),
        ("dv", "concat", "roll", 0.0),
        ("kl", "dot", "batch", np.exp(-1)),
        ("rkl", "dot", "roll", 0.0),
        ("hellinger", "dot", "batch", 0.0),
        ("chi2", "dot", "shuffle", 0.0),
    ],
)
def test_training_brings_the_local_loss_below_chance(digits, mi_estimator, discriminator, negatives, chance):
    dim = small(mi_estimator=mi_estimator, discriminator=discriminator, negatives=negatives, batch_size=16)
    dim.set_params(max_epochs=6, global_weight=0, prior_weight=0).fit(digits[0][:256])
    assert dim.history_[-1]["local"] < min(chance - 0.1, dim.history_[0]["local"])


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_builds_and_reports_nothing_of_its_term(digits, term):
    dim = small(**{f"{name}_weight": float(name != term) for name in TERMS}).fit(digits[0])
    others = {name for name in TERMS if name != term}
    assert set(dim.discriminators_) == others
    reported = set(dim.history_[0]) & {*TERMS, "prior_discriminator"}
    assert reported == (others | {"prior_discriminator"} if term != "prior" else others)


def test_history(digits):
    dim = small(local_weight=2.0, global_weight=0.5, prior_weight=0.1, max_epochs=3).fit(digits[0])
    assert dim.n_iter_ == len(dim.history_) == 3
    for epoch in dim.history_:
        total = 2 * epoch["local"] + 0.5 * epoch["global"] + 0.1 * epoch["prior"]
        assert epoch["loss"] == pytest.approx(total, rel=1e-5)
        assert epoch["images_per_second"] == pytest.approx(300 / epoch["seconds"])
    assert dim.loss_curve_ == [epoch["loss"] for epoch in dim.history_]
    assert len(dim.net_.history) == 3


def test_history_reports_bounds_in_nats(digits):
    epoch = small(batch_size=100, max_epochs=1).fit(digits[0]).history_[0]
    # One location: all negatives are independent.
    assert epoch["global_bound"] == pytest.approx(np.log(1 + 99) - epoch["global"], rel=1e-4, abs=1e-4)
    assert epoch["local_bound"] < np.log(1 + 99)
    epoch = small(mi_estimator="dv", max_epochs=1).fit(digits[0]).history_[0]
    assert epoch["local_bound"] == pytest.approx(-epoch["local"], rel=1e-4, abs=1e-4)
    assert "local_bound" not in small(mi_estimator="jsd", max_epochs=1).fit(digits[0]).history_[0]


@pytest.mark.parametrize("negatives", ["batch", "roll", "shuffle"])
def test_no_infonce_bound_exceeds_the_information_there_is(negatives):
    # Four images, again and again: nothing can tell more about them than which one it is, log 4 nats.
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(4, 1, 8, 8)), 64, axis=0).astype(np.float32)
    dim = small(negatives=negatives, max_epochs=12, batch_size=64, lr=5e-3, prior_weight=0, mi_units=32).fit(X)
    for name in ("local_bound", "global_bound"):
        assert 0.2 < max(epoch[name] for epoch in dim.history_) < np.log(4)


@pytest.mark.filterwarnings("ignore:local_weight, global_weight and coordinate_weight are all 0")
def test_the_prior_discriminator_is_an_adversary(digits):
    # One that helped the encoder would see its own loss fall together with the encoder's.
    dim = small(local_weight=0, global_weight=0, prior_weight=1.0, max_epochs=1).fit(digits[0])
    model = dim.net_.module_
    images = torch.randn(64, 1, 8, 8)
    embedding, _ = model.encoder(images)
    generator = torch.Generator().manual_seed(0)
    weights = [*model.prior.parameters()]
    to_tell_apart = torch.autograd.grad(
        model.prior_discriminator_loss(embedding, generator), embedding, allow_unused=True
    )
    assert to_tell_apart == (None,)
    fooling = torch.autograd.grad(model.prior_loss(embedding), embedding, retain_graph=True)[0]
    step = embedding - 0.1 * fooling / fooling.norm()
    generator.manual_seed(0)
    before = model.prior_discriminator_loss(embedding, generator)
    generator.manual_seed(0)
    after = model.prior_discriminator_loss(step, generator)
    assert after > before
    assert all(weight.requires_grad for weight in weights)


def distance_from_prior(Z, prior):
    """Largest gap between the distribution functions of the embedding's dimensions and the prior's, averaged."""
    distribution = {"uniform": logistic, "normal": norm}[prior]
    return np.mean([kstest(dimension, distribution.cdf).statistic for dimension in Z.T.astype(float)])


@pytest.mark.parametrize(("prior", "prior_weight"), [("uniform", 10.0), ("normal", 1.0)])
def test_the_prior_pulls_the_embedding_to_its_distribution(digits, prior, prior_weight):
    def distance(prior_weight):
        weights = {"prior_weight": prior_weight, "global_weight": 0}
        dim = small(n_components=4, prior=prior, **weights, max_epochs=40, batch_size=50)
        return distance_from_prior(dim.fit_transform(digits[0]), prior)

    matched, unmatched = distance(prior_weight), distance(0.0)
    assert matched < 0.1
    assert matched < 0.6 * unmatched


@pytest.mark.parametrize("prior_weight", [3.0, 10.0])
def test_a_strong_prior_does_not_distort_the_embedding(prior_weight):
    X, _ = load_digits(return_X_y=True)
    dim = DIMTransformer(8, prior_weight=prior_weight, mi_units=32, batch_size=64, max_epochs=30, random_state=0)
    # Encoder and discriminator circled the prior, out to 0.25 and 0.36.
    assert distance_from_prior(dim.fit(X[:600]).transform(X[600:]), "uniform") < 0.12


def test_untrained_encoder_is_the_start_of_training(digits):
    X, _ = digits
    dim = small(max_epochs=0).fit(X)
    assert dim.history_ == []
    assert dim.n_iter_ == 0
    untrained = dim.transform(X)
    trained = dim.set_params(max_epochs=2, warm_start=True).fit(X).transform(X)
    assert np.array_equal(trained, small().fit_transform(X))
    assert not np.array_equal(trained, untrained)


def test_same_random_state_same_bits_and_another_seed_others(digits):
    X, _ = digits
    first = small().fit_transform(X)
    assert np.array_equal(first, small().fit_transform(X))
    assert not np.array_equal(first, small(random_state=1).fit_transform(X))


def test_global_generators_stay_untouched(digits, monkeypatch):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    before = states()
    dim = small().fit(digits[0])
    dim.transform(digits[0])
    dim.partial_fit(digits[0])
    small(encoder=OwnEncoder).fit(digits[0])
    copy.deepcopy(dim)
    assert states() == before
    assert reseeded == []


def test_number_of_threads_is_given_back(digits):
    before = torch.get_num_threads()
    small().fit_transform(digits[0])
    assert torch.get_num_threads() == before


def test_transform_does_not_depend_on_the_batch(colour_images):
    X, _ = colour_images
    for encoder in ("dcgan", "stride1"):
        dim = small(encoder=encoder, max_epochs=1).fit(X)
        whole = dim.transform(np.concatenate([X, X, X]))
        assert np.array_equal(whole[:60], whole[60:120])
        assert np.array_equal(whole[:60], dim.transform(X))
        assert np.array_equal(whole[:60], np.concatenate([dim.transform(X[i : i + 7]) for i in range(0, 60, 7)]))
        assert np.array_equal(whole[:60][::-1], dim.transform(X[::-1]))


def test_transform_gives_kernels_batches_of_one_size(digits):
    sizes = []

    class Sized(nn.Module):
        def __init__(self, image_shape, n_components):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3, 2), nn.Linear(36, n_components)

        def forward(self, images):
            sizes.append(len(images))
            features = self.conv(images)
            return self.linear(features.flatten(1)), features

    X, _ = digits
    dim = DIMTransformer(4, encoder=Sized, max_epochs=0, random_state=0).fit(X)
    sizes.clear()
    # Kernels are chosen by the size of a batch, and differ in the last bit.
    for n in (1, 5, len(X)):
        assert len(dim.transform(X[:n])) == n
    assert len(set(sizes)) == 1


def test_transform_leaves_nothing_in_memory_of_the_batch(digits):
    dim = small().fit(digits[0])
    before = {name: value.clone() for name, value in dim.encoder_.state_dict().items()}
    dim.transform(digits[0])
    assert not dim.encoder_.training
    assert all(torch.equal(before[name], value) for name, value in dim.encoder_.state_dict().items())


def test_output_layers(digits):
    dim = small().fit(digits[0])
    widths = {"embedding": 8, "hidden": 1024, "features": 128 * 2 * 2}
    for layer, width in widths.items():
        dim.set_params(output_layer=layer)
        assert dim.transform(digits[0]).shape == (300, width)
        assert len(dim.get_feature_names_out()) == width
    with pytest.raises(ValueError, match="output_layer='hidden' is not a layer of the encoder Stride1Encoder"):
        small(encoder="stride1", output_layer="hidden").fit(digits[0])


def test_the_map_that_critics_see_is_no_output_layer(digits):
    dim = small(max_epochs=0).fit(digits[0]).set_params(output_layer="local")
    with pytest.raises(
        ValueError, match=r"output_layer='local' is not a layer .* \['embedding', 'features', 'hidden'\]"
    ):
        dim.transform(digits[0])


def test_names_of_a_layer_that_there_is_not(digits):
    dim = small(encoder="stride1", max_epochs=0).fit(digits[0]).set_params(output_layer="hidden")
    with pytest.raises(ValueError, match="output_layer='hidden' is not a layer of the encoder Stride1Encoder"):
        dim.get_feature_names_out()
    with pytest.raises(NotFittedError):
        small().get_feature_names_out()


@pytest.mark.parametrize(
    ("n", "batch_size", "size"), [(65, 64, 33), (3, 2, 2), (5, 2, 2), (2, 128, 2), (129, 64, 43), (41, 10, 9)]
)
def test_batches_have_one_size_and_together_every_image(digits, n, batch_size, size):
    X, _ = digits
    seen = []

    class Watched(OwnEncoder):
        def forward(self, images):
            if self.training:
                seen.append(images.detach().flatten(1))
            return super().forward(images)

    dim = small(encoder=Watched, batch_size=batch_size, max_epochs=1).fit(X[:n])
    assert {len(images) for images in seen} == {size}
    assert len(seen) == -(-n // batch_size)
    assert all(len(images.unique(dim=0)) == size for images in seen)
    assert len(torch.cat(seen).unique(dim=0)) == n
    record = dim.history_[0]
    assert record["images_per_second"] * record["seconds"] == pytest.approx(size * len(seen))


def test_images_are_shuffled_anew_each_epoch(digits):
    seen = []

    class Watched(OwnEncoder):
        def forward(self, images):
            if self.training:
                seen.append(images.detach().flatten(1).sum(1))
            return super().forward(images)

    dim = small(encoder=Watched, batch_size=100, max_epochs=2).fit(digits[0])
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    in_order = torch.from_numpy((digits[0].astype(np.float32) - dim.mean_[0]) / dim.std_[0]).sum(1)
    for epoch in (first, second):
        assert not torch.allclose(epoch, in_order, atol=1e-2)
        torch.testing.assert_close(epoch.sort().values, in_order.sort().values, rtol=1e-3, atol=1e-3)
    assert not torch.equal(first, second)


def test_warm_start_goes_on(digits):
    X, _ = digits
    dim = small(warm_start=True).fit(X)
    losses = list(dim.loss_curve_)
    net = dim.net_
    dim.fit(X)
    assert dim.net_ is net
    assert dim.n_iter_ == 4
    assert dim.loss_curve_[:2] == losses
    assert dim.loss_curve_[2] < losses[0]
    cold = small().fit(X)
    assert cold.fit(X).n_iter_ == 2


@pytest.mark.parametrize("go_on", [DIMTransformer.partial_fit, DIMTransformer.fit])
def test_going_on_standardises_as_the_first_call_did(digits, go_on):
    X, _ = digits
    dim = small(warm_start=True, max_epochs=1).fit(X[:100])
    mean, std = dim.mean_.copy(), dim.std_.copy()
    go_on(dim, 2 * X[100:200] + 3)
    assert np.array_equal(dim.mean_, mean)
    assert np.array_equal(dim.std_, std)


def test_partial_fit_adds_an_epoch_each_time(digits):
    X, _ = digits
    dim = small()
    for n in (1, 2, 3):
        dim.partial_fit(X[100 * (n - 1) : 100 * n])
        assert dim.n_iter_ == n
    assert dim.fit(X).n_iter_ == 2


def test_the_prior_alone_is_warned_about(digits):
    with pytest.warns(
        UserWarning, match="local_weight, global_weight and coordinate_weight are all 0: the prior alone"
    ):
        small(local_weight=0, global_weight=0, max_epochs=1).fit(digits[0])


def test_going_on_takes_up_new_weights_and_learning_rate(digits):
    X, _ = digits
    dim = small(global_weight=0, prior_weight=0).fit(X)
    net = dim.net_
    dim.set_params(local_weight=3.0, lr=1e-5).partial_fit(X)
    assert dim.net_ is net
    assert dim.history_[-1]["loss"] == pytest.approx(3 * dim.history_[-1]["local"], rel=1e-5)
    assert net.optimizer_.param_groups[0]["lr"] == 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"global_weight": 0},
        {"coordinate_weight": 1.0},
        {"mi_estimator": "jsd"},
        {"discriminator": "concat"},
        {"mi_units": 16},
        {"negatives": "roll"},
        {"local_samples": 2},
        {"prior": "normal"},
        {"prior_matching": "noise"},
        {"augmentation": "standard"},
        {"occlusion": True},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_going_on_with_another_model_warns_and_trains_it(digits, change):
    X, _ = digits
    same, again, other = (small(precision="float32", max_epochs=1).fit(X[:64]) for _ in range(3))
    for dim in (same, again):
        dim.partial_fit(X[:64])  # A warning would be an error.
    assert same.loss_curve_ == again.loss_curve_
    with pytest.warns(UserWarning, match="new discriminators and a new optimizer"):
        other.set_params(**change).partial_fit(X[:64])
    assert other.loss_curve_[0] == same.loss_curve_[0]
    assert other.loss_curve_[1] != same.loss_curve_[1]
    assert set(other.discriminators_) == {
        name for name in ("local", "global", "prior", "coordinate") if getattr(other, f"{name}_weight")
    } - ({"prior"} if other.prior_matching == "noise" else set())


def test_going_on_with_stronger_noise_warns(digits):
    dim = small(prior_matching="noise", max_epochs=1).fit(digits[0]).set_params(prior_weight=0.5)
    with pytest.warns(UserWarning, match="new discriminators and a new optimizer"):
        dim.partial_fit(digits[0])


@pytest.mark.parametrize("change", [{"n_components": 9}, {"encoder": "stride1"}, {"image_shape": (1, 4, 16)}])
def test_going_on_with_another_encoder_is_refused(digits, change):
    dim = small().fit(digits[0]).set_params(**change)
    with pytest.raises(ValueError, match="Training cannot go on"):
        dim.partial_fit(digits[0])


def test_a_weight_may_be_any_number_within_float64(digits):
    whole, decimal = (small(local_weight=weight, max_epochs=1).fit(digits[0]) for weight in (10**30, 1e30))
    assert whole.loss_curve_ == decimal.loss_curve_


def test_bfloat16_is_really_used_and_differs_little(digits):
    X, _ = digits
    exact = small(precision="float32", lr_schedule="constant", max_epochs=1).fit(X)
    rounded = clone(exact).set_params(precision="bfloat16").fit(X)
    for dim in (exact, rounded):
        assert dim.transform(X).dtype == np.float32
        assert all(weight.dtype == torch.float32 for weight in dim.encoder_.parameters())
    assert exact.loss_curve_ != rounded.loss_curve_
    assert exact.loss_curve_[0] == pytest.approx(rounded.loss_curve_[0], rel=0.05)


def test_without_a_random_state_numpys_global_generator_draws_the_seed(digits):
    def fitted():
        return small(random_state=None, max_epochs=0).fit_transform(digits[0])

    assert not np.array_equal(fitted(), fitted())
    numpys = check_random_state(None)
    state = numpys.get_state()
    embeddings = []
    for _ in range(2):
        numpys.set_state(state)
        embeddings.append(fitted())
    assert np.array_equal(*embeddings)


@pytest.mark.parametrize("n_steps", [1, 2, 15])
def test_learning_rate_schedule(digits, n_steps, monkeypatch):
    rates = []
    step = DIMNet.train_step

    def record(self, batch, **kwargs):
        rates.append((self.optimizer_.param_groups[0]["lr"], self.prior_optimizer_.param_groups[0]["lr"]))
        return step(self, batch, **kwargs)

    monkeypatch.setattr(DIMNet, "train_step", record)
    dim = small(lr=0.01, max_epochs=1, batch_size=20, lr_schedule="constant").fit(digits[0][: 20 * n_steps])
    assert rates == [(0.01, 0.01)] * n_steps
    rates.clear()
    dim.set_params(lr_schedule="one_cycle").fit(digits[0][: 20 * n_steps])
    encoder_rates = [rate for rate, _ in rates]
    assert len(rates) == n_steps
    assert all(prior_rate == rate for rate, prior_rate in rates)
    assert max(encoder_rates) <= 0.01
    if n_steps == 15:
        top = int(np.argmax(encoder_rates))
        assert max(encoder_rates) > 0.009
        assert 0 < top < 8
        assert encoder_rates[: top + 1] == sorted(encoder_rates[: top + 1])
        assert encoder_rates[top:] == sorted(encoder_rates[top:], reverse=True)
        assert encoder_rates[-1] < 0.001


@pytest.mark.parametrize("as_instance", [False, True])
def test_own_encoder(digits, as_instance):
    X, _ = digits
    encoder = OwnEncoder
    if as_instance:
        torch.manual_seed(0)
        encoder = OwnEncoder((1, 8, 8), 8)
        encoder(torch.zeros(2, 1, 8, 8))
        weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    dim = small(encoder=encoder).fit(X)
    assert isinstance(dim.encoder_, OwnEncoder)
    assert np.array_equal(dim.transform(X), clone(dim).fit_transform(X))
    assert dim.set_params(output_layer="features").transform(X).shape == (300, 12 * 4 * 4)
    if as_instance:
        assert dim.encoder_ is not encoder
        assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in weights.items())


def test_a_subclass_of_a_built_in_encoder_is_read_through_its_own_forward(digits):
    class Sevens(DCGANEncoder):
        def forward(self, images):
            embedding, features = super().forward(images)
            return 0 * embedding + 7, features

    assert (small(encoder=Sevens, max_epochs=0).fit_transform(digits[0]) == 7).all()


def test_an_encoder_with_other_than_2d_convolutions(digits):
    class Volume(OwnEncoder):
        def __init__(self, image_shape, n_components):
            super().__init__(image_shape, n_components)
            self.deep = nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, images):
            return super().forward(self.deep(images[:, None])[:, 0])

    # In float32, because torch's 3-D convolution in bfloat16 now and then gives NaN for finite images on some CPUs.
    assert np.isfinite(small(encoder=Volume, max_epochs=1, precision="float32").fit_transform(digits[0])).all()


def test_an_encoder_that_copies_a_fitted_transformer(digits):
    teacher = small().fit(digits[0])

    class Student(OwnEncoder):
        def __init__(self, image_shape, n_components):
            super().__init__(image_shape, n_components)
            self.teacher = copy.deepcopy(teacher).encoder_

    assert np.isfinite(small(encoder=Student, max_epochs=1).fit_transform(digits[0])).all()


def test_encoder_and_critics_start_from_different_numbers(digits):
    dim = small(max_epochs=0).fit(digits[0])
    first, other = (
        next(module.parameters()).detach().flatten()[:256] for module in (dim.encoder_, dim.discriminators_["local"])
    )
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.3


@pytest.mark.parametrize("n_features", [100, 101, 1024, 3071, 3072])
def test_wide_rows(n_features):
    X = np.random.default_rng(0).random((4, n_features))
    dim = small(max_epochs=1, mi_units=8, image_shape=None if n_features != 3072 else (1, 1, 3072))
    assert np.isfinite(dim.fit_transform(X)).all()


def test_early_stopping_ends_training_and_keeps_it(digits):
    stop = EarlyStopping(monitor="train_loss", patience=2, threshold=10.0, threshold_mode="abs", sink=lambda _: None)
    dim = small(max_epochs=10, lr_schedule="constant", callbacks=[stop]).fit(digits[0])
    assert dim.n_iter_ == len(dim.history_) < 10
    assert np.isfinite(dim.transform(digits[0])).all()
    assert clone(dim).get_params()["callbacks"] is not None


def test_epoch_and_batch_callbacks(digits):
    events = []

    class Watcher(Callback):
        def on_train_begin(self, net, **kwargs):
            events.append("train")

        def on_epoch_end(self, net, **kwargs):
            events.append(("epoch", net.history[-1, "train_loss"], len(net.history[-1]["batches"])))

    class BatchWatcher(Watcher):
        def on_batch_end(self, net, batch, loss, **kwargs):
            images, y = batch
            assert y is None
            events.append((len(images), net.history[-1, "batches", -1, "train_loss"] == loss.item()))

    dim = small(callbacks=[Watcher()]).fit(digits[0])
    assert events == ["train", *(("epoch", loss, 1) for loss in dim.loss_curve_)]
    events.clear()
    dim.set_params(callbacks=[("mine", BatchWatcher())], max_epochs=1).fit(digits[0])
    assert events == ["train", *[(100, True)] * 3, ("epoch", dim.loss_curve_[0], 3)]


def test_checkpoint_and_passthrough_scoring(digits, tmp_path):
    scoring = PassthroughScoring("train_loss", on_train=True)
    callbacks = [scoring, Checkpoint(dirname=tmp_path, monitor="train_loss_best", f_history=None)]
    dim = small(callbacks=callbacks).fit(digits[0])
    assert (tmp_path / "params.pt").is_file()
    assert dim.net_.history[-1]["train_loss_best"]


def test_gradients_can_be_clipped(digits):
    free = small(max_epochs=1).fit(digits[0])
    still = clone(free).set_params(callbacks=[GradientNormClipping(1e-12)]).fit(digits[0])
    assert not np.array_equal(free.transform(digits[0]), still.transform(digits[0]))


def test_learning_rate_scheduler_of_skorch(digits):
    halve = LRScheduler(policy="StepLR", step_size=1, gamma=0.5)
    with pytest.raises(ValueError, match="LRScheduler in callbacks needs lr_schedule='constant'"):
        small(callbacks=[halve]).fit(digits[0])
    dim = small(callbacks=[halve], lr_schedule="constant", lr=0.01, max_epochs=3).fit(digits[0])
    assert dim.net_.optimizer_.param_groups[0]["lr"] == pytest.approx(0.01 / 8)
    plain = clone(dim).set_params(callbacks=None).fit(digits[0])
    assert len(pickle.dumps(dim)) < len(pickle.dumps(plain)) + 5000


def test_callbacks_that_are_none_are_refused(digits):
    with pytest.raises(ValueError, match="callbacks must be a list of skorch"):
        small(callbacks=[3]).fit(digits[0])


@pytest.mark.parametrize("hook", ["on_batch_end", "on_epoch_end"])
def test_interrupts_by_others_than_skorch_propagate(digits, hook):
    def interrupt(self, net, **kwargs):
        raise KeyboardInterrupt

    Interrupt = type("Interrupt", (Callback,), {hook: interrupt})

    dim = small(callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        dim.fit(digits[0])
    assert not hasattr(dim, "encoder_")


def test_a_bad_last_step_is_an_error_too(digits):
    with pytest.raises(FloatingPointError, match="embeddings are not finite after the last step"):
        small(lr=1e12, lr_schedule="constant", max_epochs=1, batch_size=300, prior_weight=0).fit(digits[0])


@pytest.mark.parametrize(
    ("n_failures", "error"),
    [
        (1, torch.OutOfMemoryError("CUDA out of memory.")),
        (3, torch.OutOfMemoryError("CUDA out of memory.")),
        (1, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        (1, RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")),
        (1, RuntimeError("CUDA error: out of memory")),
    ],
)
def test_transform_shrinks_its_batch_when_memory_is_short(digits, monkeypatch, n_failures, error):
    X, _ = digits
    dim = small().fit(X)
    expected = dim.transform(X)
    failures = [error] * n_failures
    sizes = []

    def short_of_memory(encoder, images):
        sizes.append(len(images))
        if failures:
            raise failures.pop()
        return read_layers(encoder, images)

    monkeypatch.setattr("skdim.inference.read_layers", short_of_memory)
    np.testing.assert_allclose(dim.transform(X), expected, rtol=1e-5, atol=1e-6)
    assert sizes[: n_failures + 1] == [128 >> i for i in range(n_failures + 1)]
    failures = [RuntimeError("another error")]
    with pytest.raises(RuntimeError, match="another error"):
        dim.transform(X)


def test_transform_shrinks_its_batch_when_memory_is_short_for_its_check(digits, monkeypatch):
    dim = small().fit(digits[0])
    expected = dim.transform(digits[0])
    shapes = []
    isfinite = torch.Tensor.isfinite

    def short_of_memory(values):
        shapes.append(values.shape)
        if shapes.count(values.shape) == 1 and len(values) == 128:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return isfinite(values)

    monkeypatch.setattr(torch.Tensor, "isfinite", short_of_memory)
    np.testing.assert_allclose(dim.transform(digits[0]), expected, rtol=1e-5, atol=1e-6)
    assert (64, dim.n_components) in shapes


def test_divergence_is_an_error_and_the_last_fit_survives(digits):
    X, _ = digits
    dim = small(prior_weight=0).fit(X)
    expected = dim.transform(X)
    broken = X.copy()
    with pytest.raises(FloatingPointError, match=r"The loss term '\w+' is nan in epoch \d"):
        dim.set_params(lr=1e30, mi_estimator="dv", lr_schedule="constant", max_epochs=5).fit(broken)
    assert np.array_equal(dim.transform(X), expected)


def test_keyboard_interrupt_propagates_and_the_last_fit_survives(digits, monkeypatch):
    X, _ = digits
    dim = small().fit(X)
    expected = dim.transform(X)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("skdim.net.DIMNet.train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dim.fit(X)
    assert np.array_equal(dim.transform(X), expected)


@pytest.mark.filterwarnings("ignore:Training goes on from the encoder's weights")
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_an_error_while_going_on_takes_nothing_away(digits, monkeypatch, error, loaded):
    X, _ = digits
    dim = small(lr_schedule="constant").fit(X)
    expected = (
        copy.deepcopy(dim).partial_fit(X).transform(X) if loaded else clone(dim).fit(X).partial_fit(X).transform(X)
    )
    before = dim.transform(X)
    if loaded:
        dim = copy.deepcopy(dim)
    step = DIMNet.train_step
    steps = []

    def break_off(self, batch, **kwargs):
        steps.append(step(self, batch, **kwargs))
        if len(steps) == 2:
            raise error
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(DIMNet, "train_step", break_off)
        with pytest.raises(error):
            dim.partial_fit(X)
    assert not dim.encoder_.training
    assert dim.n_iter_ == 2
    assert np.array_equal(dim.transform(X), before)
    assert np.array_equal(dim.partial_fit(X).transform(X), expected)


def test_to_moves_the_encoder(digits):
    dim = small().fit(digits[0])
    expected = dim.transform(digits[0])
    assert dim.to("cpu") is dim
    assert np.array_equal(dim.transform(digits[0]), expected)
    with pytest.raises(ValueError, match="device must be"):
        dim.to("nowhere")


def test_to_moves_the_discriminators_too(digits, monkeypatch):
    dim = small(global_weight=0.5, coordinate_weight=0.1).fit(digits[0])
    # A device that every machine has, in place of CUDA.
    monkeypatch.setattr("skdim.transformer.resolve_device", torch.device)
    dim.to("meta")
    assert dim.discriminators_.keys() == {"local", "global", "prior", "coordinate"}
    for module in (dim.encoder_, *dim.discriminators_.values()):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Training goes on from the encoder's weights:UserWarning")
def test_scores_and_training_go_on_after_a_move(digits):
    X, _ = digits
    pytest.importorskip("matplotlib").use("Agg")
    from skdim.displays import ScoreMapDisplay

    dim = small(device="cuda", precision="float32").fit(X)
    expected = ScoreMapDisplay.from_estimator(dim, X[:20]).scores
    moved = ScoreMapDisplay.from_estimator(dim.to("cpu"), X[:20]).scores
    np.testing.assert_allclose(moved, expected, rtol=1e-2, atol=1e-2)
    # There and back again nothing has changed, so the same discriminators go on.
    before = dim.net_
    dim.to("cuda").partial_fit(X)
    assert dim.net_ is before
    dim.to("cpu").set_params(device="cpu").partial_fit(X)
    assert dim.net_ is not before
    assert dim.device_.type == "cpu"
    assert np.isfinite(ScoreMapDisplay.from_estimator(dim, X[:20]).scores).all()


@pytest.mark.parametrize(("visible", "expected"), [("", "cpu 0"), pytest.param("0", "cuda:0 1", marks=pytest.mark.gpu)])
def test_auto_is_of_the_devices_that_the_environment_shows(visible, expected):
    # torch reads the variable once, so each value needs a process of its own.
    code = (
        "import numpy, torch, skdim\n"
        "dim = skdim.DIMTransformer(n_components=2, max_epochs=0).fit(numpy.eye(16))\n"
        "print(dim.device_, torch.cuda.device_count())"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == expected


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(digits):
    X, _ = digits
    params = {"precision": "float32", "max_epochs": 0}
    on_cuda = small(device="cuda", **params).fit(X)
    assert on_cuda.device_.type == "cuda"
    np.testing.assert_allclose(
        on_cuda.transform(X), small(device="cpu", **params).fit_transform(X), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(on_cuda.transform(X), on_cuda.to("cpu").transform(X), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_training_on_cuda(digits):
    X, _ = digits
    dim = small(device="auto", max_epochs=6).fit(X)
    assert dim.device_.type == "cuda"
    assert dim.loss_curve_[-1] < dim.loss_curve_[0]
    assert np.array_equal(dim.transform(X), dim.transform(X))


@pytest.mark.gpu
@pytest.mark.parametrize("is_recorded", [False, True])
def test_the_host_waits_for_the_device_as_often_in_few_steps_as_in_many(digits, monkeypatch, is_recorded):
    monkeypatch.setattr("skdim.net.MIN_RECORDED_STEPS", 1 if is_recorded else 10**9)

    def waits(n_images):
        dim = small(device="cuda", batch_size=16)
        # Around the mode as well, of which torch warns that it is a prototype.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.cuda.set_sync_debug_mode("warn")
                dim.fit(digits[0][:n_images])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    waits(96)  # What is set up on the first call may wait.
    assert 0 < waits(96) == waits(192)


def test_going_on_needs_two_images_too(digits):
    dim = small().fit(digits[0])
    for method in (dim.partial_fit, dim.set_params(warm_start=True).fit):
        with pytest.raises(ValueError, match=r"Found array with 1 sample\(s\) .* while a minimum of 2 is required"):
            method(digits[0][:1])


class SeesGradients(Callback):
    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.names = [name for name, _ in named_parameters]


def test_gradient_callbacks_see_what_their_loss_trains(digits):
    seen = SeesGradients()
    dim = small(callbacks=[seen], max_epochs=1).fit(digits[0])
    own = {name for name, _ in dim.net_.module_.named_parameters() if not name.startswith("prior.")}
    assert set(seen.names) == own
    assert dim.net_.module_.prior is not None


class FreezeAndFail(Callback):
    def on_epoch_end(self, net, **kwargs):
        for parameter in net.module_.parameters():
            parameter.requires_grad_(False)
        raise RuntimeError("fail here")


def test_an_error_gives_frozen_weights_back_their_gradients(digits):
    dim = small().fit(digits[0]).set_params(warm_start=True, callbacks=[FreezeAndFail()])
    with pytest.raises(RuntimeError, match="fail here"):
        dim.fit(digits[0])
    assert all(parameter.requires_grad for parameter in dim.encoder_.parameters())


def test_batch_norms_go_on_learning_where_training_goes_on(digits):
    dim = small().fit(digits[0])
    dim.transform(digits[0])
    norms = [module for module in dim.encoder_.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    dim.partial_fit(digits[0])
    assert norms
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))


class Betas(Callback):
    def __init__(self):
        self.seen = set()

    def on_batch_end(self, net, **kwargs):
        self.seen |= {group["betas"] for each in (net.optimizer_, net.prior_optimizer_) for group in each.param_groups}


def test_the_schedule_moves_nothing_but_the_learning_rate(digits):
    betas = Betas()
    small(callbacks=[betas]).fit(digits[0])
    assert betas.seen == {(0.9, 0.999)}


@pytest.mark.filterwarnings("ignore:All images are constant")
def test_constant_images_may_be_negative():
    X = np.full((20, 64), -0.1, dtype=np.float32)
    X[::7] = np.nextafter(np.float32(-0.1), np.float32(-1))
    assert np.isinf(DIMTransformer(4, max_epochs=0).fit(X).std_).all()


def test_embeddings_that_are_not_finite_are_found_in_any_batch_and_the_first_is_named():
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(
        np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    )
    X = np.zeros((300, 64), dtype=np.float32)
    X[[5, 7]] = 3e38
    with pytest.raises(ValueError, match="embedding of image 5 of X is not finite"):
        dim.transform(X)


class Pixels(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.flatten(1)[:, :4], images


def test_images_far_from_zero_keep_their_digits():
    X = (300 + np.random.default_rng(0).normal(size=(40, 1, 8, 8)) / 128).astype(np.float32)
    dim = DIMTransformer(4, encoder=Pixels, max_epochs=0, random_state=0).fit(X)
    expected = (X[:, 0, 0, :4].astype(np.float64) - dim.mean_) / dim.std_
    np.testing.assert_allclose(dim.transform(X), expected, rtol=1e-5, atol=1e-6)
