"""The figure of the synthetic dataset: its body, its motion, and the props it handles.

All geometry is in *body axes*: metres, x to the figure's left, y up, z where it faces, origin on
the floor between its feet; `drawing.py` and `synthetic.py` make pixels of it. A motion is a set of
arrays over the T frames. Hands and feet follow targets by two-bone inverse kinematics, so bone
lengths never change and every part moves rigidly, which makes the optical flow exact.
"""

from dataclasses import dataclass

import numpy as np

# Actions that are each other's time reversal. The second of a pair *is* the first played backwards
# (same seed, same poses), so no single frame distinguishes the two.
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
_SIGN = (1.0, -1.0)  # of x on the left, on the right

Scalar = np.ndarray | float  # of each frame (T,), or of all
Things = dict[str, tuple[np.ndarray, np.ndarray]]

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
    """The appearance of a person; the numbers are proportions, about 1."""

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
    """Draw the appearance of person `number`, always the same."""
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
    """Middle and end of a two-bone chain from `start` towards `target`, bent towards `pole`.

    Args:
        start: (T, 3), the shoulder or hip.
        target: (T, 3); the chain ends there if it is long enough.
        first: length of the upper bone, metres.
        second: length of the lower bone.
        pole: (T, 3), the direction in which elbow or knee points.
    """
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
    """A figure and its props through T frames, in body axes.

    Attributes:
        joints: (T, J, 3), in the order of `JOINTS`.
        frames: rotations (T, 3, 3) of "pelvis", "chest" and "head".
        things: a prop's name -> its origin (T, 3) and rotation (T, 3, 3).
    """

    joints: np.ndarray
    frames: dict[str, np.ndarray]
    things: Things


