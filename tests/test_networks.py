import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, layer_norm, linear, relu

from skdim.discriminators import (
    Critic,
    GlobalConcatCritic,
    GlobalDotCritic,
    LocalConcatCritic,
    LocalDotCritic,
    PriorDiscriminator,
    PriorNoise,
)
from skdim.encoders import ENCODERS as BUILT_IN
from skdim.encoders import DCGANEncoder, FlattenMap, Stride1Encoder, layer_shapes, make_encoder
from skdim.encoders.blocks import padded_conv

ENCODERS = [DCGANEncoder, Stride1Encoder]
CRITICS = [LocalDotCritic, LocalConcatCritic, GlobalDotCritic, GlobalConcatCritic]
CONCAT_CRITICS = [LocalConcatCritic, GlobalConcatCritic]
DOT_CRITICS = [LocalDotCritic, GlobalDotCritic]
IS_LOCAL = {LocalDotCritic: True, LocalConcatCritic: True, GlobalDotCritic: False, GlobalConcatCritic: False}

STRIDE1_PARAMETERS = sum(
    (
        4 * 4 * 3 * 64 + 64,
        4 * 4 * 64 * 128 + 2 * 128,
        4 * 4 * 128 * 256 + 2 * 256,
        4 * 4 * 256 * 512 + 2 * 512,
        512 * 20 * 20 * 64 + 64,
    )
)
DCGAN_PARAMETERS = sum(
    (
        4 * 4 * 3 * 64 + 2 * 64,
        4 * 4 * 64 * 128 + 2 * 128,
        4 * 4 * 128 * 256 + 2 * 256,
        256 * 4 * 4 * 1024 + 2 * 1024,
        1024 * 64 + 64,
    )
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (GlobalDotCritic((64, 4, 3), 4, 8).feature_head, (64, 4, 3)),
        lambda: (GlobalDotCritic((64, 6, 3), 4, 8).feature_head, (64, 6, 3)),
        lambda: (BUILT_IN["resnet_folded"]((1, 10, 8), 4), (1, 10, 8)),
        lambda: (BUILT_IN["resnet"]((1, 30, 8), 4), (1, 30, 8)),
        lambda: (BUILT_IN["dcgan"]((1, 30, 8), 4), (1, 30, 8)),
    ],
    ids=["critic 4 x 3", "critic 6 x 3", "resnet_folded", "resnet", "dcgan"],
)
def test_thin_maps_are_finite_in_bfloat16(make):
    network, shape = make()
    images = torch.randn(16, *shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(10):
        # What convolutions leave out is then not finite.
        del [torch.full((1 << size,), torch.nan) for size in range(4, 18)][:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(images)
        output = output if isinstance(output, torch.Tensor) else output[0]
        output.float().square().mean().backward()
        assert output.isfinite().all()
        assert images.grad.isfinite().all()
        assert all(weight.grad.isfinite().all() for weight in network.parameters())
        network.zero_grad()
        images.grad = None


@pytest.mark.parametrize("size", [(4, 3), (2, 6), (5, 2)])
def test_a_kernel_without_its_padding_is_the_same_function(size):
    conv, _ = padded_conv(3, 5, size, (4, 4), (2, 2))
    padding = [1 if side > 3 else 0 for side in size]
    assert conv.padding == tuple(padding)
    padded = nn.Conv2d(3, 5, 4, 2, 1, bias=False)
    with torch.no_grad():
        padded.weight.zero_()
        rows, columns = (slice(None) if side > 3 else slice(1, 1 + side) for side in size)
        padded.weight[:, :, rows, columns] = conv.weight
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(conv(images), padded(images))


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def modules_of(module, *types):
    return [child for child in module.modules() if isinstance(child, types)]


def layer_kinds(module):
    return [
        type(child).__name__
        for child in module.modules()
        if not isinstance(child, nn.Sequential | nn.Identity | FlattenMap) and not list(child.children())
    ]


def run_meta(encoder_class, image_shape, n_components=3):
    """Build and run an encoder without memory or arithmetic: shapes only."""
    with torch.device("meta"):
        encoder = encoder_class(image_shape, n_components).eval()
        return encoder(torch.zeros(2, *image_shape))


def output_shapes(encoder, image_shape, *types):
    shapes = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
        for module in modules_of(encoder, *types)
    ]
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, *image_shape))
    for hook in hooks:
        hook.remove()
    return shapes


