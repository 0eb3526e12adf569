import copy
import functools
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from scipy.signal import convolve2d
from scipy.special import logsumexp
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch import NeuralNetClassifier
from skorch.callbacks import EarlyStopping, Freezer
from torch import nn

from skdim import DIMTransformer
from skdim.evaluation import (
    FineTunedClassifier,
    LinearProbe,
    MLPProbe,
    evaluate,
    knn_probe,
    knn_scorer,
    linear_probe_scorer,
    ms_ssim,
    mutual_information_bound,
    reconstruction_ms_ssim,
    retrieval_scorer,
    total_correlation_bound,
)
from skdim.evaluation.information import _bound
from skdim.evaluation.inputs import validation_split
from skdim.evaluation.networks import MLP, Samples, train
from skdim.evaluation.probes import PROBES


@pytest.fixture(scope="module")
def all_digits():
    return load_digits(return_X_y=True)


@pytest.fixture(scope="module")
def trained(all_digits):
    X, _ = all_digits
    return DIMTransformer(max_epochs=3, random_state=0).fit(X[:1000])


@pytest.fixture(scope="module")
def untrained(all_digits):
    X, _ = all_digits
    return DIMTransformer(max_epochs=0, random_state=0).fit(X[:1000])


# Probes


@parametrize_with_checks(
    [
        LinearProbe(device="cpu"),
        MLPProbe((20,), max_epochs=10, lr=0.02, batch_size=32, device="cpu"),
        FineTunedClassifier(DIMTransformer(4, max_epochs=0, random_state=0), max_epochs=10, lr=0.01, encoder_lr=1e-3),
    ]
)
def test_estimator_checks(estimator, check):
    check(estimator)


def objective(loss, C, W, b, Z, y):
    """What a linear model minimises, in float64."""
    scores, own = Z @ W.astype(np.float64).T + b, np.eye(10)[y]
    if loss == "log_loss":
        losses = logsumexp(scores, axis=1) - (scores * own).sum(axis=1)
    else:
        losses = (np.maximum(0, 1 - (2 * own - 1) * scores) ** 2).sum(axis=1)
    return 0.5 * (W.astype(np.float64) ** 2).sum() + C * losses.sum()


