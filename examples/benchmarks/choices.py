"""What each choice of the method is worth: one parameter switched at a time, equal seconds of training for each row.

    python examples/benchmarks/choices.py cifar10.npz --seconds 30 --seeds 0 1 2
    python examples/benchmarks/choices.py --print

Every row trains on the first 10,000 images without labels, for as many epochs as fit into the seconds: timed before on
some of the images, and one at least, so that a slow row may take longer; the table has the seconds it took. A linear
probe is fitted on their labels for each layer. It is measured on 10,000 other images of the training part, because
defaults are chosen by this table: the held-out images, the last 10,000 of the file, are not touched.

Results are appended to a CSV file. What is in it already is not measured again, so that the table can be built in
pieces.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from cifar10 import N_TEST, load_cifar10
from machine import describe_machine
from results import append_result, read_results, summary

from skdim import DIMTransformer
from skdim.devices import resolve_device
from skdim.evaluation import LinearProbe

LAYERS = ("embedding", "hidden", "features")
N_TRAIN = N_VALIDATION = 10_000
# Images on which an epoch is timed.
N_TIMED = 2_000

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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="file with the images, or 'openml'")
    parser.add_argument("--seconds", type=float, default=30, help="of training for each row (default 30)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--groups", nargs="+", choices=CHOICES, default=list(CHOICES), help="(default all)")
    parser.add_argument("--csv", type=Path, default=Path("choices.csv"), help="(default choices.csv)")
    parser.add_argument("--print", action="store_true", help="print the table and measure nothing")
    arguments = parser.parse_args()
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


def count_epochs(params, X, seconds):
    """Epochs that fit into the seconds, by the second of two: the first pays for set-up."""
    epoch = DIMTransformer(max_epochs=2, random_state=0, **params).fit(X[:N_TIMED]).history_[-1]
    return max(1, round(seconds * N_TIMED / (epoch["seconds"] * len(X))))


def seconds_since(start):
    return round(time.perf_counter() - start, 1)


def measure(params, epochs, seed, X_train, y_train, X_test, y_test):
    start = time.perf_counter()
    dim = DIMTransformer(max_epochs=epochs, random_state=seed, **params)
    machine = describe_machine(resolve_device(dim.device))
    try:
        dim.fit(X_train)
    except FloatingPointError as error:
        # An objective that diverges is a result: it has no accuracy.
        return {"epochs": epochs, "training_seconds": seconds_since(start), "machine": machine, "note": str(error)}
    result = {"epochs": epochs, "training_seconds": seconds_since(start), "machine": machine, "note": ""}
    for layer in LAYERS:
        if layer in dim._layer_shapes:
            dim.set_params(output_layer=layer)
            probe = LinearProbe(Cs=(1e-4, 1e-3, 1e-2), max_iter=50, random_state=0)
            accuracy = probe.fit(dim.transform(X_train), y_train).score(dim.transform(X_test), y_test)
            result[layer] = round(accuracy, 4)
    return result


def build_table(arguments):
    images, labels, data = load_cifar10(arguments.path)
    images, labels = images[:-N_TEST], labels[:-N_TEST]
    parts = [images[:N_TRAIN], labels[:N_TRAIN], images[-N_VALIDATION:], labels[-N_VALIDATION:]]
    results = read_results(arguments.csv)
    done = {(r["params"], r["seconds"], r["seed"]) for r in results}
    epochs = {(r["params"], r["seconds"]): int(r["epochs"]) for r in results}
    for seed in arguments.seeds:
        for group, params in rows(arguments.groups):
            text = json.dumps(params)
            key = (text, str(arguments.seconds))
            if (*key, str(seed)) in done:
                continue
            # All seeds of a row train for the same number of epochs.
            if key not in epochs:
                epochs[key] = count_epochs(params, parts[0], arguments.seconds)
            result = {"group": group, "params": text, "seconds": arguments.seconds, "seed": seed, "data": data}
            result |= dict.fromkeys(LAYERS, "") | measure(params, epochs[key], seed, *parts)
            append_result(arguments.csv, result)
            print(f"{text}, seed {seed}: {result}", flush=True)


def print_table(results):
    if not results:
        raise SystemExit("there is nothing to print yet")
    first = results[0]
    print(f"{first['data']}: {N_TRAIN} training images, linear probe on {N_VALIDATION} validation images, in percent")
    print(f"{first['machine']}; {first['seconds']} s of training a row\n")
    print(f"{'':14}{'parameters':58}{'epochs':>7}{'seconds':>9}" + "".join(f"{layer:>15}" for layer in LAYERS))
    groups = {}
    for result in results:
        groups.setdefault((result["group"], result["params"]), []).append(result)
    for (group, params), seeds in groups.items():
        named = ", ".join(f"{name}={value!r}" for name, value in json.loads(params).items())
        seconds = statistics.mean(float(result["training_seconds"]) for result in seeds)
        print(f"{group:14}{named:58}{seeds[0]['epochs']:>7}{seconds:>9.0f}", end="")
        print("".join(f"{summary([result[layer] for result in seeds], 100, 1):>15}" for layer in LAYERS))


def main():
    arguments = parse_arguments()
    if not arguments.print:
        build_table(arguments)
    print_table(read_results(arguments.csv))


if __name__ == "__main__":
    main()
