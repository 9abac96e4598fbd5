"""The run directory and its files.

  flags.json      the options of the run; a directory never takes two different sets
  metrics.jsonl   one line for each sweep member and logged step
  checkpoints/    the newest state of each group of sweep members that is trained together
  figures/        PNG
  summary.json    written last: a run that has one is finished
  .lock           empty; held by the process that writes the run

All files but metrics.jsonl, which grows, are replaced in one move: a file with its final name is whole. Experiments may
add files of their own. If several processes share a run, all may read and only process 0 writes: in the others, the
functions that write do nothing.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILES = ("metrics.jsonl", "checkpoints", "figures", "summary.json")
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have none


class RunError(Exception):
    """A run directory cannot be used as asked; the message, one line, names the fix."""


def find_run(
    path: Path,
    flags: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any],
    writes: Collection[str] = (),
    late: Collection[str] = (),
) -> dict[str, Any] | None:
    """The summary of the finished run in `path`; None if the run is unfinished, or if the directory is free for
    a new one: it may hold other files, as the log of a batch system, but none that a run writes.

    Args:
      defaults: for `read_flags`.
      writes: names of files and folders that the run has beside those above.
      late: names of flags that matter only after training. A run is unfinished if it has another value of one of them;
        but one that is finished does not lose what such a flag asked for if it is left out now.

    Raises:
      RunError: the directory holds files that a run writes and no run, or a run with other flags.
    """
    file, summary = path / "flags.json", path / "summary.json"
    try:
        if not file.exists():
            taken = {*FILES, *writes} & {child.name for child in path.iterdir()} if path.exists() else None
            if taken:
                raise RunError(f"{path} is not a run directory and holds {min(taken)}: give another `path`")
            return None
    except OSError as error:
        raise RunError(f"{path} cannot be used ({error.strerror}): give another `path`") from None
    recorded, asked = read_flags(path, defaults=defaults), json.loads(json.dumps(dict(flags)))
    changed = {name for name in recorded.keys() | asked.keys() if recorded.get(name) != asked.get(name)}
    finished = summary.exists()
    names = sorted(changed - {name for name in late if not finished or asked[name] != defaults[name]})
    if names:
        changes = ", ".join(f"{name} was {recorded.get(name)} and is {asked.get(name)}" for name in names)
        raise RunError(f"{path} belongs to a run with other flags ({changes}): give another `path`")
    return read_json(summary) if finished and not changed else None


@contextlib.contextmanager
def lock(path: Path, *, make: bool = True) -> Iterator[None]:
    """Within the block, no other run writes in the directory `path`, which is made if there is none; without `make`,
    nothing is done then. A process that ends, in whichever way, leaves no lock behind.

    The processes of one run enter the block together: process 0 holds the lock for all of them.

    Raises:
      RunError: another process holds the lock, or the directory cannot be written.
    """
    held, error = None, None
    if jax.process_index() == 0 and (make or path.exists()):
        try:
            held = _lock(path)
        except RunError as caught:  # the others would wait for ever
            error = caught
    failed = multihost_utils.broadcast_one_to_all(np.bool_(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RunError(f"process 0 cannot use {path}: its message says why")
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _lock(path: Path) -> int:
    """The open file that holds the lock. Closing it gives the lock back, and so does the end of the process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # to write: NFS demands it of an exclusive lock
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): give another `path`") from None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(file)
            raise RunError(f"another process writes in {path}: wait until it ends, or give another `path`") from None
    return file


def make_run(path: Path, flags: Mapping[str, Any]) -> None:
    """Makes the run directory that `find_run` did not find; one that is there keeps its flags until `finish`. Several
    processes wait here for each other.

    Raises:
      RunError: the directory cannot be written, or some processes do not see it.
    """
    file = path / "flags.json"
    try:
        if not file.exists():
            write_json(file, flags)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): give another `path`") from None
    finally:
        multihost_utils.sync_global_devices(str(file))
    if not file.exists():
        raise RunError(f"{path} is not on a file system that all processes share: give a `path` that is")


