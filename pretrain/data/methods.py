"""The methods that estimate flow and poses: names, parameters, and whether they can be used here.

For the process that packs, which imports no library of numbers.
"""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from pretrain.data.guard import Refused
from pretrain.files import cache_folder

VERSION = 1  # raise it when the same frames and method would give other flow or poses

METHODS: dict[str, dict[str, dict]] = {
    # The settings of each family that were best on the synthetic dataset, see `flow_error.py`.
    "flow": {
        # Kroeger et al. 2016, https://arxiv.org/abs/1603.03590, with variational refinement.
        "dis": {"preset": "medium", "refinement": 10, "finest_scale": 0, "patch_stride": 2},
        # Zach et al. 2007, with OpenCV's defaults: what two-stream networks were trained on.
        "tvl1": {"tau": 0.25, "lambda": 0.15, "theta": 0.3, "warps": 5, "epsilon": 0.01},
        # Teed & Deng 2020, https://arxiv.org/abs/2003.12039.
        "raft_small": {"updates": 12},
        "raft_large": {"updates": 12},
    },
    # Of several people, tracked, see `blazepose.py`.
    "pose": {"blazepose": {"smooth": True}, "blazepose_raw": {"smooth": False}},
}
# How to tell where in wide footage somebody acts, see `follow.py`.
FOLLOW = ("motion", "boxes", "pose")
FOLLOW_VERSION = 1  # raise it when the same file would be cut out otherwise
LEAST = {"dis": 12, "tvl1": 16, "raft_small": 128, "raft_large": 128}  # pixels of the short side


def check_method(method: str) -> None:
    """Refuse a method whose library is not there; fetches the weights of a network.

    Raises:
        ValueError: naming what to install, or that there are no weights.
    """
    if method.startswith("blazepose"):
        pose_weights()
        return
    if method.startswith("raft"):
        from pretrain.third_party import flow_network

        flow_network(method)
        return
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"flow of {method} needs OpenCV: pip install 'muybridge[flow]', or opencv-contrib-"
            "python-headless"
        ) from error
    if method == "tvl1" and not hasattr(cv2, "optflow"):
        raise ValueError(
            "flow of tvl1 needs OpenCV's contributed modules, and another package has put its own "
            "cv2 in their place: uninstall every opencv-python*, then pip install "
            "opencv-contrib-python-headless"
        )


def check_follow(method: str, estimate: str) -> None:
    """Refuse to follow by poses that cannot be estimated in a guarded process.

    Args:
        method: of `FOLLOW`.
        estimate: the method that estimates poses; "": they come with the data.

    Raises:
        ValueError: naming what to install.
    """
    if method == "pose" and estimate:
        if find_spec("ai_edge_litert") is None:
            raise ValueError(
                "--follow pose estimates poses of files as they come, which only LiteRT does in a "
                "process of bounded memory: pip install 'muybridge[pose]', or give poses"
            )
        check_method(estimate)


def needs_torch(method: str) -> bool:
    """Whether torch runs a method, which maps more memory than a guarded process may have."""
    from pretrain.data.blazepose import fits_torch

    return method.startswith("raft") or (method.startswith("blazepose") and fits_torch())


def refuse_size(method: str, width: int, height: int) -> None:
    """Raise Refused where frames are too small for a method."""
    if min(width, height) < LEAST[method]:
        other = "give a larger --short-side, or --flow dis" if method != "dis" else "leave it out"
        raise Refused(
            f"{method} needs frames of {LEAST[method]} pixels or more, these are {width}x{height}: "
            + other
        )


def take_pose_weights(given: str, streams: Collection[str]) -> None:
    """Bring the weights of BlazePose that a user names into the cache, if any are named.

    Args:
        given: see `pose_weights`; "": none.
        streams: that the model takes.

    Raises:
        ValueError: the model takes no poses, or they are not there.
    """
    if given and "pose" not in streams:
        takes = " and ".join(streams)
        raise ValueError(
            f"without effect, leave out: --pose-weights with a model that takes {takes}"
        )
    if given:
        pose_weights(given)


def pose_weights(given: str = "") -> Path:
    """The folder of BlazePose's two networks; they are fetched once.

    Args:
        given: where they are, see `blazepose.find_weights`; "": in the cache.

    Raises:
        ValueError: they are not there, or cannot be fetched.
    """
    from pretrain.data.blazepose import find_weights

    return find_weights(given, cache_folder() / "blazepose")
