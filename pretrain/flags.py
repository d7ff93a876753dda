"""Validation of a recipe's flags: bounds of numbers, and flags without effect.

A configuration says the bounds where it says the type, `batch_size: Count = 64`, and
`refuse_numbers` reads them there. A recipe with choices (a tower, a protocol) lists in a function
of its own, `unused`, what its choice leaves without effect; `cli` refuses such a flag by name when
it was typed, and `settle` takes a preset's value away.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from pretrain.names import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class Within:
    """Bounds of a number, or of each number of a tuple.

    Attributes:
        low: the smallest value.
        high: the largest value.
        above: `low` itself is too small.
        below: `high` itself is too large.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is a finite number in the bounds."""
        large = value > self.low if self.above else value >= self.low
        small = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and large and small

    def __str__(self) -> str:
        """The bounds in words."""
        least = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        most = f"less than {self.high:g}" if self.below else f"at most {self.high:g}"
        return f"{least} and finite" if self.high == math.inf else f"{least} and {most}"


def _whole(words: list[str]) -> int:
    try:
        return int(words[0])
    except ValueError as error:
        raise ValueError(f"{words[0]!r} is no whole number") from error


_WORDS = PrimitiveConstructorSpec(
    nargs=1, metavar="INT", instance_from_str=_whole, is_instance=lambda x: isinstance(x, int),
    str_from_instance=lambda x: [str(x)],
)  # fmt: skip
_NONE_OR_WORDS = PrimitiveConstructorSpec(
    nargs=1, metavar="{None}|INT",
    instance_from_str=lambda words: None if words == ["None"] else _whole(words),
    is_instance=lambda x: x is None or isinstance(x, int), str_from_instance=lambda x: [str(x)],
)  # fmt: skip
Count = Annotated[int, Within(1), _WORDS]
Whole = Annotated[int, Within(0), _WORDS]
OptionalCount = Annotated[int | None, Within(1), _NONE_OR_WORDS]
OptionalWhole = Annotated[int | None, Within(0), _NONE_OR_WORDS]
Seed = Annotated[int, Within(0, 2**63 - 1), _WORDS]
Positive = Annotated[float, Within(0, above=True)]
OptionalSwitch = tyro.conf.DisallowNone[bool | None]  # None: neither --name nor --no-name
OptionalPositive = Annotated[float | None, Within(0, above=True)]
NotNegative = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
PositiveFraction = Annotated[float, Within(0, 1, above=True)]
FractionBelowOne = Annotated[float, Within(0, 1, below=True)]


def flag(name: str) -> str:
    """A field of a configuration as it is typed."""
    return "--" + name.replace("_", "-")


def _bounds(hint: object) -> Within | None:
    """The bounds in a type: of `Annotated[...]`, alone, in a union or in a tuple."""
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        found = part if isinstance(part, Within) else _bounds(part)
        if found:
            return found
    return None


def groups(config: "DataclassInstance") -> dict[str, "DataclassInstance"]:
    """The nested groups of a configuration (see `pretrain.settings`), by field name."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {
        name: value
        for name, value in values.items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
    }


