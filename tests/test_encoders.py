import copy
import gc
import math
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import (
    ENCODERS,
    AlexNetEncoder,
    DCGANEncoder,
    InvalidEncoderError,
    LayerEncoder,
    ResNetEncoder,
    StandardizedEncoder,
    layer_shapes,
    local_features,
    make_encoder,
    read_layers,
    receptive_fields,
)

NEW = ["alexnet", "resnet", "resnet_folded"]


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(name, image_shape, n_components=4, **kwargs):
    torch.manual_seed(0)
    return ENCODERS[name](image_shape, n_components, **kwargs).eval()


def build_meta(name, image_shape, n_components=64):
    with torch.device("meta"):
        return ENCODERS[name](image_shape, n_components).eval()


def shapes_of(layers):
    return {name: tuple(value.shape) for name, value in layers.items()}


# Sizes

LOCAL_AND_LAST = {
    "alexnet": {8: (8, 3), 17: (8, 3), 28: (6, 2), 32: (7, 3), 64: (15, 7), 65: (7, 3), 96: (11, 5), 224: (13, 6)},
    "resnet": {8: (8, 4), 17: (9, 5), 28: (7, 4), 32: (8, 4), 64: (8, 4), 96: (6, 3), 224: (7, 4)},
    "resnet_folded": {8: (3, 2), 17: (8, 4), 28: (6, 3), 32: (7, 4), 64: (7, 4), 96: (7, 4), 224: (7, 4)},
}
CHANNELS = {"alexnet": (384, 192), "resnet": (512, 1024), "resnet_folded": (512, 1024)}


@pytest.mark.parametrize(("name", "side"), [(name, side) for name in NEW for side in LOCAL_AND_LAST[name]])
def test_shapes(name, side):
    local, last = LOCAL_AND_LAST[name][side]
    n_local, n_last = CHANNELS[name]
    for n_channels in (1, 3, 5):
        with torch.device("meta"):
            encoder = build_meta(name, (n_channels, side, side))
            embedding, features = encoder(torch.zeros(2, n_channels, side, side))
            layers = encoder.layers(torch.zeros(2, n_channels, side, side))
        assert embedding.shape == (2, 64)
        assert features.shape == (2, n_local, local, local)
        assert shapes_of(layers) == {
            "embedding": (2, 64),
            "hidden": (2, 4096 if name == "alexnet" else 1024),
            "features": (2, n_last, last, last),
            "local": (2, n_local, local, local),
        }


ODD_SIZES = [
    *((side, side) for side in (1, 2, 3, 4, 5, 7, 10, 11, 13, 23, 45, 46, 70)),
    *((1, side) for side in (2, 3, 9, 33, 70, 784)),
    *((side, 1) for side in (2, 33)),
    *((2, 9), (3, 70), (70, 5), (12, 31), (33, 64), (65, 16)),
]


@pytest.mark.parametrize("name", NEW)
def test_images_of_any_size_and_signals_run(name):
    for height, width in ODD_SIZES:
        with torch.device("meta"):
            layers = build_meta(name, (3, height, width)).layers(torch.zeros(2, 3, height, width))
        assert layers["embedding"].shape == (2, 64), (height, width)
        _, _, rows, columns = layers["local"].shape
        # A side of one pixel stays one; a longer one is seen in patches wherever it is long enough for several.
        assert (rows == 1) >= (height == 1)
        assert (columns == 1) >= (width == 1)
        assert (min(rows, columns) > 1) >= (min(height, width) >= 6), (height, width)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    ("image_shape", "multiple_globals"),
    [((1, 1, 1), True), ((2, 2, 3), False), ((5, 1, 33), True), ((3, 17, 12), False)],
)
def test_gradient_reaches_every_parameter(name, image_shape, multiple_globals):
    encoder = build(name, image_shape, multiple_globals=multiple_globals).train()
    embedding, features = encoder(torch.randn(4, *image_shape))
    (embedding.sin().sum() + features.square().sum()).backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENCODERS))
