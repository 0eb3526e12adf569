"""Deep InfoMax on scikit-learn's digits: learn features without labels, probe them, save, load, predict.

Takes no argument and downloads nothing; about a minute on two cores.
"""

import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer
from skdim.views import StandardAugmentation

N_LABELS = 50
N_DRAWS = 10

# The same linear probe for all features; scaling and regularisation are chosen on the labelled digits.
PROBE = GridSearchCV(
    make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
    {"standardscaler__with_std": [True, False], "logisticregression__C": [0.01, 0.1, 1.0]},
    cv=3,
)


def probe_accuracies(Z_train, y_train, Z_test, y_test):
    """Accuracy of the probe with all labels, and with a few, averaged over draws of which few."""
    with_all = clone(PROBE).fit(Z_train, y_train).score(Z_test, y_test)
    draws = StratifiedShuffleSplit(n_splits=N_DRAWS, train_size=N_LABELS, random_state=0).split(Z_train, y_train)
    with_few = [clone(PROBE).fit(Z_train[few], y_train[few]).score(Z_test, y_test) for few, _ in draws]
    return with_all, np.mean(with_few)


def main():
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=500, stratify=y, random_state=0)

    # The features are learned from all training images, without their labels. A digit is the same a pixel to the side,
    # so each is seen in two views that are shifted; mirrored it would be another.
    shifted = StandardAugmentation(crop=1, shift=1 / 8, horizontal_flip=False)
    dim = DIMTransformer(augmentation=shifted, output_layer="hidden", random_state=0)
    start = time.perf_counter()
    dim.fit(X_train)
    print(f"Deep InfoMax learned from {len(X_train)} digits in {time.perf_counter() - start:.0f} s on {dim.device_}.")

    untrained = clone(dim).set_params(max_epochs=0).fit(X_train)
    pca = PCA(n_components=64, random_state=0).fit(X_train)
    features = {
        "raw pixels": lambda X: X,
        "PCA": pca.transform,
        "untrained encoder": lambda X: untrained.set_params(output_layer="embedding").transform(X),
        "untrained encoder, hidden layer": lambda X: untrained.set_params(output_layer="hidden").transform(X),
        "Deep InfoMax": lambda X: dim.set_params(output_layer="embedding").transform(X),
        "Deep InfoMax, hidden layer": lambda X: dim.set_params(output_layer="hidden").transform(X),
    }
    print(f"Accuracy of a linear probe on {len(X_test)} held-out digits:\n")
    print(f"{'':34}{'width':>6}{f'{len(X_train)} labels':>14}{f'{N_LABELS} labels':>14}")
    for name, transform in features.items():
        Z_train, Z_test = transform(X_train), transform(X_test)
        with_all, with_few = probe_accuracies(Z_train, y_train, Z_test, y_test)
        print(f"{name:34}{Z_train.shape[1]:>6}{with_all:>14.1%}{with_few:>14.1%}")

    # Frozen, it is not trained again.
    pipeline = make_pipeline(FrozenEstimator(dim), StandardScaler(), LogisticRegression(max_iter=2000))
    pipeline.fit(X_train, y_train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.joblib"
        joblib.dump(pipeline, path)
        loaded = joblib.load(path)
        print(f"\nThe fitted Pipeline is a joblib file of {path.stat().st_size / 1e6:.1f} MB. Loaded again, it reads")
    print(f"the first held-out digits as {loaded.predict(X_test[:10])}; they are {y_test[:10]}.")


if __name__ == "__main__":
    main()
