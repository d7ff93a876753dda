"""Poses: people's joints, frame by frame; skeletons; what crops and mirrors do to them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.arrays import read_numbers


@dataclass(frozen=True)
class Skeleton:
    """What the joints of a pose are called and how they hang together.

    Attributes:
        joints: names; those of the left and of the right side differ in that word alone.
        bones: pairs of joints, indices; together they reach every joint.
        root: the joint that coordinates are centred on: the hips' centre, or what is nearest to the
            trunk.
    """

    joints: tuple[str, ...]
    bones: tuple[tuple[int, int], ...]
    root: int

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The left and the right joint of each pair, which a mirror swaps."""
        at = {name: i for i, name in enumerate(self.joints)}
        left = [name for name in self.joints if "left" in name]
        return tuple((at[name], at[name.replace("left", "right")]) for name in left)


def _skeleton(joints: str, bones: str, root: str) -> Skeleton:
    """Of names; a bone with S_ in a name is two, of the left joints and of the right ones."""
    names = tuple(joints.split())
    ends = []
    for bone in bones.split():
        for side in ("left_", "right_") if "S_" in bone else ("",):
            start, _, end = bone.replace("S_", side).partition("-")
            ends.append((names.index(start), names.index(end)))
    return Skeleton(names, tuple(ends), names.index(root))


_KINECT = (
    "S_shoulder-S_elbow S_elbow-S_wrist S_wrist-S_hand hip_center-S_hip S_hip-S_knee "
    "S_knee-S_ankle S_ankle-S_foot"
)
_KINECT_20 = (
    "hip_center-spine spine-shoulder_center shoulder_center-head shoulder_center-S_shoulder "
    + _KINECT
)
_OPENPOSE = (
    "neck-nose nose-S_eye S_eye-S_ear neck-S_shoulder S_shoulder-S_elbow S_elbow-S_wrist "
    "S_hip-S_knee S_knee-S_ankle "
)
_FINGERS = ("thumb", "index", "middle", "ring", "little")

