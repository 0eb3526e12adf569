"""
===================
An encoder of yours
===================

Any network can be the encoder: one written for Deep InfoMax, or an ordinary one of which one layer is named.
"""

# %%
# A module that returns both
# --------------------------
# Deep InfoMax needs two things of an image: its embedding (N, n_components) and, computed on the way to it, a map of
# local features (N, K, h, w), each location of which sees a part of the image only. A class is built for the images at
# hand, as ``encoder(image_shape, n_components)``.

from math import ceil

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skdim import DIMTransformer
from skdim.displays import FilterDisplay, TrainingCurveDisplay


class SmallEncoder(nn.Module):
    """Two convolutions, then one linear layer on the map."""

    def __init__(self, image_shape, n_components):
        super().__init__()
        channels, height, width = image_shape
        self.local = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.embedding = nn.Linear(64 * ceil(height / 2) * ceil(width / 2), n_components)

    def forward(self, images):
        features = self.local(images)
        return self.embedding(self.conv(features).flatten(1)), features


X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
dim = DIMTransformer(n_components=32, encoder=SmallEncoder, max_epochs=8, random_state=0).fit(X_train)
print(dim.transform(X_test).shape)
FilterDisplay.from_estimator(dim)
plt.show()

# %%
# An ordinary network
# -------------------
# `LayerEncoder` takes a network as it is, of torchvision or timm for instance, and the dotted name of the layer whose
# output is the map. Weights that the network has are where training starts. Its output becomes the embedding through a
# linear layer.

from functools import partial

from skdim.encoders import LayerEncoder

network = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    nn.AdaptiveAvgPool2d(1),
)
layered = DIMTransformer(
    n_components=32, encoder=partial(LayerEncoder, network, "0"), max_epochs=8, random_state=0
).fit(X_train)
print(layered.transform(X_test).shape)

# %%
# Which is better?
# ----------------
# The network itself stays as it was; training worked on a copy, ``encoder_.network``. The curves show how each training
# went, but not which encoder is the better one: each loss is about the encoder's own map, one of which may simply be
# easier to recognise, and "local_bound" cannot exceed the logarithm of the number of images in a batch, here 4.8. What
# compares them is one task for both, on images that neither has seen: `skdim.evaluation.knn_scorer` where there are
# labels, `skdim.evaluation.retrieval_scorer` where there are none.

from skdim.evaluation import knn_scorer, retrieval_scorer

_, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
for ax, title, fitted in zip(axes, ["SmallEncoder", "LayerEncoder"], [dim, layered], strict=True):
    TrainingCurveDisplay.from_estimator(fitted, ax=ax)
    accuracy, retrieval = knn_scorer(fitted, X_test, y_test), retrieval_scorer(fitted, X_test)
    ax.set_title(f"{title}\nneighbours {100 * accuracy:.1f} %, retrieval {retrieval:.2f}")
axes[0].get_legend().remove()
plt.show()
