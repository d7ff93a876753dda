"""Recurrent networks over frame features: vanilla RNN, LSTM, GRU.

Donahue et al. 2015, "Long-term recurrent convolutional networks", https://arxiv.org/abs/1411.4389.
Many-to-one: the last state is the clip's embedding; many-to-many: the state after every frame is a
token. B clips, T frames, H width of the state.
"""

from typing import Any

import torch
from torch import Tensor, nn

from downstream.models.attention import insert
from downstream.models.images import ImageNetwork
from pretrain.spec import AnyFrames, InputSpec

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def open_forget_gates(lstm: nn.LSTM) -> None:
    """Let the forget gates start open (Jozefowicz et al. 2015), in place."""
    for name, bias in lstm.named_parameters():
        if name.startswith("bias_ih"):  # gates are i, f, g, o
            nn.init.ones_(bias.data[lstm.hidden_size : 2 * lstm.hidden_size])


class FrameRNN(nn.Module):
    """A recurrent network over the vectors of a clip's frames.

    Args:
        cell: "rnn" (tanh), "lstm" or "gru".
        network: as `ImageNetwork` takes it.
        hidden: width of the state, of each direction.
        layers: stacked recurrent layers.
        bidirectional: read the clip both ways; the width of the embedding doubles.
        frames: frames of a clip.
        stride: source frames between two sampled frames; only recorded.
        size: height and width, pixels.
        attention: blocks to insert, see `downstream.models.attention.insert`.
        subtract_mean: whether each clip's mean frame is subtracted, see `Stream`.

    Raises:
        ValueError: another cell, or the network cannot be built.
    """

    kind = "recurrent"  # to presets of published training, see `downstream.training.kind_of`

    def __init__(
        self, cell: str = "lstm", network: str | dict = "resnet18", hidden: int = 256,
        layers: int = 1, bidirectional: bool = False, frames: int = 16, stride: int = 4,
        size: int = 224, attention: str = "", subtract_mean: bool = False,
    ):  # fmt: skip
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell {cell!r} is not one of {', '.join(CELLS)}")
        self.arguments: dict[str, Any] = {
            "cell": cell, "network": network, "hidden": hidden, "layers": layers,
            "bidirectional": bidirectional, "frames": frames, "stride": stride, "size": size,
            "attention": attention, "subtract_mean": subtract_mean,
        }  # fmt: skip
        self.images = ImageNetwork(network, size)
        # Vectors of a ReLU network are all positive and of any length; a recurrent cell saturates
        # on them.
        self.norm = nn.LayerNorm(self.images.embed_dim)
        self.rnn = CELLS[cell](
            self.images.embed_dim, hidden, layers, batch_first=True, bidirectional=bidirectional
        )
        if cell == "lstm":
            open_forget_gates(self.rnn)
        self.hidden, self.bidirectional = hidden, bidirectional
        self.embed_dim, self.grid = hidden * (1 + bidirectional), (frames, 1, 1)
        self.input_spec = InputSpec(
            frames, stride, size, {"rgb": self.images.stream(subtract_mean)}
        )
        insert(self, attention)

    @property
    def any_frames(self) -> AnyFrames:
        """Other lengths of a clip that exports take."""
        if self.bidirectional or self.arguments["cell"] == "rnn":
            return "torch.export unrolls a vanilla RNN, and a bidirectional one, over its frames"
        return 2, 1

    def forward_features(self, video: Tensor) -> Tensor:
        """The state after every frame."""
        self.input_spec.expect(video)
        return self.rnn(self.norm(self.images.frames(video)))[0]

    def forward(self, video: Tensor) -> Tensor:
        """The last state of each direction: what each has read of the whole clip."""
        states = self.forward_features(video)
        if not self.bidirectional:
            return states[:, -1]
        return torch.cat([states[:, -1, : self.hidden], states[:, 0, self.hidden :]], 1)
