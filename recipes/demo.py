"""The first five minutes, without data of your own: draw clips, pretrain, probe, read the numbers.

    python recipes/demo.py
    python recipes/demo.py --clips 900 --steps 400 --out runs/longer    the README's first run

It draws a part of the synthetic dataset (an articulated figure that does one of 18 actions),
pretrains a small VideoMAE on it without labels, and probes what came out beside random weights and
beside two baselines that need no network. Then it says what each number means, and which commands
do the same with your own videos. It computes for two minutes in all, which two free CPU cores share
in part; nothing is downloaded. After so few steps the accuracy may be at chance: what is shown is
the way, and that it works on this machine.

Starting it again continues where it was interrupted.
"""

from dataclasses import dataclass
from pathlib import Path

import pretrain.threads  # noqa: F401 (before torch)

from pretrain.flags import Count, Seed, replace
from pretrain.log import cli, read_log
from pretrain.names import counted, for_shell
from pretrain.settings import MACHINE, MachineFlags

BATCH = 32  # clips of a step


@dataclass(frozen=True)
class Config:
    """How much is drawn and trained."""

    clips: Count = 360
    """Clips that are drawn, of 18 actions."""
    steps: Count = 200
    """Steps of pretraining, of 32 clips each."""
    out: str = "runs/demo"
    """The folder of the run; the probe's results are in a folder in it."""
    seed: Seed = 0
    """Of weights, order, crops, masks and intervals."""
    machine: MachineFlags = MACHINE


# ------------------------------------------------------------------------------------ the words


def title(text: str) -> None:
    """Begin a part of the story."""
    print(f"\n==== {text}\n", flush=True)


def rows_of(results: dict, steps: int) -> dict[str, str]:
    """What each number of the probe means, in the order of how much was done for it.

    Args:
        results: what results.json of the probe holds.
        steps: of pretraining.
    """
    metrics, num_classes = results["metrics"], results["data"]["num_classes"]
    meanings = {
        "floor_frame": ("one grey frame", "one small still picture, without a network"),
        "floor_motion": ("frame differences", "how much moves, without a network"),
        "random_init_top1": ("random weights", "the same network before any training"),
    }
    cent = lambda value: f"{100 * value:5.1f} %"
    rows = {"guessing": f"{cent(metrics['top1']['chance'])}  one of {num_classes} actions, blindly"}
    for name, (words, meaning) in meanings.items():
        if name in metrics:
            rows[words] = f"{cent(metrics[name]['value'])}  {meaning}"
    low, high = metrics["top1"]["interval"]
    rows["this backbone"] = (
        f"{cent(metrics['top1']['value'])}  after {counted(steps, 'step')}; 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %"
    )
    return rows


def verdicts(results: dict) -> list[str]:
    """How the backbone stands beside everything else, in plain sentences, by the intervals.

    Args:
        results: what results.json of the probe holds.
    """
    top1 = results["metrics"]["top1"]
    low, _ = top1["interval"]
    if low > top1["chance"]:
        found = ["It is above guessing: its whole interval is."]
    else:
        found = [
            "It is not shown to be above guessing, which its interval does not exclude. So few "
            "steps show that everything runs; they are no training."
        ]
    ends = {
        name.removeprefix("difference to "): ends
        for name, ends in results["details"]["floor"].items()
        if name.startswith("difference to ")
    }
    for words, holds in {
        "It is better than {}.": lambda low, high: low > 0,
        "It is worse than {}: that needs no pretraining, and has to be passed before a backbone "
        "is worth its time.": lambda low, high: high < 0,
        "Beside {} this many test videos do not tell which is better.": lambda low, high: (
            low <= 0 <= high
        ),
    }.items():
        names = [name for name, (_, low, high) in ends.items() if holds(low, high)]
        if names:
            found.append(words.format(" and ".join(names)))
    return found


# ------------------------------------------------------------------------------------------- main


def main(config: Config) -> dict:
    """Draw, pretrain, probe and explain; returns what results.json of the probe holds."""
    from recipes import linear_probe, videomae  # not before: they load torch

    data, out = f"synthetic:{config.clips}", for_shell(config.out)
    title(f"1 of 3: draw {config.clips} clips and pretrain on them, without labels")
    print(
        f"muybridge videomae tiny --data {data} --steps {config.steps} --batch-size {BATCH} "
        f"--knn-every 0 --seed {config.seed} --out {out}\n"
    )
    trained = videomae.main(
        replace(
            videomae.PRESETS["tiny"], data=data, steps=config.steps, batch_size=BATCH,
            micro_batch=BATCH, knn_every=0, seed=config.seed, out=config.out,
            machine=config.machine,
        )
    )  # fmt: skip

    title("2 of 3: freeze the backbone, and let a simple classifier use it")
    backbone = str(Path(config.out) / "backbone")
    print(
        f"muybridge linear-probe --backbone {for_shell(backbone)} --data {data} --num-clips 1 "
        f"--attentive off --seed {config.seed}\n"
    )
    results = linear_probe.main(
        linear_probe.Config(
            backbone, data, num_clips=1, attentive="off", seed=config.seed, machine=config.machine
        )
    )

    title("3 of 3: what the numbers mean")
    about = results["data"]
    lines, _ = read_log(Path(config.out) / "log.jsonl")
    explained = next((x["explained"] for x in reversed(lines) if "explained" in x), 0.0)
    print(
        "Pretraining hid most of each clip and had the network fill it in. Of what painting each "
        f"hidden\npiece in its mean colour leaves wrong, it got {explained:.0%} right.\n\nThen "
        f"{counted(about['num_train'], 'video')} with labels taught a simple classifier, and "
        f"{counted(about['num_test'], 'other video')} were classified,\nof other people (figures "
        "drawn with another body). So many were recognised:\n"
    )
    rows = rows_of(results, trained["step"])
    for name, words in rows.items():
        print(f"  {name:<18}{words}")
    print()
    for sentence in verdicts(results):
        print(sentence)
    print(
        f"\nMore of both is in {out}: curve.png, reconstruction.png, and CARD.md of the probe.\n\n"
        "next, with your own videos (a folder, whose subfolders are the classes if there are any):"
        "\n\n  muybridge pack --data my_videos/ --out packs/mine\n"
        "  muybridge videomae --data packs/mine --out runs/mine\n"
        "  muybridge linear-probe --backbone runs/mine/backbone --data packs/mine"
    )
    return results


if __name__ == "__main__":
    cli(main, Config)
