"""Trains a group of sweep members with checkpoints, metrics and a progress bar."""

import collections
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Float

from experiments.programs import Group, Programs, layout
from lvae_jax import devices, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.datasets import Dataset
from lvae_jax.training import TrainState

# Training data stay on the device if they fit in this fraction of its memory, or in RESIDENT_BYTES if the device
# reports none.
RESIDENT_FRACTION = 0.25
RESIDENT_BYTES = 2**30
PREFETCH = 2  # calls whose batches are moved to the devices while these work
STREAMED_BYTES = 2**28  # limit of the batches of one call with several steps


class Pace(NamedTuple):
    """How training uses the machine.

    Attributes:
      checkpoint_seconds: the time between two checkpoints.
      resident_bytes: training data of this size or less stay on the devices, others are streamed; None for what the
        memory of the devices allows.
      fuse: several steps in one call, which saves time on accelerators; None to do it there.
    """

    checkpoint_seconds: float = 60.0
    resident_bytes: float | None = None
    fuse: bool | None = None


PACE = Pace()


def place(dataset: Dataset, pace: Pace = PACE) -> Any:
    """The training examples, on every device, if they fit; None, as for a stream, if `fit` has to stream them."""
    if dataset.train is None:
        return None
    limit = pace.resident_bytes
    if limit is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        limit = RESIDENT_BYTES if memory is None else RESIDENT_FRACTION * memory
    fits = dataset.train.nbytes <= limit
    return jax.device_put(np.asarray(dataset.train), layout(dataset).whole) if fits else None


def start(
    run_dir: Path, group: Group, programs: Programs, *, num_steps: int
) -> tuple[TrainState, Float[np.ndarray, "M T+1"]]:
    """The group's states and its record of sigma: from its checkpoint if there is one, `TrainState.finished` if it has
    taken all of its steps, else before the first step.

    Raises:
      runs.RunError: the checkpoint is damaged, or of another shape or version.
    """
    record = np.full((len(group.seeds), num_steps + 1), np.nan, np.float32)
    with runs.Checkpoints(run_dir, group.name) as checkpoints:
        if checkpoints.step is None:
            return programs.init(group), record
        like = programs.shapes(group)
        states, record = checkpoints.restore((like.finished() if checkpoints.step == num_steps else like, record))
        return states, np.array(record)


