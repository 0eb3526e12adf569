import functools
import importlib
import io
import re
import warnings
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from skorch.callbacks import Callback

from skdim import DIMTransformer
from skdim.evaluation import LinearProbe, MLPProbe

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def benchmark(monkeypatch, colour_images):
    """Import a script of the benchmarks, with a few images in the place of CIFAR-10."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples" / "benchmarks")

    def load(name):
        module = importlib.import_module(name)
        if hasattr(module, "load_cifar10"):
            images = colour_images[0].transpose(0, 2, 3, 1)
            monkeypatch.setattr(module, "load_cifar10", lambda path: (images, colour_images[1], "colours"))
            monkeypatch.setattr(module, "N_TEST", 20)
        return module

    return load


@pytest.fixture
def paper_tables(benchmark):
    return benchmark("paper_tables")


@pytest.fixture
def fits(monkeypatch):
    """List what transformers and probes are fitted on: their names, X and y."""
    calls = []

    def recorded(fit):
        def call(self, X, y=None):
            calls.append((type(self).__name__, np.array(X), y))
            return fit(self, X, y)

        return call

    for each in (DIMTransformer, LinearProbe, MLPProbe, PCA):
        monkeypatch.setattr(each, "fit", recorded(each.fit))
    return calls


def test_the_papers_tables_are_built_in_pieces_and_keep_its_figures_apart(paper_tables, tmp_path, capsys):
    path = tmp_path / "results.csv"
    command = ["images", "--csv", str(path), "--budget", "1ep", "--set", "n_components=4", "--rows", "DIM(L) InfoNCE"]
    paper_tables.main([*command, "--seeds", "0"])
    first = path.read_text()
    paper_tables.main([*command, "--seeds", "0", "1"])
    assert path.read_text().startswith(first)
    results = paper_tables.read_results(path)
    assert [result["seed"] for result in results] == ["0", "1"]
    assert all(result["epochs"] == "1" and result["machine"] and "torch" in result["versions"] for result in results)
    # Another budget is another measurement; seconds are turned into at least one epoch.
    paper_tables.main([*command, "--budget", "1s"])
    assert len(paper_tables.read_results(path)) == 3
    capsys.readouterr()
    paper_tables.main(["--print", "--csv", str(path)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.removeprefix("DIM(L) InfoNCE").split() for line in lines if line.endswith("69.13")]
    (numbers,) = [row for row in rows if row[1] == "2"]  # seeds
    ours = [f"{100 * np.mean([float(r[f'mlp_{layer}']) for r in results]):.2f}" for layer in paper_tables.LAYERS]
    assert [number for number in numbers if number in ours] == ours
    assert numbers[-3:] == ["75.21", "75.57", "69.13"]


def test_the_papers_tables_fit_nothing_on_held_out_images(paper_tables, colour_images, fits, monkeypatch, tmp_path):
    images, labels = colour_images[0].transpose(0, 2, 3, 1), colour_images[1]
    given = []
    for name in ("reconstruction_ms_ssim", "mutual_information_bound", "total_correlation_bound"):
        monkeypatch.setattr(paper_tables, name, lambda *args, **kwargs: given.append(args) or 0.5)
    command = ["images", "--csv", str(tmp_path / "results.csv"), "--budget", "1ep", "--set", "n_components=4"]
    paper_tables.main([*command, "--rows", "DIM(L) InfoNCE", "--information"])
    # 20 of 60 images are held out.
    (name, X, y), *probes = fits
    assert name == "DIMTransformer"
    assert np.array_equal(X, images[:40])
    assert y is None
    assert [name for name, *_ in probes] == ["LinearProbe", "MLPProbe", "LinearProbe"] * 3
    for _, Z, y in probes:
        assert len(Z) == 40
        assert np.array_equal(y, labels[:40])
    (_, X_train, X_test), (X_bound, Z_bound), (Z_correlation,) = given
    assert np.array_equal(X_train, images[:40])
    assert np.array_equal(X_test, images[40:])
    assert np.array_equal(X_bound, images[40:])
    assert Z_bound is Z_correlation
    assert Z_bound.shape == (20, 4)


class Interrupting(Callback):
    """Sees epochs, and breaks training off at the end of one."""

    def __init__(self, epoch):
        self.epoch, self.seen = epoch, []

    def on_epoch_end(self, net, **kwargs):
        self.seen.append(len(net.history))
        if len(net.history) == self.epoch:
            raise KeyboardInterrupt


def test_the_training_of_a_row_goes_on_after_an_interruption(paper_tables, tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    command = ["images", "--csv", str(path), "--budget", "3ep", "--set", "n_components=4", "--rows", "DIM(L) InfoNCE"]
    checkpoints = ["--checkpoints", str(tmp_path / "checkpoints")]
    paper_tables.main(command)
    (uninterrupted,) = paper_tables.read_results(path)
    path.unlink()

    interrupting = Interrupting(2)
    transformer = functools.partial(DIMTransformer, callbacks=[interrupting])
    monkeypatch.setattr(paper_tables, "DIMTransformer", transformer)
    with pytest.raises(KeyboardInterrupt):
        paper_tables.main([*command, *checkpoints])
    assert interrupting.seen == [1, 2]
    transformer.keywords["callbacks"] = [resuming := Interrupting(None)]
    paper_tables.main([*command, *checkpoints])
    assert resuming.seen == [2, 3]
    (resumed,) = paper_tables.read_results(path)
    times = {"training_seconds", "evaluation_seconds"}
    assert {field: resumed[field] for field in resumed.keys() - times} == {
        field: uninterrupted[field] for field in resumed.keys() - times
    }
    assert float(resumed["training_seconds"]) > 0

    with pytest.raises(SystemExit):
        paper_tables.main(["images", "--budget", "3s", *checkpoints])


@pytest.mark.parametrize("taken", ["mi_estimator=jsd", "max_epochs=5", "random_state=3"])
def test_what_a_row_stands_for_cannot_be_set(paper_tables, tmp_path, capsys, taken):
    command = ["images", "--csv", str(tmp_path / "results.csv"), "--budget", "1ep", "--rows", "DIM(L) InfoNCE"]
    with pytest.raises(SystemExit):
        paper_tables.main([*command, "--set", "n_components=4", taken])
    assert f"--set cannot change {taken.split('=')[0]}: " in capsys.readouterr().err


def test_no_figure_of_the_paper_is_stored_as_ours(paper_tables, tmp_path):
    assert not [field for field in paper_tables.FIELDS if "paper" in field]
    for paper in (paper_tables.PAPER_MLP, paper_tables.PAPER_SVM, paper_tables.PAPER_INFORMATION):
        assert set(paper) <= set(paper_tables.ROWS)


def test_choices_train_for_the_seconds_that_were_timed(benchmark, monkeypatch, tmp_path, capsys):
    choices = benchmark("choices")
    monkeypatch.setattr(choices, "N_TRAIN", 30)
    monkeypatch.setattr(choices, "N_VALIDATION", 10)
    monkeypatch.setattr(choices, "N_TIMED", 20)
    files = ["--csv", str(tmp_path / "results.csv"), "--times", str(tmp_path / "times.csv")]
    command = ["images", *files, "--groups", "default", "task"]
    choices.main([*command, "--time"])
    # A row that is too slow for one epoch trains on a part of the images.
    times = choices.read_results(tmp_path / "times.csv")
    assert len(times) == 4
    for row, seconds in zip(times, ("0.5", "1", "1.5", "4"), strict=True):
        row["epoch_seconds"] = seconds
    (tmp_path / "times.csv").unlink()
    for row in times:
        choices.append_result(tmp_path / "times.csv", row)
    trained = []

    class Recorded(choices.DIMTransformer):
        def fit(self, X, y=None):
            trained.append((self.max_epochs, len(X)))
            return super().fit(X)

    monkeypatch.setattr(choices, "DIMTransformer", Recorded)
    with warnings.catch_warnings():
        # Of the probe's solver, which such few images are too few for.
        warnings.simplefilter("ignore")
        choices.main([*command, "--seconds", "2", "--seeds", "0", "1"])
        choices.main([*command, "--seconds", "2", "--seeds", "0", "1"])  # is there already
    results = choices.read_results(tmp_path / "results.csv")
    assert [row["epochs"] for row in results] == ["4.0", "2.0", "1.33", "0.5"] * 2
    # Epochs, and their images: as many as take the seconds, whatever an epoch of all 30 takes.
    assert trained == [(4, 30), (2, 30), (1, 40), (1, 15)] * 2
    capsys.readouterr()
    choices.main(["--print", *files])
    lines = [line for line in capsys.readouterr().out.splitlines() if " ± " in line]
    assert len(lines) == 4
    mean = np.mean([100 * float(row["hidden"]) for row in results if row["params"] == "{}"])
    assert f" {mean:.1f} ± " in lines[0]


def jpeg_bytes(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def cifar10_file(tmp_path):
    """Write a file as that of CIFAR-10, with the labels of its 120 images, which their colour tells."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120).astype(np.uint8)
    images = rng.integers(0, 100, (120, 32, 32, 3), dtype=np.uint8)
    images[np.arange(120), :, :, labels] += 100
    files = [jpeg_bytes(image) for image in images]
    path = tmp_path / "images.npz"
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), ends=np.cumsum([*map(len, files)]), labels=labels)
    return str(path), labels


