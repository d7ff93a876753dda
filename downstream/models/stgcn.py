"""ST-GCN: convolutions over the graph of a skeleton and over time.

Yan et al. 2018, "Spatial temporal graph convolutional networks for skeleton-based action
recognition" (AAAI, https://arxiv.org/abs/1801.07455). Bones as data, and joints and bones as two
networks: Shi et al. 2019 (https://arxiv.org/abs/1805.07694). B clips, C channels, T frames, P
people, J joints, K parts of a neighbourhood.
"""

from typing import Any

import torch
from torch import Tensor, nn

from downstream.models.skeleton import joints_of
from pretrain.data.poses import SKELETONS, Skeleton
from pretrain.spec import InputSpec

STRATEGIES = ("uniform", "distance", "spatial")
DATA = ("joint", "bone", "both")
# Channels and temporal stride of the blocks.
BLOCKS = ((64, 1),) * 4 + ((128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1))
TEMPORAL_KERNEL = 9


def distances(skeleton: Skeleton, joint: int) -> list[int]:
    """Bones between a joint and every joint."""
    found = {joint: 0}
    reached = [joint]
    for at in reached:  # grows while it is read
        for bone in skeleton.bones:
            for here, there in (bone, bone[::-1]):
                if here == at and there not in found:
                    found[there] = found[at] + 1
                    reached.append(there)
    return [found[j] for j in range(len(skeleton.joints))]


def partition(skeleton: Skeleton, strategy: str) -> Tensor:
    """Weights (K, J, J) of a joint's neighbours, [k, from, to], in each part of the neighbourhood.

    A joint's neighbours are itself and those at the other end of its bones; each weighs one over
    their number. The parts (section 3.3 of the paper): "uniform", one; "distance", the joint itself
    and its neighbours; "spatial", the joint itself, with them those that are as far from the root
    or farther, and those nearer to it. As in the authors' code the second of the three has the
    farther ones, but here distances are counted over the whole skeleton: their code knows them of
    the root's neighbours only, and takes all others for equally far.

    Args:
        skeleton: whose.
        strategy: of `STRATEGIES`.

    Raises:
        ValueError: another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"partition {strategy!r:.80} is not one of {', '.join(STRATEGIES)}")
    joints = len(skeleton.joints)
    near = torch.eye(joints)
    for a, b in skeleton.bones:
        near[a, b] = near[b, a] = 1
    weights = near / near.sum(0)
    itself = torch.eye(joints) * weights
    if strategy == "uniform":
        return weights[None]
    if strategy == "distance":
        return torch.stack([itself, weights - itself])
    far = torch.tensor(distances(skeleton, skeleton.root))
    nearer = (far[:, None] < far[None, :]) * weights  # the neighbour, than the joint
    return torch.stack([itself, weights - itself - nearer, nearer])


def bones_of(pose: Tensor, skeleton: Skeleton) -> Tensor:
    """Every joint less the one before it on the way from the root, (B, K, T, P, J).

    The root's is 0, and so are those of which an end is not seen; a bone's confidence is that of
    the less certain end.

    Args:
        pose: normalised (B, K, T, P, J), the last of K the confidence.
        skeleton: whose joints.
    """
    far = distances(skeleton, skeleton.root)
    before = list(range(len(far)))
    for a, b in skeleton.bones:
        for joint, other in ((a, b), (b, a)):
            if far[other] < far[joint]:
                before[joint] = other
    where, confidence = pose[:, :-1], pose[:, -1:]
    confidence = torch.minimum(confidence, confidence[..., before])
    return torch.cat([(where - where[..., before]) * (confidence > 0), confidence], 1)


class GraphBlock(nn.Module):
    """A convolution over the joints' neighbourhoods, then one over time, and a residual.

    Args:
        inputs: channels.
        outputs: channels.
        graph: (K, J, J), see `partition`.
        stride: of time.
        dropout: fraction of the activations.
        residual: whether the input is added.
    """

    graph: Tensor

    def __init__(
        self, inputs: int, outputs: int, graph: Tensor, stride: int, dropout: float, residual: bool
    ):
        super().__init__()
        self.register_buffer("graph", graph, persistent=False)
        self.importance = nn.Parameter(torch.ones_like(graph))
        self.spatial = nn.Conv2d(inputs, outputs * len(graph), 1)
        self.temporal = nn.Sequential(
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(
                outputs, outputs, (TEMPORAL_KERNEL, 1), (stride, 1), (TEMPORAL_KERNEL // 2, 0)
            ),
            nn.BatchNorm2d(outputs),
            nn.Dropout(dropout),
        )
        self.residual: nn.Module | None = nn.Identity() if residual else None
        if residual and (inputs != outputs or stride > 1):
            self.residual = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, (stride, 1)), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B P, inputs, T, J) to (B P, outputs, T over the stride rounded up, J)."""
        parts = self.spatial(x).unflatten(1, (len(self.graph), -1))
        mixed = torch.einsum("bkctv,kvw->bctw", parts, self.graph * self.importance)
        y = self.temporal(mixed.contiguous())
        return (y if self.residual is None else y + self.residual(x)).relu()


