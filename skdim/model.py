"""The model that is trained: an encoder, its critics and its prior discriminator, and their loss terms."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from skdim.coordinates import CoordinatePredictor
from skdim.discriminators import CRITICS, Critic, PriorDiscriminator, PriorNoise
from skdim.distributed import ALONE, Group
from skdim.encoders import local_features
from skdim.layouts import ImageShape
from skdim.objectives import OBJECTIVES, Objective
from skdim.views import Occlusion

__all__ = ["InfoMaxModel", "build_model", "contrast", "draw_others"]

NEGATIVES = ("batch", "roll", "shuffle")

# Scores held at once against all images of a batch, in elements, by type of device: 16 and 64 MiB of float32. A GPU
# wants large kernels. On a CPU, allocators give blocks beyond 32 MiB back to the system after each use, and to have all
# their pages anew costs more than to compute the scores twice.
MAX_PAIR_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}


class _Draws(NamedTuple):
    """What is drawn at random for the terms of a batch.

    Attributes
    ----------
    locations : Tensor of shape (R, local_samples) or None
        The locations of each image's features that the local critic sees; None is all.
    others : dict of str to list of list
        For each critic, view and scheme of negatives what `draw_others` returns.
    partner : Tensor of shape (L,) or None
        For each location the one that the coordinate task pairs it with.
    """

    locations: Tensor | None
    others: dict[str, list[list[Tensor | None]]]
    partner: Tensor | None


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

    Attributes
    ----------
    group : Group
        The processes that each have a share of a batch, and draw in step.
    contrasted : Group
        Those whose images are negatives of each other.
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
        self.group = self.contrasted = ALONE

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
            "local", "global" and "coordinate", where there is such a term: scalar losses, whose means over a group's
            processes are those of the whole batch.
        bounds : dict
            "local_bound" and "global_bound", in nats, where the objective is a bound of the mutual information.
        embedding : Tensor of shape (R, d)
            All embeddings, those that an encoder may yield beyond one an image included.
        """
        images = torch.cat(list(views))
        occluded = None if self.occlusion is None else self.occlusion(images, generator, self.group, len(views))
        embedding, features = self._encode(images, occluded)
        if self.noise is not None:
            embedding = self.noise(embedding, generator, self.group, len(views))
        return self._score(embedding, features, len(views), self._draw(features, len(views), generator))

    def compile(self, **options: Any) -> None:
        """Compile all but the draws, with the options of `torch.compile`: no compiled graph can hold a generator."""
        self._encode = torch.compile(self._encode, **options)  # type: ignore[method-assign]
        self._score = torch.compile(self._score, **options)  # type: ignore[method-assign]

    def _encode(self, images: Tensor, occluded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (R, G, d), G an image, of occluded images where there are, and local features (R, K, h, w)."""
        if occluded is None:
            embedding, features = self.encoder(images)
        else:
            features = local_features(self.encoder, images)
            embedding, _ = self.encoder(occluded)
        return embedding.flatten(2).transpose(1, 2) if embedding.ndim == 4 else embedding[:, None], features

    def _draw(self, features: Tensor, n_views: int, generator: torch.Generator) -> _Draws:
        locations, partner = None, None
        others = {}
        n_images = len(features) // n_views * self.contrasted.size
        for name in self.critics:
            if name == "local":
                locations = self._draw_locations(features, n_views, generator)
            others[name] = [
                [draw_others(scheme, n_images, generator) for scheme in self.negatives[name]] for _ in range(n_views)
            ]
        if self.coordinates is not None:
            n_locations = features.shape[2] * features.shape[3]
            partner = torch.randperm(n_locations, generator=generator, device=features.device)
        return _Draws(locations, others, partner)

    def _draw_locations(self, features: Tensor, n_views: int, generator: torch.Generator) -> Tensor | None:
        n_locations = features.shape[2] * features.shape[3]
        if self.local_samples is None or self.local_samples >= n_locations:
            return None
        draws = self.group.draw(torch.rand, (len(features), n_locations), generator, n_views=n_views)
        return draws.topk(self.local_samples, sorted=False).indices

    def _score(
        self, embedding: Tensor, features: Tensor, n_views: int, draws: _Draws
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Compute what `forward` returns."""
        terms, bounds = {}, {}
        for name in self.critics:
            chosen = draws.locations if name == "local" else None
            seen = features if chosen is None else _take_locations(features, chosen)
            terms[name], bound = self._contrast_views(name, seen, embedding, draws.others[name])
            if bound is not None:
                bounds[f"{name}_bound"] = bound
        if self.coordinates is not None:
            assert draws.partner is not None
            partners = torch.cat(embedding.chunk(n_views)[::-1])
            terms["coordinate"] = self.coordinates.loss(features, partners.mean(dim=1), draws.partner)
        return terms, bounds, embedding.flatten(0, 1)

    def _contrast_views(
        self,
        name: str,
        features: Tensor,
        embedding: Tensor,
        others: Sequence[Sequence[Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        """Loss and bound of one critic, averaged over views and negatives."""
        critic: Critic = self.critics[name]  # type: ignore[assignment]
        maps, vectors = critic.encode(features, embedding.flatten(0, 1))
        n_views = len(others)
        vectors = self.contrasted.gather(vectors.view(*embedding.shape[:2], -1), n_views)
        # Features and embeddings that belong together: of one image, and where there are two views not of the same one.
        results = [
            contrast(
                critic,
                self.objective,
                _take_view(maps, view, n_views),
                _take_view(vectors, n_views - 1 - view, n_views),
                of_scheme,
                self.contrasted,
            )
            for view, of_view in enumerate(others)
            for of_scheme in of_view
        ]
        if len(results) == 1:
            return results[0]
        bounds = [bound for _, bound in results if bound is not None]
        return torch.stack([loss for loss, _ in results]).mean(), torch.stack(bounds).mean() if bounds else None

    def prior_discriminator_loss(self, embedding: Tensor, generator: torch.Generator) -> Tensor:
        r"""Loss of the prior discriminator: prior samples are real, embeddings are not.

        .. math:: -\mathbb{E}_{p} \log D - \mathbb{E}_{q} \log (1 - D)
            + \frac{1}{2} (\mathbb{E}_{p} + \mathbb{E}_{q}) \|\nabla \operatorname{logit} D\|^2

        with samples of the prior p, and of q, the embeddings on its support. Without a penalty on the gradients the
        players circle the prior rather than come to it (Mescheder et al., arXiv:1801.04406), at high learning rates out
        to embeddings whose sigmoid is 0 or 1.

        Parameters
        ----------
        embedding : Tensor of shape (N, d)
            Embeddings; no gradient reaches them.
        generator : torch.Generator
            Draws the samples of the prior.

        Returns
        -------
        Tensor of shape ()
            Binary cross-entropy and penalty, 2 log 2 at chance.
        """
        assert self.prior is not None
        fake = self.prior.on_support(embedding.detach())
        real = self.prior.sample_like(fake, generator, self.group)
        logit, slope = self.prior.logit_and_slope(torch.cat([real, fake]))
        real_logit, fake_logit = logit.float().chunk(2)
        penalty = slope.float().square().sum(dim=1).mean()
        return softplus(-real_logit).mean() + softplus(fake_logit).mean() + penalty

    def prior_loss(self, embedding: Tensor) -> Tensor:
        """Loss of the encoder against the prior discriminator, non-saturating.

        Parameters
        ----------
        embedding : Tensor of shape (N, d)
            Embeddings; the gradient reaches nothing else.

        Returns
        -------
        Tensor of shape ()
            ``-log D(sigmoid(y))`` or, for the normal prior, ``-log D(y)``; log 2 at chance.
        """
        assert self.prior is not None
        # Gradients of the discriminator's weights would be computed for nothing.
        weights = {name: parameter.detach() for name, parameter in self.prior.named_parameters()}
        logit: Tensor = functional_call(self.prior, weights, (self.prior.on_support(embedding),))
        return softplus(-logit.float()).mean()


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


def draw_others(negatives: str, n_images: int, generator: torch.Generator) -> Tensor | None:
    """Draw for each image of a batch the one whose embedding its locations meet as negatives.

    Parameters
    ----------
    negatives : {"batch", "roll", "shuffle"}
        All other images, the one before, or another one, by a random cycle through all images.
    n_images : int
        Images of the batch.
    generator : torch.Generator
        Draws the cycle, on the device of the embeddings.

    Returns
    -------
    Tensor of shape (n_images,), int64, or None
        A permutation that leaves nothing in place; None means all other images.
    """
    if negatives == "batch":
        return None
    if negatives == "roll":
        return torch.arange(n_images, device=generator.device).roll(1)
    order = torch.randperm(n_images, generator=generator, device=generator.device)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def contrast(
    critic: Critic, objective: Objective, maps: Tensor, vectors: Tensor, others: Tensor | None, group: Group = ALONE
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
    vectors : Tensor of shape (P * N, G, U)
        Embeddings as the critic encodes them, G an image, of all P processes of the group, in their order.
    others : Tensor of shape (P * N,), int64, or None
        A permutation that leaves nothing in place: the image whose embeddings an image's locations meet as negatives.
        None means all other images.
    group : Group, default=ALONE
        The processes whose images are negatives of each other.

    Returns
    -------
    loss : Tensor of shape ()
        The loss, whose mean over processes is that of all images.
    bound : Tensor of shape () or None
        Estimate of a lower bound of the mutual information in nats, without gradient, where the objective gives one.
    """
    n_images, n_locations = maps.shape[:2]
    own = slice(group.rank * n_images, (group.rank + 1) * n_images)
    if others is None:
        positive, reduced = _meet_all_images(critic, objective, maps, vectors, group)
    else:
        positive = _at_least_float32(critic.score(maps, vectors[own])).flatten(0, 1)
        # Moving the small embeddings rather than the maps gives the same pairs; row i is then sorted back to belong to
        # image i, as its positives do.
        moved = vectors.index_select(0, others[own])
        negative = group.gather(_at_least_float32(critic.score(maps, moved)))
        reduced = objective.reduce(negative.index_select(0, torch.argsort(others)[own]).flatten(0, 1), n_locations)
    if objective.pools:
        reduced = group.gather(reduced)
    loss = objective.loss(positive, reduced)
    if objective.bound is None:
        return loss, None
    n_others = len(vectors) - 1 if others is None else 1
    return loss, objective.bound(positive.detach(), reduced.detach(), n_others, n_locations)


def _take_view(values: Tensor, view: int, n_views: int) -> Tensor:
    return values if n_views == 1 else values.chunk(n_views)[view]


def _take_locations(features: Tensor, chosen: Tensor) -> Tensor:
    """Pick each image's chosen locations (R, m) out of maps (R, K, h, w), as maps (R, K, m, 1)."""
    n_locations = features.shape[2] * features.shape[3]
    first = n_locations * torch.arange(len(features), device=chosen.device)[:, None]
    # Whole rows: the gradient of a gather goes back number by number, which takes ten times as long.
    sampled = features.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, (first + chosen).flatten())
    return sampled.unflatten(0, chosen.shape).transpose(1, 2)[..., None]


def _at_least_float32(scores: Tensor) -> Tensor:
    """Losses need more digits than the bfloat16 of autocast."""
    return scores.float() if scores.dtype.itemsize < 4 else scores


def _meet_all_images(
    critic: Critic, objective: Objective, maps: Tensor, vectors: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """Score each embedding against all images: its positives, and its scores against all others, reduced.

    Each process scores the embeddings of all against its own images, and the embeddings' processes merge what comes of
    it: maps are too large to travel.

    More than MAX_PAIR_ELEMENTS scores are computed a few embeddings at a time, and again in the backward pass,
    instead of being kept.
    """
    n_images, n_locations, n_units = maps.shape
    n_globals = vectors.shape[1]
    n_negatives = (len(vectors) - 1) * n_locations
    first = group.rank * n_images
    vectors = vectors.flatten(0, 1)
    per_pair = n_units if critic.pairs_cost_units else 1
    n_rows = max(1, MAX_PAIR_ELEMENTS[maps.device.type] // (n_images * n_locations * per_pair))

    def meet(maps: Tensor, vectors: Tensor, start: int) -> tuple[Tensor, Tensor]:
        scores = _at_least_float32(critic.score_all(maps, vectors))
        # Without the graph, for which excluding pairs is nothing: no gradient comes out of a score of -inf.
        excluded = scores.detach()
        if n_globals == 1:
            # Embeddings of this process' own images with those images. As a view, because indices take a GPU some
            # twenty kernels more, most of them in the backward pass.
            positive = scores.diagonal(start - first).T.clone()
            excluded.diagonal(start - first).fill_(-torch.inf)
        else:
            # A part may begin and end within the embeddings of an image.
            own_rows = (min(max(n_globals * image - start, 0), len(vectors)) for image in (first, first + n_images))
            row = torch.arange(*own_rows, device=scores.device)
            own = (row + start) // n_globals - first
            positive = scores[row, own]
            # Not an assignment of a number, for which the device would wait.
            excluded.index_put_((row, own), scores.new_full((), -torch.inf))
        return positive, objective.reduce(scores.flatten(1), n_negatives)

    if n_rows >= len(vectors):
        positive, reduced = meet(maps, vectors, 0)
    else:
        chunks = [
            checkpoint(
                meet, maps, vectors[start : start + n_rows], start, use_reentrant=False, preserve_rng_state=False
            )
            for start in range(0, len(vectors), n_rows)
        ]
        positive, reduced = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    if group.size > 1:
        reduced = objective.merge(group.exchange(reduced.view(group.size, -1)))
    return positive, reduced
