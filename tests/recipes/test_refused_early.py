"""What no data could mend is refused before any are packed, and the flag is named."""

import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pretrain import log
from recipes import clip, videomae
from tests.recipes.runs import opens_data

CLASSES = "--text label --loss classes"
TINY = ("--batch-size", "--micro-batch")


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Two lists of one video each, which is not even a video: with a label, and with a caption."""
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    (tmp_path / "labels.csv").write_text("path,label,split\na.mp4,run,train\n")
    (tmp_path / "captions.csv").write_text("path,caption\na.mp4,somebody runs\n")
    (tmp_path / "template.txt").write_text("a video of {} and {}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "words", "named"),
    [
        (videomae, "--contrast 0.3", "--contrast --views"),
        (videomae, "--contrast 0.3 --views 2 --batch-size 64 --micro-batch 32", "--micro-batch"),
        (videomae, "--contrast 0.3 --views 2 --batch-size 2", "--contrast --batch-size"),
        (videomae, "--sigreg 0.3", "--sigreg --views"),
        (videomae, "--sigreg 0.3 --views 2 --batch-size 64 --micro-batch 32", "--micro-batch"),
        (videomae, "--sigreg 0.3 --contrast 0.3 --views 2", "--contrast --sigreg"),
        (videomae, "--no-reconstruct --views 2", "--no-reconstruct --sigreg"),
        (videomae, "--patch 7", "--size 48 --patch 7 --patch 8"),
        (videomae, "--size 50", "--size 50 --patch 8"),
        (videomae, "--frames 5", "--frames 5 --tubelet 2"),
        (videomae, "--tubelet 3", "--frames 16 --tubelet 3"),
        (videomae, "--decoder-dim 33", "--decoder-dim 33 64"),
        (videomae, "--mask-ratio 0", "--mask-ratio"),
        (videomae, "--mask tube", "--mask random"),
        (videomae, "--motion-tokens 0.0001", "--motion-tokens"),
        (videomae, "--mask frame --motion-tokens 1 --frames 2", "--mask-ratio"),
        (videomae, "--mask-ratio 0.01 --dual-mask", "--mask-ratio --no-dual-mask"),
        (videomae, "--motion-tokens 1 --size 24 --dual-mask --mask tube", "--size --patch"),
        (videomae, "--batch-size 9 --views 2", "--batch-size 9"),
        (videomae, "--model vivit_3 --motion-tokens 1 --patch 7", "--patch"),
        (videomae, "--model resnet", "resnet"),
        (videomae, "--backbone nowhere", "nowhere"),
        (videomae, "--split trian", "trian"),
        (videomae, "--resume", "--resume"),
        (clip, "--patch 7", "--size 48 --patch 7 --patch 8"),
        (clip, "--model frames:vit_xs --patch 7 --motion-tokens 1", "--size 48 --patch 7"),
        (clip, "--frames 5", "--frames 5 --tubelet 2"),
        (clip, f"{CLASSES} --templates nothing", "--templates"),
        (clip, f"{CLASSES} --templates template.txt", "template.txt"),
        (clip, f"{CLASSES} --templates openai_ucf101", "--templates --text label"),
        (clip, "--loss classes --text caption", "--text label"),
        (clip, f"--data captions.csv {CLASSES}", "captions.csv label column"),
        (clip, f"--data labels.csv {CLASSES}", "--loss classes run"),
        (clip, "--data labels.csv --text label --templates plane", "--templates"),
        (clip, "--data labels.csv --text caption", "labels.csv --text label"),
        (clip, "--data labels.csv captions.csv --text label", "captions.csv"),
        (clip, "--data captions.csv nowhere.csv", "nowhere.csv"),
        (clip, "--data labels.csv --text label --split val", "val"),
        (clip, "--data captions.csv captions.csv --data-weights 1 100", "weight --batch-size"),
        (clip, "--data captions.csv captions.csv --data-weights 1 2 3", "--data-weights"),
        (clip, "--batch-size 1", "--batch-size"),
        (clip, "--model frame_mean --micro-batch 4", "--micro-batch"),
        (clip, "--text-model tiny", "--text-model"),
        (clip, "--resume", "--resume"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_before_anything_is_packed(
    recipe: ModuleType, words: str, named: str, lists: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(lists)
    opened = lambda *_, **__: pytest.fail("data were opened")
    monkeypatch.setattr(recipe, opens_data(recipe), opened)
    data = "" if "--data " in words else "--data captions.csv"
    if recipe is videomae:
        data = "--data labels.csv"
    tiny = " ".join(f"{flag} 8" for flag in TINY if flag not in words)
    given = shlex.split(f"{data} {tiny} {words} --out run")
    if recipe is clip and "--model" not in words:
        given += ["--drop-tokens", "0"]
    # The preset auto chooses what goes with what is given.
    preset = ["tiny"] if "auto" in recipe.PRESETS else []
    monkeypatch.setattr(sys, "argv", ["recipe.py", *preset, *given])
    with pytest.raises(SystemExit):
        log.cli(recipe.main, recipe.PRESETS, recipe.unused)
    said = capsys.readouterr().err
    # Whatever a library, or the end of an earlier test's processes, writes before it.
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in named.split()), said
    assert not (tmp_path / "run").exists()
