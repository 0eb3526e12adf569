"""Small networks on top of features, and their training by skorch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skorch import NeuralNet
from skorch.callbacks import EarlyStopping
from skorch.helper import predefined_split
from torch import Tensor, nn

from skdim.devices import usual_torch
from skdim.monitoring import StopTraining
from skdim.persistence import to_arrays, to_tensors

__all__ = ["MLP", "Samples", "check_hidden_layer_sizes", "predict_proba", "train"]

# An epoch of few samples would be a step or two: it has this many batches, unless they had less than so many samples.
MIN_BATCHES = 10
MIN_BATCH_SIZE = 16

# Fewer steps than these say little of whether a loss still falls.
MIN_STEPS_OF_PATIENCE = 50

# What an attribute `history_` has of skorch's record of an epoch.
RECORDED = ("train_loss", "valid_loss", "valid_acc", "dur")


def check_hidden_layer_sizes(hidden_layer_sizes: Sequence[int] | NDArray[Any]) -> tuple[int, ...]:
    """Check the parameter `hidden_layer_sizes`: positive integers, none of them for a linear model.

    Parameters
    ----------
    hidden_layer_sizes : array-like
        Units of each hidden layer.

    Returns
    -------
    tuple of int
        The same.

    Raises
    ------
    ValueError
        If there is anything else.
    """
    sizes = tuple(hidden_layer_sizes)
    # True is an integer, but not to torch.
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be positive integers, got {hidden_layer_sizes!r}.")
    return sizes


class MLP(nn.Sequential):
    """Perceptron with batch norm, ReLU and dropout after each hidden layer. Its pickle holds nothing of torch.

    Parameters
    ----------
    n_features : int
        Width of the input.
    hidden_layer_sizes : tuple of int
        Units of each hidden layer.
    n_classes : int
        Width of the output, which are logits.
    dropout : float
        Share of the hidden units that is dropped.
    batch_norm_logits : bool
        Whether batch norm also follows the last layer.
    """

    def __init__(
        self,
        n_features: int,
        hidden_layer_sizes: tuple[int, ...],
        n_classes: int,
        dropout: float,
        batch_norm_logits: bool,
    ) -> None:
        self._arguments = (n_features, hidden_layer_sizes, n_classes, dropout, batch_norm_logits)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([n_features, *hidden_layer_sizes]):
            layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(), nn.Dropout(dropout)]
        layers.append(nn.Linear([n_features, *hidden_layer_sizes][-1], n_classes))
        if batch_norm_logits:
            layers.append(nn.BatchNorm1d(n_classes))
        super().__init__(*layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_mlp, (self._arguments, to_arrays(self))


def _load_mlp(arguments: tuple[Any, ...], arrays: dict[str, NDArray[Any]]) -> nn.Module:
    with usual_torch(torch.device("cpu")):
        # For weights that are replaced nothing is drawn.
        with torch.device("meta"):
            mlp = MLP(*arguments)
        mlp.load_state_dict(to_tensors(arrays), assign=True)
    return mlp.eval()


def predict_proba(mlp: nn.Module, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the probabilities of the classes, on the perceptron's device and in its precision."""
    weight = next(mlp.parameters())
    with usual_torch(weight.device), torch.inference_mode():
        logits = [mlp(torch.from_numpy(rows).to(weight)) for rows in np.array_split(X, -(-len(X) // 4096))]
    return torch.softmax(torch.cat(logits).double(), dim=1).cpu().numpy()


class Samples(torch.utils.data.Dataset[Any]):
    """Inputs and targets that are read a batch at a time.

    Parameters
    ----------
    read : callable
        ``read(rows)`` returns the inputs of some rows.
    rows : ndarray of shape (n,)
        Which of them there are.
    targets : Tensor
        Targets of all rows, also of those that are not in `rows`.
    """

    def __init__(self, read: Callable[[Any], Tensor], rows: NDArray[np.int64], targets: Tensor) -> None:
        self.read, self.rows, self.targets = read, rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        rows = self.rows[index]
        return self.read(rows), self.targets[rows]


class _Batches:
    """Batches of `Samples` that differ in size by at most one, so that batch norm never meets a single sample."""

    def __init__(self, samples: Samples, batch_size: int, generator: np.random.RandomState | None = None) -> None:
        self.samples, self.generator = samples, generator
        n_samples = len(samples)
        n_batches = max(-(-n_samples // batch_size), min(MIN_BATCHES, n_samples // MIN_BATCH_SIZE))
        self.n_batches = max(1, min(n_batches, n_samples // 2))

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.samples)
        order = np.arange(n) if self.generator is None else self.generator.permutation(n)
        for index in np.array_split(order, self.n_batches):
            yield self.samples[index]


class _EarlyStopping(EarlyStopping):
    """Ends training without the KeyboardInterrupt that skorch can't tell from the user's."""

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        try:
            super().on_epoch_end(net, **kwargs)
        except KeyboardInterrupt:
            raise StopTraining from None


def train(
    net_class: type[NeuralNet],
    module: nn.Module,
    training: Samples,
    validation: Samples,
    *,
    lr: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    device: torch.device,
    random_state: np.random.RandomState,
    **net_params: Any,
) -> list[dict[str, float]]:
    """Train a module by Adam until its loss on the validation samples has stopped falling; keep its best weights.

    Parameters
    ----------
    net_class : type
        A `skorch.NeuralNet`.
    module : nn.Module
        Trained in place and left in evaluation mode.
    training, validation : Samples
        Two or more, and one or more.
    lr : float
        Learning rate.
    batch_size : int
        Most samples in a batch; fewer samples than MIN_BATCHES such batches have smaller ones.
    max_epochs : int
        Most epochs.
    patience : int
        Epochs after which training stops if none has lowered the validation loss by a ten-thousandth of it; more where
        these have less than MIN_STEPS_OF_PATIENCE batches.
    device : torch.device
        Where to train.
    random_state : RandomState
        Draws the batches.
    **net_params
        Of the net.

    Returns
    -------
    list of dict
        Of skorch's record of each epoch its losses, its accuracy, where there is one, and the seconds it took.

    Raises
    ------
    FloatingPointError
        If the loss on the validation samples never was finite.
    """
    n_batches = len(_Batches(training, batch_size))
    net = net_class(
        module.to(device),
        optimizer=torch.optim.Adam,
        lr=lr,
        batch_size=batch_size,
        max_epochs=max_epochs,
        iterator_train=_Batches,
        iterator_train__generator=random_state,
        iterator_valid=_Batches,
        train_split=predefined_split(validation),
        callbacks=[_EarlyStopping(patience=max(patience, -(-MIN_STEPS_OF_PATIENCE // n_batches)), load_best=True)],
        verbose=0,
        device=device,
        **net_params,
    ).initialize()
    # Not skorch's fit, which swallows a KeyboardInterrupt and leaves a half-trained net that looks fitted.
    net.notify("on_train_begin", X=training, y=None)
    with suppress(StopTraining):
        net.fit_loop(training)
    net.notify("on_train_end", X=training, y=None)
    module.eval()
    if not np.isfinite(net.history[:, "valid_loss"]).any():
        raise FloatingPointError(f"The validation loss never was finite: training diverged. Lower lr (now {lr}).")
    return [{key: float(epoch[key]) for key in RECORDED if key in epoch} for epoch in net.history]
