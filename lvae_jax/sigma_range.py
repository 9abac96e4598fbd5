"""One VAE for a whole range of sigma: encoder and decoder are told the sigma of the head `likelihoods.fixed`.

  lv.mlp_vae((2,), lv.fixed(), latent_size=2, sigma_range=lv.SigmaRange(0.01, 1.0))

Each example of a batch has sigmas of its own in training. A trained model then gives the ELBO, the rate and the
distortion at every sigma of its range: `vae.with_likelihood` sets it. Multi-Rate VAE (Bae et al., ICLR 2023) does this
for the weight of the KL; here every point has a limit that is known exactly, such as `toy.best_elbo`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Training goes beyond both ends by this factor: a network is worst at the edge of what it has seen.
MARGIN = 1.5
NUM_DRAWS = 2  # sigmas at which a step sees each example: one run learns what takes many
_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


class SigmaRange(NamedTuple):
    """The sigmas from `low` to `high`, in units of the data.

    >>> sigmas = SigmaRange(0.01, 1.0)
    >>> sigmas.condition(jnp.log(jnp.array([0.01, 0.1, 1.0]))).round(3).ravel()
    Array([-4.605,  0.   ,  4.605], dtype=float32)
    """

    low: float
    high: float

    def check(self) -> None:
        """Raises if these are no limits of a range.

        Raises:
          ValueError: not 0 < low < high < inf.
        """
        if not 0.0 < self.low < self.high < math.inf:
            raise ValueError(f"a range of sigma needs 0 < low < high, got {self.low} and {self.high}")

    def condition(self, log_stddev: Float[Array, "*N"]) -> Float[Array, "N 1"]:
        """The condition that tells networks one log sigma, or one for each example: log sigma^2, 0 in the middle."""
        return 2.0 * log_stddev.reshape(-1, 1) - math.log(self.low * self.high)

    def draw(self, key: Key[Array, ""], index: Int[Array, " B"]) -> Float[Array, " B"]:
        """log sigma for the examples with these indices in a batch: uniform over the range and a margin beyond, and
        together evenly spread."""
        low, high = math.log(self.low / MARGIN), math.log(self.high * MARGIN)
        # Multiples of the golden ratio, shifted together: the first B are evenly spread for every B.
        fraction = (jax.random.uniform(key) + _GOLDEN * index.astype(jnp.float32)) % 1.0
        return low + (high - low) * fraction

    def weight(self, log_stddev: Float[Array, " B"]) -> Float[Array, " B"]:
        """The weights of examples in the loss, sigma / high. Any positive function of sigma leaves each sigma's best
        networks alone; with equal weights, the noise of the smallest sigmas' gradients, which grows as 1 / sigma, would
        drown those of all others."""
        return jnp.exp(log_stddev - math.log(self.high))

    def posterior(
        self, mean: Float[Array, "B L"], log_stddev: Float[Array, "B L"], log_sigma: Float[Array, "*N"]
    ) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
        """The mean and the log stddev of q(z|x) at one log sigma, or one for each example, from what the encoder says.

        It is the product of N(0, 1) and of what x tells about z, a Gaussian with this mean and a stddev in proportion
        to sigma, `log_stddev` at the high end. A linear decoder has such a posterior. Dimensions that are of no use at
        a large sigma keep the prior there, and are in use at a small one.
        """
        log_ratio = 2.0 * (math.log(self.high) - log_stddev - log_sigma.reshape(-1, 1))
        return jax.nn.sigmoid(log_ratio) * mean, -0.5 * jax.nn.softplus(log_ratio)
