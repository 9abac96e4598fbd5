"""Priors fitted to the aggregate posterior of a finished run: how they are fitted, kept beside the run, and read.

Encoder and decoder stay as they are. The training examples have their codes q(z|x) = N(mean, diag stddev^2) once; z is
drawn anew from them in each step. A part of the training split is held out: gradient ascent keeps the parameters that
were best on it, and a prior takes the place of N(0, I) only if its gain there is more than two standard errors.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags
from jaxtyping import Array, Float, Int, Key

from experiments import command, results, signals, sweep
from experiments.options import Option, at_least, positive
from experiments.results import Member, SecondStage
from experiments.variants import VARIANTS
from lvae_jax import datasets, evaluation, gaussians, priors, runs
from lvae_jax import vae as vae_lib
from lvae_jax.keys import Stream, stream_key
from lvae_jax.priors import STANDARD_NORMAL, Prior

FOLDER = "second_stage"  # in the directory of a run
HELD_OUT = 0.1  # of the training examples
IN_USE = 0.01  # nats: a latent dimension with a smaller mean KL is not used
INTERVALS = 50  # of a fit, each of which ends with a look at the held-out part
CHECKPOINT_SECONDS = 60.0

FITTED = ("gaussian", "mixture", "flow")  # in `priors.PRIORS`
CHOICE, FITTING, EVALUATION = GROUPS = ("what to fit", "the fit", "the evaluation")


class Config(NamedTuple):
    """The options of a second stage."""

    prior: Annotated[tuple[str, ...], Option(CHOICE, f"priors to fit: {', '.join(FITTED)}")] = FITTED
    variant: Annotated[tuple[str, ...], Option(CHOICE, "variants of the run (default: all)", repeats=True)] = ()
    num_examples: Annotated[
        int, Option(FITTING, "training examples whose codes are used, at most", at_least(20, at_most=sweep.MOST))
    ] = 60_000
    num_components: Annotated[
        int, Option(FITTING, "components of the mixture, at most", at_least(1, at_most=sweep.MOST))
    ] = 10
    num_layers: Annotated[int, Option(FITTING, "coupling layers of the flow", at_least(1, at_most=1000))] = 8
    width: Annotated[int, Option(FITTING, "units of its networks", at_least(1, at_most=sweep.MOST))] = 128
    num_steps: Annotated[int, Option(FITTING, "gradient steps of the flow", at_least(1, at_most=sweep.MOST))] = 3000
    batch_size: Annotated[int, Option(FITTING, "codes in each step", at_least(1, at_most=sweep.MOST))] = 256
    learning_rate: Annotated[float, Option(FITTING, "peak learning rate of Adam", positive())] = 1e-3
    classifier_steps: Annotated[
        int, Option(EVALUATION, "gradient steps of the classifier of quality", at_least(1, at_most=sweep.MOST))
    ] = 1000
    evidence: Annotated[
        bool,
        Option(EVALUATION, "compute log p(x) on the toy by quadrature: splits the gap to the true density once more"),
    ] = False
    summary: str | None = None  # no flag: the SHA-256 hash of the run's summary.json


class Codes(NamedTuple):
    """The codes q(z|x) of N examples."""

    mean: Float[np.ndarray, "N L"]
    log_stddev: Float[np.ndarray, "N L"]

    def kl(self) -> Float[np.ndarray, " L"]:
        """The mean KL to N(0, 1) in nats of each latent dimension."""
        return np.asarray(gaussians.kl_to_standard(*map(jnp.asarray, self)), np.float64).mean(axis=0)

    def draw(self, key: Key[Array, ""], *, num_draws: int = 1) -> Float[np.ndarray, "M L"]:
        """`num_draws` draws of z for each example, M = N num_draws: first one of each, then the next."""
        noise = np.asarray(jax.random.normal(key, (num_draws, *self.mean.shape), jnp.float32))
        return (self.mean + np.exp(self.log_stddev) * noise).reshape(-1, self.mean.shape[1])


class Split(NamedTuple):
    """The codes of the training examples that are fitted, of those that are held out, and of the test split."""

    train: Codes
    held_out: Codes
    test: Codes


def encoder(dataset: datasets.Dataset, vae: vae_lib.VAE) -> Callable[[vae_lib.Params, int, int], Split]:
    """A function (params, seed, num_examples) that gives the codes of a model with these parameters."""

    @functools.partial(jax.jit, static_argnames="split")
    def encode(params: vae_lib.Params, key: Key[Array, ""], x: Any, index: Array, split: str) -> tuple[Array, Array]:
        data = dataset.batch(None, key, index) if split == "stream" else dataset.test_batch(x, key, index)
        mean, log_stddev = vae_lib.encode(vae, params, data)
        return mean.T, log_stddev.T

    def codes(params: vae_lib.Params, key: Key[Array, ""], examples: np.ndarray, split: str) -> Codes:
        of_chunk = functools.partial(encode, params, key, split=split)
        return Codes(*(array.T for array in evaluation.over_split(of_chunk, examples)))

    def split(params: vae_lib.Params, seed: int, num_examples: int) -> Split:
        key, test_key = jax.random.split(stream_key(seed, Stream.SECOND_STAGE))
        if dataset.train is None:
            train = codes(params, key, np.zeros((num_examples, 0)), "stream")
        else:
            order = np.random.default_rng((seed, Stream.SECOND_STAGE)).permutation(len(dataset.train))
            train = codes(params, key, np.asarray(dataset.train[np.sort(order[:num_examples])]), "train")
        size = len(train.mean)
        order = np.random.default_rng((seed, Stream.SECOND_STAGE, 1)).permutation(size)
        held = np.zeros(size, bool)
        held[order[: max(1, round(HELD_OUT * size))]] = True
        test = codes(params, test_key, dataset.test, "test")
        part, rest = (Codes(*(array[chosen] for array in train)) for chosen in (held, ~held))
        return Split(rest, part, test)

    return split


def make(name: str, latent_size: int, config: Config) -> Prior:
    """The prior of this name and of the sizes in the config.

    Raises:
      ValueError: it cannot have so few latent dimensions.
    """
    if name == "mixture":
        return priors.mixture(latent_size, config.num_components)
    if name == "flow":
        return priors.flow(latent_size, num_layers=config.num_layers, width=config.width)
    return priors.PRIORS[name](latent_size)


class State(NamedTuple):
    """The state of gradient ascent. best: the params that were best on the held-out codes, by `gain` nats over
    N(0, I)."""

    params: priors.Params
    opt_state: Any
    best: priors.Params
    gain: Float[Array, ""]


class Fitter:
    """Fits one prior to the codes of many models, by programs that are compiled once."""

    def __init__(self, name: str, latent_size: int, config: Config) -> None:
        """Raises:
        ValueError: as `make` says.
        """
        self.name, self.config, self.prior = name, config, make(name, latent_size, config)
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps)),
        )
        self.gains = jax.jit(self._gains)
        self._advance = jax.jit(self._steps, donate_argnums=0)
        self._init = jax.jit(self.prior.init)

    def _gains(self, params: priors.Params, z: Float[Array, "M L"]) -> Float[Array, " M"]:
        """log p(z) - log N(z; 0, I) in nats."""
        return self.prior.log_prob(params, z) - STANDARD_NORMAL.log_prob({}, z)

    def _steps(
        self,
        state: State,
        key: Key[Array, ""],
        codes: Codes,
        held_out: Float[Array, "M L"],
        first: Int[Array, ""],
        last: Int[Array, ""],
    ) -> State:
        """Gradient steps from `first` to `last`, and a look at held-out draws."""

        def loss(params: priors.Params, z: Float[Array, "B L"]) -> Float[Array, ""]:
            return -jnp.mean(self.prior.log_prob(params, z))

        def step(index: Int[Array, ""], carry: tuple[priors.Params, Any]) -> tuple[priors.Params, Any]:
            params, opt_state = carry
            index_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
            chosen = jax.random.randint(index_key, (self.config.batch_size,), 0, len(codes.mean))
            z = gaussians.sample(noise_key, codes.mean[chosen], codes.log_stddev[chosen])
            with jax.numpy_dtype_promotion("standard"):  # as `training.train_step`
                updates, opt_state = self._optimizer.update(jax.grad(loss)(params, z), opt_state)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = jax.lax.fori_loop(first, last, step, (state.params, state.opt_state))
        gain = jnp.mean(self._gains(params, held_out))
        better = gain > state.gain
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, state.best)
        return State(params, opt_state, best, jnp.where(better, gain, state.gain))

    def fit(self, folder: Path, member: Member, split: Split, bar: tqdm.tqdm) -> priors.Params:
        """The parameters of the prior of this model, from the checkpoint in `folder` if it is fitted, else fitted from
        where a checkpoint has it.

        Raises:
          runs.RunError: the checkpoint is damaged.
          signals.Stopped: a signal came, and its handler raised nothing.
        """
        key, held_key = jax.random.split(jax.random.fold_in(stream_key(member.seed, Stream.SECOND_STAGE), 1))
        num_steps, total = self.config.num_steps, bar.n
        # Some ten thousand draws: with fewer, chance would decide which parameters are best.
        num_draws = min(20, -(-10_000 // len(split.held_out.mean)))
        held_out = split.held_out.draw(held_key, num_draws=num_draws)
        with runs.Checkpoints(folder, place(member, self.name)) as checkpoints:
            step = checkpoints.step
            if step == num_steps:
                skip(bar, num_steps)
                return jax.device_get(checkpoints.restore(self.shapes()))
            if self.name == "flow":
                candidates = [self._ascend(checkpoints, key, split.train, held_out, bar)]
            else:
                candidates = self._in_closed_form(key, split.train, member.seed)
            best = self.best(candidates, held_out, len(split.held_out.mean))
            bar.update(total + num_steps - bar.n)
            checkpoints.save(num_steps, best)
            return best

    def shapes(self) -> priors.Params:
        """The shapes and dtypes of the parameters."""
        return jax.eval_shape(self.prior.init, jax.random.key(0))

    def best(
        self, candidates: Sequence[priors.Params], held_out: Float[np.ndarray, "M L"], num_examples: int
    ) -> priors.Params:
        """The candidate with the largest gain on draws of so many held-out examples, if that is more than two standard
        errors; else N(0, I)."""
        kept, best = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.shapes()), 0.0
        for params in candidates:
            # Draws of one example are not independent: its mean counts once.
            gains = np.asarray(self.gains(params, held_out), np.float64).reshape(-1, num_examples).mean(axis=0)
            gain, error = gains.mean(), gains.std(ddof=1) / np.sqrt(num_examples)
            if gain > max(best, 2.0 * error):
                kept, best = params, float(gain)
        return jax.device_get(kept)

    def _in_closed_form(self, key: Key[Array, ""], train: Codes, seed: int) -> list[priors.Params]:
        """A Gaussian by its moments, or that and a mixture by expectation maximisation, of the dimensions in use."""
        dims, latent_size = in_use(train), train.mean.shape[1]
        if not len(dims):
            return []
        fits = [priors.fit_gaussian(train.mean[:, dims], train.log_stddev[:, dims])]
        if self.name == "mixture":
            count = self.config.num_components
            alike = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), fits[0])
            z = train.draw(key)[:, dims]
            fits = [
                alike | {"log_weight": jnp.zeros(count, jnp.float32)},
                priors.fit_mixture(z, num_components=count, seed=seed),
            ]
        return [priors.widened(params, dims=dims, latent_size=latent_size) for params in fits]

    def _ascend(
        self,
        checkpoints: runs.Checkpoints,
        key: Key[Array, ""],
        train: Codes,
        held_out: Float[np.ndarray, "M L"],
        bar: tqdm.tqdm,
    ) -> priors.Params:
        """Gradient ascent on E log p(z)."""
        step, num_steps = checkpoints.step or 0, self.config.num_steps
        params = self._init(jax.random.fold_in(key, num_steps))
        state = State(params, self._optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.zeros(()))
        if step:
            state = checkpoints.restore(jax.eval_shape(lambda: state))
        skip(bar, step)
        codes, held = jax.device_put((train, held_out))
        saved, interval = time.monotonic(), max(1, num_steps // INTERVALS)
        with signals.deferred() as asked:
            while step < num_steps and not asked():
                last = min(step + interval, num_steps)
                state = self._advance(state, key, codes, held, step, last)
                bar.set_postfix_str(f"gain {float(state.gain):.4g} nats", refresh=False)
                bar.update(last - step)
                step = last
                if step < num_steps and (asked() or time.monotonic() - saved > CHECKPOINT_SECONDS):
                    checkpoints.save(step, jax.device_get(state))
                    saved = time.monotonic()
        return jax.device_get(state.best)


def skip(bar: tqdm.tqdm, num_steps: int) -> None:
    """Moves the bar over steps of an earlier process, which say nothing about the rate."""
    if not bar.disable:
        bar.initial += num_steps
    bar.update(num_steps)


def in_use(codes: Codes) -> Int[np.ndarray, " D"]:
    """The latent dimensions that the model uses."""
    return np.flatnonzero(codes.kl() > IN_USE)


def place(member: Member, prior: str) -> str:
    """The name of the checkpoint of a member's prior."""
    at_sigma = f"-{member.sigma}" if VARIANTS[member.variant].conditioned else ""
    return f"{member.group}-{member.member}{at_sigma}-{prior}"


