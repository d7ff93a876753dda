"""An objective from outside the repository: one file, and one recipe of it on `TrainingRun`."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from downstream.models import load_backbone
from pretrain import log
from tests.recipes.runs import equal, final_weights, stop_in_step

OBJECTIVE = '''
"""The mean colour of the second half of a clip, predicted from the first."""

from torch import nn


class HiddenColour(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, 3)
        self.arguments = {"encoder": encoder.arguments}

    def forward(self, video):
        half, seen = video.shape[2] // 2, video.clone()
        seen[:, :, half:] = 128
        colour = video[:, :, half:].float().mean((2, 3, 4)) / 255
        predicted = self.head(self.encoder(self.encoder.input_spec.normalise(seen)))
        return (predicted - colour).square().mean()
'''
RECIPE = '''
"""Pretrain by predicting the mean colour of hidden frames."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hidden_colour import HiddenColour

from downstream.models import build_model
from pretrain import backbones, log, settings
from pretrain.data.cache import open_data, packing_side
from pretrain.data.shards import TrainClips
from pretrain.engine import Engine
from pretrain.flags import Seed
from pretrain.loop import TrainingRun, plan_run
from pretrain.optim import learning_rate, make_optimizers, set_rate
from pretrain.processes import is_first
from pretrain.run import try_run


@dataclass(frozen=True)
class Config:
    """Predict the mean colour of hidden frames."""

    preset: str = "tiny"
    data: str = "synthetic"
    split: str = "train"
    out: str = "runs/colour"
    model: str = "vit_xs"
    seed: Seed = 0
    optim: settings.OptimFlags = settings.OPTIM
    machine: settings.MachineFlags = settings.MACHINE
    run: settings.RunFlags = settings.RUN


def train_step(model, engine, batches, accumulate, clip_grad):
    total = torch.zeros((), device=engine.device)
    for i in range(accumulate):
        engine.sync(last=i == accumulate - 1)
        loss = model(next(batches)["rgb"].to(engine.device)) / accumulate
        engine.backward(loss)
        total += loss.detach()
    return total, engine.step(clip_grad)


def main(cfg):
    torch.manual_seed(cfg.seed)
    model, optim = HiddenColour(build_model(cfg.model, small=True)), cfg.optim
    spec = model.encoder.input_spec
    engine = Engine(cfg.machine, optim.optimizer, model)
    try_run(Path(cfg.out), cfg, set())
    pack = open_data(cfg.data, packing_side(spec.size), say=is_first())
    ids = pack.split_if_any(cfg.split)
    engine.start()
    plan = plan_run(optim, len(ids), engine.processes)
    fingerprint = pack.index["fingerprint"]
    with TrainingRun(Path(cfg.out), cfg, fingerprint, plan, engine, set()) as run:
        run.print_plan("colour of hidden frames", {"model": cfg.model, "rate": plan.rates})
        made = lambda: make_optimizers(optim.optimizer, model, optim.weight_decay, optim.betas)
        wrapped = engine.prepare(model, made)
        run.restore({"loss": None})
        dataset = TrainClips(pack, ids, spec, cfg.seed, 1, (1.0, 0.8), lambda *_: {})
        with run.batches(dataset) as batches:
            while run.unfinished:
                lr = learning_rate(run.step, plan.steps, plan.warmup, plan.peak, plan.final)
                set_rate(engine.optimizers, lr)
                loss, norm = train_step(
                    wrapped, engine, batches, plan.accumulate, optim.clip_grad
                )
                (loss,) = run.agree(norm, [loss])
                if run.log_due():
                    run.log({"loss": loss, "lr": lr}, f"loss {loss:.4f}")
                run.finish_step({"loss": loss})
        with engine.whole() as whole:
            if run.end():
                exported = run.folder / "backbone"
                said = run.provenance("hidden_colour", cfg.split)
                backbones.export_backbone(whole.encoder, exported, said)
                run.print_done({"backbone": exported}, f"linear_probe.py --backbone {exported}")
        return run.state


if __name__ == "__main__":
    log.cli(main, Config)
'''


def test_an_objective_is_one_file_and_one_recipe(
    tmp_path: Path, tiny_pack: Path, monkeypatch, capsys
) -> None:
    """It learns, is stopped and continues to the same bits, and exports a backbone."""
    (tmp_path / "hidden_colour.py").write_text(OBJECTIVE)
    (tmp_path / "colour_recipe.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = importlib.import_module("colour_recipe")

    def start(out: str, steps: int = 6) -> None:
        words = f"--data {tiny_pack} --out {tmp_path / out} --batch-size 8 --micro-batch 4"
        words += f" --steps {steps} --base-lr 0.0003 --warmup 0.2 --precision fp32 --num-workers 0"
        words += " --threads 1 --log-seconds 0"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["colour_recipe.py", *words.split()])
            log.cli(recipe.main, recipe.Config)

    start("calm")
    losses = [line["loss"] for line in log.read_log(tmp_path / "calm" / "log.jsonl")[0]]
    assert len(losses) == 6 and losses[-1] < losses[0]
    said = capsys.readouterr().out
    assert "8 clips = 2 micro-batches x 4 clips decoded" in said and "checkpoints" in said
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_step(patch, recipe, 3)
        start("harried")
    start("harried")
    assert "continuing from" in capsys.readouterr().out
    assert equal(final_weights(tmp_path / "calm"), final_weights(tmp_path / "harried"))
    encoder = load_backbone(str(tmp_path / "calm" / "backbone"))
    spec = encoder.input_spec
    assert encoder(torch.zeros(1, 3, spec.frames, spec.size, spec.size)).shape[1] > 0
    with pytest.raises(SystemExit):  # nor is a run continued with other values
        start("calm", steps=7)
    assert "run that differs (steps: 6 -> 7)" in capsys.readouterr().err
