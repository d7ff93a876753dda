"""What counts as a data set, and what is said about a broken one."""

import errno
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from pretrain.data.sources import Source, list_sources
from pretrain.data.tar import list_members
from pretrain.folders import claim


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def rows(folder: Path, name: str, text: str | bytes, *files: str) -> list[Source]:
    touch(folder, *files)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_sources(folder / name).sources


def brief(sources: list[Source]) -> list[tuple]:
    return [(s.name, s.label, s.captions, s.split, s.subject) for s in sources]


def names_labels(sources: list[Source]) -> list[tuple]:
    return [(s.name, s.label) for s in sources]


# ---- folders


def test_folder_of_classes(tmp_path):
    touch(tmp_path, "walk/b.mp4", "walk/a.AVI", "run/deep/c.mkv", "top.webm", "walk/.hidden.mp4")
    touch(tmp_path, "walk/notes.txt", ".git/x.mp4", "README")
    listing = list_sources(tmp_path)
    assert names_labels(listing.sources) == [
        ("run/deep/c.mkv", "run"),
        ("top.webm", None),
        ("walk/a.AVI", "walk"),
        ("walk/b.mp4", "walk"),
    ]
    assert listing.skipped == ["README", "walk/notes.txt"] and not listing.unread
    assert all(s.split is None and s.path.is_file() for s in listing.sources)


def test_a_list_in_a_folder_that_is_not_read_is_named(tmp_path):
    touch(tmp_path, "walk/a.mp4", "walk/a.json", "Labels.CSV", "b.xml")  # a.json is of a video
    listing = list_sources(tmp_path)
    assert listing.lists == ["Labels.CSV", "b.xml"]
    assert "Labels.CSV, b.xml" in listing.unread and "a.json" not in listing.unread


def test_folder_with_splits_above_classes(tmp_path):
    touch(tmp_path, "train/walk/a.mp4", "Validation/walk/b.mp4", "test/run/c.mp4", "test/d.mp4")
    found = {s.name: (s.label, s.split) for s in list_sources(tmp_path).sources}
    assert found == {
        "train/walk/a.mp4": ("walk", "train"),
        "Validation/walk/b.mp4": ("walk", "val"),
        "test/run/c.mp4": ("run", "test"),
        "test/d.mp4": (None, "test"),
    }


def test_a_class_may_be_called_test(tmp_path):
    touch(tmp_path, "test/a.mp4", "sprint/b.mp4")
    assert names_labels(list_sources(tmp_path).sources) == [
        ("sprint/b.mp4", "sprint"),
        ("test/a.mp4", "test"),
    ]


def test_flat_folder_of_images_and_links_in_circles(tmp_path):
    touch(tmp_path, "a.jpg", "b.PNG", "c.webp", "sub/d.jpeg")
    os.symlink(tmp_path, tmp_path / "sub" / "up")
    sources = list_sources(tmp_path).sources
    assert [(s.name, s.kind) for s in sources] == [
        ("a.jpg", "image"),
        ("b.PNG", "image"),
        ("c.webp", "image"),
        ("sub/d.jpeg", "image"),
    ]


def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    touch(tmp_path, "a.mp4")
    os.mkfifo(tmp_path / "b.mp4")
    listing = list_sources(tmp_path)
    assert [s.name for s in listing.sources] == ["a.mp4"]
    assert listing.refused == [("b.mp4", "a pipe, not a regular file")]


def test_single_video_and_nothing(tmp_path):
    touch(tmp_path, "one.mp4", "empty.csv", "only/notes.txt")
    (tmp_path / "empty.csv").write_text("\n \n")
    assert [s.name for s in list_sources(tmp_path / "one.mp4").sources] == ["one.mp4"]
    for name, message in (
        ("empty.csv", "is empty"),
        ("only", "holds no video or image"),
        ("nowhere", "does not exist"),
        ("https://host/a.mp4", "is an address"),
    ):
        with pytest.raises(ValueError, match=message):
            list_sources(name if "://" in name else tmp_path / name)


