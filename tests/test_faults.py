import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are tried in forked children")

LAST_WHOLE = ["epoch-000002.safetensors", "epoch-000003.safetensors"]


def run(folder, *scenarios):
    script = Path(__file__).with_name("faults.py")
    # One thread, because a fork has none of its parent's.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *scenarios], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("faults"), "kill=12", "size_limit", "read_only", "errors")


def check_survival(counts, n_kills, counted):
    assert counts["kills"] >= n_kills
    assert counts["resumed"] > 0
    counted("kills survived", counts["kills"])
    counted("killed trainings ended bit-equal", counts["trainings"])


def test_killed_trainings_go_on_to_equal_bits(results, counted):
    check_survival(results["kill"], 12, counted)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, counted):
    counts = run(tmp_path, "kill=100")["kill"]
    check_survival(counts, 100, counted)
    # Some of them in the midst of writing.
    assert counts["left_overs"] > 0


def test_no_room_for_checkpoints_does_not_end_training(results, counted):
    assert results["size_limit"] == {"names": LAST_WHOLE, "resumed": True}
    counted("disks full")


@pytest.mark.slow
def test_a_full_disk_does_not_end_training(tmp_path, counted):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mounted)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system")
    try:
        result = run(tmp_path, f"full_disk={mounted}")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert result["full_disk"] == {"names": LAST_WHOLE, "resumed": True}
    counted("disks full")


def test_a_directory_that_is_read_only_is_refused_before_training(results, counted):
    assert results["read_only"] == {"refused": True}
    counted("read-only directories refused", 2)


def test_errors_and_interrupts_take_nothing_away(results, counted):
    assert results["errors"] == ["interrupt", "callback", "memory", "weight", "lr"]
    counted("trainings broken off by errors", len(results["errors"]))
