"""The page of `look` in a real browser: headless Chromium, driven by selenium.

Skipped where there is no Chromium with its driver. Nothing leaves this computer.
"""

import csv
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from downstream.look.moments import find_moments
from downstream.look.server import Look, listen, server
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.sources import list_sources
from recipes import look
from tests.conftest import MOTIONS, draw_motion, write_video

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here"),
]
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
HOSTILE = "<img src=x onerror=document.title='broken'>.mp4"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Look:
    """Sixty-one videos, one of them hostile and one of three moments, with vectors by motion."""
    folder, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("out")
    names = [f"{motion}-{i:02}.mp4" for i in range(15) for motion in MOTIONS]
    drawn = {m: draw_motion(m, i, 0, 16, 32) for i, m in enumerate(MOTIONS)}
    for motion in MOTIONS:
        write_video(folder / f"{motion}-00.mp4", drawn[motion])
    for name in names[4:]:
        shutil.copy(folder / f"{name.split('-')[0]}-00.mp4", folder / name)
    write_video(folder / HOSTILE, draw_motion("up", 9, 0, 96, 32))
    with open(folder / "list.csv", "w", newline="") as file:
        rows = [[name, "up" if name == "up-03.mp4" else "", ""] for name in names]
        rows.append([HOSTILE, "", "<script>document.title='broken'</script>"])
        csv.writer(file).writerows([["path", "label", "caption"], *rows])
    packed = out / "pack"
    pack(folder / "list.csv", packed, short_side=32, workers=1, progress=False)
    opened = Pack(packed)
    moments = find_moments(opened, 2.0)
    directions = np.eye(4, 8, dtype=np.float32)
    order = list(MOTIONS)
    kind = [order.index(moments.videos[v].split("-")[0]) if "-" in moments.videos[v][:6] else 3
            for v in moments.video]  # fmt: skip
    vectors = directions[kind] + 0.05 * np.random.default_rng(0).normal(size=(len(kind), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    sources = {source.name: source for source in list_sources(folder / "list.csv").sources}
    labels = look.read_labels(opened, moments, sources, out)
    return Look(
        str(folder), "tiny", opened, moments, vectors, labels, ["up", "fall"],
        lambda text: directions[order.index(text.split()[-1])], first=[5, 6],
    )  # fmt: skip


@pytest.fixture(scope="module")
def address(page) -> Iterator[str]:
    listener = listen(0)
    running = server(page, listener, "token")
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator["Browser"]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield Browser(driver)
    driver.quit()


class Browser:
    """A page, asked in JavaScript."""

    def __init__(self, driver):
        self.driver = driver

    def run(self, script: str, *values: object):
        return self.driver.execute_script(script, *values)

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 60
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.run("return document.body.innerText"))
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def size(self, width: int, height: int) -> None:
        about = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", about)

    def cards(self) -> list[int]:
        return self.run(
            "return [...document.querySelectorAll('.card[data-n]')].map(c => +c.dataset.n)"
        )

    def open(self, address: str) -> "Browser":
        self.driver.get(f"{address}/?token=token")
        self.wait("document.querySelector('.card')")
        return self

    def view(self, kind: str, heading: str) -> None:
        self.run(f"document.querySelector('[data-kind={kind}]').click()")
        self.wait(f"heading.textContent.startsWith({heading!r})")


@pytest.fixture
def shown(browser, address) -> Browser:
    browser.size(1280, 850)
    return browser.open(address)


def labels_of(page: Look) -> dict[str, list[str]]:
    rows = csv.DictReader(page.labels.path.open(newline=""))
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["label"]:
            found.setdefault(Path(row["path"]).name, []).append(row["label"])
    return found


def test_the_address_loses_its_token_and_nothing_is_asked_elsewhere(shown, address):
    assert shown.driver.current_url == f"{address}/"
    shown.driver.get_log("performance")  # of the browser's own first page
    shown.driver.refresh()
    shown.wait("document.querySelector('.card')")
    shown.view("all", "All moments")
    shown.run("document.querySelectorAll('.card')[0].click()")
    shown.wait("player.videoWidth > 0")
    asked = [e["message"] for e in shown.driver.get_log("performance")]
    urls = [m.split('"url":"')[1].split('"')[0] for m in asked if 'requestWillBeSent"' in m]
    assert urls and all(url.startswith((address, "data:")) for url in urls), urls
    errors = [e for e in shown.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert not errors


def test_names_and_captions_are_text(shown, page):
    shown.view("all", "All moments")
    first = page.moments.videos.index(HOSTILE)
    assert first == 0  # "<" stands before the letters
    shown.run("document.querySelectorAll('.card')[0].click()")
    assert HOSTILE in shown.run("return where.textContent")
    assert "<script>" in shown.run("return captions.textContent")
    scripts = "document.querySelectorAll('#moments script, #captions script')"
    assert shown.run(f"return {scripts}.length") == 0
    assert shown.run("return document.title").startswith("Look: ")
    assert shown.run(
        "return [...document.images].every(i => !i.src || i.src.includes('/thumbnail/'))"
    )


def test_a_sentence_finds_moments_that_are_played(shown, page):
    shown.run("sentence.value = 'something moves left'; search.requestSubmit()")
    shown.wait("heading.textContent.includes('moves left')")
    names = [page.moments.videos[page.moments.video[n]] for n in shown.cards()[:15]]
    assert all(name.startswith("left") for name in names)
    shown.run("document.querySelectorAll('.card')[2].click()")
    shown.wait("!player.paused && player.currentTime > 0 && player.videoWidth == 32")
    shown.run("document.getElementById('like').click()")
    shown.wait("heading.textContent.startsWith('Like left')")
    assert shown.cards()[0] == shown.run("return chosen.n")


def test_the_moment_is_played_again_and_again(shown, page):
    shown.view("all", "All moments")
    shown.run("document.querySelectorAll('.card')[1].click()")  # the second of three
    shown.wait("player.currentTime >= 2")
    assert shown.run("return [chosen.from, chosen.to]") == [2, 4]
    shown.run("player.currentTime = 3.9; player.play()")
    shown.wait("player.currentTime < 3")
    assert shown.run("return player.currentTime") >= 1.9


def test_keys_label_and_undo(shown, page):
    from selenium.webdriver.common.keys import Keys

    shown.view("all", "All moments")
    shown.run("document.querySelectorAll('.card')[3].click()")
    n = shown.cards()[3]
    name = page.moments.videos[page.moments.video[n]]
    shown.press("2")
    shown.wait("document.querySelectorAll('.card')[3].innerText.includes('fall')")
    shown.press("1")
    shown.wait("document.querySelectorAll('.card')[3].innerText.includes('up')")
    assert labels_of(page)[name] == ["fall", "up"]
    shown.press("2")
    shown.wait("!document.querySelectorAll('.card')[3].innerText.includes('fall')")
    assert labels_of(page)[name] == ["up"]
    shown.press("u")
    shown.wait("document.querySelectorAll('.card')[3].innerText.includes('fall')")
    shown.press(Keys.ARROW_RIGHT)
    shown.wait(f"chosen.n === {shown.cards()[4]}")
    shown.press("9")
    shown.wait("document.getElementById('status').textContent.includes('no label 9')")
    # What is typed into a field labels nothing.
    shown.run("document.getElementById('new').focus()")
    shown.press("1 jump", Keys.ENTER)
    shown.wait("labels.innerText.includes('1 jump')")
    assert labels_of(page)[name] == ["fall", "up"] and "1 jump" not in str(labels_of(page))
    shown.view("unlabelled", "Moments without")
    assert n not in shown.cards()
    shown.driver.refresh()
    shown.wait("document.querySelector('.card')")
    shown.view("all", "All moments")
    assert "fall" in shown.run("return document.querySelectorAll('.card')[3].innerText")


def test_views(shown, page):
    assert shown.run("return heading.textContent") == "Label these first"
    assert shown.cards() == [5, 6]
    shown.view("all", "All moments")
    assert len(shown.cards()) == 48
    shown.press("]")
    shown.wait("range.textContent.startsWith('49')")
    assert len(shown.cards()) == len(page.moments) - 48
    shown.view("groups", "Groups")
    shown.run("wanted.value = 4; wanted.dispatchEvent(new Event('change'))")
    shown.wait("document.querySelectorAll('.group').length === 4")
    shown.run("document.querySelector('.group').click()")
    shown.wait("heading.textContent === 'Group 1'")
    kinds = {page.moments.videos[page.moments.video[n]].split("-")[0] for n in shown.cards()}
    assert len(kinds - {HOSTILE.split("-")[0]}) == 1
    shown.view("near", shown.run("return state.near"))
    assert len(shown.cards()) >= 2


def test_the_next_page_skips_no_moment_where_labelled_ones_leave_the_list(shown):
    shown.view("unlabelled", "Moments without")
    first = shown.cards()
    shown.run("document.querySelectorAll('.card')[0].click()")
    shown.press("2")
    shown.wait("document.querySelectorAll('.card')[0].innerText.includes('fall')")
    shown.press("]")
    shown.wait("!range.textContent.startsWith('1–')")
    second = shown.cards()
    assert second[0] == first[-1] + 1 and shown.run("return view.offset") == len(first) - 1
    shown.press("[")
    shown.wait("range.textContent.startsWith('1–')")
    assert shown.cards() == [*first[1:], second[0]]
    shown.press("u")
    shown.wait(f"document.querySelector('.card').dataset.n === '{first[0]}'")


def test_a_csv_changed_by_something_else_is_told(shown, page):
    shown.view("all", "All moments")
    shown.run("document.querySelectorAll('.card')[7].click()")
    shown.press("2")
    shown.wait("document.querySelectorAll('.card')[7].innerText.includes('fall')")
    page.labels.path.write_text(page.labels.path.read_text().replace("fall", "stumble"))
    shown.press("1")
    shown.wait("!changed.hidden && changed.innerText.includes('labels-kept-1.csv')")
    assert "stumble" in page.labels.path.read_text()
    shown.run("reload.click()")
    shown.wait("changed.hidden")
    shown.wait("document.querySelectorAll('.card')[7].innerText.includes('stumble')")


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits(shown, width):
    shown.size(width, 850)
    shown.view("all", "All moments")
    shown.run("document.querySelectorAll('.card')[0].click()")
    shown.wait("player.videoWidth > 0")
    assert shown.run("return document.documentElement.scrollWidth") <= width
    shown.run("scrollTo(0, 0)")
    shown.view("unlabelled", "Moments without")
    assert shown.run("return heading.getBoundingClientRect().bottom") < 0.8 * 850  # cards are seen
    # Every control has a name that a screen reader can say.
    nameless = shown.run(
        "return [...document.querySelectorAll('button, input')].filter(e => !(e.innerText.trim() ||"
        " e.getAttribute('aria-label') || (e.labels && e.labels.length))).map(e => e.outerHTML)"
    )
    assert not nameless


def test_without_the_token_there_is_nothing(browser, address):
    browser.driver.delete_all_cookies()
    browser.driver.get(address)
    assert "token" in browser.run("return document.body.innerText")
    assert browser.run("return document.querySelectorAll('.card').length") == 0
