import pickle
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

from skdim import DIMTransformer
from skdim.displays import (
    EmbeddingDisplay,
    FilterDisplay,
    NeighborsDisplay,
    ScoreMapDisplay,
    TrainingCurveDisplay,
)
from skdim.encoders import mean_over_map
from skdim.pictures import to_rgb

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def small(**params):
    return DIMTransformer(
        **{"global_weight": 0.5, "n_components": 4, "max_epochs": 2, "mi_units": 8, "random_state": 0} | params
    )


@pytest.fixture(scope="module")
def fitted(colour_images):
    return small().fit(colour_images[0])


def test_training_curves_are_the_history(fitted):
    _, ax = plt.subplots()
    display = TrainingCurveDisplay.from_estimator(fitted, ax=ax, linewidth=3)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    terms = set(fitted.history_[0]) - {"seconds", "images_per_second"}
    assert set(display.lines_) == terms >= {"loss", "local", "global", "prior", "local_bound"}
    for name, line in display.lines_.items():
        assert list(line.get_xdata()) == [1, 2]
        assert list(line.get_ydata()) == [epoch[name] for epoch in fitted.history_]
        assert line.get_linewidth() == 3
    assert display.lines_["local"].get_color() == display.lines_["local_bound"].get_color()
    assert len({line.get_color() for line in display.lines_.values()}) == len(terms) - 2
    assert ax.get_xlabel() == "Epoch"
    assert ax.get_legend().get_texts()[0].get_text() == "loss (weighted sum)"


def test_terms_that_only_some_epochs_have(digits):
    dim = small(prior_weight=0, max_epochs=1, warm_start=True).fit(digits[0])
    with pytest.warns(UserWarning, match="new discriminators"):
        dim.set_params(prior_weight=0.1).fit(digits[0])
    lines = TrainingCurveDisplay.from_estimator(dim).lines_
    np.testing.assert_array_equal(lines["prior"].get_ydata(), [np.nan, dim.history_[1]["prior"]])


def test_no_epochs_no_curves(digits):
    with pytest.raises(ValueError, match="history has no epochs"):
        TrainingCurveDisplay.from_estimator(small(max_epochs=0).fit(digits[0]))


