"""Discriminators: critics that score pairs of features and embedding, and the prior discriminator.

A critic's score of (features, embedding) is computed in three steps, so that what belongs to one side alone is
computed once and serves every pair that side is in: ``encode`` turns the features of an image into vectors, one a
location, and its embedding into one vector; ``score`` and ``score_all`` combine them. For the concat critics this
equals the concatenation followed by a linear layer, because ``W [M; y] = W_M M + W_y y``: the concatenation is never
built.
"""

import torch
from torch import Tensor, nn

from skdim.distributed import ALONE, Group
from skdim.encoders import FlattenMap, halving_stack, n_halvings
from skdim.layouts import ImageShape

__all__ = [
    "CRITICS",
    "Critic",
    "GlobalConcatCritic",
    "GlobalDotCritic",
    "LocalConcatCritic",
    "LocalDotCritic",
    "PriorDiscriminator",
    "PriorNoise",
]


class Critic(nn.Module):
    """Base of all critics: scores of pairs of a location and an embedding.

    Subclasses have `feature_head` and `embedding_head`, and implement `score` and `score_all`.

    Attributes
    ----------
    is_local : bool
        Whether there is a score for each location, or one an image.
    pairs_cost_units : bool
        Whether ``score_all`` holds as many numbers a pair as there are units, or one.
    """

    is_local: bool
    pairs_cost_units: bool
    feature_head: nn.Module
    embedding_head: nn.Module

    def encode(self, features: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Compute each side's part of the score.

        Parameters
        ----------
        features : Tensor of shape (N, K, h, w)
            Local features.
        embedding : Tensor of shape (R, d)
            Embeddings, any number of them.

        Returns
        -------
        maps : Tensor of shape (N, L, U)
            One vector a location; L is h * w for a local critic and 1 for a global one.
        vectors : Tensor of shape (R, U)
            One vector an embedding.
        """
        if self.is_local:
            maps = self.feature_head(_locations(features)).unflatten(0, (len(features), -1))
        else:
            maps = self.feature_head(features)[:, None]
        return maps, self.embedding_head(embedding)

    def score(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Score the locations of image i against the embeddings of image i.

        Parameters
        ----------
        maps : Tensor of shape (N, L, U)
            Encoded features.
        vectors : Tensor of shape (N, G, U)
            Encoded embeddings, G an image.

        Returns
        -------
        Tensor of shape (N, G, L)
            Scores.
        """
        raise NotImplementedError

    def score_all(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Score the locations of every image against every embedding.

        Parameters
        ----------
        maps : Tensor of shape (N, L, U)
            Encoded features.
        vectors : Tensor of shape (R, U)
            Encoded embeddings.

        Returns
        -------
        Tensor of shape (R, N, L)
            Scores.
        """
        raise NotImplementedError

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Score each image's features against its own embedding.

        Parameters
        ----------
        features : Tensor of shape (N, K, h, w)
            Local features.
        embedding : Tensor of shape (N, d)
            Embeddings.

        Returns
        -------
        Tensor of shape (N, h, w) or (N,)
            One score a location from a local critic, one an image from a global one.
        """
        maps, vectors = self.encode(features, embedding)
        scores = self.score(maps, vectors[:, None])
        return scores.view(len(features), *features.shape[2:]) if self.is_local else scores.flatten()


def _locations(features: Tensor) -> Tensor:
    """(N, K, h, w) to (N * h * w, K); free when the features are channels_last."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


class _DotCritic(Critic):
    """Encode-and-dot-product: the score is the dot product of both sides, over the square root of their width.

    Without that division the products of wide vectors make logits too hot to train at the learning rates used here.
    """

    pairs_cost_units = False

    def score(self, maps: Tensor, vectors: Tensor) -> Tensor:
        return torch.matmul(self._scaled(vectors), maps.transpose(1, 2))

    def score_all(self, maps: Tensor, vectors: Tensor) -> Tensor:
        n_images, n_locations, n_units = maps.shape
        scores = self._scaled(vectors) @ maps.reshape(-1, n_units).T
        return scores.view(-1, n_images, n_locations)

    @staticmethod
    def _scaled(vectors: Tensor) -> Tensor:
        return vectors * vectors.shape[-1] ** -0.5


class _ConcatCritic(Critic):
    """Concatenate-and-score: both sides meet in the first layer of a perceptron with two hidden layers."""

    pairs_cost_units = True
    tail: nn.Sequential

    def score(self, maps: Tensor, vectors: Tensor) -> Tensor:
        return self.tail(maps[:, None] + vectors[:, :, None]).squeeze(3)

    def score_all(self, maps: Tensor, vectors: Tensor) -> Tensor:
        return self.tail(maps + vectors[:, None, None]).squeeze(3)

    @staticmethod
    def _tail(n_units: int) -> nn.Sequential:
        return nn.Sequential(nn.ReLU(), nn.Linear(n_units, n_units), nn.ReLU(), nn.Linear(n_units, 1))


class _ResidualHead(nn.Module):
    """The paper's 1 x 1 convolution network: a two-layer path plus a linear shortcut, then layer norm."""

    def __init__(self, n_in: int, n_units: int) -> None:
        super().__init__()
        self.expand = nn.Linear(n_in, n_units, bias=False)
        self.norm = nn.BatchNorm1d(n_units)
        # The shortcut's bias serves both.
        self.project = nn.Linear(n_units, n_units, bias=False)
        self.shortcut = nn.Linear(n_in, n_units)
        self.out = nn.LayerNorm(n_units)
        # Near the identity, so that training starts from dot products of the features themselves.
        nn.init.uniform_(self.shortcut.weight, -0.01, 0.01)
        with torch.no_grad():
            self.shortcut.weight.diagonal().fill_(1.0)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.expand(rows)))
        return self.out(torch.addmm(self.shortcut(rows), hidden, self.project.weight.T))


