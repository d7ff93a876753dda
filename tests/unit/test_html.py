"""The writer of reports: everything escaped, nothing loaded, bounded."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pretrain import html
from pretrain.html import Page, animated

HOSTILE = '<script>alert(1)</script>"onload=x \x1b[2J\u202e=cmd|&amp;'


def page_of(name: str) -> str:
    page = Page(name)
    page.heading(name)
    page.text(name, "note")
    page.command(name)
    page.table([name], [[name]])
    page.clips([(name, np.zeros((3, 20, 30, 3), np.uint8))])
    return page.html()


def test_names_are_text():
    plain, hostile = page_of("name"), page_of(HOSTILE)
    tags = lambda text: re.sub(r'(alt|src)="[^"]*"', r"\1", "".join(re.findall(r"<[^>]*>", text)))
    assert tags(hostile) == tags(plain)
    assert "\x1b" not in hostile and "\u202e" not in hostile and "<script" not in hostile


def test_nothing_is_loaded(tmp_path):
    page = Page("report")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    page.figure(tmp_path / "a.png", "a figure")
    page.figure(tmp_path / "missing.png", "none")
    page.clips([("clip", np.zeros((2, 8, 8, 3), np.uint8))])
    page.write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in text and "//" not in re.sub(r"base64,[\w+/=]*", "", text)
    sources = re.findall(r'(?:src|href|srcset)="([^"]*)"', text)
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text


def test_clips_play_and_are_small():
    rng = np.random.default_rng(0)
    moving = np.zeros((60, 240, 320, 3), np.uint8)
    for t in range(60):
        moving[t, 50:90, 4 * t : 4 * t + 40] = 255
    image = Image.open(io.BytesIO(animated(moving)))
    assert image.n_frames == html.FRAMES and max(image.size) == html.SIDE
    noise = rng.integers(0, 256, (60, 512, 512, 3), dtype=np.uint8)
    assert len(animated(noise)) <= html.MOST_CLIP
    assert Image.open(io.BytesIO(animated(moving[:1]))).n_frames == 1


def test_a_page_is_bounded(monkeypatch):
    clip = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(html, "MOST", 3 * len(animated(clip)))
    page = Page("many")
    page.clips([(f"clip {i}", clip) for i in range(10)])
    page.table(["a"], [[i] for i in range(10_000)])
    text = page.html()
    assert text.count("data:image") == 3 and "7 pictures left out" in text
    assert text.count("<tr>") == 1 + html.MOST_ROWS and "9800 more rows" in text
    first = re.search(r"base64,([\w+/=]*)", text)
    assert first and base64.b64decode(first[1]) == animated(clip)


@pytest.mark.parametrize("text", ["", "a" * 10_000, "\ud800"])
def test_any_text_can_be_written(text, tmp_path):
    page = Page(text)
    page.text(text)
    page.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size
