"""Mutual-information objectives on the scores of positive and negative pairs.

A critic scores a pair of an image's location and an embedding. Each objective here turns those scores into one
loss to minimise; its negative is, up to a constant, a lower bound or a surrogate of the mutual information between
location and embedding (Hjelm et al., ICLR 2019, arXiv 1808.06670, section 3).

Every objective reads the negatives of an embedding only through one number. `Objective` keeps the two halves apart,
so that a large set of negatives can be reduced a few rows at a time and never has to exist as a whole.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

__all__ = ["donsker_varadhan", "f_divergence", "infonce", "jsd"]


class Objective(NamedTuple):
    """A loss on scores, split so that the negatives can be reduced row by row.

    Attributes
    ----------
    reduce : callable
        ``reduce(negative, count)`` maps scores of shape (N, M), of which `count` in each row are negatives and the
        others are ``-inf``, to a tensor of shape (N,).
    loss : callable
        ``loss(positive, reduced)`` maps positive scores of shape (N, L) and the reduced negatives of shape (N,) to
        the scalar loss.
    bound : callable or None
        ``bound(positive, reduced, n_images, n_locations)`` estimates a lower bound of the mutual information, in nats,
        from what `loss` is given, where the negatives of a row are `n_locations` scores of each of `n_images`
        independent images; None where the objective bounds nothing.
    merge : callable
        ``merge(parts)`` maps what `reduce` makes of P parts of the negatives, each with the `count` of all, from shape
        (P, N) to what it makes of all, of shape (N,).
    pools : bool
        Whether the loss of all images is not the mean of losses of a part of them each, but needs the reduced negatives
        of all; which of them belong to which positives then makes no difference.
    """

    reduce: Callable[[Tensor, int], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    bound: Callable[[Tensor, Tensor, int, int], Tensor] | None = None
    merge: Callable[[Tensor], Tensor] = partial(torch.sum, dim=0)
    pools: bool = False

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        return self.loss(positive, self.reduce(negative, negative.shape[1]))


def _log_sum_exp(negative: Tensor, count: int) -> Tensor:
    return torch.logsumexp(negative, dim=1)


def _log_mean_exp(negative: Tensor, count: int) -> Tensor:
    return torch.logsumexp(negative, dim=1) - math.log(count)


def _mean_softplus(negative: Tensor, count: int) -> Tensor:
    return softplus(negative).sum(dim=1) / count


def _infonce_loss(positive: Tensor, log_sum_exp: Tensor) -> Tensor:
    # log(e^T + sum e^T') - T = softplus(log sum e^T' - T): one log-sum-exp an image serves all its locations.
    return softplus(log_sum_exp[:, None] - positive).mean()


def _infonce_bound(positive: Tensor, log_sum_exp: Tensor, n_images: int, n_locations: int) -> Tensor:
    # The locations of one image are no independent samples: each image counts once, with the mean over its locations.
    # As log(1 + s) is concave in s, this is at most the bound with a single location of each.
    log_sum_of_means = log_sum_exp - math.log(n_locations)
    return math.log(1 + n_images) - softplus(log_sum_of_means[:, None] - positive).mean()


def _donsker_varadhan_bound(positive: Tensor, log_mean_exp: Tensor, n_images: int, n_locations: int) -> Tensor:
    return -_donsker_varadhan_loss(positive, log_mean_exp)


def _jsd_loss(positive: Tensor, mean_softplus: Tensor) -> Tensor:
    return softplus(-positive).mean() + mean_softplus.mean()


def _donsker_varadhan_loss(positive: Tensor, log_mean_exp: Tensor) -> Tensor:
    return torch.logsumexp(log_mean_exp, dim=0) - math.log(len(log_mean_exp)) - positive.mean()


_merge_log_sums = partial(torch.logsumexp, dim=0)

INFONCE = Objective(_log_sum_exp, _infonce_loss, _infonce_bound, _merge_log_sums)
JSD = Objective(_mean_softplus, _jsd_loss)
DONSKER_VARADHAN = Objective(
    _log_mean_exp, _donsker_varadhan_loss, _donsker_varadhan_bound, _merge_log_sums, pools=True
)

# Beyond this score an exponential goes on as its tangent.
EXP_LIMIT = 10.0


def _exp(scores: Tensor) -> Tensor:
    """Exponential that grows linearly beyond EXP_LIMIT, so that neither it nor its gradient can overflow."""
    # Not clamp(min=0), which at the limit has a gradient, too, and would double it.
    return torch.exp(scores.clamp(max=EXP_LIMIT)) * (1 + relu(scores - EXP_LIMIT))


def _f_divergence(positive_term: Callable[[Tensor], Tensor], negative_term: Callable[[Tensor], Tensor]) -> Objective:
    def reduce(negative: Tensor, count: int) -> Tensor:
        excluded = negative == -torch.inf
        terms = negative_term(negative.masked_fill(excluded, 0.0))
        return terms.masked_fill(excluded, 0.0).sum(dim=1) / count

    def loss(positive: Tensor, mean_term: Tensor) -> Tensor:
        return mean_term.mean() - positive_term(positive).mean()

    return Objective(reduce, loss)


F_DIVERGENCES = {
    "kl": _f_divergence(lambda t: t, lambda t: _exp(t - 1)),
    "rkl": _f_divergence(lambda t: -_exp(-t), lambda t: t - 1),
    "hellinger": _f_divergence(lambda t: 1 - _exp(-t), lambda t: _exp(t) - 1),
    "chi2": _f_divergence(lambda t: t, lambda t: t.square() / 4 + t),
}

OBJECTIVES = {"infonce": INFONCE, "jsd": JSD, "dv": DONSKER_VARADHAN} | F_DIVERGENCES


def infonce(positive: Tensor, negative: Tensor) -> Tensor:
    r"""InfoNCE loss: tell each positive from all negatives of its image.

    .. math:: \frac{1}{NL} \sum_{i,l} -\log \frac{e^{T_{il}}}{e^{T_{il}} + \sum_m e^{T'_{im}}}

    At chance, with all scores equal, the loss is :math:`\log(1 + M)`; with M independent negatives :math:`\log(1 + M)`
    minus the loss is a lower bound of the mutual information in nats (van den Oord et al., arXiv 1807.03748), which the
    locations of one image are not. Overflow is held off by the
    log-sum-exp, which subtracts the largest score before it exponentiates.

    Parameters
    ----------
    positive : Tensor of shape (N, L)
        Scores of each image's own L locations, float32 or float64.
    negative : Tensor of shape (N, M)
        Scores against other images, own-image entries already excluded. An entry of ``-inf`` adds nothing.

    Returns
    -------
    Tensor of shape ()
        The loss, in nats.

    Raises
    ------
    ValueError
        If the shapes are others, or there is nothing in one of them.
    """
    _check_rows(positive, negative)
    return INFONCE(positive, negative)


def jsd(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Jensen-Shannon loss: binary cross-entropy between positive and negative pairs.

    .. math:: \frac{1}{NL} \sum_{i,l} \mathrm{sp}(-T_{il}) + \frac{1}{NM} \sum_{i,m} \mathrm{sp}(T'_{im}),
              \qquad \mathrm{sp}(t) = \log(1 + e^t)

    The Jensen-Shannon estimator of the paper (equation 4) with its sign turned; :math:`2 \log 2` at chance. It is no
    bound of the mutual information but rises with it. The softplus is computed without exponentiating large scores.

    Parameters
    ----------
    positive : Tensor of shape (N, L)
        Scores of each image's own L locations, float32 or float64.
    negative : Tensor of shape (N, M)
        Scores against other images. Each entry counts: those of the own image are left out, not masked by ``-inf``.

    Returns
    -------
    Tensor of shape ()
        The loss.

    Raises
    ------
    ValueError
        If the shapes are others, or there is nothing in one of them.
    """
    _check_rows(positive, negative)
    return JSD(positive, negative)


def donsker_varadhan(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Donsker-Varadhan loss, the negative of the bound that MINE maximises.

    .. math:: \log \frac{1}{NM} \sum_{i,m} e^{T'_{im}} - \frac{1}{NL} \sum_{i,l} T_{il}

    The paper's equation 2 with its sign turned; 0 at chance. Overflow is held off by the log-sum-exp. Of the
    objectives here it is the least stable.

    Parameters
    ----------
    positive : Tensor of shape (N, L)
        Scores of each image's own L locations, float32 or float64.
    negative : Tensor of shape (N, M)
        Scores against other images. Each entry counts: those of the own image are left out, not masked by ``-inf``.

    Returns
    -------
    Tensor of shape ()
        The loss, in nats.

    Raises
    ------
    ValueError
        If the shapes are others, or there is nothing in one of them.
    """
    _check_rows(positive, negative)
    return DONSKER_VARADHAN(positive, negative)


def f_divergence(positive: Tensor, negative: Tensor, divergence: str = "kl") -> Tensor:
    r"""Loss of a variational f-divergence between the positive and the negative pairs (f-GAN).

    .. math:: \frac{1}{NM} \sum_{i,m} f^*(g(T'_{im})) - \frac{1}{NL} \sum_{i,l} g(T_{il})

    ============ ======================= =======================
    divergence   :math:`g(t)`            :math:`f^*(g(t))`
    ============ ======================= =======================
    "kl"         :math:`t`               :math:`e^{t - 1}`
    "rkl"        :math:`-e^{-t}`         :math:`t - 1`
    "hellinger"  :math:`1 - e^{-t}`      :math:`e^t - 1`
    "chi2"       :math:`t`               :math:`t^2 / 4 + t`
    ============ ======================= =======================

    Overflow is held off by letting an exponential go on as its tangent where its argument passes 10: losses and
    gradients stay finite at any score that training can meet, and are exact below.

    Parameters
    ----------
    positive : Tensor of shape (N, L)
        Scores of each image's own L locations, float32 or float64.
    negative : Tensor of shape (N, M)
        Scores against other images. Each entry counts: those of the own image are left out, not masked by ``-inf``.
    divergence : {"kl", "rkl", "hellinger", "chi2"}, default="kl"
        Kullback-Leibler, reverse Kullback-Leibler, squared Hellinger or Pearson chi-squared.

    Returns
    -------
    Tensor of shape ()
        The loss.

    Raises
    ------
    ValueError
        If the shapes are others, there is nothing in one of them, or no such divergence.

    References
    ----------
    S. Nowozin, B. Cseke, R. Tomioka, "f-GAN", NeurIPS 2016, arXiv:1606.00709.
    """
    if divergence not in F_DIVERGENCES:
        raise ValueError(f"divergence must be one of {list(F_DIVERGENCES)}, got {divergence!r}.")
    _check_rows(positive, negative)
    return F_DIVERGENCES[divergence](positive, negative)


def _check_rows(positive: Tensor, negative: Tensor) -> None:
    are_rows = positive.ndim == negative.ndim == 2 and len(positive) == len(negative)
    if not are_rows or not positive.numel() or not negative.numel():
        raise ValueError(
            "positive and negative must be of shapes (N, L) and (N, M), a row for each image and not empty, got "
            f"{tuple(positive.shape)} and {tuple(negative.shape)}."
        )
