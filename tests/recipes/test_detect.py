"""Events in long video: found where they are, from files and packs, and measured by the truth."""

import csv
import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.classifier import CHECKED, Classifier, at_chance, frame_probabilities
from downstream.detect import How, Scorer, list_videos, opened
from downstream.events import cut_events, smooth, truth_of_segments
from downstream.models import build_model, load_backbone, load_classifier
from downstream.results import read_results
from pretrain.backbones import export_backbone
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.data.stream import Frames
from pretrain.data.untrimmed import OTHER, SPLITS
from pretrain.data.untrimmed import Config as Untrimmed
from pretrain.data.untrimmed import main as make_untrimmed
from pretrain.names import from_csv
from pretrain.spec import InputSpec, Stream, flow_stream
from recipes import detect, predict
from recipes.detect import Config, main
from tests.conftest import draw_motion, write_video
from tests.recipes.runs import configure

FPS = 16
COLOURS = ["red", "green", "blue"]
# Label and seconds; between 3 and 4 s two things happen at once.
PLAN = {
    "a.mp4": [("red", 1, 4), ("blue", 3, 5), ("green", 6, 7)],
    "b.mp4": [("green", 0, 2), ("red", 4, 6)],
    "val.mp4": [("red", 1, 2), ("green", 3, 5), ("blue", 4, 6)],
}


def paint(events: list[tuple], seconds: int = 8) -> np.ndarray:
    """Frames (T, 32, 32, 3) whose red, green and blue say what happens."""
    video = np.zeros((seconds * FPS, 32, 32, 3), np.uint8)
    for label, start, end in events:
        video[start * FPS : end * FPS, ..., COLOURS.index(label)] = 200
    return video


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for name, events in PLAN.items():
        write_video(folder / name, paint(events), FPS)
    with open(folder / "truth.csv", "w", newline="") as file:
        rows = [[name, *e[1:], e[0]] for name, events in PLAN.items() for e in events]
        csv.writer(file).writerows([["video", "start", "end", "label"], *rows])
    return folder


@pytest.fixture
def colours(monkeypatch, tiny_backbone):
    """A model that sees colours: scores of each frame of a window of 8."""
    model = load_backbone(str(tiny_backbone))
    spec = dataclasses.replace(model.input_spec, stride=1)

    def score(clips: torch.Tensor) -> torch.Tensor:
        stream = spec.pictures["rgb"]
        std, mean = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (stream.std, stream.mean))
        return (clips * std + mean).mean((3, 4)).transpose(1, 2)  # 200 of 255, or nothing

    monkeypatch.setattr(detect, "load_scorer", lambda *_: Scorer(model, spec, COLOURS, 2, score))


def config(video, out, backbone: str = "colours", **values) -> Config:
    given = [video] if isinstance(video, str | Path) else video
    machine = {"precision": "fp32", "num_workers": 0}
    return configure(
        Config, backbone, tuple(map(str, given)), out=str(out), smooth=0.0, **(machine | values)
    )


def within(found: list[dict], events: list[tuple], slack: float = 0.3) -> bool:
    """Whether exactly these events were found, up to so many seconds."""
    ours = sorted((f["label"], *f["segment"]) for f in found)
    return len(ours) == len(events) and all(
        a[0] == b[0] and abs(a[1] - b[1]) < slack and abs(a[2] - b[2]) < slack
        for a, b in zip(ours, sorted(events), strict=True)
    )


