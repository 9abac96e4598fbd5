"""Trains a group of sweep members with checkpoints, metrics and a progress bar: what the experiments share, and where
they compile."""

import collections
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int

from lvae_jax import devices, diagnostics, evaluation, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.datasets import Dataset, Stream, example_keys, stream_key, to_float
from lvae_jax.likelihoods import Schedule
from lvae_jax.training import TrainState
from lvae_jax.vae import VAE, Scores

CHECKPOINT_SECONDS = 60.0
# Training data stay on the device if they fit in this fraction of its memory, or in RESIDENT_BYTES if the device
# reports none; otherwise they are streamed.
RESIDENT_FRACTION = 0.25
RESIDENT_BYTES = 2**30
PREFETCH = 2  # calls whose batches are moved to the devices while these work
STREAMED_BYTES = 2**28  # limit of the batches of one call with several steps


class Group(NamedTuple):
    """M sweep members that one program trains together.

    Attributes:
      name: of its checkpoints.
      seeds: [M].
      sigmas: [M] or, replayed, [M, T].
      begin: initial params, leaves [M, ...] -> those to begin with.
    """

    name: str
    seeds: Int[np.ndarray, " M"]
    sigmas: Float[np.ndarray, "M *T"]
    begin: Callable[[vae_lib.Params], vae_lib.Params] | None = None


class Pictures(NamedTuple):
    """Pictures of one model: the mean and stddev of p(x|z), z drawn from q(z|x), for given examples [B, *S]; samples
    from the prior with their means, likewise."""

    reconstructions: Float[Array, "..."]
    reconstruction_stddevs: Float[Array, "..."]
    samples: Float[Array, "..."]
    sample_means: Float[Array, "..."]


class Examination(NamedTuple):
    """Results for each example. scores, details: see `evaluation.examine`; code_elbo: of data with grey levels, the
    ELBO in nats of their probabilities, see `evaluation.as_probabilities`."""

    scores: Scores
    details: diagnostics.Details
    code_elbo: Float[Array, "..."] | None


class Programs(NamedTuple):
    """The compiled functions of one variant; they serve all groups of the same size. All map over the members of a
    group. `layout` says how `steps` takes its arguments; all others run on one device."""

    layout: devices.Layout
    init: Callable[..., TrainState]
    steps: Callable[..., tuple[TrainState, training.Metrics]]
    examine: Callable[..., Examination]
    importance_score: Callable[..., Array]
    evidence: Callable[..., Array]
    pictures: Callable[..., Pictures]


def layout(dataset: Dataset) -> devices.Layout:
    """The layout of training on the devices. Images split their batches over the devices of all processes; points in
    the plane split their members over those of one process, and all processes do the same."""
    if jax.device_count() == 1:  # where calling what pmap made takes longer than what jit made
        return devices.one_device()
    if dataset.levels is not None:
        return devices.split_batch(jax.devices())
    return devices.split_members(jax.local_devices())


def place(dataset: Dataset) -> Any:
    """The training examples, on every device, if they fit; None, as for a stream, if `fit` has to stream them."""
    if dataset.train is None:
        return None
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    fits = dataset.train.nbytes <= (RESIDENT_BYTES if memory is None else RESIDENT_FRACTION * memory)
    return jax.device_put(np.asarray(dataset.train), layout(dataset).whole) if fits else None


