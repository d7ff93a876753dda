"""Weights between ours, official VideoMAE's layout and Hugging Face's: exact, strict, verified."""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from downstream.classifier import Classifier
from downstream.features import finish_means
from downstream.models import build_model, load_backbone, load_classifier
from pretrain import flags, third_party
from pretrain.backbones import export_backbone, load_pretrained_videomae
from pretrain.checkpoint import weights_of
from pretrain.interop import videomae as interop_videomae
from pretrain.interop.hugging_face import from_hf, to_hf
from pretrain.interop.layouts import Sizes, arguments_of, assemble
from pretrain.interop.official import from_official, to_official
from pretrain.interop.videomae import import_videomae, load_videomae, verify
from pretrain.log import cli
from pretrain.saving import Saver
from pretrain.settings import Machine
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer
from recipes import videomae
from recipes.convert import Config, main
from tests.recipes.runs import equal

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def trained(whole: bool = True, **arguments) -> VideoMAE | VideoTransformer:
    """A tiny model in which every weight matters, as after training."""
    encoder = VideoTransformer(
        **{"dim": 48, "depth": 2, "heads": 3, "frames": 4, "size": 16, "patch": 8, **arguments}
    )
    model = VideoMAE(encoder, 36, 1, 2) if whole else encoder
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise if "norm" in name and name.endswith("weight") else noise
    return model


def official(whole: bool = True, **arguments) -> dict:
    model = trained(whole, **arguments)
    return to_official(model.state_dict(), arguments_of(model))


def hf(whole: bool = True, **arguments) -> tuple[dict, dict]:
    model = trained(whole, **arguments)
    return to_hf(model.state_dict(), arguments_of(model))


def write_hf(folder: Path, state: dict, config: dict) -> str:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return f"hf:{folder}"


# Round trips


@pytest.mark.parametrize("whole", [True, False], ids=["videomae", "encoder"])
def test_round_trips_are_exact(whole):
    model = trained(whole, stride=2, mean=MEAN, std=STD)
    state, arguments = model.state_dict(), arguments_of(model)
    for back in (from_official(to_official(state, arguments)), from_hf(*to_hf(state, arguments))):
        assert equal(back[0], state)
        assert back[1] == arguments
        assert back[2] == []
    assert equal(assemble(back[0], back[1]).state_dict(), state)


def test_the_epsilon_of_the_targets_is_kept(monkeypatch):
    model = VideoMAE(trained(whole=False), 36, 1, 2, target_eps=0.02)
    state, arguments = model.state_dict(), arguments_of(model)
    for back in (from_official(to_official(state, arguments)), from_hf(*to_hf(state, arguments))):
        assert back[1]["decoder"]["target_eps"] == 0.02
    # transformers has no such target: the losses differ, the reconstructions may not.
    assert verify(model) < 1e-5
    other = to_hf(state | {"head.bias": state["head.bias"] + 0.01}, arguments)
    monkeypatch.setattr(interop_videomae, "to_hf", lambda *_: other)
    with pytest.raises(ValueError, match="differs"):
        verify(model)


