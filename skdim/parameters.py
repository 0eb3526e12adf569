"""Checks of parameters that go beyond types and ranges, before any work."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skdim.model import NEGATIVES
from skdim.notices import warn

__all__ = ["check_negatives", "check_numbers", "check_units", "check_weights"]


def check_numbers(values: Mapping[str, Any], *, whole: bool) -> None:
    """Check that numbers are numbers to torch, too, which takes no truth values to count by nor integers of any length.

    Parameters
    ----------
    values : mapping of str to int, float or None
        Parameters by name, each in its range.
    whole : bool
        Whether something is counted by them.

    Raises
    ------
    ValueError
        If one is an integer beyond float64 or, where it counts, True or False.
    """
    for name, value in values.items():
        if whole and isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be a number, got {value}.")
        try:
            float(value or 0)
        except OverflowError as error:
            raise ValueError(f"{name} must be a number within float64, got {reprlib.repr(value)}.") from error


def check_weights(weights: Mapping[str, float], prior_matching: str) -> None:
    """Check that there is something to train for.

    Parameters
    ----------
    weights : mapping of str to float
        Weight of "local", "global", "prior" and "coordinate".
    prior_matching : {"adversarial", "noise"}
        Whether the prior has a loss of its own.

    Raises
    ------
    ValueError
        If every loss has a weight of 0.

    Warns
    -----
    UserWarning
        If the prior's is the only one that has not.
    """
    names = [name for name in weights if name != "prior" or prior_matching == "adversarial"]
    if not any(weights[name] for name in names):
        listed = ", ".join(f"{name}_weight" for name in names[:-1]) + f" and {names[-1]}_weight"
        why = "" if "prior" in names else ", and prior_matching='noise' works through the others only"
        raise ValueError(f"{listed} are all 0{why}: there is nothing to train for.")
    if not any(weights[name] for name in weights if name != "prior"):
        warn(
            "local_weight, global_weight and coordinate_weight are all 0: the prior alone is trained for, and the "
            "embedding learns nothing about the images."
        )


def check_negatives(negatives: Any, critics: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Bring the parameter `negatives` to one form.

    Parameters
    ----------
    negatives : str, sequence of str, or dict of these
        As in `DIMTransformer`.
    critics : sequence of str
        The critics that are trained, of "local" and "global".

    Returns
    -------
    dict
        The schemes of each critic that is trained.

    Raises
    ------
    ValueError
        If there is an unknown scheme, or a dict names other critics.
    """
    by_critic = dict(negatives) if isinstance(negatives, Mapping) else dict.fromkeys(("local", "global"), negatives)
    if not set(critics) <= set(by_critic) <= {"local", "global"}:
        wanted = f"the critics {sorted(critics)}" if critics else "critics of ['global', 'local']"
        raise ValueError(f"negatives as a dict must name {wanted}, got {negatives!r}.")
    schemes = {name: (value,) if isinstance(value, str) else value for name, value in by_critic.items()}
    if not all(isinstance(value, list | tuple) and value and _are_schemes(value) for value in schemes.values()):
        raise ValueError(
            f"negatives must be one of {list(NEGATIVES)}, a sequence of them, or a dict of these for 'local' and "
            f"'global', got {negatives!r}."
        )
    return {name: tuple(schemes[name]) for name in critics}


def check_units(mi_units: int, discriminator: str) -> None:
    """Check that the critics are wide enough to tell anything.

    Parameters
    ----------
    mi_units : int
        Width of the critics.
    discriminator : {"dot", "concat"}
        Their form.

    Raises
    ------
    ValueError
        If a layer norm would make the only unit constant.
    """
    if mi_units == 1 and discriminator == "dot":
        raise ValueError(
            "mi_units must be at least 2 with discriminator='dot', whose layer norm makes a single unit constant, got "
            "mi_units=1."
        )


def _are_schemes(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value in NEGATIVES for value in values)
