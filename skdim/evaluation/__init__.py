"""Honest figures for a representation: probes, scorers, information bounds, reconstructions and fine-tuning.

Whatever is chosen or trained here is chosen and trained on training samples or on a split of them; held-out samples
only yield the figure.
"""

from skdim.evaluation.finetuning import FineTunedClassifier
from skdim.evaluation.information import mutual_information_bound, total_correlation_bound
from skdim.evaluation.linear import LinearProbe
from skdim.evaluation.probes import MLPProbe, knn_probe
from skdim.evaluation.reconstruction import ms_ssim, reconstruction_ms_ssim
from skdim.evaluation.scorers import knn_scorer, linear_probe_scorer, retrieval_scorer
from skdim.evaluation.table import evaluate

__all__ = [
    "FineTunedClassifier",
    "LinearProbe",
    "MLPProbe",
    "evaluate",
    "knn_probe",
    "knn_scorer",
    "linear_probe_scorer",
    "ms_ssim",
    "mutual_information_bound",
    "reconstruction_ms_ssim",
    "retrieval_scorer",
    "total_correlation_bound",
]
