"""The scenes of the synthetic dataset: drawn backdrops, objects in them, passing distractors."""

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.drawing import Part
from pretrain.data.figure import rotation

PLACES = ("kitchen", "living room", "office", "street", "park", "gym", "beach")


class _Brush:
    """PIL drawing in metres, y down, (0, 0) in the middle of the canvas.

    Args:
        metres: width and height of the canvas.
        density: pixels per metre.
        colour: of the canvas.
        edge: y where the wall meets the floor.
        rng: all random numbers come from it; their order decides every pixel.
    """

    def __init__(
        self,
        metres: float,
        density: float,
        colour: np.ndarray,
        edge: float,
        rng: np.random.Generator,
    ):
        self.size, self.density = round(metres * density), density
        self.half, self.edge, self.rng = metres / 2, edge, rng
        self.image = Image.new("RGB", (self.size, self.size), _ints(colour))
        self.pen = ImageDraw.Draw(self.image)

    def tone(self, base, spread=30) -> np.ndarray:
        return _tone(self.rng, base, spread)

    def spots(self, num: int) -> np.ndarray:
        """Random x of so many objects, from left to right."""
        return np.sort(self.rng.uniform(-self.half, self.half, num))

    def xy(self, *values: float) -> list[float]:
        return [v * self.density + self.size / 2 for v in values]

    def box(self, x0, y0, x1, y1, colour, outline=None):
        outline = None if outline is None else _ints(outline)
        self.pen.rectangle(self.xy(x0, y0, x1, y1), fill=_ints(colour), outline=outline)

    def blob(self, x, y, rx, ry, colour):
        self.pen.ellipse(self.xy(x - rx, y - ry, x + rx, y + ry), fill=_ints(colour))

    def line(self, x0, y0, x1, y1, colour, width=0.02):
        pixels = max(1, round(width * self.density))
        self.pen.line(self.xy(x0, y0, x1, y1), fill=_ints(colour), width=pixels)


def _ints(colour) -> tuple[int, ...]:
    return tuple(int(c) for c in np.clip(colour, 0, 255))


def _tone(rng: np.random.Generator, base, spread: float) -> np.ndarray:
    """A random colour near `base`."""
    light, hue = rng.normal(0, spread / 2), rng.normal(0, spread / 2, 3)
    return np.clip(np.asarray(base) + light + hue, 10, 245)


def paint_place(number: int, metres: float, density: float, tilt: float) -> np.ndarray:
    """The backdrop of place `number`, float32 (N, N, 3), N = metres * density, origin central.

    `PLACES[number % len(PLACES)]` is its kind. The floor starts a metre or so behind the figure,
    which a camera looking down by `tilt` radians sees above the figure's feet.
    """
    rng = np.random.default_rng([number, 78])
    kind = PLACES[number % len(PLACES)]
    walls = {"street": (150, 160, 175), "park": (150, 190, 225), "beach": (160, 200, 230)}
    wall = _tone(rng, walls.get(kind, (165, 160, 150)), 30 if kind in walls else 70)
    edge = -rng.uniform(0.9, 2.2) * np.sin(tilt)
    brush = _Brush(metres, density, wall, edge, rng)
    if kind == "street":
        _houses(brush)
    elif kind == "park":
        _trees(brush)
    elif kind == "beach":
        _sea(brush)
    else:
        _wallpaper(brush, wall)
        _windows(brush)
        _furniture(brush, kind)
    _floor(brush, kind, kind in walls, tilt)
    return np.asarray(brush.image, np.float32) + _grain(rng, brush.size)


def _houses(brush: _Brush) -> None:
    rng, edge = brush.rng, brush.edge
    x = -brush.half
    while x < brush.half:
        width, top = rng.uniform(0.7, 1.5), -rng.uniform(1.3, 2.6)
        brush.box(x, top, x + width, edge, brush.tone((140, 110, 95), 60))
        for wx in np.arange(x + 0.12, x + width - 0.15, 0.3):
            for wy in np.arange(top + 0.15, edge - 0.3, 0.4):
                brush.box(wx, wy, wx + 0.16, wy + 0.22, brush.tone((70, 80, 95), 50))
        x += width


def _trees(brush: _Brush) -> None:
    rng, edge = brush.rng, brush.edge
    brush.box(-brush.half, edge - 0.35, brush.half, edge, brush.tone((70, 120, 60)))
    for x in brush.spots(5):
        brush.line(x, edge - 1.2, x, edge, brush.tone((90, 65, 45)), 0.12)
        for _ in range(7):
            dx, dy, radius = rng.normal(0, 0.3), rng.normal(0, 0.25), rng.uniform(0.15, 0.35)
            leaves = brush.tone((60, 125, 50), 50)
            brush.blob(x + dx, edge - 1.4 + dy, radius, radius, leaves)


def _sea(brush: _Brush) -> None:
    edge, half = brush.edge, brush.half
    brush.box(-half, edge - 0.5, half, edge, brush.tone((50, 110, 160)))
    for y in np.arange(edge - 0.5, edge, 0.08):
        brush.line(-half, y, half, y, brush.tone((80, 140, 185), 40), 0.02)
    for x in brush.spots(2):
        brush.blob(x, edge - 1.8, 0.5, 0.12, (240, 240, 245))


