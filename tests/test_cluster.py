"""Searches over a cluster of two workers find, to the bit, what they find over two processes of loky."""

import os

import numpy as np
import pytest
from joblib import parallel_config
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

PIPELINE = Pipeline(
    [
        ("dim", DIMTransformer(n_components=8, mi_units=8, max_epochs=1, device="cpu", random_state=0)),
        ("scale", StandardScaler()),
        ("classify", LogisticRegression(C=0.01, max_iter=500)),
    ]
)
SEARCHES = {
    "grid": GridSearchCV(
        PIPELINE,
        {"dim__prior_weight": [0.0, 0.1], "dim__lr": [1e-3, 5e-3]},
        scoring={
            # All bits of the embedding are in it; accuracy hardly has any.
            "log_loss": "neg_log_loss",
            # The GPU that the worker of a fit sees. A lambda travels to workers that cannot import this file.
            "gpu": lambda *_: {"0": 0, "1": 1}.get(os.environ.get("CUDA_VISIBLE_DEVICES"), -1),
        },
        refit="log_loss",
        cv=2,
        error_score="raise",
    ),
    "halving": HalvingGridSearchCV(
        PIPELINE,
        {"dim__prior_weight": [0.0, 0.1]},
        scoring="neg_log_loss",
        resource="dim__max_epochs",
        max_resources=2,
        factor=2,
        cv=2,
        error_score="raise",
    ),
}


@pytest.fixture(scope="module")
def by_loky(digits):
    with parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
        return {name: clone(search).fit(*digits) for name, search in SEARCHES.items()}


@pytest.fixture(scope="module")
def dask_client():
    """A client of two workers, each with one GPU to see, as dask-cuda starts them."""
    distributed = pytest.importorskip("distributed")
    local = {"host": "127.0.0.1"}
    workers = {
        gpu: {
            "cls": distributed.Nanny,
            "options": local | {"nthreads": 1, "env": {"CUDA_VISIBLE_DEVICES": str(gpu)}},
        }
        for gpu in range(2)
    }
    scheduler = {"cls": distributed.Scheduler, "options": local | {"port": 0, "dashboard": False}}
    with distributed.SpecCluster(workers, scheduler) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def ray_cluster():
    """Two CPUs and two GPUs; ray takes our word for the latter."""
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    register_ray()
    yield
    ray.shutdown()


def assert_found_the_same(found, expected, X):
    for column, values in expected.cv_results_.items():
        if not column.endswith(("_time", "_gpu")):
            np.testing.assert_array_equal(found.cv_results_[column], values, err_msg=column)
    assert found.best_params_ == expected.best_params_
    assert np.array_equal(found.best_estimator_["dim"].transform(X), expected.best_estimator_["dim"].transform(X))
    assert np.array_equal(found.predict_proba(X), expected.predict_proba(X))


def gpus_that_trained(search):
    return {gpu for split in range(2) for gpu in search.cv_results_[f"split{split}_test_gpu"]}


def test_grid_search_by_dask(digits, by_loky, dask_client):
    with parallel_config("dask"):
        found = clone(SEARCHES["grid"]).fit(*digits)
    assert_found_the_same(found, by_loky["grid"], digits[0])
    assert gpus_that_trained(found) == {0, 1}


def test_halving_by_dask(digits, by_loky, dask_client):
    with parallel_config("dask"):
        found = clone(SEARCHES["halving"]).fit(*digits)
    assert_found_the_same(found, by_loky["halving"], digits[0])


def test_a_worker_of_dask_fits_for_another_process(digits, by_loky, dask_client):
    expected = by_loky["grid"].best_estimator_
    fitted = dask_client.submit(clone(expected).fit, *digits).result()
    assert np.array_equal(fitted["dim"].transform(digits[0]), expected["dim"].transform(digits[0]))


def test_grid_search_by_ray(digits, by_loky, ray_cluster):
    with parallel_config("ray", n_jobs=2, ray_remote_args={"num_gpus": 1}):
        found = clone(SEARCHES["grid"]).fit(*digits)
    assert_found_the_same(found, by_loky["grid"], digits[0])
    assert gpus_that_trained(found) == {0, 1}


# ray starts its workers anew for each round.
@pytest.mark.slow
def test_halving_by_ray(digits, by_loky, ray_cluster):
    with parallel_config("ray", n_jobs=-1):
        found = clone(SEARCHES["halving"]).fit(*digits)
    assert_found_the_same(found, by_loky["halving"], digits[0])
