import copy
import gc
import io
import logging
import weakref
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pytest
import skorch.callbacks as skorch_callbacks
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import BatchScoring, Callback, EarlyStopping, EpochScoring, MlflowLogger, PrintLog, TensorBoard

from skdim import DIMTransformer
from skdim.evaluation import knn_scorer
from skdim.monitoring import StopTraining


def small(**params):
    return DIMTransformer(
        **{"global_weight": 0.5, "n_components": 4, "max_epochs": 2, "mi_units": 8, "random_state": 0} | params
    )


@pytest.fixture
def digits(digits):
    return digits[0][:100], digits[1][:100]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class StopAtSecondEpoch(Callback):
    def on_epoch_begin(self, net, **_):
        if len(net.history) == 2:
            raise RuntimeError("stop here")


def test_the_bar_of_a_training_that_goes_on_starts_where_that_stood(digits, tmp_path):
    with pytest.raises(RuntimeError, match="stop here"):
        small(checkpoint_dir=tmp_path, max_epochs=3, callbacks=[StopAtSecondEpoch()]).fit(digits[0])
    with redirect_stderr(Terminal()) as terminal:
        small(checkpoint_dir=tmp_path, max_epochs=3, verbose=1).fit(digits[0])
    states = terminal.getvalue().strip().split("\r")
    assert not any("Epoch 1/3" in state for state in states)
    assert any("Epoch 2/3:  33%" in state for state in states)
    assert "Epoch 3/3: 100%" in states[-1]


def test_one_bar_over_all_epochs(digits):
    with redirect_stderr(Terminal()) as terminal:
        dim = small(verbose=1, max_epochs=3).fit(digits[0])
    states = terminal.getvalue().strip().split("\r")
    assert "\n" not in terminal.getvalue().rstrip("\n")
    assert states[0].startswith("0%")
    assert "Epoch 3/3: 100%" in states[-1]
    assert "images/s" in states[-1]
    last = dim.history_[-1]
    assert all(f"{term}={last[term]:.3g}" in states[-1] for term in ("loss", "local", "global", "prior"))


def test_the_bar_counts_the_images_of_each_step(digits, monkeypatch):
    from tqdm import auto

    counted = []

    class Counting(auto.tqdm):
        def update(self, n=1):
            counted.append(n)
            return super().update(n)

    monkeypatch.setattr(auto, "tqdm", Counting)
    with redirect_stderr(Terminal()):
        dim = small(verbose=1, batch_size=50).fit(digits[0])
    assert counted == [50] * 4
    assert len(dim.net_.history[-1, "batches"]) == 1  # no step waited for the device to be recorded


def test_the_bar_is_closed_when_training_fails(digits, monkeypatch):
    from tqdm import auto

    monkeypatch.setattr(auto.tqdm, "_instances", weakref.WeakSet())
    with redirect_stderr(Terminal()) as terminal, pytest.raises(FloatingPointError):
        small(verbose=1, lr=1e12, lr_schedule="constant").fit(digits[0])
    assert "Epoch 1/2" in terminal.getvalue()
    assert not auto.tqdm._instances


