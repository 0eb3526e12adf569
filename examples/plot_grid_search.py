"""
=======================================
Grid search over the three loss weights
=======================================

The loss has three terms: local mutual information, global mutual information and the match to the prior, weighted by
``local_weight``, ``global_weight`` and ``prior_weight`` (the paper's beta, alpha and gamma). They are parameters like
any other, so `GridSearchCV` searches over them.
"""

# %%
# Search
# ------
# Each combination is judged by what a classifier behind the transformer makes of the features. A weight of 0 builds
# and computes nothing of its term. Short trainings on few images tell the weights apart well enough here; on one GPU
# leave ``n_jobs=1``, on many cores use more.

import warnings

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

X, y = load_digits(return_X_y=True)
pipeline = Pipeline(
    [
        ("dim", DIMTransformer(max_epochs=3, batch_size=64, random_state=0)),
        ("scale", StandardScaler()),
        ("classify", LogisticRegression(C=0.1, max_iter=500)),
    ]
)
grid = {
    "dim__local_weight": [0.0, 0.5, 1.0],
    "dim__global_weight": [0.0, 0.5, 1.0],
    "dim__prior_weight": [0.1, 1.0],
}
# The prior alone learns nothing about the images, which a warning says. Here it is the control.
warnings.filterwarnings("ignore", message=".* the prior alone is trained for")
search = GridSearchCV(pipeline, grid, cv=2, refit=False).fit(X[:300], y[:300])
print(search.best_params_)

# %%
# Heat map
# --------
# One map for each weight of the prior. Where both kinds of mutual information have a weight of 0, only the prior is
# left: that corner is the control.

import matplotlib.pyplot as plt
import numpy as np

accuracy = {
    (p["dim__prior_weight"], p["dim__local_weight"], p["dim__global_weight"]): 100 * score
    for p, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
}
locals_, globals_, priors = (grid[f"dim__{name}_weight"] for name in ("local", "global", "prior"))

figure, axes = plt.subplots(1, len(priors), figsize=(8, 3.6), layout="constrained", sharey=True)
for ax, prior in zip(axes, priors, strict=True):
    values = np.array([[accuracy[prior, local, global_] for global_ in globals_] for local in locals_])
    drawn = ax.imshow(values, vmin=min(accuracy.values()), vmax=max(accuracy.values()), cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        dark = value < (min(accuracy.values()) + max(accuracy.values())) / 2
        ax.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    ax.set(title=f"prior_weight={prior}", xlabel="global_weight")
    ax.set_xticks(range(len(globals_)), globals_)
    ax.set_yticks(range(len(locals_)), locals_)
axes[0].set_ylabel("local_weight")
figure.colorbar(drawn, ax=axes, label="Accuracy in percent")
plt.show()
