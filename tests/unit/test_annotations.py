"""Annotations of other programs, read by `--data` and written by convert-labels."""

import json
from pathlib import Path

import pytest

from pretrain.data.sources import list_sources


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(path: Path) -> dict[str, tuple]:
    """Of each video its label, split, subject, captions and segments."""
    return {
        s.name: (s.label, s.split, s.subject, s.captions, s.extra.get("segments", ""))
        for s in list_sources(path).sources
    }


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        list_sources(path)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


KINETICS = (
    "label,youtube_id,time_start,time_end,split\n"
    'testifying,---QUuC4vJs,84,94,validate\n"eating, slowly",a_b-c,10,20,train\n'
)


def test_kinetics(tmp_path):
    put(tmp_path, "val/testifying/---QUuC4vJs_000084_000094.mp4", "a_b-c.mkv")
    path = write(tmp_path, "k700.csv", KINETICS)
    assert listed(path) == {
        "val/testifying/---QUuC4vJs_000084_000094.mp4": ("testifying", "val", None, (), ""),
        "a_b-c.mkv": ("eating, slowly", "train", None, (), "10.000-20.000 eating, slowly"),
    }
    first = list_sources(path).sources[0]
    assert first.extra == {"youtube_id": "---QUuC4vJs", "time_start": "84"}
    assert "Kinetics" in " ".join(list_sources(path).notes)


def test_absent_videos_are_counted_with_examples(tmp_path):
    put(tmp_path, "a_b-c.mkv")
    rows = "".join(f"run,id{i},0,10,train\n" for i in range(60))
    told = refusal(write(tmp_path, "k.csv", KINETICS + rows))
    assert "61 problems" in told and "---QUuC4vJs_000084_000094" in told
    assert "--only-present" in told


@pytest.mark.parametrize(
    "row", ["run,a,nan,10,train", "run,a,-1,10,train", "run,a,inf,inf,train", "run,a,9,3,train",
            "run,a,1e300,2e300,train", "run,a,x,3,train", "run,a,1", "run,,1,2,train"],
)  # fmt: skip
def test_kinetics_that_cannot_be_true(tmp_path, row):
    put(tmp_path, "a.mp4")
    told = refusal(write(tmp_path, "k.csv", KINETICS.split("\n")[0] + "\n" + row + "\n"))
    assert "k.csv:2" in told


def test_two_videos_that_fit_are_refused(tmp_path):
    put(tmp_path, "x/a.mp4", "y/a.mp4")
    head = KINETICS.split("\n")[0]
    told = refusal(write(tmp_path, "k.csv", f"{head}\nrun,a,1,2,train\n"))
    assert "x/a.mp4" in told and "y/a.mp4" in told


SOMETHING = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]",
     "placeholders": ["potato"]},
    {"id": "42", "label": "putting pen on book", "template": "Putting [something] on [something]",
     "placeholders": ["pen", "book"]},
]  # fmt: skip


def test_something_something_with_validation_beside(tmp_path):
    put(tmp_path, "20bn/78687.webm", "20bn/42.webm", "20bn/7.webm")
    write(tmp_path, "something-something-v2-validation.json", [SOMETHING[0] | {"id": "7"}])
    path = write(tmp_path, "something-something-v2-train.json", SOMETHING)
    found = listed(path)
    assert found["20bn/42.webm"] == (
        "Putting something on something", "train", None, ("putting pen on book",), ""
    )  # fmt: skip
    assert found["20bn/7.webm"][:2] == ("Holding something", "val") and len(found) == 3
    assert "placeholders" in " ".join(list_sources(path).notes)


ACTIVITYNET = {
    "version": "VERSION 1.3",
    "taxonomy": [],
    "database": {
        "sJn0jh3hP_k": {
            "duration": 100.0, "subset": "training", "resolution": "640x360",
            "url": "https://example.org/a",
            "annotations": [
                {"segment": [1.001, 2.002], "label": "Jump"},
                {"segment": [20.5, 40], "label": "Run"},
            ],
        },
        "b": {"duration": 10, "subset": "testing", "annotations": []},
    },
}  # fmt: skip


def test_activitynet(tmp_path):
    put(tmp_path, "v_sJn0jh3hP_k.mp4", "sub/b.webm")
    path = write(tmp_path, "anet.json", ACTIVITYNET)
    assert listed(path) == {
        "v_sJn0jh3hP_k.mp4": (None, "train", None, (), "1.001-2.002 Jump; 20.500-40.000 Run"),
        "sub/b.webm": (None, "test", None, (), ""),
    }
    told = " ".join(list_sources(path).notes)
    assert "ActivityNet" in told and "duration" in told and "taxonomy" in told


