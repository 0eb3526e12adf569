"""The skorch net that trains the model: one loop, without a data loader or a device-host sync per batch."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import chain
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, EarlyStopping
from torch import Tensor

from skdim.batches import Batches
from skdim.callbacks import acts_on_batches, acts_on_gradients, callback_state, is_early_stopping, load_callback
from skdim.checkpoints import Checkpoints
from skdim.distributed import ALONE, Group
from skdim.model import InfoMaxModel
from skdim.monitoring import StopTraining
from skdim.nested import is_storable
from skdim.norms import shared_norms
from skdim.notices import warn
from skdim.randomness import lent_rng
from skdim.recording import RecordedStep, has_hooks, held_fast
from skdim.views import Augmentation

__all__ = ["DIMNet"]

# What an epoch's record has beside its loss.
RECORDED = (
    *("local", "global", "prior", "coordinate", "prior_discriminator", "local_bound", "global_bound"),
    *("seconds", "images_per_second"),
)

# What a net is made of.
PARTS = ("module_", "optimizer_", "prior_optimizer_")

# Steps in a training that is worth recording a step of.
MIN_RECORDED_STEPS = 100

# Steps between two looks for a loss that is not finite, each of which makes the host wait for the device.
CHECK_EVERY = 200


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
        return reduce(torch.add, (self.weights[name] * term for name, term in terms.items()))


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
        Draws all that is drawn while training; on the training device. Processes that train together draw in step.
    own_generator : torch.Generator
        Draws the augmentation: the same one, or of several processes each has its own.
    augmentation : callable or None
        ``augmentation(images, generator)`` returns a random view of standardised images. With it each batch is seen in
        two views.
    recordable : bool, default=False
        Whether a step is such that a CUDA graph can hold it, on a CUDA device and in a single process.
    **kwargs
        Of `skorch.NeuralNet`.

    Attributes
    ----------
    group : Group
        The processes that train together.
    """

    group = ALONE
    _recorded_step: RecordedStep | None = None

    def __init__(
        self,
        module: InfoMaxModel,
        *,
        autocast_dtype: torch.dtype | None,
        generator: torch.Generator,
        own_generator: torch.Generator,
        augmentation: Augmentation | None,
        recordable: bool = False,
        **kwargs: Any,
    ) -> None:
        self.autocast_dtype = autocast_dtype
        self.generator = generator
        self.own_generator = own_generator
        self.augmentation = augmentation
        self.recordable = recordable
        super().__init__(
            module,
            criterion=WeightedSum,
            optimizer=torch.optim.Adam,
            train_split=None,
            verbose=0,
            device=None,
            use_caching=False,
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
        self,
        batches: Batches,
        epochs: int,
        lr: float,
        lr_schedule: str,
        callbacks: Sequence[Callback],
        on_step: Callable[[int], None],
        checkpoints: Checkpoints | None = None,
        global_generators: Sequence[torch.Generator] = (),
        group: Group = ALONE,
        gather_negatives: bool = True,
    ) -> list[dict[str, float]]:
        """Train on some epochs more, from where the net stands.

        Parameters
        ----------
        batches : Batches
            The images.
        epochs : int
            How often each image is seen, unless a callback stops training.
        lr : float
            Learning rate of encoder, critics and prior discriminator.
        lr_schedule : {"one_cycle", "constant"}
            "one_cycle" warms up to `lr` and anneals to nearly 0 over these epochs.
        callbacks : sequence of skorch.callbacks.Callback
            Notified in this order.
        on_step : callable
            Called with the number of images of each step, while the device may still be at work on it.
        checkpoints : Checkpoints or None, default=None
            Where each epoch's state is written. Training goes on from the state saved there.
        global_generators : sequence of torch.Generator, default=()
            Lent to each step in place of torch's global ones, for what knows no others, beside the net's own.
        group : Group, default=ALONE
            The processes that train together, all of which call this.
        gather_negatives : bool, default=True
            Whether the images of all of them are negatives of each other.

        Returns
        -------
        list of dict
            One an epoch: the loss, each of its terms, seconds and images a second.

        Raises
        ------
        FloatingPointError
            If a loss term is not finite.
        ValueError
            If the saved state is not one of this model.
        """
        self.lr = lr
        self._n_steps = n_steps = epochs * len(batches)
        self._schedulers = [_scheduler(each, lr_schedule, lr, n_steps) for each in self._every_optimizer()]
        self.callbacks = list(callbacks)
        self._lent = global_generators
        self.on_step = on_step
        self.initialize_callbacks()
        first = len(self.history)
        generators = [self.generator, *global_generators]
        if self.own_generator is not self.generator:
            generators.append(self.own_generator)
        saved = None if checkpoints is None else checkpoints.saved
        if saved is not None and len(saved["history"]) > epochs:
            n_epochs = len(saved["history"])
            raise ValueError(
                f"max_epochs={epochs}, but the checkpoint has {n_epochs} epochs of training: {n_epochs} at least are "
                "needed to go on from it."
            )
        with self._joined(group, gather_negatives):
            if saved is not None and (saved["end"] == "stopped" or (saved["end"] and len(saved["history"]) == epochs)):
                self._load_state(saved, generators)
            else:
                try:
                    self._run_epochs(batches, epochs, checkpoints, generators)
                finally:
                    # And with it the memory that it holds on the device.
                    self._recorded_step = None
                    self.module_.zero_grad(set_to_none=True)
        return self.records(first)

    @contextmanager
    def _joined(self, group: Group, gather_negatives: bool) -> Iterator[None]:
        """Train with other processes while the block runs, from the weights that the first of them has."""
        model = self.module_
        self.group = model.group = group
        model.contrasted = group if gather_negatives else ALONE
        try:
            group.broadcast_tensors((*model.parameters(), *model.buffers()))
            with shared_norms(group, model):
                yield
        finally:
            self.group = model.group = model.contrasted = ALONE

    def __getstate__(self) -> dict[str, Any]:
        # A recording is of this process and of these weights, and schedules are of one training: skorch's pickles take
        # modules and optimizers off the device, and nothing else.
        return super().__getstate__() | {"_recorded_step": None, "_schedulers": []}

    def _every_optimizer(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer_] if self.module_.prior is None else [self.optimizer_, self.prior_optimizer_]

    def _choose_step(self) -> None:
        """Record the step, or record it anew, or not at all: as callbacks and what they have changed want it."""
        if not self._is_recordable():
            self._recorded_step = None
        elif self._recorded_step is None or not self._recorded_step.is_valid:
            # The old recording first gives back the memory that it holds on the device.
            self._recorded_step = None
            self._recorded_step = RecordedStep(
                self.update, self._every_optimizer(), [self.generator], self._describe_step
            )

    def _is_recordable(self) -> bool:
        """Tell whether a recorded step pays, and would do all that the step does."""
        optimizers = self._every_optimizer()
        return (
            self.recordable
            and self._n_steps >= MIN_RECORDED_STEPS
            and not any(acts_on_batches(each) or acts_on_gradients(each) for _, each in self.callbacks_)
            # A callback may have put one of its own in place, of which nobody knows what a recording would hold.
            and all(type(each) is self.optimizer for each in optimizers)
            and not has_hooks(self.module_, optimizers)
        )

    def _describe_step(self) -> list[Any]:
        """List what a recording of the step holds fast."""
        parts = held_fast(self.module_, self._every_optimizer())
        return [parts, dict(self.criterion_.weights), self.augmentation, self.autocast_dtype]

    def records(self, first: int) -> list[dict[str, float]]:
        """Return loss, terms, seconds and images a second of the epochs from `first` on."""
        return [
            {"loss": epoch["train_loss"]} | {name: epoch[name] for name in epoch if name in RECORDED}
            for epoch in self.history[first:]
        ]

    def _run_epochs(
        self, batches: Batches, epochs: int, checkpoints: Checkpoints | None, generators: Sequence[torch.Generator]
    ) -> None:
        # Not skorch's partial_fit, which swallows a KeyboardInterrupt and leaves a half-trained net that looks fitted.
        self.notify("on_train_begin", X=batches, y=None)
        # Not before, because a callback may have loaded the history of another training.
        last = len(self.history) + epochs
        if checkpoints is not None and checkpoints.saved is not None:
            self._load_state(checkpoints.saved, generators)
        end = "stopped"
        with suppress(StopTraining):
            while len(self.history) < last:
                self.fit_loop(batches, epochs=1)
                if checkpoints is not None:
                    checkpoints.write(len(self.history), self._state(generators))
            end = "reached"
        if self.history and "train_loss" not in self.history[-1]:
            # One that a callback has broken off.
            del self.history[-1]
        with suppress(StopTraining):
            self.notify("on_train_end", X=batches, y=None)
        if checkpoints is not None:
            # Once more, because callbacks may have put other weights in place.
            checkpoints.write(len(self.history), self._state(generators, end))

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Notify all callbacks; one that raises StopTraining ends training, in all processes."""
        stops = False
        with self.group.together():
            getattr(self, method_name)(self, **cb_kwargs)
            for _, callback in self.callbacks_:
                try:
                    getattr(callback, method_name)(self, **cb_kwargs)
                except StopTraining:
                    stops = True
                except KeyboardInterrupt as error:
                    # skorch's own way to end training; from any other callback it is the user's to end everything.
                    if not (isinstance(callback, EarlyStopping) or is_early_stopping(error)):
                        raise
                    stops = True
        if any(self.group.share(stops)):
            raise StopTraining

    @contextmanager
    def rolled_back_on_error(self) -> Iterator[None]:
        """Give the net back as it was, weights, optimizers, generator and history, if the block fails."""
        # By their places: a callback may put others there, and more groups into an optimizer.
        parts = {name: getattr(self, name) for name in PARTS if hasattr(self, name)}
        groups = [list(optimizer.param_groups) for optimizer in self._every_optimizer()]
        states = copy.deepcopy([part.state_dict() for part in parts.values()])
        trainable = [parameter.requires_grad for parameter in self.module_.parameters()]
        generators = (self.generator, self.own_generator)
        generator_states, n_epochs = [generator.get_state() for generator in generators], len(self.history)
        try:
            yield
        except BaseException:
            for name, part in parts.items():
                setattr(self, name, part)
            for optimizer, those_before in zip(self._every_optimizer(), groups, strict=True):
                optimizer.param_groups[:] = those_before
            for part, state in zip(parts.values(), states, strict=True):
                part.load_state_dict(state)
            for parameter, is_trainable in zip(self.module_.parameters(), trainable, strict=True):
                parameter.requires_grad_(is_trainable)
            for generator, generator_state in zip(generators, generator_states, strict=True):
                generator.set_state(generator_state)
            del self.history[n_epochs:]
            raise

    def _state(self, generators: Sequence[torch.Generator], end: str | None = None) -> dict[str, Any]:
        """Collect all that the next epoch depends on, and the history; `end` says why there is no next one."""
        self._check_finite_weights()
        return {
            "end": end,
            "model": self.module_.state_dict(),
            "weights": dict(self.criterion_.weights),
            "frozen": [name for name, weight in self.module_.named_parameters() if not weight.requires_grad],
            "optimizers": [optimizer.state_dict() for optimizer in self._every_optimizer()],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            # Of all processes, one after another.
            "generators": [*chain(*self.group.share([generator.get_state() for generator in generators]))],
            "callbacks": {name: callback_state(callback) for name, callback in self.callbacks_},
            "history": self._storable_history(),
        }

    def _storable_history(self) -> list[dict[str, Any]]:
        # One batch stands for all, as everywhere where nobody watches them.
        epochs = [{**epoch, "batches": epoch["batches"][-1:]} for epoch in self.history.to_list()]
        left_out = {name for epoch in epochs for name, value in epoch.items() if not is_storable(value)}
        if left_out:
            warn(
                f"Checkpoints leave out what a callback has recorded as {', '.join(sorted(left_out))}: it is neither a "
                "number nor a text nor a tensor."
            )
        return [{name: value for name, value in epoch.items() if name not in left_out} for epoch in epochs]

    def _load_state(self, state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
        try:
            self.module_.load_state_dict(state["model"])
            self.criterion_.weights = state["weights"]
            for name, weight in self.module_.named_parameters():
                weight.requires_grad_(name not in state["frozen"])
            for optimizer, optimizer_state in zip(self._every_optimizer(), state["optimizers"], strict=True):
                _load_optimizer(optimizer, optimizer_state)
            for scheduler, scheduler_state in zip(self._schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(scheduler_state)
            first, last = (len(generators) * (self.group.rank + i) for i in (0, 1))
            for generator, generator_state in zip(generators, state["generators"][first:last], strict=True):
                generator.set_state(generator_state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"The checkpoint is of another model than the parameters give now: {error}") from error
        for name, callback in self.callbacks_:
            load_callback(callback, state["callbacks"].get(name, {}))
        self.history[:] = state["history"]

    def _check_finite_weights(self) -> None:
        """Keep a broken state from following a good one into the checkpoints."""
        names, parameters = zip(*self.module_.named_parameters(), strict=True)
        # One sync for all.
        are_finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
        if not all(are_finite):
            raise FloatingPointError(
                f"The weight {names[are_finite.index(False)]!r} is not finite after epoch {len(self.history)}: "
                f"training diverged. Lower lr (now {self.lr}) or use precision='float32'."
            )

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
        try:
            self.module_.train()
            self._run_steps(iterator, step_fn)
        finally:
            # Callbacks may compute embeddings after an epoch, from which batch norms are not to learn.
            self.module_.eval()
        # Norms and the like of the user's own, which each process has fed with its images alone.
        self.group.broadcast_tensors(self.module_.buffers())

    def _run_steps(self, iterator: Batches, step_fn: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self._choose_step()
        watch_batches = any(acts_on_batches(callback) for _, callback in self.callbacks_)
        start = time.perf_counter()
        total: Tensor | None = None
        n_images = 0
        for step, batch in enumerate(iterator, start=1):
            if watch_batches:
                self.notify("on_batch_begin", batch=(batch, None), training=True)
            terms = step_fn(batch)
            names = list(terms)
            n_drawn = len(batch) * self.group.size
            values = torch.stack(list(terms.values())) * n_drawn
            total = values if total is None else total + values
            n_images += n_drawn
            if step % CHECK_EVERY == 0:
                self._check_finite(dict(zip(names, self.group.mean(total.clone()).tolist(), strict=True)))
            if watch_batches:
                loss = self.group.mean(terms["train_loss"])
                self.history.record_batch("train_loss", loss.item())
                self.history.record_batch("train_batch_size", n_drawn)
                self.notify("on_batch_end", batch=(batch, None), training=True, loss=loss, y_pred=None)
            self.on_step(n_drawn)
        assert total is not None
        means = dict(zip(names, (self.group.mean(total) / n_images).tolist(), strict=True))
        seconds = self.group.broadcast(time.perf_counter() - start)
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
        """Update all on one batch and go on in the schedules of learning rates; return the loss terms, detached."""
        with lent_rng(self._lent):
            terms = self.update(batch) if self._recorded_step is None else self._recorded_step(batch)
        for scheduler in self._schedulers:
            scheduler.step()
        return terms

    def update(self, batch: Tensor) -> dict[str, Tensor]:
        """Update the prior discriminator, then encoder and critics, on one batch; return the loss terms, detached."""
        model = self.module_
        augment = self.augmentation
        # Copies, because an augmentation may work in place.
        views = [batch] if augment is None else [augment(batch.clone(), self.own_generator) for _ in range(2)]
        is_reduced = self.autocast_dtype is not None
        # No weights in bfloat16 are kept for a second use: those that the backward pass makes, where it computes scores
        # again, would serve the next step, and gradients of all uses would add up in bfloat16.
        with torch.autocast(batch.device.type, dtype=self.autocast_dtype, enabled=is_reduced, cache_enabled=False):
            terms, report, embedding = model(views, self.generator)
        if model.prior is not None:
            # The prior's small networks stay in float32: their losses differ by less than bfloat16 resolves.
            report["prior_discriminator"] = self._step_prior_discriminator(embedding)
            terms["prior"] = model.prior_loss(embedding)
        loss = self.criterion_(terms)
        self.optimizer_.zero_grad(set_to_none=True)
        loss.backward()
        self.group.average_gradients(each for part in self.optimizer_.param_groups for each in part["params"])
        if any(acts_on_gradients(callback) for _, callback in self.callbacks_):
            # Not the prior discriminator's, which has made its step.
            named = [(name, each) for name, each in model.named_parameters() if not name.startswith("prior.")]
            self.notify("on_grad_computed", named_parameters=named, batch=(batch, None), training=True)
        self.optimizer_.step()
        return {name: value.detach() for name, value in {"train_loss": loss, **terms, **report}.items()}

    def _step_prior_discriminator(self, embedding: Tensor) -> Tensor:
        self.prior_optimizer_.zero_grad(set_to_none=True)
        loss = self.module_.prior_discriminator_loss(embedding, self.generator)
        loss.backward()
        self.group.average_gradients(self.module_.prior.parameters())
        self.prior_optimizer_.step()
        return loss


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                # Fused kernels take it for granted that moments lie in memory as their parameter does.
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, lr: float, n_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group.pop("initial_lr", None)
    if schedule == "constant" or n_steps == 0:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=n_steps + 1, cycle_momentum=False)
