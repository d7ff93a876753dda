"""Annotations of other programs, read by `--data` and written by convert-labels."""

import json
import os
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from downstream.look.labels import parse_segments_apart
from pretrain.data.sources import list_sources
from recipes.convert_labels import Config, main


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
    put(tmp_path, "b.mp4", "b.mkv")
    told = refusal(write(tmp_path, "k.csv", f"{head}\nrun,b,1,2,train\n"))
    assert "b.mp4" in told and "b.mkv" in told


@pytest.mark.parametrize("name", ["a.mp4", "a", "./a.mp4", "in/b", "in/b.avi"])
def test_a_file_named_exactly_comes_before_its_namesakes(tmp_path, name):
    put(tmp_path, "a.mp4", "in/a.mp4", "in/b.mkv", "in/deep/b.mkv")
    path = write(tmp_path, "a.json", {"database": {name: {"annotations": []}}})
    assert [*listed(path)] == ["in/b.mkv" if "b" in name else "a.mp4"]


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


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '{"database": {"a": {"annotations": []},\n "a": {"annotations": []}}}'),
     ("l.jsonl", '{"path": "a.mp4", "label": "x", "label": "y"}'),
     ("l.json", '[{"path": "a.mp4", "label": "x", "label": "y"}]')],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused(tmp_path, name, text):
    """Python would keep the last one's value, and lose the other."""
    put(tmp_path, "a.mp4")
    assert "stands twice" in refusal(write(tmp_path, name, text))


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
    assert "AVA" in told and "subjects" in told


def test_persons_of_ava_are_those_of_one_video(tmp_path):
    put(tmp_path, "v1.mp4", "v2.mp4")
    rows = "".join(f"{video},0902,0.1,0.1,0.5,0.5,12,1\n" for video in ("v1", "v2"))
    found = listed(write(tmp_path, "ava_train.csv", rows))
    assert [found[f"v{i}.mp4"][2] for i in (1, 2)] == ["v1 1", "v2 1"]


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


def test_video_folder_in_parquet(tmp_path):
    """With the kinds of values that parquet has and JSON has not."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    put(tmp_path, "0001.mp4", "0002.mp4")
    table = {
        "file_name": ["0001.mp4", "0002.mp4"], "label": ["dog", None], "subject": [1.0, None],
        "captions": [["a dog", "it runs"], []], "when": [datetime(2020, 1, 2)] * 2,
        "parts": [[{"at": timedelta(seconds=3)}], None], "picture": [b"x", None],
    }  # fmt: skip
    parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    first, second = list_sources(tmp_path).sources
    assert (first.label, first.subject, first.captions) == ("dog", "1", ("a dog", "it runs"))
    assert first.extra == {"when": "2020-01-02 00:00:00", "parts": '[{"at": "0:00:03"}]'}
    assert (second.label, second.captions) == (None, ())
    told = main(Config(str(tmp_path / "metadata.parquet"), "csv", str(tmp_path / "o.csv")))
    assert told["entries"] == 3 and listed(tmp_path / "o.csv")["0001.mp4"][3] == first.captions
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as parquet" in refusal(tmp_path)


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


ELAN = """<?xml version="1.0" encoding="UTF-8"?>
<ANNOTATION_DOCUMENT AUTHOR="" DATE="2020-01-01T00:00:00+00:00" FORMAT="3.0" VERSION="3.0">
<HEADER MEDIA_FILE="" TIME_UNITS="milliseconds">
<MEDIA_DESCRIPTOR MEDIA_URL="file:///C:/films/my%20day.mp4" MIME_TYPE="video/mp4"
 RELATIVE_MEDIA_URL="./my day.mp4"/></HEADER>
