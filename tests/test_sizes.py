"""Memory from shapes: estimates against arrays that were made, and the one line of a run that cannot fit."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import command, sigma_sweep, sizes, sweep
from lvae_jax import datasets, runs
from lvae_jax import vae as vae_lib

SMALL = sigma_sweep.configure(variants=("ls",))._replace(widths=(8,), num_blocks=1, num_seeds=2, num_steps=10)
FORM = datasets.Form((2,))


def test_layers_are_counted_wherever_they_are():
    def two(x, w):
        return jax.jit(jnp.dot)(jnp.dot(x, w), w) + 1.0

    x, w = np.ones((5, 3), np.float32), np.ones((3, 3), np.float32)
    assert sizes.layers(two, x, w) == 2 * 5 * 3 * 4
    assert sizes.layers(jax.vmap(two, in_axes=(0, None)), x[None].repeat(7, 0), w) == 7 * 2 * 5 * 3 * 4


def test_estimate_counts_what_is_made():
    params = vae_lib.init(jax.random.key(0), sweep.trained_vae(SMALL, "ls", FORM))
    records = 8 * 2 * 11
    # Of each example: 3 layers of 8 units in each network, the posterior's 4 numbers and the mean's 2.
    assert sweep.memory(SMALL, FORM) == 2 * (4 * sizes.nbytes(params) + 4 * 100 * (2 * 3 * 8 + 4 + 2)) + records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("widths", (10**9,)),
        ("latent_size", 10**9),
        ("batch_size", 10**9),
        ("num_steps", 2 * 10**9),
        ("num_importance_samples", 10**9),
    ],
)
def test_sizes_that_cannot_fit(tmp_path, monkeypatch, name, value):
    """Said before the directory is made; the line names the flag."""
    monkeypatch.setattr(sizes, "available", lambda: 16 * 2**30)
    text = ",".join(map(str, value)) if name == "widths" else value
    with pytest.raises(command.UsageError) as error:
        sigma_sweep.run(SMALL._replace(**{name: value}), run_dir=str(tmp_path / "run"))
    assert str(error.value).startswith(f"--{name}={text}: the run needs at least ")
    assert str(error.value).endswith("iB of memory, of 16 GiB: give less")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latent_size", 10**22),
        ("batch_size", 3 * 10**9),
        ("num_seeds", 2**31 - 1),
        ("num_steps", 10**10),
        ("num_blocks", 100_000),
    ],
)
def test_sizes_beyond_all_machines(name, value):
    with pytest.raises(command.UsageError, match=rf"^--{name}={value}: must be at least 1, and at most \d+$"):
        sigma_sweep.check(SMALL._replace(**{name: value}))


def test_failed_allocation_is_one_line():
    for failure in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating")):
        with pytest.raises(runs.RunError, match=r"has not enough memory: give less$") as error, sizes.told("give less"):
            raise failure
        assert "\n" not in str(error.value)
    with pytest.raises(jax.errors.JaxRuntimeError), sizes.told("give less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: another")


FAULTS = """
import resource
import jax, jax.numpy as jnp
from experiments import sizes
if {keep}:
    sizes.keep()
step = jax.jit(lambda x: jax.lax.map(lambda factor: factor * x, x).sum())
x = jnp.ones(6000)  # 144 MB of products
for _ in range(2):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_kept_memory_is_not_cleared_by_the_system_again():
    def faults(keep):
        program = subprocess.run(
            [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return int(program.stdout)

    assert faults(True) < 0.1 * faults(False)
