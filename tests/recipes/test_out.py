"""--out in every recipe: tried before the work, one writer at a time, nobody else's files, and
nothing left of a refusal.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pretrain import checkpoint, log, modes, weights
from pretrain.data.shards import Pack
from pretrain.flags import flat
from recipes import (
    clip,
    compare,
    detect,
    finetune,
    fit,
    linear_probe,
    predict,
    retrieval,
    videomae,
    visualize,
    zero_shot,
)
from tests.recipes import test_clip, test_finetune, test_videomae
from tests.recipes.runs import BESIDE, ROOT, change, configure, opens_data, wait_until


@pytest.fixture
def commands(tiny_pack, captioned_pack, tiny_backbone, tiny_pair) -> dict:
    """Recipe -> (module, configuration without --out)."""
    about = {"num_clips": 1, "num_workers": 0, "precision": "fp32"}
    data = about | {"data": str(captioned_pack)}
    return {
        "videomae": (videomae, test_videomae.config(tiny_pack, "", steps=2, knn_every=0)),
        "clip": (clip, test_clip.config(captioned_pack, "", steps=2, val_every=0)),
        "finetune": (finetune, test_finetune.config(tiny_pack, "", steps=2, val="off")),
        "probe": (
            linear_probe,
            configure(linear_probe.Config, str(tiny_backbone), attentive="off", **data),
        ),
        "fit": (fit, configure(fit.Config, backbone=str(tiny_backbone), **data)),
        "zero_shot": (zero_shot, configure(zero_shot.Config, str(tiny_pair), **data)),
        "retrieval": (retrieval, configure(retrieval.Config, str(tiny_pair), **data)),
        "search": (
            retrieval,
            configure(retrieval.Config, str(tiny_pair), query="a square", **data),
        ),
    }


NAMES = ("videomae", "clip", "finetune", "probe", "fit", "zero_shot", "retrieval", "search")


@pytest.mark.parametrize("name", NAMES)
def test_out_is_tried_before_the_data_are_touched(commands, tmp_path, monkeypatch, name):
    module, config = commands[name]
    monkeypatch.setattr(module, opens_data(module), lambda *_, **__: pytest.fail("packs for hours"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    for out, words in (
        ("file", "cannot write"),
        ("file/run", "cannot write"),
        ("x" * 300, "cannot write"),
        ("new/" + "x" * 300, "cannot write"),
        ("loop/run", "cannot write"),
        ("thesis", "thesis holds (something|other files)"),
    ):
        with pytest.raises(ValueError, match=words):
            module.main(change(config, out=str(tmp_path / out)))
    if Path("/proc/self").exists():  # a folder in which nobody may make anything
        with pytest.raises(ValueError, match="cannot write"):
            module.main(change(config, out="/proc/run"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "module, asked",
    [
        (predict, "refuse_others"),
        (detect, "try_folder"),
        (visualize, "claim"),
    ],
)
def test_other_videos_have_another_folder(tmp_path, monkeypatch, module, asked):
    def stop(out: Path, *_: object) -> None:
        raise ValueError(str(out))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, asked, stop)
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    found = set()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
        about = {"video": name if module is visualize else (name,)}
        about |= {"flow": "dis"} if module is visualize else {"backbone": "run/backbone"}
        with pytest.raises(ValueError) as caught:
            module.main(configure(module.Config, **about))
        found.add(str(caught.value))
    assert len(found) == 2, found


@pytest.mark.parametrize("module", [predict, detect, visualize])
def test_a_missing_backbone_leaves_no_folder(tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    video = "a.mp4" if module is visualize else ("a.mp4",)
    with pytest.raises(ValueError, match="nowhere"):
        module.main(configure(module.Config, video=video, backbone="nowhere/backbone"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_two_evaluations_into_one_folder(commands, tiny_pack, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "load_classifier", lambda *_: None)
    beside = subprocess.Popen(
        [sys.executable, "-c", BESIDE, str(tmp_path / "out")], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert beside.stdout.readline() == "mine\n"
    given = [commands[name] for name in ("probe", "zero_shot", "retrieval", "search", "fit")]
    given += [
        (predict, configure(predict.Config, str(tiny_backbone), (str(tiny_pack),))),
        (compare, configure(compare.Config, str(tiny_pack), models="frame_mean")),
    ]
    for module, config in given:
        with pytest.raises(ValueError, match="in use"):
            module.main(change(config, out=str(tmp_path / "out")))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    beside.communicate("")
    module, config = commands["search"]
    module.main(change(config, out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "search.json").exists()


@pytest.mark.parametrize("name", ["videomae", "clip", "finetune"])
def test_another_run_is_noticed_before_the_data_are_touched(commands, tmp_path, monkeypatch, name):
    """What may change, such as --save-every, and a run that came to no step are passed by."""
    module, config = commands[name]
    reached = "data were opened"
    monkeypatch.setattr(module, opens_data(module), lambda *_, **__: pytest.fail(reached))
    config = change(config, out=str(tmp_path / "run"))
    with pytest.raises(pytest.fail.Exception, match=reached):
        module.main(config)
    resolved = config
    if name == "videomae":
        resolved = change(config, guard=False)  # it starts from nothing
    if name == "finetune":
        resolved = finetune.resolve(config, finetune.build_backbone(config))[0]
    (tmp_path / "run").mkdir(exist_ok=True)
    described = {"config": flat(resolved) | {"seed": 5}, "data_fingerprint": "a", "num_clips": 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    with pytest.raises(pytest.fail.Exception, match=reached):
        module.main(config)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"holds a run that differs.*seed: 5 -> 0"):
        module.main(config)
    with pytest.raises(pytest.fail.Exception, match=reached):
        module.main(change(config, seed=5, save_every=7))


@pytest.mark.parametrize("name", ["videomae", "clip", "finetune"])
def test_a_refused_run_leaves_nothing_that_refuses_the_corrected_one(
    commands, tmp_path, monkeypatch, capsys, name
):
    module, config = commands[name]
    config = change(config, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ValueError, match="--track wandb needs the package: pip install wandb"):
            module.main(change(config, track="wandb"))
    assert not (tmp_path / "run" / "config.json").exists()

    def refuse(*_):
        raise ValueError("20 clips in a row cannot be decoded")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", refuse)
        patch.setattr(modes, "free_memory", lambda: 2**10)
        with pytest.raises(ValueError, match="20 clips"):
            module.main(config)
    assert "--micro-batch 1 or less" in capsys.readouterr().out
    for changed in (0.02, 0.01):  # the second after steps were done: that is another run
        about = change(config, base_lr=changed)
        if changed == 0.01:
            with pytest.raises(ValueError, match="run that differs"):
                module.main(about)
        else:
            assert module.main(about)
            assert "came to no step" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert kept["base_lr"] == 0.02


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_during_the_export_is_said_and_loses_nothing(
    commands, tmp_path, monkeypatch, error
):
    """The last checkpoint and an older export stay; the same command ends the run."""
    _, config = commands["videomae"]
    run = tmp_path / "run"
    config = change(config, out=str(run))
    videomae.main(config)
    before = {p: p.read_bytes() for p in (run / "backbone").iterdir()}
    real = weights.save_file

    def full(tensors, path, *rest):
        if "backbone" in str(path):
            raise error
        return real(tensors, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        with pytest.raises(ValueError, match=r"cannot write .*run.*(No space|full).*intact"):
            videomae.main(config)
    assert {p: p.read_bytes() for p in (run / "backbone").iterdir()} == before
    assert checkpoint.newest_valid(run)[0].name == "step-00000002"
    videomae.main(config)
    assert {p.name for p in run.iterdir() if p.name.startswith("tmp-")} == set()


@pytest.mark.parametrize(
    "content", ["", "\0" * 50, '{"format": "muybridge-results-1", "settings": []}']
)
def test_damaged_results_are_not_taken_for_ones(commands, tiny_pack, tmp_path, content):
    """Nor overwritten: they may be somebody's only copy of a number."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(content)
    for name in ("probe", "zero_shot", "fit"):
        module, config = commands[name]
        with pytest.raises(ValueError, match=r"out holds other files: give another"):
            module.main(change(config, out=str(out)))
        (other := tmp_path / f"of {name}" / "dataset").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"holds something else \(dataset\)"):
            module.main(change(config, out=str(other.parent)))
    with pytest.raises(ValueError, match=r"out holds no results"):
        compare.main(
            configure(
                compare.Config,
                str(tiny_pack),
                models="",
                results=(str(out),),
                out=str(tmp_path / "table"),
            )
        )
    assert (out / "results.json").read_text() == content and not (tmp_path / "table").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "9" * 5000, '{"models": 3}', None])
