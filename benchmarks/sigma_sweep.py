"""Measures the speed that the sweep promises, against its bounds: `python -m benchmarks.sigma_sweep`, some 12 minutes.

Every figure is a median of several repetitions, with the smallest and the largest; ratios are of measurements that
alternate.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments import domains, sizes, variants
from lvae_jax import convolutions, datasets, training

BATCH = 100


def seconds(*arguments: str) -> tuple[float, float]:
    """The wall time of the command with these arguments, and that until its first progress."""
    start, first = time.perf_counter(), float("nan")
    command = [sys.executable, "-m", "experiments.sigma_sweep", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        seen = b""
        while chunk := process.stderr.read(4096):
            seen += chunk
            if b"ELBO" in seen and first != first:
                first = time.perf_counter() - start
    if (process.returncode == 0) == ("--sigma=0" in arguments):
        sys.exit(f"{' '.join(command)} exited with {process.returncode}: {seen.decode().splitlines()[-1]}")
    return time.perf_counter() - start, first


def sweep_steps(variant: str, num_members: int, num_fused: int) -> tuple[Callable[[], Any], list[int]]:
    """A function that takes `num_fused` steps of the toy's sweep members, and a list that grows with every trace."""
    dataset, optimizer, traces = datasets.toy_stream(), training.optimizer(1000), []

    def model(sigma: Any) -> Any:
        traces.append(num_members)
        return variants.make_vae(variant, domains.TOY, dataset.form, 2, sigma, sigma_range=(0.01, 1.0))

    program = functools.partial(training.members_steps, make_vae=model, optimizer=optimizer, batch=dataset.batch)
    steps = jax.jit(program, donate_argnums=2)
    seeds, sigmas = np.arange(num_members, dtype=np.int32), np.geomspace(1.0, 0.01, num_members)
    indices = np.broadcast_to(np.arange(BATCH, dtype=np.int32), (num_fused, num_members, BATCH)).copy()
    state = jax.jit(functools.partial(training.members_init, make_vae=model, optimizer=optimizer))(seeds, sigmas)
    traces.clear()

    def take() -> Any:
        nonlocal state
        state, metrics = steps(seeds, sigmas, state, None, indices)
        return metrics

    return take, traces


def image_step(variant: str = "lv") -> Callable[[], Any]:
    """A function, compiled, that takes a step of a variant on images of MNIST's shape."""
    dataset, optimizer = datasets.load("mnist", fake_data=True), training.optimizer(1000)
    vae = variants.make_vae(variant, domains.IMAGES, dataset.form, 256, 1.0)
    step = jax.jit(functools.partial(training.train_step, vae=vae, optimizer=optimizer), donate_argnames="state")
    state = training.init_state(jax.random.key(0), vae, optimizer)
    x, index = datasets.to_float(dataset.train[:BATCH]), jnp.arange(BATCH)

    def take() -> Any:
        nonlocal state
        state, metrics = step(jax.random.key(1), state=state, x=x, index=index)
        return metrics

    take()
    return take


def matrix_products() -> Callable[[], Any]:
    """One member's matrix products of one step and nothing else: forward, and backward to inputs and weights."""
    vae = variants.make_vae("f", domains.TOY, datasets.Form((2,)), 2, 0.1)
    params = (vae.encoder.init(jax.random.key(0)), vae.decoder.init(jax.random.key(1)))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    inputs = [jnp.ones((BATCH, kernel.shape[0])) for kernel in kernels]
    gradients = [jnp.ones((BATCH, kernel.shape[1])) for kernel in kernels]

    @jax.jit
    def products(kernels: list[Any], inputs: list[Any], gradients: list[Any]) -> Any:
        triples = list(zip(kernels, inputs, gradients, strict=True))
        return [h @ w for w, h, _ in triples], [g @ w.T for w, _, g in triples], [h.T @ g for _, h, g in triples]

    return lambda: products(kernels, inputs, gradients)


