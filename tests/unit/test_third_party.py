"""Names and configurations from outside build what they describe, or nothing: no code, no address,
no gigabytes.
"""

import hashlib
import json
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

import open_clip
import pytest
import torch

from downstream.classifier import Classifier
from downstream.models import (
    build_model,
    builders,
    load_backbone,
    load_classifier,
    load_video_text,
)
from downstream.models.frames import FrameNetwork
from pretrain import third_party
from pretrain.backbones import (
    export_backbone,
    fresh_like,
    load_export,
)
from pretrain.clip import VideoText
from pretrain.interop.videomae import load_videomae
from pretrain.text import HuggingFaceText, OpenClipText
from pretrain.vit import VideoTransformer
from tests.conftest import save_open_clip

VIT = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
VISION = {"embed_dim": 16, "vision_cfg": VIT, "quick_gelu": False}
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
NETWORK = {"open_clip": VISION, **PIXELS}
TOWER = {"embed_dim": 16, "text_cfg": TEXT, "quick_gelu": False}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One export of each kind that takes something of another library's."""
    root = tmp_path_factory.mktemp("exports")
    pair = VideoText(FrameNetwork(NETWORK, 4, 2, 32), OpenClipText(TOWER), 16, False, "infonce")
    models = {
        "vit": VideoTransformer(32, 1, 2, 4, 32, 16),
        "pair": pair,
        "rnn": build_model("rnn", small=True),
        "clip_frames": build_model("frame_mean", network=NETWORK, size=32, frames=2),
        "classifier": Classifier(build_model("i3d", small=True, width=0.05), ["nods", "waves"]),
        "temporal": FrameNetwork(NETWORK, 4, 2, 32, "temporal"),
        "vivit": build_model("vivit_2", small=True, dim=32, depth=1, heads=2),
        "mimetic": VideoTransformer(32, 1, 2, 4, 32, 16, init="mimetic", positions="rotary"),
    }
    for name, model in models.items():
        export_backbone(model, root / name, {"recipe": "test"})
    return root


