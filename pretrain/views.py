"""Views of one clip contrasted with all other clips, beside masked reconstruction.

CAN (Mishra et al. 2022, https://arxiv.org/abs/2210.16870): reconstruction trains single tokens and
little their mean. A contrastive loss between the mean tokens of two differently masked, cropped and
coloured views makes the mean token distinguish clips, at no further encoder pass. The paper's noise
prediction is left out. Shapes: b views of one process, G of all; D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.clip import gather
from pretrain.masked import MaskedPixels
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


class ViewContrast(nn.Module):
    """Masked reconstruction plus `weight` times the contrast of the views' mean tokens.

    Args:
        masked: what reconstructs.
        views: of each clip in a batch.
        weight: of the contrast.

    Raises:
        ValueError: a single view has no positive, or the weight is not positive.
    """

    def __init__(self, masked: VideoMAE | MaskedPixels, views: int, weight: float):
        super().__init__()
        if views < 2:
            raise ValueError(
                f"--contrast {weight:g} compares the views of a clip and there is {views}: give "
                "--views 2"
            )
        if weight <= 0:
            raise ValueError(f"--contrast {weight:g} is not positive: give 0 for none")
        self.masked, self.weight = masked, weight
        dim = masked.encoder.embed_dim
        self.head = nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT)
        )
        # What rebuilds it all; written into checkpoints.
        self.arguments = masked.arguments | {"contrast": {"views": views, "weight": weight}}

    def forward(
        self, video: Tensor, visible: Tensor, masked: Tensor, clips: Tensor,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss of views; for `clips` see `match_views`, for the rest what reconstructs.

        Returns:
            the sum of both losses, and the view-retrieval accuracy.
        """
        loss, _, tokens = self.masked.rebuild(video, visible, masked, target)
        embeddings = F.normalize(self.head(tokens.mean(1)), dim=-1)
        contrast, found = match_views(embeddings, clips)
        return loss + self.weight * contrast, found
