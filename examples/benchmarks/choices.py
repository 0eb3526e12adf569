"""What each choice of the method is worth: one parameter switched at a time, equal seconds of training for each row.

    python examples/benchmarks/choices.py cifar10_train_jpeg.npz --time
    python examples/benchmarks/choices.py cifar10_train_jpeg.npz --seconds 20 --seeds 0 1 2
    python examples/benchmarks/choices.py --print

Every row trains without labels on the first 10,000 images, for the epochs that come nearest to the seconds; what then
is missing is made up by an epoch of more images, some of them twice, or of fewer. What an epoch takes is timed before,
on some of the images and against the default in turn, with nothing else on the machine (--time); training itself may
then run beside other work. For each layer a linear probe, of one strength of regularisation, is fitted on their labels
and measured on 10,000 other images of the training part, because defaults are chosen by this table: the held-out
images, the last 10,000 of the file, are not touched.

Times and results are appended to CSV files, by default those with our own results in the folder beside this file. What
is in them already is not measured again, so that the table can be built in pieces; for another machine give other
files.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from cifar10 import N_TEST, load_cifar10
from machine import describe_machine
from results import RESULTS, append_result, read_results, summary

from skdim import DIMTransformer
from skdim.batches import Standardizer
from skdim.encoders import read_layers
from skdim.evaluation import LinearProbe

LAYERS = ("embedding", "hidden", "features")
# As a row's parameters are written.
DEFAULT = "{}"
N_TRAIN = N_VALIDATION = 10_000
# Images on which an epoch is timed, and how often.
N_TIMED = 1_000
N_PAIRS = 5
# Wider layers are not probed: the features of "stride1" would take minutes and gigabytes.
MAX_WIDTH = 10_000

CHOICES = {
    "default": [{}],
    "objective": [{"mi_estimator": name} for name in ("jsd", "dv", "kl", "rkl", "hellinger", "chi2")],
    "critic": [{"discriminator": "concat", "negatives": "roll"}, {"mi_units": 64}, {"mi_units": 1024}],
    "negatives": [{"negatives": name} for name in ("roll", "shuffle", ("batch", "roll"))],
    "encoder": [{"encoder": name} for name in ("stride1", "alexnet", "resnet", "resnet_folded")],
    "terms": [{"global_weight": 0.0}, {"global_weight": 0.5}, {"local_weight": 0.0, "global_weight": 1.0}],
    "task": [{"coordinate_weight": 1.0}, {"occlusion": True}, {"coordinate_weight": 1.0, "occlusion": True}],
    "prior": [
        *({"prior_weight": 0.0}, {"prior": "normal"}, {"prior_matching": "noise"}),
        {"prior": "normal", "prior_matching": "noise"},
    ],
    "embeddings": [{"local_samples": 16}, {"multiple_globals": True}],
    "augmentation": [{"augmentation": "standard"}, {"augmentation": None}],
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="file with the images, or 'openml'")
    parser.add_argument("--time", action="store_true", help="time an epoch of each row and train nothing")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training for each row (default 20)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--groups", nargs="+", choices=CHOICES, default=list(CHOICES), help="(default all)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "choices.csv", help="(default results/choices.csv)")
    parser.add_argument(
        "--times", type=Path, default=RESULTS / "choices_times.csv", help="(default results/choices_times.csv)"
    )
    parser.add_argument("--print", action="store_true", help="print the table and measure nothing")
    arguments = parser.parse_args(argv)
    if not arguments.print and arguments.path is None:
        parser.error("the path of the images is needed, unless --print is given")
    return arguments


def rows(groups):
    """Yield group and parameters; a row that is the default is the first one already."""
    defaults = DIMTransformer().get_params()
    for group in groups:
        for params in CHOICES[group]:
            if group == "default" or any(defaults[name] != value for name, value in params.items()):
                yield group, params


def time_epoch(params, default, X):
    """Measure how many times the default's seconds an epoch takes: the median over pairs, one after the other.

    A machine that others share is faster at one time and slower at another; both of a pair then are.
    """
    dim = DIMTransformer(max_epochs=1, random_state=0, **params).fit(X)
    return statistics.median(_last_seconds(dim, X) / _last_seconds(default, X) for _ in range(N_PAIRS))


def _last_seconds(dim, X):
    return dim.partial_fit(X).history_[-1]["seconds"]


def time_rows(arguments, X):
    """Time what has not been timed yet; return the seconds an epoch takes for each row's parameters.

    They are the default's at its fastest, times a row's ratio to the default.
    """
    times = {row["params"]: float(row["epoch_seconds"]) for row in read_results(arguments.times)}
    # The default first, since the others are relative to it.
    wanted = [{}, *(params for _, params in rows(arguments.groups) if params)]
    missing = [params for params in wanted if json.dumps(params) not in times]
    if not missing:
        return times
    few = X[:N_TIMED]
    default = DIMTransformer(max_epochs=1, random_state=0).fit(few)
    machine = describe_machine(default.device_)
    for params in missing:
        if params:
            seconds = times[DEFAULT] * time_epoch(params, default, few)
        else:
            seconds = min(_last_seconds(default, few) for _ in range(5 * N_PAIRS)) * len(X) / len(few)
        times[json.dumps(params)] = seconds
        result = {"params": json.dumps(params), "epoch_seconds": round(seconds, 3), "machine": machine}
        append_result(arguments.times, result)
        print(f"{json.dumps(params)}: {seconds:.2f} s an epoch", flush=True)
    return times


def measure(params, passes, seed, X_train, y_train, X_test, y_test):
    """Train for that many passes over the images, and probe."""
    epochs = max(1, round(passes))
    n_images = round(passes * len(X_train) / epochs)
    dim = DIMTransformer(max_epochs=epochs, random_state=seed, **params)
    try:
        dim.fit(X_train[np.arange(n_images) % len(X_train)])
    except FloatingPointError as error:
        # An objective that diverges is a result: it has no accuracy.
        return {"note": str(error)}
    result = {"note": ""}
    train, test = encode_layers(dim, X_train), encode_layers(dim, X_test)
    for layer in train:
        probe = LinearProbe(Cs=(1e-3,), max_iter=50, random_state=0).fit(train[layer], y_train)
        result[layer] = round(probe.score(test[layer], y_test), 4)
    return result


def encode_layers(dim, X):
    """Compute all layers in one pass, in the precision of training, which for the slow encoders saves minutes."""
    standardize = Standardizer(dim.mean_, dim.std_, dim.device_)
    dtype = dim.net_.autocast_dtype
    with torch.inference_mode(), torch.autocast(dim.device_.type, dtype=dtype, enabled=dtype is not None):
        batches = [
            {layer: values.flatten(1) for layer, values in read_layers(dim.encoder_, standardize(batch)).items()}
            for batch in torch.from_numpy(X).permute(0, 3, 1, 2).split(250)
        ]
    layers = [layer for layer in LAYERS if layer in batches[0] and batches[0][layer].shape[1] <= MAX_WIDTH]
    return {layer: torch.cat([batch[layer] for batch in batches]).float().cpu().numpy() for layer in layers}


def build_table(arguments):
    images, labels, data = load_cifar10(arguments.path)
    images, labels = images[:-N_TEST], labels[:-N_TEST]
    parts = [images[:N_TRAIN], labels[:N_TRAIN], images[-N_VALIDATION:], labels[-N_VALIDATION:]]
    times = time_rows(arguments, parts[0])
    if arguments.time:
        return
    done = {(r["params"], r["seconds"], r["data"], r["seed"]) for r in read_results(arguments.csv)}
    for seed in arguments.seeds:
        for group, params in rows(arguments.groups):
            text = json.dumps(params)
            if (text, str(arguments.seconds), data, str(seed)) in done:
                continue
            passes = arguments.seconds / times[text]
            result = {"group": group, "params": text, "seconds": arguments.seconds, "seed": seed, "data": data}
            result |= {"epochs": round(passes, 2)} | dict.fromkeys(LAYERS, "") | measure(params, passes, seed, *parts)
            append_result(arguments.csv, result)
            print(f"{text}, seed {seed}: {result}", flush=True)


def print_table(arguments):
    results = read_results(arguments.csv)
    if not results:
        raise SystemExit("there is nothing to print yet")
    machine = read_results(arguments.times)[0]["machine"]
    for data, seconds in dict.fromkeys((result["data"], result["seconds"]) for result in results):
        print(f"{data}: {N_TRAIN} training images, linear probe on {N_VALIDATION} validation images, in percent")
        print(f"{seconds} s of training a row on {machine}\n")
        print(f"{'':14}{'parameters':58}{'epochs':>7}{'seeds':>7}" + "".join(f"{layer:>15}" for layer in LAYERS))
        groups = {}
        for result in results:
            if (result["data"], result["seconds"]) == (data, seconds):
                groups.setdefault((result["group"], result["params"]), []).append(result)
        for (group, params), seeds in groups.items():
            named = ", ".join(f"{name}={value!r}" for name, value in json.loads(params).items())
            n_diverged = sum(bool(result["note"]) for result in seeds)
            print(f"{group:14}{named:58}{seeds[0]['epochs']:>7}{len(seeds):>7}", end="")
            print("".join(f"{summary([result[layer] for result in seeds], 100, 1):>15}" for layer in LAYERS), end="")
            print(f"  {n_diverged} diverged" if n_diverged else "")


def main(argv=None):
    arguments = parse_arguments(argv)
    if not arguments.print:
        build_table(arguments)
    if not arguments.time:
        print_table(arguments)


if __name__ == "__main__":
    main()
