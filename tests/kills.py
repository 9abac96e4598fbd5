"""Kills runs at random moments: the same command must bring each to the bits of the run that was left alone.

  python -m tests.kills
  python -m tests.kills --number=3 --seed=7

Tiny runs on the toy, the digits and fake images are killed by SIGKILL, SIGTERM or SIGINT, some of them more than once,
then resumed to their end. metrics.jsonl, the numbers of summary.json and the final weights must be equal to the bit.
One line for each that differs; the last line counts: "100 of 100". The process fails if one differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOY = ("--variants=f,ls,replay", "--num_seeds=2", "--num_steps=400", "--widths=8", "--num_blocks=1", "--batch_size=8")
IMAGES = ("--variants=lv", "--num_seeds=1", "--num_steps=250", "--widths=4", "--num_blocks=1", "--latent_size=2")
RUNS = {
    "toy": TOY,
    "digits": ("--dataset=digits", "--batch_size=8", *IMAGES),
    "fake images": ("--dataset=celeb_a", "--fake_data", "--image_size=8", "--batch_size=8", *IMAGES),
}
# As `python -m experiments.sigma_sweep`, with more checkpoints: SIGKILL costs what was done since the last one.
PROGRAM = (
    "from experiments import signals; signals.exit_at_once('sigma_sweep'); "
    "import functools; from experiments import command, loop, sigma_sweep; "
    "sigma_sweep.run = functools.partial(sigma_sweep.run, pace=loop.Pace(checkpoint_seconds=0.3)); "
    "sigma_sweep.define_flags(); command.start('sigma_sweep', sigma_sweep.main)"
)
# Compiling is most of such a run: the first fills a cache for the others.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(words: tuple[str, ...], run_dir: Path) -> subprocess.Popen:
    """The command on its way, in silence."""
    command = [sys.executable, "-c", PROGRAM, *words, f"--run_dir={run_dir}"]
    output = open(run_dir.with_suffix(".txt"), "w")  # noqa: SIM115
    with output:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | QUICK, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )


def finish(words: tuple[str, ...], run_dir: Path) -> float:
    """Runs the command to its end; the seconds that it took."""
    began = time.monotonic()
    status = start(words, run_dir).wait()
    if status:
        raise RuntimeError(f"exit {status}: {run_dir.with_suffix('.txt').read_text()[-2000:]}")
    return time.monotonic() - began


def results(run_dir: Path) -> dict[str, object]:
    """What has to be equal: lines of metrics, the numbers of the summary, and the bytes of all final weights."""
    import jax
    import numpy as np

    from experiments import sweep

    config, summary = sweep.read_run(run_dir)
    variants = {member.group: member.variant for member in summary.members}
    weights = {
        group: [
            np.asarray(leaf).tobytes()
            for leaf in jax.tree.leaves(sweep.restore(run_dir, config, group, variant, summary.form))
        ]
        for group, variant in variants.items()
    }
    metrics = (run_dir / "metrics.jsonl").read_text()
    return {"metrics": metrics, "summary": summary.to_json(), "weights": weights}


def kill(words: tuple[str, ...], run_dir: Path, number: signal.Signals, seconds: float) -> str:
    """Starts or resumes the command, and sends it the signal after so many seconds; says what is wrong with its end."""
    process = start(words, run_dir)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, number)
        status = process.wait()
    printed = run_dir.with_suffix(".txt").read_text()
    if "Traceback" in printed or status not in (0, -number, 128 + number):
        return f"exit {status}: {printed[-2000:]}"
    return ""


def check(number: int, seed: int) -> int:
    """Kills so many runs, prints what differs, and returns how many did not."""
    draw, equal = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        QUICK["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, "cache"))
        whole: dict[str, tuple[float, dict[str, object]]] = {}
        for index in range(number):
            name = list(RUNS)[index % len(RUNS)]
            if name not in whole:
                path = Path(folder, name.replace(" ", "_"))
                whole[name] = finish(RUNS[name], path), results(path)
            seconds, expected = whole[name]
            path = Path(folder, str(index))
            kills = [(draw.choice(SIGNALS), draw.uniform(0.2, 1.0) * seconds) for _ in range(draw.choice((1, 1, 2)))]
            wrong = [text for signal_and_time in kills if (text := kill(RUNS[name], path, *signal_and_time))]
            finish(RUNS[name], path)
            found = results(path)
            wrong += [f"{what} differ" for what in expected if found[what] != expected[what]]
            equal += not wrong
            moments = ", ".join(f"{number.name} after {moment:.1f} s" for number, moment in kills)
            print(f"{index + 1}: {name}, {moments}: {'; '.join(wrong) or 'equal'}", flush=True)
    print(f"{equal} of {number}")
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100, help="how many runs to kill (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the signals and the moments (default: 0)")
    options = parser.parse_args()
    sys.exit(check(options.number, options.seed) != options.number)


if __name__ == "__main__":
    main()
