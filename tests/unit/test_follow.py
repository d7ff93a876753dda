"""--follow: who acts is inside the clip's box, and every stream is where the box says."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from downstream.detect import list_videos
from downstream.groups import group_clips
from downstream.probe import choose_folds
from pretrain.data.boxes import parse_boxes, still_boxes
from pretrain.data.cuts import GAP, STILL, Track, places, plan_cuts
from pretrain.data.follow_error import main
from pretrain.data.index import load_index
from pretrain.data.ingest import ingest
from pretrain.data.merge import merge
from pretrain.data.motion import find_motion
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from tests.unit.media import read_video, write_video

WIDE, HIGH = 320, 180
FPS = Fraction(25)


def make(source: Path, out: Path, **more) -> dict:
    return pack(source, out, **({"workers": 1, "progress": False} | more))


def quick(source: Path, out: Path, **more) -> Pack:
    make(source, out, **more)
    return Pack(out)


def ledger(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]


def scene(
    paths: list[np.ndarray],
    count: int = 50,
    noise: float = 2.0,
    pan: float = 0.0,
    light: float = 0.0,
) -> list[np.ndarray]:
    """A wide picture with dots in it; about each place (T, 2) something 20 x 40 waves."""
    rng = np.random.default_rng(0)
    backdrop = np.kron(rng.uniform(60, 180, (30, 60)), np.ones((8, 8)))
    frames = []
    for t in range(count):
        x = round(pan * t)
        frame = backdrop[20 : 20 + HIGH, x : x + WIDE].copy()
        for number, path in enumerate(paths):
            left, top = np.round(path[t]).astype(int)
            frame[top : top + 40, left : left + 20] = 20 + 200 * number
            swing = round(8 * math.sin(t * 1.2))
            frame[top + 8 + swing : top + 16 + swing, left + 12 : left + 20] = 230 - 200 * number
            frame[top + 30 : top + 40, left + 4 + swing // 2 : left + 10 + swing // 2] = 128
        frame = frame * (1 + light * math.sin(t * 2.0)) + rng.normal(0, 2, frame.shape)
        frames.append(np.repeat(frame.clip(0, 255).astype(np.uint8)[..., None], 3, 2))
    return frames


def at(left: float, top: float, count: int = 50, speed: float = 0.0) -> np.ndarray:
    return np.stack([left + speed * np.arange(count), np.full(count, top)], 1)


def covers(row: dict, path: np.ndarray) -> bool:
    """Whether the box of a clip holds all of what is at these places, in every frame."""
    about = row["follow"]
    lefts = places(about["way"], row["frames"])
    mine = path[about["frame"] : about["frame"] + row["frames"]]
    return bool(
        (lefts <= mine + 2).all() and (lefts + about["size"] >= mine + np.array([18, 38])).all()
    )


# ---- motion


def test_two_people_who_act_give_two_clips_of_one_source(tmp_path):
    paths = [at(40, 60), at(240, 100)]
    write_video(tmp_path / "a.mp4", scene(paths))
    (tmp_path / "list.csv").write_text("path,label,subject,split\na.mp4,wave,anna,train\n")
    found = quick(tmp_path / "list.csv", tmp_path / "pack", follow="motion")
    rows = [found.record(i) for i in range(len(found))]
    assert len(rows) == 2 and {row["follow"]["subject"] for row in rows} == {"1", "2"}
    for row in rows:
        told = (row["source"], row["label"], row["subject"], row["split"], row["frames"])
        assert told == ("a.mp4", "wave", "anna", "train", 50)
        assert len(row["follow"]["way"]) == 1 and max(row["follow"]["size"]) < 100
    assert {tuple(covers(row, path) for path in paths) for row in rows} == {
        (True, False), (False, True),
    }  # fmt: skip
    assert found.index["num_sources"] == 1 and found.index["settings"]["follow"] == "motion"


def samples(frames: list[np.ndarray], **more):
    small = np.stack([frame[::1, ::1, 0] for frame in frames[::2]])
    ticks = np.arange(0, len(frames), 2)
    return find_motion(small, ticks, len(frames), (WIDE, HIGH), FPS, **more)


@pytest.mark.parametrize("light", [0.0, 0.2])
def test_what_befalls_the_whole_picture_is_no_motion(light):
    """Noise, light, and codecs; a camera that moves is told from nothing that does."""
    assert samples(scene([], light=light)).why == "nothing moves"
    assert samples(scene([at(150, 60)], light=light, pan=1.0)).why == "the camera moves"
    (one,) = samples(scene([at(150, 60)], light=light)).tracks
    assert np.abs(one.boxes.mean(0) - (150, 60, 170, 100)).max() < 14


def test_someone_large_who_walks_by_is_found():
    """Much of the picture changes, and is no noise."""
    frames = [frame[50:130, :120] for frame in scene([at(5, 20 + 50, speed=1.6)])]
    small = np.stack([frame[..., 0] for frame in frames[::2]])
    found = find_motion(small, np.arange(0, 50, 2), 50, (120, 80), FPS)
    (one,) = found.tracks
    assert one.boxes[5, 0] < 25 and one.boxes[-5, 0] > 60, found.why


def test_whole_pictures_are_kept_as_without_following_and_named(tmp_path):
    (tmp_path / "in").mkdir()
    for name, frames in {"rest": scene([]), "pan": scene([at(150, 60)], pan=1.0)}.items():
        write_video(tmp_path / "in" / f"{name}.mp4", frames)
    plain = quick(tmp_path / "in", tmp_path / "plain")
    found = quick(tmp_path / "in", tmp_path / "pack", follow="motion")
    for i in range(2):
        ours, theirs = found.record(i), plain.record(i)
        assert "whole" in ours.pop("follow") and ours == theirs
    told = {line["source"]: line["reason"] for line in ledger(tmp_path / "pack")}
    assert "the camera moves" in told["pan.mp4"] and "nothing moves" in told["rest.mp4"]
    assert found.index["num_refused"] == 0


# ---- boxes of clips


def test_a_box_rests_while_it_can_and_else_moves_evenly():
    ticks = np.arange(100)
    jitter = np.random.default_rng(0).normal(0, 2, (100, 1))

    def cut_of(speed: float):
        left = 200 + speed * ticks[:, None] + jitter
        boxes = np.concatenate([left, left * 0 + 100, left + 30, left * 0 + 150], 1)
        (cut,) = plan_cuts([Track("1", ticks, boxes)], "boxes", (640, 360), FPS, 250, 100)
        way = places(cut.way, 100)
        assert (boxes[:, 0] >= way[:, 0] - 3).all() and (
            boxes[:, 2] <= way[:, 0] + cut.size[0] + 3
        ).all()
        return cut, way

    cut, way = cut_of(0.2)
    assert len(cut.way) == 1 and max(cut.size) < STILL * 65
    cut, way = cut_of(3.0)
    steps = np.diff(way[:, 0])
    assert len(cut.way) > 1 and max(cut.size) < 70
    # The box would shake by 2.8 pixels a frame if it went with the boxes.
    assert np.abs(np.diff(steps)).max() < 0.5 and abs(steps.mean() - 3) < 0.1


def test_gaps_are_filled_up_to_a_length_and_others_divide():
    gap = int(GAP * FPS)
    boxes = lambda ticks: np.tile([10.0, 10, 40, 60], (len(ticks), 1))
    short = np.r_[0:20, 10 + gap : 100]
    long = np.r_[0:20, 40 + gap : 140]
    cuts = plan_cuts([Track("a", short, boxes(short))], "boxes", (640, 360), FPS, 250, 200)
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 100)]
    cuts = plan_cuts([Track("a", long, boxes(long))], "boxes", (640, 360), FPS, 250, 200)
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 20), (40 + gap, 140)]
    brief = np.arange(5)
    assert plan_cuts([Track("a", brief, boxes(brief))], "boxes", (640, 360), FPS, 250, 200) == []


# ---- files of boxes


LAYOUTS = {
    "mot": "1,7,10,20,30,40,1,1,1\n2,7,12,20,30,40,1,1,1\n1,8,100,20,30,40,0.9\n1,9,0,0,5,5,0\n",
    "csv": "frame,id,x,y,w,h\n0,7,10,20,30,40\n1,7,12,20,30,40\n0,8,100,20,30,40\n",
    "corners": "track_id;frame;x1;y1;x2;y2\n7;0;10;20;40;60\n7;1;12;20;42;60\n8;0;100;20;130;60\n",
    "spaces": "frame x y w h\n0 10 20 30 40\n1 12 20 30 40\n0 100 20 30 40\n",
    "coco": json.dumps(
        {
            "images": [{"id": 31, "frame_id": 0}, {"id": 30, "frame_id": 1}],
            "annotations": [
                {"image_id": 31, "track_id": 7, "bbox": [10, 20, 30, 40]},
                {"image_id": 30, "track_id": 7, "bbox": [12, 20, 30, 40]},
                {"image_id": 31, "track_id": 8, "bbox": [100, 20, 30, 40]},
            ],
        }
    ),
    "results": json.dumps(
        [
            {"image_id": f"frame_{t + 1:04d}.jpg", "bbox": box, "score": 0.5}
            for t, box in ((0, [10, 20, 30, 40]), (1, [12, 20, 30, 40]), (0, [100, 20, 30, 40]))
        ]
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_says_the_same(name):
    found = parse_boxes(LAYOUTS[name].encode())
    (when, first), (_, second) = sorted(found.tracks.values(), key=lambda t: -len(t[0]))
    assert when.tolist() == [0, 1] and not found.seconds and found.frame is None
    assert first.tolist() == [[10, 20, 40, 60], [12, 20, 42, 60]]
    assert second.tolist() == [[100, 20, 130, 60]]


def test_times_fractions_and_boxes_in_the_list():
    found = parse_boxes(b"time,x,y,w,h\n0.5,.1,.1,.2,.2\n1.5,.2,.1,.2,.2\n")
    ((when, _),) = found.tracks.values()
    assert found.seconds and found.frame == (1, 1) and when.tolist() == [0.5, 1.5]
    for text in ("[10, 20, 30, 40]", "10 20 30 40", "10,20,30,40"):
        assert still_boxes(text).tracks["1"][1].tolist() == [[10, 20, 40, 60]]
    assert len(still_boxes("[[1, 2, 3, 4], [5, 6, 7, 8]]").tracks) == 2
    assert len(still_boxes("1 2 3 4; 5 6 7 8").tracks) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"), ("frame,id,x,y,w,h\n", "no box"), ("\xff\xfe", "line 1"),
        ("frame,id,x,y,w,h\n0,1,nan,0,5,5\n", "line 2.*leave out"),
        ("frame,id,x,y,w,h\n0,1,0,0,5,5\n1,1,0,0,1e9,5\n", "line 3"),
        ("frame,id,x,y,w,h\n0,1,50,50,-10,5\n", "line 2.*x1,y1,x2,y2"),
        ("frame,id,x,y,w,h\n0,1,5,5\n", "line 2 has 4 values"),
        ("frame,id,x,y,w,h\n0.5,1,5,5,5,5\n", "line 2.*time"),
        ("frame,id,x,y,w,h\n-3,1,5,5,5,5\n", "line 2"),
        ("frame,id,x,y,w,h\n0,1,0,0,5,5\n0,1,9,9,5,5\n", "line 3.*another box.*line 2"),
        ("frame,id,x,y\n0,1,5,5\n", "names the columns"), ("a,b\n1,2\n", "names the columns"),
        ("frame,id,x,y,w,h\n0,1," + "5" * 140_000, "'0,1,555+' cannot be read as csv"),
        ("1,2,3\n", "line 1.*names the columns"), ("1,2,a,4,5,6\n", "line 1"),
        ('{"annotations": [{"image_id": 1, "bbox": [1, 2, 3]}]}', "annotation 1"),
        ('{"annotations": [{"image_id": 1, "bbox": [1, NaN, 3, 4]}]}', "annotation 1"),
        ('{"annotations": {}}', "COCO"), ('{"annotations": [', "damaged"), ("[" * 5000, "damaged"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 2, "bbox": [1, 2, 3, 4]}]}', "2"),
        ('[{"image_id": "x", "bbox": [1, 2, 3, 4]}]', "no number"),
        ("0,1,5,5,5,5\n" + "1,-1,5,5,5,5\n" * 70, "over 64"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_boxes_is_refused_by_line(text, told):

    with pytest.raises(ValueError) as caught:
        parse_boxes(text.encode())
    assert re.search(told, str(caught.value)), caught.value


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    """Two people, one of whom walks; their flow and joints, and files of boxes."""
    folder = tmp_path_factory.mktemp("boxed")
    paths = [at(40, 60), at(60, 120, speed=4.0)]
    write_video(folder / "a.mp4", scene(paths))
    rows = [
        f"{t},{who},{left:g},{top:g},20,40\n"
        for who, path in enumerate(paths, 1)
        for t, (left, top) in enumerate(path)
        if who == 1 or t >= 10
    ]
    (folder / "a.csv").write_text("frame,id,x,y,w,h\n" + "".join(rows))
    (folder / "late.csv").write_text("frame,x,y,w,h\n60,5,5,20,20\n")
    (folder / "outside.csv").write_text("frame,x,y,w,h\n0,500,5,20,20\n")
    rng = np.random.default_rng(1)
    coarse = rng.normal(0, 2, (49, 2, 9, 16)).astype(np.float32)
    np.savez(folder / "a.npz", flow=np.kron(coarse, np.ones((1, 1, 20, 20), np.float32)))
    joints = np.stack([path[:, None] + rng.uniform(0, 20, (1, 20, 2)) for path in paths], 1)
    np.save(folder / "a.npy", joints.astype(np.float32))
    (folder / "list.csv").write_text(
        "path,label,boxes,flow,pose,skeleton\na.mp4,x,a.csv,a.npz,a.npy,synthetic20\n"
    )
    return folder


@pytest.fixture(scope="module")
def whole(boxed, tmp_path_factory) -> Pack:
    return quick(boxed / "list.csv", tmp_path_factory.mktemp("whole") / "pack")


@pytest.mark.parametrize("method", ["boxes", "pose"])
def test_streams_are_cropped_with_the_clip(boxed, whole, tmp_path, method):
    """Frames, flow and joints of each clip are those of the whole picture, inside the box."""
    found = quick(boxed / "list.csv", tmp_path / "pack", follow=method)
    rows = sorted(map(found.record, range(len(found))), key=lambda r: r["follow"]["subject"])
    assert [row["follow"]["subject"] for row in rows] == ["1", "2"]
    assert [len(row["follow"]["way"]) > 1 for row in rows] == [False, True]
    record = whole.record(0)
    flow, joints = (
        np.asarray(x) for x in (whole.flow(record, range(49)), whole.poses(record, range(50)))
    )
    frames = whole.frames(record, range(50)).numpy().astype(float)
    bound = record["streams"]["flow"]["bound"] / 127
    for row in rows:
        about, count = row["follow"], row["frames"]
        start = about["frame"]
        way, size = places(about["way"], count), about["size"]
        out = np.array([row["width"], row["height"]])
        scale = out / size
        ours = np.asarray(found.flow(row, range(count - 1)))
        mine = np.asarray(found.poses(row, range(count)))
        shown = found.frames(row, range(count)).numpy()
        shift = np.diff(way, axis=0)
        assert mine.shape[1] >= 1
        person = int(about["subject"]) - 1
        moved = (joints[start : start + count, person, :, :2] - way[:, None]) * scale
        if method == "pose":  # the one who is followed comes first
            assert np.abs(mine[:, 0, :, :2] - moved).max() < 1e-3
        assert min(np.abs(mine[:, p, :, :2] - moved).max() for p in range(mine.shape[1])) < 1e-3
        for t in range(0, count - 1, 7):
            # Where flow is the same all around, no two ways of scaling differ.
            x, y = np.meshgrid(
                *((np.arange(n) + 0.5) / by for n, by in zip(out, scale, strict=True))
            )
            u, v = x + way[t, 0], y + way[t, 1]
            column, row_ = u.astype(int).clip(0, WIDE - 1), v.astype(int).clip(0, HIGH - 1)
            inner = (np.minimum(u % 20, 20 - u % 20) > 3) & (np.minimum(v % 20, 20 - v % 20) > 3)
            there = flow[start + t][:, row_, column]
            for axis in range(2):
                expected = (there[axis] - shift[t, axis]) * scale[axis]
                allowed = bound + row["streams"]["flow"]["bound"] / 127
                assert np.abs(ours[t, axis] - expected)[inner].max() <= allowed
            seen = frames[start + t][
                v.astype(int).clip(0, HIGH - 1), u.astype(int).clip(0, WIDE - 1)
            ]
            assert np.abs(shown[t] - seen).mean() < 12  # but for compression, and halves of pixels


def test_a_video_is_one_however_many_act_in_it(tmp_path):
    small = write_video(tmp_path / "a.mp4", scene([], count=4))
    for name in "bcdefgh":
        (tmp_path / f"{name}.mp4").write_bytes(small.read_bytes())
    rows = [f"{n}.mp4,{'xy'[i % 2]},40 60 20 40; 200 20 30 60\n" for i, n in enumerate("bcdefgh")]
    (tmp_path / "list.csv").write_text("path,label,box\n" + "".join(rows))
    # They are copies of one video, which no split would divide.
    found = quick(
        tmp_path / "list.csv", tmp_path / "pack", follow="boxes", short_side=32, near=False
    )
    assert len(found) == 14
    with pytest.raises(ValueError, match="--follow"):  # a time line of several people is none
        list_videos((str(tmp_path / "pack"),))
    folds = choose_folds(found, "train", "test", False, 0)
    assert len(folds.labels) == 7 and len(folds.tested) < 7


def test_boxes_of_cvat(boxed, tmp_path):
    """Its XML alone names the video, and is the file of boxes; those outside are none."""
    side = '<box frame="{}" outside="{}" xtl="{:g}" ytl="{:g}" xbr="{:g}" ybr="{:g}"/>'
    tracks = ""
    for who, path in enumerate((at(40, 60), at(60, 120, speed=4.0))):
        shapes = [
            side.format(t, int(t > 30), x, y, x + 20, y + 40) for t, (x, y) in enumerate(path)
        ]
        tracks += f'<track id="{who}" label="act">{"".join(shapes)}</track>'
    meta = "<meta><task><source>a.mp4</source></task></meta>"
    (boxed / "cvat.xml").write_text(f"<annotations>{meta}{tracks}</annotations>")
    found = parse_boxes((boxed / "cvat.xml").read_bytes()).tracks
    assert [*found] == ["0", "1"] and found["1"][0].tolist() == [*range(31)]
    assert found["0"][1][0].tolist() == [40, 60, 60, 100]
    pack = quick(boxed / "cvat.xml", tmp_path / "pack", follow="boxes")
    assert {row["follow"]["subject"] for row in pack.records()} == {"0", "1"}
    for wrong, told in (("xtl", "frame 0"), ("frame", "number of a frame")):
        with pytest.raises(ValueError, match=told):
            parse_boxes((boxed / "cvat.xml").read_bytes().replace(f'{wrong}="'.encode(), b'x="'))


def labels_of(pack: Pack) -> dict[str, tuple]:
    return {
        row["follow"]["subject"]: (
            row["source"], row["label"], row["extra"].get("segments"), row["extra"]["recording"]
        )
        for row in pack.records()
    }  # fmt: skip


def test_a_clip_has_the_labels_of_whoever_it_follows(boxed, tmp_path, capsys):
    rows = ["0,1.2,wave,1", "1.2,2,stand,1", "0.4,2,walk,2", "0.4,2,walk,7", "1.5,1.6,flash,"]
    table = "path,boxes,start,end,label,track_id\n" + "".join(f"a.mp4,a.csv,{r}\n" for r in rows)
    (boxed / "whose.csv").write_text(table)
    pack = quick(boxed / "whose.csv", tmp_path / "all", follow="boxes", progress=True)
    assert "1 person are on no clip" in (said := capsys.readouterr().err) and "'7' of a.mp4" in said
    assert "read by no recipe" not in said
    assert labels_of(pack) == {
        "1": ("a.mp4#1", None, "1.500-1.600 flash; 0.000-1.200 wave; 1.200-2.000 stand", "a.mp4"),
        "2": ("a.mp4#2", None, "1.500-1.600 flash; 0.400-2.000 walk", "a.mp4"),
    }
    (boxed / "whose.csv").write_text(table.replace("a.mp4,a.csv,1.5,1.6,flash,\n", ""))
    pack = quick(boxed / "whose.csv", tmp_path / "one", follow="boxes")
    assert labels_of(pack)["2"] == ("a.mp4#2", "walk", "0.400-2.000 walk", "a.mp4")
    assert labels_of(pack)["1"][1] is None
    assert len({*group_clips([*pack.records()], pack.near_duplicates()[:0])}) == 1
    quick(boxed / "whose.csv", tmp_path / "whole", progress=True)
    assert "--follow boxes alone: boxes and track_id" in capsys.readouterr().err


def test_labels_of_people_for_the_whole_video(boxed, tmp_path):
    long = "x" * 90
    text = (boxed / "a.csv").read_text()
    (boxed / "long.csv").write_text(re.sub(r"(?m)^(\d+),2,", rf"\1,{long},", text))
    (boxed / "notime.csv").write_text(
        f"path,label,track_id,boxes\na.mp4,walk,1.0,long.csv\na.mp4,wave,{long},long.csv\n"
    )
    found = quick(boxed / "notime.csv", tmp_path / "two", follow="boxes").records()
    assert {(row["follow"]["subject"], row["label"]) for row in found} == {
        ("1", "walk"), (long[:80], "wave")
    }  # fmt: skip
    (boxed / "notime.csv").write_text("path,label,track_id,boxes\na.mp4,walk,1,a.csv\n")
    found = quick(boxed / "notime.csv", tmp_path / "one", follow="boxes").records()
    assert {(r["follow"]["subject"], r["label"]) for r in found} == {("1", "walk"), ("2", None)}
    boxes = [{"image_id": t, "bbox": [40, 60, 20, 40], "track_id": "\ud800x"} for t in range(50)]
    (boxed / "sur.json").write_text(json.dumps(boxes))
    (boxed / "notime.csv").write_text("path,label,track_id,boxes\na.mp4,walk,7,sur.json\n")
    (row,) = quick(boxed / "notime.csv", tmp_path / "sur", follow="boxes").records()
    assert row["source"] == "a.mp4#\\ud800x" and row["label"] is None


def test_boxes_of_ava(boxed, tmp_path):
    """Boxes of a second reach half a second before and behind it; labels are of their people."""
    (boxed / "b.mp4").write_bytes((boxed / "a.mp4").read_bytes())
    row = "{},{},0.1,0.2,0.3,0.8,{},{}\n"
    rows = [("a", 1, 12, 0), ("a", 1, 80, 0), ("a", "0001.5", 12, 3), ("b", 1, 11, 0)]
    (boxed / "ava.csv").write_text("".join(row.format(*each) for each in rows))
    found = parse_boxes((boxed / "ava.csv").read_bytes(), "a")
    assert found.seconds and found.frame == (1, 1) and [*found.tracks] == ["0", "3"]
    assert found.tracks["0"][0].tolist() == [0.5, 1, 1.5]
    pack = quick(boxed / "ava.csv", tmp_path / "pack", follow="boxes", near=False)
    rows = {(row["source"], row["label"]) for row in pack.records()}
    assert rows == {("a.mp4#0", None), ("a.mp4#3", "action 12"), ("b.mp4#0", "action 11")}
    with pytest.raises(ValueError, match=r"line 1.*8"):
        parse_boxes(b"a,1,0.1,0.2,0.3,0.8,12\n", "a")


def test_what_is_wrong_with_boxes_is_told(boxed, tmp_path):
    def told(table: str, **more) -> str:
        path = boxed / "wrong.csv"
        path.write_text(table)
        with pytest.raises(ValueError) as caught:
            make(path, tmp_path / "-".join(["pack", *more]), **({"follow": "boxes"} | more))
        return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])

    assert "no boxes" in told("path,label\na.mp4,x\n") and "column boxes" in told("path\na.mp4\n")
    assert "wrong.csv:2: no such file of boxes: b.csv" in told("path,boxes\na.mp4,b.csv\n")
    assert "60" in told("path,boxes\na.mp4,late.csv\n") and "time" in told(
        "path,boxes\na.mp4,late.csv\n"
    )
    assert "1 2 3" in told("path,boxes\na.mp4,1 2 3\n")
    assert "--pose blazepose" in told("path\na.mp4\n", follow="pose")
    assert "motion, boxes, pose" in told("path\na.mp4\n", follow="fast")
    (boxed / "wrong.csv").write_text("path,boxes\na.mp4,outside.csv\n")
    quick(boxed / "wrong.csv", tmp_path / "pack", follow="boxes", anew=True)
    (line,) = ledger(tmp_path / "pack")
    assert line["stream"] == "follow" and "outside" in line["reason"]


# ---- packs


def test_parts_merge_to_the_same_pack_and_settings_do_not_mix(boxed, tmp_path):
    (boxed / "b.mp4").write_bytes((boxed / "a.mp4").read_bytes())
    rows = [f"{name}.mp4,a.csv\n" for name in "ab"]
    (boxed / "two.csv").write_text("path,boxes\n" + "".join(rows))
    quick(boxed / "two.csv", tmp_path / "one", follow="boxes")
    for part in (1, 2):
        make(boxed / "two.csv", tmp_path / f"parts/{part}", follow="boxes", part=(part, 2))
    merge(tmp_path / "parts", tmp_path / "merged", progress=False)
    for name in ("index.json", "clips.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    before = load_index(tmp_path / "one")["fingerprint"]
    for other in ("", "motion"):
        with pytest.raises(ValueError, match="follow"):
            quick(boxed / "two.csv", tmp_path / "one", follow=other)
    shards = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "merged").glob("*.tar")}
    quick(boxed / "two.csv", tmp_path / "merged", follow="boxes")
    assert shards == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "merged").glob("*.tar")}
    changed = (boxed / "a.csv").read_text().replace(",40,60,20,40", ",200,60,20,40")
    (boxed / "a.csv").write_text(changed)  # other boxes, other clips
    again = quick(boxed / "two.csv", tmp_path / "one", follow="boxes")
    assert again.index["fingerprint"] != before


def test_a_crop_is_sharper_than_the_whole_picture(boxed, tmp_path):
    frames = scene([at(40, 60)], count=6)
    fine = [np.kron(frame, np.ones((4, 4, 1), np.uint8)) for frame in frames]
    write_video(tmp_path / "a.mp4", fine)
    (tmp_path / "list.csv").write_text("path,bbox\na.mp4,160 240 80 160\n")
    found = quick(tmp_path / "list.csv", tmp_path / "pack", follow="boxes", short_side=180)
    row = found.record(0)
    assert (row["width"], row["height"]) == (180, 180) and row["follow"]["size"] == [208, 208]


def test_pictures_are_cut_by_their_boxes(tmp_path):
    from PIL import Image

    Image.fromarray(scene([at(40, 60)], count=1)[0]).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,bbox\na.png,40 60 20 40\n")
    row = quick(tmp_path / "list.csv", tmp_path / "boxes", follow="boxes").record(0)
    assert row["frames"] == 1 and max(row["width"], row["height"]) < 60
    quick(tmp_path / "list.csv", tmp_path / "motion", follow="motion")
    assert "too short" in ledger(tmp_path / "motion")[0]["reason"]


def test_boxes_are_in_pixels_of_the_upright_video(tmp_path):
    """Phones store pictures on their side; detectors, as players, see them upright."""
    frames = scene([at(40, 60)], count=20)
    turned = [np.ascontiguousarray(np.rot90(frame)) for frame in frames]
    write_video(tmp_path / "a.mp4", turned, rotation=-90)
    upright = write_video(tmp_path / "b.mp4", frames)
    boxes = {"method": "boxes", "text": "40 60 20 40"}
    cuts = []
    for path in (tmp_path / "a.mp4", upright):
        (clip,) = ingest(str(path), None, "video", str(path) + "-out", 256, 10.0, follow=boxes)
        cuts.append(clip)
    shown = [np.stack(read_video(tmp_path / c["file"])).astype(float) for c in cuts]
    assert cuts[0]["follow"]["size"] == cuts[1]["follow"]["size"]
    assert np.abs(shown[0] - shown[1]).mean() < 6


@pytest.mark.slow
def test_the_error_of_following_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path), "--videos", "2", "--methods",
                                     "boxes", "motion"])  # fmt: skip
    main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed] == ["boxes", "motion"]
    assert "people found 1 " in printed[0] and "contains all 1 " in printed[0]