class GraphNetwork(nn.Module):
    """Batch norm of the data and ten blocks: (B, C, T, P, J) to the joints' tokens (B, T', J, D).

    Args:
        channels: of the data.
        graph: (K, J, J), see `partition`.
        width: factor on the blocks' channels.
        dropout: of every block.
    """

    def __init__(self, channels: int, graph: Tensor, width: float, dropout: float):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels * graph.shape[1])
        blocks: list[nn.Module] = []
        for published, stride in BLOCKS:
            outputs = max(round(published * width), 1)
            blocks.append(GraphBlock(channels, outputs, graph, stride, dropout, bool(blocks)))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)

    def forward(self, data: Tensor) -> Tensor:
        """See the class; people are averaged."""
        people = data.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B P, J, C, T)
        normal = self.norm(people.flatten(1, 2)).unflatten(1, people.shape[1:3])
        x = self.blocks(normal.permute(0, 2, 3, 1))
        return x.unflatten(0, (data.shape[0], -1)).mean(1).permute(0, 2, 3, 1)


class STGCN(nn.Module):
    """ST-GCN without its classifier, for any named skeleton.

    As in the paper 2-D joints come with their confidence, 3-D ones without.

    Args:
        skeleton: whose joints, a name in `pretrain.data.poses.SKELETONS`.
        coordinates: 2 or 3 of a joint.
        people: in a frame, each seen by itself and then averaged; 2 as published.
        data: "joint"; "bone", see `bones_of`; or "both", a network for each, whose embeddings are
            put side by side, so that a linear classifier adds their logits.
        strategy: how a neighbourhood is parted, see `partition`.
        width: factor on all channels; 1 as published.
        dropout: of the blocks; .5 as published for NTU RGB+D.
        frames: of a clip. The paper repeats clips up to 300; 100 frames of equal parts are those of
            later work.
        stride: source frames between two sampled ones; 0: a frame of each equal part.
        size: of the crop in which 2-D joints are, pixels.

    Raises:
        ValueError: no skeleton has this name, other data or strategy, or numbers of no joints.
    """

    kind = "stgcn"  # to presets of published training, see `downstream.training.kind_of`
    any_frames = (5, 1)  # other lengths of a clip that exports take, see `pretrain.spec.AnyFrames`

    def __init__(
        self, skeleton: str = "kinect25", coordinates: int = 3, people: int = 2,
        data: str = "joint", strategy: str = "spatial", width: float = 1.0, dropout: float = 0.5,
        frames: int = 100, stride: int = 0, size: int = 224,
    ):  # fmt: skip
        super().__init__()
        if data not in DATA:
            raise ValueError(f"ST-GCN sees {', '.join(DATA)}, not {data!r:.80}")
        self.arguments: dict[str, Any] = {
            "skeleton": skeleton, "coordinates": coordinates, "people": people, "data": data,
            "strategy": strategy, "width": width, "dropout": dropout, "frames": frames,
            "stride": stride, "size": size,
        }  # fmt: skip
        joints = joints_of(skeleton, coordinates, people)
        self.data, self.skeleton = data, SKELETONS[skeleton]
        graph = partition(self.skeleton, strategy)
        self.channels = 3  # x, y, confidence or x, y, z
        names = ("joint", "bone") if data == "both" else (data,)
        self.networks = nn.ModuleDict(
            {name: GraphNetwork(self.channels, graph, width, dropout) for name in names}
        )
        self.embed_dim = len(names) * max(round(BLOCKS[-1][0] * width), 1)
        times = frames
        for _, block_stride in BLOCKS:
            times = -(-times // block_stride)
        self.grid = (times, 1, joints.joints)
        self.input_spec = InputSpec(frames, stride, size, {"pose": joints})

    def forward_features(self, pose: Tensor) -> Tensor:
        """A token for every joint and every fourth frame, people averaged."""
        self.input_spec.expect(pose)
        tokens = []
        for name, network in self.networks.items():
            data = bones_of(pose, self.skeleton) if name == "bone" else pose
            tokens.append(network(data[:, : self.channels]))
        return torch.cat(tokens, -1).flatten(1, 2)

    def forward(self, pose: Tensor) -> Tensor:
        """The mean of the tokens."""
        return self.forward_features(pose).mean(1)
