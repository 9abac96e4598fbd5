"""Image data sets as two uint8 arrays, train and test [N, H, W, C]: from scikit-learn, from TFDS, from a folder of
JPEGs, or made up; labels of the first two.

Real images are decoded once, into .npy files that are mapped into memory from then on; the name of such a cache says
what made it. CelebA (Liu et al., ICCV 2015) means its aligned JPEGs, 178 x 218 pixels, in the official splits. Of each
face the 148 x 148 pixels in the middle are scaled to `image_size` by Pillow's bilinear filter, a triangle that widens
with the scale, so that nothing aliases.
"""

import hashlib
import importlib.util
import io
import math
import os
import re
import secrets
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = "digits"
DIGITS_LEVELS = 17
CELEBA = "celeb_a"  # as TFDS calls it
CELEBA_CROP = 148
CELEBA_SPLITS = {"train": range(1, 162_771), "validation": range(162_771, 182_638), "test": range(182_638, 202_600)}
FAKE_SIZES = {"train": 384, "test": 128}


class DatasetError(Exception):
    """A data set cannot be had; the message, one line, names the fix."""


def digits_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1,433 train and 364 test images, uint8 [N, 8, 8, 1] with grey levels 0 to 16, of the UCI handwritten digits
    that scikit-learn ships (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998).

    The first of each five images of a digit, in the order of the data, is a test image.
    """
    images, _, is_test = _digits()
    return images[~is_test], images[is_test]


def digits_labels() -> tuple[np.ndarray, np.ndarray]:
    """The digits, int32 [N] from 0 to 9, in the train and test images of `digits_images`."""
    _, labels, is_test = _digits()
    return labels[~is_test], labels[is_test]


def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images, their labels, and the mask of those for the test."""
    import sklearn.datasets  # a second that others need not wait for

    digits = sklearn.datasets.load_digits()
    labels = digits.target.astype(np.int32)
    number_of_kind = np.zeros(len(labels), int)  # of each image among those of its digit
    for label in range(10):
        number_of_kind[labels == label] = np.arange(np.sum(labels == label))
    return digits.images.astype(np.uint8)[..., None], labels, number_of_kind % 5 == 0