def peak(reset=False):
    """The peak memory of this process in kB, since it began or was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def forged(folder, target, change):
    """A copy of an export with another config.json and, as an attacker would, a new manifest."""
    config = json.loads((folder / "config.json").read_text())
    config = change(config) or config
    target.mkdir()
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (target / "config.json").write_text(json.dumps(config))
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(target.iterdir())}
    (target / "manifest.json").write_text(json.dumps(digests))
    return target


def put(*path, value):
    """A change of a config.json: the value at a path of keys below its arguments."""

    def change(config):
        at = config["arguments"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def wide_and_long(config):
    config["arguments"]["frames"] = 4096
    config["arguments"]["network"]["open_clip"]["embed_dim"] = 16_384


VIDEO, WORDS = ("video", "arguments", "network", "open_clip"), ("text", "arguments")
HOSTILE = {
    # code, addresses and paths
    "tokenizer by name": ("pair", put(*WORDS, "tokenizer", value="ViT-B-16-SigLIP")),
    "tokenizer of a folder": ("pair", put(*WORDS, "tokenizer", value="local-dir:EVIL")),
    "tokenizer of the hub": ("pair", put(*WORDS, "tokenizer", value="hf-hub:a/b")),
    "tokenizer with a class": ("pair", put(*WORDS, "tokenizer", value={
        "json": "{}", "special": {"pad_token": "x", "tokenizer_class": "Evil"}, "clean": "lower",
        "strip_sep": False})),
    "tokenizer half": ("pair", put(*WORDS, "tokenizer", value={"json": "{}"})),
    "tokenizer kwargs": ("pair", put(
        *WORDS, "config", "text_cfg", "tokenizer_kwargs", value={"trust_remote_code": True})),
    "text model by name": ("pair", put(
        *WORDS, "config", "text_cfg", "hf_model_name", value="EVIL")),
    "timm of the hub": ("pair", put(*VIDEO, "vision_cfg", "timm_model_name", value="hf-hub:a/b")),
    "timm of a folder": ("pair", put(
        *VIDEO, "vision_cfg", "timm_model_name", value="local-dir:EVIL")),
    "timm by path": ("pair", put(*VIDEO, "vision_cfg", "timm_model_name", value="../EVIL")),
    "norm kwargs": ("pair", put(*VIDEO, "vision_cfg", "norm_kwargs", value={"device": "cuda"})),
    "activation kwargs": ("pair", put(*VIDEO, "vision_cfg", "act_kwargs", value={"x": 1})),
    "network of the hub": ("rnn", put("network", value="hf-hub:a/b")),
    "network of a folder": ("rnn", put("network", value="local-dir:EVIL")),
    "network by path": ("rnn", put("network", value="/EVIL")),
    "network as a dict": ("rnn", put("network", value={"open_clip": VISION, "pretrained": True})),
    "network dict without": ("clip_frames", put("network", value={"mean": [0.5] * 3})),
    "network dict deep": ("clip_frames", put(
        "network", "open_clip", "vision_cfg", "timm_model_name", value="hf_hub:a/b")),
    # other types and unknown keys
    "unknown argument": ("vit", put("device", value="meta")),
    "text for a number": ("vit", put("dim", value="32")),
    "a truth value": ("vit", put("depth", value=True)),
    "a fraction": ("vit", put("heads", value=1.5)),
    "not a number": ("vit", put("motion_tokens", value=float("nan"))),
    "endless": ("vit", put("mean", value=[float("inf")] * 3)),
    "four colours": ("vit", put("mean", value=[0.5] * 4)),
    "a list": ("vit", put("size", value=[32])),
    "thousands of digits": ("vit", put("motion_tokens", value=10**400)),
    "no arguments": ("vit", lambda config: config.pop("arguments") and None),
    "arguments a list": ("vit", lambda config: config.update(arguments=[])),
    "builder a list": ("vit", lambda config: config.update(builder=["VideoTransformer"])),
    "builder unknown": ("vit", lambda config: config.update(builder="object")),
    "no config": ("vit", lambda config: [1]),
    "classes a number": ("classifier", put("classes", value=7)),
    "classes of numbers": ("classifier", put("classes", value=[1, 2])),
    "a classifier in itself": ("classifier", put(
        "backbone", value={"builder": "Classifier", "arguments": {}})),
    "no backbone": ("classifier", put("backbone", value=None)),
    # sizes
    "another width": ("vit", put("dim", value=64)),
    "gigantic width": ("vit", put("dim", value=1_280_000)),
    "gigantic but admitted": ("vit", put("dim", value=6144)),
    "gigantic depth": ("vit", put("depth", value=10**9)),
    "gigantic frames": ("vit", put("frames", value=10**8)),
    "gigantic pictures": ("vit", put("size", value=10**6)),
    "gigantic patches of one": ("vit", put("patch", value=1)),
    "gigantic vocabulary": ("pair",
                            put(*WORDS, "config", "text_cfg", "vocab_size", value=2_000_000)),
    "gigantic tower": ("pair", put(*VIDEO, "vision_cfg", "width", value=12_288)),
    "gigantic layers": ("pair", put(*VIDEO, "vision_cfg", "layers", value=10**8)),
    "gigantic factor": ("classifier", put("backbone", "arguments", "width", value=40.0)),
    "gigantic memory of an RNN": ("rnn", put("hidden", value=40_000)),
    "negative": ("vit", put("frames", value=-4)),
    "negative frames": ("rnn", put("frames", value=-1)),
    "no frames": ("rnn", put("frames", value=0)),
    "a stride backwards": ("classifier", put("backbone", "arguments", "stride", value=-1)),
    "zero": ("vit", put("patch", value=0)),
    "no heads": ("vit", put("heads", value=0)),
    "no deviation": ("vit", put("std", value=[0.5, 0, 0.5])),
    "negative deviations": ("vivit", put("std", value=[-1, -1, -1])),
    "no deviation of frames": ("clip_frames", put("network", "std", value=[0, 0, 0])),
    "interpolation of no kind": ("clip_frames", put("network", "interpolation", value="lanczos")),
    "means of two channels": ("vivit", put("mean", value=[0.5, 0.5])),
    "means of no channels": ("vivit", put("mean", value=[])),
    "negative eps": ("vivit", put("eps", value=-1)),
    "no eps": ("vivit", put("eps", value=0)),
    "no eps of the last norm": ("vit", put("norm_eps", value=0)),
    "negative eps of the last norm": ("vit", put("norm_eps", value=-1)),
    "dropout beyond all": ("classifier", put("dropout", value=1.5)),
    "positions of a grid of nothing": ("mimetic", put("trained_grid", value=[0, 0, 0])),
    "gigantic clip": ("rnn", lambda config: config["arguments"].update(size=2048, frames=4096)),
    "gigantic clip of frames": ("temporal", put("frames", value=2**40)),
    "gigantic table over time": ("temporal", wide_and_long),
    "blocks in blocks": ("rnn", put("attention", value="se@*.bn2" + ",se@*before" * 80)),
    "a class twice": ("classifier", put("classes", value=["nods", "nods"])),
    "no word of where from": ("vit", lambda config: config.pop("provenance") and None),
    "a list of where from": ("vit", lambda config: config.update(provenance=["x"])),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_export_is_refused(exports, tmp_path, monkeypatch, name):
    """In words, without a look at the network or an import from the folder, and without memory."""
    kind, change = HOSTILE[name]
    evil = tmp_path / "EVIL"
    evil.mkdir()
    text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    about = {"model_cfg": {"text_cfg": text}}
    (evil / "open_clip_config.json").write_text(json.dumps(about))
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (evil / "tokenizer_config.json").write_text(json.dumps(auto))
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", **auto}))
    (evil / "evil.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: from_pretrained = None\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", refuse_network)
    folder = forged(
        exports / kind,
        tmp_path / "forged",
        lambda c: replaced(change(c) or c, str(evil)),
    )
    before = peak(reset=True)
    with pytest.raises(ValueError):
        load_export(folder, builders())
    assert peak() - before < 200_000  # kB
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind, change", [
    ("rnn", {"size": 2048}),
    ("rnn", {"frames": 4096}),
    ("classifier", {"frames": 2048}),
    ("temporal", {"frames": 4096}),
])  # fmt: skip
def test_a_clip_that_no_weight_knows_costs_nothing_to_load(exports, tmp_path, kind, change):
    """Weights do not tell a clip's length and size: to learn what comes out of it no such clip is
    made.
    """

    def apply(config):
        arguments = config["arguments"]
        arguments = arguments["backbone"]["arguments"] if kind == "classifier" else arguments
        arguments.update(change)

    folder = forged(exports / kind, tmp_path / "forged", apply)
    before, began = peak(reset=True), time.process_time()
    assert load_backbone(str(folder)).input_spec.frames == change.get("frames", 16)
    assert peak() - before < 150_000  # kB
    assert time.process_time() - began < 5


def test_no_start_is_drawn_for_weights_that_are_there(exports, monkeypatch):
    """The singular values of a wide network, head by head, would take minutes."""

    def refuse(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    model = load_backbone(str(exports / "mimetic"))
    with pytest.raises(AssertionError, match="drawn"):
        fresh_like(model, 0)


LONG = "x" * 5000


@pytest.mark.parametrize("load", [
    load_backbone, load_video_text, load_classifier,
    lambda name: load_videomae(f"hf:{name}"),
    lambda name: load_videomae(f"{name}.pth"),
    HuggingFaceText.from_name,
    lambda name: load_video_text(f"open_clip:RN50/{name}"),
    lambda name: load_video_text(f"open_clip:local-dir:{name}"),
    lambda name: build_model("lstm", weights=name),
    lambda name: load_classifier("i3d_k400", name),
    lambda name: load_classifier("r3d_18_k400", name),
])  # fmt: skip
@pytest.mark.parametrize("name", [LONG, f"{LONG}/{LONG}", "a\0b", "a/b/c\n", "\ud800/x/y"])
def test_a_name_that_no_file_can_have_is_none(load, name):
    """In the words that any other wrong name gets, and not an error of the disk."""
    with pytest.raises(
        ValueError, match=r"no backbone|no classifier|no such f|neither a f|cannot be read"
    ):
        load(name)


def replaced(tree, evil):
    return json.loads(json.dumps(tree).replace("EVIL", evil))


def refuse_network(*_):
    raise AssertionError("the network was asked")


def test_honest_exports_come_back(exports):
    for folder in exports.iterdir():
        assert load_export(folder, builders())
    assert load_classifier(str(exports / "classifier")).classes == ["nods", "waves"]


MANIFESTS = {
    "a device": lambda m: {**m, "/dev/zero": "0" * 64},
    "a way out": lambda m: {**m, "../vit/model.safetensors": "0" * 64},
    "nothing": lambda m: {},
    "a list": lambda m: list(m),
    "text": lambda m: "model.safetensors",
    "only one": lambda m: {"config.json": m["config.json"]},
    "no digest": lambda m: dict.fromkeys(m),
    "another digest": lambda m: {**m, "config.json": "0" * 64},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_hostile_manifests_are_refused(exports, tmp_path, name):
    folder = forged(exports / "vit", tmp_path / "forged", lambda config: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    load_export(folder, builders())
    (folder / "manifest.json").write_text(json.dumps(MANIFESTS[name](manifest)))
    with pytest.raises(ValueError):
        load_export(folder, builders())


@pytest.mark.parametrize("file", ["config.json", "manifest.json", "model.safetensors"])
def test_a_device_in_place_of_a_file_is_refused(exports, tmp_path, file):
    folder = forged(exports / "vit", tmp_path / "forged", lambda config: None)
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    with pytest.raises(ValueError):
        load_backbone(str(folder))


# ---- open_clip's folders, and its own list


@pytest.mark.parametrize("change", [
    {"text_cfg": TEXT | {"hf_model_name": "a/b"}},
    {"text_cfg": TEXT | {
        "tokenizer_kwargs": {"trust_remote_code": True}, "hf_tokenizer_name": "a/b"}},
    {"vision_cfg": VIT | {"timm_model_name": "hf-hub:a/b"}},
    {"vision_cfg": VIT | {"width": 16_000}},
    {"vision_cfg": [1]},
    {"embed_dim": 10**9},
    {"multimodal_cfg": {}},
])  # fmt: skip
def test_hostile_open_clip_folders_are_refused(tmp_path, monkeypatch, change):
    monkeypatch.setattr("socket.socket.connect", refuse_network)
    config = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
    torch.manual_seed(0)
    name = save_open_clip(tmp_path, open_clip.CLIP(**config), config, {})
    assert load_video_text(name)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config | change}))
    with pytest.raises(ValueError):
        load_video_text(name)


def test_every_model_of_open_clips_list_is_admitted_or_says_why():
    refused = set()
    for model in open_clip.list_models():
        config = third_party.listed_open_clip(model)
        if "multimodal_cfg" in config:
            continue
        towers = {k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")}
        try:
            third_party.check_open_clip(towers, model)
        except ValueError as error:
            assert "fetched by name" in str(error), error
            refused.add(model)
    named = {
        m
        for m in open_clip.list_models()
        if "hf_model_name" in json.dumps(third_party.listed_open_clip(m))
    }
    assert refused == {m for m in named if "multimodal_cfg" not in third_party.listed_open_clip(m)}


@pytest.mark.parametrize(
    "name", ["../x", "hf-hub:a/b", "local-dir:/x", "a b", "x" * 300, "\x1b[2J", ""]
)
def test_names_that_no_list_has(name):
    for load in (
        third_party.listed_open_clip,
        third_party.timm_network,
        third_party.torchvision_network,
    ):
        with pytest.raises(ValueError):
            load(name)


# ---- text models of transformers

BERT = {
    "model_type": "bert", "vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 10,
}  # fmt: skip
WORDLEVEL = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "a": 1}, "unk_token": "a"},
})  # fmt: skip


def changed(**parts):
    """The text of a tokenizer.json with other parts."""
    return json.dumps(json.loads(WORDLEVEL) | parts)


def added(content, number):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": number, "content": f"{content}{number}", "normalized": True, **flags}


def sequence(parts):
    return {"type": "Sequence", "normalizers": parts}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def around(ids, times):
    """A template that puts `ids` after each caption so many times."""
    caption = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"a": {"id": "a", "ids": ids, "tokens": ["a"] * len(ids)}}
    single = [caption] + [{"SpecialToken": {"id": "a", "type_id": 0}}] * times
    pair = [caption, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def test_an_honest_text_model():
    text = HuggingFaceText(BERT, WORDLEVEL, {"pad_token": "[PAD]"}, 8)
    assert text(text.tokenizer(["a"])[0]).shape == (1, 16)


@pytest.mark.parametrize("change", [
    {"auto_map": {"AutoModel": "evil.Evil"}},
    {"attn_implementation": "kernels-community/evil"},
    {"_attn_implementation": "kernels-community/evil"},
    {"quantization_config": {"quant_method": "evil"}},
    {"model_type": "t5"},
    {"model_type": ["bert"]},
    {"model_type": None},
    {"torch_dtype": "float64"},
    {"hidden_act": "evil/evil"},
    {"hidden_act": "no_such"},
    {"num_hidden_layers": 10**9},
    {"vocab_size": -1},
    {"hidden_size": "16"},
    {"output_hidden_states": "gelu"},
    {"return_dict": False},
    {"chunk_size_feed_forward": 0.5},
    {"is_decoder": True},
])  # fmt: skip
def test_hostile_text_models_are_refused(change):
    with pytest.raises(ValueError):
        HuggingFaceText(BERT | change, WORDLEVEL, {"pad_token": "[PAD]"}, 8)


@pytest.mark.parametrize("data", [
    changed(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
    changed(model={"type": "WordLevel", "vocab": {"[PAD]": 0, "a": 100}, "unk_token": "a"}),
    changed(model={"type": "WordLevel", "vocab": {"[PAD]": 0}, "unk_token": "zz"}),
])  # fmt: skip
def test_a_tokenizer_that_fails_at_a_caption_says_so(data):
    """A search without end, numbers that the tower does not know, words that the tokenizer does
    not.
    """
    text = HuggingFaceText(BERT, data, {"pad_token": "[PAD]"}, 8)
    with pytest.raises(ValueError, match="tokenizer"):
        text.tokenizer(["a" * 40 + "b", "b"])


def test_a_tokenizer_pads_and_cuts_as_its_tower_says():
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": 10**9,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    text = HuggingFaceText(
        BERT, changed(padding=padding, truncation=cut), {"pad_token": "[PAD]"}, 8
    )
    assert text.tokenizer(["a"])[0].shape == (1, 8)


@pytest.mark.parametrize("data, special", [
    ("{", {"pad_token": "[PAD]"}),
    ("[]", {"pad_token": "[PAD]"}),
    (WORDLEVEL, {"pad_token": 3}),
    (WORDLEVEL, {"name_or_path": "a/b"}),
    (WORDLEVEL, ["pad_token"]),
    (WORDLEVEL, {}),
    *((data, {"pad_token": "[PAD]"}) for data in (
        "[" * 2_000_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        json.dumps([1]),
        changed(added_tokens=[added("x", n + 2) for n in range(20_000)]),
        changed(added_tokens=[added("x" * 10**6, 2)]),
        changed(added_tokens={"x": 1}),
        # a panic of Rust's
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        changed(normalizer=sequence([replace({"String": "a"}, "a" * 100)] * 6)),
        changed(normalizer=sequence([sequence([replace({"Regex": ""}, "ab" * 50)] * 2)])),
        changed(normalizer={"type": "Prepend", "prepend": "a" * 10**6}),
        changed(post_processor=around([1] * 1000, 2)),
        changed(post_processor=around([1], 5000)),
    )),
])  # fmt: skip
def test_hostile_tokenizers_are_refused(data, special):
    with pytest.raises(ValueError):
        HuggingFaceText(BERT, data, special, 8)


# ---- VideoMAE folders of transformers


@pytest.mark.parametrize("change", [
    {"image_mean": [0.5] * 2}, {"image_std": "0.5"}, {"image_mean": None}, {"layer_norm_eps": ""},
    {"num_attention_heads": "2"}, {"num_frames": 10**9}, {"image_size": [32]},
    {"image_size": 10**6}, {"num_attention_heads": 10**9}, {"sampling_rate": -1},
    {"image_std": [0, 0, 0]}, {"use_mean_pooling": "no"},
])  # fmt: skip
def test_hostile_videomae_folders_are_refused(tmp_path, change):
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, use_mean_pooling=False,
    )  # fmt: skip
    VideoMAEModel(config).save_pretrained(tmp_path)
    assert load_videomae(f"hf:{tmp_path}")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError):
        load_videomae(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("reason", "answers"),
    [(ssl.SSLCertVerificationError("self-signed"), True), (ConnectionRefusedError(), False)],
)
def test_what_else_is_wrong_with_a_hub_its_own_client_says(reason, answers, monkeypatch):
    def broken(*_, **__):
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(urllib.request, "urlopen", broken)
    assert third_party.hub_answers(f"https://{reason!r}") == answers


@pytest.mark.parametrize(
    "name", ["open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:hf-hub:nobody/nothing", "hf:a/b"]
)
def test_a_hub_out_of_reach_is_said_at_once_and_once(name, tmp_path, monkeypatch, capfd):
    from huggingface_hub import constants

    for setting, value in (
        ("HF_HUB_CACHE", str(tmp_path)), ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", "http://127.0.0.1:9"),
    ):  # fmt: skip
        monkeypatch.setattr(constants, setting, value)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9 does not answer"):
        load_backbone(name)
    assert time.monotonic() - started < 20
    (said,) = capfd.readouterr().err.splitlines()  # and nothing of other libraries
    assert said.startswith("asking http://127.0.0.1:9 for ")
    assert constants.HF_HUB_OFFLINE is False
