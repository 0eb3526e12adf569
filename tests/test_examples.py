import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
