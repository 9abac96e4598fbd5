"""Flags, ranges and help of options that are declared once."""

from typing import Annotated, NamedTuple

import pytest
from absl import flags

from experiments import command, options
from experiments.options import Option, Range, at_least, from_none_to, positive

GROUP, OTHER = "one", "another"


class Config(NamedTuple):
    count: Annotated[int, Option(GROUP, "how many", at_least(2))] = 3
    scales: Annotated[tuple[float, ...], Option(OTHER, "lengths", positive())] = (1.0, 0.5)
    sizes: Annotated[tuple[int, ...], Option(GROUP, "sides", at_least(1), repeats=True)] = (4,)
    part: Annotated[float, Option(GROUP, lambda: "a part (default: half)", from_none_to(1.0), computed=True)] = 0.5
    name: Annotated[str | None, Option(GROUP, "a name")] = None
    small: Annotated[float, Option(GROUP, "a unit", Range(lambda value: value < 1.5, "below 1.5"))] = 1.0
    quick: Annotated[bool, Option(OTHER, "be quick")] = True
    hidden: int = 7


@pytest.fixture
def defined(monkeypatch):
    """The flags of the config, parsed from words, in a registry of their own."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    monkeypatch.setattr(command, "_groups", {"the run": [], "several processes": []})
    define = {name: getattr(flags, name) for name in dir(flags) if name.startswith("DEFINE")}
    for name, function in define.items():
        monkeypatch.setattr(
            flags,
            name,
            lambda *arguments, function=function, **others: function(*arguments, flag_values=flags.FLAGS, **others),
        )
    options.define(Config, (OTHER, GROUP))

    def parse(*words):
        flags.FLAGS(["program", *words])
        return options.read(Config)

    return parse


def test_flags_have_types_and_defaults(defined):
    assert defined() == {
        "count": 3,
        "scales": (1.0, 0.5),
        "sizes": (4,),
        "part": None,
        "name": None,
        "small": 1.0,
        "quick": True,
    }
    values = defined("--count=5", "--scales=2,1e-3", "--sizes=8,8", "--part=0.25", "--name=x", "--noquick")
    assert values == {
        "count": 5,
        "scales": (2.0, 1e-3),
        "sizes": (8, 8),
        "part": 0.25,
        "name": "x",
        "small": 1.0,
        "quick": False,
    }


def test_list_values_that_are_not_numbers(defined):
    with pytest.raises(command.UsageError, match="--sizes=x: must be a whole number"):
        defined("--sizes=8,x")


def test_numbers_too_large_for_floating_point_are_shown_as_they_were_given(defined):
    assert defined("--part=inf")["part"] == float("inf"), "for the range to judge"
    for flag in ("--part=1e400", "--small=-1e400"):
        with pytest.raises(flags.Error, match=f"flag {flag}: larger than any floating-point number"):
            defined(flag)
    with pytest.raises(command.UsageError, match="--scales=1e400: larger than any"):
        defined("--scales=1,1e400")


def test_help_groups_flags_and_tells_defaults(defined):
    text = command.help_text("about")
    assert text.index("another:") < text.index("--scales") < text.index("one:") < text.index("--count")
    for said in ("how many (default: 3)", "lengths (default: 1.0,0.5)", "a part (default: half)", "(default: 1.0)"):
        assert said in text
    assert "--[no]quick" in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"count": 1}, "--count=1: must be at least 2"),
        ({"scales": (1.0, 0.0)}, "--scales=0: every value must be a positive number"),
        ({"scales": (1.0, float("inf"))}, "--scales=inf: every value must be a positive number"),
        ({"scales": (1.0, 1.0)}, "--scales=1,1: give at least one, and each only once"),
        ({"scales": ()}, "--scales=: give at least one"),
        ({"sizes": (8, 8)}, None),
        ({"sizes": (8, 0)}, "--sizes=0: every value must be at least 1"),
        ({"part": 0.0}, None),
        ({"part": 1.5}, "--part=1.5: must be from 0, for none, to 1"),
        ({"part": float("nan")}, "--part=nan: must be from 0"),
        ({"small": 2.0}, "--small=2: must be below 1.5"),
        ({"hidden": -1}, None),
    ],
)
def test_ranges(change, message):
    config = Config()._replace(**change)
    if message is None:
        options.check(config)
        return
    with pytest.raises(command.UsageError) as error:
        options.check(config)
    assert message in str(error.value)
