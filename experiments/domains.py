"""The kinds of data that a sweep knows, one record for each: all that depends on the kind and not on the model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.programs import Pictures
from experiments.results import Limits, ToyMeasures
from lvae_jax import datasets, figures, measures, ribbon, toy
from lvae_jax import vae as vae_lib
from lvae_jax.keys import of_seed

Measures = dict[str, list[Any]]
"""Values by name, one for each of M members."""


class Domain(NamedTuple):
    """A kind of data.

    Attributes:
      make_vae: (shape, likelihood, latent_size and options of the networks) -> the paper's VAE for such data.
      network: --widths -> the options of the networks that give them their sizes.
      one_width: --widths has one value.
      has_levels: its values are grey levels, which have probabilities.
      alone: members are trained one by one, and devices share their batches. A vmapped convolution with a kernel for
        each member is a grouped one, which is slow.
      num_pictures: test examples that are reconstructed, and samples that are drawn, for the measures.
      num_in_panels, num_in_gallery: the number of them in a figure of the sweep, and in one of a single model; None for
        all.
      draw: the figure of panels.
      measure: (pictures [M, ...], their originals, dataset) -> measures of the pictures.
      limits: (dataset) -> the exact limits of the data, as far as they are known.
      log_prob: x [B, *S] -> log p(x) of the true density in nats, [B]; None if it is not known.
      best_elbo: (sigma) -> the largest mean ELBO of any networks at this fixed sigma in nats, an interval; None if it
        is not known.
    """

    make_vae: Callable[..., vae_lib.VAE]
    network: Callable[[Sequence[int]], dict[str, Any]]
    one_width: bool
    has_levels: bool
    alone: bool
    num_pictures: int
    num_in_panels: int | None
    num_in_gallery: int | None
    draw: Callable[..., figures.Figure]
    measure: Callable[[Pictures, np.ndarray, datasets.Dataset], Measures]
    limits: Callable[[datasets.Dataset], Limits]
    log_prob: Callable[[Any], Any] | None = None
    best_elbo: Callable[[float], tuple[float, float]] | None = None


def image_measures(pictures: Pictures, originals: np.ndarray, dataset: datasets.Dataset) -> Measures:
    """The sharpness of reconstructions and the noise of samples; none for images without any detail or interior."""
    # Sharpness is relative to the originals: constant images have none.
    data = jnp.asarray(originals)
    if min(data.shape[1:3]) < 3 or not measures.laplacian_energy(data).any():
        return {}
    pairs = zip(*map(jnp.asarray, (pictures.samples, pictures.sample_means)), strict=True)
    return {
        "sharpness": [measures.sharpness(jnp.asarray(mean), data) for mean in pictures.reconstructions],
        "sample_noise": [measures.sample_noise(samples, means) for samples, means in pairs],
    }


def toy_measures(reconstructions: np.ndarray, samples: np.ndarray, x: np.ndarray, test: np.ndarray) -> ToyMeasures:
    """Figs. 4, 6 and 7 in numbers, in lengths of the toy: the root mean square distance of reconstructions of x from
    the curve, the part of the noise of x that they keep, and the widths of the band of samples in the three regions and
    their sliced Wasserstein distance from the test points."""
    points = jnp.asarray(reconstructions)
    # The distance from the curve itself, not from the point on it that made x: noise along the curve is no error.
    gap = points - toy.curve(toy.nearest(points))
    return ToyMeasures(
        curve_distance=float(jnp.sqrt(jnp.mean(jnp.sum(gap**2, axis=-1)))),
        noise_kept=float(toy.noise_kept(points, jnp.asarray(x))),
        band_widths=np.asarray(toy.band_widths(jnp.asarray(samples)), np.float64).tolist(),
        sliced_wasserstein=measures.sliced_wasserstein(of_seed(0), samples, test),
    )


def _measure_toy(pictures: Pictures, originals: np.ndarray, dataset: datasets.Dataset) -> Measures:
    pairs = zip(pictures.reconstructions, pictures.samples, strict=True)
    measured = [toy_measures(*pair, originals, dataset.test).to_json() for pair in pairs]
    columns = {name: [of_member[name] for of_member in measured] for name in measured[0]}
    return columns | alignments(pictures, lambda x: toy.tangent(toy.nearest(x)))


def _measure_ribbon(pictures: Pictures, originals: np.ndarray, dataset: datasets.Dataset) -> Measures:
    tangents = alignments(pictures, lambda x: ribbon.across(ribbon.nearest(x)))
    return point_measures(pictures, originals, dataset) | tangents


def alignments(pictures: Pictures, direction: Callable[[Any], Any]) -> Measures:
    """How well tangents find the direction of the data, for each member: the mean over reconstructions of |Q^T t|, with
    t = direction(x) [B, n] of unit length and Q an orthonormal basis of the tangents. It is the cosine of the angle
    between t and their span; none for models without tangents."""
    if pictures.axes is None:
        return {}
    found = []
    for axes, x in zip(pictures.axes, pictures.reconstructions, strict=True):
        basis = axes / np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-12)
        true = np.asarray(direction(jnp.asarray(x)))
        found.append(float(np.mean(np.linalg.norm(np.einsum("bnk,bn->bk", basis, true), axis=-1))))
    return {"alignment": found}


def point_measures(pictures: Pictures, originals: np.ndarray, dataset: datasets.Dataset) -> Measures:
    """The sliced Wasserstein distance of samples from the test points."""
    distance = functools.partial(measures.sliced_wasserstein, of_seed(0))
    return {"sliced_wasserstein": [distance(samples, dataset.test) for samples in pictures.samples]}


def toy_limits(dataset: datasets.Dataset) -> Limits:
    """The entropy, and the measures of as many true points in the place of reconstructions and of samples: those of a
    model that copies, and of a perfect one."""
    # Other points than those of the test split, which has the key itself.
    key = jax.random.fold_in(of_seed(datasets.TEST_SEED), 1)
    true = np.asarray(dataset.batch(None, key, jnp.arange(TOY.num_pictures)))
    return Limits(entropy=toy.entropy(), true_measures=toy_measures(true, true, true, dataset.test))


TOY = Domain(
    make_vae=vae_lib.mlp_vae,
    network=lambda widths: {"width": widths[0]},
    one_width=True,
    has_levels=False,
    alone=False,
    num_pictures=1000,
    num_in_panels=None,
    num_in_gallery=None,
    draw=figures.plane_panels,
    measure=_measure_toy,
    limits=toy_limits,
    log_prob=toy.log_prob,
    best_elbo=toy.best_elbo,
)
RIBBON = TOY._replace(
    draw=figures.space_panels,
    measure=_measure_ribbon,
    limits=lambda dataset: Limits(entropy=ribbon.entropy()),
    log_prob=ribbon.log_prob,
    best_elbo=None,
)
IMAGES = Domain(
    make_vae=vae_lib.conv_vae,
    network=lambda widths: {"widths": widths},
    one_width=False,
    has_levels=True,
    alone=True,
    num_pictures=100,
    num_in_panels=12,
    num_in_gallery=64,
    draw=figures.image_panels,
    measure=image_measures,
    limits=lambda dataset: Limits(),
)


POINTS = TOY._replace(
    draw=figures.point_panels,
    measure=point_measures,
    limits=lambda dataset: Limits(),
    log_prob=None,
    best_elbo=None,
)
SYNTHETIC = {"toy": TOY, "ribbon": RIBBON}
OWN = {"points": POINTS, "images": IMAGES, "float images": IMAGES._replace(has_levels=False)}
"""The kinds of data in files of one's own, by name."""


def of(name: str, kind: str | None = None) -> Domain:
    """The kind of the data set called `name`, in `OWN` the name of that of data in files."""
    if kind is not None:
        return OWN[kind]
    return SYNTHETIC.get(name, IMAGES)