@pytest.mark.parametrize("loss", ["log_loss", "squared_hinge"])
@pytest.mark.parametrize("C", [1e-3, 0.1])
@pytest.mark.parametrize("n_samples", [1000, 25])  # of 64 features: fewer than samples, and more
def test_the_linear_probe_finds_the_solution_of_scikit_learn(all_digits, loss, C, n_samples):
    X, y = all_digits[0][:n_samples], all_digits[1][:n_samples]
    Z = StandardScaler().fit_transform(X)
    if loss == "log_loss":
        reference = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(Z, y)
    else:
        # liblinear regularises the intercept, by less the larger its scaling.
        reference = LinearSVC(C=C, dual=False, intercept_scaling=100, max_iter=5000, tol=1e-6).fit(Z, y)
    probe = LinearProbe(loss, Cs=[C], max_iter=2000).fit(X, y)
    values = [objective(loss, C, model.coef_, model.intercept_, Z, y) for model in (probe, reference)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    predicted = reference.predict(StandardScaler().fit(X).transform(all_digits[0][1000:]))
    assert np.mean(probe.predict(all_digits[0][1000:]) == predicted) > 0.995


@pytest.mark.parametrize("loss", ["log_loss", "squared_hinge"])
def test_the_linear_probe_does_not_depend_on_the_scale_of_features(all_digits, loss):
    X, y = all_digits
    predicted = LinearProbe(loss, random_state=0).fit(X[:300], y[:300]).predict(X[300:])
    for scale in (2.0**-110, 2.0**110):
        probe = LinearProbe(loss, random_state=0).fit(X[:300] * scale, y[:300])
        assert np.array_equal(probe.predict(X[300:] * scale), predicted)


def test_the_linear_probe_chooses_C_on_training_samples_only():
    rng = np.random.default_rng(0)
    # Many features tell the class, with noise: weak regularisation learns the noise by heart.
    y = rng.integers(0, 2, 1000)
    X = rng.standard_normal((1000, 400)) + 0.1 * y[:, None]
    probe = LinearProbe(random_state=0).fit(X[:400], y[:400])
    assert probe.C_ < 0.1
    weak = LinearProbe(Cs=[1e4], max_iter=1000, random_state=0).fit(X[:400], y[:400])
    assert probe.score(X[400:], y[400:]) > weak.score(X[400:], y[400:]) + 0.02


@pytest.mark.parametrize("n_classes", [2, 10])
def test_the_linear_probe_tells_probabilities(digits, n_classes):
    X, y = digits[0][digits[1] < n_classes], digits[1][digits[1] < n_classes]
    probe = LinearProbe(random_state=0).fit(X, y)
    probabilities, scores = probe.predict_proba(X), probe.decision_function(X).astype(np.float64)
    assert probabilities.shape == (len(X), n_classes)
    assert probabilities.dtype == np.float64
    expected = np.stack([1 / (1 + np.exp(scores)), 1 / (1 + np.exp(-scores))], axis=1)
    if n_classes > 2:
        expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    losses = cross_val_score(LinearProbe(Cs=[0.1]), X, y, scoring="neg_log_loss", cv=2, error_score="raise")
    assert (losses > -np.log(n_classes) / 2).all()  # half of chance


def test_a_support_vector_machine_tells_no_probabilities(digits):
    assert not hasattr(LinearProbe("squared_hinge").fit(*digits), "predict_proba")


def test_probes_do_not_care_for_the_scale_of_features(all_digits):
    X, y = all_digits
    scaled = (X * 1e-4 * np.arange(1, 65)) + 3
    for probe in (LinearProbe(Cs=[1e-2]), MLPProbe(random_state=0), knn_probe()):
        accuracies = [clone(probe).fit(V[:500], y[:500]).score(V[500:], y[500:]) for V in (X, scaled)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
        assert accuracies[0] > 0.8


def test_the_mlp_probe_is_as_good_as_that_of_scikit_learn(all_digits):
    X, y = all_digits
    reference = make_pipeline(StandardScaler(), MLPClassifier((200,), early_stopping=True, random_state=0))
    expected = reference.fit(X[:1000], y[:1000]).score(X[1000:], y[1000:])
    assert MLPProbe(random_state=0).fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > expected - 0.015


def test_the_mlp_probe_stops_early_and_keeps_the_best_epoch():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((200, 50)), rng.integers(0, 2, 200)  # nothing to learn
    probe = MLPProbe(lr=0.01, patience=3, batch_size=8, random_state=0).fit(X, y)
    losses = [epoch["valid_loss"] for epoch in probe.history_]
    assert probe.n_iter_ == len(losses) == 1 + np.argmin(losses) + 3
    assert all(set(epoch) == {"train_loss", "valid_loss", "valid_acc", "dur"} for epoch in probe.history_)
    again = MLPProbe(lr=0.01, max_epochs=int(1 + np.argmin(losses)), batch_size=8, random_state=0).fit(X, y)
    assert np.array_equal(probe.predict_proba(X), again.predict_proba(X))


def test_the_users_interrupt_of_a_probe_is_not_swallowed(digits, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("skdim.evaluation.networks._Batches.__iter__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        MLPProbe().fit(*digits)


@pytest.mark.parametrize(
    ("probe", "within"),
    [
        (LinearProbe(device="cpu", random_state=0), "skdim.evaluation.linear.minimize"),
        (MLPProbe(device="cpu", max_epochs=1, random_state=0), "skdim.evaluation.networks._Batches.__iter__"),
    ],
)
def test_a_fit_that_is_interrupted_leaves_a_probe_as_it_was(digits, monkeypatch, probe, within):
    X, y = digits
    probe, names = clone(probe), y.astype(str)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def interrupted_fit(X, y):
        with monkeypatch.context() as patch:
            patch.setattr(within, interrupt)
            with pytest.raises(KeyboardInterrupt):
                probe.fit(X, y)

    interrupted_fit(X, y)
    with pytest.raises(NotFittedError):
        probe.predict(X)
    predicted = probe.fit(X, y).predict(X)
    interrupted_fit(2 * X[:, :10] + 1, names)
    assert probe.n_features_in_ == X.shape[1]
    assert np.array_equal(probe.predict(X), predicted)
    with pytest.raises(ValueError, match="contains NaN"):
        probe.fit(np.full((9, 3), np.nan), y[:9])
    assert np.array_equal(probe.predict(X), predicted)


@pytest.mark.parametrize("probe", [LinearProbe(random_state=3), MLPProbe(max_epochs=3, random_state=3)])
def test_probes_repeat_themselves_and_leave_global_generators_alone(digits, probe):
    X, y = digits
    state = torch.random.get_rng_state()
    first, second = (clone(probe).fit(X, y) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    read = "decision_function" if isinstance(probe, LinearProbe) else "predict_proba"
    assert np.array_equal(getattr(first, read)(X), getattr(second, read)(X))


@pytest.mark.gpu
def test_figures_on_cuda_are_those_on_the_cpu(digits, trained):
    X, y = digits
    for probe in (LinearProbe(), LinearProbe("squared_hinge"), MLPProbe(dropout=0.0)):
        probe.set_params(random_state=0)
        scores = [
            clone(probe).set_params(device=d).fit(X[:200], y[:200]).score(X[200:], y[200:]) for d in ("cpu", "cuda")
        ]
        assert scores[0] == pytest.approx(scores[1], abs=0.05)
    x, noise = np.random.default_rng(0).standard_normal((2, 1000, 1))
    Z = np.hstack([x, 0.9 * x + 0.19**0.5 * noise])
    for bound in (functools.partial(mutual_information_bound, x), total_correlation_bound):
        on_cpu, on_cuda = (bound(Z, device=device, random_state=0) for device in ("cpu", "cuda"))
        assert on_cpu == pytest.approx(on_cuda, abs=0.15)
    dims = [copy.deepcopy(trained).to(device) for device in ("cpu", "cuda")]
    values = [reconstruction_ms_ssim(dim, X[:200], X[200:], random_state=0) for dim in dims]
    assert values[0] == pytest.approx(values[1], abs=0.05)


@pytest.mark.parametrize("probe", [MLPProbe(device="cpu", max_epochs=5, random_state=0), LinearProbe(random_state=0)])
def test_a_feature_that_is_constant_in_training_counts_for_nothing_in_a_probe(digits, probe):
    X, y = digits
    X_train, X_test, y_train = X[:200], X[200:], y[:200]
    # The mean of many such values is off by rounding, and so is their deviation from it.
    constant = np.full((len(X_train), 3), 0.1, dtype=np.float32)
    constant[::50, 2] = np.nextafter(np.float32(0.1), np.float32(1))
    probe = clone(probe).fit(np.hstack([X_train, constant]), y_train)
    outputs = getattr(probe, "decision_function" if isinstance(probe, LinearProbe) else "predict_proba")
    values = ([0.1, 0.1, 0.1], [255.0, -1e6, 0.2])
    low, high = (outputs(np.hstack([X_test, np.tile(each, (len(X_test), 1))])) for each in values)
    np.testing.assert_array_equal(low, high)


FEW_STEPS = {"device": "cpu", "max_epochs": 1, "random_state": 0}


@pytest.mark.parametrize(
    "work",
    [
        lambda X, y: MLPProbe(**FEW_STEPS).fit(X, y).predict(X),
        lambda X, y: LinearProbe(device="cpu", max_iter=1, random_state=0).fit(X, y).predict(X),
        lambda X, y: mutual_information_bound(X, X[:, :4], **FEW_STEPS),
    ],
    ids=["MLPProbe", "LinearProbe", "mutual_information_bound"],
)
def test_no_float64_copy_of_the_features_is_made(work):
    X, y = np.random.default_rng(0).random((2000, 8192), dtype=np.float32), np.arange(2000) % 2
    # What is imported on the first call takes memory too.
    work(X[:40], y[:40])
    tracemalloc.start()
    try:
        work(X, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One copy in float32, and float64 of a part of it at a time. torch's own memory is not traced.
    assert peak < 1.9 * X.nbytes


class OnDisk:
    """An array that is read a few rows at a time, and how many at most."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.n_most = 0

    def __getitem__(self, rows):
        values = self.array[rows]
        self.n_most = max(self.n_most, len(values))
        return values


def test_the_retrieval_score_reads_and_crops_a_few_images_at_a_time():
    X = np.random.default_rng(0).integers(0, 255, (600, 5, 128, 128), dtype=np.uint8)
    dim = DIMTransformer(n_components=2, max_epochs=0, mi_units=4, random_state=0).fit(X[:20])
    on_disk = OnDisk(X)
    assert retrieval_scorer(dim, on_disk) == retrieval_scorer(dim, X)
    assert on_disk.n_most <= 256


def test_a_pickled_mlp_probe_holds_nothing_of_torch_and_predicts_the_same(digits):
    X, y = digits
    probe = MLPProbe(max_epochs=2, random_state=0).fit(X, y)
    blob = pickle.dumps(probe)
    assert b"torch" not in blob
    assert np.array_equal(pickle.loads(blob).predict_proba(X), probe.predict_proba(X))


def test_labels_may_be_strings(digits):
    X, y = digits
    names = np.array([f"digit {label}" for label in y])
    for probe in (LinearProbe(), MLPProbe(max_epochs=20, random_state=0)):
        assert probe.fit(X, names).score(X, names) > 0.9


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (LinearProbe("hinge"), "loss"),
        (LinearProbe(Cs=[]), "Cs must be positive, finite numbers"),
        (LinearProbe(Cs=[0.0]), "Cs must be positive, finite numbers"),
        (LinearProbe(Cs=[np.nan]), "Cs must be positive, finite numbers"),
        (LinearProbe(Cs=["a"]), r"Cs must be positive, finite numbers, at least one, got \['a'\]"),
        (LinearProbe(Cs=[1, None]), "Cs must be positive, finite numbers"),
        (LinearProbe(Cs=[[1, 2]]), "Cs must be positive, finite numbers"),
        (LinearProbe(Cs=np.array(1.0)), "Cs must be positive, finite numbers"),
        (MLPProbe([20, 0]), r"hidden_layer_sizes must be positive integers, got \[20, 0\]"),
        (MLPProbe([2.5]), "hidden_layer_sizes must be positive integers"),
        (MLPProbe([True]), "hidden_layer_sizes must be positive integers"),
        (LinearProbe(device="tpu"), "device must be"),
        (MLPProbe(dropout=1.0), "dropout"),
    ],
)
def test_unfit_parameters_of_probes(digits, probe, message):
    with pytest.raises(ValueError, match=message):
        probe.fit(*digits)


# The table


def test_table_has_every_layer_beside_its_controls(all_digits, trained):
    X, y = all_digits
    parameters = trained.get_params()
    table = evaluate(trained, X[:500], y[:500], X[1000:], y[1000:], probes=["linear", "knn"])
    assert list(table.columns) == ["features", "layer", "width", "linear", "knn"]
    assert list(table["features"]) == ["raw pixels", "PCA", *["untrained encoder"] * 3, *["Deep InfoMax"] * 3]
    assert list(table["width"]) == [64, 64, *[64, 1024, 512] * 2]
    assert list(table["layer"][2:]) == ["embedding", "hidden", "features"] * 2
    assert trained.get_params() == parameters
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    expected = LinearProbe(random_state=seed).fit(trained.transform(X[:500]), y[:500])
    row = table[(table["features"] == "Deep InfoMax") & (table["layer"] == "embedding")].iloc[0]
    assert row["linear"] == pytest.approx(expected.score(trained.transform(X[1000:]), y[1000:]))


def test_few_labels_get_few_components(all_digits):
    X, y = all_digits
    dim = DIMTransformer(64, max_epochs=0, random_state=0).fit(X[:60])
    table = evaluate(dim, X[:60], y[:60], X[1000:], y[1000:], probes=["linear"], layers=["embedding"])
    pixels, pca = (table[table["features"] == name].iloc[0] for name in ("raw pixels", "PCA"))
    assert pca["width"] == 15
    assert pca["linear"] > pixels["linear"] - 0.1


def test_table_of_all_probes_in_any_layout(colour_images):
    X, y = colour_images
    dim = DIMTransformer(8, max_epochs=1, random_state=0).set_output(transform="pandas")
    dim.fit(X.transpose(0, 2, 3, 1))
    table = evaluate(dim, X[:40], y[:40], X[40:], y[40:], layers=["embedding"])
    assert list(table["width"]) == [360, 8, 8, 8]
    assert ((table[["linear", "svm", "mlp", "knn", "classifier"]] >= 0).all()).all()
    assert table["linear"].iloc[0] > 0.9  # the colour tells the class


def test_a_table_warns_once_of_labels_in_a_column(digits, trained):
    X, y = digits
    params = {"probes": ["linear", "knn"], "layers": ["embedding"]}
    with pytest.warns(DataConversionWarning) as warnings:
        table = evaluate(trained, X, y[:, np.newaxis], X, y[:, np.newaxis], **params)
    assert len(warnings) == 2  # of the labels for training and for testing
    assert table.equals(evaluate(trained, X, y, X, y, **params))


def test_table_without_pandas_is_a_list_of_dicts(digits, trained, monkeypatch):
    X, y = digits
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = evaluate(trained, X[:200], y[:200], X[200:], y[200:], probes=["knn"], layers=["embedding"])
    assert [row["features"] for row in rows] == ["raw pixels", "PCA", "untrained encoder", "Deep InfoMax"]
    assert all(0 <= row["knn"] <= 1 for row in rows)


def test_the_untrained_encoder_of_a_table_is_untrained(digits, tmp_path):
    X, y = digits
    callbacks = [EarlyStopping(monitor="train_loss", load_best=True)]
    params = {"n_components": 8, "max_epochs": 2, "random_state": 0, "lr_schedule": "constant"}
    dim = DIMTransformer(**params, checkpoint_dir=tmp_path, callbacks=callbacks).fit(X)
    table = evaluate(dim, X[:200], y[:200], X[200:], y[200:], probes=["knn"], layers=["embedding"])
    untrained = DIMTransformer(**params | {"max_epochs": 0}).fit(X[:200])
    expected = knn_probe().fit(untrained.transform(X[:200]), y[:200]).score(untrained.transform(X[200:]), y[200:])
    assert table["knn"].iloc[2] == expected != table["knn"].iloc[3]


def test_a_table_reads_what_the_steps_before_the_transformer_read(digits, tmp_path):
    X, y = digits
    np.save(tmp_path / "X.npy", X)
    dim = DIMTransformer(4, max_epochs=0, random_state=0)
    pipeline = make_pipeline(FunctionTransformer(np.load), dim).fit(tmp_path / "X.npy")
    path = str(tmp_path / "X.npy")
    table = evaluate(pipeline, path, y, path, y, probes=["knn"])
    assert table.equals(evaluate(pipeline[-1], X, y, X, y, probes=["knn"]))


def test_what_a_table_refuses(digits, trained):
    X, y = digits
    with pytest.raises(ValueError, match="probes must be"):
        evaluate(trained, X, y, X, y, probes=["svc"])
    with pytest.raises(ValueError, match=r"probes must be .* got None"):
        evaluate(trained, X, y, X, y, probes=None)
    with pytest.raises(ValueError, match="layers must be"):
        evaluate(trained, X, y, X, y, layers=["conv"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        evaluate(trained, X, y[:10], X, y)
    with pytest.raises(NotFittedError):
        evaluate(DIMTransformer(), X, y, X, y)


def test_the_untrained_encoder_of_a_table_has_the_shape_of_the_trained_one(colour_images):
    X, y = colour_images
    params = {"n_components": 8, "random_state": 0}
    dim = DIMTransformer(**params, max_epochs=1).fit(X)
    flat = X.reshape(len(X), -1)
    table = evaluate(dim, flat[:40], y[:40], flat[40:], y[40:], probes=["linear"], layers=["embedding"])
    untrained = DIMTransformer(**params, max_epochs=0).fit(X[:40])
    probe = LinearProbe(random_state=np.random.RandomState(0).randint(np.iinfo(np.int32).max))
    expected = probe.fit(untrained.transform(X[:40]), y[:40]).score(untrained.transform(X[40:]), y[40:])
    assert table["linear"].iloc[2] == expected


def test_the_untrained_encoder_of_a_table_is_the_network_that_was_fitted(digits):
    X, y = digits
    params = {"multiple_globals": True, "prior": "normal", "prior_matching": "noise"}
    dim = DIMTransformer(8, max_epochs=1, random_state=0, **params).fit(X)
    expected = evaluate(dim, X[:200], y[:200], X[200:], y[200:], probes=["knn"])
    dim.set_params(n_components=4, encoder="stride1", multiple_globals=False, prior="uniform", occlusion=True)
    changed = evaluate(dim, X[:200], y[:200], X[200:], y[200:], probes=["knn"])
    assert changed.equals(expected)


@pytest.mark.parametrize(
    "probe", [MLPProbe(lr=1e30, max_epochs=3), FineTunedClassifier(None, lr=1e30, encoder_lr=1e30, max_epochs=3)]
)
def test_a_probe_that_diverges_says_so(digits, trained, probe):
    X, y = digits[0][:100], digits[1][:100]
    if isinstance(probe, FineTunedClassifier):
        probe.set_params(transformer=trained)
    with pytest.raises(FloatingPointError, match=r"training diverged. Lower lr \(now 1e\+30\)"):
        probe.fit(X, y)
    assert not hasattr(probe, "mlp_")


def test_a_table_trains_nothing_and_tells_nobody(digits):
    X, y = digits
    dim = DIMTransformer(8, max_epochs=1, random_state=0).fit(X)
    told = []
    if hasattr(dim, "set_callbacks"):

        class Told:
            def setup(self, **kwargs):
                told.append("setup")

            def on_fit_task_begin(self, **kwargs):
                told.append("begin")

            def on_fit_task_end(self, **kwargs):
                told.append("end")

            def teardown(self, **kwargs):
                told.append("teardown")

        dim.set_callbacks(Told())
    # As of one that was trained by several processes.
    dim.set_params(distributed=True)
    evaluate(dim, X[:200], y[:200], X[200:], y[200:], probes=["knn"], layers=["embedding"])
    assert not told


def test_tables_and_reconstructions_of_pipelines_are_those_of_their_transformers(digits):
    X, y = digits
    halve = FunctionTransformer(lambda X: X / 2)
    pipeline = make_pipeline(halve, DIMTransformer(8, max_epochs=1, random_state=0), StandardScaler()).fit(X)
    data = (X[:200] / 2, y[:200], X[200:] / 2, y[200:])
    expected = evaluate(pipeline[1], *data, probes=["knn"], layers=["embedding"])
    of_pipeline = (X[:200], y[:200], X[200:], y[200:])
    for estimator in (pipeline, FrozenEstimator(pipeline), make_pipeline(halve, FrozenEstimator(pipeline[1]))):
        table = evaluate(estimator, *of_pipeline, probes=["knn"], layers=["embedding"])
        assert list(table["knn"]) == list(expected["knn"])
    params = {"max_epochs": 2, "random_state": 0}
    drawn = reconstruction_ms_ssim(pipeline, X[:200], X[200:], **params)
    assert drawn == reconstruction_ms_ssim(pipeline[1], data[0], data[2], **params)
    assert retrieval_scorer(pipeline, X) == retrieval_scorer(pipeline[1], X / 2)
    with pytest.raises(TypeError, match="evaluate needs a fitted DIMTransformer or a Pipeline with one, got a Stand"):
        evaluate(StandardScaler().fit(X), *of_pipeline)


@pytest.mark.filterwarnings("error")
def test_any_output_that_is_set_for_all_of_scikit_learn_will_do(digits):
    pytest.importorskip("pandas")
    X, y = digits
    dim = DIMTransformer(8, max_epochs=1, random_state=0).fit(X)

    def figures():
        table = evaluate(dim, X[:200], y[:200], X[200:], y[200:], probes=["linear"], layers=["embedding"])
        decoded = reconstruction_ms_ssim(dim, X[:200], X[200:], max_epochs=1, random_state=0)
        return [*table["linear"], retrieval_scorer(dim, X), decoded]

    expected = figures()
    with config_context(transform_output="pandas"):
        assert figures() == expected


@pytest.mark.filterwarnings("error")
def test_the_scorer_without_labels_takes_named_columns(digits):
    pandas = pytest.importorskip("pandas")
    X, _ = digits
    frame = pandas.DataFrame(X, columns=[f"pixel {i}" for i in range(64)])
    dim = DIMTransformer(8, max_epochs=1, random_state=0)
    assert retrieval_scorer(clone(dim).fit(frame), frame) == retrieval_scorer(dim.fit(X), X)


# Scorers


@pytest.mark.parametrize("scorer", [knn_scorer, linear_probe_scorer])
def test_scorers_with_labels_rank_training_above_its_absence_and_shuffled_labels_at_chance(all_digits, scorer):
    X, y = all_digits[0][1000:], all_digits[1][1000:]
    # Four dimensions do not hold all that random convolutions happen to show.
    untrained, trained = (
        DIMTransformer(4, max_epochs=max_epochs, random_state=0).fit(all_digits[0][:1000]) for max_epochs in (0, 3)
    )
    assert scorer(trained, X, y) > scorer(untrained, X, y) + 0.1
    assert scorer(trained, X, np.random.default_rng(0).permutation(y)) < 0.2


class Collapsed(DIMTransformer):
    """Embeds every image at one point."""

    def transform(self, X):
        return np.full_like(super().transform(X), 0.3)


def test_the_scorer_without_labels_ranks_trained_untrained_and_collapsed(all_digits, trained, untrained):
    X = all_digits[0][1000:]
    collapsed = Collapsed(max_epochs=0, random_state=0).fit(X)
    scores = [retrieval_scorer(dim, X) for dim in (trained, untrained, collapsed)]
    assert scores[0] > scores[1] + 0.005
    assert scores[1] > 0.1
    assert scores[2] < 0.01


@pytest.mark.parametrize("condition", [1, 10])
def test_the_scorer_without_labels_sees_no_linear_map_of_the_embedding(all_digits, trained, condition):
    X = all_digits[0][1000:1600]
    score = retrieval_scorer(trained, X)
    mixed = clone(trained).set_params(max_epochs=0).fit(X)
    mixed.__dict__.update(trained.__dict__)
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in range(2)]
    stretched = turns[0] * np.geomspace(1, condition, 64) @ turns[1]
    mixed.transform = lambda X: 100 * trained.transform(X) @ stretched + 5
    assert retrieval_scorer(mixed, X) == pytest.approx(score, abs=0.01)


def test_scorers_work_in_searches_and_pipelines(digits):
    X, y = digits
    images = X.reshape(-1, 8, 8).astype(np.uint8)
    dim = DIMTransformer(4, max_epochs=1, random_state=0)
    scoring = {"knn": knn_scorer, "linear": linear_probe_scorer, "retrieval": retrieval_scorer}
    search = GridSearchCV(dim, {"local_weight": [0.5, 1.0]}, scoring=scoring, cv=2, refit=False).fit(images, y)
    for name in scoring:
        assert np.isfinite(search.cv_results_[f"mean_test_{name}"]).all()
    search = GridSearchCV(dim, {"n_components": [2, 8]}, scoring=retrieval_scorer, cv=2).fit(images)
    assert search.best_params_ == {"n_components": 8}
    pipeline = make_pipeline(FunctionTransformer(lambda X: X / 16), dim).fit(X)
    assert retrieval_scorer(pipeline, X) == pytest.approx(retrieval_scorer(clone(dim).fit(X / 16), X / 16))


def test_scorers_take_pipelines_that_end_in_a_classifier(digits):
    X, y = digits
    dim = DIMTransformer(4, max_epochs=1, random_state=0)
    pipeline = make_pipeline(dim, StandardScaler(), LogisticRegression()).fit(X, y)
    for scorer in (knn_scorer, linear_probe_scorer, retrieval_scorer):
        assert scorer(pipeline, X, y) == scorer(pipeline[:-1], X, y)


@pytest.mark.parametrize("last", [KMeans(3, n_init=1, random_state=0), LinearDiscriminantAnalysis()])
def test_scorers_take_no_account_of_a_predictor_that_transforms_too(digits, trained, last):
    X, y = digits
    pipeline = make_pipeline(FrozenEstimator(trained), last).fit(X, y)
    for scorer in (knn_scorer, linear_probe_scorer):
        assert scorer(pipeline, X, y) == scorer(trained, X, y)


class Predicts(DIMTransformer):
    def predict(self, X):
        return self.transform(X).argmax(axis=1)


def test_a_transformer_that_predicts_too_is_scored(digits):
    X, y = digits
    pipeline = make_pipeline(FunctionTransformer(), Predicts(4, max_epochs=1, random_state=0)).fit(X)
    for scorer in (knn_scorer, linear_probe_scorer):
        assert scorer(pipeline, X, y) == scorer(pipeline[-1], X, y)


def test_a_path_has_no_number_of_images(digits, trained, tmp_path):
    X, y = digits
    np.save(tmp_path / "X.npy", X)
    pipeline = make_pipeline(FunctionTransformer(np.load), FrozenEstimator(trained)).fit(str(tmp_path / "X.npy"))
    assert knn_scorer(pipeline, str(tmp_path / "X.npy"), y) == knn_scorer(trained, X, y)
    with pytest.raises(TypeError, match=r"skdim\.files\.read_images makes one"):
        knn_scorer(trained, str(tmp_path), y)


def test_the_knn_scorer_refuses_labels_that_no_neighbour_shares(digits, trained):
    X, _ = digits
    with pytest.raises(ValueError, match=r"images of the same class, but the labels of all 20 differ"):
        knn_scorer(trained, X[:20], np.arange(20))


def test_one_class_is_nothing_to_tell(digits, trained):
    X, _ = digits
    for score in (knn_scorer, linear_probe_scorer):
        with pytest.raises(
            ValueError, match=f"{score.__name__} needs samples of at least 2 classes, but y has only one"
        ):
            score(trained, X[:40], np.zeros(40))
    with pytest.raises(ValueError, match="evaluate needs samples of at least 2 classes, but y has only one class"):
        evaluate(trained, X[:40], np.zeros(40), X[40:80], np.zeros(40), probes=["knn"])


@pytest.mark.parametrize(("n_samples", "n_classes"), [(20, 2), (30, 6), (200, 20)])
def test_neighbours_of_few_samples_are_not_outvoted_by_other_classes(n_samples, n_classes):
    rng = np.random.default_rng(0)
    y = np.arange(n_samples) % n_classes
    Z = (np.eye(n_classes)[y] + 0.05 * rng.standard_normal((n_samples, n_classes))).astype(np.float32)
    assert knn_scorer(Given(), Z, y) == 1
    probe = PROBES["knn"]("cpu", 0, y)
    assert probe.fit(Z, y).score(Z + 0.01, y) == 1


def test_as_many_neighbours_vote_in_a_table_as_a_class_has_training_images(all_digits, trained):
    X, y = all_digits
    rows = np.concatenate([np.flatnonzero(y == digit)[:3] for digit in range(10)])
    table = evaluate(trained, X[rows], y[rows], X[500:], y[500:], probes=["knn"])
    table = table.to_dict("records") if hasattr(table, "to_dict") else table
    expected = knn_probe(3).fit(X[rows], y[rows]).score(X[500:], y[500:])
    assert table[0]["features"] == "raw pixels"
    assert table[0]["knn"] == pytest.approx(expected)


def test_one_rare_class_does_not_change_how_many_neighbours_vote():
    y = np.array([0] * 50 + [1] * 50 + [2])
    assert PROBES["knn"]("cpu", 0, y)[-1].n_neighbors == 20


def test_any_output_of_the_transformer_and_tensors_will_do(digits):
    X, y = digits
    dim = DIMTransformer(8, max_epochs=1, random_state=0).fit(X)
    expected = retrieval_scorer(dim, X), knn_scorer(dim, X, y)
    classifier = FineTunedClassifier(dim, max_epochs=2, random_state=0).fit(X, y)
    as_frames = pickle.loads(pickle.dumps(dim)).set_output(transform="pandas")
    assert (retrieval_scorer(as_frames, X), knn_scorer(as_frames, X, y)) == expected
    again = FineTunedClassifier(as_frames, max_epochs=2, random_state=0).fit(X, y)
    assert np.array_equal(again.predict_proba(X), classifier.predict_proba(X))
    with config_context(array_api_dispatch=True):
        assert retrieval_scorer(dim, torch.from_numpy(X)) == expected[0]
        assert np.array_equal(classifier.predict(torch.from_numpy(X)), classifier.predict(X))


# Information


def test_mutual_information_of_correlated_gaussians():
    correlation = 0.8
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 4000, 2)).astype(np.float32)
    z = correlation * x + np.sqrt(1 - correlation**2) * noise
    known = -0.5 * np.log(1 - correlation**2) * 2
    bound = mutual_information_bound(x, 10 * z + 3, random_state=0)
    assert bound == pytest.approx(known, abs=0.05 + 0.1 * known)


def test_dimensions_far_apart_among_many_are_seen_to_depend_on_each_other():
    rng = np.random.default_rng(0)
    Z = np.zeros((2500, 502))
    Z[:, 0] = rng.standard_normal(2500)
    Z[:, 500] = 0.95 * Z[:, 0] + np.sqrt(1 - 0.95**2) * rng.standard_normal(2500)
    assert total_correlation_bound(Z, max_epochs=15, random_state=0) > 0.5


class Rows(torch.utils.data.Dataset):
    """Images and their numbers."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def test_mutual_information_of_images(all_digits, trained):
    X, _ = all_digits
    images = X.reshape(-1, 8, 8)[:600]
    informative = mutual_information_bound(images, trained.transform(images), max_epochs=25, random_state=0)
    assert informative > 1.5
    items = Rows(images)
    assert mutual_information_bound(items, trained.transform(images), max_epochs=1, random_state=0) == (
        mutual_information_bound(images, trained.transform(images), max_epochs=1, random_state=0)
    )
    shuffled = trained.transform(np.random.default_rng(0).permutation(images))
    # A critic that learned the training pairs by heart would report far more if it were measured on them.
    assert abs(mutual_information_bound(images, shuffled, max_epochs=8, random_state=0)) < 0.1


def test_total_correlation_of_independent_and_of_correlated_dimensions():
    rng = np.random.default_rng(0)
    independent = rng.standard_normal((2500, 6))
    assert abs(total_correlation_bound(independent, random_state=0)) < 0.03
    # Three pairs: the total correlation is the sum of their mutual information.
    correlated = np.concatenate([independent[:, :3], 0.8 * independent[:, :3] + 0.6 * independent[:, 3:]], axis=1)
    known = -0.5 * np.log(1 - 0.8**2) * 3
    assert total_correlation_bound(correlated, random_state=0) == pytest.approx(known, rel=0.15)


def test_large_information_is_not_overstated():
    Z = np.random.default_rng(0).standard_normal((1500, 1))
    # Dimensions that determine one another have an infinite total correlation, of which 300 samples can show log(300).
    assert 2 < total_correlation_bound(np.repeat(Z, 30, axis=1), max_epochs=25, random_state=0) <= np.log(300)
    assert 1.5 < mutual_information_bound(Z, Z, max_epochs=25, random_state=0) <= np.log(300)


def test_information_bounds_repeat_themselves():
    Z = np.random.default_rng(0).standard_normal((500, 3)).cumsum(axis=1)
    state = torch.random.get_rng_state()
    for bound in (total_correlation_bound, lambda Z, **params: mutual_information_bound(Z[:, :1], Z[:, 1:], **params)):
        first, second = (bound(Z, max_epochs=3, random_state=0) for _ in range(2))
        assert first == second > 0
    assert torch.equal(state, torch.random.get_rng_state())


# Reconstruction


def reference_ms_ssim(first, second, data_range, size, weights):
    """In float64, for one channel, scale by scale, from the formulas."""
    window = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    result = 1.0
    for scale, weight in enumerate(weights):
        m1, m2, m11, m22, m12 = (
            convolve2d(image, window, mode="valid") for image in (first, second, first**2, second**2, first * second)
        )
        contrast = (2 * (m12 - m1 * m2) + c2) / (m11 - m1**2 + m22 - m2**2 + c2)
        luminance = (2 * m1 * m2 + c1) / (m1**2 + m2**2 + c1)
        last = scale == len(weights) - 1
        result *= np.mean(contrast * luminance if last else contrast) ** weight
        first, second = (
            (image[: h // 2 * 2, : w // 2 * 2].reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3)))
            for image in (first, second)
            for h, w in [image.shape]
        )
    return result


@pytest.mark.parametrize(
    ("shape", "size", "weights"),
    [
        ((180, 177), 11, [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]),
        ((32, 32), 11, [0.0448 / 0.3304, 0.2856 / 0.3304]),
        ((8, 9), 7, [1.0]),
    ],
)
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ms_ssim_against_float64_numpy(shape, size, weights, data_range):
    rng = np.random.default_rng(0)
    smooth = correlate1d(correlate1d(rng.random((2, 3, *shape)), np.ones(5) / 5, axis=2), np.ones(5) / 5, axis=3)
    first = smooth * data_range
    second = first + rng.normal(0, 0.05 * data_range, first.shape)
    value = ms_ssim(torch.from_numpy(first).float(), torch.from_numpy(second).float(), data_range=data_range)
    expected = [
        np.mean([reference_ms_ssim(a, b, data_range, size, weights) for a, b in zip(*pair, strict=True)])
        for pair in zip(first, second, strict=True)
    ]
    assert value.numpy() == pytest.approx(np.array(expected), abs=1e-4)
    assert ms_ssim(*[torch.from_numpy(first)] * 2, data_range=data_range).numpy() == pytest.approx(1.0)


@pytest.mark.parametrize(("dtype", "data_range"), [(torch.float16, 255), (torch.bfloat16, 1.0), (torch.float32, 1.0)])
def test_ms_ssim_keeps_its_digits_in_any_precision(dtype, data_range):
    rng = np.random.default_rng(0)
    smooth = correlate1d(correlate1d(rng.random((2, 1, 32, 32)), np.ones(9) / 9, axis=2), np.ones(9) / 9, axis=3)
    first = torch.from_numpy(smooth * data_range).to(dtype)
    second = torch.from_numpy((smooth + rng.normal(0, 0.01, smooth.shape)) * data_range).to(dtype)
    value = ms_ssim(first, second, data_range=data_range)
    assert value.dtype == dtype
    exact = ms_ssim(first.double(), second.double(), data_range=data_range)
    torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_ms_ssim_refuses_what_is_no_pair_of_images():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="got shapes"):
        ms_ssim(images, torch.zeros(2, 3, 8, 9), data_range=1.0)
    with pytest.raises(ValueError, match=r"floating-point tensors .* torch\.uint8"):
        ms_ssim(images.byte(), images.byte(), data_range=255)
    with pytest.raises(ValueError, match="data_range must be positive and finite, got inf"):
        ms_ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), data_range=float("inf"))
    with pytest.raises(ValueError, match="data_range must be positive and finite, got 0"):
        ms_ssim(images, images, data_range=0)


def test_a_decoder_draws_images_from_embeddings(digits, trained):
    X, _ = digits
    images = X.reshape(-1, 8, 8) * 15
    params = {"max_epochs": 40, "random_state": 0}
    good = reconstruction_ms_ssim(trained, X[:200], X[200:], **params)
    assert 0.5 < good < 1
    assert good == reconstruction_ms_ssim(trained, X[:200], X[200:], **params)
    nothing = Collapsed(max_epochs=0, random_state=0).fit(X[:200])
    assert reconstruction_ms_ssim(nothing, X[:200], X[200:], **params) < good - 0.1
    # The same images, as bytes, have the range of bytes.
    as_bytes = DIMTransformer(max_epochs=1, random_state=0).fit(images.astype(np.uint8)[:200])
    drawn = reconstruction_ms_ssim(as_bytes, images[:200].astype(np.uint8), images[200:].astype(np.uint8), **params)
    assert 0.5 < drawn < 1


# Fine-tuning


def test_fine_tuning_changes_its_own_encoder_only(all_digits, trained):
    X, y = all_digits
    before = trained.transform(X[:50])
    classifier = FineTunedClassifier(trained, max_epochs=20, random_state=0).fit(X[:200], y[:200])
    assert np.array_equal(trained.transform(X[:50]), before)
    assert not np.array_equal(classifier.transformer_.transform(X[:50]), before)
    assert classifier.score(X[1000:], y[1000:]) > 0.75
    again = FineTunedClassifier(trained, max_epochs=20, random_state=0).fit(X[:200], y[:200])
    assert np.array_equal(classifier.predict_proba(X), again.predict_proba(X))


def test_fine_tuning_from_a_layer_and_a_pickle(digits, trained):
    X, y = digits
    dim = pickle.loads(pickle.dumps(trained)).set_params(output_layer="features")
    classifier = FineTunedClassifier(dim, max_epochs=3, random_state=0).fit(X, y)
    assert classifier.mlp_[0].in_features == 512
    assert set(classifier.history_[0]) == {"train_loss", "valid_loss", "valid_acc", "dur"}
    blob = pickle.dumps(classifier)
    assert b"torch" not in blob
    assert np.array_equal(pickle.loads(blob).predict_proba(X), classifier.predict_proba(X))


def test_a_frozen_transformer_survives_cross_validation(all_digits, trained):
    X, y = all_digits
    classifier = FineTunedClassifier(FrozenEstimator(trained), max_epochs=5, encoder_lr=1e-9, random_state=0)
    assert cross_val_score(classifier, X[:300], y[:300], cv=2, error_score="raise").mean() > 0.3
    fitted = clone(classifier).fit(X[:300], y[:300])
    # At next to no learning rate only batch norm's statistics move: the weights are the trained ones.
    weight = fitted.transformer_.encoder_.embedding.weight
    assert torch.allclose(weight, trained.encoder_.embedding.weight, atol=1e-5)


def test_probes_behind_tensors(digits):
    pytest.importorskip("sklearn.externals.array_api_compat", reason="scikit-learn < 1.7 does not bring it")
    X, y = digits
    for probe in (LinearProbe(random_state=0), MLPProbe(max_epochs=3, random_state=0)):
        pipeline = make_pipeline(DIMTransformer(8, max_epochs=1, random_state=0), probe)
        expected = pipeline.fit(X, y).predict(X)
        with config_context(array_api_dispatch=True):
            tensor = torch.from_numpy(X)
            assert np.array_equal(pipeline.fit(tensor, y).predict(tensor), expected)
    Z = torch.from_numpy(X[:, :3])
    with config_context(array_api_dispatch=True):
        bounds = [mutual_information_bound(Z, Z, max_epochs=1), total_correlation_bound(Z, max_epochs=1)]
    assert np.isfinite(bounds).all()


def test_what_fine_tuning_refuses(digits, trained):
    X, y = digits
    with pytest.raises(TypeError, match="got a frozen StandardScaler"):
        FineTunedClassifier(FrozenEstimator(StandardScaler().fit(X))).fit(X, y)
    other = pickle.loads(pickle.dumps(trained)).set_params(output_layer="conv")
    with pytest.raises(ValueError, match="output_layer='conv' is not a layer of the encoder"):
        FineTunedClassifier(other).fit(X, y)
    with pytest.raises(ValueError, match=r"validation_fraction=0\.5 leaves 1 of 3 samples to train on"):
        MLPProbe(validation_fraction=0.5).fit(X[:3], y[:3])
    with pytest.warns(UserWarning, match="of another range"):
        FineTunedClassifier(trained, max_epochs=1).fit(255 * X, y)
    with pytest.raises(ValueError, match="transformer"):
        FineTunedClassifier(StandardScaler()).fit(X, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        FineTunedClassifier(trained).fit(X, y[:10])
    with pytest.raises(ValueError, match="at least 2 classes"):
        FineTunedClassifier(trained).fit(X, np.zeros(len(X)))


class Untrainable(DIMTransformer):
    """Whoever trains it has come too far."""

    def fit(self, X, y=None):
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("params", "n_images", "n_labels", "message"),
    [
        ({}, 20, 10, r"inconsistent numbers of samples: \[20, 10\]"),
        ({"hidden_layer_sizes": [0]}, 20, 20, r"hidden_layer_sizes must be positive integers, got \[0\]"),
        ({"validation_fraction": 0.999}, 20, 20, "validation_fraction=0.999 leaves 0 of 20 samples to train on"),
        ({"validation_fraction": 0.5}, 3, 3, "validation_fraction=0.5 leaves 1 of 3 samples to train on"),
        ({}, 2, 2, r"Found array with 2 sample\(s\) while a minimum of 3 is required by FineTunedClassifier"),
    ],
)
def test_fine_tuning_checks_its_own_input_before_it_trains_a_transformer(digits, params, n_images, n_labels, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        FineTunedClassifier(Untrainable(), **params).fit(X[:n_images], y[:n_labels])


def test_a_loader_is_refused_where_images_are_read_again(digits, trained):
    X, y = digits
    loader = torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=100)
    for dim in (Untrainable(), trained):
        with pytest.raises(TypeError, match=r"X is a DataLoader, .* pass its dataset"):
            FineTunedClassifier(dim).fit(loader, y)
    with pytest.raises(TypeError, match=r"X is a DataLoader, .* pass its dataset"):
        evaluate(trained, X, y, loader, y)


def test_fine_tuning_says_what_to_do_with_the_path_of_a_folder(digits, trained):
    for dim in (DIMTransformer(), trained):
        with pytest.raises(TypeError, match=r"skdim\.files\.read_images makes one of a folder"):
            FineTunedClassifier(dim).fit("folder", digits[1])


@pytest.mark.parametrize("is_fitted", [True, False])
def test_fine_tuning_leaves_critics_behind_that_fit_its_encoder_no_more(digits, is_fitted):
    X, y = digits
    dim = DIMTransformer(4, max_epochs=1, random_state=0)
    classifier = FineTunedClassifier(dim.fit(X) if is_fitted else dim, max_epochs=1, random_state=0).fit(X, y)
    assert not hasattr(classifier.transformer_, "net_")
    assert not hasattr(classifier.transformer_, "discriminators_")


def test_fine_tuning_seeds_a_transformer_that_has_no_seed_of_its_own(digits):
    X, y = digits[0][:40], digits[1][:40]

    def weight(seed, own_seed=None):
        dim = DIMTransformer(4, max_epochs=0, random_state=own_seed)
        # At next to no learning rate the encoder stays where its own fit has left it.
        tuned = FineTunedClassifier(dim, max_epochs=1, encoder_lr=1e-9, random_state=seed).fit(X, y)
        return tuned.transformer_.encoder_.embedding.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.allclose(weight(0), weight(1), atol=1e-5)
    assert torch.allclose(weight(0, own_seed=5), weight(1, own_seed=5), atol=1e-5)


def test_a_classifier_that_is_fitted_again_forgets_the_names_of_columns(digits):
    pandas = pytest.importorskip("pandas")
    X, y = digits[0][:40], digits[1][:40]
    classifier = FineTunedClassifier(DIMTransformer(4, max_epochs=0), max_epochs=1)
    frame = pandas.DataFrame(X, columns=[f"pixel {i}" for i in range(64)])
    assert classifier.fit(frame, y).feature_names_in_[0] == "pixel 0"
    assert not hasattr(classifier.fit(X, y), "feature_names_in_")


# Unfit parameters of functions


@pytest.mark.parametrize("gap", [None, np.nan, np.float32("nan"), "NA", "NaT", "list"], ids=str)
def test_missing_labels_are_refused_before_any_work(digits, trained, monkeypatch, gap):
    X = digits[0][:60]
    if gap == "NaT":
        y = np.array(["2026-01-01", "NaT"] * 30, dtype="datetime64[D]")
    elif gap == "list":
        y = ["a", np.nan] * 30
    else:
        y = np.array(["a", pytest.importorskip("pandas").NA if gap == "NA" else gap] * 30, dtype=object)
    monkeypatch.setattr(DIMTransformer, "fit", None)
    message = "Input y contains 30 missing labels, the first of image 1: {} needs one for each image"
    for fit, name in (
        (FineTunedClassifier(DIMTransformer(4)).fit, "FineTunedClassifier"),
        (LinearProbe().fit, "LinearProbe"),
        (MLPProbe().fit, "MLPProbe"),
        (lambda X, y: knn_scorer(trained, X, y), "knn_scorer"),
        (lambda X, y: evaluate(trained, X, digits[1][:60], X, y), "evaluate"),
    ):
        with pytest.raises(ValueError, match=message.format(name)):
            fit(X, y)


def test_labels_are_checked_before_images_are_embedded(digits, trained, monkeypatch):
    X, y = digits
    monkeypatch.setattr(DIMTransformer, "transform", None)
    for scorer in (knn_scorer, linear_probe_scorer):
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            scorer(trained, X, y[:-1])
    with pytest.raises(
        ValueError, match="linear_probe_scorer needs three held-out images of a class, but y has two at"
    ):
        linear_probe_scorer(trained, X, np.arange(len(X)) // 2)
    behind = make_pipeline(FunctionTransformer(pytest.fail), FrozenEstimator(trained))
    with pytest.raises(ValueError, match="probes must be a sequence of names"):
        evaluate(behind, X, y, X, y, probes=["svc"])
    with pytest.raises(ValueError, match="evaluate needs samples of at least 2 classes"):
        evaluate(behind, X[:10], np.zeros(10), X, y)


def test_what_scorers_refuse(digits, trained):
    X, _ = digits
    for scorer in (knn_scorer, linear_probe_scorer):
        with pytest.raises(ValueError, match=f"{scorer.__name__} requires y to be passed, but the target y is None"):
            scorer(trained, X)
        with pytest.raises(ValueError, match=r"y should be a 1d array, got an array of shape \(\d+, 10\) instead"):
            scorer(trained, X, np.eye(10)[digits[1]])
    message = r"Found array with 3 sample\(s\) while a minimum of 4 is required by retrieval_scorer"
    with pytest.raises(ValueError, match=message):
        retrieval_scorer(trained, X[:3])
    assert 0 < retrieval_scorer(trained, X[:4]) <= 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_epochs": -1}, r"'max_epochs' parameter of \w+_bound must be an int in the range \[1, inf\). Got -1"),
        ({"max_epochs": 0}, "'max_epochs' parameter"),
        ({"device": None}, r"'device' parameter of \w+_bound must be an instance of 'str'. Got None"),
        ({"random_state": "0"}, "'random_state' parameter"),
    ],
)
def test_parameters_that_bounds_refuse(params, message):
    Z = np.random.default_rng(0).standard_normal((20, 2))
    for bound in (total_correlation_bound, lambda Z, **params: mutual_information_bound(Z, Z, **params)):
        with pytest.raises(ValueError, match=message):
            bound(Z, **params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_format": "last"}, r"'data_format' parameter of mutual_information_bound must be a str among"),
        ({"image_shape": (2, 1)}, r"image_shape must be three positive integers"),
        ({"image_shape": (1, 3, 1)}, r"cannot reshape 2 features to image_shape=\(1, 3, 1\)"),
    ],
)
def test_layouts_that_a_bound_refuses(params, message):
    Z = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(ValueError, match=message):
        mutual_information_bound(Z, Z, **params)
    with pytest.raises(ValueError, match=r"mutual_information_bound is expecting images of shape \(1, 3, 1\)"):
        mutual_information_bound(Z.reshape(20, 1, 1, 2), Z, image_shape=(1, 3, 1))


def test_a_bound_reads_images_in_any_layout():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((60, 5, 4, 5)).astype(np.float32)
    Z = images[:, :, 0, 0]
    options = {"max_epochs": 2, "device": "cpu", "random_state": 0}
    expected = mutual_information_bound(images, Z, data_format="channels_first", **options)
    assert expected > 0
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    assert mutual_information_bound(last, Z, data_format="channels_last", **options) == expected
    rows = images.reshape(60, -1)
    assert mutual_information_bound(rows, Z, image_shape=(5, 4, 5), data_format="channels_first", **options) == expected


class Alarm(nn.Module):
    """An encoder with a dimension that is 0 but for images of great values."""

    def __init__(self, gain):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.gain = gain

    def forward(self, images):
        features = self.convolution(images)
        alarm = torch.relu(images.amax(dim=(1, 2, 3)) - 10)
        return torch.cat([features.mean(dim=(2, 3)), self.gain * alarm[:, None]], dim=1), features


def test_an_embedding_that_is_constant_in_training_is_not_decoded(digits):
    X, _ = digits
    values = []
    for gain in (0, 1):
        dim = DIMTransformer(9, encoder=Alarm(gain), max_epochs=0, device="cpu", random_state=0).fit(X[:100])
        assert np.ptp(dim.transform(X[:100])[:, 8]) == 0
        assert (np.ptp(dim.transform(X[100:] * 9)[:, 8]) > 0) == bool(gain)
        values.append(reconstruction_ms_ssim(dim, X[:100], X[100:] * 9, max_epochs=2, random_state=0))
    assert values[0] == values[1]


def test_what_a_reconstruction_refuses_before_it_embeds(digits, trained, monkeypatch):
    X, _ = digits
    thin = DIMTransformer(4, image_shape=(1, 2, 32), max_epochs=0).fit(X)

    def embed(*_):
        raise AssertionError("embedded")

    monkeypatch.setattr(DIMTransformer, "transform", embed)
    for params in ({"max_epochs": 0}, {"random_state": "0"}):
        with pytest.raises(ValueError, match=f"'{next(iter(params))}' parameter of reconstruction_ms_ssim must be"):
            reconstruction_ms_ssim(trained, X, X, **params)
    with pytest.raises(ValueError, match=r"2 sample\(s\) while a minimum of 3 is required by reconstruction_ms_ssim"):
        reconstruction_ms_ssim(trained, X[:2], X)
    with pytest.raises(ValueError, match=r"images of at least 3 x 3, got 2 x 32"):
        reconstruction_ms_ssim(thin, X, X)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_reconstructions_are_compared_on_the_range_of_the_training_images(digits, monkeypatch, dtype):
    X = digits[0].astype(dtype)
    train, test = X[:100] + dtype(3), X[100:160] * dtype(2)
    compared = []

    def record(drawn, images, *, data_range):
        compared.append((drawn, images, data_range))
        return torch.ones(len(drawn))

    monkeypatch.setattr("skdim.evaluation.reconstruction.ms_ssim", record)
    dim = DIMTransformer(8, max_epochs=0, random_state=0).fit(train)
    reconstruction_ms_ssim(dim, train, test, max_epochs=1, random_state=0)
    ((drawn, images, data_range),) = compared
    low, high = (0, 255) if dtype == np.uint8 else (3, 19)
    np.testing.assert_allclose(
        images.flatten(1).numpy(), (test.astype(np.float32) - low) / (high - low), rtol=1e-5, atol=1e-6
    )
    assert data_range == 1.0
    # Hardly trained, the decoder draws values beyond the range, too, which are clipped.
    assert drawn.min() == 0
    assert drawn.max() <= 1


def test_a_decoder_stops_by_images_that_it_is_not_trained_on(digits, monkeypatch):
    parts = []

    def record(net_class, module, training, validation, **params):
        parts.extend([training.rows, validation.rows])
        module.eval()

    monkeypatch.setattr("skdim.evaluation.reconstruction.train", record)
    X = digits[0][:105]
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    reconstruction_ms_ssim(dim, X, X[:5], random_state=0)
    training, validation = parts
    assert len(validation) == 11
    assert sorted([*training, *validation]) == list(range(105))


def test_the_scorer_without_labels_weighs_directions_by_what_two_crops_share():
    rng = np.random.default_rng(0)
    # Images of one colour each, which all crops of them have.
    X = np.repeat(rng.random((200, 3)), 64, axis=1).astype(np.float32).reshape(200, 3, 8, 8)
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)

    def transform(X):
        colours = X[:].mean(axis=(2, 3))
        return np.hstack([colours, rng.standard_normal((len(colours), 40))]).astype(np.float32)

    dim.transform = transform
    assert retrieval_scorer(dim, X) > 0.6


def test_the_scorer_without_labels_sees_crops_of_the_sizes_that_it_says():
    X = np.broadcast_to(np.arange(32, dtype=np.float32), (300, 1, 32, 32)) + 0.0
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    seen = []

    def transform(X):
        seen.append(X[:][:, 0, 16])
        return seen[-1][:, :4]

    dim.transform = transform
    retrieval_scorer(dim, X)
    rows = np.concatenate(seen)
    # A pixel of a crop is as wide as the crop is a share of the image.
    sides = np.diff(rows, axis=1)[:, 8:24].mean(axis=1)
    assert sides.min() == pytest.approx(0.4, abs=0.02)
    assert sides.max() == pytest.approx(1, abs=0.02)


def test_of_equally_good_regularisations_the_linear_probe_takes_that_of_the_lowest_loss():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 100)
    X = rng.standard_normal((100, 5)) + 20 * y[:, None]
    for Cs in ((1e-3, 1.0, 100.0), (100.0, 1e-3, 1.0)):
        assert LinearProbe(Cs=Cs, random_state=0).fit(X, y).C_ == 100.0


def test_the_linear_probe_ends_its_path_where_the_accuracy_falls(monkeypatch):
    tried = []
    minimize = LinearProbe._minimize

    def watched(self, samples, targets, C, start):
        tried.append(C)
        return minimize(self, samples, targets, C, start)

    monkeypatch.setattr(LinearProbe, "_minimize", watched)
    # Many features tell the class, with noise: weak regularisation learns the noise by heart.
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1500)
    X = rng.standard_normal((1500, 1000)) + 0.1 * y[:, None]
    y = np.where(rng.random(1500) < 0.2, 1 - y, y)
    probe = LinearProbe(random_state=0).fit(X, y)
    *path, last = tried
    assert last == probe.C_
    assert path == sorted(path)
    assert probe.C_ < max(path) < 1.0


