"""Near-duplicates are found at packing however they were cropped, trimmed or shaded; others not."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from downstream.splits import choose_splits
from pretrain.data.alike import EVEN, Alike, Clip, compare_stills
from pretrain.data.index import load_index
from pretrain.data.merge import merge
from pretrain.data.near import Vectors, add_near, without_lookalikes
from pretrain.data.near_error import measure
from pretrain.data.near_list import COLUMNS, STRUCK
from pretrain.data.pack import pack
from pretrain.data.register import detail, laid_over, settle, shrunk
from pretrain.data.shards import Pack
from pretrain.data.signatures import RATE, SIDE, Signature, count_pictures, read_signature
from pretrain.data.sources import list_sources
from pretrain.data.synthetic import clip_specs, encode_video, render
from pretrain.data.windows import best_lags

PLANTED = {"trimmed": 0, "cropped": 1, "darker": 2, "mirrored": 3}


def copies(frames: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "trimmed": frames[0][6:],
        "cropped": frames[1][:, 4:-4, 4:-2],
        "darker": (255 * (frames[2] / 255.0) ** 1.2).astype(np.uint8),
        "mirrored": frames[3][:, :, ::-1],
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A list of ten clips of different people and acts, copies of some, stills and blank ones."""
    folder = tmp_path_factory.mktemp("near")
    specs = clip_specs(0, 300)[::30]
    frames = {i: render(spec).frames for i, spec in enumerate(specs)}
    videos = {f"v{i}": own for i, own in frames.items()} | copies(frames)
    videos |= {"still0": frames[5][:1].repeat(32, 0), "still1": frames[6][3:4].repeat(32, 0)}
    videos |= {"black0": frames[0][:32] * 0, "black1": frames[0][:32] * 0 + 9}
    rows = ["path,label,split,subject"]
    for number, (name, video) in enumerate(videos.items()):
        (folder / f"{name}.mp4").write_bytes(encode_video(np.ascontiguousarray(video), 16))
        split = "train" if name[0] == "v" else "test"
        rows.append(f"{name}.mp4,{'ab'[number % 2]},{split},{name}")
    (folder / "clips.csv").write_text("\n".join(rows))
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def packed(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "pack"
    pack(raw, folder, workers=1, progress=False)
    return folder


def named(folder: Path) -> set[frozenset[str]]:
    data = Pack(folder)
    pairs = data.near_duplicates()
    assert pairs is not None
    names = [[data.record(i)["source"].removesuffix(".mp4") for i in pair] for pair in pairs]
    return set(map(frozenset, names))


EXPECTED = {frozenset((f"v{i}", name)) for name, i in PLANTED.items()}


def test_packing_finds_copies_and_nothing_else_and_given_splits_say_so(packed, raw):
    assert named(packed) == EXPECTED
    with open(packed / "near_duplicates.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["kind"] for line in lines if "mirrored.mp4" in str(line)} == {"mirrored"}
    trimmed = next(line for line in lines if "trimmed.mp4" in str(line))
    froms = sorted((float(trimmed["from"]), float(trimmed["other_from"])))
    assert froms == pytest.approx([0, 6 / 16], abs=0.04) and "part" in trimmed["kind"]
    notes = choose_splits(Pack(packed), "train", "test", 0)[2]
    assert any("4 videos near-duplicates" in note for note in notes)
    assert any("join 8 groups" in n and "v0 and trimmed" in n and STRUCK in n for n in notes)
    before = (packed / "index.json").stat().st_mtime_ns
    pack(raw, packed, workers=1, progress=False)  # nothing has changed: nothing is done
    assert (packed / "index.json").stat().st_mtime_ns == before


def test_a_pair_that_is_struck_out_stays_so(packed, raw, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(packed, folder)
    lines = (folder / "near_duplicates.csv").read_text().splitlines()
    line = next(line for line in lines if "cropped.mp4" in line)
    (folder / STRUCK).write_text(f"{line}\n")
    left = EXPECTED - {frozenset(("v1", "cropped"))}
    assert named(folder) == left
    rows = raw.read_text().splitlines()
    fewer = raw.parent / "fewer.csv"  # other clips: all numbers change, and it is looked for anew
    fewer.write_text("\n".join(row for row in rows if not row.startswith(("v9", "black"))))
    pack(fewer, folder, workers=1, progress=False)
    assert named(folder) == left
    gone = line.replace("v1.mp4", "v1\x1b[0m.mp4")
    (folder / STRUCK).write_text(f"{line}\n{gone}\n")
    notes = [n for n in choose_splits(Pack(folder), "train", "test", 0)[2] if STRUCK in n]
    told = f"{STRUCK} names 1 pair that near_duplicates.csv does not"
    assert [n.count(told) for n in notes if told in n] == [1], notes
    assert any("line 2 (" in note and "cropped.mp4" in note for note in notes)
    assert "line 1" not in str(notes) and "\x1b" not in "".join(notes)
    assert f"; {told}" in add_near(folder, load_index(folder)) and named(folder) == left
    saved = line.replace(",0.0,", ",0,").replace(",", '","')  # as spreadsheets do
    (folder / STRUCK).write_text(f'\ufeff"{saved}"\r\n')
    assert named(folder) == left
    long = line.replace("cropped.mp4", "x" * 200_000)
    for wrong in (b"v1.mp4,cropped.mp4\n", long.encode(), line.replace(",0.0,", ",x,").encode(),
                  line.replace("cropped", "\xe4").encode("latin-1")):  # fmt: skip
        (folder / STRUCK).write_bytes(wrong)
        with pytest.raises(ValueError, match=r"not_duplicates.csv(:1: .*copy whole| is no UTF-8)"):
            Pack(folder).near_duplicates()
    (folder / STRUCK).unlink()
    (folder / STRUCK).symlink_to("gone.csv")
    with pytest.raises(ValueError, match=STRUCK):
        Pack(folder).near_duplicates()


def test_a_mistake_is_told_in_a_line(packed, tmp_path):
    (tmp_path / "pack").symlink_to(packed)
    for folder, status in ((tmp_path / "pack", 0), (tmp_path / "none", 2)):
        command = [sys.executable, "-m", "pretrain.data.near", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert ("near-duplicates" in done.stdout) == (not status)
    assert "none is no pack" in done.stderr


def test_a_pack_without_signatures_says_so_and_gets_them(packed, raw, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(packed, folder)
    index = json.loads((folder / "index.json").read_text())
    del index["near_duplicates"], index["signatures"]
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "signatures.bin").unlink()
    notes = choose_splits(Pack(folder), "train", "test", 0)[2]
    assert any("not looked for" in note and "pretrain.data.near" in note for note in notes)
    assert "4 pairs" in add_near(folder, load_index(folder)) and named(folder) == EXPECTED
    assert load_index(folder)["signatures"]["bytes"] > 0
    pack(raw, folder, workers=1, progress=False)
    assert named(folder) == EXPECTED


def test_pairs_across_parts_are_found_when_they_are_merged(raw, packed, tmp_path):
    for number in (1, 2):
        out = tmp_path / "parts" / str(number)
        pack(raw, out, workers=1, progress=False, part=(number, 2))
        assert "near_duplicates" not in load_index(out) and "signatures" in load_index(out)
    merge(tmp_path / "parts", tmp_path / "one", progress=False)
    assert named(tmp_path / "one") == EXPECTED and not (tmp_path / "one" / STRUCK).exists()
    for name in ("index.json", "signatures.bin", "near_duplicates.csv"):  # as one machine makes it
        assert (tmp_path / "one" / name).read_bytes() == (packed / name).read_bytes()
    first, second = (packed / "near_duplicates.csv").read_text().splitlines()[1:3]
    left = {pair for pair in EXPECTED if not all(f"{name}.mp4" in first for name in pair)}
    assert len(left) == 3
    (tmp_path / "parts" / "2" / STRUCK).write_text(first)
    merge(tmp_path / "parts", tmp_path / "one", progress=False, near=False)
    assert (tmp_path / "one" / STRUCK).read_text() == f"{','.join(COLUMNS)}\n{first}\n"
    assert named(tmp_path / "one") == left
    (tmp_path / "one" / STRUCK).write_text(second)  # of the whole, without the end of a line
    merge(tmp_path / "parts", tmp_path / "one", progress=False, near=False)
    merge(tmp_path / "parts", tmp_path / "one", progress=False, near=False)
    assert (tmp_path / "one" / STRUCK).read_text() == f"{second}\n{first}\n"
    assert len(named(tmp_path / "one")) == 2


@pytest.mark.parametrize(
    "line", ["3,99", "4,2", "0", "", "a,b", "-1,2", "1,2" + ",x" * 20, "01e1,2" + ",x" * 9]
)
def test_a_list_that_cannot_be_true_is_refused(packed, tmp_path, line):
    copy = tmp_path / "pack"
    shutil.copytree(packed, copy)
    cells = line if line.count(",") > 1 else line + ",x" * 9
    content = f"{','.join(COLUMNS)}\n{cells}\n".encode()
    (copy / "near_duplicates.csv").write_bytes(content)
    index = json.loads((copy / "index.json").read_text())
    about = {"name": "near_duplicates.csv", "bytes": len(content)}
    index["near_duplicates"] = about | {"sha256": hashlib.sha256(content).hexdigest()}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy).near_duplicates()
    index["near_duplicates"] |= {"sha256": "0" * 64}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy).near_duplicates()
    index["near_duplicates"] |= {"name": "../else.csv"}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy)


def test_it_can_be_left_out_and_done_later(raw, tmp_path):
    index = pack(raw, tmp_path / "pack", workers=1, progress=False, near=False)
    assert "near_duplicates" not in index and Pack(tmp_path / "pack").near_duplicates() is None
    assert "near_duplicates" in pack(raw, tmp_path / "pack", workers=1, progress=False)


@pytest.mark.parametrize("fps", [0.1, 5.0, 12.0, 16.0, 23.976, 30.0, 60.0])
def test_signatures_come_back_as_they_were(fps):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, SIDE, SIDE)).astype(np.uint8)
    made = Signature(fps)
    for frame in frames:
        made.take(frame)
    data = made.data()
    pictures = read_signature(data, len(frames), fps)
    if fps <= RATE:
        assert count_pictures(len(frames), fps) == (40 if fps >= 2 else len(pictures))
    else:
        assert len(pictures) == count_pictures(len(frames), fps)
        first = frames[: next(i for i in range(1, 9) if (i + 0.5) * RATE / fps >= 1)]
        assert np.abs(pictures[0] - first.mean(0)).max() <= 0.5
    for wrong in (data[:-9], b"", b"x" * 99, data[:20] + b"\0" * 9 + data[29:]):
        with pytest.raises(ValueError, match="signature"):
            read_signature(wrong, len(frames), fps)
    with pytest.raises(ValueError, match="another length"):
        read_signature(data, 4 * len(frames), fps)


