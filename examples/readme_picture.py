"""Draw the picture of the README: what two encoders have learned without labels.

python examples/readme_picture.py docs/images/learned.png
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d

from skdim import DIMTransformer
from skdim.displays import EmbeddingDisplay, NeighborsDisplay


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=[1, 1.05], layout="constrained")

    X, y = load_digits(return_X_y=True)
    digits = DIMTransformer(mi_estimator="jsd", lr=5e-4, random_state=0).fit(X)
    EmbeddingDisplay.from_estimator(digits, X, y, projection="tsne", n_thumbnails=60, random_state=0, ax=left, s=8)
    left.set(title="Embeddings of digits, coloured by their class afterwards", xlabel="", ylabel="")

    photographs = [photograph[::2, ::2] for photograph in load_sample_images().images]
    patches = [extract_patches_2d(photo, (16, 16), max_patches=700, random_state=0) for photo in photographs]
    queries = [extract_patches_2d(photo, (16, 16), max_patches=3, random_state=8) for photo in photographs]
    dim = DIMTransformer(max_epochs=6, random_state=0).fit(np.concatenate(patches))
    NeighborsDisplay.from_estimator(dim, np.concatenate(queries), np.concatenate(patches), n_neighbors=7, ax=right)
    right.set_title("Patches of photographs and their nearest neighbours")
    figure.savefig(sys.argv[1], dpi=70)


if __name__ == "__main__":
    main()
