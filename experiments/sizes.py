"""Memory that a command needs at least, from shapes alone, before anything is made."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from lvae_jax import runs

LAYERS = ("dot_general", "conv_general_dilated")  # whose outputs no compiler merges into the next operation


def available() -> int:
    """Bytes of memory that the first device has, or the machine if the device reports none."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def nbytes(tree: Any) -> int:
    """Bytes of the arrays, or of the shapes, in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def layers(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of the outputs of all layers in `function(*arguments)`, of which the arguments may be shapes."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name in LAYERS:
                total += nbytes([variable.aval for variable in equation.outvars])
            for inner in core.jaxprs_in_params(equation.params):
                total += count(inner)
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def text(size: float) -> str:
    """Bytes in words: 3.2 GiB."""
    return f"{size / 2**30:.3g} GiB" if size < 2**40 else f"{size / 2**40:.3g} TiB"


@contextlib.contextmanager
def told(fix: str) -> Iterator[None]:
    """Turns a failed allocation into one line that names the `fix`.

    Raises:
      runs.RunError: memory is exhausted.
    """
    try:
        yield
    except MemoryError:
        raise runs.RunError(f"the machine has not enough memory: {fix}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise runs.RunError(f"the device has not enough memory: {fix}") from None
