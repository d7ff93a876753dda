"""The pack as it lies on the disk: its index, the lines about its clips, the layout of a shard.

A pack is a folder:

    index.json             counts, settings, classes, splits, shards with their hashes
    clips.jsonl            one object a clip; its line number is the sample's id
    clips.safetensors      columns of these lines, see `pretrain/data/columns.py`
    signatures.bin         by which near-duplicates are found, see `pretrain/data/signatures.py`
    near_duplicates.csv    a line a pair, see `pretrain/data/near_list.py`
    not_duplicates.csv     lines of it that a person struck out
    refused.jsonl          one object a refused file: {"source", "reason"}; of a refused stream of
                           a file that was packed, "stream" too
    shard-00000-<hash>.tar <key>.mp4 and <key>.json of each clip, a WebDataset shard; where there
                           are such streams, <key>.flow (an MP4) and <key>.pose.npy between the two
    .pack/                 what makes packing again cheap: journals, and clips not yet in a shard

A line of clips.jsonl has: key, shard (number), offset and bytes (of the .mp4 inside the shard),
sha256 (of the .mp4), frames, fps, width, height, source (as the user named it), clip (its ordinal
in the source), start (seconds), label, captions, split, subject, extra; and, of a clip that has
more streams than its frames, streams: {"flow": ..., "pose": ...}. Each of these has offset, bytes
and sha256 of its member, of (the sha256 of the .mp4 it belongs to), method ("given": it came with
the data, and nothing says of what method it is) and parameters (of the method), and

    flow    bound: the pixels of a frame that 127 levels stand for, see `pretrain/data/flow.py`
    pose    skeleton, columns, people, joints: see `pretrain/data/poses.py`

A clip that was cut out of a wider picture (--follow) has follow: method, frame (number of its first
one in the video), of (frames of the video), picture (its width and height, square pixels), and

    subject, size, way    whose clip it is; width and height of its box; where the box is, places
                          [frame of the clip, left, top] with straight lines between, pixels
    whole                 or else why the whole picture was kept

A recording of poses without a video is a clip without an .mp4: its line has "main": "pose", and
offset, bytes and sha256 are those of <key>.pose.npy.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from pretrain.data.guard import MAX_PIXELS, too_many_pixels
from pretrain.data.sources import Source
from pretrain.files import open_regular, parse_json, read_limited, reading, sync
from pretrain.names import counted

FORMAT = "muybridge-pack-1"
COLUMNS = "clips.safetensors"
NEAR, SIGNATURES = "near_duplicates.csv", "signatures.bin"
# What a packed clip is. Changing any of these makes other clips out of the same files; so does
# changing how they are cut, timed or turned, for which "rules" is to be counted up, or, where
# videos alone are concerned that were not copied as they are, TIMING: then packing again makes anew
# just these.
GOP, CRF, PRESET, MAX_FPS = 16, 18, "veryfast", 60
RULES = {"codec": "h264", "crf": CRF, "preset": PRESET, "gop": GOP, "max_fps": MAX_FPS, "rules": 1}
TIMING = 2
# Closed groups, one thread, and no macroblock tree (see `encode.py`). Three of four frames are
# needed by no other one, and are skipped by a reader that does not want them: at stride 4 that is
# most of the work of decoding.
X264 = (
    f"keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0:threads=1:mbtree=0:"
    "bframes=3:b-adapt=0:b-pyramid=none"
)
MAX_INDEX = 2**28  # bytes of index.json: 1.5 million shards
MAX_LINES = 2**33  # bytes of a journal: some 15 million clips
MAX_LINE = 2**27  # bytes of a line of clips.jsonl
MAX_FRAMES = 2**31  # of a clip
KEY = re.compile(r"[\w-]{1,100}")  # a clip's key is part of a file's name
# Of the members of a clip's further streams. Flow is an MP4, but none to be taken for a clip.
ENDINGS = {"flow": "flow", "pose": "pose.npy"}
MOST_PEOPLE, MOST_JOINTS = 64, 1024  # in a clip, and of a person
FIELDS = {
    "num_sources": int,
    "num_clips": int,
    "num_refused": int,
    "settings": dict,
    "classes": list,
    "splits": dict,
    "shards": list,
    "clips_sha256": str,
    "fingerprint": str,
}
SHARD_NAME = re.compile(r"shard-\d{5}-[0-9a-f]{8}\.tar")


def load_index(folder: str | Path) -> dict:
    """Read and check the index of a pack.

    Args:
        folder: the pack.

    Returns:
        The content of its index.json.

    Raises:
        ValueError: there is no finished pack, or the index is not one we can read.
    """
    path = Path(folder) / "index.json"
    if not os.path.lexists(path):
        state = "is a pack that is not finished: run the same pack command again"
        if not (Path(folder) / ".pack").is_dir():
            state = "is no pack: make one with muybridge pack --data VIDEOS --out FOLDER"
        raise ValueError(f"{folder} {state} (there is no {path.name})")
    with reading(path):
        data = read_limited(path, MAX_INDEX)
    try:
        index = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and pack again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        found = f"the format {found[:100]!r}" if isinstance(found, str) else "no format"
        raise ValueError(f"{path} has {found}, this version reads {FORMAT!r}")
    for name, kind in FIELDS.items():
        if type(index.get(name)) is not kind or (kind is int and not 0 <= index[name] < 2**53):
            raise ValueError(f"{path} has no usable {name!r}: delete it and pack again")
    for name, kind in (("classes", str), ("splits", int)):
        values = index[name].values() if isinstance(index[name], dict) else index[name]
        if not all(type(value) is kind for value in values):
            raise ValueError(f"{path} has no usable {name!r}: delete it and pack again")
    if not re.fullmatch("[0-9a-f]{64}", index["clips_sha256"]):  # files of the cache bear it
        raise ValueError(f"{path} has no usable 'clips_sha256': delete it and pack again")
    if len(set(index["classes"])) != len(index["classes"]):
        raise ValueError(f"{path} has a class twice: delete it and pack again")
    # A shard's name is joined to the folder, so it must be one of ours and not a way out.
    sizes: tuple[str, ...] = ("bytes", "num_clips")
    files = [(shard, SHARD_NAME, sizes) for shard in index["shards"]]
    if "columns" in index:  # not of packs that were made before there were any
        files.append((index["columns"], re.compile(re.escape(COLUMNS)), ("bytes",)))
    if str(index.get("near_duplicates")).find("near_duplicates.jsonl") >= 0:
        del index["near_duplicates"]  # of another form, which was never released
    for name, file in (("near_duplicates", NEAR), ("signatures", SIGNATURES)):
        if name in index:  # nor of packs that were made before there were any
            files.append((index[name], re.compile(re.escape(file)), ("bytes",)))
    for file, names, numbers in files:
        if not (
            isinstance(file, dict)
            and names.fullmatch(str(file.get("name")))
            and re.fullmatch("[0-9a-f]{64}", str(file.get("sha256")))
            and all(_whole(file.get(name), 0, 2**53) for name in numbers)
        ):
            raise ValueError(
                f"{path} names a shard or file {str(file)[:200]}: delete it and pack again"
            )
    match index.get("part"):
        case None if "part" not in index:
            pass
        case [int(number), int(count)] if 1 <= number <= count < 2**31:
            pass
        case part:
            raise ValueError(
                f"{path} has no usable 'part' ({part!r:.80}): delete it and pack again"
            )
    streams = index.get("streams", {})
    if not (isinstance(streams, dict) and all(type(v) is dict for v in streams.values())):
        raise ValueError(f"{path} has no usable 'streams': delete it and pack again")
    if unknown := sorted(streams.keys() - ENDINGS):
        raise ValueError(f"{path} has a stream {unknown[0]!r:.80} that this version cannot read")
    return index


def part_words(part: Sequence[int] | None) -> str:
    """What is said of a part of a pack, (I, N)."""
    return "part {}/{}".format(*part) if part else "a whole pack"


def packed_words(index: dict) -> str:
    """What is in a pack, in words."""
    return (
        f"{counted(index['num_sources'], 'source')}, {counted(index['num_clips'], 'clip')}, "
        f"{index['num_refused']} refused, {counted(len(index['shards']), 'shard')}"
    )


def refuse_part(index: dict, name: str) -> None:
    """Refuse to take a part, of which this is the index, for a whole pack of data.

    Raises:
        ValueError: it is one.
    """
    if "part" in index:
        raise ValueError(
            f"{name} is {part_words(index['part'])} of a pack: make one of all parts with "
            "muybridge pack --data FOLDER_OF_PARTS --out PACK --merge"
        )


def _whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # True is an int, too


def checked_lines(folder: Path, index: dict) -> Iterator[tuple[bytes, dict]]:
    """Yield the lines of clips.jsonl, each without its end, and what they say, each checked.

    Args:
        folder: the pack.
        index: its index, as `load_index` gives it.

    Raises:
        ValueError: it is not the file that the index describes, or a line of it cannot be true.
    """
    path = folder / "clips.jsonl"
    unlike = f"{path} does not have the {index['num_clips']} lines its index says: pack again"
    check = LineCheck(path, index)
    with reading(path), open_regular(path) as file:
        check_digest(file, path, index)
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if not line.endswith(b"\n") or number > index["num_clips"]:
                raise ValueError(unlike)
            yield line[:-1], check(line[:-1], number)
    if number != index["num_clips"]:
        raise ValueError(unlike)


def check_digest(file: io.BufferedReader, path: Path, index: dict) -> None:
    """Refuse a clips.jsonl, open at its start, that is not the file its index describes.

    Raises:
        ValueError: it is not.
    """
    if hashlib.file_digest(file, "sha256").hexdigest() != index["clips_sha256"]:
        raise ValueError(f"{path} is not the file its index describes: pack again")
    file.seek(0)


class LineCheck:
    """Reads single lines of a clips.jsonl, and refuses those that cannot be true.

    Args:
        path: the file.
        index: of its pack.
    """

    def __init__(self, path: Path, index: dict):
        self.path, self.classes = path, set(index["classes"])
        self.sizes = [shard["bytes"] for shard in index["shards"]]

    def __call__(self, line: bytes, number: int) -> dict:
        """What a line says, without its end; `number` is its place in the file, from 1.

        Raises:
            ValueError: it cannot be true.
        """
        try:
            row = parse_json(line)
            what = _wrong(row, self.sizes, self.classes)
        except ValueError as error:
            what = str(error)
        if what:
            raise ValueError(f"{self.path}:{number}: no usable {what}: pack again")
        assert isinstance(row, dict)  # `_wrong` has seen to it
        return row


def _wrong(row: object, sizes: list[int], classes: set[str]) -> str | None:
    """The implausible field of a clip's line; None if there is none. `sizes`: of shards, bytes."""
    if type(row) is not dict:
        return "object"
    if what := _wrong_clip(row):
        return what
    for name, ok in (
        ("shard", _whole(row.get("shard"), 0, len(sizes) - 1)),
        ("offset", _whole(row.get("offset"), 0, 2**53)),
        ("clip", _whole(row.get("clip"), 0, 2**53)),
        ("source", type(row.get("source")) is str),
        ("captions", _texts(row.get("captions"), list)),
        ("extra", _texts(row.get("extra"), dict)),
    ):
        if not ok:
            return name
    for name in ("label", "split", "subject"):
        if name not in row or type(row[name]) not in (str, type(None)):
            return name
    if row["label"] is not None and row["label"] not in classes:
        return "label"
    if row["offset"] + row["bytes"] > sizes[row["shard"]]:
        return "offset"
    if type(streams := row.get("streams", {})) is not dict:
        return "streams"
    if "main" in row:
        entry = streams.get("pose")
        if row["main"] != "pose" or type(entry) is not dict:
            return "main"
        if any(entry.get(name) != row[name] for name in ("offset", "bytes", "sha256")):
            return "offset of pose"
    for name, entry in streams.items():
        if what := wrong_stream(name, entry, row):
            return f"{what} of {name!r:.80}"
        if entry.get("offset", 2**53) + entry["bytes"] > sizes[row["shard"]]:
            return f"offset of {name}"
    return None


