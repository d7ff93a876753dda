"""Train the same by every engine and print the table of launch/README.md.

    python -m tests.recipes.engine_table videomae clip finetune

Each of the runs has 12 steps. A cell has the largest difference of a loss or gradient norm, in
proportion to those above 1: in float32 from one process, of a run that was killed in step 7 and
continued from one that was not, and in bf16 from DDP. The last row changes the engine all the time.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from tests.recipes.runs import equal, final_weights
from tests.recipes.test_engines import CALM, ENGINES, far, train

NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
ORDER = ("fsdp2", "ddp", "zero2", "one", "zero3", "zero1")  # a few steps each


def rows(case: str, folder: Path) -> None:
    """Print the rows of one recipe, or of another case of `CALM`."""
    one, in_bf16 = train(case, folder / "one", ENGINES["one"]), []
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    for name, words in NAMES.items():
        if "zero" in name and not deepspeed:
            print(f"| {case} | {words} | not installed | | |", flush=True)
            continue
        engine, calm, harried = ENGINES[name], folder / name, folder / f"{name}-harried"
        lines = train(case, calm, engine)
        train(case, harried, engine, {"die_in_step": 7, "rank": "1"})
        apart = f"{far(train(case, harried, engine), lines):.0e}"
        if equal(final_weights(harried), final_weights(calm)):
            apart = "to the bit"
        half = train(case, folder / f"{name}-bf16", engine, precision="bf16")
        in_bf16 = in_bf16 or half
        rounding = f"{far(half, in_bf16):.0e}" if name != "ddp" else ""
        print(f"| {case} | {words} | {far(lines, one):.0e} | {apart} | {rounding} |", flush=True)
    if deepspeed:
        for name in ORDER[:-1]:
            died = {"die_in_step": 3, "rank": "0" if name == "one" else "1"}
            train(case, folder / "moved", ENGINES[name], died, save_every=1)
        lines = train(case, folder / "moved", ENGINES[ORDER[-1]], save_every=1)
        print(f"| {case} | {', '.join(ORDER)} | | {far(lines, one):.0e} | |", flush=True)


def main() -> None:
    """Print the table for the cases on the command line."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cases = sys.argv[1:] or ["videomae", "clip", "finetune"]
    if unknown := [case for case in cases if case not in CALM]:
        sys.exit(f"error: {unknown[0]!r} is not one of {', '.join(CALM)}")
    print("| recipe | engine | float32 | continued | bf16 |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            rows(case, Path(folder) / case)


if __name__ == "__main__":
    main()
