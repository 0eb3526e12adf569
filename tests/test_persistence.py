import pickle
import pickletools
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from skorch.callbacks import Callback
from torch import nn

from skdim import DIMTransformer
from skdim.devices import available_device
from skdim.evaluation import LinearProbe, MLPProbe


@pytest.fixture(scope="module")
def fitted(digits):
    X, y = digits
    dim = DIMTransformer(n_components=8, max_epochs=2, random_state=0)
    return make_pipeline(dim, LogisticRegression(max_iter=200)).fit(X, y)


class Told(Callback):
    """Not as scikit-learn's conventions want it: it cannot be cloned."""

    def __init__(self, name):
        self.names = [name]


def test_a_callback_that_cannot_be_cloned_is_left_out_of_a_pickle(digits):
    X, _ = digits
    dim = DIMTransformer(4, max_epochs=1, random_state=0, callbacks=[Told("a")]).fit(X)
    with pytest.warns(UserWarning, match="pickle of this DIMTransformer is without callbacks, which can't be cloned"):
        loaded = pickle.loads(pickle.dumps(dim))
    assert loaded.callbacks is None
    assert np.array_equal(loaded.transform(X), dim.transform(X))


def test_a_perceptron_in_mapped_memory_predicts_in_silence(digits, tmp_path):
    X, y = digits
    probe = MLPProbe(max_epochs=2, random_state=0).fit(X, y)
    joblib.dump(probe, tmp_path / "probe.joblib")
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        mapped = joblib.load(tmp_path / "probe.joblib", mmap_mode="r")
    finally:
        torch.set_warn_always(always)
    assert np.array_equal(mapped.predict_proba(X), probe.predict_proba(X))


def weight_bytes(encoder):
    return sum(tensor.numel() * 4 for tensor in encoder.state_dict().values())


