"""Video-text contrast against open_clip: losses, gradients, embeddings, zero-shot heads."""

import json

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss

from downstream.finetune import make_targets
from downstream.models import build_model, load_backbone, load_video_text
from downstream.zero_shot import class_vectors, ensemble
from pretrain import third_party
from pretrain.backbones import export_backbone
from pretrain.clip import against_classes, contrast
from pretrain.interop.openclip import load_open_clip
from pretrain.prompts import TEMPLATES
from pretrain.text import fresh_text, trim
from tests.conftest import save_open_clip

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "patch_size": None}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def unit_rows(n: int, d: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    return torch.nn.functional.normalize(x, dim=-1)


def test_all_classes_against_timms_losses():
    """Cross entropy of scaled cosines with smoothed, mixed targets, as ViFi-CLIP is trained."""
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    video, text = unit_rows(6, 5, 0), unit_rows(9, 5, 1)
    labels = torch.tensor([0, 8, 3, 3, 5, 1])
    hot = make_targets(labels, 9, 0.1).double()
    targets = 0.7 * hot + 0.3 * hot.flip(0)
    theirs = mixup_target(labels, 9, 0.7, 0.1).double()
    assert torch.allclose(targets, theirs, atol=1e-6)
    made = against_classes(video, text, torch.tensor(20.0), targets)
    expected = SoftTargetCrossEntropy()(20 * video @ text.T, targets)
    assert made.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    best = (video @ text.T).argmax(1)
    assert made.video_to_text.item() == pytest.approx((best == labels).double().mean().item())
    assert made.duplicates.item() == 1


def gradients_of(value: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_loss_and_gradients_are_those_of_open_clip(kind):
    video, text = unit_rows(7, 12, 0), unit_rows(7, 12, 1)
    scale = torch.tensor(14.0, dtype=torch.float64)
    bias = torch.tensor(-9.0 if kind == "siglip" else 0.0, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (video, text, scale, bias)]
    groups = torch.arange(7)
    ours = contrast(*inputs, groups, loss=kind, several_positives=False)
    if kind == "siglip":
        theirs = SigLipLoss()(video, text, scale, bias)
        wanted = inputs
    else:
        theirs = ClipLoss()(video, text, scale)
        wanted = inputs[:3]
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(gradients_of(ours.loss, wanted), gradients_of(theirs, wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def literal_several(video, text, scale, groups) -> torch.Tensor:
    """-log p averaged over the positives of each row, row by row, both ways."""
    total = 0.0
    for a, b in ((video, text), (text, video)):
        for i in range(len(a)):
            logits = scale * (b @ a[i])
            log_p = logits - logits.exp().sum().log()
            positives = [j for j in range(len(b)) if groups[j] == groups[i]]
            total = total - sum(log_p[j] for j in positives) / len(positives)
    return total / (2 * len(video))


def test_several_positives_against_a_literal_computation():
    video, text = unit_rows(6, 5, 0).requires_grad_(), unit_rows(6, 5, 1).requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([3, 1, 3, 2, 1, 3])
    zero = torch.zeros((), dtype=torch.float64)
    ours = contrast(video, text, scale, zero, groups, "infonce", True)
    theirs = literal_several(video, text, scale, groups.tolist())
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    inputs = [video, text, scale]
    for a, b in zip(gradients_of(ours.loss, inputs), gradients_of(theirs, inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    plain = contrast(video, text, scale, zero, groups, "infonce", False).loss.item()
    assert abs(plain - ours.loss.item()) > 1e-3
    apart = torch.arange(6)
    one = contrast(video, text, scale, zero, apart, "infonce", True).loss.item()
    assert one == pytest.approx(plain, rel=1e-12)


def test_several_positives_of_siglip_are_all_positive():
    video, text = unit_rows(4, 5, 0), unit_rows(4, 5, 1)
    scale, bias = torch.tensor(5.0), torch.tensor(-3.0)
    groups = torch.tensor([0, 0, 1, 2])
    logits = scale * video @ text.T + bias
    signs = torch.full((4, 4), -1.0)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3)):
        signs[i, j] = 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / 4
    ours = contrast(video, text, scale, bias, groups, "siglip", True)
    assert ours.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_is_watched():
    video = torch.eye(4)
    text = torch.eye(4)[[0, 1, 3, 2]]  # the last two are swapped
    groups = torch.tensor([5, 6, 7, 5])
    result = contrast(video, text, torch.tensor(10.0), torch.zeros(()), groups, "infonce", False)
    assert result.video_to_text == result.text_to_video == 0.5
    assert result.duplicates == 1
    # 2 of 4 pairs have similarity 1; of the 12 other pairs two are of one group and not counted.
    assert result.gap.item() == pytest.approx(0.5 - 2 / 10)


# ------------------------------------------------------------------- whole models of open_clip


@pytest.fixture(scope="module", params=["vit", "resnet", "vit-quickgelu"])
def saved(request, tmp_path_factory):
    """A small open_clip model with random weights, as a local folder, and the model itself."""
    config = {
        "embed_dim": 24, "vision_cfg": RESNET if request.param == "resnet" else VIT,
        "text_cfg": TEXT, "quick_gelu": request.param == "vit-quickgelu",
    }  # fmt: skip
    torch.manual_seed(3)
    model = open_clip.CLIP(**config).eval()
    for module in model.modules():  # statistics that are not those of a fresh network
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("open_clip")
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bicubic"}
    return save_open_clip(folder, model, config, preprocess), model


def random_frames(spec, frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, frames, spec.size, spec.size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_embeddings_are_those_of_open_clip(saved):
    name, theirs = saved
    ours = load_video_text(name)
    assert not any(part.training for part in ours.modules())
    spec = ours.video.input_spec
    assert spec.streams["rgb"].mean == (0.4, 0.5, 0.6)
    assert spec.streams["rgb"].interpolation == "bicubic"
    video = spec.normalise(random_frames(spec, 8))
    each = [theirs.encode_image(video[:, :, t]) for t in range(8)]
    expected = torch.nn.functional.normalize(torch.stack(each).mean(0), dim=-1)
    assert torch.allclose(ours.encode_video(video), expected, atol=1e-6)
    one = torch.nn.functional.normalize(theirs.encode_image(video[:, :, 0]), dim=-1)
    assert torch.allclose(ours.encode_video(video[:, :, :1].expand_as(video)), one, atol=1e-6)
    texts = ["a person sits down", "nods", "a man in a red shirt waves, in a kitchen"]
    tokens, cut = ours.text.tokenizer(texts)
    assert torch.equal(tokens, open_clip.SimpleTokenizer(context_length=16)(texts))
    assert cut == [False] * 3
    expected = theirs.encode_text(tokens, normalize=True)
    assert torch.allclose(ours.encode_text(tokens), expected, atol=1e-6)
    assert torch.allclose(ours.encode_text(trim(tokens, ours.text)), expected, atol=1e-6)
    assert ours.scale().item() == pytest.approx(theirs.logit_scale.exp().item())


@torch.no_grad()
def test_a_network_of_open_clip_is_the_image_tower(saved):
    """The same network by --network as by --video-tower: weights, and how pixels are seen."""
    name, _ = saved
    tower = load_video_text(name).video
    size = tower.input_spec.size
    network = build_model("frame_mean", network=name, frames=8, stride=8, size=size)
    assert network.input_spec == tower.input_spec
    clip = network.input_spec.normalise(random_frames(network.input_spec, 8))
    assert torch.equal(network(clip), tower(clip))


@torch.no_grad()
def test_zero_shot_head_is_that_of_open_clip(saved):
    name, theirs = saved
    ours = load_video_text(name)
    classes, templates = ["nods", "sits down", "waves"], TEMPLATES["openai_ucf101"]
    head = open_clip.build_zero_shot_classifier(
        theirs, open_clip.SimpleTokenizer(context_length=16), classes, templates,
        num_classes_per_batch=2
    )  # fmt: skip
    vectors, num_cut = class_vectors(ours, classes, templates, torch.device("cpu"), "fp32")
    assert vectors.shape == (48, 3, 24) and num_cut == 0
    assert torch.allclose(torch.from_numpy(ensemble(vectors)).T, head, atol=1e-6)


@torch.no_grad()
def test_an_exported_open_clip_pair_comes_back(saved, tmp_path):
    name, _ = saved
    ours = load_video_text(name).eval()
    export_backbone(ours, tmp_path / "backbone", {})
    again = load_video_text(str(tmp_path / "backbone")).eval()
    video = random_frames(ours.video.input_spec, 8)
    tokens = ours.text.tokenizer(["waves"] * 2)[0]
    for a, b in zip(ours(video, tokens), again(video, tokens), strict=True):
        assert torch.equal(a, b)
    tower = load_backbone(str(tmp_path / "backbone")).eval()
    clips = ours.video.input_spec.normalise(video)
    assert torch.equal(tower(clips), ours.video(clips))
    assert tower.forward_features(clips).shape == (2, 8, 24) and tower.grid == (8, 1, 1)


def test_a_file_of_weights_by_name(tmp_path, monkeypatch):
    (tmp_path / "tiny-test.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT})
    )
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    pair = load_open_clip(f"open_clip:tiny-test/{tmp_path}/weights.pt")
    assert pair.trained and pair.tokenizer is None
    assert torch.equal(pair.visual.conv1.weight, model.visual.conv1.weight)
    assert not load_open_clip("open_clip:tiny-test").trained
    with pytest.raises(ValueError, match="tag of tiny-test"):
        load_open_clip("open_clip:tiny-test/laion2b")
    with pytest.raises(ValueError, match="names no weights"):
        load_video_text("open_clip:tiny-test")
    with pytest.raises(ValueError, match=r"no model 'ViT-B-23'.*did you mean.*ViT-B-32"):
        load_open_clip("open_clip:ViT-B-23/openai")
    with pytest.raises(ValueError, match="open_clip cannot load"):
        load_open_clip(f"open_clip:local-dir:{tmp_path}/nothing")


def test_openai_weights_get_their_activation(monkeypatch):
    """open_clip only warns if the tag wants QuickGELU and the name does not say so."""
    made = {}

    def create(model, **options):
        made.update(options, model=model)
        raise RuntimeError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(third_party, "hub_answers", lambda _: True)
    with pytest.raises(ValueError, match="stop here"):
        load_open_clip("open_clip:ViT-B-32/openai")
    assert (
        made["force_quick_gelu"] and made["pretrained"] == "openai" and made["require_pretrained"]
    )
    with pytest.raises(ValueError, match="stop here"):
        load_open_clip("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert not made["force_quick_gelu"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_trimmed_captions_give_the_same_numbers_and_gradients(mode):
    torch.manual_seed(0)
    text = fresh_text("ti", 16).train(mode == "train")
    tokens = text.tokenizer(["a person sits down", "nods"])[0]
    short = trim(tokens, text)
    assert short.shape == (2, 6) and tokens.shape == (2, 77)
    gradients = []
    for rows in (tokens, short):
        text.zero_grad()
        text(rows).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in text.named_parameters()})
    assert torch.allclose(text(tokens), text(short), atol=1e-5)
    for name, grad in gradients[0].items():
        scale = grad.abs().max().clamp(min=1e-6)
        assert ((grad - gradients[1][name]).abs().max() / scale) < 1e-4, name