def test_the_linear_probe_of_few_samples_is_not_far_behind_a_fixed_regularisation(all_digits):
    X, y = all_digits
    chosen, fixed = [], []
    for seed in range(8):
        order = np.random.RandomState(seed).permutation(len(X))
        few, rest = order[:30], order[30:]
        chosen.append(LinearProbe(device="cpu", random_state=seed).fit(X[few], y[few]).score(X[rest], y[rest]))
        fixed.append(LinearProbe(Cs=[1.0], device="cpu").fit(X[few], y[few]).score(X[rest], y[rest]))
    assert min(chosen) > 0.3
    assert np.mean(chosen) > np.mean(fixed) - 0.05


def test_the_linear_probe_of_a_rare_class_does_not_settle_for_the_frequent_one(all_digits):
    X, y = all_digits[0], all_digits[1] == 8
    for seed in range(6):
        order = np.random.RandomState(seed).permutation(len(X))
        few, rest = order[:150], order[150:]
        probe = LinearProbe(device="cpu", random_state=seed).fit(X[few], y[few])
        assert probe.predict(X[rest][y[rest]]).mean() > 0.2


def test_ties_between_neighbours_do_not_go_to_the_label_that_sorts_first():
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 2
    Z = rng.standard_normal((1200, 10))  # with nothing to tell, a label is predicted as often whatever its name
    share = np.mean(knn_probe().fit(Z[:600], y[:600]).predict(Z[600:]) == 0)
    renamed = np.mean(knn_probe().fit(Z[:600], 1 - y[:600]).predict(Z[600:]) == 1)
    assert share == pytest.approx(renamed, abs=0.02)


