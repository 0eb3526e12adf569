import subprocess
import sys


def test_the_import_loads_no_optional_package():
    # What these load is theirs: where pandas is installed scikit-learn imports it.
    code = """
import sys, joblib, numpy, scipy, sklearn, skorch, torch, tqdm
before = {name.partition(".")[0] for name in sys.modules}
import skdim
after = {name.partition(".")[0] for name in sys.modules}
print(*after - before - sys.stdlib_module_names)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(output.split()) == {"safetensors", "skdim"}
