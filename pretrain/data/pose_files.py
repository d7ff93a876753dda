"""Reads poses as the usual programs and datasets write them; see `read_poses` for the layouts."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.coco import is_id, last_number, read_images
from pretrain.data.poses import COLUMNS, SKELETONS, Poses, read_array
from pretrain.data.tracks import link, most_seen
from pretrain.files import has_plain_digits, is_folder, parse_json, read_limited, reading

MAX_BYTES = 2**26  # of one file
MAX_FRAMES = 2**20  # ten hours
MAX_VALUES = 2**26  # float32 numbers of one clip
MAX_IN_VIEW = 64  # people of a frame; of more, the most confident are read
LARGEST = 1e6  # metres or pixels; a larger number is a mistake
INFERRED = 0.5  # confidence of joints that a Kinect did not see but guessed
_XYZ, _UV = ("x", "y", "z", "confidence"), ("u", "v", "confidence")
_OPENPOSE_NAME = re.compile(r"(.*?)_?(\d+)(_keypoints)?\.json", re.IGNORECASE)

# The people of one frame: a name, or None where the file gives no identities, and (J, K).
_People = list[tuple[str | None, np.ndarray]]


def read_poses(path: str | Path, skeleton: str = "", people: int = 4) -> Poses:
    """Poses from a file, or a folder, of any of these layouts, recognised by content.

    - NTU RGB+D's `.skeleton`: metres, and pixels of the colour frame. A joint that the Kinect
      inferred has confidence 0.5.
    - OpenPose's JSON, a file a frame: a folder of `<video>_<number>_keypoints.json`. Of a folder
      with several videos, give `folder/<video>`. The smallest number is the first frame.
    - COCO's key points, JSON, of one video: `annotations` with `images`, whose order (`frame_id`,
      or else `id`) is the order of frames; or a list of results, whose `image_id` (or its last
      number) counts frames, from 0 if there is a 0, otherwise from 1. `track_id` tells people
      apart.
    - MediaPipe's landmarks, JSON: a list of frames (or `{"frames": [...], "fps": ...}`, or numbers
      as keys, or an object a line). A frame is null, 33 landmarks, a list of people with 33 each,
      or an object with `landmarks` (`pose_landmarks`) and/or `world_landmarks`
      (`pose_world_landmarks`) and, if it is numbered, `frame`. A landmark is an object of x, y, z
      and visibility, or a list of these. Landmarks of the picture become u and v in fractions of
      the frame, world landmarks x, y and z.
    - Numbers as text, one frame a line: `[frame] x y z x y z ...` (UTKinect-Action3D, SHREC), with
      two, three or four numbers a joint; or one joint a line: `x y z confidence` (MSR Action3D),
      `frame x y z [confidence]`, `frame joint x y z [confidence]`. One header line may come first.
    - A NumPy array (T, J, K) or (T, P, J, K), `.npy`: K is 2 (u, v), 3 (x, y, z; or u, v,
      confidence of a COCO or OpenPose skeleton) or 4 (x, y, z, confidence).

    Kinect's metres are turned to camera axes: its x is to the left of the picture, its y up. Not
    seen are joints with confidence 0, or with a number that is not finite or beyond a million;
    where no confidence is given, those at exactly 0, but for the root, on which others may be
    centred. Pixels that are all between 0 and 1 are fractions of the frame. Frames that are missing
    in a numbering are frames in which nobody is; of frames with the same number the first is read.
    Of more than `people` those stay that are seen most. Where the file gives no identities, overlap
    from frame to frame does.

    Args:
        path: the file or folder, which may be anybody's.
        skeleton: name of the skeleton in `SKELETONS`; "": the one that the layout and the number of
            joints leave.
        people: how many to keep at most.

    Raises:
        ValueError: it cannot be read, is none of these, is cut off or damaged, is too large, or has
            joints of another number than its skeleton.
    """
    path = Path(path)
    try:
        if is_folder(path) or not os.path.lexists(path):
            _check_skeleton(skeleton)
            return _poses(_Found(_UV, *_openpose(_openpose_files(path))), skeleton, people)
        with reading(path):
            data = read_limited(path, MAX_BYTES)
        return parse_poses(data, skeleton, people)
    except ValueError as error:
        what = str(error)
        raise ValueError(what if what.startswith(f"{path}") else f"{path}: {what}") from error


def parse_poses(data: bytes, skeleton: str = "", people: int = 4) -> Poses:
    """Poses from the bytes of one file, see `read_poses`.

    Raises:
        ValueError: as there.
    """
    _check_skeleton(skeleton)
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES:,} bytes")
    found = _numpy(data, skeleton) if data.startswith(b"\x93NUMPY") else _text(data, skeleton)
    return _poses(found, skeleton, people)


def _check_skeleton(name: str) -> None:
    if name and name not in SKELETONS:
        raise ValueError(f"there is no skeleton {name!r}, only {', '.join(SKELETONS)}")


@dataclass
class _Found:
    """What a layout says: people by number of frame, and what is known of them."""

    columns: tuple[str, ...]
    frames: dict[int, _People]
    count: int  # of frames
    skeletons: Sequence[str]  # that it may be
    fps: float | None = None
    frame: tuple[float, float] | None = None  # see `Poses`


def _poses(found: _Found, skeleton: str, most: int) -> Poses:
    """The poses of the people who are seen most, in the order in which they appear."""
    counts = {len(joints) for people in found.frames.values() for _, joints in people}
    if len(counts) > 1:
        raise ValueError(f"people have {' and '.join(map(str, sorted(counts)))} joints")
    fits = [
        name
        for name in ([skeleton] if skeleton else found.skeletons)
        if counts <= {len(SKELETONS[name].joints)}
    ]
    if counts and not fits:
        wanted = skeleton or " or ".join(found.skeletons)
        raise ValueError(f"{counts.pop()} joints, which {wanted} does not have")
    if len(fits) != 1:
        raise ValueError(f"say which skeleton it is: {', '.join(fits or found.skeletons)}")
    num = len(SKELETONS[fits[0]].joints)
    if not 0 < found.count <= MAX_FRAMES:
        raise ValueError(f"{found.count} frames: 1 to {MAX_FRAMES} can be read")

    for people in found.frames.values():
        for _, joints in people:
            _clean(joints)
        people[:] = [(name, joints) for name, joints in people if joints[:, -1].any()]
        if len(people) > MAX_IN_VIEW:
            least = sorted(joints[:, -1].sum() for _, joints in people)[-MAX_IN_VIEW]
            people[:] = [p for p in people if p[1][:, -1].sum() >= least][:MAX_IN_VIEW]
    order = sorted(found.frames)
    if any(name is None for people in found.frames.values() for name, _ in people):
        start = found.columns.index("u" if "u" in found.columns else "x")
        there = [[p[:, [start, start + 1, -1]] for _, p in found.frames[t]] for t in order]
        for t, linked in zip(order, _linked(there, order), strict=True):
            people = found.frames[t]
            people[:] = [(f"{n}", joints) for n, (_, joints) in zip(linked, people, strict=True)]
    kept = most_seen(((f"{name}", joints) for t in order for name, joints in found.frames[t]), most)
    shape = (found.count, max(1, len(kept)), num, len(found.columns))
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{' x '.join(map(str, shape))} numbers are more than {MAX_VALUES}")
    values = np.zeros(shape, np.float32)
    for t in reversed(order):
        for name, joints in reversed(found.frames[t]):  # of one who is there twice, the first
            if name in kept:
                values[t, kept.index(name)] = joints
    frame = found.frame
    if frame is None and "u" in found.columns:
        u = found.columns.index("u")
        if values[..., u : u + 2].min() >= 0 and 0 < values[..., u : u + 2].max() <= 1:
            frame = (1.0, 1.0)
    return Poses(values, found.columns, fits[0], found.fps, tuple(kept) or ("",), frame)


def _linked(there: list[list[np.ndarray]], order: list[int]) -> list[list[int]]:
    """Identities in frames that are numbered by `order`: between them nobody is in view."""
    frames: list[list[np.ndarray]] = []
    at: list[int] = []
    for t, people in zip(order, there, strict=True):
        missing = min(t - order[len(at) - 1] - 1, 100) if at else 0  # longer than any gap
        frames += [[]] * missing
        at.append(len(frames))
        frames.append(people)
    names = link(frames)
    return [names[i] for i in at]


def _clean(joints: np.ndarray) -> None:
    """Make 0 of what is not seen, in place, and confidences 0 to 1."""
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(joints) <= LARGEST).all(-1)
    bad |= ~(joints[:, -1] > 0)
    joints[bad] = 0
    joints[:, -1] = joints[:, -1].clip(0, 1)


# ---- text ----------------------------------------------------------------------------------------


def _text(data: bytes, skeleton: str) -> _Found:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("neither text nor a .npy: no file of poses") from error
    start = text.lstrip()[:1]
    if not start:
        raise ValueError("it is empty")
    if start in "{[":
        return _json(text)
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if all(re.fullmatch(r"\s*[0-9]+\s*", line) for _, line in lines[:2]) and len(lines) > 1:
        return _kinect(iter(lines))
    return _table(lines, skeleton)


def _floats(number: int, line: str) -> np.ndarray:
    try:
        if not has_plain_digits(line):
            raise ValueError
        return np.array([float(word) for word in re.split(r"[\s,;]+", line.strip(" \t,;"))])
    except ValueError as error:
        raise ValueError(f"line {number} is not all numbers: {line.strip()[:60]!r}") from error


def _kinect(lines: Iterator[tuple[int, str]]) -> _Found:
    """NTU's: how many frames; how many bodies; of each a line, how many joints, a line each."""
    number = 0

    def following(what: str, t: int) -> tuple[int, str]:
        nonlocal number
        number, line = next(lines, (number, ""))
        if not line:
            raise ValueError(f"it ends before {what} of frame {t}: it is cut off")
        return number, line

    def count(what: str, t: int) -> int:
        number, line = following(what, t)
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", line):
            raise ValueError(f"line {number} has to be {what}, not {line.strip()[:60]!r}")
        return int(line)

    frames: dict[int, _People] = {}
    total = count("the number of frames", 0)
    for t in range(total):
        frames[t] = []
        for _ in range(count("the number of bodies", t)):
            name = following("a body", t)[1].split()[0][:40]
            joints = []
            for _ in range(count("the number of joints", t)):
                at, line = following("a joint", t)
                row = _floats(at, line)
                if len(row) != 12:
                    raise ValueError(f"line {at} has {len(row)} numbers, a joint has 12")
                state = {2: 1.0, 1: INFERRED}.get(row[11], 0.0)
                joints.append((-row[0], -row[1], row[2], row[5], row[6], state))
            if not joints:
                raise ValueError(f"a body of frame {t} has no joints (line {number})")
            frames[t].append((name, np.array(joints)))
    if next(lines, None):
        raise ValueError(f"there is more behind its {total} frames (line {number})")
    return _Found(COLUMNS, frames, total, ("kinect25", "kinect20"))