def digest(run_dir: Path) -> str:
    """The hash of the results of a run, by which a second stage knows its run again."""
    return hashlib.sha256((run_dir / "summary.json").read_bytes()).hexdigest()


def model(
    path: Path, config: sweep.Config, *, member: Member, form: datasets.Form, prior: str | None
) -> tuple[vae_lib.VAE, vae_lib.Params]:
    """The trained model of a member of the run in `path`; with a name, under the `prior` that was fitted to it.

    Raises:
      runs.RunError: there is no such prior, or a checkpoint is missing or damaged.
    """
    vae, params = sweep.trained(path, config, member, form)
    if prior is None:
        return vae, params
    stage = read(path)
    if prior not in stage.prior or member.variant not in (stage.variant or config.variants):
        raise runs.RunError(
            f"{path / FOLDER} has no {prior} prior of {member.variant}: move it, and repeat "
            "experiments.second_stage with this --prior"
        )
    fitter = Fitter(prior, config.latent_size, stage)
    with runs.Checkpoints(path / FOLDER, place(member, prior)) as checkpoints:
        return vae_lib.with_prior(vae, params, fitter.prior, checkpoints.restore(fitter.shapes()))


def read(run_dir: Path) -> Config:
    """The config of the finished second stage of a run.

    Raises:
      runs.RunError: there is none, or it is of other results.
    """
    folder = run_dir / FOLDER
    if not (folder / "summary.json").exists():
        raise runs.RunError(f"{run_dir} has no finished second stage: run experiments.second_stage with this --run_dir")
    recorded: dict[str, Any] = runs.read_flags(folder, defaults=Config._field_defaults)
    results.read(folder / "summary.json", SecondStage)
    if recorded.keys() != set(Config._fields) or recorded["summary"] != digest(run_dir):
        raise runs.RunError(f"{folder} is of other results of this run: move it, and repeat experiments.second_stage")
    return Config._make(tuple(value) if isinstance(value, list) else value for value in recorded.values())


def define_prior() -> None:
    """Defines the flag that chooses a fitted prior."""
    with command.group("the prior"):
        flags.DEFINE_enum("prior", None, FITTED, "draw z from this prior, which second_stage has fitted")
