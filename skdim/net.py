"""The skorch net that trains the model: one loop, without a data loader or a device-host sync per batch."""

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from skorch import NeuralNet
from torch import Tensor

from skdim.batches import Batches
from skdim.model import InfoMaxModel

__all__ = ["DIMNet", "private_rng"]

# At the encoder's own learning rate the prior discriminator wins outright: its gradients then distort the embedding
# instead of spreading it. At a tenth of it the two stay in balance (both losses near chance, sigmoid(y) uniform).
PRIOR_LR_RATIO = 0.1

_rng_lock = threading.Lock()


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a block and leave them as they were.

    Module initialisation and dropout know no other generator. The lock keeps threads from seeing each other's seed.
    """
    cuda = [device] if device.type == "cuda" else []
    with _rng_lock, torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


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

    Encoder and critics share one Adam and the weighted loss; the prior discriminator has its own Adam and its own loss,
    and is updated first in each step. skorch's epoch hooks work as ever; there are no batch hooks and no history
    entries for batches, because each of them would make the device wait for the host.

    Parameters
    ----------
    module : InfoMaxModel
        The model, on the training device.
    autocast_dtype : torch.dtype or None
        Precision of the forward pass; None is float32.
    generator : torch.Generator
        Draws prior samples and shuffled negatives; on the training device.
    **kwargs
        Of `skorch.NeuralNet`.
    """

    def __init__(
        self,
        module: InfoMaxModel,
        *,
        autocast_dtype: torch.dtype | None,
        generator: torch.Generator,
        **kwargs: Any,
    ) -> None:
        self.autocast_dtype = autocast_dtype
        self.generator = generator
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
        shared = [*model.encoder.parameters(), *model.critics.parameters()]
        self.optimizer_ = self.optimizer(shared, fused=True)
        if model.prior is not None:
            self.prior_optimizer_ = self.optimizer(model.prior.parameters(), fused=True)
        return self

    def train(self, batches: Batches, epochs: int, lr: float, lr_schedule: str) -> "DIMNet":
        """Train on some epochs more, from where the net stands.

        Parameters
        ----------
        batches : Batches
            The images.
        epochs : int
            How often each image is seen.
        lr : float
            Learning rate of encoder and critics; the prior discriminator's is a tenth of it.
        lr_schedule : {"one_cycle", "constant"}
            "one_cycle" warms up to `lr` and anneals to nearly 0 over these epochs.

        Returns
        -------
        DIMNet
            The net.

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
        # Not skorch's partial_fit, which swallows a KeyboardInterrupt and leaves a half-trained net that looks fitted.
        self.notify("on_train_begin", X=batches, y=None)
        self.fit_loop(batches, epochs=epochs)
        self.notify("on_train_end", X=batches, y=None)
        return self

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

    def epochs(self, last: int) -> list[dict[str, float]]:
        """Return what was recorded of the last epochs: each loss term, seconds and images a second."""
        recorded = self.history[len(self.history) - last :]
        return [{key: value for key, value in epoch.items() if key not in ("batches", "epoch")} for epoch in recorded]

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
        start = time.perf_counter()
        total: Tensor | None = None
        n_images = 0
        for batch in iterator:
            terms = step_fn(batch)
            names = list(terms)
            values = torch.stack(list(terms.values())) * len(batch)
            total = values if total is None else total + values
            n_images += len(batch)
        assert total is not None
        means = dict(zip(names, (total / n_images).tolist(), strict=True))
        seconds = time.perf_counter() - start
        for name, value in {**means, "seconds": seconds, "images_per_second": n_images / seconds}.items():
            self.history.record(name, value)
        self._check_finite(means)

    def _check_finite(self, means: dict[str, float]) -> None:
        bad = [name for name, value in means.items() if not -float("inf") < value < float("inf")]
        if bad:
            raise FloatingPointError(
                f"The loss term {bad[0]!r} is {means[bad[0]]} in epoch {len(self.history)}: training diverged. "
                f"Lower lr (now {self.lr}) or use precision='float32'."
            )

    def train_step(self, batch: Tensor, **_: Any) -> dict[str, Tensor]:
        """Update the prior discriminator, then encoder and critics, on one batch; return the loss terms, detached."""
        model = self.module_
        device_type = batch.device.type
        with torch.autocast(device_type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            terms, embedding = model(batch, self.generator)
        report = {}
        if model.prior is not None:
            # The prior's small networks stay in float32: their losses differ by less than bfloat16 resolves.
            report["prior_discriminator"] = self._step_prior_discriminator(embedding)
            terms["prior"] = model.prior_loss(embedding)
        loss = self.criterion_(terms)
        self.optimizer_.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer_.step()
        for scheduler in self._schedulers:
            scheduler.step()
        return {name: value.detach() for name, value in {"loss": loss, **terms, **report}.items()}

    def _step_prior_discriminator(self, embedding: Tensor) -> Tensor:
        # Also drops the gradients that the encoder's loss left on the discriminator in the step before.
        self.prior_optimizer_.zero_grad(set_to_none=True)
        loss = self.module_.prior_discriminator_loss(embedding, self.generator)
        loss.backward()
        self.prior_optimizer_.step()
        return loss


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, lr: float, n_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group.pop("initial_lr", None)
    if schedule == "constant" or n_steps == 0:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=n_steps + 1, cycle_momentum=False)