def flat(config: "DataclassInstance") -> dict[str, object]:
    """The values of a configuration by flag: those of nested groups stand beside the others."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, group in groups(config).items():
        del values[name]
        values |= flat(group)
    return values


def replace(config: Config, **values: object) -> Config:
    """`dataclasses.replace` by flag: a value may belong to the configuration or to a group."""
    for name, group in groups(config).items():
        names = {field.name for field in dataclasses.fields(group)}
        own = {k: values.pop(k) for k in list(values) if k in names}
        config = dataclasses.replace(config, **{name: dataclasses.replace(group, **own)})
    return dataclasses.replace(config, **values)


def refuse_numbers(config: "DataclassInstance") -> None:
    """Refuse numbers that mean nothing.

    A field's default may lie outside of its bounds: it means "not given".

    Args:
        config: a dataclass, whose types carry `Within`.

    Raises:
        ValueError: a number is outside of its bounds, infinite or not a number.
    """
    for group in groups(config).values():
        refuse_numbers(group)
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        bounds, value = _bounds(hints[field.name]), getattr(config, field.name)
        if bounds is None or value is None or value == field.default:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not bounds.holds(number):
                raise ValueError(f"{flag(field.name)} {number:g}: it has to be {bounds}")


def typed(words: Sequence[str], config: "DataclassInstance") -> set[str]:
    """The fields of a configuration that a command line names, whatever values it gives them.

    Args:
        words: of the command line.
        config: a dataclass.
    """
    return _named(words) & flat(config).keys()


def _named(words: Sequence[str]) -> set[str]:
    """The names behind -- of a command line, with and without a `no-` before them."""
    named = {w[2:].split("=")[0].replace("-", "_") for w in words if w.startswith("--")}
    return named | {name.removeprefix("no_") for name in named}


def remember_typed(words: Sequence[str], config: Config) -> Config:
    """A configuration that knows what was typed, if it has a field `given` for that.

    Args:
        words: of the command line.
        config: a dataclass.
    """
    if not hasattr(config, "given"):
        return config
    return dataclasses.replace(config, given=tuple(sorted(typed(words, config) - {"given"})))


def value_of(words: Sequence[str], name: str) -> str | None:
    """What a command line gives for a flag of one value; None: it does not name it."""
    for word, behind in zip(words, [*words, ""][1:], strict=True):
        before, equals, value = word.partition("=")
        if before.startswith("--") and before[2:].replace("-", "_") == name:
            return value if equals else behind
    return None


def refuse_repeated(words: Sequence[str], config: "DataclassInstance") -> None:
    """Refuse flags that are typed twice, of which the parser would take the last.

    Args:
        words: of the command line.
        config: the configuration that they gave.

    Raises:
        ValueError: one was; all values of a flag that takes several stand behind it once.
    """
    values = flat(config)
    for name in sorted(typed(words, config)):
        if sum(name in _named([word]) for word in words) > 1:
            several = isinstance(values[name], tuple)
            remedy = f"give all values behind one {flag(name)}" if several else "give it once"
            raise ValueError(f"{flag(name)} is given twice, one would be ignored: {remedy}")


def refuse_empty(words: Sequence[str], config: "DataclassInstance") -> None:
    """Refuse flags with nothing behind them: an unset variable of the shell, a forgotten value.

    Args:
        words: of the command line.
        config: the configuration that they gave.

    Raises:
        ValueError: such a flag was typed; all are named.
    """
    values = flat(config)
    empty = {n for n in typed(words, config) if values[n] == () or _is_blank(values[n])}
    if named := " and ".join(flag(name) for name in sorted(empty)):
        raise ValueError(f"nothing is given for {named}: give a value, or leave the flag out")


def _is_blank(value: object) -> bool:
    """Whether this is text of nothing but spaces, or has such a text among others."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, str) and not part.strip() for part in parts)


def go_by_epochs(words: Sequence[str], config: Config) -> Config:
    """A configuration without its preset's steps where a number of epochs was typed instead.

    Args:
        words: of the command line.
        config: a dataclass.
    """
    instead = {"epochs", "steps"} & typed(words, config) == {"epochs"}
    return replace(config, steps=None) if instead else config


def refuse_unused(
    words: Sequence[str], config: "DataclassInstance", unused: dict[str, str]
) -> None:
    """Refuse typed flags that have no effect.

    Args:
        words: of the command line.
        config: the configuration that they gave.
        unused: fields without effect, and why, such as "with --model i3d".

    Raises:
        ValueError: there are such flags; all are named.
    """
    _refuse(typed(words, config) & unused.keys(), unused)


# Flags of earlier versions, and what they are called now.
RENAMED = {
    "encoder": "model", "video_tower": "model", "text_tower": "text_model",
    "moving": "motion_tokens", "still": "subtract_mean", "weights": "data_weights",
    "tensorboard": "track tensorboard",
}  # fmt: skip


def _own(config: type) -> set[str]:
    """The flags of a recipe's dataclass, those of its groups too."""
    fields = dataclasses.fields(config)
    own = {f.name for f in fields}
    for field in fields:
        if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            own |= flat(field.default).keys()
    return own


