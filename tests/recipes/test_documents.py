"""Commands and Python of the README and the guides run at tiny size; their links lead somewhere.

A command runs as it is written, in a folder that has what it names (`clips.csv`, `packs/mine`,
`runs/.../backbone`), with the flags of `SMALL` and of its rule. A command without a rule, and a
rule without a command, fail.
"""

import ast
import hashlib
import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pretrain.data.pack import pack
from pretrain.flags import refuse_numbers, refuse_unused
from pretrain.log import parse
from recipes import finetune, fit, videomae
from tests.conftest import motion_rows, write_videos
from tests.recipes import test_finetune, test_fit, test_videomae
from tests.recipes.runs import ROOT, flags_of

GUIDES = [
    "README.md", "recipes/README.md", "recipes/RESULTS.md", "pretrain/data/README.md",
    "downstream/models/README.md", "launch/README.md", "tests/README.md",
]  # fmt: skip

# Data that commands name, beside those that `home` has.
DATA = dict.fromkeys(
    ("synthetic", "synthetic:90", "synthetic:1800", "synthetic:3600", "clips.csv", "images.csv",
     "photos.csv", "packs/k400", "untrimmed/videos.csv"), "packs/mine",
)  # fmt: skip
_TRAIN = "--steps 2 --batch-size 8 --micro-batch 8 --num-workers 0 --threads 1 --precision fp32"
_SCORE = "--num-workers 0 --precision fp32"
SMALL = {
    "pack": "--workers 1",
    "videomae": f"{_TRAIN} --knn-every 0",
    "clip": f"{_TRAIN} --val-every 0",
    "finetune": f"{_TRAIN} --num-clips 1",
    "linear_probe": f"{_SCORE} --num-clips 1 --attentive off",
    "zero_shot": f"{_SCORE} --num-clips 1",
    "retrieval": f"{_SCORE} --num-clips 1",
    "fit": f"{_SCORE} --num-clips 1",
    "predict": _SCORE,
    "detect": _SCORE,
}


@dataclass(frozen=True)
class Rule:
    """What is done with the commands in which `pattern` is found; the first rule that fits counts.

    Attributes:
        pattern: a regular expression.
        small: further flags, with which it runs.
        parsed: instead: why its flags are only parsed.
        listed: instead: it is no recipe, and why it is not run here.
        slow: it runs with `-m slow` alone.
    """

    pattern: str
    small: str = ""
    parsed: str = ""
    listed: str = ""
    slow: bool = False


