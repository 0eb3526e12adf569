import os
import re
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from sklearn import config_context
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_html_repr

from skdim import DIMTransformer
from skdim.evaluation import FineTunedClassifier, LinearProbe, MLPProbe
from skdim.files import picture_as_array, read_images


def small(**params):
    return DIMTransformer(**{"n_components": 3, "max_epochs": 1, "mi_units": 8, "random_state": 0} | params)


@pytest.fixture
def photos(tmp_path, colour_images):
    """Colour images and the PNG files they are in."""
    X = np.ascontiguousarray(colour_images[0].transpose(0, 2, 3, 1))
    paths = [tmp_path / f"{index:02}.png" for index in range(len(X))]
    for image, path in zip(X, paths, strict=True):
        Image.fromarray(image).save(path)
    return X, paths


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_set_output(digits, library):
    frames = pytest.importorskip(library)
    X = digits[0]
    expected = small().fit_transform(X)
    names = [f"pixel{i}" for i in range(64)]
    frame_in = frames.DataFrame({name: X[:, i] for i, name in enumerate(names)})
    dim = small().set_output(transform=library)
    frame = dim.fit_transform(frame_in)
    assert isinstance(frame, frames.DataFrame)
    assert list(frame.columns) == ["dimtransformer0", "dimtransformer1", "dimtransformer2"]
    assert np.array_equal(frame.to_numpy(), expected)
    assert frame.to_numpy().dtype == np.float32
    assert list(dim.feature_names_in_) == names
    pipeline = make_pipeline(small(), StandardScaler()).set_output(transform=library)
    assert list(pipeline.fit_transform(frame_in).columns) == list(frame.columns)


def test_a_tensor_gives_an_array_unless_dispatch_is_on(digits):
    dim = small().fit(digits[0])
    Z = dim.transform(torch.from_numpy(digits[0]))
    assert isinstance(Z, np.ndarray)
    assert np.array_equal(Z, dim.transform(digits[0]))


@pytest.mark.skipif(os.environ.get("SCIPY_ARRAY_API") != "1", reason="needs SCIPY_ARRAY_API=1")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.usefixtures("deterministic")
def test_a_probe_stays_on_the_device_with_array_api_dispatch(digits, device):
    pytest.importorskip("sklearn.externals.array_api_compat", reason="scikit-learn < 1.7 does not bring it")
    X, y = digits
    expected = small(device=device).fit_transform(X)
    dim = small(device=device)
    images, target = (torch.from_numpy(array).float().to(device) for array in (X, y))
    with config_context(array_api_dispatch=True):
        for Z in (dim.fit_transform(images), dim.transform(images)):
            assert isinstance(Z, torch.Tensor)
            assert (Z.device, Z.dtype) == (images.device, torch.float32)
            assert np.array_equal(Z.cpu().numpy(), expected)
        assert isinstance(dim.transform(X), np.ndarray)
        probe = make_pipeline(dim, StandardScaler(), Ridge(solver="svd")).fit(images, target)
        assert probe[-1].coef_.device == images.device
        assert probe.predict(images).device == images.device


@pytest.mark.parametrize("kind", ["paths", "strings", "array of strings", "series", "pillow"])
def test_files_are_images(photos, kind):
    X, paths = photos
    files = {
        "paths": lambda: paths,
        "strings": lambda: [str(path) for path in paths],
        "array of strings": lambda: np.array([str(path) for path in paths]),
        "series": lambda: pytest.importorskip("pandas").Series([str(path) for path in paths]),
        "pillow": lambda: [Image.fromarray(image) for image in X],
    }[kind]()
    dim = small(data_format="channels_first")
    assert np.array_equal(dim.fit_transform(files), small().fit_transform(X))
    assert dim.image_shape_ == (3, 12, 10)


def test_files_in_a_pipeline(photos, colour_images):
    _, paths = photos
    y = colour_images[1]
    pipeline = make_pipeline(small(), StandardScaler(), LogisticRegression()).fit(paths[:40], y[:40])
    assert pipeline.score(paths[40:], y[40:]) > 0.5


def test_grey_files_meet_a_transformer_of_colour_images(photos, tmp_path):
    X, paths = photos
    dim = small().fit(paths)
    grey = X[:2, :, :, 0]
    for index, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"grey{index}.png")
    Z = dim.transform([tmp_path / "grey0.png", tmp_path / "grey1.png"])
    assert np.array_equal(Z, dim.transform(np.repeat(grey[..., None], 3, axis=3)))


RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.concatenate([RGB, GREY[..., None]], axis=2)