def refuse_elsewhere(words: Sequence[str], config: type, elsewhere: dict[str, str]) -> None:
    """Say of a flag that a recipe does not have what to do instead.

    Args:
        words: of the command line.
        config: the recipe's dataclass.
        elsewhere: flags of other recipes, and what to do instead. Those in `RENAMED` are known.

    Raises:
        ValueError: such a flag was typed.
    """
    own = _own(config)
    told = {name: f"is not for this recipe: {what}" for name, what in elsewhere.items()}
    told |= {
        old: f"is called {flag(new)} now" for old, new in RENAMED.items() if new.split()[0] in own
    }
    for name in sorted((_named(words) & told.keys()) - own):
        raise ValueError(f"{flag(name)} {told[name]}")


def refuse_unknown(words: Sequence[str], config: type) -> None:
    """Refuse flags that a recipe does not have, naming those most like them.

    The parser says this as well, but not where a flag that has to be given is missing too, as it is
    where that one is mistyped.

    Args:
        words: of the command line.
        config: the recipe's dataclass.

    Raises:
        ValueError: such a flag was typed, or a flag behind another dash than two hyphens.
    """
    own = _own(config)
    if {"-h", "--help"} & set(words):
        return
    for word in words:
        found = re.match(r"([-\u2010-\u2015\u2212]+)([^=]+)", word)
        if not found:
            continue
        dashes, name = found[1], found[2].replace("-", "_")
        known = name in own or name.removeprefix("no_") in own
        if known and dashes != "--":
            raise ValueError(f"{found[0]} is no flag: {flag(name)} begins with two hyphens")
        if not known and dashes == "--" and not name.startswith("tyro_"):
            near = did_you_mean(found[2], (n.replace("_", "-") for n in own), "--")
            raise ValueError(f"there is no flag {found[0]}{near or '; --help lists the flags'}")


def refuse_several(words: Sequence[str], config: type) -> None:
    """Refuse several files where a recipe takes one, as `--data *.avi` gives them.

    Args:
        words: of the command line.
        config: the recipe's dataclass.

    Raises:
        ValueError: naming the second, and what to give instead.
    """
    hints = get_type_hints(config)
    for name in {"data", "source", "video"} & hints.keys():
        place = next((i for i, word in enumerate(words) if word == flag(name)), len(words))
        given = list(itertools.takewhile(lambda w: not w.startswith("-"), words[place + 1 :]))
        if len(given) > 1 and get_origin(hints[name]) is not tuple:
            instead = "give the folder that holds the files, or a list (csv) of them"
            if name == "video":
                instead = "give one"
            elif "{" in given[1] or "://" in given[1]:
                instead = "put an address with braces in quotes"
            raise ValueError(f"{flag(name)} takes one path, and {given[1]!r} is another: {instead}")


def _refuse(useless: Iterable[str], unused: dict[str, str]) -> None:
    if named := "; ".join(f"{flag(name)} {unused[name]}" for name in sorted(useless)):
        raise ValueError(f"without effect, leave out: {named}")


def _defaults(config: "DataclassInstance") -> dict[str, object]:
    """The default of every flag."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(config)}
    for name in groups(config):
        defaults |= flat(defaults.pop(name))
    return defaults


def refuse_given(config: Config, unused: dict[str, str], preset: Config) -> None:
    """Refuse given values that have no effect: they are neither the preset's nor the default.

    Args:
        config: a dataclass.
        unused: fields without effect, and why.
        preset: that it was made of.

    Raises:
        ValueError: there are such values; all are named.
    """
    given, expected, defaults = flat(config), flat(preset), _defaults(config)
    _refuse({n for n in unused if given[n] not in (expected[n], defaults[n])}, unused)


def settle(config: Config, unused: dict[str, str], preset: Config | None) -> Config:
    """A configuration without its preset's values that have no effect: as if not given.

    Args:
        config: a dataclass.
        unused: fields without effect, and why.
        preset: that it was made of; None: nobody knows which values were meant, and all stay.

    Raises:
        ValueError: a value without effect is neither the preset's nor the default.
    """
    if preset is None:
        return config
    refuse_given(config, unused, preset)
    defaults = _defaults(config)
    return replace(config, **{name: defaults[name] for name in unused})
