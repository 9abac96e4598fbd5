"""Data sets from files of one's own: an array in a .npy or .npz file, or a folder of images.

| content | examples |
|---|---|
| uint8 [N, H, W] or [N, H, W, C], or a folder of PNG, JPEG and WebP files | images of grey levels |
| a folder with MNIST's archives, packed or not, or those of a data set like it | its train and test images |
| floats [N, H, W] or [N, H, W, C] from 0 to 1 | images without grey levels |
| floats [N, D] | points of D dimensions, of any unit |

A .npz file holds one array `x`, or two, `train` and `test`. Without a test split, a part of the examples is drawn as
one; a file or an image more changes that draw.
"""

import contextlib
import gzip
import hashlib
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lvae_jax import cache
from lvae_jax.cache import DatasetError

ARRAYS = (".npy", ".npz")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
GREY, TRANSPARENT = ("1", "L", "LA"), ("LA", "PA", "RGBA")  # Pillow's modes
ORIENTATION = 0x0112  # EXIF's tag
LARGEST = 1e15  # of float values: squares have to fit into float32
IDX = ("train", "t10k")  # how the names of MNIST's archives begin
SPLIT_SEED = 0  # of the draw of the test split

Item = TypeVar("Item")


def is_path(name: str) -> bool:
    """Tells whether the name of a data set is a path: it starts with /, ./, ../ or ~, or ends with .npy or .npz."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.endswith(ARRAYS)


def label(path: str) -> str:
    """The last part of a path, as a path: the name by which runs record the data, wherever they lie."""
    return f"./{Path(path).expanduser().resolve().name}"


def peek(path: str, *, image_size: int | None = None) -> tuple[tuple[int, ...], bool]:
    """The shape of an example, and whether it has grey levels; of all but the images that these need. Of a folder
    without `image_size`, the shape is that of its first image.

    Raises:
      DatasetError: as `load` says, as far as that can be seen without reading the data.
    """
    source = Path(path).expanduser()
    if archives := _archives(source):
        return (*_idx(archives[0], image_size, header=True).shape[1:], 1), True
    if source.is_dir():
        channels, size = _header(source / next(iter(_files(source))))
        width, height = size if image_size is None else (image_size, image_size)
        return (height, width, channels), True
    _check_fixed(source, image_size)
    shape, dtype = _read(source, _array_header)[0]
    return _shape(shape, dtype, source), dtype.kind in "ub"


def load(
    path: str, *, image_size: int | None = None, test_fraction: float = 0.1, mask: bool = False, cache_dir: Path
) -> tuple[np.ndarray, np.ndarray]:
    """The train and test examples in the file or folder `path`: uint8 images [N, H, W, C], or float32 images or points
    [N, D].

    Images of a folder and its sub-folders are cached below `cache_dir`, anew when the names, sizes or times of the
    files change. They are grey if all of them are, else RGB. Rotations that EXIF asks for are carried out.

    Args:
      image_size: the side to which the square in the middle of each image of a folder is scaled by Pillow's bilinear
        filter, a triangle that widens with the scale, so that nothing aliases. Without it, all must have one size.
      test_fraction: the part of the examples that becomes the test split, where there is none.
      mask: floats may be NaN, which are values that are missing: some, but not all, of an example, and not all of a
        dimension in training.

    Raises:
      DatasetError: there is no such file, it is damaged, empty, or has too few examples for two splits; it holds
        another type, values that are not finite (with `mask`, infinite ones, or none at all where one is needed), float
        images outside [0, 1], or points of which float32 keeps too few digits; images of several sizes, of more than 8
        bits, with transparent pixels, in other colours than RGB, or several in one file.
    """
    source = Path(path).expanduser()
    if archives := _archives(source):
        parts = [_idx(archive, image_size)[..., None] for archive in archives]
    elif source.is_dir():
        parts = [_folder(source, image_size, cache_dir)]
    else:
        parts = [_examples(array, source, mask) for array in _read(source, _array)]
    train, test = parts if len(parts) == 2 else _split(parts[0], test_fraction, source)
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DatasetError(
            f"{path}: `train` has examples {train.dtype} {list(train.shape[1:])}, `test` {test.dtype} "
            f"{list(test.shape[1:])}: give both the same"
        )
    if mask and np.isnan(train).all(axis=0).any():
        dimension = np.argwhere(np.isnan(train).all(axis=0))[0].tolist()
        raise DatasetError(f"{path}: dimension {dimension} is missing in all training examples: leave it out")
    if len(train) < 2 or np.all(np.nanmin(train, axis=0) == np.nanmax(train, axis=0)):
        raise DatasetError(f"{path}: all of its {len(train)} training examples are the same: give examples that differ")
    return train, test


def fingerprint(path: str) -> str:
    """A digest of the bytes of a file or of archives, or of the names and sizes of the images in a folder. A copy has
    the same one.

    Raises:
      DatasetError: it cannot be read.
    """
    source = Path(path).expanduser()
    archives = _archives(source)
    if source.is_dir() and not archives:
        return cache.digest(f"{name} {stat.st_size}" for name, stat in _files(source).items())
    try:
        digests = []
        for name in archives or [source]:
            with open(name, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return cache.digest(digests)
    except OSError as error:
        raise DatasetError(
            f"{source} cannot be read ({error.strerror}): give a .npy or .npz file or a folder"
        ) from None


def _archives(folder: Path) -> list[Path]:
    """The files of the training and of the test images in a folder with MNIST's archives; none in any other."""
    try:
        names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []
    found = [[name for name in names if re.fullmatch(rf"{split}-images[-.]idx3-ubyte(\.gz)?", name)] for split in IDX]
    return [folder / of_split[0] for of_split in found] if all(found) else []