def make_pose(action: str, person: Person, seed: int, frames: int, fps: float, side: int) -> Pose:
    """Draw one performance of `action`: tempo, pauses, handedness, amplitude, posture and props.

    A reversed action is its partner's performance of the same seed with the time axis flipped.

    Args:
        action: one of `ACTIONS`.
        person: who performs it.
        seed: of the performance.
        frames: T.
        fps: frames per second.
        side: of the figure where the cupboard stands, +1 its left, -1 its right.
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
    """One performance of an action that is not a reversed one, see `make_pose`.

    The order in which the parts draw from `rng` decides every pixel of the dataset.
    """
    rng = np.random.default_rng([seed, 1])
    timing = _draw_timing(rng, frames, fps)
    props = _draw_props(rng, action, side)
    posture = _draw_posture(rng, action, timing, props)
    _move_posture(rng, action, timing, posture)
    torso = _build_torso(rng, person, timing, posture)
    things = _place_things(rng, action, side, timing, props, torso)
    hands = _rest_hands(rng, action, timing, props, torso)
    _move_hands(rng, action, timing, props, torso, things, hands)
    joints = torso.joints | _limbs(person, torso, hands)
    things |= _held_things(action, person, timing, props, torso, joints)
    return Pose(np.stack([joints[name] for name in JOINTS], 1), torso.rotations, things)


@dataclass(frozen=True)
class _Timing:
    """When an action happens: arrays (T,) of times and of weights between 0 and 1.

    Attributes:
        t: seconds.
        total: length of the clip, seconds.
        progress: of a one-shot action, from 0 to 1 with pauses at both ends.
        there_and_back: of a one-shot action that returns: 0, 1, 0.
        tempo: of a cyclic action, about 1.
        phase: of a cyclic action at time 0, in turns.
        size: amplitude, about 1.
        on: envelope of a cyclic action, which may rise and fall within the clip.
        lift: envelope of its raised arms; some stay up throughout.
    """

    t: np.ndarray
    total: float
    progress: np.ndarray
    there_and_back: np.ndarray
    tempo: float
    phase: float
    size: float
    on: np.ndarray
    lift: np.ndarray

    @property
    def zeros(self) -> np.ndarray:
        """Zero at every time."""
        return np.zeros(len(self.t))

    def cycle(self, hertz: float) -> np.ndarray:
        """The angle of a cyclic action, radians."""
        return 2 * np.pi * (self.phase + hertz * self.tempo * self.t)


def _draw_timing(rng: np.random.Generator, frames: int, fps: float) -> _Timing:
    uniform = rng.uniform
    t = np.arange(frames) / fps
    total = frames / fps
    length = total * uniform(0.5, 0.85)
    begin = uniform(0, total - length)
    progress = np.clip((t - begin) / length, 0, 1) ** uniform(0.8, 1.25)
    there_and_back = _ease(np.minimum(progress, 1 - progress) / uniform(0.3, 0.42))
    tempo, phase, size = uniform(0.8, 1.25), uniform(), uniform(0.7, 1.25)
    ramp = uniform(0.2, 0.35) * min(total, 2) / 2
    rise = _ease((t - uniform(-0.4, 0.3) * total) / ramp)
    on = rise * _ease((uniform(0.8, 1.5) * total - t) / ramp)
    lift = on if uniform() < 0.5 else np.maximum(on, 0.999 * (on.max() > 0.5))
    return _Timing(t, total, progress, there_and_back, tempo, phase, size, on, lift)


def _drift(rng: np.random.Generator, amount: float, t: np.ndarray) -> np.ndarray:
    """A slow random sway (T,) of about `amount`: nobody stands quite still."""
    slow, fast = (
        rng.uniform(0.3, 1) * np.sin(2 * np.pi * (rng.uniform() + rng.uniform(0.1, 0.6) * t))
        for _ in range(2)
    )
    return amount * (slow + fast)


@dataclass(frozen=True)
class _Props:
    """The hands' roles and the things in a clip.

    Attributes:
        lead: the hand that acts, 0 left, 1 right.
        seated: whether the figure sits throughout.
        carries: whether it carries the box throughout.
        bowl: whether the other hand holds a bowl.
        hat: whether it wears a hat throughout.
        holds: whether the leading hand holds something that the action does not need.
        chair: whether there is a chair.
        floor_box: whether a box stands on the floor.
        cupboard: whether there is a cupboard.
    """

    lead: int
    seated: bool
    carries: bool
    bowl: bool
    hat: bool
    holds: bool
    chair: bool
    floor_box: bool
    cupboard: bool

    @property
    def off(self) -> int:
        """The hand that does not act."""
        return 1 - self.lead


def _draw_props(rng: np.random.Generator, action: str, side: int) -> _Props:
    """Drawn whether or not the action needs them, so that things say little about the action."""
    uniform = rng.uniform
    lead = int(uniform() < 0.35) if action != "open" else int(side < 0)
    seated = uniform() < 0.35 and action in _CAN_BE_SEATED
    carries = uniform() < 0.25 and action in _CAN_CARRY_BOX
    bowl = uniform() < (0.7 if action == "stir" else 0.3) and not carries
    bowl = bowl and action not in _USES_OFF_HAND
    hat, holds, chair = uniform() < 0.35, uniform() < 0.4, uniform() < 0.5
    floor_box, cupboard = uniform() < 0.35, uniform() < 0.3
    return _Props(lead, seated, carries, bowl, hat, holds, chair, floor_box, cupboard)


@dataclass
class _Posture:
    """Angles (T,) of the trunk and head, radians, and displacements of the body, metres.

    Attributes:
        lean: forwards.
        twist: to the left.
        roll: sideways.
        nod: of the head, forwards.
        shake: of the head, to the left.
        sit: 0 standing to 1 seated.
        crouch: how far the pelvis is lowered.
        hop: how far the whole body is raised.
        forward: how far it has walked.
        feet: (T, 3) for each ankle, its displacement from where it stands.
    """

    lean: np.ndarray
    twist: np.ndarray
    roll: np.ndarray
    nod: np.ndarray
    shake: np.ndarray
    sit: np.ndarray
    crouch: np.ndarray
    hop: np.ndarray
    forward: np.ndarray
    feet: list[np.ndarray]

    @property
    def level(self) -> np.ndarray:
        """Rotation (T, 3, 3) of an upright body that is twisted like this one."""
        return rotation(1, self.twist)


def _draw_posture(
    rng: np.random.Generator, action: str, timing: _Timing, props: _Props
) -> _Posture:
    """The posture, before the action moves it."""
    t, zeros = timing.t, timing.zeros
    lean = _drift(rng, 0.025, t) + rng.uniform(-0.03, 0.08)
    twist, roll = _drift(rng, 0.04, t), _drift(rng, 0.02, t)
    nod, shake = _drift(rng, 0.07, t) + rng.uniform(-0.05, 0.15), _drift(rng, 0.12, t)
    sit = _ease(timing.progress if action == "sit_down" else zeros + props.seated)
    feet = [np.zeros((len(t), 3)), np.zeros((len(t), 3))]
    return _Posture(lean, twist, roll, nod, shake, sit, zeros, zeros, zeros, feet)


def _move_posture(
    rng: np.random.Generator, action: str, timing: _Timing, posture: _Posture
) -> None:
    """Move the trunk, the head and the feet as the action does, in place."""
    on, size, there_and_back = timing.on, timing.size, timing.there_and_back
    if action == "sit_down":
        posture.lean = posture.lean + rng.uniform(0.35, 0.75) * np.sin(np.pi * posture.sit)
    elif action == "pick_up":
        posture.crouch = rng.uniform(0.2, 0.42) * there_and_back
        posture.lean = posture.lean + (1.25 - 1.5 * (posture.crouch.max() - 0.2)) * there_and_back
        posture.nod = posture.nod + 0.2 * there_and_back
    elif action == "nod":
        posture.nod = posture.nod + on * size * 0.32 * np.sin(timing.cycle(1.7)) + 0.1 * on
    elif action == "shake_head":
        posture.shake = posture.shake + on * size * 0.5 * np.sin(timing.cycle(1.7))
    elif action in ("drink", "answer_phone"):
        posture.nod = posture.nod - (0.35 if action == "drink" else -0.1) * there_and_back
    elif action in ("walk", "jog"):
        _stride(rng, action == "jog", timing, posture)
    elif action == "jump":
        q = (timing.cycle(1.0) / (2 * np.pi)) % 1
        posture.hop = on * size * 0.9 * np.where(q < 0.4, q * (0.4 - q) * 6.25, 0)
        bend = np.where(q < 0.4, 0, np.sin(np.pi * (q - 0.4) / 0.6))
        posture.crouch = on * size * 0.24 * bend**2
        posture.lean = posture.lean + 1.5 * posture.crouch


def _stride(rng: np.random.Generator, jog: bool, timing: _Timing, posture: _Posture) -> None:
    """Walk, or jog on the spot: the feet, and the trunk with them."""
    on, size = timing.on, timing.size
    phase = timing.cycle(1.35 if jog else 0.95)
    posture.forward = (0.0 if jog else rng.uniform(0, 0.5)) * (timing.t - timing.total / 2)
    for k, foot in enumerate(posture.feet):
        c, s = np.cos(phase + np.pi * k), np.sin(phase + np.pi * k)
        up = np.maximum(s, 0) * on * size
        foot[:] = _vec(0, (0.24 if jog else 0.1) * up, (0.08 if jog else 0.24) * c * on * size)
        foot[:, 2] -= (0.18 if jog else 0.0) * up
    posture.crouch = (0.06 if jog else 0.035) * on * (1 + np.cos(2 * phase + 0.5)) * size
    posture.hop = 0.05 * on * np.maximum(np.cos(2 * phase), 0) if jog else timing.zeros
    posture.twist = posture.twist + 0.15 * on * np.cos(phase)
    posture.lean = posture.lean + 0.08 * on


@dataclass(frozen=True)
class _Torso:
    """The body without its limbs.

    Attributes:
        posture: which it has.
        joints: (T, 3) each, from the pelvis to the head.
        rotations: (T, 3, 3) of "pelvis", "chest" and "head".
        shoulders: (T, 3), the left one and the right one.
    """

    posture: _Posture
    joints: dict[str, np.ndarray]
    rotations: dict[str, np.ndarray]
    shoulders: list[np.ndarray]

    def at_head(self, x: float, y: float, z: float) -> np.ndarray:
        """A place (T, 3) in the head's axes."""
        return self.joints["head"] + self.rotations["head"] @ (x, y, z)

    def at_chest(self, x: Scalar, y: Scalar, z: Scalar) -> np.ndarray:
        """A place (T, 3) in front of the chest, which leans half as far as the trunk."""
        turned = self.posture.level @ rotation(0, self.posture.lean * 0.5)
        place = np.broadcast_to(_vec(x, y, z), self.joints["neck"].shape)
        return self.joints["neck"] + (turned @ place[..., None])[..., 0]


