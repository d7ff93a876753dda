"""ViViT and Video Swin against transformers', torchvision's, timm's and the papers' equations."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from downstream.models import build_model
from downstream.models.video_swin import VideoSwin, convert_swin
from downstream.models.vivit import ViViT, start_from_image
from pretrain.weights import load_strict
from tests.conftest import save_open_clip


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item() < tolerance


def excite(module: nn.Module) -> nn.Module:
    """Away from the start, where zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    for value in module.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return module


# -------------------------------------------------------------------------------------------- ViViT


def through(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Tokens after the blocks of a ViViT that lets all attend to all."""
    for block in blocks:
        x = block(x, None, "joint")
    return x


def vivit(model: int, **changes) -> ViViT:
    small = {
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "temporal_depth": 2,
        "frames": 4,
        "size": 32,
        "patch": 16,
        "class_token": model < 3,
    }
    torch.manual_seed(0)
    return excite(ViViT(model, **small | changes))


@pytest.mark.parametrize("training", [False, True])
def test_model_1_is_transformers(training):
    from transformers import VivitConfig, VivitModel

    config = VivitConfig(
        image_size=32, num_frames=4, tubelet_size=[2, 16, 16], hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = VivitModel(config, add_pooling_layer=False)
    ours = vivit(1)
    state = {
        "embeddings.cls_token": ours.cls_token, "embeddings.position_embeddings": ours.pos_embed,
        "embeddings.patch_embeddings.projection.weight": ours.patch_embed.weight,
        "embeddings.patch_embeddings.projection.bias": ours.patch_embed.bias,
        "layernorm.weight": ours.norm.weight, "layernorm.bias": ours.norm.bias,
    }  # fmt: skip
    own = theirs.state_dict()
    layer_prefix = (
        "encoder.layer." if any(k.startswith("encoder.layer.") for k in own) else "layers."
    )
    names = {}
    for i, block in enumerate(ours.blocks):
        parts = {"weight": block.attn.qkv.weight.chunk(3), "bias": block.attn.qkv.bias.chunk(3)}
        where = f"{layer_prefix}{i}."
        for kind in ("weight", "bias"):
            for name, value in zip(("query", "key", "value"), parts[kind], strict=True):
                names[where, name, kind] = value
            names[where, "attn_out", kind] = getattr(block.attn.proj, kind)
            names[where, "before", kind] = getattr(block.norm1, kind)
            names[where, "after", kind] = getattr(block.norm2, kind)
            names[where, "fc1", kind] = getattr(block.mlp["fc1"], kind)
            names[where, "fc2", kind] = getattr(block.mlp["fc2"], kind)
    for key in own:
        if not key.startswith(layer_prefix):
            continue
        number = key[len(layer_prefix) :].split(".")[0]
        rest, _, kind = key[len(f"{layer_prefix}{number}.") :].rpartition(".")
        role = next(
            role
            for role, marks in {
                "query": ("query", "q_proj"), "key": ("key", "k_proj"),
                "value": ("value", "v_proj"),
                "attn_out": ("attention.output", "o_proj", "out_proj"),
                "before": ("layernorm_before",), "after": ("layernorm_after",),
                "fc1": ("intermediate", "fc1"), "fc2": ("output.dense", "fc2"),
            }.items()
            if any(mark in rest for mark in marks)
        )  # fmt: skip
        state[key] = names[f"{layer_prefix}{number}.", role, kind]
    load_strict(theirs, {k: v.detach().clone() for k, v in state.items()}, "ours")
    ours.train(training)
    theirs.train(training)
    video = torch.randn(2, 3, 4, 32, 32)
    tokens, token = ours.encode_all(video)
    expected = theirs(pixel_values=video.transpose(1, 2)).last_hidden_state
    assert close(torch.cat([token[:, None], tokens], 1), expected)
    assert torch.equal(ours(video), token) and torch.equal(ours.forward_features(video), tokens)
    if training:
        weight = torch.randn_like(expected)
        (torch.cat([token[:, None], tokens], 1) * weight).sum().backward()
        (expected * weight).sum().backward()
        gradients = dict(theirs.named_parameters())
        assert close(
            ours.patch_embed.weight.grad,
            gradients["embeddings.patch_embeddings.projection.weight"].grad,
            1e-4,
        )
        assert close(ours.pos_embed.grad, gradients["embeddings.position_embeddings"].grad, 1e-4)


def literal_attention(
    x: torch.Tensor, attention: nn.Module, groups: list[list[int]], heads: range
) -> torch.Tensor:
    """Softmax attention of one clip (N, D), token by token: each attends to the tokens of its
    group.
    """
    d = x.shape[1] // attention.heads
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = qkv.chunk(3, 1)
    out = torch.zeros_like(q)
    for h in heads:
        part = slice(h * d, (h + 1) * d)
        for group in groups:
            for i in group:
                scores = torch.stack([q[i, part] @ k[j, part] / d**0.5 for j in group]).softmax(0)
                out[i, part] = sum(s * v[j, part] for s, j in zip(scores, group, strict=True))
    return out


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * layer.weight + layer.bias


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def embed(model: ViViT, clip: torch.Tensor) -> torch.Tensor:
    """Tubelets of one clip (3, T, H, W), one after the other: (N, D) in t, h, w order."""
    tubelet, patch = model.arguments["tubelet"], model.arguments["patch"]
    rows = []
    for t in range(0, clip.shape[1], tubelet):
        for y in range(0, clip.shape[2], patch):
            for x in range(0, clip.shape[3], patch):
                cut = clip[:, t : t + tubelet, y : y + patch, x : x + patch]
                rows.append(
                    (model.patch_embed.weight * cut).sum((1, 2, 3, 4)) + model.patch_embed.bias
                )
    return torch.stack(rows)


def mlp(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    hidden = gelu_tanh(norm(x, block.norm2) @ block.mlp["fc1"].weight.T + block.mlp["fc1"].bias)
    return x + hidden @ block.mlp["fc2"].weight.T + block.mlp["fc2"].bias


@pytest.mark.parametrize("number", [1, 3, 4])
def test_joint_and_factorised_attention_are_their_equations(number):
    model = vivit(number, class_token=False).eval()
    video = torch.randn(1, 3, 4, 32, 32)
    slots, places, heads = 2, 4, range(2)
    space = [[t * places + p for p in range(places)] for t in range(slots)]
    time = [[t * places + p for t in range(slots)] for p in range(places)]
    with torch.no_grad():
        x = embed(model, video[0]) + model.pos_embed[0]
        for block in model.blocks:
            project = lambda y, a: y @ a.proj.weight.T + a.proj.bias
            if number == 1:
                x = x + project(
                    literal_attention(norm(x, block.norm1), block.attn, [list(range(8))], heads),
                    block.attn,
                )
            elif number == 3:
                x = x + project(
                    literal_attention(norm(x, block.norm1), block.attn, space, heads), block.attn
                )
                y = literal_attention(norm(x, block.norm_time), block.attn_time, time, heads)
                x = x + project(y, block.attn_time)
            else:
                y = norm(x, block.norm1)
                both = literal_attention(y, block.attn, space, range(1)) + literal_attention(
                    y, block.attn, time, range(1, 2)
                )
                x = x + project(both, block.attn)
            x = mlp(x, block)
        x = norm(x, model.norm)
        assert close(model.forward_features(video)[0], x)
        assert close(model(video)[0], x.mean(0))


@pytest.mark.parametrize("class_token", [False, True])
def test_factorised_encoder_is_its_equations(class_token):
    model = vivit(2, class_token=class_token).eval()
    video = torch.randn(1, 3, 4, 32, 32)

    def encode(x, blocks, last):
        group, project = [list(range(len(x)))], lambda y, a: y @ a.proj.weight.T + a.proj.bias
        for block in blocks:
            x = mlp(
                x
                + project(
                    literal_attention(norm(x, block.norm1), block.attn, group, range(2)), block.attn
                ),
                block,
            )
        return norm(x, last)

    with torch.no_grad():
        slots = []
        for t in range(2):
            x = embed(model, video[0, :, 2 * t : 2 * t + 2])
            x = torch.cat([model.cls_token[0], x]) if class_token else x
            x = encode(x + model.pos_embed[0], model.blocks, model.norm)
            slots.append(x[0] if class_token else x.mean(0))
        x = torch.stack(slots)
        x = torch.cat([model.time_token[0], x]) if class_token else x
        x = encode(x + model.time_pos_embed[0], model.time_blocks, model.time_norm)
        assert close(model(video)[0], x[0] if class_token else x.mean(0))
        assert close(model.forward_features(video)[0], x[1:] if class_token else x)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_vivit_starts_from_an_image_vit(number):
    """Central-frame start: the 2-D embedding of the middle frame; of a still clip, what the image
    ViT says.
    """
    torch.manual_seed(0)
    image = excite(
        timm.models.VisionTransformer(32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    ).eval()
    model = vivit(number, activation="gelu")
    fresh = ViViT(**model.arguments)
    for start in ("central", "average"):
        load_strict(fresh, start_from_image(image.state_dict(), fresh, start), "timm")
        video = torch.randn(2, 3, 4, 32, 32)
        with torch.no_grad():
            tokens = fresh.patch_embed(video)
            for t in range(2):
                seen = (
                    video[:, :, 2 * t + 1]
                    if start == "central"
                    else video[:, :, 2 * t : 2 * t + 2].mean(2)
                )
                assert close(tokens[:, :, t], image.patch_embed.proj(seen))
            if number in (2, 3):  # slots do not see each other at first: each is the image ViT's
                still = video[:, :, :1].expand(-1, -1, 4, -1, -1)
                expected = image.forward_features(still[:, :, 0])
                if number == 2:
                    x = fresh.patch_embed(still).flatten(3).permute(0, 2, 3, 1)[:, 0]
                    x = torch.cat([fresh.cls_token.expand(2, -1, -1), x], 1) + fresh.pos_embed
                    assert close(fresh.norm(through(fresh.blocks, x)), expected, 1e-4)
                else:
                    image_no_class = timm.models.VisionTransformer(
                        32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=0,
                        class_token=False, global_pool="avg", final_norm=True, fc_norm=False,
                    ).eval()  # fmt: skip
                    state = {k: v for k, v in image.state_dict().items() if k != "cls_token"}
                    load_strict(
                        image_no_class, state | {"pos_embed": state["pos_embed"][:, 1:]}, "timm"
                    )
                    first = fresh.eval().forward_features(still)[:, :4]
                    assert close(first, image_no_class.forward_features(still[:, :, 0]), 1e-4)
    with pytest.raises(ValueError, match="this ViViT has"):
        start_from_image(
            timm.models.VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2).state_dict(),
            fresh,
            "central",
        )


# --------------------------------------------------------------------------------------- Video Swin


def small_torchvision(window=(8, 7, 7)):
    return torchvision.models.video.SwinTransformer3d(
        [2, 4, 4],
        32,
        [1, 1, 2, 1],
        [1, 2, 4, 8],
        list(window),
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


@pytest.mark.parametrize(
    ("frames", "size", "window"), [(4, 32, (8, 7, 7)), (18, 64, (8, 7, 7)), (6, 72, (2, 3, 3))]
)
@pytest.mark.parametrize("training", [False, True])
def test_video_swin_is_torchvisions(frames, size, window, training):
    """Clips smaller than a window, windows that shift, and sizes that have to be padded."""
    torch.manual_seed(0)
    theirs = excite(small_torchvision(window)).train(training)
    ours = VideoSwin("xs", window, frames=frames, size=size).train(training)
    state, head = convert_swin(theirs.state_dict(), ours)
    load_strict(ours, state, "torchvision")
    video = torch.randn(2, 3, frames, size, size)
    a, b = F.linear(ours(video), head["weight"], head["bias"]), theirs(video)
    assert close(a, b)
    assert ours.forward_features(video).shape[1] == ours.grid[0] * ours.grid[1] * ours.grid[2]
    if training:
        a.square().sum().backward()
        b.square().sum().backward()
        expected = {k: p.grad for k, p in theirs.named_parameters() if not k.startswith("head")}
        found = {k: p.grad for k, p in ours.named_parameters()}
        assert found.keys() == expected.keys() and all(
            close(found[k], expected[k], 1e-3) for k in found
        )


def authors_layout(state: dict) -> dict:
    """torchvision's names to those of the authors' checkpoints, buffers of theirs included."""
    theirs = {}
    for key, value in state.items():
        if key.startswith("features."):
            _, stage, rest = key.split(".", 2)
            stage = int(stage)
            if stage % 2:
                key = f"layers.{stage // 2}.downsample.{rest}"
            else:
                key = f"layers.{stage // 2}.blocks.{rest}".replace("mlp.0", "mlp.fc1").replace(
                    "mlp.3", "mlp.fc2"
                )
        elif key.startswith("head."):
            key = key.replace("head.", "cls_head.fc_cls.")
        theirs[key if key.startswith("cls_head") else f"backbone.{key}"] = value
    theirs["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    return theirs


def test_the_authors_layout_is_known(tmp_path):
    torch.manual_seed(0)
    theirs = excite(small_torchvision()).eval()
    torch.save({"state_dict": authors_layout(theirs.state_dict())}, tmp_path / "swin.pth")
    ours = build_model(
        "video_swin_t", variant="xs", frames=4, size=32, weights=str(tmp_path / "swin.pth")
    ).eval()
    video = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert close(theirs.head(ours(video)), theirs(video))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize(("window", "size"), [(2, 64), (4, 128)])
def test_an_image_swin_is_inflated(library, window, size):
    """Where maps are whole numbers of windows, a static clip gives the image network's output.

    (Elsewhere the two differ by their design: torchvision's image Swin pads small maps up to a
    window and attends to the padding, Video Swin shrinks the window.)
    """
    torch.manual_seed(0)
    if library == "torchvision":
        image = torchvision.models.SwinTransformer(
            [4, 4], 32, [1, 1, 2, 1], [1, 2, 4, 8], [window] * 2, num_classes=3
        )
        features = lambda x: image.norm(image.features(x)).mean((1, 2))
    else:
        image = timm.models.SwinTransformer(
            size,
            4,
            embed_dim=32,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            window_size=window,
            num_classes=0,
        )
        features = lambda x: image.forward_features(x).mean((1, 2))
    excite(image).eval()
    pictures = torch.randn(2, 3, size, size)
    still = pictures.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        expected = features(pictures)
        for model, clip in (
            (
                VideoSwin("xs", (1, window, window), (1, 4, 4), frames=1, size=size),
                pictures.unsqueeze(2),
            ),
            # Repeated over time, tables do not tell slots apart: every slot of a still clip is the
            # image's.
            (VideoSwin("xs", (2, window, window), frames=4, size=size), still),
        ):
            state, _ = convert_swin(image.state_dict(), model)
            load_strict(model, state, library)
            assert close(model.eval()(clip), expected, 1e-4)
        wider = VideoSwin("xs", (8, 5, 5), frames=4, size=size).eval()
        state, _ = convert_swin(image.state_dict(), wider)  # tables are resized
        load_strict(wider, state, library)
        assert torch.isfinite(wider(still)).all()


def test_recomputing_saves_memory_and_changes_nothing():
    for name in ("vivit_3", "video_swin_t"):
        changes = (
            {"variant": "xs"}
            if "swin" in name
            else {"dim": 16, "depth": 2, "heads": 2, "patch": 16}
        )
        grads = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = build_model(name, frames=4, size=32, recompute=recompute, **changes).train()
            torch.manual_seed(1)
            model(torch.ones(2, 3, 4, 32, 32) * torch.linspace(-1, 1, 32)).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_an_open_clip_tower_starts_a_vivit(tmp_path, quick_gelu):
    """Every slot of a still clip is encoded as open_clip's image tower encodes the picture."""
    import open_clip

    name, model = small_open_clip(tmp_path, quick_gelu)
    still = torch.randn(2, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        expected = model.visual(still[:, :, 0])
    assert isinstance(model.visual, open_clip.transformer.VisionTransformer)
    for number in (1, 2, 3, 4):
        ours = build_model(f"vivit_{number}", weights=name, frames=4, temporal_depth=1).eval()
        assert ours.arguments["activation"] == ("quick_gelu" if quick_gelu else "gelu")
        assert ours.input_spec.streams["rgb"].mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
        assert (ours.arguments["heads"], ours.arguments["eps"]) == (2, 1e-5)
        assert ours.forward(still).isfinite().all()
        rebuilt = ViViT(**ours.arguments)
        load_strict(rebuilt, ours.state_dict(), "itself")
    two = build_model("vivit_2", weights=name, frames=4, temporal_depth=1).eval()
    with torch.no_grad():
        x = two.patch_embed(still).flatten(3).permute(0, 2, 3, 1)[:, 0]
        x = torch.cat([two.cls_token.expand(2, -1, -1), x], 1) + two.pos_embed
        ours = two.norm(through(two.blocks, two.norm_pre(x)))[:, 0]
        assert close(ours @ model.visual.proj, expected, 1e-4)
    with pytest.raises(ValueError, match="own ViT"):
        build_model("vivit_1", weights="open_clip:RN50")


def small_open_clip(folder, quick_gelu):
    """A small random pair in open_clip's own folder layout: its name, and the model."""
    import open_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16,
                       "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2,
                     "layers": 1},
        "quick_gelu": quick_gelu,
    }  # fmt: skip
    model = excite(open_clip.CustomTextCLIP(**config)).eval()
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return save_open_clip(folder, model, config, preprocess), model


