"""Attention maps of a video transformer.

    python recipes/visualize.py --backbone RUN/backbone --video clip.mp4

Draws the attention of the last layer and attention rollout (Abnar & Zuidema 2020) over the clip: attention.png, a row each, and
attention.gif, side by side. Works for the plain video transformers, also as video tower of a video-text pair or under a
classifier.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from downstream.attention_maps import Attends, looked_at, overlay
from downstream.models import load_backbone
from pretrain.data.cache import pack_file, packing_side
from pretrain.data.shards import EvalClips
from pretrain.files import is_file, no_file
from pretrain.flags import Count
from pretrain.folders import claim, writing
from pretrain.log import cli, reconstruction_figure
from pretrain.names import for_screen


@dataclass(frozen=True)
class Config:
    """Configuration of the figure."""

    backbone: str
    """RUN/backbone, hf:OWNER/NAME of a VideoMAE or an official VideoMAE .pth."""
    video: str
    """A video file; of a long one its first 10 s."""
    out: str = "runs/visualize"
    """Where the pictures go; older ones of this recipe are replaced."""
    enlarge: Count = 4
    """Factor of the GIF's pixels."""


def main(config: Config) -> dict:
    """Draw; returns where the pictures are."""
    if config.enlarge < 1:
        raise ValueError(f"--enlarge {config.enlarge}: give at least 1")
    path, out = Path(config.video), Path(config.out)
    if not is_file(path):
        raise ValueError(f"--video {config.video}: {no_file(config.video)}")
    lock = claim(out, ("attention.png", "attention.gif"))
    encoder = load_backbone(config.backbone)
    if not isinstance(encoder, Attends):
        raise ValueError(
            f"{config.backbone} is a {type(encoder).__name__}: attention over the whole grid is what a plain video transformer has"
        )
    spec = encoder.input_spec
    with tempfile.TemporaryDirectory() as folder:
        pack = pack_file(path, Path(folder) / "pack", packing_side(spec.size))
        clips = EvalClips(pack, np.array([0]), spec, 1, 1)
        (_, views), seconds = clips[0], clips.seconds(0)[0]
    clip = views["rgb"][0]
    maps = looked_at(encoder, spec.normalise(clip[None]))
    rows = [("clip", clip)]
    for name, seen in maps.items():
        rows.append((f"{name}\n(largest {100 * seen.max():.1f} %)", overlay(clip, seen[0])))
    pictures = [(name, c.permute(1, 2, 3, 0).numpy()) for name, c in rows]
    by = "the class token" if encoder.class_token is not None else "the mean over all tokens"
    caption = (
        f"red: what {by} attend to" if encoder.class_token is None else f"red: what {by} attends to"
    )
    if encoder.arguments["motion_tokens"] < 1:
        caption += f"; the encoder uses the {encoder.arguments['motion_tokens']:.0%} of the tokens with the largest frame difference"
    side = spec.size * config.enlarge
    frames = [
        Image.fromarray(np.concatenate([p[t] for _, p in pictures], 1)).resize(
            (side * len(pictures), side), Image.Resampling.NEAREST
        )
        for t in range(spec.frames)
    ]
    with writing(out / "attention.gif"):
        frames[0].save(
            out / "attention.gif", save_all=True, append_images=frames[1:], duration=100, loop=0
        )
    title = f"Attention of {config.backbone} on {path.name}"
    meaning = "fraction of the attention, relative to the row's largest token"
    # What a grey pixel becomes under none and under most of the attention.
    ends = overlay(torch.full((3, 1, 1, 2), 128, dtype=torch.uint8), torch.tensor([[[0.0, 1.0]]]))
    bar = (meaning, [tuple(colour) for colour in (ends[:, 0, 0].T / 255).tolist()])
    drawn = reconstruction_figure(out / "attention.png", pictures, seconds, title, caption, bar)
    lock.release(force=True)
    print(
        f"figure   {drawn}\nmoving   {for_screen(out)}/attention.gif (clip, {', '.join(maps)})",
        flush=True,
    )
    return {"png": str(out / "attention.png"), "gif": str(out / "attention.gif")}


if __name__ == "__main__":
    cli(main, Config)
