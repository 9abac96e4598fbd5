"""Arrays on disk that are written once, whole or not at all, and mapped into memory from then on."""

import math
import os
import secrets
import tokenize
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class DatasetError(Exception):
    """A data set cannot be had; the message, one line, names the fix."""


def load(cache: Path) -> np.ndarray:
    """The array [N, *S] in the file `cache`, mapped into memory.

    Raises:
      DatasetError: the file is damaged, or cannot be read.
    """
    try:
        return np.load(cache, mmap_mode="r")
    except OSError as error:
        raise DatasetError(f"the cached data in {cache} cannot be read ({error.strerror})") from None
    except (ValueError, EOFError, tokenize.TokenError):
        raise DatasetError(f"the cached data in {cache} are damaged: delete this file") from None


def write(
    cache: Path, shape: tuple[int, ...], dtype: type, values: Iterable[np.ndarray | np.generic], *, description: str
) -> None:
    """Writes `values`, [shape[1:]] each of `dtype` and shape[0] of them, one at a time, below a progress bar with this
    `description`.

    Raises:
      DatasetError: there is no room, or the folder cannot be written.
    """
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
            "make room, or give another `data_dir`"
        ) from None
