"""Skeletons drawn over the frames of a clip."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.poses import SKELETONS, crop_pose

SIDES = {"left": (255, 140, 0), "right": (0, 170, 255), "": (240, 240, 240)}  # colours of bones
FAINT = 0.3  # confidence under which a joint is drawn thin


def draw_poses(
    frames: np.ndarray, values: np.ndarray, columns: Sequence[str], skeleton: str, enlarge: int = 1
) -> np.ndarray:
    """Frames, enlarged, with the bones of everybody in them.

    Bones of the person's left side are orange, those of the right side blue; they are thin where a
    joint is hardly visible. The people of a clip have numbers.

    Args:
        frames: uint8 (T, H, W, 3).
        values: (T, P, J, K), u and v among the columns, in pixels of the frames.
        columns: see `pretrain.data.poses.COLUMNS`.
        skeleton: a name in `SKELETONS`.
        enlarge: factor of the result's pixels.
    """
    height, width = frames.shape[1:3]
    size = (width * enlarge, height * enlarge)
    values = crop_pose(values, columns, (0, 0, width, height), size)
    u, v = columns.index("u"), columns.index("v")
    names, out = SKELETONS[skeleton].joints, []
    for frame, people in zip(frames, values, strict=True):
        picture = Image.fromarray(frame).resize(size, Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture)
        for number, joints in enumerate(people):
            seen = joints[:, -1] > 0
            at = [(float(joint[u]), float(joint[v])) for joint in joints]
            for start, end in SKELETONS[skeleton].bones:
                if seen[start] and seen[end]:
                    pair = names[start] + names[end]
                    # A bone between left and right joints is in the middle.
                    side = [s for s in ("left", "right") if s in pair]
                    colour = SIDES[side[0] if len(side) == 1 else ""]
                    thin = joints[[start, end], -1].min() < FAINT
                    draw.line([at[start], at[end]], colour, 1 if thin else max(1, enlarge))
            if seen.any() and len(people) > 1:
                x, y = joints[seen][:, u].mean(), joints[seen][:, v].min()
                draw.text((x, max(0, y - 12)), str(number + 1), (255, 255, 0))
        out.append(np.asarray(picture))
    return np.stack(out)
