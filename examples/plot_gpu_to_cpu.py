"""
==============================
Fit on a GPU, predict on a CPU
==============================

Train where the GPU is, and take the result to where there is none. A fitted transformer leaves its process as
parameters, history and weights in NumPy arrays, so a file from a GPU loads on a laptop. This example runs on a CPU
alone, too: then both sides are one.
"""

# %%
# Fit
# ---
# ``device="auto"`` is CUDA where there is one. ``precision="auto"`` trains in bfloat16 where the hardware computes it
# natively; `transform` always computes in float32.

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

X, y = load_digits(return_X_y=True)
dim = DIMTransformer(device="auto", max_epochs=5, random_state=0)
pipeline = make_pipeline(dim, StandardScaler(), LogisticRegression(max_iter=1000)).fit(X[:1500], y[:1500])
print(f"trained on {dim.device_}")

# %%
# A file of your own: joblib
# --------------------------
# joblib keeps the whole pipeline. Where there is no CUDA, the transformer loads to the CPU; where there is, it goes to
# the device that it was on, and ``to`` moves it.

import tempfile
from pathlib import Path

import joblib

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "pipeline.joblib"
joblib.dump(pipeline, path)

loaded = joblib.load(path)
loaded[0].to("cpu")
print(f"{path.stat().st_size / 1e6:.1f} MB; predicts on {loaded[0].device_}: {loaded.predict(X[1500:1510])}")

# %%
# A file for others: safetensors
# ------------------------------
# Loading a joblib file runs what it contains. ``save`` writes one file that nothing is run from, and ``load`` checks
# it.

path = Path(folder.name) / "dim.safetensors"
dim.save(path)
received = DIMTransformer.load(path, device="cpu")
folder.cleanup()

# %%
# The same embeddings
# -------------------
# On one device they are the same to the bit; between a GPU and a CPU they differ in the last digits.

import matplotlib.pyplot as plt
import numpy as np

Z_there, Z_here = dim.transform(X[1500:]), received.transform(X[1500:])
print(f"largest difference {np.abs(Z_there - Z_here).max():.1e}")

_, ax = plt.subplots(figsize=(4, 4), layout="constrained")
ax.plot(Z_there.ravel(), Z_here.ravel(), ".", markersize=2, color="#3f90da")
ax.set(xlabel=f"Embedding on {dim.device_}", ylabel=f"Embedding on {received.device_}", aspect="equal")
plt.show()
