"""Losses of short runs of the recipes, pinned in golden.json; this file renews them.

    python tests/recipes/golden.py            # shows what differs from golden.json
    python tests/recipes/golden.py --write    # pins what comes out now

A change that means to alter the numbers renews them and says why in its commit message.
"""

import argparse
import hashlib
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.recipes.runs import change, configure

FILE = Path(__file__).with_suffix(".json")
DATA = "synthetic:54"  # three clips of each of 18 actions
TOLERANCE = 1e-4  # relative
PINNED = ("loss", "grad_norm", "lr")
RUNNING = {
    "steps": 6, "batch_size": 16, "micro_batch": 8, "precision": "fp32", "num_workers": 0,
    "threads": 1, "log_seconds": 0.0, "save_every": 100,
}  # fmt: skip
# Few steps must show what is wrong: rates and decay are large, two steps warm up, and a step has
# two micro-batches.
STRONG = {"warmup": 2 / 6, "weight_decay": 5.0}
VIDEOMAE: dict[str, Any] = RUNNING | STRONG | {
    "model": "vit_xs", "depth": 2, "decoder_dim": 32, "decoder_depth": 1, "frames": 8, "size": 32,
    "patch": 8, "base_lr": 0.03, "knn_every": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "videomae": ("videomae", VIDEOMAE | {"mask": "tube", "mask_ratio": 0.75, "views": 2}),
    "videomae_contrast": ("videomae", VIDEOMAE | {
        "mask": "random", "mask_ratio": 0.75, "views": 2, "contrast": 0.3, "colour": 0.4,
        "motion_tokens": 0.5, "micro_batch": 16, "optimizer": "muon", "base_lr": 0.01,
        "init": "mimetic", "positions": "separable",
    }),
    "videomae_sigreg": ("videomae", VIDEOMAE | {
        "mask": "random", "mask_ratio": 0.75, "views": 2, "sigreg": 1.0, "reconstruct": False,
        "micro_batch": 16, "base_lr": 0.01,
    }),
    "clip": ("clip", RUNNING | STRONG | {
        "model": "vit_xs", "text_model": "xs", "depth": 2, "dim": 32, "frames": 8, "size": 32,
        "patch": 8, "base_lr": 0.01, "positives": "caption", "colour": 0.4, "clip_grad": 1.0,
        "val_every": 0,
    }),
    "finetune": ("finetune", RUNNING | STRONG | {
        "model": "lstm", "network": "test_resnet", "frames": 4, "size": 32, "base_lr": 0.03,
        "mixup": 0.8, "rand_augment": "n2-m5", "ema": 0.5, "num_clips": 1, "val": "off",
    }),
}  # fmt: skip


def run(case: str, out: Path) -> dict[str, list[float]]:
    """Run one case into `out`; its losses, gradient norms and learning rates, step by step."""
    recipe, values = CASES[case]
    module = importlib.import_module(f"recipes.{recipe}")
    data = (DATA,) if recipe == "clip" else DATA
    base = module.Config() if recipe == "finetune" else configure(module.Config, preset="golden")
    module.main(change(base, data=data, out=str(out), **values))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in PINNED}


def differences(found: dict[str, list[float]], pinned: dict[str, list[float]]) -> list[str]:
    """What differs by more than the tolerance, a line each."""
    return [
        f"{name} of step {step}: {now:.8g}, pinned {then:.8g}"
        for name in PINNED
        for step, (now, then) in enumerate(zip(found[name], pinned[name], strict=True), 1)
        if not abs(now - then) <= TOLERANCE * abs(then)
    ]


def pixels() -> str:
    """A digest of the decoded data: another version of the video encoder draws other pixels."""
    from pretrain.data.cache import open_data, packing_side

    pack = open_data(DATA, packing_side(32), say=False)
    digest = hashlib.sha256()
    for record in pack.records():
        digest.update(pack.frames(record, np.arange(0, record["frames"], 4)).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Run all cases, compare with golden.json, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="pin what comes out now")
    write = parser.parse_args().write
    pinned = json.loads(FILE.read_text()) if FILE.exists() else {}
    now: dict[str, Any] = {"pixels": pixels()}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            now[case] = run(case, Path(folder) / case)
    for case in CASES:
        lines = differences(now[case], pinned[case]) if case in pinned else ["not pinned yet"]
        print("\n".join([f"{case}: {len(lines)} differ", *lines]))
    if write:
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        print(f"wrote {FILE}")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    main()
