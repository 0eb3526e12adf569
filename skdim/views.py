"""Random views of whole batches, on the device they are on: augmentation and occlusion."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from skdim.distributed import ALONE, Group
from skdim.layouts import ImageShape

__all__ = ["Augmentation", "Occlusion", "StandardAugmentation", "check_augmentation"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class StandardAugmentation:
    """Random crops, shifts, flips, turns, colours and noise, drawn for each image on its own.

    Works on images of any size and any number of channels. Colours are changed only where there are at least two
    channels, their hue only where there are three. Flips and turns leave signals, images with a side of one pixel,
    alone.

    Parameters
    ----------
    crop : float, default=0.7
        Least area of a crop, as a share of the image's; each crop is scaled back to the image's size, which
        lowers the frequencies of a signal. 1 crops nothing.
    shift : float, default=0.0
        Most an image is shifted along each side, as a share of that side; what enters is mirrored.
    horizontal_flip, vertical_flip : bool, default=True and False
        Whether to mirror half of the images left to right, and half of them top to bottom.
    color : float, default=0.2
        Strength of the changes of brightness, contrast and saturation, made to four images in five: brightness by up to
        twice as many standard deviations, the others by up to that share. The hue turns by up to half as much of the
        colour circle.
    grey : float, default=0.2
        Share of images whose channels are all replaced by their mean.
    noise : float, default=0.0
        Standard deviation of Gaussian noise, in units of a channel's standard deviation.
    quarter_turns : bool, default=False
        Whether to turn each image by 0, 90, 180 or 270 degrees, or by 0 or 180 where it is not square. For what has no
        upright, as seen by microscopes and satellites.

    Raises
    ------
    ValueError
        If a share is not between 0 and 1, `noise` is negative, or a flip or `quarter_turns` is neither True nor False.
    """

    crop: float = 0.7
    shift: float = 0.0
    horizontal_flip: bool = True
    vertical_flip: bool = False
    color: float = 0.2
    grey: float = 0.2
    noise: float = 0.0
    quarter_turns: bool = False

    def __post_init__(self) -> None:
        highest = {"crop": 1.0, "shift": 1.0, "color": 1.0, "grey": 1.0, "noise": math.inf}
        for name, limit in highest.items():
            value = getattr(self, name)
            is_number = isinstance(value, Real) and math.isfinite(value)
            if not (is_number and 0 <= value <= limit) or (name == "crop" and value == 0):
                allowed = {"crop": "(0, 1]", "noise": "[0, inf)"}.get(name, "[0, 1]")
                raise ValueError(f"{name} must be a number in {allowed}, got {value!r}.")
        for name in ("horizontal_flip", "vertical_flip", "quarter_turns"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {value!r}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one view of each image.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W), float32
            Standardised images.
        generator : torch.Generator
            On the device of the images.

        Returns
        -------
        Tensor of shape (N, C, H, W), float32
            The views.
        """
        views = self._move(images, generator)
        if images.shape[1] > 1:
            views = self._recolor(views, generator)
        if self.noise:
            views = views + self.noise * torch.randn(views.shape, generator=generator, device=views.device)
        return views.contiguous(memory_format=torch.channels_last)

    def _move(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n_images, _, height, width = images.shape
        is_image = height > 1 and width > 1
        area, aspect, x, y, flip_x, flip_y = torch.rand((6, n_images, 1), generator=generator, device=images.device)
        area = self.crop + (1 - self.crop) * area
        scale_x = scale_y = area
        if is_image:
            # Aspect ratios between 3:4 and 4:3, and none that the image has no room for.
            aspect = (1 / area).clamp(max=4 / 3) ** (2 * aspect - 1)
            scale_x, scale_y = (area * aspect).sqrt(), (area / aspect).sqrt()
        is_mirrored_x = (flip_x < 0.5) & bool(is_image and self.horizontal_flip)
        is_mirrored_y = (flip_y < 0.5) & bool(is_image and self.vertical_flip)
        is_turned = is_image and self.quarter_turns
        if is_turned:
            # Half a turn mirrors both axes, a quarter of one swaps them and mirrors one.
            quarters = (4 * torch.rand(flip_x.shape, generator=generator, device=images.device)).floor()
            if height != width:
                quarters = 2 * (quarters / 2).floor()
            is_mirrored_x = is_mirrored_x ^ ((quarters == 1) | (quarters == 2))
            is_mirrored_y = is_mirrored_y ^ (quarters >= 2)
        columns = self._sample_points(width, scale_x, x, is_mirrored_x)
        rows = self._sample_points(height, scale_y, y, is_mirrored_y)
        grid = torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=3)
        if is_turned and height == width:
            grid = torch.where((quarters % 2 == 1)[:, :, None, None], grid.transpose(1, 2), grid)
        return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _sample_points(self, n_pixels: int, scale: Tensor, position: Tensor, is_mirrored: Tensor) -> Tensor:
        """Where each pixel of a view lies in its image along one axis, from -1 to 1; shape (N, n_pixels)."""
        centers = (2 * torch.arange(n_pixels, device=scale.device) + 1) / n_pixels - 1
        offset = (2 * position - 1) * (1 - scale + 2 * self.shift)
        return torch.where(is_mirrored, -scale, scale) * centers + offset

    def _recolor(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Turn the hue, mix with the grey image, stretch about the image's mean and add: x -> a x + b g + c h + d."""
        n_images, n_channels = images.shape[:2]
        draws = torch.rand((6, n_images, 1, 1, 1), generator=generator, device=images.device)
        jittered, is_grey = draws[0] < 0.8, draws[1] < self.grey
        strength = self.color * jittered * (2 * draws[2:] - 1)
        brightness, contrast, saturation, turn = 2 * strength[0], 1 + strength[1], 1 + strength[2], strength[3] / 2
        saturation = saturation.masked_fill(is_grey, 0.0)
        grey = images.mean(dim=1, keepdim=True)
        offset = (1 - contrast) * grey.mean(dim=(2, 3), keepdim=True) + brightness
        if n_channels != 3:
            return contrast * (saturation * images + (1 - saturation) * grey) + offset
        # Rotation about the grey axis (Rodrigues): the cross product with (1, 1, 1) is a difference of channels.
        angle = 2 * math.pi * turn
        cross = (images.roll(1, dims=1) - images.roll(-1, dims=1)) * 3**-0.5
        turned = angle.cos() * images + (1 - angle.cos()) * grey + angle.sin() * cross
        return contrast * (saturation * turned + (1 - saturation) * grey) + offset


class Occlusion:
    """Hides a block of each image, by its mean: at least one location's field as a whole, and at least one not at all.

    Parameters
    ----------
    rows, columns : ndarray of shape (h, 2) and (w, 2), int
        First pixel that a row (column) of the local features depends on, and the one after the last.
    device : torch.device
        Where the images are.

    Raises
    ------
    ValueError
        If every block that hides the field of one location touches those of all others.
    """

    def __init__(self, rows: NDArray[np.intp], columns: NDArray[np.intp], device: torch.device) -> None:
        spans = [_spans(fields) for fields in (rows, columns)]
        if not any(is_sparing.any() for _, is_sparing in spans):
            fields = " x ".join(str(int((axis[:, 1] - axis[:, 0]).max())) for axis in (rows, columns))
            raise ValueError(
                "occlusion=True needs local features that each see only a part of the image, but those of this encoder "
                f"see up to {fields} pixels, and no block hides one of them as a whole and leaves another one seen."
            )
        self._spans = [torch.from_numpy(all_spans).to(device) for all_spans, _ in spans]
        self._sparing = [torch.from_numpy(all_spans[is_sparing]).to(device) for all_spans, is_sparing in spans]

    def __call__(self, images: Tensor, generator: torch.Generator, group: Group = ALONE, n_views: int = 1) -> Tensor:
        """Hide a random block of each image.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images.
        generator : torch.Generator
            On the device of the images.
        group : Group, default=ALONE
            The processes that draw in step.
        n_views : int, default=1
            How many views of them the images are, one after another.

        Returns
        -------
        Tensor of shape (N, C, H, W)
            The images with a block of zeros, the channel's mean, each.
        """
        n_images, _, height, width = images.shape
        draws = group.draw(torch.rand, (3, n_images), generator, dim=1, n_views=n_views)
        # One axis has to spare a location; the other one may be hidden from end to end.
        share = len(self._sparing[0]) / (len(self._sparing[0]) + len(self._sparing[1]))
        by_rows = draws[2] < share
        row_spans = self._draw(0, draws[0], by_rows)
        column_spans = self._draw(1, draws[1], ~by_rows)
        hidden = _inside(row_spans, height)[:, :, None] & _inside(column_spans, width)[:, None, :]
        return images.masked_fill(hidden[:, None], 0.0)

    def _draw(self, axis: int, draw: Tensor, must_spare: Tensor) -> Tensor:
        anywhere = self._spans[axis][(draw * len(self._spans[axis])).long()]
        if not len(self._sparing[axis]):
            return anywhere
        sparing = self._sparing[axis][(draw * len(self._sparing[axis])).long()]
        return torch.where(must_spare[:, None], sparing, anywhere)


def _spans(fields: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Union of the fields of every run of neighbours, (m, 2), and whether it spares some other field, (m,)."""
    # A location in the padding may see no pixel: it can be neither hidden nor seen.
    starts, ends = fields[fields[:, 0] < fields[:, 1]].T
    first, last = np.triu_indices(len(starts))
    spans = np.stack([np.minimum.accumulate(starts[::-1])[::-1][first], np.maximum.accumulate(ends)[last]], axis=1)
    spared = (ends[None, :] <= spans[:, :1]) | (starts[None, :] >= spans[:, 1:])
    return spans, spared.any(axis=1)


def _inside(spans: Tensor, n_pixels: int) -> Tensor:
    pixels = torch.arange(n_pixels, device=spans.device)
    return (pixels >= spans[:, :1]) & (pixels < spans[:, 1:])


def check_augmentation(
    augmentation: str | Augmentation | None, image_shape: ImageShape, device: torch.device
) -> Augmentation | None:
    """Turn the parameter `augmentation` into a callable, and try a user's on noise: errors come before training.

    Parameters
    ----------
    augmentation : {"standard"}, callable or None
        As in `DIMTransformer`.
    image_shape : tuple of int
        Channels, height and width.
    device : torch.device
        Where to train.

    Returns
    -------
    callable or None
        The augmentation.

    Raises
    ------
    ValueError
        If it does not return such images as it is given.
    """
    if augmentation is None or augmentation == "standard":
        return None if augmentation is None else StandardAugmentation()
    assert callable(augmentation)
    if isinstance(augmentation, type):
        raise ValueError(f"augmentation must be called with images: pass an instance, {augmentation.__name__}(...).")
    _check_signature(augmentation)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(2, *image_shape, generator=generator, device=device)
    views = augmentation(images.clone(), generator)
    if not isinstance(views, Tensor):
        raise ValueError(f"augmentation must return a tensor of images, got {type(views).__name__}.")
    wanted, got = ((tuple(batch.shape), batch.dtype, str(batch.device)) for batch in (images, views))
    if got != wanted:
        raise ValueError(
            f"augmentation must return images of the shape, dtype and device that it is given, {wanted}, got {got}."
        )
    if not views.isfinite().all():
        raise ValueError("augmentation returned NaN or infinite values for finite images.")
    return augmentation


def _check_signature(augmentation: Augmentation) -> None:
    # A module's own call takes anything.
    called = augmentation.forward if isinstance(augmentation, nn.Module) else augmentation
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"augmentation is called as augmentation(images, generator), which its signature {signature} has no room "
            f"for: {error}."
        ) from error