def _idx(archive: Path, image_size: int | None, *, header: bool = False) -> np.ndarray:
    """The images in a file of the IDX format of 8-bit numbers, uint8 [N, H, W]; with `header`, their shape alone
    counts."""
    _check_fixed(archive, image_size)
    try:
        with gzip.open(archive) if archive.suffix == ".gz" else open(archive, "rb") as file:
            # Two zeros, the type 8 of unsigned bytes, 3 axes; then the sizes of the axes.
            magic, *shape = struct.unpack(">4I", file.read(16))
            if magic != 0x0803:
                raise ValueError(f"it begins with {magic:#010x}, not with 0x00000803")
            if header:
                return np.broadcast_to(np.uint8(0), shape)
            return np.frombuffer(file.read(), np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DatasetError(
            f"{archive} cannot be read as images in the IDX format ({error}): take the original"
        ) from None


def _check_fixed(source: Path, image_size: int | None) -> None:
    if image_size is not None:
        raise DatasetError(f"`image_size` is for folders of images, {source} has one size: leave it out")


def _read(source: Path, read: Callable[[Any], Item]) -> list[Item]:
    """The results of `read` on the stream of the array x in a file, or on those of its arrays train and test."""
    try:
        if source.suffix == ".npy":
            with open(source, "rb") as stream:
                return [read(stream)]
        with zipfile.ZipFile(source) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            wanted = ("x",) if "x" in names else ("train", "test")
            if not names.issuperset(wanted):
                holds = ", ".join(sorted(names)) or "no array"
                raise DatasetError(f"{source} holds {holds}: give one array `x`, or `train` and `test`")
            results = []
            for name in wanted:
                with archive.open(f"{name}.npy") as stream:
                    results.append(read(stream))
            return results
    except FileNotFoundError:
        raise DatasetError(f"{source} does not exist: give a .npy or .npz file, or a folder of images") from None
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{source} cannot be read as a .npy or .npz file of numbers: {reason}") from None


def _array(stream: Any) -> np.ndarray:
    return np.lib.format.read_array(stream, allow_pickle=False)


def _array_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the type of an array, whose values are not read."""
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    return shape, dtype


def _shape(shape: tuple[int, ...], dtype: np.dtype, source: Path) -> tuple[int, ...]:
    """The shape of an example of an array of examples, as the model sees it."""
    is_image = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    has_levels = dtype in (np.uint8, np.bool_)
    if 0 in shape:
        fix = "it is empty, give one or more examples"
    elif has_levels and not is_image:
        fix = "give images [N, H, W], [N, H, W, 1] or [N, H, W, 3]; points have to be floats"
    elif not has_levels and dtype.kind != "f":
        fix = "convert images to uint8, points to floats"
    elif not is_image and len(shape) != 2:
        fix = "give points [N, D], or images [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
    else:
        return (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    raise DatasetError(f"{source} is {dtype} {list(shape)}: {fix}")


def _examples(array: np.ndarray, source: Path, mask: bool) -> np.ndarray:
    """The array as examples in storage form, with NaN where values are missing if there is a `mask`."""
    shape = _shape(array.shape, array.dtype, source)
    values = array.reshape(len(array), *shape)
    if array.dtype.kind in "ub":
        return values.astype(np.uint8, copy=False)
    missing = np.isnan(values).reshape(len(values), -1)
    finite = (np.isfinite(values).reshape(len(values), -1) | (missing & mask)).all(axis=1)
    if not finite.all():
        marks = "" if mask or np.isinf(values).any() else ", or, if NaN marks a missing value, train with `mask`"
        raise DatasetError(
            f"{source}: {np.sum(~finite)} of {len(values)} examples have a value that is not finite, the first is "
            f"{np.argmin(finite)}: leave them out{marks}"
        )
    if missing.all(axis=1).any():
        raise DatasetError(f"{source}: example {np.argmax(missing.all(axis=1))} has no value at all: leave it out")
    if missing.all(axis=0).any():  # in all examples
        raise DatasetError(f"{source}: dimension {np.argmax(missing.all(axis=0))} has no value at all: leave it out")
    if len(shape) == 3:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if low < 0.0 or high > 1.0:
            raise DatasetError(f"{source}: its images have pixels from {low:g} to {high:g}: scale them to [0, 1]")
        return values.astype(np.float32, copy=False)
    largest = np.nanmax(np.abs(values), axis=0).astype(np.float64)
    if largest.max() > LARGEST:
        raise DatasetError(f"{source}: has values up to {largest.max():.3g}, their squares overflow: give another unit")
    # Half a unit in the last place of float32, beside the variation that has to be modelled.
    rounding, stddev = 2.0**-24 * largest, np.nanstd(values, axis=0, dtype=np.float64)
    lost = (stddev > 0.0) & (stddev < 1e3 * rounding)
    if lost.any():
        dimension = int(np.argmax(lost))
        average = np.nanmean(values[:, dimension], dtype=np.float64)
        raise DatasetError(
            f"{source}: dimension {dimension} is {average:g} on average with a stddev of {stddev[dimension]:g}, of "
            "which float32 keeps too few digits: subtract the mean first"
        )
    return values.astype(np.float32, copy=False)


def _split(examples: np.ndarray, test_fraction: float, source: Path) -> tuple[np.ndarray, np.ndarray]:
    """A random test split, the same at every call, and the rest, both in the order of the examples."""
    size = round(test_fraction * len(examples))
    if not 1 <= size < len(examples):
        raise DatasetError(
            f"{source}: `test_fraction`={test_fraction:g} of its {len(examples)} examples leaves {size} for the test "
            f"split and {len(examples) - size} for training: each needs one"
        )
    is_test = np.zeros(len(examples), bool)
    is_test[np.random.default_rng(SPLIT_SEED).permutation(len(examples))[:size]] = True
    return examples[~is_test], examples[is_test]


def _files(folder: Path) -> dict[str, os.stat_result]:
    """The images in a folder and its sub-folders by their names relative to it, in their order; not those that are
    hidden."""
    try:
        found = {
            str(path.relative_to(folder)): path.stat()
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGES and not any(p.startswith(".") for p in path.relative_to(folder).parts)
        }
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read ({error.strerror}): give another folder") from None
    if not found:
        raise DatasetError(f"{folder} holds no PNG, JPEG or WebP files: give a folder of images")
    return found


def _folder(folder: Path, image_size: int | None, cache_dir: Path) -> np.ndarray:
    """The images in a folder, uint8 [N, H, W, C]."""
    files = _files(folder)
    # Headers first: colours and sizes decide the shape of the array that the pixels go into.
    headers = [_header(folder / name) for name in files]
    channels = max(channels for channels, _ in headers)
    sizes = list(dict.fromkeys(size for _, size in headers))
    if image_size is None and len(sizes) > 1:
        first, second = (f"{width} x {height}" for width, height in sizes[:2])
        raise DatasetError(
            f"{folder} holds images of {len(sizes)} sizes, such as {first} and {second} pixels: give `image_size`, the "
            "side to which the square in the middle of each is scaled"
        )
    width, height = sizes[0] if image_size is None else (image_size, image_size)

    def pixels() -> Iterator[np.ndarray]:
        for name in files:
            yield _pixels(folder / name, image_size, channels)

    file = cache_dir / "folders" / f"{cache.key(files)}-{height}x{width}x{channels}.npy"
    shape = (len(files), height, width, channels)
    return cache.array(file, shape, np.uint8, pixels(), description=f"decoding {folder.name}")


def _header(file: Path) -> tuple[int, tuple[int, int]]:
    """The number of channels of the image in a file, 1 or 3, and its (width, height) after the rotation that EXIF asks
    for."""
    with _image(file) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION, 1) >= 5  # those that swap the sides
        return 1 if image.mode in GREY else 3, (height, width) if turned else (width, height)


def _pixels(file: Path, image_size: int | None, channels: int) -> np.ndarray:
    """The image in a file, uint8 [H, W, channels]."""
    import PIL.Image
    import PIL.ImageOps

    with _image(file) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        # An opaque image may well have a channel that says so.
        may_be_transparent = image.mode in TRANSPARENT or "transparency" in image.info
        if may_be_transparent and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
            raise DatasetError(f"{file} has transparent pixels: flatten it on a background")
        result = upright.convert("L" if channels == 1 else "RGB")
        if image_size is not None:
            result = PIL.ImageOps.fit(result, (image_size, image_size), PIL.Image.Resampling.BILINEAR)
        return np.asarray(result).reshape(result.height, result.width, channels)


@contextlib.contextmanager
def _image(file: Path) -> Iterator[Any]:
    """The image in a file, one of 8 bits, its pixels not read yet."""
    import PIL.Image

    try:
        with PIL.Image.open(file) as image:
            # Pillow cuts 16 bits in colour down to 8 without a word: only the decoder's name tells.
            if image.mode.startswith(("I", "F")) or any("16" in str(tile[3]) for tile in image.tile):
                raise DatasetError(f"{file} has more than 8 bits for a channel: save it with 8")
            if image.mode not in (*GREY, "RGB", "P", *TRANSPARENT):
                raise DatasetError(f"{file} has the colours {image.mode}: save it in grey or RGB")
            number = getattr(image, "n_frames", 1)
            if number > 1 and image.format != "MPO":  # the JPEG of a camera, which may hold a preview
                raise DatasetError(f"{file} holds {number} images: save each in a file of its own")
            yield image
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{file} is no whole image ({reason}): save it again, or remove it") from None