# ---- lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", 'path,label,caption\na.mp4,walk,"one, two"\nb c.mp4,run,\n'),
        ("l.csv", '\ufeffpath,label,caption\r\na.mp4,walk,"one, two"\r\nb c.mp4,run,\r\n\r\n\r\n'),
        ("l.csv", 'label,caption,path\rwalk,"one, two",a.mp4\rrun,,b c.mp4\r'),
        ("l.csv", 'Video_Path, Class, Text\na.mp4, walk, "one, two"\nb c.mp4, run,\n'),
        ("l.tsv", "path\tlabel\tcaption\na.mp4\twalk\tone, two\nb c.mp4\trun\t\n"),
        ("l.txt", 'path label caption\na.mp4 walk "one, two"\n"b c.mp4" run ""\n'),
        (
            "l.jsonl",
            '{"path": "a.mp4", "label": "walk", "captions": ["one, two"]}\n\n'
            '{"path": "b c.mp4", "label": "run", "caption": null}\n',
        ),
        ("l.csv", 'path;label;caption\na.mp4;walk;"one, two"\nb c.mp4;run;\n'),
        ("l.csv", 'sep=;\r\n"Path";"Label";"Caption"\r\na.mp4;walk;one, two\r\nb c.mp4;run;\r\n'),
        ("l.csv", "file;class;text;;\na.mp4;walk;one, two;;\nb c.mp4;run;;;\n"),
        ("l.txt", "path|label|caption\na.mp4|walk|one, two\nb c.mp4|run|\n"),
        ("l.csv", 'file,class,title\na.mp4,walk,"one, two"\nb c.mp4,run,\n'),
        ("l.csv", 'name,action,Sentence\na.mp4,walk,"one, two"\nb c.mp4,run,nan\n'),
        ("l.csv", 'File Name,class-name,title\na.mp4,walk,"one, two"\nb c.mp4,run,NaN\n'),
        ("l.tsv", 'path\tlabel\tcaption\n"a.mp4"\t"walk"\t"one, two"\n"b c.mp4"\trun\t""\n'),
        (
            "l.csv",
            "\ufeffpath\tlabel\tcaption\r\na.mp4\twalk\tone, two\r\nb c.mp4\trun\t\r\n".encode(
                "utf-16-le"
            ),
        ),
        ("l.csv", "path;label;caption\r\na.mp4;walk;one, two\r\nb c.mp4;run;\r\n".encode("utf-16")),
        (
            "l.json",
            '[{"path": "a.mp4", "label": "walk", "caption": "one, two"},\n'
            ' {"path": "b c.mp4", "label": "run", "caption": NaN, "split": NaN}\n]\n',
        ),
        (
            "l.json",
            '[\n {\n  "videoPath": "a.mp4",\n  "class": "walk",\n  "text": ["one, two"]\n },\n'
            ' {"videoPath": "b c.mp4", "class": "run", "text": []}\n]',
        ),
    ],
)
def test_lists_with_header(tmp_path, name, text):
    sources = rows(tmp_path, name, text, "a.mp4", "b c.mp4")
    assert brief(sources) == [
        ("a.mp4", "walk", ("one, two",), None, None),
        ("b c.mp4", "run", (), None, None),
    ]
    assert sources[1].path == tmp_path / "b c.mp4"


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("l.csv", "a.mp4,0\nb c.mp4,1\n", ["0", "1"]),
        ("l.csv", "a.mp4 0\nb c.mp4 1\n", ["0", "1"]),
        ("l.txt", "a.mp4 0\nb c.mp4 1", ["0", "1"]),
        ("l.txt", "a.mp4 0 5\nb c.mp4 0 6\n", ["5", "6"]),
        ("l.txt", "a.mp4,0,5\nb c.mp4,0,6\n", ["5", "6"]),
        ("l.txt", "a.mp4\nb c.mp4\n", [None, None]),
        ("l.tsv", "a.mp4\twalk\nb c.mp4\tjumping jack\n", ["walk", "jumping jack"]),
        ("l.list", '"a.mp4" walk\n"b c.mp4" run\n', ["walk", "run"]),
    ],
)
def test_lists_without_header(tmp_path, name, text, labels):
    sources = rows(tmp_path, name, text, "a.mp4", "b c.mp4")
    assert names_labels(sources) == list(zip(["a.mp4", "b c.mp4"], labels, strict=True))


def test_further_columns_are_kept(tmp_path):
    text = "path,split,person,fingers,Camera\nsub/a.mp4,test,7,2,left\n"
    (source,) = rows(tmp_path, "l.csv", text, "sub/a.mp4")
    assert (source.split, source.subject, source.label) == ("test", "7", None)
    assert source.extra == {"fingers": "2", "Camera": "left"}
    (source,) = rows(tmp_path, "m.jsonl", '{"path": "sub/a.mp4", "label": 3, "box": [1, 2]}')
    assert (source.label, source.extra) == ("3", {"box": "[1, 2]"})


def test_rows_of_one_file_are_merged(tmp_path):
    text = "path,caption,label,n\na.jpg,one,x,1\nb.jpg,two,,1\n./a.jpg,three,,2\na.jpg,one,x,2\n"
    sources = rows(tmp_path, "l.csv", text, "a.jpg", "b.jpg")
    assert brief(sources) == [
        ("a.jpg", "x", ("one", "three"), None, None),
        ("b.jpg", None, ("two",), None, None),
    ]
    assert sources[0].extra == {"n": "1; 2"}


def test_paths_that_windows_wrote(tmp_path):
    found = rows(
        tmp_path, "l.csv", "path;label\r\nsub\\a b.mp4;x\r\n.\\b.mp4;y\r\n", "sub/a b.mp4", "b.mp4"
    )
    assert [s.path for s in found] == [tmp_path / "sub" / "a b.mp4", tmp_path / "b.mp4"]