@pytest.mark.parametrize(
    ("images", "mode", "expected"),
    [
        ([Image.fromarray(GREY)] * 2, None, np.stack([GREY] * 2)),
        ([Image.fromarray(GREY > 99)], None, (GREY > 99)[None] * np.uint8(255)),
        ([Image.fromarray(ALPHA)], None, RGB[None]),
        ([Image.fromarray(ALPHA)], "RGBA", ALPHA[None]),
        ([Image.fromarray(GREY), Image.fromarray(RGB)], None, np.stack([np.repeat(GREY[..., None], 3, 2), RGB])),
        ([Image.fromarray(RGB[..., 1]).convert("P")], None, np.repeat(RGB[None, :, :, 1, None], 3, 3)),
        ([Image.fromarray(GREY.astype(np.uint16) * 257)], None, GREY[None] * np.float32(257)),
        ([Image.fromarray(GREY.astype(np.float32) / 7)], None, GREY[None].astype(np.float32) / 7),
    ],
    ids=["grey", "two-tone", "no opacity", "opacity", "mixed", "palette", "16 bits", "float"],
)
def test_modes(images, mode, expected, tmp_path):
    assert np.array_equal(read_images(images, mode=mode), expected)
    assert read_images(images, mode=mode).dtype == expected.dtype
    paths = [tmp_path / f"{index}.tiff" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    assert np.array_equal(read_images(paths, mode=mode), expected)


@pytest.mark.parametrize(
    ("orientation", "as_seen"),
    [
        (1, lambda stored: stored),
        (2, np.fliplr),
        (3, lambda stored: np.rot90(stored, k=2)),
        (4, np.flipud),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: np.rot90(stored, k=-1)),
        (7, lambda stored: np.rot90(stored, k=2).swapaxes(0, 1)),
        (8, np.rot90),
        (9, lambda stored: stored),  # there is none of that number
    ],
)
def test_images_are_turned_as_the_camera_says(tmp_path, orientation, as_seen):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_images([tmp_path / "turned.png"])[0], as_seen(RGB))


def test_no_program_is_started_for_a_file_that_is_one(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "photo.jpg")
    with pytest.raises(OSError, match=r"Image 0, '.*photo.jpg', cannot be read: it is a PostScript program"):
        read_images(tmp_path)


def test_messages_name_files_as_text(tmp_path):
    for name, side in (("a", 8), ("b", 9)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / f"{name}.png")
    second = re.escape(repr(str(tmp_path / "b.png")))
    with pytest.raises(ValueError, match=rf"must have the same size: image 0, '.*a\.png', .* image 1, {second}, has"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"])


def test_a_column_of_paths_or_images_is_read_in_its_order(tmp_path):
    pandas = pytest.importorskip("pandas")
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    frame = pandas.DataFrame({"path": [str(tmp_path / f"{i}.png") for i in range(4)]})
    frame["pixels"] = list(read_images(frame["path"]))
    shuffled = frame.iloc[[2, 0, 3, 1]]
    assert read_images(shuffled["path"])[:, 0, 0].tolist() == [100, 0, 150, 50]
    dim = small(image_shape=(1, 8, 8)).fit(shuffled["path"])
    Z = dim.transform(read_images(shuffled["path"].tolist()))
    for column in ("path", "pixels"):
        assert np.array_equal(dim.transform(shuffled[column]), Z)
        scores = cross_val_score(dim, shuffled[column], scoring=lambda dim, X: len(dim.transform(X)), cv=2)
        assert scores.tolist() == [2, 2]


def test_pages_that_are_left_out_are_warned_about(tmp_path):
    pages = [Image.fromarray(GREY + i) for i in range(3)]
    path = tmp_path / "stack.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "plain.tif")
    message = r"Image 1, .*stack.tif.*, has 3 pages.* only the first is read"
    with pytest.warns(UserWarning, match=message) as caught:
        X = read_images([tmp_path / "plain.tif", path])
    assert caught[0].filename == __file__
    assert np.array_equal(X[1], GREY)
    with pytest.warns(UserWarning, match=message + ".* 1 more"):
        read_images([tmp_path / "plain.tif", path, path], n_jobs=2)
    with pytest.warns(UserWarning, match=message):
        small(max_epochs=0).fit([tmp_path / "plain.tif", path])
    with Image.open(path) as stack:
        with pytest.warns(UserWarning, match="Image 0, .*, has 3 pages"):
            read_images([stack])
        with pytest.warns(UserWarning, match="Image 0, .*, has 3 pages"):
            picture_as_array(stack, None)
        stack.seek(2)  # a page that was chosen
        assert np.array_equal(read_images([stack]), GREY[None] + 2)
        X = read_images([page.copy() for page in ImageSequence.Iterator(stack)])
    assert np.array_equal(X, [GREY, GREY + 1, GREY + 2])


def test_the_preview_beside_a_photo_is_no_page(tmp_path):
    photo = Image.fromarray(RGB)
    photo.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[photo])
    assert read_images([tmp_path / "phone.jpg"]).shape == (1, *RGB.shape)


