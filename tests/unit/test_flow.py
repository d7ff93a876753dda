"""Optical flow: stored without loss, packed from the data or by a method, loaded as frames are."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data import flow, flow_error, flow_files
from pretrain.data import pack as packing
from pretrain.data.acquire import acquire
from pretrain.data.arrays import read_arrays
from pretrain.data.decode import decode_frames
from pretrain.data.guard import Refused
from pretrain.data.index import load_index
from pretrain.data.pack import pack
from pretrain.data.shards import (
    EvalClips,
    Pack,
    Positions,
    TrainClips,
    crop_flow,
    eval_loader,
    train_batches,
)
from pretrain.data.synthetic import make_dataset
from pretrain.data.transforms import Augment, mirror
from pretrain.flow_colours import draw_flow, full_colour
from pretrain.spec import InputSpec, Stream, flow_stream
from recipes import visualize
from tests.unit.media import write_video

BOTH = InputSpec(4, 2, 32, {"rgb": Stream(), "flow": flow_stream(32)})
ALONE = InputSpec(4, 2, 32, {"flow": flow_stream(32)})


def quick(source: Path, out: Path, **more) -> dict:
    return pack(source, out, workers=1, progress=False, **more)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The list of a synthetic dataset of four clips."""
    folder = tmp_path_factory.mktemp("flow") / "dataset"
    return make_dataset(folder, num_clips=4, frames=18, workers=1, progress=False)


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory) -> Pack:
    """It, packed with the flow it brings."""
    quick(dataset, out := tmp_path_factory.mktemp("flow") / "pack")
    return Pack(out)


def rows_of(out: Path) -> dict[str, dict]:
    return {row["source"]: row for row in map(json.loads, open(out / "clips.jsonl"))}


def ledger(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "refused.jsonl")]


def bytes_of(out: Path) -> dict[str, bytes]:
    packed = Pack(out)
    return {row["key"]: packed.read(row) for row in packed.records()}


# ---- levels


