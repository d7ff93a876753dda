"""Whatever a recipe names can be chosen: every tower and every encoder trains, and flags it cannot
use are refused.
"""

import math
import shlex
from pathlib import Path

import pytest

from downstream.classifier import Classifier
from downstream.models import MODELS, build_model, load_video_text
from downstream.models.fusion import EarlyStreams
from downstream.models.pose_attention import PoseAttention
from downstream.models.skeleton import SkeletonLSTM
from downstream.models.stgcn import STGCN
from downstream.models.two_stream import FeatureFusion, FlowStack
from pretrain.backbones import export_backbone
from pretrain.log import cli
from pretrain.settings import VITS
from recipes import clip, predict, retrieval, videomae, zero_shot
from tests.recipes.runs import change, flags_of
from tests.recipes.test_clip import lines

LARGE = ("vit_b", "vit_l", "vit_h")  # no small network
BIG = {f"{kind}vit_{size}" for kind in ("", "frames:") for size in "blh"}
FLOW = "i3d_flow"
# They take streams that these data do not have.
STREAMS = {
    n for n, family in MODELS.items()
    if family.build in (EarlyStreams, FeatureFusion, FlowStack, PoseAttention, SkeletonLSTM, STGCN)
} | {FLOW, "i3d_early"}  # fmt: skip
SMALL = {
    "size": 32,
    "steps": 2,
    "num_workers": 0,
    "threads": 1,
    "log_seconds": 0.0,
    "precision": "fp32",
}
QUICK = ("frames:vit_xs", "frame_late", "frame_slow", "lstm", "i3d")


def trained(recipe, out: Path, **changes) -> list[float]:
    """Losses of two steps of the small preset."""
    preset = change(recipe.PRESETS["tiny"], out=str(out), batch_size=4, micro_batch=4, **SMALL)
    recipe.main(change(preset, **changes))
    return [line["loss"] for line in lines(out)]


@pytest.mark.parametrize("tower", QUICK)
def test_a_video_tower_trains(captioned_pack, tmp_path, tower):
    losses = trained(clip, tmp_path / "run", data=(str(captioned_pack),), model=tower, val_every=0)
    assert len(losses) == 2 and all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tower",
    sorted({*VITS, *(f"frames:{v}" for v in VITS), *MODELS} - {*QUICK, *LARGE, *STREAMS, *BIG}),
)
def test_every_video_tower_trains(captioned_pack, tmp_path, tower):
    test_a_video_tower_trains(captioned_pack, tmp_path, tower)


def test_flow_is_no_video_tower(captioned_pack, tmp_path):
    with pytest.raises(ValueError, match="takes flow"):
        trained(clip, tmp_path / "run", data=(str(captioned_pack),), model=FLOW)


@pytest.mark.parametrize("encoder", ["vit_xs", "vivit_3", "i3d"])
def test_an_encoder_trains(tiny_pack, tmp_path, encoder):
    tubelet = 1 if encoder == "frame_single" else 2
    losses = trained(
        videomae, tmp_path / "run", data=str(tiny_pack), model=encoder, tubelet=tubelet
    )
    assert len(losses) == 2 and all(map(math.isfinite, losses))


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder",
    sorted({*MODELS} - {*VITS} - {"vivit_3", "i3d", *STREAMS, *BIG}),
)
def test_every_encoder_trains(tiny_pack, tmp_path, encoder):
    test_an_encoder_trains(tiny_pack, tmp_path, encoder)


REFUSED = [
    (clip, "--model i3d --depth 2 --patch 12 --tubelet 1", "--depth --patch --tubelet"),
    (
        clip,
        "--model lstm --positions flat --init xavier --pool mean",
        "--positions --init --pool",
    ),
    (clip, "--model lstm --drop-tokens 0.5 --motion-tokens 0.5", "--drop-tokens --motion-tokens"),
    (clip, "--model frame_single --frames 4", "--frames"),
    (clip, "--model frame_single --stride 4", "--stride"),
    (clip, "--model frame_late --frames 4", "--frames"),
    (
        clip,
        "--model frames:vit_xs --tubelet 2 --motion-tokens 0.5 --small",
        "--tubelet --motion-tokens --small",
    ),
    (clip, "--model vit_xs --pool attention --small", "--pool --small"),
    (clip, "--model vit_xs --pool attention", "--pool"),
    (clip, "--model open_clip:RN50 --size 96 --depth 2", "--size --depth"),
    (clip, "vificlip_b16 --dim 64", "--dim"),
    (
        clip,
        "--backbone b --model vit_xs --frames 4 --stride 2 --motion-tokens 0.5",
        "--model --frames --stride --motion-tokens",
    ),
    (clip, "photos --stride 3", "--stride"),
    (clip, "--templates plain", "--templates"),
    (clip, "--data-weights 1", "--data-weights"),
    (clip, "--epochs 3 --steps 5", "--epochs"),
    (
        clip,
        "--smoothing 0.1 --mixup 0.8 --cutmix 1 --pixels imagenet",
        "--smoothing --mixup --cutmix --pixels",
    ),
    (clip, "vificlip_b16 --positives caption", "--positives"),
    (videomae, "--model vivit_3 --depth 3 --pool class", "--depth --pool"),
    (videomae, "--model i3d --init mimetic --positions rotary", "--init --positions"),
    (
        videomae,
        "--model i3d --motion-tokens 0.5 --dual-mask --decoder-dim 64",
        "--motion-tokens --dual-mask --decoder-dim",
    ),
    (videomae, "--small", "--small"),
    (videomae, "--backbone b --init mimetic", "--init"),
    (videomae, "--frames 1 --stride 3", "--stride"),
    (videomae, "--epochs 3 --steps 5", "--epochs"),
    (retrieval, "--backbone b --data d --top 3", "--top"),
    (retrieval, "--backbone b --data d --query q --test-split all", "--test-split"),
    (
        zero_shot,
        "--backbone b --video v --classes a,b --seed 3 --test-split all",
        "--seed --test-split",
    ),
]