SKELETONS = {
    # The built-in synthetic dataset.
    "synthetic20": _skeleton(
        "pelvis spine neck head left_shoulder left_elbow left_wrist left_hand right_shoulder "
        "right_elbow right_wrist right_hand left_hip left_knee left_ankle left_toe right_hip "
        "right_knee right_ankle right_toe",
        "pelvis-spine spine-neck neck-head neck-S_shoulder S_shoulder-S_elbow S_elbow-S_wrist "
        "S_wrist-S_hand pelvis-S_hip S_hip-S_knee S_knee-S_ankle S_ankle-S_toe",
        "pelvis",
    ),
    # The first Kinect, as its SDK numbers the joints (UTKinect-Action3D).
    "kinect20": _skeleton(
        "hip_center spine shoulder_center head left_shoulder left_elbow left_wrist left_hand "
        "right_shoulder right_elbow right_wrist right_hand left_hip left_knee left_ankle left_foot "
        "right_hip right_knee right_ankle right_foot",
        _KINECT_20,
        "hip_center",
    ),
    # The same joints as MSR Action3D numbers them.
    "msr20": _skeleton(
        "left_shoulder right_shoulder shoulder_center spine left_hip right_hip hip_center "
        "left_elbow right_elbow left_wrist right_wrist left_hand right_hand left_knee right_knee "
        "left_ankle right_ankle left_foot right_foot head",
        _KINECT_20,
        "hip_center",
    ),
    # The second Kinect (NTU RGB+D, PKU-MMD).
    "kinect25": _skeleton(
        "hip_center spine neck head left_shoulder left_elbow left_wrist left_hand right_shoulder "
        "right_elbow right_wrist right_hand left_hip left_knee left_ankle left_foot right_hip "
        "right_knee right_ankle right_foot shoulder_center left_hand_tip left_thumb right_hand_tip "
        "right_thumb",
        "hip_center-spine spine-shoulder_center shoulder_center-neck neck-head "
        "shoulder_center-S_shoulder S_hand-S_hand_tip S_wrist-S_thumb " + _KINECT,
        "hip_center",
    ),
    # MediaPipe's; its own bones, and those that join face and trunk.
    "blazepose33": _skeleton(
        "nose left_eye_inner left_eye left_eye_outer right_eye_inner right_eye right_eye_outer "
        "left_ear right_ear mouth_left mouth_right left_shoulder right_shoulder left_elbow "
        "right_elbow left_wrist right_wrist left_little right_little left_index right_index "
        "left_thumb right_thumb left_hip right_hip left_knee right_knee left_ankle right_ankle "
        "left_heel right_heel left_foot right_foot",
        "nose-S_eye_inner S_eye_inner-S_eye S_eye-S_eye_outer S_eye_outer-S_ear nose-mouth_left "
        "nose-mouth_right mouth_left-mouth_right nose-S_shoulder left_shoulder-right_shoulder "
        "S_shoulder-S_elbow S_elbow-S_wrist S_wrist-S_little S_wrist-S_index S_wrist-S_thumb "
        "S_little-S_index S_shoulder-S_hip left_hip-right_hip S_hip-S_knee S_knee-S_ankle "
        "S_ankle-S_heel S_heel-S_foot S_ankle-S_foot",
        "nose",
    ),
    "coco17": _skeleton(
        "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
        "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
        "right_ankle",
        "nose-S_eye left_eye-right_eye S_eye-S_ear S_ear-S_shoulder left_shoulder-right_shoulder "
        "S_shoulder-S_elbow S_elbow-S_wrist S_shoulder-S_hip left_hip-right_hip S_hip-S_knee "
        "S_knee-S_ankle",
        "nose",
    ),
    # OpenPose's model of 18 joints, which it calls COCO.
    "openpose18": _skeleton(
        "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
        "right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye "
        "right_ear left_ear",
        _OPENPOSE + "neck-S_hip",
        "neck",
    ),
    # OpenPose's BODY_25.
    "openpose25": _skeleton(
        "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
        "hip_center right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye "
        "left_eye right_ear left_ear left_big_toe left_small_toe left_heel right_big_toe "
        "right_small_toe right_heel",
        _OPENPOSE + "neck-hip_center hip_center-S_hip S_ankle-S_big_toe "
        "S_big_toe-S_small_toe S_ankle-S_heel",
        "hip_center",
    ),
    # One hand (SHREC'17 Track); which of the two is not said.
    "hand22": _skeleton(
        "wrist palm " + " ".join(f"{f}_base {f}_1 {f}_2 {f}_tip" for f in _FINGERS),
        "wrist-palm wrist-thumb_base palm-index_base palm-middle_base palm-ring_base "
        "palm-little_base "
        + " ".join(f"{f}_base-{f}_1 {f}_1-{f}_2 {f}_2-{f}_tip" for f in _FINGERS),
        "palm",
    ),
}

# What the numbers of a joint may be, in this order: metres in camera axes (x to the right of the
# picture, y down, z away); pixels from the upper left corner of the frame, so that the centre of
# its first pixel is (.5, .5); 0 to 1.
COLUMNS = ("x", "y", "z", "u", "v", "confidence")


