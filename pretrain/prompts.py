"""Class names -> sentences: the published prompt templates, and the user's own.

The two published sets are those of CLIP (Radford et al. 2021; github.com/openai/CLIP,
data/prompts.md), grammar mistakes included, because the published numbers were made with them.
"""

import csv
import os
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pretrain.files import is_file, is_there, no_file, read_limited, reading
from pretrain.names import NUMBER, did_you_mean

MAX_TEXT = 2**26  # bytes of a file of templates or classes
_KINDS = ("photo", "video", "example", "demonstration")
_DOING = ("using", "doing", "during", "performing", "practicing")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    # Rasheed et al. 2022, one sentence, in training and in testing.
    "vificlip": ("a photo of a {}.",),
    # Kinetics-700, 28 sentences; Kinetics-400 has no list of its own.
    "openai_kinetics": tuple(
        f"a {kind} of {what}."
        for what in ("{}", "a person {}", *(f"a person {doing} {{}}" for doing in _DOING))
        for kind in _KINDS
    ),
    # UCF101, 48 sentences.
    "openai_ucf101": tuple(
        f"a {kind} of {person} {doing}{{}}."
        for doing in ("", *(f"{doing} " for doing in _DOING))
        for person in ("a person", "the person")
        for kind in _KINDS
    ),
    # Ours, for class texts in the third person, such as those of the synthetic dataset.
    "third_person": (
        "a person {}",
        "a man {}",
        "a woman {}",
        "somebody {}",
        "a video in which a person {}",
        "a clip of a person, who {}",
    ),
}


@cache
def load_templates(name: str) -> tuple[str, ...]:
    """The template set of a name, or of a text file with one template a line.

    Raises:
        ValueError: there is no such set or file, it is empty, or a template has no `{}` (or two).
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if is_there(name) and not is_file(name):
        raise ValueError(f"--templates {name!r}: {no_file(name)}")
    if not is_file(name):
        raise ValueError(
            f"--templates {name!r} is neither a file nor one of {', '.join(TEMPLATES)}"
            + did_you_mean(name, TEMPLATES)
        )
    lines = [line.strip() for line in _read_text(path).splitlines()]
    for number, line in enumerate(lines, 1):
        if line and line.count("{}") != 1:
            raise ValueError(
                f"{path}:{number}: a template needs exactly one {{}} where the class name goes, "
                f"got {line!r}"
            )
    templates = tuple(dict.fromkeys(line for line in lines if line))
    if not templates:
        raise ValueError(
            f"{path} holds no template: write one a line, such as a video of a person {{}}."
        )
    return templates


def words_of(name: str) -> str:
    """A class name as words: `sit_down`, `SitDown` and `sit-down` become "sit down".

    CamelCase is split as CLIP splits UCF101's names ("Apply Eye Makeup"); capitals are kept. A
    number such as -1, and a name of nothing but `_` and `-`, is its own word.
    """
    if NUMBER.fullmatch(name.strip()):
        return name.strip()
    spaced = re.sub(r"[_\-]+", " ", name)
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", spaced)
    return " ".join(spaced.split()) or name.strip()


def same_words(text: str) -> str:
    """One key for texts that differ in spelling only: `sit down`, `Sit_Down` and `SitDown`."""
    return words_of(unicodedata.normalize("NFKC", text)).casefold()


def refuse_same_words(words: dict[str, str], where: str | Callable[[str], str]) -> None:
    """Refuse classes that differ in spelling only, which no model can distinguish.

    Args:
        words: class name -> its words; the names themselves count where they are the words.
        where: where they come from; or a function that says it of a name.

    Raises:
        ValueError: there are two such classes; both are named.
    """
    first: dict[str, str] = {}
    for name, text in words.items():
        other = first.setdefault(same_words(text), name)
        if other != name:
            place = where if isinstance(where, str) else where(name)
            raise ValueError(
                f"{place}: the classes {other!r} and {name!r} are the same words "
                f"({words_of(text)!r}), which no model can distinguish: write one of them "
                "everywhere, or give each words of its own"
            )


def load_classes(given: str) -> dict[str, str]:
    """The classes a user names: class name -> its words.

    Args:
        given: names separated by commas; or a file with one class a line, either just a name or, as
            csv with the header `label,text`, a name and the words that describe it.

    Returns:
        in the order given; the words are `words_of` the name where none are given.

    Raises:
        ValueError: no name, an empty one, the same one (or the same words, however spelt) twice, or
            a csv without the two columns.
    """
    path = Path(given)
    if os.path.isfile(given):  # no OSError where hundreds of names are longer than a path may be
        text = _read_text(path)
        try:
            rows = list(csv.reader(text.splitlines()))
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read as csv: {error}") from error
        header = [cell.strip().lower() for cell in next((r for r in rows if r), [])]
        if header[:2] in (["label", "text"], ["id", "name"]):
            pairs = [(n, row) for n, row in enumerate(rows, 1) if any(c.strip() for c in row)][1:]
            short = [n for n, row in pairs if len(row) != 2 or not row[0].strip()]
            if short:
                raise ValueError(
                    f"{path}:{short[0]}: each line needs a label and its text, in quotes if it "
                    "holds a comma"
                )
            entries = [(row[0].strip(), row[1].strip()) for _, row in pairs]
        else:
            entries = [(line.strip(), "") for line in text.splitlines() if line.strip()]
        where = str(path)
    else:
        if "/" in given or given.endswith((".txt", ".csv")) or is_there(given):
            raise ValueError(f"--classes {given!r}: {no_file(given)}")
        entries, where = [(name.strip(), "") for name in given.split(",")], f"--classes {given!r}"
        if any(not name for name, _ in entries):
            raise ValueError(f"{where} holds an empty name: remove the extra comma")
    if not entries:
        raise ValueError(f"{where} names no class")
    classes = {name: text or words_of(name) for name, text in entries}
    if len(classes) < len(entries):
        twice = next(n for i, (n, _) in enumerate(entries) if n in dict(entries[:i]))
        raise ValueError(f"{where} names the class {twice!r} twice")
    refuse_same_words({name: name for name in classes}, where)
    refuse_same_words(classes, where)
    return classes


def _read_text(path: Path) -> str:
    with reading(path):
        data = read_limited(path, MAX_TEXT)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
