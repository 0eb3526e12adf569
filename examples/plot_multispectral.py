"""
===================================
Images of more than three channels
===================================

Sensors see more than red, green and blue, and no network that was trained on photographs fits what they see. Deep
InfoMax takes any number of channels: here five, of generated land that a satellite might have seen.
"""

# %%
# Data
# ----
# Each image is a field of one crop, with bare soil in it. Crops have the same colours, but stand in rows of different
# distance, and light differs from image to image.

import numpy as np
from scipy.ndimage import gaussian_filter

rng = np.random.default_rng(0)
n_images, n_classes, size = 1_500, 5, 16
y = rng.integers(n_classes, size=n_images)

plants = np.array([0.1, 0.2, 0.1, 0.6, 0.5])[:, None, None]
soil = np.array([0.2, 0.3, 0.4, 0.4, 0.5])[:, None, None]
is_bare = gaussian_filter(rng.normal(size=(n_images, 1, size, size)), (0, 0, 2, 2)) > 0.15
frequency, phase = np.linspace(0.6, 2.2, n_classes)[y], rng.uniform(0, 2 * np.pi, n_images)
in_row = (1 + np.sin(frequency[:, None] * np.arange(size) + phase[:, None])[:, None, :, None]) / 2
X = np.where(is_bare, soil, soil + (plants - soil) * in_row)
X = X * rng.uniform(0.8, 1.2, (n_images, 1, 1, 1))
X = (X + rng.normal(0, 0.05, X.shape)).astype(np.float32)
X_train, y_train, X_test, y_test = X[:1_000], y[:1_000], X[1_000:], y[1_000:]
print(X.shape, X.dtype)

# %%
# Learn and look
# --------------
# Floats of any scale will do: each channel is standardised. Pictures of five channels are shown by the three principal
# components of their pixels.

import matplotlib.pyplot as plt

from skdim import DIMTransformer
from skdim.displays import EmbeddingDisplay, FilterDisplay

dim = DIMTransformer(max_epochs=12, random_state=0).fit(X_train)
EmbeddingDisplay.from_estimator(dim, X_test, y_test, projection="tsne", n_thumbnails=60, random_state=0)
plt.show()

# %%
# The filters of the first convolution look at several channels at once.

FilterDisplay.from_estimator(dim)
plt.show()

# %%
# Against hand-made features
# --------------------------
# For such images people often take the mean and the spread of each channel. The same linear classifier reads these,
# the pixels, and the features of the encoder.

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

features = {
    "mean and spread of channels": lambda X: np.concatenate([X.mean(axis=(2, 3)), X.std(axis=(2, 3))], axis=1),
    "pixels": lambda X: X.reshape(len(X), -1),
    "untrained encoder": DIMTransformer(max_epochs=0, random_state=0).fit(X_train).transform,
    "Deep InfoMax": dim.transform,
}
for name, compute in features.items():
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    accuracy = classifier.fit(compute(X_train), y_train).score(compute(X_test), y_test)
    print(f"{name:30}{accuracy:7.1%}")
