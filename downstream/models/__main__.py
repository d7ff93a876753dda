"""Print the model families: python -m downstream.models."""

from downstream.models import MODELS, build_model
from downstream.models.flops import count_flops, shapes_only


def main() -> None:
    """Print name, parameters, FLOPs for its clip, the clip, embedding size and paper of every model."""
    header = ("name", "parameters", "GFLOPs a clip", "clip", "embedding", "paper")
    rows = [header]
    for name, family in MODELS.items():
        with shapes_only():
            model = build_model(name)
        spec = model.input_spec
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
        cost = f"{count_flops(model) / 1e9:.1f}"
        clip = f"{spec.frames} x {spec.size} x {spec.size}"
        rows.append((name, size, cost, clip, str(model.embed_dim), family.paper))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [
            cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(
        "\na multiplication and an addition are two operations; 2-D networks are resnet18 unless told otherwise"
    )


if __name__ == "__main__":
    main()