class Given:
    """A transformer whose images are embeddings already."""

    def transform(self, X):
        return X.copy()


def test_folds_of_the_linear_scorer_are_drawn_at_random():
    rng = np.random.default_rng(0)
    block, y = np.repeat(np.arange(3), 60), np.tile([0, 1], 90)
    # Each third of the rows, as of plates or days, tells its classes by dimensions of its own.
    Z = 0.1 * rng.standard_normal((180, 6))
    Z[np.arange(180), 2 * block + y] += 1
    assert linear_probe_scorer(Given(), Z.astype(np.float32), y) > 0.95


def test_neighbours_of_the_scorer_are_others_and_features_are_standardised():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    Z = rng.standard_normal((150, 4)) + 0.7 * np.eye(3, 4)[y]
    unit = (Z - Z.mean(0)) / Z.std(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    votes = np.eye(3)[y[np.argsort(-similarity, axis=1)[:, :20]]].sum(axis=1)
    own = votes[np.arange(150), y]
    others = np.where(np.eye(3)[y] == 1, -1, votes).max(axis=1)
    scaled = Z * [1e-3, 1, 30, 1e3] + [5, -40, 3e2, 0]
    # Whatever is made of classes with as many votes.
    assert np.mean(own > others) <= knn_scorer(Given(), scaled, y) <= np.mean(own >= others)


def retrieval_score_of(*crops):
    """Score of the embeddings of both crops, in the order in which the scorer takes the images."""
    X = np.random.default_rng(0).random((len(crops[0]), 64)).astype(np.float32)
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    given = iter(crops)
    dim.transform = lambda X: next(given).astype(np.float32)
    return retrieval_scorer(dim, X)


def embeddings_of_two_crops(noise=0.8):
    rng = np.random.default_rng(1)
    shared = rng.standard_normal((80, 3)) * rng.lognormal(0, 0.5, (80, 1))
    return [shared + noise * rng.standard_normal((80, 3)) for _ in range(2)]


def test_either_crop_is_searched_for_among_the_others():
    first, second = embeddings_of_two_crops()
    assert retrieval_score_of(first, second) == pytest.approx(retrieval_score_of(second, first), rel=1e-9)


def test_either_half_of_the_images_is_scored():
    first, second = embeddings_of_two_crops(noise=0.2)
    usual = retrieval_score_of(first, second)
    # Neither half can be found again if its crops belong to other images.
    for half in (slice(0, 40), slice(40, 80)):
        mixed = second.copy()
        mixed[half] = np.roll(mixed[half], 1, axis=0)
        assert retrieval_score_of(first, mixed) < 0.75 * usual
    swapped = [np.concatenate([crop[40:], crop[:40]]) for crop in (first, second)]
    assert retrieval_score_of(*swapped) == pytest.approx(usual, rel=1e-9)


def test_each_half_is_centred_on_its_own_mean():
    first, second = embeddings_of_two_crops()
    moved = [crop + np.where(np.arange(80) < 40, 0, 100)[:, None] for crop in (first, second)]
    assert retrieval_score_of(*moved) == pytest.approx(retrieval_score_of(first, second), rel=1e-3)


def test_a_bound_is_one_of_all_samples_and_of_scores_within_the_limit():
    # In one batch of three: the logarithm of its mean is not a third of that of all.
    scores_of = torch.zeros(1300)
    scores_of[0] = 100.0

    def scores(rows, n_pairings, rng):
        return scores_of[rows][:, None] + 100, scores_of[rows][:, None].expand(-1, n_pairings)

    bound = _bound(scores, torch.arange(1300), 8.0, np.random.RandomState(0))
    assert bound == pytest.approx(8 - np.log((np.exp(8) + 1299) / 1300), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", LinearProbe(device="cpu", random_state=3)),
        ("svm", LinearProbe("squared_hinge", device="cpu", random_state=3)),
        ("mlp", MLPProbe(device="cpu", random_state=3)),
        ("classifier", MLPProbe((15, 10), dropout=0.0, batch_norm_logits=True, device="cpu", random_state=3)),
    ],
)
def test_the_probes_of_a_table_are_those_that_it_names(name, expected):
    probe = PROBES[name]("cpu", 3, np.arange(40) % 2)
    assert type(probe) is type(expected)
    assert probe.get_params() == expected.get_params()


