"""Deep InfoMax on scikit-learn's digits: learn features without labels, probe them, save, load, predict.

Takes no argument and downloads nothing; under a minute on two cores.
"""

import tempfile
import time
from pathlib import Path

import joblib
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

N_LABELS = 50


def main():
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=500, stratify=y, random_state=0)
    # Features are learned from all training images without labels; the linear probe on them sees all labels, or a few.
    _, X_few, _, y_few = train_test_split(X_train, y_train, test_size=N_LABELS, stratify=y_train, random_state=0)

    dim = DIMTransformer(n_components=64, random_state=0)
    start = time.perf_counter()
    dim.fit(X_train)
    seconds = time.perf_counter() - start
    features = {
        "raw pixels": StandardScaler(with_std=False).fit(X_train),
        "PCA": PCA(n_components=60, random_state=0).fit(X_train),
        "untrained encoder": clone(dim).set_params(max_epochs=0).fit(X_train),
        "Deep InfoMax": dim,
    }
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    print(f"Deep InfoMax learned from {len(X_train)} digits in {seconds:.0f} s on {dim.device_.type}.")
    print(f"Linear probe, accuracy on {len(X_test)} held-out digits:\n")
    print(f"{'':20}{len(X_train):>8} labels{N_LABELS:>8} labels")
    for name, transformer in features.items():
        Z_test = transformer.transform(X_test)
        everything = clone(probe).fit(transformer.transform(X_train), y_train).score(Z_test, y_test)
        few = clone(probe).fit(transformer.transform(X_few), y_few).score(Z_test, y_test)
        print(f"{name:20}{everything:>15.1%}{few:>15.1%}")

    pipeline = make_pipeline(dim, clone(probe)).fit(X_train, y_train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.joblib"
        joblib.dump(pipeline, path)
        loaded = joblib.load(path)
        print(f"\nThe fitted Pipeline is a joblib file of {path.stat().st_size / 1e6:.1f} MB.")
    print(f"Loaded again, it reads the first held-out digits as {loaded.predict(X_test[:10])}; they are {y_test[:10]}.")


if __name__ == "__main__":
    main()
