"""Plots of a fitted transformer, in the way of scikit-learn's displays. They need matplotlib.

Of a fitted Pipeline its `DIMTransformer` is shown, with the images as the steps before it leave them; the steps behind
it do not count.

Images are shown in grey if they have one channel and in colour if they have three. Of any other number of channels the
first three principal components of the pixels shown are the red, green and blue.
"""

from skdim.displays.embedding import EmbeddingDisplay
from skdim.displays.filters import FilterDisplay
from skdim.displays.neighbors import NeighborsDisplay
from skdim.displays.score_map import ScoreMapDisplay
from skdim.displays.training_curve import TrainingCurveDisplay

__all__ = ["EmbeddingDisplay", "FilterDisplay", "NeighborsDisplay", "ScoreMapDisplay", "TrainingCurveDisplay"]
