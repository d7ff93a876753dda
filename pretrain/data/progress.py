"""A progress bar on a terminal, a line now and then in a log file."""

import sys
import time

from tqdm import tqdm

EVERY = 10.0  # seconds between lines in a log


class Progress:
    """Counts files done, clips made and files refused on standard error.

    Args:
        total: How many files there are to do.
        shown: False to print nothing.
    """

    def __init__(self, total: int, shown: bool):
        self.total, self.done, self.clips, self.refused = total, 0, 0, 0
        self.lines = shown and total > 0 and not sys.stderr.isatty()
        self.bar = None
        if shown and total > 0 and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc="packing", unit="file", dynamic_ncols=True)
        self.started = self.last = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
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
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"{self._rate():.1f} clips/s, {self.refused} refused", refresh=False
            )
            self.bar.update()
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
            f"{self._rate():.1f} clips/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
