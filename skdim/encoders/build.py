"""Encoders by name, and from what the user gives."""

import copy
from collections.abc import Callable
from functools import partial

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from skdim.encoders.alexnet import AlexNetEncoder
from skdim.encoders.dcgan import DCGANEncoder
from skdim.encoders.reading import layer_shapes
from skdim.encoders.resnet import ResNetEncoder
from skdim.encoders.standardized import StandardizedEncoder
from skdim.encoders.stride1 import Stride1Encoder
from skdim.layouts import ImageShape

__all__ = ["ENCODERS", "build_encoder", "make_encoder"]

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "dcgan": DCGANEncoder,
    "stride1": Stride1Encoder,
    "alexnet": AlexNetEncoder,
    "resnet": ResNetEncoder,
    "resnet_folded": partial(ResNetEncoder, folded=True),
}


def make_encoder(
    encoder: str | nn.Module | Callable[[ImageShape, int], nn.Module],
    image_shape: ImageShape,
    n_components: int,
    *,
    multiple_globals: bool = False,
    standardized: bool = False,
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """Build an encoder, or copy the one given, and check what it returns.

    Parameters
    ----------
    encoder : str, nn.Module or callable
        Name of an encoder of this package; a module, which is copied; or a class, function or other callable that
        builds one as ``encoder(image_shape, n_components)``, which is copied where it brings weights that were there
        before.
    image_shape : tuple of int
        Channels, height and width.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        Whether an encoder of this package returns an embedding for each location of its last convolution's map.
    standardized : bool, default=False
        Whether the embedding gets a batch norm, as a `StandardizedEncoder`.

    Returns
    -------
    module : nn.Module
        The encoder, on the CPU.
    shapes : dict
        As `layer_shapes` gives them.

    Raises
    ------
    ValueError
        If the encoder cannot be built, cannot take such images or does not return what an encoder returns; or if
        `multiple_globals` is asked of the user's encoder.
    """
    module = build_encoder(encoder, image_shape, n_components, multiple_globals=multiple_globals)
    shapes = layer_shapes(module, image_shape)
    width = shapes["embedding"][0]
    if width != n_components:
        raise ValueError(f"encoder returns embeddings of width {width}, but n_components={n_components}.")
    return StandardizedEncoder(module, n_components) if standardized else module, shapes


def build_encoder(
    encoder: str | nn.Module | Callable[[ImageShape, int], nn.Module],
    image_shape: ImageShape,
    n_components: int,
    *,
    multiple_globals: bool = False,
) -> nn.Module:
    """Build an encoder, or copy the one given, without a look at what it returns.

    Parameters
    ----------
    encoder : str, nn.Module or callable
        As for `make_encoder`.
    image_shape : tuple of int
        Channels, height and width.
    n_components : int
        Width of the embedding.
    multiple_globals : bool, default=False
        As for `make_encoder`.

    Returns
    -------
    nn.Module
        The encoder, on the CPU.

    Raises
    ------
    ValueError
        If it cannot be built, or `multiple_globals` is asked of the user's encoder.
    """
    if multiple_globals and not isinstance(encoder, str):
        raise ValueError(
            f"multiple_globals=True needs an encoder of {sorted(ENCODERS)}, got {encoder!r}. For several embeddings an "
            "image, let your encoder return an embedding of shape (N, n_components, h, w)."
        )
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            raise ValueError(f"encoder must be a module, a callable or one of {sorted(ENCODERS)}, got {encoder!r}.")
        return ENCODERS[encoder](image_shape, n_components, multiple_globals=multiple_globals)
    if isinstance(encoder, nn.Module):
        return copy.deepcopy(encoder).cpu()
    return _call(encoder, image_shape, n_components)


def _call(factory: Callable[[ImageShape, int], nn.Module], image_shape: ImageShape, n_components: int) -> nn.Module:
    """Let the user's class or function build an encoder."""
    kind = "class" if isinstance(factory, type) else "callable"
    name = getattr(factory, "__name__", repr(factory))
    if isinstance(factory, type) and not issubclass(factory, nn.Module):
        raise ValueError(f"encoder must be a subclass of torch.nn.Module, got the class {factory!r}.")
    registered: list[nn.Parameter] = []
    listener = register_module_parameter_registration_hook(lambda _, __, weight: registered.append(weight))
    try:
        module = factory(image_shape, n_components)
    except TypeError as error:
        raise ValueError(
            f"encoder {kind} {name} cannot be built as {name}(image_shape, n_components): {error}"
        ) from error
    finally:
        listener.remove()
    if not isinstance(module, nn.Module):
        raise ValueError(f"encoder {kind} {name} must return a torch.nn.Module, got {type(module).__name__}.")
    is_new = set(map(id, registered))
    if all(id(weight) in is_new for weight in module.parameters()):
        return module
    # What was there before the call may be in use elsewhere, and stays as it is.
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"encoder {kind} {name} returned a {type(module).__name__} with weights that were there before and can't "
            f"be copied: {error}. Let it return new ones, or load them into new ones."
        ) from error