@pytest.mark.parametrize(
    "part", [{"segment": [2, 1], "label": "x"}, {"segment": [float("nan"), 1], "label": "x"},
             {"segment": [0, "1e999"], "label": "x"}, {"segment": [-1, 1], "label": "x"},
             {"segment": [0], "label": "x"}, {"label": "x"}, {"segment": [0, 1]}, 7,
             {"segment": [0, True], "label": "x"}, {"segment": [0, 1], "label": ["x"]},
             {"segment": [0, 1], "label": "a;b"}, {"segment": [0, 10**400], "label": "x"}],
)  # fmt: skip
def test_activitynet_that_cannot_be_true(tmp_path, part):
    put(tmp_path, "b.mp4")
    told = refusal(write(tmp_path, "a.json", {"database": {"b": {"annotations": [part]}}}))
    assert "a.json:1" in told and "b:" in told


def test_names_are_never_paths(tmp_path):
    put(tmp_path, "outside.mp4", "in/a.mp4")
    for name in ("../outside", str(tmp_path / "outside.mp4"), "C:\\outside", "in/../../outside"):
        path = write(tmp_path / "in", "a.json", {"database": {name: {"annotations": []}}})
        assert "no such video" in refusal(path)


def test_ava(tmp_path):
    put(tmp_path, "-5KQ66BBWC4.mkv")
    item = 'item {{\n  name: "{}"\n  id: {}\n}}\n'
    action = item.format("bend/bow (at the waist)", 1) + item.format("stand", 12)
    write(tmp_path, "ava_action_list_v2.2.pbtxt", action)
    box = "0.077,0.151,0.283,0.811"
    rows = [f"-5KQ66BBWC4,0902,{box},12,1", f"-5KQ66BBWC4,0903,{box},12,1",
            f"-5KQ66BBWC4,0903,{box},1,0", f"-5KQ66BBWC4,0905,{box},80,0"]  # fmt: skip
    path = write(tmp_path, "ava_train_v2.2.csv", "\n".join(rows))
    (_, _, subject, _, segments) = listed(path)["-5KQ66BBWC4.mkv"]
    assert subject is None
    assert segments.split("; ") == [
        "901.500-903.500 stand", "902.500-903.500 bend/bow (at the waist)",
        "904.500-905.500 action 80",
    ]  # fmt: skip
    told = " ".join(list_sources(path).notes)
    assert "AVA" in told and "boxes" in told and "subjects" in told


def test_video_folder_of_hugging_face(tmp_path):
    put(tmp_path, "train/0001.mp4", "train/0002.mp4", "test/0001.mp4", "test/left.mp4")
    table = "file_name,text,label\n0001.mp4,a dog,dog\n0002.mp4,,cat\n"
    write(tmp_path / "train", "metadata.csv", table)
    row = {"file_name": "0001.mp4", "label": "dog", "n": [1]}
    write(tmp_path / "test", "metadata.jsonl", row)
    listing = list_sources(tmp_path)
    assert listed(tmp_path) == {
        "train/0001.mp4": ("dog", "train", None, ("a dog",), ""),
        "train/0002.mp4": ("cat", "train", None, (), ""),
        "test/0001.mp4": ("dog", "test", None, (), ""),
    }
    assert listing.skipped == ["test/left.mp4"] and "VideoFolder" in " ".join(listing.notes)


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "x/../../a.mp4", "C:/a.mp4"])
def test_video_folder_stays_in_its_folder(tmp_path, name):
    put(tmp_path, "a.mp4", "in/b.mp4")
    path = write(tmp_path / "in", "metadata.csv", f"file_name,label\nb.mp4,x\n{name},y\n")
    assert "leaves the folder" in refusal(path)


def test_ordinary_lists_stay_lists(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    text = "path,youtube_id,time_start,time_end,label\na.mp4,x,0,10,run\n"
    assert list(listed(write(tmp_path, "a.csv", text))) == ["a.mp4"]
    text = '{"path": "a.mp4", "label": "database"}\n{"path": "b.mp4", "results": 3}\n'
    found = list_sources(write(tmp_path, "a.jsonl", text))
    assert [s.label for s in found.sources] == ["database", None] and not found.notes
