"""Views of one clip compared, and with all other clips, beside masked reconstruction or alone.

CAN (Mishra et al. 2022, https://arxiv.org/abs/2210.16870): reconstruction trains single tokens and
little their mean. A contrastive loss between the mean tokens of two differently masked, cropped and
coloured views makes the mean token distinguish clips, at no further encoder pass. The paper's noise
prediction is left out. LeJEPA's loss of the same views is in `pretrain/sigreg.py`. Shapes: b views
of one process, G of all; D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.clip import gather
from pretrain.loop import Plan
from pretrain.masked import MaskedPixels
from pretrain.sigreg import lejepa
from pretrain.videomae import VideoMAE

TEMPERATURE = 0.1  # the paper's
HIDDEN, OUT = 512, 128  # widths of the head, which is not exported


def match_views(embeddings: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of every view against all others of the global batch; its clip's are positives.

    Args:
        embeddings: (b, D) unit vectors.
        clips: (b,) integers, equal where the clip is: two views at least, more where an epoch's end
            and the beginning of the next one meet in a batch. The target is spread evenly over the
            others.

    Returns:
        the loss of this process's rows, whose mean over the processes is that of the global batch,
        gradients included; and the view-retrieval accuracy: the fraction of views nearest to one of
        their own clip.
    """
    everything = gather(embeddings)
    with torch.no_grad():
        all_clips = gather(clips)
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = torch.arange(len(everything), device=embeddings.device)
    itself = rows[rank * len(embeddings) :][: len(embeddings), None] == rows
    positive = (clips[:, None] == all_clips) & ~itself
    logits = embeddings @ everything.T / TEMPERATURE
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast's are bf16
    logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
    loss = F.cross_entropy(logits, positive.to(logits.dtype) / positive.sum(1, keepdim=True))
    hits = positive.gather(1, logits.argmax(1, keepdim=True))
    return loss, hits.float().mean()


class ViewObjective(nn.Module):
    """What a model learns from the views of a clip, beside masked reconstruction or alone.

    Args:
        masked: what reconstructs; its decoder is dropped where nothing is to be reconstructed.
        views: of each clip in a batch.
        contrast: weight of `match_views`; 0: none.
        sigreg: weight of `lejepa`, instead; 0: none.
        reconstruct: whether to reconstruct, too.

    Raises:
        ValueError: a weight is negative, both are given or none is, or a single view has nothing to
            be compared with.
    """

    step: Tensor

    def __init__(
        self, masked: VideoMAE | MaskedPixels, views: int, contrast: float, sigreg: float,
        reconstruct: bool,
    ):  # fmt: skip
        super().__init__()
        if contrast and sigreg:
            raise ValueError(
                f"--contrast {contrast:g} and --sigreg {sigreg:g} both keep clips apart: give one "
                "of them"
            )
        name, weight = ("sigreg", sigreg) if sigreg else ("contrast", contrast)
        if not weight:
            raise ValueError("--no-reconstruct leaves nothing to learn: give --sigreg 1 --views 2")
        if weight < 0:
            raise ValueError(f"--{name} {weight:g} is not positive: give 0 for none")
        if views < 2:
            raise ValueError(
                f"--{name} {weight:g} compares the views of a clip and there is {views}: give "
                "--views 2"
            )
        self.masked, self.views, self.weight, self.reconstruct = masked, views, weight, reconstruct
        dim = masked.encoder.embed_dim
        self.head = nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT)
        )
        self.contrasts = name == "contrast"
        if not self.contrasts:  # the directions of a step are the same where a run is continued
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        if not reconstruct:
            masked.drop_decoder()
        # What rebuilds it all; written into checkpoints.
        self.arguments = masked.arguments | {name: {"views": views, "weight": weight}}

    def forward(
        self, video: Tensor, visible: Tensor, masked: Tensor, clips: Tensor,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss of views; for `clips` see `match_views`, for the rest what reconstructs.

        The views of a clip follow one another.

        Returns:
            the sum of the losses, and the view-retrieval accuracy.
        """
        if self.reconstruct:
            loss, _, tokens = self.masked.rebuild(video, visible, masked, target)
        else:
            tokens = self.masked.see(video, visible, masked)
            loss = tokens.new_zeros(())
        embeddings = self.head(tokens.mean(1))
        with torch.set_grad_enabled(self.contrasts and torch.is_grad_enabled()):
            contrast, found = match_views(F.normalize(embeddings, dim=-1), clips)
        if self.contrasts:
            return loss + self.weight * contrast, found
        apart = lejepa(embeddings.unflatten(0, (-1, self.views)), self.step)
        self.step += self.training
        return loss + self.weight * apart, found


def refuse_batch(name: str, plan: Plan, micro_batch: int) -> None:
    """Raise ValueError for a batch whose clips cannot be compared, by the flag `name`."""
    if plan.accumulate > 1:
        raise ValueError(
            f"--{name} compares the clips of one pass and a batch of {plan.batch_size} takes "
            f"{plan.accumulate}: raise --micro-batch, now {micro_batch}, or lower --batch-size"
        )
    if plan.decodes_per_step == 1:
        raise ValueError(
            f"--{name} compares clips and a batch of {plan.batch_size} has {plan.views} views of "
            "one: raise --batch-size"
        )