def fit(
    run_dir: Path,
    group: Group,
    programs: Programs,
    train: Any,
    *,
    num_steps: int,
    batch_size: int,
    bar: tqdm.tqdm,
    pace: Pace = PACE,
) -> tuple[TrainState, Float[np.ndarray, "M T+1"]]:
    """Trains the group to `num_steps`, from where `start` finds it, and writes its metrics and checkpoints.

    `train` is what `place` returned; examples that it left on the host are streamed.

    Returns:
      The final states, `TrainState.finished`, and the record of sigma in force at each step from 0 to T = `num_steps`
      (where sigma is a vector: its largest value); the last one, after the last update, is left NaN for the evaluation
      to fill.

    Raises:
      runs.RunError: the checkpoint is damaged, or training diverged.
    """
    states, record = start(run_dir, group, programs, num_steps=num_steps)
    step, num_members = int(states.step[0]), len(group.seeds)
    dataset, on_devices = programs.dataset, programs.layout
    runs.rewind_metrics(run_dir, group.name, step)
    if not bar.disable:
        bar.initial += step * num_members  # steps of an earlier process say nothing about the rate
    bar.update(step * num_members)
    if step == num_steps:
        return states, record

    interval = max(1, min(100, num_steps // 100))  # between two lines of metrics
    streamed = train is None and dataset.train is not None
    # Fused steps must divide every interval, or the last one would compile again. A CPU gains nothing, see training.
    fuse = jax.default_backend() != "cpu" if pace.fuse is None else pace.fuse
    fused = math.gcd(interval, num_steps) if fuse else 1
    if streamed:
        fused = fitting_divisor(fused, num_members * batch_size * dataset.train[0].nbytes, STREAMED_BYTES)
    batches = feed(group, dataset, on_devices, range(step, num_steps, fused), fused, batch_size, streamed=streamed)
    seeds, sigmas, states = on_devices.place((group.seeds, group.sigmas, states))
    saved = time.monotonic()
    with runs.Checkpoints(run_dir, group.name) as checkpoints:
        while step < num_steps:
            stop = min(step + interval, num_steps)
            parts = []
            for _ in range(step, stop, fused):
                states, metrics = programs.steps(seeds, sigmas, states, train, *next(batches))
                parts.append(metrics)
            parts = on_devices.collect(parts, num_members, 1)
            metrics = jax.tree.map(lambda *parts: np.concatenate(parts).T, *parts)  # [M, stop - step]
            elbo = write_metrics(run_dir, group, metrics, stop)
            record[:, step:stop] = metrics.scores.sigma_max
            bar.set_postfix_str(f"ELBO {elbo:.4g} nats", refresh=False)
            bar.update((stop - step) * num_members)
            step = stop
            if step == num_steps or time.monotonic() - saved > pace.checkpoint_seconds:
                kept = on_devices.collect(states.finished() if step == num_steps else states, num_members, 0)
                checkpoints.save(step, (kept, record))
                saved = time.monotonic()
    return jax.device_put(kept), record


def feed(
    group: Group,
    dataset: Dataset,
    layout: devices.Layout,
    firsts: range,
    num_fused: int,
    batch_size: int,
    *,
    streamed: bool,
) -> Iterator[tuple[Any, Any]]:
    """For each of `firsts`, the indices of the batches of the `num_fused` steps from there on and, if they are
    `streamed`, the examples, else None: as `Programs.steps` takes them."""

    def batches(first: int) -> tuple[Any, Any]:
        steps = range(first, first + num_fused)
        whole = [[dataset.indices(int(seed), step, batch_size) for seed in group.seeds] for step in steps]
        indices = layout.share(np.asarray(whole))
        if streamed:
            return jax.device_put((indices, np.asarray(dataset.train[indices])), layout.batches)
        return indices, None

    return (prefetch if streamed else map)(batches, firsts)


def write_metrics(run_dir: Path, group: Group, metrics: training.Metrics, step: int) -> float:
    """Appends a line for each member with the means of its metrics [M, K] over the K steps before `step`; returns the
    mean ELBO.

    Raises:
      runs.RunError: training diverged.
    """
    scores, gradient_norm = vae_lib.summary(metrics.scores), metrics.gradient_norm.mean(axis=-1)
    if not np.isfinite([scores.elbo, gradient_norm]).all():
        raise runs.RunError(
            f"training of {group.name} diverged before step {step}: give another --sigma, or a lower --learning_rate"
        )
    lines = [
        {"group": group.name, "member": member, "seed": int(seed), "step": step}
        | {name: float(values[member]) for name, values in scores._asdict().items()}
        | {"gradient_norm": float(gradient_norm[member])}
        for member, seed in enumerate(group.seeds)
    ]
    runs.append_metrics(run_dir, lines)
    return float(scores.elbo.mean())


def fitting_divisor(count: int, size: int, limit: int) -> int:
    """The largest divisor of `count` of which as many things of `size` are within the limit; at least 1."""
    return max(part for part in range(1, count + 1) if count % part == 0 and (part == 1 or part * size <= limit))


def prefetch(batches: Callable[[int], Any], firsts: Iterable[int]) -> Iterator[Any]:
    """`map(batches, firsts)`, with the next `PREFETCH` results made in a thread while the one before is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead: collections.deque[Future] = collections.deque()
        for first in firsts:
            ahead.append(thread.submit(batches, first))
            if len(ahead) > PREFETCH:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
