"""The pair of towers: pooling, dropped tokens, scale, text towers, export."""

import json
import math
import shutil

import pytest
import torch

from downstream.models import builders, load_backbone, load_video_text
from downstream.models.frames import FrameNetwork
from downstream.training import fitting
from downstream.zero_shot import embed_texts
from pretrain.backbones import (
    build,
    describe,
    export_backbone,
    fresh_like,
)
from pretrain.clip import (
    MAX_LOG_SCALE,
    VideoText,
    backward_step,
    contrast,
    has_batch_norm,
)
from pretrain.optim import param_groups
from pretrain.spec import InputSpec, Stream
from pretrain.text import HuggingFaceText, fresh_text, trim
from pretrain.vit import VideoTransformer, motion_token_indices, patchify, take_tokens
from tests.conftest import save_open_clip

VIT = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
CONFIG = {"embed_dim": 24, "vision_cfg": VIT, "quick_gelu": False}
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


def frame_tower(pool: str, size: int = 16, **vision) -> FrameNetwork:
    torch.manual_seed(0)
    config = CONFIG | {"vision_cfg": vision or VIT}
    return FrameNetwork({"open_clip": config, **PIXELS}, 6, 2, size, pool)


def pair(loss: str = "infonce") -> VideoText:
    torch.manual_seed(0)
    video = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8)
    return VideoText(video, fresh_text("xxs", 16, 12), 16, project=True, loss=loss)


@pytest.mark.parametrize("pool", ["mean", "attention", "temporal"])
def test_every_pool_starts_as_the_mean_of_the_frames(pool):
    tower = frame_tower(pool).eval()
    video = torch.randn(2, 3, 6, 16, 16)
    each = torch.stack([tower.images(video[:, :, t]) for t in range(6)], 1)
    assert torch.allclose(tower(video), each.mean(1), atol=1e-5)
    assert tower.forward_features(video).shape == (2, 6, 24)


def test_only_the_temporal_pool_knows_the_order():
    video = torch.randn(2, 3, 6, 16, 16)
    for pool, knows in (("mean", False), ("max", False), ("attention", False), ("temporal", True)):
        tower = frame_tower(pool).eval()
        with torch.no_grad():
            for p in tower.over_time.parameters():
                p.add_(0.3 * torch.randn_like(p))
        same = torch.allclose(tower(video), tower(video.flip(2)), atol=1e-4)
        assert same != knows, pool


def test_attention_pool_learns_to_look_at_one_frame():
    tower = frame_tower("attention").eval()
    frames = torch.randn(3, 6, 24)
    with torch.no_grad():
        tower.over_time.query.copy_(200 * tower.over_time.norm(frames[0, 2]))
    assert torch.allclose(tower.over_time(frames[:1])[0], frames[0, 2], atol=1e-3)


def test_bad_towers_are_refused():
    with pytest.raises(ValueError, match=r"'median' is not one of mean, max, attention, temporal"):
        frame_tower("median")
    with pytest.raises(ValueError, match="16 x 16"):
        frame_tower("mean", **VIT | {"image_size": [16, 24]})
    with pytest.raises(ValueError, match=r"'depth'.*not among the keys"):
        frame_tower("mean", **VIT | {"depth": 3})
    with pytest.raises(ValueError, match="need a projection"):
        VideoText(frame_tower("mean"), fresh_text("xxs", 16), 16, project=False, loss="infonce")
    with pytest.raises(ValueError, match="'triplet'"):
        pair("triplet")
    with pytest.raises(ValueError, match="'xxl'"):
        fresh_text("xxl", 16)


@pytest.mark.parametrize("pool", ["mean", "class", "fc_norm"])
def test_dropped_tokens(pool):
    """All tokens listed is the whole clip, in any order; fewer are another answer."""
    torch.manual_seed(0)
    video = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8, pool=pool)
    text = fresh_text("xxs", 16, 12)
    model = VideoText(video, text, 16, project=True, loss="infonce").eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    num = math.prod(video.grid)
    listed = torch.stack([torch.randperm(num) for _ in range(2)])
    whole = model.encode_video(clips)
    assert torch.allclose(model.encode_video(clips, listed), whole, atol=1e-5)
    assert not torch.allclose(model.encode_video(clips, listed[:, :4]), whole, atol=1e-3)