def test_what_cannot_be_plotted_opens_no_figure():
    points = np.random.default_rng(0).random((6, 2))
    for display, params, message in (
        (TrainingCurveDisplay([]), {}, "history has no epochs"),
        (EmbeddingDisplay(points), {"n_thumbnails": 2}, "n_thumbnails needs pictures"),
        (EmbeddingDisplay(points[:, :1]), {}, r"coordinates must be of shape \(n, 2\), got \(6, 1\)"),
        (EmbeddingDisplay(points, y=np.zeros((6, 2))), {}, r"y should be a 1d array, got an array of shape \(6, 2\)"),
        (EmbeddingDisplay(points, y=[0, 1]), {}, "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            display.plot(**params)
    assert not plt.get_fignums()


def drawn_points(ax):
    return {points.get_label(): points for points in ax.collections}


def test_embedding_by_class(fitted, colour_images):
    X, y = colour_images
    names = np.array(["red", "green", "blue"])[y]
    display = EmbeddingDisplay.from_estimator(fitted, X, names, s=7)
    expected = PCA(2).fit_transform(fitted.transform(X))
    points = drawn_points(display.ax_)
    assert set(points) == {"red", "green", "blue"}
    for name, drawn in points.items():
        np.testing.assert_allclose(drawn.get_offsets(), expected[names == name], rtol=1e-4, atol=1e-5)
        assert drawn.get_sizes() == [7]
    assert len({tuple(drawn.get_facecolor()[0]) for drawn in points.values()}) == 3
    assert {text.get_text() for text in display.ax_.get_legend().get_texts()} == set(points)
    assert display.ax_.get_xlabel() == "Principal component 1"


def test_sizes_and_colours_of_each_image_go_with_it():
    coordinates, y = np.arange(12.0).reshape(6, 2), np.array(["a", "b", "a", None, "b", "b"], dtype=object)
    sizes, values = np.arange(10, 16), [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
    drawn = EmbeddingDisplay(coordinates, y=y).plot(s=sizes, c=values, linewidths=list(range(6))).ax_.collections
    for points, rows in zip(drawn, ([3], [0, 2], [1, 4, 5]), strict=True):
        assert points.get_offsets().tolist() == coordinates[rows].tolist()
        assert points.get_sizes().tolist() == sizes[rows].tolist()
        assert list(points.get_linewidths()) == rows
        assert points.get_array().tolist() == [values[row] for row in rows]
        assert points.get_clim() == (1, 9)


@pytest.mark.parametrize(
    ("n", "style"),
    [
        (3, {"color": (1, 0, 0)}),
        (4, {"c": ["red", (1, 0, 0), "blue", (0, 1, 0)]}),
        (3, {"marker": (5, 1, 0)}),
        (2, {"linestyle": (0, (1, 2))}),
        (3, {"s": (4, 5, 6)}),
    ],
)
def test_styles_of_as_many_parts_as_there_are_images(n, style):
    EmbeddingDisplay(np.arange(2.0 * n).reshape(n, 2)).plot(**style).figure_.canvas.draw()


def test_a_name_with_dollars_is_no_formula_and_coordinates_may_be_a_frame():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [0.0, 9.0], "y": [0.0, 9.0]}, index=[7, 8])
    display = EmbeddingDisplay(frame, y=["$a{b$", "c"], pictures=np.zeros((2, 4, 4, 3))).plot(n_thumbnails=2)
    display.figure_.canvas.draw()
    assert sorted(display.thumbnails_) == [0, 1]


def test_embedding_by_value_has_a_colour_bar(fitted, colour_images):
    X, _ = colour_images
    values = np.linspace(0.1, 2.3, len(X))
    display = EmbeddingDisplay.from_estimator(fitted, X, values)
    (points,) = display.ax_.collections
    assert np.array_equal(points.get_array(), values)
    assert display.figure_.axes[1].get_ylabel() == "y"
    assert display.ax_.get_legend() is None


def test_more_classes_than_colours_are_told_apart():
    genes = [f"gene {i:02}" for i in range(80)]
    display = EmbeddingDisplay(np.random.default_rng(0).random((80, 2)), y=genes).plot()
    drawn = display.ax_.collections
    looks = {(tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes()) for points in drawn}
    assert len(looks) == 80


def test_many_classes_leave_room_for_the_points():
    y = np.array([f"kind {i}" for i in range(30)])
    display = EmbeddingDisplay(np.random.default_rng(0).random((30, 2)), y=y).plot()
    display.figure_.canvas.draw()
    axes, page = display.ax_.get_window_extent(), display.figure_.bbox
    assert axes.width > page.width / 2
    assert axes.height > 0.8 * page.height
    legend = display.ax_.get_legend().get_window_extent()
    assert page.y0 <= legend.y0 < legend.y1 <= page.y1
    assert legend.x1 <= page.x1


class FirstTwo(BaseEstimator):
    def fit_transform(self, X):
        return X[:, :2]


def test_embedding_projections(fitted, colour_images):
    X, _ = colour_images
    display = EmbeddingDisplay.from_estimator(fitted, X, projection=FirstTwo())
    assert np.array_equal(display.coordinates, fitted.transform(X)[:, :2])
    tsne = [EmbeddingDisplay.from_estimator(fitted, X[:20], projection="tsne", random_state=0) for _ in range(2)]
    assert tsne[0].coordinates.shape == (20, 2)
    assert np.array_equal(tsne[0].coordinates, tsne[1].coordinates)
    with pytest.raises(ValueError, match=r"projection must be 'pca', 'tsne' or a transformer .*, got 'umap'"):
        EmbeddingDisplay.from_estimator(fitted, X, projection="umap")
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        EmbeddingDisplay.from_estimator(fitted, X, [0, 1])
    with pytest.raises(ValueError, match="y should be a 1d array"):
        EmbeddingDisplay.from_estimator(fitted, X, np.zeros((len(X), 2)))


class WithoutParameters:
    def fit_transform(self, X):
        self.fitted_ = True
        return X[:, :2]


def test_a_projection_is_the_users_and_stays_as_it_is(fitted, colour_images):
    X, _ = colour_images
    for projection in (PCA(2), WithoutParameters()):
        before = vars(projection).copy()
        EmbeddingDisplay.from_estimator(fitted, X, projection=projection)
        assert vars(projection) == before


def test_projections_that_are_none(fitted, colour_images):
    X, _ = colour_images
    with pytest.raises(ValueError, match=r"projection must give two columns, got an array of shape \(60, 3\)"):
        EmbeddingDisplay.from_estimator(fitted, X, projection=PCA(3))
    for projection in (None, StandardScaler, DummyClassifier()):
        with pytest.raises(TypeError, match="projection must be 'pca', 'tsne' or a transformer with fit_transform"):
            EmbeddingDisplay.from_estimator(fitted, X, projection=projection)
    for projection in ("pca", "tsne"):
        with pytest.raises(ValueError, match=r"Found array with 1 sample\(s\) while a minimum of 2 is required by Emb"):
            EmbeddingDisplay.from_estimator(fitted, X[:1], projection=projection)


def test_thumbnails_are_the_images_and_do_not_overlap(fitted, colour_images):
    X, y = colour_images
    display = EmbeddingDisplay.from_estimator(fitted, X, y, n_thumbnails=10)
    boxes = display.ax_.artists
    assert 1 < len(boxes) == len(display.thumbnails_) <= 10
    for i, box in zip(display.thumbnails_, boxes, strict=True):
        assert box.xy == pytest.approx(display.coordinates[i])
        np.testing.assert_allclose(box.offsetbox.get_data(), X[i].transpose(1, 2, 0) / np.float32(255))
    display.figure_.canvas.draw()
    extents = [box.get_window_extent() for box in boxes]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    with pytest.raises(ValueError, match="n_thumbnails needs pictures"):
        EmbeddingDisplay(display.coordinates).plot(n_thumbnails=1)
    with pytest.raises(TypeError, match="n_thumbnails must be an instance of int, not str"):
        EmbeddingDisplay.from_estimator(fitted, X, y, n_thumbnails="10")
    with pytest.raises(ValueError, match="n_thumbnails == -1, must be >= 0"):
        EmbeddingDisplay.from_estimator(fitted, X, y, n_thumbnails=-1)


def test_thumbnails_cost_no_picture_of_each_image():
    X = np.random.default_rng(0).integers(0, 255, (2000, 5, 64, 64), dtype=np.uint8)
    dim = DIMTransformer(n_components=2, max_epochs=0, mi_units=4, random_state=0).fit(X[:20])
    EmbeddingDisplay.from_estimator(dim, X[:20], n_thumbnails=1)
    tracemalloc.start()
    try:
        display = EmbeddingDisplay.from_estimator(dim, X, n_thumbnails=5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert display.thumbnails_
    # Not even their bytes once more.
    assert peak < X.nbytes / 2


@pytest.mark.parametrize(("metric", "order"), [("manhattan", 1), ("euclidean", 2)])
def test_neighbors(fitted, colour_images, metric, order):
    X, _ = colour_images
    display = NeighborsDisplay.from_estimator(fitted, X[:3], X[3:], n_neighbors=2, metric=metric)
    Z = fitted.transform(X)
    distances = np.linalg.norm(Z[:3, None] - Z[None, 3:], ord=order, axis=2)
    expected = np.argsort(distances, axis=1)[:, :2]
    assert np.array_equal(display.indices, expected)
    np.testing.assert_allclose(display.distances, np.sort(distances, axis=1)[:, :2], rtol=1e-5)
    pictures = X.transpose(0, 2, 3, 1) / np.float32(255)
    assert np.array_equal(display.queries, pictures[:3])
    assert np.array_equal(display.neighbors, pictures[3:][expected])
    (image,) = display.ax_.images
    canvas = image.get_array()
    np.testing.assert_allclose(canvas[:12, :10], pictures[0])
    np.testing.assert_allclose(canvas[-12:, -10:], pictures[3:][expected[2, 1]])
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["Query", "1", "2"]


@pytest.mark.parametrize("params", [{}, {"discriminator": "concat", "mi_estimator": "jsd"}])
@pytest.mark.parametrize("with_background", [False, True])
def test_score_maps(colour_images, params, with_background):
    X, _ = colour_images
    dim = small(**params).fit(X)
    shown, others = (X[:3], X[10:50]) if with_background else (X[:35], X[:35])
    critic = dim.discriminators_["local"].train()
    display = ScoreMapDisplay.from_estimator(dim, shown, background=others if with_background else None)

    assert critic.training
    standardized = [
        torch.from_numpy((images / 255 - dim.mean_[:, None, None]) / dim.std_[:, None, None]).float()
        for images in (shown, others)
    ]
    critic.eval()
    with torch.no_grad():
        (embedding, features), (_, other_features) = (dim.encoder_(images) for images in standardized)
        own = critic(features, embedding).double().numpy()
        for i in range(3):
            against = critic(other_features, embedding[i].expand(len(others), -1)).double().numpy()
            if not with_background:
                against = np.delete(against, i, axis=0)
            expected = own[i] - logsumexp(against) + np.log(against.size)
            np.testing.assert_allclose(display.scores[i], expected, rtol=1e-3, atol=1e-4)

    image, scores = display.ax_.images
    drawn = scores.get_array()
    assert drawn.shape == image.get_array().shape[:2]
    assert np.ma.getmaskarray(drawn)[:12].all()  # the images themselves have no scores over them
    assert drawn[-12, 0] == display.scores[0, 0, 0]
    assert drawn[-1, -1] == display.scores[-1, -1, -1]
    assert display.colorbar_.ax.get_ylabel() == "Score: high where\nit knows more"
    assert [label.get_text() for label in display.ax_.get_yticklabels()] == ["Image", "Scores"]


def test_score_maps_take_styles(fitted, colour_images):
    X, _ = colour_images
    _, scores = ScoreMapDisplay.from_estimator(fitted, X[:3]).ax_.images
    assert (scores.get_cmap().name, scores.get_alpha()) == ("viridis", 0.7)
    style = {"cmap": "magma", "alpha": 0.5, "vmin": -1, "vmax": 2}
    display = ScoreMapDisplay.from_estimator(fitted, X[:3], **style)
    for ax in (display.ax_, display.plot(**style).ax_):
        _, scores = ax.images
        assert (scores.get_cmap().name, scores.get_alpha(), *scores.get_clim()) == ("magma", 0.5, -1, 2)


def test_score_maps_need_a_critic_and_another_image(fitted, colour_images):
    X, _ = colour_images
    with pytest.raises(ValueError, match="X has a single image: set background"):
        ScoreMapDisplay.from_estimator(fitted, X[:1])
    assert ScoreMapDisplay.from_estimator(fitted, X[:1], background=X[1:]).scores.shape[0] == 1
    for without in (small(local_weight=0).fit(X), pickle.loads(pickle.dumps(fitted))):
        with pytest.raises(ValueError, match=r"needs the local critic, discriminators_\['local'\]"):
            ScoreMapDisplay.from_estimator(without, X)


def test_filters(fitted):
    display = FilterDisplay.from_estimator(fitted)
    weight = next(m for m in fitted.encoder_.modules() if isinstance(m, nn.Conv2d)).weight.detach().numpy()
    assert np.array_equal(display.filters, weight)
    (image,) = display.ax_.images
    canvas = image.get_array()
    height, width = weight.shape[2:]
    assert canvas.shape == (8 * height + 7, 8 * width + 7, 3)
    largest = np.abs(weight).max()
    np.testing.assert_allclose(canvas[:height, :width], 0.5 + weight[0].transpose(1, 2, 0) / largest / 2, rtol=1e-5)
    np.testing.assert_allclose(canvas[-1, -1], 0.5 + weight[-1, :, -1, -1] / largest / 2, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("n_channels", [1, 3, 5])
def test_filters_that_are_constant(value, n_channels):
    (image,) = FilterDisplay(np.full((4, n_channels, 3, 3), value)).plot().ax_.images
    assert np.allclose(image.get_array()[:3, :3], 1.0 if value and n_channels in (1, 3) else 0.5)


def test_a_pipeline_stands_for_its_transformer_and_the_steps_before_it(fitted, colour_images):
    X, y = colour_images
    flip = FunctionTransformer(np.flip, kw_args={"axis": 3})
    pipeline = Pipeline([("flip", flip), ("dim", fitted), ("scale", StandardScaler()), ("classify", DummyClassifier())])
    flipped = np.flip(X, axis=3)
    assert TrainingCurveDisplay.from_estimator(pipeline).history is fitted.history_
    assert FilterDisplay.from_estimator(pipeline).filters.shape[1] == 3
    for display in (
        lambda estimator, X: EmbeddingDisplay.from_estimator(estimator, X, y, n_thumbnails=2),
        lambda estimator, X: NeighborsDisplay.from_estimator(estimator, X[:2], X),
        lambda estimator, X: ScoreMapDisplay.from_estimator(estimator, X[:2], background=X[2:9]),
    ):
        of_pipeline, of_step = (vars(display(*of)) for of in ((pipeline, X), (fitted, flipped)))
        for name in ("coordinates", "pictures", "queries", "neighbors", "indices", "scores"):
            first, second = (of[name][:] if of.get(name) is not None else None for of in (of_pipeline, of_step))
            assert np.array_equal(first, second)


@pytest.mark.parametrize("estimator", [make_pipeline(StandardScaler()), GridSearchCV(small(), {})])
def test_what_holds_no_transformer_is_refused(estimator, colour_images):
    message = f"needs a fitted DIMTransformer or a Pipeline with one, got a {type(estimator).__name__}"
    with pytest.raises(TypeError, match=message):
        TrainingCurveDisplay.from_estimator(estimator)
    with pytest.raises(TypeError, match=message):
        EmbeddingDisplay.from_estimator(estimator, colour_images[0])


def test_a_users_style_counts_by_any_name_of_it(fitted, colour_images):
    X, y = colour_images
    curves = TrainingCurveDisplay.from_estimator(fitted, c="red", lw=3, ls=":")
    line = curves.lines_["loss"]
    assert (line.get_color(), line.get_linewidth(), line.get_linestyle()) == ("red", 3, ":")
    for style in ({"c": "red"}, {"color": "red", "linewidth": 1}, {"c": "red", "lw": 1, "s": 3}):
        for labels in (None, y):
            display = EmbeddingDisplay.from_estimator(fitted, X, labels, **style)
            assert all(np.allclose(each.get_facecolor(), [1, 0, 0, 1]) for each in display.ax_.collections)


def test_many_integers_are_values(fitted, colour_images):
    X, y = colour_images
    many = np.arange(len(X))
    assert len(many) > 48
    assert EmbeddingDisplay.from_estimator(fitted, X, many).ax_.get_legend() is None
    (points,) = EmbeddingDisplay.from_estimator(fitted, X, many, color="red").ax_.collections
    assert np.allclose(points.get_facecolor(), [1, 0, 0, 1])
    assert EmbeddingDisplay.from_estimator(fitted, X, y).ax_.get_legend() is not None


def test_thumbnails_in_a_part_of_a_figure(fitted, colour_images):
    parts = plt.figure().subfigures(1, 2)
    display = EmbeddingDisplay.from_estimator(fitted, colour_images[0], n_thumbnails=3, ax=parts[1].subplots())
    assert display.thumbnails_


def test_principal_components_are_drawn_from_the_seed_given(fitted):
    X = np.random.default_rng(0).random((550, 12, 10, 3), dtype=np.float32)
    wide = pickle.loads(pickle.dumps(fitted)).set_params(output_layer="hidden")
    rng = np.random.mtrand._rand  # the global generator
    before = rng.get_state()[2]
    first, second = (EmbeddingDisplay.from_estimator(wide, X, random_state=0).coordinates for _ in range(2))
    assert np.array_equal(first, second)
    assert rng.get_state()[2] == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"metric": "near"}, "metric"),
        ({"n_neighbors": 100}, r"n_neighbors must be at most the number of images in X, \d+, got 100"),
    ],
)
def test_neighbors_are_checked_before_images_are_embedded(fitted, colour_images, monkeypatch, params, message):
    X, _ = colour_images
    monkeypatch.setattr(DIMTransformer, "transform", None)
    with pytest.raises(ValueError, match=message):
        NeighborsDisplay.from_estimator(fitted, X[:2], X, **params)


