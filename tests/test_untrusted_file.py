"""What `DIMTransformer.load` does with files that `save` did not write."""

import copy
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from sklearn.base import clone
from torch import nn

from skdim import DIMTransformer
from skdim.encoders import LayerEncoder
from skdim.persistence import InvalidFileError
from skdim.tensorfile import MAX_CONTAINERS, MAX_HEADER_BYTES, _digest

ROWS = np.random.default_rng(0).random((6, 16))
# Far above what a load of these files takes, in bytes and seconds; hostile ones ask for terabytes and hours.
MEMORY, SECONDS = 150e6, 30


@pytest.fixture(scope="module")
def dim():
    X = ROWS
    fitted = DIMTransformer(n_components=4, max_epochs=2, random_state=0, image_shape=(1, 4, 4)).fit(X)
    fitted.feature_names_in_ = np.array([f"pixel{i}" for i in range(16)], dtype=object)
    return fitted


@pytest.fixture(scope="module")
def data(dim, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "dim.safetensors"
    dim.save(path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "dim.safetensors"

    def load_bytes(data):
        path.write_bytes(data)
        return DIMTransformer.load(path)

    return load_bytes


def take_apart(data):
    """Return the header of tensors, our metadata and the tensors' bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["skdim"]), data[8 + length :]


def put_together(header, content, tensors):
    """Make a file with valid checksums; `content` may be the metadata's text itself."""
    text = content if isinstance(content, str) else json.dumps(content)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    header_bytes = json.dumps({"__metadata__": {"skdim": text, "sha256": digest}, **header}).encode()
    return struct.pack("<Q", len(header_bytes)) + header_bytes + tensors


def with_content(data, **changes):
    header, content, tensors = take_apart(data)
    return put_together(header, content | changes, tensors)


def with_params(data, **changes):
    return with_content(data, params=take_apart(data)[1]["params"] | changes)


def with_tensors(data, edit):
    """Edit the tensors, by name, and make all checksums valid again."""
    _, content, _ = take_apart(data)
    tensors = safetensors.torch.load(data)
    edit(tensors)
    content["tensors_sha256"] = _digest(tensors)
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return safetensors.torch.save(tensors, {"skdim": text, "sha256": digest})


def test_putting_together_is_right(dim, data, load):
    for same in (put_together(*take_apart(data)), with_content(data), with_params(data), with_tensors(data, dict)):
        assert is_equal(load(same), dim)


def is_equal(one, other):
    """Whether two estimators hold the same, bit by bit."""
    states = [dict(dim.__getstate__()) for dim in (one, other)]
    weights = [state.pop("encoder_") for state in states]
    np.testing.assert_equal(*states)
    return weights[0].keys() == weights[1].keys() and all(
        array.tobytes() == weights[1][name].tobytes() for name, array in weights[0].items()
    )


def is_sound(loaded, dim):
    """Whether a file with other, allowed, values gave an estimator that does all that one does."""
    clone(loaded)._validate_params()
    pickle.loads(pickle.dumps(loaded))
    assert repr(loaded)
    assert len(loaded.loss_curve_) == loaded.n_iter_
    if np.prod(loaded.image_shape_, dtype=float) < 1e5:
        try:
            Z = loaded.transform(np.zeros((2, *loaded.image_shape_), dtype=np.float32).reshape(2, -1))
            assert Z.shape == (2, loaded._n_features_out)
        except ValueError as error:
            # Weights may be any numbers, and images may have come with their channels last.
            return any(reason in str(error) for reason in ("is not finite", "set data_format to"))
    return True


REFUSED = {
    "empty": (lambda data: b"", "it is empty"),
    "shorter than a length": (lambda data: data[:7], "it is truncated"),
    "a length alone": (lambda data: data[:8], "it is truncated or no safetensors file: it declares a header of"),
    "truncated in the header": (lambda data: data[:500], "it is truncated or no safetensors file"),
    "truncated in the tensors": (lambda data: data[:-1], "it is truncated or of other dtypes"),
    "longer": (lambda data: data + b"\0", "it is truncated or of other dtypes"),
    **{
        f"a pickle of protocol {protocol}": (
            lambda data, protocol=protocol: pickle.dumps({"data": data}, protocol),
            "it is no safetensors file; it begins like a pickle, which joblib.load or pickle.load reads, if you trust",
        )
        for protocol in (2, 3, 4, 5)
    },
    "a zip archive": (lambda data: b"PK\3\4" + data, "it is no safetensors file; it begins like a zip archive"),
    "truncated, of a length that begins like a pickle": (
        lambda data: struct.pack("<Q", 0x0480) + data[8:500],
        "it is truncated or no safetensors file: it declares a header of 1152 bytes",
    ),
    "a huge header": (lambda data: struct.pack("<Q", 2**63) + data[8:], "declares a header of 9223372036854775808 byt"),
    "a header over the cap": (
        lambda data: struct.pack("<Q", 1 << 24) + b" " * (1 << 24),
        "declares a header of 16777216 bytes",
    ),
    "no UTF-8": (
        lambda data: data[:8] + b"\xff" + data[9:],
        "its header is not valid JSON: 'utf-8' codec can't decode",
    ),
    "UTF-16": (
        lambda data: struct.pack("<Q", 6) + "{}".encode("utf-16"),
        "its header is not valid JSON: 'utf-8' codec can't decode",
    ),
    "a byte order mark": (lambda data: struct.pack("<Q", 5) + b"\xef\xbb\xbf{}", "its header is not valid JSON"),
    "a list": (lambda data: struct.pack("<Q", 2) + b"[]", "its header is not a JSON object"),
    "a nesting bomb": (
        lambda data: struct.pack("<Q", 1 << 15) + b"[" * (1 << 15),
        "its header is not valid JSON: maximum recursion depth",
    ),
    "a nesting bomb in the metadata": (
        lambda data: put_together({}, '{"a":' * 30_000, b""),
        "its metadata is not valid JSON: maximum recursion depth",
    ),
    "too many lists": (
        lambda data: with_content(data, history=[{"loss": 1.0}] * (1 << 16)),
        "its metadata has more than 65536 lists and objects",
    ),
    "other software's": (
        lambda data: safetensors.torch.save(safetensors.torch.load(data)),
        "it is a safetensors file of other software",
    ),
    "metadata that is no text": (
        lambda data: struct.pack("<Q", 43) + b'{"__metadata__":{"skdim":"{}", "sha256":0}}',
        "its metadata are not all texts",
    ),
    "a flipped bit in the metadata": (
        lambda data: data.replace(rb"\"lr\": 0.002", rb"\"lr\": 0.003"),
        "the checksum of its metadata is wrong, the file is damaged",
    ),
    "a flipped bit in the tensors": (
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "the checksum of its tensors is wrong, the file is damaged",
    ),
    "a duplicated key": (
        lambda data: put_together({}, '{"format": 1, "format": 1}', b""),
        "its metadata is not valid JSON: a key is there twice",
    ),
    "NaN": (lambda data: with_params(data, lr=float("nan")), "NaN is no number"),
    "a number beyond float64": (lambda data: put_together({}, '{"lr": 1e999}', b""), "a number is not finite"),
    "an integer of many digits": (
        lambda data: put_together({}, '{"lr": ' + "1" * 5000 + "}", b""),
        "its metadata is not valid JSON: Exceeds the limit",
    ),
    "a later format": (lambda data: with_content(data, format=2), "it has format 2, this version of skdim reads 1"),
    "format true": (lambda data: with_content(data, format=True), "it has format True"),
    "no checksum of the tensors": (
        lambda data: with_content(data, tensors_sha256=None),
        "it has no checksum of its tensors",
    ),
    "another class": (lambda data: with_content(data, **{"class": "os.system"}), "it holds a 'os.system'"),
    "an unknown entry": (lambda data: with_content(data, pickle="gASV"), "the metadata entry 'pickle' is unknown"),
    "an unknown parameter": (lambda data: with_params(data, lq=1), "the parameter 'lq' is unknown"),
    "a bad parameter": (lambda data: with_params(data, lr=-1), "The 'lr' parameter of DIMTransformer must be a float"),
    "a parameter beyond float64": (
        lambda data: with_params(data, lr=10**400),
        "lr must be a number within float64, got 1000",
    ),
    "a long list as parameter": (
        lambda data: with_params(data, random_state=[0.5] * 101),
        "a list or dict has more than 100 entries",
    ),
    "a deep list as parameter": (
        lambda data: with_params(data, negatives=[[[[[[["roll"]]]]]]]),
        "or lies too deep in others",
    ),
    "unfit negatives": (
        lambda data: with_params(data, negatives={"dict": {"local": "nope"}}),
        "negatives must be one of",
    ),
    "a class as encoder": (
        lambda data: with_params(data, encoder="os.path.join"),
        "The 'encoder' parameter of DIMTransformer must be",
    ),
    "an object as parameter": (
        lambda data: with_params(data, lr={"a": 1}),
        "a JSON object stands for a tuple, a dict or a StandardAugmentation only",
    ),
    "an augmentation that there is not": (
        lambda data: with_params(data, augmentation={"StandardAugmentation": {"crop": 0}}),
        "its parameters are unfit: crop must be a number in (0, 1], got 0",
    ),
    "an augmentation of other settings": (
        lambda data: with_params(data, augmentation={"StandardAugmentation": {"code": 0.5}}),
        "unexpected keyword argument 'code'",
    ),
    "an augmentation of nested settings": (
        lambda data: with_params(data, augmentation={"StandardAugmentation": {"crop": [[0.5]]}}),
        "crop must be a number in (0, 1], got [[0.5]]",
    ),
    "a callback": (lambda data: with_params(data, callbacks=["os"]), "its parameter 'callbacks' is not the default"),
    "a bad image_shape": (lambda data: with_params(data, image_shape=[1, 2]), "image_shape must be three positive int"),
    "an encoder by path": (
        lambda data: with_content(data, encoder="../../encoder"),
        "its metadata entry 'encoder' is unfit: '../../encoder'",
    ),
    "an encoder that is not skdim's": (
        lambda data: with_content(data, encoder=None),
        "it holds the weights of an encoder that is not skdim's",
    ),
    "another encoder": (lambda data: with_content(data, encoder="stride1"), "the tensor 'encoder."),
    "terabytes of embedding": (
        lambda data: with_content(data, width=1 << 40),
        "the tensor 'encoder.embedding.weight' has shape [4, 1024], expected [1099511627776, 1024]",
    ),
    "more embedding than can be counted": (lambda data: with_content(data, width=1 << 70), "cannot be built and run"),
    "terabytes of image": (
        lambda data: with_content(data, image_shape=[1, 1 << 40, 1 << 40]),
        "have more than 4294967296 values",
    ),
    "gigabytes of image": (
        lambda data: with_content(data, image_shape=[1, 1 << 16, 1 << 16], feature_names=None),
        "the tensor 'encoder.",
    ),
    "names for other images": (
        lambda data: with_content(data, image_shape=[1, 4, 5]),
        "16 feature names for images of 20",
    ),
    "history without a loss": (lambda data: with_content(data, history=[{"local": 1.0}]), "'history' is unfit"),
    "history of texts": (lambda data: with_content(data, history=[{"loss": "1"}]), "'history' is unfit"),
    "history beyond float64": (
        lambda data: with_content(data, history=[{"loss": 10**400}]),
        "'history' is unfit",
    ),
    "column names with escape codes": (
        lambda data: with_content(data, feature_names=["\x1b[31m"] * 16),
        "'feature_names' is unfit",
    ),
    "a missing tensor": (lambda data: with_tensors(data, lambda t: t.pop("mean")), "the tensor 'mean' is missing"),
    "an extra tensor": (
        lambda data: with_tensors(data, lambda t: t.update(extra=t["mean"].clone())),
        "the tensor 'extra' is unknown",
    ),
    "a tensor of another shape": (
        lambda data: with_tensors(data, lambda t: t.update(mean=t["mean"].reshape(1, 1))),
        "the tensor 'mean' has shape [1, 1], expected [1]",
    ),
    "a tensor of another dtype": (
        lambda data: with_tensors(data, lambda t: t.update(mean=t["mean"].double())),
        "it is truncated or of other dtypes",
    ),
    "a tensor of another dtype and the same size": (
        lambda data: with_tensors(data, lambda t: t.update(mean=t["mean"].int())),
        "the tensor 'mean' is not torch.float32 of shape [1]",
    ),
    "no deviation": (lambda data: with_tensors(data, lambda t: t["std"].zero_()), "no mean and standard deviation"),
    "NaN as mean": (lambda data: with_tensors(data, lambda t: t["mean"].fill_(np.nan)), "no mean and standard devi"),
    "overlapping tensors": (
        lambda data: put_together(
            {name: entry | {"data_offsets": [0, 4]} for name, entry in take_apart(data)[0].items()},
            *take_apart(data)[1:],
        ),
        "it is no valid safetensors file",
    ),
    "a dtype that torch has not": (
        lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
        "it is no valid safetensors file",
    ),
    "escape codes for the terminal": (
        lambda data: with_params(data, **{"\x1b[2J\r\n" + "a" * 10_000: 1}),
        r"the parameter '\x1b[2J\r\na",
    ),
}
for key in ("params", "width", "history", "versions", "feature_names"):

    def remove(data, key=key):
        header, content, tensors = take_apart(data)
        del content[key]
        return put_together(header, content, tensors)

    REFUSED[f"no {key}"] = (remove, f"the metadata entry {key!r} is missing")


def test_a_file_that_is_older_than_what_it_lacks_is_read(dim, data, load):
    header, content, tensors = take_apart(data)
    del content["params"]["gather_negatives"], content["channels_last"], content["versions"]["torch"]
    assert is_equal(load(put_together(header, content, tensors)), dim)


@pytest.mark.parametrize(("forge", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_file_is_refused_for_a_reason_that_the_message_gives(data, load, forge, reason, tmp_path, counted):
    counted("files fuzzed")
    with pytest.raises(InvalidFileError, match=re.escape(reason)) as caught:
        load(forge(data))
    message = str(caught.value)
    assert message.startswith(f"{str(tmp_path / 'dim.safetensors')!r} cannot be loaded by DIMTransformer.load: ")
    assert len(message) < 600
    assert message.isprintable()


def test_a_message_quotes_little_of_a_file(data, load):
    with pytest.raises(InvalidFileError) as caught:
        load(with_params(data, lr="a" * 1_000_000))
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InvalidFileError, match="it is not a regular file"):
            DIMTransformer.load(path)
    with pytest.raises(FileNotFoundError):
        DIMTransformer.load(tmp_path / "none")


def test_a_terabyte_that_takes_no_space_on_the_disk_is_not_read(data, tmp_path):
    path = tmp_path / "dim.safetensors"
    path.write_bytes(data)
    os.truncate(path, 1 << 40)
    with pytest.raises(InvalidFileError, match="bytes of tensors should follow the header"):
        DIMTransformer.load(path)


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_loading_imports_runs_and_unpickles_nothing(data, dim, tmp_path):
    for i, forge in enumerate([lambda data: data, *(forge for forge, _ in REFUSED.values())]):
        (tmp_path / f"{i}.safetensors").write_bytes(forge(data))
    np.save(tmp_path / "X.npy", ROWS)
    script = """
import sys
from pathlib import Path
import numpy
from skdim import DIMTransformer

folder = Path(sys.argv[1])
paths = sorted(folder.glob("*.safetensors"))
# torch imports some of itself when it first computes.
Z = DIMTransformer.load(folder / "0.safetensors").transform(numpy.load(folder / "X.npy"))
numpy.save(folder / "Z.npy", Z)
events = []
sys.addaudithook(lambda *event: events.append(event))
refused = 0
for path in paths:
    try:
        DIMTransformer.load(path)
    except ValueError:
        refused += 1
watched = {"import", "exec", "compile", "pickle", "marshal", "open", "os", "subprocess", "socket", "ctypes", "code"}
events = [(name, arguments) for name, arguments in events if name.split(".")[0] in watched]
print(refused, [event for event in events if event[0] != "open" or Path(event[1][0]) not in paths])
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True, check=True)
    assert result.stdout.strip() == f"{len(REFUSED)} []"
    assert np.array_equal(np.load(tmp_path / "Z.npy"), dim.transform(ROWS))


# The fuzz test: files changed at random, with the checksums broken or made valid again.

HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "\x00", "\ud800", "\u202e", "../../etc/passwd", "cuda:99", "cpu", "os.system", "%s{}" * 9, "1" * 5000),
    *([], {}, [[]], [{}], [None], [1, 2, 3], [1, 4, 4], [3, 4, 4], [1.0, 4.0, 4.0], [2**40] * 3, [1] * 10_000),
    *({"tuple": []}, {"tuple": [1, 4, 4]}, {"tuple": 1}, {"__class__": "os"}, {"loss": 1}, {"py/object": "os.system"}),
    *("dcgan", "stride1", "hidden", "features", "normal", "F16", "I32", [0, 4], [4, 0], [0, 2**64]),
)
RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "[" * 100_000, '{"a":' * 100_000, "nul", "01"),
    *("[]" * 2, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"', "\ufeff1", "/* */ 1", "'a'", "0x10", "1_000", '"\n"'),
)


def places(value, path=()):
    """List the paths to every value in nested JSON, at most two entries of a list."""
    yield path
    if isinstance(value, dict):
        entries = list(value.items())
    else:
        entries = list(enumerate(value))[:2] if isinstance(value, list) else []
    for key, entry in entries:
        yield from places(entry, (*path, key))


def put(value, path, new):
    """Set, or with `...` remove, what is at a path; the value itself at the empty one."""
    if not path:
        return {} if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def damage(rng, data):
    """Damage a file as disks, networks and editors do."""
    damaged = bytearray(data)
    header_end = 8 + int.from_bytes(data[:8], "little")
    end = header_end if rng.random() < 0.7 else len(data)
    kind = rng.integers(5)
    at, length = int(rng.integers(end)), int(rng.integers(1, 64))
    if kind == 0:
        for bit in rng.integers(end * 8, size=rng.integers(1, 9)):
            damaged[bit // 8] ^= 1 << (bit % 8)
    elif kind == 1:
        del damaged[at:]
    elif kind == 2:
        del damaged[at : at + length]
    elif kind == 3:
        source = int(rng.integers(end))
        damaged[at : at + length * int(rng.integers(2))] = data[source : source + length]
    else:
        damaged[:8] = int(rng.integers(2 ** rng.integers(1, 63))).to_bytes(8, "little")
    return bytes(damaged)


def forge(rng, data):
    """Change one thing of a file and make its checksums valid, as a stranger would."""
    header, content, tensors = take_apart(data)
    new = ... if rng.random() < 0.1 else HOSTILE[rng.integers(len(HOSTILE))]
    kind = rng.integers(6)
    if kind < 3:
        paths = list(places(content))
        return put_together(header, put(content, paths[rng.integers(len(paths))], new), tensors)
    if kind == 3:
        paths = list(places(header))[1:]
        return put_together(put(header, paths[rng.integers(len(paths))], new), content, tensors)
    if kind == 4:
        paths = list(places(content))
        marked = put(content, paths[rng.integers(len(paths))], "MARK")
        return put_together(header, json.dumps(marked).replace('"MARK"', RAW[rng.integers(len(RAW))]), tensors)

    def edit(tensors):
        name = sorted(tensors)[rng.integers(len(tensors))]
        tensor = tensors[name].reshape(-1)
        if rng.random() < 0.2:
            tensors[name] = tensor
        elif rng.random() < 0.5:
            tensor[rng.integers(len(tensor))] = int(rng.integers(-5, 5)) if not tensor.is_floating_point() else np.nan
        else:
            tensor.fill_(int(rng.integers(-5, 5)))

    return with_tensors(data, edit)


# JSON that takes many times its size in memory or in time.
WASTEFUL = ("{},", '{"a":0},', "[0],", "0.5,", '"\U0001f600",', "1" * 4300 + ",")


# The same of a parameter, which a message may quote.
WASTEFUL_VALUES = ("[],", "9e9,", "[" * 50 + "]" * 50 + ",", '{"tuple":[]},')


def peak_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux has a peak")


def fuzz(dim, data, load, files):
    """Load the files; every one is refused, or gives the same estimator or, if forged, one that is sound."""
    measures = os.path.exists("/proc/self/clear_refs")
    if measures:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
    accepted = slowest = 0
    for mutate, check, rng in files:
        changed = mutate(rng, data)
        start = time.perf_counter()
        loaded, reason = None, ""
        try:
            loaded = load(changed)
        except InvalidFileError as error:
            reason = str(error)
        assert reason.isprintable()
        slowest = max(slowest, time.perf_counter() - start)
        if loaded is not None:
            accepted += 1
            assert check(loaded, dim)
    assert slowest < SECONDS
    peak = peak_memory() - before if measures else 0
    assert peak < MEMORY
    return f"{len(files)} files, {accepted} accepted, slowest {slowest:.2f} s, peak memory {peak / 1e6:.0f} MB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_files", [300, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mutate", "check"), [(damage, is_equal), (forge, is_sound)])
def test_changed_files_are_refused_or_harmless(dim, data, load, counted, n_files, mutate, check):
    files = [(mutate, check, np.random.default_rng([n_files, i])) for i in range(n_files)]
    print(fuzz(dim, data, load, files))
    counted("files fuzzed", n_files)


def test_brackets_in_texts_are_no_lists(dim, data, load):
    names = ["[" * 5000 + '\\"{' + str(i) for i in range(16)]
    assert list(load(with_content(data, feature_names=names)).feature_names_in_) == names


def test_what_load_would_refuse_is_not_saved(dim, tmp_path):
    long = copy.copy(dim)
    long.history_ = [{"loss": 1.0}] * (MAX_CONTAINERS + 1)
    with pytest.raises(ValueError, match=f"or {MAX_CONTAINERS} lists and dicts"):
        long.save(tmp_path / "dim.safetensors")
    assert not list(tmp_path.iterdir())


def test_wasteful_headers(dim, data, load, counted):
    def make(unit, _):
        text = f'{{"a":[{unit * ((MAX_HEADER_BYTES - 9) // len(unit.encode()))}0]}}'.encode()
        return struct.pack("<Q", len(text)) + text

    print(fuzz(dim, data, load, [(make, is_equal, unit) for unit in WASTEFUL]))
    counted("files fuzzed", len(WASTEFUL))


def test_wasteful_parameters(dim, data, load, counted):
    cases = [(name, unit) for name in ("image_shape", "negatives", "lr") for unit in WASTEFUL_VALUES]

    def make(case, _):
        name, unit = case
        text = json.dumps(take_apart(with_params(data, **{name: "MARK"}))[1])
        text = text.replace('"MARK"', f"[{unit * (4_000_000 // len(unit))}0]")
        return put_together(take_apart(data)[0], text, b"")

    print(fuzz(dim, data, load, [(make, is_equal, case) for case in cases]))
    counted("files fuzzed", len(cases))


def test_a_network_of_ones_own_takes_no_memory_for_images_of_any_size(tmp_path):
    """A file may say how large its images are, where the encoder is the user's and its weights do not tell."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.AdaptiveAvgPool2d(1))
    encoder = partial(LayerEncoder, network, "0")
    path = tmp_path / "dim.safetensors"
    DIMTransformer(encoder=encoder, max_epochs=0).fit(ROWS.reshape(-1, 4, 4)).save(path)
    path.write_bytes(with_content(path.read_bytes(), image_shape=[1, 1 << 16, 1 << 16]))
    assert DIMTransformer.load(path, encoder=encoder).image_shape_ == (1, 1 << 16, 1 << 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_place_takes_every_hostile_value(dim, data, load, counted):
    header, content, tensors = take_apart(data)
    # The texts stand for their places: a file is made when it is its turn.
    cases = [(path, new) for path in places(content) for new in (..., *HOSTILE)]

    def make(case, _):
        return put_together(header, put(content, *case), tensors)

    print(fuzz(dim, data, load, [(make, is_sound, case) for case in cases]))
    counted("files fuzzed", len(cases))