<TIME_ORDER><TIME_SLOT TIME_SLOT_ID="ts1" TIME_VALUE="1001"/>
<TIME_SLOT TIME_SLOT_ID="ts2" TIME_VALUE="2002"/><TIME_SLOT TIME_SLOT_ID="ts3"/></TIME_ORDER>
<TIER TIER_ID="hands" PARTICIPANT="Ann" LINGUISTIC_TYPE_REF="d"><ANNOTATION>
<ALIGNABLE_ANNOTATION ANNOTATION_ID="a1" TIME_SLOT_REF1="ts1" TIME_SLOT_REF2="ts2">
<ANNOTATION_VALUE>wave</ANNOTATION_VALUE></ALIGNABLE_ANNOTATION></ANNOTATION></TIER>
<TIER TIER_ID="gloss" LINGUISTIC_TYPE_REF="d"><ANNOTATION><REF_ANNOTATION ANNOTATION_ID="a2"
 ANNOTATION_REF="a1"><ANNOTATION_VALUE>hi</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION></TIER>
</ANNOTATION_DOCUMENT>"""


def test_elan(tmp_path):
    put(tmp_path, "my day.mp4")
    path = write(tmp_path, "a.eaf", ELAN)
    assert listed(path) == {"my day.mp4": ("wave", None, "Ann", (), "1.001-2.002 wave")}
    told = " ".join(list_sources(path).notes)
    assert "ELAN" in told and "gloss" in told and "hands" in told


def test_xml_with_entities_or_depth_is_refused(tmp_path):
    put(tmp_path, "my day.mp4")
    bomb = '<!DOCTYPE l [<!ENTITY a "b"><!ENTITY c "&a;&a;">]><ANNOTATION_DOCUMENT>&c;'
    assert "DTD" in refusal(write(tmp_path, "a.eaf", bomb + "</ANNOTATION_DOCUMENT>"))
    deep = "<annotations>" + "<a>" * 5000 + "</a>" * 5000 + "</annotations>"
    assert "deep" in refusal(write(tmp_path, "a.xml", deep))
    assert "a.eaf:7" in refusal(write(tmp_path, "a.eaf", ELAN[:400]))
    for value in ("NaN", "-5", "1e999", "x", "9" * 5000):
        assert "hands" in refusal(write(tmp_path, "a.eaf", ELAN.replace('"1001"', f'"{value}"')))


def test_boris(tmp_path):
    put(tmp_path, "6008.mp4")
    head = "Observation id,Observation date,Media file,FPS,Subject,Behavior,Behavioral category,"
    text = head + "Behavior type,Start (s),Stop (s),Duration (s)\n"
    text += "o,2021,T:/My Videos/6008.mp4,29.97,No focal subject,Holding,,STATE,689.000,989.023,1\n"
    text += "o,2021,T:/My Videos/6008.mp4,25,No focal subject,Look,,POINT,2.0,2.0,NA\n"
    (_, _, who, _, segments) = listed(write(tmp_path, "a.csv", text))["6008.mp4"]
    assert (who, segments) == (None, "689.000-989.023 Holding; 2.000-2.040 Look")
    told = " ".join(list_sources(tmp_path / "a.csv").notes)
    assert "BORIS" in told and "observation date" in told and "without duration: 1" in told

    text = "Observation id\to\n\nMedia file(s)\n\n"
    text += "Time\tMedia file path\tTotal length\tFPS\tSubject\tBehavior\tComment\tStatus\n"
    row = "{}\tC:\\v\\6008.mp4\t30\t25\tcat\t{}\t\t{}\n"
    good = text + row.format(1.5, "sit", "START") + row.format("00:00:04.25", "sit", "STOP")
    assert listed(write(tmp_path, "b.tsv", good))["6008.mp4"][4] == "1.500-4.250 sit"
    offset = "Observation id\to\nTime offset (s)\t{}\n" + good.partition("\n")[2]
    assert listed(write(tmp_path, "b.tsv", offset.format("0.0")))
    assert "b.tsv:2" in refusal(write(tmp_path, "b.tsv", offset.format("12.5")))
    for rows in (row.format(1, "sit", "START"), row.format(1, "sit", "STOP"),
                 row.format("nan", "sit", "POINT"), row.format(-1, "sit", "POINT"),
                 row.format("-00:00:05", "sit", "POINT"),
                 row.format(1, "sit", "POINT").replace("\t25\t", "\t0\t")):  # fmt: skip
        assert "b.tsv:6" in refusal(write(tmp_path, "b.tsv", text + rows))


def test_boris_counts_times_through_all_media_of_an_observation(tmp_path):
    """So that those of the second file are not times in it."""
    put(tmp_path, "180s.mp4", "360s.mp4")
    head = (
        "Observation id\tMedia file\tFPS\tSubject\tBehavior\tBehavior type\tStart (s)\tStop (s)\n"
    )
    row = "{}\t{}.mp4\t25.0\tNo focal subject\ts\tSTATE\t{}\t{}\n"
    told = refusal(write(tmp_path, "a.tsv", head + row.format("o", "180s", 1.8, 8)
                         + row.format("o", "360s", 227, 253)))  # fmt: skip
    assert "a.tsv:3" in told and "several media" in told
    other = head + row.format("o", "180s", 1.8, 8) + row.format("p", "360s", 27, 53)
    assert len(listed(write(tmp_path, "b.tsv", other))) == 2


def studio(video: str, ranges: list, **data) -> list:
    value = {"ranges": ranges, "timelinelabels": ["fall"]}
    result = [{"type": "timelinelabels", "from_name": "a", "to_name": "video", "value": value},
              {"type": "rectangle", "value": {"x": 1}}]  # fmt: skip
    return [{"id": 1, "data": {"video": video, **data}, "annotations": [{"result": result}]}]


def test_label_studio(tmp_path):
    put(tmp_path, "my clip.mp4", "b.mp4")
    tasks = studio("/data/upload/1/0a1b2c3d-my clip.mp4", [{"start": 31, "end": 60}], fps=29.97)
    choice = {"type": "choices", "value": {"choices": ["indoor"]}}
    tasks += [{"data": {"video": "/data/local-files/?d=x%2Fb.mp4"},
               "annotations": [{"result": [choice]}]}]  # fmt: skip
    path = write(tmp_path, "ls.json", tasks)
    assert listed(path) == {
        "my clip.mp4": ("fall", None, None, (), f"{30 / 29.97:.6f}-{60 / 29.97:.6f} fall"),
        "b.mp4": ("indoor", None, None, (), ""),
    }
    assert "rectangle" in " ".join(list_sources(path).notes)
    path = write(tmp_path, "ls.json", studio("b.mp4", [{"start": 1, "end": 24}]))
    assert listed(path)["b.mp4"][4] == "0.000-1.000 fall"
    assert "24 a second" in " ".join(list_sources(path).notes)


def test_the_small_export_of_label_studio(tmp_path):
    put(tmp_path, "b.mp4", "c.mp4")
    timed = {"ranges": [{"start": 26, "end": 50}], "timelinelabels": ["fall"]}
    tasks = [
        {"video": "/data/upload/1/0a1b2c3d-b.mp4", "fps": 25, "id": 1, "tricks": [timed],
         "note": "x", "annotator": 1, "annotation_id": 1, "created_at": "", "lead_time": 2.0},
        {"video": "c.mp4", "id": 2, "choice": "indoor"},
        {"video": "c.mp4", "id": 3, "box": {"x": 1}, "place": {"choices": ["yard"]}},
    ]  # fmt: skip
    path = write(tmp_path, "min.json", tasks[:2])
    assert listed(path) == {
        "b.mp4": ("fall", None, None, (), "1.000-2.000 fall"),
        "c.mp4": ("indoor", None, None, (), ""),
    }
    assert "note" in " ".join(list_sources(path).notes)
    unlabelled = {"video": "d.mp4", "id": 4, "tricks": []}
    put(tmp_path, "d.mp4")
    path = write(tmp_path, "min.json", [unlabelled, tasks[0], tasks[2]])
    assert listed(path)["c.mp4"][0] == "yard" and listed(path)["d.mp4"][0] is None
    assert "box" in " ".join(list_sources(path).notes)


@pytest.mark.parametrize(
    "part", [{"start": 0, "end": 4}, {"start": 5, "end": 4}, {"start": 1.5, "end": 4}, 3, {},
             {"start": 1, "end": 10**12}, {"start": "nan", "end": 2}, {"start": True, "end": 2}],
)  # fmt: skip
def test_label_studio_that_cannot_be_true(tmp_path, part):
    put(tmp_path, "b.mp4")
    assert "task 1" in refusal(write(tmp_path, "ls.json", studio("b.mp4", [part])))


@pytest.mark.parametrize("data", [["b.mp4"], "b.mp4", 3, None, {}])
def test_a_task_without_an_object_of_data_is_refused(tmp_path, data):
    put(tmp_path, "b.mp4")
    tasks = studio("b.mp4", [{"start": 1, "end": 2}])
    assert "task 1" in refusal(write(tmp_path, "ls.json", [tasks[0] | {"data": data}]))


BOX = '<box frame="{}" outside="{}" occluded="0" keyframe="1" xtl="1" ytl="1" xbr="9" ybr="9"/>'


def film(path: Path, shown, fps: Fraction) -> None:
    """A video whose frames are shown at these ticks of a clock."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"bf": "0"})
        stream.width = stream.height = 32
        stream.time_base = stream.codec_context.time_base = 1 / fps
        for at in shown:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), at, np.uint8))
            frame.pts, frame.time_base = at, 1 / fps
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def test_cvat_by_the_timestamps_of_the_video(tmp_path):
    shown = [0, 1, 2, 3, 10, 11, 12, 20, 21, 22]  # in 30000 / 1001 a second
    film(tmp_path / "a.mp4", shown, Fraction(30000, 1001))
    boxes = BOX.format(2, 0) + BOX.format(5, 1)
    head = "<annotations><version>1.1</version><meta><task><source>a.mp4</source></task></meta>"
    text = f'{head}<track id="0" label="cat">{boxes}</track></annotations>'
    path = write(tmp_path, "c.xml", text)
    start, end = 2 * 1001 / 30000, 11 * 1001 / 30000
    assert listed(path)["a.mp4"][4] == f"{start:.6f}-{end:.6f} cat"
    assert "CVAT" in " ".join(list_sources(path).notes)
    assert "frame 50" in refusal(
        write(tmp_path, "c.xml", text.replace('"2"', '"50"').replace('"5"', '"60"'))
    )
    late = write(tmp_path, "c.xml", text.replace('"5"', '"60"'))
    assert "1 part cut" in " ".join(list_sources(late).notes)
    for bad in ("-1", "nan", "1.5", "x"):
        assert "track 0" in refusal(write(tmp_path, "c.xml", text.replace('"2"', f'"{bad}"')))


