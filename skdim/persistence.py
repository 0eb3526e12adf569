"""A fitted model outside its process: weights as NumPy arrays for pickles, and a file without pickle.

The file may come from a stranger. Nothing in it is believed before it has been compared with what the class and the
encoder ask for, no memory is spent that the file's own size does not pay for, and nothing is ever looked up, imported
or unpickled by a name that it holds.
"""

import os
import reprlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from skdim._version import __version__
from skdim.encoders import ENCODERS, StandardizedEncoder, build_encoder, layer_shapes
from skdim.layouts import ImageShape, check_image_shape
from skdim.notices import warn
from skdim.randomness import private_rng
from skdim.tensorfile import (
    InvalidFileError,
    check_names,
    check_shapes,
    read_header,
    read_tensors,
    write_tensor_file,
)
from skdim.views import StandardAugmentation

__all__ = ["FittedModel", "InvalidFileError", "load_model", "restore_encoder", "save_model", "to_arrays", "to_tensors"]

FORMAT = 1
KEYS = frozenset(
    [
        *("format", "class", "params", "encoder", "encoder_options", "encoder_seed", "width", "image_shape"),
        *("channels_last", "trained_on_uint8", "history", "feature_names", "versions"),
    ]
)
VERSIONS = {"skdim": __version__, "torch": str(torch.__version__), "scikit-learn": sklearn.__version__}
# Objects of the process that saves, and where it may write: a file from elsewhere must have no say in either.
NOT_STORED = ("callbacks", "checkpoint_dir")
# A bfloat16 number among NumPy's types, which have none.
BFLOAT16 = np.dtype([("bfloat16", np.int16)])
# Values an image: 16 GiB of float32.
MAX_IMAGE_VALUES = 1 << 32
# Most of a message that may quote the file.
MAX_REASON = 300
# Most entries of a list or dict that is a parameter, and how deep they may lie.
MAX_ENTRIES, MAX_DEPTH = 100, 5


@dataclass(frozen=True)
class FittedModel:
    """A fitted estimator without the estimator.

    Attributes
    ----------
    params : dict
        All constructor parameters.
    encoder : nn.Module
        The encoder, in evaluation mode; from `load_model`, on the CPU.
    encoder_spec : str, nn.Module or callable
        What it was built from.
    encoder_options : dict of str to bool
        How: "multiple_globals" and "standardized", see `skdim.encoders.make_encoder`.
    encoder_seed : int
        Of what the encoder drew when it was built.
    layer_shapes : dict
        As `skdim.encoders.layer_shapes` gives them.
    image_shape : tuple of int
        Channels, height and width.
    channels_last : bool
        Whether images came with their channels last, so that flat rows need a `data_format`.
    mean, std : ndarray of shape (C,), float32
        Statistics of the training images.
    trained_on_uint8 : bool
        Whether these were uint8.
    history : list of dict
        Name to number, one an epoch.
    feature_names : list of str or None
        Column names of the training images.
    """

    params: dict[str, Any]
    encoder: nn.Module
    encoder_spec: Any
    encoder_options: dict[str, bool]
    encoder_seed: int
    layer_shapes: dict[str, tuple[int, ...]]
    image_shape: ImageShape
    channels_last: bool
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    trained_on_uint8: bool
    history: list[dict[str, float]]
    feature_names: list[str] | None


