import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline, Pipeline
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from skdim import DIMTransformer


@parametrize_with_checks([DIMTransformer()])
def test_estimator_checks(estimator, check, monkeypatch):
    check(estimator)
