"""Memory: what a command needs at least, from shapes alone, and what it keeps from step to step."""

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from lvae_jax import runs

LAYERS = ("dot_general", "conv_general_dilated")  # whose outputs no compiler merges into the next operation

# Of malloc.h: the largest block that a heap holds (M_MMAP_THRESHOLD), and no return to the system (M_TRIM_THRESHOLD).
MALLOC_OPTIONS = {-3: 2**30, -1: -1}


def available() -> int:
    """Bytes of memory that the first device has, or the machine if the device reports none."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep() -> None:
    """Keeps the memory that a program on the CPU frees for its next call, for the rest of the process. To be called
    before JAX makes an array.

    XLA allocates the temporary arrays of a program as one block. The C library of Linux returns so large a block to the
    system when it is freed, and the system clears all its pages again in the next call: a large part of a training step
    on images. Only the main thread has a heap for such blocks, so that programs must run in the thread that calls them.
    Other systems are left alone.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        for option, value in MALLOC_OPTIONS.items():
            allocator(option, value)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


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
