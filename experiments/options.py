"""Options that are declared once: the field of a config has the type, default, range and help of its flag.

  class Config(NamedTuple):
      num_steps: Annotated[int, Option("the training", "gradient steps", at_least(1))] = 3000

A field without an `Option` has no flag.
"""

import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import command


class FloatParser(flags.FloatParser):
    """Numbers as their text says: 1e400 is none that a computer has, and not inf."""

    def convert(self, argument: Any) -> float:
        return command.number(str(argument))


class Range(NamedTuple):
    """The allowed values of an option. holds: tells whether a value is one; words: completes "must be"."""

    holds: Callable[[Any], bool]
    words: str


class Option(NamedTuple):
    """The flag of a field.

    Attributes:
      group: the title in --help.
      help: the text, or a function that gives it.
      range: the allowed values, each of them for a tuple; None for all.
      computed: the default depends on other options; the flag itself has none.
      repeats: a value may stand in a list more than once.
    """

    group: str
    help: str | Callable[[], str]
    range: Range | None = None
    computed: bool = False
    repeats: bool = False


def at_least(low: int, *, at_most: int | None = None) -> Range:
    """Numbers from `low` on, up to `at_most`."""
    high = math.inf if at_most is None else at_most
    words = f"at least {low}" + (f", and at most {at_most}" if at_most is not None else "")
    return Range(lambda value: low <= value <= high, words)


def positive() -> Range:
    """Positive finite numbers."""
    return Range(lambda value: 0.0 < value < math.inf, "a positive number")


def from_none_to(high: float) -> Range:
    """Numbers from 0, which stands for none, to `high`."""
    return Range(lambda value: 0.0 <= value <= high, f"from 0, for none, to {high:g}")


def declared(config: Any) -> dict[str, tuple[Any, Option]]:
    """The type and the option of each field of a config class that has a flag."""
    found = {}
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            found[name] = hint.__origin__, extra
    return found


def of_group(config: Any, group: str) -> list[str]:
    """The names of the fields of a config class whose options stand in a group."""
    return [name for name, (_, option) in declared(config).items() if option.group == group]


def define(config: Any, groups: Sequence[str]) -> None:
    """Defines the flags of a config class, whose groups --help lists in this order."""
    as_float = functools.partial(flags.DEFINE, FloatParser(), serializer=flags.ArgumentSerializer())
    makers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: as_float, str: flags.DEFINE_string}
    fields = declared(config)
    assert {option.group for _, option in fields.values()} == set(groups)
    for title in groups:
        with command.group(title):
            for name, (kind, option) in fields.items():
                if option.group != title:
                    continue
                default = None if option.computed else config._field_defaults[name]
                text = option.help if isinstance(option.help, str) else option.help()
                base = _base(kind)
                if typing.get_origin(base) is tuple:
                    flags.DEFINE_list(name, None if default is None else list(map(str, default)), text)
                else:
                    makers[base](name, default, text)


def read(config: Any) -> dict[str, Any]:
    """The values of the flags of a config class, lists as tuples of their type.

    Raises:
      command.UsageError: a value of a list is not a number.
    """
    values = {}
    for name, (kind, _) in declared(config).items():
        value, base = getattr(flags.FLAGS, name), _base(kind)
        if typing.get_origin(base) is tuple and value is not None:
            value = command.numbers(name, value, typing.get_args(base)[0])
        values[name] = value
    return values


def check(config: Any) -> None:
    """Raises if a value of the config is outside the range of its option, or a list is empty or repeats a value.

    Raises:
      command.UsageError: the message, one line, names the flag and the range.
    """
    for name, (_, option) in declared(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, tuple):
            if not option.repeats and (not value or len(set(value)) < len(value)):
                raise command.UsageError(f"--{name}={_text(value)}: give at least one, and each only once")
            for each in value:
                if option.range is not None and not option.range.holds(each):
                    raise command.UsageError(f"--{name}={_text((each,))}: every value must be {option.range.words}")
        elif value is not None and option.range is not None and not option.range.holds(value):
            raise command.UsageError(f"--{name}={_text((value,))}: must be {option.range.words}")


def check_seeds(config: Any) -> None:
    """Raises if the `num_seeds` consecutive seeds from `seed` on are not all 32-bit numbers from 0.

    Raises:
      command.UsageError: the message, one line, names the flag.
    """
    if config.num_seeds >= 2**31:
        raise command.UsageError(f"--num_seeds={config.num_seeds}: must be below 2^31")
    if not 0 <= config.seed < 2**31 - config.num_seeds:
        raise command.UsageError(f"--seed={config.seed}: must be from 0 to 2^31 - num_seeds - 1")


def _base(kind: Any) -> Any:
    """The type of the values of a field that may also be None."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def _text(values: tuple[Any, ...]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
