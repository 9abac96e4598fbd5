"""Priors fitted to the codes of a finished `experiments.sigma_sweep`: a second stage, counted in nats.

  python -m experiments.second_stage --run_dir=RUN

fits a Gaussian, a mixture and a flow to the aggregate posterior q(z), the mean of q(z|x) over the training examples, of
each model of the run. Encoder and decoder stay as they are. With a prior p2 in place of N(0, I) the ELBO of the same
model grows by exactly E_q(z) [log p2(z) - log N(z; 0, I)], on the test split, which one table shows beside measures of
the samples. The results go to RUN/second_stage; the same command resumes an interrupted fit, and reports a finished one
again. `experiments.generate` and `experiments.quality` take the priors by --prior.

A run of three models of MNIST with 32 latent dimensions, as colab/runs/mnist_6000, took 18 minutes on one CPU core
beside other work; expect a gain of about 24 nats by the flow of its LS-VAE.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from jaxtyping import Array, Float, Int, Key

from experiments import command, hosts, latents, options, realism, report, sizes, statistics, sweep, tables
from experiments.latents import Config, Fitter, Split
from experiments.realism import Judge
from experiments.results import Member, Quality, SecondStage, Staged, StageMember, StageRow, Summary
from lvae_jax import datasets, evaluation, figures, measures
from lvae_jax import vae as vae_lib
from lvae_jax.keys import Stream, example_keys, of_seed, stream_key
from lvae_jax.priors import STANDARD_NORMAL

NUM_DRAWS = 10  # of z, for the gain of a test example
NUM_NEIGHBOURS = 500  # generated images whose nearest training images are looked for
NUM_EVIDENCE_EXAMPLES = 1000
NUM_POINTS = 1000  # in a figure
NUM_SHOWN = 12  # images beside their neighbours
REACH = 8.0  # of the quadrature: a fitted prior may be wider than N(0, I)
DEFAULTS = Config()
STANDARD, POSTERIOR = "N(0, I)", "q(z)"


def run(
    run_dir: str | None,
    config: Config = DEFAULTS,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    celeba_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> SecondStage:
    """Fits, resumes or reports the second stage of a finished run of `sigma_sweep`. `dataset` is the file or folder of
    a run on data of one's own; the folders are those of `datasets.load`.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say, before anything is fitted.
    """
    if run_dir is None:
        raise command.UsageError("--run_dir: give the directory of a finished run of experiments.sigma_sweep")
    path = command.path("run_dir", run_dir)
    options.check(config._replace(variant=config.variant or ("all",)))
    swept, summary = sweep.read_run(path)
    check(path, swept, config)
    places = command.paths(data_dir=data_dir, manual_dir=manual_dir, celeba_dir=celeba_dir)
    source = sweep.source(path, swept, dataset, places["celeba_dir"])
    config = config._replace(summary=latents.digest(path))

    def prepare(folder: Path) -> Callable[[], SecondStage]:
        data = hosts.in_turn(lambda: datasets.load(source, **sweep.data_options(swept), **places))
        labels = labels_of(swept, data, **places)
        if labels is not None:
            realism.check_size(path, data)
        stage = Stage(path, swept, summary, config, data)

        def compute() -> SecondStage:
            judge = None
            if labels is not None:
                judge = realism.train_judge(data, labels, num_steps=config.classifier_steps)
            return stage.run(folder, judge, echo)

        return sizes.told("give a smaller --num_examples, --num_components or --width")(compute)

    place = str(path / latents.FOLDER)
    late = options.of_group(Config, latents.EVALUATION)
    return command.run(config, "second_stage", place, SecondStage, prepare=prepare, table=table, echo=echo, late=late)


def check(path: Path, swept: sweep.Config, config: Config) -> None:
    """Raises if these priors cannot be fitted to this run.

    Raises:
      command.UsageError: the message, one line, names the fix.
    """
    unknown = [name for name in config.prior if name not in latents.FITTED]
    if unknown:
        raise command.UsageError(f"--prior={unknown[0]}: give some of {', '.join(latents.FITTED)}")
    for variant in config.variant:
        if variant not in swept.variants:
            raise command.UsageError(f"--variant={variant} is not in the run, which has {', '.join(swept.variants)}")
    if swept.prior != sweep.Config().prior:
        raise command.UsageError(
            f"--run_dir={path}: its models have learned a prior, --prior={swept.prior}, give a run with N(0, I)"
        )
    for name in config.prior:
        try:
            latents.make(name, swept.latent_size, config)
        except ValueError as error:
            raise command.UsageError(
                f"--prior={name}: {error}; the run has --latent_size={swept.latent_size}"
            ) from None
    if config.evidence and (sweep.domain(swept).log_prob is None or swept.latent_size > 2):
        raise command.UsageError("--evidence is for runs of the toy with one or two latent dimensions: leave it out")


def labels_of(swept: sweep.Config, data: datasets.Dataset, **places: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The classes of both splits; None for data without any."""
    if swept.fake_data or swept.own_files is not None or data.levels is None:
        return None
    try:
        return datasets.labels(swept.dataset, data_dir=places["data_dir"], manual_dir=places["manual_dir"])
    except datasets.DatasetError:
        return None


