"""The coordinate task: predict where a local feature comes from."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from skdim.layouts import ImageShape

__all__ = ["CoordinatePredictor"]


class CoordinatePredictor(nn.Module):
    r"""Predicts from embedding and local features the place of a location, and how far it is from another one.

    One hidden layer for each of both tasks; the loss is the mean of four cross-entropies, in nats:

    .. math:: \tfrac14 \left[ H(row_l \mid C_l, y) + H(column_l \mid C_l, y)
              + H(row_m - row_l \mid C_l, C_m, y) + H(column_m - column_l \mid C_l, C_m, y) \right]

    Parameters
    ----------
    feature_shape : tuple of int
        Channels, height and width of the local features; at least two locations.
    n_components : int
        Width of the embedding.
    n_units : int
        Width of the hidden layers.
    """

    def __init__(self, feature_shape: ImageShape, n_components: int, n_units: int) -> None:
        super().__init__()
        channels, self.height, self.width = feature_shape
        # The first layers on [C_l; y] and [C_l; C_m; y], without the concatenations.
        self.place_features = nn.Linear(channels, n_units)
        self.place_embedding = nn.Linear(n_components, n_units, bias=False)
        self.offset_features = nn.Linear(channels, n_units)
        self.offset_partner = nn.Linear(channels, n_units, bias=False)
        self.offset_embedding = nn.Linear(n_components, n_units, bias=False)
        self.place = nn.Linear(n_units, self.height + self.width)
        self.offset = nn.Linear(n_units, 2 * self.height - 1 + 2 * self.width - 1)

    def forward(self, features: Tensor, embedding: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Predict places and offsets.

        Parameters
        ----------
        features : Tensor of shape (N, K, h, w)
            Local features.
        embedding : Tensor of shape (N, d)
            Embeddings.
        partner : Tensor of shape (L,), int64
            For each of the L = h * w locations the one that the offset leads to.

        Returns
        -------
        place : Tensor of shape (N, L, h + w)
            Logits of the row, then of the column.
        offset : Tensor of shape (N, L, 2 h - 1 + 2 w - 1)
            Logits of the rows from a location to its partner, from 1 - h up, then of the columns.
        """
        maps = features.permute(0, 2, 3, 1).flatten(1, 2)
        place = torch.relu(self.place_features(maps) + self.place_embedding(embedding)[:, None])
        # Not an index, whose gradient takes ten times as long.
        partners = self.offset_partner(maps).index_select(1, partner)
        offset = torch.relu(self.offset_features(maps) + partners + self.offset_embedding(embedding)[:, None])
        return self.place(place), self.offset(offset)

    def loss(self, features: Tensor, embedding: Tensor, partner: Tensor) -> Tensor:
        """Compute the mean of the four cross-entropies.

        Parameters
        ----------
        features : Tensor of shape (N, K, h, w)
            Local features.
        embedding : Tensor of shape (N, d)
            Embeddings.
        partner : Tensor of shape (L,), int64
            For each location the one it is paired with.

        Returns
        -------
        Tensor of shape ()
            The loss, in nats.
        """
        place, offset = self(features, embedding, partner)
        location = torch.arange(self.height * self.width, device=features.device)
        rows, columns = location // self.width, location % self.width
        row_offset = rows[partner] - rows + self.height - 1
        column_offset = columns[partner] - columns + self.width - 1
        tasks = [
            *zip(place.split([self.height, self.width], dim=2), (rows, columns), strict=True),
            *zip(
                offset.split([2 * self.height - 1, 2 * self.width - 1], dim=2),
                (row_offset, column_offset),
                strict=True,
            ),
        ]
        losses = [
            cross_entropy(logits.float().flatten(0, 1), target.expand(len(logits), -1).flatten())
            for logits, target in tasks
        ]
        return torch.stack(losses).mean()