@pytest.mark.parametrize("verbose", [0, 1])
def test_the_log_gets_a_line_an_epoch_and_a_pipe_the_same_if_it_is_asked_for(digits, capsys, caplog, verbose):
    with caplog.at_level(logging.INFO, logger="skdim"):
        dim = small(verbose=verbose).fit(digits[0])
    lines = [record.getMessage() for record in caplog.records if record.name == "skdim"]
    assert capsys.readouterr() == ("", "".join(line + "\n" for line in lines) if verbose else "")
    assert [line.split(":")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
    assert all(f"loss {loss:.3g}" in line for line, loss in zip(lines, dim.loss_curve_, strict=True))


def test_silent_on_a_terminal_by_default(digits):
    with redirect_stderr(Terminal()) as terminal:
        small().fit(digits[0])
    assert terminal.getvalue() == ""


class Recorder:
    """A callback of scikit-learn that takes notes and may stop training."""

    max_propagation_depth = None

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.events = []
        self.snapshots = []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.events.append(f"begin {context.estimator_name} {context.task_name}")

    def on_fit_task_end(self, estimator, context, *, X=None, fitted_estimator=None):
        self.events.append(f"end {context.estimator_name} {context.task_name}")
        if isinstance(fitted_estimator, DIMTransformer):
            self.snapshots.append((fitted_estimator.n_iter_, fitted_estimator.transform(X)))
        return context.task_name == "epoch" and context.task_id + 1 == self.stop_after


needs_callbacks = pytest.mark.skipif(
    not hasattr(DIMTransformer, "set_callbacks"), reason="scikit-learn has callbacks from 1.9 on"
)


@needs_callbacks
def test_scikit_learns_callbacks_see_the_fit_and_its_epochs(digits):
    recorder = Recorder()
    small().set_callbacks(recorder).fit(digits[0])
    fit, epoch = "DIMTransformer fit", "DIMTransformer epoch"
    assert recorder.events == [
        "setup",
        *[f"begin {fit}", *[f"begin {epoch}", f"end {epoch}"] * 2, f"end {fit}"],
        "teardown",
    ]


@needs_callbacks
def test_scikit_learns_callbacks_get_a_transformer_as_of_each_epoch(digits):
    X = digits[0]
    recorder = Recorder()
    dim = small().set_callbacks(recorder).fit(X)
    assert [n_iter for n_iter, _ in recorder.snapshots] == [1, 2, 2]
    first, second, last = (Z for _, Z in recorder.snapshots)
    assert not np.array_equal(first, second)
    assert np.array_equal(second, last)
    assert np.array_equal(last, dim.transform(X))
    # Neither telling nor copying may disturb training.
    assert np.array_equal(last, small().fit_transform(X))


@needs_callbacks
def test_scikit_learns_callbacks_stop_training(digits):
    recorder = Recorder(stop_after=2)
    dim = small(max_epochs=5).set_callbacks(recorder).fit(digits[0])
    assert dim.n_iter_ == 2
    assert recorder.events[-3:] == ["end DIMTransformer epoch", "end DIMTransformer fit", "teardown"]


@needs_callbacks
def test_each_epoch_ends_when_skorch_stops_training(digits):
    recorder = Recorder()
    stop = EarlyStopping(monitor="train_loss", patience=1, threshold=10.0, threshold_mode="abs")
    dim = small(max_epochs=5, lr_schedule="constant", callbacks=[stop]).set_callbacks(recorder).fit(digits[0])
    assert dim.n_iter_ < 5
    assert recorder.events.count("end DIMTransformer epoch") == dim.n_iter_


class Patient(EarlyStopping):
    """Decides by itself."""

    def on_epoch_end(self, net, **kwargs):
        raise KeyboardInterrupt


class Delayed(Callback):
    """Asks another one."""

    def __init__(self, inner):
        self.inner = inner

    def on_train_begin(self, net, **kwargs):
        self.inner.on_train_begin(net, **kwargs)

    def on_epoch_end(self, net, **kwargs):
        self.inner.on_epoch_end(net, **kwargs)

    def on_train_end(self, net, **kwargs):
        raise StopTraining  # too late to end anything


class Decided(Callback):
    def __init__(self, hook):
        self.hook = hook

    def stop(self, net, **kwargs):
        if len(net.history) == 2:
            raise StopTraining

    def on_epoch_end(self, net, **kwargs):
        if self.hook == "epoch":
            self.stop(net)

    def on_batch_end(self, net, **kwargs):
        if self.hook == "batch":
            self.stop(net)


class Ends(Callback):
    def on_train_begin(self, net, **kwargs):
        self.n_epochs = 0

    def on_epoch_end(self, net, **kwargs):
        self.n_epochs += 1


@pytest.mark.parametrize(
    ("stop", "n_epochs"),
    [
        (Patient(monitor="train_loss"), 1),
        (Decided("epoch"), 2),
        (Delayed(EarlyStopping(monitor="train_loss", patience=1, threshold=10.0, threshold_mode="abs")), 2),
    ],
    ids=["EarlyStopping", "own callback", "one that holds another"],
)
def test_a_callback_of_the_users_ends_training_and_the_others_see_the_epoch_end(digits, stop, n_epochs):
    after = Ends()
    dim = small(max_epochs=5, lr_schedule="constant", callbacks=[stop, after]).fit(digits[0])
    assert dim.n_iter_ == after.n_epochs == n_epochs
    assert np.isfinite(dim.transform(digits[0])).all()


class Tiny(torch.nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.conv = torch.nn.Conv2d(image_shape[0], 4, 3, padding=1)
        self.linear = torch.nn.Linear(4, n_components)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(features.relu().mean(dim=(2, 3))), features


def looking(look, at):
    """Make a callback that calls a function at the end of each epoch or batch."""
    return type("Looks", (Callback,), {f"on_{at}_end": lambda self, net, **_: look(net)})()


@pytest.mark.parametrize("at", ["epoch", "batch"])
def test_a_callback_may_embed_images_and_changes_nothing_in_training(digits, at):
    X = digits[0]
    seen = []

    def embed(net):
        seen.append(np.array_equal(dim.transform(X)[:5], dim.transform(X[:5])))
        return knn_scorer(dim, X, digits[1])

    dim = small(callbacks=[looking(embed, at)], batch_size=50)
    embeddings = dim.fit_transform(X)
    assert seen == [True] * (2 if at == "epoch" else 4)
    assert np.array_equal(embeddings, small(batch_size=50).fit_transform(X))


class Merging(Tiny):
    """Computes otherwise in evaluation mode, and sees to that as it is put there."""

    is_merged = False

    def train(self, mode=True):
        self.is_merged = not mode
        return super().train(mode)

    def forward(self, images):
        assert self.is_merged != self.training
        return super().forward(images)


def test_an_encoder_that_acts_when_its_mode_changes(digits):
    dim = small(encoder=Merging, batch_size=50)
    dim.set_params(callbacks=[looking(lambda net: dim.transform(digits[0]), "batch")]).fit(digits[0])
    assert dim.encoder_.is_merged


class Halves(Callback):
    """Puts a model with half the weights in place at the end, as one that averages them does."""

    def on_train_end(self, net, **_):
        model = copy.deepcopy(net.module_)
        with torch.no_grad():
            for weight in model.encoder.parameters():
                weight /= 2
        net.module_ = model


def test_a_model_that_a_callback_puts_in_place_is_the_result(digits):
    whole, halved = small().fit(digits[0]), small(callbacks=[Halves()]).fit(digits[0])
    for weight, half in zip(whole.encoder_.parameters(), halved.encoder_.parameters(), strict=True):
        assert torch.equal(weight / 2, half)
    assert halved.discriminators_["local"] is halved.net_.module_.critics["local"]
    before = [weight.clone() for weight in halved.encoder_.parameters()]
    with pytest.warns(UserWarning, match="new discriminators and a new optimizer"):
        halved.set_params(callbacks=None).partial_fit(digits[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, halved.encoder_.parameters(), strict=True))


class Averages(Callback):
    """Puts the average of the weights after each epoch in place, as torch makes it."""

    def on_train_begin(self, net, **_):
        self.average_ = torch.optim.swa_utils.AveragedModel(net.module_)

    def on_epoch_end(self, net, **_):
        self.average_.update_parameters(net.module_)

    def on_train_end(self, net, **_):
        net.module_ = self.average_


def test_an_average_of_weights_is_the_result(digits):
    first, last = (small(max_epochs=n, lr_schedule="constant").fit(digits[0]) for n in (1, 2))
    averaged = small(max_epochs=2, lr_schedule="constant", callbacks=[Averages()]).fit(digits[0])
    parts = zip(*(dim.encoder_.parameters() for dim in (first, last, averaged)), strict=True)
    for one, two, mean in parts:
        torch.testing.assert_close(mean, (one + two) / 2)


class Spoils(Callback):
    """Changes what a net is made of, and fails."""

    def on_train_begin(self, net, **_):
        net.optimizer_.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
        net.optimizer_ = torch.optim.SGD(net.module_.parameters(), lr=1.0)
        net.module_ = copy.deepcopy(net.module_)

    def on_epoch_end(self, net, **_):
        raise KeyboardInterrupt


def test_a_net_that_a_callback_has_spoilt_is_put_together_again(digits):
    dim, same = (small(lr_schedule="constant").fit(digits[0]) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        dim.set_params(callbacks=[Spoils()]).partial_fit(digits[0])
    for each in (dim, same):
        each.set_params(callbacks=None).partial_fit(digits[0])
    assert np.array_equal(dim.transform(digits[0]), same.transform(digits[0]))
    assert dim.loss_curve_ == same.loss_curve_


def test_the_network_is_in_evaluation_mode_between_epochs(digits):
    images = torch.from_numpy(digits[0]).float().view(-1, 1, 8, 8)
    embeddings = small(callbacks=[looking(lambda net: net.module_.encoder(images), "epoch")]).fit_transform(digits[0])
    assert np.array_equal(embeddings, small().fit_transform(digits[0]))


@needs_callbacks
def test_an_epoch_that_is_broken_off_ends_for_scikit_learns_callbacks(digits):
    recorder = Recorder()
    dim = small(max_epochs=5, callbacks=[Decided("batch")]).set_callbacks(recorder).fit(digits[0])
    assert dim.n_iter_ == 1  # of a whole one
    assert recorder.events.count("end DIMTransformer epoch") == 2


@needs_callbacks
def test_scikit_learns_callbacks_are_torn_down_when_a_fit_fails(digits):
    recorder = Recorder()
    with pytest.raises(FloatingPointError):
        small(lr=1e30, batch_size=10, lr_schedule="constant").set_callbacks(recorder).fit(digits[0])
    assert recorder.events[-1] == "teardown"


@needs_callbacks
def test_scikit_learns_callbacks_reach_through_search_and_pipeline(digits):
    recorder = Recorder()
    pipeline = make_pipeline(small(), StandardScaler(), LogisticRegression())
    search = GridSearchCV(pipeline, {"dimtransformer__n_components": [2, 4]}, cv=2).set_callbacks(recorder)
    search.fit(*digits)
    assert recorder.events.count("end DIMTransformer fit") == 5
    assert recorder.events.count("end DIMTransformer epoch") == 10
    assert recorder.events.count("setup") == recorder.events.count("teardown") == 1


@needs_callbacks
def test_scikit_learns_progress_bar(digits, capsys):
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    small().set_callbacks(ProgressBar()).fit(digits[0])
    assert "DIMTransformer - fit" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_a_fitted_estimator_does_not_keep_the_images(digits, fails):
    X = digits[0].astype(np.float32)
    kept = weakref.ref(X)
    dim = small().fit(X[:50])
    try:
        dim.set_params(lr=1e12 if fails else 1e-3, warm_start=True, lr_schedule="constant").fit(X)
    except FloatingPointError:
        assert fails
    assert dim.net_.get_params()  # of the callbacks too
    del X
    gc.collect()
    assert kept() is None


def scatter(net, X, y):
    """Score of a user: how far the embeddings of the last images are spread."""
    assert y is None
    images = X if not hasattr(X, "standardize") else next(iter(X))
    return float(net.module_.encoder(images)[0].detach().std())


def test_epoch_and_batch_scoring(digits):
    callbacks = [
        EpochScoring(scatter, on_train=True, name="spread"),
        EarlyStopping(monitor="spread", lower_is_better=False, patience=1, threshold=10.0, threshold_mode="abs"),
    ]
    dim = small(max_epochs=5, lr_schedule="constant", callbacks=callbacks).fit(digits[0])
    assert dim.n_iter_ == 2
    assert len(dim.net_.history[-1, "batches"]) == 1
    assert dim.net_.history[-1, "spread"] > 0
    dim = small(batch_size=50, callbacks=[BatchScoring(scatter, on_train=True, name="spread")]).fit(digits[0])
    scores = dim.net_.history[-1, "batches", :, "spread"]
    assert len(scores) == 2
    assert dim.net_.history[-1, "spread"] == pytest.approx(np.mean(scores))


def test_loggers_get_the_terms_of_each_epoch_and_cost_no_step(digits):
    written, logged, printed = [], [], []
    writer = SimpleNamespace(add_scalar=lambda tag, scalar_value, global_step: written.append((tag, scalar_value)))
    writer.close = lambda: None
    client = SimpleNamespace(log_metric=lambda run, key, value, step: logged.append((key, value)))
    client.set_terminated = lambda run: logged.append("terminated")
    run = SimpleNamespace(info=SimpleNamespace(run_id=0))
    callbacks = [
        TensorBoard(writer),
        MlflowLogger(run, client, create_artifact=False),
        PrintLog(sink=printed.append),
    ]
    dim = small(callbacks=callbacks, batch_size=50).fit(digits[0])
    assert len(dim.net_.history[-1, "batches"]) == 1
    last = dim.history_[-1]
    assert [value for tag, value in written if tag.endswith("local")] == [epoch["local"] for epoch in dim.history_]
    assert ("local", last["local"]) in logged
    assert logged[-1] == "terminated"
    assert f"{last['local']:.4f}" in printed[-1]


def test_a_logger_that_logs_batches_sees_them(digits):
    logged = []
    client = SimpleNamespace(log_metric=lambda run, key, value, step: logged.append(key))
    client.set_terminated = lambda run: None
    run = SimpleNamespace(info=SimpleNamespace(run_id=0))
    logger = MlflowLogger(run, client, create_artifact=False, log_on_batch_end=True)
    small(callbacks=[logger], batch_size=50, max_epochs=1).fit(digits[0])
    assert logged.count("train_loss_batch") == 2


@pytest.mark.filterwarnings("ignore:Setting self.device = cpu")
def test_every_other_callback_of_skorch_trains(digits, tmp_path):
    callbacks = [
        skorch_callbacks.EpochTimer(),
        skorch_callbacks.Freezer("encoder.embedding.bias"),
        skorch_callbacks.Initializer("encoder.embedding.weight"),
        skorch_callbacks.TrainEndCheckpoint(dirname=tmp_path),
        skorch_callbacks.GradientNormClipping(1.0),
    ]
    dim = small(callbacks=callbacks).fit(digits[0])
    assert dim.net_.history[-1, "dur"] > 0
    assert (tmp_path / "train_end_params.pt").is_file()
    again = small(callbacks=[skorch_callbacks.LoadInitState(callbacks[3])]).fit(digits[0])
    assert len(again.net_.history) == 4


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (skorch_callbacks.ProgressBar(), "ProgressBar in callbacks .* use verbose=1"),
        (PrintLog, "PrintLog in callbacks prints nothing here"),
        (skorch_callbacks.InputShapeSetter(), "InputShapeSetter in callbacks is not needed"),
        (EarlyStopping(), "EarlyStopping in callbacks monitors 'valid_loss', .* use monitor='train_loss'"),
        (skorch_callbacks.Checkpoint(), "Checkpoint in callbacks monitors 'valid_loss_best', .* PassthroughScoring"),
        (skorch_callbacks.Checkpoint("train_loss_best"), "monitors 'train_loss_best', which needs PassthroughScoring"),
        (skorch_callbacks.PassthroughScoring("train_loss"), "PassthroughScoring in callbacks needs on_train=True"),
        (("score", EpochScoring(scatter)), "EpochScoring in callbacks needs on_train=True"),
        (EpochScoring("accuracy", on_train=True), "EpochScoring in callbacks cannot use scoring='accuracy'"),
        (BatchScoring(None, on_train=True), "BatchScoring in callbacks cannot use scoring=None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_callbacks_that_cannot_work_are_refused_before_any_work(callback, message):
    with pytest.raises(ValueError, match=message):
        small(callbacks=[callback]).fit([["not", "read"]])


def test_stopping_early_in_a_cycle_of_the_learning_rate_is_warned_about(digits):
    stop = EarlyStopping(monitor="train_loss")
    with pytest.warns(UserWarning, match="EarlyStopping ends lr_schedule='one_cycle' .* set lr_schedule='constant'"):
        small(callbacks=[stop]).fit(digits[0])


def test_verbose_is_checked(digits):
    with pytest.raises(ValueError, match="'verbose' parameter of DIMTransformer must be"):
        small(verbose="yes").fit(digits[0])


def test_no_terminal_is_no_error(monkeypatch):
    class Closed:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError("closed")

        flush = write

    X = np.random.default_rng(0).random((16, 1, 8, 8))
    for stream in (None, Closed()):
        monkeypatch.setattr("sys.stderr", stream)
        assert DIMTransformer(2, mi_units=4, max_epochs=1, verbose=1, random_state=0).fit(X).n_iter_ == 1
