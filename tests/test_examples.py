import re
import subprocess
import sys
from pathlib import Path

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