@pytest.mark.parametrize(("width", "height"), [(2, 2), (34, 18), (130, 6), (64, 64)])
def test_levels_come_back_to_the_bit(width, height):
    """Rows are padded in memory, and every level has to survive: neither shifts nor colours."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (19, 2, height, width), np.uint8)
    data = flow.encode_levels(levels)
    for indices in (np.arange(19), np.array([18, 3, 3, 0])):
        planes = decode_frames(data, indices, (width, 2 * height), grey=True)
        assert np.array_equal(planes.reshape(-1, 2, height, width), levels[indices])


def test_quantisation_is_the_only_error_and_rest_is_exact():
    motion = np.random.default_rng(0).uniform(-5, 5, (3, 2, 8, 8)).astype(np.float32)
    motion[0] = 0
    again = flow.to_pixels(flow.to_levels(motion, 6.0), 6.0)
    assert np.abs(again - motion).max() <= 6 / 127 / 2 + 1e-6 and not again[0].any()
    assert np.abs(flow.to_pixels(flow.to_levels(10 * motion, 6.0), 6.0)).max() <= 6 + 1e-6


# ---- packed from what the data bring


def test_a_pack_keeps_the_exact_flow_of_the_data(dataset, packed):
    with open(dataset, newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert packed.index["streams"]["flow"] == {"num_clips": 4, "methods": {"exact": 4}}
    for record in packed.records():
        with np.load(dataset.parent / rows[record["source"]]["flow"]) as stored:
            true = stored["flow"].astype(np.float32)
        entry = record["streams"]["flow"]
        assert entry["of"] == record["sha256"] and entry["method"] == "exact"
        found = packed.flow(record, np.arange(18)).numpy()
        assert found.shape == (18, 2, 64, 64)
        error = np.abs(found[:17] - np.clip(true, -entry["bound"], entry["bound"]))
        assert error.max() <= entry["bound"] / 127 / 2 + 1e-4
        assert np.array_equal(found[17], found[16])  # behind the last frame there is no motion
        assert not found[:17][np.abs(true) < 1e-9].any()


def test_the_number_of_workers_changes_nothing(dataset, packed, tmp_path):
    pack(dataset, tmp_path / "two", workers=2, progress=False)
    assert load_index(tmp_path / "two") == packed.index


def test_flow_of_larger_frames_is_scaled_as_they_are(dataset, packed, tmp_path):
    quick(dataset, tmp_path / "small", short_side=32)
    small = Pack(tmp_path / "small")
    large = {record["source"]: record for record in packed.records()}
    for record in small.records():
        assert (record["width"], record["height"]) == (32, 32)
        ours = small.flow(record, np.arange(17))
        theirs = packed.flow(large[record["source"]], np.arange(17)) / 2
        theirs = torch.nn.functional.avg_pool2d(theirs, 2)
        assert (ours - theirs).abs().mean() < 0.05


def npz(**arrays: np.ndarray) -> bytes:
    np.savez_compressed(data := io.BytesIO(), **arrays)
    return data.getvalue()


def npy(array: np.ndarray) -> bytes:
    np.save(data := io.BytesIO(), array)
    return data.getvalue()


def test_members_of_a_tar_beside_the_video_are_its_flow(tmp_path):
    write_video(tmp_path / "a.mp4", 12, size=(32, 24))
    true = np.random.default_rng(0).normal(0, 1, (11, 24, 32, 2)).astype(np.float32)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "1.mp4")
        tar.add(tmp_path / "a.mp4", "2.left.mp4")
        for name, data in {
            "1.flow.npy": npy(true),
            "1.json": b'{"label": "x", "flow_method": "farneback"}',
            "2.left.flow.npz": npz(flow=true.transpose(0, 3, 1, 2), other=np.zeros(3)),
            "2.cls": b"y",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    quick(tmp_path / "t.tar", tmp_path / "out")
    packed = Pack(tmp_path / "out")
    methods = {}
    for record in packed.records():
        entry = record["streams"]["flow"]
        methods[record["source"]] = entry["method"]
        found = packed.flow(record, np.arange(11)).numpy().transpose(0, 2, 3, 1)
        assert np.abs(found - true).max() <= entry["bound"] / 127 / 2 + 1e-5
    assert methods == {"t.tar/1.mp4": "farneback", "t.tar/2.left.mp4": "given"}


def test_our_own_shards_are_read_as_webdataset_and_hold_no_clip_twice(packed, tmp_path):
    (shard,) = packed.folder.glob("shard-*.tar")
    with tarfile.open(shard) as tar:
        names = sorted(name.partition(".")[2] for name in tar.getnames())
    assert names == sorted(4 * ["mp4", "flow", "pose.npy", "json"])
    quick(shard, tmp_path / "out")
    again = Pack(tmp_path / "out")
    assert {r["sha256"] for r in again.records()} == {r["sha256"] for r in packed.records()}
    assert len(again) == 4


def test_a_video_cut_into_clips_shares_its_flow_out(tmp_path):
    write_video(tmp_path / "a.mp4", 40, size=(32, 24))
    true = np.zeros((39, 2, 24, 32), np.float32)
    true += np.linspace(-1, 1, 39, dtype=np.float32)[:, None, None, None]
    (tmp_path / "a.npz").write_bytes(npz(flow=true))
    (tmp_path / "list.csv").write_text("path,flow,label\na.mp4,a.npz,x\n")
    rate = 1 / (Pack(_made(tmp_path)).record(0)["fps"])
    quick(tmp_path / "list.csv", tmp_path / "out", clip_seconds=10 * rate)
    packed = Pack(tmp_path / "out")
    seen = 0
    for record in sorted(packed.records(), key=lambda r: r["clip"]):
        found = packed.flow(record, np.arange(record["frames"] - 1)).numpy()
        assert np.abs(found - true[seen : seen + record["frames"] - 1]).max() < 0.02
        seen += record["frames"]
    assert seen == 40 and len(packed) > 1


def _made(folder: Path) -> Path:
    quick(folder / "list.csv", folder / "whole")
    return folder / "whole"


def bomb() -> bytes:
    """An .npz of a few kilobytes whose array claims 6 GiB."""
    head = {"descr": "<f4", "fortran_order": False, "shape": (11, 2, 2**13, 2**13)}
    with (
        zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("flow.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, head)
        member.write(bytes(2**22))
    return data.getvalue()


HOSTILE = {
    "one too many": (npz(flow=np.zeros((12, 2, 24, 32), np.float32)), "have 11 between"),
    "no motion": (npz(flow=np.full((11, 2, 24, 32), np.nan, np.float32)), "no motion"),
    "unknown": (npz(flow=np.full((11, 2, 24, 32), 1e9, np.float32)), "no motion"),
    "other proportions": (npz(flow=np.zeros((11, 2, 32, 24), np.float32)), "no scaled ones"),
    "other array": (npz(a=np.zeros(3), b=np.zeros(4)), "no array called flow"),
    "other shape": (npz(flow=np.zeros((11, 3, 24, 32), np.float32)), "shape"),
    "pickle": (npz(flow=np.array([{}], object)), "else than numbers"),
    "text": (npz(flow=np.array(["a"])), "else than numbers"),
    "no zip": (b"PK\x03\x04" + bytes(60), "damaged"),
    "nothing": (b"", "damaged header"),
    "cut": (npy(np.zeros((11, 2, 24, 32), np.float32))[:-5], "are there"),
    "bomb": (bomb(), "are there"),
    "odd header": (b"\x93NUMPY\x01\0\x10\0" + b"{'a': (((((((((((", "damaged header"),
    "empty": (npz(flow=np.zeros((0, 2, 24, 32), np.float32)), "shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_flow_that_cannot_be_is_refused_in_words(name):
    data, words = HOSTILE[name]
    with pytest.raises(Refused, match=words):
        given = flow_files.read_flow(io.BytesIO(data), 0, 12, 12)
        flow_files.resize_flow(given, 32, 24)


def test_only_the_arrays_wanted_are_unpacked():
    found = read_arrays(io.BytesIO(npz(flow=np.ones(3), other=np.array([{}], object))), ("flow",))
    assert list(found) == ["flow"]


def test_refused_flow_is_in_the_ledger_and_its_clip_is_not_lost(tmp_path):
    write_video(tmp_path / "a.mp4", 12, size=(32, 24))
    write_video(tmp_path / "b.mp4", 12, size=(32, 24))
    (tmp_path / "bad.npz").write_bytes(bomb())
    (tmp_path / "good.npz").write_bytes(npz(flow=np.zeros((11, 2, 24, 32), np.float32)))
    table = "path,flow,label\na.mp4,bad.npz,x\nb.mp4,good.npz,x\n"
    (tmp_path / "list.csv").write_text(table)
    index = quick(tmp_path / "list.csv", tmp_path / "out")
    assert (index["num_clips"], index["num_refused"]) == (2, 0)
    assert index["streams"]["flow"]["num_clips"] == 1
    assert [(x["source"], x["stream"]) for x in ledger(tmp_path / "out")] == [("a.mp4", "flow")]
    packed = Pack(tmp_path / "out")
    with pytest.raises(ValueError, match=r"a\.mp4.*no flow"):
        EvalClips(packed, np.arange(2), ALONE, 1, 1)
    good = [i for i in range(2) if packed.record(i)["source"] == "b.mp4"]
    assert EvalClips(packed, np.array(good), ALONE, 1, 1)[0][1]["flow"].shape == (1, 2, 4, 32, 32)


def test_a_list_that_names_no_such_flow_is_refused_whole(tmp_path):
    write_video(tmp_path / "a.mp4", 12, size=(32, 24))
    (tmp_path / "list.csv").write_text("path,flow,label\na.mp4,nowhere.npz,x\n")
    with pytest.raises(ValueError, match="1 problem") as refused:
        quick(tmp_path / "list.csv", tmp_path / "out")
    assert "nowhere.npz" in str(refused.value.__notes__)
    # A column of that name with other words is an ordinary one.
    (tmp_path / "list.csv").write_text("path,flow,skeleton,label\na.mp4,fast,thin,x\n")
    quick(tmp_path / "list.csv", tmp_path / "out")
    assert Pack(tmp_path / "out").record(0)["extra"] == {"flow": "fast", "skeleton": "thin"}


# ---- files of a pair of frames each


def flo(motion: np.ndarray) -> bytes:
    """A Middlebury .flo of (2, H, W)."""
    height, width = motion.shape[1:]
    head = b"PIEH" + np.array([width, height], "<i4").tobytes()
    return head + np.ascontiguousarray(motion.transpose(1, 2, 0), "<f4").tobytes()


def picture(levels: np.ndarray, form: str = "PNG") -> bytes:
    Image.fromarray(levels).save(data := io.BytesIO(), form, quality=95)
    return data.getvalue()


def motions(number: int, size=(32, 24)) -> np.ndarray:
    """Smooth, different for every pair, up to 6 pixels."""
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    k = np.arange(1, number + 1)[:, None, None] / number
    return np.stack([6 * k * x, -3 * k * y], 1).astype(np.float32)


def tsn(folder: Path, flows: np.ndarray, bound=20.0, form="PNG", name="flow_{}_{:05}", first=1):
    """What TSN's and denseflow's tools write: round((f + bound) * 255 / (2 * bound))."""
    folder.mkdir()
    levels = np.rint((flows + bound) * 255 / (2 * bound)).clip(0, 255).astype(np.uint8)
    for number, pair in enumerate(levels, first):
        for axis, plane in zip("uv" if "flow" not in name else "xy", pair, strict=True):
            ending = {"PNG": "png", "JPEG": "jpg"}[form]
            (folder / f"{name.format(axis, number)}.{ending}").write_bytes(picture(plane, form))


def read_all(folder: Path, total=12, bound=20.0, size=(32, 24), part=None) -> np.ndarray:
    before, frames = part or (0, total)
    fitted = lambda flow, _: flow_files.resize_flow(flow, *size)
    return flow_files.read_folder(str(folder), before, frames, total, fitted, bound, lambda: None)


def test_a_file_a_pair_is_read_in_both_layouts(tmp_path):
    true = motions(11)
    tsn(tmp_path / "png", true)
    tsn(tmp_path / "jpg", true, form="JPEG", first=0)
    tsn(tmp_path / "u_v", true, bound=8.0, name="{}_{}")
    (tmp_path / "png" / "img_00001.jpg").write_bytes(b"TSN's tool puts the frames beside them")
    (tmp_path / "flo").mkdir()
    for number, motion in enumerate(true, 7):
        (tmp_path / "flo" / f"frame_{number}.flo").write_bytes(flo(motion))
    half_a_step = 20 / 255 + 1e-4
    assert np.abs(read_all(tmp_path / "png") - true).max() <= half_a_step
    assert np.abs(read_all(tmp_path / "jpg") - true).max() <= 10 * half_a_step
    assert np.abs(read_all(tmp_path / "u_v", bound=8.0) - true).max() <= 8 / 255 + 1e-4
    assert np.array_equal(read_all(tmp_path / "flo", bound=0.0), true)
    assert np.array_equal(read_all(tmp_path / "flo", part=(3, 5)), true[3:7])
    halved = read_all(tmp_path / "flo", size=(16, 12))
    assert np.abs(halved - motions(11, (16, 12)) / 2).max() < 0.2


def test_a_list_names_folders_of_flow(tmp_path):
    true = motions(11)
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", 12, size=(32, 24))
    tsn(tmp_path / "of_a", true)
    (tmp_path / "of_b").mkdir()
    for number, motion in enumerate(true):
        (tmp_path / "of_b" / f"{number:010}.flo").write_bytes(flo(motion))
    (tmp_path / "c.npz").write_bytes(npz(flow=true))
    rows = "a.mp4,of_a,20,tvl1,x\nb.mp4,of_b/,,tvl1,x\nc.mp4,c.npz,9,tvl1,x\n"
    (tmp_path / "list.csv").write_text("path,flow,flow_bound,flow_method,label\n" + rows)
    quick(tmp_path / "list.csv", tmp_path / "out")
    packed = Pack(tmp_path / "out")
    assert packed.index["streams"]["flow"] == {"num_clips": 3, "methods": {"tvl1": 3}}
    for record in packed.records():
        error = np.abs(packed.flow(record, np.arange(11)).numpy() - true).max()
        assert error < 0.12, record["source"]
    extra = {record["source"]: record["extra"] for record in packed.records()}
    assert extra == {"a.mp4": {}, "b.mp4": {}, "c.mp4": {"flow_bound": "9"}}
    # Another bound makes that flow anew.
    (tmp_path / "list.csv").write_text(
        "path,flow,flow_bound,flow_method,label\n" + rows.replace(",20,", ",10,")
    )
    quick(tmp_path / "list.csv", tmp_path / "out")
    packed = Pack(tmp_path / "out")
    (of_a,) = (record for record in packed.records() if record["source"] == "a.mp4")
    assert np.abs(packed.flow(of_a, np.arange(11)).numpy() - true / 2).max() < 0.12


@pytest.mark.parametrize("bound", ["", "0", "-20", "nan", "inf", "1e9", "fast"])
def test_pictures_of_flow_want_a_bound(tmp_path, bound):
    write_video(tmp_path / "a.mp4", 12, size=(32, 24))
    tsn(tmp_path / "flow", motions(11))
    (tmp_path / "list.csv").write_text(f"path,flow,flow_bound,label\na.mp4,flow,{bound},x\n")
    with pytest.raises(ValueError, match="1 problem") as refused:
        quick(tmp_path / "list.csv", tmp_path / "out")
    assert "flow_bound" in str(refused.value.__notes__) and not (tmp_path / "out").exists()


def _spoil(folder: Path, what: str) -> None:
    name = folder / "flow_x_00003.png"
    grey, wide = np.zeros((24, 32), np.uint8), np.zeros((24, 34), np.uint8)
    if what in ("missing", "of one axis"):
        name.unlink()
        if what == "missing":
            (folder / "flow_y_00003.png").unlink()
    elif what == "twice":
        (folder / "flow_x_3.png").write_bytes(picture(grey))
    elif what == "last missing":
        (folder / "flow_x_00011.png").unlink()
        (folder / "flow_y_00011.png").unlink()
    elif what == "both layouts":
        (folder / "1.flo").write_bytes(flo(motions(1)[0]))
    elif what == "no flow":
        for file in folder.iterdir():
            file.unlink()
    elif what == "pipe":
        name.unlink()
        os.mkfifo(name)
    else:
        colours = np.random.default_rng(0).integers(256, size=(24, 32, 3)).astype(np.uint8)
        deep = np.zeros((24, 32), np.uint16)
        data = {"wide": picture(wide), "cut": picture(grey)[:40], "colours": picture(colours),
                "deep": picture(deep), "text": b"text", "empty": b"", "bomb": _bomb()}  # fmt: skip
        name.write_bytes(data[what])


def _bomb() -> bytes:
    """A PNG that claims a billion pixels."""
    data = bytearray(picture(np.zeros((1, 1), np.uint8)))
    data[16:24] = np.array([2**15, 2**15], ">u4").tobytes()
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "missing": "lacks 1 .*3",
        "of one axis": "number 3 of one axis",
        "twice": "number 3 twice",
        "last missing": "10 flows.*11 between",
        "both layouts": "either",
        "no flow": "without flow",
        "pipe": "pipe",
        "wide": "another size",
        "cut": "damaged",
        "colours": "colours",
        "deep": "mode",
        "text": "damaged",
        "empty": "damaged",
        "bomb": "pixels",
    }.items(),
)
def test_a_folder_that_is_no_flow_is_refused_in_words(tmp_path, what, words):
    tsn(tmp_path / "flow", motions(11))
    _spoil(tmp_path / "flow", what)
    with pytest.raises((Refused, OSError), match=words):
        read_all(tmp_path / "flow")
    with pytest.raises((Refused, OSError), match="bound|" + words):
        read_all(tmp_path / "flow", bound=0.0)


@pytest.mark.parametrize(
    ("data", "words"),
    {
        b"PIEH": "size",
        b"PIEH" + bytes(8): "0x0",
        b"PIEH" + np.array([-1, -8], "<i4").tobytes() + bytes(64): "-1",
        b"PIEH" + np.array([2**30, 2**30], "<i4").tobytes() + bytes(64): "pixels",
        flo(np.zeros((2, 24, 32)))[:-1]: "bytes",
        flo(np.zeros((2, 24, 32))) + b"x": "bytes",
        flo(np.full((2, 24, 32), np.nan)): "no motion",
        flo(np.full((2, 24, 32), 1e9)): "no motion",  # what Middlebury calls unknown
        flo(np.zeros((2, 32, 24))): "no scaled ones",
        b"HEIP" + bytes(64): "PIEH",
    }.items(),
)
def test_a_flo_is_no_longer_than_it_claims_nor_shorter(tmp_path, data, words):
    (tmp_path / "1.flo").write_bytes(data)
    with pytest.raises(Refused, match=words):
        read_all(tmp_path, 2)
    if data.startswith(b"PIEH"):
        with pytest.raises(Refused, match=words):
            given = flow_files.read_flow(io.BytesIO(data), 0, 2, 2)
            flow_files.resize_flow(given, 32, 24)


# ---- estimated


def test_flow_is_added_to_a_pack_that_is_there_and_is_kept(dataset, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(dataset.parent / "clips", source)
    quick(source, out)
    frames = bytes_of(out)
    with pytest.raises(ValueError, match=r"no flow.*--flow dis"):
        TrainClips(Pack(out), np.arange(4), BOTH, 0, 1, None, lambda *_: {})
    index = quick(source, out, flow="dis")
    assert index["streams"]["flow"] == {"num_clips": 4, "methods": {"dis": 4}}
    assert bytes_of(out) == frames
    ran = []
    real = packing.run_jobs
    monkeypatch.setattr(
        packing, "run_jobs", lambda jobs, *a: ran.append(len(jobs)) or real(jobs, *a)
    )
    assert quick(source, out) == index == quick(source, out, flow="dis") and not any(ran)
    packed = Pack(out)
    first = packed.record(0)
    still = packed.flow(first, np.arange(17)).abs().mean()
    assert 0 < still < 5
    # A new file gets flow as the others have, and a clip made anew has it made anew.
    shutil.copy(source / "00000.mp4", source / "more.mp4")
    assert quick(source, out)["streams"]["flow"]["num_clips"] == 5 and ran[-1] == 1
    with pytest.raises(ValueError, match=r"takes flow 'tvl1'.*'dis'"):
        only = InputSpec(4, 2, 32, {"flow": flow_stream(32, method="tvl1")})
        EvalClips(Pack(out), np.arange(2), only, 1, 1)


def test_interrupted_work_goes_on(dataset, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    out = tmp_path / "out"
    source = dataset.parent / "clips"
    real = packing.run_jobs

    def stopped(jobs, *rest):
        for number, done in enumerate(real(jobs, *rest)):
            if jobs[0].get("stream") and number == 2:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(packing, "run_jobs", stopped)
    with pytest.raises(KeyboardInterrupt):
        quick(source, out, flow="dis")
    ran = []
    monkeypatch.setattr(
        packing, "run_jobs", lambda jobs, *a: ran.append(len(jobs)) or real(jobs, *a)
    )
    assert quick(source, out)["streams"]["flow"]["num_clips"] == 4  # as it was asked for before
    assert ran == [0, 2]


def test_flow_of_small_and_single_pictures_is_refused_by_name(tmp_path):
    pytest.importorskip("cv2")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_video(source / "a.mp4", 3, size=(10, 8))
    write_video(source / "b.mp4", 3, size=(32, 24))
    from PIL import Image

    Image.new("RGB", (32, 32)).save(source / "c.png")
    index = quick(source, out, flow="dis")
    assert index["streams"]["flow"]["num_clips"] == 1 and index["num_clips"] == 3
    why = {line["source"]: line["reason"] for line in ledger(out)}
    assert "12 pixels" in why["a.mp4"] and "one frame" in why["c.png"] and len(why) == 2


def test_an_unknown_method_and_a_missing_library_are_named(dataset, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give one of dis"):
        quick(dataset, tmp_path / "out", flow="lucas")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"muybridge\[flow\]"):
        quick(dataset, tmp_path / "out", flow="dis")


def test_without_a_network_raft_is_a_sentence(dataset, tmp_path, monkeypatch):
    import urllib.error

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(ValueError, match="weights of raft_small cannot be fetched"):
        quick(dataset, tmp_path / "out", flow="raft_small")


# ---- loaded


def no_more(*_) -> dict:
    return {}


def loader_of(packed: Pack, spec: InputSpec = BOTH, **augment) -> TrainClips:
    how = Augment(**augment) if augment else None
    return TrainClips(packed, np.arange(len(packed)), spec, 0, 2, None, no_more, how)


def test_a_shard_of_a_pack_names_the_streams_that_it_cannot_bring(packed, tmp_path):
    """Its frames are packed; flow without the index has no unit, and is not left out in silence."""
    shard = next(Path(packed.folder).glob("shard-*.tar"))
    pack(shard, tmp_path / "out", workers=1, progress=False)
    made, lines = Pack(tmp_path / "out"), ledger(tmp_path / "out")
    assert len(made) == len(packed) and not {*made.streams} & {"flow", "pose"}
    for stream in ("flow", "pose"):
        assert len([line for line in lines if line["stream"] == stream]) == len(made)
    assert len([line for line in lines if "folder of the pack" in line["reason"]]) == len(made)


def test_rgb_and_flow_are_of_the_same_crop(packed):
    """What is seen at a pixel is, a frame later, where flow says: more nearly than without it."""
    spec = InputSpec(8, 1, 48, {"rgb": Stream(), "flow": flow_stream(48)})
    clips, errors = loader_of(packed, spec, flip=True), {"flow": [], "zero": [], "turned": []}
    for place in range(8):
        batch = clips[place]
        for rgb, levels in zip(batch["rgb"].float(), batch["flow"], strict=True):
            motion = spec.normalise({"rgb": batch["rgb"], "flow": levels[None]})["flow"][0]
            motion = motion * spec.streams["flow"].bound
            moving = motion.norm(dim=0)[:-1] > 1.5
            for name, used in (("flow", motion), ("zero", 0 * motion), ("turned", -motion)):
                there = warp(rgb.transpose(0, 1)[1:], used.transpose(0, 1)[:-1])
                gap = (there - rgb.transpose(0, 1)[:-1]).abs().mean(1)
                errors[name].append(gap[moving])
    mean = {name: torch.cat(values).mean().item() for name, values in errors.items()}
    assert len(torch.cat(errors["flow"])) > 500
    assert mean["flow"] < 0.6 * mean["zero"] and mean["flow"] < 0.5 * mean["turned"], mean


def warp(frames: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Frames (T, C, H, W) read at pixel + motion (T, 2, H, W)."""
    size = frames.shape[-1]
    v, u = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    at = torch.stack([u, v], -1) + motion.permute(0, 2, 3, 1)
    grid = (at + 0.5) / size * 2 - 1
    return torch.nn.functional.grid_sample(frames, grid, align_corners=False)