def _table(lines: list[tuple[int, str]], skeleton: str) -> _Found:
    """Rows of numbers, a frame or a joint each."""
    if len(lines) > 1 and re.search(r"[A-Za-z]{2}", lines[0][1]):
        try:
            _floats(*lines[0])  # nan and inf are numbers
        except ValueError:
            lines = lines[1:]
    rows: list[np.ndarray] = []
    for number, line in lines:
        row = _floats(number, line)
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"line {number} has {len(row)} numbers, those before it {len(rows[0])}: "
                "it is cut off or damaged"
            )
        rows.append(row)
    table = np.stack(rows)
    width = table.shape[1]
    if 3 <= width <= 6:
        return _long_table(table, skeleton)
    names = [skeleton] if skeleton else ["kinect20", "kinect25", "hand22", "coco17", "openpose18"]
    names += [] if skeleton else ["blazepose33"]
    for numbered in (False, True):
        for size in (3, 4, 2):
            fits = [n for n in names if len(SKELETONS[n].joints) * size == width - numbered]
            if fits and (not numbered or _whole(table[:, 0])):
                joints = table[:, int(numbered) :].reshape(len(table), -1, size)
                numbers = table[:, 0] if numbered else np.arange(len(table))
                return _numbered(numbers, joints, fits[0])
    has = ", ".join(f"{name} {len(SKELETONS[name].joints)}" for name in names)
    raise ValueError(
        f"a line has {width} numbers, which is not 2, 3 or 4 for each joint of a skeleton ({has}), "
        "with or without the number of the frame"
    )


