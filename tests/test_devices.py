"""One device, four devices and two processes train to the same numbers, and continue each other's checkpoints.

The tests train on the one device that they have. Run as a program, this file trains on whatever devices there are.
"""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from experiments import command, hosts, loop, sigma_sweep
from experiments.programs import Group, Programs
from lvae_jax import datasets, likelihoods, networks, runs
from lvae_jax import vae as vae_lib

ROOT = Path(__file__).parents[1]
BATCH, STEPS, LATENT = 16, 6, 3


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    return datasets.image_dataset(pixels, pixels[:5])


def make_vae(head, shape, sigma):
    likelihood = head(sigma)
    return vae_lib.VAE(
        networks.mlp_encoder(shape, LATENT, width=8, num_blocks=1),
        networks.mlp_decoder(shape, likelihood.outputs, LATENT, width=8, num_blocks=1),
        likelihood,
        LATENT,
    )


def standard_vae(draws, shape, sigma):
    """Whatever x is, z is a standard normal draw; `draws` collects them."""
    likelihood = likelihoods.fixed(sigma)

    def encode(params, x):
        return jnp.zeros((len(x), LATENT)) * params, jnp.zeros((len(x), LATENT)) * params

    def decode(params, z):
        jax.debug.callback(lambda z: draws.append(np.asarray(z)), z)
        return jnp.broadcast_to(params, (len(z), *shape, 1))

    encoder = networks.Encoder(lambda key: jnp.zeros(()), encode)
    decoder = networks.Decoder(lambda key: jnp.zeros(()), decode)
    return vae_lib.VAE(encoder, decoder, likelihood, LATENT)


class Job:
    """A group, compiled once, to be trained as the experiments do."""

    def __init__(self, name, dataset, model, *, seeds=(0,), sigmas=(0.5,), ema_decay=0.0):
        self.traces = []
        self.dataset = dataset

        def traced(sigma):
            self.traces.append(sigma)
            return model(dataset.shape, sigma)

        self.programs = Programs(dataset, traced, num_steps=STEPS, beta=1.0, ema_decay=ema_decay)
        self.group = Group(name, np.asarray(seeds, np.int32), np.asarray(sigmas))

    def train(self, folder, **pace):
        folder.mkdir(parents=True, exist_ok=True)
        pace = loop.Pace(**pace)
        with tqdm.tqdm(disable=True) as bar:
            arguments = (folder, self.group, self.programs, loop.place(self.dataset, pace))
            return loop.fit(*arguments, num_steps=STEPS, batch_size=BATCH, bar=bar, pace=pace)

    def interrupt(self, folder):
        """Trains until the checkpoint of half of the steps has been made."""
        append = runs.append_metrics

        def stop(run_dir, lines):
            if lines[0]["step"] > STEPS // 2:
                raise KeyboardInterrupt
            append(run_dir, lines)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "append_metrics", stop)
            with pytest.raises(KeyboardInterrupt):
                self.train(folder, checkpoint_seconds=0.0)


# Ten members do not divide by four devices.
JOBS = {
    "lv": (images, likelihoods.learned_vector, {}),
    "optimal": (images, likelihoods.optimal, {"ema_decay": 0.9}),
    "members": (datasets.toy_stream, likelihoods.fixed, {"seeds": range(10), "sigmas": np.geomspace(1.0, 0.1, 10)}),
}


def train_all(folder):
    for name, (dataset, head, options) in JOBS.items():
        job = Job(name, dataset(), functools.partial(make_vae, head), **options)
        job.interrupt(folder / "interrupted")
        states, record = job.train(folder)
        leaves = {f"leaf{index}": leaf for index, leaf in enumerate(jax.tree.leaves(states))}
        np.savez(folder / f"{name}-{jax.process_index()}", record=record, traces=len(job.traces), **leaves)
        if name == "lv":
            streamed = {"resident_bytes": 0.0}
            assert loop.place(job.dataset, loop.Pace(**streamed)) is None
            found = job.train(folder / "streamed", **streamed)
            jax.tree.map(np.testing.assert_array_equal, found, (states, record))
    draws = []
    Job("draws", images(), functools.partial(standard_vae, draws)).train(folder / "draws")
    jax.effects_barrier()
    np.save(folder / f"draws-{jax.process_index()}", np.concatenate(draws))


def resume_all(folder):
    for name, (dataset, head, options) in JOBS.items():
        Job(name, dataset(), functools.partial(make_vae, head), **options).train(folder / "interrupted")


if __name__ == "__main__":
    to_train, to_resume, *process = sys.argv[1:]
    if process:
        hosts.connect(distributed=False, coordinator_address=process[0], num_processes=2, process_id=int(process[1]))
    train_all(Path(to_train))
    if to_resume:
        resume_all(Path(to_resume))


def start(*command, num_devices=1):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout, stderr