def test_events_are_found_where_they_are(films, colours, tmp_path):
    out = tmp_path / "out"
    content = main(config([films / "a.mp4", films / "b.mp4"], out, threshold=0.4))
    for name in ("a.mp4", "b.mp4"):
        assert within(content["results"][name], PLAN[name])
    assert json.loads((out / "events.json").read_text()) == content
    assert content.keys() == {"version", "results", "external_data"}
    with open(out / "events.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[0].keys() == {"video", "start", "end", "label", "score"}
    assert (out / "timeline.png").exists() and not (out / "results.json").exists()
    assert json.loads((out / "refused.json").read_text()) == {}


def test_where_nothing_is_found_the_highest_score_is_said(films, colours, tmp_path, capsys):
    main(config(films / "a.mp4", tmp_path / "out", threshold=1.0))
    note = next(n for n in capsys.readouterr().out.splitlines() if "no event" in n)
    highest = float(re.search(r"a frame is (\d\.\d\d)", note)[1])
    assert 0 < highest <= 1 and "--threshold" in note
    main(config(films / "a.mp4", tmp_path / "some", threshold=highest - 0.02))
    assert "no event" not in capsys.readouterr().out


def test_a_model_sees_frames_as_far_apart_as_it_learned_from(films, tmp_path, colours):
    """Of a film with every frame twice, at twice the rate, the same windows."""
    with Frames(str(films / "a.mp4"), None, 32) as frames:
        film = np.concatenate([*frames.chunks()])
    write_video(tmp_path / "a.mp4", np.repeat(film, 2, axis=0), 2 * FPS)
    model = detect.load_scorer()
    seen: dict[float, list] = {}
    for folder, fps in ((films, FPS), (tmp_path, 2 * FPS)):
        shown = seen.setdefault(fps, [])
        score = lambda clips, shown=shown: shown.extend(clips) or model.score(clips)
        scorer = dataclasses.replace(model, score=score, rate=FPS)
        (video,), _ = list_videos((str(folder / "a.mp4"),))
        detection = detect.Detection(scorer, (), How(0, 4, torch.device("cpu"), "fp32"), 0, {})
        events, _ = detection.find([video], np.full(3, 0.5), set())
        assert sorted(e[:3] for e in events[video.name]) == sorted(PLAN["a.mp4"])
        notes = detection.other_strides()
        assert len(notes) == (fps != FPS) and all("stride 2 instead of 1" in n for n in notes)
    few, many = seen.values()
    assert len(few) == len(many)
    for a, b in zip(few, many, strict=True):
        assert torch.allclose(a, b, atol=0.1)  # encoded twice


def test_a_pack_has_the_events_of_its_files(films, colours, tmp_path):
    files = main(config(films / "a.mp4", tmp_path / "files", threshold=0.4))["results"]["a.mp4"]
    pack(
        films / "a.mp4", tmp_path / "pack", short_side=36, clip_seconds=3, workers=1, progress=False
    )
    assert len(Pack(tmp_path / "pack")) > 2
    packed = main(config(tmp_path / "pack", tmp_path / "packed", threshold=0.4))["results"]["a.mp4"]
    assert [f["label"] for f in packed] == [f["label"] for f in files]
    assert np.allclose([f["segment"] for f in packed], [f["segment"] for f in files])
    assert np.allclose([f["score"] for f in packed], [f["score"] for f in files], atol=0.02)


def test_batches_of_windows_do_not_matter(films, colours, tmp_path):
    found = [
        main(config(films / "a.mp4", tmp_path / "out", threshold=0.4, batch_size=n))["results"]
        for n in (1, 5)
    ]
    assert within(found[0]["a.mp4"], PLAN["a.mp4"])
    for one, two in zip(*(f["a.mp4"] for f in found), strict=True):
        assert one["segment"] == two["segment"] and one["score"] == pytest.approx(two["score"])


def listed(folder: Path, films: Path, splits: dict[str, str]) -> Path:
    """A list of the films with a column segments."""
    folder.mkdir()
    with open(folder / "list.csv", "w", newline="") as file:
        rows = [["path", "split", "segments"]]
        for name, split in splits.items():
            shutil.copy(films / name, folder / name)
            parts = [f"{a}-{b} {label}" for label, a, b in PLAN[name] if label != "blue"]
            rows.append([name, split, "; ".join(parts)])
        csv.writer(file).writerows(rows)
    return folder / "list.csv"


def test_thresholds_are_chosen_on_validation_videos(films, colours, tmp_path):
    path = listed(tmp_path / "data", films, {"a.mp4": "test", "b.mp4": "train", "val.mp4": "val"})
    out = tmp_path / "out"
    content = main(config(path, out))
    assert list(content["results"]) == ["a.mp4"]  # neither of val nor of train
    about = json.loads((out / "thresholds.json").read_text())
    assert "1 video of split val" in about["chosen"]
    assert all(0.1 < about["thresholds"][name] < 0.8 for name in COLOURS)
    results = read_results(out)
    assert results.recipe == "detect" and results.protocol["thresholds"] == about["chosen"]
    # Blue is not in this truth, and the event of it is a third one that should not be there.
    assert results.value("map_50") == 1 and results.value("f1_50") == pytest.approx(4 / 5)
    assert results.value("edit") == pytest.approx(2 / 3)
    assert results.value("frame_map") > 0.9 and results.data.num_test == 1
    # The test videos' truth decides nothing: another one, the same thresholds.
    text = path.read_text().replace("1-4 red", "0-6 red")
    path.write_text(text)
    main(config(path, tmp_path / "other"))
    other = json.loads((tmp_path / "other" / "thresholds.json").read_text())
    assert other == about and read_results(tmp_path / "other").value("map_70") < 1
    # And they are taken from there for other videos.
    again = main(config(films / "b.mp4", tmp_path / "b", thresholds=str(out / "thresholds.json")))
    assert within(again["results"]["b.mp4"], PLAN["b.mp4"])


def test_truth_from_a_file(films, colours, tmp_path):
    files = [films / "a.mp4", films / "b.mp4"]
    given = config(files, tmp_path / "csv", threshold=0.4, truth=str(films / "truth.csv"))
    main(given)
    first = read_results(tmp_path / "csv")
    assert first.value("map") == first.value("map_70") == first.value("f1_50") == 1
    assert first.metrics["map_50"].interval == (1, 1) == first.metrics["frame_map"].interval
    assert first.metrics["map_50"].n == 5 and first.metrics["map_50"].of == "events"
    database = {
        name.removesuffix(".mp4"): {
            "subset": "validation",
            "annotations": [{"label": e[0].upper(), "segment": list(e[1:])} for e in events],
        }
        for name, events in PLAN.items()
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"database": database}))
    values = {"threshold": 0.4, "truth": str(path)}
    with pytest.raises(ValueError, match=r"no video is of split 'test'; there are val"):
        main(config(files, tmp_path / "json", **values))
    content = main(config(files, tmp_path / "json", test_split="val", **values))
    assert content["results"].keys() == {"a", "b"}  # as the truth calls them
    second = read_results(tmp_path / "json")
    assert second.value("map") == 1 and second.metrics["map_50"].n == 5
    with pytest.raises(ValueError, match="no video of those given"):
        write_video(tmp_path / "other.mp4", paint([]), FPS)
        main(config(tmp_path / "other.mp4", tmp_path / "no", **values))