def test_a_crop_scales_motion_and_a_bound_clips_it():
    motion = torch.zeros(3, 2, 16, 32)
    motion[:, 0], motion[:, 1] = 4.0, -1.0
    levels = torch.from_numpy(flow.to_levels(motion.numpy(), 8.0))
    stream = flow_stream(8, bound=4.0)
    out = crop_flow(levels, 8.0, (8, 4, 16, 8), 8, stream)  # half as wide, as high
    normal = stream.normalise(out[None])[0] * 4.0
    assert out.shape == (2, 3, 8, 8) and out.dtype == torch.uint8
    assert (normal[0] - 2.0).abs().max() < 0.05 and (normal[1] + 1.0).abs().max() < 0.05
    out = crop_flow(levels, 8.0, (8, 4, 4, 8), 8, stream)  # twice as wide: 8 pixels, of 4
    assert (out[0] == 255).all() and (stream.normalise(out[None])[0, 0] - 1).abs().max() < 1e-6


def test_a_mirror_turns_motion_round():
    clip = {"flow": torch.full((2, 1, 2, 2), 128, dtype=torch.uint8)}
    clip["flow"][0, 0, 0, 0], clip["flow"][1, 0, 0, 0] = 255, 1
    spec = InputSpec(2, 1, 8, {"flow": flow_stream(8)})
    out = mirror(clip, spec)["flow"]
    assert out[0, 0].tolist() == [[128, 1], [128, 128]]
    assert out[1, 0].tolist() == [[128, 1], [128, 128]]
    assert torch.equal(mirror({"flow": out}, spec)["flow"], clip["flow"])