def test_224_pixels_train(name):
    encoder = build(name, (3, 224, 224)).train()
    embedding, features = encoder(torch.randn(2, 3, 224, 224))
    (embedding.sin().sum() + features.square().mean()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


# The networks of the paper


def conv(n_in, n_out, kernel=3):
    """Weights of a convolution without bias and of its batch norm."""
    return n_in * n_out * kernel * kernel + 2 * n_out


def bottleneck(n_in, n_hidden, n_out):
    shortcut = 0 if n_in == n_out else conv(n_in, n_out, 1)
    return conv(n_in, n_hidden, 1) + conv(n_hidden, n_hidden) + conv(n_hidden, n_out, 1) + shortcut


ALEXNET_64 = sum(
    (
        *(conv(3, 96), conv(96, 192), conv(192, 384), conv(384, 384), conv(384, 192)),
        *(192 * 7 * 7 * 4096 + 2 * 4096, 4096 * 4096 + 2 * 4096, 4096 * 64 + 64),
    )
)
RESNET_32 = sum(
    (
        conv(3, 64),
        *(bottleneck(64, 64, 256), bottleneck(256, 64, 256)),
        *(bottleneck(256, 128, 512), bottleneck(512, 128, 512)),
        *(bottleneck(512, 256, 1024), bottleneck(1024, 256, 1024)),
        *(1024 * 4 * 4 * 1024 + 2 * 1024, 1024 * 64 + 64),
    )
)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("alexnet", 64, ALEXNET_64), ("resnet", 32, RESNET_32), ("resnet_folded", 32, RESNET_32)],
)
def test_parameters(name, side, expected):
    assert n_parameters(build_meta(name, (3, side, side))) == expected


@pytest.mark.parametrize(("name", "reference", "factor"), [("alexnet", 64, 1.01), ("resnet", 32, 2.05)])
def test_parameters_do_not_grow_with_the_image(name, reference, factor):
    most = factor * n_parameters(build_meta(name, (3, reference, reference)))
    assert all(n_parameters(build_meta(name, (3, side, side))) <= most for side in (45, 64, 91, 128, 181, 224, 512))


def outputs_of(encoder, image_shape, *types):
    """Kernel, stride and output shape of each layer of some types, in the order in which they run."""
    found = []
    for module in encoder.modules():
        if isinstance(module, types):
            module.register_forward_hook(
                lambda module, inputs, output: found.append(
                    (module.kernel_size, module.stride, *output.shape[1:])
                    if hasattr(module, "kernel_size")
                    else tuple(output.shape[1:])
                )
            )
    with torch.device("meta"):
        encoder(torch.zeros(2, *image_shape))
    return found


def test_alexnet_layers():
    three, one, two = (3, 3), (1, 1), (2, 2)
    found = outputs_of(build_meta("alexnet", (3, 64, 64)), (3, 64, 64), nn.Conv2d, nn.MaxPool2d, nn.Linear)
    assert found == [
        *((three, one, 96, 64, 64), (three, two, 96, 31, 31)),
        *((three, one, 192, 31, 31), (three, two, 192, 15, 15)),
        *((three, one, 384, 15, 15), (three, one, 384, 15, 15), (three, one, 192, 15, 15), (three, two, 192, 7, 7)),
        *((4096,), (4096,), (64,)),
    ]


def test_resnet_layers():
    found = outputs_of(build_meta("resnet", (3, 32, 32)), (3, 32, 32), nn.Conv2d, nn.Linear)
    expected = [((3, 3), (2, 2), 64, 16, 16)]
    side = 16
    for n_in, n_hidden, n_out, stride in [
        *((64, 64, 256, 1), (256, 64, 256, 1), (256, 128, 512, 2)),
        *((512, 128, 512, 1), (512, 256, 1024, 2), (1024, 256, 1024, 1)),
    ]:
        expected.append(((1, 1), (1, 1), n_hidden, side, side))
        side //= stride
        expected.append(((3, 3), (stride, stride), n_hidden, side, side))
        expected.append(((1, 1), (1, 1), n_out, side, side))
        if n_in != n_out:
            expected.append(((1, 1), (stride, stride), n_out, side, side))
    assert found == [*expected, (1024,), (64,)]


def test_a_bottleneck_adds_its_shortcut():
    block = build("resnet", (3, 32, 32)).local[2]
    maps = torch.randn(2, 256, 5, 5)
    with torch.no_grad():
        block.residual[-1].weight.zero_()
        torch.testing.assert_close(block(maps), maps.relu())


# Folded


def test_a_location_of_the_folded_encoder_is_its_crop_in_the_unfolded_one():
    folded, whole = build("resnet_folded", (3, 32, 32)), build("resnet", (3, 32, 32))
    with torch.no_grad():
        for ours, theirs in zip(folded.state_dict().values(), whole.state_dict().values(), strict=True):
            if ours.is_floating_point():
                theirs.copy_(ours.uniform_(0.1, 0.2) if ours.ndim == 1 else ours)
        images = torch.randn(2, 3, 32, 32)
        grid = folded.local(images)
        assert grid.shape == (2, 512, 7, 7)
        for i in range(7):
            for j in range(7):
                crop = images[:, :, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8]
                assert whole.local(crop).shape == (2, 512, 2, 2)
                torch.testing.assert_close(grid[:, :, i, j], whole.local(crop).mean((2, 3)), rtol=1e-4, atol=1e-5)
        # After the local features both are the same network.
        torch.testing.assert_close(folded.conv(grid), whole.conv(grid))


