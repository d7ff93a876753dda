"""What only a GPU can show: `pytest -m gpu -n 0`. The same numbers as on the CPU, within what its
arithmetic allows.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream.models import load_backbone
from pretrain.clip import VideoText, backward_step, contrast
from pretrain.engine import Engine
from pretrain.optim import Muon, orthogonalise
from pretrain.settings import Machine
from pretrain.text import OpenClipText
from pretrain.videomae import VideoMAE, draw_tokens
from pretrain.vit import VideoTransformer
from recipes import clip, linear_probe, videomae
from tests.recipes import test_clip, test_videomae
from tests.recipes.runs import change, configure, final_weights, stop_in_step

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def small_mae() -> VideoMAE:
    torch.manual_seed(3)
    encoder = VideoTransformer(dim=64, depth=3, heads=2, frames=8, size=32, patch=8, stride=2)
    return VideoMAE(encoder, 32, 1, 1)


def masked_clips(model: VideoMAE, clips: int = 4) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    tokens = [draw_tokens("tube", model.encoder.grid, 0.75, False, rng) for _ in range(clips)]
    visible, masked = (torch.from_numpy(np.stack(t)) for t in zip(*tokens, strict=True))
    video = torch.randint(0, 256, (clips, 3, 8, 32, 32), dtype=torch.uint8)
    return [video, visible, masked]


def loss_and_gradients(model, tensors, where, dtype=None) -> tuple[float, dict]:
    model.to(where).zero_grad()
    with torch.autocast(where.type, dtype, enabled=dtype is not None):
        loss = model(*(t.to(where) for t in tensors))[0]
    loss.backward()
    return loss.item(), {n: p.grad.double().cpu() for n, p in model.named_parameters()}


def largest_difference(a: dict, b: dict) -> float:
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)).item() for n in b)


@pytest.mark.parametrize(("precision", "allowed"), [(None, 1e-4), (torch.bfloat16, 0.1)])
def test_loss_and_gradients_are_those_of_the_cpu(precision, allowed):
    model = small_mae()
    tensors = masked_clips(model)
    expected, gradients = loss_and_gradients(model, tensors, torch.device("cpu"))
    loss, found = loss_and_gradients(model, tensors, CUDA, precision)
    assert loss == pytest.approx(expected, rel=allowed / 10)
    assert largest_difference(found, gradients) < allowed


def test_a_compiled_model_computes_the_same():
    model = small_mae().to(CUDA)
    tensors = masked_clips(model)
    expected, gradients = loss_and_gradients(model, tensors, CUDA)
    compiled = torch.compile(model)
    for _ in range(2):
        model.zero_grad()
        loss = compiled(*(t.to(CUDA) for t in tensors))[0]
        loss.backward()
    found = {n: p.grad.double().cpu() for n, p in model.named_parameters()}
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert largest_difference(found, gradients) < 1e-3


def test_muon_in_bfloat16_orthogonalises():
    """What it does to singular values on the CPU in float32, it does here in bfloat16."""
    matrix = torch.randn(96, 64, device=CUDA)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.4 and values.max() < 1.6
    parameter = torch.nn.Parameter(matrix.clone())
    parameter.grad = torch.randn_like(matrix)
    Muon([parameter], 0.0).step()
    assert parameter.isfinite().all()


def test_cached_gradients_are_those_of_the_whole_batch():
    engine = Engine(Machine(), "adamw", torch.nn.Identity())
    engine.start()
    text = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    video = torch.randint(0, 256, (8, 3, 4, 16, 16), dtype=torch.uint8)
    tokens, groups = torch.randint(1, 50, (8, 6)), torch.tensor([0, 1, 2, 0, 3, 4, 1, 5])
    losses, gradients = [], []
    for passes in (1, 4):
        torch.manual_seed(0)
        tower = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8)
        words = OpenClipText({"embed_dim": 12, "text_cfg": text, "quick_gelu": False})
        model = VideoText(tower, words, 10, project=True, loss="infonce").double().to(CUDA)
        rows = torch.arange(8).chunk(passes)
        micro = [{"video": video[r], "tokens": tokens[r], "groups": groups[r]} for r in rows]
        made = partial(contrast, loss="infonce", several_positives=True)
        losses.append(backward_step(model, micro, made, engine).loss.item())
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert largest_difference(gradients[1], gradients[0]) < 1e-9


def same_within(a: dict, b: dict, allowed: float) -> bool:
    return all(torch.allclose(a[k].float(), b[k].float(), atol=allowed, rtol=allowed) for k in b)


def test_a_run_continues_and_its_backbone_is_the_cpus_too(tiny_pack, tmp_path, monkeypatch):
    """Masked reconstruction on the GPU, stopped, continued, exported, probed."""
    calm, harried = tmp_path / "calm", tmp_path / "harried"
    cfg = test_videomae.config(tiny_pack, calm, optimizer="muon")
    videomae.main(cfg)
    stop_in_step(monkeypatch, videomae, 3)
    with pytest.raises(SystemExit):
        videomae.main(change(cfg, out=str(harried)))
    videomae.main(change(cfg, out=str(harried), resume=True))
    assert same_within(final_weights(harried), final_weights(calm), 1e-3)
    assert json.loads((calm / "log.jsonl").read_text().splitlines()[-1])["step"] == 8
    encoder = load_backbone(str(calm / "backbone")).eval()
    clips = torch.rand(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = encoder(clips)
        assert torch.allclose(encoder.to(CUDA)(clips.to(CUDA)).cpu(), expected, atol=1e-4)
    results = linear_probe.main(
        configure(
            linear_probe.Config,
            str(calm / "backbone"),
            str(tiny_pack),
            str(tmp_path / "probe"),
            num_workers=0,
            attentive="on",
        )
    )
    assert results["data"]["num_test"] == 16


def test_video_and_text_learn_in_bf16(captioned_pack, tmp_path):
    cfg = test_clip.config(
        captioned_pack, tmp_path / "run", precision="auto", steps=30, val_every=0
    )
    clip.main(cfg)
    losses = [line["loss"] for line in test_clip.lines(tmp_path / "run")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def launched(configuration: str, *words: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [*start, str(ROOT / "launch" / configuration), *words], capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip


def test_launch_files_choose_the_device(tiny_pack, tmp_path):
    recipe = [
        str(ROOT / "recipes" / "videomae.py"), "--data", str(tiny_pack), "--steps", "2", "--size",
        "32", "--frames", "4", "--num-workers", "0",
    ]  # fmt: skip
    one = launched("gpus.yaml", "--num_processes", "1", *recipe, "--out", str(tmp_path / "gpu"))
    assert one.returncode == 0, one.stdout + one.stderr
    assert f"1 x {torch.cuda.get_device_name()}, bf16" in one.stdout
    cpu = launched("cpu.yaml", *recipe, "--out", str(tmp_path / "cpu"))
    assert cpu.returncode == 0, cpu.stdout + cpu.stderr
    assert "1 x CPU" in cpu.stdout
    many = str(torch.cuda.device_count() + 1)
    refused = launched("gpus.yaml", "--num_processes", many, *recipe, "--out", str(tmp_path / "no"))
    assert refused.returncode != 0 and f"{many} processes need a GPU each" in refused.stderr