class LocalDotCritic(_DotCritic):
    """Local critic, encode-and-dot-product.

    Parameters
    ----------
    feature_shape : tuple of int
        Channels, height and width of the local features.
    n_components : int
        Width of the embedding.
    n_units : int
        Width of the space in which the dot products are taken.
    """

    is_local = True

    def __init__(self, feature_shape: ImageShape, n_components: int, n_units: int) -> None:
        super().__init__()
        self.feature_head = _ResidualHead(feature_shape[0], n_units)
        self.embedding_head = _ResidualHead(n_components, n_units)


class LocalConcatCritic(_ConcatCritic):
    """Local critic, concat-and-convolve: 1 x 1 convolutions on the features with the embedding at every location.

    Parameters
    ----------
    feature_shape : tuple of int
        Channels, height and width of the local features.
    n_components : int
        Width of the embedding.
    n_units : int
        Width of the two hidden layers.
    """

    is_local = True

    def __init__(self, feature_shape: ImageShape, n_components: int, n_units: int) -> None:
        super().__init__()
        self.feature_head = nn.Linear(feature_shape[0], n_units)
        self.embedding_head = nn.Linear(n_components, n_units, bias=False)
        self.tail = self._tail(n_units)


class GlobalDotCritic(_DotCritic):
    """Global critic, encode-and-dot-product: the features pass halving convolutions and two linear layers.

    Parameters
    ----------
    feature_shape : tuple of int
        Channels, height and width of the local features.
    n_components : int
        Width of the embedding.
    n_units : int
        Width of the space in which the dot product is taken.
    """

    is_local = False

    def __init__(self, feature_shape: ImageShape, n_components: int, n_units: int) -> None:
        super().__init__()
        channels, height, width = feature_shape
        n_stages = max(1, n_halvings(height, width))
        widths = [max(channels, min(channels << stage, 512)) for stage in range(1, n_stages + 1)]
        stages, shapes = halving_stack(feature_shape, widths)
        channels, height, width = shapes[-1]
        self.feature_head = nn.Sequential(
            *stages,
            FlattenMap(),
            nn.Linear(channels * height * width, 1024, bias=False),
            nn.BatchNorm1d(1024),
            nn.ReLU(inplace=True),
            nn.Linear(1024, n_units),
        )
        self.embedding_head = nn.Linear(n_components, n_units)


class GlobalConcatCritic(_ConcatCritic):
    """Global critic, concatenation: two 3 x 3 convolutions, flattened, meet the embedding in a perceptron.

    For features of 128 x 26 x 26 the convolutions give 64 x 24 x 24 (with ReLU) and 32 x 22 x 22 (without). A map
    too small for a 3 x 3 kernel gets the largest kernel that fits.

    Parameters
    ----------
    feature_shape : tuple of int
        Channels, height and width of the local features.
    n_components : int
        Width of the embedding.
    n_units : int
        Width of the two hidden layers.
    """

    is_local = False

    def __init__(self, feature_shape: ImageShape, n_components: int, n_units: int) -> None:
        super().__init__()
        channels, height, width = feature_shape
        first = (min(3, height), min(3, width))
        height, width = height - first[0] + 1, width - first[1] + 1
        second = (min(3, height), min(3, width))
        height, width = height - second[0] + 1, width - second[1] + 1
        self.feature_head = nn.Sequential(
            nn.Conv2d(channels, 64, first),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 32, second),
            FlattenMap(),
            nn.Linear(32 * height * width, n_units),
        )
        self.embedding_head = nn.Linear(n_components, n_units, bias=False)
        self.tail = self._tail(n_units)


CRITICS: dict[str, dict[str, type[Critic]]] = {
    "local": {"dot": LocalDotCritic, "concat": LocalConcatCritic},
    "global": {"dot": GlobalDotCritic, "concat": GlobalConcatCritic},
}