def test_crops_of_an_uneven_side_start_in_a_frame_of_zeros():
    encoder = build("resnet_folded", (1, 17, 20))
    images = torch.arange(1.0, 341.0).view(1, 1, 17, 20)
    crops = encoder.local[0].crops(images)
    framed = np.zeros((18, 20))
    framed[:17] = images[0, 0]
    expected = [framed[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] for i in range(8) for j in range(9)]
    np.testing.assert_array_equal(crops[:, 0], expected)


# Multiple globals


@pytest.mark.parametrize(
    ("name", "side", "grid"),
    [("dcgan", 32, 4), ("stride1", 16, 4), ("alexnet", 32, 3), ("resnet", 24, 3), ("resnet_folded", 32, 4)],
)
def test_multiple_globals_are_the_head_at_each_location(name, side, grid):
    encoder, shapes = make_encoder(name, (3, side, side), 5, multiple_globals=True)
    encoder.eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        embedding, local = encoder(images)
        layers = read_layers(encoder, images)
        assert embedding.shape == (2, 5, grid, grid)
        assert shapes["embedding"] == (5,)
        assert shapes == {key: shape[1:] for key, shape in shapes_of(layers).items()}
        torch.testing.assert_close(local, layers["local"])
        means = {}
        for i in range(grid):
            for j in range(grid):
                vector = layers["features"][:, :, i, j]
                for layer in (*encoder.hidden, encoder.embedding):
                    if isinstance(layer, nn.Conv2d):
                        bias = 0 if layer.bias is None else layer.bias
                        vector = vector @ layer.weight[:, :, 0, 0].T + bias
                    elif isinstance(layer, nn.BatchNorm2d):
                        vector = layer(vector[:, :, None, None])[:, :, 0, 0]
                    else:
                        vector = layer(vector)
                    if layer is encoder.hidden[-1]:
                        means["hidden"] = means.get("hidden", 0) + vector.clone() / grid**2
                torch.testing.assert_close(embedding[:, :, i, j], vector, rtol=1e-4, atol=1e-5)
                means["embedding"] = means.get("embedding", 0) + vector / grid**2
    torch.testing.assert_close(layers["embedding"], means["embedding"], rtol=1e-4, atol=1e-5)
    assert ("hidden" in layers) == (name != "stride1")
    if "hidden" in layers:
        torch.testing.assert_close(layers["hidden"], means["hidden"], rtol=1e-4, atol=1e-5)


class MapOfEmbeddings(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], n_components, 3)

    def forward(self, images):
        embedding = self.conv(images)
        return embedding[:, :, ::2], embedding


def test_an_encoder_of_the_users_may_return_a_map_of_embeddings():
    module, shapes = make_encoder(MapOfEmbeddings, (1, 8, 8), 4)
    assert shapes == {"local": (4, 6, 6), "embedding": (4,), "features": (4, 6, 6)}
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(read_layers(module, images)["embedding"], module(images)[0].mean((2, 3)))


def test_multiple_globals_of_an_encoder_of_the_users_are_refused():
    with pytest.raises(ValueError, match=r"multiple_globals=True needs an encoder of \['alexnet'.*return an embedding"):
        make_encoder(MapOfEmbeddings, (1, 8, 8), 4, multiple_globals=True)


# Local features and receptive fields


def test_local_features_stop_after_the_local_layers():
    images = torch.randn(2, 3, 16, 16)
    for name in ENCODERS:
        encoder = build(name, (3, 16, 16))
        with torch.no_grad():
            _, expected = encoder(images)
            encoder.conv.register_forward_hook(lambda *_: pytest.fail("runs later layers"))
            encoder.hidden.register_forward_hook(lambda *_: pytest.fail("runs later layers"))
            torch.testing.assert_close(local_features(encoder, images), expected)


def test_local_features_of_a_subclass_come_from_its_forward():
    class Sevens(DCGANEncoder):
        def forward(self, images):
            embedding, features = super().forward(images)
            return embedding, torch.full_like(features, 7)

    encoder = Sevens((3, 16, 16), 4)
    assert (local_features(encoder, torch.zeros(2, 3, 16, 16)) == 7).all()
    assert (receptive_fields(encoder, (3, 16, 16))[0] == 0).all()


def test_a_subclass_without_a_forward_of_its_own_has_all_layers():
    class Narrow(DCGANEncoder):
        max_width = 32

    shapes = layer_shapes(Narrow((3, 32, 32), 4), (3, 32, 32))
    assert shapes == {"local": (32, 8, 8), "embedding": (4,), "features": (32, 4, 4), "hidden": (1024,)}


