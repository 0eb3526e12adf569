"""An encoder whose embedding has zero mean and unit variance."""

from torch import Tensor, nn

__all__ = ["StandardizedEncoder"]


class StandardizedEncoder(nn.Module):
    """An encoder with a batch norm, without scale or shift, on its embedding.

    Parameters
    ----------
    encoder : nn.Module
        The encoder.
    n_components : int
        Width of its embedding.
    """

    def __init__(self, encoder: nn.Module, n_components: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(n_components, affine=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised embedding (N, d) or (N, d, gh, gw), and the local features (N, K, h, w)."""
        embedding, features = self.encoder(images)
        # All embeddings of an image are samples of the one distribution that is standardised.
        vectors = self.norm(embedding.flatten(2).transpose(1, 2).flatten(0, 1) if embedding.ndim == 4 else embedding)
        if embedding.ndim == 4:
            vectors = vectors.view(len(embedding), *embedding.shape[2:], -1).permute(0, 3, 1, 2)
        return vectors, features