def test_the_measurement_counts_planted_copies(raw):
    some = [s for s in list_sources(raw).sources if s.name in ("v0.mp4", "v1.mp4", "v2.mp4")]
    assert measure(some, "mirror", 1, 1)[:3] == (3, 0, 6)
    assert measure(some[:1], "halves", 1, 1)[:3] == (1, 0, 2)


def test_a_place_is_found_from_a_pixel_beside_it():
    rng = np.random.default_rng(0)
    ours = detail(shrunk(rng.integers(0, 256, (5, 12, 12)).astype(np.float32), 64))
    true = ((0.9, 4.0), (1.1, -2.5))
    theirs = laid_over(ours, tuple((1 / scale, -shift / scale) for scale, shift in true))[0]
    score, place = settle(ours, theirs, ((0.92, 4.6), (1.08, -3.0)))
    assert score > 0.95 and np.allclose(place, true, atol=0.15)


def test_of_a_motion_that_repeats_the_lag_with_the_longest_overlap_counts():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]

    def clip(numbers: np.ndarray) -> Clip:
        """A spot that goes around in 20 pictures, with noise."""
        angle = (2 * np.pi * numbers / 20)[:, None, None]
        away = (y - 15.5 - 7 * np.sin(angle)) ** 2 + (x - 15.5 - 7 * np.cos(angle)) ** 2
        pictures = 40 + 180 * np.exp(-away / 12) + rng.normal(0, 4, away.shape)
        return Clip(pictures, 64, lambda *_: (np.zeros((0, 64, 64)), np.zeros(0)))

    one, same, later = (clip(np.arange(first, 80)) for first in (0, 0, 12))
    mirrored = Clip(same.pictures[..., ::-1], 64, same.frames)
    found = best_lags(one.windows, [later.windows, same.windows, mirrored.windows])
    assert [way[0][1] for way in found[:2]] == [-12, 0] and found[2][1][1] == 0
    assert found[0][0][0] > 0.9 and found[2][1][0] > 0.9 > found[2][0][0]