def fields_by_hand(layers, length):
    """Intervals of pixels under a stack of (kernel, stride, padding) layers, from the last to the first."""
    n_out = length
    for kernel, stride, padding in layers:
        n_out = (n_out + 2 * padding - kernel) // stride + 1
    fields = []
    for i in range(n_out):
        first = last = i
        for kernel, stride, padding in reversed(layers):
            first, last = first * stride - padding, last * stride - padding + kernel - 1
        fields.append((max(0, first), min(length, last + 1)))
    return fields


@pytest.mark.parametrize(
    ("name", "side", "layers"),
    [
        ("dcgan", 32, [(4, 2, 1)] * 2),
        ("dcgan", 28, [(5, 2, 2)] * 2),
        ("dcgan", 64, [(4, 2, 1)] * 3),
        ("stride1", 20, [(4, 1, 0)] * 2),
        ("alexnet", 32, [(3, 1, 1), (3, 2, 0), (3, 1, 1), (3, 2, 0), (3, 1, 1)]),
        ("resnet", 32, [(3, 2, 1), (3, 1, 1), (3, 1, 1), (3, 2, 1)]),
    ],
)
def test_receptive_fields(name, side, layers):
    expected = fields_by_hand(layers, side)
    rows, columns = receptive_fields(ENCODERS[name]((1, side, side), 4), (1, side, side))
    assert rows.tolist() == columns.tolist() == [list(field) for field in expected]
    if (name, side) == ("dcgan", 32):
        assert {tuple(field) for field in expected[1:-1]} == {(4 * i - 3, 4 * i + 7) for i in range(1, 7)}


def test_receptive_fields_of_the_folded_encoder_are_its_crops():
    encoder = ENCODERS["resnet_folded"]((2, 32, 24), 4)
    rows, columns = receptive_fields(encoder, (2, 32, 24))
    assert rows.tolist() == [[4 * i, 4 * i + 8] for i in range(7)]
    assert columns.tolist() == [[3 * i, 3 * i + 6] for i in range(7)]
    assert encoder.training


def test_reading_an_encoder_leaves_each_part_in_its_mode():
    encoder = ENCODERS["dcgan"]((1, 16, 16), 4)
    frozen = next(part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d))
    frozen.eval()
    for read in (layer_shapes, receptive_fields):
        read(encoder, (1, 16, 16))
        assert encoder.training
        assert not frozen.training


def test_receptive_fields_of_other_encoders():
    class WithMeanOfColumns(MapOfEmbeddings):
        def forward(self, images):
            embedding, features = super().forward(images)
            return embedding, features + images.mean((1, 2), keepdim=True)[..., 2:]

    rows, columns = receptive_fields(WithMeanOfColumns((1, 8, 7), 4), (1, 8, 7))
    assert rows.tolist() == [[0, 8]] * 6
    assert columns.tolist() == [[i, i + 3] for i in range(5)]


# Any backbone


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps):
        return self.relu(self.bn1(self.conv1(maps)))


class Backbone(nn.Module):
    """Laid out as the residual networks of torchvision are."""

    def __init__(self, n_channels=3, n_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8, 6), nn.Identity())
        self.layer2 = nn.Sequential(Block(6, 12))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, n_classes)
        self.unused = nn.Linear(1, 1)

    def forward(self, images):
        maps = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images)))))
        return self.fc(self.avgpool(maps).flatten(1))


class ChannelsLast(nn.Module):
    def forward(self, maps):
        return maps.permute(0, 2, 3, 1)


class ReturnsTuple(nn.Module):
    def forward(self, maps):
        return maps, maps


class Tokens(nn.Module):
    def forward(self, maps):
        return maps.flatten(2).transpose(1, 2)


class WithBranch(Backbone):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, images):
        self.branch(self.layer1(self.conv1(images)))
        return super().forward(images)


def test_layer_encoder_returns_the_layer_and_the_output():
    torch.manual_seed(0)
    network = Backbone().eval()
    encoder = LayerEncoder(network, "layer1.0", (3, 16, 16), 10).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.layer1(network.relu(network.bn1(network.conv1(images))))
        for _ in range(2):
            embedding, features = encoder(images)
            # An output of the right width is the embedding itself.
            torch.testing.assert_close(embedding, network(images))
            torch.testing.assert_close(features, expected)
    assert n_parameters(encoder) == n_parameters(network)


@pytest.mark.parametrize("is_map", [False, True])
def test_layer_encoder_projects_an_output_of_another_width(is_map):
    torch.manual_seed(0)
    network = Backbone().eval()
    if is_map:
        network = nn.Sequential(network.conv1, network.bn1, network.layer1)
    layer = "2" if is_map else "layer1"
    encoder = LayerEncoder(network, layer, (3, 16, 16), 4).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output = network(images)
        expected = encoder.project(output.mean((2, 3)) if is_map else output)
        torch.testing.assert_close(encoder(images)[0], expected)
    assert encoder.project.in_features == (6 if is_map else 10)


