"""What training shows and whom it asks: a progress bar, a log, and the callbacks of scikit-learn."""

import logging
import sys
from contextlib import suppress
from typing import Any, Self

from skorch.callbacks import Callback

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9 has no callbacks

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's; an estimator without `set_callbacks` supports none."""


__all__ = ["CallbackSupportMixin", "FitTask", "Progress", "StopTraining", "training_attributes"]

logger = logging.getLogger("skdim")

# What the bar and the log show of an epoch's record.
SHOWN = {"train_loss": "loss"} | {name: name for name in ("local", "global", "coordinate", "prior")}


class StopTraining(Exception):
    """A callback has asked to end training; what is trained so far stands."""


def training_attributes(history: list[dict[str, float]]) -> dict[str, Any]:
    """Make the fitted attributes that say how training went, of one record an epoch."""
    return {"history_": history, "n_iter_": len(history), "loss_curve_": [epoch["loss"] for epoch in history]}


class Progress(Callback):
    """One bar over all epochs of a training, and one line an epoch in the log "skdim" at level INFO.

    The bar is drawn on a terminal or in a notebook; a pipe or file gets the lines of the log in its place. It counts
    the images of the steps that were given to the device and shows the losses of the last epoch, so that no step waits
    for the device.

    Parameters
    ----------
    n_epochs : int
        Epochs of this training.
    n_images : int
        Images of an epoch.
    verbose : int
        With 0 there is neither bar nor line but in the log.
    is_silent : bool, default=False
        Whether there is neither bar nor line, as another process has them.
    """

    def __init__(self, n_epochs: int, n_images: int, verbose: int, is_silent: bool = False) -> None:
        self.n_epochs = n_epochs
        self.n_images = n_images
        self.verbose = verbose
        self.is_silent = is_silent
        self.epoch = 0
        self.bar: Any = None

    def __enter__(self) -> Self:
        # A notebook's stderr is no terminal; there tqdm draws a widget or, without ipywidgets, text.
        if (
            self.verbose
            and not self.is_silent
            and self.n_epochs
            and sys.stderr is not None
            and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        ):
            # Not at the top: tqdm warns on import in a notebook without ipywidgets.
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=self.n_epochs * self.n_images,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}",
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_train_begin(self, net: Any, **_: Any) -> None:
        self.first_epoch = len(net.history)

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        is_first = self.epoch == 0
        self.epoch = len(net.history) - self.first_epoch
        if self.bar is not None:
            if is_first:
                # A training that goes on from a checkpoint does not begin with the first epoch.
                self.bar.initial = self.bar.n = (self.epoch - 1) * self.n_images
            self.bar.set_description(f"Epoch {self.epoch}/{self.n_epochs}")

    def step(self, n_images: int) -> None:
        """Count the images of one step."""
        if self.bar is not None:
            self.bar.update(n_images)

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        record = net.history[-1]
        losses = {shown: f"{record[name]:.3g}" for name, shown in SHOWN.items() if name in record}
        if self.bar is not None:
            self.bar.set_postfix(losses)
        if self.is_silent:
            return
        shown = ", ".join(f"{name} {value}" for name, value in losses.items())
        line = f"Epoch {self.epoch}/{self.n_epochs}: {shown}, {record['images_per_second']:.0f} images/s"
        logger.info("%s", line)
        if self.verbose and self.bar is None and sys.stderr is not None:
            # A terminal that was closed shall not end a training.
            with suppress(OSError):
                print(line, file=sys.stderr, flush=True)


class FitTask(Callback):
    """Tells scikit-learn's callbacks of a fit and, as its subtasks, of the epochs; each of them may stop training.

    A callback that asks for the `fitted_estimator` gets a copy that transforms as if the fit had ended there. With
    scikit-learn < 1.9 nobody is told.

    Parameters
    ----------
    estimator : DIMTransformer
        What is fitted.
    X, y
        As they came into `fit`.
    max_epochs : int
        Most epochs.
    """

    def __init__(self, estimator: Any, X: Any, y: Any, max_epochs: int) -> None:
        self.estimator = estimator
        self.X = X
        self.y = y
        self.max_epochs = max_epochs
        self.epoch: Any = None

    def __enter__(self) -> Self:
        self.context = None
        if hasattr(self.estimator, "set_callbacks"):
            self.context = self.estimator._init_callback_context(max_subtasks=self.max_epochs)
            self.context.call_on_fit_task_begin(estimator=self.estimator, X=self.X, y=self.y)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and self.context is not None:
            self.context.call_on_fit_task_end(
                estimator=self.estimator, X=self.X, y=self.y, reconstruction_attributes={}
            )
        # The net keeps its callbacks, and must not keep the images with them.
        self.estimator = self.X = self.y = None

    def on_train_begin(self, net: Any, **_: Any) -> None:
        self.first_epoch = len(net.history)

    def on_epoch_begin(self, net: Any, **_: Any) -> None:
        if self.context is not None:
            self.epoch = self.context.subcontext(task_name="epoch")
            self.epoch.call_on_fit_task_begin(estimator=self.estimator, X=self.X, y=self.y)

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        if self._end_epoch(net):
            raise StopTraining

    def on_train_end(self, net: Any, **_: Any) -> None:
        # Where a callback has stopped training at a batch, the last epoch is still open.
        self._end_epoch(net)

    def _end_epoch(self, net: Any) -> bool:
        if self.epoch is None:
            return False
        epoch, self.epoch = self.epoch, None
        return epoch.call_on_fit_task_end(
            estimator=self.estimator,
            X=self.X,
            y=self.y,
            # Called by callbacks that want the estimator as it is.
            reconstruction_attributes=lambda: training_attributes(
                self.estimator.history_ + net.records(self.first_epoch)
            ),
        )
