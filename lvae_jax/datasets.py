"""Data sets as draws of examples: the toy's endless stream, and TFDS images.

A batch is a pure function of (seed, step) wherever and whenever it is asked for: `indices` names the examples on the
host, `batch` makes them on the device. Examples are [B, *S] floats: points in the toy's own lengths, or pixels in [0,
1] on the grid k/255. Images are kept as uint8.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int, Key

from lvae_jax import toy, vae

TOY_TEST_SIZE = 10_000
TOY_TEST_SEED = 2**31 - 1  # apart from the seeds of training


class DatasetError(Exception):
    """A data set cannot be had; the message, one line, names the fix."""


class Dataset(NamedTuple):
    """A data set with its two splits.

    Attributes:
      shape: *S, the shape of one example.
      unit: of the data and therefore of sigma, for people to read.
      train: what `batch` draws from, to be placed on the device: an array of all images, or None for a stream.
      test: [N, *S], the held-out examples, in storage form (uint8 images, float points).
      indices: (seed, step, batch_size) -> [B] int32, the examples of a training batch.
      batch: (train, key, indices [B]) -> [B, *S], those examples. `key` is the step's; a stream draws example i from
        (key, i).
    """

    shape: tuple[int, ...]
    unit: str
    train: Any
    test: np.ndarray
    indices: Callable[[int, int, int], Int[np.ndarray, " B"]]
    batch: Callable[[Any, Key[Array, ""], Int[Array, " B"]], Float[Array, "B *S"]]


def load(name: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Dataset:
    """The data set called `name`: "toy", or a TFDS image data set, downloaded and prepared first if need be (see
    `tfds_images`)."""
    if name == "toy":
        return toy_stream()
    return image_dataset(*tfds_images(name, data_dir=data_dir, manual_dir=manual_dir))


def toy_stream() -> Dataset:
    """Fresh points of the toy at every step; the test split is a fixed draw of 10,000."""
    return Dataset(
        shape=toy.SHAPE,
        unit="toy length",
        train=None,
        test=np.asarray(toy.sample(vae.example_keys(jax.random.key(TOY_TEST_SEED), jnp.arange(TOY_TEST_SIZE)))),
        indices=lambda seed, step, batch_size: np.arange(batch_size, dtype=np.int32),
        batch=lambda train, key, indices: toy.sample(vae.example_keys(key, indices)),
    )


def image_dataset(train: np.ndarray, test: np.ndarray) -> Dataset:
    """uint8 images [N, H, W, C] as a data set; every epoch visits each training image once, in an order made from
    (seed, epoch)."""

    @functools.lru_cache(maxsize=4)
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(train)).astype(np.int32)

    def indices(seed: int, step: int, batch_size: int) -> np.ndarray:
        first, last = step * batch_size, (step + 1) * batch_size
        size = len(train)
        parts = [
            order(seed, epoch)[max(first - epoch * size, 0) : last - epoch * size]
            for epoch in range(first // size, -(-last // size))
        ]
        return np.concatenate(parts)

    return Dataset(
        shape=train.shape[1:],
        unit="pixel on [0, 1]",
        train=train,
        test=test,
        indices=indices,
        batch=lambda images, key, indices: to_float(images[indices]),
    )


def to_float(x: Array | np.ndarray) -> Float[Array, "B *S"]:
    """Examples in storage form as the model sees them: uint8 to the grid k/255 on [0, 1], floats unchanged."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x


def tfds_images(
    name: str, *, data_dir: str | None = None, manual_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The train and test images of a TFDS data set with a fixed-shape `image` feature, uint8 [N, H, W, C].

    They are decoded once and cached as .npy files in `data_dir` (default ~/tensorflow_datasets); later runs map the
    files into memory. A data set that TFDS has not prepared yet is downloaded, or taken from the archives in
    `manual_dir`, and prepared, which needs TensorFlow.

    Raises:
      DatasetError: unknown name, no fixed-shape image, no train or test split, TensorFlow missing, or neither network
        nor archives.
    """
    builder = _builder(name, data_dir)
    folder = Path(builder.data_path)
    caches = [folder.parent / f"{folder.name}-{split}-images.npy" for split in ("train", "test")]
    if not all(cache.exists() for cache in caches):
        _prepare(builder, manual_dir)
        missing = {"train", "test"} - set(builder.info.splits)
        if missing:
            raise DatasetError(
                f"data set {name!r} has no {' and no '.join(sorted(missing))} split: give one that has both"
            )
        for split, cache in zip(("train", "test"), caches, strict=True):
            _cache_images(builder, split, cache)
    try:
        train, test = (np.load(cache, mmap_mode="r") for cache in caches)
    except (ValueError, EOFError, OSError):
        raise DatasetError(
            f"the cached images in {folder.parent} are damaged: delete {caches[0].name} and {caches[1].name}"
        ) from None
    return train, test


def check_name(name: str, *, data_dir: str | None = None) -> None:
    """Returns if `load` knows `name`; neither loads nor writes anything.

    Raises:
      DatasetError: it does not, or the data set's images have no fixed shape, or `data_dir` holds it in another format.
    """
    if name != "toy":
        _builder(name, data_dir)


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds  # half a second that the toy need not wait for

    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # not found, not installed, not a name, prepared in another format
        if "File format is already set" in str(error):
            raise DatasetError(
                f"{data_dir} holds {name!r} in another file format than array_record: give another --data_dir"
            ) from None
        raise DatasetError(
            f"unknown data set {name!r}: give toy, mnist or the name of another TFDS image data set"
        ) from None
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
    files = {url: info.filename for url, info in builder.url_infos.items()}
    absent = {url: name for url, name in files.items() if manual_dir is None or not Path(manual_dir, name).exists()}
    # TFDS would go on trying for minutes.
    for url in list(absent)[:1]:
        try:
            requests.head(url, timeout=10)
        except requests.RequestException:
            raise DatasetError(
                f"{builder.name!r} is not prepared and cannot be downloaded: connect to the network, or put "
                f"{', '.join(absent.values())} into the folder that --manual_dir names"
            ) from None
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir and os.path.abspath(manual_dir))
        )
    except Exception as error:  # any of dozens of TFDS's, requests' and the operating system's
        raise DatasetError(f"TFDS could not prepare {builder.name!r}: {' '.join(repr(error).split())}") from error


def _cache_images(builder: Any, split: str, cache: Path) -> None:
    source = builder.as_data_source(split=split)
    # Written under another name first: a file called `cache` is always whole.
    temporary = cache.with_name(f".{os.getpid()}-{cache.name}")
    try:
        shape = (len(source), *builder.info.features["image"].shape)
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for start in tqdm.trange(0, len(source), 1000, desc=f"decoding {builder.name} {split}", unit="k"):
            stop = min(start + 1000, len(source))
            images[start:stop] = [example["image"] for example in source.__getitems__(range(start, stop))]
        images.flush()
        os.replace(temporary, cache)
    finally:
        temporary.unlink(missing_ok=True)
