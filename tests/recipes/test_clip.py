"""Video-text contrast end to end, at tiny size: it learns, survives, mixes, and says no."""

import json
import math
from itertools import pairwise
from pathlib import Path

import open_clip
import pytest
from safetensors.torch import load_file

from downstream.models import load_backbone, load_video_text
from pretrain import checkpoint, log
from pretrain.data.pack import pack
from pretrain.flags import flat
from pretrain.prompts import load_templates
from pretrain.spec import Stream
from recipes import clip, zero_shot
from tests.conftest import save_open_clip
from tests.recipes.runs import (
    change,
    configure,
    equal,
    final_weights,
    modes_in_steps,
    run_calm_and_harried,
    stop_in_step,
)

ROOT = Path(__file__).parents[2]


def config(data, out, **changes) -> clip.Config:
    small = configure(clip.Config,
        preset="test", data=tuple(map(str, data)) if isinstance(data, list) else (str(data),),
        out=str(out), depth=1, dim=16, text_model="xxs", frames=4, stride=4, size=32, patch=8,
        positions="separable", init="mimetic", positives="caption", steps=8, batch_size=8,
        micro_batch=4, base_lr=0.01, warmup=0.2, beta2=0.95, clip_grad=1.0, weight_decay=0.05,
        precision="fp32", num_workers=0, threads=1, save_every=3, log_seconds=0.0, val_every=4,
    )  # fmt: skip
    return change(small, **changes)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(captioned_pack, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("clip") / "run"
    clip.main(config(captioned_pack, run))
    return run


def test_whole_run(undisturbed, capsys):
    logged = lines(undisturbed)
    assert [entry["step"] for entry in logged] == list(range(1, 9))
    assert 1 < logged[0]["loss"] < 4  # about ln 8
    assert {"video_to_text", "text_to_video", "gap", "scale", "duplicates"} <= logged[0].keys()
    assert logged[0]["duplicates"] > 0  # eight sentences in all
    assert [entry["step"] for entry in logged if "val_t2v_r10" in entry] == [4, 8]
    # Beside each share is what a model that tells nothing apart has: the curve draws it.
    chances = [logged[-1][f"val_t2v_r{k}_chance"] for k in (1, 5, 10)]
    assert 0 < chances[0] < chances[1] <= chances[2] <= 1
    assert (undisturbed / "curve.png").is_file()
    model = load_video_text(str(undisturbed / "backbone"))
    saved = load_file(checkpoint.checkpoints(undisturbed)[0] / "model.safetensors")
    assert equal(dict(model.state_dict()), saved)


def coloured_squares(folder: Path) -> Path:
    """A list of pictures: a square of one of four colours somewhere on a grey ground, with
    captions.
    """
    import numpy as np
    from PIL import Image

    colours = {
        "red": (220, 40, 40),
        "green": (40, 200, 60),
        "blue": (50, 60, 220),
        "yellow": (230, 220, 40),
    }
    rng = np.random.default_rng(0)
    rows = ["path,label,caption,split"]
    for i in range(96):
        name = list(colours)[i % 4]
        image = np.full((32, 32, 3), rng.integers(90, 150), np.uint8)
        x, y = rng.integers(0, 18, 2)
        image[y : y + 14, x : x + 14] = colours[name]
        Image.fromarray(image).save(folder / f"{i}.png")
        split = "train" if i < 64 else "test"
        for words in ("a {} square", "a square that is {}"):
            rows.append(f"{i}.png,{name},{words.format(name)},{split}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


def test_it_learns_what_the_captions_say(tmp_path, monkeypatch):
    """New pictures by words: the towers must have met."""
    from recipes import retrieval, zero_shot

    listing, run = coloured_squares(tmp_path), tmp_path / "run"
    titles, draw = [], log.curve_figure
    monkeypatch.setattr(log, "curve_figure", lambda *a: titles.append(a[-1]) or draw(*a))
    clip.main(
        config(
            listing, run, frames=1, tubelet=1, stride=1, steps=40, save_every=40, batch_size=16,
            micro_batch=16, val_every=0, log_seconds=60.0,
        )
    )  # fmt: skip
    assert titles and " val" not in titles[0]  # of which there is none
    more = {"num_clips": 1, "num_workers": 0}
    templates = tmp_path / "templates.txt"
    templates.write_text("a {} square\n")
    results = zero_shot.main(
        configure(
            zero_shot.Config,
            str(run / "backbone"),
            str(listing),
            out=str(tmp_path / "zs"),
            templates=str(templates),
            **more,
        )
    )
    assert results["metrics"]["top1"]["value"] > 0.8 and results["data"]["num_test"] == 32
    found = retrieval.main(
        configure(
            retrieval.Config,
            str(run / "backbone"),
            str(listing),
            "a blue square",
            6,
            str(tmp_path / "s"),
            **more,
        )
    )
    assert sum(int(entry["video"].removesuffix(".png")) % 4 == 2 for entry in found["best"]) >= 5


@pytest.mark.parametrize("stop_after", [2, 3, 7])
def test_interrupted_and_resumed_equals_undisturbed(
    undisturbed, captioned_pack, tmp_path, monkeypatch, stop_after
):
    stop_in_step(monkeypatch, clip, stop_after)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        clip.main(config(captioned_pack, run))
    assert stopped.value.code == 130
    clip.main(config(captioned_pack, run, resume=True))
    assert equal(final_weights(run), final_weights(undisturbed))
    assert [entry["step"] for entry in lines(run)] == list(range(1, 9))


def test_workers_and_trimming_do_not_change_the_run(undisturbed, captioned_pack, tmp_path):
    clip.main(config(captioned_pack, tmp_path / "run", num_workers=2))
    assert equal(final_weights(tmp_path / "run"), final_weights(undisturbed))
    clip.main(config(captioned_pack, tmp_path / "long", trim_text=False))
    losses = [[entry["loss"] for entry in lines(r)] for r in (undisturbed, tmp_path / "long")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_cached_gradients_give_the_run_of_the_whole_batch(
    undisturbed, captioned_pack, tmp_path, capsys
):
    clip.main(config(captioned_pack, tmp_path / "run", micro_batch=8))
    assert "passes" not in capsys.readouterr().out
    losses = [[entry["loss"] for entry in lines(r)] for r in (undisturbed, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


CLASSES = {
    "loss": "classes", "text": "label", "templates": "vificlip", "smoothing": 0.1, "mixup": 0.8,
    "cutmix": 1.0, "sampling": "uniform", "jitter": 0.5, "grey": 0.5, "flip": True,
    "schedule": "counting", "warmup": 0.5, "clip_grad": 0.0, "steps": 4,
}  # fmt: skip


def test_all_class_prompts(captioned_pack, tmp_path, monkeypatch):
    """Every clip against all prompts: interrupted as undisturbed, words stay, and a batch is exact
    in any number of passes.
    """
    whole, split, broken = (config(captioned_pack, tmp_path / n, **CLASSES) for n in "abc")
    before = clip.build_model(whole).state_dict()
    clip.main(whole)
    log = lines(whole.out)
    assert 1.1 < log[0]["loss"] < 2.5 and log[0]["lr"] == 0  # about ln 4, smoothed
    after = final_weights(whole.out)
    words = "text.tower.token_embedding.weight"
    assert equal({words: before[words]}, {words: after[words]})
    with monkeypatch.context() as patch:
        stop_in_step(patch, clip, 3)
        with pytest.raises(SystemExit):
            clip.main(broken)
    clip.main(broken)
    assert equal(final_weights(broken.out), after)
    losses = []
    for micro, out in ((8, "d"), (2, "e")):
        plain = change(split, mixup=0.0, cutmix=0.0, micro_batch=micro, out=str(tmp_path / out))
        clip.main(plain)
        losses.append([entry["loss"] for entry in lines(plain.out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_score_on_val_is_of_videos(make_pack, tmp_path):
    """The clips of a long one share its caption: none is a rival of another."""
    rows = [
        {"motion": m, "person": p, "take": 0, "caption": f"{m} {p}",
         "split": "val" if p == 2 else "train"}
        for m in ("up", "down", "left") for p in range(3)
    ]  # fmt: skip
    data = make_pack(rows, frames=32, clip_seconds=1.0)
    state = clip.main(config(data, tmp_path / "run", steps=1, batch_size=4))
    assert state["val"]["num"] == 3


@pytest.mark.parametrize("changes", [{"text": "caption"}, {"templates": "openai_ucf101"}])
def test_all_class_prompts_want_one_sentence_a_class(captioned_pack, tmp_path, changes):
    with pytest.raises(ValueError, match="sentence"):
        clip.main(config(captioned_pack, tmp_path / "run", **CLASSES | changes))


def test_the_whole_of_vificlip_on_a_small_pair(captioned_pack, tmp_path):
    """Both towers of a pair under its own scale, which nothing holds back; tested with the frames
    that it was trained on.
    """
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    about = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    made = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    made.logit_scale.data.fill_(4.7)  # above ln 100
    run = str(tmp_path / "run")
    small = {
        "model": save_open_clip(tmp_path, made, about, {"mean": [0.5] * 3, "std": [0.5] * 3}),
        "frames": 4, "batch_size": 8, "micro_batch": 4, "steps": 2, "num_workers": 0, "threads": 1,
        "precision": "fp32",
    }  # fmt: skip
    preset = clip.PRESETS["vificlip_b16"]
    clip.main(change(preset, data=(str(captioned_pack),), out=run, **small))
    model = load_video_text(run + "/backbone")
    spec = model.video.input_spec
    assert spec.stride == 0 and spec.streams == {"rgb": Stream()}
    assert model.log_scale.item() > 4.69 and not model.arguments["project"]
    results = zero_shot.main(
        configure(
            zero_shot.Config,
            run + "/backbone",
            str(captioned_pack),
            templates="vificlip",
            out=run + "/zs",
            num_clips=1,
            num_workers=0,
        )
    )
    assert results["data"]["num_classes"] == 4


def test_the_preset_of_vificlip():
    """As the authors' repository has it; see the comment at the preset."""
    preset = flat(clip.PRESETS["vificlip_b16"])
    published = {
        "model": "open_clip:ViT-B-16/openai", "loss": "classes", "smoothing": 0.1, "mixup": 0.8,
        "cutmix": 1.0, "frames": 32, "sampling": "uniform", "scales": (1.0, 0.875, 0.75, 0.66),
        "flip": True, "jitter": 0.8, "grey": 0.2, "epochs": 10, "warmup": 0.5, "batch_size": 256,
        "base_lr": 8e-6, "final_lr": 8e-8, "weight_decay": 0.001, "beta2": 0.98, "clip_grad": 0.0,
        "optimizer": "adamw", "pixels": "imagenet", "pool": "mean", "colour": 0.0,
        "drop_tokens": 0.0,
    }  # fmt: skip
    assert {name: preset[name] for name in published} == published
    assert load_templates(preset["templates"]) == ("a photo of a {}.",)


def test_dropped_tokens_siglip_and_labels(captioned_pack, tmp_path, capsys):
    run = tmp_path / "run"
    changes = {
        "loss": "siglip",
        "drop_tokens": 0.5,
        "positives": "label",
        "text": "label",
        "steps": 2,
    }
    clip.main(config(captioned_pack, run, templates="openai_ucf101", **changes))
    assert "50%" in capsys.readouterr().out
    assert load_video_text(str(run / "backbone")).bias is not None
    from recipes import zero_shot

    results = zero_shot.main(
        configure(
            zero_shot.Config, str(run / "backbone"), str(captioned_pack), num_workers=0, num_clips=1
        )
    )
    assert any("class labels" in note for note in results["notes"])
    assert (tmp_path / "run" / "zero-shot-pack" / "CARD.md").exists()


def test_from_a_backbone(captioned_pack, tiny_backbone, tmp_path):
    run = tmp_path / "run"
    clip.main(
        config(captioned_pack, run, backbone=str(tiny_backbone), steps=1, base_lr=0.0, warmup=0.0)
    )
    ours = load_backbone(str(run / "backbone"))
    theirs = load_backbone(str(tiny_backbone))
    assert equal(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert ours.input_spec == theirs.input_spec


@pytest.mark.parametrize("pool", ["mean", "attention", "temporal"])
def test_frame_towers(captioned_pack, tmp_path, pool):
    run = tmp_path / "run"
    clip.main(
        config(captioned_pack, run, model="frames:vit_ti", pool=pool, steps=2, drop_tokens=0.5)
    )
    tower = load_backbone(str(run / "backbone"))
    assert tower.pool == pool and tower.input_spec.frames == 4


def photos(folder: Path) -> Path:
    """A list of twelve small pictures with captions."""
    from PIL import Image

    rows = ["path,caption,split"]
    for i in range(12):
        Image.new("RGB", (40, 32), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a plain picture number {i},{'train' if i < 8 else 'test'}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


def documents(folder: Path) -> Path:
    """Two interleaved documents over the same pictures."""
    docs = [
        {"document": [{"text": f"above {k}"}, {"image": f"{k}.png"}, {"text": f"below {k}"}]}
        for k in (0, 1)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    return folder / "docs.jsonl"


def test_a_mixture_of_videos_photographs_and_documents(captioned_pack, tmp_path, capsys):
    listing = photos(tmp_path)
    pictures, docs = tmp_path / "pictures", tmp_path / "docs"
    pack(listing, pictures, short_side=32, workers=1, progress=False)
    pack(documents(tmp_path), docs, short_side=32, workers=1, progress=False)
    run = tmp_path / "run"
    seen = []
    real = clip.train_step

    def step(model, optimizers, batches, *rest):
        def watched():
            for batch in batches:
                seen.append(batch)
                yield batch

        return real(model, optimizers, watched(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "train_step", step)
        clip.main(
            config([captioned_pack, pictures, docs], run, data_weights=(2.0, 1.0, 1.0), steps=2)
        )
    printed = capsys.readouterr().out
    assert "(32 clips, 4 in a batch)" in printed and "(2 clips, 2 in a batch)" in printed
    assert sum(len(batch["samples"]) for batch in seen) == 16
    # A photograph is a clip that stands still.
    still = [bool((v[0] == v[0][:, :1]).all()) for batch in seen for v in batch["rgb"].unsqueeze(1)]
    assert sum(still) == 8


def test_images_alone(tmp_path):
    listing = photos(tmp_path)
    run = tmp_path / "run"
    state = clip.main(
        config(
            listing,
            run,
            frames=1,
            tubelet=1,
            stride=1,
            steps=40,
            save_every=40,
            batch_size=8,
            val_every=0,
            scales=(1.0,),
        )
    )
    assert state["loss"] < 1.0
    assert load_backbone(str(run / "backbone")).input_spec.frames == 1


# ------------------------------------------------------------------------------ saying no


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "xl"},
            r"--model 'xl' is not a name of python -m downstream.models",
        ),
        ({"text_model": "xl"}, r"--text-model 'xl' is not one of xs, ti, s, b"),
        ({"model": "frames:vit_ti", "patch": 7}, "not a multiple of --patch 7"),
        ({"model": "frames:vit_ti", "pool": "median"}, "'median' is not one of mean"),
        ({"drop_tokens": 1.0}, "--drop-tokens 1.0"),
        ({"data_weights": (1.0, 2.0)}, "2 --data-weights and 1 --data"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"backbone": "open_clip:RN50"}, "give --model open_clip:RN50"),
        ({"text": "label", "templates": "nothing"}, "neither a file nor one of"),
        ({"split": "holiday"}, "no clip of split 'holiday'"),
        ({"resume": True}, "no checkpoint to continue from"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    captioned_pack, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        clip.main(config(captioned_pack, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_data_without_captions_say_what_to_do(tiny_pack, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no clip .*32 in all.* has a caption: .*--text label"):
        clip.main(config(tiny_pack, tmp_path / "run"))
    clip.main(config(tiny_pack, tmp_path / "run", text="label", steps=1))


def test_clips_without_a_caption_are_left_out_and_counted(make_pack, tmp_path, capsys):
    rows = [
        {"motion": m, "person": p, "take": 0, "caption": "it moves" if p else "  "}
        for m in ("up", "down") for p in range(3)
    ]  # fmt: skip
    clip.main(config(make_pack(rows), tmp_path / "run", steps=1, batch_size=4))
    assert "2 of 6 clips" in capsys.readouterr().out


def test_long_captions_are_counted(make_pack, tmp_path, capsys):
    rows = [
        {"motion": "up", "person": p, "take": 0, "caption": f"{p} word " * 60} for p in range(4)
    ]
    state = clip.main(config(make_pack(rows), tmp_path / "run", steps=2, batch_size=4))
    assert state["cut"] == 8 and "8 captions" in capsys.readouterr().out


def test_a_loss_at_chance_is_said_in_words(captioned_pack, tmp_path, capsys):
    """A rate far too high makes all embeddings one; it is said when it begins, not beside every
    line.
    """
    clip.main(
        config(
            captioned_pack,
            tmp_path / "run",
            text_model="xs",
            steps=12,
            base_lr=1.0,
            clip_grad=0.0,
            batch_size=16,
            micro_batch=16,
            log_seconds=0.0,
        )
    )
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if "ln(16) = 2.77" in line]
    assert said
    assert all(j - i > 2 for i, j in pairwise(said)), lines


def test_batch_norm_and_cached_gradients_are_refused(captioned_pack, tmp_path):
    """A batch that is not one batch for the normalisation would not give the same loss."""
    import open_clip

    resnet = {"layers": [1, 1, 1, 1], "width": 32, "image_size": 32, "patch_size": None}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config_file = tmp_path / "tiny-resnet.json"
    config_file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": resnet, "text_cfg": text}))
    open_clip.add_model_config(config_file)
    cfg = config(captioned_pack, tmp_path / "run", model="open_clip:tiny-resnet", steps=1)
    with pytest.raises(ValueError, match="batch normalisation"):
        clip.main(cfg)
    state = clip.main(change(cfg, micro_batch=8))
    assert math.isfinite(state["loss"])


# --------------------------------------------------------------------- real processes


def survive(
    tmp_path: Path, data: Path, plans: list[dict], processes: int, steps: int
) -> tuple[dict, dict]:
    """The last weights of a run killed as planned, each time started again, and of a calm one."""
    cfg = config(data, "", steps=steps, num_workers=1, val_every=0)
    run_calm_and_harried(tmp_path, cfg, plans, processes)
    return final_weights(tmp_path / "harried"), final_weights(tmp_path / "calm")


def test_two_processes_survive_sigkill_and_equal_one(captioned_pack, tmp_path):
    assert equal(*survive(tmp_path, captioned_pack, [{"die_in_step": 5, "rank": "1"}], 2, 6))
    clip.main(config(captioned_pack, tmp_path / "one", steps=6, val_every=0))
    losses = [[entry["loss"] for entry in lines(tmp_path / n)] for n in ("one", "calm")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills(captioned_pack, tmp_path, processes):
    steps = [5, 3, 2, 7, 4, 6, 1, 5]
    plans = [{"die_in_step": s, "rank": str(i % processes)} for i, s in enumerate(steps)]
    plans[3:3] = [{"die_in_save": 1}]
    plans[7:7] = [{"die_in_save": 4}]
    assert equal(*survive(tmp_path, captioned_pack, plans, processes, 40))


def test_a_classical_video_tower(captioned_pack, tmp_path, monkeypatch):
    """Any family can be the video tower; what cannot be exact or is not there is refused."""
    cfg = config(
        captioned_pack,
        tmp_path / "run",
        model="frame_mean",
        drop_tokens=0.0,
        motion_tokens=1.0,
        micro_batch=64,
        small=True,
    )
    modes = modes_in_steps(monkeypatch, clip)
    clip.main(cfg)
    assert modes == [{True}] * 8  # between them it was scored
    model = load_video_text(str(tmp_path / "run" / "backbone"))
    assert type(model.video).__name__ == "FrameNetwork"
    with pytest.raises(ValueError, match="batch normalisation"):
        clip.main(change(cfg, micro_batch=2, out=str(tmp_path / "a")))
    with pytest.raises(ValueError, match="drop-tokens needs"):
        clip.main(change(cfg, drop_tokens=0.5, out=str(tmp_path / "b")))
    with pytest.raises(ValueError, match="sees 2 frames"):
        clip.main(change(cfg, model="frame_late", out=str(tmp_path / "c")))
