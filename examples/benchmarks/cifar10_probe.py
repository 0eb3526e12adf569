"""Linear probe on CIFAR-10: raw pixels, PCA, the untrained encoder and Deep InfoMax at each output layer.

    python examples/benchmarks/cifar10_probe.py cifar10_train_jpeg.npz --n-train 10000 --max-epochs 6

Every parameter of DIMTransformer is an option; --augmentation also takes parameters of StandardAugmentation, as
crop=0.5,color=0.4. The encoder learns from the first n-train images without labels; the probe, standardisation and
logistic regression, is fitted on their labels, with its regularisation chosen on a fifth of them; accuracy is measured
on the last 10,000 images of the file, which nothing here trains or tunes on.
--validation measures on the 10,000 images before them instead: for choosing parameters.
"""

import argparse
import inspect
import time

import numpy as np
from cifar10 import N_TEST, load_cifar10
from machine import describe_machine
from options import assignment, literal
from sklearn.base import clone
from sklearn.decomposition import PCA

from skdim import DIMTransformer
from skdim.evaluation import LinearProbe
from skdim.views import StandardAugmentation

LAYERS = ("embedding", "hidden", "features")


def augmentation(text):
    if "=" not in text:
        return literal(text)
    return StandardAugmentation(**dict(assignment(part) for part in text.split(",")))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file with the training images, or 'openml'")
    parser.add_argument("--n-train", type=int, default=10_000, help="training images (default 10000)")
    parser.add_argument("--validation", action="store_true", help="measure on other images than the held-out ones")
    parser.add_argument("--only-trained", action="store_true", help="leave out pixels, PCA and the untrained encoder")
    for name, parameter in inspect.signature(DIMTransformer).parameters.items():
        default = {"max_epochs": 6, "random_state": 0}.get(name, parameter.default)
        kind = augmentation if name == "augmentation" else literal
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"(default {default})")
    params = vars(parser.parse_args(argv))
    options = {name: params.pop(name) for name in ("path", "n_train", "validation", "only_trained")}
    return options, params


def report(name, Z_train, y_train, Z_test, y_test, rate=""):
    # A hundred iterations leave the widest probes short of convergence; more change their accuracy by tenths.
    accuracy = LinearProbe(random_state=0).fit(Z_train, y_train).score(Z_test, y_test)
    print(f"{name:40}{Z_train.shape[1]:>7}{accuracy:>10.1%}{rate:>20}", flush=True)


def main(argv=None):
    options, params = parse_arguments(argv)
    images, labels, data = load_cifar10(options["path"])
    end = len(images) - N_TEST
    test = slice(end - N_TEST, end) if options["validation"] else slice(end, None)
    train = slice(0, min(options["n_train"], test.start))
    X_train, y_train, X_test, y_test = images[train], labels[train], images[test], labels[test]

    dim = DIMTransformer(**params)
    start = time.perf_counter()
    dim.fit(X_train)
    seconds = time.perf_counter() - start
    kind = "validation" if options["validation"] else "held-out"
    print(f"data      {data}: {len(X_train)} training images, {len(X_test)} {kind} images")
    print(f"machine   {describe_machine(dim.device_)}")
    print(f"seed      {params['random_state']}")
    print(f"model     {dim}")
    print(f"training  {dim.n_iter_} epochs, {seconds:.1f} s, {dim.n_iter_ * len(X_train) / seconds:.0f} images/s")
    print(f"loss      {', '.join(f'{epoch:.3f}' for epoch in dim.loss_curve_)}\n")
    print(f"{'linear probe (logistic regression) on':40}{'width':>7}{'accuracy':>10}{'transform images/s':>20}")

    encoders = {"Deep InfoMax": dim}
    if not options["only_trained"]:
        encoders["untrained encoder"] = clone(dim).set_params(max_epochs=0, checkpoint_dir=None).fit(X_train)
        flat = [X.reshape(len(X), -1).astype(np.float32) / 255 for X in (X_train, X_test)]
        report("raw pixels", flat[0], y_train, flat[1], y_test)
        pca = PCA(64, random_state=0).fit(flat[0])
        report("PCA", pca.transform(flat[0]), y_train, pca.transform(flat[1]), y_test)
        del flat
    for title, encoder in encoders.items():
        for layer in LAYERS:
            if layer == "hidden" and params["encoder"] == "stride1":
                continue
            encoder.set_params(output_layer=layer)
            start = time.perf_counter()
            Z_train, Z_test = encoder.transform(X_train), encoder.transform(X_test)
            rate = (len(Z_train) + len(Z_test)) / (time.perf_counter() - start)
            report(f"{title}, {layer}", Z_train, y_train, Z_test, y_test, f"{rate:.0f}")


if __name__ == "__main__":
    main()