def to_arrays(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Copy a module's parameters and buffers.

    Parameters
    ----------
    module : nn.Module
        On any device.

    Returns
    -------
    dict
        Name to ndarray.
    """
    return {name: _to_array(tensor.detach().cpu()) for name, tensor in module.state_dict().items()}


def _to_array(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        # NumPy has no such numbers, but a type of two bytes that is nothing else.
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16).copy()
    return tensor.numpy().copy()


def to_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Make tensors of arrays, as `to_arrays` made them.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        They may be read-only, as those of a memory-mapped joblib file.

    Returns
    -------
    dict
        Name to a copy.
    """
    return {name: _to_tensor(np.array(array)) for name, array in arrays.items()}


def _to_tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def restore_encoder(
    spec: Any,
    image_shape: ImageShape,
    width: int,
    options: dict[str, bool],
    seed: int,
    weights: Mapping[str, Tensor],
) -> nn.Module:
    """Build an encoder around parameters and buffers that it had.

    Parameters
    ----------
    spec : str, nn.Module or callable
        What it was built from.
    image_shape : tuple of int
        Channels, height and width.
    width : int
        Of the embedding.
    options : dict of str to bool
        As those of a `FittedModel`.
    seed : int
        Of what it draws when it is built.
    weights : mapping of str to Tensor
        Name to parameter or buffer, on the CPU; the encoder may take them over.

    Returns
    -------
    nn.Module
        The encoder, on the CPU, in evaluation mode.
    """
    if isinstance(spec, str):
        # For weights that are replaced nothing is drawn and no memory taken.
        with torch.device("meta"):
            module = _build(spec, image_shape, width, options)
        module.load_state_dict(weights, assign=True)
    else:
        # What the user brings may draw when it is built, and hold more than its state.
        with private_rng(seed, torch.device("cpu")):
            module = _build(spec, image_shape, width, options)
            if module.state_dict().keys() != weights.keys():
                # The rest is made by a first pass, as in training. No file from a stranger has such: its names are
                # compared before.
                layer_shapes(module, image_shape)
        module.load_state_dict(weights)
    return module.eval()


def save_model(path: str | os.PathLike[str], estimator_class: type[BaseEstimator], model: FittedModel) -> None:
    """Write a model to a file, whole or not at all.

    Parameters
    ----------
    path : str or path-like
        The file; one that is there is replaced.
    estimator_class : type
        The class of the estimator, which alone will read the file.
    model : FittedModel
        The model.

    Raises
    ------
    ValueError
        If history and column names are more than `load_model` reads, or the latter have control characters.

    Warns
    -----
    UserWarning
        If parameters are left out. `load_model` gives them their defaults.
    """
    for name in model.feature_names or ():
        if not _is_column_name(name):
            raise ValueError(f"The column name {name!r} has control characters, which `load` does not take.")
    tensors = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    tensors |= to_tensors({"mean": model.mean, "std": model.std})
    content = {
        "format": FORMAT,
        "class": estimator_class.__name__,
        "params": _params_to_json(estimator_class, model.params),
        "encoder": model.encoder_spec if isinstance(model.encoder_spec, str) else None,
        "encoder_options": model.encoder_options,
        "encoder_seed": model.encoder_seed,
        "width": model.layer_shapes["embedding"][0],
        "image_shape": model.image_shape,
        "channels_last": model.channels_last,
        "trained_on_uint8": model.trained_on_uint8,
        "history": model.history,
        "feature_names": model.feature_names,
        "versions": VERSIONS,
    }
    write_tensor_file(path, content, tensors)


def load_model(path: str | os.PathLike[str], estimator_class: type[BaseEstimator], encoder: Any = None) -> FittedModel:
    """Read a model from a file that may come from anyone.

    Parameters
    ----------
    path : str or path-like
        The file.
    estimator_class : type
        The class whose estimator the file must hold.
    encoder : nn.Module or callable, default=None
        What to build the encoder from, where it is none of this library's.

    Returns
    -------
    FittedModel
        The model.

    Raises
    ------
    InvalidFileError
        If the file is anything but what `save_model` wrote, or calls for another class or encoder.
    OSError
        If there is no such file, or it cannot be read.
    """
    try:
        # Opening a pipe would wait for its writer.
        if os.path.exists(path) and not os.path.isfile(path):
            raise InvalidFileError("it is not a regular file")
        with open(path, "rb") as file:
            return _read(file, estimator_class, encoder)
    except InvalidFileError as error:
        # Quotes from the file may hold codes that act on a terminal, also where a traceback shows the first error.
        words = " ".join(str(error)[: 4 * MAX_REASON].split())
        reason = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
        raise InvalidFileError(
            f"{os.fspath(path)!r} cannot be loaded by {estimator_class.__name__}.load: "
            f"{reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + '...'}."
        ) from None


def _read(file: BinaryIO, estimator_class: type[BaseEstimator], encoder: Any) -> FittedModel:
    size = os.fstat(file.fileno()).st_size
    declared, content, digest = read_header(file, size)
    _check_content(content, estimator_class)
    params = _params_from_json(estimator_class, content["params"], encoder)
    own = content["encoder"] is None
    if own and encoder is None:
        raise InvalidFileError("it holds the weights of an encoder that is not skdim's; pass that as encoder")
    if encoder is not None and not own and content["params"]["encoder"] is not None:
        raise InvalidFileError(f"it holds the encoder {content['encoder']!r}, so none can be passed")
    spec = encoder if own else content["encoder"]
    image_shape, width, options = tuple(content["image_shape"]), content["width"], content["encoder_options"]

    state, shapes = _blueprint(spec, image_shape, width, options)
    if params["output_layer"] not in shapes:
        raise InvalidFileError(f"its encoder has no layer {params['output_layer']!r}")
    expected = {f"encoder.{name}": tensor for name, tensor in state.items()}
    expected |= {name: torch.empty(image_shape[0], dtype=torch.float32, device="meta") for name in ("mean", "std")}
    check_shapes(declared, expected)
    tensors = read_tensors(file, size, expected, digest)
    mean, std = tensors.pop("mean").numpy(), tensors.pop("std").numpy()
    if not (np.isfinite(mean).all() and (std > 0).all()):
        raise InvalidFileError("its mean and std are no mean and standard deviation")

    weights = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    return FittedModel(
        params=params,
        encoder=restore_encoder(spec, image_shape, width, options, content["encoder_seed"], weights),
        encoder_spec=spec,
        encoder_options=options,
        encoder_seed=content["encoder_seed"],
        layer_shapes=shapes,
        image_shape=image_shape,
        channels_last=content["channels_last"],
        mean=mean,
        std=std,
        trained_on_uint8=content["trained_on_uint8"],
        history=content["history"],
        feature_names=content["feature_names"],
    )


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(epoch, dict) and "loss" in epoch and all(map(_is_number, epoch.values())) for epoch in value
    )