def test_official_names_are_those_of_its_checkpoints():
    state = official()["model"]
    block = {
        "norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight",
        "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight",
        "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    }  # fmt: skip
    stacks = ("encoder.blocks.0.", "encoder.blocks.1.", "decoder.blocks.0.")
    outside = {
        "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder.norm.weight",
        "encoder.norm.bias", "encoder_to_decoder.weight", "mask_token", "decoder.norm.weight",
        "decoder.norm.bias", "decoder.head.weight", "decoder.head.bias",
    }  # fmt: skip
    assert state.keys() == outside | {stack + name for stack in stacks for name in block}
    assert state["encoder.patch_embed.proj.weight"].shape == (48, 3, 2, 8, 8)


def test_the_linear_patch_embedding_is_the_conv3d():
    model = trained(whole=False)
    state = official(whole=False)["model"]
    clip = torch.randn(2, 3, 4, 16, 16)
    expected = torch.nn.functional.conv3d(
        clip,
        state["encoder.patch_embed.proj.weight"],
        state["encoder.patch_embed.proj.bias"],
        stride=(2, 8, 8),
    )
    model.blocks, model.norm = torch.nn.ModuleList(), torch.nn.Identity()
    tokens = model.forward_features(clip) - model.pos_embed
    assert torch.allclose(tokens, expected.flatten(2).transpose(1, 2), atol=1e-5)


def test_transformers_reads_what_we_write(tmp_path):
    """Its own from_pretrained finds every weight, and the outputs agree."""
    from transformers import VideoMAEForPreTraining, VideoMAEModel

    for whole, kind in ((True, VideoMAEForPreTraining), (False, VideoMAEModel)):
        model = trained(whole)
        folder = write_hf(tmp_path / str(whole), *hf(whole))[3:]
        theirs, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        encoder = model.encoder if whole else model
        clip = torch.randn(1, 3, 4, 16, 16)
        tokens = (theirs.videomae if whole else theirs)(clip.transpose(1, 2)).last_hidden_state
        assert torch.allclose(encoder.forward_features(clip), tokens, atol=1e-5)


def test_we_read_what_transformers_writes(tmp_path):
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    theirs = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=32, patch_size=8, num_frames=4, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=256, use_mean_pooling=False,
            decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=128,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    model, report = import_videomae(f"hf:{tmp_path / 'theirs'}")
    # Their default epsilon is 1e-12: it is kept for the comparison and found harmless.
    assert report["max_difference"] < 1e-4
    assert report["dropped"] == [k for k in theirs.state_dict() if k.endswith("key.bias")]
    video = torch.from_numpy(
        np.random.default_rng(0).integers(256, size=(1, 3, 4, 32, 32), dtype=np.uint8)
    )
    index = torch.randperm(32)[None]
    visible, masked = index[:, :12].sort().values, index[:, 12:].sort().values
    mask = torch.zeros(1, 32, dtype=torch.bool).scatter(1, masked, True)
    pixels = model.encoder.input_spec.normalise(video).transpose(1, 2)
    assert torch.allclose(model(video, visible, masked)[0], theirs(pixels, mask).loss, atol=1e-5)


# Dialects and wrappings


def older_names(state: dict, dialect: str) -> dict:
    """The same weights as transformers 4 or 5.17 wrote them."""
    if dialect == "4":
        return {
            k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v
            for k, v in state.items()
        }
    keys = {
        k.replace("query", "key"): torch.zeros_like(v)
        for k, v in state.items()
        if "query.bias" in k
    }
    return state | keys


@pytest.mark.parametrize("dialect", ["4", "5.17"])
@pytest.mark.parametrize("whole", [True, False], ids=["videomae", "encoder"])
def test_older_hugging_face_names(dialect, whole):
    state, config = hf(whole)
    ours, _, dropped = from_hf(older_names(state, dialect), config)
    assert equal(ours, trained(whole).state_dict())
    assert len(dropped) == {"4": 0, "5.17": 3 if whole else 2}[dialect]
    assert all(name.endswith("attention.attention.key.bias") for name in dropped)


@pytest.mark.parametrize("wrapper", ["model", "module", None])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_official_files(wrapper, prefix):
    content = official()
    state = {prefix + k: v for k, v in content["model"].items()}
    content = {wrapper: state, "epoch": 799} if wrapper else state
    ours, arguments, _ = from_official(content, Sizes(4, 16, 3, 2))
    assert equal(ours, trained().state_dict())
    assert arguments == arguments_of(trained())


def test_encoder_without_its_prefix_and_a_class_head_dropped_by_name():
    content = official(whole=False)
    state = {k.removeprefix("encoder."): v for k, v in content["model"].items()}
    content["model"] = state | {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}
    ours, _, dropped = from_official(content)
    assert equal(ours, trained(whole=False).state_dict())
    assert dropped == ["head.weight", "head.bias"]


def test_half_precision_is_read_as_float32():
    content = official()
    content["model"] = {k: v.half() for k, v in content["model"].items()}
    ours, _, _ = from_official(content)
    assert all(v.dtype == torch.float32 for v in ours.values())
    assert torch.equal(ours["head.weight"], trained().head.weight.half().float())


def test_published_widths_and_defaults():
    """What an official file does not say: heads by width, 16 frames, 224 pixels, stride 4."""
    model = VideoMAE(VideoTransformer(384, 1, 6), 192, 1, 3)
    content = {"model": to_official(model.state_dict(), arguments_of(model))["model"]}
    _, arguments, _ = from_official(content)
    assert arguments == arguments_of(model)
    content["args"] = argparse.Namespace(num_frames=8, input_size=112, sampling_rate=2, lr=0.1)
    encoder = from_official(content)[1]["encoder"]
    assert (encoder["frames"], encoder["size"], encoder["stride"]) == (8, 112, 2)
    encoder = from_official(content, Sizes(32, 64, 12))[1]["encoder"]
    assert (encoder["frames"], encoder["size"], encoder["heads"]) == (32, 64, 12)


# Refusals: each names what is wrong

FIRST = "encoder.blocks.0.attn."
HF_FIRST = "videomae.encoder.layer.0.attention.attention."


def without(state: dict, key: str) -> None:
    del state[key]


def put(state: dict, key: str, value: torch.Tensor) -> None:
    state[key] = value


OFFICIAL_FAULTS = {
    "missing": (lambda s: s.pop(FIRST + "q_bias"), "missing encoder.blocks.0.attn.q_bias"),
    "missing in the decoder": (
        lambda s: s.pop("decoder.norm.bias"),
        "missing decoder.norm.bias",
    ),
    "missing mask token": (lambda s: s.pop("mask_token"), "missing mask_token"),
    "missing norm": (lambda s: s.pop("encoder.norm.weight"), "missing encoder.norm.weight"),
    "no patch embedding": (
        lambda s: s.pop("encoder.patch_embed.proj.weight"),
        r"encoder.patch_embed.proj.weight is missing",
    ),
    "no blocks at all": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.blocks.")],
        r"missing encoder\.blocks\.0\.",
    ),
    "a block in the middle": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.blocks.0.")],
        r"missing encoder\.blocks\.0\..*left over encoder\.blocks\.1\.",
    ),
    "left over": (
        lambda s: s.update({"encoder.pos_embed": torch.ones(1, 8, 48)}),
        "left over encoder.pos_embed",
    ),
    "layer scale": (
        lambda s: s.update({"encoder.blocks.1.gamma_1": torch.ones(48)}),
        "left over encoder.blocks.1.gamma_1",
    ),
    "shape": (
        lambda s: s.update({"encoder.blocks.1.mlp.fc1.weight": torch.ones(190, 48)}),
        r"encoder.blocks.1.mlp.fc1.weight is \(190, 48\), expected \(192, 48\)",
    ),
    "transposed": (
        lambda s: s.update({"encoder_to_decoder.weight": s["encoder_to_decoder.weight"].T}),
        r"encoder_to_decoder.weight is \(48, 36\)",
    ),
    "grey input": (
        lambda s: s.update({"encoder.patch_embed.proj.weight": torch.ones(48, 1, 2, 8, 8)}),
        r"patch_embed.proj.weight is \(48, 1, 2, 8, 8\)",
    ),
    "zeroed q_bias": (
        lambda s: s[FIRST + "q_bias"].zero_(),
        "encoder.blocks.0.attn.q_bias: all zeros",
    ),
    "zeroed v_bias in the decoder": (
        lambda s: s["decoder.blocks.0.attn.v_bias"].zero_(),
        "decoder.blocks.0.attn.v_bias: all zeros",
    ),
    "zeroed matrix": (
        lambda s: s["encoder_to_decoder.weight"].zero_(),
        "encoder_to_decoder.weight: all zeros",
    ),
    "not a number": (
        lambda s: s["decoder.head.bias"].__setitem__(3, math.nan),
        "decoder.head.bias holds values that are not finite",
    ),
    "integers": (
        lambda s: s.update({"mask_token": torch.ones(1, 1, 36, dtype=torch.int8)}),
        "mask_token is torch.int8",
    ),
    "sparse": (
        lambda s: s.update({"decoder.head.weight": s["decoder.head.weight"].to_sparse()}),
        "decoder.head.weight is not a dense tensor",
    ),
    "not a tensor": (lambda s: s.update({"mask_token": "x"}), "mask_token is not a dense tensor"),
    "twice": (
        lambda s: s.update({"module.mask_token": s["mask_token"]}),
        "'mask_token' is there twice",
    ),
    "two last norms": (
        lambda s: s.update({"fc_norm.weight": torch.ones(48), "fc_norm.bias": torch.ones(48)}),
        "left over encoder.norm|tokens have no norm",
    ),
}


