"""How real the images of a finished sweep look: samples and means of p(x|z), z from the prior, beside the test split.

  python -m experiments.quality --run_dir=RUN

trains a small classifier on the labels of the run's training images, and prints for each row of the run the Frechet
distance, the precision and the recall of its features, between as many generated images and the whole test split. As a
yardstick, the same for as many training images. They go to RUN/quality.json; the same command reports them again.

With --prior=flow, z comes from that prior, fitted by experiments.second_stage, and the file is quality-flow.json.

The numbers belong to this classifier: they compare the rows of a table, and are no FIDs.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command, latents, realism, report, results, sweep, tables
from experiments.realism import Generated
from experiments.results import Quality, Summary
from lvae_jax import datasets, runs


def run(
    run_dir: str | None,
    *,
    classifier_steps: int = 1000,
    prior: str | None = None,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    echo: Callable[[str], None] = print,
) -> Quality:
    """Scores a finished run of `sigma_sweep` on images with labels, or reports the scores in RUN/quality.json again.

    Raises:
      command.UsageError, runs.RunError, datasets.DatasetError: as their docstrings say; nothing has been written then.
    """
    if run_dir is None:
        raise command.UsageError("--run_dir: give the directory of a finished run of experiments.sigma_sweep")
    if classifier_steps < 1:
        raise command.UsageError(f"--classifier_steps={classifier_steps}: must be at least 1")
    path = command.path("run_dir", run_dir)
    config, summary = sweep.read_run(path)
    if config.fake_data or not sweep.domain(config).has_levels:
        what = "with --fake_data" if config.fake_data else f"of the {config.dataset}"
        raise command.UsageError(f"--run_dir={path}: a run {what}, give one of real images with labels, like digits")
    file = path / ("quality.json" if prior is None else f"quality-{prior}.json")
    fitted = None
    if prior is not None:
        latents.read(path)  # says at once if there is none
        fitted = latents.digest(path / latents.FOLDER)
    if file.exists():
        quality = results.read(file, Quality)
        if quality.classifier_steps != classifier_steps:
            steps = quality.classifier_steps
            raise command.UsageError(
                f"{file} was made with --classifier_steps={steps}: give the same, or move the file"
            )
        if quality.second_stage != fitted:
            raise command.UsageError(f"{file} is of a prior that has been fitted anew since: move the file")
        echo(table(quality))
        return quality
    places: dict[str, Any] = command.paths(data_dir=data_dir, manual_dir=manual_dir)
    labels = datasets.labels(config.dataset, **places)
    dataset = datasets.load(config.dataset, **sweep.data_options(config), **places)
    realism.check_size(path, dataset)
    drawn = generators(path, config, summary, prior=prior)
    judge = realism.train_judge(dataset, labels, num_steps=classifier_steps)
    rows = [realism.training_row(judge, dataset)]
    for title, part in report.by_row(summary.members).items():
        pairs = [drawn[member.group, member.sigma](num_samples=len(dataset.test)) for member in part]
        for kind, of_members in zip(("samples", "means"), zip(*pairs, strict=True), strict=True):
            rows.append(realism.row(f"{title}: {kind}", [judge.score(generated) for generated in of_members]))
    quality = Quality(
        rows=rows,
        num_images=len(dataset.test),
        num_seeds=config.num_seeds,
        classifier_accuracy=judge.accuracy,
        classifier_steps=classifier_steps,
        prior=prior,
        second_stage=fitted,
    )
    runs.write_json(file, quality.to_json())
    echo(table(quality))
    return quality


def generators(
    path: Path, config: sweep.Config, summary: Summary, *, prior: str | None = None
) -> dict[tuple[str, float], Callable[..., Generated]]:
    """Functions (num_samples=N), one for each member by the name of its group and its sigma, as `realism.generator` has
    them; under the fitted `prior` of that name, if any.

    Raises:
      runs.RunError: a checkpoint is missing or damaged, or there is no such prior.
    """
    model = functools.partial(latents.model, path, config, form=summary.form, prior=prior)
    found: dict[tuple[str, float], Callable[..., Generated]] = {}
    programs: dict[str, Callable[..., Generated]] = {}
    for member in summary.members:
        vae, params = model(member=member)
        if member.variant not in programs:  # one for all seeds: their models are the same function of the parameters
            programs[member.variant] = realism.generator(vae)
        found[member.group, member.sigma] = functools.partial(programs[member.variant], params, member.seed)
    return found


def table(quality: Quality) -> str:
    """The scores as a table with a note."""
    return tables.realism(quality).text()


def define_flags() -> None:
    command.define_places(celeba=False)
    latents.define_prior()
    with command.group("the classifier"):
        flags.DEFINE_integer("classifier_steps", 1000, "gradient steps of the classifier, 128 images each")


def main() -> None:
    run(**command.values(("run_dir", "prior", "classifier_steps", "data_dir", "manual_dir")))


if __name__ == "__main__":
    define_flags()
    command.start("quality", main)
