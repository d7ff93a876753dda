"""Augmentations that treat a clip as one thing: every frame, and every stream, gets the same.

A clip is its streams by name: "rgb", uint8 (C, T, H, W); "flow", levels uint8 (2, T, H, W); "pose",
float32 (K, T, P, J).
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.poses import mirror_pose
from pretrain.spec import FLOW_ZERO, InputSpec, Joints

_RULE = re.compile(r"n(\d+)-m(\d+(?:\.\d+)?)")
_GREY = [128, 128, 128]  # what turned and shifted pictures leave free


@dataclass(frozen=True)
class Augment:
    """Augmentation of a training clip: RandAugment before its crop, the rest after it.

    A mirror is of all streams. Colours are of rgb alone. Where a clip has other streams,
    RandAugment leaves out the operations that turn, shear and shift pictures: what is seen would no
    longer be where flow and joints say. Erasing puts noise into rgb and no motion into flow; joints
    stay.

    Attributes:
        flip: mirror half of the clips left to right; not for texts or classes that know left from
            right.
        colour: strength of random brightness, contrast and colour balance, each by up to this
            fraction; 0: none.
        rand_augment: "" or "nN-mM": N of RandAugment's operations at magnitude M of 10.
        erase: fraction of the clips of which one box is replaced by noise, in all frames alike.
        jitter: fraction of the clips whose frames are coloured otherwise, each by itself, see
            `jitter_colours`.
        grey: fraction of the clips that become grey.
        turn: of 3-D joints by themselves: each clip is turned about the vertical by up to so many
            degrees, as if the camera stood elsewhere.
        affine: of joints by themselves: the axes of each clip are scaled by up to this fraction and
            mixed with up to this fraction of one another, as if body and camera were others.
        span: of joints by themselves, seen in equal parts: the smallest fraction of a recording's
            time that a clip is of; 1: always the whole.

    Raises:
        ValueError: a strength or fraction outside 0 to 1, a span of nothing, degrees outside 0 to
            180, or another rule.
    """

    flip: bool = False
    colour: float = 0.0
    rand_augment: str = ""
    erase: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0
    turn: float = 0.0
    affine: float = 0.0
    span: float = 1.0

    def __post_init__(self):
        for name in ("colour", "erase", "jitter", "grey", "affine", "span"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        if not self.span:
            raise ValueError("span 0 leaves nothing of a recording: give 1 for all of it")
        if not 0 <= self.turn <= 180:
            raise ValueError(f"turn {self.turn} is not between 0 and 180 degrees")
        if self.rand_augment and not _RULE.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment {self.rand_augment!r} is not of the form n4-m7: how many "
                "operations, and how strong of 10"
            )

    def check(self, spec: InputSpec) -> None:
        """Raise ValueError if these clips have no colours to change, or no joints to move."""
        joints, alone = spec.streams.get("pose"), len(spec.streams) == 1
        flat = not isinstance(joints, Joints) or joints.coordinates == 2
        for name, off, useless, kind in (
            ("turn", 0, flat or not alone, "joints of 3 coordinates"),
            ("affine", 0, not (joints and alone), "joints"),
            ("span", 1, not (joints and alone) or spec.stride, "joints in equal parts"),
        ):
            if useless and getattr(self, name) != off:
                raise ValueError(
                    f"{name} {getattr(self, name)} is of {kind} by themselves, and this backbone "
                    f"takes {' and '.join(spec.streams)}, {spec.pace}: give {off}"
                )
        names = ("colour", "rand_augment", "jitter", "grey")
        if "rgb" not in spec.streams and (of := [name for name in names if getattr(self, name)]):
            raise ValueError(
                f"{of[0]} {getattr(self, of[0])} changes colours, and clips of "
                f"{' and '.join(spec.streams)} have none: leave it out (0, or nothing)"
            )

    def before_crop(self, frames: Tensor, rng: np.random.Generator, alone: bool = True) -> Tensor:
        """Augment whole frames, uint8 (T, H, W, C), as they were decoded.

        Args:
            frames: of rgb.
            rng: of all choices.
            alone: whether the clip has no other streams.
        """
        if not (rule := _RULE.fullmatch(self.rand_augment)):  # none is asked for
            return frames
        num, magnitude = rule.groups()
        clip = rand_augment(frames.permute(3, 0, 1, 2), int(num), float(magnitude), rng, alone)
        return clip.permute(1, 2, 3, 0)

    def __call__(
        self, clip: dict[str, Tensor], rng: np.random.Generator, spec: InputSpec
    ) -> dict[str, Tensor]:
        """Augment one cropped clip; all randomness comes from `rng`."""
        if self.flip and rng.random() < 0.5:
            clip = mirror(clip, spec)
        if "rgb" in clip:
            clip = clip | {"rgb": self._colours(clip["rgb"], rng)}
        if self.erase and rng.random() < self.erase:
            clip = random_erase(clip, rng)
        if self.turn:
            angle = np.deg2rad(rng.uniform(-self.turn, self.turn))
            x, y, z, seen = clip["pose"]
            cos, sin = float(np.cos(angle)), float(np.sin(angle))
            clip = {"pose": torch.stack([x * cos + z * sin, y, z * cos - x * sin, seen])}
        if self.affine:
            where, seen = clip["pose"][:-1], clip["pose"][-1:]
            change = rng.uniform(-self.affine, self.affine, (len(where), len(where)))
            matrix = torch.from_numpy(np.eye(len(where)) + change).float()
            clip = {"pose": torch.cat([torch.tensordot(matrix, where, 1), seen])}
        return {name: part.contiguous() for name, part in clip.items()}

    def _colours(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        if self.colour:
            low, high = 1 - self.colour, 1 + self.colour
            # Of all channels together, and of each.
            contrast = rng.uniform(low, high) * rng.uniform(low, high, 3)
            brightness = 128 * self.colour * rng.uniform(-0.5, 0.5)
            # One product and one sum a value: each of the 256 values is looked up.
            values = np.arange(256)[None] - 128.0
            table = np.clip(values * contrast[:, None] + 128 + brightness, 0, 255).round()
            pairs = zip(table.astype(np.uint8), clip.numpy(), strict=True)
            # numpy's lookup: torch's took four times as long.
            clip = torch.from_numpy(np.stack([np.take(row, channel) for row, channel in pairs]))
        if self.jitter and rng.random() < self.jitter:
            clip = jitter_colours(clip, rng)
        if self.grey and rng.random() < self.grey:
            clip = take_colours(clip)
        return clip


def mirror(clip: dict[str, Tensor], spec: InputSpec) -> dict[str, Tensor]:
    """A cropped clip as in a mirror: what is right is left, and so are motion and joints."""
    out = dict(clip)
    if "rgb" in clip:
        out["rgb"] = clip["rgb"].flip(-1)
    if "flow" in clip:
        x, y = clip["flow"].flip(-1)
        out["flow"] = torch.stack([(2 * FLOW_ZERO - x.int()).to(torch.uint8), y])
    if "pose" in clip:
        joints = spec.streams["pose"]
        assert isinstance(joints, Joints)
        values = clip["pose"].permute(1, 2, 3, 0).numpy()
        turned = mirror_pose(values, pose_columns(joints), joints.skeleton, spec.size)
        out["pose"] = torch.from_numpy(turned).permute(3, 0, 1, 2)
    return out


def pose_columns(joints: Joints) -> tuple[str, ...]:
    """What the K values of a joint are, of `pretrain.data.poses.COLUMNS`."""
    return ("u", "v", "confidence") if joints.coordinates == 2 else ("x", "y", "z", "confidence")


def jitter_colours(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Change the colours of a clip, uint8 (C, T, H, W), of every frame by itself.

    torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1) on one frame after the other, as ViFi-CLIP has it:
    its frames flicker.
    """
    import torchvision.transforms.v2.functional as TF

    frames = []
    for frame in clip.unbind(1):
        factors = (*rng.uniform(0.6, 1.4, 2), rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1))
        for i in rng.permutation(4):
            change = (
                TF.adjust_brightness,
                TF.adjust_contrast,
                TF.adjust_saturation,
                TF.adjust_hue,
            )[i]
            frame = change(frame, float(factors[i]))
        frames.append(frame)
    return torch.stack(frames, 1)


