"""Attention maps of a video transformer, skeletons of people, and optical flow, over a clip.

    python recipes/visualize.py --backbone RUN/backbone --video clip.mp4
    python recipes/visualize.py --pose blazepose --video clip.mp4
    python recipes/visualize.py --flow dis --video clip.mp4
    python recipes/visualize.py --backbone RUN/backbone --pose poses.json --video clip.mp4

The first draws the attention of the last layer and attention rollout (Abnar & Zuidema 2020) over
the clip: attention.png, a row each, and attention.gif, side by side. It works for the plain video
transformers, also as video tower of a video-text pair or under a classifier.

The second draws the joints of people: those that BlazePose finds, or those of a file that came
with the video (see `pretrain/data/pose_files.py`): pose.png and pose.gif.

The third draws optical flow, its direction as hue and its speed as saturation: flow.png, flow.gif.

The fourth is for pose-driven attention (`downstream/models/pose_attention.py`): attention.png and
attention.gif show the places that the joints choose over the clip, the skeleton on top, and below
how much each part of the time counts. Poses come from --pose, or from --video clip.csv, a list of
one video that names them.
"""

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
import torch
from PIL import Image

from downstream.attention_maps import Attends, AttendsByPose, attention_on_grid, overlay
from downstream.models import load_backbone
from downstream.results import data_name
from downstream.skeletons import draw_poses
from pretrain.data.blazepose import estimate_poses, load_networks
from pretrain.data.cache import first_refusal, pack_file, packing_side
from pretrain.data.methods import pose_weights
from pretrain.data.pose_files import read_poses
from pretrain.data.poses import COLUMNS, Poses, clip_poses, crop_pose
from pretrain.data.sampling import test_boxes, test_indices
from pretrain.data.shards import EvalClips, Pack
from pretrain.files import is_file, is_there, no_file
from pretrain.flow_colours import draw_flow, full_colour
from pretrain.folders import claim, writing
from pretrain.log import clips_figure
from pretrain.names import did_you_mean, file_name, for_screen
from pretrain.spec import Backbone, InputSpec, Stream
from recipes.options.visualize import Config, command

SIDE = 256  # pixels of the short side to which a video is packed


def main(config: Config) -> dict:
    """Draw; returns where the pictures are."""
    if config.enlarge < 1:
        raise ValueError(f"--enlarge {config.enlarge}: give at least 1")
    path = Path(config.video)
    if not is_file(path):
        raise ValueError(f"--video {config.video}: {no_file(config.video)}")
    out = Path(config.out or f"runs/visualize-{file_name(data_name(config.video))}")
    encoder = load_backbone(config.backbone) if config.backbone else None
    driven = encoder if isinstance(encoder, AttendsByPose) else None
    pose = "" if driven is not None else config.pose  # else it is drawn with the attention
    given = {"attention": config.backbone, "pose": pose, "flow": config.flow}
    names = [name for name, value in given.items() if value]
    if not names:
        raise ValueError(
            "nothing to draw: give --backbone for attention, --pose for skeletons, or --flow for "
            "motion"
        )
    lock = claim(out, tuple(f"{name}{end}" for name in names for end in (".png", ".gif")))
    if driven is not None:
        draw_driven_attention(config, driven, path, out)
    elif encoder is not None:
        draw_attention(config, encoder, path, out)
    if pose:
        draw_skeletons(config, path, out)
    if config.flow:
        draw_motion(config, path, out)
    lock.release(force=True)
    pictures = {end: [str(out / f"{name}.{end}") for name in names] for end in ("png", "gif")}
    return {end: files[0] for end, files in pictures.items()}


