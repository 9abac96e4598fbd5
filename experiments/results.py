"""The results of the experiments: typed, and the only code that knows how they stand in a JSON file.

ELBOs, their parts and bounds are in nats; sigmas, errors and lengths in the data's unit.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from lvae_jax import runs
from lvae_jax.datasets import Form

POINTS = "points"  # the kind of data without grey levels; the others are `evaluation.Kind`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A set of named results. A field that is None by default does not apply where it is None: files leave it out."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as JSON has them."""
        return {
            field.name: _to_json(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.default is not None or getattr(self, field.name) is not None
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; names that are no fields are ignored.

        Raises:
          TypeError: a field without a default is missing, or a value is not of the type of its field.
        """
        # Newer versions add fields with defaults: files of older and of newer ones can be read.
        kinds = typing.get_type_hints(cls)
        known = [field.name for field in dataclasses.fields(cls) if field.name in values]
        return cls(**{name: _from_json(kinds[name], values[name]) for name in known})


AnyResult = TypeVar("AnyResult", bound=Result)


def _to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    return value.to_json() if isinstance(value, Result) else value


def _from_json(kind: Any, value: Any) -> Any:
    """`value` as a field of the type `kind`: a JSON value, or a `Result`, one or None or a list of them."""
    if not fits(kind, value):
        raise TypeError(f"not of the type {kind}")
    result = _result_in(kind)
    if result is None or value is None:
        return value
    return [result.from_json(each) for each in value] if isinstance(value, list) else result.from_json(value)


def _result_in(kind: Any) -> type[Result] | None:
    """The class of results of which values of the type `kind` consist, if they do."""
    if isinstance(kind, type) and issubclass(kind, Result):
        return kind
    return next((found for part in typing.get_args(kind) if (found := _result_in(part)) is not None), None)


def fits(kind: Any, value: Any) -> bool:
    """Tells whether a JSON value can be one of the type `kind`: tuples are lists there, a `Result` an object."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(parts[0], each) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(parts[1], each) for each in value.values())
    if parts:
        return any(fits(part, value) for part in parts)
    if isinstance(value, bool):
        return kind is bool
    if issubclass(kind, Result):
        return isinstance(value, dict)
    return isinstance(value, (int, float) if kind is float else kind)


def read(file: Path, kind: type[AnyResult]) -> AnyResult:
    """The results in a JSON file.

    Raises:
      runs.RunError: the file is missing, damaged or of an older version.
    """
    try:
        return kind.from_json(runs.read_json(file))
    except TypeError:
        raise runs.RunError(
            f"{file} is damaged or of an older version: move it, and repeat the command that wrote it"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Result):
    """The results of a trained model of a sweep, or their means over seeds.

    Attributes:
      variant: its name in `VARIANTS`.
      sigma: that of a fixed sigma, else `sigma_mean`.
      diagnosis: see `diagnostics.diagnosis`.
      elbo ... sigma_max: see `vae.Scores`.
      active_units ... residual_stddev: see `diagnostics.Diagnostics`.
      best_sigma: the root mean squared error.
      code_elbo, code_importance_bound: of the probabilities of grey levels, whatever was trained.
      importance_bound: see `vae.importance_bound`.
      model_gap, posterior_gap, evidence_error: the true log p(x) less the model's; the model's less the ELBO; the error
        of the quadrature for both.
      curve_distance, noise_kept, sliced_wasserstein: see `domains.toy_measures`.
      alignment: see `domains.alignment`.
      sharpness, sample_noise: see `domains.image_measures`.
    """

    variant: str
    sigma: float
    diagnosis: str
    elbo: float
    log_likelihood: float
    kl: float
    mse: float
    sigma_min: float
    sigma_mean: float
    sigma_max: float
    active_units: float
    active_directions: float
    floor_fraction: float
    sigma_factor: float
    residual_mean: float
    residual_stddev: float
    best_sigma: float
    code_elbo: float | None = None
    importance_bound: float | None = None
    code_importance_bound: float | None = None
    evidence_error: float | None = None
    model_gap: float | None = None
    posterior_gap: float | None = None
    curve_distance: float | None = None
    noise_kept: float | None = None
    sliced_wasserstein: float | None = None
    alignment: float | None = None
    sharpness: float | None = None
    sample_noise: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member(Scored):
    """A trained model of a sweep.

    Attributes:
      group, member: its place in metrics.jsonl and among the checkpoints.
      latent_kl, coverage: see `diagnostics.Diagnostics`.
      band_widths: see `domains.toy_measures`.
    """

    seed: int
    group: str
    member: int
    latent_kl: list[float]
    coverage: list[float]
    band_widths: list[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Scored):
    """The mean over the members of a row, which differ in their seeds.

    Attributes:
      elbo_sd: the standard deviation of the ELBO over seeds, 0 for a single one.
      elbo_paper: see `evaluation.paper_elbo`; None for probabilities.
      nats_per_dimension ... is_code: see `evaluation.Rate`; None for points. The bits are those of probabilities where
        these are known.
      importance_bits_per_dimension: the same of the importance-weighted bound.
      gap: the mean true log p(x) of the test examples less the ELBO.
      best_elbo: the largest ELBO of any networks at this sigma, an interval; None where sigma is not one number.
      sigma_gap: the part of the gap that this sigma imposes on any networks, an interval.
    """

    num_seeds: int
    elbo_sd: float
    elbo_paper: float | None = None
    nats_per_dimension: float | None = None
    bits_per_dimension: float | None = None
    bound: float | None = None
    is_code: bool | None = None
    importance_bits_per_dimension: float | None = None
    gap: float | None = None
    best_elbo: list[float] | None = None
    sigma_gap: list[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve(Result):
    """A conditioned model read at each of T sigmas of its range: the means over the first test examples.

    Attributes:
      sigma, elbo, kl, mse: [T]; see `vae.Scores`.
    """

    variant: str
    seed: int
    sigma: list[float]
    elbo: list[float]
    kl: list[float]
    mse: list[float]

    @property
    def best_sigma(self) -> float:
        """The sigma of the largest ELBO: the top of the parabola through the three highest points, over log sigma."""
        log_sigma, elbo = np.log(self.sigma), np.array(self.elbo)
        middle = min(max(int(elbo.argmax()), 1), len(elbo) - 2)
        near = slice(middle - 1, middle + 2)
        curvature, slope, _ = np.polyfit(log_sigma[near] - log_sigma[middle], elbo[near], 2)
        if curvature >= 0.0:  # the highest point is at an end
            return self.sigma[int(elbo.argmax())]
        top = -0.5 * slope / curvature
        return float(np.exp(np.clip(log_sigma[middle] + top, log_sigma[0], log_sigma[-1])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyMeasures(Result):
    """Figs. 4, 6 and 7 in numbers, in lengths of the toy: see `domains.toy_measures`."""

    curve_distance: float
    noise_kept: float
    band_widths: list[float]
    sliced_wasserstein: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Result):
    """The exact limits of a data set whose density is known: its entropy, and the measures of true points."""

    entropy: float | None = None
    true_measures: ToyMeasures | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Limits):
    """A finished sweep.

    Attributes:
      shape: of an example; `num_dimensions` is its product.
      levels: the number of grey levels; None for data without them.
      centre, scale: see `datasets.Form`; None where no scaling was needed.
      missing: the fraction of the test examples' values that are missing; None where none may be.
      prior: its name in `priors.PRIORS`; None for N(0, I).
      kind: one of `evaluation.Kind`, or `POINTS`.
      histograms: bits per dimension of `evaluation.histograms`; empty for points.
      curves: of conditioned models; None without any.
    """

    rows: list[Row]
    members: list[Member]
    dataset: str
    shape: list[int]
    levels: int | None
    kind: str
    num_dimensions: int
    latent_size: int
    num_test_examples: int
    num_importance_samples: int
    num_evidence_examples: int
    histograms: dict[str, float] = dataclasses.field(default_factory=dict)
    unit: str
    device: str
    jax: str
    centre: list[float] | None = None
    scale: float | None = None
    missing: float | None = None
    prior: str | None = None
    curves: list[Curve] | None = None

    @property
    def form(self) -> Form:
        """All that a model has to know of the data."""
        form = Form(tuple(self.shape), self.levels, masked=self.missing is not None)
        if self.scale is None or self.centre is None:
            return form
        return form._replace(centre=np.array(self.centre), scale=self.scale)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """As `Result.from_json`; runs from before the number of levels was recorded have 8 bits."""
        if not values.get("rows"):
            raise TypeError("a sweep has rows")
        return super().from_json({"levels": None if values.get("kind") == POINTS else 256} | dict(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SphereResult(Result):
    """The results of a trained model on a sphere, or their means over seeds.

    Attributes:
      dim: of the space that holds the sphere.
      start, relative_sigma: sigma at the start and at the end, in units of the critical one.
      radius, posterior_radius: mean norm of the decoder's outputs, z drawn from the prior, or from the posterior of the
        test examples.
      exact_radius, exact_elbo: those of Theorem 1 for this sigma and ideal networks.
    """

    variant: str
    dim: int
    sigma: float
    start: float
    relative_sigma: float
    radius: float
    posterior_radius: float
    exact_radius: float
    exact_elbo: float
    elbo: float
    kl: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SphereMember(SphereResult):
    """A trained model on a sphere."""

    seed: int
    log_likelihood: float
    mse: float
    sigma_min: float
    sigma_mean: float
    sigma_max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SphereRow(SphereResult):
    """The mean over seeds, with the standard deviations of radius and ELBO, 0 for a single seed."""

    num_seeds: int
    radius_over_seeds_sd: float
    elbo_over_seeds_sd: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SphereSummary(Result):
    """A finished run of `experiments.hypersphere`."""

    rows: list[SphereRow]
    members: list[SphereMember]
    num_test_examples: int
    device: str
    jax: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directions(Result):
    """The principal directions that a decoder can use at one sigma.

    Attributes:
      directions: the number of principal stddevs above sigma.
      linear_elbo: the largest ELBO of a linear VAE.
      trained_...: the fields of the `Row` of an F-VAE with this sigma, if one was trained.
    """

    sigma: float
    directions: int
    linear_elbo: float
    trained_active_units: float | None = None
    trained_active_directions: float | None = None
    trained_elbo: float | None = None
    trained_elbo_sd: float | None = None
    trained_num_seeds: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalSigma(Result):
    """A finished run of `experiments.critical_sigma`.

    Attributes:
      critical_sigma: the largest of `principal_stddevs`.
      mean_sigma: the root of the mean variance.
      correlation, chance: see `theory.Spread`. These and `mean_sigma` are None for runs from before they were computed.
    """

    critical_sigma: float
    mean_sigma: float | None = None
    correlation: float | None = None
    chance: float | None = None
    principal_stddevs: list[float]
    rows: list[Directions]
    dataset: str
    num_dimensions: int
    num_examples: int
    unit: str
    jax: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Realism(Result):
    """How real a set of images looks: the mean over seeds, and the standard deviation if there are several.

    Attributes:
      row: the name of the set.
      classifier_frechet_distance, precision, recall: see `quality.score`.
    """

    row: str
    classifier_frechet_distance: float
    precision: float
    recall: float
    classifier_frechet_distance_sd: float | None = None
    precision_sd: float | None = None
    recall_sd: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality(Result):
    """The content of quality.json.

    Attributes:
      classifier_accuracy: on the test split.
      prior: the name of a fitted prior, of which z was drawn; None for that of the models.
      second_stage: the hash of the results of the second stage that has fitted it.
    """

    rows: list[Realism]
    num_images: int
    num_seeds: int
    classifier_accuracy: float
    classifier_steps: int
    prior: str | None = None
    second_stage: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Result):
    """The results of a trained model with z from one prior, or their means over seeds.

    Attributes:
      prior: the name of the fitted prior, "N(0, I)", or "q(z)", the posteriors of the test examples in its place: the
        best that a prior can give. That has no ELBO.
      elbo, kl: under this prior.
      gain: the ELBO less that under N(0, I).
      information: a lower and an upper bound on the mutual information of x and z, the part of the KL that no prior
        saves; the upper one is the smallest KL of all priors. See `evaluation.information_bound`.
      neighbour_distance: the median of the root mean square distance of means from their nearest training images.
      sliced_wasserstein: of samples from the test points.
      gap: the true log p(x) less the ELBO under N(0, I), which is the sum of the part that this prior closes,
        prior_gap, and of two that are left: model_gap and posterior_gap, see `Scored`.
    """

    variant: str
    sigma: float
    prior: str
    elbo: float | None = None
    gain: float | None = None
    kl: float | None = None
    information: list[float] | None = None
    neighbour_distance: float | None = None
    sliced_wasserstein: float | None = None
    gap: float | None = None
    prior_gap: float | None = None
    model_gap: float | None = None
    posterior_gap: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageMember(Staged):
    """A trained model with z from one prior."""

    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRow(Staged):
    """The mean over seeds, with standard deviations, 0 for a single seed."""

    num_seeds: int
    elbo_sd: float | None = None
    gain_sd: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondStage(Result):
    """A finished run of `experiments.second_stage`.

    Attributes:
      quality: of samples and means, None without labels.
      test_neighbour_distance: that of test images, see `Staged`.
      num_examples, num_held_out: training examples whose codes were used, and those of them that were held out.
    """

    rows: list[StageRow]
    members: list[StageMember]
    quality: Quality | None = None
    test_neighbour_distance: float | None = None
    unit: str
    num_seeds: int
    num_examples: int
    num_held_out: int
    num_test_examples: int
    device: str
    jax: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadroomRow(Result):
    """The gain of one kind of covariance over a row of a sweep, the mean over its seeds.

    Attributes:
      kind: see `headroom.headroom`.
      nats, bits: the gain in nats, and in bits per dimension.
      nats_sd: over seeds, 0 for a single one.
      error: the standard error over test examples, of the first seed.
    """

    variant: str
    sigma: float
    kind: str
    nats: float
    nats_sd: float
    bits: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headroom(Result):
    """A finished run of `experiments.headroom`.

    Attributes:
      num_train, num_test: examples to whose residuals covariances were fitted, and those on which they were judged.
    """

    rows: list[HeadroomRow]
    num_seeds: int
    num_train: int
    num_test: int
    dequantised: bool
    device: str
    jax: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen(Result):
    """A member of a sweep that generated."""

    variant: str
    sigma: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(Result):
    """The content of generated.json.

    Attributes:
      run: the directory of the sweep, where it was then.
      summary: the SHA-256 hash of its summary.json; None for files from before it was recorded.
      shape, unit: of the data, and so of all arrays.
      images: the SHA-256 hash of the reconstructed examples, None without any.
      files: the names of the files of each of `members`, without their endings.
      prior: the name of the fitted prior that z comes from; None for that of the models.
    """

    run: str
    summary: str | None = None
    shape: list[int]
    unit: str
    num_samples: int
    key_seed: int
    images: str | None
    members: list[Chosen]
    files: list[str]
    prior: str | None = None

    def same(self, other: Self) -> bool:
        """Tells whether both are the same choice from the same run, wherever the run lies."""
        if self.summary is None or other.summary is None:
            return dataclasses.replace(self, summary=None) == dataclasses.replace(other, summary=None)
        return dataclasses.replace(self, run=other.run) == other
