"""Reports that a browser opens: one file of HTML, without a request to anywhere.

Everything that is not ours is escaped (`pretrain.names.for_html`), pictures and short clips are
inside as data URIs, and a Content-Security-Policy forbids the page all else: no script runs and
nothing is loaded. Light and dark as the reader has it; it prints.

    page = Page("title")
    page.text("a sentence")
    page.table(["class", "top-1"], [["bend", "90.0 %"]])
    page.write(Path("report.html"))

A page holds at most `MOST` bytes of pictures: what does not fit is left out, and that is said.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.files import read_limited
from pretrain.log import write_whole
from pretrain.names import counted, for_html

MOST = 12 * 2**20  # bytes of pictures of a page
MOST_FIGURE = 4 * 2**20  # of one .png
MOST_CLIP = 150_000  # of one animated clip
MOST_ROWS = 200  # of a table
FRAMES, SIDE = 16, 128  # of an animated clip: pictures, and pixels of its longer side
QUALITIES = (60, 30, 10)  # of WebP, until a clip is small enough
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
h1, h2, p, td, th, figcaption { overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; } .note { border-left: .25rem solid #c80; padding-left: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } th, td:first-child { overflow-wrap: break-word; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.clips figure { margin: 0; } .clips img { width: 100%; background: var(--soft); }
figcaption { font-size: .85rem; }
code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
""".strip()
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
"""


class Page:
    """A report that grows from top to bottom.

    Args:
        title: its first line.
    """

    def __init__(self, title: str):
        self._parts = [HEAD.format(title=for_html(title), style=STYLE)]
        self._room, self._lacking = MOST, 0

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{for_html(text)}</h2>\n")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; `kind` is "lead" for the most important one, "note" for a warning."""
        assert kind in ("", "lead", "note")
        self._parts.append(f'<p class="{kind}">{for_html(text)}</p>\n' if kind else
                           f"<p>{for_html(text)}</p>\n")  # fmt: skip

    def command(self, text: str) -> None:
        """A command to copy."""
        self._parts.append(f"<p><code>{for_html(text)}</code></p>\n")

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table, of which at most `MOST_ROWS` rows are shown; `heads` may be empty."""
        rows = list(rows)
        line = lambda cells, tag: "".join(f"<{tag}>{for_html(c)}</{tag}>" for c in cells)
        lines = [f"<tr>{line(row, 'td')}</tr>\n" for row in rows[:MOST_ROWS]]
        head = f"<thead><tr>{line(heads, 'th')}</tr></thead>\n" if heads else ""
        self._parts.append(f'<div class="wide"><table>{head}<tbody>\n{"".join(lines)}</tbody>'
                           "</table></div>\n")  # fmt: skip
        if len(rows) > MOST_ROWS:
            self.text(f"{counted(len(rows) - MOST_ROWS, 'more row')} not shown")

    def figure(self, path: Path, about: str) -> None:
        """A .png file of ours, if it is there.

        Args:
            path: the file.
            about: what it shows, also for who cannot see it.
        """
        if not path.is_file():
            return
        data = read_limited(path, MOST_FIGURE)
        self._parts.append(self._image(data, "image/png", about, for_html(about)))

    def clips(self, clips: Iterable[tuple[str, np.ndarray]]) -> None:
        """Short clips that play, side by side.

        Args:
            clips: caption and uint8 frames (T, H, W, 3) of each; of one frame, a picture.
        """
        shown = [
            self._image(animated(frames), "image/webp", caption, for_html(caption))
            for caption, frames in clips
        ]
        self._parts.append(f'<div class="clips">\n{"".join(shown)}</div>\n')

    def _image(self, data: bytes, kind: str, about: str, caption: str) -> str:
        if len(data) > self._room:
            self._lacking += 1
            return f"<figure><figcaption>{caption} (not shown)</figcaption></figure>\n"
        self._room -= len(data)
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        image = f'<img src="{source}" alt="{for_html(about)}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"

    def html(self) -> str:
        """The whole page."""
        lacking = ""
        if self._lacking:
            number = counted(self._lacking, "picture")
            lacking = f"<p>{number} left out for the size of the page</p>\n"
        return f"{''.join(self._parts)}{lacking}</body>\n</html>\n"

    def write(self, path: Path) -> None:
        """Write it to a file, whole or not at all.

        Raises:
            ValueError: the disk does not take it.
        """
        write_whole(path, self.html().encode("utf-8"))


def animated(frames: np.ndarray) -> bytes:
    """A clip (T, H, W, 3) as a small WebP that plays for ever, of at most `MOST_CLIP` bytes.

    Frames are spread over the clip, and it plays in about two seconds. What is still too large at
    the lowest quality, such as noise, is its first picture.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int))
    images = [Image.fromarray(np.ascontiguousarray(frames[i])) for i in chosen]
    for image in images:
        image.thumbnail((SIDE, SIDE))
    data = b""
    for some, quality in [(images, q) for q in QUALITIES] + [(images[:1], QUALITIES[-1])]:
        file = io.BytesIO()
        first, *rest = some
        first.save(file, "WEBP", save_all=bool(rest), append_images=rest, duration=120, loop=0,
                   quality=quality, method=2)  # fmt: skip
        data = file.getvalue()
        if len(data) <= MOST_CLIP:
            break
    return data
