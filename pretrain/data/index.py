"""The pack as it lies on the disk: its index, the lines about its clips, the layout of a shard.

A pack is a folder:

    index.json             what there is: counts, settings, classes, splits, shards with their hashes
    clips.jsonl            one object a clip; its line number is the sample's id
    refused.jsonl          one object a refused file: {"source", "reason"}
    shard-00000-<hash>.tar <key>.mp4 and <key>.json of each clip, a WebDataset shard
    .pack/                 what makes packing again cheap: a journal, and clips not yet in a shard

A line of clips.jsonl has: key, shard (number), offset and bytes (of the .mp4 inside the shard),
sha256 (of the .mp4), frames, fps, width, height, source (as the user named it), clip (its ordinal
in the source), start (seconds), label, captions, split, subject, extra.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

from pretrain.data.sources import Source

FORMAT = "muybridge-pack-1"
# What a packed clip is. Changing any of these makes other clips out of the same files; so does
# changing how they are cut, timed or turned, for which "rules" is to be counted up.
GOP, CRF, PRESET, MAX_FPS = 16, 18, "veryfast", 60
RULES = {"codec": "h264", "crf": CRF, "preset": PRESET, "gop": GOP, "max_fps": MAX_FPS, "rules": 1}
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
    """Reads and checks the index of a pack.

    Args:
        folder: The pack.

    Returns:
        The content of its index.json.

    Raises:
        ValueError: There is no finished pack, or the index is not one we can read.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        state = "is a pack that is not finished: run the same pack command again"
        if not (Path(folder) / ".pack").is_dir():
            state = "is no pack: make one with python recipes/pack.py --source VIDEOS --out FOLDER"
        raise ValueError(f"{folder} {state} (there is no {path.name})")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and pack again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ValueError(f"{path} has the format {found!r}, this version reads {FORMAT!r}")
    for name, kind in FIELDS.items():
        if not isinstance(index.get(name), kind):
            raise ValueError(f"{path} has no usable {name!r}: delete it and pack again")
    for shard in index["shards"]:
        # A shard's name is joined to the folder, so it must be one of ours and not a way out.
        if not isinstance(shard, dict) or not SHARD_NAME.fullmatch(str(shard.get("name"))):
            raise ValueError(f"{path} names a shard {shard!r}: delete it and pack again")
    return index


# ---- writing without a moment at which something is missing


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name == "nt":
        return  # a folder cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finish_commit(out: Path) -> None:
    """Moves a complete set of new files into place, now or after an interruption.

    Three files cannot be replaced at once, so the old index goes first and the new one comes last:
    in between there is no index, and whoever packs next finishes the job.
    """
    new = out / ".pack" / "new"
    if (new / "index.json").is_file():
        (out / "index.json").unlink(missing_ok=True)
        for name in ("clips.jsonl", "refused.jsonl", "index.json"):
            if (new / name).is_file():
                os.replace(new / name, out / name)
        sync_folder(out)
    shutil.rmtree(new, ignore_errors=True)


def json_line(value: dict) -> str:
    """One line of a .jsonl file, in ASCII."""
    return json.dumps(value) + "\n"


def text_digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---- the lines of clips.jsonl, and the layout of a shard


def clip_row(source: Source, number: int, clip: dict) -> dict:
    """The line of clips.jsonl about the clip of this ordinal of a source."""
    return {
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


def place_rows(shard: int, rows: list[dict]) -> int:
    """Fills in where each clip will lie; returns the size of the shard."""
    at = 0
    for row in rows:
        row["shard"], row["offset"] = shard, at + 512
        at += 512 + row["bytes"] + len(around_clip(row)[1])
    return at + 1024


def member_header(name: str, size: int) -> bytes:
    """The header of one file in a tar."""
    info = tarfile.TarInfo(name)  # its defaults are date 0 and no owner
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def around_clip(row: dict) -> tuple[bytes, bytes]:
    """The header before the bytes of a clip, and all that follows them: padding and the .json."""
    about = {name: v for name, v in row.items() if name not in ("shard", "offset", "bytes")}
    text = json.dumps(about).encode()
    rest = bytes(-row["bytes"] % 512) + member_header(f"{row['key']}.json", len(text))
    return member_header(f"{row['key']}.mp4", row["bytes"]), rest + text + bytes(-len(text) % 512)