def test_cvat_names_its_video_before_its_labels(tmp_path):
    """A task that has no source is called as its file; labels and attributes have names, too."""
    film(tmp_path / "walk.mp4", range(12), Fraction(25))
    put(tmp_path, "cat.mp4")
    labels = "<labels><label><name>cat</name></label></labels>"
    text = f"<annotations><meta><task><name>walk</name>{labels}</task></meta>"
    text += f'<track id="0" label="cat">{BOX.format(2, 0) + BOX.format(5, 1)}</track></annotations>'
    path = write(tmp_path, "c.xml", text)
    assert [*listed(path)] == ["walk.mp4"] and "is not here" not in str(list_sources(path).notes)
    other = write(tmp_path, "walk.xml", text.replace("<name>walk<", "<name>run<", 1))
    assert "run is not here: walk.mp4 is taken" in str(list_sources(other).notes)
    for wrong in ("<fps>1e9</fps>", "<fps>x</fps>"):  # told with the file's name
        rated = write(tmp_path, "r.xml", text.replace("<name>", f"{wrong}<name>", 1))
        assert "r.xml: fps is" in refusal(rated)


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25)])
@pytest.mark.parametrize("to", ["activitynet", "cvat", "labelstudio", "csv"])
def test_what_is_written_is_read_again(tmp_path, fps, to, capsys):
    film(tmp_path / "a.mp4", range(60), fps)
    text = "path,start,end,label\na.mp4,0.5,1.234,wave\na.mp4,1.0,2.0,jump\n"
    out = tmp_path / f"out.{'csv' if to == 'csv' else 'xml' if to == 'cvat' else 'json'}"
    config = Config(str(write(tmp_path, "mine.csv", text)), to, str(out))
    main(config)
    (segments,) = (s.extra["segments"] for s in list_sources(out).sources)
    for (a, b, label), (c, d, got) in zip(
        [(0.5, 1.234, "wave"), (1.0, 2.0, "jump")], parse_segments_apart(segments), strict=True
    ):
        assert label == got and max(abs(a - c), abs(b - d)) <= 0.5 / fps + 0.001
    with pytest.raises(ValueError, match="overwritten"):
        main(config)


