from contextlib import contextmanager
from threading import Barrier, Thread

import numpy as np
import pytest
import torch

from skdim import DIMTransformer
from skdim.encoders import DCGANEncoder

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)


def switches():
    """Read the switches that reduce float32, the older two and the newer ones."""
    values = [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]
    if hasattr(torch.backends.cudnn, "conv"):
        operations = [torch.backends.cuda.matmul]
        for backend in (torch.backends.cudnn, torch.backends.mkldnn):
            operations += [backend.conv, backend.rnn]
        values += [operation.fp32_precision for operation in [*operations, torch.backends.mkldnn.matmul]]
    return values


class Watching(DCGANEncoder):
    """Notes the switches where it transforms, and meets other threads there."""

    seen = []
    barrier = None

    def forward(self, images):
        if not self.training and len(images) > 8:
            self.seen.append(switches())
            if self.barrier is not None:
                self.barrier.wait(timeout=60)
        return super().forward(images)


@contextmanager
def reduced():
    """Let torch multiply matrices in TF32 or bfloat16, where the hardware can."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fitted(encoder="dcgan", **params):
    return DIMTransformer(4, encoder=encoder, max_epochs=0, random_state=0, **params).fit(IMAGES)


def test_transform_computes_in_full_float32_whatever_is_switched_on():
    dim = fitted()
    expected = dim.transform(IMAGES)
    with reduced():
        assert np.array_equal(dim.transform(IMAGES), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_switches_are_off_inside_and_restored(monkeypatch, fails):
    dim = fitted(Watching)
    monkeypatch.setattr(Watching, "seen", [])
    with reduced():
        before = switches()
        if fails:
            monkeypatch.setattr("skdim.inference.read_layers", lambda encoder, images: encoder(images)["none"])
            with pytest.raises(TypeError):
                dim.transform(IMAGES)
        else:
            dim.transform(IMAGES)
        assert switches() == before
    assert Watching.seen == [[False, "highest", *["ieee"] * (len(before) - 2)]]


def test_switches_are_restored_by_the_last_of_several_threads(monkeypatch):
    dim = fitted(Watching)
    monkeypatch.setattr(Watching, "seen", [])
    monkeypatch.setattr(Watching, "barrier", Barrier(2))
    with reduced():
        before = switches()
        threads = [Thread(target=dim.transform, args=(IMAGES[:n],)) for n in (20, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert switches() == before
    assert len(Watching.seen) == 2


@pytest.mark.gpu
def test_transform_on_cuda_is_float32_and_not_tf32():
    on_cuda = fitted(device="cuda")
    assert torch.backends.cudnn.allow_tf32  # torch's default, with which convolutions are wrong in the third digit
    Z = on_cuda.transform(IMAGES)
    assert torch.backends.cudnn.allow_tf32
    expected = on_cuda.to("cpu").transform(IMAGES)
    np.testing.assert_allclose(Z, expected, rtol=0, atol=5e-5 * abs(expected).max())


@pytest.mark.gpu
def test_transform_on_cuda_of_more_images_than_a_batch():
    many = np.concatenate([IMAGES] * 120)  # 2400, the last of three batches short
    dim = fitted(device="cuda")
    expected = np.concatenate([dim.transform(IMAGES)] * 120)
    np.testing.assert_allclose(dim.transform(many), expected, rtol=0, atol=1e-5 * abs(expected).max())
