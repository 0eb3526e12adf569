import json
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from skdim import DIMTransformer

RANKS = Path(__file__).with_name("ranks.py")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1",
}

COLOURS = np.random.default_rng(1).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)

if sys.platform == "win32":
    pytest.skip("needs fork", allow_module_level=True)

# By how many processes each is run, in this order.
SCENARIOS = {
    **{"grid": (1, 2, 4), "rows": (2, 4), "estimators": (2,), "going_on": (1, 2), "apart": (1, 2), "resumed": (2,)},
    **{"own_modules": (2,), "copies": (2,)},
    **{"failures": (2,), "stops": (2,), "whole": (2, 4), "killed": (2, 4), "taken_up": (2, 4), "killed_first": (2,)},
    **{"stalled": (2, 4), "absent": (2,)},
}
# Exit statuses of scenarios in which a process is killed.
KILLED = {
    **{("killed", 2): [0, -9], ("killed", 4): [0, -9, 0, 0], ("killed_first", 2): [-9, 0]},
    **{("stalled", 2): [0, -9], ("stalled", 4): [0, 0, 0, -9]},
}


def run(folder, scenarios):
    """Run scenarios; return a function ``load(name, size)`` that gives what each process returned."""
    names = [f"{name}:{size}" for name, sizes in scenarios.items() for size in sizes]
    command = [sys.executable, str(RANKS), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])

    def load(name, size):
        assert statuses[f"{name}:{size}"] == KILLED.get((name, size), [0] * size), done.stderr
        paths = [folder / f"{name}-{size}-{rank}.pkl" for rank in range(size)]
        return [pickle.loads(path.read_bytes()) for path in paths if path.exists()]

    return load


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), SCENARIOS)


def assert_same_bits(one, other):
    assert one["history"] == other["history"]
    assert one["state"].keys() == other["state"].keys()
    assert [name for name in one["state"] if not torch.equal(one["state"][name], other["state"][name])] == []


def losses(results):
    return torch.tensor([list(epoch.values()) for epoch in results["history"]])


def assert_equals_one_process(together, alone):
    """Compare trainings by name: all processes have the same, which is that of one process up to rounding."""
    for name, of_all in {name: [results[name] for results in together] for name in together[0]}.items():
        expected, found = alone[name], of_all[0]
        for other in of_all[1:]:
            assert_same_bits(found, other)
        np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-6)
        assert [*found["history"][0]] == [*expected["history"][0]]
        torch.testing.assert_close(losses(found), losses(expected), rtol=1e-4, atol=1e-5, msg=name)
        gradients = expected["gradients"]
        assert found["gradients"].keys() == gradients.keys()
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for weight, gradient in gradients.items():
            error = (found["gradients"][weight] - gradient).norm()
            assert error < 1e-4 * gradient.norm() + 1e-5 * total, (name, weight, error)
        for weight, values in expected["state"].items():
            error = (found["state"][weight] - values).double()
            if "optimizer" not in weight:
                # A hundredth of what Adam adds in a step; to one weight in ten thousand, whose gradient is next to 0,
                # it may add another part where sums are rounded in another order.
                differs = error.abs() >= 2e-5 + 1e-4 * values.abs().max()
                assert differs.sum() <= 1e-4 * error.numel(), (name, weight, error)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_equal_one(trained, size):
    [alone] = trained("grid", 1)
    assert_equals_one_process(trained("grid", size), alone)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_equal_one_in_all_ways(tmp_path, size):
    load = run(tmp_path, {"product": (1, size)})
    [alone] = load("product", 1)
    assert_equals_one_process(load("product", size), alone)


