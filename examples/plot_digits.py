"""
======================
Digits: a first course
======================

Deep InfoMax learns features from images without their labels. Here it learns from scikit-learn's handwritten digits,
and a linear classifier on its features then learns what the digits are called.
"""

# %%
# Learn features
# --------------
# A row of 64 values is a perfect square, so it is taken as a grey image of 8 x 8 pixels. No label goes into ``fit``.

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skdim import DIMTransformer

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=500, stratify=y, random_state=0)

dim = DIMTransformer(n_components=64, mi_estimator="jsd", lr=5e-4, max_epochs=10, random_state=0)
Z_train = dim.fit_transform(X_train)
print(Z_train.shape, Z_train.dtype)

# %%
# How training went
# -----------------
# Every term of the loss is in ``history_``, epoch by epoch. The local term falls as the encoder learns to tell which
# patches belong to which image. The prior term is a game of two networks, so it need not fall.

import matplotlib.pyplot as plt

from skdim.displays import EmbeddingDisplay, TrainingCurveDisplay

TrainingCurveDisplay.from_estimator(dim)
plt.show()

# %%
# What was learned
# ----------------
# In two dimensions, images of the same digit lie together, although the labels come in only now, as colours.

EmbeddingDisplay.from_estimator(dim, X_test, y_test, projection="tsne", n_thumbnails=40, random_state=0)
plt.show()

# %%
# In a Pipeline
# -------------
# The transformer stands in front of any classifier. ``output_layer="hidden"`` hands on the layer of 1024 units before
# the embedding, which is better for linear classifiers where there are many labels.

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pipeline = make_pipeline(
    dim.set_params(output_layer="hidden"), StandardScaler(), LogisticRegression(C=0.01, max_iter=500)
)
pipeline.fit(X_train, y_train)
print(f"Accuracy on {len(X_test)} held-out digits: {pipeline.score(X_test, y_test):.1%}")

# %%
# The pipeline is an ordinary estimator: it can be searched over, cross-validated and kept in a joblib file.

pipeline
