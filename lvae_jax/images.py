"""Image data sets as two uint8 arrays, train and test [N, H, W, C]: from scikit-learn, from TFDS, or made up; labels of
the first two.

Images of TFDS are decoded once, into a `cache` whose name says what made it.

TFDS keeps one format of a data set in a folder. This library needs array_record, which can be read without TensorFlow;
so that it takes no place from TFDS's default, it prepares into a folder of its own.
"""

import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvae_jax import cache, celeba
from lvae_jax.cache import DatasetError

DIGITS = "digits"
DIGITS_LEVELS = 17
FAKE_SIZES = {"train": 384, "test": 128}


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
    `data_dir` (see `data_folder`).

    A data set that TFDS has not prepared yet is downloaded, or taken from the archives in `manual_dir`, and prepared,
    which needs TensorFlow. `image_size` is for CelebA alone, and cuts and scales its images.

    Raises:
      DatasetError: unknown name, no fixed-shape image, no train or test split, TensorFlow missing, neither network nor
        archives, a broken image, a damaged cache or no room for one.
    """
    import tensorflow_datasets as tfds  # half a second that the toy need not wait for

    builder = _builder(name, data_dir)
    _prepare(builder, manual_dir)
    decoders = None if image_size is None else {"image": tfds.decode.SkipDecoding()}
    shape = builder.info.features["image"].shape if image_size is None else (image_size, image_size, 3)

    def decoded(split: str) -> np.ndarray:
        source = _source(builder, split, decoders)
        values = _examples(source, "image")
        if image_size is not None:
            values = (
                celeba.face(io.BytesIO(jpeg), image_size, name=f"image {index} of {name}'s {split} split")
                for index, jpeg in enumerate(values)
            )
        file = f"{split}-images.npy" if image_size is None else celeba.cache_name(split, image_size)
        description = f"decoding {builder.name} {split}"
        return cache.array(_beside(builder, file), (len(source), *shape), np.uint8, values, description=description)

    return decoded("train"), decoded("test")


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
    _prepare(builder, manual_dir)

    def read(split: str) -> np.ndarray:
        source = _source(builder, split, {"image": tfds.decode.SkipDecoding()})
        labels = (np.int32(label) for label in _examples(source, "label"))
        description = f"reading {builder.name} {split} labels"
        return cache.array(
            _beside(builder, f"{split}-labels.npy"), (len(source),), np.int32, labels, description=description
        )

    return read("train"), read("test")


def gather(source: Any, feature: str | None = None) -> np.ndarray:
    """The images of any sequence as uint8 [N, H, W, C]: of NumPy arrays, a Grain or Hugging Face source, a list of PIL
    images. Its items are [H, W] or [H, W, C], all of one shape, or have such an image under the name `feature`.

    Raises:
      DatasetError: the sequence is empty, or an item is no 8-bit image of the shape of the first.
    """
    examples: list[np.ndarray] = []
    for index, item in enumerate(_items(source)):
        image = np.asarray(item if feature is None else item[feature])
        image = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or image.ndim != 3 or (examples and image.shape != examples[0].shape):
            wanted = "an 8-bit image [H, W] or [H, W, C]" if not examples else f"uint8 {list(examples[0].shape)}"
            raise DatasetError(f"item {index} is {image.dtype} {list(image.shape)}: give {wanted}")
        examples.append(image)
    if not examples:
        raise DatasetError("the sequence of images is empty: give one or more")
    return np.stack(examples)


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
    """The shape [H, W, C] of the images of a TFDS data set. Loads and writes nothing.

    Raises:
      DatasetError: there is no such data set, its images have no fixed shape, or `data_dir` holds it in another format.
    """
    return _builder(name, data_dir).info.features["image"].shape


def data_folder(data_dir: str | None) -> Path:
    """The folder `data_dir`, by default lvae_jax/tensorflow_datasets in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(data_dir or Path(caches, "lvae_jax", "tensorflow_datasets")).expanduser()


def _beside(builder: Any, name: str) -> Path:
    """Beside the prepared data set, under a name that tells its version and changes with its files."""
    folder = Path(builder.data_path)
    made_of = cache.key({file.name: file.stat() for file in sorted(folder.iterdir())})
    return folder.with_name(f"{folder.name}-{made_of}-{name}")


def _source(builder: Any, split: str, decoders: Any) -> Any:
    """The data source of a split of a prepared data set."""
    if split not in builder.info.splits:
        raise DatasetError(f"data set {builder.name!r} has no {split} split: give one that has train and test")
    return builder.as_data_source(split=split, decoders=decoders)


def _examples(source: Any, feature: str) -> Iterator[Any]:
    """The `feature` of each example of a TFDS data source."""
    try:
        for example in _items(source):
            yield example[feature]
    except Exception as error:  # whatever array_record and TFDS's decoders raise
        folder = source.dataset_info.data_dir
        raise DatasetError(f"the data in {folder} are damaged: delete it, to prepare them again") from error


def _items(source: Any) -> Iterator[Any]:
    """The items of a sequence, a thousand at once if it can."""
    for start in range(0, len(source), 1000):
        index = range(start, min(start + 1000, len(source)))
        together = getattr(source, "__getitems__", None)
        yield from (source[i] for i in index) if together is None else together(index)


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    folder = data_folder(data_dir)
    if data_dir is None:
        # Data that TFDS has prepared in the right format elsewhere need no second copy.
        with contextlib.suppress(Exception):
            there = tfds.builder(name, file_format="array_record")
            folder = Path(tfds.core.constants.DATA_DIR).expanduser() if there.is_prepared() else folder
    try:
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    except Exception as error:  # not found, not installed, not a name, prepared in another format
        if "File format is already set" in str(error):
            raise DatasetError(
                f"{folder} holds {name!r} in another file format than array_record: give another `data_dir`"
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
    by_hand = f"put {', '.join(absent.values()) or 'its original archives'} into the folder that `manual_dir` names"
    if builder.name == celeba.NAME:
        by_hand += ", or give the folder of its JPEGs as `celeba_dir`"
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