def _build_torso(
    rng: np.random.Generator, person: Person, timing: _Timing, posture: _Posture
) -> _Torso:
    thigh, shin = _THIGH * person.legs, _SHIN * person.legs
    height = (thigh + shin) * 0.994 + _ANKLE + posture.hop - posture.crouch
    sideways = _drift(rng, 0.012, timing.t)
    root = _vec(sideways, height, _drift(rng, 0.012, timing.t) - 0.3 * posture.crouch)
    root = _mix(root, _vec(0, _SEAT[0] + 0.1, _SEAT[1] + 0.06), posture.sit)
    root[:, 2] += posture.forward
    lean, twist, roll = posture.lean, posture.twist, rotation(2, posture.roll)
    pelvis = rotation(1, twist * 0.3) @ rotation(0, lean * 0.4 - 0.1 * posture.sit)
    chest = rotation(1, twist) @ rotation(0, lean) @ roll
    head = rotation(1, twist + posture.shake) @ rotation(0, lean * 0.6 + posture.nod) @ roll
    spine = root + pelvis @ (0, 0.13 * person.trunk, 0)
    neck = spine + chest @ (0, 0.34 * person.trunk, 0)
    top = neck + head @ (0, 0.05 + 0.13 * person.head, 0.02)
    return _Torso(
        posture,
        {"pelvis": root, "spine": spine, "neck": neck, "head": top},
        {"pelvis": pelvis, "chest": chest, "head": head},
        [neck + chest @ (sign * 0.18, -0.04, 0) for sign in _SIGN],
    )


