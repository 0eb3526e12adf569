"""Rows of a table: Deep InfoMax on measurements that are no images.

    python examples/tabular.py

The breast cancer data has ten measurements of cell nuclei, each as mean, standard error and worst value: a signal of
three channels and ten places, image_shape=(3, 1, 10). Rows in no such order are signals of one channel, and need no
image_shape unless their width is a perfect square. Every encoder trains on them with one-dimensional convolutions.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

N_LABELS = 20
N_DRAWS = 20


def accuracy(features, X_train, y_train, X_test, y_test):
    """Mean accuracy with few labels, over draws of them."""
    Z_train, Z_test = features.transform(X_train), features.transform(X_test)
    accuracies = []
    for seed in range(N_DRAWS):
        Z_few, _, y_few, _ = train_test_split(
            Z_train, y_train, train_size=N_LABELS, stratify=y_train, random_state=seed
        )
        search = GridSearchCV(LogisticRegression(max_iter=500), {"C": np.logspace(-4, 4, 10)}, cv=3)
        probe = make_pipeline(StandardScaler(), search)
        accuracies.append(probe.fit(Z_few, y_few).score(Z_test, y_test))
    return np.mean(accuracies), np.std(accuracies)


def main():
    X, y = load_breast_cancer(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    # The columns have different units; Deep InfoMax scales channels as a whole.
    pipelines = {
        "columns": make_pipeline(StandardScaler()),
        "PCA, 8": make_pipeline(StandardScaler(), PCA(8, random_state=0)),
    }
    for name, max_epochs in (("untrained encoder", 0), ("Deep InfoMax", 60)):
        dim = DIMTransformer(8, image_shape=(3, 1, 10), max_epochs=max_epochs, batch_size=64, random_state=0)
        pipelines[f"{name}, 8"] = make_pipeline(StandardScaler(), dim)
    print(f"Accuracy with {N_LABELS} labels on {len(X_test)} held-out samples, mean and spread over {N_DRAWS} draws:")
    for name, pipeline in pipelines.items():
        mean, spread = accuracy(pipeline.fit(X_train), X_train, y_train, X_test, y_test)
        print(f"{name:24}{mean:7.1%} ± {spread:.1%}")


if __name__ == "__main__":
    main()
