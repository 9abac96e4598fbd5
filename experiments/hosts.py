"""Several processes, on one host or on many, as one run."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lvae_jax import runs

Tree = TypeVar("Tree")


def connect(
    *, distributed: bool, coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins several processes, on one host or on many, into one run; call it before JAX looks at its devices. Nothing
    happens without `distributed` and an address.

    Args:
      distributed: asks the cluster (Slurm, Cloud TPU and others, see `jax.distributed.initialize`) for all else.

    Raises:
      runs.RunError: the arguments do not fit together, or the processes cannot be joined.
    """
    given = (coordinator_address, num_processes, process_id)
    if not distributed and given == (None, None, None):
        return
    if not distributed and None in given:
        raise runs.RunError("--coordinator_address, --num_processes and --process_id: give all three, or --distributed")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise runs.RunError(f"--process_id={process_id}: must be from 0 to num_processes - 1 = {num_processes - 1}")
    try:
        jax.distributed.initialize(*given)  # which takes SIGTERM for itself
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise runs.RunError(
            f"cannot join the processes ({reason}): give --coordinator_address=HOST:PORT, --num_processes and "
            "--process_id"
        ) from None


def any_process(asked: bool) -> bool:
    """Tells every process whether any of them asks for something. All have to call it."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(asked))))


def in_turn(load: Callable[[], Tree]) -> Tree:
    """Calls `load` in process 0 first and, when all that it writes is there, in the others; returns its result.

    Raises:
      runs.RunError: process 0 has failed. Whatever `load` raises.
    """
    loaded, error = None, None
    if jax.process_index() == 0:
        try:
            loaded = load()
        except BaseException as caught:  # the others would wait for ever
            error = caught
    failed = multihost_utils.broadcast_one_to_all(np.bool_(error is not None))
    if error is not None:
        raise error
    if failed:
        raise runs.RunError("process 0 could not load the data: its message says why")
    return load() if loaded is None else loaded
