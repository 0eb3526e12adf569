"""Deep InfoMax for scikit-learn."""

from skdim._version import __version__
from skdim.transformer import DIMTransformer

__all__ = ["DIMTransformer", "__version__"]
