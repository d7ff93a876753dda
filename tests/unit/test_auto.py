"""The preset `auto`: what is seen in clips, and that what it chooses can be trained."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from downstream import auto_pairs, monitor
from pretrain import auto, flags
from pretrain.auto import MOST_TOKENS, SIZES, Facts, choose, measure
from pretrain.backbones import read_backbone_config
from pretrain.data.pack import pack
from pretrain.data.shards import Pack
from pretrain.settings import STARTER
from pretrain.vit import without_init
from recipes import clip, videomae
from recipes.options.videomae import unused
from tests.conftest import write_video

FRAMES = 40


def packed(folder, draw, size=(96, 96), frames=FRAMES, fps=10) -> Pack:
    """A pack of three videos whose frame at time t is `draw(rng, t)`, uint8 (H, W, 3)."""
    (folder / "raw").mkdir()
    for number in range(3):
        rng = np.random.default_rng(number)
        clip = np.stack([draw(rng, t) for t in range(frames)])
        assert clip.shape[1:3] == size[::-1]
        write_video(folder / "raw" / f"{number}.mp4", clip, fps)
    pack(folder / "raw", folder / "pack", short_side=min(size), workers=1, progress=False)
    return Pack(folder / "pack")


def block(part: float, size: int = 96):
    """A textured square on a still background, which moves over a part of the picture."""
    side = int(size * part**0.5)
    still = np.random.default_rng(9).integers(0, 255, (size, size, 3), np.uint8)

    def draw(rng, _):
        frame = still.copy()
        frame[:side, :side] = rng.integers(0, 255, (side, side, 3), np.uint8)
        return frame

    return draw


def test_the_moving_part_is_measured(tmp_path):
    found = {}
    for part in (0.05, 0.25, 1.0):
        (tmp_path / f"{part}").mkdir()
        data = packed(tmp_path / f"{part}", block(part))
        facts = measure(data, data.split("all"))
        assert (facts.clips, facts.frames, facts.fps, facts.side) == (3, FRAMES, 10, 96)
        found[part] = facts.moving
    assert found[0.05] == pytest.approx(0.05, abs=0.03)
    assert found[0.25] == pytest.approx(0.25, abs=0.08)
    assert found[1.0] > 0.9  # nothing is still, from which noise could be told


def test_noise_is_no_motion_and_the_same_clips_give_the_same_facts(tmp_path):
    background = np.random.default_rng(9).integers(40, 200, (96, 128, 3)).astype(float)

    def noisy(rng, _):
        return np.clip(background + rng.normal(0, 6, background.shape), 0, 255).astype(np.uint8)

    data = packed(tmp_path, noisy, (128, 96))
    state = torch.get_rng_state()
    facts = measure(data, data.split("all"))
    assert facts.moving < 0.05 and facts == measure(data, data.split("all"))
    assert torch.equal(state, torch.get_rng_state())


WORLD = [
    Facts(clips, frames, fps, side, moving)
    for clips, (frames, fps), side, moving in itertools.product(
        (3, 200_000), ((1, 1.0), (2, 25.0), (11, 5.0), (32, 16.0), (300, 29.97), (3000, 120.0)),
        (24, 50, 144, 480), (0.0, 0.13, 0.4, 0.9),
    )
]  # fmt: skip


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("typed", [{}, {"size": 64}, {"patch": 16}, {"frames": 8}])
def test_whatever_clips_are_like_a_run_can_begin(gpu, typed):
    """The model is built, without numbers, and a mask drawn."""
    for facts in WORLD[::3] if not typed else WORLD[::9]:
        if facts.side < typed.get("size", 3 * typed.get("patch", 0)):
            continue
        chosen = choose(facts, typed, gpu)
        assert not chosen.keys() & typed.keys() and all(why for _, why in chosen.values())
        values = {name: value for name, (value, _) in chosen.items()} | typed
        given = tuple(typed)
        cfg = flags.replace(videomae.PRESETS["auto"], given=given, steps=3, **values)
        with torch.device("meta"), without_init():
            model = videomae.build_model(cfg)
        encoder = model.encoder
        videomae.draw_tokens(
            cfg.mask, model.mask_grid, cfg.mask_ratio, cfg.dual_mask, np.random.default_rng(0)
        )
        assert encoder.num_motion_tokens <= MOST_TOKENS[gpu] or "size" in typed
        if "size" not in typed:
            assert cfg.size in SIZES[gpu] and (cfg.size <= facts.side or cfg.size == 32)
        if facts.frames > 1 and not typed:
            span = cfg.frames * cfg.stride / facts.fps
            assert span <= max(auto.WINDOW, cfg.frames / facts.fps) * 1.2


def test_a_flag_is_kept_and_others_follow_it():
    facts = Facts(90, 60, 25.0, 144, 0.13)
    free, wide = choose(facts, {}, False), choose(facts, {"motion_tokens": 1.0}, False)
    assert free["motion_tokens"][0] < 0.2 and "motion_tokens" not in wide
    assert free["size"][0] / free["patch"][0] > wide["size"][0] / wide["patch"][0]
    halved = choose(facts, {"frames": 8}, False)
    assert halved["stride"][0] * 8 == pytest.approx(free["stride"][0] * free["frames"][0], rel=0.2)


def run(data: Pack, out, **values) -> dict:
    values |= {"data": str(data.folder), "out": str(out), "split": "all", "precision": "fp32"}
    values |= {} if "steps" in values else {"minutes": 1e-4}
    cfg, given = flags.replace(videomae.PRESETS["auto"], **values), tuple(values)
    return videomae.main(flags.replace(cfg, given=given))


def test_a_run_chooses_says_why_and_continues_as_it_began(tmp_path, capsys, monkeypatch):
    data = packed(tmp_path, block(0.1))
    state = run(data, tmp_path / "run", model="vit_xs", depth=1, batch_size=4)
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    for name in ("stride", "size", "motion_tokens", "mask_ratio", "base_lr"):
        assert f"--{name.replace('_', '-')} " in said and name in kept
    assert kept["steps"] == state["step"] == 20 and kept["model"] == "vit_xs"

    config = tmp_path / "run/config.json"
    whole = config.read_text()
    for name, value in (("base_lr", 50.0), ("motion_tokens", math.nan), ("scales", ["x", None])):
        config.write_text(json.dumps({**json.loads(whole), "config": kept | {name: value}}))
        with pytest.raises(ValueError, match=name):
            run(data, tmp_path / "run", model="vit_xs", depth=1, batch_size=4)
    config.write_text(whole)

    # The same command again neither looks nor measures anew: what was chosen stands.
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(auto, "measure", never)
    monkeypatch.setattr(auto, "seconds_a_step", never)
    again = run(data, tmp_path / "run", model="vit_xs", depth=1, batch_size=4)
    assert again["step"] == 20 and again["loss"] == state["loss"]
    with pytest.raises(ValueError, match=r"size: .* -> 48"):
        run(data, tmp_path / "run", model="vit_xs", depth=1, batch_size=4, size=48)


def test_weights_decide_their_form(tmp_path):
    from pretrain.backbones import export_backbone
    from pretrain.vit import VideoTransformer

    data = packed(tmp_path, block(0.1))
    theirs = VideoTransformer(128, 2, 4, 8, 64, 16, positions="separable", motion_tokens=0.5)
    export_backbone(theirs, tmp_path / "weights", {})
    run(data, tmp_path / "run", backbone=str(tmp_path / "weights"), batch_size=4, steps=1)
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    wanted = {"model": "vit_xs", "depth": 2, "frames": 8, "size": 64, "patch": 16}
    assert wanted.items() <= kept.items() and kept["motion_tokens"] == 0.5


@pytest.mark.parametrize("known", [(1, 0), (1, 1), (0, 0), (0, 1)])
def test_labels_decide_whether_the_starter_is_ahead(known, tiny_pack, monkeypatch):
    """`known`: whether features of the starter, and of random weights, tell the classes."""
    rest = iter(known)

    def features(_, data, samples, __):
        labels = [data.record(int(i))["label"] for i in samples]
        classes = np.unique(labels, return_inverse=True)[1]
        noise = np.random.default_rng(0).normal(size=(len(samples), 8))
        return (next(rest) * 20 * np.eye(8)[classes] + noise)[:, None].astype(np.float32)

    monkeypatch.setattr(monitor, "extract", features)
    data = Pack(tiny_pack)
    ahead, why = monitor.starter_ahead(data, data.split("train"), 0)
    assert ahead == (known == (1, 0)) and "random weights" in why


def test_without_labels_nothing_tells(tmp_path, monkeypatch):
    data = packed(tmp_path, block(0.1))
    ahead, why = monitor.starter_ahead(data, data.split("all"), 0)
    assert not ahead and "no clip has a label" in why


def test_a_run_starts_from_the_starter_where_it_is_ahead_and_nothing_contradicts(
    tmp_path, monkeypatch, capsys
):
    data = packed(tmp_path, block(0.1))
    monkeypatch.setattr(videomae, "starter_ahead", lambda *_: (True, "planted"))
    for _ in range(2):  # the second continues
        run(data, tmp_path / "run", batch_size=2, steps=1)
    said = capsys.readouterr().out
    assert said.count("starter: planted") == 1
    kept = json.loads((tmp_path / "run/config.json").read_text())["config"]
    wanted = {"backbone": STARTER, "frames": 32, "size": 64, "depth": 6, "stride": 1, "guard": True}
    assert wanted.items() <= kept.items() and kept["distill"] == 10
    assert kept["trained_share"] == 0.25
    assert read_backbone_config(tmp_path / "run/backbone")["arguments"]["motion_tokens"] == 0.28

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(videomae, "starter_ahead", never)
    for given in ({"size": 32}, {"backbone": None}, {"depth": 1}, {"stream": "flow"}):
        cfg = flags.replace(videomae.PRESETS["auto"], **given)
        cfg = flags.replace(cfg, given=tuple(given))
        assert videomae.start(cfg, data, data.split("all")) == (None, "")
    for name, words in (("distill", "--distill 0.5"), ("trained_share", "--trained-share 0.5")):
        wanted = flags.replace(cfg, **{name: 0.5})
        with pytest.raises(ValueError, match=f"{words}: .*fresh weights"):
            videomae.start(wanted, data, data.split("all"))


def test_a_weight_of_distillation_may_be_given_where_auto_chooses_the_weights():
    cfg = flags.replace(videomae.PRESETS["auto"], distill=2.0, given=("distill",))
    assert "distill" not in unused(cfg)
    assert "distill" in unused(flags.replace(cfg, given=("distill", "backbone")))
    tiny = flags.replace(videomae.PRESETS["tiny"], distill=2.0, backbone="x")
    assert "distill" not in unused(tiny)
    for more in ({"contrast": 0.3}, {"sigreg": 0.1}, {"reconstruct": False}):
        assert "distill" in unused(flags.replace(tiny, **more))
    cfg = flags.replace(videomae.PRESETS["auto"], trained_share=0.5, given=("trained_share",))
    assert "trained_share" not in unused(cfg)
    for more in ({"contrast": 0.3}, {"sigreg": 0.1}, {"preset": "tiny"}):
        assert "trained_share" in unused(flags.replace(cfg, **more))
    without = flags.replace(cfg, distill=0.0, given=("trained_share", "distill"))
    assert "trained_share" in unused(without)


@pytest.mark.parametrize("recipe", [videomae, clip])
def test_a_place_that_cannot_be_a_run_is_refused_before_packing(recipe, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", np.zeros((20, 64, 64, 3), np.uint8))
    (tmp_path / "l.csv").write_text("path,caption\na.mp4,somebody walks\n")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(auto, "open_data", lambda *_: pytest.fail("it packed"))
    monkeypatch.setattr(auto_pairs, "open_all", lambda *_: pytest.fail("it packed"))
    data = str(tmp_path / "l.csv")
    values = {"data": data if recipe is videomae else (data,), "out": str(tmp_path / "run")}
    cfg = flags.replace(recipe.PRESETS["auto"], **values, given=("data", "out"))
    for changes, told in (({"track": "nowhere"}, "pip install"), ({"resume": True}, "--resume")):
        with pytest.raises(ValueError, match=told):
            recipe.main(flags.replace(cfg, run=replace(cfg.run, **changes)))
    (tmp_path / "run/thesis.txt").touch()
    with pytest.raises(ValueError, match="not a run"):
        recipe.main(cfg)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"size": 50}, "patch"), ({"mask": "tube", "motion_tokens": 0.1}, "tube"),
        ({"stream": "flow"}, "flow"), ({"target": "flow"}, "flow"), ({"contrast": 0.3}, "views"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused_before_packing(values, told, tmp_path, monkeypatch):
    """Raw videos take long to pack."""
    write_video(tmp_path / "a.mp4", np.zeros((20, 64, 64, 3), np.uint8))

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(auto, "open_data", never)
    values |= {"data": str(tmp_path), "out": str(tmp_path / "run")}
    cfg = flags.replace(videomae.PRESETS["auto"], **values)
    with pytest.raises(ValueError, match=told):
        videomae.main(flags.replace(cfg, given=tuple(values)))


@pytest.mark.parametrize(
    "typed, wanted",
    [
        ({"mask": "tube"}, {"motion_tokens": 1.0}), ({"model": "i3d"}, {"motion_tokens": 1.0}),
        ({"views": 3}, {"batch_size": 66}), ({"frames": 1}, {"motion_tokens": 1.0}),
        ({"base_lr": 1e-4}, {"final_lr": 1e-6}), ({"tubelet": 3}, {"frames": 30}),
        ({"optimizer": "adamw"}, {"base_lr": 0.2 * 0.016}),
        ({"backbone": "weights"}, {"base_lr": 0.016, "distill": 10, "trained_share": 0.25}),
        ({"backbone": "weights", "distill": 0.0}, {"base_lr": 0.1 * 0.016}),
        ({"backbone": "weights", "contrast": 0.3, "views": 2}, {"base_lr": 0.1 * 0.016}),
    ],
)  # fmt: skip
def test_what_is_typed_decides_what_goes_with_it(typed, wanted):
    chosen = choose(Facts(90, 60, 25.0, 144, 0.13), typed, False)
    found = {name: value for name, (value, _) in chosen.items() if name in wanted}
    assert found == pytest.approx(wanted)


def test_few_clips_make_small_batches_and_rest_selects_nothing():
    assert choose(Facts(18, 60, 25.0, 144, 0.13), {}, False)["batch_size"][0] == 16
    assert choose(Facts(18, 60, 25.0, 144, 0.0), {}, False)["motion_tokens"][0] == 1.0


def test_flicker_of_light_is_no_motion(tmp_path):
    still = np.random.default_rng(9).integers(60, 160, (96, 96, 3))
    data = packed(tmp_path, lambda _, t: (still + 40 * (t % 2)).astype(np.uint8))
    assert measure(data, data.split("all")).moving < 0.1


def test_pictures_among_videos_say_nothing_of_these(tmp_path):
    data = packed(tmp_path, block(0.1))
    alone = measure(data, data.split("all"))
    for number in range(5):
        picture = np.random.default_rng(number).integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "raw" / f"p{number}.png")
    pack(tmp_path / "raw", tmp_path / "both", short_side=96, workers=1, progress=False)
    both = Pack(tmp_path / "both")
    facts = measure(both, both.split("all"))
    assert facts == replace(alone, clips=8, pictures=5) and "5 pictures" in facts.in_words()