def test_background_is_no_event(films, colours, tmp_path):
    values = {"threshold": 0.4, "background": ("Blue",), "truth": str(films / "truth.csv")}
    content = main(config(films / "a.mp4", tmp_path / "out", **values))
    assert within(content["results"]["a.mp4"], [e for e in PLAN["a.mp4"] if e[0] != "blue"])
    assert read_results(tmp_path / "out").value("map_50") == 1
    with pytest.raises(ValueError, match="no class of"):
        main(config(films / "a.mp4", tmp_path / "no", background=("purple",)))
    with pytest.raises(ValueError, match="every class"):
        main(config(films / "a.mp4", tmp_path / "no", background=tuple(COLOURS)))


def test_bad_files_are_named_and_the_others_scored(films, colours, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(films / "a.mp4", folder / "=cmd().mp4")
    (folder / "text.mp4").write_text("hello " * 50)
    grain = np.random.default_rng(0).integers(0, 30, (8 * FPS, 32, 32, 3), np.uint8)
    write_video(folder / "torn.mp4", paint(PLAN["b.mp4"]) + grain, FPS)
    data = bytearray((folder / "torn.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 2
    data[middle : middle + 300] = b"\xff" * 300
    (folder / "torn.mp4").write_bytes(data)
    out = tmp_path / "out"
    content = main(config(folder, out, threshold=0.4))
    assert content["results"].keys() == {"=cmd().mp4", "torn.mp4"}
    assert within(content["results"]["=cmd().mp4"], PLAN["a.mp4"])
    assert content["results"]["torn.mp4"][0]["label"] == "green"
    refused = json.loads((out / "refused.json").read_text())
    assert "not a video" in refused["text.mp4"] and refused["torn.mp4"].startswith("read to ")
    with open(out / "events.csv", newline="") as file:
        names = {row["video"] for row in csv.DictReader(file)}
    assert "'=cmd().mp4" in names and from_csv("'=cmd().mp4") == "=cmd().mp4"
    with pytest.raises(ValueError, match=r"nothing at .* can be used.*not a video"):
        main(config(folder / "text.mp4", tmp_path / "none"))


def test_truth_in_frames_is_warned_of(films, colours, tmp_path):
    for end, warned in (("2", False), ("200", True)):
        text = f"video,start,end,label\na.mp4,0.5,{end},red\n"
        (tmp_path / "truth.csv").write_text(text)
        main(config(films / "a.mp4", tmp_path / "out", truth=str(tmp_path / "truth.csv")))
        notes = json.loads((tmp_path / "out" / "results.json").read_text())["notes"]
        assert any("are they in seconds" in note for note in notes) is warned


def test_what_is_wrong_is_said(films, colours, tmp_path):
    for values, words in (
        ({"video": tmp_path / "none"}, "no such file"),
        ({"video": [films / "a.mp4", films / "a.mp4"]}, "two videos are called a.mp4"),
        ({"video": films / "a.mp4", "out": films}, "holds something else"),
        ({"video": films / "a.mp4", "thresholds": str(films / "truth.csv")}, "truth.csv"),
    ):
        given = {"out": tmp_path / "out"} | values
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            main(config(**given))


# -------------------------------------------------------------------------------------- real models


def export(folder: Path, model: str, about: dict | None = None, **arguments) -> str:
    """A classifier of motions with random weights, of which its export says this."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if model in ("tcn", "frame_early"):
            arguments["network"] = "test_resnet"
        if "skeleton" not in arguments:
            arguments["size"] = 32
        backbone = build_model(model, True, **arguments)
        frames = model == "tcn"
        export_backbone(
            Classifier(backbone, ["a", "b", "c", "d"], per_frame=frames), folder, about or {}
        )
    return str(folder)


@pytest.fixture(scope="module")
def long_film(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    moves = ("right", "down", "left", "up", "right")
    write_video(path, np.concatenate([draw_motion(m, 1, 1, 16, 32) for m in moves]), FPS)
    return path


def test_a_classifier_of_frames(long_film, tmp_path):
    run = export(tmp_path / "run", "tcn", frames=8)
    given = config(long_film, tmp_path / "out", run, threshold=0.25, shortest=0.0)
    found = main(given)["results"]["long.mp4"]
    assert found == main(dataclasses.replace(given, batch_size=1))["results"]["long.mp4"]
    # The scores are those that fine-tuning and recipes/predict.py see of the packed file.
    model = load_classifier(run)
    pack(long_film, tmp_path / "pack", short_side=36, workers=1, progress=False)
    packed = Pack(tmp_path / "pack")
    scores = frame_probabilities(model, packed, packed.record(0), torch.device("cpu"), "fp32")
    direct = cut_events(smooth([scores], 0), model.classes, np.full(4, 0.25), FPS, 0)
    through = main(config(tmp_path / "pack", tmp_path / "packed", run,
                          threshold=0.25, shortest=0.0))["results"]["long.mp4"]  # fmt: skip
    assert [(f["label"], *f["segment"]) for f in through] == [e[:3] for e in direct]


@pytest.mark.parametrize(
    ("told", "warned"),
    [((0.3, 40), True), ((0.6, 40), False), ((0.3, 4000), False), ((None, 40), False),
     ((0.1, True), True), (("0.1", 40), False), ((0.1, 0), False), ((float("nan"), 9), False)],
)  # fmt: skip
def test_a_classifier_that_its_own_validation_found_at_chance(told, warned, tmp_path):
    about = dict(zip(CHECKED, told, strict=True))
    run = export(tmp_path / "run", "skeleton_lstm", about, skeleton="kinect20", frames=8)
    assert bool(at_chance(run, 4)) is warned and not at_chance("i3d_k400", 400)


def test_events_of_a_classifier_at_chance_come_with_a_warning(long_film, tmp_path, capsys):
    about = dict(zip(CHECKED, (0.25, 20), strict=True))
    run = export(tmp_path / "run", "frame_early", about, frames=4)
    main(config(long_film, tmp_path / "out", run, threshold=0.0, stride=1))
    assert "WARNING" in capsys.readouterr().out
    predict.main(
        configure(
            predict.Config, run, (str(long_film),), out=str(tmp_path / "labels"), num_workers=0
        )
    )
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [detect, predict])
def test_pose_weights_of_a_model_without_poses_are_refused(recipe, long_film, tmp_path):
    run = export(tmp_path / "run", "frame_early", frames=4)
    given = {"out": str(tmp_path / "out"), "num_workers": 0, "pose_weights": str(tmp_path)}
    with pytest.raises(ValueError, match=r"leave out: --pose-weights .*rgb"):
        recipe.main(configure(recipe.Config, run, (str(long_film),), **given))


def test_a_classifier_of_clips_and_sentences(tiny_pair, long_film, tmp_path):
    run = export(tmp_path / "run", "frame_early", frames=4)
    clips = config(long_film, tmp_path / "clips", run, threshold=0.0, stride=1)
    found = main(clips)["results"]["long.mp4"]
    assert {f["label"] for f in found} == {"a", "b", "c", "d"}  # all are at least 0
    assert all(f["segment"] == [0.0, 5.0] for f in found)
    texts = ("a square moves right", "a square moves up")
    pair = config(long_film, tmp_path / "pair", str(tiny_pair), threshold=0.0, stride=1, text=texts)
    found = main(pair)["results"]["long.mp4"]
    assert [f["label"] for f in found] == sorted(texts)
    assert sum(f["score"] for f in found) == pytest.approx(1, abs=1e-4)  # they compete
    (tmp_path / "list.csv").write_text("label,text\nr,a square moves right\nu,it moves up\n")
    named = dataclasses.replace(
        pair, text=(str(tmp_path / "list.csv"),), background=("nothing moves",)
    )
    found = main(named)["results"]["long.mp4"]
    assert [f["label"] for f in found] == ["r", "u"] and sum(f["score"] for f in found) < 1
    for words, match in (
        (("one",), "another one to compete"),
        (("one", "One"), "same sentence"),
    ):
        with pytest.raises(ValueError, match=match):
            main(dataclasses.replace(pair, text=words))


def test_long_videos_with_known_events(tmp_path):
    out = tmp_path / "long"
    listing = make_untrimmed(Untrimmed(str(out), clips=54, per_video=6, size=32, frames=8, fps=8))
    with open(listing, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["split"] for row in rows} == set(SPLITS)
    with open(listing, newline="") as file:
        digest = file.read()
    for row in rows:
        events = truth_of_segments(row["segments"], row["path"])
        with Frames(str(out / row["path"]), None, 32) as frames:
            num = sum(len(chunk) for chunk in frames.chunks())
        assert num == 8 * events[-1][2] and events[0][1] == 0
        # Neighbours touch and differ.
        assert all(a[2] == b[1] and a[0] != b[0] for a, b in pairwise(events))
    assert OTHER in digest
    with pytest.raises(ValueError, match="something else"):
        make_untrimmed(Untrimmed(str(out)))


# ------------------------------------------------------------------------------ flow, poses, lists


def streams_of(video, spec) -> dict[str, torch.Tensor]:
    """All frames of a video, as a model takes them."""
    with opened(video, spec) as stream:
        parts = list(stream.chunks)
        assert not stream.reason()
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def test_flow_of_a_raw_video_is_that_of_its_pack(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr("downstream.detect.PART_SECONDS", 2.0)
    texture = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    texture = np.asarray(Image.fromarray(texture).resize((96, 96), Image.Resampling.BICUBIC))
    path = tmp_path / "film.mp4"
    moved = [np.roll(texture, (t, 2 * t), (0, 1))[:48, :48] for t in range(80)]
    write_video(path, np.stack(moved), FPS)
    pack(path, tmp_path / "pack", short_side=36, clip_seconds=2, workers=1, progress=False,
         flow="dis")  # fmt: skip
    spec = InputSpec(8, 1, 32, {"rgb": Stream(), "flow": flow_stream(32)})
    (raw,), (packed,) = (list_videos((str(name),))[0] for name in (path, tmp_path / "pack"))
    assert len(packed.ids) == 3
    ours, theirs = streams_of(raw, spec), streams_of(packed, spec)
    for name in spec.streams:  # packed frames were encoded once more
        assert ours[name].shape == theirs[name].shape == (2 + (name == "rgb"), 80, 32, 32)
        assert (ours[name].float() - theirs[name].float()).abs().mean() < 3
    x, y = ours["flow"].float().mean((1, 2, 3)) - 128
    assert 1.5 < x / y < 2.5 and y > 5


def test_a_classifier_of_flow_takes_raw_videos_and_packs(long_film, tmp_path):
    pytest.importorskip("cv2")
    run = export(tmp_path / "run", "i3d_flow", width=0.1, frames=8)
    pack(long_film, tmp_path / "pack", short_side=36, workers=1, progress=False, flow="dis")
    scores = []
    for video in (long_film, tmp_path / "pack"):
        given = config(video, tmp_path / "out", run, threshold=0.0, stride=1)
        scores.append([f["score"] for f in main(given)["results"]["long.mp4"]])
    assert len(scores[0]) == 4 and np.allclose(*scores, atol=0.02)
    pack(long_film, tmp_path / "plain", short_side=36, workers=1, progress=False)
    with pytest.raises(ValueError, match="--flow dis adds it"):  # before a stride is asked for
        main(config(tmp_path / "plain", tmp_path / "out", run))


def test_poses_of_a_list_and_videos_without(long_film, tmp_path):
    run = export(tmp_path / "run", "skeleton_lstm", skeleton="kinect20", frames=8)
    with pytest.raises(ValueError, match="columns path and pose"):
        main(config(long_film, tmp_path / "out", run, stride=1))
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        shutil.copy(long_film, tmp_path / name)
    np.save(tmp_path / "b.npy", np.ones((3, 1, 20, 4), np.float32))
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((80, 1, 20, 4), np.float32))
    path = tmp_path / "list.csv"
    path.write_text("path,pose,skeleton\na.mp4,a.npy,kinect20\nb.mp4,,\nc.mp4,b.npy,kinect20\n")
    out = tmp_path / "out"
    found = main(config(path, out, run, threshold=0.0, stride=1))["results"]
    assert list(found) == ["a.mp4"] and len(found["a.mp4"]) == 4
    refused = json.loads((out / "refused.json").read_text())
    assert "no pose" in refused["b.mp4"] and "3 frames" in refused["c.mp4"]


def test_a_list_with_files_that_cannot_be_read(films, colours, tmp_path):
    for name in ("a.mp4", "torn.mp4"):
        shutil.copy(films / "a.mp4", tmp_path / name)
    (tmp_path / "torn.mp4").write_bytes((films / "a.mp4").read_bytes()[:300])
    (tmp_path / "empty.mp4").touch()
    names = ["a.mp4", "torn.mp4", "empty.mp4"]
    (tmp_path / "list.csv").write_text("\n".join(["path", *names, ""]))
    found = main(config(tmp_path / "list.csv", tmp_path / "out", threshold=0.4))["results"]
    assert list(found) == ["a.mp4"] and within(found["a.mp4"], PLAN["a.mp4"])
    assert sorted(json.loads((tmp_path / "out" / "refused.json").read_text())) == sorted(names[1:])
