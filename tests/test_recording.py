"""Training steps recorded as CUDA graphs; on the CPU a twin of the recording, which runs what it has recorded again."""

import copy
import pickle
import threading
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback, Freezer, LRScheduler, TrainEndCheckpoint
from torch.optim.optimizer import register_optimizer_step_pre_hook

from skdim import DIMTransformer, model, net, recording, transformer
from skdim.randomness import private_rng
from skdim.views import StandardAugmentation

# Batches of 8, one image of which is drawn twice.
IMAGES = np.random.default_rng(0).integers(0, 256, (31, 3, 8, 8), dtype=np.uint8)
# A learning rate that is the same number in float32, and at which kernels that round otherwise make little difference.
PARAMS = {"n_components": 4, "max_epochs": 4, "batch_size": 8, "mi_units": 8, "random_state": 0}
PARAMS |= {"lr": 2**-13, "lr_schedule": "constant", "precision": "float32"}

ON_CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# What is drawn, computed and kept between steps, all of it.
SETTINGS = [
    {},
    {"global_weight": 0.5, "negatives": ("batch", "roll", "shuffle"), "augmentation": "standard"},
    {"discriminator": "concat", "negatives": "shuffle", "mi_estimator": "jsd", "multiple_globals": True},
    {"prior_matching": "noise", "coordinate_weight": 1.0, "local_samples": 3},
    {"occlusion": True, "encoder": "resnet_folded", "prior": "normal"},
    {"mi_estimator": "dv", "lr_schedule": "one_cycle", "augmentation": StandardAugmentation(noise=0.1, shift=0.1)},
    {"encoder": "alexnet", "mi_estimator": "chi2", "precision": "bfloat16"},
    {"encoder": "stride1", "discriminator": "concat", "global_weight": 0.5},
    # bfloat16 on CUDA.
    {"precision": "auto"},
    {"augmentation": StandardAugmentation(quarter_turns=True), "precision": "auto"},
]


class Recordable(net.DIMNet):
    """Records on any device."""

    def __init__(self, module, *, recordable, **kwargs):
        super().__init__(module, recordable=True, **kwargs)


class Recordings:
    """How often a step was recorded and replayed."""

    def __init__(self):
        self.made = self.replays = 0

    def __call__(self, work, generators, device):
        self.made += 1
        replay = RECORD(work, generators, device) if device.type == "cuda" else work

        def counted():
            self.replays += 1
            replay()

        return counted


RECORD, BESIDE = recording.record, recording.beside


@pytest.fixture
def recordings(monkeypatch, deterministic):
    """All trainings are recorded that can be."""
    monkeypatch.setattr(net, "MIN_RECORDED_STEPS", 5)
    monkeypatch.setattr(transformer, "DIMNet", Recordable)
    made = Recordings()
    monkeypatch.setattr(recording, "record", made)
    monkeypatch.setattr(recording, "beside", lambda device: nullcontext() if device.type == "cpu" else BESIDE(device))
    return made


@contextmanager
def unrecorded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "MIN_RECORDED_STEPS", 10**9)
        yield


def fit_as_it_is(images=IMAGES, **params):
    with unrecorded():
        return DIMTransformer(**PARAMS | params).fit(images)


def trained_weights(dim, part):
    """Put weights and biases of the encoder, or of a discriminator, one behind the other."""
    module = dim.encoder_ if part == "encoder" else dim.discriminators_[part]
    return np.concatenate([weight.detach().flatten().cpu().numpy() for weight in module.parameters()])


def assert_same(recorded, plain):
    """Compare the losses of all epochs, and the ways that the weights of the encoder and its adversaries went."""
    on_cpu = plain.device_.type == "cpu"
    rtol = 1e-6 if on_cpu else 1e-2
    for ours, epoch in zip(recorded.history_, plain.history_, strict=True):
        for name, value in epoch.items():
            if name not in ("seconds", "images_per_second"):
                np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=rtol, err_msg=name)
    images = IMAGES[:, : plain.image_shape_[0]]
    untrained = DIMTransformer(**plain.get_params() | {"max_epochs": 0, "callbacks": None}).fit(images)
    for part in ("encoder", *plain.discriminators_):
        start, *ends = (trained_weights(dim, part) for dim in (untrained, recorded, plain))
        way, plain_way = (end - start for end in ends)
        if on_cpu:
            assert np.linalg.norm(way - plain_way) <= 1e-4 * np.linalg.norm(plain_way), part
        else:
            # Where kernels add up in any order, Adam's first steps turn with the last digit where gradients are nearly
            # 0, this way and that; all others together go as far, which another learning rate changes.
            assert np.linalg.norm(way - plain_way) <= 0.3 * np.linalg.norm(plain_way), part
            tolerance = 0.05 if plain.net_.autocast_dtype is None else 0.1
            assert abs(way @ plain_way / (plain_way @ plain_way) - 1) <= tolerance, part


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_recorded_steps_are_the_same_steps(params, device, recordings):
    params = {"device": device} | params
    recorded = DIMTransformer(**PARAMS | params).fit(IMAGES)
    assert (recordings.made, recordings.replays) == (1, 4 * 4 - recording.WARM_UP_STEPS)
    assert_same(recorded, fit_as_it_is(**params))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("params", [{}, {"augmentation": "standard", "precision": "auto"}], ids=str)