def test_labels_and_thumbnails_are_checked_before_images_are_embedded(fitted, colour_images, monkeypatch):
    X, y = colour_images
    monkeypatch.setattr(DIMTransformer, "transform", None)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        EmbeddingDisplay.from_estimator(fitted, X, y[:7])
    with pytest.raises(ValueError, match="n_thumbnails == -1, must be >= 0"):
        EmbeddingDisplay.from_estimator(fitted, X, n_thumbnails=-1)


def test_a_single_dimension_is_no_plane(digits):
    with pytest.raises(ValueError, match="two dimensions at least, got n_components=1"):
        EmbeddingDisplay.from_estimator(small(n_components=1).fit(digits[0]), digits[0])


class Convolutionless(nn.Module):
    def __init__(self, image_shape, n_components):
        super().__init__()
        self.linear = nn.Linear(int(np.prod(image_shape)), n_components)

    def forward(self, images):
        return self.linear(images.flatten(1)), images


def test_an_encoder_without_convolution_has_no_filters(digits):
    with pytest.raises(ValueError, match="Convolutionless has no 2-D convolution"):
        FilterDisplay.from_estimator(small(encoder=Convolutionless).fit(digits[0]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (5, 8, 6), (1, 1, 40)])
def test_displays_show_any_kind_of_image(shape):
    X = np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)
    dim = small(image_shape=shape, data_format="channels_first").fit(X)
    EmbeddingDisplay.from_estimator(dim, X, n_thumbnails=3)
    NeighborsDisplay.from_estimator(dim, X[:2], X, n_neighbors=1)
    display = ScoreMapDisplay.from_estimator(dim, X)
    title = FilterDisplay.from_estimator(dim).ax_.get_title()
    assert ("principal components of the" in title) == (shape[0] not in (1, 3))
    assert display.pictures.shape == (20, shape[1] if shape[1] > 1 else 10, shape[2], 3)
    assert display.pictures.min() >= 0
    assert display.pictures.max() <= 1
    display.figure_.canvas.draw()