def test_moving_tokens_are_those_that_change():
    """A square that moves in one corner, before a ground that differs from place to place."""
    video = torch.randn(1, 3, 1, 32, 32).repeat(1, 1, 4, 1, 1)
    video[0, :, 2, 8:16, 24:32] += 5  # frame 2 of 4: both tubelets see it come or go
    index = motion_token_indices(video, tubelet=2, patch=8, num=1)
    row = 1 * 4 + 3  # patch row 1, column 3 of a 4 x 4 grid
    assert index.tolist() == [[16 + row]]  # the second tubelet: it comes and goes there
    assert motion_token_indices(video[:, :, [0, 2, 2, 2]], 2, 8, 1).tolist() == [[row]]
    many = motion_token_indices(torch.randn(2, 3, 4, 32, 32), 2, 8, 9)
    assert many.shape == (2, 9) and (many.diff(dim=1) > 0).all()


def test_what_moves_is_the_same_before_and_after_normalising():
    spec = InputSpec(8, 1, 48, {"rgb": Stream(std=(0.1, 0.4, 0.2))})
    clips = torch.randint(0, 256, (3, 3, 8, 48, 48), dtype=torch.uint8)
    normalised = spec.normalise(clips)
    # By definition, in another way: average pooling of the squared differences.
    change = (normalised[:, :, 1:] - normalised[:, :, :-1]).square().mean(1, keepdim=True)
    energy = torch.nn.functional.avg_pool3d(torch.cat([change[:, :, :1], change], 2), (4, 8, 8))
    expected = energy.flatten(1).topk(30, dim=1).indices.sort(1).values
    assert torch.equal(motion_token_indices(normalised, 4, 8, 30), expected)
    assert torch.equal(motion_token_indices(clips, 4, 8, 30, spec.streams["rgb"].std), expected)
    assert not torch.equal(
        motion_token_indices(clips, 4, 8, 30), expected
    )  # channels count by their deviation


def test_a_tower_that_looks_at_what_moves():
    torch.manual_seed(0)
    arguments = {"dim": 24, "depth": 1, "heads": 2, "frames": 4, "size": 32, "patch": 8}
    whole = VideoTransformer(**arguments).eval()
    part = VideoTransformer(**arguments, motion_tokens=0.25).eval()
    part.load_state_dict(whole.state_dict())
    clips = torch.randn(2, 3, 4, 32, 32)
    index = motion_token_indices(clips, 2, 8, 8)
    patches = patchify(clips, 2, 8)
    expected = part.encode(take_tokens(patches, index), index)
    assert torch.allclose(part(clips), expected.mean(1), atol=1e-6)
    tokens = part.forward_features(clips)
    assert tokens.shape == (2, 32, 24)
    assert torch.allclose(tokens.mean(1), part(clips), atol=1e-6)
    assert torch.allclose(take_tokens(tokens, index), expected, atol=1e-6)
    everything = VideoTransformer(**arguments, motion_tokens=1.0).eval()
    everything.load_state_dict(whole.state_dict())
    assert torch.equal(everything(clips), whole(clips))
    # Dropped tokens are some of those.
    model = VideoText(part, fresh_text("xxs", 16, 12), 16, project=True, loss="infonce").eval()
    some = torch.tensor([[0, 3, 5], [1, 2, 7]])
    chosen = index.gather(1, some)
    by_hand = part.encode(take_tokens(patches, chosen), chosen).mean(1)
    by_hand = torch.nn.functional.normalize(model.video_proj(by_hand), dim=-1)
    assert torch.allclose(model.encode_video(clips, some), by_hand, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"motion_tokens": 0.0},
        {"motion_tokens": 1.5},
        {"motion_tokens": 0.5, "frames": 1, "tubelet": 1},
    ],
)
def test_a_share_of_moving_tokens_that_makes_no_sense(changes):
    arguments = {"dim": 24, "depth": 1, "heads": 2, "frames": 4, "size": 32, "patch": 8}
    with pytest.raises(ValueError, match="motion_tokens"):
        VideoTransformer(**arguments | changes)


