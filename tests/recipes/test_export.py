"""recipes/export.py: what other programs get gives the model's own outputs, and says its clip."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from downstream.classifier import Classifier, at_chance
from downstream.export import (
    at_length,
    compared,
    contract_of,
    lengths_of,
    program_of,
    write_onnx,
)
from downstream.models import (
    MODELS,
    build_model,
    load_backbone,
    load_classifier,
    load_video_text,
    trained_rate,
)
from pretrain import third_party
from pretrain.backbones import export_backbone
from pretrain.spec import InputSpec
from pretrain.vit import VideoTransformer
from recipes import export
from tests.recipes.runs import ROOT, configure

REFUSED = {"vivit_4": "4D"}  # what has no form in ONNX, and why
FIXED = [
    "frame_single", "frame_late", "frame_early", "frame_slow", "early_streams", "flow_stack",
    "two_stream", "rnn", "bilstm", "c3d", "i3d_two_stream", "vivit_1", "vivit_2", "vivit_3",
    "vivit_4", "pose_attention", "feature_fusion",
]  # fmt: skip
CLASSES = ["up", "do|wn", "# left"]


def exported(backbone: object, to: str, out: Path, pack: Path, **more: object) -> dict:
    about = {"data": str(pack), "clips": 6} | more
    return export.main(configure(export.Config, str(backbone), to, str(out), **about))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 8 frames, 2 apart, of 32x32, that recognised 90 % of 10 videos."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = VideoTransformer(dim=16, depth=1, heads=2, frames=8, size=32, patch=8, stride=2)
        model = Classifier(encoder, CLASSES)
        torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("run") / "backbone"
    told = {"recipe": "finetune", "data": "a_b", "fps": 25.0, "config": {"seed": 4}}
    export_backbone(model, folder, told | {"val_top1": 0.2, "val_videos": 10})
    return folder


def test_torch(classifier, tiny_pack, tmp_path, capsys):
    contract = exported(classifier, "torch", tmp_path / "out", tiny_pack)
    assert contract == json.loads((tmp_path / "out/contract.json").read_text())
    assert contract["check"]["clips"] == 6 and contract["check"]["same_top1"] == 1
    assert contract["check"]["max_abs_difference"] <= 1e-4
    assert (contract["frames"], contract["stride"], contract["size"]) == (8, 2, 32)
    assert contract["classes"] == CLASSES
    assert (contract["fps"], contract["frame_step"]) == (25, 0.08)
    assert contract["streams"]["rgb"]["shape"] == ["batch", 3, "frames", 32, 32]
    assert [contract[f"frames_{k}"] for k in ("min", "max", "multiple_of")] == [4, None, 2]
    elsewhere = contract["check"]["differences_at_other_lengths"]
    assert set(elsewhere) == {"4", "10"} and max(elsewhere.values()) <= 1e-4
    printed = capsys.readouterr().out
    assert "25 frames a second" in printed and "4 or more in multiples of 2" in printed
    with zipfile.ZipFile(tmp_path / "out/model.pt2") as archive:
        names = archive.namelist()
        inside = json.loads(archive.read(next(n for n in names if n.endswith("contract.json"))))
        # Nothing in it is a pickle: they begin with this byte, or are zip archives.
        assert not [n for n in names if archive.read(n)[:2] in (b"\x80\x02", b"PK")]
    assert inside == {k: v for k, v in contract.items() if k != "check"}
    with pytest.raises(ValueError, match="exists already"):
        exported(classifier, "torch", tmp_path / "out", tiny_pack)


@pytest.mark.parametrize("fps", [None, 0, -5, "25", 1e9, True, [25]])
def test_a_rate_that_is_not_known_is_said_to_be(fps, tmp_path):
    encoder = VideoTransformer(dim=16, depth=1, heads=2, frames=8, size=32, patch=8, stride=2)
    export_backbone(encoder, tmp_path / "backbone", {"fps": fps})
    contract = contract_of(encoder, trained_rate(str(tmp_path / "backbone")), (4, 2))
    assert contract["fps"] is contract["frame_step"] is None
    assert contract_of(encoder, trained_rate("starter"), "so")["frame_step"] == 2 / 16


def test_what_differs_is_not_kept(classifier, tiny_pack, tmp_path, monkeypatch):
    real = export.write_torch

    def off(*given):
        run = real(*given)
        return lambda streams: run(streams) + np.float32(2e-4)

    monkeypatch.setattr(export, "write_torch", off)
    with pytest.raises(ValueError, match="differs"):
        exported(classifier, "torch", tmp_path / "out", tiny_pack)
    assert not list(tmp_path.iterdir())


def test_what_differs_at_another_length_has_fixed_frames(
    classifier, tiny_pack, tmp_path, monkeypatch, capsys
):
    real = export.at_length

    def off(model, frames):
        other = real(model, frames)
        torch.nn.init.constant_(other.head.bias, 2e-4)
        return other

    monkeypatch.setattr(export, "at_length", off)
    contract = exported(classifier, "torch", tmp_path / "out", tiny_pack)
    assert "at 4 frames the export differs" in contract["frames_are"]
    assert [contract[f"frames_{k}"] for k in ("min", "max", "multiple_of")] == [8, 8, 1]
    assert contract["streams"]["rgb"]["shape"] == ["batch", 3, 8, 32, 32]
    assert contract["check"]["max_abs_difference"] <= 1e-4
    assert "fixed: for any number of them it failed" in capsys.readouterr().out
    module = torch.export.load(tmp_path / "out/model.pt2").module()
    with pytest.raises(Exception, match="equal to 8"), torch.no_grad():
        module(torch.zeros(1, 3, 10, 32, 32, dtype=torch.uint8))


class Colours(nn.Module):
    """The mean colour of every frame, a token each."""

    any_frames = (1, 1)

    def __init__(self, frames: int = 8):
        super().__init__()
        self.arguments, self.input_spec = {"frames": frames}, InputSpec(frames, 2, 8)
        self.grid, self.embed_dim = (frames, 1, 1), 3

    def forward_features(self, video: torch.Tensor) -> torch.Tensor:
        self.input_spec.expect(video)
        return video.mean((3, 4)).transpose(1, 2)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.forward_features(video).mean(1)


@pytest.mark.parametrize(
    ("head", "lengths"),
    [({"per_frame": True}, (1, 1)), ({"time_segments": 4}, (4, 4)), ({"time_segments": 0}, (1, 1))],
)
def test_a_classifier_over_time_takes_any_length(head, lengths):
    model = Classifier(Colours(), CLASSES, **head).eval()
    assert lengths_of(model) == lengths
    module = program_of(model, lengths).module()
    for frames in (8, 12, 20):
        clips = random_clips(model.input_spec, frames)
        own = export.runner_of(at_length(model, frames))(clips)
        with torch.no_grad():
            assert np.abs(module(*map(torch.from_numpy, clips)).numpy() - own).max() <= 1e-4


def test_lengths_that_are_fixed_say_why(monkeypatch):
    of = lambda frames, **head: lengths_of(Classifier(Colours(frames), CLASSES, **head))
    assert "parts of time" in of(6, time_segments=4)  # 3 parts of 6 frames, 4 of 8
    monkeypatch.setattr(Colours, "any_frames", (9, 3))
    assert "from 9 frames on, in multiples of 3, and its clip has 6" in of(6)
    assert "its clip has 10" in of(10)
    assert of(12) == (9, 3)
    monkeypatch.delattr(Colours, "any_frames")
    assert "does not say" in of(8)
    half = VideoTransformer(16, 1, 2, frames=8, size=32, patch=8, motion_tokens=0.5)
    assert "motion tokens" in lengths_of(half)
    longer = VideoTransformer(16, 1, 2, frames=8, size=32, patch=8).resized(12, 0)
    assert "interpolated" in lengths_of(longer)


def test_weights_that_fit_one_length_only():
    class Wrong(Colours):
        def __init__(self, frames: int = 8):
            super().__init__(frames)
            self.weight = nn.Parameter(torch.ones(frames))

    with pytest.raises(ValueError, match="at 1 frames"):
        export.check_lengths(Wrong(), None, None, (1, 1))


def test_another_best_answer_is_a_difference():
    want = np.array([[0, 1.0], [1, 0]], np.float32)
    assert compared(want, want + np.float32(1e-5), True)["same_top1"] == 1
    near = np.array([[0, 5e-5], [1, 0]], np.float32)
    with pytest.raises(ValueError, match="1 of 2"):
        compared(near, near[:, ::-1] * np.array([[1], [0]]) + near * np.array([[0], [1]]), True)
    with pytest.raises(ValueError, match="not finite"):
        compared(want * np.nan, want * np.nan, True)


def test_weights_that_are_not_finite(tiny_pack, tmp_path):
    encoder = VideoTransformer(dim=16, depth=1, heads=2, frames=8, size=32, patch=8, stride=2)
    with torch.no_grad():
        encoder.blocks[0].fc1.weight[0, 0] = np.nan
    export_backbone(encoder, tmp_path / "backbone", {})
    with pytest.raises(ValueError, match="not finite"):
        exported(tmp_path / "backbone", "torch", tmp_path / "out", tiny_pack)
    assert not (tmp_path / "out").exists()


def test_a_folder_for_the_hub(classifier, tiny_pair, tiny_pack, tmp_path, monkeypatch):
    """It is loaded again from the folder and from the hub, with nothing else fetched."""
    contract = exported(classifier, "hf", tmp_path / "out", tiny_pack)
    assert contract["check"]["max_abs_difference"] == 0
    assert json.loads((tmp_path / "out/contract.json").read_text())["frame_step"] == 0.08
    card = (tmp_path / "out/README.md").read_text()
    for words in ("finetune", "a_b", "seed", "Intended use", "Limits", "Licence", "do\\|wn"):
        assert words in card, words
    assert "at 25 frames a second" in card
    wanted = []

    def snapshot(name: str, patterns: list[str]) -> Path:
        wanted.extend(patterns)
        return tmp_path / "out"

    monkeypatch.setattr("pretrain.backbones.hub_folder", snapshot)
    own = load_file(classifier / "model.safetensors")
    for name in (f"hf:{tmp_path / 'out'}", "hf:somebody/model"):
        model = load_classifier(name)
        assert model.classes == CLASSES
        assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())
        assert type(load_backbone(name)) is VideoTransformer
        assert at_chance(name, 3)  # what the run said of itself is still known
    assert set(wanted) == {"config.json", "manifest.json", "model.safetensors"}
    exported(tiny_pair, "hf", tmp_path / "pair", tiny_pack)
    assert load_video_text(f"hf:{tmp_path / 'pair'}").text is not None
    (tmp_path / "pair/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="corrupt"):
        load_video_text(f"hf:{tmp_path / 'pair'}")


def snippet() -> str:
    """The guide's program that runs an ONNX model without torch."""
    text = (ROOT / "recipes/README.md").read_text()
    return re.search(r"```python\n([^`]*onnxruntime[^`]*)```", text)[1]