def test_what_a_format_cannot_hold_is_named(tmp_path):
    put(tmp_path, "a.mp4")
    text = "path,start,end,label,subject,caption\na.mp4,0,1,wave,Ann,someone waves\n"
    source = str(write(tmp_path, "mine.csv", text))
    told = main(Config(source, "labelstudio", str(tmp_path / "o.json"), fps=25.0))
    assert "subject" in told["cannot hold"] and "caption" in told["cannot hold"]


def test_a_folder_holds_annotations_and_is_none(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file"):
        main(Config(str(tmp_path), "csv", str(tmp_path / "o.csv")))


def test_only_the_present_are_written(tmp_path):
    put(tmp_path, "a_b-c.mkv")
    source = write(tmp_path, "k.csv", KINETICS)
    told = main(Config(str(source), "csv", str(tmp_path / "o.csv"), only_present=True))
    assert told["absent videos"].startswith("1,")
    assert listed(tmp_path / "o.csv")["a_b-c.mkv"][4] == "10.000-20.000 eating, slowly"


LISTS = {
    "cut.csv": "path,label,recording,start,end\na.mp4,run,day 1,10,12\nb.mp4,hop,day 1,30,31\n",
    "mixed.csv": "path,Start,End,label,recording\na.mp4,1,2,run,\nb.mp4,10,12,hop,day 1\n",
    "file.csv": "path,start,end,label,recording,start_time,times\n"
    "a.mp4,1,2,run,day 1,10,file\nb.mp4,,,hop,day 1,20,\n",
    "parts.csv": "path,label,recording,segments\n"
    "a.mp4,,day 1,1.000-2.000 run; 2.500-3.000 hop\nb.mp4,hop,,\n",
    "more.csv": "name,class,weather,boxes,n\na.mp4,'=1+1,-sun,-1 2 3 4,\nb.mp4,nan,,,3\n",
    "several.csv": "path,captions,text,segments\n"
    "a.mp4,one,two,0.000-1.000 x; 1.500-2.000 y\nb.mp4,- a,'- b,\n",
    "rows.jsonl": '{"path": "a.mp4", "label": 3.0, "captions": ["one", "two"], "n": [1, 2]}\n'
    '{"video": "b.mp4", "label": NaN, "set": "valid", "person_id": 7, "title": "\\u001b[2J"}\n',
    "windows.csv": 'file,label,start,end\nin\\c.mp4,"run, then\nstop",0.1234,2\na.mp4,x,,\n',
    "poses.csv": "path,label,pose,skeleton\na.mp4,x,p.npy,coco\nb.mp4,y,,\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_is_converted_says_what_it_said(tmp_path, name):
    """To csv nothing is lost, and values are read by the rules of `--data`."""
    put(tmp_path, "a.mp4", "b.mp4", "in/c.mp4", "p.npy")
    source, out = write(tmp_path, name, LISTS[name]), tmp_path / "out.csv"
    told = main(Config(str(source), "csv", str(out)))
    assert told["cannot hold"] == "nothing"
    plain = lambda path: [
        (os.path.normpath(s.name.replace("\\", "/")), s.label, s.captions, s.split, s.subject,
         s.beside, {n.lower(): v for n, v in s.extra.items()})
        for s in list_sources(path).sources
    ]  # fmt: skip
    assert plain(out) == plain(source)


@pytest.mark.parametrize(
    ("video", "label", "to"),
    [("a\n.mp4", "x", "csv"), ("b\\x41.mp4", "x", "csv"), ("a.mp4", "x\0", "cvat"),
     ("a.mp4", "x\ud800", "activitynet")],
)  # fmt: skip
def test_what_no_reader_could_take_is_not_written(tmp_path, video, label, to):
    film(tmp_path / video, range(12), Fraction(25))
    row = {"path": video, "label": label, "start": 0, "end": 0.2}
    source, out = write(tmp_path, "l.jsonl", row), tmp_path / "out"
    with pytest.raises(ValueError, match=r"cannot hold the|is no character"):
        main(Config(str(source), to, str(out)))
    assert not out.exists()


@pytest.mark.parametrize(
    "cells", ["run,2,1", "run,1,1", "run,-1,1", "run,nan,1", "run,0,inf", "run,1,", "run,,1",
              '"run","0,5","1,5"', "run,0:00,0:02", "run;hop,0,1"],
)  # fmt: skip
def test_a_label_with_times_that_are_none_is_refused(tmp_path, cells):
    """Else it would be a label of the whole video, beside others of parts."""
    put(tmp_path, "a.mp4", "b.mp4")
    path = write(tmp_path, "l.csv", f"path,label,start,end\na.mp4,hop,0,1\nb.mp4,{cells}\n")
    assert "l.csv:3: " in refusal(path)
    told = write(tmp_path, "whole.csv", "path,label,start,end\na.mp4,hop,,\nb.mp4,run,nan,nan\n")
    assert all(about[4] == "" for about in listed(told).values())


def test_times_of_recordings_and_further_columns_are_no_segments(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    source = write(tmp_path, "cut.csv", LISTS["cut.csv"])
    told = main(Config(str(source), "activitynet", str(tmp_path / "o.json")))
    assert all(f"column {c} (2)" in told["cannot hold"] for c in ("recording", "start", "end"))
    assert "segment" not in (tmp_path / "o.json").read_text()


def test_a_list_written_into_another_folder_names_the_same_files(tmp_path):
    put(tmp_path / "in", "a.mp4", "x/b.mp4", "x/b.npz")
    lines = "path,label,flow\na.mp4,run,\nx/b.mp4,hop,x/b.npz\n"
    source = write(tmp_path / "in", "a.csv", lines)
    (tmp_path / "out").mkdir()
    main(Config(str(source), "csv", str(tmp_path / "out" / "o.csv")))
    paths = lambda path: [(s.path.resolve(), s.label) for s in list_sources(path).sources]
    assert paths(tmp_path / "out" / "o.csv") == paths(source)
    assert "../in/x/b.npz" in (tmp_path / "out" / "o.csv").read_text()
    told = main(Config(str(source), "activitynet", str(tmp_path / "out" / "o.json")))
    assert f"files in {tmp_path / 'in'}" in told["notes"]


@pytest.mark.parametrize("row", [{"label": ["run"]}, {"label": True}, {"path": ""}, {"path": [1]}])
def test_what_packing_refuses_of_a_list_is_not_converted(tmp_path, row):
    put(tmp_path, "a.mp4")
    source = write(tmp_path, "a.jsonl", {"path": "a.mp4", "n": 1} | row)
    assert "a.jsonl:1" in refusal(source)
    with pytest.raises(ValueError, match="1 problem"):
        main(Config(str(source), "csv", str(tmp_path / "o.csv")))