RULES = [
    Rule(r"^python3 -m venv|^\. \.venv/bin/activate|^pip install -e ", listed=".ci/run does these"),
    Rule(r"^pytest|^FUZZ_SECONDS|^ruff |^mypy", listed="this is one of them"),
    Rule(r"^pip download", listed="needs the network"),
    Rule(r"^python tests/fuzz/run\.py", listed="tests/fuzz runs it"),
    Rule(r"^python -m tests\.recipes\.engine_table", listed="test_engines.py trains these"),
    Rule(r"^GOMP_SPINCOUNT", listed="measures for minutes"),
    Rule(r"^python -m downstream\.models", listed="tests/unit/test_models.py runs it"),
    Rule(r"^python -m downstream\.look\.score", listed="tests/unit/test_look.py runs it"),
    Rule(r"^python -m downstream\.simulate_labelling", listed="tests/recipes/test_fit.py runs it"),
    Rule(r"^python -m pretrain\.data\.untrimmed", listed="tests/recipes/test_detect.py runs it"),
    Rule(r"^python -m pretrain\.data\.index_size", listed="tests/unit/test_columns.py runs it"),
    Rule(r"^python -m pretrain\.data\.flow_error", listed="tests/unit/test_flow.py runs it"),
    Rule(r"^python -m pretrain\.data\.follow_error", listed="tests/unit/test_follow.py runs it"),
    Rule(r"^python -m pretrain\.data\.near", listed="tests/unit/test_near.py runs it"),
    Rule(r"pack\.py .*--follow", parsed="tests/unit/test_follow.py does it"),
    Rule(r"^python -m pretrain\.data\.pose_errors", listed="test_pose_errors.py runs it"),
    Rule(
        r"finetune\.py --model (stgcn|skeleton_lstm|flow_stack)",
        parsed="test_stream_families.py does it",
    ),
    Rule(r"--out runs/(i3d|more)$", parsed="test_skeletons.py does these stages"),
    Rule(r"finetune\.py .*--model pose_attention", parsed="test_skeletons.py does it"),
    Rule(r"hf:|open_clip:|--weights imagenet|i3d_k400|_18_k400|--pose b", parsed="downloads"),
    Rule(r"--data (s3|gs|https|hf)://", parsed="tests/unit/test_remote.py does it from loopback"),
    Rule(r"^accelerate .*(gpus|fsdp2|deepspeed_zero.|multi_node)\.yaml", parsed="wants GPUs"),
    Rule(r"pack\.py .*msr\.csv", parsed="MSR Action3D is not included"),
    Rule(r"pack\.py .*--merge", parsed="tests/unit/test_merge.py does it"),
    Rule(r"benchmark\.py", parsed="measures for minutes"),
    Rule(r"demo\.py", parsed="tests/recipes/test_demo.py does it"),
    Rule(r"export\.py", parsed="tests/recipes/test_export.py does it"),
    Rule(r"look\.py", parsed="tests/unit/test_look.py and test_look_page.py do it"),
    Rule(r"look-mine", parsed="its csv is packed in tests/unit/test_look.py"),
    Rule(r"predict\.py .*(rtsp|webcam)", parsed="tests/unit/test_live.py does it"),
    Rule(r"runs\.py", parsed="tests/recipes/test_runs.py does it"),
    Rule(r"doctor\.py", parsed="tests/recipes/test_doctor.py does it"),
    Rule(r"compare\.py .*--models", parsed="starts a process for every model"),
    Rule(
        r"finetune\.py (paper --model i3d|--model i3d --data packs/mine$)",
        "--frames 16 --size 32 --width 0.1",
    ),
    Rule(r"detect\.py .*--background other", "--background up"),
    Rule(r"detect\.py .*hour\.mp4", parsed="takes minutes"),
    Rule(r"detect\.py .*texts\.csv", parsed="test_detect.py does it"),
    Rule(r"--leave-out |fuse\.py .*runs/rgb", parsed="test_finetune.py and test_fuse.py do these"),
    Rule(r"videomae\.py .*--(stream|target) flow", parsed="test_stream_pretraining.py does it"),
    Rule(r"videomae\.py .*runs/synthetic", parsed="tests/recipes/test_adapt.py does it"),
    Rule(r"videomae\.py .*--(model|backbone None)", slow=True),
    Rule(r"videomae\.py shrec", slow=True),
    Rule(r"clip\.py (motion|--model)", slow=True),
    Rule(r"linear_probe\.py .*(runs/videomae|runs/yard|runs/tiny-500|--leave-one-out)", slow=True),
    Rule(r"zero_shot\.py .*runs/clip-motion", slow=True),
    Rule(r"^(python|accelerate launch --config_file \S+.*) recipes/\w+\.py"),
]


def commands_of(text: str) -> list[str]:
    """The commands of a text's ```bash blocks, one by one, without comments."""
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        for line in re.sub(r"\\\n *", "", block).splitlines()
    ]
    return [re.sub(r"\s+#.*", "", part) for line in lines for part in line.split(" && ")]


def rule_of(command: str) -> Rule:
    """The first rule that fits; `muybridge NAME` counts as the recipe that it is."""
    as_file = lambda typed: f"python recipes/{typed[1].replace('-', '_')}.py"
    command = re.sub(r"^muybridge (\S+)", as_file, command)
    found = [rule for rule in RULES if re.search(rule.pattern, command)]
    assert found, f"{command}: add a rule to {Path(__file__).name}"
    return found[0]


TEXTS = {name: (ROOT / name).read_text() for name in GUIDES}
COMMANDS = list(dict.fromkeys(c for text in TEXTS.values() for c in commands_of(text)))
RUN = [c for c in COMMANDS if not (rule_of(c).parsed or rule_of(c).listed)]


def test_every_guide_is_read_here():
    found = {
        str(p.relative_to(ROOT))
        for p in ROOT.glob("*/**/*.md")
        if p.parts[len(ROOT.parts)][0] != "."
    }
    assert {name for name in found if name.endswith(("README.md", "RESULTS.md"))} == {*GUIDES} - {
        "README.md"
    }