def multiply_adds(encoder, image_shape):
    shapes = output_shapes(encoder, image_shape, nn.Conv2d, nn.Linear)
    layers = modules_of(encoder, nn.Conv2d, nn.Linear)
    return sum(layer.weight.numel() * math.prod(shape[1:]) for layer, shape in zip(layers, shapes, strict=True))


# Encoders


def test_stride1_parameters():
    assert STRIDE1_PARAMETERS == 15_864_704
    with torch.device("meta"):
        assert n_parameters(Stride1Encoder((3, 32, 32), 64)) == STRIDE1_PARAMETERS


def test_dcgan_parameters():
    assert DCGAN_PARAMETERS == 4_921_280
    with torch.device("meta"):
        assert n_parameters(DCGANEncoder((3, 32, 32), 64)) == DCGAN_PARAMETERS


def test_stride1_layers():
    image_shape = (3, 32, 32)
    encoder = Stride1Encoder(image_shape, 64)
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert layer_kinds(encoder) == ["Conv2d", "ReLU", *block, *block, *block, "Linear"]
    convs = modules_of(encoder, nn.Conv2d)
    assert [conv.bias is not None for conv in convs] == [True, False, False, False]
    assert {(conv.kernel_size, conv.stride, conv.padding) for conv in convs} == {((4, 4), (1, 1), (0, 0))}
    assert output_shapes(encoder, image_shape, nn.Conv2d) == [(64, 29, 29), (128, 26, 26), (256, 23, 23), (512, 20, 20)]
    assert multiply_adds(encoder, image_shape) / 1e6 == pytest.approx(1220.5, abs=0.05)


def test_stride1_returns_embedding_and_26_by_26_features():
    encoder = Stride1Encoder((3, 32, 32), 64).eval()
    with torch.no_grad():
        embedding, features = encoder(torch.zeros(1, 3, 32, 32))
        layers = encoder.layers(torch.zeros(1, 3, 32, 32))
    assert embedding.shape == (1, 64)
    assert features.shape == (1, 128, 26, 26)
    assert {name: tuple(value.shape) for name, value in layers.items()} == {
        "embedding": (1, 64),
        "features": (1, 512, 20, 20),
        "local": (1, 128, 26, 26),
    }


@pytest.mark.parametrize(
    ("image_shape", "kernel", "padding", "stages", "local"),
    [
        ((3, 32, 32), 4, 1, [(64, 16, 16), (128, 8, 8), (256, 4, 4)], (128, 8, 8)),
        ((3, 64, 64), 4, 1, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)], (256, 8, 8)),
        ((1, 28, 28), 5, 2, [(64, 14, 14), (128, 7, 7)], (128, 7, 7)),
    ],
)
def test_dcgan_layers(image_shape, kernel, padding, stages, local):
    encoder = DCGANEncoder(image_shape, 64)
    convolutional = ["Conv2d", "BatchNorm2d", "ReLU"] * len(stages)
    assert layer_kinds(encoder) == [*convolutional, "Linear", "BatchNorm1d", "ReLU", "Linear"]
    convs = modules_of(encoder, nn.Conv2d)
    assert {(conv.kernel_size, conv.stride, conv.padding, conv.bias) for conv in convs} == {
        ((kernel, kernel), (2, 2), (padding, padding), None)
    }
    hidden, embedding = modules_of(encoder, nn.Linear)
    assert hidden.bias is None
    assert embedding.bias is not None
    assert output_shapes(encoder, image_shape, nn.Conv2d) == stages
    assert output_shapes(encoder, image_shape, nn.Linear) == [(1024,), (64,)]
    with torch.no_grad():
        layers = encoder.eval().layers(torch.zeros(2, *image_shape))
    assert {name: tuple(value.shape) for name, value in layers.items()} == {
        "embedding": (2, 64),
        "hidden": (2, 1024),
        "features": (2, *stages[-1]),
        "local": (2, *local),
    }


def test_dcgan_multiply_adds():
    image_shape = (3, 32, 32)
    assert multiply_adds(DCGANEncoder(image_shape, 64), image_shape) / 1e6 == pytest.approx(21.82, abs=0.005)