def _is_uniform(prior: str) -> bool:
    if prior not in ("uniform", "normal"):
        raise ValueError(f"prior must be 'uniform' or 'normal', got {prior!r}.")
    return prior == "uniform"


class PriorDiscriminator(nn.Module):
    """Tells samples of the prior from embeddings: linear 1000, 200 and 1 with ReLU between.

    Parameters
    ----------
    n_components : int
        Width of the embedding.
    prior : {"uniform", "normal"}, default="uniform"
        The uniform distribution on [0, 1], to which ``sigmoid(y)`` is matched, or the standard normal one, to which
        the embedding y itself is.
    """

    def __init__(self, n_components: int, prior: str = "uniform") -> None:
        super().__init__()
        self.is_uniform = _is_uniform(prior)
        self.logit = nn.Sequential(
            nn.Linear(n_components, 1000),
            nn.ReLU(inplace=True),
            nn.Linear(1000, 200),
            nn.ReLU(inplace=True),
            nn.Linear(200, 1),
        )

    def on_support(self, embedding: Tensor) -> Tensor:
        """Bring embeddings (N, d) to the support of the prior, in float32."""
        return torch.sigmoid(embedding.float()) if self.is_uniform else embedding.float()

    def sample_like(self, samples: Tensor, generator: torch.Generator, group: Group = ALONE) -> Tensor:
        """Draw as many samples of the prior, on the same device; processes of a group do so in step."""
        return group.draw(torch.rand if self.is_uniform else torch.randn, samples.shape, generator)

    def forward(self, samples: Tensor) -> Tensor:
        """Compute one logit a sample; positive says "from the prior".

        Parameters
        ----------
        samples : Tensor of shape (N, d)
            Samples of the prior, or embeddings brought to its support.

        Returns
        -------
        Tensor of shape (N,)
            Logits.
        """
        return self.logit(samples).squeeze(1)

    def logit_and_slope(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits and their gradients with respect to the samples.

        The gradient is written out, for a second derivative by `torch.autograd` takes hooks and tools of torch by
        surprise.

        Parameters
        ----------
        samples : Tensor of shape (N, d)
            As in `forward`.

        Returns
        -------
        logit : Tensor of shape (N,)
            Logits.
        slope : Tensor of shape (N, d)
            Gradients.
        """
        first, _, second, _, last = self.logit
        inner = first(samples).relu()
        outer = second(inner).relu()
        # Backwards, through the units that are on.
        slope = (last.weight * (outer > 0)) @ second.weight * (inner > 0) @ first.weight
        return last(outer).squeeze(1), slope


class PriorNoise(nn.Module):
    r"""Noise that matches embeddings to a prior without an adversary.

    Critics read :math:`y + Z` in place of y, with Z independent noise. Of all embeddings of bounded variance the
    normally distributed ones carry the most information through normal noise, so that maximising the mutual information
    brings the embedding to the prior (Butakov et al., arXiv:2410.06993). Of those of bounded range, the uniformly
    distributed ones nearly do so through uniform noise, as long as it is narrow: with a share s of the range, the
    inverse of a whole number, 1 + 1/s equally spaced points carry ``log(1 + 1/s)`` a dimension, the uniform
    distribution ``log(1/s) + s/2``.

    Parameters
    ----------
    prior : {"uniform", "normal"}
        Uniform noise on ``sigmoid(y)``, or normal noise on an embedding y of zero mean and unit variance, which its
        encoder has to see to, see `skdim.encoders.StandardizedEncoder`.
    strength : float
        Standard deviation of the noise, as a share of the prior's.
    """

    def __init__(self, prior: str, strength: float) -> None:
        super().__init__()
        self.is_uniform = _is_uniform(prior)
        self.strength = strength

    def on_support(self, embedding: Tensor) -> Tensor:
        """Bring embeddings (..., d) to the support of the prior, scaled to its zero mean and unit variance; float32."""
        embedding = embedding.float()
        return 12**0.5 * (torch.sigmoid(embedding) - 0.5) if self.is_uniform else embedding

    def forward(self, embedding: Tensor, generator: torch.Generator, group: Group = ALONE, n_views: int = 1) -> Tensor:
        """Bring embeddings to the support of the prior and add noise.

        Parameters
        ----------
        embedding : Tensor of shape (..., d)
            Embeddings.
        generator : torch.Generator
            Draws the noise, on the device of the embeddings.
        group : Group, default=ALONE
            The processes that draw in step.
        n_views : int, default=1
            How many views, one after another, the embeddings are of.

        Returns
        -------
        Tensor of shape (..., d), float32
            Noisy embeddings, on the scale of `on_support`.
        """
        noise = group.draw(torch.rand if self.is_uniform else torch.randn, embedding.shape, generator, n_views=n_views)
        if self.is_uniform:
            noise = 12**0.5 * (noise - 0.5)
        return self.on_support(embedding) + self.strength * noise