def test_layer_encoder_copies_the_network():
    network = Backbone().train()
    network.bn1.eval()
    before = copy.deepcopy(network.state_dict())
    encoder = LayerEncoder(network, "layer1", (3, 16, 16), 4)
    encoder(torch.randn(2, 3, 16, 16))[0].sum().backward()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert encoder.network.layer1.training
    assert not encoder.network.bn1.training


def from_its_network(encoder):
    other = LayerEncoder(encoder.network, "layer1", (3, 16, 16), 4).eval()
    other.load_state_dict(encoder.state_dict())
    return other


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder)), from_its_network]
)
def test_copies_of_a_layer_encoder_capture_for_themselves(duplicate):
    torch.manual_seed(0)
    encoder = LayerEncoder(Backbone(), "layer1", (3, 16, 16), 4).eval()
    other = duplicate(encoder)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for value, expected in zip(other(images), encoder(images), strict=True):
            assert torch.equal(value, expected)
        other.network.conv1.weight.zero_()
        assert not torch.equal(other(images)[1], encoder(images)[1])


def test_layer_encoder_keeps_nothing_of_a_pass():
    encoder = LayerEncoder(Backbone(), "layer1", (3, 16, 16), 4)
    embedding, features = encoder(torch.randn(2, 3, 16, 16))
    references = weakref.ref(embedding), weakref.ref(features)
    del embedding, features
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_layer_encoder_nested_in_another():
    torch.manual_seed(0)
    inner = LayerEncoder(Backbone(8), "layer2", (8, 16, 16), 8).eval()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.inner = inner

        def forward(self, images):
            return self.inner(self.stem(images))[0]

    outer = LayerEncoder(Outer(), "stem", (3, 16, 16), 8).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        embedding, features = outer(images)
        torch.testing.assert_close(features, outer.network.stem(images))
        torch.testing.assert_close(embedding, inner(features)[0])


def test_threads_do_not_see_each_others_features():
    torch.manual_seed(0)
    encoder = LayerEncoder(Backbone(), "layer1", (3, 16, 16), 4).eval()
    batches = [torch.randn(n, 3, 16, 16) for n in range(1, 9)]

    def encode(images):
        with torch.inference_mode():
            return [encoder(images) for _ in range(20)]

    expected = [encode(images)[0] for images in batches]
    with ThreadPoolExecutor(8) as pool:
        for outputs, (embedding, features) in zip(pool.map(encode, batches), expected, strict=True):
            for output in outputs:
                assert torch.equal(output[0], embedding)
                assert torch.equal(output[1], features)


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        (Backbone(), "layer3", r"Backbone has no layer 'layer3'; some that it has are \['layer[12]', 'layer[12]'"),
        (Backbone, "layer1", "network must be an instance of torch.nn.Module, got <class"),
        (Backbone(), "unused", "layer 'unused' of Backbone is not run by its forward"),
        (Backbone(), "avgpool.0", "has no layer 'avgpool.0'"),
        (Backbone(), "fc", r"shape \(N, K, h, w\); for images of shape \(2, 3, 16, 16\) 'fc' of .* shape \(2, 10\)\."),
        (Backbone(n_channels=1), "layer1", r"network Backbone cannot take images of shape \(3, 16, 16\)"),
        (WithBranch(ReturnsTuple()), "branch", "'branch' of WithBranch returned tuple"),
        (WithBranch(Tokens()), "branch", r"returned the shape \(2, 64, 6\)"),
        (WithBranch(ChannelsLast()), "branch", r"shape \(2, 8, 8, 6\), which seems to have its channels last"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), ReturnsTuple()), "0", r"\(N, d\) or \(N, K, h, w\).* returned tuple"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), Tokens()), "0", r"Sequential returned the shape \(2, 196, 4\)"),
    ],
)
def test_wrong_networks_and_layers(network, layer, message):
    with pytest.raises(ValueError, match=message):
        LayerEncoder(network, layer, (3, 16, 16), 4)


def own_network(image_shape, n_components):
    return LayerEncoder(Backbone(image_shape[0]), "layer1", image_shape, n_components)