@pytest.mark.parametrize("fault", OFFICIAL_FAULTS)
def test_faulty_official_files_are_refused_by_name(fault):
    content = official()
    from_official(content)  # sound before
    spoil, message = OFFICIAL_FAULTS[fault]
    content["model"] = {k: v.clone() for k, v in content["model"].items()}
    spoil(content["model"])
    with pytest.raises(ValueError, match=message):
        from_official(content)


HF_FAULTS = {
    "missing": (lambda s, c: s.pop(HF_FIRST + "value.bias"), f"missing {HF_FIRST}value.bias"),
    "missing key": (lambda s, c: s.pop(HF_FIRST + "key.weight"), f"missing {HF_FIRST}key.weight"),
    "missing query": (lambda s, c: s.pop(HF_FIRST + "query.weight"), f"missing {HF_FIRST}qkv"),
    "left over": (
        lambda s, c: s.update({"videomae.embeddings.cls_token": torch.ones(1, 1, 48)}),
        "left over videomae.embeddings.cls_token",
    ),
    "key bias": (
        lambda s, c: s.update({HF_FIRST + "key.bias": torch.full((48,), 1e-3)}),
        f"{HF_FIRST}key.bias is not zero",
    ),
    "both dialects": (
        lambda s, c: s.update({HF_FIRST + "q_bias": torch.ones(48)}),
        "same weight twice",
    ),
    "shape": (
        lambda s, c: s.update({HF_FIRST + "key.weight": torch.ones(40, 48)}),
        r"qkv.weight is \(136, 48\), expected \(144, 48\)",
    ),
    "zeroed query bias": (
        lambda s, c: s[HF_FIRST + "query.bias"].zero_(),
        f"{HF_FIRST}query.bias: all zeros",
    ),
    "mean pooling": (
        lambda s, c: [s.pop(k) for k in list(s) if k.startswith("videomae.layernorm")],
        "no norm after its blocks",
    ),
    "mean pooling in the config": (
        lambda s, c: c.update(use_mean_pooling=True),
        "no norm after its blocks",
    ),
    "another model": (lambda s, c: c.update(model_type="vit_mae"), "'vit_mae'"),
    "fewer layers": (
        lambda s, c: c.update(num_hidden_layers=3),
        "num_hidden_layers 3 where these weights need 2",
    ),
    "activation": (lambda s, c: c.update(hidden_act="relu"), "hidden_act 'relu'"),
    "dropout": (lambda s, c: c.update(hidden_dropout_prob=0.1), "hidden_dropout_prob 0.1"),
    "plain pixels": (lambda s, c: c.update(norm_pix_loss=False), "norm_pix_loss False"),
    "a default that is not ours": (
        lambda s, c: c.pop("decoder_num_hidden_layers"),
        "decoder_num_hidden_layers 4 where these weights need 1",
    ),
    "heads that do not divide": (lambda s, c: c.update(num_attention_heads=5), "5 attention heads"),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_faulty_hugging_face_weights_are_refused_by_name(fault):
    state, config = hf()
    from_hf(state, config)  # sound before
    spoil, message = HF_FAULTS[fault]
    state = {k: v.clone() for k, v in state.items()}
    spoil(state, config)
    with pytest.raises(ValueError, match=message):
        from_hf(state, config)


def test_sixteen_heads_of_the_hugging_face_converter_are_refused():
    model = VideoTransformer(384, 1, 6, frames=2, size=16)
    state, config = to_hf(model.state_dict(), arguments_of(model))
    config["num_attention_heads"] = 16
    with pytest.raises(ValueError, match="heads, 6"):
        from_hf(state, config)
    assert from_hf(state, config, Sizes(heads=6))[1]["encoder"]["heads"] == 6


def test_heads_of_an_unpublished_width_must_be_given():
    content = {"model": official()["model"]}
    with pytest.raises(ValueError, match="48 and 36 wide"):
        from_official(content, Sizes(4, 16, heads=3))
    from_official(content, Sizes(4, 16, heads=3, decoder_heads=2))


def test_an_untrained_model_is_not_taken_for_a_broken_one():
    model = VideoMAE(VideoTransformer(48, 2, 3, frames=4, size=16, patch=8), 36, 1, 2)
    assert not model.encoder.blocks[0].attn.q_bias.any()
    ours, _, _ = from_official(to_official(model.state_dict(), arguments_of(model)))
    assert equal(ours, model.state_dict())
    # Trained encoder, fresh decoder: what pretraining of an imported encoder starts with.
    model.encoder = trained(whole=False)
    from_official(to_official(model.state_dict(), arguments_of(model)))


def test_hugging_face_names_in_a_pth_are_told_apart():
    state, _ = hf()
    with pytest.raises(ValueError, match="hf:FOLDER"):
        from_official({"model": state})


def test_export_needs_the_weights_of_its_arguments():
    model = trained()
    state = model.state_dict()
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"head\.bias"):
        to_hf(state, arguments_of(model))