def _wallpaper(brush: _Brush, wall: np.ndarray) -> None:
    """Stripes, tiles, bricks or dots."""
    edge, half = brush.edge, brush.half
    style = brush.rng.integers(4)
    step = brush.rng.uniform(0.12, 0.4)
    other = brush.tone(wall, 40)
    for i, a in enumerate(np.arange(-half, half, step)):
        if style == 0:  # stripes
            brush.box(a, -half, a + step / 2, edge, other)
        elif style == 1:  # tiles
            brush.line(a, -half, a, edge, other, 0.025)
            brush.line(-half, a, half, a, other, 0.025)
        elif style == 2:  # bricks
            brush.line(-half, a, half, a, other, 0.03)
            for b in np.arange(-half + step * (i % 2), half, 2 * step):
                brush.line(b, a, b, a + step, other, 0.03)
        else:  # dots
            for b in np.arange(-half, half, step):
                brush.blob(b, a, step / 5, step / 5, other)


def _windows(brush: _Brush) -> None:
    """Windows, or pictures on the wall."""
    rng = brush.rng
    for x in brush.spots(int(rng.integers(2, 6))):
        width, height = rng.uniform(0.25, 0.7), rng.uniform(0.25, 0.8)
        y = rng.uniform(-1.9, -0.8)
        top, bottom = y - height / 2, y + height / 2
        brush.box(x, top, x + width, bottom, brush.tone((120, 90, 70), 80))
        pane = brush.tone((170, 200, 220) if rng.random() < 0.5 else (120, 120, 120), 120)
        brush.box(x + 0.04, top + 0.04, x + width - 0.04, bottom - 0.04, pane)


def _furniture(brush: _Brush, kind: str) -> None:
    edge, half = brush.edge, brush.half
    if kind == "kitchen":
        top = brush.tone((200, 195, 185), 60)
        for x in np.arange(-half, half, 0.5):
            brush.box(x, edge - 0.75, x + 0.48, edge, top, brush.tone((90, 80, 70)))
    elif kind == "office":
        for x in brush.spots(3):
            brush.box(x, edge - 1.3, x + 0.6, edge, brush.tone((110, 90, 75), 60))
            for y in np.arange(edge - 1.25, edge, 0.26):
                for b in np.arange(x + 0.03, x + 0.55, 0.08):
                    brush.box(b, y, b + 0.06, y + 0.2, brush.tone((130, 110, 110), 150))
    elif kind == "gym":
        for y in np.arange(edge - 1.8, edge, 0.16):
            brush.line(-half, y, half, y, brush.tone((190, 140, 85)), 0.05)
    else:  # a sofa and a lamp
        x = brush.rng.uniform(-half, half / 2)
        sofa = brush.tone((130, 90, 90), 120)
        brush.box(x, edge - 0.5, x + 1.2, edge + 0.05, sofa, (40, 35, 35))
        brush.line(-x, edge - 1.4, -x, edge, (60, 55, 50), 0.04)
        brush.blob(-x, edge - 1.4, 0.2, 0.15, (240, 225, 170))


def _floor(brush: _Brush, kind: str, outdoor: bool, tilt: float) -> None:
    rng, edge, half = brush.rng, brush.edge, brush.half
    colours = {
        "street": (110, 110, 112),
        "park": (95, 145, 70),
        "beach": (215, 195, 150),
        "gym": (180, 140, 90),
    }
    floor = brush.tone(colours.get(kind, (140, 115, 90)), 30 if outdoor else 60)
    brush.box(-half, edge, half, half, floor)
    lines = brush.tone(floor, 35)
    if outdoor:
        for _ in range(160):
            x, y = rng.uniform(-half, half), rng.uniform(edge, edge + 1.6)
            rx, ry = rng.uniform(0.02, 0.12), rng.uniform(0.01, 0.03)
            brush.blob(x, y, rx, ry, brush.tone(floor, 35))
        return
    squash = max(np.sin(tilt), 0.1)
    for y in np.arange(edge, half, rng.uniform(0.25, 0.5) * squash):
        brush.line(-half, y, half, y, lines, 0.02)
    for x in np.arange(-half, half, rng.uniform(0.2, 0.6)):
        brush.line(x, edge, x, half, lines, 0.02)


