"""A progress bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from pretrain.names import counted, first_of, for_screen

EVERY = 10.0  # seconds between lines in a log
LONG = 10.0  # seconds at work from which on a file is named
T = TypeVar("T")


def slow_files(seconds: dict[str, float]) -> str:
    """Of the files at work and for how long, those that take long, in words."""
    slow = sorted(((s, name) for name, s in seconds.items() if s >= LONG), reverse=True)
    return first_of([f"{for_screen(name, 60)} for {s:.0f} s" for s, name in slow], 3)


class Bar:
    """Counts on standard error: a bar on a terminal, a line now and then in a file.

    Args:
        total: how many there are to do.
        title: what is done.
        unit: what is counted.
        shown: False to print nothing.
        done: how many are done already.
        lines: False to print nothing in a file.
    """

    def __init__(
        self, total: int, title: str, unit: str, shown: bool = True, done: int = 0,
        lines: bool = True,
    ):  # fmt: skip
        self.total, self.title, self.unit, self.done, self.about = total, title, unit, done, ""
        shown, terminal = shown and total > 0, sys.stderr.isatty()
        self.lines = shown and not terminal and lines
        self.bar = None
        if shown and terminal:
            self.bar = tqdm(total=total, desc=title, unit=unit, initial=done, dynamic_ncols=True)
        self.started = self.last = time.monotonic()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int = 1, about: str | None = None) -> None:
        """Take note of so many more, and show other words behind the count, if given."""
        self.done += done
        self.about = self.about if about is None else about
        if self.bar is not None:
            self.bar.set_postfix_str(self.about, refresh=False)
            self.bar.update(done)
        self._line(self.done >= self.total)

    def say(self, title: str | None = None, about: str = "") -> None:
        """Show other words before and after the count."""
        self.title, self.about = self.title if title is None else title, about
        if self.bar is not None:
            self.bar.set_description(self.title, refresh=False)
            self.bar.set_postfix_str(about)
        self._line(title is not None)

    def hide(self) -> None:
        """Make room for what others print, until the next `update`."""
        if self.bar is not None:
            self.bar.clear()

    def write(self, text: str) -> None:
        """A line of its own."""
        tqdm.write(text, file=sys.stderr)

    def _line(self, now: bool) -> None:
        if self.lines and (now or time.monotonic() - self.last >= EVERY):
            self.last = time.monotonic()
            text = f"{self.title}: {self.done}/{counted(self.total, self.unit)}"
            if 0 < self.done < self.total:
                left = (self.last - self.started) / self.done * (self.total - self.done)
                text += f", {tqdm.format_interval(left)} left"
            print(text + f", {self.about}" * bool(self.about), file=sys.stderr, flush=True)


def counting(items: Sequence[T], title: str, unit: str, shown: bool = True) -> Iterator[T]:
    """The items, counted by a `Bar` as they are done.

    Args:
        items: what there is to do.
        title: see `Bar`, likewise the rest.
        unit: see there.
        shown: see there.
    """
    with Bar(len(items), title, unit, shown) as bar:
        for item in items:
            yield item
            bar.update()
