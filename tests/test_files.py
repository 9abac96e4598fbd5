"""Data of one's own: arrays, and folders of images in every format that people have."""

import gzip
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import sigma_sweep, sweep
from lvae_jax import cache, datasets, files, images

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 3))
PIXELS = RNG.integers(0, 256, (20, 6, 8), dtype=np.uint8)


def array_file(path, **arrays):
    """A file with one array x, or with several."""
    if set(arrays) == {"x"} and path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        np.savez_compressed(path, **arrays)
    return str(path)


def folder(path, **pictures):
    """A folder with these PIL images or bytes, by name: "deep/a.png" lies in a sub-folder."""
    for name, picture in pictures.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture) if isinstance(picture, bytes) else picture.save(file)
    return str(path)


def picture(seed, *, size=(8, 6), mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def rows(array):
    """The examples of an array, in an order of their own."""
    return sorted(array.reshape(len(array), -1).tolist())


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize(
    ("x", "shape", "levels"),
    [
        (PIXELS, (6, 8, 1), 256),
        (PIXELS[..., None], (6, 8, 1), 256),
        (np.repeat(PIXELS[..., None], 3, axis=-1), (6, 8, 3), 256),
        (PIXELS // 16, (6, 8, 1), 16),
        (PIXELS > 128, (6, 8, 1), 2),
        (POINTS, (3,), None),
        (POINTS.astype(np.float16), (3,), None),
        (PIXELS / 255.0, (6, 8, 1), None),
    ],
)
def test_arrays(name, x, shape, levels, tmp_path):
    path = array_file(tmp_path / name, x=x)
    assert files.peek(path) == (shape, levels is not None)
    data = datasets.load(path)
    assert (data.shape, data.levels) == (shape, levels)
    assert len(data.test) == round(0.1 * len(x))
    stored = x.astype(np.uint8 if levels else np.float32)
    assert rows(np.concatenate([data.train, data.test])) == rows(stored), "each example once"
    again = datasets.load(path)
    np.testing.assert_array_equal(data.test, again.test)
    seen = data.batch(jnp.asarray(data.train[:4]), jax.random.key(0), jnp.arange(4))
    assert seen.dtype == jnp.float32
    np.testing.assert_allclose(seen, data.train[:4] / (levels - 1 if levels else 1), rtol=1e-6)


def test_given_splits_are_kept(tmp_path):
    path = array_file(tmp_path / "both.npz", train=POINTS[:30], test=POINTS[30:])
    data = datasets.load(path, test_fraction=0.5)
    np.testing.assert_array_equal(data.train, POINTS[:30].astype(np.float32))
    np.testing.assert_array_equal(data.test, POINTS[30:].astype(np.float32))
    np.testing.assert_allclose(data.centre, data.train.mean(axis=0), rtol=1e-6)
    assert data.scale == pytest.approx(np.sqrt(np.mean(data.train.var(axis=0))))


def with_nan(index):
    x = POINTS.copy()
    x[index, 1] = np.nan
    return x


WRONG = {
    "a number for each": ({"x": POINTS[:, 0]}, "float64 .40.: give points"),
    "channels first": ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, r"give images \[N, H, W\]"),
    "a table of bytes": ({"x": PIXELS[:, 0]}, "points have to be floats"),
    "64-bit integers": ({"x": PIXELS.astype(np.int64)}, "convert images to uint8"),
    "16-bit integers": ({"x": PIXELS.astype(np.uint16)}, "convert images to uint8"),
    "objects": ({"x": np.array([None, 1])}, "of numbers|convert images"),
    "empty": ({"x": POINTS[:0]}, "it is empty"),
    "no dimension": ({"x": POINTS[:, :0]}, "it is empty"),
    "one example": ({"x": POINTS[:1]}, "each needs one"),
    "all the same": ({"x": np.ones((40, 2))}, "all of its 36 training examples are the same"),
    "NaN": ({"x": with_nan(7)}, "1 of 40 examples have a value that is not finite, the first is 7"),
    "inf": ({"x": np.where(np.isnan(with_nan(9)), np.inf, POINTS)}, "the first is 9"),
    "too large": ({"x": 1e20 * POINTS}, "overflow"),
    "far from zero": ({"x": POINTS + np.array([0.0, 1e6, 0.0])}, "dimension 1 is 1e.06 .*subtract the mean"),
    "unscaled": ({"x": PIXELS.astype(float)}, r"pixels from 0 to 255: scale them to \[0, 1\]"),
    "no known name": ({"a": POINTS, "b": POINTS}, "holds a, b: give one array `x`"),
    "train alone": ({"train": POINTS}, "holds train: give one array `x`"),
    "an empty split": ({"train": POINTS, "test": POINTS[:0]}, "it is empty"),
    "splits that differ": ({"train": POINTS, "test": POINTS[:, :2]}, "give both the same"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unusable_arrays_are_refused_in_one_line(case, tmp_path):
    arrays, message = WRONG[case]
    with pytest.raises(datasets.DatasetError, match=message) as refused:
        datasets.load(array_file(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(refused.value)


def test_a_constant_dimension_is_no_reason_to_refuse(tmp_path):
    x = POINTS + np.array([0.0, 0.0, 1e6]) * 0.0
    x[:, 2] = 1e6
    assert datasets.load(array_file(tmp_path / "x.npy", x=x)).shape == (3,)


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "missing", "a folder without images"])
def test_damaged_files(damage, tmp_path):
    path = Path(array_file(tmp_path / "x.npy", x=POINTS))
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"1,2,3\n")
    else:
        path.unlink()
    if damage == "a folder without images":
        (tmp_path / "x.npy").mkdir()
        (tmp_path / "x.npy" / "notes.txt").write_text("none yet")
    with pytest.raises(datasets.DatasetError, match=r"cannot be read|does not exist|holds no PNG"):
        datasets.load(str(path))


def test_paths_are_told_from_names():
    paths = ["./faces", "../a/b", "/data/x", "~/x", "x.npy", "a/x.npz", ".", ".."]
    assert all(map(files.is_path, paths))
    assert not any(map(files.is_path, ["toy", "mnist", "mnist:3.0.1", "cifar10_corrupted/fog_1", "faces"]))


def test_a_folder_and_its_sub_folders(tmp_path):
    """Every format, sub-folders, endings in capitals; what is hidden, or no image, is left alone."""
    path = tmp_path / "faces"
    names = ("a.png", "b.PNG", "deep/c.webp", "deep/er/d.jpeg", "e.jpg", "f.png", "g.png", "h.png", "i.png", "j.png")
    folder(path, **{name: picture(seed) for seed, name in enumerate(names)})
    folder(path, **{".thumbs/x.png": picture(99), ".hidden.png": picture(99), "notes.txt": b"by me"})
    data = datasets.load(str(path), data_dir=str(tmp_path / "cache"))
    assert (data.shape, data.levels) == ((6, 8, 3), 256)
    assert len(data.train) == 9
    lossless = [np.asarray(picture(seed)).ravel().tolist() for seed in (0, 1, 5, 6, 7, 8, 9)]
    assert sum(row in lossless for row in rows(np.concatenate([data.train, data.test]))) == len(lossless)
    made = list((tmp_path / "cache").rglob("*.npy"))
    assert len(made) == 1
    os.utime(path / "a.png", ns=(1, 1))
    datasets.load(str(path), data_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2, "a file that changed is read anew"


def pixels(path, file, **options):
    """The one image of a folder, as it is read."""
    return files._pixels(Path(path, file), options.get("image_size"), options.get("channels", 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_give_the_pixels_that_are_seen(mode, tmp_path):
    original = picture(0, mode=mode)
    path = folder(tmp_path, **{"x.png": original})
    channels = 1 if mode in ("1", "L", "LA") else 3
    assert files.peek(path) == ((6, 8, channels), True)
    seen = original.convert("RGBA").convert("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(pixels(path, "x.png", channels=channels).squeeze(), np.asarray(seen))


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    path = folder(tmp_path / "x", **{"a.png": picture(0, mode="L")} | {f"{i}.png": picture(i) for i in range(1, 4)})
    both = np.concatenate(files.load(path, test_fraction=0.5, cache_dir=tmp_path / "cache"))
    assert both.shape == (4, 6, 8, 3)
    assert any(np.ptp(image.astype(int), axis=-1).max() == 0 for image in both)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotations_of_exif_are_carried_out(orientation, tmp_path):
    original, exif = picture(0), PIL.Image.Exif()
    exif[0x0112] = orientation
    original.save(tmp_path / "x.png", exif=exif)
    a = np.asarray(original)
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.swapaxes(0, 1), np.rot90(a, -1), np.rot90(a, 1).swapaxes(0, 1)]
    upright[6:] = [np.rot90(a, 2).swapaxes(0, 1), np.rot90(a, 1)]
    expected = upright[orientation - 1]
    assert files.peek(str(tmp_path))[0] == expected.shape
    np.testing.assert_array_equal(pixels(tmp_path, "x.png"), expected)


def test_jpeg_of_a_camera_is_its_first_image(tmp_path):
    """With a preview behind it, as phones write."""
    picture(0).save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[picture(1)], quality=95)
    picture(0).save(tmp_path / "y.jpg", quality=95)
    np.testing.assert_array_equal(pixels(tmp_path, "x.jpg"), pixels(tmp_path, "y.jpg"))


def test_progressive_jpeg(tmp_path):
    picture(0).save(tmp_path / "x.jpg", progressive=True, quality=95)
    np.testing.assert_array_equal(pixels(tmp_path, "x.jpg"), np.asarray(PIL.Image.open(tmp_path / "x.jpg")))


@pytest.mark.parametrize("size", [(30, 12), (12, 30), (13, 13)])
def test_the_square_in_the_middle_is_scaled(size, tmp_path):
    """Against Pillow's own resizing of the square, cut out by hand."""
    original = picture(0, size=size)
    path = folder(tmp_path, **{"x.png": original})
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    square = (left, top, left + side, top + side)
    expected = original.resize((5, 5), PIL.Image.Resampling.BILINEAR, box=square)
    np.testing.assert_array_equal(pixels(path, "x.png", image_size=5), np.asarray(expected))
    assert files.peek(path, image_size=5) == ((5, 5, 3), True)


def sixteen_bit_colours():
    """A PNG of 16 bits in colour, by hand: Pillow cannot write one."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") + (6).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    lines = zlib.compress((b"\0" + bytes(8 * 3 * 2)) * 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def saved(path, image, **options):
    image.save(path, **options)
    return path.read_bytes()


UNFIT = {
    "16 bits, grey": ("x.png", lambda path: saved(path, PIL.Image.new("I;16", (8, 6))), "more than 8 bits"),
    "16 bits, colour": ("x.png", lambda path: sixteen_bit_colours(), "more than 8 bits"),
    "CMYK": (
        "x.jpg",
        lambda path: saved(path, PIL.Image.new("CMYK", (8, 6))),
        "the colours CMYK: save it in grey or RGB",
    ),
    "transparent": (
        "x.png",
        lambda path: saved(path, PIL.Image.new("RGBA", (8, 6), (9, 9, 9, 9))),
        "transparent pixels",
    ),
    "transparent palette": (
        "x.png",
        lambda path: saved(path, PIL.Image.new("P", (8, 6)), transparency=0),
        "transparent pixels",
    ),
    "animated": (
        "x.png",
        lambda path: saved(path, picture(0), save_all=True, append_images=[picture(1)]),
        "holds 2 images",
    ),
    "cut short": ("x.png", lambda path: saved(path, picture(0))[:60], "no whole image"),
    "empty": ("x.jpg", lambda path: b"", "no whole image"),
    "another format": ("x.png", lambda path: b"GIF89a nonsense", "no whole image"),
    "another size": ("x.png", lambda path: saved(path, picture(0, size=(9, 6))), "images of 2 sizes.*`image_size`"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_images_are_named(case, tmp_path):
    name, make, message = UNFIT[case]
    path = folder(tmp_path / "x", **{f"{i}.png": picture(i) for i in range(3)})
    folder(tmp_path / "x", **{name: make(tmp_path / "x" / name)})
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load(path, data_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("packed", [True, False])
def test_archives_like_those_of_mnist(packed, tmp_path):
    """As downloaded, or unpacked with either of the names in use."""
    expected = {"train": PIXELS, "t10k": PIXELS[:4]}
    for split, pixels in expected.items():
        content = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in pixels.shape) + pixels.tobytes()
        name = f"{split}-images-idx3-ubyte.gz" if packed else f"{split}-images.idx3-ubyte"
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(b"")
    assert files.peek(str(tmp_path)) == ((6, 8, 1), True)
    data = datasets.load(str(tmp_path))
    np.testing.assert_array_equal(data.train[..., 0], PIXELS)
    np.testing.assert_array_equal(data.test[..., 0], PIXELS[:4])
    before = files.fingerprint(str(tmp_path))
    (tmp_path / name).write_bytes(gzip.compress(content[:-9]) if packed else content[:-9])
    assert files.fingerprint(str(tmp_path)) != before
    with pytest.raises(datasets.DatasetError, match=r"t10k-images.* cannot be read as images in the IDX format"):
        datasets.load(str(tmp_path))
    with pytest.raises(datasets.DatasetError, match="`image_size`"):
        datasets.check(str(tmp_path), image_size=8)


def test_a_copy_has_the_same_fingerprint(tmp_path):
    path = array_file(tmp_path / "x.npy", x=POINTS)
    other = array_file(tmp_path / "y.npy", x=POINTS)
    assert files.fingerprint(path) == files.fingerprint(other)
    array_file(tmp_path / "y.npy", x=POINTS + 1)
    assert files.fingerprint(path) != files.fingerprint(other)
    a, b = (folder(tmp_path / name, **{"p.png": picture(0)}) for name in "ab")
    assert files.fingerprint(a) == files.fingerprint(b)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (POINTS, {"levels": 4}, "`levels` is for images of grey levels"),
        (POINTS, {"flip": True}, "`flip` is for images"),
        (POINTS, {"image_size": 8}, "`image_size` is for folders of images"),
        (PIXELS / 255.0, {"dequantize": True}, "`dequantize` is for images of grey levels"),
        (PIXELS, {"fake_data": True}, "`fake_data` does not go with files of your own"),
        (PIXELS, {"manual_dir": "x"}, "`manual_dir` does not go with files of your own"),
        (PIXELS, {"celeba_dir": "x"}, "`celeba_dir` is for CelebA"),
        (PIXELS, {"levels": 1000}, "`levels`=1000: must be from 2 to 256"),
        (PIXELS, {"test_fraction": 1.5}, "`test_fraction`=1.5: must be between 0 and 1"),
    ],
)
def test_options_that_do_not_fit(x, options, message, tmp_path):
    path = array_file(tmp_path / "x.npy", x=x)
    for function in (datasets.check, datasets.load):
        with pytest.raises(datasets.DatasetError, match=message):
            function(path, **options)


@pytest.mark.parametrize(
    ("x", "asked", "levels", "largest"),
    [(PIXELS, 4, 4, 1.0), (PIXELS, 256, 256, 1.0), (PIXELS // 16, 17, 17, 15 / 16), (PIXELS // 16, None, 16, 1.0)],
)
def test_grey_levels_are_those_in_use_or_those_asked_for(x, asked, levels, largest, tmp_path):
    data = datasets.load(array_file(tmp_path / "x.npy", x=x), levels=asked)
    assert data.levels == levels
    seen = datasets.to_float(np.concatenate([data.train, data.test]), levels=data.levels)
    assert float(seen.max()) == pytest.approx(largest)


@pytest.mark.parametrize(("x", "levels"), [(PIXELS // 16, 8), (PIXELS, 17)])
def test_grey_levels_that_cannot_be(x, levels, tmp_path):
    with pytest.raises(datasets.DatasetError, match=f"`levels`={levels}: the images have"):
        datasets.load(array_file(tmp_path / "x.npy", x=x), levels=levels)


def test_any_sequence_of_images_serves():
    """Lists of arrays, PIL images, items with a name, sources that give many at once."""
    coloured = [picture(seed) for seed in range(3)]
    expected = np.stack([np.asarray(image) for image in coloured])
    np.testing.assert_array_equal(images.gather(coloured), expected)
    np.testing.assert_array_equal(images.gather([{"image": image} for image in coloured], "image"), expected)
    assert images.gather(list(PIXELS)).shape == (20, 6, 8, 1)

    class Source:
        def __len__(self):
            return 3

        def __getitems__(self, index):
            return [{"image": coloured[i]} for i in index]

    np.testing.assert_array_equal(images.gather(Source(), "image"), expected)
    for source, message in (([], "empty"), ([PIXELS[0], PIXELS[0].T], "item 1"), ([POINTS], "item 0 is float64")):
        with pytest.raises(datasets.DatasetError, match=message):
            images.gather(source)


def test_where_no_cache_can_be_written_images_stay_in_memory(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    path = folder(tmp_path / "x", **{f"{i}.png": picture(i) for i in range(4)})
    whole = files.load(path, cache_dir=tmp_path / "cache", test_fraction=0.5)
    monkeypatch.setattr(cache.Path, "touch", refuse)
    for in_memory, cached in zip(files.load(path, cache_dir=tmp_path / "none", test_fraction=0.5), whole, strict=True):
        np.testing.assert_array_equal(in_memory, cached)


def test_runs_of_own_data_do_not_depend_on_where_these_lie(tmp_path):
    """And a config knows the kind of its data, with defaults for it."""
    first, second = (tmp_path / name for name in ("here", "there"))
    configs = []
    for place in (first, second):
        place.mkdir()
        configs.append(sweep.recorded(sigma_sweep.configure(dataset=array_file(place / "x.npy", x=POINTS))))
    assert configs[0] == configs[1]
    assert (configs[0].dataset, configs[0].own_kind, configs[0].discretise) == ("./x.npy", "points", False)
    grey = sigma_sweep.configure(dataset=array_file(tmp_path / "grey.npy", x=PIXELS))
    assert (grey.own_kind, grey.discretise, len(grey.widths)) == ("images", True, 3)
    floats = sigma_sweep.configure(dataset=array_file(tmp_path / "floats.npy", x=PIXELS / 255.0))
    assert (floats.own_kind, floats.discretise) == ("float images", False)