def test_neighbours_are_those_of_least_angle_and_have_a_vote_each():
    rng = np.random.default_rng(0)
    # Lengths of all sizes: of two directions the nearer point is often the one of the wider angle.
    Z = rng.standard_normal((200, 3)) * rng.lognormal(0, 2, (200, 1))
    y = (Z[:, 0] > np.median(Z[:, 0])).astype(int)
    probe = knn_probe(5).fit(Z[:150], y[:150])
    S = (Z - Z[:150].mean(0)) / Z[:150].std(0)
    S /= np.linalg.norm(S, axis=1, keepdims=True)
    nearest = np.argsort(-S[150:] @ S[:150].T, axis=1)[:, :5]
    assert np.array_equal(probe.predict(Z[150:]), (y[:150][nearest].mean(axis=1) > 0.5).astype(int))


@pytest.mark.parametrize(
    ("probe", "changes"),
    [
        (
            MLPProbe(max_epochs=2, random_state=0),
            [
                {"lr": 0.01},
                {"dropout": 0.5},
                {"batch_size": 8},
                {"validation_fraction": 0.3},
                {"batch_norm_logits": True},
            ],
        ),
        (
            LinearProbe(Cs=(1e-3, 1.0), random_state=0),
            [{"max_iter": 1}, {"loss": "squared_hinge"}, {"validation_fraction": 0.5}],
        ),
        (
            FineTunedClassifier(DIMTransformer(4, max_epochs=0, random_state=0), max_epochs=2, random_state=0),
            [{"lr": 0.01}, {"encoder_lr": 0.01}, {"dropout": 0.5}, {"batch_size": 8}, {"validation_fraction": 0.3}],
        ),
    ],
    ids=["mlp", "linear", "fine-tuned"],
)
def test_each_parameter_of_a_classifier_counts(digits, probe, changes):
    X, y = digits[0][:100], digits[1][:100]

    def outputs(**params):
        fitted = clone(probe).set_params(**params).fit(X, y)
        return (fitted.decision_function if isinstance(probe, LinearProbe) else fitted.predict_proba)(X)

    usual = outputs()
    assert [change for change in changes if np.array_equal(outputs(**change), usual)] == []