def test_pictures_of_many_channels_are_principal_components():
    rng = np.random.default_rng(0)
    latent = rng.uniform(-1, 1, (4, 9, 7, 3)) * [9, 3, 1]
    values = latent @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:3]
    pictures = to_rgb(values)
    for channel in range(3):
        inside = (pictures[..., channel] > 0) & (pictures[..., channel] < 1)
        r = np.corrcoef(pictures[..., channel][inside], latent[..., channel][inside])[0, 1]
        assert abs(r) > 0.95


def test_a_component_with_loadings_that_cancel_is_drawn():
    values = np.zeros((1, 2, 2, 4))
    values[0, :, :, :2] = np.array([[[1, -1], [-1, 1]], [[1, -1], [-1, 1]]]) * 8  # a direction whose loadings sum to 0
    assert len(np.unique(to_rgb(values)[..., 0])) == 2


def test_pictures_keep_the_range_0_to_1_and_stretch_others():
    unit = np.array([0.2, 0.6]).reshape(1, 1, 2, 1)
    assert np.array_equal(to_rgb(unit)[0, 0, :, 0], [0.2, 0.6])
    assert np.array_equal(to_rgb(unit * 100)[0, 0, :, 0], [0.0, 1.0])
    assert np.isfinite(to_rgb(np.full((2, 3, 3, 5), 7.0))).all()


