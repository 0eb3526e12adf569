"""Deep InfoMax for scikit-learn."""

from skdim._version import __version__
from skdim.transformer import DIMTransformer
from skdim.versions import show_versions

__all__ = ["DIMTransformer", "__version__", "show_versions"]