def test_dropped_tokens_of_an_image_tower():
    tower = frame_tower("mean")
    tower.drop_tokens(0.5)
    video = torch.randn(1, 3, 6, 16, 16)
    assert not torch.equal(tower.train()(video), tower(video))
    assert torch.equal(tower.eval()(video), tower(video))
    resnet = {"layers": [1, 1, 1, 1], "width": 32, "image_size": 32}
    convolutional = frame_tower("mean", 32, **resnet)
    assert has_batch_norm(convolutional) and not has_batch_norm(tower)
    with pytest.raises(ValueError, match="drop-tokens needs"):
        convolutional.drop_tokens(0.5)


@pytest.mark.parametrize(
    ("loss", "scale", "bias"), [("infonce", 1 / 0.07, None), ("siglip", 10, -10)]
)
def test_scale_starts_is_clamped_and_does_not_decay(loss, scale, bias):
    model = pair(loss)
    assert model.scale().item() == pytest.approx(scale, rel=1e-6)
    assert (model.bias if bias is None else model.bias.item()) == bias
    decay, no_decay = param_groups(model, 0.2)
    assert any(p is model.log_scale for p in no_decay["params"]) and no_decay["weight_decay"] == 0
    assert not any(p is model.log_scale or p is model.bias for p in decay["params"])
    for value, kept in ((9.0, MAX_LOG_SCALE), (-2.0, 0.0), (3.0, 3.0)):
        model.log_scale.data.fill_(value)
        model.clamp_scale()
        assert model.log_scale.item() == pytest.approx(kept)


def test_bfloat16_does_not_round_similarities():
    model = pair().eval()
    video = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    tokens = model.text.tokenizer(["nods", "waves"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        clips, texts, scale, _ = model(video, tokens)
    assert clips.dtype == texts.dtype == scale.dtype == torch.float32
    assert torch.allclose(clips.norm(dim=1), torch.ones(2), atol=1e-6)


class Plain:
    """What `backward_step` needs of an engine, in one process."""

    device = torch.device("cpu")

    def backward(self, loss):
        loss.backward()

    def sync(self, last):
        pass


def test_cached_gradients_repeat_what_was_drawn():
    """Dropout differs between the clips and not between the two passes."""

    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)
            self.seen = []

        def forward(self, video, tokens):
            x = torch.nn.functional.dropout(self.layer(video), 0.5, training=True)
            self.seen.append(x.detach().clone())
            x = torch.nn.functional.normalize(x, dim=-1)
            return x, torch.nn.functional.normalize(tokens, dim=-1), torch.ones(()), torch.zeros(())

    torch.manual_seed(0)
    model = Noisy()
    micro = [
        {"video": torch.randn(3, 6), "tokens": torch.randn(3, 6), "groups": torch.arange(3) + 3 * i}
        for i in range(2)
    ]

    def loss(*parts):
        return contrast(*parts, "infonce", False)

    backward_step(model, micro, loss, Plain())
    first, second = model.seen[:2], model.seen[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    after = torch.rand(1)
    torch.manual_seed(0)
    assert not torch.equal(after, torch.rand(1))  # the generator went on


# ------------------------------------------------------------------------------ text towers


def test_long_captions_are_cut_and_counted():
    text = fresh_text("xxs", 16, context_length=8)
    tokens, cut = text.tokenizer(["nods", "one two three four five six seven", "a b c d e f"])
    assert cut == [False, True, False]
    assert tokens.shape == (3, 8) and (tokens[1:, -1] == tokens.max()).all()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT of transformers with a word tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "person", "nods", "waves", "slowly"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=10,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_transformers_text_model(bert, tmp_path):
    text = HuggingFaceText.from_name(str(bert))
    assert not any(part.training for part in text.modules())
    assert text.tokenizer.context_length == 10 and text.embed_dim == 16
    tokens, cut = text.tokenizer(["a person nods", "waves", "a person nods slowly " * 3])
    assert cut == [False, False, True] and tokens.shape == (3, 10)
    assert tokens[0].tolist() == [2, 4, 5, 6, 3, 0, 0, 0, 0, 0]
    with torch.no_grad():
        states = text.tower(input_ids=tokens[:1, :5]).last_hidden_state
        assert torch.allclose(text(tokens[:1]), states.mean(1), atol=1e-5)
        assert torch.allclose(text(tokens[:2]), text(trim(tokens[:2], text)), atol=1e-5)
    assert trim(tokens[:2], text).shape == (2, 5)
    video = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8)
    model = VideoText(video, text, 8, project=True, loss="siglip").eval()
    export_backbone(model, tmp_path / "backbone", {})
    for file in bert.iterdir():  # the export needs nothing of it
        assert file.exists()
    again = load_video_text(str(tmp_path / "backbone")).eval()
    with torch.no_grad():
        assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    assert torch.equal(
        again.text.tokenizer(["waves slowly"])[0], text.tokenizer(["waves slowly"])[0]
    )


def test_a_tokenizer_travels_as_data(bert, tmp_path):
    """A folder of open_clip's brings its tokenizer, whose name is never followed; an export needs
    nothing else.
    """
    import open_clip
    from transformers import AutoTokenizer

    config = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {
        "context_length": 12, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1,
        "hf_tokenizer_name": "nobody/nothing",
        "tokenizer_kwargs": {"clean": "canonicalize", "strip_sep_token": True},
    }}  # fmt: skip
    source = tmp_path / "theirs"
    source.mkdir()
    name = save_open_clip(source, open_clip.CustomTextCLIP(**config), config, {})
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_video_text(name)
    fast = AutoTokenizer.from_pretrained(bert)
    fast.sep_token = "[SEP]"
    fast.save_pretrained(source)
    model = load_video_text(name).eval()
    tokens, cut = model.text.tokenizer(["A person  nods!", "waves"])
    assert tokens[0, :5].tolist() == [2, 4, 5, 6, 0] and cut == [False, False]  # [SEP] is blank
    export_backbone(model, tmp_path / "backbone", {})
    shutil.rmtree(source)
    again = load_video_text(str(tmp_path / "backbone")).eval()
    assert torch.equal(again.text.tokenizer(["A person  nods!", "waves"])[0], tokens)
    with torch.no_grad():
        assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))


