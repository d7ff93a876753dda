"""How well --follow finds people who are small in a wide picture, where the truth is known.

    python -m pretrain.data.follow_error --out FOLDER

It makes wide footage: figures of the synthetic dataset, some 48 pixels tall, in a picture of 640 x
360 that rests, with noise and compression; one or two of them, in one place or walking about, on a
few clips before a camera that moves. FOLDER/wide has the videos, a list and everybody's boxes;
FOLDER/<method> are the packs. Printed is, of each method, how far its boxes agree with the truth.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.cuts import places
from pretrain.data.drawing import draw, figure_parts, thing_parts
from pretrain.data.figure import make_person, make_pose, rotation
from pretrain.data.pack import pack
from pretrain.data.places import PLACES, paint_place
from pretrain.data.shards import Pack
from pretrain.data.synthetic import encode_video
from pretrain.data.tracks import overlaps

ACTIONS = ("wave", "clap", "jump", "jog", "pick_up", "stand_up", "nod", "drink")
WIDTH, HEIGHT, FIGURE, FPS, FRAMES = 640, 360, 64, 16, 48
NOISE = 3.0  # grey levels


def figure(action: str, person: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A figure that acts: colours times opacity, float32 (T, S, S, 3), and opacity (T, S, S)."""
    rng = np.random.default_rng([seed, 5])
    facing = float(rng.choice((-1, 1)) * np.radians(rng.uniform(10, 75)))
    who = make_person(person)
    pose = make_pose(action, who, seed, FRAMES, FPS, side=int(np.sign(facing)))
    view = rotation(0, 0.2) @ np.diag([1.0, -1, -1]) @ rotation(1, facing)
    middle = float((pose.joints[:, 0] @ view.T)[:, 0].mean())
    scale = FIGURE / 2.3
    offset = (FIGURE - 1) / 2 - scale * np.array([middle, -0.85])
    camera = np.tile([scale, *offset], (FRAMES, 1))
    parts = [*figure_parts(pose, who), *thing_parts(pose, rng)]
    seen = [
        draw(parts, view, camera, np.full((FRAMES, FIGURE, FIGURE, 3), shade, np.float32), FIGURE)[
            0
        ].astype(np.float32)
        for shade in (0, 255)
    ]
    # Rounded to bytes: of nothing at all the difference is 255.
    return seen[0], np.clip(1 - (seen[1] - seen[0]).mean(-1) / 255, 0, 1)


def wide_video(number: int, action: str) -> tuple[np.ndarray, np.ndarray]:
    """A wide video, uint8 (T, H, W, 3), and everybody's boxes (P, T, 4)."""
    rng = np.random.default_rng([number, 6])
    canvas = paint_place(int(rng.integers(len(PLACES))), WIDTH / 60 + 2, 60, 0.2)
    height, width = canvas.shape[:2]
    scale = max((WIDTH + 80) / width, (HEIGHT + 80) / height)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    picture = picture.resize((round(width * scale), round(height * scale)))
    backdrop = np.asarray(picture, np.float32) * rng.uniform(0.5, 1)
    pan = rng.uniform(20, 60) * (rng.random() < 0.06)
    people = 1 + (rng.random() < 0.25)
    lanes = rng.permutation(2)
    video = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.float32)
    light = 1 + 0.04 * np.sin(np.arange(FRAMES) / FPS * rng.uniform(0.5, 6))
    for t in range(FRAMES):
        x = min(round(pan * t / FPS), backdrop.shape[1] - WIDTH)
        video[t] = backdrop[20 : 20 + HEIGHT, x : x + WIDTH]
    boxes = []
    for person in range(people):
        colours, opacity = figure(action, int(rng.integers(1000)), number * 2 + person)
        away = rng.uniform(30, 80) * (rng.random() < 0.35) * rng.choice((-1, 1))
        left = WIDTH / 2 * lanes[person] + rng.uniform(20, WIDTH / 2 - FIGURE - 20)
        top, mine = rng.uniform(60, HEIGHT - FIGURE - 10), []
        for t in range(FRAMES):
            x = round(np.clip(left + away * t / FPS, 0, WIDTH - FIGURE))
            y = round(top)
            there = video[t, y : y + FIGURE, x : x + FIGURE]
            there[:] = colours[t] + there * (1 - opacity[t][..., None])
            rows, columns = np.nonzero(opacity[t] > 0.5)
            mine.append((x + columns.min(), y + rows.min(), x + columns.max(), y + rows.max()))
        boxes.append(mine)
    video *= light[:, None, None, None]
    video += rng.normal(0, NOISE, video.shape)
    return video.clip(0, 255).astype(np.uint8), np.array(boxes, float) + np.array([0, 0, 1, 1])


