"""Draws the solids of the synthetic dataset with a depth buffer, and their exact optical flow.

Camera axes are x right, y down, z away from the viewer, in metres. The projection is parallel with
a scale (weak perspective): `u = scale * x + u0`, `v = scale * y + v0`, pixel centres at whole
numbers. Scale and offset may change from frame to frame (zoom, pan, shake); the viewing direction
may not. Under it a static backdrop moves by a similarity and every solid's surface is found in
closed form.
"""

from dataclasses import dataclass

import numpy as np

from pretrain.data.figure import COLOURS, JOINTS, Person, Pose, rotation

_SUB = 3  # samples per pixel side; odd, so that one of them is the pixel's centre
_AMBIENT, _DIFFUSE = 0.52, 0.55


@dataclass(frozen=True)
class Part:
    """One rigid solid through time: a capsule, an ellipsoid or a box.

    `origin` (T, 3) and `rotation` (T, 3, 3) place its own axes. A capsule runs from the origin
    along its own y, `size` is (length, radius); the others are centred, `size` is the three
    half-sizes. `pattern` says where each of its one to three `colours` (0..255) goes: "plain",
    "bands" (capsule), "head", "ball" (ellipsoid) or "front" (box: the +z face has the second
    colour).
    """

    shape: str
    origin: np.ndarray
    rotation: np.ndarray
    size: tuple[float, ...]
    colours: tuple[tuple[float, ...], ...]
    pattern: str = "plain"


# ----------------------------------------------------------------------------- solids


def _along(direction: np.ndarray) -> np.ndarray:
    """Frames (T, L, 3, 3) whose y is the unit `direction` (T, L, 3), turning without twist.

    A limb's twist about its own axis cannot be seen, so we choose none: each frame is the one
    before it turned by the smallest rotation that takes the old direction to the new.
    """
    frames = np.empty((*direction.shape, 3))
    y = direction[0]
    x = np.cross(y, np.where(np.abs(y[:, 2:]) < 0.9, [0.0, 0, 1], [1.0, 0, 0]))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    frames[0] = np.stack([x, y, np.cross(x, y)], -1)
    old, new = direction[:-1], direction[1:]
    v = np.cross(old, new)
    skew = np.zeros((*v.shape, 3))
    skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0] = v[..., 0], v[..., 1], v[..., 2]
    skew -= np.swapaxes(skew, -1, -2)
    cosine = (old * new).sum(-1)[..., None, None]
    turn = np.eye(3) + skew + skew @ skew / np.maximum(1 + cosine, 1e-6)
    for t in range(len(turn)):
        frames[t + 1] = turn[t] @ frames[t]
    frames[..., 1] = direction  # to the last bit, so that played backwards it draws the same
    return frames