def test_a_fresh_process_computes_equal_bits(fitted, digits, tmp_path):
    X, _ = digits
    joblib.dump(fitted, tmp_path / "pipeline.joblib")
    np.save(tmp_path / "X.npy", X)
    script = (
        "import joblib, numpy, sys; folder = sys.argv[1]; pipeline = joblib.load(folder + '/pipeline.joblib');"
        "numpy.save(folder + '/Z.npy', pipeline[:-1].transform(numpy.load(folder + '/X.npy')));"
        "assert pipeline.predict(numpy.load(folder + '/X.npy')).shape == (300,)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert np.array_equal(np.load(tmp_path / "Z.npy"), fitted[:-1].transform(X))


def test_the_file_is_little_more_than_the_weights(fitted, tmp_path):
    path = tmp_path / "pipeline.joblib"
    joblib.dump(fitted, path)
    assert path.stat().st_size <= 1.1 * weight_bytes(fitted[0].encoder_) + 200_000


def test_the_pickle_names_nothing_of_torch_or_skorch(fitted):
    strings = []
    for opcode, argument, _ in pickletools.genops(pickle.dumps(fitted)):
        # STACK_GLOBAL takes module and name from strings before it, GLOBAL and INST name both.
        if isinstance(argument, str) and ("UNICODE" in opcode.name or opcode.name in ("GLOBAL", "INST")):
            strings.append(argument)
    modules = {string.split()[0].split(".")[0] for string in strings if string.strip()}
    assert "skdim" in modules
    assert not modules & {"torch", "skorch"}


def test_what_a_copy_has_and_leaves_out(fitted, digits):
    dim = fitted[0]
    copy = pickle.loads(pickle.dumps(dim))
    assert copy.history_ == dim.history_
    assert copy.n_iter_ == 2
    assert copy.image_shape_ == (1, 8, 8)
    assert not copy.encoder_.training
    for name in ("net_", "discriminators_"):
        assert hasattr(dim, name)
        assert not hasattr(copy, name)
    assert np.array_equal(copy.transform(digits[0]), dim.transform(digits[0]))


def test_pickle_before_fit_and_after_partial_fit(digits):
    X, _ = digits
    dim = pickle.loads(pickle.dumps(DIMTransformer(n_components=4, random_state=0)))
    dim.partial_fit(X).partial_fit(X)
    copy = pickle.loads(pickle.dumps(dim))
    assert copy.n_iter_ == 2
    assert np.array_equal(copy.transform(X), dim.transform(X))


def test_a_copy_survives_parameters_set_after_fit(fitted, digits):
    dim = pickle.loads(pickle.dumps(fitted[0]))
    expected = dim.transform(digits[0])
    dim.set_params(n_components=3, encoder="stride1")
    assert np.array_equal(pickle.loads(pickle.dumps(dim)).transform(digits[0]), expected)


@pytest.mark.parametrize("method", ["partial_fit", "fit"])
def test_training_goes_on_from_a_loaded_encoder_with_a_warning(fitted, digits, method):
    X, _ = digits
    dim = pickle.loads(pickle.dumps(fitted[0])).set_params(warm_start=True)
    before = dim.transform(X)
    with pytest.warns(UserWarning, match="new discriminators and a new optimizer"):
        getattr(dim, method)(X)
    assert dim.n_iter_ == (3 if method == "partial_fit" else 4)
    after = dim.transform(X)
    fresh = clone(dim).set_params(max_epochs=0).fit(X).transform(X)
    assert not np.array_equal(after, before)
    assert np.corrcoef(after.ravel(), before.ravel())[0, 1] > np.corrcoef(after.ravel(), fresh.ravel())[0, 1]


def test_a_memory_mapped_file_loads(fitted, digits, tmp_path):
    joblib.dump(fitted, tmp_path / "pipeline.joblib")
    copy = joblib.load(tmp_path / "pipeline.joblib", mmap_mode="r")
    assert np.array_equal(copy[:-1].transform(digits[0]), fitted[:-1].transform(digits[0]))


def test_a_model_of_cuda_loads_on_the_cpu(fitted, digits, monkeypatch):
    # What a CUDA machine pickles differs from this pickle in the name of the device only.
    monkeypatch.setattr(fitted[0], "device_", torch.device("cuda", 1))
    state = pickle.dumps(fitted[0])
    monkeypatch.undo()
    copy = pickle.loads(state)
    if not torch.cuda.is_available():
        assert copy.device_ == torch.device("cpu")
        assert np.array_equal(copy.transform(digits[0]), fitted[0].transform(digits[0]))
    # Of two GPUs one may be all there is.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert available_device("cuda:1") == torch.device("cuda", 0)


@pytest.mark.gpu
def test_trained_on_cuda_loads_where_there_is_none(digits, tmp_path):
    X, _ = digits
    dim = DIMTransformer(n_components=8, max_epochs=2, device="cuda", random_state=0).fit(X)
    joblib.dump(dim, tmp_path / "dim.joblib")
    np.save(tmp_path / "X.npy", X)
    script = (
        "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; import joblib, numpy; folder = sys.argv[1];"
        "dim = joblib.load(folder + '/dim.joblib'); assert dim.device_.type == 'cpu';"
        "numpy.save(folder + '/Z.npy', dim.transform(numpy.load(folder + '/X.npy')))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "Z.npy"), dim.transform(X), rtol=1e-3, atol=1e-3)


class OwnEncoder(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, padding=1)
        self.linear = nn.Linear(6 * image_shape[1] * image_shape[2], n_components)

    def forward(self, images):
        features = torch.relu(self.conv(images))
        return self.linear(features.flatten(1)), features


@pytest.mark.parametrize("encoder", [OwnEncoder, OwnEncoder((1, 8, 8), 8)], ids=["class", "instance"])
def test_own_encoders_are_pickled_too(digits, encoder):
    X, _ = digits
    dim = DIMTransformer(n_components=8, encoder=encoder, max_epochs=1, random_state=0).fit(X)
    copy = pickle.loads(pickle.dumps(dim))
    assert np.array_equal(copy.transform(X), dim.transform(X))
    if isinstance(encoder, nn.Module):
        # The instance is a parameter: pickled beside the trained weights, once.
        assert copy.encoder is copy._encoder_spec
        assert len(pickle.dumps(dim)) < 2.2 * weight_bytes(dim.encoder_) + 20_000


def test_tied_weights_stay_tied(digits):
    class Tied(OwnEncoder):
        def __init__(self, image_shape, n_components):
            super().__init__(image_shape, n_components)
            self.same = self.linear

    globals()["Tied"] = Tied
    Tied.__qualname__ = "Tied"
    dim = DIMTransformer(n_components=8, encoder=Tied, max_epochs=1, random_state=0).fit(digits[0])
    copy = pickle.loads(pickle.dumps(dim))
    assert copy.encoder_.same.weight is copy.encoder_.linear.weight


@pytest.mark.parametrize(
    "estimator",
    [DIMTransformer(max_epochs=1, random_state=0), LinearProbe(), MLPProbe(max_epochs=1)],
    ids=lambda each: type(each).__name__,
)
def test_a_pickle_of_another_version_is_warned_of(digits, estimator, monkeypatch):
    X, y = digits
    fitted = clone(estimator).fit(X[:60], y[:60])
    pickle.loads(pickle.dumps(fitted))  # without a warning
    monkeypatch.setattr("skdim.base.__version__", "0.0.7")
    older = pickle.dumps(fitted)
    monkeypatch.undo()
    with pytest.warns(InconsistentVersionWarning, match=rf"{type(estimator).__name__} from version 0\.0\.7"):
        loaded = pickle.loads(older)
    assert not hasattr(loaded, "_skdim_version")
