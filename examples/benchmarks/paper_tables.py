"""Rows of the paper's CIFAR-10 tables, measured here, beside the paper's own figures.

    python examples/benchmarks/paper_tables.py cifar10_train_jpeg.npz --budget 20ep --seeds 0 1 2
    python examples/benchmarks/paper_tables.py cifar10_train_jpeg.npz --budget 300s --rows "DIM(L) InfoNCE"
    python examples/benchmarks/paper_tables.py --print

Each row is trained without labels on the first n-train images; a linear SVM, the paper's MLP and a logistic regression,
which the paper has not, are fitted on their labels for each layer and measured on the last 10,000 images of the file,
which nothing here trains or tunes on. The parameters of a row are those of its objective; the others are
DIMTransformer's defaults, for budgets far below the paper's 1000 epochs. --set changes any of them, so the paper's own
training of DIM(L) is

    --budget 1000ep --set mi_units=2048 batch_size=64 lr=1e-4 lr_schedule=constant

Results are appended to a CSV file, by default ours in the folder beside this one. What is in it already, with the same
settings, seed, data and versions, is not measured again: a long table is built in pieces, and goes on after an
interruption. With --checkpoints, so does the training of a row.
--print shows all of it, as means over the seeds and their standard deviation.
"""

import argparse
import hashlib
import json
import time
from math import ceil
from pathlib import Path

import numpy as np
import sklearn
import skorch
import torch
from cifar10 import N_TEST, load_cifar10
from machine import describe_machine
from options import assignment
from results import RESULTS, append_result, read_results, summary

import skdim
from skdim import DIMTransformer
from skdim.devices import resolve_device
from skdim.evaluation import (
    LinearProbe,
    MLPProbe,
    mutual_information_bound,
    reconstruction_ms_ssim,
    total_correlation_bound,
)
from skdim.net import MIN_RECORDED_STEPS

LAYERS = ("features", "hidden", "embedding")
GLOBAL = {"local_weight": 0.0, "global_weight": 1.0, "prior_weight": 1.0}
LOCAL = {"local_weight": 1.0, "global_weight": 0.0, "prior_weight": 0.1}
BOTH = {"local_weight": 0.1, "global_weight": 0.5, "prior_weight": 0.1}

ESTIMATORS = {"DV": "dv", "JSD": "jsd", "InfoNCE": "infonce"}

ROWS = {"untrained": {"max_epochs": 0}}
ROWS |= {
    f"{name} {title}": weights | {"mi_estimator": mi_estimator}
    for name, weights in (("DIM(G)", GLOBAL), ("DIM(L)", LOCAL), ("DIM(L+G)", BOTH))
    for title, mi_estimator in ESTIMATORS.items()
}
ROWS |= {
    f"DIM(L) InfoNCE {title}": LOCAL | {"mi_estimator": "infonce"} | tasks
    for title, tasks in (
        ("+ coordinates", {"coordinate_weight": 1.0}),
        ("+ occlusion", {"occlusion": True}),
        ("+ both", {"coordinate_weight": 1.0, "occlusion": True}),
    )
}


def beside_each_estimator(figures):
    """Name the rows for which figures stand of which the paper does not say by which estimator."""
    return {f"{name} {title}": figures[name] for name in figures for title in ESTIMATORS}


# In percent, for features ("conv"), hidden ("fc") and embedding ("y").
PAPER_MLP = beside_each_estimator({"DIM(G)": (52.20, 52.84, 43.17)}) | {
    "DIM(L) DV": (72.66, 70.60, 64.71),
    "DIM(L) JSD": (73.25, 73.62, 66.96),
    "DIM(L) InfoNCE": (75.21, 75.57, 69.13),
    "DIM(L) InfoNCE + coordinates": (77.28, 73.89, 71.56),
    "DIM(L) InfoNCE + occlusion": (76.77, 74.45, 72.87),
    "DIM(L) InfoNCE + both": (77.27, 75.15, 73.99),
}
PAPER_SVM = beside_each_estimator(
    {"DIM(G)": (46.80, 28.79, 29.08), "DIM(L+G)": (57.55, 45.56, 18.63), "DIM(L)": (63.25, 54.06, 49.62)}
)
# MS-SSIM of reconstructions, MINE and NDM, from the embedding.
PAPER_INFORMATION = beside_each_estimator(
    {"DIM(G)": (0.49, 49.6, 0.35), "DIM(L+G)": (0.53, 101.7, 0.50), "DIM(L)": (0.37, 45.1, 0.18)}
)

