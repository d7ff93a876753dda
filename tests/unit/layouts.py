"""Files of poses in every layout that is read, written from one array of joints.

Each takes metres and pixels of people in view, `ALL` (T, P, J, 6), and answers {name: bytes}.
"""

import io
import json
from collections.abc import Callable

import numpy as np

from pretrain.data.poses import SKELETONS

Files = dict[str, bytes]


def people(frames: int, num: int, skeleton: str, seed: int = 0) -> np.ndarray:
    """People who stand beside one another and move a little: x, y, z, u, v, confidence."""
    rng = np.random.default_rng(seed)
    joints = len(SKELETONS[skeleton].joints)
    shape = rng.normal(0, 0.3, (1, num, joints, 3)) + rng.normal(0, 0.01, (frames, 1, joints, 3))
    at = np.stack([np.arange(num) * 2 - num, np.zeros(num), np.full(num, 4.0)], -1)
    metres = shape + at[:, None]
    pixels = metres[..., :2] * 50 + (320, 120)
    seen = rng.uniform(0.5, 1, (frames, num, joints, 1))
    return np.concatenate([metres, pixels, seen], -1).astype(np.float32)


def kinect(pose: np.ndarray, names: tuple[str, ...] = ("7205", "7206")) -> Files:
    lines = [str(len(pose))]
    for frame in pose:
        here = [(name, joints) for name, joints in zip(names, frame, strict=False) if joints.any()]
        lines.append(str(len(here)))
        for name, joints in here:
            lines += [f"{name} 0 1 1 1 1 0 0.02 -0.1 2", str(len(joints))]
            for x, y, z, u, v, c in joints:
                state = round(c * 2)
                lines.append(f"{-x:.6f} {-y:.6f} {z:.6f} 1 2 {u:.5f} {v:.5f} 0 0 0 1 {state}")
    return {"S001C001P001R001A001.skeleton": ("\n".join(lines) + "\n").encode()}


def _flat(joints: np.ndarray) -> list[float]:
    return [round(float(n), 5) for n in joints[:, 3:].ravel()]


def openpose(pose: np.ndarray, start: int = 0, video: str = "a") -> Files:
    return {
        f"{video}_{t:012d}_keypoints.json": json.dumps(
            {
                "version": 1.3,
                "people": [
                    {"person_id": [-1], "pose_keypoints_2d": _flat(joints)}
                    for joints in frame
                    if joints.any()
                ],
            }
        ).encode()
        for t, frame in enumerate(pose, start)
    }


def coco(pose: np.ndarray, images: bool = True, tracks: bool = True) -> Files:
    about = [
        {"image_id": t, "keypoints": _flat(joints), "score": 0.9}
        | ({"track_id": p} if tracks else {})
        for t, frame in enumerate(pose)
        for p, joints in enumerate(frame)
        if joints.any()
    ]
    listed = [
        {"id": t, "file_name": f"{t:06d}.jpg", "width": 640, "height": 480}
        for t in range(len(pose))
    ]
    whole = {"images": listed, "annotations": about} if images else about
    return {"keypoints.json": json.dumps(whole).encode()}


def mediapipe(pose: np.ndarray, size: tuple[int, int] = (640, 480)) -> Files:
    def point(x, y, z, c):
        return {"x": float(x), "y": float(y), "z": float(z), "visibility": float(c)}

    frames = [
        {
            "frame": t,
            "pose_landmarks": [
                [point(j[3] / size[0], j[4] / size[1], 0, j[5]) for j in joints]
                for joints in frame
                if joints.any()
            ],
            "pose_world_landmarks": [
                [point(*j[[0, 1, 2, 5]]) for j in joints] for joints in frame if joints.any()
            ],
        }
        for t, frame in enumerate(pose)
    ]
    return {"landmarks.json": json.dumps({"fps": 25, "frames": frames}).encode()}


def msr(pose: np.ndarray) -> Files:
    rows = pose[:, 0].reshape(-1, 6)
    lines = [f"{-x:.6f} {-y:.6f} {z:.6f} {c:.6f}" for x, y, z, _, _, c in rows]
    return {"a01_s01_e01_skeleton3D.txt": ("\n".join(lines) + "\n").encode()}


def utkinect(pose: np.ndarray, numbers: list[int] | None = None) -> Files:
    numbers = list(range(252, 252 + len(pose))) if numbers is None else numbers
    lines = []
    for number, joints in zip(numbers, pose[:, 0], strict=True):
        metres = (joints[:, :3] * (-1, -1, 1)).ravel()
        lines.append(f"{number} " + " ".join(f"{n:.6f}" for n in metres))
    return {"joints_s01_e01.txt": ("\n".join(lines) + "\n").encode()}


def numpy(pose: np.ndarray) -> Files:
    file = io.BytesIO()
    np.save(file, pose[..., [0, 1, 2, 5]])
    return {"pose.npy": file.getvalue()}


LAYOUTS: dict[str, tuple[str, Callable[[np.ndarray], Files]]] = {
    "kinect": ("kinect25", kinect),
    "openpose": ("openpose25", openpose),
    "openpose18": ("openpose18", openpose),
    "coco": ("coco17", coco),
    "coco_results": ("coco17", lambda pose: coco(pose, images=False, tracks=False)),
    "mediapipe": ("blazepose33", mediapipe),
    "msr": ("msr20", msr),
    "utkinect": ("kinect20", utkinect),
    "numpy": ("blazepose33", numpy),
}
