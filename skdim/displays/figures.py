"""What the displays' figures have in common: axes, colours, legends and sizes."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from numpy.typing import NDArray

__all__ = [
    "COLORS",
    "MARKERS",
    "figure_size",
    "get_axes",
    "import_pyplot",
    "legend_beside",
    "remove_lines",
    "with_defaults",
]

# Ten colours that people with any kind of colour vision tell apart (M. A. Petroff, arXiv:2107.02270).
COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
# Neighbouring markers tell apart what small points of like colours do not.
MARKERS = "o^sDvP*X"

# Lines of a legend that a figure of the usual size has room for.
LEGEND_ROWS = 16


def import_pyplot(caller: str) -> Any:
    """Import pyplot, or say who needs it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} requires matplotlib. You can install matplotlib with `pip install matplotlib`"
        ) from error
    return plt


def get_axes(display: object, ax: Any, figsize: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """Return axes to plot into and their figure."""
    plt = import_pyplot(f"{type(display).__name__}.plot")
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    return ax, ax.figure


def with_defaults(artist: type, defaults: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Put what a user has chosen of an artist, by whatever name matplotlib knows it, above defaults."""
    from matplotlib.cbook import normalize_kwargs

    return defaults | normalize_kwargs(chosen, artist)


def legend_beside(ax: Any, artists: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend beside the axes, in as many columns as it needs."""
    n_columns = ceil(len(names) / LEGEND_ROWS)
    legend = ax.legend(
        artists,
        [str(i) for i in range(len(names))],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        markerscale=2,
        ncols=n_columns,
        **({"fontsize": "small", "columnspacing": 1.0, "handletextpad": 0.2} if n_columns > 1 else {}),
    )
    # Afterwards, because matplotlib leaves out what has an underscore before its name, or none.
    for text, name in zip(legend.get_texts(), names, strict=True):
        # A dollar in a name begins no formula.
        text.set_parse_math(False)
        text.set_text(name)


def remove_lines(ax: Any) -> None:
    """Leave names, but no lines, around images."""
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def figure_size(tiles: NDArray[Any]) -> tuple[float, float]:
    """About an inch a tile, within what a page holds."""
    n_rows, n_columns, height, width, _ = tiles.shape
    inch = min(1.0, 10 / n_columns)
    # Titles and labels need some height beside flat images.
    return n_columns * inch + 0.6, min(max(n_rows * inch * height / width, 1.0), 14) + 0.6