def test_a_damaged_comparison(tiny_pack, tmp_path, monkeypatch, capsys, content):
    """Its settings are written anew where nothing else was lost, and a folder of others' files is
    refused.
    """
    asked = []

    def fail(command, *_):
        asked.append(command)
        return "no such network"

    monkeypatch.setattr(compare, "run_one", fail)
    out = tmp_path / "table"
    config = configure(compare.Config, str(tiny_pack), models="frame_mean", out=str(out), seeds=1)
    (out / "runs" / "frame_mean-seed0").mkdir(parents=True)
    if content is not None:
        (out / "config.json").write_text(content)
        foreign = content.startswith(('{"',))
        with pytest.raises(ValueError, match="not a comparison" if foreign else "every run failed"):
            compare.main(config)
        assert bool(asked) != foreign
        if foreign:
            return
        assert "config.json" in capsys.readouterr().err
    else:
        (out / "runs" / "frame_mean-seed0").rmdir()
        (out / "runs").rmdir()
        with pytest.raises(ValueError, match="every run failed"):
            compare.main(config)
    # What came to nothing gives way to the corrected command; what has a result does not.
    with pytest.raises(ValueError, match="every run failed"):
        compare.main(change(config, steps=7))
    assert json.loads((out / "config.json").read_text())["steps"] == 7
    (out / "runs" / "frame_mean-seed0").mkdir(parents=True, exist_ok=True)
    (out / "runs" / "frame_mean-seed0" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="under other settings"):
        compare.main(config)