def unused_of(recipe):
    return flags_of(recipe.__name__.rpartition(".")[2]).unused


@pytest.mark.parametrize(("recipe", "words", "named"), REFUSED, ids=lambda x: str(x)[:40])
def test_flags_without_effect_are_refused_by_name(recipe, words, named, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipe.py", *shlex.split(words)])
    with pytest.raises(SystemExit):
        cli(
            lambda _: pytest.fail("it ran"),
            getattr(recipe, "PRESETS", recipe.Config),
            unused_of(recipe),
        )
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(name in said for name in named.split())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (clip, "--model i3d --motion-tokens 1 --drop-tokens 0 --frames 8 --size 32 --no-small"),
        (clip, "--model frame_single --frames 1"),
        (clip, "--model vit_ti --patch 12 --depth 2 --init mimetic --motion-tokens 0.5"),
        (clip, "--model frames:vit_xs --depth 2 --patch 8 --pool attention --drop-tokens 0.5"),
        (clip, "--model open_clip:ViT-B-16/openai --pool attention --frames 8"),
        (clip, "--model open_clip:RN50 --dim 64"),
        (clip, "--epochs 3"),
        (clip, "--epochs 3 --steps None"),
        (clip, "vificlip_b16 --epochs 3 --templates plain"),
        (videomae, "--model vivit_3 --motion-tokens 1 --no-dual-mask --patch 8 --backbone w"),
        (videomae, "--model vit_s --depth 3 --pool class --positions learned --init xavier"),
        (videomae, "vit_b_k400 --epochs 3"),
    ],
)  # fmt: skip
def test_flags_with_an_effect_are_not(recipe, words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", *shlex.split(words)])
    ran = []
    cli(
        ran.append,
        getattr(recipe, "PRESETS", recipe.Config),
        unused_of(recipe),
    )
    assert len(ran) == 1


def test_a_classifier_of_frames_has_no_views(tmp_path, monkeypatch, capsys):
    tower = build_model("lstm", small=True)
    export_backbone(
        Classifier(tower, ["a", "b"], 0.0, True), tmp_path / "b", {"recipe": "for tests"}
    )
    words = ["--backbone", str(tmp_path / "b"), "--video", "v", "--num-crops", "3"]
    test_flags_without_effect_are_refused_by_name(
        predict, shlex.join(words), "--num-crops", monkeypatch, capsys
    )


def test_a_sized_tower_of_the_families_takes_its_form(captioned_pack, tmp_path):
    given = {"data": (str(captioned_pack),), "val_every": 0, "size": 36}
    trained(clip, tmp_path / "run", model="vit_xs", patch=12, depth=2, positions="flat", **given)
    tower = load_video_text(str(tmp_path / "run" / "backbone")).video
    assert tower.patch == 12 and len(tower.blocks) == 2 and tower.grid == (8, 3, 3)


def test_a_small_network_is_asked_for_and_not_inferred():
    """A few pixels more or less change no channel."""
    for recipe, name in ((clip, "model"), (videomae, "model")):
        counts = set()
        for size in (96, 128):
            for small in (False, True):
                config = change(
                    recipe.PRESETS["tiny"],
                    size=size,
                    small=small,
                    motion_tokens=1.0,
                    **{name: "i3d"},
                )
                model = recipe.build_model(
                    change(config, drop_tokens=0.0)
                    if recipe is clip
                    else change(config, dual_mask=False)
                )
                counts.add((small, (model.video if recipe is clip else model.encoder).embed_dim))
        assert len(counts) == 2
