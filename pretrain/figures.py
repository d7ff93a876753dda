"""Figures of what a model made of a clip."""

from pathlib import Path

import numpy as np
import torch

from pretrain import log
from pretrain.data.shards import EvalClips, Pack
from pretrain.masked import MaskedPixels
from pretrain.videomae import VideoMAE, reconstruct


@log.optional_figure
def reconstruction_figure(
    path: Path, model: VideoMAE | MaskedPixels, pack: Pack, sample: int,
    tokens: tuple[np.ndarray, np.ndarray], title: str, mask: str,
) -> str:  # fmt: skip
    """Draw one clip, its visible tokens and the predictions.

    Args:
        path: the .png to write.
        model: in any mode, which stays.
        pack: where the clip is.
        sample: its number.
        tokens: indices of the visible and of the hidden ones.
        title: above the figure.
        mask: in words, for the caption.

    Returns:
        what to print of the figure, see `pretrain.log.optional_figure`.
    """
    clips = EvalClips(pack, np.array([sample]), model.encoder.input_spec, 1, 1)
    views = clips[0][1]["rgb"]
    where, training = next(model.parameters()).device, model.training
    visible, masked = (torch.from_numpy(i)[None].to(where) for i in tokens)
    model.eval()
    pictures = [views, *reconstruct(model, views.to(where), visible, masked)]
    model.train(training)
    rebuilt = ("reconstruction\n(true patch mean/std)", "reconstruction\n(nothing leaked)")
    names = ("clip", "visible", *rebuilt)
    rows = [
        (n, p[0].permute(1, 2, 3, 0).cpu().numpy()) for n, p in zip(names, pictures, strict=True)
    ]
    caption = (
        f"{mask}. Row 3 borrows the true mean and standard deviation of every hidden tubelet, row "
        "4 those of the nearest visible one."
    )
    if model.encoder.arguments.get("motion_tokens", 1) < 1:
        caption += " Grey in all rows: tokens that were not selected for their motion."
    return log.reconstruction_figure(path, rows, clips.seconds(0)[0], title, caption)
