"""Warnings that point at the line of the user's that they are about."""

import contextlib
import os
import sys
import warnings

import joblib
import sklearn
import skorch

__all__ = ["warn"]

# Where the code between the user and what warns is.
BETWEEN = (
    *(os.path.dirname(path) + os.sep for path in (__file__, sklearn.__file__, joblib.__file__, skorch.__file__)),
    contextlib.__file__,
)


def warn(message: str) -> None:
    """Issue a UserWarning for the first caller outside skdim and what it stands on."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
