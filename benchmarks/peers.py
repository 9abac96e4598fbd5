"""Times a training step beside that of the same LS-VAE in PyTorch: `python -m benchmarks.peers`.

PyTorch comes with `pip install -e '.[bench]'`. Each measurement is a process of its own, as a command is one; those of
the peers alternate. Equal networks, batches of 100 examples, gradients clipped to a global norm, Adam with a cosine
schedule; PyTorch has its fused Adam. It prints a table, and --json keeps all that was measured.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lvae_jax as lv
from experiments import sizes, tables

BATCH = 100
OURS = "lvae_jax"
# Each peer, and the options of `torch_steps`.
PEERS: dict[str, dict[str, bool]] = {
    OURS: {},
    "PyTorch": {"compiled": False, "channels_last": False},
    "torch.compile": {"compiled": True, "channels_last": False},
    "torch.compile, channels last": {"compiled": True, "channels_last": True},  # for images alone
}


class Network(NamedTuple):
    """A pair of networks to compare.

    Attributes:
      shape: of an example.
      latent_size: L.
      options: of `lv.mlp_vae` or, for images, `lv.conv_vae`.
      steps: in each block that is timed.
      fused: steps in each call of ours, as commands train such data.
    """

    shape: tuple[int, ...]
    latent_size: int
    options: dict[str, Any]
    steps: int
    fused: int = 1


NETWORKS = {
    "toy": Network((2,), 2, {"width": 200, "num_blocks": 4}, 50, fused=10),
    "mnist": Network((28, 28, 1), 256, {"widths": (32, 64, 64), "num_blocks": 4}, 5),
    "celeba": Network((64, 64, 3), 2048, {"widths": (64, 128, 256, 256), "num_blocks": 5}, 1),
    "smoke": Network((5, 6, 1), 2, {"widths": (2, 3), "num_blocks": 1}, 2),
}


class Measurement(NamedTuple):
    """What one process measured: the number of parameters, seconds until the first block was done, milliseconds of a
    step in each block, and for ours the floating-point operations of a step as XLA counts them."""

    num_parameters: int
    first: float
    steps: list[float]
    num_operations: float | None = None


def our_steps(network: Network) -> tuple[int, Callable[[], Any], float | None]:
    """The number of parameters, a function that takes the steps of a block, for whose result `float` waits, and the
    number of operations of a step."""
    sizes.keep()  # as all commands do
    make = lv.conv_vae if len(network.shape) == 3 else lv.mlp_vae
    vae = make(network.shape, lv.learned_scalar(), latent_size=network.latent_size, **network.options)
    optimizer = lv.optimizer(10_000)
    state = jax.jit(lambda key: lv.init_state(key, vae, optimizer))(jax.random.key(0))
    program = functools.partial(lv.train_steps, vae=vae, optimizer=optimizer)
    steps = jax.jit(program, donate_argnames="state")
    batches, key = jnp.asarray(np.stack([batch(network)] * network.fused)), jax.random.key(1)
    one = jax.jit(program).lower(key, state=state, batches=batches[:1]).cost_analysis() or {}

    def take() -> Any:
        nonlocal state
        for _ in range(network.steps // network.fused):
            state, metrics = steps(key, state=state, batches=batches)
        return metrics.scores.elbo[-1]

    return sum(leaf.size for leaf in jax.tree.leaves(state.params)), take, one.get("flops")


def torch_steps(network: Network, *, compiled: bool, channels_last: bool) -> tuple[int, Callable[[], Any]]:
    """The number of parameters and the function of PyTorch, on its GPU if there is one."""
    import torch

    from benchmarks import torch_vae

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = torch_vae.learned_scalar_vae(network.shape, network.latent_size, **network.options).to(device)
    x = torch.from_numpy(batch(network)).to(device)
    if len(network.shape) == 3:
        x = x.permute(0, 3, 1, 2).contiguous()
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
            vae = vae.to(memory_format=torch.channels_last)
    step = torch_vae.training(vae, 10_000, compiled=compiled)

    def take() -> Any:
        for _ in range(network.steps):
            loss = step(x)
        return loss

    return sum(parameter.numel() for parameter in vae.parameters()), take


def batch(network: Network) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(BATCH, *network.shape)).astype(np.float32)


def measure(peer: str, network: Network, num_blocks: int) -> Measurement:
    """Times a peer in this process."""
    start = time.perf_counter()
    num_operations = None
    if peer == OURS:
        num_parameters, take, num_operations = our_steps(network)
    else:
        num_parameters, take = torch_steps(network, **PEERS[peer])
    float(take())
    first = time.perf_counter() - start
    steps = []
    for _ in range(1 + num_blocks):
        start = time.perf_counter()
        float(take())
        steps.append(1e3 * (time.perf_counter() - start) / network.steps)
    del steps[0]  # caches and memory were not yet warm
    return Measurement(num_parameters, first, steps, num_operations)


def matrix_rate(size: int = 2048) -> float:
    """Floating-point operations per second of a product of two square matrices in float32, as XLA computes it."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def in_process(*arguments: str) -> Any:
    """What this program prints as JSON in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, peers: list[str], *, rounds: int, num_blocks: int) -> dict[str, list[Measurement]]:
    """The measurements of each peer on a network, one for each round; peers alternate."""
    if len(NETWORKS[name].shape) == 1:
        peers = [peer for peer in peers if not PEERS[peer].get("channels_last")]
    measured: dict[str, list[Measurement]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            measured[peer].append(
                Measurement(*in_process(f"--worker={peer}", f"--networks={name}", f"--blocks={num_blocks}"))
            )
            print(f"{name}, {peer}: {statistics.median(measured[peer][-1].steps):.2f} ms", file=sys.stderr, flush=True)
    counts = {peer: measurements[0].num_parameters for peer, measurements in measured.items()}
    if len(set(counts.values())) > 1:
        sys.exit(f"the networks differ in their numbers of parameters: {counts}")
    return measured


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def rows(name: str, measured: dict[str, list[Measurement]], rate: float) -> list[list[str]]:
    """The lines of the table for a network."""
    medians = {peer: [statistics.median(one.steps) for one in ones] for peer, ones in measured.items()}
    ours = medians.get(OURS)
    operations = next((one.num_operations for ones in measured.values() for one in ones if one.num_operations), None)
    lines = []
    for peer, ones in measured.items():
        ratio = spread([theirs / our for theirs, our in zip(medians[peer], ours, strict=True)], 2) if ours else ""
        part = f"{operations / (1e-3 * statistics.median(medians[peer]) * rate):.0%}" if operations else ""
        lines.append([name, peer, spread(medians[peer], 1), ratio, part, spread([one.first for one in ones], 1)])
    return lines


HEADER = ["networks", "by", "step [ms]", "time against ours", "of the matrix rate", "first block [s]"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="toy,mnist,celeba", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--peers", default=";".join(PEERS), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each peer")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of steps in a process")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--worker", choices=[*PEERS, "matrix"], help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(argv)
    names, peers = options.networks.split(","), options.peers.split(";")
    for what, values, known in (("networks", names, NETWORKS), ("peers", peers, PEERS)):
        if unknown := set(values) - set(known):
            flags.error(f"--{what}: unknown {', '.join(sorted(unknown))}: give some of {', '.join(known)}")
    if min(options.rounds, options.blocks) < 1:
        flags.error("--rounds and --blocks must be at least 1")
    if options.json and not options.json.absolute().parent.is_dir():
        flags.error(f"--json: there is no folder {options.json.absolute().parent}")
    if options.worker:
        rated = options.worker == "matrix"
        print(json.dumps(matrix_rate() if rated else measure(options.worker, NETWORKS[names[0]], options.blocks)))
        return
    if set(peers) - {OURS} and importlib.util.find_spec("torch") is None:
        flags.error("PyTorch is not installed: pip install -e '.[bench]', or give --peers=lvae_jax")
    versions = {name: importlib.metadata.version(name) for name in ("jax", *(["torch"] if set(peers) - {OURS} else []))}
    rate = statistics.median([in_process("--worker=matrix") for _ in range(options.rounds)])
    measured = {name: compare(name, peers, rounds=options.rounds, num_blocks=options.blocks) for name in names}
    table = [line for name in names for line in rows(name, measured[name], rate)]
    device = jax.devices()[0].device_kind
    print(f"{platform.machine()}, {device}, {os.cpu_count()} cores, {versions}, {rate / 1e9:.0f} GFLOP/s in products")
    print(tables.grid(HEADER, table))
    if options.json:
        kept = {
            name: {peer: [one._asdict() for one in ones] for peer, ones in of.items()} for name, of in measured.items()
        }
        options.json.write_text(json.dumps({"versions": versions, "matrix_rate": rate, "measured": kept}, indent=1))


if __name__ == "__main__":
    main()
