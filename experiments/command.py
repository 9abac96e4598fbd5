"""Flags, errors and run directories of all commands: bad flags end in one line, a finished run is only reported."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from experiments import hosts, results, signals, sizes
from experiments.results import AnyResult
from lvae_jax import datasets, files, runs

FLAGS_OF_ARGUMENTS = {"name": "dataset", "path": "run_dir"}  # where the names differ
ALIASES = {"discretize": "discretise", "dequantise": "dequantize"}
HELP = ("--help", "-help", "-h", "--helpshort", "-?")

_groups: dict[str, list[str]] = {}  # the flags that --help lists, by title


class UsageError(Exception):
    """The flags ask for something impossible; the message, one line, names the fix."""


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
    """--help lists the flags that are defined in this context together, in their order, below the title."""
    before = set(flags.FLAGS)
    yield
    names = _groups.setdefault(title, [])
    names += [name for name in flags.FLAGS if name not in before and name not in names]


with group("the run"):
    flags.DEFINE_string("run_dir", None, "folder of the run (default: below runs/, named after the flags)")
with group("several processes"):
    flags.DEFINE_bool("distributed", False, "join the processes that a cluster started, as it describes them")
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, to join processes by hand; all share one --run_dir"
    )
    flags.DEFINE_integer("num_processes", None, "number of processes to join")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0; process 0 writes and prints")


SHARED = tuple(name for names in _groups.values() for name in names)
LAST = tuple(_groups)  # in --help


def help_text(about: str) -> str:
    """The flags in their groups, below the text `about` the program."""

    def lines(name: str) -> str:
        flag = flags.FLAGS[name]
        silent = flag.boolean or not flag.default
        shown = "" if silent else f" (default: {flag.default_as_str.strip(chr(39))})"
        option = f"--[no]{name}" if flag.default is True else f"--{name}" if flag.boolean else f"--{name}=..."
        text = textwrap.wrap(flag.help + shown, 90, break_on_hyphens=False)
        return "\n".join([f"  {option}", *(f"      {part}" for part in text)])

    titles = [title for title in _groups if title not in LAST] + list(LAST)
    sections = [f"{title}:\n" + "\n".join(map(lines, _groups[title])) for title in titles]
    return "\n\n".join([about.strip(), *sections])


def start(name: str, main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`, whose module's docstring heads --help. The process ends with one line if the
    flags, the data or the run directory cannot be used."""

    def parse(argv: Sequence[str]) -> list[str]:
        if set(HELP) & set(argv[1:]):
            print(help_text(sys.modules[main.__module__].__doc__ or ""))
            sys.exit()
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
        sizes.keep()
        try:
            hosts.connect(**values(("distributed", "coordinator_address", "num_processes", "process_id")))
            signals.raise_stopped(name)
            main()
        except BaseException as error:
            number = signals.received()
            if number is not None:  # whatever was made on the way of what it raised
                print(signals.message(name, number), file=sys.stderr)
                sys.exit(128 + number)
            if isinstance(error, (UsageError, datasets.DatasetError, runs.RunError)):
                sys.exit(f"{name}: {with_flags(str(error))}")
            if is_full(error):
                sys.exit(f"{name}: no space is left on a disk; make room, and the same command goes on")
            raise

    try:
        with signals.as_before():
            app.run(guarded, flags_parser=parse)
    finally:
        forget()


def forget() -> None:
    """Forgets the flags of a command and the values of those that all share: a notebook may run it again."""
    for name in list(flags.FLAGS):
        if name in SHARED:
            flags.FLAGS[name].unparse()
        elif name in (*ALIASES, *(name for names in _groups.values() for name in names)):
            delattr(flags.FLAGS, name)
    for title in set(_groups) - set(LAST):
        del _groups[title]


def is_full(error: BaseException | None) -> bool:
    """Tells whether a full disk or a quota caused the error. Orbax says so only in the text of errors of its own."""
    if error is None:
        return False
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return any(text in str(error) for text in texts) or is_full(error.__cause__ or error.__context__)


def with_flags(message: str) -> str:
    """A message of the library, in which `argument` becomes the --flag that gives it."""

    def flag(match: re.Match[str]) -> str:
        name = FLAGS_OF_ARGUMENTS.get(match[1], match[1])
        return f"--{name}" if name in flags.FLAGS else match[0]

    return re.sub(r"`(\w+)`", flag, message)


def path(name: str, text: str) -> Path:
    """The file or folder that the flag `name` names, ~ being the user's home.

    Raises:
      UsageError: the name is empty, a URL, or of an unknown user's home.
    """
    if not text.strip():
        raise UsageError(f"--{name}: the name is empty, give that of a folder or leave the flag out")
    if re.match(r"\w[\w+.-]+:/", text):
        raise UsageError(f"--{name}={text}: a URL, give a folder of the file system, where a bucket can be mounted")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"--{name}={text}: there is no such user, give a folder") from None


