"""Controls: is it the action that a backbone reads, or the scene?

The same backbone sees each clip without its motion, and the same classifier is fitted and tested in
the same folds: on one frame, repeated; on the frames in another order; and on the median picture,
in which nothing moves. A classifier that is as good there did not need the action.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from downstream.metrics import paired_difference
from pretrain.data.sampling import counter_rng
from pretrain.spec import InputSpec

CONTROLS = {
    "frame": "single frame",
    "shuffled": "shuffled frames",
    "background": "static background alone",
}

CONTROL = "control_"  # before the names of their metrics
MUCH = 0.5  # of what is above chance, from which a control explains much of it


@dataclass(frozen=True)
class Verdict:
    """What controls say of a classifier.

    Attributes:
        word: "unclear" (these videos do not show it), "scene" (the background alone is as good),
            "partly scene" (it explains much), "frame" (one frame is as good), "frames" (frames in
            another order are), "order" (it needs them in their order).
        sentence: the same for a reader, with numbers.
        differences: of each control, ours less its accuracy, and the ends of its 95 % interval.
    """

    word: str
    sentence: str
    differences: dict[str, tuple[float, float, float]]


def controls_of(spec: InputSpec) -> list[str]:
    """The controls that say something of a backbone: a background is of pictures in colour."""
    return [name for name in CONTROLS if name != "background" or list(spec.streams) == ["rgb"]]


def controlled(
    views: Mapping[str, Tensor], control: str, ids: Sequence[int], num_crops: int
) -> dict[str, Tensor]:
    """Clips as a control shows them.

    Args:
        views: by stream (B, V, C, T, ...), the crops of a time one behind the other.
        control: a name in `CONTROLS`. "frame": the middle one of a view, repeated. "shuffled": the
            frames in an order drawn for each clip, the same for all of its streams and views.
            "background": the median over all frames of all views of a crop, repeated: what does
            not move, and of an actor who stays in place what rests.
        ids: (B,) sample numbers, which decide the order.
        num_crops: spatial views of a clip.
    """
    changed = {}
    for name, clips in views.items():
        frames = clips.shape[3]
        if control == "frame":
            changed[name] = clips[:, :, :, frames // 2, None].expand_as(clips)
        elif control == "shuffled":
            orders = [torch.from_numpy(counter_rng(0, i).permutation(frames)) for i in ids]
            pairs = zip(clips, orders, strict=True)
            changed[name] = torch.stack([clip[:, :, order] for clip, order in pairs])
        else:
            assert control == "background"
            crops = clips.unflatten(1, (-1, num_crops))  # (B, times, crops, C, T, H, W)
            every = crops.movedim(1, 4).flatten(3, 4)  # (B, crops, C, T * times, H, W)
            picture = every.median(3).values[:, None, :, :, None]
            changed[name] = picture.expand_as(crops).flatten(1, 2)
    return changed


def judge(
    hits: np.ndarray, controls: Mapping[str, np.ndarray], groups: Sequence[str | None],
    chance: float, seed: int,
) -> Verdict:  # fmt: skip
    """Whether a classifier reads the action or the scene, as far as these videos show.

    Args:
        hits: (M,) 1 where it is correct on a tested video.
        controls: of each control the same.
        groups: (M,) of the videos, as the folds have them.
        chance: accuracy of guessing.
        seed: of the bootstrap.
    """
    ours, least = hits.mean(), paired_difference(hits - chance, groups, seed)[1]
    differences = {
        n: paired_difference(hits - other, groups, seed) for n, other in controls.items()
    }
    points = lambda value: f"{100 * value:.1f} %"

    def told(name: str) -> str:
        mean, low, high = (100 * value for value in differences[name])
        return (
            f"{CONTROLS[name]} {points(controls[name].mean())} against {points(ours)}: "
            f"{mean:+z.1f} points, 95 % interval {low:+z.1f} to {high:+z.1f}"
        )

    def alike(name: str) -> bool:
        return name in controls and differences[name][1] <= 0

    def explained(name: str) -> float:
        return (controls[name].mean() - chance) / (ours - chance) if name in controls else 0.0

    scene = controls.get("background", np.zeros(len(hits)))
    seen = paired_difference(scene - chance, groups, seed)[1] > 0
    if seen and alike("background"):
        word, said = "scene", (
            "it may read the scene and not the action: the static background alone is not shown to "
            f"be worse ({told('background')}). Film every action in the same places, or crop to "
            "who acts"
        )  # fmt: skip
    elif least <= 0:
        word, said = "unclear", (
            f"it is not shown to be above chance ({points(ours)}, chance {points(chance)}), so "
            "what it reads cannot be said yet"
        )  # fmt: skip
    elif alike("background"):
        word, said = "unclear", (
            "whether it reads the action or the scene is not certain yet: the static background "
            f"alone is neither shown to be above chance nor to be worse ({told('background')}). "
            "Label clips of more people"
        )  # fmt: skip
    elif explained("background") >= MUCH:
        word, said = "partly scene", (
            f"it reads more than the scene, but the scene alone gives "
            f"{100 * explained('background'):.0f} % of what is above chance ({told('background')}):"
            " expect less in new places"
        )  # fmt: skip
    elif alike("frame"):
        word, said = "frame", (
            f"it is not shown to need motion: one frame is as good ({told('frame')}). It may read "
            "postures or things"
        )  # fmt: skip
    elif alike("shuffled"):
        word, said = "frames", (
            "it needs several frames, but is not shown to need their order "
            f"({told('shuffled')}; {told('frame')})"
        )  # fmt: skip
    else:
        word, said = "order", (
            "it reads the action: it needs the frames in their order "
            f"({'; '.join(told(name) for name in controls)})"
        )  # fmt: skip
    return Verdict(word, said, differences)