@pytest.mark.parametrize(
    "encoder",
    [own_network, partial(LayerEncoder, Backbone(), "layer1"), LayerEncoder(Backbone(), "layer1", (3, 12, 10), 6)],
    ids=["function", "partial", "instance"],
)
def test_fit_with_a_backbone(colour_images, encoder, tmp_path):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=encoder, max_epochs=2, batch_size=32, mi_units=8, random_state=0)
    Z = clone(dim).fit_transform(X)
    assert Z.shape == (60, 6)
    assert np.isfinite(Z).all()
    dim.fit(X)
    np.testing.assert_array_equal(dim.transform(X), Z)
    joblib.dump(dim, tmp_path / "dim.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "dim.joblib").transform(X), Z)
    np.testing.assert_array_equal(copy.deepcopy(dim).transform(X), Z)
    dim.save(tmp_path / "dim.safetensors")
    np.testing.assert_array_equal(DIMTransformer.load(tmp_path / "dim.safetensors", encoder=encoder).transform(X), Z)
    dim.set_params(warm_start=True).fit(X)
    assert dim.n_iter_ == 4


class Keeping(nn.Module):
    """Keeps a table that its first pass makes, and draws a projection that is no part of its state."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, padding=1)
        self.linear = nn.Linear(6, n_components)
        self.register_buffer("projection", torch.randn(6, 6), persistent=False)
        self.register_buffer("scale", torch.ones((), dtype=torch.bfloat16))
        self.table = None

    def forward(self, images):
        if self.table is None:
            self.table = torch.linspace(0, 1, images.shape[-1], device=images.device)
        features = self.scale * self.conv(images) * self.table
        return self.linear(features.mean(dim=(2, 3)) @ self.projection), features


def test_what_an_encoder_holds_beside_its_state_comes_with_copies(colour_images, tmp_path):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=Keeping, max_epochs=1, mi_units=8, random_state=3).fit(X)
    Z = dim.transform(X)
    dim.save(tmp_path / "dim.safetensors")
    loaded = DIMTransformer.load(tmp_path / "dim.safetensors", encoder=Keeping)
    for same in (pickle.loads(pickle.dumps(dim)), copy.deepcopy(dim), loaded):
        np.testing.assert_array_equal(same.transform(X), Z)
    # What a pass in inference mode has made serves in training.
    assert dim.partial_fit(X).n_iter_ == 2


class Filling(nn.Module):
    """Fills a buffer in its first pass."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, padding=1)
        self.linear = nn.Linear(6, n_components)
        self.register_buffer("positions", None)

    def forward(self, images):
        if self.positions is None:
            self.positions = torch.linspace(0, 1, images.shape[-1], device=images.device)
        features = self.conv(images) * self.positions
        return self.linear(features.mean(dim=(2, 3))), features


def test_a_buffer_that_the_first_pass_fills_comes_with_copies(colour_images):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=Filling, max_epochs=1, mi_units=8, random_state=0).fit(X)
    for same in (pickle.loads(pickle.dumps(dim)), copy.deepcopy(dim)):
        np.testing.assert_array_equal(same.transform(X), dim.transform(X))


def test_a_network_that_keeps_what_it_makes_of_images_may_be_probed(colour_images):
    network = Keeping((3, 12, 10), 6)
    network.register_forward_hook(lambda module, inputs, outputs: outputs[0])
    dim = DIMTransformer(6, encoder=partial(LayerEncoder, network, "conv"), max_epochs=1, mi_units=8)
    assert np.isfinite(dim.fit_transform(colour_images[0])).all()


class Growing(nn.Module):
    """Makes its last layer in its first pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.last = None

    def forward(self, images):
        maps = self.conv(images)
        if self.last is None:
            self.last = nn.Linear(6, 6, device=images.device)
        return self.last(maps.mean(dim=(2, 3)))


def test_a_network_that_makes_layers_in_its_first_pass(colour_images):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=partial(LayerEncoder, Growing(), "conv"), max_epochs=1, mi_units=8).fit(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dim)).transform(X), dim.transform(X))


def scripted(image_shape, n_components):
    return torch.jit.script(Plain(image_shape, n_components))


class Plain(nn.Module):
    def __init__(self, image_shape: tuple[int, int, int], n_components: int, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, track_running_stats=norm)
        self.linear = nn.Linear(6, n_components)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.norm(self.conv(images))
        return self.linear(features.relu().mean(dim=(2, 3))), features


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_encoder(colour_images):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=scripted, max_epochs=1, mi_units=8, random_state=0).fit(X)
    plain = DIMTransformer(6, encoder=Plain, max_epochs=1, mi_units=8, random_state=0).fit(X)
    np.testing.assert_allclose(dim.transform(X), plain.transform(X), rtol=1e-3, atol=1e-4)


def test_embeddings_that_depend_on_their_batch_are_warned_of(colour_images):
    with pytest.warns(UserWarning, match="An image has another embedding in another batch"):
        DIMTransformer(6, encoder=partial(Plain, norm=False), max_epochs=1, mi_units=8).fit(colour_images[0])


SHARED = Backbone()


class AroundShared(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.backbone = SHARED
        self.head = nn.Linear(6, n_components)

    def forward(self, images):
        network = self.backbone
        features = network.layer1(network.relu(network.bn1(network.conv1(images))))
        return self.head(features.mean(dim=(2, 3))), features


class WithClosures(nn.Module):
    """Holds what a copy would share or could not make: closures, a weight that is computed, and a lock."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 6, 3, 2)
        self.head = torch.nn.utils.weight_norm(nn.Linear(6, n_components))
        self.lock = threading.Lock()
        forward = self.conv.forward
        self.conv.forward = lambda images: forward(images).relu()
        self.conv.register_forward_hook(lambda module, _, features: setattr(self, "features", features))

    def forward(self, images):
        features = self.conv(images)
        return self.head(self.features.mean(dim=(2, 3))), features