def test_absolute_and_upward_paths(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "lists").mkdir()
    sources = rows(
        tmp_path / "lists", "l.csv", f"path\n../a.mp4\n{tmp_path}/lists/b.mp4\n", "b.mp4"
    )
    assert [s.path for s in sources] == [tmp_path / "a.mp4", tmp_path / "lists" / "b.mp4"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (",path,label\n0,a.mp4,x\n1,b.mp4,y\n",
         [("x", (), {"index": "0"}), ("y", (), {"index": "1"})]),
        # pandas: quotes are written twice, a value with a tab or a line end is quoted
        ('path\tcaption\na.mp4\t"one\t""two"""\nb.mp4\t"one\ntwo"\n',
         [(None, ('one\t"two"',), {}), (None, ("one\ntwo",), {})]),
        ('path\tcaption\na.mp4\t"a ""b"""\nb.mp4\tc\n',
         [(None, ('a "b"',), {}), (None, ("c",), {})]),
        # and sentences in which a " is just one
        ('path\tcaption\na.mp4\t"Hello" she said\nb.mp4\t5" of rain\n',
         [(None, ('"Hello" she said',), {}), (None, ('5" of rain',), {})]),
        ('path\tcaption\na.mp4\t"Hello\nb.mp4\tbye"\n',
         [(None, ('"Hello',), {}), (None, ('bye"',), {})]),
        ("path,title,caption\na.mp4,T,c\nb.mp4,,d\n",
         [(None, ("c",), {"title": "T"}), (None, ("d",), {})]),
        ("video,caption,text\na.mp4,c,d\nb.mp4,e,e\n",
         [(None, ("c", "d"), {}), (None, ("e",), {})]),
        ("id,filename,label\n7,a.mp4,x\n8,b.mp4,y\n",
         [("x", (), {"id": "7"}), ("y", (), {"id": "8"})]),
        ('["a.mp4", "b.mp4"]', [(None, (), {}), (None, (), {})]),
        ('[{"path": "a.mp4", "label": 3, "caption": ["x", 4]}, {"path": "b.mp4", "label": 5.0}]',
         [("3", ("x", "4"), {}), ("5", (), {})]),
        ('{"path": "a.mp4", "label": "NaN"}\n{"path": "b.mp4", "label": NaN}',
         [(None, (), {}), (None, (), {})]),
        ("path,label\na.mp4,None\nb.mp4,null\n", [("None", (), {}), ("null", (), {})]),
    ],
)  # fmt: skip
def test_lists_as_others_write_them(tmp_path, text, found):
    sources = rows(tmp_path, "l.tsv", text, "a.mp4", "b.mp4")
    assert [s.name for s in sources] == ["a.mp4", "b.mp4"]
    assert [(s.label, s.captions, s.extra) for s in sources] == found


@pytest.mark.parametrize("how", ["csv", "jsonl", "array", "tar", "folder"])
def test_words_for_splits_are_understood_everywhere(tmp_path, how):
    words = [
        ("train", "train"), ("training", "train"), ("Train", "train"), ("TRAINING", "train"),
        ("val", "val"), ("Val", "val"), ("valid", "val"), ("validation", "val"),
        ("Validation", "val"), ("dev", "val"), ("eval", "val"), ("evaluation", "val"),
        ("test", "test"), ("Testing", "test"), ("TEST", "test"),
    ]  # fmt: skip
    objects = [{"path": f"{i}.mp4", "split": word} for i, (word, _) in enumerate(words)]
    if how == "folder":
        touch(tmp_path, *(f"f/{word}/{i:02}.mp4" for i, (word, _) in enumerate(words)))
        sources = list_sources(tmp_path / "f").sources
        sources = sorted(sources, key=lambda source: source.path.name)
    elif how == "tar":
        members = [
            (f"{i}.{end}", data)
            for i, row in enumerate(objects)
            for end, data in (("mp4", b"x"), ("json", json.dumps(row).encode()))
        ]
        sources = list_sources(make_tar(tmp_path / "s.tar", members)).sources
    else:
        text = {
            "csv": "path,split\n" + "".join(f"{row['path']}, {row['split']} \n" for row in objects),
            "jsonl": "\n".join(map(json.dumps, objects)),
            "array": json.dumps(objects),
        }[how]
        sources = rows(tmp_path, "l.csv", text, *(row["path"] for row in objects))
    assert [s.split for s in sources] == [split for _, split in words]


def test_a_split_of_another_name_stays(tmp_path):
    sources = rows(tmp_path, "l.csv", "path,split\na.mp4,compose\nb.mp4,Fold 1\n", "a.mp4", "b.mp4")
    assert [s.split for s in sources] == ["compose", "Fold 1"]


