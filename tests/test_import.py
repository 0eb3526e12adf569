import subprocess
import sys


def test_the_import_loads_no_optional_package_and_little_else():
    # What these load is theirs. pandas, which scikit-learn imports where it is installed, is hidden: skdim is not to.
    code = """
import sys
sys.modules["pandas"] = None
import joblib, numpy, scipy, sklearn, skorch, torch, tqdm
before = set(sys.modules)
import skdim
packages = {name.partition(".")[0] for name in before} | sys.stdlib_module_names
more = [name for name in sys.modules.keys() - before if name.partition(".")[0] != "skdim"]
print(*{name.partition(".")[0] for name in more} - packages)
print(*more)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    packages, modules = map(str.split, output.splitlines())
    assert packages == ["safetensors"]
    # Time goes by modules. They are three; a part of torch, scikit-learn or SciPy that none of these needs brings 30.
    assert len(modules) < 15, modules