# What makes two measurements the same.
KEY = ("row", "settings", "budget", "data", "n_train", "information", "seed", "versions")
PROBES = ("svm", "mlp", "logistic")
MEASURES = (*(f"{probe}_{layer}" for probe in PROBES for layer in LAYERS), *("ms_ssim", "mine", "ndm"))
FIELDS = (*KEY, "epochs", "training_seconds", "evaluation_seconds", *MEASURES, "machine")
VERSIONS = " ".join(f"{package.__name__} {package.__version__}" for package in (skdim, sklearn, skorch, torch))


def budget(text):
    if not (text.endswith("ep") and text[:-2].isdigit()) and not (text.endswith("s") and text[:-1].isdigit()):
        raise argparse.ArgumentTypeError(f"must be epochs, as 20ep, or seconds of training, as 300s; got {text!r}")
    return text


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="file with the images, or 'openml'")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default all)")
    parser.add_argument("--budget", type=budget, default="20ep", help="training, as 20ep or 300s (default 20ep)")
    parser.add_argument("--n-train", type=int, default=40_000, help="training images (default 40000)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="values of random_state (default 0)")
    parser.add_argument("--information", action="store_true", help="also MS-SSIM, MINE and NDM")
    parser.add_argument("--set", nargs="+", type=assignment, default=[], metavar="NAME=VALUE", help="parameters")
    parser.add_argument(
        "--csv", type=Path, default=RESULTS / "paper_tables.csv", help="(default results/paper_tables.csv)"
    )
    parser.add_argument("--checkpoints", type=Path, help="directory for checkpoints of the trainings (default none)")
    parser.add_argument("--print", action="store_true", help="print the table and measure nothing")
    arguments = parser.parse_args(argv)
    if not arguments.print and arguments.path is None:
        parser.error("the path of the images is needed, unless --print is given")
    taken = {"max_epochs", "random_state", "checkpoint_dir"}.union(*(ROWS[row] for row in arguments.rows))
    if overruled := taken & dict(arguments.set).keys():
        parser.error(f"--set cannot change {', '.join(sorted(overruled))}: the other options say what it is")
    if arguments.checkpoints is not None and not arguments.budget.endswith("ep"):
        parser.error("--checkpoints needs a budget in epochs: timed again, seconds are another number of them")
    return arguments


def key_of(result):
    return tuple(str(result[field]) for field in KEY)


def n_epochs(budget, params, X):
    """Read the budget, or find the epochs that fit into it by timing two on some of the images."""
    if budget.endswith("ep"):
        return int(budget[:-2])
    few = X[:4000]
    # The last epoch: the first pays for set-up, and on CUDA it takes some for steps to be recorded.
    on_cuda = resolve_device(params.get("device", "auto")).type == "cuda"
    epochs = 1 + (ceil(MIN_RECORDED_STEPS * params.get("batch_size", 128) / len(few)) if on_cuda else 1)
    epoch = DIMTransformer(**params | {"max_epochs": epochs}).fit(few).history_[-1]
    return max(1, round(float(budget[:-1]) / (epoch["seconds"] * len(X) / len(few))))


def checkpoint_dir(checkpoints, result):
    """Name the directory of one training among those of others, or None."""
    if checkpoints is None:
        return None
    return checkpoints / hashlib.sha256(repr(key_of(result)).encode()).hexdigest()[:16]


def measure(params, seed, with_information, X_train, y_train, X_test, y_test):
    """Train a row and probe it; return its fields of the CSV file."""
    dim = DIMTransformer(**params).fit(X_train)
    trained = time.perf_counter()
    # Those of epochs before an interruption are in the history too.
    seconds = sum(epoch["seconds"] for epoch in dim.history_)
    result = {"epochs": dim.n_iter_, "training_seconds": round(seconds, 3)}
    print(f"trained {dim.n_iter_} epochs in {seconds:.1f} s", flush=True)
    device = str(dim.device_)
    probes = {
        "svm": LinearProbe("squared_hinge", device=device, random_state=seed),
        "mlp": MLPProbe(device=device, random_state=seed),
        "logistic": LinearProbe(device=device, random_state=seed),
    }
    for layer in LAYERS:
        dim.set_params(output_layer=layer)
        Z_train, Z_test = dim.transform(X_train), dim.transform(X_test)
        for name, probe in probes.items():
            result[f"{name}_{layer}"] = round(probe.fit(Z_train, y_train).score(Z_test, y_test), 4)
            print(f"{name} on {layer}: {result[f'{name}_{layer}']:.2%}", flush=True)
    if with_information:
        # LAYERS ends with the embedding: Z_test is that of the test images.
        result["ms_ssim"] = round(reconstruction_ms_ssim(dim, X_train, X_test, random_state=seed), 3)
        result["mine"] = round(mutual_information_bound(X_test, Z_test, device=device, random_state=seed), 2)
        result["ndm"] = round(total_correlation_bound(Z_test, device=device, random_state=seed), 3)
    machine = describe_machine(dim.device_)
    return result | {"evaluation_seconds": round(time.perf_counter() - trained, 1), "machine": machine}


def build_table(arguments):
    images, labels, data = load_cifar10(arguments.path)
    X_train, y_train = images[:-N_TEST][: arguments.n_train], labels[:-N_TEST][: arguments.n_train]
    X_test, y_test = images[-N_TEST:], labels[-N_TEST:]
    done = {key_of(result) for result in read_results(arguments.csv)}
    for seed in arguments.seeds:
        for row in arguments.rows:
            settings = dict(arguments.set) | ROWS[row]
            result = {
                "row": row,
                "settings": json.dumps(settings, sort_keys=True),
                "budget": arguments.budget,
                "data": data,
                "n_train": len(X_train),
                "information": arguments.information,
                "seed": seed,
                "versions": VERSIONS,
            }
            if key_of(result) in done:
                print(f"{row}, seed {seed}: already in {arguments.csv}", flush=True)
                continue
            params = settings | {"random_state": seed}
            if "max_epochs" not in params:
                params["max_epochs"] = n_epochs(arguments.budget, params, X_train)
            params["checkpoint_dir"] = checkpoint_dir(arguments.checkpoints, result)
            result |= measure(params, seed, arguments.information, X_train, y_train, X_test, y_test)
            append_result(arguments.csv, {field: result.get(field, "") for field in FIELDS})
            print(
                f"{row}, seed {seed}: {result['epochs']} epochs, {result['training_seconds']} s of training and "
                f"{result['evaluation_seconds']} s of evaluation",
                flush=True,
            )


def print_table(results, title, measures, headings, paper, scale):
    groups = {}
    for result in results:
        if any(result[measure] for measure in measures):
            # A seed that was measured again, for the information, trained the same.
            groups.setdefault((result["row"], result["settings"]), {})[result["seed"]] = result
    if not groups:
        return
    print(f"\n{title}\n{'':30}{'epochs':>7}{'seeds':>6}{'seconds':>8}", end="")
    print("".join(f"{heading:>14}" for heading in headings) + f"{'the paper':>12}")
    for (row, _), of_seed in sorted(groups.items(), key=lambda item: list(ROWS).index(item[0][0])):
        group = list(of_seed.values())
        seconds = np.mean([float(result["training_seconds"]) for result in group])
        print(f"{row:30}{group[0]['epochs']:>7}{len(group):>6}{seconds:>8.0f}", end="")
        print("".join(f"{summary([result[measure] for result in group], scale):>14}" for measure in measures), end="")
        print("  " + "".join(f"{figure:>8}" for figure in paper.get(row, ["-"] * len(headings))))


def print_tables(results):
    if not results:
        raise SystemExit("there is nothing to print yet")
    for setup in sorted({(r["data"], r["n_train"], r["budget"], r["machine"], r["versions"]) for r in results}):
        data, n_train, budget, machine, versions = setup
        chosen = [r for r in results if (r["data"], r["n_train"], r["budget"], r["machine"], r["versions"]) == setup]
        print(f"\n{data}, {n_train} training images, budget {budget}\n{machine}; {versions}")
        for settings in sorted({r["settings"] for r in chosen}):
            print(f"  {next(r['row'] for r in chosen if r['settings'] == settings)}: {settings}")
        svm, mlp, logistic = ([f"{probe}_{layer}" for layer in LAYERS] for probe in PROBES)
        print_table(chosen, "Linear SVM, accuracy in percent", svm, LAYERS, PAPER_SVM, 100)
        print_table(chosen, "MLP of 200 units, accuracy in percent", mlp, LAYERS, PAPER_MLP, 100)
        print_table(chosen, "Logistic regression, accuracy in percent", logistic, LAYERS, {}, 100)
        information = ("ms_ssim", "mine", "ndm")
        print_table(chosen, "Embedding", information, ("MS-SSIM", "MINE", "NDM"), PAPER_INFORMATION, 1)
    print(
        "\nThe paper's figures are those of 1000 epochs on 50,000 images, tested on CIFAR-10's own test set."
        "\nIt does not say by which estimator it trained DIM(G), nor the encoders that its SVM, MS-SSIM, MINE and NDM"
        "\nmeasure: these figures stand beside all three."
    )


def main(argv=None):
    arguments = parse_arguments(argv)
    if not arguments.print:
        build_table(arguments)
    print_tables(read_results(arguments.csv))


if __name__ == "__main__":
    main()