def _place_things(
    rng: np.random.Generator,
    action: str,
    side: int,
    timing: _Timing,
    props: _Props,
    torso: _Torso,
) -> Things:
    """The box, the cupboard with its door, and the chair."""
    uniform, zeros = rng.uniform, timing.zeros
    things: Things = {}
    still = np.zeros((len(zeros), 3))
    on_floor = _vec(uniform(-0.15, 0.15), 0.13, uniform(0.34, 0.42)) + still
    level = torso.posture.level
    in_hands = torso.joints["pelvis"] + level @ (0, 0.22, 0.33)
    turned = rotation(1, zeros + uniform(-0.2, 0.2))
    if action == "pick_up":
        raised = _ease((timing.progress - 0.5) / 0.4)
        things["box"] = (_mix(on_floor, in_hands, raised), turned)
    elif props.carries:
        things["box"] = (in_hands, level)
    elif props.floor_box:
        aside = uniform(0.25, 0.5) * rng.choice((-1, 1))
        things["box"] = (on_floor + _vec(aside, 0, uniform(-0.3, 0.2)), turned)

    least, most = uniform(0, 0.3), uniform(1.3, 2.0)
    if action == "open":
        swing = _ease((timing.progress - 0.28) / 0.44)
        angle = least * 0.3 + (most - least * 0.3) * swing
    else:
        angle = zeros + uniform(least, most)
    if action == "open" or props.cupboard:
        place = np.array([side * uniform(0.6, 0.7), uniform(0.9, 1.1), uniform(0.3, 0.42)])
        facing = rotation(1, zeros - side * uniform(1.9, 2.3))  # its front towards the figure
        hinge = place + facing @ (0.22 * side, 0, 0.19)
        door = facing @ rotation(1, side * angle)
        things["cupboard"] = (place + still, facing)
        things["door"] = (hinge, door)
    if props.chair or props.seated or action == "sit_down":
        things["chair"] = (still, np.broadcast_to(np.eye(3), (len(zeros), 3, 3)))
    return things