def tfds_images(
    name: str, *, image_size: int | None = None, data_dir: str | None = None, manual_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The train and test images, uint8 [N, H, W, C], of a TFDS data set with a fixed-shape `image` feature, cached in
    `data_dir` (default ~/tensorflow_datasets).

    A data set that TFDS has not prepared yet is downloaded, or taken from the archives in `manual_dir`, and prepared,
    which needs TensorFlow. `image_size` is for CelebA alone, and cuts and scales its images.

    Raises:
      DatasetError: unknown name, no fixed-shape image, no train or test split, TensorFlow missing, neither network nor
        archives, a broken image, a damaged cache or no room for one.
    """
    import tensorflow_datasets as tfds  # half a second that the toy need not wait for

    builder = _builder(name, data_dir)
    caches = {split: _tfds_cache(builder, _cache_name(split, image_size)) for split in ("train", "test")}
    if not all(cache.exists() for cache in caches.values()):
        decoders = None if image_size is None else {"image": tfds.decode.SkipDecoding()}
        shape = builder.info.features["image"].shape if image_size is None else (image_size, image_size, 3)
        for (split, cache), source in zip(caches.items(), _sources(builder, manual_dir, decoders), strict=True):
            decoded = _examples(source, "image")
            if image_size is not None:
                decoded = (
                    celeba_face(io.BytesIO(jpeg), image_size, name=f"image {index} of {name}'s {split} split")
                    for index, jpeg in enumerate(decoded)
                )
            _write_cache(
                cache, (len(source), *shape), np.uint8, decoded, description=f"decoding {builder.name} {split}"
            )
    return _map_cache(caches["train"]), _map_cache(caches["test"])


def tfds_labels(
    name: str, *, data_dir: str | None = None, manual_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The classes, int32 [N] from 0 on, of the train and test images that `tfds_images` gives, in the same order;
    cached beside them.

    Raises:
      DatasetError: the data set has no `label`, one class for each image, or as `tfds_images` says.
    """
    import tensorflow_datasets as tfds

    builder = _builder(name, data_dir)
    features = builder.info.features
    if "label" not in features or not isinstance(features["label"], tfds.features.ClassLabel):
        raise DatasetError(f"data set {name!r} has no `label`, one class for each image: give one that has, like mnist")
    caches = {split: _tfds_cache(builder, f"{split}-labels.npy") for split in ("train", "test")}
    if not all(cache.exists() for cache in caches.values()):
        sources = _sources(builder, manual_dir, {"image": tfds.decode.SkipDecoding()})
        for (split, cache), source in zip(caches.items(), sources, strict=True):
            labels = (np.int32(label) for label in _examples(source, "label"))
            description = f"reading {builder.name} {split} labels"
            _write_cache(cache, (len(source),), np.int32, labels, description=description)
    return _map_cache(caches["train"]), _map_cache(caches["test"])


def celeba_images(celeba_dir: str, *, image_size: int, data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """CelebA's train and test images, uint8 [N, H, W, C], from a folder of its aligned JPEGs, 000001.jpg to 202599.jpg,
    or some of them.

    The splits are those of list_eval_partition.txt in the folder or beside it, or else the official ones by number.
    The images are cached in `data_dir` (default ~/tensorflow_datasets), anew when the names, sizes or times of the
    files change.

    Raises:
      DatasetError: no folder, no images in it or none of one split, an image that has no split, is broken or of
        another size, a damaged cache or no room for one.
    """
    folder, files, split_of = _celeba_folder(celeba_dir)
    members: dict[str, list[str]] = {split: [] for split in CELEBA_SPLITS}
    for name in sorted(files):
        split = split_of(name)
        if split is None:
            raise DatasetError(f"{folder / name} belongs to none of CelebA's splits: remove it from the folder")
        members[split].append(name)
    caches = {}
    for split in ("train", "test"):
        if not members[split]:
            raise DatasetError(
                f"--celeba_dir={celeba_dir} holds no image of the {split} split: "
                f"add some, officially {CELEBA_SPLITS[split][0]:06}.jpg to {CELEBA_SPLITS[split][-1]:06}.jpg"
            )
        source = [f"{name} {files[name].st_size} {files[name].st_mtime_ns}" for name in members[split]]
        digest = hashlib.sha256("\n".join(source).encode()).hexdigest()[:16]
        caches[split] = _data_dir(data_dir) / CELEBA / f"folder-{digest}-{_cache_name(split, image_size)}"
    for split, cache in caches.items():
        if not cache.exists():
            faces = (celeba_face(folder / name, image_size, name=str(folder / name)) for name in members[split])
            shape = (len(members[split]), image_size, image_size, 3)
            _write_cache(cache, shape, np.uint8, faces, description=f"decoding {CELEBA} {split}")
    return _map_cache(caches["train"]), _map_cache(caches["test"])


def celeba_fingerprint(celeba_dir: str) -> str:
    """Which images the folder holds, by their names, sizes and splits: the same for a copy of the folder.

    Raises:
      DatasetError: the folder cannot be read, or holds no images.
    """
    _, files, split_of = _celeba_folder(celeba_dir)
    lines = [f"{name} {files[name].st_size} {split_of(name)}" for name in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _celeba_folder(celeba_dir: str) -> tuple[Path, dict[str, os.stat_result], Callable[[str], str | None]]:
    """The folder, its images by name, and the split that a name belongs to."""
    folder = Path(celeba_dir).expanduser().resolve()
    try:
        with os.scandir(folder) as entries:
            files = {file.name: file.stat() for file in entries if re.fullmatch(r"\d{6}\.jpg", file.name)}
        split_of = _celeba_partition(folder)
    except OSError as error:
        raise DatasetError(
            f"--celeba_dir={celeba_dir}: {error.filename} cannot be read ({error.strerror}): "
            "give the folder that holds 000001.jpg, with every image whole"
        ) from None
    if not files:
        raise DatasetError(
            f"--celeba_dir={celeba_dir} holds no image called like 000001.jpg: give the folder img_align_celeba"
        )
    return folder, files, split_of


def celeba_face(jpeg: Path | io.BytesIO, image_size: int, *, name: str) -> np.ndarray:
    """The face in one of CelebA's aligned JPEGs, uint8 [image_size, image_size, 3]: cut out, then scaled, as the
    module's docstring says. `name` stands for the image in errors. Damage after which a decoder still finds all rows is
    not seen.

    Raises:
      DatasetError: it is not a whole JPEG, or of another size than CelebA's.
    """
    import PIL.Image

    try:
        with PIL.Image.open(jpeg, formats=["JPEG"]) as image:
            if image.size != (178, 218):
                width, height = image.size
                raise DatasetError(
                    f"{name} has {width} x {height} pixels, CelebA's aligned images have 178 x 218: take the original"
                )
            left, top = (178 - CELEBA_CROP) // 2, (218 - CELEBA_CROP) // 2
            face = image.convert("RGB").crop((left, top, left + CELEBA_CROP, top + CELEBA_CROP))
    except (OSError, PIL.Image.DecompressionBombError) as error:  # what Pillow raises for anything it cannot decode
        raise DatasetError(f"{name} is not a whole JPEG ({error}): take the original") from error
    return np.asarray(face.resize((image_size, image_size), PIL.Image.Resampling.BILINEAR))


def fake_images(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic images of this shape [H, W, C], always the same 384 and 128: an ellipse of random place, size and
    colour before a slanted background, with noise of stddev 0.02 of the full range."""
    height, width, channels = shape
    y, x = np.meshgrid(np.linspace(-1.0, 1.0, height), np.linspace(-1.0, 1.0, width), indexing="ij")

    def one(rng: np.random.Generator) -> np.ndarray:
        place, size, slope = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.2, 0.6, 2), rng.uniform(-0.2, 0.2, 2)
        colour, background = rng.uniform(0.0, 1.0, (2, channels))
        inside = ((y - place[0]) / size[0]) ** 2 + ((x - place[1]) / size[1]) ** 2 < 1.0
        image = np.where(inside[..., None], colour, background + (slope[0] * y + slope[1] * x)[..., None])
        noisy = image + 0.02 * rng.standard_normal(image.shape)
        return np.rint(255.0 * np.clip(noisy, 0.0, 1.0)).astype(np.uint8)

    train, test = (
        np.stack([one(np.random.default_rng((seed, index))) for index in range(size)])
        for seed, size in enumerate(FAKE_SIZES.values())
    )
    return train, test


def tfds_shape(name: str, *, data_dir: str | None = None) -> tuple[int, int, int]:
    """The shape [H, W, C] of the images of a TFDS data set; neither loads nor writes anything.

    Raises:
      DatasetError: there is no such data set, its images have no fixed shape, or `data_dir` holds it in another format.
    """
    return _builder(name, data_dir).info.features["image"].shape


def _celeba_partition(folder: Path) -> Callable[[str], str | None]:
    """The split that a file name belongs to: by list_eval_partition.txt, lines like `000001.jpg 0`, or by number."""
    for listing in (folder / "list_eval_partition.txt", folder.parent / "list_eval_partition.txt"):
        if not listing.exists():
            continue
        split_of: dict[str, str] = {}
        splits = dict(zip("012", CELEBA_SPLITS, strict=True))
        for number, line in enumerate(listing.read_text(errors="replace").splitlines(), start=1):
            name, split = (*line.split(), "", "")[:2]
            if split not in splits or split_of.setdefault(name, splits[split]) != splits[split]:
                raise DatasetError(
                    f"{listing}, line {number}: expected an image and its one split, 0, 1 or 2, as in `000001.jpg 0`"
                )
        return split_of.get
    return lambda name: next((split for split, numbers in CELEBA_SPLITS.items() if int(name[:6]) in numbers), None)


def _data_dir(data_dir: str | None) -> Path:
    import tensorflow_datasets as tfds

    return Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def _cache_name(split: str, image_size: int | None) -> str:
    made_by = "images" if image_size is None else f"crop{CELEBA_CROP}-bilinear{image_size}"
    return f"{split}-{made_by}.npy"


def _map_cache(cache: Path) -> np.ndarray:
    try:
        return np.load(cache, mmap_mode="r")
    except OSError as error:
        raise DatasetError(f"the cached data in {cache} cannot be read ({error.strerror})") from None
    except (ValueError, EOFError, tokenize.TokenError):
        raise DatasetError(f"the cached data in {cache} are damaged: delete this file") from None


def _write_cache(
    cache: Path, shape: tuple[int, ...], dtype: type, values: Iterable[np.ndarray | np.generic], *, description: str
) -> None:
    """Writes `values`, [shape[1:]] each of `dtype` and shape[0] of them, one at a time."""
    import tqdm

    # Under another name first: a file called `cache` is always whole. And not through a memory map: where the disk is
    # full, writing to one kills the process.
    temporary = cache.with_name(f".{secrets.token_hex(8)}-{cache.name}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for value in tqdm.tqdm(values, desc=description, total=shape[0], unit="image", unit_scale=True):
                    file.write(value.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raise DatasetError(
            f"no cache of {size / 1e9:.2g} GB can be written to {cache.parent} ({error.strerror}): "
            "make room, or give another --data_dir"
        ) from None


def _tfds_cache(builder: Any, name: str) -> Path:
    """Beside the prepared data set, under a name that tells its version."""
    folder = Path(builder.data_path)
    return folder.with_name(f"{folder.name}-{name}")


def _sources(builder: Any, manual_dir: str | None, decoders: Any) -> list[Any]:
    """The data sources of the train and test splits, prepared first if need be."""
    _prepare(builder, manual_dir)
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise DatasetError(
            f"data set {builder.name!r} has no {' and no '.join(sorted(missing))} split: give one that has both"
        )
    return [builder.as_data_source(split=split, decoders=decoders) for split in ("train", "test")]


def _examples(source: Any, feature: str) -> Iterator[Any]:
    """The `feature` of each example of a TFDS data source."""
    for start in range(0, len(source), 1000):
        try:
            examples = source.__getitems__(range(start, min(start + 1000, len(source))))
        except Exception as error:  # whatever array_record and TFDS's decoders raise
            folder = source.dataset_info.data_dir
            raise DatasetError(f"the data in {folder} are damaged: delete it, to prepare them again") from error
        for example in examples:
            yield example[feature]


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    folder = _data_dir(data_dir)
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except Exception as error:  # not found, not installed, not a name, prepared in another format
        if "File format is already set" in str(error):
            raise DatasetError(
                f"{folder} holds {name!r} in another file format than array_record: give another --data_dir"
            ) from None
        raise DatasetError(
            f"unknown data set {name!r}: give toy, digits, mnist or the name of another TFDS image data set"
        ) from None
    if not name.startswith(builder.name):
        raise DatasetError(f"unknown data set {name!r}: TFDS calls it {builder.name!r}, give this name")
    features = builder.info.features
    image: Any = features["image"] if features is not None and "image" in features else None
    shape: tuple[int | None, ...] = () if image is None else image.shape
    if len(shape) != 3 or None in shape or shape[-1] not in (1, 3) or image.np_dtype != np.uint8:
        raise DatasetError(
            f"data set {name!r} has no 8-bit `image` of a fixed shape [height, width, 1 or 3]: give one that has"
        )
    return builder


def _prepare(builder: Any, manual_dir: str | None) -> None:
    import requests
    import tensorflow_datasets as tfds

    if builder.is_prepared():
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise DatasetError(
            f"preparing {builder.name!r} needs TensorFlow once, to unpack its archives: pip install 'lvae_jax[prepare]'"
        )
    files = {url: info.filename for url, info in (builder.url_infos or {}).items() if info.filename}
    absent = {url: name for url, name in files.items() if manual_dir is None or not Path(manual_dir, name).exists()}
    by_hand = f"put {', '.join(absent.values()) or 'its original archives'} into the folder that --manual_dir names"
    if builder.name == CELEBA:
        by_hand += ", or give the folder of its JPEGs as --celeba_dir"
    # TFDS would go on trying for minutes.
    for url in list(absent)[:1]:
        try:
            requests.head(url, timeout=10)
        except requests.RequestException:
            raise DatasetError(
                f"{builder.name!r} is not prepared and cannot be downloaded: connect to the network, or {by_hand}"
            ) from None
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.abspath(manual_dir))
        )
    except Exception as error:  # any of dozens of TFDS's, requests' and the operating system's
        raise DatasetError(
            f"TFDS could not prepare {builder.name!r}, {by_hand}: {' '.join(repr(error).split())}"
        ) from error