def test_colours_leave_flow_alone_and_are_refused_without_rgb(packed):
    how = {"colour": 0.5, "jitter": 1.0, "rand_augment": "n2-m9"}
    plain, coloured = loader_of(packed)[0], loader_of(packed, **{**how, "rand_augment": ""})[0]
    assert torch.equal(plain["flow"], coloured["flow"])
    assert not torch.equal(plain["rgb"], coloured["rgb"])
    for name, value in how.items():
        with pytest.raises(ValueError, match=name):
            loader_of(packed, ALONE, **{name: value})


def test_randaugment_beside_flow_turns_nothing(packed, monkeypatch):
    from pretrain.data import transforms

    done = []
    monkeypatch.setattr(transforms, "apply_operation", lambda name, x, *_: done.append(name) or x)
    for spec in (BOTH, InputSpec(4, 2, 32)):
        done.clear()
        clips = loader_of(packed, spec, rand_augment="n9-m9")
        for place in range(8):
            clips[place]
        turning = {"rotate", "shear_x", "shear_y", "shift_x", "shift_y"}
        assert bool(turning & {*done}) == (len(spec.streams) == 1) and len({*done}) > 8


def test_an_erased_box_has_no_motion(packed):
    clips = loader_of(packed, erase=1.0)
    plain = loader_of(packed)
    for place in range(4):
        out, was = clips[place], plain[place]
        changed = (out["rgb"] != was["rgb"]).any(1).any(1)
        for view in range(2):
            box = changed[view]
            assert (out["flow"][view][:, :, box] == 128).float().mean() > 0.98
            assert torch.equal(out["flow"][view][:, :, ~box], was["flow"][view][:, :, ~box])


