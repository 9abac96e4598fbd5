"""The programs that train and evaluate a group of sweep members, each compiled at its first call."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvae_jax import devices, diagnostics, evaluation, low_rank, runs, training
from lvae_jax import vae as vae_lib
from lvae_jax.datasets import Dataset, to_float
from lvae_jax.keys import Stream, example_keys, stream_key
from lvae_jax.likelihoods import Schedule
from lvae_jax.training import TrainState
from lvae_jax.vae import VAE, Scores


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


NUM_AXES = 3  # of tangents, in figures and measures


class Pictures(NamedTuple):
    """Pictures of one model: the mean and stddev of p(x|z), z drawn from q(z|x), for given examples [B, *S]; samples
    from the prior with their means, likewise. axes: of the tangents at the reconstructions, [B, *S, k], the first
    `NUM_AXES` of `low_rank.principal_axes`; None for models without any."""

    reconstructions: Float[np.ndarray, "..."]
    reconstruction_stddevs: Float[np.ndarray, "..."]
    samples: Float[np.ndarray, "..."]
    sample_means: Float[np.ndarray, "..."]
    axes: Float[np.ndarray, "..."] | None = None


class Examination(NamedTuple):
    """Results for each example. scores, details: see `evaluation.examine`; code_elbo: of data with grey levels, the
    ELBO in nats of their probabilities, see `evaluation.as_probabilities`; None if the head knows none."""

    scores: Scores
    details: diagnostics.Details
    code_elbo: Float[Array, "..."] | None


class Programs:
    """The programs of one model and data set. All map over the members of a group, and serve all groups of the same
    size.

    Attributes:
      dataset: the data set.
      layout: how `steps` takes its arguments; all others run on one device.
      steps: see `training.members_steps`.
    """

    def __init__(
        self,
        dataset: Dataset,
        make_vae: Callable[[Any], VAE],
        *,
        num_steps: int,
        beta: float | Schedule,
        ema_decay: float = 0.0,
        dequantised: bool = False,
        **schedule: Any,
    ) -> None:
        """For the model `make_vae(sigma)`. `dequantised` tells whether the data are; `schedule` are options of
        `training.optimizer`."""
        model = {
            "make_vae": make_vae,
            "optimizer": training.optimizer(num_steps, **schedule),
            "ema_decay": ema_decay,
        }
        self.dataset, self.layout = dataset, layout(dataset)
        self._make_vae, self._dequantised = make_vae, dequantised
        # The states are donated: a step needs no second copy of them.
        steps = functools.partial(
            training.members_steps, **model, batch=dataset.batch, beta=beta, axis_name=self.layout.axis_name
        )
        self.steps: Callable[..., tuple[TrainState, training.Metrics]] = self.layout.map(steps, donate_argnums=2)
        self._init = jax.jit(functools.partial(training.members_init, **model))
        self._examine = jax.jit(self._examine_all)
        self._importance = jax.jit(self._importance_all, static_argnames=("num_samples", "as_code"))
        self._evidence = jax.jit(self._evidence_all, static_argnames="num_nodes")
        self._pictures = jax.jit(self._pictures_all)

    def init(self, group: Group) -> TrainState:
        """The states before the first step, leaves [M, ...]."""
        states = self._init(group.seeds, group.sigmas)
        if group.begin is None:
            return states
        states = states._replace(params=group.begin(states.params))
        return states._replace(ema=None if states.ema is None else jax.tree.map(jnp.copy, states.params))

    def shapes(self, group: Group) -> TrainState:
        """The shapes and dtypes of the states."""
        return jax.eval_shape(self._init, group.seeds, group.sigmas)

    def evaluate(
        self, group: Group, states: TrainState
    ) -> tuple[Scores, diagnostics.Diagnostics, Float[Array, "M N"] | None]:
        """The scores [M, N] of the N examples of the test split by each of the group's M members, their diagnostics,
        and `Examination.code_elbo`.

        Raises:
          runs.RunError: they are not finite.
        """
        examine = functools.partial(self._examine, group.seeds, group.sigmas, states)
        scores, details, code_elbo = self._over_test_split(examine)
        if not np.isfinite(scores.elbo).all():
            raise runs.RunError(
                f"training of {group.name} diverged in its last steps: give another --sigma, or a lower --learning_rate"
            )
        return scores, diagnostics.summarise(details), code_elbo

    def score(self, group: Group, states: TrainState, num_examples: int) -> Scores:
        """The scores [M, N] of the first examples of the test split by each of M members."""
        examine = functools.partial(self._examine, group.seeds, group.sigmas, states)
        return self._over_test_split(examine, num_examples)[0]

    def importance_bound(
        self, group: Group, states: TrainState, *, num_samples: int, as_code: bool = False
    ) -> Float[np.ndarray, "M N"]:
        """The importance-weighted bound, in nats, of the N examples of the test split by each of M members; `as_code`,
        of the probabilities of grey levels."""
        score: Any = functools.partial(
            self._importance, group.seeds, group.sigmas, states, num_samples=num_samples, as_code=as_code
        )
        return self._over_test_split(score)

    def evidence(
        self, group: Group, states: TrainState, x: np.ndarray
    ) -> tuple[Float[np.ndarray, "M N"], Float[np.ndarray, " M"]]:
        """log p(x) in nats of the points x by each of M members, by quadrature over a latent space of one or two
        dimensions, with its error: see `evaluation.refined`."""
        return evaluation.refined(functools.partial(self._evidence, group.sigmas, states, x))

    def pictures(self, group: Group, states: TrainState, x: np.ndarray) -> Pictures:
        """The pictures [M, ...] of the examples x, as they are stored."""
        return Pictures(*jax.device_get(self._pictures(group.seeds, group.sigmas, states, x)))

    def _over_test_split(self, score_chunk: Callable[..., Any], num_examples: int | None = None) -> Any:
        # About a million values in each chunk of the test split, whatever the size of an example.
        chunk_size = max(1, min(1000, 2**20 // math.prod(self.dataset.shape)))
        return evaluation.over_split(score_chunk, self.dataset.test[:num_examples], chunk_size=chunk_size)

    def _as_code(self, vae: VAE) -> VAE:
        return evaluation.as_probabilities(vae, levels=self.dataset.levels or 256, dequantised=self._dequantised)

    def _examine_all(self, seeds: Array, sigmas: Array, states: TrainState, x: Array, index: Array) -> Examination:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Examination:
            data = self.dataset.test_batch(x, stream_key(seed, Stream.TEST_DATA), index)
            vae, key = self._make_vae(sigma), stream_key(seed, Stream.EXAMINE)
            examination = Examination(*evaluation.examine(key, vae, params, data, index), code_elbo=None)
            if self.dataset.levels is None or vae.likelihood.log_mass is None:
                return examination
            terms = vae_lib.elbo(example_keys(key, index), self._as_code(vae), params, data)  # at the same z
            return examination._replace(code_elbo=terms.elbo)

        return jax.vmap(one)(seeds, sigmas, states.weights)

    def _importance_all(
        self, seeds: Array, sigmas: Array, states: TrainState, x: Array, index: Array, num_samples: int, as_code: bool
    ) -> Array:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> Array:
            data = self.dataset.test_batch(x, stream_key(seed, Stream.TEST_DATA), index)
            key, vae = stream_key(seed, Stream.IMPORTANCE), self._make_vae(sigma)
            vae = self._as_code(vae) if as_code else vae
            return evaluation.importance_score(key, vae, params, data, index, num_samples=num_samples)

        return jax.vmap(one)(seeds, sigmas, states.weights)

    def _evidence_all(self, sigmas: Array, states: TrainState, x: Array, num_nodes: int) -> Array:
        def one(member: tuple[Array, vae_lib.Params]) -> Array:
            sigma, params = member
            return vae_lib.evidence(self._make_vae(sigma), params, x, num_nodes=num_nodes)

        # Member by member: the nodes of all at once would not fit into memory.
        return jax.lax.map(one, (sigmas, states.weights))

    def _pictures_all(self, seeds: Array, sigmas: Array, states: TrainState, x: Array) -> tuple[Array | None, ...]:
        def one(seed: Array, sigma: Array, params: vae_lib.Params) -> tuple[Array | None, ...]:
            vae, key, prior_key = self._make_vae(sigma), *jax.random.split(stream_key(seed, Stream.PICTURES))
            data = to_float(x, levels=self.dataset.levels)
            # The posterior's mean would not do: in many dimensions it lies where no draw ever is.
            terms = vae_lib.elbo(example_keys(key, jnp.arange(len(x))), vae, params, data)
            samples, means, _ = vae_lib.generate(prior_key, vae, params, num_samples=len(x))
            axes = None
            if terms.factors is not None:
                axes = jax.vmap(low_rank.principal_axes)(terms.factors)[..., :NUM_AXES]
            return terms.mean, terms.stddev, samples, means, axes

        return jax.vmap(one)(seeds, sigmas, states.weights)


def layout(dataset: Dataset) -> devices.Layout:
    """The layout of training on the devices. Images split their batches over the devices of all processes; points in
    the plane split their members over those of one process, and all processes do the same."""
    if jax.device_count() == 1:  # where calling what pmap made takes longer than what jit made
        return devices.one_device()
    if dataset.is_image:
        return devices.split_batch(jax.devices())
    return devices.split_members(jax.local_devices())
