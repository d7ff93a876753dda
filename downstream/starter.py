"""How `--backbone starter`, the pair of towers that comes with the package, is made.

    python -m downstream.starter draw FOLDER         the clips: FOLDER/clips.csv
    python -m downstream.starter keep RUN/backbone FOLDER/clips.csv
                                                     the trained pair, as the package has it

Between the two it is trained by recipes, see pretrain/starter/CARD.md.
"""

import csv
import sys
from pathlib import Path

import torch

from downstream.models import load_video_text
from pretrain.backbones import export_backbone, folder_of
from pretrain.clip import VideoText
from pretrain.data.synthetic import make_dataset
from pretrain.names import for_screen
from pretrain.settings import STARTER
from pretrain.text import OpenClipText

SEEDS, NUM_CLIPS = (1, 2, 3, 4), 3600  # of the synthetic dataset; its tests have the people of 0
COLUMNS = ("path", "label", "class_text", "caption", "split", "subject")


def draw(folder: Path) -> Path:
    """Draw the synthetic datasets of `SEEDS`, and one list of all their clips.

    Raises:
        ValueError: the folder holds other data.
    """
    rows: list[dict[str, str]] = []
    for seed in SEEDS:
        listing = make_dataset(folder / f"seed-{seed}", NUM_CLIPS, seed)
        with open(listing, newline="") as file:
            rows += [row | {"path": f"seed-{seed}/{row['path']}"} for row in csv.DictReader(file)]
    with open(folder / "clips.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "clips.csv"


def compact(pair: VideoText, texts: list[str]) -> VideoText:
    """Make a pair small, in place, where it is compressed: in a wheel, or by git.

    Weights are rounded to 8 bits of mantissa, and embeddings of tokens that no text has become 0,
    by which `pretrain.text.unseen_words` knows them.

    Args:
        pair: with a tower of CLIP's vocabulary.
        texts: that it was trained on.
    """
    assert isinstance(pair.text, OpenClipText)
    tokens, _ = pair.text.tokenizer(texts)
    seen = torch.zeros(pair.text.tower.token_embedding.num_embeddings, dtype=torch.bool)
    seen[tokens.unique()] = True
    with torch.no_grad():
        for weight in pair.parameters():
            weight.copy_(weight.bfloat16())
        pair.text.tower.token_embedding.weight[~seen] = 0
    return pair


def keep(backbone: str, texts: list[str]) -> Path:
    """Write a trained pair to where `--backbone starter` finds it.

    Raises:
        ValueError: it is no pair.
    """
    pair = compact(load_video_text(backbone), texts)
    about = {
        "recipe": "clip", "data": f"synthetic, {NUM_CLIPS} clips each of the seeds 1 to 4",
        "split": "all", "card": "pretrain/starter/CARD.md",
    }  # fmt: skip
    export_backbone(pair, Path(folder_of(STARTER)), about)
    return Path(folder_of(STARTER))


def main(words: list[str]) -> None:
    """Do what the words say."""
    match words:
        case ["draw", folder]:
            print(for_screen(draw(Path(folder))))
        case ["keep", backbone, listing]:
            with open(listing, newline="") as file:
                texts = {row[k] for row in csv.DictReader(file) for k in ("caption", "class_text")}
            print(for_screen(keep(backbone, sorted(texts))))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
