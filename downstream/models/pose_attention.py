"""Attention over a 3-D network's features that the poses drive, separately in space and in time.

Das et al. 2019, "Toyota Smarthome: real-world activities of daily living" (ICCV), section 4,
separable STA. B clips, (t, h, w) the grid of the features, D their width, H width of the poses'
embedding, Z hidden units.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from downstream.models.two_stream import common_spec, part_of
from pretrain.spec import Backbone


class PoseAttention(nn.Module):
    """Separable spatio-temporal attention, driven by poses, over the features of a video network.

    With h the embedding of the poses and g the features (t, h, w, D) of the video,

        alpha = sigmoid(V_s tanh(W_s h + b_s) + c_s), over the h w places,
        beta = softmax(V_t tanh(W_t h + b_t) + c_t), over the t times;

    g alpha and g beta are averaged over the grid, each in a branch of its own, and put side by
    side. Trained in stages: the network of poses on the classes, the video network on the classes,
    then all of it, with the regulariser below, the network of poses as it is (`freeze_pose`).

    Sources. The authors' code, in Keras (attention of 49 and 8 over I3D's Mixed_5c): the equations
    with Z = 256, V and c that start at zero (every place at a half, every time alike), a frozen
    LSTM. Its I3D is trained on. The re-implementation of Climent-Perez & Florez-Revuelta 2021
    (Sensors 21(3), 1005; DAIGroup/separable_STA): the same, and the paper's regulariser; the
    authors' own code has none in this network (its 1e-5 (1 - sum)^2 is unused). We differ:

    - The mean is over all times. Both codes average over pairs of neighbouring times, so that the
      first and the last count half, and classify each pair; the authors' classifier then weighs
      pairs by class, the other takes the mean of their logits.
    - Dropout is behind the means alone (`Classifier`). In Keras the frozen LSTM's own, 0.5 on h,
      stays on in the authors' training.
    - The regulariser is the mean over clips. There alpha's norm is that of the whole batch, and
      beta's term the batch's sum.

    Args:
        video: a backbone of pixels with a grid; I3D as published.
        pose: a backbone of joints; the stacked LSTM as published.
        hidden: Z, 256 as published.
        freeze_pose: whether the network of poses stays as it was trained.
        space: factor of the regulariser of alpha, 1e-5 as re-implemented.
        time: likewise of beta.
        stride: source frames between two sampled ones, 0: a frame of each equal part; None: those
            of the longer one.

    Raises:
        ValueError: the two cannot share a clip, see `common_spec`, or the video network has no
            places or times to choose from.
    """

    parts = ("video", "pose")  # arguments that are models, see `pretrain.backbones`
    kind = "pose_attention"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = "its attention has a weight for every time of the clip"

    def __init__(
        self, video: nn.Module, pose: nn.Module, hidden: int = 256, freeze_pose: bool = True,
        space: float = 1e-5, time: float = 1e-5, stride: int | None = None,
    ):  # fmt: skip
        super().__init__()
        assert isinstance(video, Backbone) and isinstance(pose, Backbone)
        if math.prod(video.grid) == 1:
            raise ValueError(
                f"{type(video).__name__} has one token for the whole clip, and pose attention "
                "weighs places and times: take a 3-D network"
            )
        if set(pose.input_spec.streams) != {"pose"}:
            raise ValueError(f"{type(pose).__name__} sees other things than joints")
        self.arguments: dict[str, Any] = {
            "hidden": hidden, "freeze_pose": freeze_pose, "space": space, "time": time,
            "stride": stride,
        }  # fmt: skip
        self.video, self.pose = video, pose
        self.grid, self.embed_dim = video.grid, 2 * video.embed_dim
        spec = common_spec([video.input_spec, pose.input_spec])
        self.input_spec = spec if stride is None else replace(spec, stride=stride)
        times, places = self.grid[0], self.grid[1] * self.grid[2]
        self.space = nn.Sequential(
            nn.Linear(pose.embed_dim, hidden), nn.Tanh(), nn.Linear(hidden, places)
        )
        self.time = nn.Sequential(
            nn.Linear(pose.embed_dim, hidden), nn.Tanh(), nn.Linear(hidden, times)
        )
        for branch in (self.space, self.time):
            for parameter in branch[-1].parameters():
                nn.init.zeros_(parameter)
        self.regulariser: Tensor | None = None  # of the last clips, see `forward_features`
        if freeze_pose:
            pose.requires_grad_(False)

    def train(self, mode: bool = True) -> "PoseAttention":
        """As `nn.Module.train`; a network of poses that is frozen stays in evaluation mode."""
        super().train(mode)
        if self.arguments["freeze_pose"]:
            self.pose.eval()
        return self

    def attentions(self, clip: Any) -> tuple[Tensor, Tensor]:
        """Attention over space (B, h, w), each in 0 to 1, and over time (B, t), which sums to 1."""
        self.input_spec.expect(clip)
        seen = self.pose(part_of(clip, self.pose.input_spec))
        space, time = self.space(seen), self.time(seen)
        return space.sigmoid().unflatten(1, self.grid[1:]), time.softmax(1)

    def forward_features(self, clip: Any) -> Tensor:
        """Features weighed by place, and by time, side by side.

        Leaves in `regulariser` what the paper adds to the loss, which `downstream.finetune` does
        wherever in a classifier this network is: the mean over the clips of

            space |alpha| + time sum of (1 - beta)^2,

        which keeps alpha small and every time in view. Other losses, such as of contrast, do not
        have it.
        """
        space, time = self.attentions(clip)
        added = self.arguments["space"] * space.flatten(1).norm(dim=1)
        added = added + self.arguments["time"] * (1 - time).square().sum(1)
        self.regulariser = added.mean()
        tokens = self.video.forward_features(part_of(clip, self.video.input_spec))
        features = tokens.unflatten(1, self.grid)
        by_place = features * space[:, None, :, :, None]
        by_time = features * time[:, :, None, None, None]
        return torch.cat([by_place, by_time], -1).flatten(1, 3)

    def forward(self, clip: Any) -> Tensor:
        """Both branches averaged over the grid."""
        return self.forward_features(clip).mean(1)