def recipe_words(command: str) -> tuple[str, list[str]]:
    """A recipe's name and the words of its command line, started in one of the three ways."""
    words = shlex.split(command)
    if words[0] == "muybridge":
        return words[1].replace("-", "_"), words[2:]
    at = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    if words[0] == "accelerate":
        file = words[words.index("--config_file") + 1]
        assert yaml.safe_load((ROOT / file).read_text())["num_processes"] >= 1
    else:
        assert words[:at] == ["python"], command
    return Path(words[at]).stem, words[at + 1 :]


def configuration(name: str, words: list[str]):
    """The recipe, and its configuration from the command line, checked as `cli` checks it."""
    recipe = importlib.import_module(f"recipes.{name}")
    flags = flags_of(name)
    # Exits on a flag that is not there.
    config = parse(words, getattr(flags, "PRESETS", flags.Config))
    refuse_numbers(config)
    refuse_unused(words, config, getattr(flags, "unused", lambda _: {})(config))
    return recipe, config


def test_all_commands_parse():
    """Also those in the recipes' help and in the files of launch/."""
    commands = [c for c in COMMANDS if not rule_of(c).listed]
    for path in sorted((ROOT / "recipes").glob("[a-z]*.py")):
        examples = re.findall(
            r"^ +((?:python|accelerate) .*)", ast.get_docstring(ast.parse(path.read_text())), re.M
        )
        assert examples, path
        commands += [re.split(" {2,}", line)[0] for line in examples]
    for path in sorted((ROOT / "launch").glob("*.yaml")):
        commands += re.findall(r"^# +(accelerate .*)", path.read_text(), re.M)
    for command in commands:
        configuration(*recipe_words(command))


def test_every_rule_has_a_command():
    assert {rule_of(c).pattern for c in COMMANDS} == {rule.pattern for rule in RULES}


# Flags of other programs that the guides name in their text.
OTHERS = {"cpu", "num_processes", "num_machines", "quiet", "config_file", "help", "write"}


