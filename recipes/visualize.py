"""Attention maps of a video transformer, skeletons of people, and optical flow, over a clip.

    python recipes/visualize.py --backbone RUN/backbone --video clip.mp4
    python recipes/visualize.py --pose blazepose --video clip.mp4
    python recipes/visualize.py --flow dis --video clip.mp4

The first draws the attention of the last layer and attention rollout (Abnar & Zuidema 2020) over
the clip: attention.png, a row each, and attention.gif, side by side. It works for the plain video
transformers, also as video tower of a video-text pair or under a classifier.

The second draws the joints of people: those that BlazePose finds, or those of a file that came
with the video (see `pretrain/data/pose_files.py`): pose.png and pose.gif.

The third draws optical flow, its direction as hue and its speed as saturation: flow.png, flow.gif.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from downstream.attention_maps import Attends, attention_on_grid, overlay
from downstream.models import load_backbone
from downstream.skeletons import draw_poses
from pretrain.data.blazepose import LiteRT, check_installed, estimate_poses
from pretrain.data.cache import first_refusal, pack_file, packing_side
from pretrain.data.methods import pose_weights
from pretrain.data.pose_files import read_poses
from pretrain.data.poses import COLUMNS, clip_poses
from pretrain.data.shards import EvalClips
from pretrain.files import is_file, no_file
from pretrain.flags import Count
from pretrain.flow_colours import draw_flow
from pretrain.folders import claim, writing
from pretrain.log import cli, clips_figure
from pretrain.names import for_screen

SIDE = 256  # pixels of the short side to which a video is packed


@dataclass(frozen=True)
class Config:
    """Configuration of the figure."""

    backbone: str = ""
    """RUN/backbone, hf:OWNER/NAME of a VideoMAE or an official VideoMAE .pth."""
    video: str = ""
    """A video file; of a long one its first 10 s."""
    out: str = "runs/visualize"
    """Where the pictures go; older ones of this recipe are replaced."""
    enlarge: Count = 4
    """Factor of the GIF's pixels."""
    pose: str = ""
    """Draw skeletons: "blazepose", or a file or folder with the poses of the video's frames."""
    skeleton: str = ""
    """The skeleton of that file, where the file leaves it open."""
    pose_weights: str = ""
    """BlazePose's weights: mediapipe's wheel or a folder; by default fetched once."""
    flow: Literal["", "dis", "tvl1", "raft_small", "raft_large"] = ""
    """Draw the optical flow that this method estimates (needs the extra `flow`)."""


def main(config: Config) -> dict:
    """Draw; returns where the pictures are."""
    if config.enlarge < 1:
        raise ValueError(f"--enlarge {config.enlarge}: give at least 1")
    path, out = Path(config.video), Path(config.out)
    if not is_file(path):
        raise ValueError(f"--video {config.video}: {no_file(config.video)}")
    given = {"attention": config.backbone, "pose": config.pose, "flow": config.flow}
    names = [name for name, value in given.items() if value]
    if not names:
        raise ValueError(
            "nothing to draw: give --backbone for attention, --pose for skeletons, or --flow for "
            "motion"
        )
    lock = claim(out, tuple(f"{name}{end}" for name in names for end in (".png", ".gif")))
    if config.backbone:
        draw_attention(config, path, out)
    if config.pose:
        draw_skeletons(config, path, out)
    if config.flow:
        draw_motion(config, path, out)
    lock.release(force=True)
    pictures = {end: [str(out / f"{name}.{end}") for name in names] for end in ("png", "gif")}
    return {end: files[0] for end, files in pictures.items()}


def draw_skeletons(config: Config, path: Path, out: Path) -> None:
    """pose.png and pose.gif."""
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", SIDE)
        record, total = pack.record(0), sum(each["frames"] for each in pack.records())
        frames = pack.frames(record, np.arange(record["frames"])).numpy()
    size = (record["width"], record["height"])
    if config.pose == "blazepose":
        check_installed()
        networks = LiteRT(pose_weights(config.pose_weights))
        values, _ = estimate_poses(frames, record["fps"], networks)
        columns: tuple[str, ...] = COLUMNS
        skeleton = "blazepose33"
    else:
        poses = read_poses(config.pose, config.skeleton)
        if "u" not in poses.columns:
            raise ValueError(f"--pose {config.pose}: metres alone, which have no place in a frame")
        columns, skeleton = poses.columns, poses.skeleton
        values = clip_poses(poses, range(len(frames)), total, size, size)
    drawn = draw_poses(frames, values, columns, skeleton, config.enlarge)
    write_gif(out / "pose.gif", drawn, 1000 / record["fps"])
    there = (values[..., -1] > 0).max(-1).sum(1)  # people of each frame
    caption = (
        "orange: the person's left side, blue: the right side, thin: hardly visible; "
        f"somebody is in {np.mean(there > 0):.0%} of the frames, at most {there.max()} at once"
    )
    title = f"Joints of {path.name}, by {config.pose}"
    seconds = record["start"] + np.arange(len(frames)) / record["fps"]
    left, top, right, bottom = (config.enlarge * side for side in around(values, columns, size))
    rows = [("pose", drawn[:, top:bottom, left:right])]
    told = clips_figure(out / "pose.png", rows, seconds, title, caption)
    print(f"figure   {told}\nmoving   {for_screen(out)}/pose.gif", flush=True)


