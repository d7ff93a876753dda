"""Cuts out of a wide video those who act in it: looks where they are first, then cuts.

A video is decoded twice. The first time it is looked at in the parts into which packing would cut
it, so that memory holds one part; the second time everybody's clips are written.
"""

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from pretrain.data import methods, motion
from pretrain.data.beside import given_poses, opened, refuse_frames
from pretrain.data.blazepose import estimate_poses, load_networks
from pretrain.data.boxes import MAX_BYTES, parse_boxes, still_boxes
from pretrain.data.cuts import (
    Cut,
    Track,
    box_tracks,
    crop_frame,
    places,
    plan_cuts,
    pose_tracks,
    whole_cut,
)
from pretrain.data.encode import (
    BYTES_A_CLIP,
    FREE_BYTES,
    FREE_CLIPS,
    GROWTH,
    Clips,
    cut_places,
    target_size,
)
from pretrain.data.guard import MAX_PIXELS, Refused
from pretrain.data.poses import COLUMNS

Shown = Callable[[], AbstractContextManager[Iterator[tuple[av.VideoFrame, int]]]]
_Frames = Iterable[tuple[int, int, av.VideoFrame]]  # number, how many ticks it lasts, upright


class Follow:
    """The subjects of one video, and their clips.

    Args:
        shown: opens the frames, each with the ticks that it lasts; called twice.
        scan: of the video: fps, ticks, aspect and size (bytes).
        longest: frames of a clip at most.
        short_side: pixels; larger boxes are scaled down to it.
        beat: called whenever there was progress.
        method: of `methods.FOLLOW`.
        text: of boxes: those of the whole video, see `boxes.still_boxes`.
        file: of boxes or poses: path and member of the file with them.
        video: what a file of boxes of many videos calls this one.
        camera: of poses: see `beside.given_poses`.
        skeleton: of poses: likewise.
        estimate: of poses: the method that estimates them, of `methods.METHODS`.

    Raises:
        Refused: the video, its boxes or its poses cannot be used.
    """

    def __init__(
        self,
        shown: Shown,
        scan: dict,
        longest: int,
        short_side: int,
        beat: Callable[[], None],
        method: str,
        text: str = "",
        file: dict[str, Any] | None = None,
        video: str = "",
        camera: dict[str, Any] | None = None,
        skeleton: str = "",
        estimate: str = "",
    ):
        self.shown, self.scan, self.longest, self.short_side = shown, scan, longest, short_side
        self.beat, self.method, self.estimate = beat, method, estimate
        self.whole = Clips("", scan, scan["ticks"], MAX_PIXELS, write=False)
        self.total = 0
        self.cuts: list[Cut] = []
        if method == "boxes":
            self._known(self._boxes(text, file, video), "has no boxes")
        elif method == "pose" and not estimate:
            self._known(self._poses(file, camera, skeleton), "has no poses")
        else:
            self._look()

    def anyone(self) -> bool:
        """Whether anything is to be cut out, and not the whole picture at all times."""
        return any(cut.who is not None for cut in self.cuts)

    @property
    def picture(self) -> tuple[int, int]:
        """Width and height of the upright frames, with square pixels."""
        turned = self.whole.turn is not None and self.whole.turn[0]
        return self.whole.size[::-1] if turned else self.whole.size

    def noted(self, clips: list[dict]) -> list[dict]:
        """Clips of the whole picture, with the note that they are."""
        before = 0
        for clip in clips:
            why = next((cut.why for cut in self.cuts if cut.start <= before < cut.stop), "")
            cut = whole_cut(before, before + clip["frames"], self.picture, why)
            clip["follow"] = cut.note(self.method, self.picture, self.total)
            before += clip["frames"]
        return clips

    # ---- looking

    def _frames(self) -> Iterator[tuple[int, int, av.VideoFrame]]:
        """Every frame as it is stored, with its number and how long it lasts."""
        number = 0
        with self.shown() as frames:
            for frame, repeats in frames:
                self.whole.add(frame, repeats)
                yield number, repeats, frame
                number += repeats
        if not number:
            raise Refused("holds no frame that can be decoded")

    def _known(self, tracks: Callable[[], tuple[list[Track], str]], none: str) -> None:
        """Plan by what came with the video; frames are counted."""
        for number, repeats, _ in self._frames():
            self.total = number + repeats
            self.beat()
        found, why = tracks()
        self._plan(found)
        if not self.cuts:
            why = why or ("nobody is in view for half a second" if found else none)
            self.cuts = [whole_cut(0, self.total, self.picture, why)]

    def _plan(self, tracks: list[Track]) -> None:
        size = self.picture
        fps = self.scan["fps"]
        self.cuts += plan_cuts(tracks, self.method, size, fps, self.longest, self.total)

    def _boxes(
        self, text: str, file: dict | None, video: str
    ) -> Callable[[], tuple[list[Track], str]]:
        try:
            if file is not None:
                with opened(file) as given:
                    boxes = parse_boxes(given.read(MAX_BYTES + 1), video)
            elif text:
                boxes = still_boxes(text)
            else:
                return lambda: ([], "")
        except ValueError as error:
            raise Refused(f"its boxes: {error}") from error

        def tracks() -> tuple[list[Track], str]:
            size = self.picture
            found = box_tracks(boxes, self.whole.seen, size, self.scan["fps"], self.total)
            wide, high = self.whole.seen
            return found, "" if found else f"all boxes lie outside of its {wide}x{high} pixels"

        return tracks

    def _poses(
        self, file: dict | None, camera: dict | None, skeleton: str
    ) -> Callable[[], tuple[list[Track], str]]:
        if file is None:
            return lambda: ([], "")
        try:
            poses = given_poses(file, camera, skeleton)
        except Refused as error:
            raise Refused(f"its poses: {error}", error.retry) from error
        if "u" not in poses.columns:
            return lambda: ([], "its poses do not say where in the picture joints are")

        def tracks() -> tuple[list[Track], str]:
            refuse_frames(poses, self.total)
            frame = poses.frame or self.whole.seen
            return pose_tracks(poses.values, poses.columns, frame, self.picture), ""

        return tracks

    def _look(self) -> None:
        """Plan by what frames show, a part after the other."""
        starts = sorted(cut_places(self.scan["ticks"], self.longest))
        part_of = lambda shown: bisect.bisect(starts, shown[0])
        find = self._find_people if self.estimate else self._find_motion
        for _, part in itertools.groupby(self._frames(), key=part_of):
            start = self.total
            tracks, why = find(part)
            before = len(self.cuts)
            self._plan(tracks)
            if len(self.cuts) == before:
                why = why or "nobody is in view for half a second"
                self.cuts.append(whole_cut(start, self.total, self.picture, why))

    def _find_motion(self, part: _Frames) -> tuple[list[Track], str]:
        step, due = motion.sampling_step(self.scan["fps"], self.longest), 0
        samples: list[np.ndarray] = []
        ticks: list[int] = []
        for number, repeats, frame in part:
            self.total = number + repeats
            if number >= due and len(samples) < 2 * motion.MOST_SAMPLES:
                upright = self.whole.convert(frame).planes[0]
                rows = np.frombuffer(memoryview(upright), np.uint8)
                rows = rows.reshape(upright.height, upright.line_size)[:, : upright.width]
                size = motion.sampled_size(upright.width, upright.height)
                small = Image.fromarray(np.ascontiguousarray(rows)).resize(
                    size, Image.Resampling.BOX
                )
                samples.append(np.asarray(small))
                ticks.append(number)
                due = number + step
            self.beat()
        found = motion.find_motion(
            np.stack(samples), np.array(ticks), self.total, self.picture, self.scan["fps"]
        )
        return found.tracks, found.why

    def _find_people(self, part: _Frames) -> tuple[list[Track], str]:
        to_rgb, start = VideoReformatter(), self.total
        lasting: list[int] = []

        def pictures() -> Iterator[np.ndarray]:
            for number, repeats, frame in part:
                self.total = number + repeats
                lasting.append(repeats)
                rgb = to_rgb.reformat(self.whole.convert(frame), format="rgb24", threads=1)
                yield rgb.to_ndarray()

        networks = load_networks(methods.pose_weights(), in_torch=False)
        smooth = methods.METHODS["pose"][self.estimate]["smooth"]
        values, _ = estimate_poses(pictures(), float(self.scan["fps"]), networks, smooth, self.beat)
        size = self.picture
        tracks = pose_tracks(np.repeat(values, lasting, axis=0), COLUMNS, size, size)
        moved = [Track(track.who, track.ticks + start, track.boxes) for track in tracks]
        return moved, "" if moved else "no person was found"

    # ---- cutting

    def write(self, out: str) -> list[dict]:
        """Write everybody's clips, `out-0000-0000.mp4`, `out-0001-0000.mp4`, ...

        Raises:
            Refused: the frames are others than before, or the clips are too many or too large.
            DiskError: a clip could not be written.
        """
        size = self.scan["size"]
        if len(self.cuts) > (most := FREE_CLIPS + size // BYTES_A_CLIP):
            raise Refused(f"would become {len(self.cuts)} clips, more than {most} for its size")
        with contextlib.ExitStack() as stack:  # in trouble, each removes its file
            done = self._write(out, stack)
            if len(done) < len(self.cuts):
                raise Refused("gave fewer frames when it was decoded again")
            if sum(clip["bytes"] for clip in done.values()) > FREE_BYTES + GROWTH * size:
                raise Refused("its clips take too many bytes for its size")
        return [done[i] for i in range(len(self.cuts))]

    def _write(self, out: str, stack: contextlib.ExitStack) -> dict[int, dict]:
        done: dict[int, dict] = {}
        at_work: dict[int, tuple[Clips, np.ndarray]] = {}
        waiting = list(reversed(range(len(self.cuts))))
        for number, repeats, frame in self._frames():
            upright = self.whole.convert(frame)
            for tick in range(number, number + repeats):
                while waiting and self.cuts[waiting[-1]].start <= tick:
                    cut = self.cuts[waiting[-1]]
                    length = cut.stop - cut.start
                    scan = self.scan | {"ticks": length, "aspect": None}
                    clips = Clips(f"{out}-{waiting[-1]:04d}", scan, length, self.short_side, True)
                    at_work[waiting.pop()] = stack.enter_context(clips), places(cut.way, length)
                for i, (clips, way) in list(at_work.items()):
                    cut = self.cuts[i]
                    scaled = target_size(*cut.size, None, self.short_side)
                    clips.add(crop_frame(upright, way[tick - cut.start], cut.size, scaled), 1)
                    clips.repeated += tick > number
                    if tick + 1 == cut.stop:
                        done[i] = self._finished(i, clips)
                        del at_work[i]
            self.beat()
        return done

    def _finished(self, number: int, clips: Clips) -> dict:
        cut = self.cuts[number]
        clips.finish()
        (clip,) = clips.done
        return clip | {
            "start": round(float(cut.start / self.scan["fps"]), 6),
            "seen": self.whole.seen,
            "follow": cut.note(self.method, self.picture, self.total),
        }
