"""What a report of a fault needs to name."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from skdim._version import __version__

__all__ = ["show_versions"]

DEPENDENCIES = (
    *("torch", "scikit-learn", "skorch", "numpy", "scipy", "joblib", "safetensors", "tqdm"),
    *("pillow", "matplotlib", "pandas", "polars"),
)


def show_versions() -> None:
    """Print the versions of skdim and of what it stands on, and the devices: for reports of faults.

    Examples
    --------
    >>> import skdim
    >>> skdim.show_versions()  # doctest: +SKIP
    """
    print("System")
    _show({"python": sys.version.replace("\n", ""), "machine": platform.platform()})
    print("\nPackages")
    _show({"skdim": __version__} | {name: _installed(name) for name in DEPENDENCIES})
    print("\nDevices")
    _show({"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"})
    _show({f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _show(lines: dict[str, str]) -> None:
    for name, value in lines.items():
        print(f"{name:>15}: {value}")
