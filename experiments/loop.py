"""Trains a group of sweep members with checkpoints, metrics and a progress bar."""

import collections
import itertools
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

from experiments import hosts, signals
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
      fuse: several steps in one call, which saves time where steps are short; None to do it there.
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


class Start(NamedTuple):
    """The start of training. record: of sigma, see `fit`; unwritten: the metrics, leaves [K, M], of the last K
    steps, of which metrics.jsonl has no line yet, or nothing."""

    states: TrainState
    record: Float[np.ndarray, "M T+1"]
    unwritten: tuple[training.Metrics, ...]


def line_interval(num_steps: int) -> int:
    """The number of steps between two lines of metrics."""
    return max(1, min(100, num_steps // 100))


def start(run_dir: Path, group: Group, programs: Programs, *, num_steps: int) -> Start:
    """From the group's checkpoint if there is one, `TrainState.finished` if it has taken all of its steps, else before
    the first step.

    Raises:
      runs.RunError: the checkpoint is damaged, or of another shape or version.
    """
    num_members = len(group.seeds)
    record = np.full((num_members, num_steps + 1), np.nan, np.float32)
    with runs.Checkpoints(run_dir, group.name) as checkpoints:
        step = checkpoints.step
        if step is None:
            return Start(programs.init(group), record, ())
        like = programs.shapes(group)
        if step == num_steps or step % line_interval(num_steps) == 0:
            states, record = checkpoints.restore((like.finished() if step == num_steps else like, record))
            return Start(states, np.array(record), ())
        column: Any = np.zeros((step % line_interval(num_steps), num_members), jax.dtypes.canonicalize_dtype(float))
        metrics = training.Metrics(vae_lib.Scores(*len(vae_lib.Scores._fields) * [column]), column)
        states, record, unwritten = checkpoints.restore((like, record, metrics))
        return Start(states, np.array(record), (jax.device_get(unwritten),))


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

    Signals wait for a checkpoint at the end of the step or, if several processes train, of the interval between lines.

    `train` is what `place` returned; examples that it left on the host are streamed.

    Returns:
      The final states, `TrainState.finished`, and the record of sigma in force at each step from 0 to T = `num_steps`
      (where sigma is a vector: its largest value); the last one, after the last update, is left NaN for the evaluation
      to fill.

    Raises:
      runs.RunError: the checkpoint is damaged, or training diverged.
      signals.Stopped: a signal came, and its handler raised nothing.
    """
    states, record, unwritten = start(run_dir, group, programs, num_steps=num_steps)
    step, num_members = int(states.step[0]), len(group.seeds)
    dataset, on_devices = programs.dataset, programs.layout
    runs.rewind_metrics(run_dir, group.name, step)
    if not bar.disable:
        bar.initial += step * num_members  # steps of an earlier process say nothing about the rate
    bar.update(step * num_members)
    if step == num_steps:
        return states, record

    interval = line_interval(num_steps)
    streamed = train is None and dataset.train is not None
    # Fused steps must divide every interval, or the last one would compile again. Steps on images are long on a CPU:
    # they gain nothing, and signals would wait. A checkpoint within an interval comes from a run that fused fewer.
    short = jax.default_backend() != "cpu" or not dataset.is_image
    fuse = short if pace.fuse is None else pace.fuse
    fused = math.gcd(interval, num_steps, step) if fuse else 1
    if streamed:
        fused = fitting_divisor(fused, num_members * batch_size * dataset.train[0].nbytes, STREAMED_BYTES)
    batches = feed(group, dataset, on_devices, range(step, num_steps, fused), fused, batch_size, streamed=streamed)
    seeds, sigmas, states = on_devices.place((group.seeds, group.sigmas, states))
    parts: list[training.Metrics] = []  # of the steps since then, as the devices give them
    saved, stopping = time.monotonic(), False
    with signals.deferred() as asked, runs.Checkpoints(run_dir, group.name) as checkpoints:
        while step < num_steps and not stopping:
            states, metrics = programs.steps(seeds, sigmas, states, train, *next(batches))
            # One call works and one waits: with more under way, the time and the signals would be looked at too early.
            jax.block_until_ready(parts[-1:])
            parts.append(metrics)
            step += fused
            bar.update(fused * num_members)
            complete = step % interval == 0 or step == num_steps
            if complete:
                columns = stack(unwritten, on_devices.collect(parts, num_members, 1))
                unwritten, parts = (), []
                elbo = write_metrics(run_dir, group, jax.tree.map(np.transpose, columns), step)
                record[:, step - len(columns.gradient_norm) : step] = columns.scores.sigma_max.T
                bar.set_postfix_str(f"ELBO {elbo:.4g} nats", refresh=False)
            # Processes that train together stop at the same step: one that waits for another's batch waits for ever.
            stopping = asked() if jax.process_count() == 1 else complete and hosts.any_process(asked())
            if step == num_steps or stopping or time.monotonic() - saved > pace.checkpoint_seconds:
                kept = on_devices.collect(states.finished() if step == num_steps else states, num_members, 0)
                if complete:
                    checkpoints.save(step, (kept, record))
                else:
                    unwritten, parts = (stack(unwritten, on_devices.collect(parts, num_members, 1)),), []
                    checkpoints.save(step, (kept, record, *unwritten))
                saved = time.monotonic()
    return jax.device_put(kept), record


def stack(*parts: Iterable[training.Metrics]) -> training.Metrics:
    """Metrics [K, M] of consecutive steps as one."""
    return jax.tree.map(lambda *columns: np.concatenate(columns), *itertools.chain(*parts))


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
