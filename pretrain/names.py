"""Names from outside (files, classes, people, captions) on screen, in csv, cards and figures.

A name may hold anything: sequences that move a terminal's cursor, formulas that a spreadsheet runs,
Markdown, HTML, bytes that are no UTF-8 (Python's lone surrogates). JSON files keep names as they
are; everywhere else they pass through the function here that knows what is dangerous there. Our own
numbers and words come out unchanged.
"""

import hashlib
import html
import re
import shlex
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TextIO

JOINERS = "\u200c\u200d"  # format characters without which Persian, Hindi and emoji are misspelt
CURSOR = re.compile(r"(?:\r|\n|\x1b\[A)+")  # what tqdm writes to move its bars
ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U(00(?:10|0[0-9a-f])[0-9a-f]{4}))")
FORMULA = re.compile(r"'*\s*[=+\-@＝＋－＠]")
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_SECRET = re.compile(r"(?<=://)[^\s/]+(?=@)")


def _escape(text: str, kept: str) -> str:
    r"""Control, format, private and unassigned characters and line ends as `\x1b`; `kept` stay."""
    if text.isprintable():
        return text
    safe = []
    for c in text:
        number = ord(c)
        if c.isprintable() or c in kept or unicodedata.category(c) == "Zs":
            safe.append(c)
        elif number < 0x100:
            safe.append(f"\\x{number:02x}")
        else:
            safe.append(f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}")
    return "".join(safe)


def for_screen(text: object, most: int | None = None) -> str:
    """One line that cannot steer a terminal or change the order of what stands around it.

    User and password of an address become stars.

    Args:
        text: a name, a path, a sentence that holds one.
        most: characters; a longer text loses its middle.
    """
    line = _SECRET.sub("***", _escape(str(text), JOINERS))
    if most is None or len(line) <= most:
        return line
    tail = (most - 1) // 2
    return f"{line[: most - 1 - tail]}…{line[len(line) - tail :]}"


def for_shell(path: object) -> str:
    """A path, or what else is to be copied into a command, quoted where a shell needs it."""
    return shlex.quote(for_screen(path))


def for_csv(value: object) -> object:
    """A csv cell that no spreadsheet takes for a formula; `from_csv` reads it back.

    Numbers, also those written as text, stay numbers.
    """
    if not isinstance(value, str):
        return value
    text = _escape(ESCAPED.sub(lambda found: "\\x5c" + found[0][1:], value), JOINERS)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def from_csv(cell: str) -> str:
    """The text of which `for_csv` made a cell."""
    return unescaped(unmarked(cell))


def unmarked(cell: str) -> str:
    """A csv cell without the quote that `for_csv` puts before a formula."""
    marked = cell[:1] == "'" and FORMULA.match(cell[1:]) and not NUMBER.fullmatch(cell[1:])
    return cell[1:] if marked else cell


def unescaped(text: str) -> str:
    """A text with the characters that `for_csv` escapes."""
    return ESCAPED.sub(lambda found: chr(int(found[1] or found[2] or found[3], 16)), text)


def for_markdown(value: object) -> str:
    """One line of Markdown, also in a cell of a table, that shows the text and nothing else."""
    if not isinstance(value, str):
        return for_screen(value)
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)", r"\\\\", for_screen(value))
    text = re.sub(r"([`*\[\]<>|~$]|&(?=#?\w+;)|(?<!\w)_|_(?!\w))", r"\\\1", text)
    # At the start of a line: no heading, list or rule.
    return re.sub(r"^(\d*)([.)#+=-])(?=[#+=-]*(\s|$))", r"\1\\\2", text)


def for_html(text: object) -> str:
    """One line of text as HTML, also within quotes."""
    return html.escape(for_screen(text))


def for_figure(text: object, most: int = 120) -> str:
    r"""One line that matplotlib draws as it stands; `\$` is a dollar there and starts no formula.

    Args:
        text: a name, or a title that holds one.
        most: characters; a longer text loses its middle.
    """
    return for_screen(text, most).replace("$", r"\$")


def for_title(text: object, inches: float, points: float = 10) -> str:
    """A title over several lines where one would be wider than the figure, as matplotlib draws it.

    Args:
        text: the title, or a name.
        inches: width of the figure.
        points: size of its letters, of which a mean one is half as wide.
    """
    lines = textwrap.wrap(for_screen(text, 300), max(20, int(inches * 135 / points)))
    return "\n".join(lines).replace("$", r"\$")


def file_name(text: str) -> str:
    """A name for a file or folder of ours, of at most 100 bytes, neither hidden nor an option.

    Colons, slashes and spaces, which names of models and data have, become dashes; another change,
    or a cut, adds a short hash, so that different names stay different.
    """
    dashed = re.sub(r"[:/ ]+", "-", text)
    safe = "".join(c if c.isalnum() or c in "_.-" else "-" for c in dashed).strip(".-")
    if safe and safe == dashed and len(safe.encode()) <= 100:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    cut = safe.encode()[: 99 - len(digest)].decode(errors="ignore").strip(".-")
    return f"{cut}-{digest}" if cut else digest


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, or else its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nothing_usable(where: str, refused: Mapping[str, str]) -> ValueError:
    """What to raise where every file was refused: the first three, each with its reason."""
    reasons = "; ".join(for_screen(f"{name}: {why}") for name, why in list(refused.items())[:3])
    return ValueError(f"nothing at {where} can be used: {reasons}")


def counted(number: int, what: str) -> str:
    """So many things in words: "1 clip", "3 clips", "2 classes", "4 people"."""
    if number == 1:
        return f"1 {what}"
    if what.endswith("person"):
        return f"{number} {what.removesuffix('person')}people"
    return f"{number} {what}{'es' if what.endswith(('s', 'x', 'ch')) else 's'}"


def first_of(words: Sequence[object], most: int, between: str = ", ") -> str:
    """The first few of some names on one line, and how many there are beside: "a, b and 3 more".

    Args:
        words: names, in the order in which they are shown.
        most: so many are shown.
        between: stands between two of them.
    """
    more = f" and {len(words) - most} more" * (len(words) > most)
    return between.join(map(for_screen, words[:most])) + more


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """Names like a mistyped one, as the end of a sentence: "; did you mean lstm?", or nothing.

    The same words in another order come first: `videomae_k400_b` is videomae_b_k400.

    Args:
        word: what was typed.
        known: the names that there are.
        before: stands before each name that is shown, such as a flag's hyphens.
    """
    names = {name.lower(): name for name in known}
    words = lambda name: sorted(re.findall(r"[^\W_]+", name))
    near = [name for name in names if words(name) == words(word.lower())]
    near = near or get_close_matches(word.lower(), names, 3, 0.5)
    shown = " or ".join(before + names[name] for name in near)
    return f"; did you mean {shown}?" if near else ""


class _Screen:
    """A stream of text that hands everything on, what could steer a terminal as visible escapes.

    Lines end and tqdm moves its bars as ever. A letter that the terminal's encoding lacks is
    escaped too.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not (self._stream.isatty() and CURSOR.fullmatch(text)):
            text = _SECRET.sub("***", _escape(text, JOINERS + "\n\r\t"))
        return self._stream.write(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)


def clean_screen() -> None:
    """From now on nothing printed steers the terminal, or fails for a letter it cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Screen):
            setattr(sys, name, _Screen(stream))
