"""The figure of the synthetic dataset: its body, how it moves, and the things it handles.

Everything here is geometry in *body axes*: metres, x to the figure's left, y up, z where it faces,
origin on the floor between its feet. Nothing here knows of pixels. A motion is a law of time written
out as arrays with a leading T; hands and feet follow targets by two-bone inverse kinematics, so bone
lengths never change and every part moves rigidly, which is what makes the optical flow exact.
"""

from dataclasses import dataclass

import numpy as np

# What each action is the time reversal of. The motion of the second of a pair *is* the motion of the
# first played backwards (same seed, same poses), so no single frame distinguishes the two.
REVERSED_PAIRS = (
    ("sit_down", "stand_up"),
    ("pick_up", "put_down"),
    ("put_on", "take_off"),
    ("open", "close"),
)
ACTIONS = (
    *(name for pair in REVERSED_PAIRS for name in pair),
    *("nod", "shake_head", "drink", "answer_phone", "wave", "clap", "stir", "walk", "jog", "jump"),
)
JOINTS = (
    *("pelvis", "spine", "neck", "head"),
    *("left_shoulder", "left_elbow", "left_wrist", "left_hand"),
    *("right_shoulder", "right_elbow", "right_wrist", "right_hand"),
    *("left_hip", "left_knee", "left_ankle", "left_toe"),
    *("right_hip", "right_knee", "right_ankle", "right_toe"),
)
_FORWARD = {second: first for first, second in REVERSED_PAIRS}
_CAN_BE_SEATED = ("nod", "shake_head", "drink", "answer_phone", "wave", "clap", "stir", "put_on")
_CAN_CARRY_BOX = ("nod", "shake_head", "walk", "jog", "jump", "sit_down")
_USES_OFF_HAND = ("clap", "jog", "jump", "pick_up")
_UPPER_ARM, _FOREARM, _HAND, _THIGH, _SHIN, _ANKLE = 0.28, 0.25, 0.08, 0.41, 0.40, 0.07
_SEAT = (0.47, -0.34)  # height and depth of the chair's seat

SKINS = ((244, 208, 177), (224, 172, 135), (198, 134, 94), (141, 88, 60), (92, 58, 44))
HAIRS = ((35, 28, 26), (84, 56, 36), (150, 98, 48), (214, 178, 106), (150, 150, 150), (140, 52, 30))
COLOURS = {
    "red": (200, 45, 45),
    "blue": (50, 85, 190),
    "green": (50, 140, 70),
    "yellow": (225, 190, 50),
    "white": (232, 232, 228),
    "black": (38, 38, 44),
    "purple": (125, 65, 155),
    "orange": (230, 125, 40),
    "grey": (130, 132, 138),
    "pink": (228, 140, 168),
}


@dataclass(frozen=True)
class Person:
    """What one person looks like; the numbers are proportions, about 1."""

    noun: str
    shirt: str
    trousers: str
    legs: float
    trunk: float
    arms: float
    head: float
    build: float
    skin: tuple[int, ...]
    hair: tuple[int, ...]
    long_hair: bool
    long_sleeves: bool
    striped: str | None


def make_person(number: int) -> Person:
    """Draws the looks of person `number`, always the same."""
    rng = np.random.default_rng([number, 77])
    noun = str(rng.choice(["man", "woman"]))
    shirt, trousers, second = (str(c) for c in rng.choice(list(COLOURS), 3, replace=False))
    return Person(
        noun=noun,
        shirt=shirt,
        trousers=trousers,
        legs=float(rng.uniform(0.9, 1.1)),
        trunk=float(rng.uniform(0.9, 1.1)),
        arms=float(rng.uniform(0.95, 1.08)),
        head=float(rng.uniform(0.9, 1.1)),
        build=float(rng.uniform(0.85, 1.25)),
        skin=SKINS[rng.integers(len(SKINS))],
        hair=HAIRS[rng.integers(len(HAIRS))],
        long_hair=bool(rng.random() < (0.75 if noun == "woman" else 0.1)),
        long_sleeves=bool(rng.random() < 0.5),
        striped=second if rng.random() < 0.35 else None,
    )


# ----------------------------------------------------------------------------- small geometry