@pytest.mark.parametrize("size", [32, (32,), (3, 32, 32), (0, 32), (32.5, 32), "32"])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match=r"size must be two positive integers \(height, width\) or None, got"):
        read_images([Image.fromarray(GREY)], size=size)


def test_size_scales():
    flat = [Image.fromarray(np.full(shape, 9, dtype=np.uint8)) for shape in [(4, 6), (8, 3)]]
    deep = [Image.fromarray(np.full((4, 6), 999, dtype=np.uint16))]
    assert np.array_equal(read_images(flat, size=(5, 7)), np.full((2, 5, 7), 9))
    assert np.array_equal(read_images(deep, size=(5, 7)), np.full((1, 5, 7), 999))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_smaller_size_averages(dtype):
    # Every fourth pixel alone would be 0.
    stripes = np.repeat(30 * np.arange(8), 4)[:, None] * (np.arange(32) % 2)
    stripes[::4] = 0
    (small,) = read_images([Image.fromarray(stripes.astype(dtype))], size=(8, 8))
    assert np.abs(small - stripes.reshape(8, 4, 8, 4).mean(axis=(1, 3))).max() < 25


def test_bad_files_are_named(photos, tmp_path):
    X, paths = photos
    (tmp_path / "text.png").write_text("no image")
    whole = paths[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(X[0, :4]).save(tmp_path / "other.png")
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "deep.png")

    def refuses(error, message, *names, **params):
        with pytest.raises(error, match=message):
            read_images([paths[0], *(tmp_path / name for name in names)], **params)

    refuses(FileNotFoundError, r"Image 2, '.*missing.png', cannot be read", "01.png", "missing.png")
    refuses(OSError, r"Image 1, '.*text.png', cannot be read: cannot identify", "text.png")
    refuses(OSError, r"Image 1, '.*cut.png', cannot be read", "cut.png")
    refuses(
        ValueError,
        r"image 0, .*00.png.* has \(12, 10\) .*, image 2, .*other.png.*, has \(4, 10\)",
        *("01.png", "other.png"),
    )
    refuses(ValueError, r"image 0, .*00.png.*, has 8 bits, image 1, .*deep.png.*, more", "deep.png", size=(4, 4))
    refuses(ValueError, r"Image 1, .*deep.png.*: mode='RGB' cannot hold it", "deep.png", size=(4, 4), mode="RGB")
    refuses(ValueError, "mode must be 'L', 'RGB', 'RGBA' or None, got 'CMYK'", mode="CMYK")
    with pytest.raises(ValueError, match="at least one image"):
        read_images([])
    with pytest.raises(FileNotFoundError, match=r"Image 0, 'nothing.png'"):
        small().fit(["nothing.png", "nowhere.png"])


