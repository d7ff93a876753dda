"""Networks on people's joints instead of pixels: what they share, and the stacked LSTM.

Das et al. 2019, "Toyota Smarthome: real-world activities of daily living" (ICCV), whose attention
the LSTM drives (`pose_attention.py`); three layers, after Shahroudy et al. 2016
(https://arxiv.org/abs/1604.02808). B clips, K coordinates and a confidence, T frames, P people, J
joints, H width of the state.
"""

from typing import Any

import torch
from torch import Tensor, nn

from downstream.models.recurrent import open_forget_gates
from pretrain.data.poses import SKELETONS
from pretrain.names import did_you_mean
from pretrain.spec import InputSpec, Joints


def joints_of(skeleton: str, coordinates: int, people: int) -> Joints:
    """The stream of the joints of a skeleton that has a name.

    Args:
        skeleton: in `SKELETONS`.
        coordinates: 2 or 3, see `Joints`.
        people: likewise.

    Raises:
        ValueError: no skeleton has this name.
    """
    if skeleton not in SKELETONS:
        raise ValueError(
            f"there is no skeleton {skeleton!r:.80}{did_you_mean(skeleton, SKELETONS)}: give one "
            f"of {', '.join(SKELETONS)}"
        )
    return Joints(skeleton, len(SKELETONS[skeleton].joints), coordinates, people)


def from_root(pose: Tensor, root: int) -> Tensor:
    """Coordinates (B, K - 1, T, P, J) relative to where the first person was at first.

    The origin is the root joint of the first person in the first frame in which it is seen, as in
    the code of Das et al.; in a clip where it never is, what it was before. Joints that are not
    seen are 0.

    Args:
        pose: normalised (B, K, T, P, J).
        root: index of the joint.
    """
    where, seen = pose[:, :-1], pose[:, -1:] > 0
    first = seen[:, 0, :, 0, root].int().argmax(1)
    clips = torch.arange(pose.shape[0], device=pose.device)
    origin = where[clips, :, first, 0, root]
    return (where - origin[:, :, None, None, None]) * seen


class SkeletonLSTM(nn.Module):
    """A stacked LSTM over the joints of a clip's frames; its last state is the embedding.

    The joints are relative to the root (`from_root`), and every coordinate is normalised over the
    batch, as ST-GCN does and Das et al. do not: hands, which say most, move less far than feet are
    from the root. On MSR Action3D (odd people learned, even people tested, one seed, 128 wide, 16
    frames) this was worth 3 points.

    The authors train it with Adam at a rate of .005, gradients clipped at 1, a dropout of .5 behind
    the last state, on one random frame of each of `frames` equal parts.

    Args:
        skeleton: whose joints, a name in `pretrain.data.poses.SKELETONS`.
        coordinates: 2 or 3 of a joint.
        people: in a frame, their joints side by side; of NTU RGB+D 2.
        hidden: width of the state, 512 as published.
        layers: 3 as published.
        frames: of a clip; 20 for NTU RGB+D and 30 for Toyota Smarthome as published.
        stride: source frames between two sampled ones; 0: a frame of each equal part.
        size: of the crop in which 2-D joints are, pixels.

    Raises:
        ValueError: no skeleton has this name, or the numbers are none of joints.
    """

    kind = "skeleton_lstm"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = (2, 1)  # other lengths of a clip that exports take, see `pretrain.spec.AnyFrames`

    def __init__(
        self, skeleton: str = "kinect25", coordinates: int = 3, people: int = 1, hidden: int = 512,
        layers: int = 3, frames: int = 20, stride: int = 0, size: int = 224,
    ):  # fmt: skip
        super().__init__()
        self.arguments: dict[str, Any] = {
            "skeleton": skeleton, "coordinates": coordinates, "people": people, "hidden": hidden,
            "layers": layers, "frames": frames, "stride": stride, "size": size,
        }  # fmt: skip
        joints = joints_of(skeleton, coordinates, people)
        self.root = SKELETONS[skeleton].root
        inputs = coordinates * people * joints.joints
        self.norm = nn.BatchNorm1d(inputs)
        self.rnn = nn.LSTM(inputs, hidden, layers, batch_first=True)
        open_forget_gates(self.rnn)
        self.embed_dim, self.grid = hidden, (frames, 1, 1)
        self.input_spec = InputSpec(frames, stride, size, {"pose": joints})

    def forward_features(self, pose: Tensor) -> Tensor:
        """The state of the last layer after every frame."""
        self.input_spec.expect(pose)
        frames = from_root(pose, self.root).permute(0, 2, 3, 4, 1).flatten(2)
        return self.rnn(self.norm(frames.transpose(1, 2)).transpose(1, 2))[0]

    def forward(self, pose: Tensor) -> Tensor:
        """The last state: what was read of the whole clip."""
        return self.forward_features(pose)[:, -1]
