"""Figures of what a model made of a clip."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pretrain import log
from pretrain.data.shards import EvalClips, Pack
from pretrain.flow_colours import draw_flow
from pretrain.masked import MaskedPixels
from pretrain.modes import evaluating
from pretrain.spec import FLOW_LEVELS, FLOW_ZERO
from pretrain.videomae import MOST_MOTION, VideoMAE, patch_statistics
from pretrain.vit import patchify, take_tokens, unpatchify


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
    clips = EvalClips(pack, np.array([sample]), model.clip, 1, 1)
    (seen,) = model.encoder.input_spec.pictures
    views = clips[0][1]
    where = next(model.parameters()).device
    visible, masked = (torch.from_numpy(i)[None].to(where) for i in tokens)
    target = None if model.target == seen else views[model.target].to(where)
    with evaluating(model):
        rebuilt = reconstruct(model, views[seen].to(where), visible, masked, target)
    names: tuple[str, ...]
    if target is not None:
        names, blank = ("hidden flow", "prediction"), "Grey and white"
        caption = (
            f"{mask}. Rows 3 and 4: optical flow of the tokens to predict. Hue: direction; white: "
            "no motion, or nothing to predict"
        )
    elif model.target == "flow":
        names, blank = ("reconstruction",), "White"
        caption = f"{mask}. Hue: direction; white: no motion, and in row 2 what is hidden"
    else:
        names = ("reconstruction\n(true patch mean/std)", "reconstruction\n(nothing leaked)")
        blank = "Grey"
        caption = (
            f"{mask}. Row 3 borrows the true mean and standard deviation of every hidden tubelet, "
            "row 4 those of the nearest visible one."
        )
    most = 0.0
    if model.target == "flow":
        most = float(np.hypot(*_motion(model, views["flow"]).swapaxes(0, 1)).max()) or 1.0
        fastest = most * model.clip.pictures["flow"].bound
        caption += f"; full colour: {fastest:.2g} pixels a frame."
    if model.encoder.arguments.get("motion_tokens", 1) < 1:
        caption += f" {blank} in all rows: tokens that were not selected for their motion."
    rows = []
    for name, clip in zip(("clip", "visible", *names), (views[seen], *rebuilt), strict=True):
        if clip.shape[1] == 2:
            drawn = draw_flow(_motion(model, clip), most)
        else:
            drawn = clip[0].permute(1, 2, 3, 0).cpu().numpy()
        rows.append((name, drawn))
    return log.clips_figure(path, rows, clips.seconds(0)[0], title, caption)


def _motion(model: VideoMAE | MaskedPixels, clip: Tensor) -> np.ndarray:
    """Motion over the bound (T, 2, H, W) of one clip of flow, uint8 (1, 2, T, H, W)."""
    return model.clip.pictures["flow"].normalise(clip.cpu())[0].transpose(0, 1).numpy()


@torch.no_grad()
def reconstruct(
    model: VideoMAE | MaskedPixels, video: Tensor, visible: Tensor, masked: Tensor,
    target: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Visible tokens and reconstructions as pixels, for figures.

    The model predicts normalised tubelets, so pixels need each tubelet's mean and standard
    deviation. The true ones, which published figures use, leak the target's colours. The second
    reconstruction uses those of the nearest visible tubelet instead.

    Args:
        model: in evaluation mode.
        video: uint8 clips (B, C, T, H, W).
        visible: (B, V) tokens, as `VideoMAE.forward` takes them.
        masked: (B, M) all other tokens that the encoder uses.
        target: as `VideoMAE.forward` takes it.

    Returns:
        the visible tokens, the others grey; the reconstruction with true statistics; the one with
        statistics of visible tokens; each uint8 (B, C, T, H, W). Tokens that the encoder does not
        use are grey. Of flow, which is not normalised, there is one reconstruction, and grey is no
        motion. Where `target` is predicted from another stream: the visible tokens, then what was
        hidden of the target and the prediction, both grey elsewhere.
    """
    tubelet, patch, grid = model.tubelet, model.patch, model.grid
    _, prediction = model(video, visible, masked, target)
    visible, masked = model.grid_indices(video, visible), model.grid_indices(video, masked)
    patches = patchify(video, tubelet, patch).float() / 255

    positions = torch.cartesian_prod(*(torch.arange(n, device=video.device) for n in grid)).float()
    distance = torch.cdist(positions[masked], positions[visible])  # (B, M, V)
    nearest = visible.gather(1, distance.argmin(2))

    shown = torch.full_like(patches, 0.5)
    for known in (visible, masked):
        index = known[..., None].expand(-1, -1, patches.shape[2])
        shown = shown.scatter(1, index, take_tokens(patches, known))

    def as_video(values: Tensor, around: Tensor = shown) -> Tensor:
        canvas = around.scatter(1, masked[..., None].expand_as(values), values)
        return (unpatchify(canvas, grid, tubelet, patch).clamp(0, 1) * 255).round().byte()

    results = [as_video(torch.full_like(take_tokens(patches, masked), 0.5))]
    if model.target == "flow":
        motion = (prediction.float() / MOST_MOTION).clamp(-1, 1)
        levels = (motion * FLOW_LEVELS + FLOW_ZERO) / 255
        if target is None:
            return results[0], as_video(levels)
        flow = patchify(target, tubelet, patch).float() / 255
        grey = torch.full_like(flow, 0.5)
        return results[0], as_video(take_tokens(flow, masked), grey), as_video(levels, grey)
    prediction = rearrange(prediction.float(), "b m (s c) -> b m s c", c=3)
    for source in (masked, nearest):
        mean, std = patch_statistics(take_tokens(patches, source))
        results.append(as_video((prediction * (std + model.target_eps) + mean).flatten(2)))
    return results[0], results[1], results[2]
