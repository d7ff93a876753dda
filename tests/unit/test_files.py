"""What stands in the place of a file or a folder that somebody named."""

import json
import os
import socket

import pytest

from downstream.models import build_model, load_backbone, load_classifier, load_video_text
from downstream.models.images import read_weights
from downstream.segments import parse_segments
from pretrain import log
from pretrain.data.boxes import parse_boxes
from pretrain.data.pose_files import parse_poses
from pretrain.data.sources import list_sources
from pretrain.interop.openclip import load_open_clip
from pretrain.prompts import load_classes, load_templates
from recipes import visualize, zero_shot

# Who reads a name that a user gave, and whether it is to be a folder.
READERS = {
    "weights": (read_weights, False),
    "i3d": (lambda name: load_backbone("i3d_k400", name), False),
    "ViViT": (lambda name: build_model("vivit_1", True, name), False),
    "videomae": (load_backbone, False),
    "hugging face": (lambda name: load_backbone(f"hf:{name}"), True),
    "backbone": (load_backbone, True),
    "classifier": (load_classifier, True),
    "pair": (load_video_text, True),
    "open_clip folder": (lambda name: load_open_clip(f"open_clip:local-dir:{name}"), True),
    "open_clip weights": (lambda name: load_open_clip(f"open_clip:ViT-B-32/{name}"), False),
    "classes": (load_classes, False),
    "templates": (load_templates, False),
    "zero-shot": (lambda v: zero_shot.classify_video(
        zero_shot.Config("", video=v, classes="nods,waves"), None, None), False),
    "visualize": (lambda v: visualize.main(visualize.Config("", v)), False),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_called_what_it_is(reader, tmp_path, monkeypatch):
    """Neither waited for nor called missing."""
    read, folder = READERS[reader]
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    ending = ".pth" if reader == "videomae" else ""
    os.mkfifo(f"pipe{ending}")
    os.symlink("/dev/zero", f"device{ending}")
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(f"socket{ending}")
        for what in ("pipe", "device", "socket"):
            with pytest.raises(ValueError, match=f"a {what}, not a") as refused:
                read(str(tmp_path / f"{what}{ending}"))
            assert "no such" not in str(refused.value)
    for what, there in (("a folder", os.mkdir), ("a file", lambda p: open(p, "w").close())):
        if (what == "a folder") != folder:
            there(f"other{ending}")
            with pytest.raises(ValueError, match=f"{what}, not a"):
                read(str(tmp_path / f"other{ending}"))


def test_no_line_of_a_log_is_read_without_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MOST_LINE", 100)
    endless = json.dumps({"step": 1} | {f"value_{i}": i for i in range(99)})
    (tmp_path / "log.jsonl").write_text(f'{{"step": 0}}\n{endless}\n{{"step": 2}}\n{10**6 * "["}')
    lines, damaged = log.read_log(tmp_path / "log.jsonl")
    assert lines == [{"step": 0}, {"step": 2}] and damaged > 1


@pytest.mark.parametrize("odd", ["1_0", "٣", "１０"])
def test_numbers_of_files_have_plain_digits(odd, tmp_path):
    """Python takes others too, which is a slip of a hand or an eye; and each is named by line."""
    (tmp_path / "a.mp4").touch()
    for text, line in (
        (f"path,label,start,end\na.mp4,x,0,4\na.mp4,x,5,{odd}\n", 3),
        (f"Media file path,Behavior,Behavior type,Time\na.mp4,x,START,0\na.mp4,x,STOP,{odd}\n", 3),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(ValueError, match="1 problem") as caught:
            list_sources(tmp_path / "list.csv")
        assert (
            f"list.csv:{line}: " in caught.value.__notes__[0] and odd in caught.value.__notes__[0]
        )
    for refuse, where in (
        (lambda: parse_boxes(f"frame,id,x,y,w,h\n0,1,1,1,{odd},9\n".encode()), "line 2"),
        (lambda: parse_boxes(f"frame,id,x,y,w,h\n{odd},1,1,1,9,9\n".encode()), "line 2"),
        (lambda: parse_segments(f"0-{odd} walk", "here"), "here"),
        (lambda: parse_poses(f"1 2 3 4 {odd} 6\n".encode(), "kinect20"), "line 1"),
    ):
        with pytest.raises(ValueError, match=where):
            refuse()
