"""The model that is trained: an encoder, its critics and its prior discriminator, and their loss terms."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from skdim.discriminators import CRITICS, Critic, PriorDiscriminator
from skdim.images import ImageShape
from skdim.objectives import OBJECTIVES, Objective

__all__ = ["InfoMaxModel", "build_model", "contrast"]

# Scores held at once against all images of a batch, in elements: 64 MiB of float32.
MAX_PAIR_ELEMENTS = 1 << 24


class InfoMaxModel(nn.Module):
    """Encoder and discriminators; computes the named terms of the Deep InfoMax loss.

    Parameters
    ----------
    encoder : nn.Module
        Maps images to (embedding, features).
    critics : mapping of str to Critic
        "local" and "global", those whose weight is not 0.
    prior : PriorDiscriminator or None
        None where the prior's weight is 0.
    objective : Objective
        The mutual-information objective.
    negatives : {"batch", "roll", "shuffle"}
        Which pairs are negatives.
    """

    def __init__(
        self,
        encoder: nn.Module,
        critics: Mapping[str, Critic],
        prior: PriorDiscriminator | None,
        objective: Objective,
        negatives: str,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.critics = nn.ModuleDict(critics)
        self.prior = prior
        self.objective = objective
        self.negatives = negatives

    @property
    def discriminators(self) -> dict[str, nn.Module]:
        """The critics and the prior discriminator, by the name of their term."""
        return dict(self.critics.items()) | ({} if self.prior is None else {"prior": self.prior})

    def forward(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Compute the mutual-information terms of a batch.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images, N >= 2.
        generator : torch.Generator
            Draws the permutation of negatives="shuffle".

        Returns
        -------
        terms : dict
            "local" and "global", where there is such a critic: scalar losses.
        bounds : dict
            "local_bound" and "global_bound", in nats, where the objective is a bound of the mutual information.
        embedding : Tensor of shape (N, d)
            The embeddings.
        """
        embedding, features = self.encoder(images)
        terms, bounds = {}, {}
        for name, critic in self.critics.items():
            terms[name], bound = contrast(
                critic,  # type: ignore[arg-type]
                self.objective,
                features,
                embedding,
                self.negatives,
                generator,
            )
            if bound is not None:
                bounds[f"{name}_bound"] = bound
        return terms, bounds, embedding

    def prior_discriminator_loss(self, embedding: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of the prior discriminator: prior samples are real, embeddings are not.

        Parameters
        ----------
        embedding : Tensor of shape (N, d)
            Embeddings; no gradient reaches them.
        generator : torch.Generator
            Draws the samples of the prior.

        Returns
        -------
        Tensor of shape ()
            Binary cross-entropy, 2 log 2 at chance.
        """
        assert self.prior is not None
        fake = self.prior.on_support(embedding.detach())
        real = self.prior.sample_like(fake, generator)
        real_logit, fake_logit = self.prior(torch.cat([real, fake])).float().chunk(2)
        return softplus(-real_logit).mean() + softplus(fake_logit).mean()

    def prior_loss(self, embedding: Tensor) -> Tensor:
        """Loss of the encoder against the prior discriminator, non-saturating.

        Parameters
        ----------
        embedding : Tensor of shape (N, d)
            Embeddings.

        Returns
        -------
        Tensor of shape ()
            ``-log D(sigmoid(y))`` or, for the normal prior, ``-log D(y)``; log 2 at chance.
        """
        assert self.prior is not None
        return softplus(-self.prior(self.prior.on_support(embedding)).float()).mean()


def build_model(
    encoder: nn.Module,
    feature_shape: ImageShape,
    n_components: int,
    *,
    terms: Collection[str],
    discriminator: str,
    mi_units: int,
    mi_estimator: str,
    negatives: str,
    prior: str,
) -> InfoMaxModel:
    """Put new discriminators around an encoder.

    Parameters
    ----------
    encoder : nn.Module
        The encoder.
    feature_shape : tuple of int
        Channels, height and width of its local features.
    n_components : int
        Width of its embedding.
    terms : collection of str
        Which of "local", "global" and "prior" to build.
    discriminator, mi_units, mi_estimator, negatives, prior
        As in `DIMTransformer`.

    Returns
    -------
    InfoMaxModel
        The model.
    """
    critics = {
        name: CRITICS[name][discriminator](feature_shape, n_components, mi_units)
        for name in ("local", "global")
        if name in terms
    }
    prior_discriminator = PriorDiscriminator(n_components, prior) if "prior" in terms else None
    return InfoMaxModel(encoder, critics, prior_discriminator, OBJECTIVES[mi_estimator], negatives)


def contrast(
    critic: Critic,
    objective: Objective,
    features: Tensor,
    embedding: Tensor,
    negatives: str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Loss of one critic on a batch, and the bound in nats that it stands for.

    Parameters
    ----------
    critic : Critic
        Scores the pairs.
    objective : Objective
        Turns the scores into a loss.
    features : Tensor of shape (N, K, h, w)
        Local features.
    embedding : Tensor of shape (N, d)
        Embeddings.
    negatives : {"batch", "roll", "shuffle"}
        Each embedding meets the locations of all other images, of the next image, or of a random other image.
    generator : torch.Generator
        Draws the permutation of "shuffle", on the device of the embeddings.

    Returns
    -------
    loss : Tensor of shape ()
        The loss.
    bound : Tensor of shape () or None
        Lower bound of the mutual information in nats, without gradient, where the objective is one.
    """
    maps, vectors = critic.encode(features, embedding)
    if negatives == "batch":
        positive, reduced = _meet_all_images(critic, objective, maps, vectors)
    else:
        shift = (_next_image if negatives == "roll" else _random_other_image)(len(maps), generator)
        positive = _at_least_float32(critic.score(maps, vectors))
        # Moving the small embeddings rather than the maps gives the same pairs; row i is then sorted back to belong to
        # embedding i, as its positives do.
        negative = _at_least_float32(critic.score(maps, vectors[shift]))[torch.argsort(shift)]
        reduced = objective.reduce(negative, negative.shape[1])
    loss = objective.loss(positive, reduced)
    n_images, n_locations = positive.shape
    n_negatives = n_locations * (n_images - 1 if negatives == "batch" else 1)
    return loss, None if objective.bound is None else objective.bound(loss.detach(), n_negatives)


def _at_least_float32(scores: Tensor) -> Tensor:
    """Losses need more digits than the bfloat16 of autocast."""
    return scores.float() if scores.dtype.itemsize < 4 else scores


def _next_image(n_images: int, generator: torch.Generator) -> Tensor:
    return torch.arange(n_images, device=generator.device).roll(1)


def _random_other_image(n_images: int, generator: torch.Generator) -> Tensor:
    """Random permutation that leaves nothing in place: a random cycle through all images."""
    order = torch.randperm(n_images, generator=generator, device=generator.device)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _meet_all_images(critic: Critic, objective: Objective, maps: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Score each embedding against all images: its positives, and its scores against all others, reduced.

    More than MAX_PAIR_ELEMENTS scores are computed a few embeddings at a time, and again in the backward pass,
    instead of being kept.
    """
    n_images, n_locations, n_units = maps.shape
    per_pair = n_units if critic.pairs_cost_units else 1
    rows = max(1, MAX_PAIR_ELEMENTS // (n_images * n_locations * per_pair))

    def meet(maps: Tensor, vectors: Tensor, start: int) -> tuple[Tensor, Tensor]:
        scores = _at_least_float32(critic.score_all(maps, vectors))
        row = torch.arange(len(vectors), device=scores.device)
        positive = scores[row, row + start]
        scores[row, row + start] = -torch.inf
        return positive, objective.reduce(scores.flatten(1), (n_images - 1) * n_locations)

    if rows >= n_images:
        return meet(maps, vectors, 0)
    chunks = [
        checkpoint(meet, maps, vectors[start : start + rows], start, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, n_images, rows)
    ]
    positive, reduced = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return positive, reduced