def test_recorded_steps_on_grey_images_are_the_same_steps(params, device, recordings):
    grey, params = IMAGES[:, :1], {"device": device} | params
    recorded = DIMTransformer(**PARAMS | params).fit(grey)
    assert (recordings.made, recordings.replays) == (1, 4 * 4 - recording.WARM_UP_STEPS)
    assert_same(recorded, fit_as_it_is(grey, **params))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_scores_computed_in_parts_are_recorded(device, recordings, monkeypatch):
    monkeypatch.setitem(model.MAX_PAIR_ELEMENTS, device, 64)
    recorded = DIMTransformer(**PARAMS, device=device, discriminator="concat").fit(IMAGES)
    assert recordings.made == 1
    assert_same(recorded, fit_as_it_is(device=device, discriminator="concat"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_recorded(recordings):
    recorded = DIMTransformer(**PARAMS, device="cuda", compile=True).fit(IMAGES)
    assert recordings.made == 1
    assert_same(recorded, fit_as_it_is(device="cuda"))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_training_that_goes_on_is_recorded_anew(device, recordings):
    params = {"device": device, "warm_start": True}
    recorded = DIMTransformer(**PARAMS | params).fit(IMAGES).fit(IMAGES)
    assert recordings.made == 2
    assert recorded.net_._recorded_step is None
    with unrecorded():
        plain = DIMTransformer(**PARAMS | params).fit(IMAGES).fit(IMAGES)
    assert_same(recorded, plain)


class ActsOnce(Callback):
    """Acts on the net at the beginning of an epoch, by its number from 1."""

    def __init__(self, act, epoch=3):
        self.act, self.epoch = act, epoch

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == self.epoch:
            self.act(net)


def freeze(net):
    for weight in net.module_.encoder.parameters():
        weight.requires_grad_(False)


def unfreeze(net):
    for weight in net.module_.encoder.parameters():
        weight.requires_grad_(True)


def decay(net):
    net.optimizer_.param_groups[0]["weight_decay"] = 0.5


def reload_optimizer(net):
    net.optimizer_.load_state_dict(copy.deepcopy(net.optimizer_.state_dict()))


def weigh(net):
    net.criterion_.weights["local"] = 0.1


def remember_more(net):
    net.module_.encoder.get_submodule("local.0.1").momentum = 0.5


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("act", [freeze, decay, reload_optimizer, weigh, remember_more], ids=lambda act: act.__name__)
def test_what_callbacks_change_after_an_epoch_counts(act, device, recordings):
    recorded = DIMTransformer(**PARAMS, device=device, callbacks=[ActsOnce(act)]).fit(IMAGES)
    # Each recording comes after steps that are not recorded: two epochs of four steps, and two more.
    assert (recordings.made, recordings.replays) == (2, 2 * (8 - recording.WARM_UP_STEPS))
    plain = fit_as_it_is(device=device, callbacks=[ActsOnce(act)])
    assert_same(recorded, plain)
    norms = [dim.encoder_.get_submodule("local.0.1") for dim in (recorded, plain)]
    assert torch.allclose(*(norm.running_mean for norm in norms))
    # And makes a difference.
    assert recorded.loss_curve_[-1] != DIMTransformer(**PARAMS, device=device).fit(IMAGES).loss_curve_[-1] or (
        act in (reload_optimizer, remember_more)
    )


@pytest.mark.filterwarnings("ignore:Setting self.device:skorch.exceptions.DeviceWarning")
@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_net_is_pickled_and_copied_while_it_is_recorded(device, recordings, tmp_path):
    callbacks = [ActsOnce(copy.deepcopy, epoch=4), TrainEndCheckpoint(dirname=tmp_path, f_pickle="net.pkl")]
    recorded = DIMTransformer(**PARAMS, device=device, callbacks=callbacks).fit(IMAGES)
    assert recordings.made == 1
    loaded = pickle.loads((tmp_path / "train_end_net.pkl").read_bytes())
    for name, weight in recorded.net_.module_.state_dict().items():
        assert torch.equal(loaded.module_.state_dict()[name].cpu(), weight.cpu()), name


def take_another_adam(net):
    net.optimizer_ = torch.optim.Adam(net.optimizer_.param_groups[0]["params"], lr=2**-13, fused=True)


def add_weights(net):
    net.optimizer_.add_param_group({"params": [torch.zeros(1, requires_grad=True, device=net.generator.device)]})


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("act", [freeze, decay, take_another_adam, add_weights], ids=lambda act: act.__name__)
def test_what_callbacks_change_before_the_recording_counts(act, device, recordings):
    params = {"device": device, "batch_size": 31, "max_epochs": 12}

    def callbacks():
        return [ActsOnce(act, epoch=3)]

    recorded = DIMTransformer(**PARAMS | params, callbacks=callbacks()).fit(IMAGES)
    # A step an epoch: two before the change, and the warm-up after it.
    assert (recordings.made, recordings.replays) == (1, 10 - recording.WARM_UP_STEPS)
    assert_same(recorded, fit_as_it_is(**params, callbacks=callbacks()))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_weights_that_are_trained_later_get_a_state_first(device, recordings):
    def callbacks():
        return [ActsOnce(freeze, epoch=1), ActsOnce(unfreeze, epoch=3)]

    recorded = DIMTransformer(**PARAMS, device=device, callbacks=callbacks()).fit(IMAGES)
    assert (recordings.made, recordings.replays) == (2, 2 * (8 - recording.WARM_UP_STEPS))
    assert_same(recorded, fit_as_it_is(device=device, callbacks=callbacks()))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_hook_sees_each_step(device, recordings):
    calls = []

    class Watches(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 3:
                net.module_.encoder.register_forward_hook(lambda *_: calls.append(1))

    DIMTransformer(**PARAMS, device=device, callbacks=[Watches()]).fit(IMAGES)
    # Two epochs of four steps, and a look at the embeddings in the end.
    assert len(calls) == 2 * 4 + 1
    assert recordings.replays == 8 - recording.WARM_UP_STEPS


def take_another_optimizer(net):
    weights = net.optimizer_.param_groups[0]["params"]
    net.optimizer_ = torch.optim.SGD(weights, lr=2**-13, momentum=0.5)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_steps_with_an_optimizer_of_the_users_are_not_recorded(device, recordings):
    recorded = DIMTransformer(**PARAMS, device=device, callbacks=[ActsOnce(take_another_optimizer)]).fit(IMAGES)
    assert (recordings.made, recordings.replays) == (1, 8 - recording.WARM_UP_STEPS)
    assert_same(recorded, fit_as_it_is(device=device, callbacks=[ActsOnce(take_another_optimizer)]))


class Watch(Callback):
    """Has something called at each step from the third epoch on."""

    def __init__(self, register):
        self.register, self.calls, self.handles = register, [], []

    def on_epoch_begin(self, net, **kwargs):
        if len(net.history) == 3:
            self.handles.append(self.register(net, lambda *_: self.calls.append(1)))

    def on_train_end(self, net, **kwargs):
        for handle in self.handles:
            handle.remove()


HOOKS = {
    "optimizer": lambda net, hook: net.optimizer_.register_step_post_hook(hook),
    "every optimizer": lambda net, hook: register_optimizer_step_pre_hook(hook),
    "every module": lambda net, hook: torch.nn.modules.module.register_module_forward_hook(hook),
}


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_of_all_kinds_see_each_step(register, device, recordings):
    watch = Watch(register)
    DIMTransformer(**PARAMS, device=device, callbacks=[watch]).fit(IMAGES)
    assert recordings.replays == 8 - recording.WARM_UP_STEPS
    # Each step has two optimizers and many modules.
    assert len(watch.calls) >= 2 * 4


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_anomaly_detection_sees_each_step(device, recordings):
    with torch.autograd.detect_anomaly():
        DIMTransformer(**PARAMS, device=device).fit(IMAGES)
    assert recordings.made == 0


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("last", [None, "CUDA error: out of memory", "CUDA error: a previous error during capture"])
def test_training_goes_on_without_a_recording_that_memory_does_not_hold(device, last, recordings, monkeypatch):
    def fill_memory(model, views, generator):
        # In bfloat16, of which nothing may be left: what a recording computes is never there.
        model.encoder.embedding(torch.zeros(8, model.encoder.embedding.in_features, device=device))
        if device == "cuda":
            # Nor is what it draws, in a recording that is begun and given up.
            torch.rand(8, generator=generator, device=device)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def fail(work, generators, device):
        recordings.made += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.InfoMaxModel, "forward", fill_memory)
            try:
                RECORD(work, generators, device) if device.type == "cuda" else work()
            except torch.OutOfMemoryError as error:
                if last:
                    # What ends a recording finds no memory either, and says so in its own words, or not at all.
                    raise RuntimeError(last) from error
                raise

    monkeypatch.setattr(recording, "record", fail)
    params = {"device": device, "precision": "bfloat16", "lr": 2**-6}
    unrecorded_after_all = DIMTransformer(**PARAMS | params).fit(IMAGES)
    # Tried once, not at each step.
    assert recordings.made == 1
    assert_same(unrecorded_after_all, fit_as_it_is(**params))


class Disturb(Callback):
    """Draws from torch's global generator in another thread, in the first two epochs."""

    def __init__(self, recordings):
        self.recordings = recordings
        self.begun, self.over = threading.Event(), threading.Event()

    def draw(self):
        with private_rng(0, torch.device("cpu")):
            self.begun.set()
            self.over.wait(60)

    def on_train_begin(self, net, **kwargs):
        self.thread = threading.Thread(target=self.draw)
        self.thread.start()
        assert self.begun.wait(60)

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            self.n_made = self.recordings.made
            self.over.set()
            self.thread.join(60)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_nothing_is_recorded_while_another_thread_draws_from_torchs_generator(device, recordings):
    params = {"device": device}
    disturb = Disturb(recordings)
    recorded = DIMTransformer(**PARAMS | params, callbacks=[disturb]).fit(IMAGES)
    assert (disturb.n_made, recordings.made) == (0, 1)
    assert_same(recorded, fit_as_it_is(**params))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_rates_that_callbacks_set_count(device, recordings):
    params = {"device": device}

    def schedule():
        return [LRScheduler("StepLR", step_size=1, gamma=0.5)]

    recorded = DIMTransformer(**PARAMS | params, callbacks=schedule()).fit(IMAGES)
    assert recordings.made == 1
    assert_same(recorded, fit_as_it_is(**params, callbacks=schedule()))
    assert recorded.net_.optimizer_.param_groups[0]["lr"] == pytest.approx(2**-13 * 0.5**4)


class SeesBatches(Callback):
    def on_batch_end(self, net, **kwargs):
        pass


class SeesGradients(Callback):
    def on_grad_computed(self, net, named_parameters, **kwargs):
        pass


@pytest.mark.parametrize("callback", [SeesBatches, SeesGradients])
def test_callbacks_within_a_step_see_steps_that_are_not_recorded(callback, recordings):
    DIMTransformer(**PARAMS, callbacks=[callback()], device="cpu").fit(IMAGES)
    assert recordings.made == 0
    DIMTransformer(**PARAMS, callbacks=[Freezer("encoder*")], device="cpu").fit(IMAGES)
    assert recordings.made == 1


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_batches_of_another_size_run_as_they_are(device, recordings):
    images = torch.from_numpy(IMAGES)

    class Sizes(torch.utils.data.Dataset):
        def __len__(self):
            return 31

        def __getitem__(self, index):
            return images[index]

    # Of 31 images, in batches of 8, the last has 7.
    loader = torch.utils.data.DataLoader(Sizes(), batch_size=8)
    params = {"device": device}
    recorded = DIMTransformer(**PARAMS | params).fit(loader)
    assert (recordings.made, recordings.replays) == (1, 3 * 4 - recording.WARM_UP_STEPS)
    with unrecorded():
        plain = DIMTransformer(**PARAMS | params).fit(loader)
    assert_same(recorded, plain)


class Fail(Callback):
    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            raise RuntimeError("enough")


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_recorded_training_resumes_to_the_same_bits(device, recordings, tmp_path):
    # A learning rate that is another number in float32.
    params = {"device": device, "augmentation": "standard", "negatives": "shuffle", "lr": 1e-3}
    expected = DIMTransformer(**PARAMS | params).fit(IMAGES)
    with pytest.raises(RuntimeError, match="enough"):
        DIMTransformer(**PARAMS | params, checkpoint_dir=tmp_path, callbacks=[Fail()]).fit(IMAGES)
    resumed = DIMTransformer(**PARAMS | params, checkpoint_dir=tmp_path).fit(IMAGES)
    assert recordings.made == 3
    assert resumed.loss_curve_ == expected.loss_curve_
    assert np.array_equal(resumed.transform(IMAGES), expected.transform(IMAGES))


@pytest.mark.gpu
def test_trainings_on_cuda_are_recorded_but_for_parts_that_users_bring(monkeypatch):
    monkeypatch.setattr(net, "MIN_RECORDED_STEPS", 5)
    made = Recordings()
    monkeypatch.setattr(recording, "record", made)
    DIMTransformer(**PARAMS).fit(IMAGES)
    assert made.made == 1
    DIMTransformer(**PARAMS, augmentation=lambda images, generator: images.flip(3)).fit(IMAGES)
    assert made.made == 1