def wrong_stream(name: str, entry: object, row: dict) -> str | None:
    """The implausible field of a further stream of a clip, whose line is good otherwise."""
    if name not in ENDINGS or type(entry) is not dict:
        return "stream"
    size: Any = entry.get("bytes")
    frames = row["frames"]
    for field, ok in (
        ("offset", _whole(entry.get("offset", 0), 0, 2**53)),
        ("bytes", _whole(size, 1, 2**53)),
        ("sha256", type(entry.get("sha256")) is str),
        ("clip hash", entry.get("of") == row["sha256"]),
        ("method", type(entry.get("method")) is str),
        ("parameters", type(entry.get("parameters")) is dict),
    ):
        if not ok:
            return field
    if name == "flow":
        bound: Any = entry.get("bound")
        if type(bound) not in (int, float) or not 0 < bound < 2**20:
            return "bound"
        pixels = 2 * (frames - 1) * row["width"] * row["height"]
        return "frames" if frames < 2 or too_many_pixels(pixels, size) else None
    from pretrain.data.poses import COLUMNS  # numpy, which only poses need

    columns: Any = entry.get("columns")
    people: Any = entry.get("people")
    joints: Any = entry.get("joints")
    for field, ok in (
        ("skeleton", type(entry.get("skeleton")) is str),
        ("people", _whole(people, 0, MOST_PEOPLE)),
        ("joints", _whole(joints, 1, MOST_JOINTS)),
        ("columns", type(columns) is list and all(c in COLUMNS for c in columns)),
    ):
        if not ok:
            return field
    if len(set(columns)) != len(columns) or columns[-1:] != ["confidence"]:
        return "columns"
    return "bytes" if size < 4 * frames * people * joints * len(columns) else None


