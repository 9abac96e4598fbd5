"""JAX's settings that users turn on for programs of their own: strict types, 64 bits, and the check for NaN."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lvae_jax as lv
from lvae_jax import datasets, likelihoods, measures, theory, toy

HEADS = {name: make(0.3) for name, make in lv.HEADS.items()} | {
    "schedule": lv.fixed(lambda step: 0.3 * jnp.exp(-0.1 * step.astype(jnp.float32))),
    "replay": lv.fixed(lv.replay(jnp.linspace(1.0, 0.1, 5))),
    "map": lv.learned_map((3,)),
    "tangent": lv.tangent(lv.learned_vector(), rank=2, ramp=optax.linear_schedule(0.0, 1.0, 5)),
    "scheduled": lv.learned_vector(balance=optax.linear_schedule(1.0, 0.0, 5), ramp=optax.linear_schedule(0.0, 1.0, 5)),
    "discretised": lv.discretised(lv.learned_vector()),
    "discretised mixture": lv.discretised(lv.mixture()),
    "rescaled": likelihoods.rescaled(lv.optimal(), centre=np.zeros(3), scale=2.0),
    "masked": lv.masked(lv.learned_scalar()),
}
SETTINGS = {
    "strict types": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "64 bits": functools.partial(jax.enable_x64, True),
    "check for NaN": functools.partial(jax.debug_nans, True),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains(name, setting):
    """With one trace, and no change of a type."""
    with SETTINGS[setting]():
        vae = lv.mlp_vae((3,), HEADS[name], latent_size=1, width=4, num_blocks=0)
        optimizer, traces = lv.optimizer(10, warmup_steps=2), []

        @jax.jit
        def step(key, state, x):
            traces.append(None)
            options = {"beta": optax.linear_schedule(0.0, 1.0, 5), "ema_decay": 0.9}
            state, metrics = lv.train_step(key, vae, optimizer, state, x, jnp.arange(4), **options)
            tighter = lv.importance_bound(jax.random.split(key, 4), vae, state.params, x, num_samples=2)
            return state, metrics, tighter, lv.generate(key, vae, state.params, num_samples=2)

        state = lv.init_state(jax.random.key(0), vae, optimizer, ema_decay=0.9)
        before = jax.tree.map(lambda leaf: leaf.dtype, state)
        for index in range(2):
            state, *results = step(jax.random.key(index), state, jnp.full((4, 3), 0.5))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == before
    assert len(traces) == 1


def test_networks_data_and_measures_run_under_strict_types():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
    with jax.numpy_dtype_promotion("strict"):
        for options in ({}, {"flip": True}, {"dequantized": True}):
            dataset = datasets.image_dataset(pixels, pixels, **options)
            x = dataset.batch(jnp.asarray(pixels), jax.random.key(0), jnp.arange(6))
        for dtype in (None, jnp.bfloat16):
            vae = lv.conv_vae((4, 4, 1), lv.fixed(), latent_size=1, widths=(2,), num_blocks=1, dtype=dtype)
            jax.eval_shape(
                lambda keys, params, x, vae=vae: lv.elbo(keys, vae, params, x).elbo,
                jax.random.split(jax.random.key(0), 6),
                jax.eval_shape(lambda vae=vae: lv.init(jax.random.key(0), vae)),
                x,
            )
        points = toy.sample(jax.random.split(jax.random.key(0), 30))
        assert np.isfinite(toy.band_widths(points)).all()
        assert np.isfinite(toy.log_prob(points)).all()
        assert np.isfinite(toy.noise_kept(points, points))
        assert np.isfinite(theory.best_elbo(0.3, dim=3))
        assert measures.sharpness(x, x) == pytest.approx(1.0)
        assert measures.sliced_wasserstein(jax.random.key(0), np.asarray(points), np.asarray(points)) == 0.0


SMALL = ("--num_seeds=1", "--num_blocks=1", "--num_steps=2")
DIGITS = ("--dataset=digits", "--widths=4,4", "--num_importance_samples=2", *SMALL)
VARIANTS = "f,ls,lv,optimal,replay,lv_star,mixture,tangent"
# Each command under one setting; the library runs under all of them above.
COMMANDS = {
    "JAX_NUMPY_DTYPE_PROMOTION=strict": (
        ("sigma_sweep", f"--variants={VARIANTS}", "--evidence", "--latent_size=1", "--widths=4", *SMALL),
        ("generate", "--num_samples=2"),
        ("headroom", "--num_train=100", "--num_test=100"),
    ),
    "JAX_ENABLE_X64=1": (
        ("sigma_sweep", "--variants=ls,lv_star,mixture", *DIGITS),
        ("quality", "--classifier_steps=2"),
        ("critical_sigma", "--dataset=digits"),
        ("sigma_sweep", "--dequantize", "--flip", "--variants=ls,tangent", *DIGITS),
    ),
    "JAX_DEBUG_NANS=1": (
        ("hypersphere", "--num_steps=2", "--num_seeds=1", "--dims=2,3", "--sigma=0.5,1.3"),
        ("sigma_sweep", "--density", "--variants=lv", "--bfloat16", "--ema_decay=0.9", *DIGITS),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", COMMANDS)
def test_every_command_runs_to_its_end(setting, tmp_path):
    """Those that read a finished run take that of the sweep before them."""
    for index, (name, *words) in enumerate(COMMANDS[setting]):
        reads = name in ("generate", "headroom", "quality")
        words.append(f"--run_dir={tmp_path / str(0 if reads else index)}")
        if name not in ("generate", "hypersphere"):
            words.append(f"--data_dir={tmp_path}/data")
        _run(setting, name, *words)


def _run(setting, name, *words):
    environment = os.environ | dict([setting.split("=")])
    command = [sys.executable, "-m", f"experiments.{name}", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