@pytest.mark.parametrize(
    "value",
    ['["walk", "run"]', "true", "false", "3.5", '{"en": "walk"}', "Infinity", "-Infinity",
     '["walk"]'],
)  # fmt: skip
@pytest.mark.parametrize("role", ["label", "split", "subject", "caption", "path"])
def test_json_values_that_are_no_text_are_named_with_their_line(tmp_path, role, value):
    bad = f'{{"path": "b.mp4", "{role}": {value}}}'
    bad = bad.replace('"path": "b.mp4", "path"', '"path"')
    for name, text in (
        ("l.jsonl", f'{{"path": "a.mp4"}}\n{bad}'),
        ("l.json", f'[{{"path": "a.mp4"}},\n{bad}]'),
    ):
        if role == "caption" and value.startswith("["):
            assert rows(tmp_path, name, text, "a.mp4", "b.mp4")[
                1
            ].captions  # several are right here
            continue
        with pytest.raises(ValueError, match=rf"{name}:2: {role} is .*text"):
            rows(tmp_path, name, text, "a.mp4", "b.mp4")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        # Kinetics, Something-Something, MSR-VTT, COCO, UCF-101's list in another folder, an unknown
        # header
        ("label,youtube_id,time_start,time_end,split\n"
         + "".join(f"x,no{i},0,10,train\n" for i in range(120)), "no such video: .*no0"),
        (json.dumps([{"id": f"no{i}", "label": "x", "template": "y", "placeholders": []}
                     for i in range(120)]), "no such video: no no0.webm"),
        (json.dumps([{"label": "x", "template": "y"}] * 120, indent=1), "no path.*label, template"),
        (json.dumps({"info": {}, "videos": [{"video_id": "a"}]}), "no path.*info, videos"),
        (json.dumps({"info": {}, "images": [], "annotations": []}, indent=1),
         "no path.*annotations"),
        ("".join(f"Walk/v_{i}.avi 1\n" for i in range(120)), "no such file: Walk/v_0.avi"),
        ("what;when\n" + "".join(f"x{i};y\n" for i in range(120)), "no such file: what"),
        ("label,caption\n" + "x,y\n" * 120, "no column names the files, among label, caption"),
        ("path,label\n" + "a.mp4;x\n" * 120, "1 columns, not the 2"),
        ("{path: a.mp4}\n" * 120, "not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_every_line_is_told_once(tmp_path, text, cause):
    touch(tmp_path, "a.mp4", "yt0.webm")
    with pytest.raises(ValueError, match=rf"(?s)l\.csv:\d+: .*{cause}") as caught:
        rows(tmp_path, "l.csv", text)
    told = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert "\n".join(told).count("l.csv:") == 1


@pytest.mark.parametrize(
    "text",
    [
        *("[", '["a.mp4", 3]'),
        *('[{"path": "a.mp4"}', '[{"path": "a.mp4"}] x', '[{"path": "a.mp4"} {}]'),
    ],
)
def test_a_broken_json_array_is_no_shorter_list(tmp_path, text):
    with pytest.raises(ValueError, match=r"l\.json:1: not "):
        rows(tmp_path, "l.json", text, "a.mp4")


def test_a_list_in_another_encoding_says_which_to_save_it_in(tmp_path):
    with pytest.raises(ValueError, match=r"l\.csv:2: not UTF-8.*save the list as UTF-8"):
        rows(tmp_path, "l.csv", "path;label\na.mp4;Fu\xdfball\n".encode("latin-1"), "a.mp4")


def test_all_problems_of_a_list_are_reported_with_their_lines(tmp_path):
    text = (
        "path,label\na.mp4,x\nmissing.mp4,x\na.mp4,y\n\n,x\na.mp4\nsub,x\n"
        "http://host/v.mp4,x\npipe:rm -rf /,x\nb.mp4,x,y\n"
    )
    touch(tmp_path, "b.mp4", "sub/c.mp4")
    with pytest.raises(ValueError) as caught:
        rows(tmp_path, "l.csv", text, "a.mp4")
    message = "\n".join([str(caught.value), *caught.value.__notes__])
    place = f"{tmp_path}/l.csv"
    for line, what in (
        (3, "no such file: missing.mp4"),
        (4, "another label ('y', not 'x') than line 2 gives"),
        (6, "no path"),
        (7, "1 columns, not the 2 of path, label"),
        (8, "sub is a folder"),
        (9, "http://host/v.mp4 is an address"),
        (10, "pipe:rm -rf / is an address"),
        (11, "3 columns, not the 2"),
    ):
        assert any(at.startswith(f"{place}:{line}: {what}") for at in message.splitlines()), (
            line,
            message,
        )
    assert message.startswith("8 problems in")


def test_many_problems_are_cut_at_fifty(tmp_path):
    text = "path,label\n" + "".join(f"no{i}.mp4,x\n" for i in range(120))
    with pytest.raises(ValueError) as caught:
        rows(tmp_path, "l.csv", text + "good.mp4,x\n", "good.mp4")
    *lines, more = caught.value.__notes__
    assert len(lines) == 50 and all("no such file" in line for line in lines)
    assert "120 problems" in str(caught.value) and "and 70 more" in more


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.mp4,x,y\n", "cannot tell what its 3 columns mean"),
        ("l.csv", "a.mp4,a man walks\n", "cannot tell what its 2 columns mean"),
        ("l.csv", "a.mp4,train\n", "cannot tell"),
        ("l.csv", "a.mp4,1,2,3\n", "write a first line that names the columns"),
        ("l.csv", "path,label,class\na.mp4,1,2\n", "two columns for label"),
        ("l.csv", 'path,label\n"a.mp4,x\n', "broken quotes"),
        (
            "l.csv",
            "stuff,what\na.mp4,x\n",
            "l.csv:1: no such file: stuff.*if this line is a header",
        ),
        ("l.jsonl", '{"path": "a.mp4"}\n{"path": \n[1]\n{"label": 1}', "l.jsonl:2: not JSON"),
        ("l.csv", b"path\n\xff\xfe\n", "l.csv:2: not UTF-8"),
        ("l.csv", b"\xff\xfe\x00", "not UTF-16"),
        ("l.csv", "path\na\0.mp4\n".encode("utf-16"), "not a list"),
        ("l.csv", "path,path\na.mp4,a.mp4\n", "two columns"),
        ("l.csv", "path,x,x\na.mp4,1,2\n", "two columns called x"),
        ("l.csv", "path,,x\na.mp4,1,2\n", "a column without name"),
        (
            "l.jsonl",
            '{"path": "a.mp4", "label": 1, "class_name": "x"}',
            "l.jsonl:1: two values for label",
        ),
        ("l.bin", b"\0\1\2\3", "not a list"),
        ("l.tar.gz", b"\x1f\x8b", "is compressed"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, name, text, "a.mp4")


# ---- tars


def make_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tar(tmp_path):
    about = {"label": "walk", "caption": ["one", "two"], "subject": 3, "camera": 1}
    make_tar(
        tmp_path / "s.tar",
        [
            ("a/0001.mp4", b"video"),
            ("a/0001.json", json.dumps(about).encode()),
            ("a/0002.MP4", b"more"),
            ("a/0002.txt", b" a sentence\n"),
            ("a/0002.cls", b"4"),
            ("0003.webm", b"v"),
            ("0003.jpg", b"its thumbnail"),
            ("0004.jpg", b"picture"),
            ("0005.npy", b"?"),
            ("0006.mp4", b"v"),
            ("0006.json", b"{broken"),
        ],
    )
    listing = list_sources(tmp_path / "s.tar")
    assert brief(listing.sources) == [
        ("s.tar/a/0001.mp4", "walk", ("one", "two"), None, "3"),
        ("s.tar/a/0002.MP4", "4", ("a sentence",), None, None),
        ("s.tar/0003.webm", None, (), None, None),
        ("s.tar/0004.jpg", None, (), None, None),
    ]
    assert listing.sources[0].extra == {"camera": "1"}
    assert [s.kind for s in listing.sources] == ["video", "video", "video", "image"]
    assert listing.skipped == ["s.tar/0003.jpg", "s.tar/0005.npy"]
    assert [name for name, why in listing.refused if "json" in why] == ["s.tar/0006.mp4"]
    offset, size = listing.sources[1].member
    assert (tmp_path / "s.tar").read_bytes()[offset : offset + size] == b"more"


def tar_of(folder: Path, *names: str) -> dict[str, tuple]:
    """Name -> label and captions; every text says of whom it is."""
    about = {"json": '{"caption": "%s"}'}
    members = [
        (name, (about.get(name.rpartition(".")[2], "%s") % name.rpartition(".")[0]).encode())
        for name in names
    ]
    listing = list_sources(make_tar(folder / "s.tar", members))
    found = {s.name.removeprefix("s.tar/"): (s.label, s.captions) for s in listing.sources}
    return found | {name.removeprefix("s.tar/"): "skipped" for name in listing.skipped}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        # names cut at the last dot
        (
            ("clip.001.mp4", "clip.001.txt", "clip.001.cls", "clip.002.txt", "clip.002.mp4"),
            {"clip.001.mp4": ("clip.001", ("clip.001",)), "clip.002.mp4": (None, ("clip.002",))},
        ),
        (
            ("7.mp4", "7.caption", "7.class", "8.mp4", "8.text", "8.label"),
            {"7.mp4": ("7", ("7",)), "8.mp4": ("8", ("8",))},
        ),
        (
            ("v1.0/Dr. Who.mp4", "v1.0/Dr. Who.json", "v1.0/Dr. No.mp4"),
            {"v1.0/Dr. Who.mp4": (None, ("v1.0/Dr. Who",)), "v1.0/Dr. No.mp4": (None, ())},
        ),
        (
            ("a.mp4", "a.txt", "a.1.mp4", "a.1.txt", "a.2.mp4"),
            {"a.mp4": (None, ("a",)), "a.1.mp4": (None, ("a.1",)), "a.2.mp4": (None, ())},
        ),
        # and at the first one, as webdataset has it
        (
            ("7.left.mp4", "7.right.mp4", "7.txt", "7.cls"),
            {"7.left.mp4": ("7", ("7",)), "7.right.mp4": ("7", ("7",))},
        ),
        (("7.mp4", "7.flow.mp4", "7.txt"), {"7.mp4": (None, ("7",)), "7.flow.mp4": (None, ("7",))}),
        (
            ("7.left.mp4", "7.right.mp4", "7.left.txt", "7.cls"),
            {"7.left.mp4": ("7", ("7.left",)), "7.right.mp4": ("7", ())},
        ),
        (("7.mp4", "7.thumb.jpg", "7.txt"), {"7.mp4": (None, ("7",)), "7.thumb.jpg": "skipped"}),
        # what belongs to none is named
        (
            ("7.mp4", "7.meta.json", "8.txt", "7.MP4", "7.TXT", "7.txt"),
            {"7.mp4": (None, ("7",)), "7.MP4": (None, ("7",))}
            | dict.fromkeys(("7.meta.json", "8.txt", "7.txt"), "skipped"),
        ),
    ],
)
def test_texts_in_a_tar_go_to_the_videos_they_are_about(tmp_path, names, found):
    assert tar_of(tmp_path, *names) == found
    assert tar_of(tmp_path, *reversed(names)) == found or "7.TXT" in names


