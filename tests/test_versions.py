from importlib.metadata import version
from importlib.resources import files

import torch

import skdim


def test_a_report_of_a_fault_names_versions_and_devices(capsys):
    skdim.show_versions()
    report = capsys.readouterr().out
    assert f"skdim: {skdim.__version__}" in report
    assert f"torch: {version('torch')}" in report
    assert f"cpu: {torch.get_num_threads()} threads" in report


def test_types_are_announced_to_type_checkers():
    assert (files("skdim") / "py.typed").is_file()