def free_address():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What was left by one device, by four, which went on with the interrupted jobs of the one, and the other way."""
    assert jax.device_count() == 1
    path = tmp_path_factory.mktemp("devices")
    folders = {name: path / name for name in ("one", "four")}
    for folder in folders.values():
        folder.mkdir()
    train_all(folders["one"])
    finish(start(__file__, *map(str, (folders["four"], folders["one"])), num_devices=4))
    resume_all(folders["four"])
    return folders


def metrics(folder, name):
    """[steps * members, fields], and the names of the fields."""
    lines = [line for line in runs.read_metrics(folder) if line["group"] == name]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    return np.array([[line[field] for field in lines[0] if field != "group"] for line in lines])


def arrays(folder, name, process=0):
    with np.load(folder / f"{name}-{process}.npz") as file:
        return dict(file)


def assert_same_training(folder, one, name):
    ours, theirs = metrics(folder, name), metrics(one, name)
    assert len(theirs) == STEPS * (10 if name == "members" else 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    ours, theirs = arrays(folder, name), arrays(one, name)
    assert ours.keys() == theirs.keys()
    for leaf in ours:
        np.testing.assert_allclose(ours[leaf], theirs[leaf], rtol=1e-4, atol=1e-4, err_msg=leaf)
    assert ours["traces"] == theirs["traces"] == 2, "init and steps, each once"


def draws(folder, num_processes=1):
    parts = [np.load(folder / f"draws-{process}.npy") for process in range(num_processes)]
    return np.concatenate(parts).reshape(-1, LATENT)


def assert_same_noise(folder, one, num_processes=1):
    """No two examples draw the same, and no device draws its own."""
    ours = draws(folder, num_processes)
    assert len(ours) == STEPS * BATCH
    assert len(np.unique(ours)) == STEPS * BATCH * LATENT
    np.testing.assert_allclose(np.sort(ours, axis=0), np.sort(draws(one), axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", JOBS)
def test_four_devices_train_as_one(folders, name):
    assert_same_training(folders["four"], folders["one"], name)


@pytest.mark.parametrize(("saved_on", "resumed_on"), [("one", "four"), ("four", "one")])
@pytest.mark.parametrize("name", JOBS)
def test_checkpoint_serves_other_devices(folders, saved_on, resumed_on, name):
    resumed = metrics(folders[saved_on] / "interrupted", name)
    np.testing.assert_allclose(resumed, metrics(folders[resumed_on], name), rtol=1e-4)


def test_noise_belongs_to_the_example(folders):
    assert_same_noise(folders["four"], folders["one"])


@pytest.mark.slow
def test_two_processes_train_as_one(folders, tmp_path):
    address = free_address()
    for process in [start(__file__, str(tmp_path), "", address, str(index)) for index in range(2)]:
        finish(process)
    for name in JOBS:
        assert_same_training(tmp_path, folders["one"], name)
        first, second = (arrays(tmp_path, name, process) for process in range(2))
        for leaf in first:
            np.testing.assert_array_equal(first[leaf], second[leaf])
    assert_same_noise(tmp_path, folders["one"], num_processes=2)


@pytest.mark.slow
def test_two_processes_run_the_command(tmp_path):
    flags = ["--num_steps=4", "--num_seeds=2", "--variants=ls", "--widths=8", "--num_blocks=1", "--batch_size=10"]
    words, address = ("-m", "experiments.sigma_sweep", *flags), free_address()
    pair = [
        start(
            *(*words, f"--run_dir={tmp_path / 'two'}", f"--coordinator_address={address}"),
            *("--num_processes=2", f"--process_id={process}"),
        )
        for process in range(2)
    ]
    (printed, _), (nothing, progress) = map(finish, pair)
    assert "LS-VAE" in printed
    assert all(line.startswith("[Gloo]") for line in nothing.splitlines()), "which its library prints"
    assert "step/s" not in progress
    finish(start(*words, f"--run_dir={tmp_path / 'one'}"))
    # What pmap and what jit compile may round differently.
    np.testing.assert_allclose(metrics(tmp_path / "two", "ls"), metrics(tmp_path / "one", "ls"), rtol=1e-5)
    two, one = (runs.read_json(tmp_path / name / "summary.json")["rows"][0] for name in ("two", "one"))
    assert two["elbo"] == pytest.approx(one["elbo"], rel=1e-5)


def test_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = sigma_sweep.configure(dataset="mnist", fake_data=True, batch_size=100)
    with pytest.raises(command.UsageError, match=r"--batch_size=100: the 8 devices .* give a multiple of 8"):
        sigma_sweep.check(config)
    sigma_sweep.check(config._replace(batch_size=96))


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(100, 1, 100), (100, 3, 25), (100, 30, 2), (100, 100, 1), (100, 10**9, 1), (7, 20, 1)],
)
def test_fitting_divisor(count, size, expected):
    assert loop.fitting_divisor(count, size, 100) == expected
    assert count % expected == 0


def test_loading_in_turn(monkeypatch):
    calls = []
    assert hosts.in_turn(lambda: calls.append(1) or "data") == "data"
    assert calls == [1]

    def broken():
        raise ValueError("no disk")

    with pytest.raises(ValueError, match="no disk"):
        hosts.in_turn(broken)
    # Another process hears from process 0 whether there are data, before it looks for them itself.
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 1)
    told = []
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda failed: told.append(failed) or np.True_)
    with pytest.raises(runs.RunError, match="process 0 could not load the data"):
        hosts.in_turn(lambda: pytest.fail("loaded"))
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda failed: np.False_)
    assert hosts.in_turn(lambda: "later") == "later"


def test_prefetch():
    def batches(first):
        if first == 7:
            raise OSError("no such block")
        return first * first

    assert list(loop.prefetch(batches, range(7))) == [first * first for first in range(7)]
    made = []
    for first in loop.prefetch(lambda first: made.append(first) or first, range(10)):
        assert len(made) <= first + 1 + loop.PREFETCH
    with pytest.raises(OSError, match="no such block"):
        list(loop.prefetch(batches, range(10)))
