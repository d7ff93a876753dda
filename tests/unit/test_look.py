"""`look`: its index, its labels on the disk, and what its server gives to whom."""

import csv
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from downstream.events import read_truth
from downstream.groups import find_leaks, group_clips
from downstream.look import score
from downstream.look import server as served
from downstream.look.cut import write_clips
from downstream.look.index import group, near_duplicates, nearest
from downstream.look.labels import (
    ChangedError,
    Labels,
    Mark,
    Row,
    check_label,
    marks_of,
    read_places,
)
from downstream.look.moments import embed_moments, find_moments
from downstream.look.score import precision_at
from downstream.look.server import HEADERS, Look, listen, server
from downstream.look.speed import measure
from downstream.segments import segments_of
from downstream.splits import choose_splits
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.sources import list_sources
from pretrain.names import from_csv
from recipes import look
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import ROOT, configure

SCRIPT = "<script>document.title='broken'</script>"
IMAGE = "<img src=x onerror=document.title='broken'>.mp4"


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def unit_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """A list of videos: one of three moments, one whose name is a formula, one whose name is HTML,
    two plain ones."""
    folder = tmp_path_factory.mktemp("footage")
    names = ["long.mp4", "=cmd().mp4", IMAGE, "plain.mp4", "other.mp4"]
    for i, name in enumerate(names):
        write_video(folder / name, draw_motion("right", i, 0, 96 if i == 0 else 16, 32))
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "caption", "class_text"])
        writer.writerow(["long.mp4", "", "train", "=HYPERLINK(1)", ""])
        writer.writerow(["long.mp4", "", "train", SCRIPT, ""])
        writer.writerow(["=cmd().mp4", "walk", "train", "", "walking"])
        writer.writerow([IMAGE, SCRIPT, "test", "", ""])
        writer.writerow(["plain.mp4", "", "test", "", ""])
        writer.writerow(["other.mp4", "\x1b[31mred", "test", "", ""])
    return folder / "list.csv"


@pytest.fixture(scope="module")
def packed(footage, tmp_path_factory) -> Pack:
    out = tmp_path_factory.mktemp("packed") / "pack"
    pack(footage, out, short_side=32, workers=1, progress=False)
    return Pack(out)


def build(packed: Pack, footage: Path, out: Path, **more) -> Look:
    moments = find_moments(packed, 2.0)
    sources = {source.name: source for source in list_sources(footage).sources}
    labels = look.read_labels(packed, moments, sources, out)
    return Look(
        str(footage), "tiny", packed, moments, unit_rows(len(moments), 8), labels,
        list(labels.counts()), **more,
    )  # fmt: skip


@pytest.fixture
def page(packed, footage, tmp_path) -> Look:
    return build(packed, footage, tmp_path)


def number(page: Look, name: str, place: int = 0) -> int:
    """The number of a moment of a video."""
    video = page.moments.videos.index(name)
    return int(np.flatnonzero(page.moments.video == video)[place])


def give(page: Look, name: str, label: str, place: int = 0) -> bool:
    n = number(page, name, place)
    m = page.moments
    whole = np.count_nonzero(m.video == m.video[n]) == 1
    return page.labels.toggle(
        int(m.video[n]), float(m.start[n]), float(m.end[n]), bool(whole), label
    )


# ---- the index