def test_candidates_are_the_nearest_clips_whatever_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.near.BLOCK", 7)
    monkeypatch.setattr("pretrain.data.near.PARTNERS", 2)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 3, 8))
    vectors[5:] = vectors[:4] + 0.2 * rng.normal(size=(4, 3, 8))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    pool = Vectors(str(tmp_path), "vectors")
    for number, own in enumerate(vectors):
        pool.add(number, own, own)
    apart = np.array([0, 1, 2, 3, 4, 5, 1, 7, 8])  # 1 and 6 are of one source
    near = (vectors[:, None, :, None] * vectors[None, :, None]).sum(-1).max((2, 3))
    near[apart[:, None] == apart] = -1
    best = {(c, o) for c in range(9) for o in np.argsort(-near[c])[:2] if near[c, o] > 0.55}
    assert pool.pairs(apart) == {(min(pair), max(pair)) for pair in best}


def test_small_frames_that_resemble_others_need_a_higher_score():
    def near(score: float, small: bool) -> Alike:
        return Alike(score, (0.0, 0.0), 1.0, (EVEN, EVEN), False, 0.9, 0.9, 0.9, small)

    tested = {(0, 1): near(3, True), (1, 2): near(-1, True)}  # 1 resembles 2
    tested |= {(3, 4): near(3, True), (5, 6): near(3, False), (6, 7): near(-1, False)}
    tested |= {(8, 9): near(6, True), (9, 10): near(-2, True)}
    assert set(without_lookalikes(tested)) == {(3, 4), (5, 6), (8, 9)}


def test_what_rests_is_compared_where_nothing_moves():
    def still(picture: np.ndarray) -> Clip:
        grey = picture.mean(-1)[None]
        pictures = shrunk(grey, SIDE).repeat(12, 0)
        return Clip(pictures, 64, lambda _, __, side: (shrunk(grey, side), np.zeros(1)))

    one, other = (render(spec).frames[0] for spec in clip_specs(0, 300)[::150])
    copy = compare_stills(still(one), still(one[5:-3, 4:, ::1]))
    assert copy and copy.score > 0 and not copy.mirrored
    mirror = compare_stills(still(one), still(one[:, ::-1]))
    assert mirror and mirror.score > 0 and mirror.mirrored
    others = compare_stills(still(one), still(other))
    assert others is None or others.score < 0
