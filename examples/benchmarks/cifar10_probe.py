"""Linear probe on CIFAR-10: raw pixels, PCA, the untrained encoder and Deep InfoMax at each output layer.

    python examples/benchmarks/cifar10_probe.py cifar10.npz --n-train 10000 --max-epochs 6

Every parameter of DIMTransformer is an option. The encoder learns from the first n-train images without labels; the
probe, standardisation and logistic regression, is fitted on their labels, with its regularisation chosen on a fifth of
them; accuracy is measured on the last 10,000 images of the file, which nothing here trains or tunes on.
"""

import argparse
import ast
import inspect
import time
import warnings

import numpy as np
from cifar10 import N_TEST, load_cifar10
from machine import describe_machine
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer

LAYERS = ("embedding", "hidden", "features")


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file with the training images, or 'openml'")
    parser.add_argument("--n-train", type=int, default=10_000, help="training images (default 10000)")
    for name, parameter in inspect.signature(DIMTransformer).parameters.items():
        default = {"max_epochs": 6, "random_state": 0}.get(name, parameter.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=literal, default=default, help=f"(default {default})")
    arguments = vars(parser.parse_args())
    return arguments.pop("path"), arguments.pop("n_train"), arguments


def probe_accuracy(Z_train, y_train, Z_test, y_test):
    # A hundred iterations leave the widest probes short of convergence; more change their accuracy by tenths.
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    split = StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0)
    search = GridSearchCV(probe, {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}, cv=split)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return search.fit(Z_train, y_train).score(Z_test, y_test)


def main():
    path, n_train, params = parse_arguments()
    images, labels, data = load_cifar10(path)
    X_train, y_train = images[:-N_TEST][:n_train], labels[:-N_TEST][:n_train]
    X_test, y_test = images[-N_TEST:], labels[-N_TEST:]

    dim = DIMTransformer(**params)
    start = time.perf_counter()
    dim.fit(X_train)
    seconds = time.perf_counter() - start
    print(f"data      {data}: {len(X_train)} training images, {len(X_test)} held-out images")
    print(f"machine   {describe_machine(dim.device_)}")
    print(f"seed      {params['random_state']}")
    print(f"model     {dim}")
    print(f"training  {dim.n_iter_} epochs, {seconds:.1f} s, {dim.n_iter_ * len(X_train) / seconds:.0f} images/s")
    print(f"loss      {', '.join(f'{epoch:.3f}' for epoch in dim.loss_curve_)}\n")

    print(f"{'linear probe (logistic regression) on':40}{'width':>7}{'accuracy':>10}{'transform images/s':>20}")

    def report(name, Z_train, Z_test, rate=None):
        accuracy = probe_accuracy(Z_train, y_train, Z_test, y_test)
        print(f"{name:40}{Z_train.shape[1]:>7}{accuracy:>10.1%}{f'{rate:.0f}' if rate else '':>20}", flush=True)

    flat = [X.reshape(len(X), -1).astype(np.float32) / 255 for X in (X_train, X_test)]
    report("raw pixels", *flat)
    pca = PCA(64, random_state=0).fit(flat[0])
    report("PCA", *map(pca.transform, flat))
    untrained = clone(dim).set_params(max_epochs=0).fit(X_train)
    for title, encoder in (("untrained encoder", untrained), ("Deep InfoMax", dim)):
        for layer in LAYERS:
            if layer == "hidden" and params["encoder"] != "dcgan":
                continue
            encoder.set_params(output_layer=layer)
            start = time.perf_counter()
            Z_train, Z_test = encoder.transform(X_train), encoder.transform(X_test)
            rate = (len(Z_train) + len(Z_test)) / (time.perf_counter() - start)
            report(f"{title}, {layer}", Z_train, Z_test, rate)


if __name__ == "__main__":
    main()