def _wrong_clip(clip: dict) -> str | None:
    """The implausible field among those of the clip itself, not of its place or source."""
    size, frames, width, height = (clip.get(n, -1) for n in ("bytes", "frames", "width", "height"))
    for name, ok in (
        ("key", type(clip.get("key")) is str and KEY.fullmatch(clip["key"])),
        ("bytes", _whole(size, 1, 2**53)),
        # Each takes a byte at least.
        ("frames", _whole(size, 1, 2**53) and _whole(frames, 1, min(size, MAX_FRAMES))),
        ("width", _whole(width, 1, MAX_PIXELS)),
        ("height", _whole(width, 1, MAX_PIXELS) and _whole(height, 1, MAX_PIXELS // width)),
        ("fps", type(clip.get("fps")) in (int, float) and 0 < clip["fps"] <= MAX_FPS),
        ("start", type(clip.get("start")) in (int, float) and 0 <= clip["start"] < 2**53),
        ("sha256", type(clip.get("sha256")) is str),
    ):
        if not ok:
            return name
    if "follow" in clip and not _is_follow(clip["follow"], frames):
        return "follow"
    return "frames" if too_many_pixels(frames * width * height, size) else None


def _is_follow(about: object, frames: int) -> bool:
    """Whether this can be what is noted of where a clip of so many frames was cut out."""
    match about:
        case {"method": str(), "frame": int(frame), "of": int(of), "picture": [int(w), int(h)]}:
            if not (0 <= frame <= of - frames < 2**53 and min(w, h) > 0 and w * h <= MAX_PIXELS):
                return False
        case _:
            return False
    match about:
        case {"whole": str(), **rest} if "size" not in rest:
            return True
        case {"subject": str(), "size": [int(wide), int(high)], "way": [[0, _, _], *_] as way}:
            if not (0 < wide <= w and 0 < high <= h and len(way) <= frames):
                return False
            before = -1
            for place in way:
                match place:
                    case [int(at), int() | float() as left, int() | float() as top]:
                        inside = 0 <= left <= w - wide and 0 <= top <= h - high
                        if not (before < at < frames and inside):
                            return False
                        before = at
                    case _:
                        return False
            return True
    return False


def is_stream_line(record: object) -> TypeGuard[dict]:
    """Whether this is what the packer notes of a stream of a clip in .pack/streams.jsonl."""
    names = ("key", "stream", "made", "of")
    if type(record) is not dict or not all(type(record.get(n)) is str for n in names):
        return False
    if "refused" in record:
        seconds = type(record.get("seconds", 0)) in (int, float)
        return seconds and type(record["refused"]) is str
    return record["stream"] in ENDINGS and type(record.get("entry")) is dict


def is_journal_line(record: object) -> TypeGuard[dict]:
    """Whether this is what the packer notes of a source in .pack/journal.jsonl."""
    if type(record) is not dict or not all(type(record.get(n)) is str for n in ("id", "name")):
        return False
    if "refused" in record:
        seconds = type(record.get("seconds", 0)) in (int, float)
        return seconds and type(record["refused"]) is str
    clips = record.get("clips")
    return type(clips) is list and all(type(c) is dict and not _wrong_noted(c) for c in clips)


def _wrong_noted(clip: dict) -> str | None:
    """The implausible field of a clip in the journal."""
    if (what := _wrong_clip(clip)) or "main" not in clip:
        return what
    if clip["main"] != "pose" or type(clip.get("entry")) is not dict:
        return "main"
    place = {"bytes": clip["bytes"], "sha256": clip["sha256"], "of": clip["sha256"]}
    return wrong_stream("pose", place | clip["entry"], clip)


def _texts(values: object, kind: type) -> bool:
    if type(values) is not kind or not isinstance(values, dict | list):
        return False
    return all(type(v) is str for v in (values.values() if isinstance(values, dict) else values))


# ---- writing without a moment at which something is missing


def finish_commit(out: Path) -> None:
    """Move a complete set of new files into place, now or after an interruption.

    Several files cannot be replaced at once, so the old index goes first and the new one comes
    last: in between there is no index, and whoever packs next finishes the job.
    """
    new = out / ".pack" / "new"
    if (new / "index.json").is_file():
        (out / "index.json").unlink(missing_ok=True)
        for name in ("clips.jsonl", COLUMNS, SIGNATURES, "refused.jsonl", "index.json"):
            if (new / name).is_file():
                os.replace(new / name, out / name)
        sync(out)
    shutil.rmtree(new, ignore_errors=True)


def json_line(value: dict | list) -> str:
    """One line of a .jsonl file, in ASCII."""
    return json.dumps(value) + "\n"


def text_digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---- the lines of clips.jsonl, and the layout of a shard


def clip_row(source: Source, number: int, clip: dict, streams: dict[str, dict]) -> dict:
    """The line of clips.jsonl about the clip of this ordinal of a source, with further streams.

    A clip that follows somebody by boxes has the labels of this person.
    """
    follow = clip.get("follow", {})
    if "subject" in follow and follow["method"] == "boxes":
        source = source.of(follow["subject"])
    row = {
        "key": clip["key"],
        "shard": -1,  # this and `offset` are filled in by `place_rows`
        "offset": -1,
        "bytes": clip["bytes"],
        "sha256": clip["sha256"],
        "frames": clip["frames"],
        "fps": clip["fps"],
        "width": clip["width"],
        "height": clip["height"],
        "source": source.name,
        "clip": number,
        "start": clip["start"],
        "label": source.label,
        "captions": list(source.captions),
        "split": source.split,
        "subject": source.subject,
        "extra": source.extra,
    }
    if "follow" in clip:
        row["follow"] = clip["follow"]
    if "main" in clip:
        row["main"] = clip["main"]
        place = {"bytes": clip["bytes"], "sha256": clip["sha256"], "of": clip["sha256"]}
        streams = {clip["main"]: place | clip["entry"]}
    if streams:
        places = {"offset": -1}
        row["streams"] = {name: places | entry for name, entry in sorted(streams.items())}
    return row


def members(row: dict) -> list[tuple[str, dict]]:
    """A clip's files in a shard before its .json: endings, and what holds offset and bytes."""
    streams = row.get("streams", {})
    frames = [] if "main" in row else [("mp4", row)]
    return [*frames, *((ENDINGS[name], entry) for name, entry in streams.items())]


def place_rows(shard: int, rows: list[dict]) -> int:
    """Fill in where each clip will lie; return the size of the shard."""
    at = 0
    for row in rows:
        row["shard"] = shard
        for _, place in members(row):
            place["offset"] = at + 512
            at += 512 + place["bytes"] + -place["bytes"] % 512
        if "main" in row:
            row["offset"] = row["streams"][row["main"]]["offset"]
        at += len(last_member(row))
    return at + 1024


def member_header(name: str, size: int) -> bytes:
    """The header of one file in a tar."""
    info = tarfile.TarInfo(name)  # its defaults are date 0 and no owner
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def last_member(row: dict) -> bytes:
    """The .json of a clip, as it stands in a shard."""
    about = {name: v for name, v in row.items() if name not in ("shard", "offset", "bytes")}
    if "streams" in about:
        without = {name: entry.copy() for name, entry in about["streams"].items()}
        for entry in without.values():
            del entry["offset"], entry["bytes"]
        about["streams"] = without
    text = json.dumps(about).encode()
    return member_header(f"{row['key']}.json", len(text)) + text + bytes(-len(text) % 512)
