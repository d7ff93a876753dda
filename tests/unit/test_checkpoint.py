"""Checkpoints: whole or not there, at every instant."""

import hashlib
import json
import os
import shutil
import stat
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save

from downstream.classifier import Classifier
from downstream.models import build_model, load_backbone, load_classifier, load_video_text
from pretrain import backbones, saving
from pretrain import weights as weights_module
from pretrain.backbones import BUILDERS, describe, export_backbone, load_export
from pretrain.checkpoint import (
    checkpoints,
    load_checkpoint,
    moments_of,
    moments_to_fill,
    newest_valid,
    weights_of,
)
from pretrain.clip import VideoText
from pretrain.optim import make_optimizers
from pretrain.saving import Saver
from pretrain.text import fresh_text
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer
from pretrain.weights import CheckpointError


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so whatever is on disk at that moment stays."""


def trained(steps: int, width: int = 16):
    torch.manual_seed(0)
    model = VideoMAE(VideoTransformer(width, 1, 2, 4, 16, 8), 8, 1, 2)
    optimizers = make_optimizers("muon", model, 0.05, (0.9, 0.95))  # has an AdamW beside it
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = 1e-2
    for step in range(steps):
        torch.manual_seed(step)
        sum(
            p.square().sum() + (p * torch.randn_like(p)).sum() for p in model.parameters()
        ).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def write(run, model, optimizers, state):
    """Save what a process has that trains alone, and return the checkpoint."""
    about = state | {"model": model.arguments}
    Saver(run).save(weights_of(model), moments_of(model, optimizers), about)
    return run / "checkpoints" / f"step-{state['step']:08d}"


def read(folder, model, optimizers) -> dict:
    return load_checkpoint(folder, weights_of(model), moments_to_fill(model, optimizers))


def same(a, b) -> bool:
    one, two = a[0].state_dict(), b[0].state_dict()
    assert num_moments(a) == num_moments(b) == 3 * len(one) - 2 * 8  # 8 matrices have one each
    moments = [
        torch.equal(value, o2.state[q][k])
        for o1, o2 in zip(a[1], b[1], strict=True)
        for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True)
        for k, value in o1.state.get(p, {}).items()
    ]
    return all(torch.equal(one[k], two[k]) for k in one) and all(moments)


def num_moments(run) -> int:
    return sum(len(entries) for optimizer in run[1] for entries in optimizer.state.values())


def test_round_trip_and_rotation(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, *trained(step), {"step": step, "note": "x"})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000004", "step-00000003"]
    fresh = trained(0)
    state = read(newest_valid(tmp_path)[0], *fresh)
    assert state["step"] == 4 and state["note"] == "x" and same(fresh, trained(4))
    assert not same(fresh, trained(3))


OPERATIONS = [
    (weights_module, "save_file"),
    (weights_module, "sync"),
    (saving, "sync"),
    (os, "replace"),
    (shutil, "rmtree"),
]


def test_killed_at_every_operation_of_a_save(tmp_path, monkeypatch):
    """Before and after each write, sync, rename and removal: the newest valid is the old or the
    new.
    """
    reference = {n: trained(n) for n in (1, 2, 3)}

    def attempt(kill_at: int) -> int:
        run = tmp_path / str(kill_at)
        write(run, *reference[1], {"step": 1})
        write(run, *reference[2], {"step": 2})
        count = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == kill_at:
                    raise Killed
                result = function(*args, **kwargs)
                count += 1
                if count == kill_at:
                    raise Killed
                return result

            return call

        with monkeypatch.context() as patch:
            for module, name in OPERATIONS:
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                write(run, *reference[3], {"step": 3})
            except Killed:
                pass
            else:
                assert kill_at > count
        found, _ = newest_valid(run)
        fresh = trained(0)
        step = read(found, *fresh)["step"]
        assert step in (2, 3) and same(fresh, reference[step])
        # And the next save of the same step works, whatever was left behind.
        write(run, *reference[3], {"step": 3})
        assert newest_valid(run)[0].name == "step-00000003"
        assert not list((run / "checkpoints").glob("tmp-*"))
        return count

    total = attempt(10_000)
    assert total >= 16
    for kill_at in range(1, total + 1):
        attempt(kill_at)


def test_order_on_disk(tmp_path, monkeypatch):
    """Every file is synced before the rename, the parent after it, and old ones go last."""
    events = []
    for module, name in OPERATIONS[1:]:
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name,
            lambda *a, real=real, name=name,
            **k: (events.append((name, str(a[0]))), real(*a, **k))[1],
        )  # fmt: skip
    for step in (1, 2, 3):
        events.clear()
        write(tmp_path, *trained(1), {"step": step})
    rename = next(i for i, (name, _) in enumerate(events) if name == "replace")
    synced = {path.rsplit("/", 1)[1] for name, path in events[:rename] if name == "sync"}
    assert synced >= {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert events[rename + 1] == ("sync", str(tmp_path / "checkpoints"))
    assert [name for name, _ in events[rename + 2 :]] == ["rmtree"]


def test_corrupt_files_are_found_and_the_older_one_is_used(tmp_path):
    write(tmp_path, *trained(1), {"step": 1})
    newest = write(tmp_path, *trained(2), {"step": 2})
    generator = torch.Generator().manual_seed(0)
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        for kind in range(6):
            data = bytearray(original)
            place = int(torch.randint(len(data), (1,), generator=generator))
            data[place] ^= 1 << kind
            file.write_bytes(data[: len(data) // 2] if kind == 5 else data)
            found, problems = newest_valid(tmp_path)
            assert found.name == "step-00000001", (file, kind, place)
            assert "step-00000002" in problems[0]
            with pytest.raises(CheckpointError):
                read(newest, *trained(0))
        file.write_bytes(original)
    (newest / "optimizer.safetensors").unlink()
    assert newest_valid(tmp_path)[0].name == "step-00000001"


def test_disk_full_keeps_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, *trained(1), {"step": 1})

    def full(tensors, path):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            write(tmp_path, *trained(2), {"step": 2})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="1,000 are free"):
            write(tmp_path, *trained(2), {"step": 2})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert read(newest_valid(tmp_path)[0], *trained(0))["step"] == 1


def held_up(monkeypatch) -> tuple[threading.Event, threading.Event]:
    """Let a save begin, and go on once it may: events that say so."""
    begun, may = threading.Event(), threading.Event()
    real = weights_module.save_file

    def save_file(*given):
        begun.set()
        assert may.wait(60)
        real(*given)

    monkeypatch.setattr(weights_module, "save_file", save_file)
    return begun, may


def test_a_save_in_the_background_has_what_was_there_when_it_began(tmp_path, monkeypatch):
    write(tmp_path, *trained(1), {"step": 1})
    begun, may = held_up(monkeypatch)
    saver, (model, optimizers) = Saver(tmp_path, background=True), trained(2)
    state = {"step": 2, "model": model.arguments, "seen": [1]}
    saver.save(weights_of(model), moments_of(model, optimizers), state)
    assert begun.wait(60)
    saver.check()  # nothing to say yet, and it does not wait
    with torch.no_grad():  # training goes on
        for values in (*weights_of(model).values(), *moments_of(model, optimizers).values()):
            values.values.fill_(7)
    state["seen"].append(2)
    assert newest_valid(tmp_path)[0].name == "step-00000001"
    may.set()
    saver.wait()
    fresh = trained(0)
    state = read(newest_valid(tmp_path)[0], *fresh)
    assert state["step"] == 2 and state["seen"] == [1] and same(fresh, trained(2))


def test_one_save_at_a_time_is_in_the_background(tmp_path, monkeypatch):
    begun, may = held_up(monkeypatch)
    saver, run = Saver(tmp_path, background=True), trained(1)
    about = {"model": run[0].arguments}
    saver.save(weights_of(run[0]), {}, about | {"step": 1})
    assert begun.wait(60)
    threading.Timer(0.2, may.set).start()
    saver.save(weights_of(run[0]), {}, about | {"step": 2})
    assert "step-00000001" in {p.name for p in checkpoints(tmp_path)}  # the next has waited
    saver.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]


@pytest.mark.parametrize("how", ["check", "save", "wait"])
def test_an_error_in_the_background_is_raised_next_in_words(tmp_path, monkeypatch, how):
    write(tmp_path, *trained(1), {"step": 1})
    model, _ = trained(2)
    saver, held = Saver(tmp_path, background=True), (weights_of(model), {})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "save_file", full)
        saver.save(*held, {"step": 2, "model": {}})
        with pytest.raises(CheckpointError, match=r"No space left.*intact"):
            if how == "save":
                saver.save(*held, {"step": 3, "model": {}})
            end = time.monotonic() + 60
            while how == "check" and time.monotonic() < end:
                saver.check()
            saver.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    saver.save(*held, {"step": 4, "model": {}})  # it was said once, and is over
    saver.wait()
    assert newest_valid(tmp_path)[0].name == "step-00000004"


@pytest.mark.slow
def test_what_a_save_costs_training(tmp_path):
    """Of a ViT-B with AdamW: how long a save stops training, and how long it takes in all."""
    model = VideoTransformer(768, 12, 12, 16, 224, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = weights_of(model), moments_of(model, [optimizer])
    stops: dict[bool, float] = {}
    for background in (False, True):
        saver, took = Saver(tmp_path, background=background), []
        for step in (1, 2, 3):
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            began = time.perf_counter()
            saver.save(*held, {"step": step, "model": {}})
            stopped = time.perf_counter()
            saver.wait()
            took.append((stopped - began, time.perf_counter() - began))
        stops[background], whole = map(min, zip(*took, strict=True))
        print(f"| {'async' if background else 'sync'} | {stops[background]:.2f} | {whole:.2f} |")
    print(sum(p.numel() for p in model.parameters()), "parameters")
    assert stops[True] < stops[False] / 2


def test_non_finite_weights_are_not_saved(tmp_path):
    write(tmp_path, *trained(1), {"step": 1})
    model, optimizers = trained(2)
    model.head.bias.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        write(tmp_path, model, optimizers, {"step": 2})
    assert newest_valid(tmp_path)[0].name == "step-00000001"


def test_another_model_is_refused(tmp_path):
    saved = write(tmp_path, *trained(1), {"step": 1})
    with pytest.raises(CheckpointError, match=r"is \(.*the model has"):
        read(saved, *trained(0, width=32))


def test_backbone_round_trip_and_refusals(tmp_path):
    encoder = trained(1)[0].encoder
    folder = tmp_path / "run" / "backbone"
    folder.parent.mkdir()
    export_backbone(encoder, folder, {"recipe": "test"})
    video = torch.randn(2, 3, 4, 16, 16)
    loaded = load_backbone(str(folder))
    assert torch.equal(loaded(video), encoder(video)) and loaded.input_spec == encoder.input_spec
    assert json.loads((folder / "config.json").read_text())["provenance"] == {"recipe": "test"}
    with pytest.raises(ValueError, match="did you mean"):
        load_backbone(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no backbone at"):
        load_backbone(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"\(3, 4, 16, 16\)"):
        loaded(torch.randn(2, 3, 8, 16, 16))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="corrupt"):
        load_backbone(str(folder))


def test_arguments_under_older_names(tmp_path):
    """Exports and checkpoints of older versions load; both names at once, or another value, are
    refused.
    """
    encoder = VideoTransformer(16, 1, 2, 4, 16, 8, motion_tokens=0.5)
    model = VideoMAE(encoder, 8, 1, 2)
    encoder.arguments["moving"] = encoder.arguments.pop("motion_tokens")
    export_backbone(encoder, tmp_path / "old", {})
    write(tmp_path, model, [], {"step": 1})
    assert load_backbone(str(tmp_path / "old")).arguments["motion_tokens"] == 0.5
    again = backbones.load_pretrained_videomae(tmp_path)
    assert again.encoder.num_motion_tokens == encoder.num_motion_tokens == 4
    encoder.arguments["motion_tokens"] = 0.5
    export_backbone(encoder, tmp_path / "both", {})
    with pytest.raises(ValueError, match="moving"):
        load_backbone(str(tmp_path / "both"))
    for old in ("subtract", "keep", "remove", ["keep"]):
        family = build_model("frame_mean", network="test_resnet", size=32, frames=2)
        del family.arguments["subtract_mean"]
        family.arguments["still"] = old
        model = Classifier(family, ["nods", "waves"])  # under a head, as fine-tuning exports them
        export_backbone(model, tmp_path / "still", {})
        if old in ("subtract", "keep"):
            again = load_classifier(str(tmp_path / "still")).backbone
            assert again.input_spec.streams["rgb"].subtract_mean is (old == "subtract")
        else:
            with pytest.raises(ValueError, match="still"):
                load_classifier(str(tmp_path / "still"))


def test_a_family_is_loaded_by_who_knows_it(tmp_path):
    """Families are not of this package: who does not hand over their table is told what it has."""
    folder, pair = tmp_path / "backbone", tmp_path / "pair"
    family = build_model("frame_mean", network="test_resnet", size=32, frames=2)
    export_backbone(family, folder, {"recipe": "test"})
    text = fresh_text("xxs", 8)
    export_backbone(VideoText(family, text, 8, project=True, loss="infonce"), pair, {})
    for place in (folder, pair):
        with pytest.raises(ValueError, match=r"FrameNetwork.*none of VideoTransformer"):
            load_export(place, BUILDERS)
    clip = family.input_spec.normalise(torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8))
    for place in (folder, pair):
        assert torch.equal(load_backbone(str(place))(clip), family(clip))
    assert torch.equal(load_video_text(str(pair)).video(clip), family(clip))
    with pytest.raises(ValueError, match=r"did you mean r3d_18"):
        load_backbone("r3d_81")
    (folder / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match=f"hf:{folder}"):
        load_backbone(str(folder))


def test_what_is_no_backbone_is_not_loaded_as_one(tmp_path):
    """A text tower alone, under a classifier's head and beside itself; and two video towers."""
    text, video = fresh_text("xxs", 8), trained(1)[0].encoder
    export_backbone(text, tmp_path / "text", {})
    with pytest.raises(ValueError, match="OpenClipText"):
        load_backbone(str(tmp_path / "text"))
    head = {"classes": ["nods", "waves"], "dropout": 0.0, "per_frame": False}
    joined = {"dim": 8, "project": True, "loss": "infonce"}
    for name, arguments in (
        ("Classifier", head | {"backbone": describe(text)}),
        ("VideoText", joined | {"video": describe(text), "text": describe(text)}),
        ("VideoText", joined | {"video": describe(video), "text": describe(video)}),
    ):
        config = json.loads((tmp_path / "text" / "config.json").read_text())
        config |= {"builder": name, "arguments": arguments}
        rewrite(tmp_path / "text", "config.json", json.dumps(config).encode())
        with pytest.raises(ValueError, match="cannot be that"):
            load_backbone(str(tmp_path / "text"))


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_exported_weights_are_read_by_whoever_reads_their_json(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        export_backbone(trained(1)[0].encoder, tmp_path / "backbone", {})
        write(tmp_path, *trained(1), {"step": 1})
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 7 and {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


def damage(folder) -> None:
    with open(folder / "optimizer.safetensors", "r+b") as file:
        file.truncate(100)


def rewrite(folder, name: str, content: bytes) -> None:
    """Change a file of a checkpoint and its manifest with it, as somebody with intent would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_damaged_checkpoint_is_replaced_and_said(tmp_path, capsys):
    for step in (1, 2):
        write(tmp_path, *trained(step), {"step": step})
    damage(tmp_path / "checkpoints" / "step-00000002")
    assert backbones.load_pretrained_videomae(tmp_path) is not None
    assert "step-00000002" in capsys.readouterr().err  # and not in silence the older one
    write(tmp_path, *trained(2), {"step": 2})
    assert "step-00000002" in capsys.readouterr().err
    assert newest_valid(tmp_path) == (tmp_path / "checkpoints" / "step-00000002", [])
    assert read(newest_valid(tmp_path)[0], *trained(0))["step"] == 2


@pytest.mark.parametrize("kind", ["truncated", "link", "dangling", "file", "empty"])
def test_what_is_no_checkpoint_takes_none_of_the_places(tmp_path, capsys, kind):
    for step in (1, 2):
        write(tmp_path, *trained(step), {"step": step})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("years of work")
    newest = tmp_path / "checkpoints" / "step-00000002"
    if kind == "truncated":
        damage(newest)
    else:
        shutil.rmtree(newest)
        if kind == "file":
            newest.touch()
        elif kind == "empty":
            newest.mkdir()
        else:
            newest.symlink_to(elsewhere if kind == "link" else "nowhere")
    assert newest_valid(tmp_path)[0].name == "step-00000001"
    write(tmp_path, *trained(3), {"step": 3})
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000001"]
    assert "step-00000002" in capsys.readouterr().err
    assert (elsewhere / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "state",
    [b"[]", b"", b"null", b"{}", b'{"step": 1}', b'{"step": "2"}', b'{"step": true}',
     b'{"step": NaN}', b'{"step": 2.0}', b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000],
)  # fmt: skip
def test_a_hostile_state_is_passed_over(tmp_path, state):
    for step in (1, 2):
        newest = write(tmp_path, *trained(step), {"step": step})
    rewrite(newest, "state.json", state)
    found, problems = newest_valid(tmp_path)
    assert found.name == "step-00000001" and "step-00000002" in problems[0]


@pytest.mark.parametrize("kind", ["shape", "name", "missing", "stranger"])
def test_hostile_moments_are_refused(tmp_path, kind):
    newest = write(tmp_path, *trained(1), {"step": 1})
    moments = load_file(newest / "optimizer.safetensors")
    name = next(k for k in moments if k.endswith(".exp_avg"))
    if kind == "shape":
        moments[name] = torch.zeros(7)
    elif kind == "name":
        moments[f"{name}_other"] = moments[name].clone()
    elif kind == "missing":
        del moments[name]
    else:
        moments["nobody.exp_avg"] = torch.zeros(1)
    rewrite(newest, "optimizer.safetensors", save(moments))
    with pytest.raises(CheckpointError, match="optimizer"):
        read(newest, *trained(0))
