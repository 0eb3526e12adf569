"""
=====================================
What a linear classifier can read off
=====================================

How good a representation is, is told by how much a linear classifier reads off it: a probe. Beside Deep InfoMax stand
what it has to beat: raw pixels, principal components, and the same encoder without training.

.. code-block:: bash

    python examples/plot_cifar10.py openml                  # CIFAR-10, downloaded from OpenML
    python examples/plot_cifar10.py cifar10_train_jpeg.npz  # from a file, see examples/benchmarks/cifar10.py
    python examples/plot_cifar10.py                         # generated textures: a short run that needs no data

What you see on this page comes from the generated textures; figures for CIFAR-10 are in :ref:`results`.
"""

# %%
# Data
# ----
# The classes of the generated images are ten directions of stripes. How wide the stripes are and where they begin is
# random, and much noise lies over them, so that no class can be told from single pixels.

import sys

import numpy as np


def make_stripes(n_images, random_state):
    """Images (n, 16, 16, 3), uint8, and labels: the direction of the stripes, of ten."""
    rng = np.random.default_rng(random_state)
    labels = rng.integers(10, size=n_images)
    angle = np.pi / 10 * (labels + rng.normal(0, 0.1, n_images))
    frequency, phase = rng.uniform(0.7, 1.4, n_images), rng.uniform(0, 2 * np.pi, n_images)
    rows, columns = np.mgrid[:16, :16]
    along = np.cos(angle)[:, None, None] * columns + np.sin(angle)[:, None, None] * rows
    wave = np.sin(frequency[:, None, None] * along + phase[:, None, None])[..., None]
    images = 128 + 60 * wave * [1.0, 0.8, 0.6] + rng.normal(0, 60, (n_images, 16, 16, 3))
    return images.clip(0, 255).astype(np.uint8), labels


if len(sys.argv) > 1:
    from benchmarks.cifar10 import N_TEST, load_cifar10

    images, labels, name = load_cifar10(sys.argv[1])
    n_train, max_epochs = len(images) - N_TEST, 20
else:
    images, labels = make_stripes(2_000, random_state=0)
    name, n_train, max_epochs = "generated stripes", 1_500, 5
X_train, y_train, X_test, y_test = images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]

# %%
# Learn, then probe
# -----------------
# `evaluate` fits each probe to the training images' features and labels; held-out images only yield the accuracy.

from skdim import DIMTransformer
from skdim.evaluation import evaluate

dim = DIMTransformer(max_epochs=max_epochs, random_state=0).fit(X_train)
table = evaluate(dim, X_train, y_train, X_test, y_test, probes=["linear"])
table

# %%
# The untrained encoder is the honest control: what exceeds it was learned. On photographs the wider layers before the
# embedding keep more that a linear classifier can use; on these stripes there is little more to keep.

import matplotlib.pyplot as plt

_, ax = plt.subplots(figsize=(7, 4), layout="constrained")
encoders = table[table["layer"].notna()]
bars = encoders.pivot(index="layer", columns="features", values="linear")
bars = bars.loc[["embedding", "hidden", "features"], ["untrained encoder", "Deep InfoMax"]]
(100 * bars).plot.bar(ax=ax, rot=0, color=["#94a4a2", "#3f90da"], xlabel="Layer", ylabel="Accuracy in percent")
for style, title in (("-", "raw pixels"), ("--", "PCA")):
    best = 100 * table.loc[table["features"] == title, "linear"].max()
    ax.axhline(best, color="black", linestyle=style, linewidth=1, label=title)
ax.set(ylim=(0, 100), title=f"Linear probe on {len(X_test)} held-out images, {name}")
ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
plt.show()