def paths(**given: str | None) -> dict[str, Any]:
    """The paths that flags name, as text; None for None. Equal paths have equal texts: ./a/ is a.

    Raises:
      UsageError: see `path`; or there is no folder of original archives, which nothing would make.
    """
    found = {name: None if text is None else str(path(name, text)) for name, text in given.items()}
    archives = found.get("manual_dir")
    if archives is not None and not os.path.isdir(archives):
        raise UsageError(f"--manual_dir={archives}: there is no such folder, give that of the original archives")
    return found


def define_places(*, celeba: bool = True) -> None:
    """Defines the flags that say where data are: the folders of `datasets.load`."""
    with group("the data"):
        flags.DEFINE_string(
            "data_dir",
            None,
            "folder of prepared data sets and caches (default: ~/.cache/lvae_jax, or TFDS's own if that holds the data "
            "set as array_record)",
        )
        flags.DEFINE_string("manual_dir", None, "folder of the data set's original archives, to download nothing")
        if celeba:
            flags.DEFINE_string(
                "celeba_dir", None, "folder of CelebA's aligned JPEGs, 000001.jpg to 202599.jpg; replaces TFDS's copy"
            )


def values(names: Iterable[str]) -> dict[str, Any]:
    """The flags of these names."""
    return {name: getattr(flags.FLAGS, name) for name in names}


def number(text: str, kind: type = float) -> Any:
    """The number that a text says.

    Raises:
      ValueError: it says none, or one that is too large for floating point.
    """
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number") from None
    if kind is float and math.isinf(value) and "inf" not in text.lower():
        raise ValueError("larger than any floating-point number, give a smaller one")
    return value


def numbers(name: str, texts: Sequence[str], kind: type = float) -> tuple[Any, ...]:
    """The numbers that the flag `name` lists.

    Raises:
      UsageError: a value is not a number, or too large.
    """
    values = []
    for text in texts:
        try:
            values.append(number(text, kind))
        except ValueError as error:
            raise UsageError(f"--{name}={text}: {error}") from None
    return tuple(values)


def file_name(dataset: str) -> str:
    """The name of a data set as a part of a file's."""
    return (Path(dataset).stem if files.is_path(dataset) else dataset).replace("/", "-")


def run_path(config: Any, name: str, run_dir: str | None) -> Path:
    """The directory asked for, or one below runs/ whose name is made of `name` and of what in the config, a NamedTuple,
    is not the default: the same command finds its run again, even if it has learned new flags since."""
    given = {key: value for key, value in config._asdict().items() if value != config._field_defaults[key]}
    # Defaults are left out: a flag that is added later does not move the runs of before.
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    return Path("runs", f"{name}_{digest}") if run_dir is None else path("run_dir", run_dir)


def run(
    config: Any,
    name: str,
    run_dir: str | None,
    kind: type[AnyResult],
    *,
    prepare: Callable[[Path], Callable[[], AnyResult]],
    table: Callable[[AnyResult], str],
    echo: Callable[[str], None],
    writes: Collection[str] = (),
    late: Collection[str] = (),
) -> AnyResult:
    """The summary of the finished run of this config, a NamedTuple of all flags with their defaults, or else the one
    that it computes and writes now; echoed as a table either way.

    `prepare(run directory)` loads what the run needs, makes nothing there, and returns the function that computes.
    `writes` and `late` are for `runs.find_run`.

    Raises:
      runs.RunError: the directory belongs to something else, another process writes there, or the summary is of another
        `kind`. Whatever `prepare` and what it returns raise.
    """
    if jax.process_index() != 0:
        echo = _silent
    path = run_path(config, name, run_dir)
    options: dict[str, Any] = {"defaults": config._field_defaults, "writes": writes, "late": late}
    find = functools.partial(runs.find_run, path, config._asdict(), **options)
    if find() is None:
        with runs.lock(path, make=False):  # held by another, it is refused before the data are loaded
            pass
        compute = prepare(path)
        with runs.lock(path):
            if find() is None:  # nor has another finished it in the meantime
                runs.make_run(path, config._asdict())
                summary = compute()
                runs.finish(path, config._asdict(), summary.to_json())
                echo(table(summary))
                echo(f"metrics, checkpoints, figures and summary.json: {path}")
                return summary
    summary = results.read(path / "summary.json", kind)
    echo(f"{path} is finished")
    echo(table(summary))
    return summary


def _silent(line: str) -> None:
    del line