def _rest_hands(
    rng: np.random.Generator, action: str, timing: _Timing, props: _Props, torso: _Torso
) -> list[np.ndarray]:
    """The hands (T, 3) beside the body, in the lap of a seated figure, or at a bowl."""
    swing: Scalar = 0.0
    if action == "walk":
        swing = 0.2 * timing.size * timing.on * np.cos(timing.cycle(0.95))
    hands = []
    for sign, shoulder in zip(_SIGN, torso.shoulders, strict=True):
        sideways = sign * 0.07 + _drift(rng, 0.01, timing.t)
        forwards = 0.07 + _drift(rng, 0.015, timing.t) - sign * swing
        beside = shoulder + _vec(sideways, -0.56, forwards)
        lap = torso.joints["pelvis"] + _vec(sign * 0.13, 0.11, 0.3)
        hands.append(_mix(beside, lap, torso.posture.sit))
    if props.bowl:
        hands[props.off] = torso.at_chest(_SIGN[props.off] * 0.06, -0.36, 0.3)
    return hands


def _move_hands(
    rng: np.random.Generator,
    action: str,
    timing: _Timing,
    props: _Props,
    torso: _Torso,
    things: Things,
    hands: list[np.ndarray],
) -> None:
    """Move the hands from rest towards the goals of the action, in place."""
    size, on, lead = timing.size, timing.on, props.lead
    sign = _SIGN[lead]

    def move(hand: int, goal: np.ndarray, weight: np.ndarray) -> None:
        hands[hand] = _mix(hands[hand], goal, weight)

    if action == "pick_up" or props.carries:
        reach = _ease(timing.progress / 0.4) if action == "pick_up" else timing.zeros + 1
        place, turned = things["box"]
        for k in (0, 1):
            move(k, place + turned @ (_SIGN[k] * 0.17, 0.0, 0), reach)
    elif action == "put_on":
        move(lead, torso.at_head(sign * 0.12, 0.13, 0.05), timing.there_and_back)
    elif action == "open":
        hinge, door = things["door"]  # on the side of the leading hand
        grip = _ease(timing.progress / 0.26) * _ease((1 - timing.progress) / 0.26)
        move(lead, hinge + door @ (-0.4 * sign, 0.0, 0.05), grip)
    elif action == "drink":
        move(lead, torso.at_head(sign * 0.02, -0.06, 0.17), timing.there_and_back)
    elif action == "answer_phone":
        move(lead, torso.at_head(sign * 0.16, -0.04, 0.05), timing.there_and_back)
    elif action == "wave":
        across = 0.21 * size * np.sin(timing.cycle(1.7)) * on
        up = rng.uniform(0.1, 0.36) - 0.5 * np.abs(across)
        move(lead, torso.at_chest(sign * (0.36 + across), up, 0.16), timing.lift)
    elif action == "clap":
        gap = 0.03 + 0.1 * size * (1 + np.sin(timing.cycle(1.7)))
        height = rng.uniform(-0.3, -0.05)
        for k in (0, 1):
            move(k, torso.at_chest(_SIGN[k] * gap, height, 0.36), timing.lift)
    elif action == "stir":
        a = timing.cycle(1.5) * rng.choice((-1, 1))
        x, z = 0.1 * size * np.cos(a) * on, 0.33 + 0.1 * size * np.sin(a) * on
        move(lead, torso.at_chest(x, -0.27, z), timing.lift)
    elif action == "jog":
        for k in (0, 1):
            a = 0.16 * size * on * np.cos(timing.cycle(1.35) + np.pi * (1 - k))
            move(k, torso.at_chest(_SIGN[k] * 0.2, -0.3 + 0.5 * a, 0.22 + a), on)
    elif action == "jump":
        hop = torso.posture.hop
        arms = 0.5 * size * rng.uniform(0.3, 1) * (hop > 0) * hop / 0.2
        for k in (0, 1):
            move(k, torso.at_chest(_SIGN[k] * 0.35, -0.1, 0.2), np.clip(arms, 0, 1))