def test_onnx_and_the_snippet_of_the_guide(classifier, tiny_pack, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra `export` is not installed")
    (tmp_path / "exported").mkdir()
    contract = exported(classifier, "onnx", tmp_path / "exported/mine", tiny_pack)
    assert contract["check"]["same_top1"] == 1
    monkeypatch.chdir(tmp_path)
    clip = np.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    np.save("clip.npy", clip)
    told: dict = {}
    source = snippet()
    assert "torch" not in source
    exec(compile(source, "guide", "exec"), told)
    model = load_classifier(str(classifier))
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        want = model(model.input_spec.normalise(video)).numpy()
    assert np.abs(told["logits"] - want).max() <= 1e-4
    (longer,) = random_clips(model.input_spec, 14)
    run = told["model"].run(None, {"rgb": longer})[0]
    assert np.abs(run - export.runner_of(at_length(model, 14))([longer])).max() <= 1e-4
    assert told["contract"]["classes"] == CLASSES
    assert told["contract"]["stride"] == 2 and told["contract"]["frame_step"] == 0.08


def test_without_the_libraries(tiny_backbone, tiny_pack, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(export, "open_clips", lambda *_: pytest.fail("packs for minutes"))
    with pytest.raises(ValueError, match=r"muybridge\[export\]"):
        exported(tiny_backbone, "onnx", tmp_path / "out", tiny_pack)
    assert not (tmp_path / "out").exists()


def test_hf_names_of_others_stay_theirs(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match=r"model\.safetensors or"):
        load_backbone(f"hf:{tmp_path}")
    monkeypatch.setattr(third_party, "hub_folder", lambda *_: pytest.fail("fetched"))
    (tmp_path / "config.json").write_text('{"builder": "Evil", "arguments": {}}')
    with pytest.raises(ValueError, match="incomplete"):
        load_backbone(f"hf:{tmp_path}")


def random_clips(spec: InputSpec, frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.random((3, *shape), np.float32) if name == "pose"
        else rng.integers(256, size=(3, *shape), dtype=np.uint8)
        for name, shape in ((n, s.shape(frames, spec.size)) for n, s in spec.streams.items())
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name, tmp_path):
    """The table of the guide, which -s prints: a small model of each, fresh, on three clips."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="the extra `export` is not installed")
    torch.manual_seed(0)
    changes = {}
    if name.startswith("vit_"):  # as published
        changes = {"motion_tokens": 1.0, "init": "xavier"}
    if name.startswith("video_swin"):
        changes = {"variant": name[-1], "frames": 32}
    model = build_model(name, small=True, **changes)
    lengths, frames = lengths_of(model), model.input_spec.frames
    assert isinstance(lengths, str) == (name in FIXED), lengths
    tried = [frames]
    if not isinstance(lengths, str):
        tried += [lengths[0], 2 * frames + lengths[1]]
    program = program_of(model, lengths)
    module = program.module()

    def run(clips: list[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return module(*map(torch.from_numpy, clips)).numpy()

    def largest(run: Callable) -> float:
        found = []
        for other in tried:
            clips = random_clips(model.input_spec, other)
            own = export.runner_of(model if other == frames else at_length(model, other))(clips)
            found.append(compared(own, run(clips), False)["max_abs_difference"])
        return max(found)

    at = lengths if isinstance(lengths, str) else f"frames {tried}"
    print(f"\n{name}: {at}; torch {largest(run):.0e}", end="")
    write = lambda: write_onnx(program, tmp_path / "m.onnx", contract_of(model, None, lengths))
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            write()
        return
    print(f", ONNX {largest(write()):.0e}")