def test_the_scorer_without_labels_is_not_scored_on_what_it_has_learned_from(digits):
    X, _ = digits
    # 64 directions, learned from 60 images, fit these by heart.
    dim = DIMTransformer(max_epochs=0, random_state=0).fit(X[:120])
    calls = iter(range(10))
    dim.transform = lambda X: np.random.default_rng(next(calls)).standard_normal((X.shape[0], 64)).astype(np.float32)
    assert retrieval_scorer(dim, X[:120]) < 0.12


def test_the_scorer_without_labels_draws_from_all_images(digits, monkeypatch):
    monkeypatch.setattr("skdim.evaluation.scorers.MAX_IMAGES", 50)
    X = digits[0][:200].copy()
    dim = DIMTransformer(8, max_epochs=0, random_state=0).fit(X)
    X[:100] = 0
    # Among images that are all the same none is found again.
    assert retrieval_scorer(dim, X) > 0.15


def test_fine_tuning_stops_early(digits):
    X = digits[0][:120]
    y = np.random.default_rng(0).integers(0, 2, 120)  # nothing to learn
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    classifier = FineTunedClassifier(dim, lr=0.01, patience=2, batch_size=4, random_state=0).fit(X, y)
    losses = [epoch["valid_loss"] for epoch in classifier.history_]
    assert classifier.n_iter_ == len(losses) == 1 + np.argmin(losses) + 2


def test_a_split_smaller_than_the_number_of_classes_is_drawn_without_regard_to_them():
    rng = np.random.default_rng(0)
    # Three of thirty samples cannot stand for ten classes.
    probe = MLPProbe(max_epochs=1, random_state=0).fit(rng.standard_normal((30, 4)), np.arange(30) % 10)
    assert len(probe.classes_) == 10


def test_each_class_of_a_small_split_is_trained_on():
    labels = np.arange(24) % 8
    for seed in range(20):
        training, validation = validation_split(labels, 0.2, np.random.RandomState(seed))
        assert sorted([*training, *validation]) == list(range(24))
        assert len(validation) == 5
        assert np.bincount(labels[training], minlength=8).min() >= 1


@pytest.mark.parametrize("n_samples", [20, 40])
def test_a_perceptron_of_few_samples_is_given_the_steps_to_learn(n_samples):
    scores = []
    for seed in range(5):
        X, y = make_blobs(2 * n_samples, 16, centers=4, center_box=(-3, 3), random_state=seed)
        probe = PROBES["classifier"]("cpu", seed, y).fit(X[:n_samples], y[:n_samples])
        assert probe.n_iter_ > 20
        scores.append(probe.score(X[n_samples:], y[n_samples:]))
    assert np.mean(scores) > 0.7


def test_a_split_has_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    for seed in range(5):
        first, second = validation_split(labels, 0.2, np.random.RandomState(seed))
        assert np.bincount(labels[first]).tolist() == [56, 16, 8]
        assert np.bincount(labels[second]).tolist() == [14, 4, 2]


def test_a_class_of_one_sample_is_trained_on_and_the_others_stratified():
    labels = np.array([0] * 20 + [1] * 10 + [2])
    for seed in range(5):
        training, validation = validation_split(labels, 0.2, np.random.RandomState(seed))
        assert sorted([*training, *validation]) == list(range(31))
        assert 30 in training
        assert np.bincount(labels[validation]).tolist() == [5, 2]


