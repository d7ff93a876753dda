"""The flags of recipes/visualize.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.flags import Count
from pretrain.log import cli


@dataclass(frozen=True)
class Config:
    """Configuration of the figure."""

    backbone: str = ""
    """RUN/backbone, hf:OWNER/NAME of a VideoMAE or an official VideoMAE .pth."""
    video: str = ""
    """A video file; of a long one its first 10 s. For attention also a list of one video, with what
    is beside it."""
    out: str | None = None
    """Where the pictures go, by default runs/visualize-VIDEO; older ones of this recipe are
    replaced."""
    enlarge: Count = 4
    """Factor of the GIF's pixels."""
    pose: str = ""
    """Draw skeletons: "blazepose", or a file or folder with the poses of the video's frames. With a
    --backbone whose attention poses drive: draw that, by these poses."""
    skeleton: str = ""
    """The skeleton of that file, where the file leaves it open."""
    pose_weights: str = ""
    """BlazePose's weights: mediapipe's wheel or a folder; by default fetched once."""
    flow: Literal["", "dis", "tvl1", "raft_small", "raft_large"] = ""
    """Draw the optical flow that this method estimates (needs the extra `flow`)."""


def unused(config: Config) -> dict[str, str]:
    """Values without effect, and why."""
    why = {}
    if config.pose in ("", "blazepose"):
        why["skeleton"] = "without a file of poses (--pose)"
    if config.pose != "blazepose":
        why["pose_weights"] = "without --pose blazepose"
    return why


def command(main: Callable[[Config], object]) -> None:
    """Parse the command line and run the recipe's `main`."""
    cli(main, Config, unused)
