"""What is cut out of wide footage: boxes around a subject over time become the box of a clip.

The box of a clip has one size, so that nothing seems to grow or shrink. It stays where it is if the
subject's whole way fits into `STILL` times the size that following would need: then what rests in
the video rests in the clip, to the pixel. Only otherwise it moves, along the smoothed way.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from pretrain.data.boxes import Boxes
from pretrain.data.encode import cut_places
from pretrain.data.flow_files import refuse_proportions
from pretrain.data.guard import Refused
from pretrain.data.tracks import regions_of

# Of a subject's size, on each side. What moves is often less than who moves it.
MARGIN = {"motion": 0.3, "boxes": 0.15, "pose": 0.15}
STILL = 1.5
LEAST = 32  # pixels of a box's side
SHORTEST = 0.5  # seconds that somebody is in view, or no clip is made of it
GAP = 2.0  # seconds without a box that are filled in; after longer ones another clip begins
SMOOTH = 2.0  # seconds over which a moving box's way is smoothed
KNOT = 0.5  # seconds between the places of a moving box that are noted; it goes straight between
MOST = 64  # subjects in view at any time


@dataclass(frozen=True)
class Track:
    """Where one subject is.

    Attributes:
        who: identity in its video.
        ticks: numbers of frames, (N,) ascending.
        boxes: left, top, right and bottom in pixels of the picture, (N, 4).
    """

    who: str
    ticks: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Cut:
    """A clip that is to be cut out of a video.

    Attributes:
        start: number of its first frame.
        stop: and of the one behind its last.
        size: width and height of its box, whole pixels of the picture.
        way: where the box is, as (frame from `start`, left, top), straight lines between.
        who: the subject; None: it is the whole picture.
        why: of a whole picture, why.
    """

    start: int
    stop: int
    size: tuple[int, int]
    way: tuple[tuple[float, float, float], ...]
    who: str | None = None
    why: str = ""

    def note(self, method: str, picture: tuple[int, int], total: int) -> dict:
        """What the index says of it; `total`: frames of the whole video."""
        about = {"method": method, "frame": self.start, "of": total, "picture": [*picture]}
        if self.who is None:
            return about | {"whole": self.why}
        way = [[*place] for place in self.way]
        return about | {"subject": self.who, "size": [*self.size], "way": way}


def whole_cut(start: int, stop: int, picture: tuple[int, int], why: str) -> Cut:
    """The whole picture of some frames."""
    return Cut(start, stop, picture, ((0, 0, 0),), None, why)


def places(way: Sequence, count: int) -> np.ndarray:
    """Left and top of a box in each of `count` frames, (count, 2), of `Cut.way`."""
    at, left, top = np.array(way, float).T
    frames = np.arange(count)
    return np.stack([np.interp(frames, at, left), np.interp(frames, at, top)], 1)


def is_cut(clip: dict) -> bool:
    """Whether a clip, by what is noted of it, shows a part of its video's picture."""
    return "size" in clip.get("follow", {})


def crop_flow(
    flow: np.ndarray, way: np.ndarray, size: Sequence[int], picture: Sequence[int],
    out: tuple[int, int],
) -> np.ndarray:  # fmt: skip
    """Flow as it is in a box of the picture, which may move itself, scaled to a clip.

    Args:
        flow: (T, 2, h, w), pixels of frames of any size with the picture's proportions.
        way: left and top of the box in each frame, (T + 1, 2), pixels of the picture.
        size: its width and height.
        picture: width and height of the picture.
        out: width and height of the clip.

    Raises:
        Refused: the frames have other proportions.
    """
    refuse_proportions(flow, *picture)
    h, w = flow.shape[2:]
    shrunk = np.array([w, h]) / picture
    scale = np.array(out) / size
    planes = []
    for planes_of_pair, place in zip(flow, way[:-1], strict=True):
        low = place * shrunk
        high = np.minimum(low + size * shrunk, (w, h))
        for plane in planes_of_pair.astype(np.float32):
            cut = Image.fromarray(plane).resize(out, Image.Resampling.BILINEAR, (*low, *high))
            planes.append(np.asarray(cut))
    cut_out = np.stack(planes).reshape(len(flow), 2, out[1], out[0])
    moved = np.diff(way, axis=0) * scale
    ratio = (scale / shrunk).astype(np.float32).reshape(1, 2, 1, 1)
    return cut_out * ratio - moved.astype(np.float32)[:, :, None, None]