def draw_motion(config: Config, path: Path, out: Path) -> None:
    """flow.png and flow.gif."""
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", SIDE, config.flow)
        record = pack.record(0)
        if "flow" not in record.get("streams", {}):
            raise ValueError(f"--flow {config.flow}: {first_refusal(pack.folder)}")
        numbers = np.arange(record["frames"])
        frames, flow = pack.frames(record, numbers).numpy(), pack.flow(record, numbers).numpy()
    drawn = draw_flow(flow)
    speed = np.hypot(flow[:, 0], flow[:, 1])
    caption = (
        "white: no motion; red: to the right, yellow green: down, cyan: left, violet: up; "
        f"mean speed {speed.mean():.2f} pixels a frame, largest {speed.max():.1f}"
    )
    both = np.concatenate([frames, drawn], 2).repeat(config.enlarge, 1).repeat(config.enlarge, 2)
    write_gif(out / "flow.gif", both, 1000 / record["fps"])
    seconds = record["start"] + numbers / record["fps"]
    rows = [("clip", frames), ("flow", drawn)]
    title = f"Optical flow of {path.name}, by {config.flow}"
    told = clips_figure(out / "flow.png", rows, seconds, title, caption)
    print(f"figure   {told}\nmoving   {for_screen(out)}/flow.gif", flush=True)


def around(values: np.ndarray, columns: Sequence[str], size: tuple[int, int]) -> list[int]:
    """The part of the frame that people are in: left, top, right and bottom, whole pixels."""
    u = columns.index("u")
    points = values[values[..., -1] > 0][:, u : u + 2]
    if not len(points):
        return [0, 0, *size]
    low, high = points.min(0), points.max(0)
    margin = 8 + 0.1 * (high - low).max()
    box = np.concatenate([np.floor(low - margin), np.ceil(high + margin)])
    box = box.clip(0, [*size, *size]).astype(int).tolist()
    return box if box[0] < box[2] and box[1] < box[3] else [0, 0, *size]


def write_gif(path: Path, frames: np.ndarray, milliseconds: float) -> None:
    """Frames, uint8 (T, H, W, 3), as a GIF that never ends."""
    pictures = [Image.fromarray(frame) for frame in frames]
    with writing(path):
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
        )


def draw_attention(config: Config, path: Path, out: Path) -> None:
    """attention.png and attention.gif."""
    encoder = load_backbone(config.backbone)
    if not isinstance(encoder, Attends):
        raise ValueError(
            f"{config.backbone} is a {type(encoder).__name__}: attention over the whole grid is "
            "what a plain video transformer has"
        )
    spec = encoder.input_spec
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", packing_side(spec.size))
        clips = EvalClips(pack, np.array([0]), spec, 1, 1)
        (_, views), seconds = clips[0], clips.seconds(0)[0]
    clip = views["rgb"][0]
    maps = attention_on_grid(encoder, spec.normalise(clip[None]))
    rows = [("clip", clip)]
    for name, seen in maps.items():
        rows.append((f"{name}\n(largest {100 * seen.max():.1f} %)", overlay(clip, seen[0])))
    pictures = [(name, c.permute(1, 2, 3, 0).numpy()) for name, c in rows]
    by = "the class token" if encoder.class_token is not None else "the mean over all tokens"
    caption = (
        f"red: what {by} attend to" if encoder.class_token is None else f"red: what {by} attends to"
    )
    if encoder.arguments["motion_tokens"] < 1:
        kept = encoder.arguments["motion_tokens"]
        caption += f"; the encoder uses the {kept:.0%} of the tokens with the largest difference"
    side = spec.size * config.enlarge
    beside = [np.concatenate([p[t] for _, p in pictures], 1) for t in range(spec.frames)]
    size = (side * len(pictures), side)
    moving = [Image.fromarray(f).resize(size, Image.Resampling.NEAREST) for f in beside]
    write_gif(out / "attention.gif", np.stack([np.asarray(f) for f in moving]), 100)
    title = f"Attention of {config.backbone} on {path.name}"
    meaning = "fraction of the attention, relative to the row's largest token"
    # What a grey pixel becomes under none and under most of the attention.
    ends = overlay(torch.full((3, 1, 1, 2), 128, dtype=torch.uint8), torch.tensor([[[0.0, 1.0]]]))
    bar = (meaning, [tuple(colour) for colour in (ends[:, 0, 0].T / 255).tolist()])
    drawn = clips_figure(out / "attention.png", pictures, seconds, title, caption, bar)
    print(
        f"figure   {drawn}\nmoving   {for_screen(out)}/attention.gif (clip, {', '.join(maps)})",
        flush=True,
    )


if __name__ == "__main__":
    cli(main, Config)
