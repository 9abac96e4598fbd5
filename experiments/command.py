"""What all binaries share: bad flags end in one line, and a finished run is reported, not run again."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from experiments import loop
from lvae_jax import datasets, runs

flags.DEFINE_string("run_dir", None, "where everything is written (default: a name below runs/ made of the flags)")
flags.DEFINE_bool("distributed", False, "join the processes that a cluster started, as it describes them")
flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, to join processes by hand; all write to one shared --run_dir"
)
flags.DEFINE_integer("num_processes", None, "how many processes there are to join")
flags.DEFINE_integer("process_id", None, "which of them this is, from 0 on; process 0 writes and prints")


class UsageError(Exception):
    """The flags ask for something impossible; the message, one line, names the fix."""


def start(name: str, main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; the process ends with one line if the flags, the data or the run directory
    cannot be used."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(list(argv))
        except flags.Error as error:
            sys.exit(f"{name}: {' '.join(str(error).split())} (--help lists all flags)")
        if len(rest) > 1:
            sys.exit(f"{name}: unexpected argument {rest[1]!r} (--help lists all flags)")
        return rest

    def guarded(argv: Sequence[str]) -> None:
        del argv
        logging.set_verbosity(logging.ERROR)  # Orbax, TFDS and JAX narrate
        try:
            loop.connect(**values(("distributed", "coordinator_address", "num_processes", "process_id")))
            main()
        except (UsageError, datasets.DatasetError, runs.RunError) as error:
            sys.exit(f"{name}: {error}")
        except KeyboardInterrupt:
            sys.exit(
                f"{name}: interrupted; the same command goes on from its last checkpoint, or starts again without one"
            )

    app.run(guarded, flags_parser=parse)


def define_places(*, celeba: bool = True) -> None:
    """Defines the flags that say where data are: the folders of `datasets.load`."""
    flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data sets (default: ~/tensorflow_datasets)")
    flags.DEFINE_string("manual_dir", None, "folder with the data set's original archives, instead of downloading them")
    if celeba:
        flags.DEFINE_string(
            "celeba_dir", None, "folder of CelebA's aligned JPEGs, 000001.jpg to 202599.jpg, instead of TFDS's celeb_a"
        )


def values(names: Iterable[str]) -> dict[str, Any]:
    """The flags of these names."""
    return {name: getattr(flags.FLAGS, name) for name in names}


def numbers(name: str, texts: Iterable[str], kind: type = float) -> tuple[Any, ...]:
    """The numbers that the flag `name` lists.

    Raises:
      UsageError: one of them is none.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UsageError(f"--{name}={','.join(texts)}: every value must be a {what}") from None


def run_path(config: Any, name: str, run_dir: str | None) -> Path:
    """The directory asked for, or one below runs/ whose name is made of `name` and of what in the config, a NamedTuple,
    is not the default: the same command finds its run again, even if it has learned new flags since."""
    given = {key: value for key, value in config._asdict().items() if value != config._field_defaults[key]}
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    return Path(run_dir).expanduser() if run_dir else Path("runs", f"{name}_{digest}")


def run(
    config: Any,
    name: str,
    run_dir: str | None,
    *,
    compute: Callable[[Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    echo: Callable[[str], None],
) -> dict[str, Any]:
    """The summary of the finished run of this config, a NamedTuple of all flags with their defaults, or else what
    `compute(run directory)` returns, written there; echoed as a table either way.

    Raises:
      runs.RunError: the directory belongs to something else. Whatever `compute` raises.
    """
    if jax.process_index() != 0:
        echo = _silent
    path = run_path(config, name, run_dir)
    summary = runs.find_run(path, config._asdict(), defaults=config._field_defaults)
    if summary is not None:
        echo(f"{path} is finished")
        echo(table(summary))
        return summary
    summary = compute(path)
    runs.write_json(path / "summary.json", summary)
    echo(table(summary))
    echo(f"metrics, checkpoints, figures and summary.json: {path}")
    return summary


def _silent(line: str) -> None:
    del line