@pytest.mark.parametrize("count", [1, 7, 8192, 20_000])
def test_search_finds_what_comparing_all_finds(count):
    vectors, query = unit_rows(count, 16), unit_rows(1, 16, 1)[0]
    vectors[count // 2 :: 3] = vectors[0]  # many that are equal
    numbers, scores = nearest(vectors, query, 50)
    everything = vectors @ query
    assert np.allclose(scores, np.sort(everything)[::-1][:50], atol=1e-6)
    assert np.allclose(everything[numbers], scores, atol=1e-6)
    assert len(set(numbers.tolist())) == len(numbers) == min(50, count)


def test_near_duplicates_are_of_two_videos_and_told_once():
    vectors = unit_rows(300, 32)
    video = np.arange(300) // 3
    vectors[200], vectors[201], vectors[50] = vectors[10], vectors[9], vectors[51]
    vectors[4] = vectors[3]  # within one video
    found = near_duplicates(vectors, video, 10)
    assert {(a, b) for a, b, _ in found} == {(9, 201), (10, 200), (50, 51)} and len(found) == 3
    same = np.repeat(unit_rows(1, 8), 3000, 0)  # all alike: bounded in number and in time
    assert len(near_duplicates(same, np.arange(3000), 20)) == 20


def test_the_speed_is_measured():
    assert all(taken >= 0 for taken in measure(60, 8, 3).values())


def test_groups_hold_every_moment_once():
    centres = unit_rows(4, 16) * 5
    vectors = np.concatenate([c + unit_rows(30 + i, 16, i) for i, c in enumerate(centres)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = group(vectors, 4)
    assert sorted(np.concatenate(groups)) == list(range(len(vectors)))
    truth = np.repeat(range(4), [30, 31, 32, 33])
    assert all(len(set(truth[g])) == 1 for g in groups)
    assert [len(g) for g in groups] == [33, 32, 31, 30]
    assert len(group(np.repeat(vectors[:1], 9, 0), 5)) == 1


def test_moments_cover_every_video_and_are_embedded_once(packed, tiny_backbone, monkeypatch):
    moments = find_moments(packed, 2.0)
    assert sorted(moments.videos) == moments.videos and len(moments) == 7
    long = moments.video == moments.videos.index("long.mp4")
    assert np.allclose(moments.start[long], [0, 2, 4]) and np.allclose(moments.end[long], [2, 4, 6])
    from downstream.features import Extraction
    from downstream.models import load_backbone

    backbone = load_backbone(str(tiny_backbone))
    vectors = embed_moments(backbone, packed, moments, Extraction(), bar=False)
    assert vectors.shape == (7, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert not np.allclose(vectors[long][0], vectors[long][2], atol=1e-3)
    monkeypatch.setattr("downstream.look.moments.show", lambda *_: pytest.fail("embeds again"))
    again = embed_moments(backbone, packed, moments, Extraction(), bar=False)
    assert np.array_equal(vectors, again)


# ---- labels


def test_labels_come_back_from_the_packer(page, tmp_path):
    give(page, "plain.mp4", "run")
    give(page, "long.mp4", "walk", 0)
    give(page, "long.mp4", "walk", 1)
    give(page, "long.mp4", "fall over", 2)
    path = tmp_path / "labels.csv"
    rows = rows_of(path)
    assert {row["path"].split("/")[-1] for row in rows} == {
        "long.mp4", "=cmd().mp4", IMAGE, "plain.mp4", "other.mp4",
    }  # fmt: skip
    index = pack(path, tmp_path / "again", short_side=32, workers=1, progress=False)
    again = {Path(r["source"]).name: r for r in Pack(tmp_path / "again").records()}
    assert again["plain.mp4"]["label"] == "run" and again["plain.mp4"]["split"] == "test"
    assert again["=cmd().mp4"]["label"] == "walk"
    assert again["=cmd().mp4"]["extra"]["class_text"] == "walking"
    long = again["long.mp4"]
    assert long["label"] is None and len(long["captions"]) == 2
    assert segments_of(long) == [(0, 2, "walk"), (2, 4, "walk"), (4, 6, "fall over")]
    assert {"run", "walk"} <= set(index["classes"])
    train, test, _ = choose_splits(Pack(tmp_path / "again"), "train", "test", 0, labels=False)
    assert len(train) == 2 and len(test) == 3
    truth = read_truth(path) if all(r["start"] for r in rows if r["label"]) else {}
    assert not truth  # labels of whole videos have no times
    # And the page finds them again, whatever the data say.
    fresh = build(page.pack, Path(page.title), tmp_path)
    assert fresh.labels.marks == page.labels.marks


def test_several_labels_of_a_moment(page, tmp_path):
    give(page, "plain.mp4", "run")
    assert give(page, "plain.mp4", "outside")
    give(page, "long.mp4", "run", 1)
    give(page, "long.mp4", "outside", 1)
    assert page.item(number(page, "plain.mp4"))["labels"] == ["run", "outside"]
    times = [
        (r["start"], r["end"]) for r in rows_of(tmp_path / "labels.csv") if "plain" in r["path"]
    ]
    assert times == [("0.000", "1.000")] * 2  # two labels of a whole video are refused by lists
    pack(tmp_path / "labels.csv", tmp_path / "p", short_side=32, workers=1, progress=False)
    fresh = build(page.pack, Path(page.title), tmp_path)
    assert fresh.item(number(fresh, "plain.mp4"))["labels"] == ["run", "outside"]
    assert not give(page, "plain.mp4", "run") and not give(page, "long.mp4", "run", 1)
    assert page.item(number(page, "long.mp4", 1))["labels"] == ["outside"]
    assert page.item(number(page, "long.mp4", 0))["labels"] == []


def test_parts_of_long_videos_become_files(page, tmp_path):
    give(page, "long.mp4", "walk", 0)
    give(page, "long.mp4", "fall over", 2)
    give(page, "long.mp4", "run", 1)
    give(page, "long.mp4", "outside", 1)
    told = write_clips(page.pack, page.moments, page.labels)
    assert "1 part with several labels left out" in told
    pack(tmp_path / "clips.csv", tmp_path / "p", short_side=32, workers=1, progress=False)
    packed = Pack(tmp_path / "p")
    of = {(Path(r["source"]).parent.name, r["label"]): r for r in packed.records()}
    assert len(packed) == 6
    walk, fall = of["clips", "walk"], of["clips", "fall over"]
    assert walk["extra"]["recording"] == fall["extra"]["recording"] == "long.mp4"
    assert (fall["extra"]["start"], fall["extra"]["end"]) == ("4.000", "6.000")
    assert walk["frames"] == fall["frames"] == 32 and walk["split"] == "train"
    groups = group_clips(list(packed.records()))
    assert groups[list(packed.records()).index(walk)] == groups[list(packed.records()).index(fall)]
    # They show what the moment shows, and are not made again.
    record = page.pack.record(int(page.moments.sample[number(page, "long.mp4", 2)]))
    first = int(page.moments.first[number(page, "long.mp4", 2)])
    expected = page.pack.frames(record, np.array([first, first + 31])).numpy().astype(int)
    found = packed.frames(fall, np.array([0, 31])).numpy().astype(int)
    assert np.abs(expected - found).mean() < 3
    dates = {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    write_clips(page.pack, page.moments, page.labels)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()} == dates
    (tmp_path / "clips.csv").write_text("path,label\nmine.mp4,x\n")
    with pytest.raises(ValueError, match="something else"):
        write_clips(page.pack, page.moments, page.labels)


def test_undo(page, tmp_path):
    before = page.labels.marks[:]
    for label in ("run", "jump", "run"):
        give(page, "long.mp4", label, 1)
    assert page.labels.undo() is not None
    assert page.item(number(page, "long.mp4", 1))["labels"] == ["run", "jump"]
    page.labels.undo()
    page.labels.undo()
    assert page.labels.marks == before and page.labels.undo() is None
    assert not [r for r in rows_of(tmp_path / "labels.csv") if r["start"]]


def test_nothing_in_the_csv_is_a_formula_or_steers_a_terminal(page, tmp_path):
    give(page, "long.mp4", "run")
    text = (tmp_path / "labels.csv").read_text()
    assert "\x1b" not in text
    for row in rows_of(tmp_path / "labels.csv"):
        assert not any(re.match(r"\s*[=+@-]", cell) for cell in row.values()), row
    labels = {from_csv(row["label"]) for row in rows_of(tmp_path / "labels.csv")}
    assert {SCRIPT, "\x1b[31mred", "run"} <= labels


@pytest.mark.parametrize(
    "text",
    ["", "  ", "nan", "a;b", "=1+1", "+x", "@x", "-x", "x" * 101, "a\x1b[31m", "a\u202eb", "\0"],
)
def test_labels_that_no_list_gives_back_are_refused(text):
    with pytest.raises(ValueError, match="label"):
        check_label(text)


def test_a_label_that_differs_in_spelling_is_the_one_there_is(page):
    assert page.add_key("sit down") == "sit down"
    assert page.add_key("Sit_Down") == "sit down" and page.add_key("Walk") == "walk"


def test_a_csv_that_something_else_changed_is_left_as_it_is(page, tmp_path):
    path = tmp_path / "labels.csv"
    give(page, "plain.mp4", "run")
    theirs = path.read_text().replace("run", "stroll")
    path.write_text(theirs)
    with pytest.raises(ChangedError, match="labels-kept-1"):
        give(page, "plain.mp4", "jump")
    with pytest.raises(ChangedError):
        give(page, "long.mp4", "fall")
    assert path.read_text() == theirs
    kept = {from_csv(row["label"]) for row in rows_of(tmp_path / "labels-kept-1.csv")}
    assert {"run", "jump", "fall"} <= kept and not (tmp_path / "labels-kept-2.csv").exists()
    page.labels.reload()
    assert page.item(number(page, "plain.mp4"))["labels"] == ["stroll"]
    give(page, "plain.mp4", "jump")
    assert {"stroll", "jump"} <= {row["label"] for row in rows_of(path)}


def test_a_csv_that_appears_meanwhile_is_left_as_it_is(page, tmp_path):
    (tmp_path / "labels.csv").write_text("mine\n")
    with pytest.raises(ChangedError):
        give(page, "plain.mp4", "run")
    assert (tmp_path / "labels.csv").read_text() == "mine\n"


def test_a_csv_that_a_person_edited_is_copied_first(page, packed, footage, tmp_path):
    path = tmp_path / "labels.csv"
    give(page, "plain.mp4", "run")
    edited = path.read_text().replace("run", "stroll") + "gone.mp4,,,swim,,,,,\n"
    path.write_text(edited)
    fresh = build(packed, footage, tmp_path)
    assert fresh.labels.left_out == 1 and path.read_text() == edited
    give(fresh, "long.mp4", "run")
    assert (tmp_path / "labels-before-1.csv").read_text() == edited
    assert "stroll" in path.read_text() and "swim" not in path.read_text()


def all_of(folder: Path) -> set[str]:
    """Every label that any csv of a folder holds."""
    return {row["label"] for path in folder.glob("labels*.csv") for row in rows_of(path)}


def test_no_label_is_lost_however_often_the_csv_changes(page, tmp_path):
    path = tmp_path / "labels.csv"
    give(page, "plain.mp4", "first")
    for turn, label in enumerate(["second", "third", "fourth"], 1):
        path.write_text(path.read_text().replace("plain.mp4,,,first", f"plain.mp4,,,first{turn}"))
        with pytest.raises(ChangedError, match=f"labels-kept-{turn}.csv"):
            give(page, "long.mp4", label)
        page.labels.reload()
    assert {"second", "third", "fourth"} <= all_of(tmp_path)
    # Nor what somebody writes into the file that was named.
    path.write_text(path.read_text().replace("first321", "other"))
    with pytest.raises(ChangedError, match="kept-4"):
        give(page, "long.mp4", "fifth")
    kept = tmp_path / "labels-kept-4.csv"
    kept.write_text(kept.read_text().replace("fifth", "theirs"))
    with pytest.raises(ChangedError, match="kept-5"):
        give(page, "plain.mp4", "sixth")
    assert {"theirs", "fifth", "sixth"} <= all_of(tmp_path)


def test_two_pages_of_one_csv(page, packed, footage, tmp_path):
    other = build(packed, footage, tmp_path)
    give(page, "plain.mp4", "mine")
    with pytest.raises(ChangedError, match="was changed"):
        give(other, "plain.mp4", "yours")
    other.labels.reload()
    give(other, "long.mp4", "both")
    with pytest.raises(ChangedError, match="kept-2"):
        give(page, "long.mp4", "again")
    assert {"mine", "yours", "both", "again"} <= all_of(tmp_path)


def test_labels_that_no_file_holds_are_written_before_the_csv_is_read(page, tmp_path, monkeypatch):
    path = tmp_path / "labels.csv"
    give(page, "plain.mp4", "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.log.write_synced", full)
    with pytest.raises(ChangedError, match="No space"):
        give(page, "long.mp4", "walk")
    path.write_text(path.read_text().replace("run", "stroll"))
    with pytest.raises(ChangedError, match="No space"):
        page.labels.reload()
    assert page.labels.unsaved and "walk" in page.labels.counts()
    monkeypatch.undo()
    page.labels.reload()
    assert {"walk", "run", "stroll"} <= all_of(tmp_path) and "stroll" in page.labels.counts()


def test_a_label_is_taken_from_its_moment_alone(page, tmp_path):
    long = page.moments.videos.index("long.mp4")
    page.labels.marks[long] = (Mark("day", 0, 6), Mark("run", 1.9, 4))
    assert not give(page, "long.mp4", "day", 1)
    assert page.labels.marks[long] == (Mark("day", 0, 2), Mark("day", 4, 6), Mark("run", 1.9, 4))
    assert not give(page, "long.mp4", "run", 1)  # the tenth of a second before it is of no moment
    assert {m.label for m in page.labels.marks[long]} == {"day"}
    page.labels.marks[long] = (Mark("whole"),)
    assert not give(page, "long.mp4", "whole", 0)
    assert page.labels.marks[long] == (Mark("whole", 2, 6),)
    page.labels.undo()
    assert page.labels.marks[long] == (Mark("whole"),)


def test_labels_of_files_cut_out_of_recordings(tmp_path):
    """The list's times are those of the recordings, the labels' times are those of the files."""
    for i, name in enumerate(("a.mp4", "b.mp4")):
        write_video(tmp_path / name, draw_motion("right", i, 0, 96, 32))
    (tmp_path / "out").mkdir()
    given = tmp_path / "list.csv"
    given.write_text("path,recording,start,end\na.mp4,day 1,60,66\nb.mp4,day 1,300,306\n")
    pack(given, tmp_path / "pack", short_side=32, workers=1, progress=False)
    page = build(Pack(tmp_path / "pack"), given, tmp_path / "out")
    for name, place, label in (("a.mp4", 0, "walk"), ("a.mp4", 2, "fall"), ("b.mp4", 1, "walk")):
        give(page, name, label, place)
    labels = tmp_path / "out" / "labels.csv"
    pack(labels, tmp_path / "again", short_side=32, workers=1, progress=False)
    a, b = sorted(Pack(tmp_path / "again").records(), key=lambda r: r["source"])
    assert segments_of(a) == [(0, 2, "walk"), (4, 6, "fall")] and segments_of(b) == [(2, 4, "walk")]
    assert b["label"] == "walk" and a["label"] is None
    (leak,) = find_leaks({0: a}, {1: b})
    assert leak.kind == "recording"  # four minutes apart: they do not overlap
    again = build(Pack(tmp_path / "again"), labels, tmp_path / "out")
    assert again.labels.marks == page.labels.marks
    give(again, "../b.mp4", "sit", 2)
    assert not list(labels.parent.glob("labels-before-*"))
    # Files of the parts say when in the recording they are.
    write_clips(page.pack, page.moments, page.labels)
    rows = {(r["recording"], r["start"], r["end"]) for r in rows_of(labels.parent / "clips.csv")}
    assert ("day 1", "64.000", "66.000") in rows and ("day 1", "302.000", "304.000") in rows
    # A csv of before has no such column: what it says of a file without a recording is the same.
    old = "path,start,end,label\nplain.mp4,0.000,1.000,run\n"
    (tmp_path / "plain.mp4").touch()
    (tmp_path / "old.csv").write_text(old)
    (source,) = list_sources(tmp_path / "old.csv").sources
    assert source.extra == {"segments": "0.000-1.000 run"}


def test_a_part_ends_where_its_file_does(page, tmp_path, monkeypatch):
    monkeypatch.setattr("downstream.look.cut.BLOCK", 20)
    long = page.moments.videos.index("long.mp4")
    page.labels.marks[long] = (Mark("all", 0, 99),)
    told = write_clips(page.pack, page.moments, page.labels)
    (row,) = (r for r in rows_of(tmp_path / "clips.csv") if r["label"] == "all")
    assert (row["start"], row["end"]) == ("0.000", "6.000") and "1 part shown in part" in told
    pack(tmp_path / "clips.csv", tmp_path / "p", short_side=32, workers=1, progress=False)
    assert {r["frames"] for r in Pack(tmp_path / "p").records() if r["label"] == "all"} == {96}


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "path,label\nlong.mp4,x\n", "\0\1", "path\n", ""])
def test_a_csv_of_something_else_is_refused(packed, footage, tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match="labels"):
        build(packed, footage, tmp_path)
    assert (tmp_path / "labels.csv").read_text() == text


def test_a_csv_of_other_videos_is_refused(packed, footage, tmp_path):
    (tmp_path / "labels.csv").write_text("path,start,end,label\nelsewhere.mp4,,,walk\n")
    with pytest.raises(ValueError, match="labels of other videos"):
        build(packed, footage, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_killed_while_it_saves(page, tmp_path):
    path = tmp_path / "labels.csv"
    give(page, "plain.mp4", "first")
    before = path.read_bytes()

    def half(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        os.fsync = half
        give(page, "plain.mp4", "second")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    fresh = build(page.pack, Path(page.title), tmp_path)  # what was left half done is in no way
    give(fresh, "plain.mp4", "third")
    labels = [row["label"] for row in rows_of(path) if "plain" in row["path"]]
    assert labels == ["first", "third"]


def test_a_full_disk_loses_no_label(page, tmp_path, monkeypatch):
    give(page, "plain.mp4", "run")
    before = (tmp_path / "labels.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.log.write_synced", full)
    with pytest.raises(ValueError, match="No space"):
        give(page, "long.mp4", "walk")
    assert (tmp_path / "labels.csv").read_bytes() == before
    monkeypatch.undo()
    give(page, "long.mp4", "walk", 1)
    marks = [row["label"] for row in rows_of(tmp_path / "labels.csv") if row["start"]]
    assert marks == ["walk", "walk"]


def test_files_that_no_list_can_name_are_shown_and_not_labelled(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a\x1b[2Jb.mp4", draw_motion("up", 0, 0, 16, 32))
    pack(folder, tmp_path / "pack", short_side=32, workers=1, progress=False)
    page = build(Pack(tmp_path / "pack"), folder, tmp_path)
    assert "control" in page.item(0)["refused"] and "\x1b" not in page.item(0)["video"]
    with pytest.raises(ValueError, match="rename"):
        give(page, "a\x1b[2Jb.mp4", "run")
    assert not (tmp_path / "labels.csv").exists()


def test_labels_that_the_data_have_are_shown(page):
    assert page.item(number(page, "=cmd().mp4"))["labels"] == ["walk"]
    segments = {"label": None, "extra": {"segments": "0-2 sit; 1-3 stand up"}}
    assert marks_of(segments) == (Mark("sit", 0, 2), Mark("stand up", 1, 3))
    other = {"label": "walk", "extra": {"segments": "3 of 7"}}
    assert marks_of(other) == (Mark("walk"),)


def test_lists_of_one_name_have_folders_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clips.csv").touch()
    given = [str(tmp_path / name) for name in ("a/clips.csv", "b/clips.csv", "a")]
    assert [look.default_out(name) for name in given] == [
        "runs/look-a-clips", "runs/look-b-clips", "runs/look-a",
    ]  # fmt: skip


def test_rows_with_times_are_segments(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).touch()
    path = tmp_path / "list.csv"
    path.write_text(
        "path,start,end,label\na.mp4,0,1.5,sit\na.mp4,12345.678,12346,run\n"
        "b.mp4,0,2,sit\nb.mp4,2,4,sit\nc.mp4,,,walk\nc.mp4,1,2,run\n"
    )
    a, b, c = list_sources(path).sources
    assert a.label is None and a.extra["segments"] == "0.000-1.500 sit; 12345.678-12346.000 run"
    assert b.label == "sit" and c.label == "walk" and c.extra["segments"] == "1.000-2.000 run"
    path.write_text("path,start,end,label,times\na.mp4,0,2,sit,5\nb.mp4,0,2,run,file\n")
    a, b = list_sources(path).sources  # a column of the user's own keeps what it says
    assert a.extra["times"] == "5" and "times" not in b.extra
    path.write_text("path,recording,start,end,label\na.mp4,day 1,60,62,sit\n")
    (alone,) = list_sources(path).sources  # when in the recording it was, not in the file
    assert alone.extra == {"recording": "day 1", "start": "60", "end": "62"}
    path.write_text("path,start,end,label\na.mp4,x,2,sit\na.mp4,4,2,run\n")
    with pytest.raises(ValueError) as refused:  # these say nothing of when
        list_sources(path)
    assert "another label" not in str(refused.value) and refused.value.__notes__


def test_a_label_with_a_semicolon_is_of_whole_videos_alone(tmp_path):
    """Of a part it would be two segments in every list."""
    path, row = tmp_path / "labels.csv", Row("a.mp4", 10.0)
    labels = Labels(path, [row], [(Mark("a;b"),)])
    for start, whole, name in ((0.0, True, "run"), (2.0, False, "run"), (2.0, False, "a;b")):
        with pytest.raises(ValueError, match=r"semicolon.* rename"):
            labels.toggle(0, start, start + 1, whole, name)
    assert labels.marks == [(Mark("a;b"),)] and not path.exists()
    path.write_text("path,start,end,label\na.mp4,0,1,a;b\n")
    with pytest.raises(ValueError, match="1 problem"):
        Labels(path, [row], [()])


# ---- the server


class Client:
    """Asks a server of `look` what it is told to."""

    def __init__(self, port: int, token: str):
        self.port, self.token = port, token
        self.host = f"127.0.0.1:{port}"
        self.cookie = ""

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = {"Host": self.host, "Cookie": self.cookie}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given["Content-Length"] = str(len(body))
        for name, value in given.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer, answer.read()

    def enter(self) -> "Client":
        answer, _ = self.ask(f"/?token={self.token}")
        self.cookie = answer.getheader("Set-Cookie").split(";")[0]
        return self

    def post(self, path: str, content: object, **headers: str):
        given = {"Origin": f"http://{self.host}", "Content_Type": "application/json"} | headers
        answer, data = self.ask(path, "POST", json.dumps(content).encode(), **given)
        return answer.status, json.loads(data) if data[:1] == b"{" else data


def serve(page: Look):
    listener = listen(0)
    running = server(page, listener, "secret-token")
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield Client(listener.getsockname()[1], "secret-token")
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def client(page):
    yield from serve(page)


def test_only_the_page_of_the_token_gets_anything(client, page):
    paths = [
        "/", "/api/state", "/api/view", "/api/groups?k=2", "/thumbnail/0.jpg", "/clip/0.mp4",
        "/page/look.js", "/page/index.html", "/nothing",
    ]  # fmt: skip

    def refused(**headers: str) -> None:
        for path in paths:
            answer, data = client.ask(path, **headers)
            assert answer.status == 403 and b"video" not in data, path
            assert not answer.getheader("Set-Cookie")

    refused()  # no token
    for bad in ("", "secret-toke", "secret-token2", "%C3%A9", "%ff"):
        assert client.ask(f"/?token={bad}")[0].status == 403
    assert client.ask("/api/state?token=secret-token")[0].status == 403  # opens the page alone
    refused(Cookie="look=secret-token")
    refused(Cookie=f"look-{client.port}=secret-token")
    client.enter()
    assert all(client.ask(path)[0].status == 200 for path in paths[:-1])
    assert client.ask("/nothing")[0].status == 404
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1", "localhost"):
        refused(Host=host)  # a name of somebody else that leads to this computer
    refused(Origin="http://evil.example")
    refused(Origin=f"http://127.0.0.1:{client.port + 1}")
    refused(Origin="null")
    refused(Sec_Fetch_Site="cross-site")
    refused(Sec_Fetch_Site="same-site")  # another port
    assert client.ask("/api/state", Host="")[0].status == 400
    other = Client(client.port, "secret-token")
    other.host = "evil.example"
    assert other.ask("/?token=secret-token")[0].status == 403


def test_another_page_changes_nothing(client, page, tmp_path):
    client.enter()
    ours = f"http://{client.host}"
    content = {"n": number(page, "plain.mp4"), "label": "run"}
    for headers in (
        {"Origin": ""}, {"Origin": "http://evil.example"}, {"Origin": "null"},
        {"Origin": ours, "Content_Type": "text/plain"},
        {"Origin": ours, "Content_Type": "application/x-www-form-urlencoded"},
        {"Origin": ours, "Sec_Fetch_Site": "cross-site"}, {"Cookie": ""},
        {"Host": "evil.example", "Origin": "http://evil.example"},
    ):  # fmt: skip
        for path in ("/api/label", "/api/undo", "/api/keys", "/api/reload", "/api/cut"):
            assert client.post(path, content, **headers)[0] == 403, headers
    assert client.ask("/api/label", "GET")[0].status == 405
    assert not (tmp_path / "labels.csv").exists()
    assert client.post("/api/label", content)[0] == 200
    assert (tmp_path / "labels.csv").exists()


def test_every_answer_has_the_headers_that_keep_it_here(client):
    for path in ("/", "/api/state", "/thumbnail/0.jpg", "/page/look.js", "/nothing"):
        for _ in range(2):
            answer, _data = client.ask(path)
            assert {n: answer.getheader(n) for n in HEADERS} == HEADERS, path
            assert answer.getheader("Cache-Control")
            client.enter()
    policy = dict(p.strip().split(" ", 1) for p in HEADERS["Content-Security-Policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}  # nothing inline, nothing from elsewhere
    cookie = client.ask(f"/?token={client.token}")[0].getheader("Set-Cookie")
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Domain" not in cookie
    assert client.token not in cookie


def test_the_page_names_no_other_computer():
    for path in (ROOT / "downstream/look/page").iterdir():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text())
        assert not [name for name in found if "w3.org" not in name], path


@pytest.mark.parametrize(
    "path",
    [
        "/page/../server.py", "/page/%2e%2e/server.py", "/page/..%2fserver.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd", "/page/..\\server.py", "/../../etc/passwd", "/clip/../0.mp4",
        "/clip/-1.mp4", "/clip/999.mp4", "/clip/0.py", "/clip/..%2f..%2flist.csv",
        "/clip/long.mp4", "/clip/0.mp4.mp4", "/thumbnail/999.jpg", "/thumbnail/1e1.jpg",
        "/thumbnail/%00.jpg", "/thumbnail/%D9%A3.jpg", "/clip/" + "9" * 4000 + ".mp4",
        "/api/view?kind=like&q=-1", "/api/view?kind=like&q=x", "/api/view?kind=x",
        "/api/view?offset=-1", "/api/view?kind=group&q=2:9", "/api/view?kind=group&q=999:0",
        "/api/view?kind=text&q=a", "/api/groups?k=x",
    ],
)  # fmt: skip
def test_nothing_but_what_the_index_names(client, path):
    answer, data = client.enter().ask(path)
    assert 400 <= answer.status < 500, data
    assert b"import" not in data and b"root:" not in data and b"Traceback" not in data


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[", b"[]", b"1", b"[" * 20_000, b'{"n": 0}', b'{"n": "x", "label": "a"}',
        b'{"n": 0, "label": "=1+1"}', b'{"n": 0, "label": "a;b"}', b'{"n": -1, "label": "a"}',
        b'{"n": 0.5, "label": "a"}', b'{"n": true, "label": "a"}', b'{"n": 0, "label": ["a"]}',
        b'{"n": 0, "label": "\\ud800"}', b"\xff\xfe", b"x" * 70_000,
    ],
)  # fmt: skip
def test_what_is_no_label_is_refused(client, tmp_path, body):
    client.enter()
    headers = {"Origin": f"http://{client.host}", "Content_Type": "application/json"}
    answer, data = client.ask("/api/label", "POST", body, **headers)
    assert 400 <= answer.status < 500 and b"Traceback" not in data
    assert not (tmp_path / "labels.csv").exists()


def test_labels_by_the_page(client, page, tmp_path):
    client.enter()
    n = number(page, "long.mp4", 1)
    status, answer = client.post("/api/label", {"n": n, "label": "fall over"})
    assert status == 200 and answer["items"][0]["labels"] == ["fall over"]
    assert {"name": "fall over", "count": 1} in answer["labels"] and not answer["changed"]
    listed = json.loads(client.ask("/api/view?kind=label&q=fall%20over")[1])
    assert [item["n"] for item in listed["items"]] == [n] and listed["total"] == 1
    unlabelled = json.loads(client.ask("/api/view?kind=unlabelled")[1])["items"]
    assert n not in {item["n"] for item in unlabelled}
    assert client.post("/api/undo", {})[0] == 200
    assert json.loads(client.ask("/api/view?kind=label&q=fall%20over")[1])["total"] == 0
    (tmp_path / "labels.csv").write_text("path,start,end,label\n")
    status, answer = client.post("/api/label", {"n": n, "label": "run"})
    assert status == 409 and "labels-kept-1.csv" in answer["changed"]
    assert answer["items"][0]["labels"] == ["run"]
    assert (tmp_path / "labels.csv").read_text() == "path,start,end,label\n"
    # Names of the data are told as text that steers nothing, and taken back as they are shown.
    shown = [label["name"] for label in answer["labels"]]
    assert SCRIPT in shown and "\\x1b[31mred" in shown


def test_clips_are_played_in_parts(client, page):
    client.enter()
    n = number(page, "long.mp4", 2)
    answer, whole = client.ask(f"/clip/{n}.mp4")
    assert answer.status == 200 and answer.getheader("Content-Type") == "video/mp4"
    assert whole == page.pack.read(page.pack.record(int(page.moments.sample[n])))
    answer, part = client.ask(f"/clip/{n}.mp4", Range="bytes=10-19")
    assert answer.status == 206 and part == whole[10:20]
    assert client.ask(f"/clip/{n}.mp4", Range=f"bytes={len(whole)}-")[0].status == 416
    answer, other = client.ask(f"/clip/{n}.webm")
    assert answer.getheader("Content-Type") == "video/webm" and other[:4] == b"\x1a\x45\xdf\xa3"
    answer, picture = client.ask(f"/thumbnail/{n}.jpg")
    assert answer.getheader("Content-Type") == "image/jpeg" and picture[:3] == b"\xff\xd8\xff"


def test_thumbnails_are_made_once(client, page, monkeypatch):
    client.enter()
    first = client.ask("/thumbnail/0.jpg")[1]
    monkeypatch.setattr(Pack, "frames", lambda *_: pytest.fail("decodes again"))
    assert client.ask("/thumbnail/0.jpg")[1] == first


def test_ten_thousand_moments_are_paged(client, page):
    client.enter()
    answer = json.loads(client.ask("/api/view?offset=2&limit=3")[1])
    assert [item["n"] for item in answer["items"]] == [2, 3, 4] and answer["total"] == 7
    late = json.loads(client.ask("/api/view?offset=99&limit=2")[1])
    assert late["offset"] == 5 and [item["n"] for item in late["items"]] == [5, 6]
    assert len(json.loads(client.ask("/api/view?limit=99999")[1])["items"]) == 7
    like = json.loads(client.ask("/api/view?kind=like&q=3")[1])["items"]
    assert like[0]["n"] == 3 and sorted(item["n"] for item in like) == list(range(7))


def test_pages_of_a_list_that_gets_shorter_skip_nothing(client, page):
    client.enter()

    def turn(kind: str, **query: object) -> list[int]:
        given = "&".join(f"{name}={value}" for name, value in query.items())
        answer = json.loads(client.ask(f"/api/view?kind={kind}&limit=2&{given}")[1])
        return [item["n"] for item in answer["items"]]

    a, b, c, d = (row["n"] for row in page.view("unlabelled", ""))
    page.first = [d, a, c, b]
    assert turn("unlabelled") == [a, b]
    client.post("/api/label", {"n": a, "label": "run"})
    assert turn("first", beside=a, step=1) == [c, b] and turn("first", beside=c, step=-1) == [d, c]
    client.post("/api/label", {"n": b, "label": "run"})
    assert turn("unlabelled", beside=b, step=1) == [c, d]
    assert turn("unlabelled", beside=c, step=-1) == [c, d]  # nothing is left before it
    assert turn("unlabelled", beside=d, step=1) == [c, d]  # nor behind
    client.post("/api/undo", {})
    assert turn("unlabelled", beside=c, step=-1) == [b, c]
    assert turn("label", q="run") == [a]


def test_near_duplicates_are_those_that_packing_found(page, monkeypatch):
    long, other = (number(page, name) for name in ("long.mp4", "plain.mp4"))
    clips = [[int(page.moments.sample[n]) for n in (long, other)]]
    monkeypatch.setattr(Pack, "near_duplicates", lambda _: np.array(clips))
    pair = page.view("near", "")
    assert len(pair) == 2 and {item["pair"] for item in pair} == {0}
    assert [page.moments.videos[page.moments.video[item["n"]]] for item in pair] == [
        "long.mp4", "plain.mp4",
    ]  # fmt: skip


def test_the_port_is_of_this_computer_alone():
    listener = listen(0)
    assert listener.getsockname()[0] == "127.0.0.1"
    with pytest.raises(ValueError, match="--port"):
        listener.listen()
        listen(listener.getsockname()[1])
    listener.close()


# ---- the recipe


def test_precision_of_sentences():
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 1, 2, 3, 3]]
    labels = [{"a"}, {"a"}, {"b"}, {"b"}, {"b", "c"}, set(), set(), set()]
    queries = dict(zip("abc", np.eye(4, dtype=np.float32), strict=False))
    found = precision_at(vectors, labels, queries, 2)
    assert found == {"a": (1.0, 0.25), "b": (1.0, 0.375), "c": (0.0, 0.125)}


def test_the_score_of_a_pair(tiny_pair, captioned_pack, capsys):
    config = configure(score.Config, str(tiny_pair), str(captioned_pack), num_workers=0, best=3)
    found = score.main(config)
    assert set(found["classes"]) == {"up", "down", "left", "right"}
    assert found["num_moments"] == 16 and found["chance"] == 0.25
    assert "moves up" in capsys.readouterr().out  # the sentences of the list


def prepared(config: look.Config):
    return look.prepare(config, *look.load_model(config.backbone))


def test_a_wrong_backbone_leaves_nothing(footage, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="nowhere"):
        look.main(configure(look.Config, data=str(footage), backbone="nowhere", out=str(out)))
    assert not out.exists()


def test_everything_is_prepared(footage, tiny_pair, tiny_backbone, tmp_path):
    more = {"data": str(footage), "out": str(tmp_path), "every": 2.0, "num_workers": 0}
    first = tmp_path / "first.csv"
    first.write_text("source,start,end,guess\nlong.mp4,4.1,5.9,x\n'=cmd().mp4,0,1,x\nno,0,1,x\n")
    config = configure(
        look.Config, backbone=str(tiny_pair), labels=("jump",), first=str(first), **more
    )
    page = prepared(config)
    assert page.state()["text"] and page.keys[0] == "jump" and "walk" in page.keys
    assert page.first == [number(page, "long.mp4", 2), number(page, "=cmd().mp4")]
    assert page.view("first", "") == [{"n": number(page, "long.mp4", 2)}]  # the other has one
    first.write_text(f"path,start,end\n{footage.parent}/long.mp4,1,3.5\n")
    assert read_places(first, page.moments, page.labels) == [number(page, "long.mp4", 1)]
    found = page.view("text", "somebody jumps")
    assert len(found) == 7 and found[0]["score"] >= found[-1]["score"]
    with pytest.raises(ValueError, match="sentence"):
        page.view("text", "  ")
    for broken in (b"\xff\xfe\0", b"", b"path\nlong.mp4\n", b"path,start,end\nlong.mp4,x,2\n",
                   b"path,start,end\nelse.mp4,1,2\n", b"start,end,path\n1,2\n"):  # fmt: skip
        first.write_bytes(broken)
        with pytest.raises(ValueError, match="first"):
            read_places(first, page.moments, page.labels)
    page.add_key("swim")
    plain = prepared(configure(look.Config, backbone=str(tiny_backbone), **more))
    assert "swim" in plain.keys and not plain.state()["text"]
    assert any("no text tower" in note for note in plain.notes)
    with pytest.raises(ValueError, match="no text tower"):
        plain.view("text", "somebody jumps")


def test_a_pack_needs_its_source_for_labels(packed, footage, tiny_backbone, tmp_path):
    about = {
        "data": str(packed.folder), "backbone": str(tiny_backbone), "out": str(tmp_path),
        "num_workers": 0,
    }  # fmt: skip
    page = prepared(configure(look.Config, **about))
    with pytest.raises(ValueError, match="folder or the list"):
        give(page, "plain.mp4", "run")
    page = prepared(configure(look.Config, source=str(footage), **about))
    give(page, "plain.mp4", "run")
    assert (tmp_path / "labels.csv").exists()


def test_a_hub_that_does_not_answer_is_out_of_reach(monkeypatch, tmp_path):
    from huggingface_hub import constants

    from pretrain.third_party import open_clip_at_hand

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert not open_clip_at_hand(look.MODEL, look.TAG)
    assert time.monotonic() - started < 20
    monkeypatch.setattr(constants, "ENDPOINT", "http://a:b")
    assert not open_clip_at_hand(look.MODEL, look.TAG)


def test_somebody_elses_folder_is_refused(footage, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        look.main(configure(look.Config, data=str(footage), backbone="x", out=str(tmp_path)))


def test_data_that_are_not_there_are_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "load_model", lambda *_: pytest.fail("asks the network for weights"))
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "nowhere"), ("empty", "no video")):
        given = configure(look.Config, data=str(tmp_path / name), out=str(tmp_path / "out"))
        with pytest.raises(ValueError, match=words):
            look.main(given)
    assert not (tmp_path / "out").exists()


def test_the_starter_instead_of_weights_out_of_reach_is_told(monkeypatch, capsys):
    monkeypatch.setattr(look, "open_clip_at_hand", lambda *_: False)
    name, model = look.load_model(None)
    assert name == "starter" and look.MODEL in capsys.readouterr().out
    assert look.unseen_by(model)("a giraffe walks") == ["giraffe"]


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(footage, tiny_backbone, tmp_path):
    """As a person types it; the labels of one run are those of the next."""
    command = [sys.executable, str(ROOT / "recipes/look.py"), str(footage), "--no-open",
               "--backbone", str(tiny_backbone), "--num-workers", "0"]  # fmt: skip
    for given in ("run", "jump"):
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        lines = []
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", "".join(lines))):
            lines.append(process.stdout.readline())
            assert process.poll() is None, process.communicate()
        client = Client(int(found[1]), found[2])
        while True:
            try:
                client.enter()
                break
            except ConnectionError:
                time.sleep(0.05)
        items = json.loads(client.ask("/api/view")[1])["items"]
        plain = next(item for item in items if item["video"] == "plain.mp4")
        assert plain["labels"] == (["run"] if given == "jump" else [])
        assert client.post("/api/label", {"n": plain["n"], "label": given})[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "ended; the labels are in" in out, err
    rows = rows_of(tmp_path / look.default_out(str(footage)) / "labels.csv")
    assert [row["label"] for row in rows if "plain" in row["path"]] == ["run", "jump"]


def test_what_ctrl_c_cuts_off_is_no_error(page):
    listener = served.listen(0)
    server, log = served.server(page, listener, "t"), logging.getLogger("uvicorn.error")
    listener.close()
    assert log.isEnabledFor(logging.ERROR)
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit and not log.isEnabledFor(logging.ERROR)
    log.setLevel(logging.WARNING)


def test_words_that_mean_nothing_are_told(page):
    page.unseen = lambda text: [word for word in text.split() if word == "xyzzy\x1b"]
    assert "xyzzy" in page.note_on("a xyzzy\x1b") and "\x1b" not in page.note_on("a xyzzy\x1b")
    assert page.note_on("somebody walks") == ""


def test_served_is_what_is_built(page):
    assert served.build_app(page, 1, "t")
    assert isinstance(page.labels, Labels)