def test_flags_in_the_text_are_there():
    known = set()
    for path in (ROOT / "recipes").glob("[a-z]*.py"):
        for field in fields(importlib.import_module(f"recipes.{path.stem}").Config):
            group = fields(field.default) if is_dataclass(field.default) else [field]
            known |= {one.name for one in group}
            known |= {f"no_{one.name}" for one in group if isinstance(one.default, bool)}
    for name, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", prose)}
        assert named <= known | OTHERS, (name, named - known - OTHERS)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The data that commands name: my_videos/ (a folder a class), clips.csv, folder/, clip.mp4,
    packs/mine.
    """
    home = tmp_path_factory.mktemp("home")
    parts = {"train": range(4), "val": range(4, 5), "test": range(5, 7), "compose": range(7, 8)}
    rows = [row for split, people in parts.items() for row in motion_rows(people, 1, split)]
    for row in rows:
        row |= {"caption": f"a square moves {row['label']}", "class_text": f"moves {row['label']}"}
    (home / "folder").mkdir()
    listed = write_videos(home / "folder", rows)
    (home / "clips.csv").write_text(
        re.sub(r"^(?!path)", "folder/", listed.read_text(), flags=re.M).rstrip("folder/")
    )
    listed.unlink()
    for video in (home / "folder").iterdir():
        label = home / "my_videos" / video.name.split("-")[0]
        label.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, label)
    shutil.copy(video, home / "clip.mp4")
    out = home / "packs" / "mine"  # the clips of other people are near-duplicates
    pack(home / "clips.csv", out, short_side=32, workers=1, progress=False, near=False)
    return home


@pytest.fixture(scope="module")
def standins(home, tiny_backbone, tiny_pair, tmp_path_factory) -> dict[str, Callable[[], Path]]:
    """Runs that commands go on from, made when one is wanted: by how their names begin, the first
    that fits.
    """
    made, data = tmp_path_factory.mktemp("runs"), str(home / "packs" / "mine")

    def classifier() -> Path:
        finetune.main(test_finetune.config(data, made / "classifier", steps=1, val="off"))
        return made / "classifier"

    def fitted() -> Path:
        fit.main(test_fit.config(data, made / "fit", tiny_backbone, num_clips=1))
        return made / "fit"

    def flat() -> Path:
        plain = {"positions": "flat", "init": "xavier", "motion_tokens": 1.0}
        videomae.main(test_videomae.config(data, made / "flat", steps=1, knn_every=0, **plain))
        return made / "flat"

    def moving() -> Path:
        words = small_words(
            "videomae", ["shrec_moving", "--data", data, "--out", str(made / "moving")], ""
        )
        videomae.main(configuration("videomae", words)[1])
        return made / "moving"

    return {
        "clip": lambda: tiny_pair.parent, "finetune": cache(classifier), "fit": cache(fitted),
        "videomae-vit_b_k400": cache(flat), "videomae-shrec_moving": cache(moving),
        "": lambda: tiny_backbone.parent,
    }  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def furnish(
    folder: Path, home: Path, standins: dict[str, Callable[[], Path]], command: str
) -> None:
    """Put into a folder what a command names and does not write."""
    words = shlex.split(command)
    given = [word for before, word in pairwise(words) if before != "--out"]
    for name in ("my_videos", "folder", "clips.csv", "clip.mp4"):
        (folder / name).symlink_to(home / name)
    if ("--out", "packs/mine") not in pairwise(words):
        (folder / "packs").symlink_to(home / "packs")
    runs = {word.split("/")[1] for word in given if word.startswith("runs/")}
    for number, run in enumerate(sorted(runs)):
        make = next(make for start, make in standins.items() if run.startswith(start))
        copy = shutil.copytree(make(), folder / "runs" / run)
        if (scores := copy / "scores.csv").exists():  # the same numbers, as of different runs
            known = digest(scores)
            before, comma, last = scores.read_text().rpartition(",")
            scores.write_text(f"{before}{comma}{'0' * number}{last}")
            results = (copy / "results.json").read_text()
            (copy / "results.json").write_text(results.replace(known, digest(scores)))


def small_words(name: str, words: list[str], extra: str) -> list[str]:
    """A command line with the data of `home`, and with the flags that make it small in place of its
    own.
    """
    if name != "pack":
        words = [DATA.get(word, word) for word in words]
        if name in ("videomae", "clip", "finetune") and "--data" not in words:
            words += ["--data", "packs/mine"]
    for text in (SMALL.get(name, ""), extra):
        for flag, value in re.findall(r"(--\S+) (\S+)", text):
            if flag in words:
                words[words.index(flag) + 1] = value
            else:
                words += [flag, value]
    return words


def once(commands: list[str]) -> list[str]:
    """One of those that are the same when they are made small, but for folders and seeds."""
    found: dict[tuple, str] = {}
    for command in commands:
        rule, (name, words) = rule_of(command), recipe_words(command)
        words = small_words(name, words, rule.small)
        for flag in ("--out", "--seed"):
            if flag in words:
                at = words.index(flag)
                del words[at : at + 2]
        found.setdefault((rule.slow, name, *sorted(words)), command)
    return [*found.values()]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=[pytest.mark.slow] if rule_of(c).slow else [], id=c[:100])
        for c in once(RUN)
    ],
)
def test_a_command_runs(command, home, standins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, home, standins, command)
    before = {p for p in tmp_path.rglob("*") if not p.is_symlink()}
    name, words = recipe_words(command)
    recipe, config = configuration(name, small_words(name, words, rule_of(command).small))
    recipe.main(config)
    assert set(tmp_path.rglob("*")) - before, "it wrote nothing"


def snippets() -> list[tuple[str, str]]:
    return [
        (name, block)
        for name, text in TEXTS.items()
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        if "onnxruntime" not in block  # tests/recipes/test_export.py runs it on an export
    ]


@pytest.mark.parametrize("name, code", snippets(), ids=lambda x: x if x in GUIDES else "")
def test_python_runs(name, code, home, standins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, home, standins, "--backbone runs/mine/backbone")
    names: dict = {}
    exec(compile(code, name, "exec"), names)
    if "embedding" in names:
        backbone = names["backbone"]
        assert names["embedding"].shape == (1, backbone.embed_dim) and not backbone.training
        assert names["tokens"].shape[::2] == (1, backbone.embed_dim)


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            assert "://" not in path, target
            there = (ROOT / name).parent / path if path else ROOT / name
            assert there.exists(), (name, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)", there.read_text(), re.M)
                anchors = {
                    re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
                }
                assert anchor in anchors, (name, target, anchors)


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_blocks_say_what_they_hold():
    for name, text in TEXTS.items():
        fences = re.findall(r"^```(.*)$", text, re.M)
        assert set(fences[::2]) <= {"bash", "python", "text"} and set(fences[1::2]) <= {""}, name
