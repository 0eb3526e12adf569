"""The model that is trained: an encoder, its critics and its prior discriminator, and their loss terms."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from skdim.coordinates import CoordinatePredictor
from skdim.discriminators import CRITICS, Critic, PriorDiscriminator, PriorNoise
from skdim.encoders import local_features
from skdim.images import ImageShape
from skdim.objectives import OBJECTIVES, Objective
from skdim.views import Occlusion

__all__ = ["InfoMaxModel", "build_model", "contrast"]

NEGATIVES = ("batch", "roll", "shuffle")

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
    objective : Objective
        The mutual-information objective.
    negatives : mapping of str to sequence of {"batch", "roll", "shuffle"}
        Which pairs are negatives, for each critic.
    prior : PriorDiscriminator, PriorNoise or None
        None where the prior's weight is 0.
    coordinates : CoordinatePredictor or None
        None where the coordinate task's weight is 0.
    occlusion : Occlusion or None
        Hides a part of the images from the embedding.
    local_samples : int or None
        How many locations of an image the local critic sees in a batch, drawn at random; None is all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        critics: Mapping[str, Critic],
        objective: Objective,
        *,
        negatives: Mapping[str, Sequence[str]],
        prior: PriorDiscriminator | PriorNoise | None = None,
        coordinates: CoordinatePredictor | None = None,
        occlusion: Occlusion | None = None,
        local_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.critics = nn.ModuleDict(critics)
        self.objective = objective
        self.negatives = negatives
        self.prior = prior if isinstance(prior, PriorDiscriminator) else None
        self.noise = prior if isinstance(prior, PriorNoise) else None
        self.coordinates = coordinates
        self.occlusion = occlusion
        self.local_samples = local_samples

    @property
    def discriminators(self) -> dict[str, nn.Module]:
        """Critics, prior discriminator and coordinate predictor, by the name of their term."""
        others = {"prior": self.prior, "coordinate": self.coordinates}
        return dict(self.critics.items()) | {name: module for name, module in others.items() if module is not None}

    def forward(
        self, views: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Compute the terms of a batch that encoder and critics share.

        Parameters
        ----------
        views : sequence of one or two Tensors of shape (N, C, H, W)
            Standardised images, N >= 2. Of two views, the features of each are scored against the embeddings of the
            other one.
        generator : torch.Generator
            Draws occluded blocks, noise, locations and the permutation of negatives="shuffle".

        Returns
        -------
        terms : dict
            "local", "global" and "coordinate", where there is such a term: scalar losses.
        bounds : dict
            "local_bound" and "global_bound", in nats, where the objective is a bound of the mutual information.
        embedding : Tensor of shape (R, d)
            All embeddings, those that an encoder may yield beyond one an image included.
        """
        embedding, features = self._encode(torch.cat(list(views)), generator)
        if self.noise is not None:
            embedding = self.noise(embedding, generator)
        n_images = len(views[0])
        first, last = slice(0, n_images), slice(-n_images, None)
        # Features and embeddings that belong together: of one image, and where there are two views not of the same one.
        pairs = [(first, last), (last, first)][: len(views)]
        terms, bounds = {}, {}
        for name in self.critics:
            terms[name], bound = self._contrast_views(name, features, embedding, pairs, generator)
            if bound is not None:
                bounds[f"{name}_bound"] = bound
        if self.coordinates is not None:
            partners = torch.cat([embedding[of_embedding] for _, of_embedding in pairs])
            terms["coordinate"] = self.coordinates.loss(features, partners.mean(dim=1), generator)
        return terms, bounds, embedding.flatten(0, 1)

    def _contrast_views(
        self,
        name: str,
        features: Tensor,
        embedding: Tensor,
        pairs: Sequence[tuple[slice, slice]],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and bound of one critic, averaged over views and negatives."""
        critic: Critic = self.critics[name]  # type: ignore[assignment]
        if name == "local":
            features = self._sample_locations(features, generator)
        maps, vectors = critic.encode(features, embedding.flatten(0, 1))
        vectors = vectors.view(*embedding.shape[:2], -1)
        results = [
            contrast(critic, self.objective, maps[of_features], vectors[of_embedding], scheme, generator)
            for of_features, of_embedding in pairs
            for scheme in self.negatives[name]
        ]
        bounds = [bound for _, bound in results if bound is not None]
        return torch.stack([loss for loss, _ in results]).mean(), torch.stack(bounds).mean() if bounds else None

    def _encode(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings (N, G, d), G an image, and local features (N, K, h, w)."""
        if self.occlusion is None:
            embedding, features = self.encoder(images)
        else:
            features = local_features(self.encoder, images)
            embedding, _ = self.encoder(self.occlusion(images, generator))
        return embedding.flatten(2).transpose(1, 2) if embedding.ndim == 4 else embedding[:, None], features

    def _sample_locations(self, features: Tensor, generator: torch.Generator) -> Tensor:
        n_locations = features.shape[2] * features.shape[3]
        if self.local_samples is None or self.local_samples >= n_locations:
            return features
        draws = torch.rand((len(features), n_locations), generator=generator, device=features.device)
        chosen = draws.topk(self.local_samples, sorted=False).indices
        locations = features.permute(0, 2, 3, 1).flatten(1, 2)
        sampled = locations.gather(1, chosen[:, :, None].expand(-1, -1, features.shape[1]))
        return sampled.transpose(1, 2)[..., None]

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
    weights: Mapping[str, float],
    discriminator: str,
    mi_units: int,
    mi_estimator: str,
    negatives: Mapping[str, Sequence[str]],
    prior: str,
    prior_matching: str,
    occlusion: Occlusion | None,
    local_samples: int | None,
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
    weights : mapping of str to float
        Weight of "local", "global", "prior" and "coordinate"; nothing is built for a weight of 0.
    discriminator, mi_units, mi_estimator, prior, prior_matching, local_samples
        As in `DIMTransformer`.
    negatives : mapping of str to sequence of str
        The schemes of each critic.
    occlusion : Occlusion or None
        Hides a part of the images from the embedding.

    Returns
    -------
    InfoMaxModel
        The model.
    """
    critics = {
        name: CRITICS[name][discriminator](feature_shape, n_components, mi_units)
        for name in ("local", "global")
        if weights[name]
    }
    prior_module: PriorDiscriminator | PriorNoise | None = None
    if weights["prior"]:
        is_noise = prior_matching == "noise"
        prior_module = PriorNoise(prior, weights["prior"]) if is_noise else PriorDiscriminator(n_components, prior)
    return InfoMaxModel(
        encoder,
        critics,
        OBJECTIVES[mi_estimator],
        negatives=negatives,
        prior=prior_module,
        coordinates=CoordinatePredictor(feature_shape, n_components, mi_units) if weights["coordinate"] else None,
        occlusion=occlusion,
        local_samples=local_samples,
    )


def contrast(
    critic: Critic,
    objective: Objective,
    maps: Tensor,
    vectors: Tensor,
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
    maps : Tensor of shape (N, L, U)
        Features as the critic encodes them.
    vectors : Tensor of shape (N, G, U)
        Embeddings as the critic encodes them, G an image.
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
    if negatives == "batch":
        positive, reduced = _meet_all_images(critic, objective, maps, vectors)
    else:
        shift = (_next_image if negatives == "roll" else _random_other_image)(len(maps), generator)
        positive = _at_least_float32(critic.score(maps, vectors)).flatten(0, 1)
        # Moving the small embeddings rather than the maps gives the same pairs; row i is then sorted back to belong to
        # image i, as its positives do.
        negative = _at_least_float32(critic.score(maps, vectors[shift]))[torch.argsort(shift)].flatten(0, 1)
        reduced = objective.reduce(negative, negative.shape[1])
    loss = objective.loss(positive, reduced)
    n_images, n_locations = maps.shape[:2]
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
    n_globals = vectors.shape[1]
    vectors = vectors.flatten(0, 1)
    per_pair = n_units if critic.pairs_cost_units else 1
    n_rows = max(1, MAX_PAIR_ELEMENTS // (n_images * n_locations * per_pair))

    def meet(maps: Tensor, vectors: Tensor, start: int) -> tuple[Tensor, Tensor]:
        scores = _at_least_float32(critic.score_all(maps, vectors))
        row = torch.arange(len(vectors), device=scores.device)
        own = (row + start) // n_globals
        positive = scores[row, own]
        scores[row, own] = -torch.inf
        return positive, objective.reduce(scores.flatten(1), (n_images - 1) * n_locations)

    if n_rows >= len(vectors):
        return meet(maps, vectors, 0)
    chunks = [
        checkpoint(meet, maps, vectors[start : start + n_rows], start, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, len(vectors), n_rows)
    ]
    positive, reduced = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return positive, reduced