def _long_table(table: np.ndarray, skeleton: str) -> _Found:
    """Rows of one joint each: (N, 3 to 6)."""
    width = table.shape[1]
    starts = np.flatnonzero(np.diff(table[:, 0], prepend=np.nan))
    lengths = np.diff(starts, append=len(table))
    known = {len(SKELETONS[n].joints) for n in ([skeleton] if skeleton else SKELETONS)}
    usual = int(np.bincount(lengths).argmax())
    if not (width > 3 and _whole(table[:, 0]) and usual in known):
        if width not in (3, 4) or (width == 3 and not skeleton):
            raise ValueError(
                f"lines of {width} numbers are x y z confidence, frame x y z [confidence] or frame "
                "joint x y z [confidence], each frame with the joints of a skeleton"
            )
        skeleton = skeleton or "msr20"
        num = len(SKELETONS[skeleton].joints)
        if len(table) % num:
            raise ValueError(
                f"{len(table)} lines are not {num} joints of {skeleton} a frame: it is cut off, or "
                "another skeleton"
            )
        joints = table.reshape(-1, num, width)
        return _numbered(np.arange(len(joints)), joints, skeleton)
    index = table[:, 1] if _whole(table[:, 1]) and width > 4 else None
    base = 0 if index is None else index.min()
    if base not in (0, 1):
        index = None
    joints = np.zeros((len(starts), usual, width - 1 - (index is not None)))
    for t, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        rows = table[start : start + length]
        if index is None:
            if length % usual:
                number = int(rows[0, 0])
                raise ValueError(f"frame {number} has {length} joints, other frames {usual}")
            rows, place = rows[:usual], np.arange(usual)
        else:
            place = (rows[:, 1] - base).astype(int)
            if place.max() >= usual:
                raise ValueError(
                    f"frame {int(rows[0, 0])} has a joint {int(place.max() + base)}, of {usual}"
                )
        values = rows[:, 1 + (index is not None) :]
        for joint, row in zip(place[::-1], values[::-1], strict=True):  # of two, the first
            joints[t, joint] = row
    names = [n for n in SKELETONS if len(SKELETONS[n].joints) == usual]
    kinect = {20: "kinect20", 25: "kinect25"}.get(usual)
    return _numbered(table[starts, 0], joints, skeleton or kinect or names[0])