def take_colours(clip: Tensor) -> Tensor:
    """A clip, uint8 (C, T, H, W), in shades of grey, by ITU-R 601's weights of the colours."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
    grey = (clip.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    return grey.expand_as(clip)


def rand_augment(
    clip: Tensor, num: int, magnitude: float, rng: np.random.Generator, turning: bool = True
) -> Tensor:
    """Apply `num` random operations, the same to every frame.

    Cubuk et al. 2020, https://arxiv.org/abs/1909.13719.

    The operations and their ranges are those of timm's "increasing" set, with which VideoMAE is
    fine-tuned: each is left out half of the time, and magnitudes vary around `magnitude` with
    standard deviation 0.5.

    Args:
        clip: uint8 (C, T, H, W).
        num: operations, drawn with replacement.
        magnitude: 0 to 10.
        rng: of all choices.
        turning: whether operations that turn, shear and shift are among those drawn.
    """
    frames = clip.transpose(0, 1)  # (T, C, H, W), as torchvision takes many pictures
    height, width = frames.shape[-2:]
    for name in rng.choice(_OPERATIONS if turning else _COLOURING, num):
        level = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            continue
        frames = apply_operation(str(name), frames, level, sign, height, width)
    return frames.transpose(0, 1)


_OPERATIONS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
    "colour", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "shift_x", "shift_y",
)  # fmt: skip
_COLOURING = tuple(n for n in _OPERATIONS if n != "rotate" and not n.startswith(("shear", "shift")))


def apply_operation(
    name: str, x: Tensor, level: float, sign: int, height: int, width: int
) -> Tensor:
    """One of RandAugment's operations on frames (T, C, H, W); level 0 to 1, sign 1 or -1."""
    import torchvision.transforms.v2.functional as TF  # seconds, and only RandAugment needs it

    factor = 1 + 0.9 * level * sign
    if name == "auto_contrast":
        return TF.autocontrast(x)
    if name == "equalize":
        return TF.equalize(x)
    if name == "invert":
        return TF.invert(x)
    if name == "posterize":
        return TF.posterize(x, max(4 - int(4 * level), 1))
    if name == "solarize":
        return TF.solarize(x, 256 - 256 * level)
    if name == "solarize_add":  # brighten what is dark
        return torch.where(x < 128, (x.int() + int(110 * level)).clamp(max=255).to(torch.uint8), x)
    if name == "colour":
        return TF.adjust_saturation(x, factor)
    if name == "contrast":
        return TF.adjust_contrast(x, factor)
    if name == "brightness":
        return TF.adjust_brightness(x, factor)
    if name == "sharpness":
        return TF.adjust_sharpness(x, factor)
    angle, shift, shear = 0.0, [0, 0], [0.0, 0.0]
    if name == "rotate":
        angle = 30 * level * sign
    elif name.startswith("shift"):
        shift["xy".index(name[-1])] = round(
            0.45 * level * sign * (width if name[-1] == "x" else height)
        )
    else:
        shear["xy".index(name[-1])] = float(np.degrees(np.arctan(0.3 * level * sign)))
    bilinear = TF.InterpolationMode.BILINEAR
    return TF.affine(x, angle, shift, 1.0, shear, interpolation=bilinear, fill=_GREY)


def random_erase(clip: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Replace one box of a clip by noise, and its motion by none, the same box in every frame.

    Zhong et al. 2020, https://arxiv.org/abs/1708.04896: 2 to 33 per cent of the picture, sides at
    most 3.3 to 1.
    """
    pictures = {name: clip[name] for name in ("rgb", "flow") if name in clip}
    if not pictures:
        return clip
    height, width = next(iter(pictures.values())).shape[-2:]
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            clip = dict(clip)
            for name, part in pictures.items():
                clip[name] = part.clone()
                hole = clip[name][:, :, top : top + h, left : left + w]
                if name == "flow":
                    hole.fill_(FLOW_ZERO)
                else:
                    noise = rng.normal(118, 58, hole.shape).clip(0, 255).astype(np.uint8)
                    hole.copy_(torch.from_numpy(noise))
            break
    return clip
