"""Pack videos, images or poses into checked clips, the only thing the other recipes read.

    python recipes/pack.py --data videos/ --out packs/mine
    python recipes/pack.py --data clips.csv --out packs/mine --short-side 128
    python recipes/pack.py --data videos/ --out packs/mine --flow dis --pose blazepose
    python recipes/pack.py --data videos/ --out packs/mine --follow motion
    python recipes/pack.py --data videos/ --out parts/3 --part 3/16
    python recipes/pack.py --data parts/ --out packs/mine --merge

DATA is a folder (its subfolders are classes, with train/val/test folders above them if there
are), a list (csv, tsv, space-separated, jsonl or a JSON array, with columns such as path, label,
caption, split, subject), a WebDataset tar or a folder of these, or images. Every file is decoded
once, fully, in a process that may crash or hang without harm; what cannot be used is named in
OUT/refused.jsonl with the reason.

Optical flow and poses that come with the data are kept beside the frames (columns flow and pose of
a list, members 7.flow.npz and 7.pose.json of a tar); --flow and --pose estimate them for each clip,
also of a pack that is there. A list with a column pose and no path is of recordings of poses alone.

--follow cuts everybody who acts out of wide footage, a clip a person; what is found is sharper than
in the whole picture scaled down. pretrain/data/README.md says how.

Near-duplicates are looked for at the end and listed in near_duplicates.csv of the pack; no split
that the toolkit makes divides them.

Running the same command again does only what has changed, and goes on after an interruption.

Several machines share the work with --part I/N, each part into a folder of its own; --merge then
makes of the folder that holds them the pack that one machine would have made.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pretrain.data.merge import merge
from pretrain.data.methods import pose_weights
from pretrain.data.pack import pack, parse_part
from pretrain.data.remote import bring_tars, is_address
from pretrain.flags import Count, OptionalPositive, Positive
from pretrain.log import cli
from pretrain.names import for_screen, for_shell


@dataclass(frozen=True)
class Config:
    """Configuration of packing."""

    data: str
    """A folder, a list file, a tar, a video; or tars far away, in quotes:
    's3://BUCKET/{000..010}.tar'."""
    out: str
    """The folder of the pack: new, or an earlier pack of the same data."""
    short_side: Count = 256
    """Larger videos are scaled down to this many pixels; smaller ones are left as they are."""
    clip_seconds: Positive = 10.0
    """Longer videos are cut into equal parts of about this length at most; of a slow series, 25
    pictures count as a second."""
    workers: Count | None = None
    """Decoding processes; by default one a core."""
    timeout: Positive = 60.0
    """Seconds without progress before a decoder is killed and its file refused."""
    file_timeout: Positive = 1800.0
    """Seconds that a file may take in all, and as many again for every 64 MiB of it."""
    flow: Literal["", "dis", "tvl1", "raft_small", "raft_large"] = ""
    """Estimate optical flow by this method (needs the extra `flow`; RAFT a GPU for speed); by
    default as before."""
    pose: Literal["", "blazepose", "blazepose_raw"] = ""
    """Estimate the joints of people (needs the extra `pose`), smoothed over time or not; by default
    as before."""
    follow: Literal["", "motion", "boxes", "pose"] = ""
    """Cut everybody who acts out of wide footage: by what moves, by boxes of the list, by poses."""
    pose_weights: str = ""
    """Weights for that: a folder of two networks, or the wheel of mediapipe; by default fetched."""
    cache_gib: OptionalPositive = None
    """Most of tars far away that is kept here, GiB; by default 16."""
    part: str = ""
    """Pack one part of several, such as 3/16: what falls to it by the hashes of the names."""
    merge: bool = False
    """Make one pack of all parts in the folder --data."""
    near_duplicates: bool = True
    """Look for near-duplicates (copies that were cut, cropped or encoded anew) at the end, so that
    no split divides them."""


def unused(config: Config) -> dict[str, str]:
    """Flags without effect, and why."""
    if not config.merge:
        why = "with --part: --merge looks for them among all parts"
        return {"near_duplicates": why} if config.part else {}
    others = {field.name for field in fields(Config)}
    others -= {"data", "out", "merge", "near_duplicates"}
    return dict.fromkeys(others, "with --merge: parts are packed already")


def main(config: Config) -> dict:
    """Pack, and say what to do next."""
    if config.pose_weights:
        pose_weights(config.pose_weights)  # from now on they are in the cache
    part = parse_part(config.part) if config.part else None
    far = is_address(config.data)
    if config.cache_gib is not None and not far:
        raise ValueError(f"--cache-gib: {config.data} is not far away, leave it out")
    if config.merge:
        index = merge(config.data, config.out, near=config.near_duplicates)
    else:
        if far and part:  # which videos a part has is known when all names are
            print(f"every part brings all tars of {for_screen(config.data)}", flush=True)
        index = pack(
            bring_tars(config.data, config.cache_gib) if far else config.data,
            config.out,
            short_side=config.short_side,
            clip_seconds=config.clip_seconds,
            workers=config.workers,
            timeout=config.timeout,
            file_timeout=config.file_timeout,
            flow=config.flow,
            pose=config.pose,
            follow=config.follow,
            part=part,
            near=config.near_duplicates,
        )
    print(f"packed: {for_screen(config.out)}")
    if part:
        parts = for_shell(str(Path(config.out).parent))
        print(f"next, with all parts: muybridge pack --data {parts} --out PACK --merge")
        return index
    pose = index.get("streams", {}).get("pose", {})
    command = "videomae"
    if pose.get("alone") == index["num_clips"]:
        command = f"finetune --model stgcn --skeleton {next(iter(pose['skeletons']))}"
    print(f"next: muybridge {command} --data {for_shell(config.out)}")
    return index


if __name__ == "__main__":
    cli(main, Config, unused)