def make_wide(out: Path, count: int) -> None:
    """Write the videos, the list and the boxes."""
    (out / "boxes").mkdir(parents=True, exist_ok=True)
    with open(out / "clips.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split", "boxes"])
        for number in range(count):
            action = ACTIONS[number % len(ACTIONS)]
            video, boxes = wide_video(number, action)
            (out / f"{number:04d}.mp4").write_bytes(encode_video(video, FPS))
            rows = [
                f"{t},{who},{left:g},{top:g},{right:g},{bottom:g}\n"
                for who, mine in enumerate(boxes, 1)
                for t, (left, top, right, bottom) in enumerate(mine)
            ]
            text = "frame,id,x1,y1,x2,y2\n" + "".join(rows)
            (out / "boxes" / f"{number:04d}.csv").write_text(text)
            split = "test" if number // len(ACTIONS) % 3 == 0 else "train"
            table.writerow([f"{number:04d}.mp4", action, split, f"boxes/{number:04d}.csv"])


def errors(wide: Path, folder: Path) -> dict[str, float]:
    """How far the boxes of a pack agree with the truth of its videos.

    Of each video's clip and person: the part of the person that is inside the box, on average over
    frames; overlap of the box with the person's, both as squares of the same margin; of the people,
    how many have a clip.
    """
    data = Pack(folder)
    inside, overlap, found, people, whole, clips, speed = [], [], 0, 0, 0, 0, []
    mine: dict[str, list[dict]] = {}
    for row in data.records():
        mine.setdefault(row["source"], []).append(row)
    for name, rows in mine.items():
        table = np.loadtxt(wide / "boxes" / f"{name[:-4]}.csv", delimiter=",", skiprows=1)
        truth = {int(who): table[table[:, 1] == who][:, 2:] for who in np.unique(table[:, 1])}
        people += len(truth)
        had = set()
        for row in rows:
            clips += 1
            about = row["follow"]
            if "whole" in about:
                whole += 1
                continue
            lefts = places(about["way"], row["frames"])
            box = np.concatenate([lefts, lefts + about["size"]], 1)
            part = slice(about["frame"], about["frame"] + row["frames"])
            share = {who: _shares(boxes[part], box) for who, boxes in truth.items()}
            who = max(share, key=lambda each: share[each].mean())
            had |= {who} if share[who].mean() > 0.5 else set()
            inside.append(float(share[who].min()))
            squares = _squares(truth[who][part])
            overlap.append(np.mean([overlaps(b[None], s[None])[0, 0]
                                    for b, s in zip(box, squares, strict=True)]))  # fmt: skip
            speed.append(np.abs(np.diff(lefts, axis=0)).mean())
        found += len(had)
    return {
        "clips": clips,
        "whole": whole,
        "people found": found / people,
        "contains all": float(np.mean(np.array(inside) > 0.95)) if inside else 0.0,
        "contains most": float(np.mean(np.array(inside) > 0.7)) if inside else 0.0,
        "IoU": float(np.mean(overlap)) if inside else 0.0,
        "moving": float(np.mean(np.array(speed) > 0)) if inside else 0.0,
    }


def _shares(truth: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Of each (T, 4) box how much is inside another."""
    low, high = np.maximum(truth[:, :2], box[:, :2]), np.minimum(truth[:, 2:], box[:, 2:])
    return np.clip(high - low, 0, None).prod(1) / (truth[:, 2:] - truth[:, :2]).prod(1)


def _squares(boxes: np.ndarray) -> np.ndarray:
    side = 1.3 * (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True)
    middle = (boxes[:, 2:] + boxes[:, :2]) / 2
    return np.concatenate([middle - side / 2, middle + side / 2], 1)


def main() -> None:
    """Make the footage, pack it by each method, and print how far boxes agree with the truth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=["boxes", "motion", "pose"])
    given = parser.parse_args()
    wide = given.out / "wide"
    if not (wide / "clips.csv").is_file():
        make_wide(wide, given.videos)
    for method in given.methods:
        pose = "blazepose" if method == "pose" else ""
        out = given.out / method
        pack(wide / "clips.csv", out, follow=method, pose=pose, progress=False)
        about = errors(wide, out)
        print(method, *(f"{name} {value:.3g}" for name, value in about.items()), sep=" | ")


if __name__ == "__main__":
    main()