def rotation(axis: int, angle: np.ndarray | float) -> np.ndarray:
    """Rotation matrices (..., 3, 3) by `angle` (...) radians about axis 0, 1 or 2."""
    angle = np.asarray(angle, float)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out = np.zeros((*angle.shape, 3, 3))
    out[..., axis, axis] = 1
    out[..., i, i] = out[..., j, j] = np.cos(angle)
    out[..., j, i] = np.sin(angle)
    out[..., i, j] = -out[..., j, i]
    return out


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _vec(x, y, z) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*(np.asarray(c, float) for c in (x, y, z))), -1)


def _ease(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, smooth between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _mix(a, b, weight: np.ndarray) -> np.ndarray:
    return a + (b - a) * weight[..., None]


def _two_bones(start, target, first: float, second: float, pole):
    """Middle and end of a two-bone chain from `start` to (or towards) `target`, bent towards `pole`."""
    reach = target - start
    distance = np.linalg.norm(reach, axis=-1, keepdims=True)
    along = reach / distance
    distance = np.clip(distance, abs(first - second) + 0.05, (first + second) * 0.998)
    foot = (first**2 - second**2 + distance**2) / (2 * distance)
    bend = _unit(pole - (pole * along).sum(-1, keepdims=True) * along)
    middle = start + along * foot + bend * np.sqrt(np.maximum(first**2 - foot**2, 0))
    return middle, start + along * distance


# ----------------------------------------------------------------------------- motion


@dataclass(frozen=True)
class Pose:
    """A figure and what it handles through T frames, in body axes.

    `joints` (T, J, 3); `frames` the rotations (T, 3, 3) of pelvis, chest and head; `things` maps a
    prop's name to its origin (T, 3) and rotation (T, 3, 3).
    """

    joints: np.ndarray
    frames: dict[str, np.ndarray]
    things: dict[str, tuple[np.ndarray, np.ndarray]]


def make_pose(action: str, person: Person, seed: int, frames: int, fps: float, side: int) -> Pose:
    """Draws one performance of `action`: tempo, pauses, handedness, amplitude, posture and props.

    A reversed action is its partner's performance of the same seed with the time axis flipped.
    `side` (+1 or -1) is the side of the figure, +1 its left, where the cupboard stands.
    """
    pose = _perform(_FORWARD.get(action, action), person, seed, frames, fps, side)
    if action not in _FORWARD:
        return pose
    return Pose(
        pose.joints[::-1],
        {name: r[::-1] for name, r in pose.frames.items()},
        {name: (o[::-1], r[::-1]) for name, (o, r) in pose.things.items()},
    )


def _perform(action: str, person: Person, seed: int, frames: int, fps: float, side: int) -> Pose:
    rng = np.random.default_rng([seed, 1])
    uniform = rng.uniform
    t = np.arange(frames) / fps
    total = frames / fps
    still = np.zeros(frames)
    upright = np.broadcast_to(np.eye(3), (frames, 3, 3))

    # One-shot actions run a progress 0 -> 1 with pauses at both ends. Cyclic ones run a phase (in
    # turns) under an envelope that may rise and fall within the clip.
    length = total * uniform(0.5, 0.85)
    begin = uniform(0, total - length)
    progress = np.clip((t - begin) / length, 0, 1) ** uniform(0.8, 1.25)
    there_and_back = _ease(np.minimum(progress, 1 - progress) / uniform(0.3, 0.42))
    tempo, turn0, size = uniform(0.8, 1.25), uniform(), uniform(0.7, 1.25)
    ramp = uniform(0.2, 0.35) * min(total, 2) / 2
    on = _ease((t - uniform(-0.4, 0.3) * total) / ramp) * _ease(
        (uniform(0.8, 1.5) * total - t) / ramp
    )
    lift = (
        on if uniform() < 0.5 else np.maximum(on, 0.999 * (on.max() > 0.5))
    )  # arms up throughout?

    def cycle(hertz: float) -> np.ndarray:
        return 2 * np.pi * (turn0 + hertz * tempo * t)

    def drift(amount: float) -> np.ndarray:
        slow, fast = (
            uniform(0.3, 1) * np.sin(2 * np.pi * (uniform() + uniform(0.1, 0.6) * t)) for _ in "ab"
        )
        return amount * (slow + fast)

    # Everything is drawn whether or not the action needs it, so two actions see the same stream.
    lead = int(uniform() < 0.35) if action != "open" else int(side < 0)  # which hand: 0 left
    off = 1 - lead
    seated = uniform() < 0.35 and action in _CAN_BE_SEATED
    carries = uniform() < 0.25 and action in _CAN_CARRY_BOX
    bowl = uniform() < (0.7 if action == "stir" else 0.3) and not carries
    bowl = bowl and action not in _USES_OFF_HAND
    wears_hat, holds, chair = uniform() < 0.35, uniform(), uniform() < 0.5
    floor_box, cupboard = uniform() < 0.35, uniform() < 0.3

    lean, twist, roll = drift(0.025) + uniform(-0.03, 0.08), drift(0.04), drift(0.02)
    nod, shake = drift(0.07) + uniform(-0.05, 0.15), drift(0.12)
    sit = progress if action == "sit_down" else still + seated
    sit = _ease(sit)
    crouch, hop, forward = still, still, still
    foot = [np.zeros((frames, 3)), np.zeros((frames, 3))]  # how far each ankle leaves its place

    # --- the trunk and the feet
    if action == "sit_down":
        lean = lean + uniform(0.35, 0.75) * np.sin(np.pi * sit)
    elif action == "pick_up":
        crouch = uniform(0.2, 0.42) * there_and_back
        lean = lean + (1.25 - 1.5 * (crouch.max() - 0.2)) * there_and_back
        nod = nod + 0.2 * there_and_back
    elif action == "nod":
        nod = nod + on * size * 0.32 * np.sin(cycle(1.7)) + 0.1 * on
    elif action == "shake_head":
        shake = shake + on * size * 0.5 * np.sin(cycle(1.7))
    elif action in ("drink", "answer_phone"):
        nod = nod - (0.35 if action == "drink" else -0.1) * there_and_back
    elif action in ("walk", "jog"):
        jog = action == "jog"
        phase = cycle(1.35 if jog else 0.95)
        forward = (0.0 if jog else uniform(0, 0.5)) * (t - total / 2)
        for k in (0, 1):
            c, s = np.cos(phase + np.pi * k), np.sin(phase + np.pi * k)
            up = np.maximum(s, 0) * on * size
            foot[k][:] = _vec(
                0, (0.24 if jog else 0.1) * up, (0.08 if jog else 0.24) * c * on * size
            )
            foot[k][:, 2] -= (0.18 if jog else 0.0) * up
        crouch = (0.06 if jog else 0.035) * on * (1 + np.cos(2 * phase + 0.5)) * size
        hop = 0.05 * on * np.maximum(np.cos(2 * phase), 0) if jog else still
        twist = twist + 0.15 * on * np.cos(phase)
        lean = lean + 0.08 * on
    elif action == "jump":
        q = (cycle(1.0) / (2 * np.pi)) % 1
        hop = on * size * 0.9 * np.where(q < 0.4, q * (0.4 - q) * 6.25, 0)
        crouch = on * size * 0.24 * np.where(q < 0.4, 0, np.sin(np.pi * (q - 0.4) / 0.6)) ** 2
        lean = lean + 1.5 * crouch

    thigh, shin = _THIGH * person.legs, _SHIN * person.legs
    root = _vec(
        drift(0.012), (thigh + shin) * 0.994 + _ANKLE + hop - crouch, drift(0.012) - 0.3 * crouch
    )
    root = _mix(root, _vec(0, _SEAT[0] + 0.1, _SEAT[1] + 0.06), sit)
    root[:, 2] += forward
    pelvis_r = rotation(1, twist * 0.3) @ rotation(0, lean * 0.4 - 0.1 * sit)
    chest_r = rotation(1, twist) @ rotation(0, lean) @ rotation(2, roll)
    head_r = rotation(1, twist + shake) @ rotation(0, lean * 0.6 + nod) @ rotation(2, roll)
    J = {"pelvis": root, "spine": root + pelvis_r @ (0, 0.13 * person.trunk, 0)}
    J["neck"] = J["spine"] + chest_r @ (0, 0.34 * person.trunk, 0)
    J["head"] = J["neck"] + head_r @ (0, 0.05 + 0.13 * person.head, 0.02)
    sign = (1.0, -1.0)
    shoulder = [J["neck"] + chest_r @ (sign[k] * 0.18, -0.04, 0) for k in (0, 1)]

    # --- where things stand
    things = {}
    box_floor = _vec(uniform(-0.15, 0.15), 0.13, uniform(0.34, 0.42)) + np.zeros((frames, 3))
    box_held = root + rotation(1, twist) @ (0, 0.22, 0.33)
    box_r = rotation(1, still + uniform(-0.2, 0.2))
    if action == "pick_up":
        things["box"] = (_mix(box_floor, box_held, _ease((progress - 0.5) / 0.4)), box_r)
    elif carries:
        things["box"] = (box_held, rotation(1, twist))
    elif floor_box:
        aside = uniform(0.25, 0.5) * rng.choice((-1, 1))
        things["box"] = (box_floor + _vec(aside, 0, uniform(-0.3, 0.2)), box_r)

    swing = uniform(0, 0.3), uniform(1.3, 2.0)
    if action == "open":
        angle = swing[0] * 0.3 + (swing[1] - swing[0] * 0.3) * _ease((progress - 0.28) / 0.44)
    else:
        angle = still + uniform(*swing)
    if action == "open" or cupboard:
        place = np.array([side * uniform(0.6, 0.7), uniform(0.9, 1.1), uniform(0.3, 0.42)])
        facing = rotation(1, still - side * uniform(1.9, 2.3))  # its front looks at the figure
        hinge = place + facing @ (0.22 * side, 0, 0.19)
        door_r = facing @ rotation(1, side * angle)
        things["cupboard"] = (place + np.zeros((frames, 3)), facing)
        things["door"] = (hinge, door_r)
        handle = hinge + door_r @ (-0.4 * side, 0.0, 0.05)
    if chair or seated or action == "sit_down":
        things["chair"] = (np.zeros((frames, 3)), upright)

    # --- the hands: at rest, or at a goal
    def at_head(x, y, z):
        goal = np.broadcast_to(_vec(x, y, z), (frames, 3))[..., None]
        return J["head"] + (head_r @ goal)[..., 0]

    def at_chest(x, y, z):
        goal = np.broadcast_to(_vec(x, y, z), (frames, 3))[..., None]
        return J["neck"] + (rotation(1, twist) @ rotation(0, lean * 0.5) @ goal)[..., 0]

    swingy = 0.0
    if action == "walk":
        swingy = 0.2 * size * on * np.cos(cycle(0.95))
    hand = []
    for k in (0, 1):
        hang = shoulder[k] + _vec(
            sign[k] * 0.07 + drift(0.01), -0.56, 0.07 + drift(0.015) - sign[k] * swingy
        )
        lap = root + _vec(sign[k] * 0.13, 0.11, 0.3)
        hand.append(_mix(hang, lap, sit))
    if bowl:
        hand[off] = at_chest(sign[off] * 0.06, -0.36, 0.3)

    outward = sign[lead]
    if action == "pick_up" or carries:
        reach = _ease(progress / 0.4) if action == "pick_up" else still + 1
        at, r = things["box"]
        for k in (0, 1):
            hand[k] = _mix(hand[k], at + r @ (sign[k] * 0.17, 0.0, 0), reach)
    elif action == "put_on":
        hand[lead] = _mix(hand[lead], at_head(outward * 0.12, 0.13, 0.05), there_and_back)
    elif action == "open":
        grip = _ease(progress / 0.26) * _ease((1 - progress) / 0.26)
        hand[lead] = _mix(hand[lead], handle, grip)
    elif action in ("drink", "answer_phone"):
        goal = (0.02, -0.06, 0.17) if action == "drink" else (0.16, -0.04, 0.05)
        goal = (outward * goal[0], *goal[1:])
        hand[lead] = _mix(hand[lead], at_head(*goal), there_and_back)
    elif action == "wave":
        side_to_side = 0.21 * size * np.sin(cycle(1.7)) * on
        up = uniform(0.1, 0.36)
        goal = at_chest(outward * (0.36 + side_to_side), up - 0.5 * np.abs(side_to_side), 0.16)
        hand[lead] = _mix(hand[lead], goal, lift)
    elif action == "clap":
        gap = 0.03 + 0.1 * size * (1 + np.sin(cycle(1.7)))
        height = uniform(-0.3, -0.05)
        for k in (0, 1):
            hand[k] = _mix(hand[k], at_chest(sign[k] * gap, height, 0.36), lift)
    elif action == "stir":
        a = cycle(1.5) * rng.choice((-1, 1))
        goal = at_chest(0.1 * size * np.cos(a) * on, -0.27, 0.33 + 0.1 * size * np.sin(a) * on)
        hand[lead] = _mix(hand[lead], goal, lift)
    elif action == "jog":
        for k in (0, 1):
            a = 0.16 * size * on * np.cos(cycle(1.35) + np.pi * (1 - k))
            hand[k] = _mix(hand[k], at_chest(sign[k] * 0.2, -0.3 + 0.5 * a, 0.22 + a), on)
    elif action == "jump":
        arms = 0.5 * size * uniform(0.3, 1) * (hop > 0) * hop / 0.2
        for k in (0, 1):
            hand[k] = _mix(hand[k], at_chest(sign[k] * 0.35, -0.1, 0.2), np.clip(arms, 0, 1))

    # --- bones
    level = rotation(1, twist)
    lower = (_FOREARM + _HAND) * person.arms
    for k, name in enumerate(("left", "right")):
        pole = level @ (sign[k] * 0.5, -0.6, -0.7)
        elbow, tip = _two_bones(shoulder[k], hand[k], _UPPER_ARM * person.arms, lower, pole)
        wrist = elbow + (tip - elbow) * (_FOREARM / (_FOREARM + _HAND))
        hip = root + pelvis_r @ (sign[k] * 0.1, -0.03, 0)
        ankle = _vec(sign[k] * 0.12, _ANKLE + hop, 0.06 * sit + forward) + foot[k]
        knee, ankle = _two_bones(hip, ankle, thigh, shin, level @ (sign[k] * 0.15, 0.1, 1))
        droop = 1.2 * np.maximum(foot[k][:, 1], 0) + 1.2 * hop
        toe = ankle + _vec(sign[k] * 0.05, -0.03 - 0.13 * np.sin(droop), 0.14 * np.cos(droop))
        toe = ankle + _unit(toe - ankle) * 0.15
        J |= {f"{name}_shoulder": shoulder[k], f"{name}_elbow": elbow, f"{name}_wrist": wrist}
        J |= {f"{name}_hand": tip, f"{name}_hip": hip, f"{name}_knee": knee}
        J |= {f"{name}_ankle": ankle, f"{name}_toe": toe}

    # --- what hands and head hold
    grip_r = [rotation(1, twist) @ rotation(0, 0.2 + lean), level][int(seated)]
    lead_hand = J[f"{('left', 'right')[lead]}_hand"]
    if bowl:
        things["bowl"] = (J[f"{('left', 'right')[off]}_hand"] + (0, 0.06, 0.03), level)
    if action == "put_on":
        tilt = rotation(0, -0.5 * (1 - there_and_back))
        on_head = J["head"] + head_r @ (0, 0.09 * person.head, 0)
        in_hand = lead_hand + head_r @ (-outward * 0.12, -0.04, -0.05)
        worn = progress[:, None] >= 0.5
        things["hat"] = (
            np.where(worn, on_head, in_hand),
            np.where(worn[..., None], head_r, head_r @ tilt),
        )
    else:
        if wears_hat:
            things["hat"] = (J["head"] + head_r @ (0, 0.09 * person.head, 0), head_r)
        needs = action in ("drink", "answer_phone", "stir")
        if (needs or holds < 0.4) and not carries and action not in ("pick_up", "clap", "open"):
            tip_up = 1.1 * there_and_back if action == "drink" else still
            name = "spoon" if action == "stir" else "cup"
            things[name] = (lead_hand, grip_r @ rotation(0, -tip_up))
    joints = np.stack([J[name] for name in JOINTS], 1)
    return Pose(joints, {"pelvis": pelvis_r, "chest": chest_r, "head": head_r}, things)