def figure_parts(pose: Pose, person: Person) -> list[Part]:
    """The person's solids: trunk, head, hair, limbs."""
    joint = {name: pose.joints[:, i] for i, name in enumerate(JOINTS)}
    pelvis, chest, head = (pose.frames[k] for k in ("pelvis", "chest", "head"))
    b = person.build
    shirt, trousers = COLOURS[person.shirt], COLOURS[person.trousers]
    sleeve = shirt if person.long_sleeves else person.skin
    shoe = tuple(0.45 * c for c in COLOURS[person.trousers])
    second = COLOURS[person.striped] if person.striped else shirt
    sideways = rotation(2, -np.pi / 2)  # turns a capsule's y to the figure's left

    def fixed(shape, at, r, offset, size, colours, pattern="plain", turn=None):
        return Part(shape, at + r @ offset, r if turn is None else r @ turn, size, colours, pattern)

    h = 0.145 * person.head
    parts = [
        fixed("capsule", joint["pelvis"], pelvis, (-0.06, 0.0, 0), (0.12, 0.115 * b), (trousers,),
              turn=sideways),
        fixed("capsule", joint["spine"], chest, (0, -0.05, 0), (0.3 * person.trunk, 0.125 * b),
              (shirt, second), "bands"),
        fixed("capsule", joint["neck"], chest, (-0.13, -0.06, 0), (0.26, 0.075 * b), (shirt,),
              turn=sideways),
        fixed("capsule", joint["neck"], head, (0, -0.02, 0), (0.1, 0.055), (person.skin,)),
        fixed("ellipsoid", joint["head"], head, (0, 0, 0), (h * 0.88, h * 1.08, h),
              (person.skin, person.hair, (25, 20, 20)), "head"),
        fixed("ellipsoid", joint["head"], head, (0, -0.01, h), (0.025, 0.03, 0.035),
              (tuple(0.9 * c for c in person.skin),)),
    ]  # fmt: skip
    if person.long_hair:
        parts.append(
            fixed(
                "ellipsoid",
                joint["head"],
                head,
                (0, -0.07, -0.07),
                (0.13, 0.19, 0.08),
                (person.hair,),
            )
        )
    limbs = []
    for side in ("left", "right"):
        limbs += [
            (f"{side}_shoulder", f"{side}_elbow", 0.056 * b, shirt),
            (f"{side}_elbow", f"{side}_wrist", 0.045 * b, sleeve),
            (f"{side}_wrist", f"{side}_hand", 0.052, person.skin),
            (f"{side}_hip", f"{side}_knee", 0.085 * b, trousers),
            (f"{side}_knee", f"{side}_ankle", 0.062 * b, trousers),
            (f"{side}_ankle", f"{side}_toe", 0.052, shoe),
        ]
    bone = np.stack([joint[end] - joint[start] for start, end, _, _ in limbs], 1)
    length = np.linalg.norm(bone, axis=-1)
    frames = _along(bone / length[..., None])
    for i, (start, _, radius, colour) in enumerate(limbs):
        size = (float(length[0, i]), radius)
        parts.append(Part("capsule", joint[start], frames[:, i], size, (colour,)))
    return parts


def thing_parts(pose: Pose, rng: np.random.Generator) -> list[Part]:
    """The solids of the props a pose handles or stands beside, in colours drawn from `rng`."""
    parts = []

    def add(name, shape, offset, size, colours, pattern="plain", turn=None):
        at, r = pose.things[name]
        turned = r if turn is None else r @ turn
        parts.append(Part(shape, at + r @ offset, turned, size, colours, pattern))

    def colour():
        return tuple(float(c) for c in np.clip(rng.normal(130, 60, 3), 25, 235))

    c = {name: colour() for name in ("box", "hat", "cup", "spoon", "bowl", "chair", "cupboard")}
    dark = {name: tuple(0.55 * v for v in value) for name, value in c.items()}
    if "box" in pose.things:
        add("box", "box", (0, 0, 0), (0.17, 0.13, 0.13), (c["box"], dark["box"]), "front")
    if "hat" in pose.things:
        add("hat", "ellipsoid", (0, 0.04, 0), (0.135, 0.11, 0.145), (c["hat"],))
        add("hat", "ellipsoid", (0, 0.0, 0.05), (0.18, 0.022, 0.21), (dark["hat"],))
    if "cup" in pose.things:
        add("cup", "capsule", (0, -0.02, 0.04), (0.09, 0.05), (c["cup"],))
    if "spoon" in pose.things:
        add("spoon", "capsule", (0, 0.02, 0.02), (0.2, 0.022), (c["spoon"],), turn=rotation(0, 2.6))
    if "bowl" in pose.things:
        add("bowl", "ellipsoid", (0, 0, 0.05), (0.15, 0.075, 0.15), (c["bowl"],))
    if "chair" in pose.things:
        wood = (c["chair"], dark["chair"])
        add("chair", "box", (0, 0.45, -0.36), (0.22, 0.025, 0.2), wood[:1])
        add("chair", "box", (0, 0.74, -0.57), (0.22, 0.26, 0.022), wood[1:])
        for x, z in ((-0.19, -0.54), (0.19, -0.54), (-0.19, -0.19), (0.19, -0.19)):
            add("chair", "capsule", (x, 0.02, z), (0.42, 0.02), wood[1:])
    if "cupboard" in pose.things:
        inside = tuple(0.25 * v for v in c["cupboard"])
        add("cupboard", "box", (0, 0, 0), (0.23, 0.42, 0.18), (dark["cupboard"], inside), "front")
        # The door's own origin is its hinge; which way it extends follows from the cupboard's side.
        side = np.sign(pose.things["cupboard"][0][0, 0])
        add("door", "box", (-0.22 * side, 0, 0.0), (0.22, 0.41, 0.014), (c["cupboard"],))
        add("door", "ellipsoid", (-0.4 * side, 0, 0.03), (0.03, 0.05, 0.03), (inside,))
    return parts