def poses_of(config: Config) -> Poses:
    """The poses that --pose names.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        return read_poses(config.pose, config.skeleton)
    except ValueError as error:
        meant = "" if is_there(config.pose) else did_you_mean(config.pose, ["blazepose"])
        raise ValueError(f"--pose {error}{meant}") from error


def draw_skeletons(config: Config, path: Path, out: Path) -> None:
    """pose.png and pose.gif.

    Raises:
        ValueError: the video or its poses cannot be read, or the poses have no place in a frame.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", SIDE)
        record, total = pack.record(0), sum(each["frames"] for each in pack.records())
        frames = pack.frames(record, np.arange(record["frames"])).numpy()
    size = (record["width"], record["height"])
    if config.pose == "blazepose":
        networks = load_networks(pose_weights(config.pose_weights))
        values, _ = estimate_poses(frames, record["fps"], networks)
        columns: tuple[str, ...] = COLUMNS
        skeleton = "blazepose33"
    else:
        poses = poses_of(config)
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
    """flow.png and flow.gif.

    Raises:
        ValueError: the video cannot be read, or its flow not estimated.
    """
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", SIDE, config.flow)
        record = pack.record(0)
        if "flow" not in record.get("streams", {}):
            raise ValueError(f"--flow {config.flow}: {first_refusal(pack.folder)}")
        numbers = np.arange(record["frames"])
        frames, flow = pack.frames(record, numbers).numpy(), pack.flow(record, numbers).numpy()
    full = full_colour(flow)
    drawn = draw_flow(flow, full)
    speed = np.hypot(flow[:, 0], flow[:, 1])
    caption = (
        "white: no motion; red: to the right, yellow green: down, cyan: left, violet: up; colours "
        f"are full from {full:.2g} pixels a frame on (mean {speed.mean():.2f}, largest "
        f"{speed.max():.1f})"
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


def draw_attention(config: Config, encoder: Backbone, path: Path, out: Path) -> None:
    """attention.png and attention.gif of a video transformer.

    Raises:
        ValueError: the encoder attends in another way, or the video cannot be read.
    """
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
    caption = f"red: what {by} attends to"
    if encoder.arguments["motion_tokens"] < 1:
        kept = encoder.arguments["motion_tokens"]
        caption += f"; the encoder uses the {kept:.0%} of the tokens with the largest "
        caption += "frame difference"
    side = spec.size * config.enlarge
    beside = [np.concatenate([p[t] for _, p in pictures], 1) for t in range(spec.frames)]
    size = (side * len(pictures), side)
    moving = [Image.fromarray(f).resize(size, Image.Resampling.NEAREST) for f in beside]
    write_gif(out / "attention.gif", np.stack([np.asarray(f) for f in moving]), 100)
    title = f"Attention of {config.backbone} on {path.name}"
    bar = colour_bar("fraction of the attention, relative to the row's largest token")
    drawn = clips_figure(out / "attention.png", pictures, seconds, title, caption, bar)
    print(
        f"figure   {drawn}\nmoving   {for_screen(out)}/attention.gif (clip, {', '.join(maps)})",
        flush=True,
    )


def draw_driven_attention(config: Config, encoder: AttendsByPose, path: Path, out: Path) -> None:
    """attention.png and attention.gif of attention that poses drive.

    Raises:
        ValueError: the video cannot be read, or lacks poses that the encoder takes.
    """
    assert isinstance(encoder, Backbone)
    spec = encoder.input_spec
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_with_poses(config, path, Path(folder), spec)
        record = pack.record(0)
        pack.check_streams(np.array([0]), spec, config.backbone)
        # What is drawn over is the picture, whatever the network sees of it.
        shown = replace(spec, streams={**spec.streams, "rgb": spec.streams.get("rgb", Stream())})
        clips = EvalClips(pack, np.array([0]), shown, 1, 1)
        (_, views), seconds = clips[0], clips.seconds(0)[0]
        indices = test_indices(record["frames"], spec.frames, spec.stride, 1)[0]
        values, columns = pack.poses(record, indices).numpy(), record["streams"]["pose"]["columns"]
    with torch.inference_mode():
        space, time = (part[0] for part in encoder.attentions(spec.normalise(spec.take(views))))
    low, high = float(space.min()), float(space.max())
    # From grey at the least to red at the most: what differs is seen, and the numbers say by how
    # much.
    contrast = ((space - low) / (high - low) if high > low else space * 0)[None]
    plain = views["rgb"][0]
    pictures = [clip.permute(1, 2, 3, 0).numpy() for clip in (plain, overlay(plain, contrast))]
    placed = "u" in columns
    if placed:
        box = test_boxes(record["width"], record["height"], 1)[0]
        people = crop_pose(values, columns, box, (spec.size, spec.size))
        skeleton = record["streams"]["pose"]["skeleton"]
        drawn = [draw_poses(clip, people, columns, skeleton, config.enlarge) for clip in pictures]
    else:
        drawn = [p.repeat(config.enlarge, 1).repeat(config.enlarge, 2) for p in pictures]
    strip = weights_strip(time.numpy(), spec.frames, drawn[0].shape[2] * 2, 12 * config.enlarge)
    moving = np.concatenate([np.concatenate(drawn, 2), strip], 1)
    pace = np.diff(seconds).mean() if len(seconds) > 1 else 0.1
    write_gif(out / "attention.gif", moving, max(1000 * float(pace), 20))
    caption = (
        f"spatial attention, the same in all frames: {low:.3f} (grey) to {high:.3f} (red); temporal"
        f" attention: {float(time.min()):.3f} to {float(time.max()):.3f}, "
        f"{1 / len(time):.3f} if all times were alike"
    ) + ("" if placed else "; joints in metres alone have no place in the frame")
    title = f"Attention of {config.backbone} on {path.name}, driven by its poses"
    rows = [("clip", drawn[0]), ("spatial\nattention", drawn[1])]
    bar = colour_bar("spatial attention", low, high)
    bars = ("temporal\nattention", time.numpy())
    told = clips_figure(out / "attention.png", rows, seconds, title, caption, bar, 8, bars)
    print(f"figure   {told}\nmoving   {for_screen(out)}/attention.gif", flush=True)


def pack_with_poses(config: Config, path: Path, folder: Path, spec: InputSpec) -> Pack:
    """The video with its poses, and flow if the network takes it, packed into a new folder.

    Raises:
        ValueError: it cannot be used, or it has no poses and none are given.
    """
    stream = spec.pictures.get("flow")
    flow = (stream.method or "dis") if stream else ""
    source, estimated = path, "blazepose" if config.pose == "blazepose" else ""
    if estimated:
        pose_weights(config.pose_weights)  # from now on they are in the cache
    elif config.pose:
        source = folder / "clip.csv"
        with open(source, "w", newline="", encoding="utf-8") as file:
            row = [path.resolve(), Path(config.pose).resolve(), config.skeleton]
            csv.writer(file).writerows([["path", "pose", "skeleton"], row])
    pack = pack_file(source, folder / "pack", packing_side(spec.size), flow, estimated)
    if not {*spec.streams} - {"rgb"} <= pack.record(0).get("streams", {}).keys():
        if refusal := first_refusal(pack.folder):
            raise ValueError(f"{config.pose or path}: {refusal}")
        raise ValueError(f"the attention of {config.backbone} is driven by poses: give --pose")
    return pack


def colour_bar(
    meaning: str, low: float = 0.0, high: float = 1.0
) -> tuple[str, list[tuple[float, ...]], tuple[float, float]]:
    """What a grey pixel becomes under least and under most of the attention, for a figure's bar."""
    ends = overlay(torch.full((3, 1, 1, 2), 128, dtype=torch.uint8), torch.tensor([[[0.0, 1.0]]]))
    colours = [tuple(colour) for colour in (ends[:, 0, 0].T / 255).tolist()]
    return meaning, colours, (low, max(high, low + 1e-6))


def weights_strip(weights: np.ndarray, frames: int, width: int, height: int) -> np.ndarray:
    """Bars of the weights of equal parts of the time, the part of the frame at hand in orange.

    Args:
        weights: (t,).
        frames: T.
        width: of a picture, pixels.
        height: likewise; of the highest bar.

    Returns:
        uint8 (T, height, width, 3).
    """
    part = np.arange(width) * len(weights) // width  # that each column of pixels is of
    top = height - np.round(height * weights / weights.max()).astype(int)
    filled = np.arange(height)[:, None] >= top[part]
    strip = np.full((frames, height, width, 3), 255, np.uint8)
    strip[:, filled] = (120, 120, 120)
    for frame in range(frames):
        now = part == frame * len(weights) // frames
        strip[frame][filled & now] = (255, 140, 0)
    return strip


if __name__ == "__main__":
    command(main)