def _is_number(value: Any) -> bool:
    # Integers may be beyond float64.
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_column_name(value: Any) -> bool:
    """Tell names of columns, which errors quote, from texts with codes that act on a terminal."""
    return isinstance(value, str) and not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in value)


def _check_content(content: dict[str, Any], estimator_class: type[BaseEstimator]) -> None:
    """Check the metadata, all but the parameters."""
    # First, because another format may have other keys.
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise InvalidFileError(
            f"it has format {reprlib.repr(content.get('format'))}, this version of skdim reads {FORMAT}"
        )
    if content.get("class") != estimator_class.__name__:
        raise InvalidFileError(f"it holds a {reprlib.repr(content.get('class'))}")
    # Files of before there were such entries do not say.
    content.setdefault("channels_last", False)
    content.setdefault("encoder_seed", 0)
    check_names(content, KEYS, "metadata entry")
    shape, names, encoder = content["image_shape"], content["feature_names"], content["encoder"]
    versions, options = content["versions"], content["encoder_options"]
    sound = {
        "encoder": encoder is None or (isinstance(encoder, str) and encoder in ENCODERS),
        "encoder_options": isinstance(options, dict)
        and options.keys() == {"multiple_globals", "standardized"}
        and all(isinstance(value, bool) for value in options.values()),
        "width": _is_positive_int(content["width"]),
        "image_shape": isinstance(shape, list) and len(shape) == 3 and all(map(_is_positive_int, shape)),
        "encoder_seed": type(content["encoder_seed"]) is int and 0 <= content["encoder_seed"] < 1 << 32,
        "channels_last": isinstance(content["channels_last"], bool),
        "trained_on_uint8": isinstance(content["trained_on_uint8"], bool),
        "history": _is_history(content["history"]),
        "feature_names": names is None or (isinstance(names, list) and all(map(_is_column_name, names))),
        "versions": isinstance(versions, dict)
        and "skdim" in versions
        and all(isinstance(version, str) for version in versions.values()),
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise InvalidFileError(f"its metadata entry {name!r} is unfit: {reprlib.repr(content[name])}")
    if prod(shape) > MAX_IMAGE_VALUES:
        raise InvalidFileError(f"its images of shape {reprlib.repr(shape)} have more than {MAX_IMAGE_VALUES} values")
    if names is not None and len(names) != prod(shape):
        raise InvalidFileError(f"it has {len(names)} feature names for images of {prod(shape)} values")


def _params_to_json(estimator_class: type[BaseEstimator], params: dict[str, Any]) -> dict[str, Any]:
    defaults = estimator_class().get_params(deep=False)
    stored, left_out = {}, []
    for name, value in params.items():
        try:
            if name in NOT_STORED:
                raise TypeError("not stored")
            stored[name] = _to_json(value)
        except TypeError:
            # `load_model` is given such an encoder; of anything else it takes the default.
            stored[name] = None if name == "encoder" else _to_json(defaults[name])
            if name != "encoder" and value is not defaults[name]:
                left_out.append(name)
    if left_out:
        warn(
            f"The file does not hold the parameters {', '.join(left_out)}: {estimator_class.__name__}.load gives them "
            "their defaults, for set_params to change before training goes on."
        )
    return stored


def _to_json(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if type(value) is StandardAugmentation:
        return {"StandardAugmentation": {name: _to_json(setting) for name, setting in vars(value).items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is not stored")


def _params_from_json(estimator_class: type[BaseEstimator], stored: Any, encoder: Any) -> dict[str, Any]:
    """Read the parameters and check them as `fit` would."""
    defaults = estimator_class().get_params(deep=False)
    if not isinstance(stored, dict):
        raise InvalidFileError("its parameters are not a JSON object")
    # A file may be older than a parameter, which then has its default.
    stored = {name: _to_json(default) for name, default in defaults.items() if name != "encoder"} | stored
    check_names(stored, defaults, "parameter")
    for name in NOT_STORED:
        if stored[name] != _to_json(defaults[name]):
            raise InvalidFileError(f"its parameter {name!r} is not the default")
    try:
        params = {name: _from_json(value) for name, value in stored.items()}
        if params["encoder"] is None:
            if encoder is None:
                raise InvalidFileError("it was saved with an encoder that is not skdim's; pass that as encoder")
            params["encoder"] = encoder
        estimator_class(**params)._validate_params()
        if params["image_shape"] is not None:
            check_image_shape(params["image_shape"])
    except InvalidFileError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidFileError(f"its parameters are unfit: {error}") from error
    return params


def _from_json(value: Any, depth: int = 0) -> Any:
    kind, items = type(value), value
    if isinstance(value, dict):
        if value.keys() == {"tuple"} and isinstance(value["tuple"], list):
            kind, items = tuple, value["tuple"]
        elif value.keys() == {"dict"} and isinstance(value["dict"], dict):
            items = value["dict"]
        elif value.keys() == {"StandardAugmentation"} and isinstance(value["StandardAugmentation"], dict):
            return StandardAugmentation(**value["StandardAugmentation"])
        else:
            raise TypeError("a JSON object stands for a tuple, a dict or a StandardAugmentation only")
    if kind not in (list, tuple, dict):
        return value
    if len(items) > MAX_ENTRIES or depth > MAX_DEPTH:
        raise ValueError(f"a list or dict has more than {MAX_ENTRIES} entries, or lies too deep in others")
    if kind is dict:
        return {key: _from_json(item, depth + 1) for key, item in items.items()}
    return kind(_from_json(item, depth + 1) for item in items)


def _build(encoder: Any, image_shape: ImageShape, width: int, options: dict[str, bool]) -> nn.Module:
    module = build_encoder(encoder, image_shape, width, multiple_globals=options["multiple_globals"])
    return StandardizedEncoder(module, width) if options["standardized"] else module


def _blueprint(
    encoder: Any, image_shape: ImageShape, width: int, options: dict[str, bool]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Find the tensors and layers of an encoder on the meta device, where sizes cost nothing, whoever chose them."""
    try:
        with torch.device("meta"):
            module = _build(encoder, image_shape, width, options).to("meta")
            state, shapes = module.state_dict(), layer_shapes(module, image_shape)
    except Exception as error:
        raise InvalidFileError(
            f"its encoder for images of shape {image_shape} and embeddings of width {reprlib.repr(width)} cannot be "
            f"built and run on torch's meta device: {error}"
        ) from error
    if shapes["embedding"] != (width,):
        raise InvalidFileError(f"the encoder returns embeddings of shape {shapes['embedding']}, expected {(width,)}")
    return state, shapes
