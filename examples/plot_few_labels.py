"""
==========================
Many images and few labels
==========================

Images are cheap and labels are dear: this is where features that are learned without labels pay. Deep InfoMax learns
from all images; a classifier on its features then learns from 50 labels.
"""

# %%
# Data
# ----
# scikit-learn's digits, each put at a random place on a noisy canvas, as objects are on a photograph: pixels no longer
# stand for the same stroke in each image.

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def scatter_digits(digits, size, random_state):
    """Images (n, size, size), uint8, each with a digit at a random place, in noise."""
    rng = np.random.default_rng(random_state)
    images = rng.normal(40, 10, (len(digits), size, size))
    places = rng.integers(size - 8 + 1, size=(len(digits), 2))
    for image, digit, (top, left) in zip(images, digits, places, strict=True):
        image[top : top + 8, left : left + 8] += 12 * digit
    return images.clip(0, 255).astype(np.uint8)


digits = load_digits()
X, y = scatter_digits(digits.images, size=10, random_state=0), digits.target
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=500, stratify=y, random_state=0)

# %%
# Features from all images
# ------------------------
# None of the encoders sees a label. The untrained one is the control. The last one sees each image in two random views
# and has to find what they share: shifted views teach it that the place does not matter, which is knowledge about the
# task that needs no labels either.

from sklearn.decomposition import PCA

from skdim import DIMTransformer
from skdim.views import StandardAugmentation

shifts = StandardAugmentation(crop=1.0, shift=0.15, horizontal_flip=False)
encoders = {
    "untrained encoder": DIMTransformer(max_epochs=0, random_state=0),
    "Deep InfoMax": DIMTransformer(max_epochs=12, random_state=0),
    "Deep InfoMax, shifted views": DIMTransformer(augmentation=shifts, max_epochs=12, random_state=0),
}
rows_train, rows_test = X_train.reshape(len(X_train), -1), X_test.reshape(len(X_test), -1)
pca = PCA(64, random_state=0).fit(rows_train)
features = {
    "raw pixels": (rows_train / 255, rows_test / 255),
    "PCA": (pca.transform(rows_train), pca.transform(rows_test)),
}
for name, dim in encoders.items():
    features[name] = (dim.fit_transform(X_train), dim.transform(X_test))

# %%
# A classifier from a few labels
# ------------------------------
# The same linear classifier for all features, averaged over draws of which images have labels.

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

n_labels = [20, 50, 100, 200, 500]
accuracy = {name: [] for name in features}
for n in n_labels:
    draws = list(StratifiedShuffleSplit(n_splits=4, train_size=n, random_state=0).split(X_train, y_train))
    for name, (Z_train, Z_test) in features.items():
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        scores = [classifier.fit(Z_train[few], y_train[few]).score(Z_test, y_test) for few, _ in draws]
        accuracy[name].append(100 * np.mean(scores))

print(f"Accuracy with {n_labels[1]} labels:")
for name, values in accuracy.items():
    print(f"{name:30}{values[1]:6.1f} %")

# %%
# The fewer labels there are, the more it matters what the classifier reads.

import matplotlib.pyplot as plt

_, ax = plt.subplots(figsize=(7, 4), layout="constrained")
colors = ["#94a4a2", "#ffa90e", "#832db6", "#3f90da", "#bd1f01"]
for (name, values), color in zip(accuracy.items(), colors, strict=True):
    ax.plot(n_labels, values, marker="o", color=color, label=name)
ax.set(xscale="log", xlabel="Labelled images", ylabel="Accuracy in percent", title=f"{len(X_train)} images in all")
ax.set_xticks(n_labels, n_labels)
ax.minorticks_off()
ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
plt.show()