@pytest.mark.parametrize("batch_norm_logits", [False, True])
def test_the_layers_of_the_mlp_probe(digits, batch_norm_logits):
    probe = MLPProbe((7, 5), dropout=0.3, batch_norm_logits=batch_norm_logits, max_epochs=1, random_state=0).fit(
        *digits
    )
    hidden = ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    last = ["Linear", "BatchNorm1d"] if batch_norm_logits else ["Linear"]
    assert [type(layer).__name__ for layer in probe.mlp_] == [*hidden, *hidden, *last]
    assert [layer.out_features for layer in probe.mlp_ if isinstance(layer, nn.Linear)] == [7, 5, 10]
    assert {layer.p for layer in probe.mlp_ if isinstance(layer, nn.Dropout)} == {0.3}


def test_batches_of_a_network_are_drawn_anew_each_epoch():
    seen = []

    def read(rows):
        seen.append(rows)
        return torch.zeros(len(rows), 3)

    def blank(rows):
        return torch.zeros(len(rows), 3)

    targets = torch.arange(24) % 2
    parts = Samples(read, np.arange(20), targets), Samples(blank, np.arange(20, 24), targets)
    params = {"lr": 1e-3, "batch_size": 5, "max_epochs": 2, "patience": 5, "device": torch.device("cpu")}
    params |= {"criterion": nn.CrossEntropyLoss, "classes": range(2), "random_state": np.random.RandomState(0)}
    train(NeuralNetClassifier, MLP(3, (4,), 2, 0.0, False), *parts, **params)
    assert [len(rows) for rows in seen] == [5] * 8
    first, second = np.concatenate(seen[:4]), np.concatenate(seen[4:])
    for order in (first, second):
        assert sorted(order) == list(range(20))
        assert list(order) != list(range(20))
    assert list(first) != list(second)


def test_a_bound_is_that_of_the_best_epoch_and_training_goes_on_for_five_more(monkeypatch):
    # Of one epoch after another, and of the held-out samples in the end.
    bounds = iter([0.1, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0])
    seen = []

    def bound(scores, rows, limit, rng):
        with torch.no_grad():
            seen.append(scores(torch.arange(50), 1, np.random.RandomState(0))[0])
        return next(bounds)

    monkeypatch.setattr("skdim.evaluation.information._bound", bound)
    Z = np.random.default_rng(0).standard_normal((200, 3)).cumsum(axis=1)
    assert total_correlation_bound(Z, device="cpu", random_state=0) == 7.0
    assert next(bounds, None) is None
    assert torch.equal(seen[-1], seen[5])
    assert not torch.equal(seen[-2], seen[5])


def test_no_input_is_paired_with_its_own_embedding_as_if_they_were_independent(monkeypatch):
    def held_out_bound(critic, last_layer, scores, *rest):
        with torch.no_grad():
            positive, negative = scores(torch.arange(2), 50, np.random.RandomState(0))
        # Of two samples each has one other, in whatever pairing.
        assert torch.equal(negative, negative[:, :1].expand_as(negative))
        assert not torch.isclose(negative[:, :1], positive).any()
        return 3.0

    monkeypatch.setattr("skdim.evaluation.information._held_out_bound", held_out_bound)
    Z = np.random.default_rng(0).standard_normal((20, 2))
    assert mutual_information_bound(Z[:, :1], Z[:, 1:], device="cpu", random_state=0) == 3.0


def test_independent_dimensions_all_come_from_different_samples(monkeypatch):
    def held_out_bound(critic, last_layer, scores, *rest):
        seen = []
        critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            scores(torch.arange(10), 4, np.random.RandomState(0))
        joint, product = seen
        assert all(len(row.unique()) == 1 for row in joint)
        assert all(len(row.unique()) == 10 for row in product.flatten(0, 1))
        return 3.0

    monkeypatch.setattr("skdim.evaluation.information._held_out_bound", held_out_bound)
    # Each dimension says which sample it is from.
    Z = np.repeat(np.arange(10.0)[:, None], 10, axis=1)
    assert total_correlation_bound(Z, device="cpu", random_state=0) == 3.0


def test_a_network_stops_by_samples_that_it_is_not_trained_on():
    read = {"training": [], "validation": []}

    def reader(part):
        return lambda rows: read[part].append(rows) or torch.zeros(len(rows), 3)

    targets = torch.arange(24) % 2
    parts = (
        Samples(reader("training"), np.arange(20), targets),
        Samples(reader("validation"), np.arange(20, 24), targets),
    )
    params = {"lr": 1e-3, "batch_size": 5, "max_epochs": 2, "patience": 5, "device": torch.device("cpu")}
    params |= {"criterion": nn.CrossEntropyLoss, "classes": range(2), "random_state": np.random.RandomState(0)}
    train(NeuralNetClassifier, MLP(3, (4,), 2, 0.0, False), *parts, **params)
    assert sorted(np.concatenate(read["training"])) == sorted([*range(20)] * 2)
    assert sorted(np.concatenate(read["validation"])) == sorted([*range(20, 24)] * 2)


def test_fine_tuning_leaves_a_transformer_that_is_not_fitted_as_it_is(digits):
    dim = DIMTransformer(4, max_epochs=0, random_state=0)
    before = dict(vars(dim))
    FineTunedClassifier(dim, max_epochs=1, random_state=0).fit(digits[0][:60], digits[1][:60])
    assert vars(dim) == before


def test_the_untrained_encoder_of_a_table_has_the_seed_of_the_trained_one(digits):
    X, y = digits
    dim = DIMTransformer(8, max_epochs=0, random_state=5).fit(X)
    table = evaluate(dim, X[:100], y[:100], X[100:], y[100:], probes=["linear"], layers=["embedding"])
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    untrained = DIMTransformer(8, max_epochs=0, random_state=5).fit(X[:100])
    probe = LinearProbe(random_state=seed).fit(untrained.transform(X[:100]), y[:100])
    assert table["linear"].iloc[2] == pytest.approx(probe.score(untrained.transform(X[100:]), y[100:]), abs=1e-9)


def test_a_bound_is_measured_on_samples_that_chose_nothing(monkeypatch):
    rows_of = []
    monkeypatch.setattr(
        "skdim.evaluation.information._bound", lambda scores, rows, limit, rng: rows_of.append(rows) or 0.1
    )
    Z = np.random.default_rng(0).standard_normal((50, 2))
    mutual_information_bound(Z[:, :1], Z[:, 1:], max_epochs=2, device="cpu", random_state=0)
    first, second, test = (set(rows.tolist()) for rows in rows_of)
    assert first == second
    assert len(first) == len(test) == 10
    assert not first & test


def test_bounds_start_from_zero():
    Z = np.random.default_rng(0).standard_normal((50, 2))
    assert mutual_information_bound(Z[:, :1], Z[:, 1:], max_epochs=1, device="cpu", random_state=0) == pytest.approx(
        0, abs=0.1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skdim.evaluation.information.LR", 0.0)
        assert mutual_information_bound(Z[:, :1], Z[:, 1:], max_epochs=1, device="cpu", random_state=0) == 0


@pytest.mark.filterwarnings("ignore:X has the same value everywhere")
def test_crops_are_of_the_channels_and_the_type_of_the_images():
    X = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 6), dtype=np.uint8)
    X[:, 1] = 0
    scores = []
    for images, data_format in ((X, "channels_first"), (X.transpose(0, 2, 3, 1), "channels_last")):
        dim = DIMTransformer(4, max_epochs=0, data_format=data_format, random_state=0).fit(images)
        scores.append(retrieval_scorer(dim, images))
        seen = []
        dim.transform = lambda X, seen=seen: seen.append(X[:]) or X[:][:, 0, 0, :4].astype(np.float32)
        retrieval_scorer(dim, images)
        for crops in seen:
            assert crops.dtype == np.uint8
            assert crops.shape == X.shape
            assert crops.max() > 100
            assert not crops[:, 1].any()
    assert scores[0] == pytest.approx(scores[1])


def test_the_scorer_without_labels_leaves_the_names_of_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.random.default_rng(0).random((20, 64)), columns=[f"pixel {i}" for i in range(64)])
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(frame)
    retrieval_scorer(dim, frame)
    assert list(dim.feature_names_in_) == list(frame.columns)


def test_reconstructions_of_many_images_are_each_compared_with_their_own(digits, monkeypatch):
    X = np.tile(digits[0], (2, 1))
    compared = []
    monkeypatch.setattr(
        "skdim.evaluation.reconstruction.ms_ssim",
        lambda drawn, images, data_range: compared.append(images) or torch.ones(len(drawn)),
    )
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    reconstruction_ms_ssim(dim, X[:60], X, max_epochs=1, random_state=0)
    np.testing.assert_allclose(torch.cat(compared).flatten(1).numpy() * 16, X, atol=1e-4)


def test_a_reconstruction_does_not_depend_on_the_other_test_images(digits, monkeypatch):
    X = digits[0]
    drawn = []
    monkeypatch.setattr(
        "skdim.evaluation.reconstruction.ms_ssim",
        lambda images, others, data_range: drawn.append(images) or torch.ones(len(images)),
    )
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    for test in (X[60:100], X[60:62]):
        reconstruction_ms_ssim(dim, X[:60], test, max_epochs=1, random_state=0)
    torch.testing.assert_close(drawn[0][:2], drawn[1], rtol=1e-4, atol=1e-5)


def test_the_principal_components_of_a_table_are_those_of_the_training_images(digits):
    X, y = digits
    dim = DIMTransformer(6, max_epochs=0, random_state=0).fit(X)
    table = evaluate(dim, X[:80], y[:80], X[80:], y[80:], probes=["linear"], layers=["embedding", "hidden"])
    rows = table[table["features"] == "PCA"]
    # The hidden layer is wider than a quarter of the training images, which is the most.
    assert list(rows["width"]) == [6, 20]
    seed = np.random.RandomState(0).randint(np.iinfo(np.int32).max)
    pca = PCA(20, random_state=seed).fit(X[:80].astype(np.float32))
    train, test = (pca.transform(part.astype(np.float32)) for part in (X[:80], X[80:]))
    for width, accuracy in zip(rows["width"], rows["linear"], strict=True):
        probe = LinearProbe(random_state=seed).fit(train[:, :width], y[:80])
        assert accuracy == pytest.approx(probe.score(test[:, :width], y[80:]), abs=1e-9)


@pytest.mark.parametrize("probe", [LinearProbe(Cs=[1.0]), MLPProbe(lr=0.01, max_epochs=20)], ids=["linear", "mlp"])
def test_features_next_to_nothing_are_features(probe):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    X = rng.standard_normal((150, 5)) + 3 * y[:, None]
    assert clone(probe).set_params(device="cpu", random_state=0).fit(1e-32 * X, y).score(1e-32 * X, y) > 0.8


def test_features_of_any_scale_are_standardised_in_full():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    X = rng.standard_normal((150, 5)) + y[:, None]
    probe = LinearProbe(Cs=[1.0], random_state=0)
    usual, tiny = (probe.fit(scale * X, y).decision_function(scale * X) for scale in (1.0, 1e-6))
    np.testing.assert_allclose(tiny, usual, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("n_samples", "n_splits"), [(999, 5), (1000, 1)])
