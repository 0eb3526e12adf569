"""The skorch net that trains the model: one loop, without a data loader or a device-host sync per batch."""

import copy
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, EarlyStopping, LRScheduler
from torch import Tensor

from skdim.batches import Batches
from skdim.model import InfoMaxModel
from skdim.views import Augmentation

__all__ = ["DIMNet", "private_rng"]

# At the encoder's own learning rate the prior discriminator wins outright: its gradients then distort the embedding
# instead of spreading it. At a tenth of it the two stay in balance (both losses near chance, sigmoid(y) uniform).
PRIOR_LR_RATIO = 0.1

# What an epoch's record has beside its loss.
RECORDED = (
    *("local", "global", "prior", "coordinate", "prior_discriminator", "local_bound", "global_bound"),
    *("seconds", "images_per_second"),
)

# Reentrant, because a user's module may load or copy an estimator when it is built.
_rng_lock = threading.RLock()


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a block and leave them as they were.

    Module initialisation and dropout know no other generator. The lock keeps threads from seeing each other's seed.
    """
    cuda = [device] if device.type == "cuda" else []
    with _rng_lock, torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed, which seeds every device, also those that are not forked here.
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            torch.cuda.default_generators[each.index].manual_seed(seed)
        yield


class StopTraining(Exception):
    """A callback has asked to end training; what is trained so far stands."""


class WeightedSum(torch.nn.Module):
    """The criterion: the weighted sum of the named loss terms.

    Attributes
    ----------
    weights : dict of str to float
        Weight of each term.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}

    def forward(self, terms: dict[str, Tensor]) -> Tensor:
        return sum((self.weights[name] * term for name, term in terms.items()), torch.zeros(()))