LAYER_ROWS = [("embedding", 4), ("hidden", 1024), ("features", 4096)]


@pytest.mark.filterwarnings("ignore")  # Of the probe's solver, which such few images are too few for.
@pytest.mark.parametrize(
    ("options", "n_train", "held_out"),
    [
        ([], 100, slice(100, 120)),
        (["--only-trained", "--n-train", "30"], 30, slice(100, 120)),
        (["--only-trained", "--validation"], 80, slice(80, 100)),
    ],
)
def test_the_linear_probe_is_fitted_on_training_images(
    benchmark, cifar10_file, fits, monkeypatch, capsys, options, n_train, held_out
):
    path, labels = cifar10_file
    cifar10_probe = benchmark("cifar10_probe")
    load_cifar10 = importlib.import_module("cifar10").load_cifar10
    monkeypatch.setattr(cifar10_probe, "load_cifar10", load_cifar10)
    scored = []
    score = LinearProbe.score

    def recorded(self, Z, y):
        scored.append((y, score(self, Z, y)))
        return scored[-1][1]

    monkeypatch.setattr(LinearProbe, "score", recorded)
    cifar10_probe.main([path, *options, "--max-epochs", "1", "--n-components", "4", "--mi-units", "8"])

    images, read, data = load_cifar10(path)
    assert data.startswith("images.npz ")  # not the copy of CIFAR-10 that figures are of
    assert images.shape == (120, 32, 32, 3)
    assert np.array_equal(read, labels)
    assert np.array_equal(images.mean((1, 2)).argmax(1), labels)
    for name, X, y in fits:
        assert len(X) == n_train
        if name == "DIMTransformer":
            assert np.array_equal(X, images[:n_train])
        elif name == "PCA":
            assert np.array_equal(X, images[:n_train].reshape(n_train, -1).astype(np.float32) / 255)
        assert np.array_equal(y, labels[:n_train]) if name == "LinearProbe" else y is None
    assert all(np.array_equal(y, labels[held_out]) for y, _ in scored)

    encoders = ["Deep InfoMax"] if "--only-trained" in options else ["Deep InfoMax", "untrained encoder"]
    expected = [(f"{name}, {layer}", width) for name in encoders for layer, width in LAYER_ROWS]
    if len(encoders) == 2:
        expected = [("raw pixels", 3072), ("PCA", 64), *expected]
    lines = capsys.readouterr().out.partition("accuracy")[2].splitlines()[1:]
    for line, (name, width), (_, accuracy) in zip(lines, expected, scored, strict=True):
        assert re.fullmatch(rf"{name} +{width} +{accuracy:.1%} +\d*", line)