@pytest.mark.parametrize("order", [1, -1])
def test_a_video_with_json_txt_and_cls(tmp_path, order):
    """In whatever order they lie, a sentence is listed once, and the class's name goes before its
    number.
    """
    about = {
        "caption": "one",
        "label": "walk",
        "split": "validation",
        "title": "t",
        "id": 7,
        "filename": "x.mp4",
    }
    parts = [("a.mp4", b"x"), ("a.txt", b"one\n"), ("a.cls", b"4")]
    parts.append(("a.json", json.dumps(about).encode()))
    listing = list_sources(make_tar(tmp_path / "s.tar", parts[::order]))
    assert brief(listing.sources) == [("s.tar/a.mp4", "walk", ("one",), "val", None)]
    assert listing.sources[0].extra == {"title": "t", "id": "7", "filename": "x.mp4"}
    assert not listing.skipped


@pytest.mark.parametrize("data", ['["one", "two"]', "3", '"a"', "[]", "null", "true"])
def test_a_json_beside_a_video_that_is_no_object_is_named(tmp_path, data):
    parts = [("a.mp4", b"x"), ("a.json", data.encode()), ("a.txt", b"one")]
    listing = list_sources(make_tar(tmp_path / "s.tar", parts))
    assert brief(listing.sources) == [("s.tar/a.mp4", None, ("one",), None, None)]
    assert listing.skipped == ["s.tar/a.json"]


