"""Trains a group of sweep members with checkpoints, metrics and a progress bar: what the experiments share, and where
they compile."""

import functools
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
    sample_stddevs: Float[Array, "..."]


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
            return Pictures(
                *vae_lib.reconstruct(vae, params, to_float(x)), *vae_lib.generate(key, vae, params, num_samples=len(x))
            )

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


def log_interval(num_steps: int) -> int:
    """Steps between two lines of metrics: about a hundredth of the run, and a divisor of it."""
    return next(interval for interval in range(max(1, num_steps // 100), 0, -1) if num_steps % interval == 0)


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
    """Trains the group to `num_steps`, from its checkpoint if there is one, and writes its metrics.

    Returns:
      The final states, and the record of sigma in force at each step from 0 to T = `num_steps` (where sigma is a
      vector: its largest value); the last one, after the last update, is left NaN for the evaluation to fill.

    Raises:
      runs.RunError: the checkpoint is damaged, or training diverged.
    """
    checkpoints = runs.Checkpoints(run_dir, group.name)
    states = programs.init(group.seeds, group.sigmas)
    record = np.full((len(group.seeds), num_steps + 1), np.nan, np.float32)
    restored = checkpoints.restore((states, record))
    if restored is not None:
        states, record = restored[0], np.array(restored[1])
    step = int(states.step[0])
    runs.rewind_metrics(run_dir, group.name, step)
    bar.update(step * len(group.seeds))

    interval = log_interval(num_steps)
    fused = 1 if jax.default_backend() == "cpu" else interval  # a CPU gains nothing from fusing, see training
    saved = time.monotonic()
    while step < num_steps:
        parts = []
        for start in range(step, step + interval, fused):
            indices = [
                [dataset.indices(int(seed), s, batch_size) for seed in group.seeds] for s in range(start, start + fused)
            ]
            states, metrics = programs.steps(group.seeds, group.sigmas, states, train, np.asarray(indices))
            parts.append(metrics)
        metrics = jax.tree.map(lambda *parts: np.concatenate(parts).T, *jax.device_get(parts))  # [M, interval]
        record[:, step : step + interval] = metrics.scores.sigma_max
        step += interval
        scores = vae_lib.summary(metrics.scores)
        if not np.isfinite(scores.elbo).all():
            raise runs.RunError(
                f"training of {group.name} diverged before step {step}, its ELBO is {scores.elbo.min()}: "
                "give another sigma or more data; the last checkpoint is kept"
            )
        runs.append_metrics(
            run_dir,
            (
                {"group": group.name, "member": member, "seed": int(seed), "step": step}
                | {name: float(values[member]) for name, values in scores._asdict().items()}
                | {"gradient_norm": float(metrics.gradient_norm[member].mean())}
                for member, seed in enumerate(group.seeds)
            ),
        )
        bar.set_postfix_str(f"ELBO {scores.elbo.mean():.4g} nats", refresh=False)
        bar.update(interval * len(group.seeds))
        if step == num_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoints.save(step, (states, record))
            saved = time.monotonic()
    checkpoints.close()
    return states, record
