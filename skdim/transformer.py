"""DIMTransformer, the one door to the library."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context, clone
from sklearn.utils import check_random_state, metadata_routing
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from skorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from skdim._version import __version__
from skdim.base import EstimatorMixin, unchanged_on_error
from skdim.batches import Batches, LoadedBatches, Standardizer
from skdim.callbacks import check_callbacks, describe_callbacks
from skdim.checkpoints import Checkpoints
from skdim.devices import (
    available_device,
    check_precision,
    heed_fork,
    is_out_of_memory,
    limited_threads,
    place,
    resolve_device,
    resolve_precision,
    usual_torch,
)
from skdim.distributed import ALONE, Group, join, local_device
from skdim.encoders import ENCODERS, make_encoder, receptive_fields
from skdim.export import write_onnx
from skdim.identity import describe, describe_images, describe_training
from skdim.images import CHUNK_BYTES, Images, check_images
from skdim.inference import encode
from skdim.layouts import ImageShape, check_image_shape
from skdim.loaders import LoadedImages, check_loader, check_order
from skdim.model import NEGATIVES, InfoMaxModel, build_model
from skdim.monitoring import CallbackSupportMixin, FitTask, Progress, training_attributes
from skdim.net import DIMNet
from skdim.notices import warn
from skdim.objectives import OBJECTIVES
from skdim.parameters import check_negatives, check_numbers, check_units, check_weights
from skdim.persistence import FittedModel, load_model, restore_encoder, save_model, to_arrays, to_tensors
from skdim.randomness import private_rng, seeded_generators
from skdim.statistics import SMALLEST_SPREAD, channel_statistics
from skdim.views import Augmentation, Occlusion, StandardAugmentation, check_augmentation

# Lives only in the process that trained; the rest of the estimator is pickled.
_TRAINING_STATE = ("discriminators_", "net_", "_built_for")

# What of the identity of a training a checkpoint may bring.
_SEED = "seed drawn from random_state"

# Images of one kind differ less in contrast than a forgotten division by 255 makes them.
OTHER_SCALE = 100
# Nor do they lie, in all channels, as many standard deviations from each other as Kelvin from degrees Celsius.
OTHER_LEVEL = 20
# Embeddings of one image in two batches differ by rounding, which is less than this share of them.
OTHER_BATCH = 1e-2


def _split_seed(entropy: int) -> tuple[int, int]:
    """Derive the seeds of the encoder and of the net."""
    encoder_seed, net_seed = np.random.SeedSequence(entropy).generate_state(2)
    return int(encoder_seed), int(net_seed)


class DIMTransformer(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, CallbackSupportMixin, EstimatorMixin, BaseEstimator
):
    r"""Learn image embeddings without labels by Deep InfoMax.

    Trains an encoder to maximise the mutual information between an image, its local patches and its embedding, while
    the distribution of the embedding is matched to a prior:

    .. math:: \max_E \; \alpha \, \hat I_{global}(C(x); y) + \frac{\beta}{L} \sum_{l} \hat I_{local}(C_l(x); y)
              - \gamma \, D(p_y \,\|\, p_{prior}), \qquad y = E(x)

    where :math:`C` is the map of local features that the encoder computes on the way to the embedding :math:`y` [1]_.

    Parameters
    ----------
    n_components : int, default=64
        Width of the embedding.

    image_shape : tuple of int, default=None
        Channels, height and width of an image. Needed for flat rows of colour images. With None, flat rows whose
        width is a perfect square of at least 16 are grey images and others signals of 1 x 1 x p; arrays of images
        bring their shape. Rows that look like images of several channels are warned about.

    data_format : {"auto", "channels_first", "channels_last"}, default="auto"
        Order of the axes of an image. "auto" finds the channels of (n, C, H, W) and (n, H, W, C) arrays where only
        one reading is sensible, and takes flat rows as channels first, unless `fit` has seen (n, H, W, C) arrays: which
        they are must then be said.

    encoder : {"dcgan", "stride1", "alexnet", "resnet", "resnet_folded"}, nn.Module or callable, default="dcgan"
        The network. "dcgan" is the paper's for small images, "alexnet" the one for 64 x 64 images, "resnet" the
        residual one and "resnet_folded" the same on overlapping crops; "stride1" is four convolutions of stride 1.
        All but the first are far slower: the guide compares them. A class or other callable builds a module as
        ``encoder(image_shape, n_components)``; an instance, and a module with weights that were there before the call,
        is copied and trained on from the weights it has. Its ``forward`` takes float32 images (N, C, H, W) and returns
        the embedding (N, n_components) and the local features (N, K, h, w). `skdim.encoders.LayerEncoder` makes one of
        any network. Behind ``memory`` of a pipeline give a callable that holds no module: joblib tells no two modules
        to be equal, and would train each time.

    local_weight : float, default=1.0
        Weight of the local mutual information, the paper's beta. A weight of 0 builds and computes nothing of its
        term.

    global_weight : float, default=0.0
        Weight of the global mutual information, the paper's alpha. The local term alone is as good and trains faster.

    prior_weight : float, default=0.1
        Weight of the match of the embedding to the prior, the paper's gamma.

    mi_estimator : {"infonce", "jsd", "dv", "kl", "rkl", "hellinger", "chi2"}, default="infonce"
        The mutual-information objective: InfoNCE, Jensen-Shannon, Donsker-Varadhan, or the variational form of an
        f-divergence, see `skdim.objectives`.

    discriminator : {"dot", "concat"}, default="dot"
        Form of the critics: "dot" encodes both sides and takes the dot product, "concat" puts both into one
        perceptron. With "concat", ``negatives="batch"`` costs batch_size times the work of the other two.

    mi_units : int, default=256
        Width of the critics, at least 2 with "dot".

    negatives : {"batch", "roll", "shuffle"}, sequence of them, or dict, default="batch"
        Against what an embedding is told apart: the locations of all other images of its batch, of the next image,
        or of another image drawn at random. Of several schemes the losses are averaged; a dict names those of each
        critic, ``{"local": "batch", "global": ("roll", "shuffle")}``.

    local_samples : int, default=None
        How many locations of each image the local critic sees in a batch, drawn at random. None is all of them, and
        so is more than there are.

    prior : {"uniform", "normal"}, default="uniform"
        What the embedding y is matched to: "uniform" matches ``sigmoid(y)`` to the uniform distribution on [0, 1] in
        every dimension, "normal" y itself to the standard normal one.

    prior_matching : {"adversarial", "noise"}, default="adversarial"
        How: "adversarial" trains a discriminator between prior and embedding, which the encoder learns to fool; the
        encoder's loss in this game is weighted by `prior_weight`, the slope of the discriminator's logit is penalised
        [3]_. "noise" adds noise to the embeddings that the critics see, so that the prior's distribution is the one
        that carries most information [2]_, or with ``prior="uniform"`` nearly so while the noise is weak;
        `prior_weight` is the standard deviation of the noise as a share of the prior's, and should stay near 0.1. It
        needs no second network and cannot become unstable. With ``prior="normal"`` the encoder then ends in a batch
        norm, whose mean and variance are those of the images as training shows them, occluded or augmented: of whole
        images they differ somewhat.

    multiple_globals : bool, default=False
        Whether the encoder yields one embedding for each location of its last convolution's map, each of which is
        trained as an embedding of the image. `transform` returns their mean. A module of your own does so by returning
        embeddings of shape (N, n_components, gh, gw).

    augmentation : {"standard"}, callable or None, default=None
        With an augmentation each batch is seen in two independent random views, and the locations of each view are
        scored against the embeddings of the other one. "standard" is `skdim.views.StandardAugmentation`, whose crops,
        flips, colours and noise can be set; a callable is called as ``augmentation(images, generator)`` with
        standardised images, a float32 tensor (N, C, H, W) on the training device, and a torch.Generator on the same
        device, and returns as many images of the same shape.

    coordinate_weight : float, default=0.0
        Weight of the coordinate task: predicting from the embedding and local features the row and the column of a
        location, and the offset of another one from it.

    occlusion : bool, default=False
        Whether a random block of each image is hidden from the embedding, but not from the local features. A ValueError
        where each local feature sees so much of the image that no block hides one feature's field and leaves another's.

    output_layer : {"embedding", "hidden", "features"}, default="embedding"
        What `transform` returns: the embedding; the hidden layer before it (of 1024 units, 4096 with "alexnet", none
        with "stride1"); or the last convolution's map, flattened (for your own encoder, the features it returns). May
        be changed after `fit`.

    max_epochs : int, default=20
        Passes over the images. 0 gives the untrained encoder, the control for what training brings.

    batch_size : int, default=128
        Most images in a batch, of all processes together where several train. All batches have one size; where the
        images do not divide into such batches, a few random ones are seen twice in an epoch. It also sets how many
        negatives there are with ``negatives="batch"``.

    lr : float, default=2e-3
        Learning rate of Adam; the highest one of the "one_cycle" schedule.

    lr_schedule : {"one_cycle", "constant"}, default="one_cycle"
        Schedule over the epochs of one `fit`.

    device : str, default="auto"
        Where to train: "cpu", "cuda", "cuda:N", or "auto", which is CUDA where there is one, else the CPU.

    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Precision of training. "auto" is bfloat16 (with float32 weights and losses) where the hardware computes it
        natively; on a CPU float32 for images, other than signals, with one side at least twice the other, or less than
        8 pixels and not square. `transform` always computes in float32.

    compile : bool, default=False
        Whether to compile the training step with ``torch.compile``: half a minute or so at the start of training, and
        fewer, larger kernels.

    distributed : bool, default=False
        Whether all processes that ``torchrun`` or ``accelerate launch`` has started, or that have initialized
        ``torch.distributed``, train one encoder together. Each of them calls `fit` with the same parameters and all
        images, reads its share of each batch, and gets the same encoder: that of one process with the same
        `batch_size`, up to rounding. "auto" and "cuda" are then the GPU of the process' number on its host.

    gather_negatives : bool, default=True
        With `distributed`, whether an embedding is told apart from the images of all processes. With False from those
        of its own only, and embeddings do not travel.

    warm_start : bool, default=False
        Whether `fit` goes on from the last solution.

    checkpoint_dir : str or path-like, default=None
        Directory in which `fit` writes the state of training after each epoch: one safetensors file of 12 bytes a
        weight, of which it keeps the newest two. A `fit` that finds a state there goes on from it, to the same bits as
        without the interruption, with the same number of threads; after the last epoch it returns the result. The
        directory is for one training: one of other parameters or images is refused. With ``random_state=None`` the seed
        of the first attempt is taken over. With ``lr_schedule="constant"`` `max_epochs` may be raised, to train on from
        where the last `fit` ended, unless a callback had stopped it: that result is final. A checkpoint that cannot be
        written is a warning. `partial_fit` takes no notice of the directory, and ``warm_start=True`` excludes it.

    callbacks : sequence of skorch.callbacks.Callback, default=None
        Callbacks for the training net, ``EarlyStopping(monitor="train_loss")`` for one. There is no validation loss;
        the loss is "train_loss" in the net's history, beside the terms that `history_` has. A callback that acts on
        batches makes the device wait for the host after each of them. One that raises `skdim.monitoring.StopTraining`
        at an epoch or a batch ends training; what has been learned stands. In a training that goes on from a
        checkpoint, attributes that end in an underscore are taken up again if they are numbers, strings, tensors, or
        lists or dicts of them, or have a ``state_dict``; parameters of callbacks are not compared. An LRScheduler needs
        ``lr_schedule="constant"``; it sets the rate of encoder and critics, not the prior discriminator's. An
        EpochScoring needs ``on_train=True`` and a function ``scoring(net, X, y)`` of your own. Callbacks of
        scikit-learn (from 1.9 on) are set with `set_callbacks` instead.

    random_state : int, RandomState instance or None, default=None
        Draws initial weights and all that is drawn in training. An int gives the same bits on the same machine with the
        same number of threads, on CUDA only with ``torch.use_deterministic_algorithms(True)``; with None the seed is
        drawn from NumPy's global generator. Images of up to 256 values are always computed on one thread, so that
        searches over them give the same bits for any `n_jobs`.

    verbose : int, default=0
        With 1, training shows a bar on a terminal or in a notebook: epochs, losses, images a second and the time left;
        elsewhere a line an epoch is printed to stderr. With or without it, such a line goes to
        ``logging.getLogger("skdim")`` at level INFO.

    Attributes
    ----------
    encoder_ : nn.Module
        The encoder, in evaluation mode. It takes standardised images.
    discriminators_ : dict
        The critics "local" and "global", the discriminator "prior" and the predictor "coordinate", those whose weight
        is not 0. Only in the process that trained them.
    net_ : skorch.NeuralNet
        The net that trained. Only in the process that trained it.
    image_shape_ : tuple of int
        Channels, height and width of an image.
    mean_, std_ : ndarray of shape (C,)
        Mean and standard deviation of each channel of the training images, with which images are standardised;
        uint8 images are scaled by 1/255 first. A channel that was constant has an infinite `std_`: it becomes 0.
    n_features_in_ : int
        Values an image has: C * H * W.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names of `X`, where it had any that are all strings.
    n_iter_ : int
        Epochs trained.
    history_ : list of dict
        One dict an epoch: "loss", each of its terms before weighting ("local", "global", "prior", "coordinate"),
        "prior_discriminator", "seconds" and "images_per_second"; with "infonce" and "dv" also "local_bound" and
        "global_bound", estimates of lower bounds of the mutual information in nats (those of "dv" are biased upwards by
        batches being finite).
    loss_curve_ : list of float
        The weighted loss of each epoch.
    device_ : torch.device
        Where the encoder is.

    See Also
    --------
    sklearn.decomposition.PCA : Linear features.

    Notes
    -----
    A pickle, and so a joblib file, holds parameters, history and the encoder's weights as NumPy arrays: what
    `transform` needs. An encoder instance of your own is a parameter and pickled with it, by torch's means.
    `partial_fit` or `warm_start` on a loaded estimator go on from these weights with fresh discriminators. For
    files that go to or come from strangers there are `save` and `load`.

    References
    ----------
    .. [1] R. D. Hjelm et al., "Learning deep representations by mutual information estimation and maximization",
       ICLR 2019, arXiv:1808.06670.
    .. [2] I. Butakov et al., "Efficient distribution matching of representations via noise-injected Deep InfoMax",
       arXiv:2410.06993.

    .. [3] L. Mescheder, A. Geiger and S. Nowozin, "Which training methods for GANs do actually converge?", ICML 2018,
       arXiv:1801.04406.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdim import DIMTransformer
    >>> X, _ = load_digits(return_X_y=True)
    >>> DIMTransformer(n_components=16, max_epochs=2, random_state=0).fit_transform(X).shape
    (1797, 16)
    """

    encoder_: nn.Module
    net_: DIMNet
    history_: list[dict[str, float]]
    # Also of a pickle from before there were such attributes.
    _channels_last = False
    _encoder_seed = 0
    _layer_shapes: dict[str, Any]
    _encoder_options: dict[str, bool]
    _built_for: tuple[Any, ...]

    # No metadata for routing.
    __metadata_request__transform = {"out": metadata_routing.UNUSED}

    _parameter_constraints: dict[str, list[Any]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "image_shape": [tuple, list, None],
        "data_format": [StrOptions({"auto", "channels_first", "channels_last"})],
        "encoder": [StrOptions(set(ENCODERS)), nn.Module, callable],
        "local_weight": [Interval(Real, 0, None, closed="left")],
        "global_weight": [Interval(Real, 0, None, closed="left")],
        "prior_weight": [Interval(Real, 0, None, closed="left")],
        "mi_estimator": [StrOptions(set(OBJECTIVES))],
        "discriminator": [StrOptions({"dot", "concat"})],
        "mi_units": [Interval(Integral, 1, None, closed="left")],
        "negatives": [StrOptions(set(NEGATIVES)), list, tuple, dict],
        "local_samples": [Interval(Integral, 1, None, closed="left"), None],
        "prior": [StrOptions({"uniform", "normal"})],
        "prior_matching": [StrOptions({"adversarial", "noise"})],
        "multiple_globals": ["boolean"],
        "augmentation": [StrOptions({"standard"}), callable, None],
        "coordinate_weight": [Interval(Real, 0, None, closed="left")],
        "occlusion": ["boolean"],
        "output_layer": [StrOptions({"embedding", "hidden", "features"})],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "lr_schedule": [StrOptions({"one_cycle", "constant"})],
        "device": [str],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "compile": ["boolean"],
        "distributed": ["boolean"],
        "gather_negatives": ["boolean"],
        "warm_start": ["boolean"],
        "checkpoint_dir": [str, os.PathLike, None],
        "callbacks": [list, tuple, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_components: int = 64,
        *,
        image_shape: Sequence[int] | None = None,
        data_format: str = "auto",
        encoder: str | nn.Module | Callable[..., nn.Module] = "dcgan",
        local_weight: float = 1.0,
        global_weight: float = 0.0,
        prior_weight: float = 0.1,
        mi_estimator: str = "infonce",
        discriminator: str = "dot",
        mi_units: int = 256,
        negatives: str | Sequence[str] | dict[str, str | Sequence[str]] = "batch",
        local_samples: int | None = None,
        prior: str = "uniform",
        prior_matching: str = "adversarial",
        multiple_globals: bool = False,
        augmentation: str | Augmentation | None = None,
        coordinate_weight: float = 0.0,
        occlusion: bool = False,
        output_layer: str = "embedding",
        max_epochs: int = 20,
        batch_size: int = 128,
        lr: float = 2e-3,
        lr_schedule: str = "one_cycle",
        device: str = "auto",
        precision: str = "auto",
        compile: bool = False,
        distributed: bool = False,
        gather_negatives: bool = True,
        warm_start: bool = False,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.image_shape = image_shape
        self.data_format = data_format
        self.encoder = encoder
        self.local_weight = local_weight
        self.global_weight = global_weight
        self.prior_weight = prior_weight
        self.mi_estimator = mi_estimator
        self.discriminator = discriminator
        self.mi_units = mi_units
        self.negatives = negatives
        self.local_samples = local_samples
        self.prior = prior
        self.prior_matching = prior_matching
        self.multiple_globals = multiple_globals
        self.augmentation = augmentation
        self.coordinate_weight = coordinate_weight
        self.occlusion = occlusion
        self.output_layer = output_layer
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.lr_schedule = lr_schedule
        self.device = device
        self.precision = precision
        self.compile = compile
        self.distributed = distributed
        self.gather_negatives = gather_negatives
        self.warm_start = warm_start
        self.checkpoint_dir = checkpoint_dir
        self.callbacks = callbacks
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the encoder from images.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            At least two images: uint8, scaled by 1/255, or numbers of any scale, computed with as float32. Or a
            sequence of paths or Pillow images, see `skdim.files.read_images`. An array is not copied where that can be
            helped, nor ever written to, and should not change while `fit` runs. What is on disk is read a part at a
            time: an array in a mapped file, an HDF5 dataset, a zarr or dask array, a map-style torch Dataset of images
            or of tuples that begin with one. A torch DataLoader brings batches of its own, instead of those of
            `batch_size`, in its own order.
        y : None
            Ignored.

        Returns
        -------
        DIMTransformer
            The fitted transformer.

        Raises
        ------
        ValueError
            If a parameter or the images are unfit, or `checkpoint_dir` holds another training or only damaged files.
            The estimator is then as it was.
        TypeError
            If `X` is sparse, masked or no array of numbers. The estimator is then as it was.
        OSError
            If `checkpoint_dir` cannot be written to. The estimator is then as it was.
        FloatingPointError
            If training diverges. The estimator is then as it was.
        torch.OutOfMemoryError
            If memory is short. The estimator is then as it was.
        RuntimeError
            If another process of a `distributed` training is lost or fails. The estimator is then as it was.
        """
        if self.warm_start and self.checkpoint_dir is not None:
            raise ValueError(
                "checkpoint_dir needs warm_start=False: where a training that goes on from another one began, no "
                "checkpoint can tell."
            )
        go_on = self.warm_start and hasattr(self, "encoder_")
        with FitTask(self, X, y, self.max_epochs) as task, self._unchanged_on_error():
            self._train(
                X,
                go_on=go_on,
                # torch's schedules take no integers of NumPy.
                epochs=int(self.max_epochs),
                lr_schedule=self.lr_schedule,
                checkpoint_dir=self.checkpoint_dir,
                watchers=[task],
            )
        return self

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Train one epoch more on these images, at the constant learning rate `lr`.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            At least two images, in any form that `fit` takes. The first call sets their shape and how they are
            standardised.
        y : None
            Ignored.

        Returns
        -------
        DIMTransformer
            The fitted transformer.

        Raises
        ------
        ValueError
            If a parameter or the images are unfit. The estimator is then as it was.
        FloatingPointError
            If training diverges. The estimator is then as it was.
        torch.OutOfMemoryError
            If memory is short. The estimator is then as it was.
        RuntimeError
            If another process of a `distributed` training is lost or fails. The estimator is then as it was.
        """
        # scikit-learn's decorator would check them before the first call only.
        if not get_config()["skip_parameter_validation"]:
            self._validate_params()
        with self._unchanged_on_error():
            self._train(X, go_on=hasattr(self, "encoder_"), epochs=1, lr_schedule="constant")
        return self

    def transform(self, X: Any, *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32] | torch.Tensor:
        """Compute the embeddings of images.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            Images of the shape seen in `fit`, in any form that `fit` takes; a DataLoader must keep their order.
        out : ndarray of shape (n, n_features_out), float32, default=None
            Where to write the embeddings, a memory-mapped file for one.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            The embeddings, or the layer that `output_layer` names. An image has the same embedding in any batch.
            With scikit-learn's array API dispatch on, torch tensors give a tensor on their device. `out`, if it is
            given; where `set_output` asks for a DataFrame, one with the values of `out`.

        Raises
        ------
        ValueError
            If the images are unfit or of another shape, `out` cannot take the embeddings, or an embedding is not
            finite. Rows of `out` may be written where the values of images on disk, which are checked as they are
            read, are unfit or embeddings are not finite.
        NotFittedError
            If `fit` has not been called.
        """
        check_is_fitted(self)
        self._check_output_layer()
        heed_fork()
        if isinstance(X, DataLoader):
            check_order(X)
        images = self._check_images(X, reset=False)
        if images.n_images is None:
            raise ValueError(
                "transform needs to know how many images a DataLoader brings, which it cannot without a batch_size: "
                "give it one, or pass its dataset."
            )
        if out is not None:
            self._check_out(out, images)
        self._warn_of_other_scale(images)
        standardize = Standardizer(self.mean_, self.std_, self.device_)
        if isinstance(images, LoadedImages):
            images.seed(0, self.device_)
        with limited_threads(images.shape, self.device_):
            values = encode(self.encoder_, images, standardize, self.output_layer, self._n_features_out, out)
        if out is not None:
            return out
        if isinstance(X, torch.Tensor) and get_config()["array_api_dispatch"]:
            return values.to(X.device)
        return values.numpy()

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """Learn the encoder from images and compute their embeddings.

        Parameters
        ----------
        X : array-like of shape (n, p), (n, C, H, W), (n, H, W, C) or (n, H, W)
            At least two images, in any form that `fit` takes; a DataLoader must keep their order.
        y : None
            Ignored.
        **fit_params : dict
            Of `fit`, which has none.

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            What `transform` returns.

        Raises
        ------
        ValueError
            As `fit` and `transform` do.
        """
        if isinstance(X, DataLoader):
            # Before the training, not after it.
            check_order(X)
        return super().fit_transform(X, y, **fit_params)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Name the columns of what `transform` returns: "dimtransformer0", "dimtransformer1", ...

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Only compared with the columns that `fit` had.

        Returns
        -------
        ndarray of shape (n_features_out,), object
            The names.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ValueError
            If the encoder has no such layer as `output_layer` names, or `fit` had other columns.
        """
        check_is_fitted(self)
        self._check_output_layer()
        return super().get_feature_names_out(input_features)

    def to(self, device: str) -> Self:
        """Move the fitted encoder to a device, and the discriminators if there are any.

        Training that goes on afterwards, on another device than before, starts with new discriminators.

        Parameters
        ----------
        device : str
            "auto", "cpu", "cuda" or "cuda:N". The parameter `device`, which says where to train, is not changed.

        Returns
        -------
        DIMTransformer
            The estimator itself.

        Raises
        ------
        NotFittedError
            If it is not fitted.
        ValueError
            If there is no such device.
        """
        check_is_fitted(self)
        resolved = resolve_device(device)
        # The net's module is the encoder with its discriminators, so that displays find both on one device.
        module = self.net_.module_ if hasattr(self, "net_") else self.encoder_
        # Or the moved weights could never be trained again.
        with torch.inference_mode(False):
            module.to(resolved)
        self.device_ = resolved
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one safetensors file, for `load`.

        The file holds what a pickle holds, parameters, history and the encoder's weights, in a format that opening
        can't harm. It is written whole or not at all. `callbacks`, `checkpoint_dir` and parameters that are objects,
        such as a RandomState or an augmentation of your own, are not stored: `load` gives them their defaults. Nor is
        what `set_output` has been given. Of an encoder of your own only the weights are.

        Parameters
        ----------
        path : str or path-like
            The file, ".safetensors" by custom; one that is there is replaced.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ValueError
            If a parameter is unfit, a column name has control characters, or history and column names are too long.
        OSError
            If the file cannot be written. One that was there is as it was.

        Warns
        -----
        UserWarning
            If parameters are not stored; it names them.
        """
        check_is_fitted(self)
        self._validate_params()
        self._check_output_layer()
        feature_names = getattr(self, "feature_names_in_", None)
        model = FittedModel(
            params=self.get_params(deep=False),
            encoder=self.encoder_,
            encoder_spec=self._encoder_spec,
            encoder_options=self._encoder_options,
            encoder_seed=self._encoder_seed,
            layer_shapes=self._layer_shapes,
            image_shape=self.image_shape_,
            channels_last=self._channels_last,
            mean=self.mean_,
            std=self.std_,
            trained_on_uint8=self._trained_on_uint8,
            history=self.history_,
            feature_names=None if feature_names is None else feature_names.tolist(),
        )
        save_model(path, type(self), model)

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write what `transform` computes to an ONNX file, for other runtimes and languages.

        The file takes a tensor "images" of shape (n, C, H, W), any n, and returns the layer that `output_layer` names,
        under that name, as float32 (n, n_features_out). Images are uint8 if those of `fit` were, else float32; scaling
        and standardisation are in the file. Before it is written, whole or not at all, it is run in onnxruntime and
        compared with the encoder. Needs the packages onnx, onnxscript and onnxruntime.

        Parameters
        ----------
        path : str or path-like
            The file, ".onnx" by custom; one that is there is replaced.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        ImportError
            If a package is missing.
        ValueError
            If torch cannot export an encoder of your own for any number of images, or it has 2 GiB of weights or more.
        OSError
            If the file cannot be written. One that was there is as it was.
        """
        check_is_fitted(self)
        self._check_output_layer()
        write_onnx(
            path,
            self.encoder_,
            self.output_layer,
            self.image_shape_,
            self.mean_,
            self.std_,
            is_uint8=self._trained_on_uint8,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto", encoder: Any = None) -> Self:
        """Read an estimator from a file that `save` wrote; the file may come from a stranger.

        Nothing in the file is run, imported or unpickled, and no memory is spent that its own size does not pay for.
        What the weights compute is up to who sent them.

        Parameters
        ----------
        path : str or path-like
            The file.
        device : str, default="auto"
            Where to put the encoder: "auto", "cpu", "cuda" or "cuda:N".
        encoder : nn.Module class, instance or callable, default=None
            The encoder, where the estimator was fitted with your own; it must have the same structure, and be able
            to run on torch's meta device. An instance is copied.

        Returns
        -------
        DIMTransformer
            The fitted transformer. It transforms to the bits of the one that was saved, on the same machine;
            `partial_fit` and `warm_start` go on from its weights with fresh discriminators.

        Raises
        ------
        skdim.persistence.InvalidFileError
            A ValueError: if the file is damaged or is anything but what `save` wrote.
        ValueError
            If there is no such device.
        OSError
            If there is no such file, or it cannot be read.
        """
        resolved = resolve_device(device)
        with private_rng(0, torch.device("cpu")):
            model = load_model(path, cls, encoder)
            place(model.encoder, resolved)
        dim = cls(**model.params)
        dim.encoder_ = model.encoder
        dim.device_ = resolved
        dim.image_shape_, dim._channels_last = model.image_shape, model.channels_last
        dim.n_features_in_ = prod(model.image_shape)
        if model.feature_names is not None:
            dim.feature_names_in_ = np.array(model.feature_names, dtype=object)
        dim.mean_, dim.std_ = model.mean, model.std
        dim.__dict__.update(training_attributes(model.history))
        dim._layer_shapes = model.layer_shapes
        dim._encoder_spec = model.encoder_spec
        dim._encoder_options = model.encoder_options
        dim._encoder_seed = model.encoder_seed
        dim._trained_on_uint8 = model.trained_on_uint8
        return dim

    def _train(
        self,
        X: Any,
        *,
        go_on: bool,
        epochs: int,
        lr_schedule: str,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        watchers: Sequence[Callback] = (),
    ) -> None:
        weights = {
            # torch takes no integers of any length.
            "local": float(self.local_weight),
            "global": float(self.global_weight),
            "prior": float(self.prior_weight),
            "coordinate": float(self.coordinate_weight),
        }
        heed_fork()
        with ExitStack() as stack:
            device = resolve_device(local_device(self.device) if self.distributed else self.device)
            group = stack.enter_context(join(device)) if self.distributed else ALONE
            with group.together():
                check_precision(self.precision, device)
                negatives = self._check_objective(weights)
                check_callbacks(self.callbacks, lr_schedule)
                images = self._check_training_images(X, checkpoint_dir, go_on=go_on)
                common = self._describe_for_others(images, device, group, go_on=go_on) if self.distributed else {}
            trains = f"{epochs} epochs, {lr_schedule}, {'without' if checkpoint_dir is None else 'with'} checkpoints"
            group.check_same({**common, "training": trains})
            entropy = group.broadcast(int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)))
            encoder_seed, net_seed = _split_seed(entropy)
            stack.enter_context(usual_torch(device))
            stack.enter_context(limited_threads(images.shape, device))
            stack.enter_context(self._advised_on_memory(device))
            if isinstance(images, LoadedImages):
                images.seed(encoder_seed, device)
            if not go_on:
                self._start(images, encoder_seed)
            self._check_coordinates()
            with private_rng(net_seed, device):
                augmentation = check_augmentation(self.augmentation, images.shape, device)
            self._make_net(weights, negatives, augmentation, device, net_seed, group, keep=go_on)
            # From here on all images are read: what can be refused without is refused above.
            if not go_on:
                self.mean_, self.std_ = channel_statistics(images, group)
            checkpoints = stack.enter_context(self._open_checkpoints(checkpoint_dir, images, device, entropy, group))
            if checkpoints is not None and checkpoints.identity[_SEED] != entropy:
                encoder_seed, net_seed = _split_seed(checkpoints.identity[_SEED])
                self._build_encoder(images.shape, encoder_seed)
                self._make_net(weights, negatives, augmentation, device, net_seed, group, keep=False)
            self.net_.criterion_.weights = weights
            standardize = Standardizer(self.mean_, self.std_, device)
            if isinstance(images, LoadedImages):
                batches: Batches = LoadedBatches(images, standardize)
            else:
                batches = Batches(images, standardize, self.batch_size, self.net_.generator, group)
            if go_on:
                stack.enter_context(self.net_.rolled_back_on_error())
                if isinstance(images, LoadedImages):
                    # The generators of the net go on; a loader's would start again, with the same order.
                    images.seed(self.net_.draw_seed(), device)
            generators = []
            if not self._is_built_in(augmentation):
                # What the user brings may draw from torch's global generators, in dropout say; ours never do.
                generators = seeded_generators(self.net_.draw_seed() + group.rank, device)
            progress = stack.enter_context(Progress(epochs, batches.n_drawn, self.verbose, group.rank > 0))
            callbacks = [progress, *(self.callbacks or ()), *watchers]
            records = self.net_.train(
                batches,
                epochs,
                float(self.lr),
                lr_schedule,
                callbacks,
                progress.step,
                checkpoints,
                generators,
                group,
                self.gather_negatives,
            )
            self._take_over_model()
            self.encoder_.eval()
            with group.together(), private_rng(net_seed, device):
                self._check_embeddings(images)
        self.__dict__.update(training_attributes(self.history_ + records))

    def _validate_params(self) -> None:
        super()._validate_params()
        for kind in (Integral, Real):
            names = [
                name for name, kinds in self._parameter_constraints.items() if getattr(kinds[0], "type", 0) is kind
            ]
            check_numbers({name: getattr(self, name) for name in names}, whole=kind is Integral)
        check_negatives(self.negatives, [])

    def _check_objective(self, weights: dict[str, float]) -> dict[str, tuple[str, ...]]:
        """Check what the loss is made of, and return the schemes of negatives of each critic."""
        check_weights(weights, self.prior_matching)
        check_units(self.mi_units, self.discriminator)
        return check_negatives(self.negatives, [name for name in ("local", "global") if weights[name]])

    def _check_training_images(
        self, X: Any, checkpoint_dir: str | os.PathLike[str] | None, *, go_on: bool
    ) -> Images | LoadedImages:
        if go_on:
            self._check_same_encoder()
        images = self._check_images(X, reset=not go_on, min_samples=2)
        if isinstance(images, LoadedImages) and checkpoint_dir is not None:
            raise ValueError(
                "checkpoint_dir needs images in an order that can be taken up again, and a DataLoader draws its own: "
                "pass its dataset."
            )
        if go_on:
            self._warn_of_other_scale(images)
        return images

    def _describe_for_others(
        self, images: Images | LoadedImages, device: torch.device, group: Group, *, go_on: bool
    ) -> dict[str, Any]:
        """Check what training together needs, and describe what all processes have to have the same of."""
        if isinstance(images, LoadedImages):
            raise ValueError(
                "distributed=True needs images of which each process can read its share, and a DataLoader draws its "
                "own: pass its dataset."
            )
        if self.compile:
            raise ValueError("distributed=True needs compile=False: compiled code has no exchanges between processes.")
        if min(self.batch_size, len(images)) < 2 * group.size:
            raise ValueError(
                f"distributed=True with {group.size} processes needs {2 * group.size} images in a batch at least, two "
                f"for each, got batch_size={self.batch_size} and {len(images)} images."
            )
        return {
            **describe_training(self.get_params(deep=False), images.shape, device),
            "images": f"{len(images)} of shape {images.shape}, {images.dtype}",
            "first images": describe(images.head(2).numpy()),
            "gather_negatives": self.gather_negatives,
            "callbacks": describe_callbacks(self.callbacks),
            "fitted before": go_on,
        }

    def _open_checkpoints(
        self,
        folder: str | os.PathLike[str] | None,
        images: Images | LoadedImages,
        device: torch.device,
        seed: int,
        group: Group,
    ) -> AbstractContextManager[Checkpoints | None]:
        """Open the directory of checkpoints for the training that parameters, images and seed make."""
        if folder is None:
            return nullcontext()
        assert isinstance(images, Images)  # others are refused with a folder
        identity = describe_training(self.get_params(deep=False), images.shape, device)
        if self.lr_schedule == "constant":
            # More epochs then go on from the end of fewer.
            del identity["max_epochs"]
        identity |= {
            _SEED: seed,
            "images": describe_images(images) if group.rank == 0 else None,
            "version": __version__,
        }
        if group.size > 1:
            identity |= {"processes": group.size, "gather_negatives": self.gather_negatives}
        adopted = [_SEED] if self.random_state is None else []
        return Checkpoints(folder, identity, adopted, group)

    @contextmanager
    def _advised_on_memory(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                f"Out of memory on {device} in training: lower batch_size (now {self.batch_size}), then mi_units (now "
                f"{self.mi_units}). {error}"
            ) from error

    def _take_over_model(self) -> None:
        """Take the model that a callback may have put in the place of the one that was trained."""
        net = self.net_
        if isinstance(net.module_, AveragedModel):
            net.module_ = net.module_.module
        if net.module_.encoder is not self.encoder_:
            # The optimizers hold the weights of the one before: training that goes on has to begin with new ones.
            self.encoder_, self.discriminators_, self._built_for = net.module_.encoder, net.module_.discriminators, ()

    def _check_embeddings(self, images: Images | LoadedImages) -> None:
        """Catch a last step that went wrong, which no loss saw any more, and embeddings that depend on their batch."""
        few = Standardizer(self.mean_, self.std_, self.device_)(images.head(8))
        with torch.no_grad():
            embedding, _ = self.encoder_(few)
            again = embedding[:2] if isinstance(self.encoder, str) else self.encoder_(few[:2])[0]
        if not embedding.isfinite().all():
            raise FloatingPointError(
                f"The embeddings are not finite after the last step: training diverged. Lower lr (now {self.lr}) or "
                "use precision='float32'."
            )
        if (again - embedding[:2]).abs().max() > OTHER_BATCH * embedding.abs().max():
            warn(
                "An image has another embedding in another batch, or each time: the encoder draws at random in "
                "evaluation mode, or its norms take their statistics from the batch (track_running_stats=False)."
            )

    def _start(self, images: Images | LoadedImages, seed: int) -> None:
        """Set what a fit sets and going on keeps, but for the statistics of the channels."""
        self._build_encoder(images.shape, seed)
        self._check_output_layer()
        self._encoder_spec = self.encoder
        self._encoder_options = self._get_encoder_options()
        self.image_shape_ = images.shape
        self._trained_on_uint8 = images.dtype == np.uint8
        self.history_ = []

    def _build_encoder(self, image_shape: ImageShape, seed: int) -> None:
        # With which it is built again in another process: an encoder of the user's may draw more than its weights.
        self._encoder_seed = seed
        with private_rng(seed, torch.device("cpu")):
            self.encoder_, self._layer_shapes = make_encoder(
                self.encoder, image_shape, self.n_components, **self._get_encoder_options()
            )

    def _check_coordinates(self) -> None:
        _, height, width = self._layer_shapes["local"]
        if self.coordinate_weight and height * width < 2:
            raise ValueError(
                f"coordinate_weight={self.coordinate_weight} needs local features at two locations at least, but those "
                f"of {type(self.encoder_).__name__} for images of shape {self.image_shape_} are {height} x {width}."
            )

    def _make_net(
        self,
        weights: dict[str, float],
        negatives: dict[str, tuple[str, ...]],
        augmentation: Augmentation | None,
        device: torch.device,
        seed: int,
        group: Group,
        *,
        keep: bool,
    ) -> None:
        """Build discriminators, optimizers and net around the encoder; `keep` those there are, if they still serve."""
        critics = (self.discriminator, self.mi_units, self.mi_estimator, negatives, self.local_samples)
        prior = (self.prior, self.prior_matching, self.prior_weight if self.prior_matching == "noise" else None)
        terms = [name for name, weight in weights.items() if weight]
        training = (augmentation, self.occlusion, self.precision, self.compile, device, group.size)
        built_for = (terms, critics, prior, training)
        if keep and hasattr(self, "net_") and built_for == self._built_for and device == self.device_:
            return
        if keep:
            warn(
                "Training goes on from the encoder's weights, but with new discriminators and a new optimizer, because "
                "this estimator was loaded, copied or moved, or its parameters were changed, since it was trained."
            )
        model = self._build_model(weights, negatives, device, seed)
        generator = own_generator = torch.Generator(device).manual_seed(seed)
        if group.size > 1:
            own_seed = np.random.SeedSequence((seed, group.rank)).generate_state(1)
            own_generator = torch.Generator(device).manual_seed(int(own_seed[0]))
        self.net_ = DIMNet(
            model,
            autocast_dtype=resolve_precision(self.precision, device, self.image_shape_),
            generator=generator,
            own_generator=own_generator,
            augmentation=augmentation,
            # What users bring may wait for the device or look at what is on it.
            recordable=device.type == "cuda" and group.size == 1 and self._is_built_in(augmentation),
        ).initialize()
        self.discriminators_ = model.discriminators
        self.device_ = device
        self._built_for = built_for

    def _is_built_in(self, augmentation: Augmentation | None) -> bool:
        """Tell whether nothing of the user's runs in a step."""
        return isinstance(self.encoder, str) and type(augmentation) in (StandardAugmentation, type(None))

    def _build_model(
        self, weights: dict[str, float], negatives: dict[str, tuple[str, ...]], device: torch.device, seed: int
    ) -> InfoMaxModel:
        occlusion = None
        with private_rng(seed, torch.device("cpu")):
            if self.occlusion:
                occlusion = Occlusion(*receptive_fields(self.encoder_.cpu(), self.image_shape_), device)
            model = build_model(
                self.encoder_,
                self._layer_shapes["local"],
                self.n_components,
                weights=weights,
                discriminator=self.discriminator,
                mi_units=self.mi_units,
                mi_estimator=self.mi_estimator,
                negatives=negatives,
                prior=self.prior,
                prior_matching=self.prior_matching,
                occlusion=occlusion,
                local_samples=self.local_samples,
            )
        place(model, device)
        if self.compile:
            model.compile()
        return model

    def _check_same_encoder(self) -> None:
        width = self._layer_shapes["embedding"][0]
        if self.n_components != width or (
            self.encoder is not self._encoder_spec and self.encoder != self._encoder_spec
        ):
            raise ValueError(
                f"Training cannot go on: the fitted encoder is {self._encoder_spec!r} with n_components={width}, but "
                f"the parameters now are encoder={self.encoder!r} and n_components={self.n_components}."
            )
        if self.image_shape is not None and check_image_shape(self.image_shape) != self.image_shape_:
            raise ValueError(
                f"Training cannot go on: the fitted encoder takes images of shape {self.image_shape_}, but now "
                f"image_shape={self.image_shape!r}."
            )
        if self._get_encoder_options() != self._encoder_options:
            raise ValueError(
                "Training cannot go on: multiple_globals, prior, prior_weight or prior_matching were changed since the "
                "encoder was fitted, and call for another network."
            )

    def _get_encoder_options(self) -> dict[str, bool]:
        """Name what the network depends on beside the encoder and its width."""
        is_normal_by_noise = bool(self.prior_weight) and self.prior == "normal" and self.prior_matching == "noise"
        return {"multiple_globals": bool(self.multiple_globals), "standardized": is_normal_by_noise}

    def _check_images(self, X: Any, *, reset: bool, min_samples: int = 1) -> Images | LoadedImages:
        shape = self.image_shape if reset else self.image_shape_
        if shape is not None:
            shape = check_image_shape(shape)
        check: Callable[..., Images | LoadedImages] = check_loader if isinstance(X, DataLoader) else check_images
        return check(self, X, image_shape=shape, data_format=self.data_format, reset=reset, min_samples=min_samples)

    def _check_out(self, out: Any, images: Images | LoadedImages) -> None:
        shape = (images.n_images, self._n_features_out)
        if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != np.float32:
            found = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise ValueError(f"out must be a float32 NumPy array of shape {shape}, got {found}.")
        if not out.flags.writeable or min(out.strides) < 0 or any(stride % out.itemsize for stride in out.strides):
            raise ValueError(
                "out must be an array that can be written to, with strides that are multiples of 4 and not negative."
            )
        if isinstance(images, Images) and images.shares_memory(out):
            raise ValueError("out must not overlap X in memory: X would change while it is read.")

    def _check_output_layer(self) -> None:
        if self.output_layer not in self._output_shapes:
            raise ValueError(
                f"output_layer={self.output_layer!r} is not a layer of the encoder {type(self.encoder_).__name__}, "
                f"which has {sorted(self._output_shapes)}."
            )

    def _warn_of_other_scale(self, images: Images | LoadedImages) -> None:
        """Catch images in another unit than those of `fit`, as 0 to 255 where they were 0 to 1."""
        if images.dtype == np.uint8 and self._trained_on_uint8:
            return
        # A few of them tell the unit of all.
        few = images.some(min(16, max(1, CHUNK_BYTES // (8 * prod(images.shape))))).double()
        if images.dtype == np.uint8:
            few /= 255
        spread, mean = (values.numpy() for values in torch.std_mean(few, dim=(0, 2, 3), correction=0))
        # Of a blank channel no spread can be told, and one that was blank is left out.
        was_blank = np.isinf(self.std_)
        is_blank = (spread <= SMALLEST_SPREAD) | was_blank
        ratios = spread[~is_blank] / self.std_[~is_blank]
        if ratios.size and (ratios.min() > OTHER_SCALE or ratios.max() < 1 / OTHER_SCALE):
            than = f"{ratios.min():.3g} times more" if ratios.min() > 1 else f"{1 / ratios.max():.3g} times less"
            warn(
                f"The values of X spread {than} than those of the images that {type(self).__name__} was fitted on, as "
                "if they were of another range. uint8 images are scaled by 1/255, all others are taken as they are."
            )
            return
        shifts = abs(mean - self.mean_)[~was_blank] / self.std_[~was_blank]
        if shifts.size and shifts.min() > OTHER_LEVEL:
            warn(
                f"The values of X lie {shifts.min():.3g} standard deviations away from those of the images that "
                f"{type(self).__name__} was fitted on, as if they were in another unit, or the images blank or "
                "saturated."
            )

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        try:
            with unchanged_on_error(self):
                yield
        except BaseException:
            if hasattr(self, "encoder_"):
                self.encoder_.to(self.device_).eval()
            raise

    @property
    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self._layer_shapes.items() if name != "local"}

    @property
    def _n_features_out(self) -> int:
        if self.output_layer not in self._output_shapes:
            # Not a ValueError, which would break the HTML representation.
            raise AttributeError(f"there is no layer {self.output_layer!r}")
        return prod(self._output_shapes[self.output_layer])

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key not in _TRAINING_STATE}
        if "encoder_" in state:
            state["encoder_"] = to_arrays(state["encoder_"])
            state["device_"] = str(state["device_"])
        # As they were given: after training some hold the optimizer.
        try:
            state["callbacks"] = clone(self.callbacks, safe=False)
        except (AttributeError, RuntimeError, TypeError) as error:
            warn(f"A copy or pickle of this {type(self).__name__} is without callbacks, which can't be cloned: {error}")
            state["callbacks"] = None
        if isinstance(self.encoder, nn.Module):
            # A user's instance is a parameter and pickled as one; on the CPU it loads anywhere.
            on_cpu = copy.deepcopy(self.encoder).cpu()
            state.update({key: on_cpu for key in ("encoder", "_encoder_spec") if state.get(key) is self.encoder})
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "encoder_" in state:
            self.device_ = available_device(state["device_"])
            width = self._layer_shapes["embedding"][0]
            with usual_torch(self.device_):
                weights = to_tensors(state["encoder_"])
                encoder = restore_encoder(
                    self._encoder_spec, self.image_shape_, width, self._encoder_options, self._encoder_seed, weights
                )
                self.encoder_ = place(encoder, self.device_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
