"""Warnings that point at the line of the user's that they are about."""

import contextlib
import os
import sys
import warnings

import sklearn

__all__ = ["warn"]

# Those between the user and what warns.
PACKAGES = tuple(os.path.dirname(path) + os.sep for path in (__file__, sklearn.__file__))


def warn(message: str) -> None:
    """Issue a UserWarning for the first caller outside skdim and scikit-learn."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*PACKAGES, contextlib.__file__)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
