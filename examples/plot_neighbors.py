"""
==================
Nearest neighbours
==================

What does an encoder take for similar? The nearest neighbours of some images in the embedding show it, beside those that
are nearest by their pixels.
"""

# %%
# Patches of two photographs
# --------------------------
# scikit-learn ships a photograph of a temple and one of a flower. Random patches of them are the images.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d

photographs = [photograph[::2, ::2] for photograph in load_sample_images().images]
X = np.concatenate([extract_patches_2d(photo, (16, 16), max_patches=700, random_state=0) for photo in photographs])
X_query = np.concatenate([extract_patches_2d(photo, (16, 16), max_patches=3, random_state=8) for photo in photographs])
print(X.shape, X.dtype)

# %%
# In the embedding
# ----------------
# Neighbours share what is in them: the kind of edge, petal, roof or sky, though not at the same pixels.

from skdim import DIMTransformer
from skdim.displays import NeighborsDisplay, ScoreMapDisplay

dim = DIMTransformer(max_epochs=6, random_state=0).fit(X)
NeighborsDisplay.from_estimator(dim, X_query, X, n_neighbors=7)
plt.show()

# %%
# By pixels
# ---------
# The same display, from neighbours that are found elsewhere: here by the Manhattan distance of pixels, for which
# smooth patches of the right colour are near to almost everything.

from sklearn.neighbors import NearestNeighbors

search = NearestNeighbors(n_neighbors=7, metric="manhattan").fit(X.reshape(len(X), -1) / 255)
distances, indices = search.kneighbors(X_query.reshape(len(X_query), -1) / 255)
display = NeighborsDisplay(X_query / 255, X[indices] / 255, indices, distances).plot()
display.ax_.set_title("Nearest neighbours by pixels")
plt.show()

# %%
# What an embedding knows about
# -----------------------------
# The local critic, kept after training, scores each location of an image against the image's embedding. Where the
# score is high, the embedding captures what is there.

ScoreMapDisplay.from_estimator(dim, X_query, background=X[:200])
plt.show()