def crop_frame(
    frame: av.VideoFrame, place: np.ndarray, size: tuple[int, int], out: tuple[int, int]
) -> av.VideoFrame:
    """A part of a frame, yuv420p, scaled; the place may lie between pixels."""
    cut = av.VideoFrame(*out, "yuv420p")
    for number, (old, new) in enumerate(zip(frame.planes, cut.planes, strict=True)):
        coarse = 2 if number else 1
        rows = np.frombuffer(memoryview(old), np.uint8).reshape(old.height, old.line_size)
        picture = Image.fromarray(np.ascontiguousarray(rows[:, : old.width]))
        low = place / coarse
        high = np.minimum(low + np.array(size) / coarse, picture.size)
        part = picture.resize((new.width, new.height), Image.Resampling.BICUBIC, (*low, *high))
        target = np.frombuffer(memoryview(new), np.uint8).reshape(new.height, new.line_size)
        target[:, : new.width] = np.asarray(part)
    return cut


# ---- what is cut out


def plan_cuts(
    tracks: list[Track], method: str, picture: tuple[int, int], fps: Fraction, longest: int,
    total: int,
) -> list[Cut]:  # fmt: skip
    """The clips of these subjects: of each, equal parts of the times in which it is there.

    Args:
        tracks: of one video.
        method: of `pretrain.data.methods.FOLLOW`.
        picture: width and height of the upright frames, pixels.
        fps: frames a second.
        longest: frames of a clip at most, see `cut_places`.
        total: frames of the video.

    Raises:
        Refused: too many are in view at once.
    """
    cuts = []
    gap, shortest = GAP * fps, min(total, SHORTEST * fps)
    for track in tracks:
        breaks = np.flatnonzero(np.diff(track.ticks) > max(1, gap)) + 1
        for part in np.split(np.arange(len(track.ticks)), breaks):
            first, last = int(track.ticks[part[0]]), int(track.ticks[part[-1]])
            if last + 1 - first < shortest:
                continue
            ticks = np.arange(first, last + 1)
            sides = [np.interp(ticks, track.ticks[part], side) for side in track.boxes[part].T]
            boxes = np.stack(sides, 1)
            starts = sorted(cut_places(len(ticks), longest))
            for start, stop in itertools.pairwise([*starts, len(ticks)]):
                about = _follow(boxes[start:stop], method, picture, fps)
                cuts.append(Cut(first + start, first + stop, *about, track.who))
    cuts.sort(key=lambda cut: cut.start)
    changes = sorted([(c.start, 1) for c in cuts] + [(c.stop, -1) for c in cuts])
    if max(itertools.accumulate(step for _, step in changes), default=0) > MOST:
        raise Refused(f"has over {MOST} people in view at once: leave out some of their boxes")
    return cuts


