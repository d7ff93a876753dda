"""The recipe end to end, at tiny size: it learns, survives, and says no."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from downstream.encoders import weights_to_start_from
from downstream.models import load_backbone
from pretrain import backbones, checkpoint
from pretrain.data.shards import Pack
from pretrain.loop import plan_run
from pretrain.videomae import start_from
from recipes import videomae
from tests.recipes.runs import (
    ROOT,
    change,
    configure,
    equal,
    final_weights,
    launch,
    run_calm_and_harried,
    stop_in_step,
)


def config(data, out, **changes) -> videomae.Config:
    small = configure(videomae.Config,
        preset="test", data=str(data), out=str(out), depth=2, decoder_dim=32, decoder_depth=1,
        frames=4, stride=2, size=32, patch=8, mask_ratio=0.75, steps=8, batch_size=8, micro_batch=4,
        base_lr=0.05, precision="fp32", num_workers=0, threads=1, save_every=3, log_seconds=0.0,
        knn_every=4,
    )  # fmt: skip
    return change(small, **changes)


@pytest.fixture(scope="module")
def undisturbed(tiny_pack, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    videomae.main(config(tiny_pack, run))
    return run


def test_whole_run(undisturbed, tiny_pack):
    log = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"]
    assert [entry["step"] for entry in log if "knn" in entry] == [4, 8]  # not repeated in between
    assert log[-1]["knn_chance"] == 0.25
    assert (undisturbed / "reconstruction.png").is_file()
    assert (undisturbed / "curve.png").is_file()
    encoder = load_backbone(str(undisturbed / "backbone"))
    trained = backbones.load_pretrained_videomae(undisturbed).encoder
    assert equal(encoder.state_dict(), trained.state_dict())
    provenance = json.loads((undisturbed / "backbone" / "config.json").read_text())["provenance"]
    assert provenance["data_fingerprint"] == Pack(tiny_pack).index["fingerprint"]
    assert provenance["fps"] == Pack(tiny_pack).rate() == 16


def test_the_loss_falls_when_it_trains_longer(tiny_pack, tmp_path):
    cfg = config(tiny_pack, tmp_path / "run", steps=60, knn_every=25, log_seconds=600.0)
    state = videomae.main(cfg)
    assert state["loss"] < 0.75  # 1 is what predicting each patch's mean costs
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(entry["step"], "knn" in entry) for entry in log] == [
        (25, True),
        (50, True),
        (60, True),
    ]


def test_same_command_again_changes_nothing(undisturbed, tiny_pack, capsys):
    before = {p: p.stat().st_mtime_ns for p in (undisturbed / "checkpoints").rglob("*")}
    state = videomae.main(config(tiny_pack, undisturbed))
    assert state["step"] == 8 and "done" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (undisturbed / "checkpoints").rglob("*")}


@pytest.mark.parametrize("stop_after", [2, 3, 7])
def test_interrupted_and_resumed_equals_undisturbed(
    undisturbed, tiny_pack, tmp_path, monkeypatch, stop_after
):
    """Ctrl-C during a step saves at its end; the same command goes on to the same bits."""
    stop_in_step(monkeypatch, videomae, stop_after)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        videomae.main(config(tiny_pack, run))
    assert stopped.value.code == 130
    assert checkpoint.checkpoints(run)[0].name == f"step-{stop_after:08d}"
    videomae.main(config(tiny_pack, run, resume=True))
    assert equal(final_weights(run), final_weights(undisturbed))
    steps = [json.loads(x)["step"] for x in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_only_what_moves(tiny_pack, tmp_path):
    """The masks choose among motion-selected tokens; the rest is never seen and never predicted."""
    cfg = config(
        tiny_pack, tmp_path / "run", motion_tokens=0.5, mask="random", dual_mask=True, steps=2
    )
    videomae.main(cfg)
    encoder = load_backbone(str(tmp_path / "run" / "backbone"))
    assert encoder.num_motion_tokens == 16 and encoder.grid == (2, 4, 4)
    assert (tmp_path / "run" / "reconstruction.png").is_file()
    model = backbones.load_pretrained_videomae(tmp_path / "run").eval()
    video = torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8)
    video[:, :, :, :16] = video[:, :, :1, :16]  # the upper half stands still
    visible, masked = torch.arange(0, 4)[None], torch.arange(4, 16)[None]
    places = torch.cat([model.grid_indices(video, visible), model.grid_indices(video, masked)], 1)
    assert sorted(places[0].tolist()) == [n for n in range(32) if n % 16 >= 8]
    with torch.no_grad():
        loss = model(video, visible, masked)[0]
        video[:, :, :, :16] = 0
        assert torch.equal(model(video, visible, masked)[0], loss)
        video[:, :, :, 16:] = 255 - video[:, :, :, 16:]
        assert not torch.equal(model(video, visible, masked)[0], loss)
    with pytest.raises(ValueError, match="--mask random"):
        videomae.main(config(tiny_pack, tmp_path / "other", motion_tokens=0.5))


@pytest.mark.parametrize(
    ("name", "said", "reconstruct"),
    [("contrast", "contrasted", True), ("sigreg", "SIGReg", True), ("sigreg", "SIGReg", False)],
)
def test_comparing_views_learns_resumes_and_leaves_a_plain_backbone(
    name, said, reconstruct, tiny_pack, tmp_path, monkeypatch, capsys
):
    changes = {
        "views": 2, name: 0.3, "colour": 0.4, "micro_batch": 8, "optimizer": "muon",
        "reconstruct": reconstruct,
    }  # fmt: skip
    calm, cut = tmp_path / "calm", tmp_path / "cut"
    videomae.main(config(tiny_pack, calm, **changes))
    printed = capsys.readouterr().out
    assert f"2 views {said}" in printed or f", {said}" in printed
    assert "view-retrieval" in printed and (calm / "reconstruction.png").exists() == reconstruct
    log = [json.loads(line) for line in (calm / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and "view_retrieval_accuracy" in log[-1]

    stop_in_step(monkeypatch, videomae, 4, signal.SIGTERM)
    with pytest.raises(SystemExit):
        videomae.main(config(tiny_pack, cut, **changes))
    videomae.main(config(tiny_pack, cut, resume=True, **changes))
    weights = final_weights(calm)
    assert equal(final_weights(cut), weights)
    assert any(name.startswith("head.") for name in weights)  # the contrast's
    assert any("decoder" in name for name in weights) == reconstruct

    encoder = load_backbone(str(calm / "backbone"))
    if not reconstruct:
        with pytest.raises(ValueError, match="its backbone is in"):
            backbones.load_pretrained_videomae(calm)
        return
    whole = backbones.load_pretrained_videomae(calm)
    assert equal(whole.encoder.state_dict(), encoder.state_dict())
    again = videomae.build_model(
        config(tiny_pack, "x", backbone=str(calm), **changes)
    )  # starts from it
    assert equal(again.masked.state_dict(), whole.state_dict())


def test_workers_do_not_change_a_bit(undisturbed, tiny_pack, tmp_path):
    videomae.main(config(tiny_pack, tmp_path / "run", num_workers=2))
    assert equal(final_weights(tmp_path / "run"), final_weights(undisturbed))


def test_accumulation_gives_the_same_loss(undisturbed, tiny_pack, tmp_path):
    videomae.main(config(tiny_pack, tmp_path / "run", micro_batch=8))
    a, b = final_weights(tmp_path / "run"), final_weights(undisturbed)
    for key in ("encoder.patch_embed.weight", "head.weight"):
        assert torch.allclose(a[key], b[key], atol=1e-4), key


def test_another_seed_is_another_run(undisturbed, tiny_pack, tmp_path):
    videomae.main(config(tiny_pack, tmp_path / "run", seed=1))
    assert not equal(final_weights(tmp_path / "run"), final_weights(undisturbed))


def test_non_finite_step_is_skipped_counted_and_not_remembered(tiny_pack, tmp_path, monkeypatch):
    """A poisoned step leaves weights and moments as they were, and the next one counts."""
    real, calls, before_after = videomae.train_step, 0, []

    def step(model, *rest):
        nonlocal calls
        calls += 1
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if calls == 3:
            bias = model.head.bias
            hook = bias.register_hook(lambda g: g * torch.nan)
            result = real(model, *rest)
            hook.remove()
        else:
            result = real(model, *rest)
        before_after.append(equal(before, dict(model.state_dict())))
        return result

    monkeypatch.setattr(videomae, "train_step", step)
    state = videomae.main(config(tiny_pack, tmp_path / "run"))
    assert before_after == [False, False, True, False, False, False, False, False]
    assert state["skipped"] == 1 and state["skipped_in_row"] == 0


def test_several_non_finite_steps_stop_the_run(tiny_pack, tmp_path, monkeypatch):
    real, calls = videomae.train_step, 0

    def step(model, *rest):
        nonlocal calls
        calls += 1
        if calls > 3:
            model.head.bias.register_hook(lambda g: g * torch.inf)
        return real(model, *rest)

    monkeypatch.setattr(videomae, "train_step", step)
    with pytest.raises(ValueError, match="in a row"):
        videomae.main(config(tiny_pack, tmp_path / "run", steps=20))
    assert checkpoint.newest_valid(tmp_path / "run")[0] is not None


def test_broken_clips_are_named_counted_and_at_last_too_many(
    tiny_pack, tmp_path, monkeypatch, capsys
):
    real = Pack.read
    pack = Pack(tiny_pack)
    victims = {pack.record(i)["key"] for i in range(0, len(pack), 4)}
    monkeypatch.setattr(
        Pack, "read", lambda self, r: real(self, r)[:100] if r["key"] in victims else real(self, r)
    )
    state = videomae.main(config(tiny_pack, tmp_path / "a", max_bad_clips=0.9))
    ledger = [
        json.loads(x) for x in (tmp_path / "a" / "data_errors.jsonl").read_text().splitlines()
    ]
    assert len(ledger) == state["bad_clips"] > 5 and {e["key"] for e in ledger} <= victims
    assert "bad clip replaced" in capsys.readouterr().err
    with pytest.raises(ValueError, match="more than --max-bad-clips"):
        videomae.main(config(tiny_pack, tmp_path / "b", steps=40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size: 8 -> 12"),
        ({"seed": 3}, "seed: 0 -> 3"),
    ],
)
def test_a_run_folder_is_not_continued_with_other_values(undisturbed, tiny_pack, changes, message):
    with pytest.raises(ValueError, match=message):
        videomae.main(change(config(tiny_pack, undisturbed), **changes))


def test_a_run_folder_is_not_continued_with_data_that_changed(
    undisturbed, tiny_pack, make_pack, monkeypatch
):
    rows = [{"motion": "up", "person": p, "take": 0, "split": "train"} for p in range(3)]
    other = Pack(make_pack(rows))
    monkeypatch.setattr(videomae, "open_data", lambda *_, **__: other)
    with pytest.raises(ValueError, match="3 clips, fingerprint"):
        videomae.main(config(tiny_pack, undisturbed))


def test_a_run_of_another_version_is_not_told_to_repeat_flags_that_are_gone(
    undisturbed, tiny_pack, tmp_path
):
    run = shutil.copytree(undisturbed, tmp_path / "old")
    described = json.loads((run / "config.json").read_text())
    described["config"] |= {"encoder": "xs", "threads": 0}
    (run / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"another version.* --encoder.* --out") as refused:
        videomae.main(change(config(tiny_pack, run), seed=3))
    assert "same values" not in str(refused.value)
    assert json.loads((run / "config.json").read_text()) == described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "xl"}, "no model 'xl'"),
        ({"mask_ratio": 1.0}, "at least one"),
        ({"mask": "tubes"}, "not one of tube"),
        ({"size": 30}, "choose multiples"),
        ({"size": 4, "patch": 2, "data": "synthetic:54"}, "--size 8"),
        ({"batch_size": 9, "views": 2}, "choose a multiple of 2"),
        ({"split": "trian"}, "no clip of split"),
        ({"precision": "fp8"}, "not one of auto"),
        ({"backbone": "nowhere"}, "no backbone at"),
        ({"contrast": 0.3, "micro_batch": 8}, "--views 2"),
        ({"contrast": 0.3, "views": 2}, "raise --micro-batch, now 4"),
        ({"resume": True}, "holds no checkpoint"),
        ({"data": "nowhere"}, "no data at"),
    ],
)
def test_mistakes_are_explained(tiny_pack, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        videomae.main(change(config(tiny_pack, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_foreign_folder_is_refused(tiny_pack, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a run"):
        videomae.main(config(tiny_pack, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_starting_from_a_backbone_and_from_a_run(undisturbed, tiny_pack, tmp_path):
    for name in (undisturbed, undisturbed / "backbone"):
        model = videomae.build_model(config(tiny_pack, tmp_path, backbone=str(name)))
        trained = load_backbone(str(undisturbed / "backbone"))
        assert equal(model.encoder.state_dict(), trained.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        videomae.build_model(config(tiny_pack, tmp_path, backbone=str(undisturbed), depth=3))


def test_repeated_augmentation_is_counted_honestly(tiny_pack, tmp_path, capsys):
    cfg = config(tiny_pack, tmp_path / "run", views=2, steps=0, epochs=1, micro_batch=8)
    state = videomae.main(cfg)
    assert state["step"] == 8  # 32 training clips, 4 decodes a step
    assert "4 clips decoded x 2 views" in capsys.readouterr().out


def test_published_presets_resolve():
    expected = {  # steps on 240,000 clips, learning rate
        "vit_b_k400": (93750, 1.2e-3), "vit_l_k400": (750000, 3e-4),
        "vit_b_ssv2": (281250, 1.2e-3), "vit_b_ucf101": (4000000, 2.25e-4),
    }  # fmt: skip
    for name, (steps, lr) in expected.items():
        cfg = videomae.PRESETS[name]
        for processes in (1, 8):
            plan = plan_run(cfg.optim, 240_000, processes, cfg.views)
            assert plan.steps == steps
            assert plan.micro * plan.accumulate * processes == plan.batch_size
            assert plan.peak == pytest.approx(lr)


# --------------------------------------------------------------------- real processes


def survive(
    tmp_path: Path, data: Path, plans: list[dict], processes: int, steps: int
) -> tuple[dict, dict]:
    """The last weights of a run killed as planned, each time started again, and of a calm one."""
    cfg = config(data, "", steps=steps, num_workers=1, knn_every=0)
    run_calm_and_harried(tmp_path, cfg, plans, processes)
    return final_weights(tmp_path / "harried"), final_weights(tmp_path / "calm")


def test_sigkill_in_a_step_and_inside_a_save(tiny_pack, tmp_path):
    assert equal(*survive(tmp_path, tiny_pack, [{"die_in_step": 5}, {"die_in_save": 3}], 1, 8))


def test_two_processes_survive_sigkill_of_one(tiny_pack, tmp_path):
    assert equal(*survive(tmp_path, tiny_pack, [{"die_in_step": 5, "rank": "1"}], 2, 6))
    # The same global batches as one process: the same loss up to rounding.
    one = launch(tmp_path, config(tiny_pack, tmp_path / "one", steps=6, knn_every=0), {})
    assert one.returncode == 0, one.stderr[-2000:]
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("one", "calm")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills(tiny_pack, tmp_path, processes):
    steps = [5, 3, 2, 7, 4, 6, 1, 5]
    plans = [{"die_in_step": s, "rank": str(i % processes)} for i, s in enumerate(steps)]
    plans[3:3] = [{"die_in_save": 1}]
    plans[7:7] = [{"die_in_save": 4}]
    assert equal(*survive(tmp_path, tiny_pack, plans, processes, 40))


def test_sigterm_to_the_whole_group_saves(tiny_pack, tmp_path):
    run = tmp_path / "run"
    cfg = config(tiny_pack, run, steps=100_000, num_workers=1, save_every=100_000, knn_every=0)
    group = tmp_path / "group"
    with ThreadPoolExecutor(1) as beside:
        ended = beside.submit(launch, tmp_path, cfg, {"group": str(group)})
        while not (run / "log.jsonl").exists():
            assert not ended.done(), ended.result()
            time.sleep(0.05)
        os.killpg(int(group.read_text()), signal.SIGTERM)  # decoding workers included
    done = ended.result()
    assert done.returncode == 143, done.stderr[-2000:]
    found, _ = checkpoint.newest_valid(run)
    assert found is not None and "stopped after step" in done.stdout


def test_a_launch_that_would_silently_train_alone_is_refused(tiny_pack, tmp_path):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        "recipes/videomae.py", "--data", str(tiny_pack), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    refused = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert refused.returncode != 0 and "would train alone" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_network_without_weights_is_nothing_to_start_from(tmp_path):
    with pytest.raises(ValueError, match="vit_ti is a network without weights"):
        weights_to_start_from("vit_ti")


def test_weights_of_other_positions_or_heads_are_refused(tmp_path):
    from pretrain.backbones import export_backbone
    from pretrain.vit import VideoTransformer

    theirs = VideoTransformer(24, 1, 2, 4, 16, 8, positions="separable")
    export_backbone(theirs, tmp_path / "backbone", {})
    for positions in ("flat", "separable"):
        encoder = VideoTransformer(24, 1, 2, 4, 16, 8, positions=positions)
        model = videomae.VideoMAE(encoder, 12, 1, 2)
        if positions == "flat":
            with pytest.raises(ValueError, match="give --positions separable"):
                start_from(model, load_backbone(str(tmp_path / "backbone")), "backbone")
        else:
            start_from(model, load_backbone(str(tmp_path / "backbone")), "backbone")
            for mine, other in zip(encoder.parameters(), theirs.parameters(), strict=True):
                assert mine.equal(other)
    model = videomae.VideoMAE(VideoTransformer(24, 1, 4, 4, 16, 8, positions="separable"), 12, 1, 2)
    with pytest.raises(ValueError, match="heads 4"):
        start_from(model, load_backbone(str(tmp_path / "backbone")), "backbone")
