"""The way of a clip from the packed file to the loss is the one that recipes/README.md shows."""

import re
import sys
from pathlib import Path
from types import FrameType, ModuleType

import pytest

from recipes import clip, finetune, videomae
from tests.recipes import test_clip, test_finetune, test_videomae

ROOT = Path(__file__).parents[2]
MOST_FILES = 8


def documented(recipe: str) -> list[tuple[str, list[str]]]:
    """Every file of a recipe's way, in order, and its functions."""
    text = (ROOT / "recipes" / "README.md").read_text()
    row = text.split("## The way of a clip")[1].split(f"| `{recipe}.py` |")[1].split("\n")[0]
    found = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", row)
    return [(file, re.findall(r"`([\w.]+)`", names)) for file, names in found]


def returned(recipe: ModuleType, config: object, patch: pytest.MonkeyPatch) -> list[str]:
    """Our functions that a step of a recipe calls, in the order in which they first return."""
    real, seen = recipe.train_step, {}

    def note(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "return" and file.is_relative_to(ROOT):
            seen.setdefault(f"{file.relative_to(ROOT)}: {frame.f_code.co_qualname}", None)

    def step(*arguments: object) -> object:
        sys.setprofile(note)
        try:
            return real(*arguments)
        finally:
            sys.setprofile(None)

    patch.setattr(recipe, "train_step", step)
    recipe.main(config)
    return list(seen)


@pytest.mark.parametrize("name", ["videomae", "clip", "finetune"])
def test_a_clip_goes_the_way_that_is_written(
    name: str, tiny_pack: Path, captioned_pack: Path, tmp_path: Path, monkeypatch
) -> None:
    """One direction: what is behind in the list returns later; every file is there once."""
    run = tmp_path / "run"
    tuned = test_finetune.config(tiny_pack, run, model="vit_xs", network=None, frames=4, steps=1)
    recipe, config = {
        "videomae": (videomae, test_videomae.config(tiny_pack, run, steps=1)),
        "clip": (clip, test_clip.config(captioned_pack, run, steps=1, micro_batch=8)),
        "finetune": (finetune, tuned),
    }[name]
    way = documented(name)
    seen = returned(recipe, config, monkeypatch)
    files = [file for file, _ in way]
    assert 3 < len(files) == len(set(files)) <= MOST_FILES
    for file, names in way:
        places = [seen.index(f"{file}: {function}") for function in names]
        assert places == sorted(places), (file, names)
    firsts = [seen.index(f"{file}: {names[0]}") for file, names in way]
    assert firsts == sorted(firsts), way
