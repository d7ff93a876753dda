"""The notebook: its cells run in order, on drawn clips in folders of classes, without jupyter."""

import json

from pretrain.data.synthetic import clip_specs, encode_video, render
from tests.recipes.runs import ROOT

ACTIONS = ("wave", "jump", "sit_down")


def cells(kind: str) -> list[dict]:
    notebook = json.loads((ROOT / "recipes" / "few_labels.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_clips_are_packed_classified_and_found(tmp_path, monkeypatch, capsys):
    for action in ACTIONS:
        (tmp_path / "clips" / action).mkdir(parents=True)
        drawn = [spec for spec in clip_specs(0, 72) if spec.action == action][:3]
        for number, spec in enumerate(drawn):
            frames = render(spec, 64, 32, 16).frames
            (tmp_path / "clips" / action / f"{number}.mp4").write_bytes(encode_video(frames, 16))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), "few_labels.ipynb", "exec"), names)
    score, *found = capsys.readouterr().out.splitlines()[-6:]
    assert "of 9 videos are recognised, every one" in score and float(score.split("%")[0]) > 60
    assert [name.split("/")[0] for name in found[:2]] == ["wave", "wave"]


def test_it_is_short_and_no_output_is_kept():
    lines = [line for cell in cells("code") for line in cell["source"] if line.strip()]
    assert len(lines) <= 25 and len(cells("markdown")) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells("code"))
