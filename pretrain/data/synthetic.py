"""The synthetic dataset ("action world"): clips, captions, flow and poses of a drawn figure.

It needs no download.

    clip_specs(seed, num_clips)  which clips there are: action, person, place, split
    render(spec)                 one clip in memory
    make_dataset(out)            all as files, with a list `clips.csv` that the packer reads

The dataset is a pure function of its parameters. It is meant to be hard from one frame: the two
actions of a reversed pair hold the same frames in another order, the others share postures, props,
places and camera moves, so that what happens has to be read from the motion.
"""

import contextlib
import csv
import io
import itertools
import json
import multiprocessing
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from pretrain.data.drawing import draw, figure_parts, thing_parts
from pretrain.data.figure import (
    ACTIONS,
    JOINTS,
    REVERSED_PAIRS,
    Person,
    make_person,
    make_pose,
    rotation,
)
from pretrain.data.places import PLACES, cast_shadow, dress, look_at, paint_place
from pretrain.data.pool import usable_cores
from pretrain.data.progress import Bar
from pretrain.files import read_json, replacing

__all__ = [
    "ACTIONS",
    "JOINTS",
    "REVERSED_PAIRS",
    "SYNTHETIC_VERSION",
    "Clip",
    "ClipSpec",
    "clip_specs",
    "make_dataset",
    "render",
]

# Raise it when a change of ours changes the pixels: older datasets are then refused.
SYNTHETIC_VERSION = 3
_NUM_PLACES = 42
_SPLITS = {"val": 0.10, "test": 0.25, "compose": 0.10}  # the rest is for training
_HELD = 5  # of so many people, and of so many places, a training clip of an action leaves one out
_PLAYED_BACKWARDS = tuple(second for _, second in REVERSED_PAIRS)

VERBS = {
    "sit_down": (
        "sits down", "takes a seat", "lowers onto a chair",
        "goes from standing to sitting", "has a seat on a chair", "settles down on a chair",
    ),
    "stand_up": (
        "stands up", "gets up", "rises from a chair",
        "goes from sitting to standing", "leaves the chair and stands", "gets to their feet",
    ),
    "pick_up": (
        "picks up a box", "lifts a box off the floor", "bends down and takes a box",
        "raises a box from the ground", "collects a box from the floor",
        "grabs a box and straightens up",
    ),
    "put_down": (
        "puts down a box", "sets a box on the floor", "bends down and leaves a box there",
        "lowers a box to the ground", "places a box on the floor", "drops off a box",
    ),
    "put_on": (
        "puts on a hat", "places a hat on their head", "starts wearing a hat",
        "raises a hat and wears it", "covers their head with a hat", "dons a hat",
    ),
    "take_off": (
        "takes off a hat", "removes a hat from their head", "stops wearing a hat",
        "lifts a hat off and lowers it", "uncovers their head", "doffs a hat",
    ),
    "open": (
        "opens a cupboard", "pulls a cupboard door open", "swings open a door",
        "opens up a wall cupboard", "unlatches a cupboard and opens it", "draws a small door open",
    ),
    "close": (
        "closes a cupboard", "pushes a cupboard door shut", "swings a door shut",
        "shuts a wall cupboard", "closes an open cupboard door", "presses a small door closed",
    ),
    "nod": (
        "nods", "nods their head", "says yes with their head",
        "moves their head up and down", "gives a nod", "agrees with a nod",
    ),
    "shake_head": (
        "shakes their head", "says no with their head", "turns their head from side to side",
        "moves their head left and right", "disagrees with a shake of the head",
        "gives a shake of the head",
    ),
    "drink": (
        "drinks from a cup", "takes a sip", "raises a cup to their mouth and drinks",
        "has a drink", "sips from a cup", "drinks something",
    ),
    "answer_phone": (
        "answers a phone", "holds a phone to their ear", "takes a call",
        "raises a phone to their ear", "listens to a phone", "makes a phone call",
    ),
    "wave": (
        "waves", "waves a hand", "waves hello",
        "greets with a raised hand", "moves a raised hand from side to side", "gives a wave",
    ),
    "clap": (
        "claps", "claps their hands", "applauds",
        "brings both hands together again and again", "gives a round of applause",
        "beats their hands together",
    ),
    "stir": (
        "stirs", "stirs with a spoon", "moves a spoon in circles",
        "mixes something in a bowl", "stirs a pot", "turns a spoon round and round",
    ),
    "walk": (
        "walks", "takes a walk", "walks along",
        "steps forward at a walk", "strolls", "goes for a stroll",
    ),
    "jog": (
        "jogs", "jogs on the spot", "runs in place",
        "lifts their knees running", "trots without moving ahead", "does a running exercise",
    ),
    "jump": (
        "jumps", "jumps up and down", "hops on both feet",
        "leaps into the air", "springs up from the ground", "bounces on both legs",
    ),
}  # fmt: skip
_SENTENCES = (
    "{who} {verb}",
    "{who} {verb} {where}",
    "{where}, {who} {verb}",
    "a video in which {who} {verb}",
    "a clip of {who}, who {verb} {where}",
    "{where} there is {who}, who {verb}",
)