def test_a_text_model_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="text model"):
        HuggingFaceText.from_name(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ValueError, match="text model"):
        HuggingFaceText.from_name(str(tmp_path))


# ------------------------------------------------------------------------------ on the disk


def test_an_exported_pair_is_a_backbone_too(tmp_path):
    model = pair("siglip")
    model.log_scale.data.fill_(1.5)
    export_backbone(model, tmp_path / "backbone", {"recipe": "test"})
    again = load_video_text(str(tmp_path / "backbone"))
    assert not any(part.training for part in again.modules())  # as all that is loaded
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    encoder = load_backbone(str(tmp_path / "backbone"))
    assert isinstance(encoder, VideoTransformer)
    assert torch.equal(encoder.patch_embed.weight, model.video.patch_embed.weight)


def test_describe_builds_the_same_architecture():
    for model in (pair(), frame_tower("temporal")):
        again = build(describe(model), builders())
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert describe(again) == describe(model)
    fresh = fresh_like(frame_tower("temporal"), 5)
    assert not torch.equal(
        fresh.images.net.conv1.weight, frame_tower("temporal").images.net.conv1.weight
    )


def test_a_backbone_without_text_says_which_recipe_makes_one(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match=r"no text tower; train one: .*muybridge clip --backbone"):
        load_video_text(str(tiny_backbone))
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match="text tower"):
        load_video_text(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="no backbone at"):
        load_video_text(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"did you mean .*backbone"):
        load_video_text(str(tiny_backbone.parent))


def test_texts_embedded_between_two_steps_leave_buffers_that_can_be_trained_with():
    """A device of several CPU processes is "cpu:0", and a copy made in inference mode cannot be
    synchronised.
    """
    model = pair()
    embed_texts(model, ["a person sits down"], torch.device("cpu", 0))
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    assert not [name for name, tensor in tensors.items() if tensor.is_inference()]
    assert any(model.named_buffers())


def test_image_towers_of_open_clip_have_a_recipe():
    assert fitting(frame_tower("mean"))[0] == "tsn_ucf101"
