"""What skorch's callbacks do and need, where there are no labels and no validation images."""

from collections.abc import Sequence
from typing import Any

from skorch.callbacks import (
    BatchScoring,
    Callback,
    EarlyStopping,
    EpochScoring,
    InputShapeSetter,
    LRScheduler,
    MlflowLogger,
    NeptuneLogger,
    PassthroughScoring,
    PrintLog,
    ProgressBar,
    SacredLogger,
    TensorBoard,
)

from skdim.nested import is_storable
from skdim.notices import warn

__all__ = [
    "acts_on_batches",
    "acts_on_gradients",
    "callback_state",
    "check_callbacks",
    "describe_callbacks",
    "is_early_stopping",
    "load_callback",
]

# Hooks of skorch that do nothing: EpochScoring's gathers predictions and labels, and there are none.
IDLE_HOOKS = {
    Callback.on_batch_begin,
    Callback.on_batch_end,
    TensorBoard.on_batch_end,
    EpochScoring.on_batch_end,
}

# Those that do nothing unless ``log_on_batch_end`` is set.
LOGGER_HOOKS = {NeptuneLogger.on_batch_end, SacredLogger.on_batch_end, MlflowLogger.on_batch_end}


def check_callbacks(callbacks: Sequence[Any] | None, lr_schedule: str) -> None:
    """Refuse what is no callback of skorch and those of skorch that a training without labels cannot serve.

    Parameters
    ----------
    callbacks : sequence or None
        Instances or classes of `skorch.callbacks.Callback`, or pairs of a name and one of them.
    lr_schedule : str
        The parameter of `DIMTransformer`.

    Raises
    ------
    ValueError
        If there is one; the message names it and says what serves instead.

    Warns
    -----
    UserWarning
        If one ends a schedule of learning rates half way.
    """
    # Names under which skorch's scores have been recorded when a callback's turn comes.
    recorded: set[str] = set()
    for entry in callbacks or ():
        callback = _unwrapped(entry)
        if not isinstance(callback, Callback):
            raise ValueError(f"callbacks must be a list of skorch.callbacks.Callback, got {entry!r} in it.")
        misfit = _misfit(callback, lr_schedule, recorded)
        if misfit is not None:
            raise ValueError(f"{type(callback).__name__} in callbacks {misfit}.")
        if isinstance(callback, EarlyStopping) and lr_schedule != "constant":
            warn(
                f"EarlyStopping ends lr_schedule={lr_schedule!r} before its learning rate has fallen, which costs "
                "accuracy: set lr_schedule='constant' with it."
            )
        if isinstance(callback, PassthroughScoring):
            recorded.add(callback.name)


def describe_callbacks(callbacks: Sequence[Any] | None) -> list[str]:
    """Name callbacks, and say which of them act within an epoch, where processes that train together have to."""
    names = []
    for callback in map(_unwrapped, callbacks or ()):
        acts = {"batches": acts_on_batches(callback), "gradients": acts_on_gradients(callback)}
        where = " and ".join(what for what, does in acts.items() if does)
        names.append(f"{type(callback).__name__} on {where}" if where else type(callback).__name__)
    return names


def _unwrapped(entry: Any) -> Any:
    """Return the callback of a pair with a name, and an instance of a class."""
    callback = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
    return callback() if isinstance(callback, type) and issubclass(callback, Callback) else callback


def _misfit(callback: Callback, lr_schedule: str, recorded: set[str]) -> str | None:
    """Say why a callback cannot work here and what does."""
    if isinstance(callback, LRScheduler) and lr_schedule != "constant":
        return f"needs lr_schedule='constant', got {lr_schedule!r}"
    if isinstance(callback, ProgressBar):
        return "makes every step wait for the device; use verbose=1 instead"
    if isinstance(callback, PrintLog) and callback.sink is print:
        return "prints nothing here; use verbose=1, the log 'skdim' at level INFO, or give it a sink"
    if isinstance(callback, InputShapeSetter):
        return "is not needed: the encoder is built for the shape of the images"
    if isinstance(callback, EpochScoring | BatchScoring | PassthroughScoring) and not callback.on_train:
        return "needs on_train=True: there are no validation images"
    if isinstance(callback, EpochScoring | BatchScoring) and not _scores_without_labels(callback.scoring):
        return (
            f"cannot use scoring={callback.scoring!r}: there are no labels and no predictions; use a function "
            "scoring(net, X, y) of your own, which finds the encoder in net.module_.encoder and gets y=None"
        )
    monitor = getattr(callback, "monitor", None)
    passed_through = "PassthroughScoring('train_loss', on_train=True)"
    if monitor == "valid_loss":
        return "monitors 'valid_loss', but there are no validation images; use monitor='train_loss'"
    if monitor == "valid_loss_best":
        return (
            "monitors 'valid_loss_best', but there are no validation images; use monitor='train_loss_best' after "
            + passed_through
        )
    if monitor == "train_loss_best" and "train_loss" not in recorded:
        return f"monitors 'train_loss_best', which needs {passed_through} before it"
    return None


def _scores_without_labels(scoring: Any) -> bool:
    return callable(scoring) and not getattr(scoring, "__module__", "").startswith("sklearn.")


def acts_on_gradients(callback: Callback) -> bool:
    """Tell whether a callback wants to see gradients."""
    return type(callback).on_grad_computed is not Callback.on_grad_computed


def acts_on_batches(callback: Callback) -> bool:
    """Tell whether a callback does anything at a batch."""
    if isinstance(callback, LRScheduler):
        return callback.step_every == "batch"
    idle = IDLE_HOOKS if getattr(callback, "log_on_batch_end", True) else IDLE_HOOKS | LOGGER_HOOKS
    return any(getattr(type(callback), hook) not in idle for hook in ("on_batch_begin", "on_batch_end"))


def is_early_stopping(error: BaseException) -> bool:
    """Tell whether it was skorch's EarlyStopping that raised, for a callback that holds one."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "") == EarlyStopping.__module__


def callback_state(callback: Callback) -> dict[str, Any]:
    """Read what a callback carries from epoch to epoch: by skorch's convention, attributes ending in an underscore."""
    states = {}
    for name, value in vars(callback).items():
        if name.endswith("_"):
            has_state = hasattr(value, "state_dict") and not isinstance(value, type)
            state = value.state_dict() if has_state else value
            if is_storable(state):
                states[name] = state
            elif has_state:
                warn(
                    f"Checkpoints leave out the state of {type(callback).__name__}.{name}, in which there is more than "
                    "numbers, texts, arrays and tensors: a resumed training will differ."
                )
    return states


def load_callback(callback: Callback, states: dict[str, Any]) -> None:
    """Give a callback back what `callback_state` has read of it."""
    for name, state in states.items():
        value: Any = getattr(callback, name, None)
        if hasattr(value, "load_state_dict"):
            value.load_state_dict(state)
        else:
            setattr(callback, name, state)