def test_without_matplotlib_the_error_says_what_to_install(fitted, colour_images, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"TrainingCurveDisplay.plot requires matplotlib.*pip install matplotlib"):
        TrainingCurveDisplay.from_estimator(fitted)
    with pytest.raises(ImportError, match=r"NeighborsDisplay.from_estimator requires matplotlib"):
        NeighborsDisplay.from_estimator(fitted, colour_images[0], None)


@pytest.mark.parametrize("missing", [None, np.nan, "NA"])
def test_images_without_a_label_are_grey(missing):
    missing = pytest.importorskip("pandas").NA if missing == "NA" else missing
    y = np.array(["a", missing, "b", "a", missing], dtype=object)
    coordinates = np.arange(10.0).reshape(5, 2)
    ax = EmbeddingDisplay(coordinates, y=y).plot().ax_
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["no label", "a", "b"]
    drawn = [points.get_offsets().tolist() for points in ax.collections]
    assert drawn == [coordinates[rows].tolist() for rows in ([1, 4], [0, 3], [2])]
    values = EmbeddingDisplay(coordinates, y=[0.5, np.nan, 0.25, 0.125, np.nan]).plot().ax_.collections
    assert [len(points.get_offsets()) for points in values] == [2, 3]
    nothing = EmbeddingDisplay(coordinates, y=[np.nan] * 5).plot().ax_
    assert [text.get_text() for text in nothing.get_legend().get_texts()] == ["no label"]


