"""
========================
Embedding and clustering
========================

Without any label, clusters of embeddings find the kinds of things in a collection of images. Here the images are
patches all over one photograph, so that the clusters can be seen where the patches lie.
"""

# %%
# Patches of a photograph
# -----------------------
# A patch of 16 x 16 pixels around every fourth pixel of the temple that scikit-learn ships.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

photograph = load_sample_image("china.jpg")[::2, ::2]
windows = np.lib.stride_tricks.sliding_window_view(photograph, (16, 16), axis=(0, 1))[::4, ::4]
height, width = windows.shape[:2]
X = windows.reshape(-1, 3, 16, 16)
print(X.shape, X.dtype)

# %%
# Embed and cluster
# -----------------
# `KMeans` behind the transformer makes one Pipeline of both. k-means weighs each dimension by its spread: put a
# `StandardScaler` between the two where the spreads of the embedding differ much.

from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline

from skdim import DIMTransformer

pipeline = make_pipeline(DIMTransformer(n_components=32, max_epochs=2, random_state=0), KMeans(6, random_state=0))
clusters = pipeline.fit_predict(X).reshape(height, width)

# %%
# The map of clusters
# -------------------
# Beside it what k-means makes of the pixels of the same patches.

by_pixels = KMeans(6, random_state=0).fit_predict(X.reshape(len(X), -1) / 255).reshape(height, width)

_, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
axes[0].imshow(photograph)
axes[1].imshow(clusters, cmap="Set2", interpolation="nearest")
axes[2].imshow(by_pixels, cmap="Set2", interpolation="nearest")
for ax, title in zip(axes, ["Photograph", "Clusters of embeddings", "Clusters of pixels"], strict=True):
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %%
# Some patches of each cluster of embeddings:

rng = np.random.default_rng(0)
_, axes = plt.subplots(6, 12, figsize=(8, 4.2), layout="constrained")
for cluster, row in enumerate(axes):
    members = np.flatnonzero(clusters.ravel() == cluster)
    for ax, patch in zip(row, X[rng.choice(members, 12)], strict=True):
        ax.imshow(patch.transpose(1, 2, 0))
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(cluster, rotation=0, labelpad=10, va="center")
plt.show()