def test_batches_with_flow_do_not_depend_on_workers(packed, monkeypatch):
    def batches(workers: int) -> list[dict]:
        clips = loader_of(packed, flip=True)
        with train_batches(clips, Positions(0, 3, 3, 1, 1, 0), workers) as all_of_them:
            return list(all_of_them)

    first, second = batches(0), batches(2)
    monkeypatch.setattr("pretrain.data.shards.KEEP_DECODED", 0)
    for one, *others in zip(first, second, batches(0), strict=True):
        assert one["flow"].shape == (6, 2, 4, 32, 32) and one["flow"].dtype == torch.uint8
        for other in others:
            assert all(torch.equal(one[name], other[name]) for name in ("rgb", "flow", "clips"))


def test_evaluation_gives_every_stream(packed):
    for spec in (BOTH, ALONE):
        for _, views in eval_loader(EvalClips(packed, np.arange(3), spec, 2, 1), 2, 0):
            assert set(views) == set(spec.streams)
            assert views["flow"].shape[1:] == (2, 2, 4, 32, 32)


# ---- what is written is not trusted


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"offset": 2**40}, "offset"),
        ({"bytes": 0}, "bytes"),
        ({"of": "0" * 64}, "clip hash"),
        ({"bound": 0}, "bound"),
        ({"bound": "wide"}, "bound"),
        ({"method": None}, "method"),
        ({"parameters": []}, "parameters"),
    ],
)
def test_a_line_whose_flow_cannot_be_is_refused(packed, tmp_path, change, what):
    import hashlib

    out = tmp_path / "out"
    shutil.copytree(packed.folder, out)
    lines = (out / "clips.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["streams"]["flow"] |= change
    (out / "clips.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    index = load_index(out)
    index["clips_sha256"] = hashlib.sha256((out / "clips.jsonl").read_bytes()).hexdigest()
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"no usable {what} of"):
        Pack(out)


def test_flow_that_changed_on_the_disk_is_named_and_made_anew(dataset, packed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(packed.folder, out)
    record = Pack(out).record(1)
    entry = record["streams"]["flow"]
    shard = next(out.glob("shard-*.tar"))
    with open(shard, "r+b") as file:
        file.seek(entry["offset"] + 40)
        file.write(bytes(entry["bytes"] - 60))
    from pretrain.data.decode import DecodeError

    with pytest.raises(DecodeError, match="has changed on the disk"):
        Pack(out).flow(record, np.arange(4))
    shard.unlink()
    quick(dataset, out)
    assert torch.equal(
        Pack(out).flow(Pack(out).record(1), np.arange(17)), packed.flow(record, np.arange(17))
    )


def test_a_clip_that_changed_before_its_flow_is_estimated_is_tried_again(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"something else")
    clip = {"path": str(tmp_path / "a.mp4"), "offset": 0, "bytes": 14, "sha256": "0" * 64}
    clip |= {"frames": 3, "width": 32, "height": 32}
    pytest.importorskip("cv2")
    with pytest.raises(Refused, match="has changed") as refused:
        acquire("flow", clip, str(tmp_path / "out.mp4"), method="dis")
    assert refused.value.retry


def test_the_worker_starts_without_torch():
    code = "import sys, pretrain.data.acquire; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result


# ---- told and shown


def test_the_table_of_errors_is_of_the_methods(capsys):
    """Estimating is better than saying that nothing moves; what cannot be used is named."""
    pytest.importorskip("cv2")
    config = flow_error.Config(methods=("dis", "raft_small"), num_clips=2, frames=8)
    table = flow_error.main(config)
    assert set(table) == {"no motion", "dis"}
    assert table["dis"]["moving"] < 0.7 * table["no motion"]["moving"]
    assert table["dis"]["stored"] < 0.05 < table["dis"]["moving"]
    assert "128 pixels" in capsys.readouterr().out
    for wrong in ({"methods": ("lucas",)}, {"frames": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            flow_error.main(dataclasses.replace(config, **wrong))


def test_raft_pads_its_frames_and_finds_what_moves(monkeypatch):
    """Of frames whose sides are no multiples of 8 comes flow of their size, right side up."""

    def network(first: torch.Tensor, second: torch.Tensor, num_flow_updates: int) -> list:
        assert first.shape == (1, 3, 136, 144) and first.abs().max() <= 1 and num_flow_updates == 12
        return [torch.stack([first[:, 0], second[:, 1]], 1)]

    network.to = lambda device: network
    network.eval = lambda: network
    monkeypatch.setattr("pretrain.third_party.flow_network", lambda name: network)
    frames = np.random.default_rng(0).integers(0, 256, (2, 130, 140, 3), np.uint8)
    found = flow.estimator("raft_small")(*frames)
    assert found.shape == (2, 130, 140)
    assert np.allclose(found[0], frames[0, ..., 0] / 127.5 - 1, atol=1e-6)
    assert np.allclose(found[1], frames[1, ..., 1] / 127.5 - 1, atol=1e-6)


def test_flow_is_drawn_in_the_colour_of_its_direction(tmp_path, capsys):
    motion = np.zeros((1, 2, 2, 2), np.float32)
    motion[0, :, 0, 0], motion[0, :, 0, 1], motion[0, :, 1, 0] = (4, 0), (-4, 0), (1, 0)
    drawn = draw_flow(motion, 4.0)[0]
    assert drawn[0, 0].tolist() == [255, 0, 0] and drawn[0, 1].tolist() == [0, 255, 255]
    assert drawn[1, 1].tolist() == [255, 255, 255] and 0 < drawn[1, 0, 1] < 255
    assert draw_flow(motion * 0, full_colour(motion * 0)).min() == 255
    pytest.importorskip("cv2")
    write_video(tmp_path / "a.mp4", 6, size=(64, 48))
    write_video(tmp_path / "tiny.mp4", 6, size=(10, 8))
    out = tmp_path / "out"
    visualize.main(visualize.Config(video=str(tmp_path / "a.mp4"), flow="dis", out=str(out)))
    assert (out / "flow.png").is_file() and (out / "flow.gif").is_file()
    assert "flow.png" in capsys.readouterr().out
    with pytest.raises(ValueError, match="12 pixels"):
        visualize.main(visualize.Config(video=str(tmp_path / "tiny.mp4"), flow="dis", out=str(out)))


def test_a_missing_library_is_named_before_anything_is_packed(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="needs OpenCV"):
        pack(tmp_path, tmp_path / "pack", flow="dis", workers=1, progress=False)
    assert not (tmp_path / "pack").exists()