@pytest.mark.parametrize(
    "labels", [np.array([1, 2, 1, 3]), np.array([True, False, False, True]), np.array(["a", "b", "a", "c"])]
)
def test_labels_of_numpys_types_beside_a_gap(labels):
    ax = EmbeddingDisplay(np.zeros((5, 2)), y=[*labels, None]).plot().ax_
    expected = ["no label", *map(str, np.unique(labels))]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == expected


@pytest.mark.parametrize("to_labels", [list, "Int64"])
def test_counts_with_gaps_have_a_colour_bar(to_labels):
    counts = np.arange(60.0)
    if to_labels == "Int64":
        y = pytest.importorskip("pandas").Series(np.where(counts < 5, np.nan, counts), dtype="Int64")
    else:
        y = [None if count < 5 else count for count in counts]
    display = EmbeddingDisplay(np.zeros((60, 2)), y=y).plot()
    gaps, values = display.ax_.collections
    assert len(gaps.get_offsets()) == 5
    np.testing.assert_array_equal(values.get_array(), counts[5:])
    assert display.figure_.axes[1].get_ylabel() == "y"


def test_the_legend_has_classes_of_any_name():
    ax = EmbeddingDisplay(np.zeros((4, 2)), y=["", "_control", "$5", "treated"]).plot().ax_
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["''", "$5", "_control", "treated"]


