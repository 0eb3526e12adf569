import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from skdim import DIMTransformer


@parametrize_with_checks([DIMTransformer()])
def test_estimator_checks(estimator, check):
    check(estimator)


def probe(**params):
    dim = DIMTransformer(n_components=16, max_epochs=2, random_state=0, **params)
    return Pipeline([("dim", dim), ("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=200))])


def test_pipeline_on_rows_beats_chance(digits):
    X, y = digits
    assert probe().fit(X[:200], y[:200]).score(X[200:], y[200:]) > 0.5


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_pipeline_on_4d_images(colour_images, axes):
    X, y = colour_images
    X = X.transpose(axes)
    assert probe().fit(X[:40], y[:40]).score(X[40:], y[40:]) > 0.6


def test_layouts_and_rows_of_the_same_images_give_the_same_bits(colour_images):
    X, _ = colour_images
    dim = DIMTransformer(n_components=4, max_epochs=1, random_state=0)
    expected = dim.fit_transform(X)
    assert np.array_equal(expected, clone(dim).fit_transform(X.transpose(0, 2, 3, 1)))
    assert np.array_equal(expected, clone(dim).set_params(image_shape=(3, 12, 10)).fit_transform(X.reshape(60, -1)))
    rows = X.transpose(0, 2, 3, 1).reshape(60, -1)
    channels_last = clone(dim).set_params(image_shape=(3, 12, 10), data_format="channels_last")
    assert np.array_equal(expected, channels_last.fit_transform(rows))


@pytest.mark.parametrize("augmentation", [None, "standard"])
def test_layouts_of_the_same_grey_images_give_the_same_bits(digits, augmentation):
    X = digits[0][:100].reshape(-1, 8, 8).astype(np.uint8)
    dim = DIMTransformer(n_components=4, max_epochs=1, augmentation=augmentation, random_state=0)
    expected = dim.fit_transform(X)
    for same in (X[:, None], X[..., None], X[..., None].transpose(0, 3, 1, 2), X.reshape(-1, 64)):
        assert np.array_equal(clone(dim).fit_transform(same), expected)


def test_grid_search_has_the_same_best_score_for_any_n_jobs(digits):
    X, y = digits
    grid = {"dim__local_weight": [0.5, 1.0], "dim__global_weight": [0.0, 0.5], "dim__prior_weight": [0.1]}
    serial = GridSearchCV(probe(), grid, cv=2, n_jobs=1).fit(X, y)
    parallel = GridSearchCV(probe(), grid, cv=2, n_jobs=2).fit(X, y)
    assert serial.best_score_ == parallel.best_score_
    assert serial.best_params_ == parallel.best_params_
    assert np.array_equal(serial.cv_results_["mean_test_score"], parallel.cv_results_["mean_test_score"])
    assert np.array_equal(
        serial.best_estimator_["dim"].transform(X),
        parallel.best_estimator_["dim"].transform(X),
    )


def test_cross_val_score(digits):
    X, y = digits
    scores = cross_val_score(probe(), X, y, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.5


def test_clone_has_the_parameters_and_is_not_fitted(digits):
    fitted = DIMTransformer(n_components=4, max_epochs=1, lr=0.1, random_state=0).fit(digits[0])
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "encoder_")


def test_feature_names_and_pandas_output(digits):
    pandas = pytest.importorskip("pandas")
    X, _ = digits
    dim = DIMTransformer(n_components=3, max_epochs=1, random_state=0).set_output(transform="pandas")
    frame = dim.fit_transform(pandas.DataFrame(X, columns=[f"pixel{i}" for i in range(X.shape[1])]))
    assert list(frame.columns) == ["dimtransformer0", "dimtransformer1", "dimtransformer2"]
    assert list(dim.get_feature_names_out()) == list(frame.columns)
    assert (frame.dtypes == np.float32).all()
    assert dim.feature_names_in_[0] == "pixel0"


def test_feature_union(digits):
    X, _ = digits
    union = FeatureUnion(
        [("dim", DIMTransformer(n_components=5, max_epochs=1, random_state=0)), ("raw", StandardScaler())]
    )
    assert union.fit_transform(X).shape == (300, 5 + 64)
    assert make_pipeline(union).fit(X).get_feature_names_out()[0] == "dim__dimtransformer0"