def _grain(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise, float32 (size, size, 3)."""
    coarse = rng.normal(0, 7, (24, 24, 1)) + rng.normal(0, 3, (24, 24, 3))
    channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(coarse, 2, 0)]
    smooth = [c.resize((size, size), Image.Resampling.BICUBIC) for c in channels]
    return np.stack([np.asarray(c) for c in smooth], -1)


def look_at(canvas: np.ndarray, density: float, camera: np.ndarray, size: int) -> np.ndarray:
    """What each camera (T, 3) sees of a canvas: float32 (T, size, size, 3), bilinear."""
    side = len(canvas)
    grid = np.arange(size)
    out = np.empty((len(camera), size, size, 3), np.float32)
    for t, (scale, u0, v0) in enumerate(camera):
        u, v = (
            np.clip((grid - o) / scale * density + side / 2 - 0.5, 0, side - 1.001)
            for o in (u0, v0)
        )
        iu, iv = u.astype(int), v.astype(int)
        fu, fv = (
            (u - iu).astype(np.float32)[None, :, None],
            (v - iv).astype(np.float32)[:, None, None],
        )
        rows = canvas[iv] * (1 - fv) + canvas[iv + 1] * fv
        out[t] = rows[:, iu] * (1 - fu) + rows[:, iu + 1] * fu
    return out


# ----------------------------------------------------------------------------- what stands about


def dress(rng: np.random.Generator, frames: int, fps: int, body_to_stage: np.ndarray) -> list[Part]:
    """Distractors unrelated to the action: objects in front and beside, something passing by."""
    parts = []

    def add(shape, at, offset, size, colours, pattern="plain", turn=None):
        at = np.broadcast_to(np.asarray(at, float) + offset, (frames, 3))
        turn = np.broadcast_to(np.eye(3) if turn is None else turn, (frames, 3, 3))
        turn = body_to_stage.T @ turn
        parts.append(Part(shape, at @ body_to_stage, turn, size, colours, pattern))

    def colour():
        return tuple(float(c) for c in np.clip(rng.normal(130, 55, 3), 25, 235))

    uniform = rng.uniform
    if rng.random() < 0.12:  # a crate or bench between viewer and figure
        half = (uniform(0.12, 0.35), uniform(0.1, 0.24), uniform(0.08, 0.15))
        turn = rotation(1, uniform(-0.6, 0.6))
        add(
            "box", (uniform(-0.6, 0.6), half[1], uniform(0.6, 0.9)), 0, half, (colour(),), turn=turn
        )
    if rng.random() < 0.35:  # furniture beside
        x = uniform(0.75, 1.2) * rng.choice((-1, 1))
        if rng.random() < 0.5:
            half = (uniform(0.15, 0.3), uniform(0.2, 0.6), uniform(0.15, 0.25))
            turn = rotation(1, uniform(-0.6, 0.6))
            add("box", (x, half[1], uniform(-1, 0.2)), 0, half, (colour(), colour()), "front", turn)
        else:
            at, leaf = np.array((x, 0, uniform(-1, 0.3))), (50, uniform(90, 150), 60)
            add("capsule", at, (0, 0.06, 0), (0.2, 0.11), (colour(),))
            for _ in range(3):
                spot = (uniform(-0.12, 0.12), uniform(0.4, 0.85), uniform(-0.1, 0.1))
                add("ellipsoid", at, spot, (0.16, uniform(0.12, 0.25), 0.16), (leaf,))
    if rng.random() < 0.15:  # something passes by
        t = np.arange(frames) / fps
        speed, heading = uniform(0.3, 1.3), rng.choice((-1, 1))
        x = heading * speed * (t - t.mean()) + uniform(-0.6, 0.6)
        z = rng.choice((-0.7, 0.75))
        if rng.random() < 0.5:  # a ball, rolling or bouncing
            radius, height = uniform(0.08, 0.15), rng.choice((0, uniform(0.2, 0.8)))
            y = radius + height * np.abs(np.sin(np.pi * (uniform() + uniform(0.8, 1.5) * t)))
            at = np.stack([x, y, np.full(frames, z)], 1)
            spin = rotation(2, -(x - x[0]) / radius)
            add("ellipsoid", at, 0, (radius,) * 3, (colour(), colour()), "ball", spin)
        else:  # a cat
            fur = (colour(),)
            at = np.stack([x, 0.24 + 0.015 * np.sin(12 * t), np.full(frames, z)], 1)
            lying = rotation(2, -heading * np.pi / 2)
            add("capsule", at, 0, (0.28, 0.08), fur, turn=lying)
            add("ellipsoid", at, (0.36 * heading, 0.09, 0), (0.09, 0.08, 0.08), fur)
            add(
                "capsule",
                at,
                (-0.07 * heading, 0.02, 0),
                (0.2, 0.022),
                fur,
                turn=rotation(2, heading * 0.5),
            )
            for k, dx in enumerate((0.0, 0.05, 0.24, 0.29)):
                swing = rotation(2, np.pi + 0.5 * np.sin(11 * t + 2.2 * k))
                add("capsule", at, (heading * dx, -0.03, 0), (0.17, 0.025), fur, turn=swing)
    return parts


def cast_shadow(backdrop: np.ndarray, root: np.ndarray, camera: np.ndarray, tilt: float) -> None:
    """Darken the floor under the figure, in place; a shadow is no surface and has no flow."""
    grid = np.arange(backdrop.shape[1])
    u = (grid - camera[:, 1:2]) / camera[:, :1] - root[:, :1]
    v = (grid - camera[:, 2:]) / camera[:, :1] - root[:, 1:2]
    across = np.exp(-((u / 0.3) ** 2))[:, None, :]
    down = np.exp(-((v / (0.3 * np.sin(tilt) + 0.03)) ** 2))[:, :, None]
    backdrop *= (1 - 0.45 * across * down)[..., None].astype(np.float32)
