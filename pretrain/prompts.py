"""Class names -> sentences: the published prompt templates, and the user's own.

The two published sets are those of CLIP (Radford et al. 2021; github.com/openai/CLIP, data/prompts.md),
grammar mistakes included, because the published numbers were made with them.
"""

import csv
import os
import re
from functools import cache
from pathlib import Path

_KINDS = ("photo", "video", "example", "demonstration")
_DOING = ("using", "doing", "during", "performing", "practicing")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
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
    # Ours, for class texts that are verbs in the third person, such as those of the built-in world.
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
    if not os.path.isfile(name):
        raise ValueError(
            f"--templates {name!r} is neither a file nor one of {', '.join(TEMPLATES)}"
        )
    lines = [line.strip() for line in _read_text(path).splitlines()]
    for number, line in enumerate(lines, 1):
        if line and line.count("{}") != 1:
            raise ValueError(
                f"{path}:{number}: a template needs exactly one {{}} where the class name goes, got {line!r}"
            )
    templates = tuple(dict.fromkeys(line for line in lines if line))
    if not templates:
        raise ValueError(
            f"{path} holds no template: write one a line, such as a video of a person {{}}."
        )
    return templates


def words_of(name: str) -> str:
    """A class name as words: `sit_down`, `SitDown` and `sit-down` become "sit down".

    CamelCase is split as CLIP splits UCF101's names ("Apply Eye Makeup"); capitals are kept.
    """
    name = re.sub(r"[_\-]+", " ", name)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(name.split())


def load_classes(given: str) -> dict[str, str]:
    """The classes a user names: class name -> its words.

    Args:
        given: names separated by commas; or a file with one class a line, either just a name or, as csv
            with the header `label,text`, a name and the words that describe it.

    Returns:
        in the order given; the words are `words_of` the name where none are given.

    Raises:
        ValueError: no name, an empty one, the same one (or the same words) twice, or a csv without the
            two columns.
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
                    f"{path}:{short[0]}: each line needs a label and its text, in quotes if it holds a comma"
                )
            entries = [(row[0].strip(), row[1].strip()) for _, row in pairs]
        else:
            entries = [(line.strip(), "") for line in text.splitlines() if line.strip()]
        where = str(path)
    else:
        if "/" in given or given.endswith((".txt", ".csv")):
            raise ValueError(f"--classes {given!r}: there is no such file")
        entries, where = [(name.strip(), "") for name in given.split(",")], f"--classes {given!r}"
        if any(not name for name, _ in entries):
            raise ValueError(f"{where} holds an empty name: remove the extra comma")
    if not entries:
        raise ValueError(f"{where} names no class")
    classes = {name: text or words_of(name) for name, text in entries}
    names = [name for name, _ in entries]
    for what, values in (("class", names), ("class text", list(classes.values()))):
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ValueError(
                f"{where} names the {what} {twice[0]!r} twice: the model could not tell them apart"
            )
    return classes


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
