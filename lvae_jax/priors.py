"""Priors p(z) of the latent variables [B, L], in nats. The VAE's default is `standard_normal`, N(0, I).

The others learn: jointly with the networks, or as a second stage, fitted to the aggregate posterior q(z), the mean of
q(z|x) over the data. With encoder and decoder unchanged, a prior p2 in place of N(0, I) changes the ELBO by exactly
E_q(z) log p2(z) - E_q(z) log N(z; 0, I). No prior saves the rest of the KL, which is the mutual information of x and z:

  E_x KL(q(z|x) || p) = I(x; z) + KL(q(z) || p)

(Hoffman and Johnson, ELBO surgery, 2016). So the best gain on N(0, I) is KL(q(z) || N(0, I)).
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lvae_jax import gaussians

Params = dict[str, Any]


class Prior(NamedTuple):
    """A prior as pure functions of its parameters, which the VAE keeps under the key prior, if it has any.

    Attributes:
      init: key -> params, a (possibly empty) dict of arrays.
      log_prob: (params, z [B, L]) -> [B], log p(z) in nats.
      kl: (params, mean [B, L], log_stddev [B, L], z [B, L]) -> [B], KL(q || p) in nats for q = N(mean, diag stddev^2),
        in closed form or by its draws z: `sampled_kl`.
      sample: (key, params, (B, L)) -> z [B, L].
    """

    init: Callable[[Key[Array, ""]], Params]
    log_prob: Callable[[Params, Float[Array, "B L"]], Float[Array, " B"]]
    kl: Callable[[Params, Float[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]], Float[Array, " B"]]
    sample: Callable[[Key[Array, ""], Params, tuple[int, int]], Float[Array, "B L"]]


def standard_normal() -> Prior:
    """N(0, I), with the KL in closed form."""

    def log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, " B"]:
        return _standard_log_prob(z)

    def kl(
        params: Params, mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], z: Float[Array, "B L"]
    ) -> Float[Array, " B"]:
        # The closed form does not need the draws z, and has no sampling noise.
        return jnp.sum(gaussians.kl_to_standard(mean, log_stddev), axis=-1)

    def sample(key: Key[Array, ""], params: Params, shape: tuple[int, int]) -> Float[Array, "B L"]:
        return jax.random.normal(key, shape)

    return Prior(lambda key: {}, log_prob, kl, sample)


def sampled_kl(
    log_prior: Float[Array, " B"], mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], z: Float[Array, "B L"]
) -> Float[Array, " B"]:
    """KL(q || N(0, I)) + log N(z; 0, I) - log p(z) in nats, [B]: unbiased for KL(q || p), q = N(mean, diag stddev^2),
    if z is drawn from q. `log_prior` is log p(z). For priors whose KL has no closed form."""
    # log q(z) - log p(z) has the same mean, but the noise of log q(z), too: that of half a chi squared of L degrees.
    to_standard = jnp.sum(gaussians.kl_to_standard(mean, log_stddev), axis=-1)
    # The brackets keep the bits of the closed form where p is N(0, I).
    return to_standard + (_standard_log_prob(z) - log_prior)


def gaussian(latent_size: int) -> Prior:
    """N(m, C C^T) with a full covariance, and the KL in closed form. It begins as N(0, I); `fit_gaussian` fits it.

    Its parameters are mean [L], log_scale [L], the logarithms of the diagonal of the lower triangle C, and below
    [L, L], whose part below the diagonal is that of C.
    """

    def init(key: Key[Array, ""]) -> Params:
        return _only(_unit_components(jnp.zeros((1, latent_size), jnp.float32)))

    def log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, " B"]:
        return _component_log_prob(_as_component(params), z)[0]

    def kl(
        params: Params, mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], z: Float[Array, "B L"]
    ) -> Float[Array, " B"]:
        factor, unit = _factor(_as_component(params))[0], jnp.eye(latent_size, dtype=mean.dtype)
        inverse = jax.scipy.linalg.solve_triangular(factor, unit, lower=True)
        trace = jnp.exp(2.0 * log_stddev) @ jnp.sum(inverse**2, axis=0)
        distance = jnp.sum(((mean - params["mean"][None]) @ inverse.T) ** 2, axis=-1)
        log_ratio = jnp.sum(params["log_scale"]) - jnp.sum(log_stddev, axis=-1)
        return 0.5 * (trace + distance - latent_size) + log_ratio

    def sample(key: Key[Array, ""], params: Params, shape: tuple[int, int]) -> Float[Array, "B L"]:
        noise = jax.random.normal(key, shape, jnp.float32)
        return params["mean"][None] + noise @ _factor(_as_component(params))[0].T

    return Prior(init, log_prob, kl, sample)


def mixture(latent_size: int, num_components: int) -> Prior:
    """A mixture of K = `num_components` Gaussians with full covariances; `fit_mixture` fits it. It begins with equal
    weights and unit covariances around K draws from N(0, I).

    Its parameters are those of `gaussian` with a leading axis K, and log_weight [K], the logarithms of the weights up
    to a constant.

    Raises:
      ValueError: there is no component.
    """
    if num_components < 1:
        raise ValueError(f"num_components must be at least 1, got {num_components}")

    def init(key: Key[Array, ""]) -> Params:
        # Means of zero would be equal for ever: equal components have equal gradients.
        components = _unit_components(jax.random.normal(key, (num_components, latent_size), jnp.float32))
        return components | {"log_weight": jnp.zeros(num_components, jnp.float32)}

    def log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, " B"]:
        log_weight = jax.nn.log_softmax(params["log_weight"])
        return jax.nn.logsumexp(log_weight[:, None] + _component_log_prob(params, z), axis=0)

    def sample(key: Key[Array, ""], params: Params, shape: tuple[int, int]) -> Float[Array, "B L"]:
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, params["log_weight"], shape=shape[:1])
        noise = jax.random.normal(noise_key, shape, jnp.float32)
        # Every component turns all the noise, of which each draw takes its own: a factor for each draw would be larger.
        turned = jnp.einsum("kij,bj->kbi", _factor(params), noise)
        return params["mean"][k] + jnp.take_along_axis(turned, k[None, :, None], axis=0)[0]

    return Prior(init, log_prob, _by_draws(log_prob), sample)


def flow(latent_size: int, *, num_layers: int = 8, width: int = 128) -> Prior:
    """The distribution of N(0, I) noise after `couplings`: a normalising flow. It begins as N(0, I), to the bit.

    Raises:
      ValueError: as `couplings` says.
    """
    layers = couplings(latent_size, num_layers=num_layers, width=width)

    def log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, " B"]:
        noise, log_volume = layers.to_noise(params, z)
        return _standard_log_prob(noise) + log_volume

    def sample(key: Key[Array, ""], params: Params, shape: tuple[int, int]) -> Float[Array, "B L"]:
        return layers.from_noise(params, jax.random.normal(key, shape, jnp.float32))

    return Prior(layers.init, log_prob, _by_draws(log_prob), sample)


class Bijection(NamedTuple):
    """An invertible map between noise and z, as pure functions of its parameters.

    Attributes:
      init: key -> params.
      to_noise: (params, z [B, L]) -> (noise [B, L], log |det d noise / d z| [B]).
      from_noise: (params, noise [B, L]) -> z [B, L], the inverse.
    """

    init: Callable[[Key[Array, ""]], Params]
    to_noise: Callable[[Params, Float[Array, "B L"]], tuple[Float[Array, "B L"], Float[Array, " B"]]]
    from_noise: Callable[[Params, Float[Array, "B L"]], Float[Array, "B L"]]


class _Conditioner(nn.Module):
    """Shift and log scale, each [B, num_outputs], from the part of z that a coupling layer leaves alone."""

    num_outputs: int
    width: int

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array]:
        for _ in range(2):
            h = nn.silu(nn.Dense(self.width)(h))
        # Zeros make the layer the identity at first.
        shift, scale = jnp.split(nn.Dense(2 * self.num_outputs, kernel_init=nn.initializers.zeros)(h), 2, axis=-1)
        # A factor from e^-2 to e^2 for each layer: no draw far from the data overflows.
        return shift, 2.0 * jnp.tanh(0.5 * scale)


def couplings(latent_size: int, *, num_layers: int, width: int) -> Bijection:
    """Affine coupling layers (Dinh et al., Density estimation using Real NVP, ICLR 2017): each scales and shifts half
    of the dimensions by what an MLP of this width makes of the others. The halves are drawn anew for each pair of
    layers, the second of which changes what the first leaves alone. The map begins as the identity.

    Raises:
      ValueError: there are fewer than two latent dimensions, or no layer.
    """
    if latent_size < 2:
        raise ValueError("a flow couples latent dimensions, and needs two or more: take a mixture for one")
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    # The halves belong to the architecture, as a kernel's size does, so that they are the same for every seed.
    rng = np.random.default_rng(0)
    halves: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(-(-num_layers // 2)):
        first, second = np.array_split(rng.permutation(latent_size), 2)
        halves += [(np.sort(first), np.sort(second)), (np.sort(second), np.sort(first))]
    layers = [(f"layer_{index}", kept, changed) for index, (kept, changed) in enumerate(halves[:num_layers])]

    def conditioner(params: Params, name: str, z: Array, kept: np.ndarray, changed: np.ndarray) -> tuple[Array, Array]:
        shift, log_scale = _Conditioner(len(changed), width).apply(params[name], z[:, kept])
        return shift, log_scale

    def init(key: Key[Array, ""]) -> Params:
        keys = jax.random.split(key, len(layers))
        return {
            name: _Conditioner(len(changed), width).init(keys[index], jnp.zeros((1, len(kept)), jnp.float32))
            for index, (name, kept, changed) in enumerate(layers)
        }

    def to_noise(params: Params, z: Float[Array, "B L"]) -> tuple[Float[Array, "B L"], Float[Array, " B"]]:
        log_volume = jnp.zeros(len(z), z.dtype)
        for name, kept, changed in reversed(layers):
            shift, log_scale = conditioner(params, name, z, kept, changed)
            z = z.at[:, changed].set((z[:, changed] - shift) * jnp.exp(-log_scale))
            log_volume = log_volume - jnp.sum(log_scale, axis=-1)
        return z, log_volume

    def from_noise(params: Params, noise: Float[Array, "B L"]) -> Float[Array, "B L"]:
        z = noise
        for name, kept, changed in layers:
            shift, log_scale = conditioner(params, name, z, kept, changed)
            z = z.at[:, changed].set(z[:, changed] * jnp.exp(log_scale) + shift)
        return z

    return Bijection(init, to_noise, from_noise)


def fit_gaussian(mean: Float[np.ndarray, "N L"], log_stddev: Float[np.ndarray, "N L"]) -> Params:
    """The parameters of the `gaussian` that has the moments of the aggregate posterior, the mean of the N Gaussians
    q(z|x) of these means and log stddevs: of all Gaussian priors, the one with the largest ELBO on these examples. Its
    gain is exact, without a draw of z.

    Raises:
      ValueError: a value is not finite.
    """
    mean, log_stddev = np.asarray(mean, np.float64), np.asarray(log_stddev, np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(log_stddev).all()):
        raise ValueError("means and log stddevs must be finite")
    centre = mean.mean(axis=0)
    between = (mean - centre[None]).T @ (mean - centre[None]) / len(mean)
    within = np.exp(2.0 * log_stddev).mean(axis=0)
    return _only(_components_of(centre[None], (between + np.diag(within))[None]))


def fit_mixture(z: Float[np.ndarray, "N L"], *, num_components: int, seed: int = 0) -> Params:
    """The parameters of the `mixture` of so many components that scikit-learn's expectation maximisation finds for
    draws z of the aggregate posterior; `seed` decides where it starts.

    Raises:
      ValueError: a value is not finite, or the draws are fewer than L + 1 for each component.
    """
    import sklearn.exceptions
    import sklearn.mixture

    z = np.asarray(z, np.float64)
    needed = num_components * (z.shape[1] + 1)
    if len(z) < needed:
        raise ValueError(f"{num_components} components in {z.shape[1]} dimensions need {needed} draws, got {len(z)}")
    if not np.isfinite(z).all():
        raise ValueError("draws of z must be finite")
    model = sklearn.mixture.GaussianMixture(num_components, random_state=seed)
    with warnings.catch_warnings():
        # Short of its maximum the likelihood is still that of a normalised prior.
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        model.fit(z)
    with np.errstate(divide="ignore"):
        log_weight = np.maximum(np.log(model.weights_), math.log(np.finfo(np.float32).tiny))
    components = _components_of(model.means_, model.covariances_)
    return components | {"log_weight": jnp.asarray(log_weight, jnp.float32)}


def widened(params: Params, *, dims: Int[np.ndarray, " D"], latent_size: int) -> Params:
    """The parameters of the `gaussian` or `mixture` of L = `latent_size` dimensions that is the one with these
    parameters along the dimensions `dims`, in rising order, and N(0, I) along all others. To fit only the dimensions
    that a model uses takes less time, and no chance correlation with an unused one is learned."""
    along, matrix = (..., dims), (..., dims[:, None], dims)

    def zeros(like: Array, num_axes: int) -> Array:
        return jnp.zeros(like.shape[:-1] + num_axes * (latent_size,), like.dtype)

    return params | {
        "mean": zeros(params["mean"], 1).at[along].set(params["mean"]),
        "log_scale": zeros(params["log_scale"], 1).at[along].set(params["log_scale"]),
        "below": zeros(params["mean"], 2).at[matrix].set(params["below"]),
    }


STANDARD_NORMAL = standard_normal()

PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard_normal": lambda latent_size: STANDARD_NORMAL,
    "gaussian": gaussian,
    "mixture": functools.partial(mixture, num_components=10),
    "flow": flow,
}
"""The priors by name: latent size -> prior. Of those that learn, parameters that are all zero mean N(0, I)."""


def _standard_log_prob(z: Float[Array, "B L"]) -> Float[Array, " B"]:
    # Scalars broadcast: no array of zeros is made.
    return jnp.sum(gaussians.log_prob(z, jnp.zeros(()), jnp.zeros(())), axis=-1)


def _by_draws(log_prob: Callable[[Params, Array], Array]) -> Callable[[Params, Array, Array, Array], Array]:
    """The `kl` of a prior without closed form."""
    return lambda params, mean, log_stddev, z: sampled_kl(log_prob(params, z), mean, log_stddev, z)


def _only(components: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[0], components)


def _as_component(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[None], params)


def _unit_components(mean: Float[Array, "K L"]) -> Params:
    zeros = jnp.zeros_like(mean)
    return {"mean": mean, "log_scale": zeros, "below": jnp.zeros((*mean.shape, mean.shape[1]), mean.dtype)}


def _components_of(mean: Float[np.ndarray, "K L"], covariance: Float[np.ndarray, "K L L"]) -> Params:
    factor = np.linalg.cholesky(covariance)
    values = {
        "mean": mean,
        "log_scale": np.log(np.diagonal(factor, axis1=1, axis2=2)),
        "below": np.tril(factor, -1),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def _factor(params: Params) -> Float[Array, "K L L"]:
    """The lower triangles C."""
    scale = jnp.exp(params["log_scale"])
    return jnp.tril(params["below"], -1) + scale[:, None] * jnp.eye(scale.shape[1], dtype=scale.dtype)[None]


def _component_log_prob(params: Params, z: Float[Array, "B L"]) -> Float[Array, "K B"]:
    """log N(z; m_k, C_k C_k^T) in nats."""
    centred = z[None] - params["mean"][:, None]
    noise = jax.scipy.linalg.solve_triangular(_factor(params), centred.mT, lower=True)
    log_probs = jnp.sum(gaussians.log_prob(noise, jnp.zeros(()), jnp.zeros(())), axis=1)
    return log_probs - jnp.sum(params["log_scale"], axis=-1)[:, None]
