"""One number for each head: the ELBO of a batch after five steps of training. It is right by definition, and shows that
the numbers of every run have changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvae_jax import datasets, likelihoods, networks, toy, training
from lvae_jax.keys import example_keys
from lvae_jax.vae import VAE

BATCH, STEPS = 32, 5

# name: the head, the shape of its data, and the mean ELBO in nats. Images have random grey levels.
CASES = {name: (make, toy.SHAPE) for name, make in likelihoods.HEADS.items()} | {
    "scheduled": (lambda sigma: likelihoods.fixed(optax.exponential_decay(1.0, STEPS, 0.1, end_value=0.1)), toy.SHAPE),
    "tangent": (lambda sigma: likelihoods.tangent(likelihoods.learned_vector(sigma), rank=2), toy.SHAPE),
    "discretised": (lambda sigma: likelihoods.discretised(likelihoods.learned_vector(sigma)), (4, 4, 1)),
}
GOLDEN = {
    "f": -7.925502,
    "ls": -6.77318,
    "lv": -7.576349,
    "optimal": -3.46621,
    "logistic": -5.661037,
    "mixture": -4.919334,
    "scheduled": -183.96593,
    "tangent": -6.977777,
    "discretised": -101.074867,
}


def trained(make, shape):
    """The mean ELBO in nats of the batch after five steps, as a run of one sweep member computes it."""

    def vae(sigma):
        head, options = make(sigma), {"width": 8, "num_blocks": 1}
        encoder = networks.mlp_encoder(shape, 2, **options)
        return VAE(encoder, networks.mlp_decoder(shape, head.outputs, 2, **options), head, 2)

    images, batch = None, lambda examples, key, indices: toy.sample(example_keys(key, indices))
    if shape != toy.SHAPE:
        images = np.random.default_rng(0).integers(0, 256, (BATCH, *shape), dtype=np.uint8)
        batch = datasets.image_dataset(images, images).batch
        images = jnp.array(images)
    seeds, sigmas, optimizer = jnp.zeros(1, jnp.int32), jnp.full(1, 0.5), training.optimizer(100)
    indices = jnp.tile(jnp.arange(BATCH), (STEPS + 1, 1, 1))

    @jax.jit
    def run():
        states = training.members_init(seeds, sigmas, vae, optimizer)
        options = {"make_vae": vae, "optimizer": optimizer, "batch": batch}
        return training.members_steps(seeds, sigmas, states, images, indices, **options)[1]

    return float(run().scores.elbo[STEPS, 0])  # of the parameters before the sixth step


@pytest.mark.parametrize("name", sorted({*CASES, *GOLDEN}))
def test_training_gives_the_golden_number(name):
    assert name in CASES, f"{name} is gone: take it out of GOLDEN"
    elbo = trained(*CASES[name])
    assert name in GOLDEN, f'{name} has no golden number: add "{name}": {elbo:.6f} to GOLDEN'
    # CPUs with other instructions differ by 2e-7; a learning rate 1 % off makes 2e-5.
    assert elbo == pytest.approx(GOLDEN[name], rel=1e-5), (
        f"{name} trains to {elbo:.6f} nats, not {GOLDEN[name]:.6f}. The numbers of every run have changed, by the "
        "optimiser, the streams of random keys, the initialisation, the networks or the density. If that is what you "
        "want, say so in the commit, put this number into GOLDEN, and print those of the README and RESULTS.md again."
    )
