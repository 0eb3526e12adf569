"""What the built-in encoders share: convolutions up to and after the local features, and the head on top of them."""

from collections.abc import Sequence

from torch import Tensor, nn

from skdim.encoders.blocks import FlattenMap, mean_over_map
from skdim.layouts import ImageShape

__all__ = ["ConvolutionalEncoder"]


class ConvolutionalEncoder(nn.Module):
    """Convolutions, then hidden linear layers with batch norm and ReLU, then one linear layer.

    Parameters
    ----------
    local : nn.Module
        From images to the local features.
    conv : nn.Module
        From the local features to the last convolution's map.
    conv_shape : tuple of int
        Channels, height and width of that map.
    hidden_widths : sequence of int
        Widths of the hidden layers.
    n_components : int
        Width of the embedding.
    multiple_globals : bool
        Whether the linear layers read each location of the last convolution's map on its own, as 1 x 1 convolutions,
        instead of the whole map: `forward` then returns a map of embeddings, and the layers that can be read are
        means over it.
    """

    def __init__(
        self,
        local: nn.Module,
        conv: nn.Module,
        conv_shape: ImageShape,
        hidden_widths: Sequence[int],
        n_components: int,
        multiple_globals: bool,
    ) -> None:
        super().__init__()
        channels, height, width = conv_shape
        head: list[nn.Module] = []
        n_in = channels if multiple_globals else channels * height * width
        for n_out in hidden_widths:
            if multiple_globals:
                head += [nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)]
            else:
                head += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out)]
            head.append(nn.ReLU(inplace=True))
            n_in = n_out
        self.local = local
        self.conv = conv
        self.has_hidden = bool(hidden_widths)
        self.hidden = nn.Sequential(nn.Identity() if multiple_globals else FlattenMap(), *head)
        self.embedding = nn.Conv2d(n_in, n_components, 1) if multiple_globals else nn.Linear(n_in, n_components)

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        """Compute every layer that can be read.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images.

        Returns
        -------
        dict
            "embedding" (N, n_components), "hidden" (N, width), where there are hidden layers, "features"
            (N, K, h, w), the last convolution, and "local" (N, K', h', w'), the local features.
        """
        local = self.local(images)
        features = self.conv(local)
        hidden = self.hidden(features)
        layers = {"embedding": mean_over_map(self.embedding(hidden)), "features": features, "local": local}
        if self.has_hidden:
            layers["hidden"] = mean_over_map(hidden)
        return layers

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding and the local features.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W)
            Standardised images.

        Returns
        -------
        embedding : Tensor of shape (N, n_components), or (N, n_components, gh, gw) with `multiple_globals`
            One embedding an image, or one at each location of the last convolution's map.
        features : Tensor of shape (N, K, h, w)
            The local features.
        """
        local = self.local(images)
        return self.embedding(self.hidden(self.conv(local))), local