class DIMNet(NeuralNet):
    """Trains an `InfoMaxModel` on `Batches`.

    Encoder, critics and coordinate predictor share one Adam and the weighted loss; the prior discriminator has its own
    Adam and its own loss, and is updated first in each step. skorch's epoch hooks work as ever; batch hooks and history
    entries for batches, each of which makes the device wait for the host, are there only for callbacks that act on
    batches.

    Parameters
    ----------
    module : InfoMaxModel
        The model, on the training device.
    autocast_dtype : torch.dtype or None
        Precision of the forward pass; None is float32.
    generator : torch.Generator
        Draws all that is drawn while training; on the training device.
    augmentation : callable or None
        ``augmentation(images, generator)`` returns a random view of standardised images. With it each batch is seen in
        two views.
    **kwargs
        Of `skorch.NeuralNet`.
    """

    def __init__(
        self,
        module: InfoMaxModel,
        *,
        autocast_dtype: torch.dtype | None,
        generator: torch.Generator,
        augmentation: Augmentation | None,
        **kwargs: Any,
    ) -> None:
        self.autocast_dtype = autocast_dtype
        self.generator = generator
        self.augmentation = augmentation
        super().__init__(
            module,
            criterion=WeightedSum,
            optimizer=torch.optim.Adam,
            train_split=None,
            verbose=0,
            device=None,
            **kwargs,
        )

    @property
    def _default_callbacks(self) -> list[Any]:
        return []

    def initialize_optimizer(self, triggered_directly: bool | None = None) -> "DIMNet":
        """Give encoder and critics one optimizer, and the prior discriminator another."""
        model = self.module_
        adversary = set() if model.prior is None else set(model.prior.parameters())
        shared = [parameter for parameter in model.parameters() if parameter not in adversary]
        self.optimizer_ = self.optimizer(shared, fused=True)
        if model.prior is not None:
            self.prior_optimizer_ = self.optimizer(model.prior.parameters(), fused=True)
        return self

    def train(
        self, batches: Batches, epochs: int, lr: float, lr_schedule: str, callbacks: Sequence[Callback] | None
    ) -> list[dict[str, float]]:
        """Train on some epochs more, from where the net stands.

        Parameters
        ----------
        batches : Batches
            The images.
        epochs : int
            How often each image is seen, unless a callback stops training.
        lr : float
            Learning rate of encoder and critics; the prior discriminator's is a tenth of it.
        lr_schedule : {"one_cycle", "constant"}
            "one_cycle" warms up to `lr` and anneals to nearly 0 over these epochs.
        callbacks : sequence of skorch.callbacks.Callback or None
            The user's.

        Returns
        -------
        list of dict
            One an epoch: the loss, each of its terms, seconds and images a second.

        Raises
        ------
        FloatingPointError
            If a loss term is not finite at the end of an epoch.
        """
        self.lr = lr
        n_steps = epochs * len(batches)
        self._schedulers = [_scheduler(self.optimizer_, lr_schedule, lr, n_steps)]
        if self.module_.prior is not None:
            self._schedulers.append(_scheduler(self.prior_optimizer_, lr_schedule, lr * PRIOR_LR_RATIO, n_steps))
        self.callbacks = None if callbacks is None else list(callbacks)
        self.initialize_callbacks()
        first = len(self.history)
        # Not skorch's partial_fit, which swallows a KeyboardInterrupt and leaves a half-trained net that looks fitted.
        self.notify("on_train_begin", X=batches, y=None)
        with suppress(StopTraining):
            self.fit_loop(batches, epochs=epochs)
        self.notify("on_train_end", X=batches, y=None)
        self.module_.zero_grad(set_to_none=True)
        return [
            {"loss": epoch["train_loss"]} | {name: epoch[name] for name in epoch if name in RECORDED}
            for epoch in self.history[first:]
        ]

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Notify callbacks; one of skorch's that raises KeyboardInterrupt, as EarlyStopping does, ends training."""
        try:
            super().notify(method_name, **cb_kwargs)
        except KeyboardInterrupt as interrupt:
            if not _raised_by_skorch(interrupt):
                raise
            raise StopTraining from None

    @contextmanager
    def rolled_back_on_error(self) -> Iterator[None]:
        """Give the net back as it was, weights, optimizers, generator and history, if the block fails."""
        optimizers = [getattr(self, name + "_") for name in self._optimizers]
        parts = [self.module_, *optimizers]
        states = copy.deepcopy([part.state_dict() for part in parts])
        generator_state, n_epochs = self.generator.get_state(), len(self.history)
        try:
            yield
        except BaseException:
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
            self.generator.set_state(generator_state)
            del self.history[n_epochs:]
            raise

    def draw_seed(self) -> int:
        """Draw a seed from the net's generator."""
        device = self.generator.device
        return int(torch.randint(2**31 - 1, (), generator=self.generator, device=device))

    def get_dataset(self, X: Batches, y: None = None) -> Batches:
        """Return the batches as they are: they already live on the device."""
        return X

    def get_iterator(self, dataset: Batches, training: bool = False) -> Batches:
        """Return the batches as they are: they iterate themselves."""
        return dataset

    def run_single_epoch(self, iterator: Batches | None, training: bool, prefix: str, step_fn: Any, **_: Any) -> None:
        """Run one epoch and record the mean of each loss term, with one sync at its end."""
        if iterator is None:
            return
        self._set_training(True)
        watch_batches = any(_acts_on_batches(callback) for _, callback in self.callbacks_)
        start = time.perf_counter()
        total: Tensor | None = None
        n_images = 0
        for batch in iterator:
            if watch_batches:
                self.notify("on_batch_begin", batch=batch, training=True)
            terms = step_fn(batch)
            names = list(terms)
            values = torch.stack(list(terms.values())) * len(batch)
            total = values if total is None else total + values
            n_images += len(batch)
            if watch_batches:
                self.history.record_batch("train_loss", terms["train_loss"].item())
                self.history.record_batch("train_batch_size", len(batch))
                self.notify("on_batch_end", batch=batch, training=True, loss=terms["train_loss"], y_pred=None)
        assert total is not None
        means = dict(zip(names, (total / n_images).tolist(), strict=True))
        seconds = time.perf_counter() - start
        if not watch_batches:
            # skorch's callbacks for epochs expect an epoch to have a batch: this one stands for all of them.
            self.history.new_batch()
            self.history.record_batch("train_loss", means["train_loss"])
            self.history.record_batch("train_batch_size", n_images)
        for name, value in {**means, "seconds": seconds, "images_per_second": n_images / seconds}.items():
            self.history.record(name, value)
        self._check_finite(means)

    def _check_finite(self, means: dict[str, float]) -> None:
        # The terms say more than their sum, which comes first.
        bad = [name for name, value in reversed(means.items()) if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"The loss term {bad[0]!r} is {means[bad[0]]} in epoch {len(self.history)}: training diverged. "
                f"Lower lr (now {self.lr}) or use precision='float32'."
            )

    def train_step(self, batch: Tensor, **_: Any) -> dict[str, Tensor]:
        """Update the prior discriminator, then encoder and critics, on one batch; return the loss terms, detached."""
        model = self.module_
        augment = self.augmentation
        views = [batch] if augment is None else [augment(batch, self.generator) for _ in range(2)]
        with torch.autocast(batch.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            terms, report, embedding = model(views, self.generator)
        if model.prior is not None:
            # The prior's small networks stay in float32: their losses differ by less than bfloat16 resolves.
            report["prior_discriminator"] = self._step_prior_discriminator(embedding)
            terms["prior"] = model.prior_loss(embedding)
        loss = self.criterion_(terms)
        self.optimizer_.zero_grad(set_to_none=True)
        loss.backward()
        if any(_overrides(callback, "on_grad_computed") for _, callback in self.callbacks_):
            self.notify("on_grad_computed", named_parameters=list(model.named_parameters()), batch=batch, training=True)
        self.optimizer_.step()
        for scheduler in self._schedulers:
            scheduler.step()
        return {name: value.detach() for name, value in {"train_loss": loss, **terms, **report}.items()}

    def _step_prior_discriminator(self, embedding: Tensor) -> Tensor:
        # Also drops the gradients that the encoder's loss left on the discriminator in the step before.
        self.prior_optimizer_.zero_grad(set_to_none=True)
        loss = self.module_.prior_discriminator_loss(embedding, self.generator)
        loss.backward()
        self.prior_optimizer_.step()
        return loss


def _overrides(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook)


def _acts_on_batches(callback: Callback) -> bool:
    if isinstance(callback, LRScheduler):
        return callback.step_every == "batch"
    return _overrides(callback, "on_batch_begin") or _overrides(callback, "on_batch_end")


def _raised_by_skorch(error: BaseException) -> bool:
    """Tell a callback that ends training from a user who interrupts it."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "") == EarlyStopping.__module__


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, lr: float, n_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group.pop("initial_lr", None)
    if schedule == "constant" or n_steps == 0:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=n_steps + 1, cycle_momentum=False)
