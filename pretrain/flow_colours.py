"""Optical flow in colours: the direction is the hue, the speed the saturation."""

import numpy as np


def full_colour(flow: np.ndarray) -> float:
    """The speed in flow (T, 2, H, W) that one pixel in a hundred exceeds; 1 where nothing moves."""
    return float(np.quantile(np.hypot(flow[:, 0], flow[:, 1]), 0.99)) or 1.0


def draw_flow(flow: np.ndarray, most: float) -> np.ndarray:
    """Flow as pictures, in the manner of Baker et al. 2011 (https://doi.org/10.1007/s11263-010-0390-2).

    What rests is white. Motion to the right is red, down yellow green, left cyan, up violet.

    Args:
        flow: (T, 2, H, W), pixels to the right and down.
        most: pixels at which colours are full, such as `full_colour`.

    Returns:
        uint8 (T, H, W, 3).
    """
    from matplotlib.colors import hsv_to_rgb

    speed = np.hypot(flow[:, 0], flow[:, 1])
    hue = np.arctan2(flow[:, 1], flow[:, 0]) / (2 * np.pi) % 1
    strength = np.clip(speed / most, 0, 1)
    colours = hsv_to_rgb(np.stack([hue, strength, np.ones_like(hue)], -1))
    return np.rint(colours * 255).astype(np.uint8)