# The numerical proof


def test_verify_accepts_and_measures():
    assert 0 <= verify(trained()) < 1e-5  # 0 where both take the same path through oneDNN
    assert verify(trained(whole=False, mean=MEAN, std=STD)) < 1e-5


def test_verify_sees_every_kind_of_wrong_conversion(monkeypatch):
    """Each fault is one that strict names and shapes cannot see."""
    right = interop_videomae.to_hf

    def swapped(name: str, other: str):
        def wrong(state, arguments):
            out, config = right(state, arguments)
            first, second = (f"{HF_FIRST}{part}" for part in (name, other))
            out[first], out[second] = out[second], out[first]
            return out, config

        return wrong

    def channels_first(state, arguments):
        out, config = right(state, arguments)
        conv = "videomae.embeddings.patch_embeddings.projection.weight"
        out[conv] = state["encoder.patch_embed.weight"].unflatten(1, (3, 2, 8, 8)).contiguous()
        return out, config

    def lost_bias(state, arguments):
        out, config = right(state, arguments)
        out["decoder.decoder_layers.0.attention.attention.query.bias"].zero_()
        return out, config

    def head_rows(state, arguments):
        out, config = right(state, arguments)
        head = out["decoder.head.weight"]
        out["decoder.head.weight"] = head.unflatten(0, (-1, 3)).transpose(0, 1).reshape(head.shape)
        return out, config

    model = trained()
    for wrong in (
        swapped("query.weight", "key.weight"), swapped("query.bias", "value.bias"),
        channels_first, head_rows,
        lambda s, a: lost_bias({k: v.clone() for k, v in s.items()}, a),
    ):  # fmt: skip
        monkeypatch.setattr(interop_videomae, "to_hf", wrong)
        with pytest.raises(ValueError, match="differs"):
            verify(model)


def test_another_epsilon_is_refused_with_its_value():
    assert verify(trained(), 1e-12) < 1e-4
    with pytest.raises(ValueError, match=r"layer_norm_eps is 0\.1, ours 1e-6"):
        verify(trained(), 0.1)