# ----------------------------------------------------------------------------- rasteriser


def _capsule(dx, dy, r, size, light):
    """Depth and shade of a capsule seen along z; dx (w,), dy (h, 1) are offsets from its origin."""
    length, radius = size
    axis = r[:, 1]
    flat = max(float(np.hypot(axis[0], axis[1])), 1e-4)
    ex, ey = axis[0] / flat, axis[1] / flat
    s = ex * dx + ey * dy  # along the projected axis, and across it
    d = ex * dy - ey * dx
    rest = radius * radius - d * d
    y = np.clip((s + axis[2] * np.sqrt(np.maximum(rest, 0))) / flat, 0, length)
    s -= y * flat
    depth = np.sqrt(rest - s * s)  # nan outside: such a sample is never nearer than anything
    lx, ly, lz = light / radius
    shade = (lx * ex + ly * ey) * s + (ly * ex - lx * ey) * d - lz * depth
    return y * axis[2] - depth, shade, y


def _ellipsoid(dx, dy, r, size, light):
    """As `_capsule`; the last value is the point on the unit sphere, (3, h, w)."""
    w = (r / np.asarray(size)).T.astype(np.float32)  # camera offset -> unit sphere
    g = w.T @ w
    a = g[2, 2]
    b = g[0, 2] * dx + g[1, 2] * dy
    c = g[0, 0] * dx * dx + 2 * g[0, 1] * dx * dy + g[1, 1] * dy * dy - 1
    z = -(b + np.sqrt(b * b - a * c)) / a
    n = [g[i, 0] * dx + g[i, 1] * dy + g[i, 2] * z for i in range(3)]
    norm = np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2])
    shade = (light[0] * n[0] + light[1] * n[1] + light[2] * n[2]) / norm
    return z, shade, lambda: [w[i, 0] * dx + w[i, 1] * dy + w[i, 2] * z for i in range(3)]


def _box(dx, dy, r, size, light):
    """As `_capsule`; the last value is the number of the axis whose face is seen."""
    near, far = [], []
    slope = np.where(np.abs(r[2]) < 1e-4, 1e-4, r[2])
    for i in range(3):
        middle = -(r[0, i] * dx + r[1, i] * dy) / slope[i]
        half = size[i] / abs(slope[i])
        near.append(middle - half)
        far.append(middle + half)
    face = (near[1] > near[0]).astype(np.uint8)
    z = np.maximum(near[0], near[1])
    face[near[2] > z] = 2
    z = np.maximum(z, near[2])
    z[z > np.minimum(np.minimum(far[0], far[1]), far[2])] = np.nan
    shade = (-np.sign(slope) * (light @ r)).astype(np.float32)[face]
    return z, shade, face