@dataclass(frozen=True)
class ClipSpec:
    """The content of a clip, for `render`; person and place are numbers that fix appearance."""

    action: str
    person: int
    place: int
    seed: int
    split: str


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    Attributes:
        frames: uint8 (T, H, W, 3), RGB.
        flow: float16 (T - 1, 2, H, W), pixels per frame, channel 0 to the right, 1 downwards: the
            surface seen at a pixel's centre at t is at pixel + flow at t + 1 (there it may be
            hidden). Exact up to rounding to 1/256 pixel.
        joints: float32 (T, J, 3) in the order of `JOINTS`, metres, camera axes (x right, y down, z
            away), origin on the floor where the figure stands.
        camera: float32 (T, 3), scale (pixels per metre), u0, v0. The projection is parallel: a
            point is seen at column `scale * x + u0`, row `scale * y + v0`, pixel centres at whole
            numbers.
        captions: what the clip shows, in several wordings.
    """

    frames: np.ndarray
    flow: np.ndarray
    joints: np.ndarray
    camera: np.ndarray
    captions: list[str]


# ----------------------------------------------------------------------------- what there is


def clip_specs(seed: int, num_clips: int) -> list[ClipSpec]:
    """List the clips of a dataset: balanced over actions, with three ways to be tested.

    "train", about 55 %; "val", 10 %, and "test", 25 %, of other people; and "compose", 10 %: people
    and places that occur in training, but neither this person nor this place ever with this action.
    From three clips per action on every action is in val and test, from five on also in compose.

    Raises:
        ValueError: if `num_clips` is not positive or `seed` is negative.
    """
    if num_clips < 1 or seed < 0:
        raise ValueError(
            f"the synthetic dataset needs num_clips >= 1 and seed >= 0, not {num_clips} and {seed}"
        )
    rng = np.random.default_rng([seed, 0])
    num_people = int(np.clip(num_clips // 8, 8, 80))
    # Numbers of people and clips are spread over the whole range, so that two seeds share nobody.
    people = rng.choice(2**31, num_people, replace=False)
    num_val, num_test = max(1, round(0.15 * num_people)), max(1, round(0.25 * num_people))
    val, test, train = np.split(people, [num_val, num_val + num_test])
    places = np.arange(_NUM_PLACES)
    specs = []
    for i, action in enumerate(ACTIONS):
        count = num_clips // len(ACTIONS) + (i < num_clips % len(ACTIONS))
        held_people, held_places = (
            (np.arange(n) + i) % _HELD == 0 for n in (len(train), _NUM_PLACES)
        )
        cast = {
            "val": (val, places),
            "test": (test, places),
            "compose": (train[held_people], places[held_places]),
            "train": (train[~held_people], places[~held_places]),
        }
        num = {
            "val": max(round(_SPLITS["val"] * count), int(count > 2)),
            "test": max(round(_SPLITS["test"] * count), int(count > 1)),
            "compose": max(round(_SPLITS["compose"] * count), int(count > 4)),
        }
        num["train"] = count - sum(num.values())
        for split, (who, where) in cast.items():
            for _ in range(num[split]):
                person, place = int(rng.choice(who)), int(rng.choice(where))
                specs.append(ClipSpec(action, person, place, int(rng.integers(2**31)), split))
    return [specs[i] for i in rng.permutation(num_clips)]


def write_captions(spec: ClipSpec, person: Person) -> list[str]:
    """Three sentences of what a clip shows; they depend on the arguments alone."""
    rng = np.random.default_rng([spec.seed, 4])
    kind = PLACES[spec.place % len(PLACES)]
    article = "an" if kind[0] in "aeiou" else "a"
    where = f"{'on' if kind in ('street', 'beach') else 'in'} {article} {kind}"
    article = "an" if person.shirt[0] in "aeiou" else "a"
    who = (
        f"a {person.noun}",
        f"a {person.noun} in {article} {person.shirt} shirt",
        f"a {person.noun} in {person.trousers} trousers",
        f"a {person.noun} wearing {person.shirt} and {person.trousers}",
        f"somebody in {article} {person.shirt} top",
        "a person",
    )
    verbs = rng.choice(VERBS[spec.action], 3, replace=False)
    sentences = rng.choice(_SENTENCES, 3, replace=False)
    return [
        str(s).format(who=rng.choice(who), verb=v, where=where)
        for v, s in zip(verbs, sentences, strict=True)
    ]


# ----------------------------------------------------------------------------- one clip


def render(spec: ClipSpec, size: int = 64, frames: int = 32, fps: int = 16) -> Clip:
    """Render one clip; the same arguments give the same bits on the same machine.

    Raises:
        ValueError: if the action is not one of `ACTIONS`, `size` is odd or below 16, or `frames` is
            below 2.
    """
    if spec.action not in ACTIONS:
        raise ValueError(f"unknown action {spec.action!r}; there are {', '.join(ACTIONS)}")
    _check_shape(size, frames, fps)
    person = make_person(spec.person)
    rng = np.random.default_rng([spec.seed, 2])
    facing = float(rng.choice((-1, 1)) * np.radians(rng.uniform(10, 75)))
    tilt = float(np.radians(rng.uniform(6, 20)))
    pose = make_pose(spec.action, person, spec.seed, frames, fps, side=int(np.sign(facing)))
    # Body axes, turned to where the figure faces: stage axes (x right, y up, z to the viewer).
    # Tipped by the camera's tilt, and y and z flipped: camera axes.
    stage_to_camera = rotation(0, tilt) @ np.diag([1.0, -1, -1])
    body_to_stage = rotation(1, facing)
    view = stage_to_camera @ body_to_stage

    # Camera and set are drawn for the forward action and played backwards with it.
    backwards = spec.action in _PLAYED_BACKWARDS
    joints = pose.joints @ view.T
    in_order = np.ascontiguousarray(joints[::-1]) if backwards else joints
    camera = _move_camera(in_order, rng, size, fps)
    extras = dress(rng, frames, fps, body_to_stage)
    if backwards:
        camera = camera[::-1]
        extras = [replace(p, origin=p.origin[::-1], rotation=p.rotation[::-1]) for p in extras]
    parts = [*figure_parts(pose, person), *thing_parts(pose, rng), *extras]

    density = 1.15 * float(camera[:, 0].max())
    canvas = paint_place(spec.place, 2 * size / float(camera[:, 0].min()) + 1.0, density, tilt)
    gain = rng.uniform(0.8, 1.15) * rng.uniform(0.94, 1.06, 3)
    # The place is paler than the figure, as if out of focus: moving parts should stand out from the
    # background.
    middle = canvas.mean((0, 1))
    canvas = middle + (canvas - middle) * rng.uniform(0.25, 0.65)
    canvas = np.clip(canvas * rng.uniform(0.75, 1.0) + rng.uniform(0, 30), 0, 255)
    backdrop = look_at(canvas.astype(np.float32), density, camera, size)
    root = pose.joints[:, 0] * (1, 0, 1) @ view.T
    cast_shadow(backdrop, root, camera, tilt)
    parts = [
        replace(p, colours=tuple(tuple(np.asarray(c) * gain) for c in p.colours)) for p in parts
    ]
    pixels, flow = draw(parts, view, camera, backdrop, size)
    return Clip(
        frames=pixels,
        # Rounded to 1/256 pixel, which halves the files; adding 0 turns -0 into 0.
        flow=(np.round(flow * 256) / 256 + 0).astype(np.float16),
        joints=joints.astype(np.float32),
        camera=camera.astype(np.float32),
        captions=write_captions(spec, person),
    )


def _move_camera(joints: np.ndarray, rng: np.random.Generator, size: int, fps: int) -> np.ndarray:
    """A camera (T, 3) that holds the figure: framing, pan, zoom and shake."""
    num = len(joints)
    t = np.arange(num) / fps
    ramp = np.linspace(-0.5, 0.5, num)
    scale = size / rng.uniform(1.8, 2.15) * np.exp(ramp * (rng.random() < 0.2) * rng.normal(0, 0.1))
    pan = ramp[:, None] * rng.normal(0, 0.25, 2) * (1, 0.3) * (rng.random() < 0.25)
    shake = np.zeros((num, 2))
    strength = (rng.random() < 0.2) * rng.uniform(0.002, 0.01)
    for hertz in rng.uniform(0.5, 3.5, 3):
        shake += strength * np.sin(2 * np.pi * (rng.random(2) + hertz * t[:, None]))
    # A figure that walks off is followed, not quite perfectly.
    drift = joints[:, 0, 0] - joints[:, 0, 0].mean()
    centre = np.array([joints[:, 0, 0].mean(), -0.82]) + rng.normal(0, (0.12, 0.05))
    aim = centre + pan + shake
    aim[:, 0] += rng.uniform(0.6, 1.0) * np.interp(ramp, [-0.5, 0.5], drift[[0, -1]])
    offset = (size - 1) / 2 - scale[:, None] * aim
    return np.concatenate([scale[:, None], offset], 1)


# ----------------------------------------------------------------------------- files


def make_dataset(
    out: str | Path,
    num_clips: int = 900,
    seed: int = 0,
    size: int = 64,
    frames: int = 32,
    fps: int = 16,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a dataset to a folder and return the path of its list, `out/clips.csv`.

    `clips/*.mp4` are H.264 yuv420p with a keyframe every 16 frames and neither B-frames nor sound.
    `flow/*.npz` hold `flow` and `camera`, `joints/*.npy` the joints, as in `Clip`. The list has one
    row for each caption of a clip, columns path, label, class_text (the action in words), caption,
    split, subject, flow, joints, flow_method ("exact"), skeleton; paths are relative to it. It is
    written last: while it is missing the dataset is not finished, and the same call again makes
    what is missing. The bytes do not depend on the number of workers. Not for two callers at once
    on the same folder.

    Args:
        out: folder; made if missing.
        num_clips: how many clips.
        seed: another seed gives other people, places and performances.
        size: side of the frames in pixels, even.
        frames: frames per clip.
        fps: frames per second.
        workers: processes; None is one per core.
        progress: whether to show progress on standard error.

    Raises:
        ValueError: if `out` holds another dataset or anything else, or a number makes no sense.
    """
    out = Path(out)
    _check_shape(size, frames, fps)
    specs = clip_specs(seed, num_clips)
    about = {
        "format": "muybridge-synthetic-1",
        "version": SYNTHETIC_VERSION,
        "num_clips": num_clips,
        "seed": seed,
    }
    about |= {"size": size, "frames": frames, "fps": fps}
    _claim(out, about)
    listing, text = out / "clips.csv", _list(out, specs)
    if listing.exists():
        if listing.read_bytes() != text:  # of an earlier version, with fewer columns
            _write(listing, text)
        return listing
    for folder in ("clips", "flow", "joints"):
        (out / folder).mkdir(exist_ok=True)
    missing = [i for i in range(num_clips) if not all(p.exists() for p in _files(out, i).values())]
    jobs = [(str(out), i, specs[i], size, frames, fps) for i in missing]
    workers = max(1, min(workers or usable_cores(), len(jobs) // 4))
    with Bar(len(jobs), "drawing the synthetic dataset", "clip", progress) as bar:
        for _ in _work(jobs, workers):
            bar.update()
    _write(listing, text)
    return listing


def _list(out: Path, specs: list[ClipSpec]) -> bytes:
    """The content of clips.csv."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    columns = ["path", "label", "class_text", "caption", "split", "subject", "flow", "joints"]
    rows.writerow([*columns, "flow_method", "skeleton"])
    for i, spec in enumerate(specs):
        clip, flow, joints = (str(p.relative_to(out).as_posix()) for p in _files(out, i).values())
        subject = f"person-{spec.person:010d}"
        for caption in write_captions(spec, make_person(spec.person)):
            words = [spec.action, VERBS[spec.action][0], caption, spec.split, subject]
            rows.writerow([clip, *words, flow, joints, "exact", "synthetic20"])
    return text.getvalue().encode()


def _check_shape(size: int, frames: int, fps: int) -> None:
    if size < 16 or size % 2 or frames < 2 or fps < 1:
        raise ValueError(
            f"size {size}, frames {frames}, fps {fps}: size must be even and at least 16, "
            "frames at least 2, fps at least 1"
        )


def _claim(out: Path, about: dict) -> None:
    """Make `out` the folder of the dataset `about`, or find that it already is."""
    remedy = "give another folder, or delete this one if it is no longer needed"
    stated = out / "synthetic.json"
    if stated.exists():
        try:
            found = read_json(stated)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        if found != about:
            differ = [
                f"{k} {found.get(k)!r:.40} instead of {v!r}"
                for k, v in about.items()
                if found.get(k) != v
            ]
            raise ValueError(
                f"{out} holds another synthetic dataset ({', '.join(differ)}); {remedy}"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not a synthetic dataset (no synthetic.json); {remedy}"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(stated, (json.dumps(about, indent=2) + "\n").encode())


def _files(out: Path, index: int) -> dict[str, Path]:
    name = f"{index:05d}"
    return {
        "clip": out / "clips" / f"{name}.mp4",
        "flow": out / "flow" / f"{name}.npz",
        "joints": out / "joints" / f"{name}.npy",
    }


def _work(jobs: list[tuple], workers: int):
    """Run the jobs, yielding as each ends."""
    if workers == 1:
        yield from map(_make_clip, jobs)
        return
    # Spawned, not forked: the caller may hold threads (torch, PyAV) that do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        with _without_interrupts():
            futures = [pool.submit(_make_clip, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _without_interrupts():
    """Hide Ctrl-C from processes started meanwhile.

    One that ended at its queue would leave the others waiting for ever.
    """
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _make_clip(job: tuple) -> None:
    out, index, spec, size, frames, fps = job
    clip = render(spec, size, frames, fps)
    files = _files(Path(out), index)
    flow, joints = io.BytesIO(), io.BytesIO()
    np.savez_compressed(flow, flow=clip.flow, camera=clip.camera)
    np.save(joints, clip.joints)
    _write(files["flow"], flow.getvalue())
    _write(files["joints"], joints.getvalue())
    _write(files["clip"], encode_video(clip.frames, fps))


def encode_video(frames: np.ndarray, fps: int | Fraction) -> bytes:
    """`write_frames` of frames (T, H, W, 3), as bytes."""
    target = io.BytesIO()
    write_frames(target, frames, fps)
    return target.getvalue()


def write_frames(
    target: Path | BinaryIO, frames: Iterable[np.ndarray], fps: int | Fraction
) -> None:
    """H.264 that the packer can copy as it is: closed groups of 16 frames, no B-frames.

    Args:
        target: where to.
        frames: at least one, uint8 (H, W, 3) RGB.
        fps: frames a second.
    """
    pictures = iter(frames)
    first = next(pictures)
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
        # One thread: the bytes must not depend on the machine's number of cores.
        stream.thread_count = 1
        groups = "keyint=16:min-keyint=16:scenecut=0:open-gop=0:bframes=0:threads=1:mbtree=0"
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": groups}
        for image in itertools.chain([first], pictures):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as aside:
        aside.write_bytes(data)