def test_a_result_that_is_not_a_number_does_not_pass():
    model = trained(whole=False)
    model.norm.weight.data[0] = math.inf
    model.norm.bias.data[0] = -math.inf
    with pytest.raises(ValueError, match="differs"):
        verify(model)


# Files


def test_official_file_to_backbone(tmp_path):
    path = tmp_path / "checkpoint.pth"
    content = official()
    args = argparse.Namespace(num_frames=4, input_size=16, sampling_rate=4, lr=1e-3)
    torch.save({"model": content["model"], "args": args, "epoch": 3}, path)
    sizes = Sizes(heads=3, decoder_heads=2)
    assert equal(import_videomae(str(path), sizes)[0].state_dict(), trained().state_dict())
    assert equal(load_videomae(str(path), sizes).state_dict(), trained().encoder.state_dict())
    torch.save(content, path)  # as we write it, all sizes are in the file
    assert equal(load_backbone(str(path)).state_dict(), trained().encoder.state_dict())


def test_an_encoder_alone_is_read(tmp_path):
    name = write_hf(tmp_path / "encoder", *hf(whole=False))
    assert isinstance(load_videomae(name), VideoTransformer)


def test_hugging_face_folders(tmp_path):
    state, config = hf()
    expected = trained().state_dict()
    assert equal(
        import_videomae(write_hf(tmp_path / "one", state, config))[0].state_dict(), expected
    )

    shards = tmp_path / "shards"
    write_hf(shards, {"x": torch.ones(1)}, config)
    (shards / "model.safetensors").unlink()
    for number in (0, 1):
        part = dict(list(state.items())[number::2])
        save_file(part, shards / f"model-0000{number + 1}-of-00002.safetensors")
    assert equal(import_videomae(f"hf:{shards}")[0].state_dict(), expected)

    save_file(part, shards / "model-extra.safetensors")
    with pytest.raises(ValueError, match="repeats weights"):
        import_videomae(f"hf:{shards}")

    older = tmp_path / "older"
    write_hf(older, {"x": torch.ones(1)}, config)
    (older / "model.safetensors").unlink()
    torch.save(older_names(state, "4"), older / "pytorch_model.bin")
    (older / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD})
    )
    for key in ("image_mean", "image_std"):
        del config[key]
    (older / "config.json").write_text(json.dumps(config))
    model, _ = import_videomae(f"hf:{older}")
    assert equal(model.state_dict(), expected)
    assert model.encoder.input_spec.streams["rgb"].mean == MEAN