def _paint(part: Part, detail, slope) -> np.ndarray | int:
    """Which of the part's colours each sample has."""
    if part.pattern == "bands":
        return ((detail * 12).astype(np.uint8)) & 1
    if part.pattern == "head":
        x, y, z = detail()
        hair = (y > 0.42) | (z < -0.25 + 0.3 * y)
        eyes = (np.abs(np.abs(x) - 0.4) < 0.17) & (np.abs(y - 0.08) < 0.15) & (z > 0)
        return np.where(hair, 1, np.where(eyes, 2, 0)).astype(np.uint8)
    if part.pattern == "ball":
        x, y, _ = detail()
        return ((x > 0) ^ (y > 0)).astype(np.uint8)
    if part.pattern == "front":
        return ((detail == 2) & (slope < 0)).astype(np.uint8)
    return 0


_SHAPES = {"capsule": _capsule, "ellipsoid": _ellipsoid, "box": _box}


def draw(
    parts: list[Part], view: np.ndarray, camera: np.ndarray, backdrop: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw solids over a moving backdrop.

    Args:
        parts: solids in body axes over T frames.
        view: rotation (3, 3) from body axes to camera axes.
        camera: (T, 3), each row scale (pixels per metre), u0, v0.
        backdrop: float32 (T, size, size, 3) in 0..255, already seen by the camera.
        size: side of the square frames in pixels.

    Returns:
        Frames uint8 (T, size, size, 3) and forward flow float32 (T - 1, 2, size, size): where what
        is seen at a pixel's centre at t is at t + 1, less the pixel, as (u, v).
    """
    num = len(camera)
    light = np.array([-0.45, -0.7, -0.55])
    light = light / np.linalg.norm(light)
    origin = np.stack([p.origin for p in parts], 1) @ view.T  # (T, P, 3)
    rotate = view @ np.stack([np.broadcast_to(p.rotation, (num, 3, 3)) for p in parts], 1)
    low, high = _extent(parts, origin, rotate)
    scale, offset = camera[:, :1, None], camera[:, None, 1:]
    low = np.clip(np.floor((low * scale + offset + 0.5) * _SUB), 0, size * _SUB).astype(int)
    high = np.clip(np.ceil((high * scale + offset + 0.5) * _SUB), 0, size * _SUB).astype(int)

    # Colour 0 is nothing at all; part p has colours 3p+1 .. 3p+3, counted in a byte.
    assert 3 * len(parts) < 256, f"{len(parts)} parts are too many"
    palette = np.zeros((3 * len(parts) + 1, 3), np.float32)
    for i, part in enumerate(parts):
        for k in range(3):
            palette[3 * i + 1 + k] = part.colours[min(k, len(part.colours) - 1)]
    full = size * _SUB
    samples = (np.arange(full, dtype=np.float32) - (_SUB - 1) / 2) / _SUB  # in pixels
    frames = np.empty((num, size, size, 3), np.uint8)
    who = np.empty((num, size, size), np.uint8)
    depth = np.empty((num, size, size), np.float32)
    rotate32, origin32 = rotate.astype(np.float32), origin.astype(np.float32)
    light32 = light.astype(np.float32)
    with np.errstate(invalid="ignore"):
        for t in range(num):
            zbuf = np.full((full, full), np.inf, np.float32)
            shade = np.zeros((full, full), np.float32)
            paint = np.zeros((full, full), np.uint8)
            xs = (samples - np.float32(camera[t, 1])) / np.float32(camera[t, 0])
            ys = ((samples - np.float32(camera[t, 2])) / np.float32(camera[t, 0]))[:, None]
            for i, part in enumerate(parts):
                (x0, y0), (x1, y1) = low[t, i], high[t, i]
                if x1 <= x0 or y1 <= y0:
                    continue
                o, r = origin32[t, i], rotate32[t, i]
                window = (slice(y0, y1), slice(x0, x1))
                z, lit, detail = _SHAPES[part.shape](
                    xs[x0:x1] - o[0], ys[y0:y1] - o[1], r, part.size, light32
                )
                z += o[2]
                nearer = z < zbuf[window]
                colour = _paint(part, detail, r[2, 2])
                np.copyto(zbuf[window], z, where=nearer)
                np.copyto(shade[window], lit, where=nearer)
                np.copyto(paint[window], colour + np.uint8(3 * i + 1), where=nearer)
            x0, y0 = low[t].min(0) // _SUB
            x1, y1 = -(-high[t].max(0) // _SUB)
            _resolve(paint, shade, palette, backdrop[t], frames[t], (x0, y0, x1, y1))
            who[t] = paint[_SUB // 2 :: _SUB, _SUB // 2 :: _SUB]
            depth[t] = zbuf[_SUB // 2 :: _SUB, _SUB // 2 :: _SUB]
    return frames, _flow(who, depth, origin, rotate, camera)


def _extent(parts, origin, rotate):
    """Corners (T, P, 2) of each part's bounding rectangle in metres."""
    low, high = origin[..., :2].copy(), origin[..., :2].copy()
    for i, part in enumerate(parts):
        r = rotate[:, i, :2]
        if part.shape == "capsule":
            end = part.size[0] * r[..., 1]
            low[:, i] += np.minimum(end, 0) - part.size[1]
            high[:, i] += np.maximum(end, 0) + part.size[1]
        else:
            reach = np.abs(r * part.size)
            reach = reach.sum(-1) if part.shape == "box" else np.sqrt((reach**2).sum(-1))
            low[:, i] -= reach
            high[:, i] += reach
    return low, high


def _resolve(paint, shade, palette, backdrop, out, window):
    """Average samples to pixels and lay them over the backdrop."""
    x0, y0, x1, y1 = window
    box = (slice(y0 * _SUB, y1 * _SUB), slice(x0 * _SUB, x1 * _SUB))
    out[:] = backdrop
    paint = paint[box]
    bright = _AMBIENT + _DIFFUSE * np.maximum(shade[box], 0)
    layers = [palette[:, channel][paint] * bright for channel in range(3)]
    means = []
    for layer in (*layers, (paint > 0).astype(np.float32)):
        rows = layer[0::_SUB] + layer[1::_SUB] + layer[2::_SUB]
        means.append((rows[:, 0::_SUB] + rows[:, 1::_SUB] + rows[:, 2::_SUB]) / _SUB**2)
    colour = np.stack(means[:3], -1) + (1 - means[3][..., None]) * backdrop[y0:y1, x0:x1]
    out[y0:y1, x0:x1] = np.clip(colour, 0, 255)


def _flow(who, depth, origin, rotate, camera):
    """Flow of what each pixel's centre shows: its part's rigid motion, then the next camera."""
    size = who.shape[1]
    grid = np.arange(size)
    # A parallel camera sees the backdrop, whatever its depth, move by one similarity.
    ratio = camera[1:, :1] / camera[:-1, :1]
    shift = camera[1:, 1:] - ratio * camera[:-1, 1:]
    flow = np.empty((len(who) - 1, 2, size, size), np.float32)
    flow[:, 0] = (grid * (ratio - 1) + shift[:, :1])[:, None, :]
    flow[:, 1] = (grid * (ratio - 1) + shift[:, 1:])[:, :, None]
    turn = rotate[1:] @ np.swapaxes(rotate[:-1], -1, -2)
    move = origin[1:] - (turn @ origin[:-1, :, :, None])[..., 0]
    t, v, u = np.nonzero(who[:-1])
    part = (who[t, v, u] - 1) // 3
    scale, u0, v0 = camera[t].T
    point = np.stack([(u - u0) / scale, (v - v0) / scale, depth[t, v, u]], -1)
    there = (turn[t, part, :2] * point[:, None]).sum(-1) + move[t, part, :2]
    there = there * camera[t + 1, :1] + camera[t + 1, 1:]
    flow[t, 0, v, u] = there[:, 0] - u
    flow[t, 1, v, u] = there[:, 1] - v
    return flow