def compile_programs(
    dataset: Dataset,
    make_vae: Callable[[Any], VAE],
    *,
    num_steps: int,
    beta: float | Schedule,
    ema_decay: float = 0.0,
    dequantised: bool = False,
    **schedule: Any,
) -> Programs:
    """Compiles, at the first call of each, the programs of the model `make_vae(sigma)`. `dequantised` tells whether the
    data are; `schedule` are options of `training.optimizer`."""
    on_devices = layout(dataset)
    model = {
        "make_vae": make_vae,
        "optimizer": training.optimizer(num_steps, **schedule),
        "ema_decay": ema_decay,
    }

    def code(vae: VAE) -> VAE:
        return evaluation.as_probabilities(vae, levels=dataset.levels or 256, dequantised=dequantised)

    def examine(seeds: Array, sigmas: Array, states: TrainState, x: Array, index: Array) -> Examination:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Examination:
            data = dataset.test_batch(x, stream_key(seed, Stream.TEST_DATA), index)
            vae, key = make_vae(sigma), stream_key(seed, Stream.EXAMINE)
            examination = Examination(*evaluation.examine(key, vae, params, data, index), code_elbo=None)
            if dataset.levels is None:
                return examination
            terms = vae_lib.elbo(example_keys(key, index), code(vae), params, data)  # at the same z
            return examination._replace(code_elbo=terms.elbo)

        return jax.vmap(one)(seeds, sigmas, states.weights)

    def importance_score(
        seeds: Array, sigmas: Array, states: TrainState, x: Array, index: Array, num_samples: int, as_code: bool
    ) -> Array:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Array:
            data = dataset.test_batch(x, stream_key(seed, Stream.TEST_DATA), index)
            key, vae = stream_key(seed, Stream.IMPORTANCE), make_vae(sigma)
            vae = code(vae) if as_code else vae
            return evaluation.importance_score(key, vae, params, data, index, num_samples=num_samples)

        return jax.vmap(one)(seeds, sigmas, states.weights)

    def evidence(sigmas: Array, states: TrainState, x: Array, num_nodes: int) -> Array:
        def one(member: tuple[Array, vae_lib.Params]) -> Array:
            sigma, params = member
            return vae_lib.evidence(make_vae(sigma), params, x, num_nodes=num_nodes)

        return jax.lax.map(one, (sigmas, states.weights))

    def pictures(seeds: Array, sigmas: Array, states: TrainState, x: Array) -> Pictures:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Pictures:
            vae, key, prior_key = make_vae(sigma), *jax.random.split(stream_key(seed, Stream.PICTURES))
            # The posterior's mean would not do: in many dimensions it lies where no draw ever is.
            terms = vae_lib.elbo(example_keys(key, jnp.arange(len(x))), vae, params, to_float(x, levels=dataset.levels))
            samples, means, _ = vae_lib.generate(prior_key, vae, params, num_samples=len(x))
            return Pictures(terms.mean, terms.stddev, samples, means)

        return jax.vmap(one)(seeds, sigmas, states.weights)

    steps = functools.partial(
        training.members_steps, **model, batch=dataset.batch, beta=beta, axis_name=on_devices.axis_name
    )
    return Programs(
        layout=on_devices,
        init=jax.jit(functools.partial(training.members_init, **model)),
        steps=on_devices.map(steps, donate_argnums=2),
        examine=jax.jit(examine),
        importance_score=jax.jit(importance_score, static_argnames=("num_samples", "as_code")),
        evidence=jax.jit(evidence, static_argnames="num_nodes"),
        pictures=jax.jit(pictures),
    )


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
            states = programs.init(group.seeds, group.sigmas)
            if group.begin is not None:
                states = states._replace(params=group.begin(states.params))
                ema = None if states.ema is None else jax.tree.map(jnp.copy, states.params)
                states = states._replace(ema=ema)
            return states, record
        like = jax.eval_shape(programs.init, group.seeds, group.sigmas)
        states, record = checkpoints.restore((like.finished() if checkpoints.step == num_steps else like, record))
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

    `train` is what `place` returned; examples that it left on the host are streamed.

    Returns:
      The final states, `TrainState.finished`, and the record of sigma in force at each step from 0 to T = `num_steps`
      (where sigma is a vector: its largest value); the last one, after the last update, is left NaN for the evaluation
      to fill.

    Raises:
      runs.RunError: the checkpoint is damaged, or training diverged.
    """
    states, record = start(run_dir, group, programs, num_steps=num_steps)
    step, num_members, on_devices = int(states.step[0]), len(group.seeds), programs.layout
    runs.rewind_metrics(run_dir, group.name, step)
    if not bar.disable:
        bar.initial += step * num_members  # steps of an earlier process say nothing about the rate
    bar.update(step * num_members)
    if step == num_steps:
        return states, record

    interval = max(1, min(100, num_steps // 100))  # between two lines of metrics
    streamed = train is None and dataset.train is not None
    # Fused steps must divide every interval, or the last one would compile again. A CPU gains nothing, see training.
    fused = 1 if jax.default_backend() == "cpu" else math.gcd(interval, num_steps)
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
            if step == num_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
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


def evaluate(
    group: Group, programs: Programs, states: TrainState, dataset: Dataset
) -> tuple[Scores, diagnostics.Diagnostics, Float[Array, "M N"] | None]:
    """The scores [M, N] of the N examples of the test split by each of the group's M members, their diagnostics, and
    `Examination.code_elbo`.

    Raises:
      runs.RunError: they are not finite.
    """
    examine = functools.partial(programs.examine, group.seeds, group.sigmas, states)
    scores, details, code_elbo = evaluation.over_split(examine, dataset.test, chunk_size=_chunk_size(dataset))
    if not np.isfinite(scores.elbo).all():
        raise runs.RunError(
            f"training of {group.name} diverged in its last steps: give another --sigma, or a lower --learning_rate"
        )
    return scores, diagnostics.summarise(details), code_elbo


def importance_bound(
    group: Group, programs: Programs, states: TrainState, dataset: Dataset, *, num_samples: int, as_code: bool = False
) -> Float[np.ndarray, "M N"]:
    """The importance-weighted bound, in nats, of the N examples of the test split by each of M members; `as_code`, of
    the probabilities of grey levels."""
    score: Any = functools.partial(
        programs.importance_score,
        group.seeds,
        group.sigmas,
        states,
        num_samples=num_samples,
        as_code=as_code,
    )
    return evaluation.over_split(score, dataset.test, chunk_size=_chunk_size(dataset))


def evidence(
    group: Group, programs: Programs, states: TrainState, x: np.ndarray, *, tolerance: float = 1e-3
) -> tuple[Float[np.ndarray, "M N"], Float[np.ndarray, " M"]]:
    """log p(x) in nats of the points x by each of M members, by quadrature over a latent space of one or two
    dimensions, with the change of its mean when the number of nodes was last doubled: below `tolerance`, or as it was
    at 2,048."""
    num_nodes = 128
    coarse = jax.device_get(programs.evidence(group.sigmas, states, x, num_nodes))
    while True:
        num_nodes *= 2
        fine = jax.device_get(programs.evidence(group.sigmas, states, x, num_nodes))
        change = np.abs(fine.mean(axis=-1) - coarse.mean(axis=-1))
        if num_nodes == 2048 or change.max() < tolerance:
            return fine, change
        coarse = fine


def _chunk_size(dataset: Dataset) -> int:
    return max(1, min(1000, 2**20 // math.prod(dataset.shape)))
