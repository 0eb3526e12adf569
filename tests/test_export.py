import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import LayerEncoder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_pipeline.py"
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, 9, 10), dtype=np.uint8)


def fitted(X=IMAGES, **params):
    # Trained a little, so that batch norms differ from what they start as.
    params = {"n_components": 4, "max_epochs": 1, "mi_units": 8, "precision": "float32", "random_state": 0} | params
    return DIMTransformer(**params).fit(X)


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {"images": images})
    return values


def assert_same(dim, path, images, expected):
    for rows in (slice(None), slice(0, 1)):
        np.testing.assert_allclose(run(path, images[rows]), expected[rows], rtol=0, atol=1e-4 * abs(expected).max())
    assert expected.std() > 0


NETWORK = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="dcgan"),
        pytest.param({"encoder": "stride1"}, id="stride1"),
        pytest.param({"encoder": "alexnet"}, id="alexnet", marks=pytest.mark.slow),
        pytest.param({"encoder": "resnet"}, id="resnet", marks=pytest.mark.slow),
        pytest.param({"encoder": "resnet_folded"}, id="resnet_folded"),
        pytest.param({"multiple_globals": True}, id="multiple globals"),
        pytest.param({"prior": "normal", "prior_matching": "noise", "multiple_globals": True}, id="standardized"),
        pytest.param({"encoder": partial(LayerEncoder, NETWORK, "2")}, id="a network's layer"),
    ],
)
def test_a_file_computes_what_transform_does(params, tmp_path):
    dim = fitted(**params)
    dim.to_onnx(tmp_path / "dim.onnx")
    assert_same(dim, tmp_path / "dim.onnx", IMAGES, dim.transform(IMAGES))
    assert [path.name for path in tmp_path.iterdir()] == ["dim.onnx"]


@pytest.mark.parametrize("layer", ["hidden", "features"])
def test_the_output_is_the_layer_that_output_layer_names(layer, tmp_path):
    dim = fitted().set_params(output_layer=layer)
    path = str(tmp_path / "dim.onnx")
    dim.to_onnx(path)
    (output,) = onnx.load(path).graph.output
    assert output.name == layer
    assert_same(dim, path, IMAGES, dim.transform(IMAGES))


def test_images_have_the_dtype_of_the_training_images(tmp_path, digits):
    rows = digits[0][:30]
    dim = fitted(1000 + 50 * rows)
    dim.to_onnx(tmp_path / "dim.onnx")
    images = (1000 + 50 * rows).astype(np.float32).reshape(-1, 1, 8, 8)
    assert_same(dim, tmp_path / "dim.onnx", images, dim.transform(images))
    channels_last = fitted(IMAGES.transpose(0, 2, 3, 1))
    channels_last.to_onnx(tmp_path / "dim.onnx")
    assert_same(channels_last, tmp_path / "dim.onnx", IMAGES, fitted().transform(IMAGES))


def test_export_leaves_everything_else_alone(tmp_path, capfd, recwarn):
    dim = fitted()
    expected, state = dim.transform(IMAGES), torch.get_rng_state()
    dim.to_onnx(tmp_path / "dim.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(dim.transform(IMAGES), expected)
    # Nothing of the machine that exports.
    assert b".py" not in (tmp_path / "dim.onnx").read_bytes()


class FixedBatch(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], n_components, 3)

    def forward(self, images):
        features = self.conv(images)
        return features.reshape(len(images), features.shape[1], -1).mean(2), features


class OtherInExport(FixedBatch):
    def forward(self, images):
        features = self.conv(images)
        # A branch that tracing fixes.
        return features.mean((2, 3)) + torch.compiler.is_compiling(), features


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (FixedBatch, "encoder FixedBatch cannot be exported for any number of images"),
        (OtherInExport, "encoder OtherInExport computes other values of 'embedding'"),
    ],
)
def test_an_encoder_that_does_not_export_is_an_error(encoder, message, tmp_path):
    path = tmp_path / "dim.onnx"
    path.write_bytes(b"before")
    dim = fitted(encoder=encoder)
    with pytest.raises(ValueError, match=message):
        dim.to_onnx(path)
    assert path.read_bytes() == b"before"


@pytest.mark.filterwarnings("ignore:X has the same value everywhere")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_channel_that_was_constant(dtype, tmp_path):
    X = IMAGES.astype(dtype)
    X[:, 1] = 100
    dim = fitted(X)
    dim.to_onnx(tmp_path / "dim.onnx")
    assert_same(dim, tmp_path / "dim.onnx", IMAGES.astype(dtype), dim.transform(X))


def test_a_small_spread_about_a_large_mean(tmp_path):
    temperatures = np.random.default_rng(0).normal(300, 0.01, (12, 3, 9, 10)).astype(np.float32)
    dim = fitted(temperatures)
    dim.to_onnx(tmp_path / "dim.onnx")
    assert_same(dim, tmp_path / "dim.onnx", temperatures, dim.transform(temperatures))


def test_other_errors(tmp_path, monkeypatch):
    path = tmp_path / "dim.onnx"
    with pytest.raises(NotFittedError):
        DIMTransformer().to_onnx(path)
    dim = fitted(max_epochs=0)
    with pytest.raises(FileNotFoundError):
        dim.to_onnx(tmp_path / "missing" / "dim.onnx")
    for folder in ("", "."):
        with pytest.raises(IsADirectoryError):
            dim.to_onnx(folder)
    monkeypatch.setattr("skdim.export.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"DCGANEncoder has \d+ bytes of weights, but an ONNX file holds 1000"):
        dim.to_onnx(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"to_onnx requires onnxruntime.*`pip install onnxruntime`"):
        dim.to_onnx(path)
    assert not path.exists()


def test_the_example_merges_a_pipeline():
    pytest.importorskip("skl2onnx")
    output = subprocess.run([sys.executable, str(EXAMPLE)], check=True, capture_output=True, text=True).stdout
    assert "labels that differ: 0 of 450" in output
    assert float(re.search(r"differ by at most (\S+)", output)[1]) < 1e-4
    assert float(re.search(r"in onnxruntime ([\d.]+)%", output)[1]) > 90