LARGE_MAPS = {
    "dcgan": ((512, 7, 7), (512, 7, 7)),
    "stride1": ((128, 54, 54), (512, 48, 48)),
    "alexnet": ((384, 13, 13), (192, 6, 6)),
    "resnet": ((512, 7, 7), (1024, 4, 4)),
    "resnet_folded": ((512, 7, 7), (1024, 4, 4)),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_maps_of_224_pixels_are_of_moderate_size(name):
    with torch.device("meta"):
        layers = BUILT_IN[name]((3, 224, 224), 64).eval().layers(torch.zeros(2, 3, 224, 224))
    local, last = LARGE_MAPS[name]
    assert layers["embedding"].shape == (2, 64)
    assert layers["local"].shape == (2, *local)
    assert layers["features"].shape == (2, *last)


def failures(encoder_class, image_shapes):
    found = []
    for image_shape in image_shapes:
        try:
            embedding, features = run_meta(encoder_class, image_shape)
        except (RuntimeError, ValueError) as error:
            found.append((image_shape, str(error)[:60]))
            continue
        if embedding.shape != (2, 3) or features.ndim != 4 or len(features) != 2 or min(features.shape) < 1:
            found.append((image_shape, (tuple(embedding.shape), tuple(features.shape))))
    return found


@pytest.mark.parametrize("encoder_class", ENCODERS)
def test_square_images_from_1_to_70_pixels_run(encoder_class):
    assert failures(encoder_class, [(3, side, side) for side in range(1, 71)]) == []


@pytest.mark.parametrize("encoder_class", ENCODERS)
def test_one_dimensional_signals_from_1_to_70_run(encoder_class):
    assert failures(encoder_class, [(1, 1, side) for side in range(1, 71)]) == []
    assert failures(encoder_class, [(1, side, 1) for side in range(1, 71)]) == []


@pytest.mark.parametrize("encoder_class", ENCODERS)
@pytest.mark.parametrize("height", [1, 2, 3, 7, 13, 16, 29, 33, 64, 70])
def test_rectangular_images_run(encoder_class, height):
    widths = [1, 2, 5, 12, 13, 14, 17, 20, 31, 32, 45, 63, 64, 65, 70]
    assert failures(encoder_class, [(3, height, width) for width in widths]) == []


@pytest.mark.parametrize("encoder_class", ENCODERS)
@pytest.mark.parametrize("n_channels", [1, 3, 5, 13])
def test_any_number_of_channels_runs(encoder_class, n_channels):
    sizes = [(1, 1), (8, 8), (9, 14), (28, 28), (33, 31), (64, 64)]
    assert failures(encoder_class, [(n_channels, *size) for size in sizes]) == []


@pytest.mark.parametrize("encoder_class", ENCODERS)
@pytest.mark.parametrize(
    "image_shape", [(1, 1, 1), (13, 2, 3), (5, 1, 33), (1, 8, 8), (3, 17, 12), (5, 28, 28), (3, 65, 33)]
)
def test_real_batches_give_finite_embeddings_and_gradients(encoder_class, image_shape):
    torch.manual_seed(0)
    encoder = encoder_class(image_shape, 3)
    embedding, features = encoder(torch.randn(2, *image_shape))
    assert embedding.shape == (2, 3)
    assert features.shape[0] == 2
    assert torch.isfinite(embedding).all()
    (embedding.square().sum() + features.square().sum()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in encoder.parameters())


@pytest.mark.parametrize("encoder_class", ENCODERS)
def test_forward_returns_layers_embedding_and_local(encoder_class):
    torch.manual_seed(0)
    encoder = encoder_class((3, 20, 16), 4).eval()
    images = torch.randn(2, 3, 20, 16)
    with torch.no_grad():
        embedding, features = encoder(images)
        layers = encoder.layers(images)
    # Nothing after the local features may write into them.
    torch.testing.assert_close(features, encoder.local(images))
    torch.testing.assert_close(embedding, layers["embedding"])
    torch.testing.assert_close(features, layers["local"])


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (12, 5), (8, 20)])
def test_stride1_pads_small_images_with_zeros_around_them(size):
    torch.manual_seed(0)
    padded_size = tuple(max(13, side) for side in size)
    small, large = Stride1Encoder((3, *size), 4).eval(), Stride1Encoder((3, *padded_size), 4).eval()
    with torch.no_grad():
        for parameter, other in zip(small.parameters(), large.parameters(), strict=True):
            parameter.copy_(other)
        images = torch.randn(2, 3, *size)
        top, left = ((padded - side) // 2 for padded, side in zip(padded_size, size, strict=True))
        framed = torch.zeros(2, 3, *padded_size)
        framed[:, :, top : top + size[0], left : left + size[1]] = images
        for value, expected in zip(small(images), large(framed), strict=True):
            torch.testing.assert_close(value, expected)


# Critics


def make_critic(critic_class, feature_shape=(3, 5, 4), n_components=4, n_units=6, seed=0):
    torch.manual_seed(seed)
    return critic_class(feature_shape, n_components, n_units).double()


def make_pairs(feature_shape=(3, 5, 4), n_components=4, n_images=3, seed=1):
    rng = np.random.default_rng(seed)
    return (
        torch.tensor(rng.standard_normal((n_images, *feature_shape))),
        torch.tensor(rng.standard_normal((n_images, n_components))),
    )


def test_global_concat_critic_layers_and_parameters():
    with torch.device("meta"):
        critic = GlobalConcatCritic((128, 26, 26), 64, 512)
        assert critic(torch.zeros(2, 128, 26, 26), torch.zeros(2, 64)).shape == (2,)
    convs = modules_of(critic, nn.Conv2d)
    assert [(conv.in_channels, conv.out_channels, conv.kernel_size) for conv in convs] == [
        (128, 64, (3, 3)),
        (64, 32, (3, 3)),
    ]
    assert 15_488 in [layer.in_features for layer in modules_of(critic, nn.Linear)]
    convolutions = 3 * 3 * 128 * 64 + 64 + 3 * 3 * 64 * 32 + 32
    perceptron = (15_488 + 64) * 512 + 512 + 512 * 512 + 512 + 512 + 1
    assert n_parameters(critic) == convolutions + perceptron


def test_local_concat_critic_parameters():
    with torch.device("meta"):
        critic = LocalConcatCritic((128, 26, 26), 64, 512)
        assert critic(torch.zeros(2, 128, 26, 26), torch.zeros(2, 64)).shape == (2, 26, 26)
    assert n_parameters(critic) == (128 + 64) * 512 + 512 + 512 * 512 + 512 + 512 + 1


def test_local_dot_critic_parameters():
    n_units = 512
    with torch.device("meta"):
        critic = LocalDotCritic((128, 8, 8), 64, n_units)
        assert critic(torch.zeros(2, 128, 8, 8), torch.zeros(2, 64)).shape == (2, 8, 8)
    expected = 0
    for n_in in (128, 64):
        two_layers = n_in * n_units + 2 * n_units + n_units * n_units
        shortcut = n_in * n_units + n_units
        expected += two_layers + shortcut + 2 * n_units
    assert n_parameters(critic) == expected


def test_global_dot_critic_has_the_later_layers_of_dcgan():
    n_units = 512
    with torch.device("meta"):
        critic = GlobalDotCritic((128, 8, 8), 64, n_units)
        assert critic(torch.zeros(2, 128, 8, 8), torch.zeros(2, 64)).shape == (2,)
    (conv,) = modules_of(critic, nn.Conv2d)
    assert (conv.out_channels, conv.kernel_size, conv.stride, conv.padding) == (256, (4, 4), (2, 2), (1, 1))
    features = 4 * 4 * 128 * 256 + 2 * 256 + 256 * 4 * 4 * 1024 + 2 * 1024 + 1024 * n_units + n_units
    assert n_parameters(critic) == features + 64 * n_units + n_units


@pytest.mark.parametrize("critic_class", CRITICS)
@pytest.mark.parametrize("feature_shape", [(128, 26, 26), (128, 7, 7), (64, 1, 1), (64, 1, 9), (5, 2, 2), (7, 3, 5)])
def test_critics_score_maps_of_any_size(critic_class, feature_shape):
    with torch.device("meta"):
        critic = critic_class(feature_shape, 4, 6)
        scores = critic(torch.zeros(2, *feature_shape), torch.zeros(2, 4))
    assert isinstance(critic, Critic)
    assert critic.is_local == IS_LOCAL[critic_class]
    assert scores.shape == ((2, *feature_shape[1:]) if IS_LOCAL[critic_class] else (2,))


@pytest.mark.parametrize("critic_class", CRITICS)
def test_encode_shapes(critic_class):
    features, embedding = make_pairs()
    maps, vectors = make_critic(critic_class).encode(features, embedding)
    assert maps.shape == (3, 20 if IS_LOCAL[critic_class] else 1, 6)
    assert vectors.shape == (3, 6)


def first_layer_of_concatenation(critic, n_flat):
    """Weight and bias of the linear layer on [features, embedding] that the two heads stand for."""
    feature_head = modules_of(critic.feature_head, nn.Linear)[-1]
    embedding_head = modules_of(critic.embedding_head, nn.Linear)[-1]
    assert feature_head.in_features == n_flat
    assert embedding_head.bias is None
    return torch.cat([feature_head.weight, embedding_head.weight], dim=1), feature_head.bias


def perceptron(critic, concatenated, n_flat):
    _, second, third = (None, *modules_of(critic.tail, nn.Linear))
    hidden = relu(linear(concatenated, *first_layer_of_concatenation(critic, n_flat)))
    hidden = relu(linear(hidden, second.weight, second.bias))
    return linear(hidden, third.weight, third.bias)


def concatenate_local(critic, features, embedding):
    """Embedding tiled on every location, concatenated to the features, then 1 x 1 convolutions."""
    n_images, n_channels, height, width = features.shape
    tiled = embedding[:, :, None, None].expand(-1, -1, height, width)
    concatenated = torch.cat([features, tiled], dim=1)
    scores = torch.empty(n_images, height, width, dtype=features.dtype)
    for i, row, column in itertools.product(range(n_images), range(height), range(width)):
        scores[i, row, column] = perceptron(critic, concatenated[i, :, row, column], n_channels)[0]
    return scores


def concatenate_global(critic, features, embedding):
    first, second = modules_of(critic.feature_head, nn.Conv2d)
    hidden = relu(conv2d(features, first.weight, first.bias))
    flat = conv2d(hidden, second.weight, second.bias).permute(0, 2, 3, 1).flatten(1)
    return perceptron(critic, torch.cat([flat, embedding], dim=1), flat.shape[1])[:, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("critic_class", "concatenate"),
    [(LocalConcatCritic, concatenate_local), (GlobalConcatCritic, concatenate_global)],
)
def test_concat_critics_equal_the_concatenation(critic_class, concatenate, memory_format):
    critic = make_critic(critic_class, (3, 5, 6))
    features, embedding = make_pairs((3, 5, 6))
    with torch.no_grad():
        scores = critic(features.to(memory_format=memory_format), embedding)
        expected = concatenate(critic, features, embedding)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("critic_class", CRITICS)
def test_score_all_holds_every_pair(critic_class):
    critic = make_critic(critic_class).eval()
    features, embedding = make_pairs(n_images=3)
    more_features, more = make_pairs(n_images=5, seed=2)
    with torch.no_grad():
        maps, _ = critic.encode(features, embedding)
        _, vectors = critic.encode(more_features, more)
        scores = critic.score_all(maps, vectors)
        assert scores.shape == (5, 3, maps.shape[1])
        for r, n in itertools.product(range(5), range(3)):
            pair = critic(features[[n]], more[[r]]).flatten()
            torch.testing.assert_close(scores[r, n], pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("critic_class", CRITICS)
def test_diagonal_of_score_all_is_score(critic_class):
    critic = make_critic(critic_class)
    maps, vectors = critic.encode(*make_pairs(n_images=4))
    diagonal = critic.score_all(maps, vectors)[range(4), range(4)]
    torch.testing.assert_close(diagonal, critic.score(maps, vectors[:, None])[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("critic_class", CRITICS)
def test_several_embeddings_an_image_are_scored_one_by_one(critic_class):
    critic = make_critic(critic_class)
    features, embedding = make_pairs(n_images=4)
    maps, vectors = critic.encode(features, torch.cat([embedding, embedding.flip(0)]))
    scores = critic.score(maps, torch.stack(vectors.chunk(2), dim=1))
    for i, one_each in enumerate(vectors.chunk(2)):
        torch.testing.assert_close(scores[:, i], critic.score(maps, one_each[:, None])[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("critic_class", DOT_CRITICS)
def test_dot_score_is_the_dot_product_over_the_root_of_the_width(critic_class):
    critic = make_critic(critic_class)
    with torch.no_grad():
        maps, vectors = critic.encode(*make_pairs())
        scores = critic.score(maps, vectors[:, None])[:, 0].numpy()
    expected = [
        [sum(map_i[k] * vector_i[k] for k in range(6)) / math.sqrt(6) for map_i in maps_i]
        for maps_i, vector_i in zip(maps.numpy(), vectors.numpy(), strict=True)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)


def residual_head(head, rows):
    hidden = linear(rows, head.expand.weight)
    hidden = batch_norm(hidden, None, None, head.norm.weight, head.norm.bias, training=True)
    two_layers = relu(hidden) @ head.project.weight.T
    total = two_layers + linear(rows, head.shortcut.weight, head.shortcut.bias)
    return layer_norm(total, (total.shape[1],), head.out.weight, head.out.bias)


def test_local_dot_critic_is_layer_norm_of_two_layers_plus_shortcut():
    critic = make_critic(LocalDotCritic)
    features, embedding = make_pairs()
    with torch.no_grad():
        scores = critic(features, embedding)
        maps = residual_head(critic.feature_head, features.flatten(2).transpose(1, 2).reshape(-1, 3)).view(3, 5, 4, 6)
        vectors = residual_head(critic.embedding_head, embedding)
        expected = torch.einsum("nhwu,nu->nhw", maps, vectors) / math.sqrt(6)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_units", [2, 6, 40])
def test_local_dot_shortcut_starts_near_the_identity(n_units):
    critic = make_critic(LocalDotCritic, n_units=n_units)
    for head in (critic.feature_head, critic.embedding_head):
        difference = head.shortcut.weight - torch.eye(*head.shortcut.weight.shape, dtype=torch.float64)
        assert difference.abs().max() <= 0.01


@pytest.mark.parametrize("critic_class", CRITICS)
def test_critics_leave_their_inputs_alone(critic_class):
    features, embedding = make_pairs()
    before = features.clone(), embedding.clone()
    with torch.no_grad():
        critic = make_critic(critic_class)
        maps, vectors = critic.encode(features, embedding)
        kept = maps.clone(), vectors.clone()
        critic.score(maps, vectors[:, None])
        critic.score_all(maps, vectors)
    for value, expected in zip((features, embedding, maps, vectors), (*before, *kept), strict=True):
        assert torch.equal(value, expected)


def test_prior_discriminator_gives_one_logit_an_embedding():
    prior = PriorDiscriminator(64)
    assert prior(torch.zeros(5, 64)).shape == (5,)
    assert prior(torch.zeros(1, 64)).shape == (1,)
    assert layer_kinds(prior) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert n_parameters(prior) == 64 * 1000 + 1000 + 1000 * 200 + 200 + 200 + 1


@pytest.mark.parametrize("build", [lambda prior: PriorDiscriminator(4, prior), lambda prior: PriorNoise(prior, 0.1)])
def test_an_unknown_prior_is_refused(build):
    with pytest.raises(ValueError, match="prior must be 'uniform' or 'normal', got 'gaussian'"):
        build("gaussian")


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match=r"encoder must be a module, a callable or one of .*, got 'vgg'"):
        make_encoder("vgg", (1, 8, 8), 4)


def test_global_dot_critic_layers():
    def layers(feature_shape):
        with torch.device("meta"):
            critic = GlobalDotCritic(feature_shape, 64, 512)
        kinds = [type(m).__name__ for m in critic.feature_head.modules() if not [*m.children()]]
        return kinds, [m.out_channels for m in critic.modules() if isinstance(m, nn.Conv2d)]

    head = ["FlattenMap", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    stage = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert layers((128, 8, 8)) == (stage + head, [256])
    assert layers((128, 4, 4)) == (stage + head, [256])
    # Widths double up to 512, and never shrink.
    assert layers((256, 32, 32)) == (3 * stage + head, [512, 512, 512])
    assert layers((1024, 7, 7)) == (stage + head, [1024])


@pytest.mark.parametrize(("side", "local"), [(24, (64, 12, 12)), (26, (64, 13, 13)), (28, (128, 7, 7))])
def test_the_local_map_of_dcgan_has_seven_pixels_a_side_or_more(side, local):
    assert layer_shapes(DCGANEncoder((1, side, side), 4), (1, side, side))["local"] == local