def test_thumbnails_are_of_all_classes_in_whatever_order_they_come(fitted, colour_images):
    X, _ = colour_images
    coordinates = np.random.default_rng(0).random((200, 2))
    pictures = [X[0].transpose(1, 2, 0)] * 200
    display = EmbeddingDisplay(coordinates, pictures=pictures).plot(n_thumbnails=10)
    assert len(display.thumbnails_) == 10
    assert max(display.thumbnails_) > 100
    nothing = EmbeddingDisplay(coordinates[:0], pictures=pictures[:0]).plot(n_thumbnails=10)
    assert nothing.thumbnails_ == []


@pytest.mark.parametrize("params", [{"prior_matching": "noise", "prior_weight": 0.5}, {"multiple_globals": True}])
def test_score_maps_are_of_the_embeddings_that_the_critic_has_learned_from(colour_images, params):
    X, _ = colour_images
    dim = small(**params).fit(X)
    display = ScoreMapDisplay.from_estimator(dim, X[:3], background=X[10:40])
    model = dim.net_.module_.eval()
    own, others = (
        torch.from_numpy((x / 255 - dim.mean_[:, None, None]) / dim.std_[:, None, None]).float()
        for x in (X[:3], X[10:40])
    )
    with torch.no_grad():
        embedding, features = dim.encoder_(own)
        embedding = mean_over_map(embedding)
        if model.noise is not None:
            embedding = model.noise.on_support(embedding)
        critic = model.critics["local"]
        scores = critic(features, embedding).double().numpy()
        other_features = dim.encoder_(others)[1]
        for i in range(3):
            against = critic(other_features, embedding[i].expand(30, -1)).double().numpy()
            expected = scores[i] - logsumexp(against) + np.log(against.size)
            np.testing.assert_allclose(display.scores[i], expected, rtol=1e-3, atol=1e-4)