@pytest.mark.parametrize(
    "about", [{"label": ["a", "b"]}, {"caption": {"en": "x"}}, {"label": True}]
)
def test_values_in_a_tar_that_are_no_text_refuse_that_member(tmp_path, about):
    parts = [("a.mp4", b"x"), ("a.json", json.dumps(about).encode()), ("b.mp4", b"x")]
    listing = list_sources(make_tar(tmp_path / "s.tar", parts))
    assert [s.name for s in listing.sources] == ["s.tar/b.mp4"]
    assert [name for name, _ in listing.refused] == ["s.tar/a.mp4"]


def test_folder_of_tars(tmp_path):
    (tmp_path / "train").mkdir()
    make_tar(tmp_path / "train" / "0.tar", [("a.mp4", b"1")])
    make_tar(tmp_path / "train" / "1.tar", [("a.mp4", b"2")])
    sources = list_sources(tmp_path).sources
    assert [(s.name, s.split) for s in sources] == [
        ("train/0.tar/a.mp4", "train"),
        ("train/1.tar/a.mp4", "train"),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path, format):
    long = "d" * 120 + "/" + ("n" * 90 if format == tarfile.USTAR_FORMAT else "ä" * 150) + ".mp4"
    members = [("a.mp4", b"x" * 1000), (long, b""), ("ünï/b.mp4", b"y" * 512), ("c" * 100, b"z")]
    path = make_tar(tmp_path / "s.tar", members, format)
    found, problems = list_members(path)
    with tarfile.open(path) as file:
        assert [tuple(m) for m in found] == [(m.name, m.offset_data, m.size) for m in file]
    assert not problems and len(found) == 4


def twenty(tmp_path: Path) -> tuple[Path, bytes]:
    path = make_tar(
        tmp_path / "s.tar", [(f"{i:02}.mp4", bytes([i]) * (300 + 40 * i)) for i in range(20)]
    )
    return path, path.read_bytes()


def test_no_flipped_header_byte_loses_a_sample_silently(tmp_path):
    path, good = twenty(tmp_path)
    headers = [m.offset - 512 for m in list_members(path)[0]]
    silent = harmless = 0
    for header in headers[1::3]:
        for at in range(0, 512, 7):
            bad = bytearray(good)
            bad[header + at] ^= 0x20
            path.write_bytes(bad)
            members, problems = list_members(path)
            silent += len(members) < 20 and not problems
            harmless += not problems
    assert silent == 0
    assert harmless == len(headers[1::3])  # one place: the blank behind the check sum


def test_no_cut_is_silent(tmp_path):
    path, good = twenty(tmp_path)
    for size in range(0, 20 * 1024, 256):
        path.write_bytes(good[:size])
        _, problems = list_members(path)
        assert problems and problems[-1][0] == "", size
    path.write_bytes(good + good)
    assert "end mark" in list_members(path)[1][0][1]


def test_damaged_tar_names_the_place(tmp_path):
    path, good = twenty(tmp_path)
    bad = bytearray(good)
    at = list_members(path)[0][7].offset - 512
    bad[at] ^= 1
    path.write_bytes(bad)
    listing = list_sources(path)
    assert len(listing.sources) == 7
    assert listing.refused == [
        ("s.tar", f"not a tar header at byte {at} of {len(good)}; 7 members before it were read")
    ]