class Under(NamedTuple):
    """A model with z from one prior.

    Attributes:
      result: the numbers.
      scores: of its images, by their kind, where the data have labels.
      samples, means: x ~ p(x|z), and the means of p(x|z), [N, *S].
      z: [N, 2], draws in the two latent dimensions with the largest KL.
    """

    result: StageMember
    scores: dict[str, realism.Scores]
    samples: np.ndarray
    means: np.ndarray
    z: np.ndarray


class Programs(NamedTuple):
    """The programs of a variant under one prior, which serve all of its members, each compiled at its first call: the
    functions of these names in `priors`, `realism` and `vae`."""

    kl: Callable[..., Array]
    draw: Callable[..., Array]
    generate: Callable[..., realism.Generated]
    elbo: Callable[..., Array]
    evidence: Callable[..., Array]


class Stage:
    """The second stage of one run: fits the priors, and measures what they change."""

    def __init__(
        self, path: Path, swept: sweep.Config, summary: Summary, config: Config, data: datasets.Dataset
    ) -> None:
        """For the run in `path` with this config and summary, on its data."""
        self.path, self.swept, self.summary, self.config, self.data = path, swept, summary, config, data
        chosen = config.variant or swept.variants
        self.members = [member for member in summary.members if member.variant in chosen]
        self.fitters = {name: Fitter(name, swept.latent_size, config) for name in config.prior}
        self.vaes = {variant: sweep.trained_vae(swept, variant, summary.form) for variant in chosen}
        # One program for all members of a variant.
        self._encode = {variant: latents.encoder(data, vae) for variant, vae in self.vaes.items()}
        self._decode = {variant: decoder(vae) for variant, vae in self.vaes.items()}
        self.programs = functools.cache(self._programs)

    def run(self, folder: Path, judge: Judge | None, echo: Callable[[str], None]) -> SecondStage:
        """Fits all priors, with checkpoints in `folder`, and returns the results; draws the figures."""
        splits = [self._encode[m.variant](self.params(m), m.seed, self.config.num_examples) for m in self.members]
        pairs = list(zip(self.members, splits, strict=True))
        for member, split in pairs:
            self.check_size(member, split)
        total = len(pairs) * len(self.fitters) * self.config.num_steps
        quiet = jax.process_index() != 0
        fitted: list[dict[str, Any]] = []
        with tqdm.tqdm(
            total=total, unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0, disable=quiet
        ) as bar:
            for member, split in pairs:
                fitted.append({})
                for name, fitter in self.fitters.items():
                    bar.set_description(f"{title(member)}, seed {member.seed}, {name}")
                    fitted[-1][name] = fitter.fit(folder, member, split, bar)
        examined: dict[str, list[list[Under]]] = {}
        for (member, split), of_member in zip(pairs, fitted, strict=True):
            found = self.examine(member, split, of_member, judge)
            examined.setdefault(title(member), []).append(found)
            echo(f"{title(member)}, seed {member.seed}: " + gains([each.result for each in found]))
        if not quiet:
            self.draw(folder, {row: found[0] for row, found in examined.items()}, echo)
        return self.summarise(examined, pairs[0][1], judge)

    def params(self, member: Member) -> vae_lib.Params:
        """The trained parameters of a member."""
        return sweep.trained(self.path, self.swept, member, self.summary.form)[1]

    def check_size(self, member: Member, split: Split) -> None:
        """Raises if a mixture cannot be fitted to so few codes.

        Raises:
          command.UsageError: the message, one line, names the fix.
        """
        count, used, size = len(split.train.mean), len(latents.in_use(split.train)), self.config.num_components
        if "mixture" in self.fitters and count < size * (used + 1):
            raise command.UsageError(
                f"--num_components={size}: the {title(member)} uses {used} latent dimensions, in which they need "
                f"{size * (used + 1)} codes, of {count}: give at most {count // (used + 1)}, or a --prior without "
                "mixture"
            )

    def examine(self, member: Member, split: Split, fitted: Mapping[str, Any], judge: Judge | None) -> list[Under]:
        """The member under N(0, I), under each fitted prior, and with z from the posteriors of the test examples."""
        params = self.params(member)
        key = jax.random.fold_in(stream_key(member.seed, Stream.SECOND_STAGE), 2)
        z, size = split.test.draw(key, num_draws=NUM_DRAWS), len(split.test.mean)
        parts = np.split(z, NUM_DRAWS)
        kls = {STANDARD: np.asarray(jax.jit(STANDARD_NORMAL.kl)({}, *split.test, z[:size]), np.float64)}
        under = {STANDARD: params}
        for name in self.fitters:
            under[name] = params | {"prior": fitted[name]}
            kl = functools.partial(self.programs(member.variant, name).kl, fitted[name], *split.test)
            kls[name] = np.mean([kl(part) for part in parts], axis=0, dtype=np.float64)
        information = [
            # Of the draws of all examples, as many as take seconds.
            float(np.mean([evaluation.information_bound(*split.test, part) for part in parts[: -(-10_000 // size)]])),
            min(float(kl.mean()) for kl in kls.values()),
        ]
        gaps = self.gaps(member, under, kls) if self.config.evidence else {}
        axes = np.argsort(split.test.kl())[::-1][:2]
        # As many as there are test examples, unless there is nothing to compare them by.
        num_drawn = min(size, NUM_POINTS) if self.data.is_image and judge is None else size
        results = []
        for name, of_prior in under.items():
            gain = float(np.mean(kls[STANDARD] - kls[name]))
            numbers = {"elbo": member.elbo + gain, "gain": gain, "kl": float(kls[name].mean())}
            programs = self.programs(member.variant, name)
            samples, means = programs.generate(of_prior, member.seed, num_samples=num_drawn)
            drawn = programs.draw(key, of_prior)
            more = numbers | {"information": information} | gaps.get(name, {})
            results.append(self.measure(member, name, samples, means, np.asarray(drawn)[:, axes], judge, more))
        samples, means = self._decode[member.variant](params, key, z[:num_drawn])
        results.append(self.measure(member, POSTERIOR, samples, means, z[:NUM_POINTS, axes], judge, {}))
        return results

    def measure(
        self,
        member: Member,
        prior: str,
        samples: np.ndarray,
        means: np.ndarray,
        z: np.ndarray,
        judge: Judge | None,
        numbers: Mapping[str, Any],
    ) -> Under:
        """Measures samples and means, and joins the `numbers` that are known already."""
        measured: dict[str, Any] = {}
        if self.data.is_image:
            measured["neighbour_distance"] = float(np.median(self.neighbours(means[:NUM_NEIGHBOURS])[1]))
        elif not self.data.masked:
            measured["sliced_wasserstein"] = measures.sliced_wasserstein(of_seed(0), samples, self.data.test)
        images = {"samples": samples, "means": means} if judge is not None else {}
        return Under(
            StageMember(
                variant=member.variant, sigma=member.sigma, seed=member.seed, prior=prior, **measured, **numbers
            ),
            {kind: judge.score(of_kind) for kind, of_kind in images.items() if judge is not None},
            samples[:NUM_POINTS],
            means[:NUM_POINTS],
            z,
        )

    def neighbours(self, images: Float[np.ndarray, "M *S"]) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
        """The indices of the nearest training images, and their root mean square distances, in units of the data."""
        highest = 1.0 if self.data.levels is None else self.data.levels - 1.0
        train = self.data.train[: self.config.num_examples]
        size = images[0].size
        index, distance = measures.nearest(highest * images.reshape(-1, size), train.reshape(-1, size))
        return index, distance / (highest * np.sqrt(size))

    def gaps(
        self, member: Member, under: Mapping[str, vae_lib.Params], kls: Mapping[str, np.ndarray]
    ) -> dict[str, dict[str, float]]:
        """The gap of the ELBO to the true log p(x) on the toy, in nats, under each prior, and its parts: the prior's,
        which the prior has closed, the model's and the posterior's. Their sum is the gap under N(0, I)."""
        log_prob = sweep.domain(self.swept).log_prob
        assert log_prob is not None, "checked"
        x = self.data.test[:NUM_EVIDENCE_EXAMPLES]
        true = np.asarray(log_prob(jnp.asarray(x)), np.float64)
        keys = example_keys(stream_key(member.seed, Stream.EXAMINE), jnp.arange(len(x)))
        elbo = np.asarray(self.programs(member.variant, STANDARD).elbo(keys, under[STANDARD], x), np.float64)
        found = {}
        for name, params in under.items():
            evidence, _ = evaluation.refined(functools.partial(self.programs(member.variant, name).evidence, params, x))
            prior_gap = float(np.mean((kls[STANDARD] - kls[name])[: len(x)]))
            found[name] = {
                "gap": float(np.mean(true - elbo)),
                "prior_gap": prior_gap,
                "model_gap": float(np.mean(true - evidence)),
                "posterior_gap": float(np.mean(evidence - elbo)) - prior_gap,
            }
        return found

    def summarise(
        self, examined: Mapping[str, Sequence[Sequence[Under]]], split: Split, judge: Judge | None
    ) -> SecondStage:
        """The content of summary.json."""
        rows, looks = [], [] if judge is None else [realism.training_row(judge, self.data)]
        for row, of_seeds in examined.items():
            for under in zip(*of_seeds, strict=True):
                rows.append(stage_row([each.result for each in under]))
                for kind in under[0].scores:
                    name = f"{row}, {under[0].result.prior}: {kind}"
                    looks.append(realism.row(name, [each.scores[kind] for each in under]))
        quality = None
        if judge is not None:
            quality = Quality(
                rows=looks,
                num_images=len(self.data.test),
                num_seeds=self.swept.num_seeds,
                classifier_accuracy=judge.accuracy,
                classifier_steps=self.config.classifier_steps,
            )
        neighbour = None
        if self.data.is_image:
            test = np.asarray(datasets.to_float(self.data.test[:NUM_NEIGHBOURS], levels=self.data.levels))
            neighbour = float(np.median(self.neighbours(test)[1]))
        return SecondStage(
            rows=rows,
            members=[each.result for of_seeds in examined.values() for under in of_seeds for each in under],
            quality=quality,
            test_neighbour_distance=neighbour,
            unit=self.summary.unit,
            num_seeds=self.swept.num_seeds,
            num_examples=len(split.train.mean) + len(split.held_out.mean),
            num_held_out=len(split.held_out.mean),
            num_test_examples=len(self.data.test),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            jax=jax.__version__,
        )

    def draw(self, folder: Path, examined: Mapping[str, Sequence[Under]], echo: Callable[[str], None]) -> None:
        """Writes the figures of the first seed of each row."""
        test = np.asarray(datasets.to_float(self.data.test[:NUM_POINTS], levels=self.data.levels))
        pictures = {
            row: {each.result.prior: (each.samples, each.means) for each in under} for row, under in examined.items()
        }
        planes = {row: {each.result.prior: each.z for each in under} for row, under in examined.items()}
        drawings: dict[str, Callable[[], figures.Figure]] = {
            "samples": lambda: figures.by_prior(pictures, test, unit=self.summary.unit),
            "latents": lambda: figures.latent_planes(planes),
        }
        if self.data.is_image:
            drawings["neighbours"] = lambda: figures.strips(self.beside(examined))
        report.write_figures(folder, drawings, echo=echo)

    def beside(self, examined: Mapping[str, Sequence[Under]]) -> list[tuple[str, np.ndarray]]:
        """Strips of generated means of each row under its best prior, each above its nearest training images."""
        shown: list[tuple[str, np.ndarray]] = []
        for row, under in examined.items():
            best = max(under[:-1], key=lambda each: each.result.gain or 0.0)
            means = best.means[:NUM_SHOWN]
            index, _ = self.neighbours(means)
            nearest = np.stack([self.data.train[each] for each in index])
            shown += [
                (f"{row}\nmeans, {best.result.prior}", means),
                ("nearest\ntraining images", np.asarray(datasets.to_float(nearest, levels=self.data.levels))),
            ]
        return shown

    def _programs(self, variant: str, prior: str) -> Programs:
        vae = self.vaes[variant]
        if prior in self.fitters:
            vae = vae._replace(prior=self.fitters[prior].prior)
        return Programs(
            kl=jax.jit(vae.prior.kl),
            draw=jax.jit(lambda key, params: vae_lib.sample_prior(key, vae, params, num_samples=NUM_POINTS)),
            generate=realism.generator(vae),
            elbo=jax.jit(functools.partial(mean_elbo, vae)),
            evidence=jax.jit(
                lambda params, x, num_nodes: vae_lib.evidence(vae, params, x, num_nodes=num_nodes, reach=REACH),
                static_argnames="num_nodes",
            ),
        )


def mean_elbo(
    vae: vae_lib.VAE, keys: Key[Array, " N"], params: vae_lib.Params, x: Float[Array, "N *S"]
) -> Float[Array, " N"]:
    """The mean ELBO of each example over `NUM_DRAWS` draws of z, in nats."""

    def draw(index: Int[Array, ""]) -> Float[Array, " N"]:
        draw_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        return vae_lib.elbo(draw_keys, vae, params, x).elbo

    return jnp.mean(jax.lax.map(draw, jnp.arange(NUM_DRAWS)), axis=0)


def decoder(vae: vae_lib.VAE) -> Callable[..., realism.Generated]:
    """A function (params, key, z [N, L]) that gives samples x ~ p(x|z) and the means of p(x|z)."""

    @jax.jit
    def decode(params: vae_lib.Params, key: Key[Array, ""], z: Array, index: Array) -> tuple[Array, Array]:
        outputs = vae_lib.decode(vae, params, z)
        head, head_params = vae.likelihood, params["likelihood"]
        samples = head.sample(jax.random.fold_in(key, index[0]), head_params, outputs)
        return jnp.moveaxis(samples, 0, -1), jnp.moveaxis(head.mean(head_params, outputs), 0, -1)

    def decode_all(params: vae_lib.Params, key: Key[Array, ""], z: Float[np.ndarray, "N L"]) -> realism.Generated:
        chunks = evaluation.over_split(functools.partial(decode, params, key), z, chunk_size=realism.CHUNK)
        samples, means = (np.moveaxis(array, -1, 0) for array in chunks)
        return samples, means

    return decode_all


def title(member: Member) -> str:
    """The title of a member's row."""
    return next(iter(report.by_row([member])))


def gains(results: Sequence[StageMember]) -> str:
    """The gains in words."""
    fitted = [each for each in results if each.gain is not None and each.prior != STANDARD]
    return ", ".join(f"{each.prior} {each.gain:+.4f} nats" for each in fitted)


AVERAGED = [field.name for field in dataclasses.fields(Staged) if field.name not in ("variant", "prior")]


def stage_row(members: Sequence[StageMember]) -> StageRow:
    """The mean over seeds, with the standard deviation of ELBO and gain."""
    first = members[0]
    names = [name for name in AVERAGED if getattr(first, name) is not None]
    columns = {name: [getattr(member, name) for member in members] for name in names}
    mean: dict[str, Any] = {name: np.mean(values, axis=0).tolist() for name, values in columns.items()}
    mean |= {f"{name}_sd": statistics.stddev(columns[name]) for name in ("elbo", "gain") if name in columns}
    return StageRow(variant=first.variant, prior=first.prior, num_seeds=len(members), **mean)


def table(stage: SecondStage) -> str:
    """The results as tables with notes."""
    parts = [tables.second_stage(stage).text()]
    if stage.quality is not None:
        parts.append(tables.realism(stage.quality).text())
    return "\n\n".join(parts)


def define_flags() -> None:
    options.define(Config, latents.GROUPS)
    command.define_places()
    with command.group("the data"):
        flags.DEFINE_string("dataset", None, "the file or folder of a run on data of your own")


def main() -> None:
    config = Config(**options.read(Config))
    run(config=config, **command.values(("run_dir", "dataset", "data_dir", "manual_dir", "celeba_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("second_stage", main)