def finish(path: Path, flags: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Writes summary.json, which makes the run a finished one, and the flags that it has been made with.

    Raises:
      RunError: the run directory is no longer there.
    """
    if jax.process_index() != 0:
        return
    if not (path / "flags.json").exists():
        raise RunError(f"{path} was emptied while its run was under way: delete it and start again")
    if read_json(path / "flags.json") != json.loads(json.dumps(dict(flags))):
        # In this order: a summary never stands beside flags that are not its own.
        (path / "summary.json").unlink(missing_ok=True)
        write_json(path / "flags.json", flags)
    write_json(path / "summary.json", summary)


def read_flags(path: Path, *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the run in `path`, as JSON gives them. A flag that is newer than the run has its default, which is
    what was done before it existed.

    Raises:
      RunError: they are missing or damaged.
    """
    return json.loads(json.dumps(dict(defaults))) | read_json(path / "flags.json")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      RunError: it is missing or damaged.
    """
    try:
        value = json.loads(file.read_text())
        if isinstance(value, dict):
            return value
    except (OSError, ValueError):
        pass
    raise RunError(f"{file} cannot be read: give the directory of a whole run")


def write_json(file: Path, value: Any) -> None:
    """Replaces `file` by `value` as JSON; NaN and infinities are refused, they are not JSON."""
    replace(file, lambda temporary: temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n"))


def replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes `file` by `write(temporary path)`, and gives it its name once it is whole."""
    if jax.process_index() != 0:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(file)
    write(temporary)
    with open(temporary, "rb+") as written:  # a name whose content a power cut takes away would be worse than none
        os.fsync(written.fileno())
    os.replace(temporary, file)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}")  # the same ending: some writers look at it


def append_metrics(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds lines to the run's metrics.jsonl.

    Raises:
      RunError: the run directory is no longer there.
    """
    if jax.process_index() != 0:
        return
    _check_there(path)
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows)


def _check_there(path: Path) -> None:
    # To make it again would leave files without flags.json, a directory that no command accepts.
    if not path.exists():
        raise RunError(f"{path} was deleted or moved while its run was under way: start the command again")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl, each the mean over the steps since the one before, up to its `step`.

    A last line that was cut short by an interruption is left out.

    Raises:
      RunError: another line is damaged, or the file cannot be read.
    """
    file = path / "metrics.jsonl"
    where = ""
    try:
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            where = f" in line {number}"
            if line.endswith(b"\n"):
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict) or not {"group", "member", "step"} <= rows[-1].keys():
                    raise ValueError("no line of metrics")
        return rows
    except (OSError, ValueError):
        raise RunError(
            f"{file} is damaged{where}: restore it, or delete {path} to start again, or give another `path`"
        ) from None


def read_curves(path: Path) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """The run's metrics by (group, member), each a column [T] of values over the logged steps, by its name.

    Raises:
      RunError: see `read_metrics`.
    """
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in read_metrics(path):
        lines.setdefault((line.pop("group"), line.pop("member")), []).append(line)
    return {
        member: {name: np.array([line[name] for line in of_member]) for name in of_member[0]}
        for member, of_member in lines.items()
    }


def rewind_metrics(path: Path, group: str, step: int) -> None:
    """Drops the lines of `group` after `step`: a resumed run writes them again.

    Raises:
      RunError: see `read_metrics` and `append_metrics`.
    """
    _check_there(path)
    rows = [row for row in read_metrics(path) if row["group"] != group or row["step"] <= step]
    replace(
        path / "metrics.jsonl", lambda temporary: temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    )


class Checkpoints:
    """The checkpoints of one group of sweep members; the newest is kept. Use it in a `with` block: leaving the block
    waits for pending writes."""

    def __init__(self, path: Path, group: str):
        self._path = (path / "checkpoints" / group).absolute()
        # A manager for each process: they need not wait for each other.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process-{jax.process_index()}",
        )
        # Orbax refuses to make the directory for such a manager.
        _check_there(path)
        self._path.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(max_to_keep=1, create=False, multiprocessing_options=alone),
        )

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree of numpy arrays; returns when it has been copied, while it is still being written."""
        if jax.process_index() == 0:
            self._manager.save(step, args=ocp.args.StandardSave(tree))

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, where there is one; `like` is a pytree of the same structure, shapes and types.

        Raises:
          RunError: the checkpoint is damaged, or of another shape or version.
        """
        step = self.step
        # On the devices at hand, whichever it was saved on.
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises whatever its storage layers raise
            raise RunError(
                f"the checkpoint {self._path / str(step)} is damaged, or of another shape or version: delete "
                f"{self._path}, and summary.json if there is one, and the run's command trains this part again"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()
