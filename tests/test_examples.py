import importlib
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn import datasets, feature_extraction

from skdim import DIMTransformer
from skdim.evaluation import retrieval_scorer
from skdim.model import MAX_PAIR_ELEMENTS

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart_beats_pixels_pca_and_the_untrained_encoder_with_few_labels():
    output = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")], check=True, capture_output=True, text=True
    ).stdout
    few = {name: float(percent) for name, percent in re.findall(r"^(\S.*?) +\d+ +[\d.]+% +([\d.]+)%$", output, re.M)}
    assert len(few) == 6
    embedding, hidden = few.pop("Deep InfoMax"), few.pop("Deep InfoMax, hidden layer")
    assert embedding > max(few.values())
    assert hidden > max(few.values())
    assert "joblib file" in output


def test_rows_of_a_table_train(capsys):
    with warnings.catch_warnings():
        # Of the probe, which is scikit-learn's.
        warnings.simplefilter("ignore", FutureWarning)
        runpy.run_path(str(EXAMPLES / "tabular.py"), run_name="__main__")
    accuracies = {
        name.strip(): float(value)
        for name, value in re.findall(r"^(.{24}) *([\d.]+)% ±", capsys.readouterr().out, re.M)
    }
    assert len(accuracies) == 4
    assert accuracies["Deep InfoMax, 8"] > accuracies["untrained encoder, 8"] > 62.7  # the larger class


def test_optuna_finds_no_worse_than_the_defaults(monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.setattr(sys, "argv", ["optuna_search.py", "--n-trials", "2", "--max-epochs", "1"])
    runpy.run_path(str(EXAMPLES / "optuna_search.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "2 trials, 0 of them given up: 2 epochs instead of 2." in output
    scores = dict(re.findall(r"^(defaults|found) .* ([\d.]+) +[\d.]+%$", output, re.M))
    assert float(scores["found"]) >= float(scores["defaults"]) > 0


def test_a_trial_that_is_given_up_leaves_nothing_broken(digits):
    optuna = pytest.importorskip("optuna")
    Pruning = runpy.run_path(str(EXAMPLES / "optuna_search.py"))["Pruning"]
    X = digits[0]
    params = {"max_epochs": 2, "random_state": 0}

    def score(dim):
        return retrieval_scorer(dim, X)

    def train(study, dim):
        trial = study.ask()
        dim.set_params(callbacks=[Pruning(trial, lambda: score(dim))]).fit(X)
        return trial

    # No score is as high, so that the first one ends the trial.
    strict = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(lower=2))
    dim = DIMTransformer(**params)
    with pytest.raises(optuna.TrialPruned):
        train(strict, dim)
    assert list(strict.trials[0].intermediate_values) == [1]
    assert not hasattr(dim, "encoder_")
    trial = train(optuna.create_study(pruner=optuna.pruners.NopPruner()), dim)
    # What was reported of the last epoch is the score of what came out, and nobody has looked on.
    assert trial.study.trials[0].intermediate_values[2] == score(dim)
    assert np.array_equal(dim.transform(X), DIMTransformer(**params).fit(X).transform(X))

    fitted = dim.transform(X)
    with pytest.raises(optuna.TrialPruned):
        train(strict, dim.set_params(warm_start=True))
    assert np.array_equal(dim.transform(X), fitted)


def test_the_readmes_picture_is_drawn(digits, monkeypatch, tmp_path):
    patches = feature_extraction.image.extract_patches_2d

    def few_patches(*args, max_patches, **kwargs):
        return patches(*args, max_patches=min(max_patches, 60), **kwargs)

    monkeypatch.setattr(datasets, "load_digits", lambda return_X_y: digits)
    monkeypatch.setattr(feature_extraction.image, "extract_patches_2d", few_patches)
    monkeypatch.setattr(sys, "argv", ["readme_picture.py", str(tmp_path / "learned.png")])
    runpy.run_path(str(EXAMPLES / "readme_picture.py"), run_name="__main__")
    plt.close("all")
    height, width, _ = plt.imread(tmp_path / "learned.png").shape
    assert (height, width) == (350, 840)


def test_the_page_on_probes_takes_cifar10(monkeypatch):
    shown = []
    monkeypatch.syspath_prepend(EXAMPLES)
    cifar10 = importlib.import_module("benchmarks.cifar10")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8), np.arange(120) % 10
    monkeypatch.setattr(cifar10, "load_cifar10", lambda path: (images, labels, f"images of {path}"))
    monkeypatch.setattr(cifar10, "N_TEST", 40)
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gca().get_title()))
    monkeypatch.setattr(sys, "argv", ["plot_cifar10.py", "cifar10.npz"])
    names = runpy.run_path(str(EXAMPLES / "plot_cifar10.py"), run_name="__main__")
    plt.close("all")
    assert shown == ["Linear probe on 40 held-out images, images of cifar10.npz"]
    assert names["dim"].n_iter_ == 20
    assert len(names["X_train"]) == 80


def test_scaling_counts_the_network_and_prints_the_rows_of_its_page(monkeypatch, capsys):
    benchmarks = EXAMPLES / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    # The script sets it: what it was comes back.
    monkeypatch.setitem(MAX_PAIR_ELEMENTS, "cpu", MAX_PAIR_ELEMENTS["cpu"])
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--sizes", "32", "--n-images", "128", "--price", "3600"])
    runpy.run_path(str(benchmarks / "scaling.py"), run_name="__main__")
    output = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in output.splitlines())}
    # Twice the multiply-adds of the paper's network, its convolutions 32 -> 16 -> 8 -> 4 and two linear layers.
    encoder = 16 * (3 * 64 * 16**2 + 64 * 128 * 8**2 + 128 * 256 * 4**2) + 4096 * 1024 + 1024 * 64
    assert rows["GFLOP an image, transform"] == [f"{2 * encoder / 1e9:.4f}"]
    # Forward, and backward to both sides: 64 locations, 256 units.
    assert rows["MFLOP an image, training, for each image of its batch"] == [f"{6 * 64 * 256 / 1e6:.3f}"]
    # Half of the weights twice, four bytes each.
    n_weights = 1e6 * float(rows["million weights in training"][0])
    assert float(rows["gradients"][0]) == pytest.approx(4 * n_weights / 1e6, rel=0.01)
    # The page has the rows that the script prints. Their figures depend on the machine, but for those of the bytes.
    page = (benchmarks / "SCALING.md").read_text().splitlines()
    tables = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(tables) > 30
    assert {line.split(" | ")[0] for line in tables} <= {line.split(" | ")[0] for line in page}
    sent = [
        line for line in tables if line.split(" | ")[0][2:] in {"gradients", "embeddings", "reductions", "statistics"}
    ]
    assert len(sent) == 4
    assert set(sent) <= set(page)


@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("plot_*.py")), ids=lambda path: path.stem)
def test_a_page_of_the_gallery_runs_without_warnings_and_plots(path, monkeypatch, tmp_path):
    shown = []

    def show():
        shown.extend(plt.get_fignums())
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert shown
    assert not plt.get_fignums()
    assert not list(tmp_path.iterdir())
