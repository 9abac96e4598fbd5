"""Arrays on disk that are written once, whole or not at all, and mapped into memory from then on."""

import errno
import hashlib
import math
import os
import secrets
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class DatasetError(Exception):
    """A data set cannot be had; the message, one line, names the fix."""


def array(
    cache: Path, shape: tuple[int, ...], dtype: type, values: Iterable[np.ndarray | np.generic], *, description: str
) -> np.ndarray:
    """The array of `shape` in the file `cache`, mapped into memory. If there is no such file, it is written first, of
    `values`, [shape[1:]] each of `dtype` and shape[0] of them, one at a time, below a progress bar with this
    `description`. Where its folder cannot be written, the array stays in memory.

    Raises:
      DatasetError: the file is damaged, cannot be read, or there is no room for it.
    """
    if not cache.exists():
        # Under another name first: a file called `cache` is always whole.
        temporary = cache.with_name(f".{secrets.token_hex(8)}-{cache.name}")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        except OSError as error:
            if error.errno in READ_ONLY:
                return _in_memory(shape, dtype, _shown(values, shape[0], description))
            raise _no_room(cache, shape, dtype, error) from None
        _write(temporary, cache, shape, dtype, _shown(values, shape[0], description))
    return load(cache)


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


def key(files: Mapping[str, os.stat_result]) -> str:
    """A digest of the names, sizes and times of files: the name of what is made of them has it, so that other files, or
    changed ones, never find it."""
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files.items()]
    return digest(lines)


def digest(lines: Iterable[str]) -> str:
    """A digest of lines of text, 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _shown(values: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """The values, with a progress bar."""
    import tqdm

    yield from tqdm.tqdm(values, desc=description, total=total, unit="image", unit_scale=True)


def _in_memory(shape: tuple[int, ...], dtype: type, values: Iterator[Any]) -> np.ndarray:
    result: np.ndarray = np.empty(shape, dtype)
    for index, value in enumerate(values):
        result[index] = value
    return result


def _write(temporary: Path, cache: Path, shape: tuple[int, ...], dtype: type, values: Iterator[Any]) -> None:
    try:
        try:
            # Not through a memory map: where the disk is full, writing to one kills the process.
            with open(temporary, "wb") as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for value in values:
                    file.write(value.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _no_room(cache, shape, dtype, error) from None


def _no_room(cache: Path, shape: tuple[int, ...], dtype: type, error: OSError) -> DatasetError:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return DatasetError(
        f"no cache of {size / 1e9:.2g} GB can be written to {cache.parent} ({error.strerror}): "
        "make room, or give another `data_dir`"
    )