def test_few_samples_are_split_five_times(n_samples, n_splits, monkeypatch):
    sizes = []
    minimize = LinearProbe._minimize
    monkeypatch.setattr(
        LinearProbe, "_minimize", lambda self, X, *rest: sizes.append(len(X)) or minimize(self, X, *rest)
    )
    X = np.random.default_rng(0).standard_normal((n_samples, 2))
    LinearProbe(Cs=[0.1, 1.0], random_state=0).fit(X, X[:, 0] > 0)
    assert sizes == [n_samples * 4 // 5] * 2 * n_splits + [n_samples]


def test_two_samples_will_do_for_a_linear_probe():
    assert LinearProbe(random_state=0).fit([[0.0], [1.0]], [0, 1]).predict([[0.0], [1.0]]).tolist() == [0, 1]


@pytest.mark.parametrize("probe", [MLPProbe(max_epochs=3, random_state=0), LinearProbe(random_state=0)])
def test_a_constant_feature_may_be_negative(digits, probe):
    X, y = digits
    constant = np.full((len(X), 1), -0.1, dtype=np.float32)
    constant[::50] = np.nextafter(np.float32(-0.1), np.float32(-1))
    assert np.isinf(clone(probe).fit(np.hstack([X, constant]), y).scale_[-1])


def test_of_two_neighbours_the_nearer_wins():
    rng = np.random.default_rng(0)
    Z, y = rng.standard_normal((200, 3)), rng.integers(0, 2, 200)
    nearest = knn_probe(1).fit(Z[:150], y[:150]).predict(Z[150:])
    assert np.array_equal(knn_probe(2).fit(Z[:150], y[:150]).predict(Z[150:]), nearest)


def test_more_neighbours_outvote_nearer_ones():
    Z = np.array([3.0, 3.0, -2.0, -2.0, -2.0])[:, None]
    assert knn_probe(5).fit(Z, ["few", "few", "many", "many", "many"]).predict(Z[:1]) == ["many"]


@pytest.mark.parametrize(
    ("module", "classifier"),
    [
        ("probes", MLPProbe(random_state=0)),
        ("finetuning", FineTunedClassifier(DIMTransformer(4, max_epochs=0, random_state=0), random_state=0)),
    ],
)
def test_a_classifier_stops_by_samples_that_it_is_not_trained_on(digits, monkeypatch, module, classifier):
    parts = []

    def record(net_class, module, training, validation, **params):
        parts.extend([training.rows, validation.rows])
        return []

    monkeypatch.setattr(f"skdim.evaluation.{module}.train", record)
    classifier.fit(digits[0][:100], digits[1][:100])
    assert len(parts[1]) == 10
    assert sorted(np.concatenate(parts)) == list(range(100))


def test_networks_classify_in_float64(digits):
    dim = DIMTransformer(4, max_epochs=0, random_state=0)
    for classifier in (MLPProbe(max_epochs=1, random_state=0), FineTunedClassifier(dim, max_epochs=1, random_state=0)):
        assert classifier.fit(*digits).mlp_[0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(33, 16, [11] * 3), (7, 2, [3, 2, 2]), (3, 2, [3]), (180, 256, [18] * 10), (40, 256, [20] * 2)],
)
def test_batches_differ_by_one_and_none_is_of_one(n, batch_size, sizes):
    seen = []

    def read(rows):
        seen.append(len(rows))
        return torch.zeros(len(rows), 3)

    targets = torch.arange(n + 2) % 2
    parts = [Samples(read, rows, targets) for rows in (np.arange(n), np.arange(n, n + 2))]
    params = {"lr": 1e-3, "batch_size": batch_size, "max_epochs": 1, "patience": 5, "device": torch.device("cpu")}
    params |= {"criterion": nn.CrossEntropyLoss, "classes": range(2), "random_state": np.random.RandomState(0)}
    train(NeuralNetClassifier, MLP(3, (4,), 2, 0.0, False), *parts, **params)
    assert seen == [*sizes, 2]


def test_a_network_stops_where_its_loss_falls_by_less_than_a_ten_thousandth(digits):
    # So slowly does it learn.
    assert MLPProbe((), lr=1e-8, patience=3, batch_size=16, random_state=0).fit(*digits).n_iter_ == 4


def test_probabilities_of_more_samples_than_a_batch(digits):
    X, y = digits
    probe = MLPProbe(max_epochs=1, random_state=0).fit(X, y)
    many = np.tile(X, (30, 1))
    assert len(many) > 4096
    np.testing.assert_allclose(probe.predict_proba(many), np.tile(probe.predict_proba(X), (30, 1)), rtol=1e-9)


def test_crops_lie_anywhere_in_their_images():
    rows, columns = np.mgrid[:32.0, :32.0].astype(np.float32)
    X = np.broadcast_to(np.stack([rows, columns]), (300, 2, 32, 32)) + 0.0
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    seen = []
    dim.transform = lambda X: seen.append(X[:]) or X[:][:, 0, 0, :4]
    retrieval_scorer(dim, X)
    first, second = seen
    centers = np.concatenate([crops.mean(axis=(2, 3)) for crops in (first, second)], axis=1).T
    assert (np.ptp(centers, axis=1) > 12).all()
    assert np.abs(np.corrcoef(centers) - np.eye(4)).max() < 0.25


def test_crops_of_one_colour_keep_it():
    values = np.arange(200, dtype=np.uint8)[:, None, None, None]
    X = np.broadcast_to(values, (200, 1, 16, 16)).copy()
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    seen = []
    dim.transform = lambda X: seen.append(X[:]) or X[:][:, 0, 0, :4].astype(np.float32)
    retrieval_scorer(dim, X)
    for crops in seen:
        assert (crops == crops[:, :, :1, :1]).all()
        assert sorted(crops[:, 0, 0, 0]) == list(range(200))


def test_a_bound_that_never_rises_is_that_of_no_training(monkeypatch):
    bounds, seen = iter([-0.1, -0.2, -0.3, -0.4, -0.5, 7.0]), []

    def bound(scores, rows, limit, rng):
        with torch.no_grad():
            seen.append(scores(torch.arange(50), 1, np.random.RandomState(0))[0])
        return next(bounds)

    monkeypatch.setattr("skdim.evaluation.information._bound", bound)
    Z = np.random.default_rng(0).standard_normal((200, 3))
    assert total_correlation_bound(Z, device="cpu", random_state=0) == 7.0
    assert seen[0].any()
    assert not seen[-1].any()


def test_bounds_do_not_depend_on_units():
    Z = np.random.default_rng(0).standard_normal((200, 3)).cumsum(axis=1)
    params = {"max_epochs": 5, "device": "cpu", "random_state": 0}
    # Powers of two change no digit.
    scaled = Z * 2.0 ** np.array([10, -8, 3])
    assert total_correlation_bound(Z, **params) == total_correlation_bound(scaled, **params) > 0
    of_vectors = [mutual_information_bound(V[:, :2], V[:, 2:], **params) for V in (Z, scaled)]
    assert of_vectors[0] == of_vectors[1] > 0
    images = np.repeat(Z[:, :1, None], 8, axis=1).repeat(8, axis=2)
    of_images = [mutual_information_bound(factor * images, Z, **params) for factor in (1.0, 2.0**10)]
    assert of_images[0] == of_images[1] > 0


def test_a_bound_needs_as_many_inputs_as_embeddings():
    Z = np.zeros((20, 2))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        mutual_information_bound(Z, Z[:15])


def test_opposite_images_have_no_similarity():
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(images, 1 - images, data_range=1.0).tolist() == [0, 0]


def test_each_reconstruction_counts_as_much(digits, monkeypatch):
    # The 512 first images in a batch, and one.
    monkeypatch.setattr(
        "skdim.evaluation.reconstruction.ms_ssim",
        lambda drawn, images, data_range: torch.full((len(drawn),), float(len(drawn) == 1)),
    )
    X = np.tile(digits[0], (3, 1))[:513]
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    assert reconstruction_ms_ssim(dim, X[:20], X, max_epochs=1, random_state=0) == pytest.approx(1 / 513)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 33, 17)])
def test_images_of_odd_sides_are_decoded(shape):
    X = np.random.default_rng(0).random((20, *shape), dtype=np.float32)
    dim = DIMTransformer(4, image_shape=shape, data_format="channels_first", max_epochs=0, random_state=0).fit(X)
    assert 0 <= reconstruction_ms_ssim(dim, X, X, max_epochs=1, random_state=0) < 1


@pytest.mark.filterwarnings("ignore:All images are constant")
def test_constant_images_are_decoded():
    X = np.ones((20, 64), dtype=np.float32)
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)
    assert 0 <= reconstruction_ms_ssim(dim, X, X, max_epochs=1, random_state=0) <= 1


def test_the_layer_and_the_number_of_epochs_of_a_decoder_count(digits):
    X = digits[0][:60]
    dim = DIMTransformer(4, max_epochs=0, random_state=0).fit(X)

    def value(output_layer, max_epochs):
        return reconstruction_ms_ssim(
            dim.set_params(output_layer=output_layer), X, X, max_epochs=max_epochs, random_state=0
        )

    assert len({value("embedding", 1), value("embedding", 4), value("hidden", 1)}) == 3


def test_a_training_part_smaller_than_the_number_of_classes():
    X, y = np.random.default_rng(0).standard_normal((20, 4)), np.arange(20) % 10
    assert len(MLPProbe(validation_fraction=0.7, max_epochs=1, random_state=0).fit(X, y).classes_) == 10


class Plain(nn.Module):
    """An encoder of the user's, without the built-in ones' hidden layer."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(image_shape[0], 4, 2, 2), nn.Linear(4, n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(features.mean((2, 3))), features


def test_a_table_of_an_encoder_has_the_layers_that_it_has(digits):
    X, y = digits
    dim = DIMTransformer(4, encoder=Plain, max_epochs=0, random_state=0).fit(X)
    table = evaluate(dim, X, y, X, y, probes=["knn"])
    assert list(table["layer"][-2:]) == ["embedding", "features"]


def test_C_is_that_of_the_best_mean_accuracy_of_five_splits():
    X, y = load_digits(return_X_y=True)
    Cs, rng, n_different = (1e-4, 1e-2, 1.0), np.random.RandomState(0), 0
    for seed in range(6):
        rows = rng.permutation(len(X))[:90]
        Z = StandardScaler().fit_transform(StandardScaler().fit_transform(X)[rows] + 2 * rng.standard_normal((90, 64)))
        draws, scores = np.random.RandomState(seed), []
        for _ in range(5):
            train, test = validation_split(y[rows], 0.2, draws, min_training=1)
            models = [LogisticRegression(C=C, max_iter=1000).fit(Z[train], y[rows][train]) for C in Cs]
            scores.append([model.score(Z[test], y[rows][test]) for model in models])
        means = np.mean(scores, axis=0).round(9)
        best = np.flatnonzero(means == means.max())  # of equally good ones the loss decides
        assert LinearProbe(Cs=Cs, random_state=seed).fit(Z, y[rows]).C_ in np.array(Cs)[best]
        n_different += np.argmax(scores[0]) not in best
    assert n_different


def test_fine_tuning_trains_what_was_frozen_before(digits):
    X, y = digits[0][:100], digits[1][:100]
    dim = DIMTransformer(4, max_epochs=1, callbacks=[Freezer("encoder*")], random_state=0)
    classifier = FineTunedClassifier(dim, max_epochs=1, random_state=0).fit(X, y)
    weights = classifier.transformer_.encoder_.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights, clone(dim).fit(X).encoder_.parameters(), strict=True))
    assert not hasattr(classifier.transformer_, "net_")


@pytest.mark.parametrize("y", [np.zeros(40, int), np.r_[np.zeros(39, int), 1]])
@pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")
def test_linear_probe_scorer_raises_what_its_probes_do(y):
    X = np.random.default_rng(0).random((40, 1, 8, 8))
    dim = DIMTransformer(2, max_epochs=0, random_state=0).fit(X)
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_probe_scorer(dim, X, y)