def test_odd_members_are_named_and_never_followed(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (
            ("l.mp4", tarfile.SYMTYPE),
            ("h.mp4", tarfile.LNKTYPE),
            ("d.mp4", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        for name in ("../../up.mp4", "/abs.mp4", "twice.mp4", "twice.mp4", "new\nline.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"x"))
    listing = list_sources(path)
    assert [s.name for s in listing.sources] == [
        "s.tar/../../up.mp4",
        "s.tar//abs.mp4",
        "s.tar/twice.mp4",
        "s.tar/new\nline.mp4",
    ]
    assert {s.path for s in listing.sources} == {path}
    assert [name for name, _ in listing.refused] == [
        "s.tar/l.mp4",
        "s.tar/h.mp4",
        "s.tar/d.mp4",
        "s.tar/twice.mp4",
    ]


# ---- interleaved documents


def documents(folder: Path, *docs: dict) -> list[Source]:
    return rows(folder, "docs.jsonl", "\n".join(map(json.dumps, docs)), "a.jpg", "b.mp4", "c.jpg")


def test_a_visual_is_paired_with_its_neighbouring_paragraphs(tmp_path):
    parts = [
        {"image": "a.jpg"}, {"text": "first"}, {"text": " second "}, {"video": "b.mp4"},
        {"image": "c.jpg"}, {"text": "third"},
    ]  # fmt: skip
    found = documents(tmp_path, {"id": "d7", "split": "test", "document": parts})
    assert brief(found) == [
        ("a.jpg", None, ("first",), "test", None),
        ("b.mp4", None, ("second", "third"), "test", None),
        ("c.jpg", None, ("second", "third"), "test", None),
    ]
    assert [(s.kind, s.extra) for s in found] == [
        ("image", {"id": "d7", "document": "d7", "place": "0"}),
        ("video", {"id": "d7", "document": "d7", "place": "1"}),
        ("image", {"id": "d7", "document": "d7", "place": "2"}),
    ]


def test_documents_of_two_lists(tmp_path):
    found = documents(
        tmp_path, {"images": [None, "a.jpg", None], "texts": ["before", None, "after"]}
    )
    assert [(s.name, s.captions) for s in found] == [("a.jpg", ("before", "after"))]


def test_the_same_visual_in_two_documents_collects_its_captions(tmp_path):
    found = documents(
        tmp_path,
        {"document": [{"text": "one"}, {"image": "a.jpg"}]},
        {"document": [{"image": "a.jpg"}, {"text": "two"}]},
    )
    assert [(s.name, s.captions) for s in found] == [("a.jpg", ("one", "two"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": [{"text": "alone"}]}, "without an image or a video"),
        ({"document": [{"image": "a.jpg"}, {"text": "  "}]}, "without text"),
        ({"document": [{"audio": "a.wav"}, {"text": "x"}, {"image": "a.jpg"}]}, "kind 'audio'"),
        ({"document": ["a.jpg", "text"]}, "a document is a list of"),
        ({"document": [{"image": "gone.jpg"}, {"text": "x"}]}, "no such file: gone.jpg"),
        ({"images": ["a.jpg"], "texts": []}, "two lists of one length"),
        ({"images": ["a.jpg", None], "texts": [None, 3]}, "a document is a list of"),
    ],
)
def test_bad_documents_are_named_with_their_line(tmp_path, row, message):
    good = {"document": [{"text": "x"}, {"image": "a.jpg"}]}
    with pytest.raises(ValueError, match=rf"docs\.jsonl:2: .*{message}"):
        documents(tmp_path, good, row)


# ---- what may not be read, and what was made to do harm


def ledger(path: Path) -> dict[str, str]:
    return dict(list_sources(path).refused)


def test_a_folder_that_may_not_be_read_is_in_the_ledger(tmp_path, monkeypatch):
    touch(tmp_path, "walk/a.mp4", "run/b.mp4", "run/deep/c.mp4")
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # permissions do not bind root
    listing = list_sources(tmp_path)
    assert names_labels(listing.sources) == [("run/b.mp4", "run"), ("walk/a.mp4", "walk")]
    assert listing.refused == [("run/deep", "cannot be listed: Permission denied")]
    with pytest.raises(ValueError, match=r"deep.*Permission denied"):
        list_sources(tmp_path / "run" / "deep")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="binds no root")
def test_permissions_themselves(tmp_path):
    touch(tmp_path, "walk/a.mp4", "run/b.mp4")
    (tmp_path / "run").chmod(0)
    try:
        assert "run" in ledger(tmp_path)
    finally:
        (tmp_path / "run").chmod(0o755)


def test_a_class_that_is_a_link_to_its_sibling_is_in_the_ledger(tmp_path):
    touch(tmp_path, "walk/a.mp4", "run/b.mp4")
    os.symlink("walk", tmp_path / "a_first_by_name")  # the real folder gives the class all the same
    os.symlink(tmp_path / "run", tmp_path / "z_last")
    os.symlink(tmp_path, tmp_path / "walk" / "up")
    listing = list_sources(tmp_path)
    assert names_labels(listing.sources) == [("run/b.mp4", "run"), ("walk/a.mp4", "walk")]
    refused = dict(listing.refused)
    assert set(refused) == {"a_first_by_name", "z_last", "walk/up"}
    assert "walk" in refused["a_first_by_name"] and "run" in refused["z_last"]


def test_pictures_of_results_are_no_clips(tmp_path):
    """`fit --data .` writes to runs/ below the data, which would be one more class."""
    touch(tmp_path, "walk/a.mp4", "runs/fit/confusion.png", "runs/fit/clips/a.mp4", "up/b.mp4")
    touch(tmp_path, "packs/a/index.json", "packs/a/clips.jsonl", "packs/a/shard.tar")
    claim(tmp_path / "runs/fit").release(force=True)
    listing = list_sources(tmp_path)
    assert names_labels(listing.sources) == [("up/b.mp4", "up"), ("walk/a.mp4", "walk")]
    assert "results" in (told := dict(listing.refused))["runs/fit"] and "packed" in told["packs/a"]
    assert names_labels(list_sources(tmp_path / "runs/fit").sources)  # where they are asked for


def test_links_out_of_the_folder_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere", "a.mp4")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "walk")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "zoo")
    listing = list_sources(tmp_path / "in")
    assert names_labels(listing.sources) == [("walk/a.mp4", "walk")]
    assert [name for name, _ in listing.refused] == ["zoo"]


def test_links_that_lead_nowhere_are_in_the_ledger(tmp_path):
    touch(tmp_path, "a.mp4")
    os.symlink("missing", tmp_path / "class")
    os.symlink("missing.mp4", tmp_path / "b.mp4")
    os.symlink("round", tmp_path / "round")
    refused = ledger(tmp_path)
    assert set(refused) == {"class", "b.mp4", "round"}
    assert all("leads nowhere" in reason for reason in refused.values())


def pax_tar(path: Path, header: bytes) -> Path:
    """A good member, then one with this extended header, then another good one."""
    data = b""
    for name, kind, content in (
        ("a.mp4", tarfile.REGTYPE, b"x"),
        ("header", tarfile.XHDTYPE, header),
        ("b.mp4", tarfile.REGTYPE, b"y"),
        ("c.mp4", tarfile.REGTYPE, b"z"),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(content)
        data += info.tobuf() + content + bytes(-len(content) % 512)
    path.write_bytes(data + bytes(1024))
    return path


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return str(size).encode() + body


@pytest.mark.parametrize(
    "header",
    [
        record("size", "9" * 5000),
        record("size", "²"),
        record("size", "-1"),
        record("size", "1_0"),
        record("size", "٣"),
        b"9" * 5000 + b" size=1\n",
        b"\xb2\xb2 size=1\n",
        b"5 size=1\n",
        b"0 size=1\n",
        b"99 size=1\n",
        record("path", "n" * 100_000),
    ],
)
def test_an_impossible_extended_header_refuses_that_tar_by_name(tmp_path, header):
    pax_tar(tmp_path / "bad.tar", header)
    make_tar(tmp_path / "good.tar", [("g.mp4", b"x")])
    touch(tmp_path, "v.mp4")
    listing = list_sources(tmp_path)
    assert {"good.tar/g.mp4", "v.mp4", "bad.tar/a.mp4"} == {s.name for s in listing.sources}
    assert [name for name, _ in listing.refused] == ["bad.tar"]


def test_a_name_with_a_nul_is_refused_by_itself(tmp_path):
    members, problems = list_members(pax_tar(tmp_path / "s.tar", record("path", "b\0.mp4")))
    assert [m.name for m in members] == ["a.mp4", "c.mp4"]
    assert [name for name, _ in problems] == ["b\0.mp4"]


@pytest.mark.parametrize(
    "field",
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0", b"0x000000001\0", b"1_000000001\0"],
)
def test_sizes_that_are_none_refuse_that_tar_by_name(tmp_path, field):
    make_tar(tmp_path / "bad.tar", [("a.mp4", b"x"), ("b.mp4", b"y")])
    data = bytearray((tmp_path / "bad.tar").read_bytes())
    data[1024 + 124 : 1024 + 136] = field
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    (tmp_path / "bad.tar").write_bytes(data)
    touch(tmp_path, "v.mp4")
    listing = list_sources(tmp_path)
    assert [s.name for s in listing.sources] == ["bad.tar/a.mp4", "v.mp4"]
    assert [name for name, _ in listing.refused] == ["bad.tar"]


def test_a_tar_without_end_of_headers_has_a_budget(tmp_path, monkeypatch):
    make_tar(tmp_path / "s.tar", [(f"{i}.mp4", b"") for i in range(20)])
    monkeypatch.setattr("pretrain.data.tar.MAX_HEADERS", 10)
    members, problems = list_members(tmp_path / "s.tar")
    assert len(members) == 10 and "more than 10" in problems[0][1]


def test_tars_that_cannot_be_read_do_not_stop_the_folder(tmp_path, monkeypatch):
    touch(tmp_path, "v.mp4")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    make_tar(tmp_path / "bad.tar", [("a.mp4", b"x")])

    def list_bad(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("pretrain.data.sources.list_members", list_bad)
    listing = list_sources(tmp_path)
    assert [s.name for s in listing.sources] == ["v.mp4"]
    assert {name for name, _ in listing.refused} == {"bad.tar", "pipe.tar"}
    with pytest.raises(ValueError, match=r"bad.tar cannot be read"):
        list_sources(tmp_path / "bad.tar")


@pytest.mark.parametrize(
    "text",
    [
        '{"label": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"label": ' + '{"a":' * 100_000,
    ],
)
def test_impossible_json_beside_a_member_refuses_that_member(tmp_path, text):
    make_tar(tmp_path / "s.tar", [("a.mp4", b"x"), ("a.json", text.encode()), ("b.mp4", b"y")])
    listing = list_sources(tmp_path / "s.tar")
    assert [s.name for s in listing.sources] == ["s.tar/b.mp4"]
    assert [name for name, _ in listing.refused] == ["s.tar/a.mp4"]
    touch(tmp_path, "a.mp4")
    (tmp_path / "l.jsonl").write_text('{"path": "a.mp4", ' + text[1:])
    with pytest.raises(ValueError, match=r"l.jsonl:1"):
        list_sources(tmp_path / "l.jsonl")


@pytest.mark.parametrize("name", ["zero", "zero.mp4", "zero.tar", "pipe", "pipe.mp4", "pipe.tar"])
def test_what_is_no_file_is_neither_waited_for_nor_read_for_ever(tmp_path, name):
    path = tmp_path / name
    os.symlink("/dev/zero", path) if name.startswith("zero") else os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name}.*not a regular file"):
        list_sources(path)
    (tmp_path / "l.csv").write_text(f"path\n{name}\n")
    with pytest.raises(ValueError, match=r"l.csv:2.*not a regular file"):
        list_sources(tmp_path / "l.csv")


def test_a_list_of_zeros_is_not_read_whole(tmp_path):
    path = tmp_path / "l.csv"
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="not a list"):
        list_sources(path)


def test_names_that_no_file_can_have(tmp_path):
    touch(tmp_path, "a.mp4")
    lines = ["a\\u0000.mp4", "\\ud800.mp4", "n" * 5000 + ".mp4"]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(f'{{"path": "{line}"}}\n' for line in lines))
    with pytest.raises(ValueError, match="3 problems"):
        list_sources(path)


def test_many_rows_of_one_file_take_no_longer_than_of_many(tmp_path):
    """Collecting captions was quadratic: 40,000 took a minute."""
    touch(tmp_path, "a.mp4")
    rows = 30_000
    text = "path,caption\n" + "".join(f"a.mp4,sentence {i}\n" for i in range(rows))
    (tmp_path / "l.csv").write_text(text)
    start = time.process_time()
    (source,) = list_sources(tmp_path / "l.csv").sources
    assert len(source.captions) == rows and time.process_time() - start < 5  # 0.2 s; it was 30 s
