"""Data sets as draws of examples: the toy's endless stream, images, and points.

A batch is a pure function of (seed, step) wherever and whenever it is asked for: `indices` names the examples on the
host, `batch` makes them on the device. Examples are [B, *S] floats: points in the unit of the data, or pixels in [0,
1], dequantised or on the grid k / (levels - 1). Images with grey levels k are kept as these, uint8.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from lvae_jax import celeba, files, images, ribbon, toy
from lvae_jax.cache import DatasetError
from lvae_jax.keys import as_threefry, example_keys, of_seed

TEST_SIZE = 10_000  # of the streams
TEST_SEED = 2**31 - 1  # apart from the seeds of training
SYNTHETIC = {"toy": toy, "ribbon": ribbon}  # whose densities are known
REDUCED_LEVELS = (2, 4, 8, 16, 32, 64, 128)  # of 8-bit images, by dropping low bits


class Form(NamedTuple):
    """All that a model has to know of its data.

    Attributes:
      shape: *S, the shape of one example.
      levels: the number of grey levels of images, 256 for 8 bits; None for all other data.
      centre, scale: the mean of each dimension, [*S] or one number, and the overall stddev, by which a model scales
        data of any magnitude; 0 and 1 where no scaling is needed. See `vae.rescaled`.
      masked: whether values may be missing. See `vae.masked`.
    """

    shape: tuple[int, ...]
    levels: int | None = None
    centre: Float[np.ndarray, "*S"] | float = 0.0
    scale: float = 1.0
    masked: bool = False


class Dataset(NamedTuple):
    """A data set with its two splits.

    Attributes:
      shape, levels, centre, scale, masked: see `Form`.
      unit: the name of the unit of the data, and so of sigma.
      train: what batches are gathered from: an array [N, *S] of all examples in storage form, or None for a stream.
      test: [N, *S], the held-out examples, in storage form (uint8 for grey levels, else floats).
      indices: (seed, step, batch_size) -> [B] int32, the examples of a training batch.
      batch: (train[indices] [B, *S] or None, key, indices [B]) -> [B, *S], those examples as the model sees them. `key`
        is the step's; whatever is random about example i is drawn from (key, i).
      test_batch: (test[indices] [B, *S], key, indices [B]) -> [B, *S], held-out examples as the model sees them.
    """

    shape: tuple[int, ...]
    unit: str
    levels: int | None
    train: Any
    test: np.ndarray
    indices: Callable[[int, int, int], Int[np.ndarray, " B"]]
    batch: Callable[[Any, Key[Array, ""], Int[Array, " B"]], Float[Array, "B *S"]]
    test_batch: Callable[[Any, Key[Array, ""], Int[Array, " B"]], Float[Array, "B *S"]]
    centre: Float[np.ndarray, "*S"] | float = 0.0
    scale: float = 1.0
    masked: bool = False

    @property
    def is_image(self) -> bool:
        """Tells images [H, W, C] from points."""
        return len(self.shape) == 3

    @property
    def form(self) -> Form:
        """All that a model has to know of the data."""
        return Form(self.shape, self.levels, self.centre, self.scale, self.masked)


def load(
    name: str,
    *,
    image_size: int | None = None,
    levels: int | None = None,
    flip: bool = False,
    dequantize: bool = False,
    fake_data: bool = False,
    test_fraction: float = 0.1,
    mask: bool = False,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
) -> Dataset:
    """The data set called `name`: "toy", "ribbon", "digits", a TFDS image data set, downloaded and prepared first if
    need be, or the path of a file or a folder of one's own, see `files`.

    Images whose largest grey level is below 128 have so many levels as that needs: 2 if they are black and white.

    Args:
      image_size: side of the images of CelebA, from 8 to 148, or of a folder; no other data set takes one.
      levels: the number of grey levels. A power of 2 below 256 reduces 8-bit images by dropping low bits, in memory; 32
        makes the 5-bit CelebA of the literature on flows. For images with fewer levels it may be more than they use.
      flip, dequantize: of images, see `image_dataset`.
      fake_data: synthetic images of the data set's shape instead, see `images.fake_images`; nothing is read.
      test_fraction: of files without a test split, see `files.load`.
      mask: floats of files may be NaN, which are values that are missing.
      data_dir, manual_dir: see `images.tfds_images`.
      celeba_dir: a folder of CelebA's JPEGs, see `celeba.images`.

    Raises:
      DatasetError: as `check` says, or the data cannot be had.
    """
    check(
        name,
        image_size=image_size,
        levels=levels,
        flip=flip,
        dequantize=dequantize,
        fake_data=fake_data,
        test_fraction=test_fraction,
        mask=mask,
        data_dir=data_dir,
        manual_dir=manual_dir,
        celeba_dir=celeba_dir,
    )
    if name in SYNTHETIC:
        return synthetic_stream(name)
    if files.is_path(name):
        options: dict[str, Any] = {"image_size": image_size, "test_fraction": test_fraction, "mask": mask}
        train, test = files.load(name, **options, cache_dir=images.data_folder(data_dir))
    elif name == images.DIGITS:
        train, test = images.digits_images()
    elif fake_data:
        # No folder, so that it does not matter in which format one holds the real images.
        shape = (image_size, image_size, 3) if image_size is not None else images.tfds_shape(name, data_dir=os.devnull)
        train, test = images.fake_images(shape)
    elif celeba_dir is not None:
        assert image_size is not None, "checked"
        train, test = celeba.images(celeba_dir, image_size=image_size, cache_dir=images.data_folder(data_dir))
    else:
        train, test = images.tfds_images(name, image_size=image_size, data_dir=data_dir, manual_dir=manual_dir)
    if train.dtype == np.uint8:
        train, test, levels = _with_levels(train, test, levels)
    if train.ndim == 2:
        dataset = point_dataset(train, test)
    else:
        dataset = image_dataset(train, test, levels=levels, flip=flip, dequantized=dequantize)
    return dataset._replace(masked=mask)


def labels(
    name: str, *, data_dir: str | None = None, manual_dir: str | None = None
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """The classes, from 0 on, of the train and test images that `load` gives, in the same order.

    Raises:
      DatasetError: the data set has no labels, or cannot be had.
    """
    if name == images.DIGITS:
        return images.digits_labels()
    if files.is_path(name):
        raise DatasetError(f"{name} has no labels: give the name of a data set that has, like mnist")
    return images.tfds_labels(name, data_dir=data_dir, manual_dir=manual_dir)


def check(
    name: str,
    *,
    image_size: int | None = None,
    levels: int | None = None,
    flip: bool = False,
    dequantize: bool = False,
    fake_data: bool = False,
    test_fraction: float = 0.1,
    mask: bool = False,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
) -> None:
    """Raises if `load` would reject these arguments, as far as that can be said without the data. Writes nothing.

    Raises:
      DatasetError: the data set is unknown, its images have no fixed shape, `data_dir` holds it in another format, or
        the options do not go together.
    """
    if not 0.0 < test_fraction < 1.0:
        raise DatasetError(f"`test_fraction`={test_fraction:g}: must be between 0 and 1")
    is_path = files.is_path(name)
    of_celeba = name.partition(":")[0] == celeba.NAME
    asked = {
        "`image_size`": image_size is not None,
        "`levels`": levels is not None,
        "`celeba_dir`": celeba_dir is not None,
        "`flip`": flip,
        "`dequantize`": dequantize,
        "`fake_data`": fake_data,
        "`manual_dir`": manual_dir is not None,
    }
    for argument in ("`image_size`", "`celeba_dir`"):
        if asked[argument] and not of_celeba and not (is_path and argument == "`image_size`"):
            raise DatasetError(f"{argument} is for CelebA: leave it out, or give `name`={celeba.NAME}")
    if mask and not is_path:
        raise DatasetError("`mask` is for files of your own, in which NaN is a missing value: leave it out")
    if is_path:
        for argument in ("`fake_data`", "`manual_dir`"):
            if asked[argument]:
                raise DatasetError(f"{argument} does not go with files of your own: leave it out")
        if image_size is not None and image_size < 1:
            raise DatasetError(f"`image_size`={image_size}: must be at least 1")
        shape, has_levels = files.peek(name, image_size=image_size)
        if mask and has_levels:
            raise DatasetError(f"`mask` is for floats, {name} holds grey levels, all of which are there: leave it out")
        wrong = [] if len(shape) == 3 else ["`flip`"]
        for argument in wrong if has_levels else [*wrong, "`levels`", "`dequantize`"]:
            if asked[argument]:
                raise DatasetError(f"{argument} is for images of grey levels, {name} holds floats: leave it out")
        if levels is not None and not 2 <= levels <= 256:
            raise DatasetError(f"`levels`={levels}: must be from 2 to 256")
        return
    for argument in ("`levels`", "`flip`", "`dequantize`", "`fake_data`"):
        if asked[argument] and name in SYNTHETIC:
            raise DatasetError(f"{argument} is for images: leave it out, or give an image data set as `name`")
    for argument in ("`levels`", "`fake_data`", "`manual_dir`"):
        if asked[argument] and name == images.DIGITS:
            raise DatasetError(
                f"{argument} is for 8-bit images that have to be downloaded, {images.DIGITS} come with scikit-learn: "
                "leave it out, or give another `name`"
            )
    if levels is not None and levels not in REDUCED_LEVELS:
        raise DatasetError(f"`levels`={levels}: must be one of {', '.join(map(str, REDUCED_LEVELS))}")
    sources = [argument for argument in ("`fake_data`", "`celeba_dir`", "`manual_dir`") if asked[argument]]
    if len(sources) > 1:
        raise DatasetError(f"{' and '.join(sources)}: images come from one source, leave one out")
    if of_celeba and image_size not in celeba.SIDES:
        raise DatasetError(
            f"`image_size`={image_size}: must be from {celeba.SIDES[0]} to {celeba.SIDES[-1]}, "
            "CelebA's images are cropped to that"
        )
    if name not in (*SYNTHETIC, images.DIGITS) and celeba_dir is None:
        # Raises for an unknown name, without a download.
        images.tfds_shape(name, data_dir=os.devnull if fake_data else data_dir)


def toy_stream() -> Dataset:
    """`synthetic_stream` of the toy."""
    return synthetic_stream("toy")


def synthetic_stream(name: str) -> Dataset:
    """Fresh points of the data set of this name in `SYNTHETIC` at every step; the test split is a fixed draw of
    10,000."""
    source = SYNTHETIC[name]
    return _stream(source.SHAPE, f"{name} length", source.sample)


def sphere_stream(dim: int, *, radius: float = 1.0) -> Dataset:
    """Fresh points, uniform on the sphere of `radius` in R^dim, at every step; the test split is a fixed draw of
    10,000."""

    def sample(keys: Key[Array, " B"]) -> Float[Array, "B n"]:
        normal = jax.vmap(lambda key: jax.random.normal(key, (dim,)))(keys)
        return radius * normal / jnp.linalg.norm(normal, axis=1, keepdims=True)

    return _stream((dim,), "the sphere's length", sample)


def _stream(shape: tuple[int, ...], unit: str, sample: Callable[[Key[Array, " B"]], Float[Array, "B *S"]]) -> Dataset:
    return Dataset(
        shape=shape,
        unit=unit,
        levels=None,
        train=None,
        test=np.asarray(sample(example_keys(of_seed(TEST_SEED), jnp.arange(TEST_SIZE)))),
        indices=lambda seed, step, batch_size: np.arange(batch_size, dtype=np.int32),
        batch=lambda examples, key, indices: sample(example_keys(key, indices)),
        test_batch=lambda examples, key, indices: examples,
    )


def point_dataset(train: np.ndarray, test: np.ndarray, *, unit: str = "unit of the data") -> Dataset:
    """Points, floats [N, D] in any `unit`, as a data set, in epochs as `image_dataset` has them. Models scale them by
    the mean of each dimension and by one number, the root of the mean variance, of the training points. NaN is a value
    that is missing, and does not count."""
    centre = np.nanmean(train, axis=0, dtype=np.float64)
    scale = math.sqrt(np.mean(np.nanvar(train, axis=0, dtype=np.float64)))
    return image_dataset(train, test, levels=None)._replace(unit=unit, centre=centre, scale=scale)


def image_dataset(
    train: np.ndarray, test: np.ndarray, *, levels: int | None = 256, flip: bool = False, dequantized: bool = False
) -> Dataset:
    """Images [N, H, W, C] as a data set; every epoch visits each training image once, in an order made from (seed,
    epoch).

    Args:
      levels: the number of grey levels, of which the uint8 images hold the indices k = 0, ..., levels - 1; None for
        images of floats from 0 to 1. `images.gather` makes such an array of other sequences of images.
      flip: mirror each training image left to right with probability 1/2, drawn anew at every step.
      dequantized: `dequantize` the images of both splits, those of training anew at every step.
    """

    @functools.lru_cache(maxsize=4)
    def order(seed: int, epoch: int) -> np.ndarray:
        # A function of (seed, epoch): a resumed run finds its place without any saved state.
        return np.random.default_rng((seed, epoch)).permutation(len(train)).astype(np.int32)

    def indices(seed: int, step: int, batch_size: int) -> np.ndarray:
        first, last = step * batch_size, (step + 1) * batch_size
        size = len(train)
        # A batch may run over the end of an epoch into the next one.
        parts = [
            order(seed, epoch)[max(first - epoch * size, 0) : last - epoch * size]
            for epoch in range(first // size, -(-last // size))
        ]
        return np.concatenate(parts)

    def test_batch(
        examples: Array | np.ndarray, key: Key[Array, ""], indices: Int[Array, " B"]
    ) -> Float[Array, "B *S"]:
        if dequantized:
            assert levels is not None, "floats have no cells to spread over"
            return dequantize(example_keys(key, indices), examples, levels=levels)
        return to_float(examples, levels=levels)

    def batch(examples: Array | np.ndarray, key: Key[Array, ""], indices: Int[Array, " B"]) -> Float[Array, "B *S"]:
        flip_key, noise_key = jax.random.split(key)
        if flip:
            mirrored = jax.vmap(jax.random.bernoulli)(example_keys(flip_key, indices))
            examples = jnp.where(mirrored[:, None, None, None], examples[:, :, ::-1], examples)
        return test_batch(examples, noise_key, indices)

    return Dataset(
        shape=train.shape[1:],
        unit="pixel on [0, 1]",
        levels=levels,
        train=train,
        test=test,
        indices=indices,
        batch=batch,
        test_batch=test_batch,
    )


def _with_levels(train: np.ndarray, test: np.ndarray, asked: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """8-bit images with the number of their grey levels, that which was `asked` for if any."""
    highest = 0
    for split in (train, test):
        for start in range(0, len(split), 1000):
            highest = max(highest, int(split[start : start + 1000].max()))
            if highest >= 128:  # all 8 bits are in use: no need to read on
                break
    if highest < 128:
        if asked is not None and asked <= highest:
            raise DatasetError(
                f"`levels`={asked}: the images have grey levels up to {highest}, give at least {highest + 1}"
            )
        return train, test, asked or max(2, highest + 1)
    if asked in (None, 256):
        return train, test, 256
    if asked not in REDUCED_LEVELS:
        raise DatasetError(
            f"`levels`={asked}: the images have 256 levels, give one of {', '.join(map(str, REDUCED_LEVELS))}"
        )
    width = np.uint8(256 // asked)
    return train // width, test // width, asked


def to_float(x: Array | np.ndarray, *, levels: int | None = 256) -> Float[Array, "B *S"]:
    """Examples in storage form as the model sees them: grey levels k, uint8, to the grid k / (levels - 1) on [0, 1];
    floats unchanged."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / float((levels or 256) - 1) if x.dtype == jnp.uint8 else x


def dequantize(
    keys: Key[Array, " B"], x: UInt8[Array, "B *S"] | UInt8[np.ndarray, "B *S"], *, levels: int = 256
) -> Float[Array, "B *S"]:
    """Images of grey levels k, spread over the cells of the levels: (k + u) / levels on [0, 1), u uniform on [0, 1).

    A density p of the result, in nats on these units, gives the image k of n dimensions the probability of its cell, a
    cube of volume L^-n with L = `levels`: P(k) = L^-n E_u[p((k + u) / L)]. That is a distribution over images, and by
    Jensen's inequality

      log P(k) >= E_u[log p((k + u) / L)] - n ln L    nats

    (Theis et al., A note on the evaluation of generative models, ICLR 2016). An ELBO in place of log p keeps the bound.
    u has 16 bits: k + u is then exact in float32; with more bits it could round up to the next level.
    """
    # Bits instead of a uniform float, which would have 23 of them.
    u = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(as_threefry(keys))
    return (jnp.asarray(x, jnp.float32) + u.astype(jnp.float32) / 2.0**16) / float(levels)
