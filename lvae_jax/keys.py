"""Random keys: one generator whatever JAX's default is, one stream for each use in a run, one key for each example.

Noise that belongs to an example, in a batch of any size and on any device, needs a generator that draws the same
numbers mapped over keys as with each key alone. Threefry does; rbg, which is faster on TPUs, does not.
"""

import enum

import jax
from jaxtyping import Array, Int, Key

GENERATOR = "threefry2x32"


class Stream(enum.IntEnum):
    """The uses of random numbers in a run. Each has its own keys, so that none repeats the draws of another."""

    INIT = 0
    STEP = 1
    EXAMINE = 2
    PICTURES = 3
    TEST_DATA = 4
    IMPORTANCE = 5
    QUALITY = 6
    SECOND_STAGE = 7


def of_seed(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key of a seed, always that of threefry."""
    return jax.random.key(seed, impl=GENERATOR)


def stream_key(seed: int | Int[Array, ""], stream: Stream) -> Key[Array, ""]:
    """The key of a run with this seed for one use."""
    return jax.random.fold_in(of_seed(seed), stream)


def example_keys(key: Key[Array, ""], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key for each example, a function of `key` and of the example's global index alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(as_threefry(key), index)


def as_threefry(keys: Key[Array, "*B"]) -> Key[Array, "*B"]:
    """The keys as those of threefry. Keys of rbg are two of them side by side, of which this takes the first: keys of
    equal origin by `of_seed`, `fold_in` and `split` become equal."""
    if str(jax.random.key_impl(keys)) == GENERATOR:
        return keys
    return jax.random.wrap_key_data(jax.random.key_data(keys)[..., :2], impl=GENERATOR)