def alternate(
    functions: dict[str, Callable[[], Any]], *, calls: int = 50, repetitions: int = 7
) -> dict[str, list[float]]:
    """Milliseconds per call of each function, once compiled; `repetitions` times, in turn."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = function()
            jax.block_until_ready(result)
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return times


def report(what: str, values: list[float], unit: str, bound: str) -> None:
    spread = f"({min(values):.2f} to {max(values):.2f}, {len(values)} times)"
    print(f"{what:58}{statistics.median(values):9.2f} {unit:3} {spread}   {bound}", flush=True)


def main() -> None:
    sizes.keep()  # as all commands do
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(jax.devices())} device(s)")
    one, one_traces = sweep_steps("lv", 1, 1)
    ten, ten_traces = sweep_steps("lv", 10, 1)
    fused, _ = sweep_steps("lv", 1, 10)
    times = alternate({"one": one, "ten": ten, "products": matrix_products()})
    report("a step of one member", times["one"], "ms", "")
    report("a step of ten members", times["ten"], "ms", "")
    ratios = [a / b for a, b in zip(times["ten"], times["one"], strict=True)]
    report("a step of ten members / of one", ratios, "", "(the bound is on the whole run, below)")
    ratios = [a / b for a, b in zip(times["one"], times["products"], strict=True)]
    report("a step / its matrix products", ratios, "", "bound: 3")
    print(f"{'traces in ' + str(8 * 50) + ' steps':58}{max(len(one_traces), len(ten_traces)):9d}       bound: 1")
    times = alternate({"one": one, "fused": fused}, calls=10)
    ratios = [a / 10 / b for a, b in zip(times["fused"], times["one"], strict=True)]
    report("a step fused by scan, of ten / a single one", ratios, "", "below 1: fusing would pay")
    times = alternate({"f": sweep_steps("f", 1, 1)[0], "conditioned": sweep_steps("conditioned", 1, 1)[0]})
    ratios = [a / b for a, b in zip(times["conditioned"], times["f"], strict=True)]
    report("a step of a conditioned VAE / of an F-VAE", ratios, "", "bound: 2")
    ours = image_step()
    with mock.patch.object(convolutions, "by_products", return_value=False):
        theirs = image_step()
    times = alternate({"ours": ours, "theirs": theirs}, calls=5)
    report("a step on MNIST", times["ours"], "ms", "")
    ratios = [a / b for a, b in zip(times["theirs"], times["ours"], strict=True)]
    report("a step on MNIST, by XLA's convolutions / by products", ratios, "", "above 1: products pay")
    times = alternate({"lv": ours, "tangent": image_step("tangent_10")}, calls=5)
    ratios = [a / b for a, b in zip(times["tangent"], times["lv"], strict=True)]
    report("a step on MNIST, with ten tangents / without", ratios, "", "bound: 1.3")

    report("--help", [seconds("--help")[0] for _ in range(5)], "s", "bound: 3")
    report("a bad flag", [seconds("--sigma=0")[0] for _ in range(5)], "s", "bound: 3")
    with tempfile.TemporaryDirectory() as folder:
        wall, first = zip(*(seconds(f"--run_dir={folder}/{index}") for index in range(2)), strict=True)
        report("the default command until its first progress", list(first), "s", "bound: 15")
        report("the default command", list(wall), "s", "bound: 180")
        flags = ("--variants=f", "--num_seeds=1", "--num_steps=1000")
        sigmas = ",".join(f"{sigma:.4g}" for sigma in np.geomspace(1.0, 0.01, 10))
        ones, tens = [], []
        for index in range(3):
            ones.append(seconds(*flags, f"--run_dir={folder}/one-{index}")[0])
            tens.append(seconds(*flags, f"--sigma={sigmas}", f"--run_dir={folder}/ten-{index}")[0])
        report("whole run, ten members / one", [a / b for a, b in zip(tens, ones, strict=True)], "", "bound: 10")


if __name__ == "__main__":
    main()