def test_timms_own_vits_start_a_vivit(monkeypatch):
    """Blocks, activation and pixels come from the network itself, a CLIP-like one with its norm in
    front included.
    """
    nets = {
        "plain": {"num_heads": 4},
        "clip": {"num_heads": 2, "pre_norm": True, "act_layer": timm.layers.QuickGELU},
        "no_class": {"num_heads": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
    }

    def create(name, pretrained):
        assert pretrained
        net = timm.models.VisionTransformer(
            32, 8, embed_dim=16, depth=3, num_classes=5, **nets[name]
        )
        net.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        return excite(net).eval()

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(timm, "is_model", nets.__contains__)
    for name, about in nets.items():
        torch.manual_seed(0)
        ours = build_model("vivit_2", weights=f"timm:{name}", frames=4).eval()
        torch.manual_seed(0)
        net = create(name, True)
        assert (ours.arguments["heads"], ours.arguments["depth"]) == (about["num_heads"], 3)
        assert ours.input_spec.streams["rgb"].mean == (0.1, 0.2, 0.3)
        still = torch.randn(2, 3, 1, 32, 32).expand(-1, -1, 4, -1, -1)
        with torch.no_grad():
            x = ours.patch_embed(still).flatten(3).permute(0, 2, 3, 1)[:, 0]
            if ours.cls_token is not None:
                x = torch.cat([ours.cls_token.expand(2, -1, -1), x], 1)
            x = x + ours.pos_embed
            x = x if ours.norm_pre is None else ours.norm_pre(x)
            x = ours.norm(through(ours.blocks, x))
            assert close(x, net.forward_features(still[:, :, 0]), 1e-4)


def test_a_file_of_an_image_vit_starts_a_vivit(tmp_path):
    image = timm.models.VisionTransformer(32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=7)
    torch.save(image.state_dict(), tmp_path / "vit.pth")
    small = {
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "temporal_depth": 1,
        "frames": 4,
        "size": 32,
        "activation": "gelu",
    }
    for number in (1, 2, 3, 4):
        model = build_model(f"vivit_{number}", weights=str(tmp_path / "vit.pth"), **small)
        assert torch.equal(model.blocks[1].attn.qkv.weight, image.blocks[1].attn.qkv.weight)
        assert torch.equal(model.patch_embed.weight[:, :, 1], image.patch_embed.proj.weight)
        assert not model.patch_embed.weight[:, :, 0].any()
    derived = build_model("vivit_2", weights=str(tmp_path / "vit.pth"), frames=4)
    assert {k: derived.arguments[k] for k in ("dim", "depth", "heads", "size", "activation")} == {
        "dim": 16, "depth": 2, "heads": 1, "size": 32, "activation": "gelu",
    }  # fmt: skip
    with pytest.raises(ValueError, match="image ViT"):
        save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
        build_model("vivit_1", weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="no such file"):
        build_model("video_swin_t", variant="xs", weights=str(tmp_path / "none.pth"))