def _limbs(person: Person, torso: _Torso, hands: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The joints (T, 3) of arms and legs, which reach for the hands' and the feet's places."""
    posture = torso.posture
    joints: dict[str, np.ndarray] = {}
    lower = (_FOREARM + _HAND) * person.arms
    thigh, shin = _THIGH * person.legs, _SHIN * person.legs
    for k, name in enumerate(("left", "right")):
        sign, foot = _SIGN[k], posture.feet[k]
        shoulder = torso.shoulders[k]
        pole = posture.level @ (sign * 0.5, -0.6, -0.7)
        elbow, tip = _two_bones(shoulder, hands[k], _UPPER_ARM * person.arms, lower, pole)
        wrist = elbow + (tip - elbow) * (_FOREARM / (_FOREARM + _HAND))
        hip = torso.joints["pelvis"] + torso.rotations["pelvis"] @ (sign * 0.1, -0.03, 0)
        forwards = 0.06 * posture.sit + posture.forward
        ankle = _vec(sign * 0.12, _ANKLE + posture.hop, forwards) + foot
        knee, ankle = _two_bones(hip, ankle, thigh, shin, posture.level @ (sign * 0.15, 0.1, 1))
        droop = 1.2 * np.maximum(foot[:, 1], 0) + 1.2 * posture.hop
        toe = ankle + _vec(sign * 0.05, -0.03 - 0.13 * np.sin(droop), 0.14 * np.cos(droop))
        toe = ankle + _unit(toe - ankle) * 0.15
        joints |= {f"{name}_shoulder": shoulder, f"{name}_elbow": elbow, f"{name}_wrist": wrist}
        joints |= {f"{name}_hand": tip, f"{name}_hip": hip, f"{name}_knee": knee}
        joints |= {f"{name}_ankle": ankle, f"{name}_toe": toe}
    return joints


def _held_things(
    action: str,
    person: Person,
    timing: _Timing,
    props: _Props,
    torso: _Torso,
    joints: dict[str, np.ndarray],
) -> Things:
    """The bowl, the hat, and the cup or spoon: what hands and head hold."""
    posture, head = torso.posture, torso.rotations["head"]
    things: Things = {}
    hand, other = (joints[f"{('left', 'right')[k]}_hand"] for k in (props.lead, props.off))
    on_head = joints["head"] + head @ (0, 0.09 * person.head, 0)
    if props.bowl:
        things["bowl"] = (other + np.array((0, 0.06, 0.03)), posture.level)
    if action == "put_on":
        tilt = rotation(0, -0.5 * (1 - timing.there_and_back))
        in_hand = hand + head @ (-_SIGN[props.lead] * 0.12, -0.04, -0.05)
        worn = timing.progress[:, None] >= 0.5
        place = np.where(worn, on_head, in_hand)
        things["hat"] = (place, np.where(worn[..., None], head, head @ tilt))
        return things
    if props.hat:
        things["hat"] = (on_head, head)
    needs = action in ("drink", "answer_phone", "stir")
    busy = props.carries or action in ("pick_up", "clap", "open")
    if (needs or props.holds) and not busy:
        grip = posture.level
        if not props.seated:
            grip = grip @ rotation(0, 0.2 + posture.lean)
        tip_up = 1.1 * timing.there_and_back if action == "drink" else timing.zeros
        name = "spoon" if action == "stir" else "cup"
        things[name] = (hand, grip @ rotation(0, -tip_up))
    return things
