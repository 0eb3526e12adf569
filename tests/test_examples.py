import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart_beats_pixels_pca_and_the_untrained_encoder():
    output = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py")], check=True, capture_output=True, text=True
    ).stdout
    few = {name: float(percent) for name, percent in re.findall(r"^([A-Za-z ]+?) +[\d.]+% +([\d.]+)%$", output, re.M)}
    assert few.keys() == {"raw pixels", "PCA", "untrained encoder", "Deep InfoMax"}
    assert few["Deep InfoMax"] > max(value for name, value in few.items() if name != "Deep InfoMax")
    assert "joblib file" in output