class Lazy(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Sequential(nn.LazyConv2d(6, 3, 2), nn.LazyBatchNorm2d())
        self.head = nn.LazyLinear(n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.head(features.flatten(1)), features


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("encoder", [WithClosures, Lazy])
def test_what_a_callable_makes_anew_is_taken_as_it_is(colour_images, encoder, tmp_path):
    X, _ = colour_images
    dim = DIMTransformer(6, encoder=encoder, max_epochs=1, mi_units=8, random_state=0).fit(X)
    untrained = DIMTransformer(6, encoder=encoder, max_epochs=0, mi_units=8, random_state=0).fit(X)
    for (name, weight), start in zip(dim.encoder_.named_parameters(), untrained.encoder_.parameters(), strict=True):
        assert not torch.equal(weight, start), name
    Z = dim.transform(X)
    dim.save(tmp_path / "dim.safetensors")
    loaded = DIMTransformer.load(tmp_path / "dim.safetensors", encoder=encoder)
    for again in (pickle.loads(pickle.dumps(dim)), loaded):
        np.testing.assert_array_equal(again.transform(X), Z)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_from_elsewhere_that_cannot_be_copied_are_refused(colour_images):
    network = WithClosures((3, 12, 10), 6)
    with pytest.raises(ValueError, match="with weights that were there before and can't be copied"):
        DIMTransformer(6, encoder=lambda image_shape, n_components: network).fit(colour_images[0])


def test_a_callable_may_hand_out_weights_that_stay_the_users(colour_images, tmp_path):
    X, _ = colour_images
    before = copy.deepcopy(SHARED.state_dict())
    dim = DIMTransformer(6, encoder=AroundShared, max_epochs=1, mi_units=8, random_state=0)
    first, second = clone(dim).fit(X), clone(dim).fit(X)
    Z = first.transform(X)
    np.testing.assert_array_equal(second.transform(X), Z)
    first.save(tmp_path / "dim.safetensors")
    loaded = DIMTransformer.load(tmp_path / "dim.safetensors", encoder=AroundShared)
    for again in (first, loaded, pickle.loads(pickle.dumps(first))):
        np.testing.assert_array_equal(again.transform(X), Z)
    for name, weights in SHARED.state_dict().items():
        assert torch.equal(weights, before[name]), name


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            lambda image_shape, n_components: None,
            "encoder callable <lambda> must return a torch.nn.Module, got NoneType",
        ),
        (lambda: None, r"encoder callable <lambda> cannot be built as <lambda>\(image_shape, n_components\)"),
        (partial(LayerEncoder, Backbone(), "layer5"), "Backbone has no layer 'layer5'"),
        (partial(DCGANEncoder, n_components=5), r"cannot be built as functools\.partial"),
        (lambda image_shape, _: DCGANEncoder(image_shape, 5), "width 5, but n_components=6"),
    ],
)
def test_wrong_callables(colour_images, encoder, message):
    with pytest.raises(ValueError, match=message):
        DIMTransformer(6, encoder=encoder).fit(colour_images[0])


def test_a_wrong_encoder_is_told_the_shapes():
    class OnlyTokens(nn.Module):
        def forward(self, images):
            return images.flatten(1), images.flatten(2)

    message = (
        r"\(N, d, gh, gw\) and features of shape \(N, K, h, w\); for images of shape \(2, 1, 4, 4\) OnlyTokens ret"
    )
    with pytest.raises(InvalidEncoderError, match=message):
        layer_shapes(OnlyTokens(), (1, 4, 4))


# Through the estimator


