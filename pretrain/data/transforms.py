"""Augmentations that treat a clip as one thing: every frame gets the same."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_RULE = re.compile(r"n(\d+)-m(\d+(?:\.\d+)?)")
_GREY = [128, 128, 128]  # what turned and shifted pictures leave free


@dataclass(frozen=True)
class Augment:
    """Augmentation of a training clip: RandAugment before its crop, as VideoMAE is fine-tuned, the rest after it.

    Attributes:
        flip: mirror half of the clips left to right; not for texts or classes that know left from right.
        colour: strength of random brightness, contrast and colour balance, each by up to this fraction; 0: none.
        rand_augment: "" or "nN-mM": N of RandAugment's operations at magnitude M of 10.
        erase: fraction of the clips of which one box is replaced by noise, in all frames alike.
        jitter: fraction of the clips whose frames are coloured otherwise, each by itself, see `jitter_colours`.
        grey: fraction of the clips that become grey.

    Raises:
        ValueError: a strength or fraction outside 0 to 1, or another rule.
    """

    flip: bool = False
    colour: float = 0.0
    rand_augment: str = ""
    erase: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0

    def __post_init__(self):
        for name in ("colour", "erase", "jitter", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 1")
        if self.rand_augment and not _RULE.fullmatch(self.rand_augment):
            raise ValueError(
                f"rand_augment {self.rand_augment!r} is not of the form n4-m7: how many operations, and how strong of 10"
            )

    def before_crop(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment whole frames, uint8 (T, H, W, C), as they were decoded; all randomness comes from `rng`."""
        if not (rule := _RULE.fullmatch(self.rand_augment)):  # none is asked for
            return frames
        num, magnitude = rule.groups()
        clip = rand_augment(frames.permute(3, 0, 1, 2), int(num), float(magnitude), rng)
        return clip.permute(1, 2, 3, 0)

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Augment one cropped clip, uint8 (C, T, H, W); all randomness comes from `rng`."""
        if self.flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if self.colour:
            low, high = 1 - self.colour, 1 + self.colour
            contrast = rng.uniform(low, high) * rng.uniform(
                low, high, 3
            )  # of all, and of each channel
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
        if self.erase and rng.random() < self.erase:
            clip = random_erase(clip, rng)
        return clip.contiguous()


def jitter_colours(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of a clip, uint8 (C, T, H, W), of every frame by itself.

    torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1) on one frame after the other, as ViFi-CLIP has it: its frames flicker.
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
    """A clip, uint8 (C, T, H, W), in shades of grey, by ITU-R 601's weights of red, green and blue."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
    grey = (clip.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    return grey.expand_as(clip)


def rand_augment(clip: Tensor, num: int, magnitude: float, rng: np.random.Generator) -> Tensor:
    """Apply `num` random operations, the same to every frame (Cubuk et al. 2020, https://arxiv.org/abs/1909.13719).

    The operations and their ranges are those of timm's "increasing" set, with which VideoMAE is fine-tuned: each is
    left out half of the time, and magnitudes vary around `magnitude` with standard deviation 0.5.

    Args:
        clip: uint8 (C, T, H, W).
        num: operations, drawn with replacement.
        magnitude: 0 to 10.
        rng: of all choices.
    """
    frames = clip.transpose(0, 1)  # (T, C, H, W), as torchvision takes many pictures
    height, width = frames.shape[-2:]
    for name in rng.choice(_OPERATIONS, num):
        level = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            continue
        frames = apply_operation(str(name), frames, level, sign, height, width)
    return frames.transpose(0, 1)


_OPERATIONS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "colour", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "shift_x", "shift_y",
)  # fmt: skip


def apply_operation(
    name: str, x: Tensor, level: float, sign: int, height: int, width: int
) -> Tensor:
    """One of RandAugment's operations, by name, on frames (T, C, H, W); level 0 to 1, sign 1 or -1."""
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


def random_erase(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """Replace one box of a clip, uint8 (C, T, H, W), by noise, the same box in every frame.

    Zhong et al. 2020, https://arxiv.org/abs/1708.04896: 2 to 33 per cent of the picture, sides at most 3.3 to 1.
    """
    height, width = clip.shape[-2:]
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.normal(118, 58, (*clip.shape[:2], h, w)).clip(0, 255).astype(np.uint8)
            clip = clip.clone()
            clip[:, :, top : top + h, left : left + w] = torch.from_numpy(noise)
            break
    return clip
