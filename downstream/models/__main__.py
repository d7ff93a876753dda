"""Print the model families: python -m downstream.models.

Parameters and FLOPs come from costs.json, since building all models takes too long for a table.
A test counts them anew. A family that is not in the file is counted on the spot, and `--write`
counts all of them into the file.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from downstream.models import MODELS, build_model
from downstream.models.flops import count_flops, shapes_only
from pretrain.log import cli
from pretrain.spec import Backbone

COSTS = Path(__file__).with_name("costs.json")


def count_costs(name: str) -> dict[str, int]:
    """Parameters, FLOPs of a clip, the clip and the embedding size of a family as published."""
    with shapes_only():
        model = build_model(name)
    assert isinstance(model, Backbone)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": count_flops(model),
        "frames": model.input_spec.frames,
        "size": model.input_spec.size,
        "embed_dim": model.embed_dim,
    }


def main(costs: dict[str, dict[str, int]]) -> None:
    """Print name, parameters, FLOPs of a clip, the clip, embedding size and paper of every family.

    Args:
        costs: by name, as `count_costs` gives them; families that are not in it are counted.
    """
    header = ("name", "parameters", "GFLOPs a clip", "clip", "embedding", "paper")
    rows = [header]
    for name, family in MODELS.items():
        cost = costs.get(name) or count_costs(name)
        size, flops = f"{cost['parameters'] / 1e6:.1f} M", f"{cost['flops'] / 1e9:.1f}"
        clip = f"{cost['frames']} x {cost['size']} x {cost['size']}"
        rows.append((name, size, flops, clip, str(cost["embed_dim"]), family.paper))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(
        "\na multiplication and an addition are two operations; 2-D networks are resnet18 unless "
        "told otherwise"
    )


@dataclass(frozen=True)
class Config:
    """Print the model families."""

    write: bool = False
    """Count all of them again and write costs.json."""


def command(config: Config) -> None:
    """Print the families, counted again if asked for."""
    if config.write:
        lines = [f"{json.dumps(name)}: {json.dumps(count_costs(name))}" for name in MODELS]
        COSTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    with contextlib.suppress(BrokenPipeError):  # whoever reads, such as head, has had enough
        main(json.loads(COSTS.read_text()))


if __name__ == "__main__":
    cli(command, Config)