@pytest.mark.parametrize(("name", "precision"), [*((name, "bfloat16") for name in NEW), ("resnet_folded", "float32")])
def test_fit(colour_images, name, precision):
    X = colour_images[0][:, :, :6, :5]
    params = {
        "data_format": "channels_first",
        "max_epochs": 1,
        "batch_size": 32,
        "mi_units": 8,
        "precision": precision,
        "random_state": 0,
    }
    dim = DIMTransformer(6, encoder=name, output_layer="hidden", **params).fit(X)
    assert math.isfinite(dim.loss_curve_[-1])
    Z = dim.transform(X)
    assert Z.shape == (60, 4096 if name == "alexnet" else 1024)
    assert np.isfinite(Z).all()
    if precision == "float32":
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(dim)).transform(X), Z)


class SeesLayouts(nn.Module):
    """Notes, of each batch of 20 images or their two views, whether images and weights have their channels last."""

    seen = []

    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 4, 3)
        self.linear = nn.Linear(4, n_components)

    def forward(self, images):
        if len(images) in (20, 40):
            weight = self.conv.weight
            are_last = [each.is_contiguous(memory_format=torch.channels_last) for each in (images, weight)]
            # Of a single channel only the strides tell.
            self.seen.append([*are_last, weight.stride(1) == 1])
        features = self.conv(images)
        return self.linear(features.mean((2, 3))), features


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("params", [{}, {"augmentation": "standard"}])
def test_convolutions_compute_with_the_channels_last(colour_images, monkeypatch, tmp_path, n_channels, params):
    X = np.ascontiguousarray(colour_images[0][:, :n_channels])
    monkeypatch.setattr(SeesLayouts, "seen", seen := [])
    monkeypatch.setattr("skdim.inference.CPU_BATCH", 20)
    params = params | {"encoder": SeesLayouts, "mi_units": 8, "batch_size": 20, "max_epochs": 2, "device": "cpu"}
    dim = DIMTransformer(4, **params).fit(X)
    dim.save(tmp_path / "dim.safetensors")
    loaded = DIMTransformer.load(tmp_path / "dim.safetensors", encoder=SeesLayouts, device="cpu")
    for each in (dim, pickle.loads(pickle.dumps(dim)), loaded):
        n_seen = len(seen)
        each.transform(X)
        assert len(seen) == n_seen + 3
    assert len(seen) == 2 * 3 + 3 * 3
    assert np.all(seen)


@pytest.mark.parametrize(
    ("encoder_class", "kwargs"), [(AlexNetEncoder, {}), (ResNetEncoder, {}), (ResNetEncoder, {"folded": True})]
)
@pytest.mark.parametrize("multiple_globals", [False, True])
def test_a_state_dict_holds_the_whole_encoder(encoder_class, kwargs, multiple_globals):
    image_shape = (2, 9, 9)
    encoder = encoder_class(image_shape, 4, multiple_globals=multiple_globals, **kwargs)
    encoder(torch.randn(4, *image_shape))
    other = encoder_class(image_shape, 4, multiple_globals=multiple_globals, **kwargs).eval()
    other.load_state_dict(encoder.state_dict())
    encoder.eval()
    images = torch.randn(2, *image_shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for value, expected in zip(other(images), encoder(images), strict=True):
            torch.testing.assert_close(value, expected)
        # Both outputs are in the layout that the critics compute fastest in.
        assert other(images)[1].is_contiguous(memory_format=torch.channels_last)


def test_a_standardized_encoder_standardises_over_images_and_locations():
    class Stub(nn.Module):
        def forward(self, images):
            return images, images[:, :1]

    maps = 3 + 2 * torch.randn(5, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    encoder = StandardizedEncoder(Stub(), 3)
    assert not [*encoder.parameters()]
    for embedding, dims in ((maps, (0, 2, 3)), (maps[:, :, 0, 0], 0)):
        variance, mean = torch.var_mean(embedding, dims, correction=0, keepdim=True)
        torch.testing.assert_close(encoder(embedding)[0], (embedding - mean) / (variance + 1e-5).sqrt())


@pytest.mark.parametrize("multiple_globals", [False, True])
def test_hidden_layers_have_batch_norm_and_relu(multiple_globals):
    head = DCGANEncoder((1, 16, 16), 4, multiple_globals=multiple_globals).hidden
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == (
        ["Identity", "Conv2d", "BatchNorm2d", "ReLU"]
        if multiple_globals
        else ["FlattenMap", "Linear", "BatchNorm1d", "ReLU"]
    )


@pytest.mark.parametrize(("side", "n_strided"), [(32, 0), (40, 0), (48, 1), (64, 1), (88, 1), (96, 2)])
def test_resnet_halves_once_more_for_each_doubling_beyond_32_to_the_nearest(side, n_strided):
    with torch.device("meta"):
        encoder = ResNetEncoder((3, side, side), 4)
    stem = [layer for layer in encoder.local if isinstance(layer, nn.Sequential)]
    assert len(stem) == 1 + n_strided