def test_axes_and_legend_name_what_they_show(fitted, colour_images):
    X, y = colour_images
    ax = EmbeddingDisplay.from_estimator(fitted, X, y).ax_
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Principal component 1", "Principal component 2")
    points, legend = drawn_points(ax), ax.get_legend()
    for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
        assert np.array_equal(handle.get_facecolor(), points[text.get_text()].get_facecolor())


def test_frames_of_thumbnails_have_the_colours_of_their_points():
    y = np.array([None] * 10 + ["a", "b"] * 10, dtype=object)
    coordinates = np.arange(60.0).reshape(30, 2)
    display = EmbeddingDisplay(coordinates, y=y, pictures=np.zeros((30, 4, 4, 3))).plot(n_thumbnails=30)
    colours = {points.get_label(): points.get_facecolor()[0] for points in display.ax_.collections}
    assert np.array_equal(colours["no label"], matplotlib.colors.to_rgba("lightgrey"))
    assert len(display.thumbnails_) > 5
    for i, box in zip(display.thumbnails_, display.ax_.artists, strict=True):
        assert np.array_equal(box.patch.get_edgecolor(), colours[y[i] or "no label"])


@pytest.mark.parametrize(("n_values", "has_legend"), [(48, True), (49, False)])
def test_up_to_48_whole_numbers_are_classes(n_values, has_legend):
    ax = EmbeddingDisplay(np.zeros((49, 2)), y=np.minimum(np.arange(49), n_values - 1)).plot().ax_
    assert (ax.get_legend() is not None) == has_legend


def test_each_point_has_the_colour_of_its_own_value():
    coordinates, y = np.random.default_rng(0).random((9, 2)), np.random.default_rng(1).random(9)
    (points,) = EmbeddingDisplay(coordinates, y=y).plot().ax_.collections
    assert np.array_equal(points.get_offsets(), coordinates)
    assert np.array_equal(points.get_array(), y)


def test_tsne_is_that_of_scikit_learn(fitted, colour_images):
    X = colour_images[0][:20]
    display = EmbeddingDisplay.from_estimator(fitted, X, projection="tsne", random_state=0)
    expected = TSNE(2, perplexity=19 / 3, random_state=0).fit_transform(fitted.transform(X))
    np.testing.assert_allclose(display.coordinates, expected, rtol=1e-4)


def test_queries_and_neighbors_are_scaled_alike():
    X = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)
    display = NeighborsDisplay.from_estimator(small(max_epochs=0).fit(X), X[:2], X, n_neighbors=3)
    assert np.array_equal(display.queries[0], display.neighbors[0, 0])


def test_thumbnails_repeat_themselves():
    display = EmbeddingDisplay(np.random.default_rng(0).random((200, 2)), pictures=np.zeros((200, 4, 4, 3)))
    first, second = (display.plot(n_thumbnails=5).thumbnails_ for _ in range(2))
    assert first == second


def test_bounds_are_dashed(fitted):
    display = TrainingCurveDisplay.from_estimator(fitted)
    styles = {name: line.get_linestyle() for name, line in display.lines_.items()}
    assert styles == {name: "--" if name.endswith("_bound") else "-" for name in styles}
    assert display.ax_.get_ylabel() == "Loss (solid), bound in nats (dashed)"


def test_each_location_covers_its_share_of_the_image():
    scores = np.arange(6.0).reshape(1, 2, 3)
    _, drawn = ScoreMapDisplay(np.zeros((1, 5, 7, 3)), scores).plot().ax_.images
    expected = scores[0][np.ix_([0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2])]
    assert np.array_equal(drawn.get_array()[-5:, :7], expected)
    assert drawn.get_interpolation() == "nearest"