@pytest.mark.parametrize("name", ["choices", "paper_tables"])
def test_the_guide_has_the_table_that_is_printed(benchmark, capsys, name):
    script = benchmark(name)
    script.main(["--print"])
    assert (script.RESULTS / f"{name}.txt").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("letter", ["a", "b", "c", "d", "e"])
def test_throughput_compares_each_baseline_with_skdim(benchmark, capsys, letter):
    throughput = benchmark("throughput")
    throughput.SECTIONS[letter](SimpleNamespace(n_images=64, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if letter in "ad" else 2)
    for line in lines:
        baseline, ours, ratio = map(float, re.search(r"(\d+) +(\d+) +([\d.]+)  \(", line).groups())
        # All three are rounded, and on a busy machine the baseline is some images/s.
        assert (ours - 0.5) / (baseline + 0.5) - 0.01 <= ratio <= (ours + 0.5) / (baseline - 0.5) + 0.01


def test_throughput_trains_what_the_baselines_train(benchmark, colour_images):
    throughput = benchmark("throughput")
    for recipe, critics in (
        (throughput.STRIDE1_RECIPE, ["global", "local", "prior"]),
        (throughput.OFFICIAL_RECIPE, ["local"]),
    ):
        dim = DIMTransformer(**recipe | {"max_epochs": 0}).fit(colour_images[0])
        assert sorted(dim.discriminators_) == critics


def test_throughput_shows_where_the_time_of_a_step_goes(benchmark, capsys):
    throughput = benchmark("throughput")
    net = throughput.trained_net(64).net_
    batch = throughput.standardized_batches(throughput.trained_net(64), 64, 64)[0]
    throughput.print_operations(net, batch, n_steps=2, n_printed=100)
    first, *lines = capsys.readouterr().out.splitlines()
    rows = [re.search(r"(aten::\w+) +(\d+) times +(\d+) µs +(\d+)%", line).groups() for line in lines]
    assert {"aten::mm", "aten::native_batch_norm_backward", "aten::_fused_adam_"} < {name for name, *_ in rows}
    total, times = int(re.search(r"(\d+) µs a step", first)[1]), [int(row[2]) for row in rows]
    assert times == sorted(times, reverse=True)
    for time, (*_, share) in zip(times, rows, strict=True):
        assert int(share) == pytest.approx(100 * time / total, abs=1)


def test_throughput_gives_shares_of_the_machines_rates(benchmark, monkeypatch, capsys):
    throughput = benchmark("throughput")
    for name, few in {"matmul_rate": {"size": 256}, "bandwidth": {"n_bytes": 1 << 20}}.items():
        monkeypatch.setattr(throughput, name, functools.partial(getattr(throughput, name), **few))
    operations = functools.partial(throughput.print_operations, n_steps=1, n_printed=2)
    monkeypatch.setattr(throughput, "print_operations", operations)
    throughput.section_f(SimpleNamespace(n_images=64, repeats=1))
    output = capsys.readouterr().out
    half, single, copying = map(
        float, re.search(r"([\d.]+) TFLOP/s bf\w+, ([\d.]+) .*copy (\d+) GB/s", output).groups()
    )
    assert min(half, single, copying) > 0
    pattern = (
        r"^\(f\) (.+): (\d+) images/s x ([\d.]+) GFLOP = ([\d.]+) TFLOP/s, (\d+)% of .*; (\d+)% of a roofline of (\d+) "
    )
    rows = re.findall(pattern, output, re.M)
    assert [params for params, *_ in rows] == ["defaults", "{'batch_size': 512}"]
    for rate, flops, achieved, share, share_of_roofline, roofline in (map(float, numbers) for _, *numbers in rows):
        assert achieved == pytest.approx(rate * flops / 1e3, rel=0.02, abs=1e-3)
        assert share == pytest.approx(100 * achieved / half, rel=0.05, abs=1)
        assert share_of_roofline == pytest.approx(100 * rate / roofline, rel=0.05, abs=1)
    assert output.count("a step in operations") == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_throughput_measures_memory(benchmark, monkeypatch, capsys):
    throughput = benchmark("throughput")
    before, after = throughput.peak_memory(throughput.FitMemory(64))
    assert 0 <= before < after < before + 2

    def in_this_process(work):
        queue = SimpleQueue()
        throughput._measure_memory(work, queue)
        return queue.get()

    monkeypatch.setattr(throughput, "peak_memory", in_this_process)
    for each, few in ((throughput.FitMemory, 64), (throughput.OfficialMemory, 8)):
        make = each.__init__
        monkeypatch.setattr(
            each, "__init__", lambda self, n, *, make=make, few=few, **kwargs: make(self, few, **kwargs)
        )
    throughput.section_g(SimpleNamespace())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    for line in lines[:6]:
        more, before = map(float, re.search(r"([\d.]+) GB above the ([\d.]+) GB", line).groups())
        assert 0 <= more < 2
        assert 0 <= before < 20
    assert lines[-1].endswith("17.18 GB (computed)")


def test_throughput_gives_the_cost_of_an_image(benchmark, monkeypatch, capsys):
    throughput = benchmark("throughput")
    monkeypatch.setattr(throughput, "NUMBERS", (16, 24, 32, 48))
    monkeypatch.setattr(throughput, "enough_epochs", lambda *args, **kwargs: 1)
    throughput.section_h(SimpleNamespace(n_images=16, repeats=1))
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [re.search(r"(\w+) = (\d+) +([\d.]+) ms", line).groups() for line in lines]
    powers = [str(2**i) for i in range(6, 12)]
    expected = {"n": ["16", "24", "32", "48"], "batch_size": powers, "mi_units": powers}
    assert [row[:2] for row in rows] == [(name, value) for name, values in expected.items() for value in values]
    costs = [float(cost) for *_, cost in rows]
    assert min(costs) > 0
    middle, within = map(float, re.search(r"from 16 to 48 images: ([\d.]+) ms an image within (\d+)%", last).groups())
    assert middle == pytest.approx((min(costs[:4]) + max(costs[:4])) / 2, rel=0.01)
    assert within == pytest.approx(100 * (max(costs[:4]) / middle - 1), abs=1)


def test_throughput_runs_each_section_in_a_process_of_its_own(benchmark, capfd):
    benchmark("throughput").main(["d", "--n-images", "64", "--repeats", "1"])
    output = capfd.readouterr().out
    assert re.search(r"images/s +images/s +ratio\n\(d\) .* 1 pairs\)\n", output)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_streaming_compares_a_mapped_file_with_an_array(benchmark, monkeypatch, tmp_path, capsys):
    streaming = benchmark("streaming")
    monkeypatch.setattr(streaming, "in_child", lambda work, *arguments: work(*arguments))
    streaming.main(["--gigabytes", "0.03", "--in-memory", "0.015", "--folder", str(tmp_path)])
    output = capsys.readouterr().out
    before, mapped, after = (
        tuple(map(int, row)) for row in re.findall(r"^(?:in memory|memory map) +(\d+) +(\d+)", output, re.M)
    )
    assert mapped[0] == 2 * before[0] == 2 * after[0]
    ratio = float(re.search(r"epoch: ([\d.]+)", output)[1])
    assert ratio == pytest.approx((before[1] + after[1]) / 2 / mapped[1], rel=0.05, abs=0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("n_cut", "kept"), [(2, ["0", "1", "2"]), (8, ["0", "1", "2"]), (9, ["0", "1"]), (14, ["0", "1"])]
)
def test_results_outlive_a_line_that_is_cut_short(benchmark, tmp_path, n_cut, kept):
    results = benchmark("results")
    path = tmp_path / "results.csv"
    for seed in range(3):
        results.append_result(path, {"row": "DIM(L)", "seed": seed, "machine": "a, b"})
    path.write_bytes(path.read_bytes()[:-n_cut])
    assert [result["seed"] for result in results.read_results(path)] == kept
    results.append_result(path, {"row": "DIM(L)", "seed": 3, "machine": "c"})
    *before, last = results.read_results(path)
    assert [result["seed"] for result in before] == kept
    assert last == {"row": "DIM(L)", "seed": "3", "machine": "c"}