def _follow(
    boxes: np.ndarray, method: str, picture: tuple[int, int], fps: Fraction
) -> tuple[tuple[int, int], tuple[tuple[float, float, float], ...]]:
    """Size and way of the box of one clip, of its subject's boxes (T, 4)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    own = float(np.percentile(sides.max(1), 90))
    wide = 1 + 2 * MARGIN[method]
    low = np.percentile(boxes[:, :2], 2, axis=0)
    high = np.percentile(boxes[:, 2:], 98, axis=0)
    resting = float((high - low).max()) + own * (wide - 1)
    still = resting <= STILL * own * wide
    side = max(LEAST, resting if still else own * wide)
    size = min(math.ceil(side), picture[0]), min(math.ceil(side), picture[1])
    room = np.array(picture) - size
    if still or (room == 0).all():
        place = np.clip(np.round((low + high - size) / 2), 0, room)
        return size, ((0, int(place[0]), int(place[1])),)
    from scipy.signal import savgol_filter  # half a second, and only those who go about need it

    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    count = len(boxes)
    window = min(count, max(1, round(SMOOTH * fps)))
    window -= window % 2 == 0
    if window > 2:  # means over time; lines at both ends
        centres = savgol_filter(centres, window, 1, axis=0, mode="interp")
    pieces = max(1, round((count - 1) / max(1, KNOT * fps)))
    knots = np.unique(np.round(np.linspace(0, count - 1, pieces + 1)).astype(int))
    lefts = np.clip(np.round(centres[knots] - np.array(size) / 2, 2), 0, room)
    return size, tuple((int(t), float(x), float(y)) for t, (x, y) in zip(knots, lefts, strict=True))


# ---- boxes and poses that are known


def box_tracks(
    boxes: Boxes, seen: tuple[int, int], picture: tuple[int, int], fps: Fraction, total: int
) -> list[Track]:
    """Tracks of boxes that came with a video; those outside of the picture do not count.

    Args:
        boxes: as they were read.
        seen: width and height of the upright frames as they are stored.
        picture: of the same with square pixels, in which the tracks are.
        fps: frames a second.
        total: frames of the video.

    Raises:
        Refused: there are boxes behind its end.
    """
    scale = np.tile(np.array(picture) / np.array(boxes.frame or seen, float), 2)
    tracks = []
    for who, (when, sides) in boxes.tracks.items():
        ticks = np.round(when * float(fps)).astype(int) if boxes.seconds else when.astype(int)
        if boxes.still:
            ticks, sides = np.array([0, total - 1])[: min(2, total)], sides[[0, 0]][: min(2, total)]
        elif ticks[-1] >= total + (fps if boxes.seconds else 0):
            what = f"{when[-1]:g} s" if boxes.seconds else f"frame {ticks[-1]}"
            raise Refused(
                f"has boxes at {what}, and the video has {total} frames, {float(total / fps):g} s "
                f"at {float(fps):g} a second: number its frames from the first, or give a column "
                "time of seconds"
            )
        ticks = np.minimum(ticks, total - 1)
        ticks, first = np.unique(ticks, return_index=True)
        inside = np.clip(sides[first] * scale, 0, np.tile(picture, 2))
        there = (inside[:, 2:] - inside[:, :2]).min(1) > 0
        if there.any():
            tracks.append(Track(who, ticks[there], inside[there]))
    return tracks


def pose_tracks(
    values: np.ndarray, columns: tuple[str, ...], frame: tuple[float, float],
    picture: tuple[int, int],
) -> list[Track]:  # fmt: skip
    """Tracks of people given by their joints.

    Args:
        values: (T, P, J, K) of these columns, see `pretrain.data.poses.COLUMNS`, with u and v.
        columns: see there.
        frame: width and height of the frame in the units of u and v.
        picture: width and height of the frames, pixels.
    """
    u = columns.index("u")
    tracks = []
    scale = np.tile(np.array(picture) / np.array(frame), 2)
    for person in range(values.shape[1]):
        joints = values[:, person][..., [u, u + 1, -1]]
        ticks = np.flatnonzero((joints[..., -1] > 0).any(-1))
        if not len(ticks):
            continue
        boxes = np.clip(regions_of(list(joints[ticks])) * scale, 0, np.tile(picture, 2))
        there = (boxes[:, 2:] - boxes[:, :2]).min(1) > 0
        if there.any():
            tracks.append(Track(str(person + 1), ticks[there], boxes[there]))
    return tracks
