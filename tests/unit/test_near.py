"""Near-duplicates are found however they were cropped, trimmed or shaded; others are none."""

import json
from pathlib import Path

import numpy as np
import pytest

from downstream.splits import choose_splits
from pretrain.data.near import add_near
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.synthetic import clip_specs, encode_video, render

PLANTED = {"trimmed": 0, "cropped": 1, "darker": 2, "mirrored": 3}


def copies(frames: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "trimmed": frames[0][6:],
        "cropped": frames[1][:, 4:-4, 4:-2],
        "darker": (255 * (frames[2] / 255.0) ** 1.2).astype(np.uint8),
        "mirrored": frames[3][:, :, ::-1],
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A pack of ten clips of different people and acts, copies of some, stills and blank ones."""
    folder = tmp_path_factory.mktemp("near")
    (folder / "raw").mkdir()
    specs = clip_specs(0, 300)[::30]
    frames = {i: render(spec).frames for i, spec in enumerate(specs)}
    videos = {f"v{i}": own for i, own in frames.items()} | copies(frames)
    videos |= {"still0": frames[0][:1].repeat(32, 0), "still1": frames[0][3:4].repeat(32, 0)}
    videos |= {"black0": frames[0][:32] * 0, "black1": frames[0][:32] * 0}
    rows = ["path,label,split"]
    for number, (name, video) in enumerate(videos.items()):
        (folder / "raw" / f"{name}.mp4").write_bytes(encode_video(np.ascontiguousarray(video), 16))
        rows.append(f"{name}.mp4,{'ab'[number % 2]},{'train' if name[0] == 'v' else 'test'}")
    (folder / "raw" / "clips.csv").write_text("\n".join(rows))
    pack(folder / "raw" / "clips.csv", folder / "pack", workers=1, progress=False)
    return folder / "pack"


def test_copies_are_found_and_nothing_else_and_given_splits_say_so(packed):
    before = Pack(packed)
    assert before.near_duplicates() is None
    assert "near-duplicates" in add_near(str(packed))
    data = Pack(packed)
    pairs = data.near_duplicates()
    named = {
        frozenset(data.record(i)["source"].removesuffix(".mp4") for i in pair) for pair in pairs
    }
    assert named == {frozenset((f"v{i}", name)) for name, i in PLANTED.items()}
    lines = [json.loads(x) for x in (packed / "near_duplicates.jsonl").read_text().splitlines()]
    assert [line["mirrored"] for line in lines if any("mirr" in s for s in line["sources"])] == [
        True
    ]
    trimmed = next(line for line in lines if any("trimmed" in s for s in line["sources"]))
    assert sorted(trimmed["starts"]) == pytest.approx([0, 6 / 16], abs=0.13)
    notes = choose_splits(data, "train", "test", 0)[2]
    assert any("4 videos near-duplicates" in note for note in notes)
    raw = packed.parent / "raw" / "clips.csv"
    pack(raw, packed, workers=1, progress=False)  # nothing has changed: they still hold
    assert len(Pack(packed).near_duplicates()) == 4


@pytest.mark.parametrize(
    "line",
    ['{"clips": [3, 99]}', '{"clips": [4, 2]}', '{"clips": [0]}', "[]", "{", '{"clips": "ab"}'],
)
def test_a_list_that_cannot_be_true_is_refused(packed, tmp_path, line):
    import hashlib
    import shutil

    copy = tmp_path / "pack"
    shutil.copytree(packed, copy)
    content = f"{line}\n".encode()
    (copy / "near_duplicates.jsonl").write_bytes(content)
    index = json.loads((copy / "index.json").read_text())
    about = {"name": "near_duplicates.jsonl", "bytes": len(content)}
    index["near_duplicates"] = about | {"sha256": hashlib.sha256(content).hexdigest()}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy).near_duplicates()
    index["near_duplicates"] |= {"sha256": "0" * 64}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy).near_duplicates()
    index["near_duplicates"] |= {"name": "../else.jsonl"}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="pack again"):
        Pack(copy)