def test_unreadable_hugging_face_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no config\.json with model\.safetensors"):
        (tmp_path / "empty").mkdir()
        load_videomae(f"hf:{tmp_path / 'empty'}")
    name = write_hf(tmp_path / "cut", *hf())
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="safetensors"):
        load_videomae(name)
    name = write_hf(tmp_path / "list", *hf())
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list"):
        load_videomae(name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    monkeypatch.setattr(third_party, "hub_answers", lambda _: True)
    with pytest.raises(
        ValueError, match=r"hf:nobody/nothing: no such folder.*unplugged.*check the name"
    ):
        load_videomae("hf:nobody/nothing")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pth: there is no such file"):
        load_videomae(str(tmp_path / "nothing.pth"))


def no_network(*args, **kwargs):
    raise OSError("unplugged")


def test_a_malicious_file_is_not_executed(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    content = official() | {"args": Bomb()}
    torch.save(content, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="plain tensors"):
        load_videomae(str(tmp_path / "bomb.pth"))
    folder = write_hf(tmp_path / "hf", *hf())[3:]
    Path(folder, "model.safetensors").unlink()
    torch.save(content, Path(folder, "pytorch_model.bin"))
    with pytest.raises(ValueError, match="plain tensors"):
        load_videomae(f"hf:{folder}")
    assert not canary.exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert canary.exists()  # the bomb was live


# The recipe


def test_recipe_there_and_back(tmp_path, capsys):
    model = trained(whole=False, stride=2)
    export_backbone(model, tmp_path / "backbone", {})
    main(Config(str(tmp_path / "backbone"), "hf", str(tmp_path / "hf")))
    main(Config(f"hf:{tmp_path / 'hf'}", "official", str(tmp_path / "a.pth")))
    report = main(Config(str(tmp_path / "a.pth"), "ours", str(tmp_path / "ours")))
    back = load_backbone(str(tmp_path / "ours"))
    assert equal(back.state_dict(), model.state_dict())
    assert back.arguments == model.arguments
    assert report["max_difference"] < 2e-5
    said = capsys.readouterr().out
    assert re.search(r"dropped\s+nothing", said)
    assert "from transformers' outputs" in said
    assert {p.name for p in tmp_path.iterdir()} == {"backbone", "hf", "a.pth", "ours"}


def test_recipe_converts_a_run_with_its_decoder(tmp_path):
    model = trained()
    state = {"step": 1, "model": model.arguments}
    Saver(tmp_path / "run").save(weights_of(model), {}, state)
    main(Config(str(tmp_path / "run"), "official", str(tmp_path / "a.pth")))
    main(Config(str(tmp_path / "run"), "hf", str(tmp_path / "hf")))
    for name in (str(tmp_path / "a.pth"), f"hf:{tmp_path / 'hf'}"):
        assert equal(import_videomae(name)[0].state_dict(), model.state_dict())
        assert not any(part.training for part in import_videomae(name)[0].modules())
    assert not any(part.training for part in load_pretrained_videomae(tmp_path / "run").modules())


def test_recipe_names_the_decoder_it_drops(tmp_path):
    name = write_hf(tmp_path / "hf", *hf())
    report = main(Config(name, "ours", str(tmp_path / "ours")))
    assert {"mask_token", "encoder_to_decoder.weight", "head.bias"} <= set(report["dropped"])
    assert equal(load_backbone(str(tmp_path / "ours")).state_dict(), trained().encoder.state_dict())


def test_recipe_refuses_on_the_command_line(tmp_path, monkeypatch, capsys):
    source = write_hf(tmp_path / "hf", *hf())
    (tmp_path / "there").mkdir()
    flags = ["--source", source, "--to", "official", "--out", str(tmp_path / "there")]
    monkeypatch.setattr("sys.argv", ["convert.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli(main, Config)
    assert stopped.value.code == 2
    assert "there exists already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []


def test_recipe_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf", *hf())

    def broken(*args):
        raise ValueError("no")

    monkeypatch.setattr("recipes.convert.write_official", broken)
    with pytest.raises(ValueError, match="no"):
        main(Config(source, "official", str(tmp_path / "a.pth")))
    monkeypatch.setattr("recipes.convert.import_videomae", lambda *_: (trained(), {}))
    monkeypatch.setattr("recipes.convert.write_hf", lambda *given: broken(given[-1].mkdir()))
    with pytest.raises(ValueError, match="no"):
        main(Config(source, "hf", str(tmp_path / "there")))
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
    with pytest.raises(ValueError, match=r"ends in \.pth"):
        main(Config(source, "official", str(tmp_path / "a.bin")))
    with pytest.raises(ValueError, match="leave out --frames"):
        export_backbone(trained(False), tmp_path / "b", {})
        main(Config(str(tmp_path / "b"), "hf", str(tmp_path / "c"), frames=8))


def test_a_model_with_other_positions_is_not_given_away_as_a_published_one():
    model = VideoTransformer(48, 1, 3, 4, 16, 8, positions="separable")
    for give in (to_official, to_hf):
        with pytest.raises(ValueError, match=r"separable positions.*--positions flat"):
            give(model.state_dict(), {"encoder": model.arguments})


def test_a_model_that_looks_at_what_moves_is_not_given_away_either():
    model = VideoTransformer(48, 1, 3, 4, 16, 8, motion_tokens=0.5)
    for give in (to_official, to_hf):
        with pytest.raises(ValueError, match=r"50%.*--motion-tokens 1"):
            give(model.state_dict(), {"encoder": model.arguments})


@pytest.mark.parametrize(
    "preset", ["tiny", *(pytest.param(p, marks=pytest.mark.slow) for p in ("shrec", "shrec_apart"))]
)
def test_what_the_readme_tells_one_to_pretrain_converts(preset, tiny_pack, tmp_path):
    """The small presets with `--positions flat --motion-tokens 1`, there and back, features and
    all.
    """
    run = tmp_path / "run"
    cfg = flags.replace(
        videomae.PRESETS[preset], positions="flat", motion_tokens=1.0, data=str(tiny_pack),
        out=str(run), frames=8, size=32, steps=2, batch_size=8, micro_batch=8,
        machine=Machine("fp32", threads=1), knn_every=0,
    )  # fmt: skip
    videomae.main(cfg)
    ours = load_backbone(str(run / "backbone"))
    spec = ours.input_spec
    clip = torch.randn(1, 3, spec.frames, spec.size, spec.size)
    for source in ("run", "run/backbone"):
        for to, name in (("hf", "{}"), ("official", "{}.pth")):
            out = tmp_path / name.format(f"{source.replace('/', '-')}-{to}")
            main(Config(str(tmp_path / source), to, str(out)))
            name = f"hf:{out}" if to == "hf" else str(out)
            with torch.no_grad():
                assert torch.equal(load_backbone(name)(clip), ours(clip))
        assert isinstance(import_videomae(name)[0], VideoMAE) == (source == "run")
    theirs = import_videomae(f"hf:{tmp_path / 'run-hf'}")[0]
    assert equal(theirs.state_dict(), load_pretrained_videomae(run).state_dict())


def test_all_obstacles_are_told_at_once(tmp_path):
    """Each may cost a training run."""
    encoder = VideoTransformer(
        48,
        1,
        3,
        4,
        16,
        8,
        positions="separable",
        motion_tokens=0.5,
        pool="class",
        trained_grid=(2, 3, 3),
    )
    export_backbone(encoder, tmp_path / "backbone", {})
    (tmp_path / "there").mkdir()
    (tmp_path / "tmp-there").mkdir()
    told = (
        "positions flat",
        "motion-tokens 1",
        "pool mean",
        "2 x 3 x 3",
        "exists",
        "pth",
        "stopped",
        "leave out --frames",
    )
    with pytest.raises(ValueError) as refused:
        main(Config(str(tmp_path / "backbone"), "official", str(tmp_path / "there"), frames=8))
    assert not [words for words in told if words not in str(refused.value)]
    with pytest.raises(ValueError, match=r"exists.*no backbone at"):
        main(Config(str(tmp_path / "none"), "hf", str(tmp_path / "there")))
    (tmp_path / "file").touch()
    told = (
        r"ends in \.pth",
        "file/new|file:|file ",
        "leave out --frames",
        "positions flat",
        "motion-tokens 1",
    )
    for words in told:
        with pytest.raises(ValueError, match=words):
            main(
                Config(
                    str(tmp_path / "backbone"), "official", str(tmp_path / "file" / "new"), heads=3
                )
            )
    with pytest.raises(ValueError, match=r"leave out --frames.*no backbone at"):
        main(Config(str(tmp_path / "none"), "hf", str(tmp_path / "new"), frames=8))
    export_backbone(build_model("i3d", width=0.05, frames=8, size=32), tmp_path / "i3d", {})
    with pytest.raises(ValueError, match="I3D"):
        main(Config(str(tmp_path / "i3d"), "hf", str(tmp_path / "new")))


def test_a_grid_of_its_own_is_no_obstacle(tmp_path):
    """A backbone that was only told another stride has recorded the grid it has anyway."""
    encoder = trained(whole=False).resized(0, 0, stride=3)
    assert encoder.arguments["trained_grid"]
    export_backbone(encoder, tmp_path / "backbone", {})
    main(Config(str(tmp_path / "backbone"), "official", str(tmp_path / "a.pth")))
    assert equal(load_backbone(str(tmp_path / "a.pth")).state_dict(), encoder.state_dict())


def test_a_mimetic_start_is_no_obstacle():
    """Only how the first weights were drawn; theirs has no such thing to say, so it comes back
    xavier.
    """
    model = VideoTransformer(48, 1, 3, 4, 16, 8, init="mimetic")
    state, arguments = model.state_dict(), {"encoder": model.arguments}
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("bias"):
                value.add_(0.1)  # zero biases are refused as a lossy conversion's
    for back in (from_official(to_official(state, arguments)), from_hf(*to_hf(state, arguments))):
        assert equal(back[0], state)
        assert back[1]["encoder"] == model.arguments | {"init": "xavier"}


# Fine-tuned models


def hf_tuned(folder: Path, **changes) -> tuple[str, torch.nn.Module]:
    """transformers' own fine-tuned VideoMAE, small and with random weights, as it saves it."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    torch.manual_seed(0)
    sizes = {
        "image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
        "id2label": {0: "walk", 1: "sit down", 2: "a, b"},
    }  # fmt: skip
    theirs = VideoMAEForVideoClassification(VideoMAEConfig(**sizes | changes)).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1 and not name.endswith("key.bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return f"hf:{folder}", theirs


def same_logits(model: Classifier, theirs: torch.nn.Module) -> float:
    clip = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (model(clip) - theirs(clip.transpose(1, 2)).logits).abs().max().item()


def test_fine_tuned_models_answer_as_in_transformers_and_go_out_again(tmp_path):
    """Logits and labels in, through ours and the official layout, and back out to transformers' own
    reader.
    """
    from transformers import VideoMAEForVideoClassification

    name, theirs = hf_tuned(tmp_path / "theirs")
    model = load_classifier(name)
    assert model.classes == ["walk", "sit down", "a, b"] and not model.training
    assert same_logits(model, theirs) < 1e-6
    main(Config(name, "ours", str(tmp_path / "ours")))
    main(Config(str(tmp_path / "ours"), "official", str(tmp_path / "a.pth")))
    main(Config(str(tmp_path / "a.pth"), "hf", str(tmp_path / "hf")))
    for source in (str(tmp_path / "ours"), str(tmp_path / "a.pth"), f"hf:{tmp_path / 'hf'}"):
        again = load_classifier(source)
        assert again.classes == model.classes and equal(again.state_dict(), model.state_dict())
        assert again.backbone.arguments["norm_eps"] == 1e-5
        backbone = load_backbone(source)
        assert equal(backbone.state_dict(), model.backbone.state_dict())
        clip = torch.randn(1, 3, 4, 32, 32)
        assert torch.equal(model.head(backbone(clip)), model(clip))
    back, info = VideoMAEForVideoClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert back.config.id2label == theirs.config.id2label
    assert same_logits(model, back.eval()) < 1e-6


def tuned_file(**changes) -> dict:
    """An official fine-tuned checkpoint: bare names, fc_norm, a head, and no names of classes."""
    model = trained(whole=False, pool="fc_norm")
    content = to_official(model.state_dict(), arguments_of(model))
    generator = torch.Generator().manual_seed(2)
    head = {
        "head.weight": torch.randn(3, 48, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }
    content["args"] = argparse.Namespace(num_frames=4, input_size=16, num_heads=3, **changes)
    return content | {"model": content["model"] | head}


@pytest.mark.parametrize("wrapper", ["model", "module"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_fine_tuned_files(tmp_path, wrapper, prefix):
    content = tuned_file()
    state = content.pop("model")
    assert {"patch_embed.proj.weight", "blocks.0.attn.q_bias", "fc_norm.bias", "head.bias"} <= set(
        state
    )
    assert len(state) == 2 + 2 * 13 + 2 + 2  # 13 weights a block
    torch.save(content | {wrapper: {prefix + k: v for k, v in state.items()}}, tmp_path / "a.pth")
    model = load_classifier(str(tmp_path / "a.pth"), names=["x", "y", "z"])
    assert model.classes == ["x", "y", "z"]
    clip = torch.randn(2, 3, 4, 16, 16)
    tokens = model.backbone.forward_features(clip)
    mean = torch.nn.functional.layer_norm(
        tokens.mean(1), (48,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6
    )
    expected = mean @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(model(clip), expected, atol=1e-6)
    with pytest.raises(ValueError, match="2 names"):
        load_classifier(str(tmp_path / "a.pth"), names=["x", "y"])


def test_fine_tuning_on_something_something_samples_uniformly():
    for data_set, stride in (("SSV2", 0), ("Kinetics-400", 2)):
        arguments = from_official(tuned_file(data_set=data_set, sampling_rate=2))[1]
        assert arguments["encoder"]["stride"] == stride
        assert arguments["classes"] == ["class 0", "class 1", "class 2"]


def test_faulty_fine_tuned_files_are_refused_by_name(tmp_path):
    for fault, message in (
        (lambda s: s.pop("head.bias"), "missing head.bias"),
        (lambda s: s.pop("fc_norm.bias"), "missing fc_norm.bias"),
        (lambda s: s.update({"norm.weight": torch.ones(48)}), "left over encoder.norm.weight"),
        (lambda s: s.update({"head.weight": torch.ones(3, 40)}), r"head.weight is \(3, 40\)"),
    ):
        content = tuned_file()
        fault(content["model"])
        with pytest.raises(ValueError, match=message):
            from_official(content)
    for number, (config, message) in enumerate((
        ({"id2label": {"0": "a", "1": "b"}}, "3 classes.*not number 2"),
        ({"id2label": {str(i): str(i) for i in range(4)}}, "3 classes.*names 4"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "two classes are called 'a'"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"use_mean_pooling": False}, "use_mean_pooling False"),
    )):  # fmt: skip
        name, _ = hf_tuned(tmp_path / str(number))
        file = tmp_path / str(number) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        with pytest.raises(ValueError, match=message):
            load_classifier(name)
    name, _ = hf_tuned(tmp_path / "unnamed")
    file = tmp_path / "unnamed" / "config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if "2" not in k})
    )
    assert load_classifier(name).classes == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with pytest.raises(ValueError, match="fc_norm"):
        load_classifier(write_hf(tmp_path / "plain", *hf(whole=False)))


def test_a_classifier_of_another_kind_is_named_as_dropped(tmp_path):
    export_backbone(Classifier(trained(whole=False), ["a", "b"]), tmp_path / "mean", {})
    report = main(Config(str(tmp_path / "mean"), "hf", str(tmp_path / "hf")))
    assert report["dropped"] == ["head.weight", "head.bias"]
    assert isinstance(load_videomae(f"hf:{tmp_path / 'hf'}"), VideoTransformer)
    # Its features are what its classifier sees, and no decoder can stand on tokens without a norm.
    tuned = trained(whole=False, pool="fc_norm")
    means = torch.randn(2, 3, 48)
    assert torch.equal(finish_means(tuned, means), tuned.norm(means))
    assert torch.equal(finish_means(trained(whole=False), means), means)
    with pytest.raises(ValueError, match="pool"):
        VideoMAE(tuned, 36, 1, 2)
    # An fc_norm without a classifier is kept: transformers' logits are then the embedding.
    encoder = trained(whole=False, pool="fc_norm")
    export_backbone(encoder, tmp_path / "bare", {})
    for to, out in (("hf", "bare-hf"), ("official", "bare.pth")):
        main(Config(str(tmp_path / "bare"), to, str(tmp_path / out)))
        back = load_backbone(f"hf:{tmp_path / out}" if to == "hf" else str(tmp_path / out))
        assert (
            equal(back.state_dict(), encoder.state_dict()) and back.arguments == encoder.arguments
        )
