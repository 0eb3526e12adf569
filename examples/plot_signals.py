"""
================
Rows and signals
================

Measurements that are no images are signals of one row of pixels: channels x 1 x places. Every encoder trains on them
with one-dimensional convolutions.
"""

# %%
# Vibrations
# ----------
# Sensors along three axes of a machine, generated: four faults, each a rhythm of its own of knocks that ring down.
# When the first knock falls, how hard, and the noise are random, so that no class can be told from single places.

import matplotlib.pyplot as plt
import numpy as np

from skdim import DIMTransformer

PERIODS = [11, 13, 16, 20]


def make_vibrations(n_signals, random_state):
    """Signals (n, 3, 1, 96), float32, and labels: the period of the knocks, of four."""
    rng = np.random.default_rng(random_state)
    labels = rng.integers(len(PERIODS), size=n_signals)
    period = np.take(PERIODS, labels)[:, None]
    since_knock = (np.arange(96) + rng.uniform(0, period, (n_signals, 1))) % period
    ringing = np.exp(-since_knock / 3) * np.sin(1.5 * since_knock)
    strength = rng.uniform(0.5, 1.5, (n_signals, 3, 1))
    signals = strength * ringing[:, None] + rng.normal(0, 0.2, (n_signals, 3, 96))
    return signals[:, :, None].astype(np.float32), labels


X, y = make_vibrations(2_000, random_state=0)
X_train, y_train, X_test, y_test = X[:1_500], y[:1_500], X[1_500:], y[1_500:]

_, axes = plt.subplots(4, 1, figsize=(7, 4), sharex=True, layout="constrained")
for label, ax in enumerate(axes):
    ax.plot(X[y == label][0, :, 0].T, linewidth=1)
    ax.set_ylabel(f"fault {label}", rotation=0, ha="right")
    ax.set_yticks([])
plt.show()

# %%
# Few labels
# ----------
# Accuracy of a linear classifier with 40 labels, over draws of which signals have them. Flat rows would do as well,
# with ``image_shape=(3, 1, 96)``; of one channel ``image_shape=(1, 1, p)``.

from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

rows_train, rows_test = X_train.reshape(len(X_train), -1), X_test.reshape(len(X_test), -1)
pca = PCA(64, random_state=0).fit(rows_train)
features = {"values": (rows_train, rows_test), "PCA": (pca.transform(rows_train), pca.transform(rows_test))}
for name, max_epochs in {"untrained encoder": 0, "Deep InfoMax": 10}.items():
    dim = DIMTransformer(data_format="channels_first", max_epochs=max_epochs, random_state=0)
    features[name] = (dim.fit_transform(X_train), dim.transform(X_test))

draws = list(StratifiedShuffleSplit(n_splits=10, train_size=40, random_state=0).split(X_train, y_train))
accuracy = {}
for name, (Z_train, Z_test) in features.items():
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    accuracy[name] = [100 * probe.fit(Z_train[few], y_train[few]).score(Z_test, y_test) for few, _ in draws]
    print(f"{name:20}{np.mean(accuracy[name]):6.1f} % ± {np.std(accuracy[name]):.1f}")

# %%
# Deep InfoMax can do this for rows that are long, with what matters at any place of them. A table of a few columns,
# each of which says something of its own, is best left as it is.

_, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
ax.boxplot(list(accuracy.values()), tick_labels=list(accuracy))
ax.set(ylabel="Accuracy in percent", title=f"40 labels, {len(draws)} draws of them")
plt.show()
