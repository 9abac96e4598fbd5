"""Trains a group of sweep members with checkpoints, metrics and a progress bar: what the experiments share, and where
they compile."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int

from lvae_jax import evaluation, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.datasets import Dataset, to_float
from lvae_jax.training import TrainState
from lvae_jax.vae import VAE, Scores

CHECKPOINT_SECONDS = 60.0


class Group(NamedTuple):
    """M sweep members that one program trains together. name: of its checkpoints; seeds [M]; sigmas [M] or, replayed,
    [M, T]."""

    name: str
    seeds: Int[np.ndarray, " M"]
    sigmas: Float[np.ndarray, "M *T"]


class Pictures(NamedTuple):
    """Of one model: the mean and stddev of p(x|z) for given examples [B, *S]; samples from the prior with their means
    and stddevs, likewise."""

    reconstructions: Float[Array, "..."]
    reconstruction_stddevs: Float[Array, "..."]
    samples: Float[Array, "..."]
    sample_means: Float[Array, "..."]


class Programs(NamedTuple):
    """The compiled functions of one variant; they serve all groups of the same size. All map over the members of a
    group."""

    init: Callable[..., TrainState]
    steps: Callable[..., tuple[TrainState, training.Metrics]]
    score: Callable[..., Scores]
    pictures: Callable[..., Pictures]


def compile_programs(dataset: Dataset, make_vae: Callable[[Any], VAE], *, num_steps: int, beta: float) -> Programs:
    """Compiles, at the first call of each, the programs of the model `make_vae(sigma)`."""
    optimizer = training.optimizer(num_steps)

    def score(seeds: Array, sigmas: Array, states: TrainState, x: Array, index: Array) -> Scores:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Scores:
            return evaluation.score(jax.random.fold_in(jax.random.key(seed), 2), make_vae(sigma), params, x, index)

        return jax.vmap(one)(seeds, sigmas, states.params)

    def pictures(seeds: Array, sigmas: Array, states: TrainState, x: Array) -> Pictures:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Pictures:
            key, vae = jax.random.fold_in(jax.random.key(seed), 3), make_vae(sigma)
            samples, means, _ = vae_lib.generate(key, vae, params, num_samples=len(x))
            return Pictures(*vae_lib.reconstruct(vae, params, to_float(x)), samples, means)

        return jax.vmap(one)(seeds, sigmas, states.params)

    model = {"make_vae": make_vae, "optimizer": optimizer}
    return Programs(
        init=jax.jit(functools.partial(training.members_init, **model)),
        steps=jax.jit(
            functools.partial(training.members_steps, **model, batch=dataset.batch, beta=beta), donate_argnums=2
        ),
        score=jax.jit(score),
        pictures=jax.jit(pictures),
    )


def start(
    run_dir: Path, group: Group, programs: Programs, *, num_steps: int
) -> tuple[TrainState, Float[np.ndarray, "M T+1"]]:
    """The group's states and its record of sigma: from its checkpoint if there is one, else before the first step.

    Raises:
      runs.RunError: the checkpoint is damaged or of another shape.
    """
    fresh = (programs.init(group.seeds, group.sigmas), np.full((len(group.seeds), num_steps + 1), np.nan, np.float32))
    restored = runs.Checkpoints(run_dir, group.name).restore(fresh)
    states, record = fresh if restored is None else restored
    return states, np.array(record)


def fit(
    run_dir: Path,
    group: Group,
    programs: Programs,
    dataset: Dataset,
    train: Any,
    *,
    num_steps: int,
    batch_size: int,
    bar: tqdm.tqdm,
) -> tuple[TrainState, Float[np.ndarray, "M T+1"]]:
    """Trains the group to `num_steps`, from where `start` finds it, and writes its metrics and checkpoints.

    Returns:
      The final states, and the record of sigma in force at each step from 0 to T = `num_steps` (where sigma is a
      vector: its largest value); the last one, after the last update, is left NaN for the evaluation to fill.

    Raises:
      runs.RunError: the checkpoint is damaged, or training diverged.
    """
    states, record = start(run_dir, group, programs, num_steps=num_steps)
    step = int(states.step[0])
    runs.rewind_metrics(run_dir, group.name, step)
    bar.update(step * len(group.seeds))

    interval = max(1, min(100, num_steps // 100))  # between two lines of metrics
    # Fused steps must divide every interval, or the last one would compile again. A CPU gains nothing, see training.
    fused = 1 if jax.default_backend() == "cpu" else math.gcd(interval, num_steps)
    checkpoints = runs.Checkpoints(run_dir, group.name)
    saved = time.monotonic()
    while step < num_steps:
        stop = min(step + interval, num_steps)
        parts = []
        for first in range(step, stop, fused):
            steps = range(first, first + fused)
            indices = [[dataset.indices(int(seed), s, batch_size) for seed in group.seeds] for s in steps]
            states, metrics = programs.steps(group.seeds, group.sigmas, states, train, np.asarray(indices))
            parts.append(metrics)
        metrics = jax.tree.map(lambda *parts: np.concatenate(parts).T, *jax.device_get(parts))  # [M, stop - step]
        scores, gradient_norm = vae_lib.summary(metrics.scores), metrics.gradient_norm.mean(axis=-1)
        if not np.isfinite([scores.elbo, gradient_norm]).all():
            raise runs.RunError(f"training of {group.name} diverged before step {stop}: give another --sigma or --beta")
        lines = [
            {"group": group.name, "member": member, "seed": int(seed), "step": stop}
            | {name: float(values[member]) for name, values in scores._asdict().items()}
            | {"gradient_norm": float(gradient_norm[member])}
            for member, seed in enumerate(group.seeds)
        ]
        runs.append_metrics(run_dir, lines)
        record[:, step:stop] = metrics.scores.sigma_max
        bar.set_postfix_str(f"ELBO {scores.elbo.mean():.4g} nats", refresh=False)
        bar.update((stop - step) * len(group.seeds))
        step = stop
        if step == num_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoints.save(step, (states, record))
            saved = time.monotonic()
    checkpoints.close()
    return states, record