@pytest.mark.parametrize("size", [2, 4])
def test_each_process_reads_its_share(trained, size):
    read = trained("rows", size)
    for before, *epochs in read:
        # Its part for the statistics, and looks at the first ones.
        assert len(before) <= 64 // size + 6
        assert [len(epoch) for epoch in epochs] == [64 // size] * 2
    assert {row for before, *_ in read for row in before} == {*range(64)}
    for epoch in (1, 2):
        assert sorted(row for each in read for row in each[epoch]) == [*range(64)]
    assert read[0][1] != read[0][2]


def test_all_processes_get_the_same_estimator(trained):
    one, other = trained("estimators", 2)
    assert one["pickle"] == other["pickle"]
    assert torch.equal(one["generator"], other["generator"])
    assert np.array_equal(one["augmented"], other["augmented"])
    for results in (one, other):
        assert not results["is_initialized"]
        assert {*results["norms"]} == {"BatchNorm1d", "BatchNorm2d"}
        assert results["hooks"] == 0
        assert results["copy"]
        assert np.array_equal(pickle.loads(results["pickle"]).transform(COLOURS), results["Z"])


def test_partial_fit_and_warm_start_go_on_together(trained):
    [alone] = trained("going_on", 1)
    one, other = trained("going_on", 2)
    for expected, found, found_too in zip(alone, one, other, strict=True):
        assert_same_bits(found, found_too)
        assert len(found["history"]) == len(expected["history"])
        torch.testing.assert_close(losses(found), losses(expected), rtol=1e-3, atol=1e-4)


def test_negatives_of_a_process_alone(trained):
    [(alone, _)] = trained("apart", 1)
    (one, counted), (other, _) = trained("apart", 2)
    assert_same_bits(one, other)
    assert {*counted} == {1}
    # Other negatives, another objective.
    assert (losses(one) - losses(alone)).abs().max() > 1e-3


def test_a_resumed_training_ends_with_equal_bits(trained):
    for saved, uninterrupted, again, over in trained("resumed", 2):
        assert saved == ["epoch-000001.safetensors"]
        assert_same_bits(uninterrupted, again)
        assert_same_bits(uninterrupted, over)


@pytest.mark.parametrize(
    ("case", "kinds", "messages"),
    [
        ("parameters", ["ValueError"] * 2, [r"lr: 0.001 in process 0, 0.002 in 1\."] * 2),
        ("images", ["ValueError"] * 2, [r"images: '64 of shape .*' in process 0, '63 of shape .*' in 1\."] * 2),
        ("first images", ["ValueError"] * 2, ["first images: .* in process 0, "] * 2),
        ("callbacks", ["ValueError"] * 2, [r"callbacks: \[\] in process 0, \['AtBatch on gradients'\] in 1\."] * 2),
        ("named callbacks", ["ValueError"] * 2, [r"\['AtEpoch'\] in process 0, \['AtBatch on gradients'\]"] * 2),
        ("checkpoint_dir", ["ValueError"] * 2, ["training: '2 epochs.*without .*' in process 0, '.* with "] * 2),
        ("method", ["ValueError"] * 2, ["training: '1 epochs, constant, .* '1 epochs, one_cycle, "] * 2),
        (
            "validation",
            ["RuntimeError", "ValueError"],
            ["process 1 has failed with ValueError: .*NaN", "^Input X .*NaN"],
        ),
        ("callback", ["RuntimeError", "Boom"], ["Process 0 of 2 .* process 1 has failed with Boom: mine", "^mine$"]),
        ("step", ["RuntimeError", "Boom"], ["Process 0 of 2 .* process 1 has failed with Boom: mine", "^mine$"]),
        (
            "directory",
            ["FileExistsError", "RuntimeError"],
            ["checkpoint_dir=", "process 0 has failed .*checkpoint_dir="],
        ),
        ("loader", ["ValueError"] * 2, ["pass its dataset"] * 2),
        ("compile", ["ValueError"] * 2, ["needs compile=False"] * 2),
        ("batch_size", ["ValueError"] * 2, ["2 processes needs 4 images .* got batch_size=3 and 64 images"] * 2),
        ("few", ["ValueError"] * 2, ["2 processes needs 4 images .* got batch_size=32 and 3 images"] * 2),
    ],
)
def test_an_error_of_one_process_is_one_of_all(trained, case, kinds, messages):
    for found, kind, message in zip(trained("failures", 2), kinds, messages, strict=True):
        assert found[case][0] == kind
        assert re.search(message, found[case][1], flags=re.DOTALL), found[case]
        assert not found["fitted"]
        assert found["after"] is None


def test_all_processes_get_the_same_weights_and_buffers_of_modules_of_ones_own(trained):
    first, second = trained("own_modules", 2)
    for name, results in first.items():
        assert_same_bits(results, second[name])


def test_copies_of_a_model_know_nothing_of_other_processes(trained):
    (first, error), (second, other_error) = trained("copies", 2)
    assert error is None
    assert other_error is None
    assert_same_bits(first, second)


def test_an_error_is_told_by_a_process_that_lives_on(tmp_path):
    # In processes that have imported nothing before.
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import os, sys
            import numpy as np
            from skorch.callbacks import Callback
            from skdim import DIMTransformer

            rank = int(os.environ["RANK"])

            class Boom(Callback):
                def on_grad_computed(self, net, **kwargs):
                    if rank == 1:
                        raise ValueError("mine")

            X = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
            dim = DIMTransformer(8, mi_units=8, batch_size=32, distributed=True, device="cpu", callbacks=[Boom()])
            try:
                dim.fit(X)
            except (ValueError, RuntimeError) as error:
                print(error, flush=True)
            if rank == 1:
                sys.stdin.read()
        """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen([sys.executable, script], env=ENVIRONMENT | launched | {"RANK": rank}, **pipes)
        for rank in ("0", "1")
    )
    try:
        # The second one only ends when it is let.
        told, _ = first.communicate(timeout=120)
        assert second.poll() is None
        assert "process 1 has failed with ValueError: mine" in told
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_stop_in_one_process_is_one_in_all(trained):
    assert trained("stops", 2) == [2, 2]


@pytest.mark.parametrize(
    ("name", "size", "rank", "limit"),
    [
        ("killed", 2, 1, 10),
        ("killed", 4, 1, 10),
        ("killed_first", 2, 0, 15),
        ("stalled", 2, 1, 12),
        ("stalled", 4, 3, 12),
    ],
)
def test_a_process_that_is_lost_ends_the_others(trained, name, size, rank, limit):
    outcomes = trained(name, size)
    assert len(outcomes) == size - 1
    left = [other for other in range(size) if other != rank]
    for other, ((kind, message), seconds, is_fitted) in zip(left, outcomes, strict=True):
        assert kind == "RuntimeError"
        assert message.startswith(f"Process {other} of {size} cannot train on: ")
        # Where the first one kept the addresses of all, nobody can be asked.
        named = f"process {rank} was killed, has stalled or cannot be reached"
        assert (named if rank else "process 0") in message
        assert seconds < limit
        assert not is_fitted


@pytest.mark.parametrize("size", [2, 4])
def test_a_training_with_a_killed_process_is_taken_up(trained, size):
    trained("killed", size)
    for (seen, found), uninterrupted in zip(trained("taken_up", size), trained("whole", size), strict=True):
        assert seen == [3, 4]
        assert_same_bits(found, uninterrupted)


def test_a_process_that_does_not_come_is_not_waited_for_any_longer(trained):
    (kind, message), _ = trained("absent", 2)
    assert kind == "RuntimeError"
    assert "waits for 2 processes, and not all of them have come to train within 2 seconds" in message


def test_without_a_launcher_it_is_an_error(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"distributed=True needs .*torchrun.* RANK, WORLD_SIZE, MASTER_ADDR"):
        DIMTransformer(distributed=True).fit(COLOURS)


def test_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import os
            import joblib
            from sklearn.datasets import load_digits
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
            from skdim import DIMTransformer

            X, _ = load_digits(return_X_y=True)
            dim = DIMTransformer(8, mi_units=8, max_epochs=1, precision="float32", distributed=True, random_state=0)
            pipeline = make_pipeline(dim, StandardScaler()).fit(X[:200])
            joblib.dump(pipeline, os.environ["RANK"] + ".joblib")
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    X, _ = load_digits(return_X_y=True)
    alone = DIMTransformer(8, mi_units=8, max_epochs=1, precision="float32", device="cpu", random_state=0).fit(X[:200])
    one, other = (joblib.load(tmp_path / f"{rank}.joblib") for rank in range(2))
    assert np.array_equal(one.transform(X), other.transform(X))
    assert one[0].history_ == other[0].history_
    np.testing.assert_allclose(one[0].loss_curve_, alone.loss_curve_, rtol=1e-4)