@dataclass(frozen=True)
class Poses:
    """People's joints in the frames of one clip.

    Attributes:
        values: float32 (T, P, J, K). A joint that is not seen has confidence 0 and coordinates 0,
            and so have all joints of a person in the frames he or she is not in.
        columns: what the K numbers are, of `COLUMNS`; the last is the confidence.
        skeleton: a name in `SKELETONS`.
        fps: frames a second; None where nothing says.
        people: the P people's identities, in the order in which they appear.
        frame: width and height of the frame in the units of u and v, (1, 1) where these are
            fractions of it; None: they are pixels of a frame of unknown size.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    skeleton: str
    fps: float | None
    people: tuple[str, ...]
    frame: tuple[float, float] | None = None

    def in_pixels(self) -> tuple[np.ndarray, tuple[int, int]]:
        """The values where there is no video, u and v in pixels of a frame of the given size.

        Fractions become pixels of a square frame; where nothing says how large the frame was, it
        ends behind the last joint.
        """
        side = (256.0, 256.0)
        if "u" not in self.columns:
            return self.values, (256, 256)
        if self.frame == (1, 1):
            return crop_pose(self.values, self.columns, (0, 0, 1, 1), side), (256, 256)
        u = self.columns.index("u")
        size = self.frame or np.ceil(self.values[..., u : u + 2].max((0, 1, 2))) + 1
        width, height = (int(min(max(side, 8), 2**14)) for side in size)
        return self.values, (width, height)


def crop_pose(
    values: np.ndarray,
    columns: Sequence[str],
    box: tuple[float | np.ndarray, float | np.ndarray, float, float],
    size: tuple[float, float],
) -> np.ndarray:
    """Poses in a part of the frame, scaled to another size; a joint outside it stays known.

    Args:
        values: float32 (..., J, K) of these columns. x, y and z are left as they are.
        columns: see `COLUMNS`.
        box: left, top, width and height of the part, in the units of u and v; left and top may be
            arrays that broadcast with (..., J).
        size: width and height that it gets.
    """
    out = values.copy()
    seen = values[..., -1] > 0
    for name, start, side, length in zip(("u", "v"), box[:2], box[2:], size, strict=True):
        if name in columns:
            k = columns.index(name)
            out[..., k] = (values[..., k] - start) * (length / side) * seen
    return out


def mirror_pose(
    values: np.ndarray, columns: Sequence[str], skeleton: str, width: float
) -> np.ndarray:
    """Poses as they are in the mirrored frame: u and x turned round, left and right joints swapped.

    Args:
        values: float32 (..., J, K) of these columns.
        columns: see `COLUMNS`.
        skeleton: a name in `SKELETONS`.
        width: of the frame, in the units of u.
    """
    order = list(range(values.shape[-2]))
    for left, right in SKELETONS[skeleton].pairs:
        order[left], order[right] = right, left
    out = values[..., order, :]
    seen = out[..., -1] > 0
    for name, end in (("x", 0.0), ("u", width)):
        if name in columns:
            k = columns.index(name)
            out[..., k] = (end - out[..., k]) * seen
    return out


def clip_poses(
    poses: Poses, part: range, total: int, seen: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """The poses in a part of a video, pixels as in its packed frames.

    Args:
        poses: of the whole video.
        part: numbers of the frames.
        total: frames of the whole video.
        seen: width and height of the video's frames.
        size: width and height of the packed frames.

    Raises:
        ValueError: there are poses of another number of frames.
    """
    if len(poses.values) != total:
        raise ValueError(f"poses of {len(poses.values)} frames, and the video has {total}")
    values = poses.values[part.start : part.stop]
    width, height = poses.frame or seen
    return crop_pose(values, poses.columns, (0, 0, width, height), size)


def in_view(values: np.ndarray, columns: Sequence[str], size: tuple[float, float]) -> np.ndarray:
    """How much of each person is inside a frame, (P,): the sum of the confidence of joints there.

    Args:
        values: float32 (T, P, J, K) of these columns, with u and v.
        columns: see `COLUMNS`.
        size: width and height of the frame, in the units of u and v.
    """
    u = columns.index("u")
    place = values[..., u : u + 2]
    inside = ((place >= 0) & (place < np.array(size))).all(-1)
    return (values[..., -1] * inside).sum((0, 2))


def most_seen_first(values: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Poses (T, P, J, K), confidence last, of the people who are seen, who is seen most first.

    Where nobody is seen at all, one person remains.

    Args:
        values: the poses.
        seen: how much each is seen, (P,); None: by the confidence of all joints.
    """
    if seen is None:
        seen = values[..., -1].sum((0, 2))
    order = np.argsort(-seen, kind="stable")[: max(1, np.count_nonzero(seen))]
    return values[:, order]


def pose_member(
    values: np.ndarray, columns: Sequence[str], skeleton: str, seen: np.ndarray | None = None
) -> tuple[bytes, dict]:
    """A clip's poses as a pack keeps them: the member's bytes, and what the index says of it.

    Who is seen most comes first: models of fewer people take the first ones.

    Args:
        values: (T, P, J, K) of these columns; who is nowhere in it is left out.
        columns: see `COLUMNS`.
        skeleton: a name in `SKELETONS`.
        seen: see `most_seen_first`.
    """
    values = most_seen_first(values, seen)
    people, joints = values.shape[1:3]
    about = {"skeleton": skeleton, "columns": list(columns), "people": people, "joints": joints}
    return write_array(values), about


def read_array(data: bytes) -> np.ndarray:
    """The numbers of a .npy file in memory, which may be anybody's.

    Raises:
        ValueError: it is damaged, cut off, or of something else than numbers.
    """
    return read_numbers(io.BytesIO(data), len(data))


def write_array(values: np.ndarray) -> bytes:
    """Poses as a pack keeps them: a .npy of float32."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values, np.float32), allow_pickle=False)
    return file.getvalue()
