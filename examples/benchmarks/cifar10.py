"""CIFAR-10 for the benchmarks: training images from a file, or from OpenML where there is a network."""

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import fetch_openml

# Figures are measured on the last rows, which no benchmark trains or tunes on.
N_TEST = 10_000


# Of the files and the labels of the copy that figures in the documentation are of.
JPEG_COPY = "4c3eb0629bf30286bb90bc90227231f421d758d75a96e7a213bd4ff9eb372c01"


def load_cifar10(path: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Load images (n, 32, 32, 3), labels (n,) and the name of the data.

    `path` is an .npz file with the arrays "jpeg" (the files back to back), "ends" (the end of each) and "labels"; or
    "openml", which downloads CIFAR_10. A file with other images goes by its name and a digest of what is in it.
    """
    if path == "openml":
        X, y = fetch_openml("CIFAR_10", version=1, return_X_y=True, as_frame=False)
        images = X.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images, dtype=np.uint8), y.astype(np.uint8), "CIFAR-10 (OpenML)"
    if not Path(path).is_file():
        raise SystemExit(f"no such file: {path} (give the path of the .npz file, or 'openml')")
    with np.load(path, allow_pickle=False) as archive:
        stream, ends, labels = archive["jpeg"].tobytes(), archive["ends"], archive["labels"]
    starts = np.concatenate([[0], ends[:-1]])
    files = (stream[start:end] for start, end in zip(starts, ends, strict=True))
    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    digest = hashlib.sha256(stream + labels.tobytes()).hexdigest()
    return images, labels, "CIFAR-10, JPEG copy" if digest == JPEG_COPY else f"{Path(path).name} {digest[:8]}"
