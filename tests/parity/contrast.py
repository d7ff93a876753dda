"""Contrastive losses, contrast of views and Muon on any number of processes, each to a file."""

from copy import deepcopy
from functools import partial
from itertools import product

import torch
from safetensors.torch import save_file

from pretrain.clip import VideoText, backward_step, contrast
from pretrain.engine import Engine
from pretrain.optim import Muon
from pretrain.settings import Machine
from pretrain.text import OpenClipText
from pretrain.videomae import VideoMAE
from pretrain.views import ViewObjective
from pretrain.vit import VideoTransformer

GLOBAL = 8  # clips in the batch
CASES = [(loss, several) for loss in ("infonce", "siglip") for several in (False, True)]


def main(out: str) -> None:
    """Write losses and gradients to `out`, and each process's weights after Muon beside it."""
    engine = Engine(Machine(precision="fp32", threads=1), "adamw", torch.nn.Identity())
    engine.start()
    accelerator = engine.accelerator
    world, rank = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    text_cfg = {"context_length": 6, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    text = OpenClipText({"embed_dim": 12, "text_cfg": text_cfg, "quick_gelu": False})
    results = {}
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (GLOBAL, 3, 4, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 50, (GLOBAL, 6), generator=generator)
    groups = torch.tensor([0, 1, 2, 0, 3, 4, 1, 5])
    for dtype in (torch.float32, torch.float64):
        for loss, several in CASES:
            for passes in (1, 2, 4):
                if GLOBAL % (world * passes) or (passes * world == GLOBAL and passes > 2):
                    continue
                torch.manual_seed(0)
                tower = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8)
                model = VideoText(tower, deepcopy(text), 10, project=True, loss=loss).to(dtype)
                bare, model = model, engine.prepare(model, list)
                size = GLOBAL // world // passes
                rows = torch.arange(GLOBAL).reshape(passes, world, size)[:, rank]
                micro = [
                    {"video": video[r], "tokens": tokens[r], "groups": groups[r]} for r in rows
                ]
                made = partial(contrast, loss=loss, several_positives=several)
                result = backward_step(model, micro, made, engine)
                value = accelerator.reduce(result.loss.detach()) / world
                name = f"{dtype} {loss} {several} {passes}"
                results[f"{name} loss"] = value.reshape(1).clone()
                for n, p in bare.named_parameters():
                    results[f"{name} {n}"] = (
                        torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    )
                    assert p.grad is not None, n
    weights = {"views": (0.5, 0.0, True), "sigreg": (0.0, 0.5, False)}
    for dtype, kind in product((torch.float32, torch.float64), weights):
        torch.manual_seed(0)
        encoder = VideoTransformer(24, 1, 2, frames=4, size=16, patch=8)
        bare = ViewObjective(VideoMAE(encoder, 12, 1, 2), 2, *weights[kind]).to(dtype)
        model = engine.prepare(bare, list)
        rows = torch.arange(GLOBAL).reshape(world, -1)[rank]
        places = torch.rand(GLOBAL, 8, generator=torch.Generator().manual_seed(2)).argsort(1)[rows]
        clips = torch.tensor([4, 4, 2, 2, 9, 9, 4, 4])[rows]  # one of them twice
        loss, found = model(video[rows], places[:, :3], places[:, 3:], clips)
        engine.backward(loss)
        name = f"{dtype} {kind}"
        results[f"{name} loss"] = (accelerator.reduce(loss.detach()) / world).reshape(1).clone()
        results[f"{name} found"] = (accelerator.reduce(found) / world).reshape(1).clone()
        results |= {f"{name} {n}": p.grad.clone() for n, p in bare.named_parameters()}
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 8)]  # fewer than four processes
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    muon = Muon(matrices, 0.1)
    muon.param_groups[0]["lr"] = 0.1
    for _ in range(2):
        for p in matrices:
            p.grad = torch.randn_like(p)
        muon.step()
    results |= {f"muon {i}": p.detach() for i, p in enumerate(matrices)}
    if rank == 0:
        save_file(results, out)
    save_file({f"{i}": p.detach() for i, p in enumerate(matrices)}, f"{out}.{rank}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # or gloo's threads may outlive the interpreter, which aborts