def test_without_pillow_the_error_says_what_to_install(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        small().fit(photos[1])


def test_html_links_to_the_documentation_and_has_a_tooltip_for_every_parameter():
    for estimator in (small(), LinearProbe(), MLPProbe(), FineTunedClassifier(small())):
        html = estimator_html_repr(estimator)
        assert "https://scikit-deepinfomax.readthedocs.io/en/stable/api.html" in html
        if hasattr(DIMTransformer, "set_callbacks"):  # scikit-learn >= 1.9
            for name in estimator.get_params(deep=False):
                assert f"--doc-link-{name};" in html

    class Subclass(DIMTransformer):
        pass

    assert "readthedocs" not in estimator_html_repr(Subclass())


def tiff(pixels, planes, kind=1, n_extra=None):
    """Write colours (H, W, C), or planes of them (C, H, W), as an uncompressed TIFF of one strip a plane."""
    n_samples, (height, width) = (len(pixels), pixels.shape[1:]) if planes else (pixels.shape[2], pixels.shape[:2])
    n_extra = max(0, n_samples - 3) if n_extra is None else n_extra
    strips = list(pixels) if planes else [pixels]
    data = b"".join(strip.tobytes() for strip in strips)
    tags = [
        (256, 3, [width]),
        (257, 3, [height]),
        (258, 3, [8 * pixels.itemsize] * n_samples),
        (259, 3, [1]),
        (262, 3, [1 if n_samples == 1 else 2]),
        (273, 4, [8 + index * strips[0].nbytes for index in range(len(strips))]),
        (277, 3, [n_samples]),
        (278, 3, [height]),
        (279, 4, [strip.nbytes for strip in strips]),
        (284, 3, [2 if planes else 1]),
        *([(338, 3, [0] * n_extra)] if n_extra else []),
        (339, 3, [kind] * n_samples),
    ]
    entries, extra = b"", b""
    start = 8 + len(data)
    for tag, kind, values in tags:
        packed = struct.pack("<" + {3: "H", 4: "I"}[kind] * len(values), *values)
        if len(packed) > 4:
            extra_at = start + 2 + 12 * len(tags) + 4 + len(extra)
            extra += packed
            packed = struct.pack("<I", extra_at)
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return struct.pack("<2sHI", b"II", 42, start) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + extra


def test_what_pillow_loses_of_a_tiff_is_said(tmp_path):
    path = tmp_path / "cells.tif"
    rng = np.random.default_rng(0)
    bytes_, words = (rng.integers(0, np.iinfo(dtype).max, (6, 8, 5), dtype=dtype) for dtype in ("u1", "u2"))
    path.write_bytes(tiff(bytes_[..., :3].copy(), planes=False))
    assert np.array_equal(read_images([path])[0], bytes_[..., :3])
    path.write_bytes(tiff(bytes_, planes=False))
    with pytest.warns(UserWarning, match=r"has 5 channels, of which only [34] can be read.*tifffile\.imread"):
        assert np.array_equal(read_images([path])[0], bytes_[..., :3])
    path.write_bytes(tiff(words[..., :3].copy(), planes=False))
    with pytest.warns(UserWarning, match=r"has colours of 16 bits, which are cut to 8\. .*tifffile\.imread"):
        assert np.array_equal(read_images([path])[0], words[..., :3] >> 8)
    path.write_bytes(tiff(words[..., :3].transpose(2, 0, 1).copy(), planes=True))
    with pytest.raises(OSError, match=r"Image 0, .*16 bits that lie in planes.*tifffile\.imread"):
        read_images([path])


@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [("i1", 2, "takes its 8-bit integers for unsigned ones"), ("u4", 1, "takes its 32-bit integers for signed ones")],
)
def test_integers_that_pillow_takes_for_others_are_refused(tmp_path, dtype, kind, message):
    path = tmp_path / "cells.tif"
    pixels = np.array([[[1], [np.iinfo(dtype).min], [np.iinfo(dtype).max]]], dtype=dtype)
    path.write_bytes(tiff(pixels, planes=False, kind=kind))
    # Older Pillow refuses them itself.
    with pytest.raises(OSError, match=f"Image 0, .*({message}|cannot identify image file)"):
        read_images([path])


def test_a_fourth_channel_is_not_dropped_without_a_word(tmp_path):
    path = tmp_path / "scene.tif"
    scene = np.random.default_rng(0).integers(0, 255, (6, 8, 4), dtype=np.uint8)
    path.write_bytes(tiff(scene, planes=False, n_extra=0))
    with pytest.warns(UserWarning, match="a fourth channel that is not called opacity, which is left out"):
        assert np.array_equal(read_images([path])[0], scene[..., :3])


def test_pages_of_one_pillow_image_have_to_be_copies(tmp_path):
    path = tmp_path / "stack.tif"
    pages = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (10, 20, 30)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with Image.open(path) as stack:
        with pytest.raises(ValueError, match="one Pillow image of several pages more than once"):
            read_images(list(ImageSequence.Iterator(stack)))
        copies = read_images([page.copy() for page in ImageSequence.Iterator(stack)])
    assert copies[:, 0, 0].tolist() == [10, 20, 30]


def test_linked_folders_are_read_and_circles_end(tmp_path):
    for name, value in (("inside", 1), ("elsewhere", 2)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(tmp_path / name / "image.png")
    folder = tmp_path / "inside"
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "up").symlink_to(tmp_path / "inside")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    assert read_images(folder)[:, 0, 0].tolist() == [1, 2]


def test_premultiplied_grey(tmp_path):
    grey = Image.fromarray(np.full((8, 8), 77, dtype=np.uint8)).convert("LA").convert("La")
    assert (read_images([grey]) == 77).all()


def test_what_is_no_sequence_of_files(photos, tmp_path):
    pandas = pytest.importorskip("pandas")
    _, paths = photos
    table = pandas.DataFrame({"path": [str(path) for path in paths]})
    with pytest.raises(TypeError, match="got a table: pass its column of paths"):
        read_images(table)
    for frame in (table, pandas.DataFrame({"image": list(np.zeros((3, 8, 8)))})):
        with pytest.raises(TypeError, match=f"pass the column itself, X\\['{frame.columns[0]}'\\]"):
            small().fit(frame)
    with pytest.raises(TypeError, match="paths or Pillow images, got nan as image 1"):
        read_images([paths[0], np.nan])
    for gap in (None, np.nan):
        with pytest.raises(TypeError, match=f"paths or Pillow images throughout, or none: entry 1 is {gap}"):
            small().fit([paths[0], gap, paths[1]])
    with pytest.raises(ValueError, match="which is no folder: a single file is"):
        read_images(paths[0])
    numbers = pandas.DataFrame({"pixel": ["1.5", "2", "3"]})
    assert small(max_epochs=0).fit(numbers).n_features_in_ == 1
