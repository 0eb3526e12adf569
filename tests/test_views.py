import math

import numpy as np
import pytest
import torch

from skdim.encoders import DCGANEncoder, receptive_fields
from skdim.views import Occlusion, StandardAugmentation

QUIET = {"crop": 1.0, "shift": 0.0, "horizontal_flip": False, "color": 0.0, "grey": 0.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_of(shape, n_images=64, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal((n_images, *shape)), dtype=torch.float32)


def augmented(images, seed=0, **changes):
    return StandardAugmentation(**(QUIET | changes))(images, seeded(seed))


def test_with_everything_switched_off_a_view_is_its_image():
    images = images_of((3, 7, 9))
    torch.testing.assert_close(augmented(images), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 9), (3, 32, 32), (13, 16, 16), (1, 1, 30), (4, 1, 50), (3, 1, 1)])
def test_any_image_gets_finite_views_of_its_shape_that_the_generator_fixes(shape):
    images = images_of(shape)
    before = images.clone()
    augment = StandardAugmentation(vertical_flip=True, quarter_turns=True, noise=0.1, shift=0.1)
    views = [augment(images, seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(images, before)
    for view in views:
        assert view.shape == images.shape
        assert view.dtype == torch.float32
        assert view.isfinite().all()
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize(("flip", "axis"), [("horizontal_flip", 3), ("vertical_flip", 2)])
def test_flips_mirror_half_of_the_images(flip, axis):
    images = images_of((3, 6, 8), n_images=400)
    views = augmented(images, **{flip: np.True_})
    same = torch.isclose(views, images, atol=1e-4).flatten(1).all(dim=1)
    mirrored = torch.isclose(views, images.flip(axis), atol=1e-4).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize(("shape", "turns"), [((2, 6, 6), (0, 1, 2, 3)), ((2, 5, 7), (0, 2))])
@pytest.mark.parametrize("flip", [False, True])
def test_quarter_turns_are_all_as_frequent_and_mirror_nothing(shape, turns, flip):
    images = images_of(shape, n_images=800)
    views = augmented(images, quarter_turns=True, horizontal_flip=flip)
    forms = [torch.rot90(form, turn, (2, 3)) for form in (images, images.flip(3))[: 1 + flip] for turn in turns]
    found = torch.stack([torch.isclose(views, form, atol=1e-4).flatten(1).all(dim=1) for form in forms])
    assert (found.sum(dim=0) == 1).all()
    share = 800 / len(forms)
    assert (found.sum(dim=1) - share).abs().max() < 4 * share**0.5


@pytest.mark.parametrize("shape", [(2, 1, 40), (2, 40, 1)])
def test_signals_are_not_reversed(shape):
    images = images_of(shape)
    torch.testing.assert_close(augmented(images, horizontal_flip=True, vertical_flip=True), images, atol=1e-4, rtol=0)


def ramp(height=32, width=32, n_images=300):
    """Two channels that say where a pixel is, in pixels."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([rows, columns]).expand(n_images, -1, -1, -1)


def test_crops_stay_inside_the_image_and_have_the_areas_asked_for():
    views = augmented(ramp(), crop=0.25)
    steps = [
        (view[:, 1:-1].diff(dim=1).mean((1, 2)), view[:, :, 1:-1].diff(dim=2).mean((1, 2))) for view in views.unbind(1)
    ]
    scale_y, scale_x = steps[0][0], steps[1][1]
    # A row index does not change along a row, nor a column index down a column.
    assert steps[0][1].abs().max() < 1e-3
    assert steps[1][0].abs().max() < 1e-3
    areas = scale_x * scale_y
    assert areas.min() > 0.24
    assert areas.max() <= 1.0001
    assert areas.mean() == pytest.approx(0.6, abs=0.05)
    aspects = scale_x / scale_y
    assert aspects.min() == pytest.approx(3 / 4, abs=0.03)
    assert aspects.max() == pytest.approx(4 / 3, abs=0.03)
    assert views.min() >= 0
    assert views.max() <= 31
    corners = torch.stack([views[:, 0, 0, 0], views[:, 1, 0, 0]])
    assert corners.std(dim=1).min() > 1


def test_shifts_move_by_at_most_their_share_and_mirror_what_enters():
    views = augmented(ramp(), shift=0.125)
    inner = views[:, :, 8:-8, 8:-8] - ramp()[:, :, 8:-8, 8:-8]
    offsets = inner.mean(dim=(2, 3))
    torch.testing.assert_close(inner, offsets[:, :, None, None].expand_as(inner), atol=1e-3, rtol=0)
    assert offsets.abs().max() <= 4.001
    assert offsets.abs().max(dim=0).values.min() > 3.5
    assert views.min() >= -1e-3
    assert views.max() <= 31.001


@pytest.mark.parametrize("n_channels", [2, 3, 5])
def test_grey_images_have_equal_channels_and_their_mean(n_channels):
    images = images_of((n_channels, 4, 4), n_images=400)
    views = augmented(images, grey=0.25)
    mean = images.mean(dim=1, keepdim=True).expand_as(images)
    is_grey = torch.isclose(views, mean, atol=1e-4).flatten(1).all(dim=1)
    is_same = torch.isclose(views, images, atol=1e-4).flatten(1).all(dim=1)
    assert (is_grey ^ is_same).all()
    assert 70 < is_grey.sum() < 130


def test_one_channel_keeps_its_values():
    images = images_of((1, 6, 6))
    torch.testing.assert_close(augmented(images, color=0.8, grey=0.5), images, atol=1e-4, rtol=0)


def colour_parts(images):
    """Mean over everything, spread of the channel mean, spread of what differs between channels, for each image."""
    grey = images.mean(dim=1, keepdim=True)
    return grey.mean(dim=(1, 2, 3)), grey.std(dim=(2, 3)).flatten(), (images - grey).pow(2).mean(dim=(1, 2, 3)).sqrt()


@pytest.mark.parametrize("n_channels", [2, 3, 7])
def test_colour_changes_have_the_strength_asked_for(n_channels):
    images = images_of((n_channels, 16, 16), n_images=1000)
    views = augmented(images, color=0.4)
    brightness, contrast, saturation = (
        new - old if i == 0 else new / old
        for i, (new, old) in enumerate(zip(colour_parts(views), colour_parts(images), strict=True))
    )
    saturation = saturation / contrast
    unchanged = torch.isclose(views, images, atol=1e-4).flatten(1).all(dim=1)
    assert 130 < unchanged.sum() < 270
    for change, center, reach in ((brightness, 0, 0.8), (contrast, 1, 0.4), (saturation, 1, 0.4)):
        assert (change - center).abs().max() <= reach + 1e-3
        assert change.min() < center - 0.9 * reach
        assert change.max() > center + 0.9 * reach


def test_hue_turns_about_the_grey_axis_by_at_most_its_share():
    images = images_of((3, 1, 1), n_images=2000)
    views = augmented(images, color=0.4)
    # In the plane across the grey axis a colour is a complex number, its hue the angle.
    axis = np.exp(2j * math.pi * np.arange(3) / 3)
    turn = np.angle((views[:, :, 0, 0].numpy() @ axis) / (images[:, :, 0, 0].numpy() @ axis)) / (2 * math.pi)
    assert np.abs(turn).max() <= 0.2 + 1e-4
    assert turn.min() < -0.18
    assert turn.max() > 0.18


@pytest.mark.parametrize("n_channels", [1, 3])
def test_noise_has_the_standard_deviation_asked_for(n_channels):
    images = images_of((n_channels, 32, 32))
    noise = augmented(images, noise=0.3) - augmented(images)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)


# Occlusion

DCGAN_FIELDS = np.array([[max(0, 4 * i - 3), min(32, 4 * i + 7)] for i in range(8)])


def hidden_blocks(occluded):
    hidden = occluded[:, 0] == 0
    rows, columns = hidden.any(dim=2), hidden.any(dim=1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])
    return rows.numpy(), columns.numpy()


def is_hidden_and_is_seen(rows, columns, row_fields, column_fields):
    """Whether some location's field is hidden as a whole, and whether some other one is wholly seen."""
    fields = [
        (slice(*row), slice(*column)) for row in row_fields for column in column_fields if row[1] > 0 and column[1] > 0
    ]
    block = rows[:, None] & columns[None, :]
    return any(block[field].all() for field in fields), any(not block[field].any() for field in fields)


@pytest.mark.parametrize(
    ("row_fields", "column_fields", "size"),
    [
        (DCGAN_FIELDS, DCGAN_FIELDS, (32, 32)),
        (np.array([[0, 1]]), DCGAN_FIELDS, (1, 32)),
        (np.array([[0, 6], [2, 8]]), np.array([[0, 3], [3, 6]]), (8, 6)),
        (np.array([[0, 2], [2, 4]]), np.array([[0, 1]]), (4, 1)),
        (np.array([[0, 0], [0, 2], [2, 4], [0, 0]]), np.array([[0, 0], [0, 2], [2, 4], [0, 0]]), (4, 4)),
    ],
)
def test_a_block_hides_one_location_and_spares_another(row_fields, column_fields, size):
    images = torch.ones(300, 2, *size)
    occluded = Occlusion(row_fields, column_fields, torch.device("cpu"))(images, seeded())
    assert torch.equal(images, torch.ones_like(images))
    blocks = list(zip(*hidden_blocks(occluded), strict=True))
    for rows, columns in blocks:
        assert is_hidden_and_is_seen(rows, columns, row_fields, column_fields) == (True, True)
        assert (np.diff(np.flatnonzero(rows)) == 1).all()
        assert (np.diff(np.flatnonzero(columns)) == 1).all()
    if size == (32, 32):
        # Every pixel is hidden now and then and seen now and then, and blocks differ in size.
        share = np.mean([rows[:, None] & columns[None, :] for rows, columns in blocks], axis=0)
        assert share.min() > 0.02
        assert share.max() < 0.8
        assert len({(rows.sum(), columns.sum()) for rows, columns in blocks}) > 10


def test_occlusion_knows_the_fields_of_the_encoder():
    rows, columns = receptive_fields(DCGANEncoder((3, 32, 32), 4), (3, 32, 32))
    np.testing.assert_array_equal(rows, DCGAN_FIELDS)
    np.testing.assert_array_equal(columns, DCGAN_FIELDS)


def test_fields_that_are_the_whole_image_leave_nothing_to_occlude():
    whole = np.array([[0, 8], [0, 8]])
    with pytest.raises(ValueError, match=r"occlusion=True .* see up to 8 x 8 pixels"):
        Occlusion(whole, whole, torch.device("cpu"))


def test_what_a_shift_brings_in_is_mirrored_at_the_edge():
    views = augmented(ramp(), shift=0.125)
    for axis in (0, 1):
        lines = views[:, axis].mean(dim=2 - axis)
        # Away from the edges a view says by how much its image is shifted.
        place = torch.arange(32) + (lines[:, 8:-8] - torch.arange(8, 24)).mean(dim=1, keepdim=True)
        mirrored = torch.where(place < -0.5, -1 - place, torch.where(place > 31.5, 63 - place, place))
        torch.testing.assert_close(lines, mirrored.clamp(0, 31), atol=2e-3, rtol=0)


def test_a_block_may_reach_from_edge_to_edge_along_either_axis():
    images = torch.ones(3000, 1, 32, 32)
    hidden = Occlusion(DCGAN_FIELDS, DCGAN_FIELDS, torch.device("cpu"))(images, seeded())[:, 0] == 0
    n_high, n_wide = (int(hidden.any(dim=axis).all(dim=1).sum()) for axis in (2, 1))
    assert n_high > 10
    assert n_wide > 10


def test_colour_changes_are_drawn_each_on_its_own():
    images = images_of((3, 16, 16), n_images=1000)
    before, after = colour_parts(images), colour_parts(augmented(images, color=0.4))
    changes = np.stack([after[0] - before[0], after[1] / before[1], after[2] / before[2] / (after[1] / before[1])])
    changed = np.abs(changes[0]) > 1e-3
    assert np.abs(np.corrcoef(changes[:, changed]) - np.eye(3)).max() < 0.15


def test_places_and_aspects_of_crops_are_drawn_each_on_its_own():
    views = augmented(ramp(), crop=0.25)
    row, column = views.mean(dim=(2, 3)).T
    height, width = views[:, 0, 1:-1].diff(dim=1).mean((1, 2)), views[:, 1, :, 1:-1].diff(dim=2).mean((1, 2))
    drawn = torch.stack([row, column, (height / width).log()])
    assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 0.25


def test_flips_along_both_axes_are_drawn_each_on_its_own():
    images = images_of((3, 6, 8), n_images=400)
    views = augmented(images, horizontal_flip=True, vertical_flip=True)
    forms = [images, images.flip(2), images.flip(3), images.flip(2, 3)]
    assert all(torch.isclose(views, form, atol=1e-4).flatten(1).all(dim=1).sum() > 60 for form in forms)


def test_hue_and_brightness_are_drawn_each_on_its_own():
    images = images_of((3, 1, 1), n_images=2000)
    views = augmented(images, color=0.4)
    axis = np.exp(2j * math.pi * np.arange(3) / 3)
    turn = np.angle((views[:, :, 0, 0].numpy() @ axis) / (images[:, :, 0, 0].numpy() @ axis))
    brightness = (views - images).mean(dim=(1, 2, 3)).numpy()
    changed = np.abs(brightness) > 1e-3
    assert abs(np.corrcoef(turn[changed], brightness[changed])[0, 1]) < 0.15


def test_grey_images_are_drawn_apart_from_those_of_other_colours():
    images = images_of((3, 4, 4), n_images=2000)
    views = augmented(images, color=0.4, grey=0.3)
    is_grey = (views - views.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-4
    is_bright = (views - images).mean(dim=(1, 2, 3)).abs() > 1e-4
    # As many as of the others: four in five.
    assert 0.7 < is_bright[is_grey].float().mean() < 0.9