def test_packs_and_answers_of_others_are_not_overwritten(
    commands, tiny_pair, captioned_pack, tmp_path
):
    (tmp_path / "search.json").write_text("older answer")
    (tmp_path / "notes.txt").write_text("mine")
    search, config = commands["search"]
    video = tmp_path / "a.mp4"
    pack = Pack(captioned_pack)
    video.write_bytes(pack.read(pack.record(0)))
    one = configure(
        zero_shot.Config,
        str(tiny_pair),
        video=str(video),
        classes="a, b",
        num_clips=1,
        num_workers=0,
    )
    for module, about in ((search, config), (zero_shot, one)):
        with pytest.raises(ValueError, match="holds something else"):
            module.main(change(about, out=str(tmp_path)))
    assert (tmp_path / "search.json").read_text() == "older answer"


# ------------------------------------------------------------------------------- the command line


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No flags at all."""


def ended(error: BaseException | signal.Signals, monkeypatch, capsys) -> tuple[int, str]:
    """The exit status of a recipe that ends so, and what it said on standard error."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    monkeypatch.setattr(sys, "argv", ["recipes/some.py"])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back afterwards

    def main(_):
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        raise error

    try:
        with pytest.raises(SystemExit) as end:
            log.cli(main, Nothing)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/disk/a\x1b[2J"),
         r"/disk/a\x1b[2J: No space left"),
        (OSError(5, "Input/output error"), "error: Input/output error"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError("something of a library"), "something of a library"),
        (ValueError("--steps 0: give\x1b[2J more"), r"error: --steps 0: give\x1b[2J more"),
    ],
)  # fmt: skip
def test_what_a_disk_refuses_is_one_line(error, words, monkeypatch, capsys):
    code, said = ended(error, monkeypatch, capsys)
    assert code == 2 and words in said
    assert said.count("\n") == 1 and said.startswith("error: ") and "Traceback" not in said
    assert ("same command again" in said) == isinstance(error, OSError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(number, monkeypatch, capsys):
    code, said = ended(number, monkeypatch, capsys)
    assert code == 128 + number and said.count("\n") == 1 and "same command" in said


# A recipe whose processes, like a loader's, ignore SIGTERM; or one that draws the synthetic
# dataset.
ENDS = """
import multiprocessing, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from pretrain import log
from pretrain.data.synthetic import make_dataset

@dataclass(frozen=True)
class Config:
    out: str

stays = multiprocessing.get_context("fork").Event()

def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stays.set()
    time.sleep(600)

def fail(config):
    multiprocessing.get_context("fork").Process(target=stay, daemon=True).start()
    stays.wait()
    raise ValueError("a clip cannot be decoded")

def draw(config):
    make_dataset(Path(config.out), num_clips=400, workers=2)

if __name__ == "__main__":
    log.cli({main}, Config)
"""


def start(tmp_path: Path, main: str) -> subprocess.Popen:
    script = tmp_path / "recipe.py"
    script.write_text(ENDS.replace("{main}", main))
    return subprocess.Popen(
        [sys.executable, str(script), "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_an_error_ends_what_was_started(tmp_path):
    recipe = start(tmp_path, "fail")
    _, said = recipe.communicate(timeout=300)
    assert recipe.returncode == 2 and said == "error: a clip cannot be decoded\n"


def test_ctrl_c_ends_the_drawing_of_the_dataset(tmp_path):
    recipe = start(tmp_path, "draw")
    wait_until(recipe, lambda: list(tmp_path.glob("out/clips/[0-9]*.mp4")))
    os.killpg(recipe.pid, signal.SIGINT)  # as a terminal does
    _, said = recipe.communicate(timeout=300)
    assert recipe.returncode == 130 and "Traceback" not in said and "interrupted" in said
    assert list(tmp_path.glob("out/clips/[0-9]*.mp4"))


def test_help_into_a_pipe_that_nobody_reads_to_the_end(tmp_path):
    command = [sys.executable, "recipes/pack.py", "--help"]
    out, into = os.pipe()
    os.close(out)
    done = subprocess.run(
        command, stdout=into, stderr=subprocess.PIPE, cwd=ROOT, timeout=300, check=False
    )
    os.close(into)
    assert done.stderr == b""
