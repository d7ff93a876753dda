"""A progress bar on a terminal, a line now and then in a log file."""

import sys
import time

from tqdm import tqdm

from pretrain.names import for_screen

EVERY = 10.0  # seconds between lines in a log
LONG = 10.0  # seconds at work from which on a file is named


class Progress:
    """Counts files done, clips made and files refused on standard error.

    Args:
        total: How many files there are to do.
        shown: False to print nothing.
    """

    def __init__(self, total: int, shown: bool):
        self.total, self.done, self.clips, self.refused = total, 0, 0, 0
        self.slow = ""  # the files that have been at work for long
        self.lines = shown and total > 0 and not sys.stderr.isatty()
        self.bar = None
        if shown and total > 0 and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc="packing", unit="file", dynamic_ncols=True)
        self.started = self.last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.slow = ""
        if self.bar is not None:
            self.bar.close()
        elif self.lines:
            self._print()

    def update(self, clips: int, refused: bool) -> None:
        """Takes note of one more file done."""
        self.done, self.clips, self.refused = (
            self.done + 1,
            self.clips + clips,
            self.refused + refused,
        )
        self._show(1)

    def at_work(self, seconds: dict[str, float]) -> None:
        """Takes note of the files at work now and for how long; names those that take long."""
        slow = sorted(((s, name) for name, s in seconds.items() if s >= LONG), reverse=True)
        self.slow = ", ".join(f"{for_screen(name, 60)} for {s:.0f} s" for s, name in slow[:3])
        if len(slow) > 3:
            self.slow += f" and {len(slow) - 3} more"
        if slow:
            self._show(0)

    def _show(self, done: int) -> None:
        if self.bar is not None:
            text = f"{self._rate():.1f} clips/s, {self.refused} refused"
            self.bar.set_postfix_str(text + f", at work: {self.slow}" * bool(self.slow), done == 0)
            self.bar.update(done)
        elif self.lines and time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            self._print()

    def _rate(self) -> float:
        return self.clips / max(1e-9, time.monotonic() - self.started)

    def _print(self) -> None:
        seconds = time.monotonic() - self.started
        left = seconds / max(1, self.done) * (self.total - self.done)
        print(
            f"packing: {self.done}/{self.total} files, {self.clips} clips, {self.refused} refused, "
            f"{self._rate():.1f} clips/s, {left:.0f} s left"
            + f"; at work: {self.slow}"
            * bool(self.slow),
            file=sys.stderr,
            flush=True,
        )


class Bar:
    """Counts on standard error: a bar on a terminal, a line now and then in a file.

    Args:
        total: How many there are to do.
        title: What is done.
        unit: What is counted.
        shown: False to print nothing.
    """

    def __init__(self, total: int, title: str, unit: str, shown: bool = True):
        self.total, self.title, self.unit, self.done, self.about = total, title, unit, 0, ""
        terminal = sys.stderr.isatty()
        self.lines = shown and not terminal
        self.bar = None
        if shown and terminal:
            self.bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)
        self.last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int = 1) -> None:
        """Takes note of so many more."""
        self.done += done
        if self.bar is not None:
            self.bar.update(done)
        self._line(self.done >= self.total)

    def say(self, title: str | None = None, about: str = "") -> None:
        """Shows other words before and after the count."""
        self.title, self.about = self.title if title is None else title, about
        if self.bar is not None:
            self.bar.set_description(self.title, refresh=False)
            self.bar.set_postfix_str(about)
        self._line(title is not None)

    def write(self, text: str) -> None:
        """A line of its own."""
        tqdm.write(text, file=sys.stderr)

    def _line(self, now: bool) -> None:
        if self.lines and (now or time.monotonic() - self.last >= EVERY):
            self.last = time.monotonic()
            text = f"{self.title}: {self.done}/{self.total} {self.unit}s"
            print(text + f", {self.about}" * bool(self.about), file=sys.stderr, flush=True)