def _whole(values: np.ndarray) -> bool:
    return bool((np.abs(values) < 2**53).all() and (values == np.floor(values)).all())


def _numbered(numbers: np.ndarray, joints: np.ndarray, skeleton: str) -> _Found:
    """Frames (N, J, 2 to 4) by their numbers, of which the smallest is the first frame."""
    first = int(numbers.min())
    count = int(numbers.max()) - first + 1
    if count > 10 * len(numbers) + 100:
        raise ValueError(
            f"its frames are numbered {first} to {first + count - 1}, and only {len(numbers)} are "
            "there: the first number of a line has to count frames"
        )
    columns, values = _columns(joints, skeleton)
    if columns == _XYZ and skeleton in ("kinect20", "kinect25", "msr20"):
        values = values * (-1, -1, 1, 1)
        guessed = (values[..., :3] != 0).any(-1) & (values[..., 3] == 0)
        values[guessed, 3] = INFERRED
    frames: dict[int, _People] = {}
    for number, person in zip(numbers, values, strict=True):
        frames.setdefault(int(number) - first, [("0", person)])
    return _Found(columns, frames, count, (skeleton,))


def _columns(joints: np.ndarray, skeleton: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The columns of joints (..., 2 to 4) and their values with a confidence."""
    width = joints.shape[-1]
    if width == 4:
        return _XYZ, joints
    if width == 3 and skeleton.startswith(("coco", "openpose")):
        return _UV, joints
    seen = (joints != 0).any(-1)
    seen[..., SKELETONS[skeleton].root] |= seen.any(-1)
    joints = np.concatenate([joints, seen[..., None].astype(joints.dtype)], -1)
    return (_UV if width == 2 else _XYZ), joints


# ---- NumPy ---------------------------------------------------------------------------------------


def _numpy(data: bytes, skeleton: str) -> _Found:
    array = read_array(data)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[-1] not in (2, 3, 4) or not array.shape[0]:
        raise ValueError(f"an array of {array.shape}, not (T, J, 2 to 4) or (T, P, J, 2 to 4)")
    num_frames, num_people, num = array.shape[:3]
    names = [skeleton] if skeleton else [n for n in SKELETONS if len(SKELETONS[n].joints) == num]
    if len(names) != 1 or num != len(SKELETONS[names[0]].joints):
        raise ValueError(
            f"an array of {num} joints, which is no skeleton's number"
            if not names
            else f"{num} joints, which {skeleton} does not have"
            if skeleton
            else f"say which skeleton it is: {', '.join(names)}"
        )
    if not 0 < num_people <= MAX_IN_VIEW or num_frames > MAX_FRAMES:
        raise ValueError(f"{num_people} people in {num_frames} frames, too many or none")
    columns, values = _columns(array.astype(np.float64), names[0])
    frames: dict[int, _People] = {
        t: [(f"{p}", values[t, p]) for p in range(num_people)] for t in range(num_frames)
    }
    return _Found(columns, frames, num_frames, names)


# ---- JSON ----------------------------------------------------------------------------------------


def _json(text: str) -> _Found:
    try:
        content: Any = parse_json(text, lax=True)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise ValueError(f"damaged JSON, or cut off: {error}") from error
        try:  # an object a line
            content = [parse_json(line, lax=True) for line in lines]
        except ValueError:
            raise ValueError(f"damaged JSON, or cut off: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("people"), list):
        return _Found(_UV, *_openpose([(0, content)]))
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content["annotations"], content.get("images"), content)
    if isinstance(content, list) and any(
        isinstance(row, dict) and "image_id" in row and "keypoints" in row for row in content[:1]
    ):
        return _coco(content, None, {})
    return _mediapipe(content)


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"{str(value)[:40]!r} where a number has to be")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def _triples(values: object, what: str) -> np.ndarray:
    """(J, 3) of a flat list: u, v, confidence."""
    if not isinstance(values, list) or not values or len(values) % 3:
        count = len(values) if isinstance(values, list) else 0
        raise ValueError(f"{what} are {count} numbers, not three for each joint")
    return np.array([_number(value) for value in values]).reshape(-1, 3)


def _fps(content: dict) -> float | None:
    value = content.get("fps")
    return float(value) if isinstance(value, int | float) and 0 < value <= 1000 else None


def _openpose_files(path: Path) -> Iterator[tuple[int, object]]:
    """Numbers and contents of the files of one video: of all in a folder, or `folder/<video>`."""
    folder, wanted = (path, None) if is_folder(path) else (path.parent, path.name)
    if not is_folder(folder):
        raise ValueError("there is no such file")
    with reading(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".json"))
    found = [match for match in map(_OPENPOSE_NAME.fullmatch, names) if match]
    if wanted is not None:
        found = [match for match in found if match[1] == wanted]
    if not found:
        where = f"no files {wanted}_<number>_keypoints.json" if wanted else "no files of poses"
        raise ValueError(f"{where} in {folder}" if wanted else f"{where} (JSON, one a frame)")
    videos = sorted({match[1] for match in found})
    if len(videos) > 1:
        raise ValueError(
            f"a folder of {len(videos)} videos: give one of them, such as {path / videos[0]}"
        )
    if len(found) > MAX_FRAMES:
        raise ValueError(f"{len(found)} files, more than {MAX_FRAMES}")
    found.sort(key=lambda match: (int(match[2][-18:]), match[0]))
    total = 0
    for match in found:
        file = folder / match[0]
        with reading(file):
            data = read_limited(file, MAX_BYTES)
        total += len(data)
        if total > 16 * MAX_BYTES:
            raise ValueError(f"more than {16 * MAX_BYTES} bytes")
        try:
            yield int(match[2][-18:]), parse_json(data, lax=True)
        except ValueError as error:
            raise ValueError(f"{file.name}: damaged JSON, or cut off: {error}") from error


def _openpose(
    contents: Iterator[tuple[int, object]] | list,
) -> tuple[dict[int, _People], int, tuple[str, ...]]:
    frames: dict[int, _People] = {}
    for number, content in contents:
        people = content.get("people") if isinstance(content, dict) else None
        if not isinstance(people, list):
            raise ValueError(f"frame {number} has no list of people")
        if number in frames:
            continue
        frames[number] = []
        for person in people:
            if not isinstance(person, dict):
                raise ValueError(f"frame {number} has a person that is no object")
            values = person.get("pose_keypoints_2d", person.get("pose_keypoints"))
            name = person.get("person_id")
            name = name[0] if isinstance(name, list) and name else name
            known = f"{name}" if type(name) is int and name >= 0 else None
            joints = _triples(values, f"the key points of a person of frame {number}")
            frames[number].append((known, joints))
    frames = _without_half_known(frames)
    first, last = min(frames), max(frames)
    return (
        {number - first: people for number, people in frames.items()},
        last - first + 1,
        ("openpose25", "openpose18"),
    )


def _without_half_known(frames: dict[int, _People]) -> dict[int, _People]:
    """Where some people have no identity, nobody's counts."""
    if all(name is not None for people in frames.values() for name, _ in people):
        return frames
    return {t: [(None, joints) for _, joints in people] for t, people in frames.items()}


def _coco(annotations: object, images: object, content: dict) -> _Found:
    """COCO's annotations with their images, or a list of results without."""
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise ValueError("its annotations are no list of objects")
    size = None
    if images is not None:
        size, numbers = read_images(images)
    else:
        ids = {a.get("image_id"): None for a in annotations if is_id(a.get("image_id"))}
        numbers = {name: last_number(name) for name in ids}
        first = 0 if 0 in numbers.values() else 1
        numbers = {name: number - first for name, number in numbers.items()}
    frames: dict[int, _People] = {}
    whole = True
    for about in annotations:
        if not about.get("keypoints"):
            continue  # a box without joints
        name = about.get("image_id")
        if not is_id(name) or name not in numbers:
            raise ValueError(f"an annotation is of the image {str(name)[:40]!r}, which is none")
        joints = _triples(about["keypoints"], f"the key points of a person of image {name}")
        whole = whole and bool(np.isin(joints[:, 2], (0, 1, 2)).all())
        track = about.get("track_id")
        known = f"{track}" if type(track) in (int, str) else None
        frames.setdefault(numbers[name], []).append((known, joints))
    people = [joints for there in frames.values() for _, joints in there]
    if whole and any((joints[:, 2] == 2).any() for joints in people):
        for joints in people:  # 1: labelled but hidden, 2: seen
            joints[:, 2] /= 2
    count = max(numbers.values(), default=-1) + 1
    frames = _without_half_known(frames)
    return _Found(_UV, frames, count, ("coco17",), _fps(content), size)


# What MediaPipe's languages call these, without capitals and _.
_LANDMARKS = ("poselandmarks", "landmarks")
_WORLD = ("poseworldlandmarks", "worldlandmarks")
_FRAME = ("frame", "framenumber", "frameindex", "frameid")


def _plain(content: dict) -> dict[str, Any]:
    return {name.lower().replace("_", ""): value for name, value in content.items()}


def _mediapipe(content: Any) -> _Found:
    fps = None
    if isinstance(content, dict):
        fps = _fps(content)
        if isinstance(content.get("frames"), list):
            content = content["frames"]
        elif content and all(re.fullmatch(r"[0-9]{1,9}", name) for name in content):
            content = [
                value | {"frame": int(name)}
                if isinstance(value, dict)
                else {"frame": int(name), "landmarks": value}
                for name, value in content.items()
            ]
        else:
            content = [content]
    if not isinstance(content, list) or not content:
        raise ValueError("JSON of another layout than those that are read")
    if len(content) == 33 and all(_is_point(point) for point in content):
        content = [content]  # one frame
    both: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    numbers = []
    for i, frame in enumerate(content):
        number, flat, world = i, frame, None
        if isinstance(frame, dict):
            plain = _plain(frame)
            if not plain.keys() & {*_LANDMARKS, *_WORLD, *_FRAME, "landmark"}:
                raise ValueError(f"frame {i} has no landmarks: JSON of another layout")
            flat = next((plain[n] for n in (*_LANDMARKS, "landmark") if n in plain), None)
            world = next((plain[n] for n in _WORLD if n in plain), None)
            number = next((plain[n] for n in _FRAME if n in plain), i)
            if type(number) is not int or not 0 <= number < 2**53:
                raise ValueError(f"frame {i} has the number {str(number)[:40]!r}")
        numbers.append(number)
        both.setdefault(number, (_landmarks(flat, i), _landmarks(world, i)))
    first, count = min(numbers), max(numbers) - min(numbers) + 1
    there = [pair for pair in both.values() if pair[0] or pair[1]]
    has_flat, has_world = (all(pair[k] for pair in there) for k in (0, 1))
    if not (has_flat or has_world):
        raise ValueError("some people have image landmarks only, others world landmarks only")
    columns = COLUMNS if has_flat and has_world else _UV if has_flat else _XYZ
    frames: dict[int, _People] = {}
    for number, (flat, world) in both.items():
        if has_flat and has_world:
            if len(flat) != len(world):
                raise ValueError(
                    f"frame {number} has image landmarks of {len(flat)} people, but world "
                    f"landmarks of {len(world)}"
                )
            people = [
                np.hstack([w[:, :3], f[:, [0, 1, 3]]]) for f, w in zip(flat, world, strict=True)
            ]
        elif has_flat:
            people = [f[:, [0, 1, 3]] for f in flat]
        else:
            people = world
        frames[number - first] = [(None, joints) for joints in people]
    size = (1.0, 1.0) if has_flat else None
    return _Found(columns, frames, count, ("blazepose33",), fps, size)


def _is_point(value: object) -> bool:
    if isinstance(value, dict):
        return "x" in value and "y" in value
    return isinstance(value, list) and len(value) > 1 and type(value[0]) in (int, float)


def _landmarks(value: object, frame: int) -> list[np.ndarray]:
    """The people of a frame, each (33, 4): x, y, z, visibility."""
    if isinstance(value, dict) and "landmark" in value:
        value = value["landmark"]
    if value is None or value == []:
        return []
    if not isinstance(value, list):
        raise ValueError(f"frame {frame} has landmarks that are no list")
    if not _is_point(value[0]):
        return [person for inner in value for person in _person(inner, frame)]
    return _person(value, frame)


def _person(value: object, frame: int) -> list[np.ndarray]:
    if isinstance(value, dict) and "landmark" in value:
        value = value["landmark"]
    if value is None or value == []:
        return []
    if not isinstance(value, list) or not all(_is_point(point) for point in value):
        raise ValueError(f"frame {frame} has landmarks that are no points")
    joints = np.zeros((len(value), 4))
    for row, point in zip(joints, value, strict=True):
        if isinstance(point, dict):
            seen = point.get("visibility", point.get("presence", 1))
            point = [point["x"], point["y"], point.get("z", 0), seen]
        numbers = [_number(n) for n in point[:4]]
        row[:] = (numbers + [0.0] * (3 - len(numbers)) + [1.0])[:4]
    return [joints]
