"""Search by Optuna over the weights of the loss and the learning rate; trials that fall behind are given up early.

    pip install optuna
    python examples/optuna_search.py --n-trials 20 --max-epochs 8
    python examples/optuna_search.py --score retrieval

Losses of different weights cannot be compared. A trial is therefore scored after each epoch by a scorer of
`skdim.evaluation`, which has nothing of the loss in it: by the neighbours of labelled validation images, or without
labels by the retrieval of crops, which says less about classes. All trials have the same schedule of the learning rate,
so their scores after the same epoch can be compared, and those below the median are given up. Adam does not mind the
scale of a loss: only the ratios of the weights matter, and `local_weight` stays 1.

Trains on scikit-learn's digits; about a minute on two cores.
"""

import argparse

import optuna
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch.callbacks import Callback

from skdim import DIMTransformer
from skdim.evaluation import LinearProbe, knn_scorer, retrieval_scorer

SCORERS = {"neighbours": knn_scorer, "retrieval": retrieval_scorer}
DEFAULTS = {name: DIMTransformer().get_params()[name] for name in ("global_weight", "prior_weight", "lr")}


class Pruning(Callback):
    """Report a score after each epoch, and give the trial up where Optuna says so.

    The exception passes through ``fit``, which leaves the transformer as it was.

    Parameters
    ----------
    trial : optuna.Trial
        Gets the scores.
    score : callable
        ``score()`` returns a number, of the transformer as it is by then.
    """

    def __init__(self, trial, score):
        self.trial = trial
        self.score = score

    def on_epoch_end(self, net, **kwargs):
        self.trial.report(self.score(), step=len(net.history))
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(trial, max_epochs, X, score):
    """Train with the parameters that a trial suggests and return the score."""
    params = {
        "global_weight": trial.suggest_float("global_weight", 0.0, 1.0),
        "prior_weight": trial.suggest_float("prior_weight", 0.01, 1.0, log=True),
        "lr": trial.suggest_float("lr", 2e-4, 1e-2, log=True),
    }
    dim = DIMTransformer(**params, max_epochs=max_epochs, random_state=0)
    dim.set_params(callbacks=[Pruning(trial, lambda: score(dim))]).fit(X)
    return score(dim)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-trials", type=int, default=20, help="(default 20)")
    parser.add_argument("--max-epochs", type=int, default=8, help="of a trial that is not given up (default 8)")
    parser.add_argument("--score", choices=SCORERS, default="neighbours", help="(default neighbours)")
    arguments = parser.parse_args()

    X, y = load_digits(return_X_y=True)
    X_train, X_rest, y_train, y_rest = train_test_split(X, y, train_size=1000, stratify=y, random_state=0)
    X_validation, X_test, y_validation, y_test = train_test_split(
        X_rest, y_rest, test_size=400, stratify=y_rest, random_state=0
    )

    def score(dim):
        return SCORERS[arguments.score](dim, X_validation, y_validation)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    )
    # What is found is then no worse than the defaults, by this score.
    study.enqueue_trial(DEFAULTS)
    study.optimize(
        lambda trial: objective(trial, arguments.max_epochs, X_train, score),
        n_trials=arguments.n_trials,
        # Weights and rates that diverge are worth a failed trial, not the study.
        catch=(FloatingPointError,),
    )
    n_pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    n_epochs = sum(len(trial.intermediate_values) for trial in study.trials)
    print(f"{len(study.trials)} trials, {n_pruned} of them given up: {n_epochs} epochs instead of ", end="")
    print(f"{len(study.trials) * arguments.max_epochs}.\n")

    print(f"{'':10}{'global_weight':>15}{'prior_weight':>15}{'lr':>10}{arguments.score:>15}{'accuracy':>11}")
    for name, params in (("defaults", DEFAULTS), ("found", study.best_params)):
        dim = DIMTransformer(**params, max_epochs=arguments.max_epochs, random_state=0).fit(X_train)
        probe = LinearProbe(random_state=0).fit(dim.transform(X_train), y_train)
        values = "".join(f"{params[key]:>{width}.3g}" for key, width in zip(DEFAULTS, (15, 15, 10), strict=True))
        print(f"{name:10}{values}{score(dim):>15.3f}{probe.score(dim.transform(X_test), y_test):>11.1%}")
    print(f"\n{arguments.score}: what was searched by, on validation images; accuracy: a linear probe on test images.")


if __name__ == "__main__":
    main()
