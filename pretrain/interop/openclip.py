"""open_clip's pretrained pairs of towers, by name or from local files.

open_clip:ViT-B-32/laion2b_s34b_b79k     a name and a tag of open_clip's list (downloaded once)
open_clip:ViT-B-32//data/my_weights.pt   a name and a file of weights (tensors only, never executed)
open_clip:local-dir:/data/my_model       a folder with open_clip_config.json and weights
open_clip:hf-hub:OWNER/NAME              the same on the Hugging Face hub
open_clip:RN50                           the architecture, with fresh weights
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pretrain import third_party
from pretrain.clip import VideoText
from pretrain.files import is_file, is_folder, is_there, no_file, no_folder, read_json
from pretrain.names import first_line
from pretrain.spec import IMAGENET_MEAN, IMAGENET_STD
from pretrain.text import OpenClipText
from pretrain.weights import load_strict, load_torch_file, read_safetensors, refuse_misfit, unwrap

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP

PREFIX = "open_clip:"
# Of OpenAI's CLIP.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pair:
    """Towers loaded from open_clip.

    Attributes:
        config: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        tokenizer: that of its text tower as data, see `OpenClipText`; None: CLIP's own.
        visual: image tower.
        text: text tower.
        log_scale: logarithm of the factor on similarities.
        bias: SigLIP's, else None.
        preprocess: `mean`, `std`, `interpolation` of the images it was trained on.
        trained: False for fresh weights.
    """

    config: dict
    tokenizer: dict | None
    visual: nn.Module
    text: nn.Module
    log_scale: Tensor
    bias: Tensor | None
    preprocess: dict
    trained: bool

    @property
    def size(self) -> int:
        """Height and width of the images, pixels.

        Raises:
            ValueError: they are not square.
        """
        size = self.config["vision_cfg"].get("image_size", 224)
        if isinstance(size, int):
            return size
        if len(set(size)) > 1:
            raise ValueError(
                f"this image tower sees {size[0]} x {size[1]} pixels: only square ones can be used"
            )
        return size[0]

    def network(self, pixels: str = "tower") -> dict:
        """The image tower's argument for `ImageNetwork`.

        {"open_clip": configuration, "mean", "std", "interpolation"}.

        Args:
            pixels: "tower": normalised and scaled as the pair was trained; "imagenet": by
                ImageNet's mean and standard deviation, and bilinearly.
        """
        config = {k: self.config[k] for k in ("embed_dim", "vision_cfg", "quick_gelu")}
        about = self.preprocess
        if pixels == "imagenet":
            about = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
        about = {
            "mean": list(about["mean"]),
            "std": list(about["std"]),
            "interpolation": about["interpolation"],
        }
        return {"open_clip": config, **about}

    @property
    def text_config(self) -> dict:
        """The configuration for `OpenClipText`."""
        return {k: self.config[k] for k in ("embed_dim", "text_cfg", "quick_gelu")}


# As open_clip looks for them in a folder, the best first.
_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
    "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def is_trained(name: str) -> bool:
    """Whether a name of the kinds above names weights, not an architecture alone."""
    return any(sign in name.removeprefix(PREFIX) for sign in "/:")


def load_open_clip(name: str) -> Pair:
    """Load a pair of towers.

    Args:
        name: as above, with its prefix.

    Raises:
        ValueError: there is no such model, tag or file, it cannot be downloaded, its configuration
            is not admitted (`pretrain/third_party.py`), or it has no separate towers.
    """
    given = name.removeprefix(PREFIX)
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs every step on the root logger, errors too
    try:
        for kind in ("local-dir:", "hf-hub:"):
            if given.startswith(kind):
                return _from_folder(given.removeprefix(kind), kind == "hf-hub:")
        return _from_list(*given.partition("/")[::2])
    except ValueError as error:
        raise ValueError(f"open_clip cannot load {name}: {error}") from error
    except Exception as error:  # a hub, a file system and torch raise many kinds
        raise ValueError(f"open_clip cannot load {name}: {first_line(error)}") from error
    finally:
        logging.disable(level)


def _two_towers(config: object) -> dict:
    """The part of a configuration that describes the towers."""
    if not isinstance(config, dict) or "multimodal_cfg" in config:
        raise ValueError("it is a CoCa, which has no two separate towers, or no model at all")
    if lacking := [k for k in ("embed_dim", "vision_cfg", "text_cfg") if k not in config]:
        raise ValueError(f"its configuration lacks {', '.join(lacking)}")
    towers = {
        "embed_dim": config["embed_dim"],
        "vision_cfg": config["vision_cfg"],
        "text_cfg": config["text_cfg"],
        "quick_gelu": config.get("quick_gelu", False),
    }
    third_party.check_open_clip(towers, "its configuration")
    return copy.deepcopy(towers)


def _tokenizer(text_cfg: dict, source: str) -> dict:
    """The tokenizer at `source`, a folder or a name in open_clip's own list, as data."""
    about = text_cfg.get("tokenizer_kwargs", {})
    return {
        **third_party.tokenizer_data(third_party.fetch_tokenizer(source)),
        "clean": about.get("clean", "whitespace"),
        "strip_sep": about.get("strip_sep_token", False),
    }


def _from_list(model: str, weights: str) -> Pair:
    """A model in open_clip's own list, with weights by a tag or from a file, or fresh."""
    import open_clip

    config = _two_towers(third_party.listed_open_clip(model))
    own = is_file(weights)
    if weights and not own and is_there(weights):
        raise ValueError(f"{third_party.shown(weights)}: {no_file(weights)}")
    if weights and not own:
        tag = open_clip.get_pretrained_cfg(model, weights)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise ValueError(
                f"{weights!r} is neither a file nor a tag of {model}, which has "
                f"{', '.join(tags) or 'none'}"
            )
        # open_clip only warns, and uses the wrong activation.
        config["quick_gelu"] = config["quick_gelu"] or tag.get("quick_gelu", False)
    if own:
        loaded, about = _from_file(config, Path(weights)), _preprocess({})
    else:
        loaded = third_party.listed_open_clip_model(model, weights or None, config["quick_gelu"])
        about = dict(loaded.visual.preprocess_cfg)
    theirs = config["text_cfg"].get("hf_tokenizer_name")
    return _pair(
        config,
        _tokenizer(config["text_cfg"], theirs) if theirs else None,
        loaded,
        about,
        bool(weights),
    )


def _from_file(config: dict, file: Path) -> "CustomTextCLIP":
    """The towers of a configuration with the weights, or the training checkpoint, in a file."""
    state = read_safetensors(file) if file.suffix == ".safetensors" else load_torch_file(file)
    state = _separate_towers({k: v for k, v in unwrap(state).items() if isinstance(v, Tensor)})
    bias = "logit_bias" in state
    build = lambda: third_party.build_open_clip(vision=config, text=config, bias=bias)
    refuse_misfit(third_party.dry_state(build), state, str(file))  # before anything is built
    loaded = build()
    loaded.load_state_dict(state)
    return loaded


def _from_folder(where: str, hub: bool) -> Pair:
    """A folder with open_clip_config.json and weights, here or on the hub.

    open_clip would read the configuration itself and follow the names in it, so it is checked and
    built here.
    """
    folder = Path(where)
    if not hub and not is_folder(where):
        raise ValueError(f"{third_party.shown(where)}: {no_folder(where)}")
    if hub:
        folder = third_party.hub_folder(
            where, ["open_clip_config.json", *_WEIGHTS, *_TOKENIZER_FILES]
        )
    about = read_json(folder / "open_clip_config.json")
    config = _two_towers(about.get("model_cfg"))
    files = [folder / file for file in _WEIGHTS if (folder / file).is_file()]
    if not files:
        raise ValueError(f"{folder} holds no weights ({', '.join(_WEIGHTS)})")
    loaded = _from_file(config, files[0])
    tokenizer = None
    if config["text_cfg"].get("hf_tokenizer_name"):
        # The name is never followed: what a model needs lies beside it.
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json: put its tokenizer there")
        tokenizer = _tokenizer(config["text_cfg"], str(folder))
    return _pair(config, tokenizer, loaded, _preprocess(about.get("preprocess_cfg", {})), True)


def _separate_towers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of two towers, also open_clip's `CLIP`; scales as scalars."""
    if "positional_embedding" in state:
        of_text = (
            *("positional_embedding", "text_projection"),
            *("token_embedding.", "transformer.", "ln_final."),
        )
        state = {f"text.{k}" if k.startswith(of_text) else k: v for k, v in state.items()}
    state.pop("text.transformer.embeddings.position_ids", None)
    return {
        k: v.reshape(()) if k in ("logit_scale", "logit_bias") and v.numel() == 1 else v
        for k, v in state.items()
    }


def _preprocess(about: object) -> dict:
    """`mean`, `std` and `interpolation` of a folder's preprocess_cfg, or open_clip's defaults."""
    import open_clip

    three = third_party.several(third_party.number(-1e6, 1e6), 3, 3)
    about = about if isinstance(about, dict) else {}
    known = {
        "mean": about.get("mean", list(open_clip.OPENAI_DATASET_MEAN)),
        "std": about.get("std", list(open_clip.OPENAI_DATASET_STD)),
        "interpolation": about.get("interpolation", "bicubic"),
    }
    if known["interpolation"] == "random":  # what open_clip evaluates with then
        known["interpolation"] = "bicubic"
    rules = {
        "mean": three,
        "std": three,
        "interpolation": third_party.one_of("bicubic", "bilinear"),
    }
    third_party.check(known, rules, "its preprocess_cfg")
    return known


def _pair(
    config: dict, tokenizer: dict | None, loaded: "CustomTextCLIP", preprocess: dict, trained: bool
) -> Pair:
    return Pair(
        config=config,
        tokenizer=tokenizer,
        visual=loaded.visual,
        text=loaded.text,
        log_scale=loaded.logit_scale.detach().clone(),
        bias=None if loaded.logit_bias is None else loaded.logit_bias.detach().clone(),
        preprocess=preprocess,
        trained=trained,
    )


def video_text(pair: Pair, video: nn.Module) -> VideoText:
    """The whole pair, in evaluation mode: text tower and scale are its own.

    Args:
        pair: of open_clip.
        video: its image tower, on the frames of clips.
    """
    text = OpenClipText(pair.text_config, pair.tokenizer)
    load_strict(text.tower, pair.text.state_dict(), "the text tower of open_clip")
    loss = "infonce" if pair.bias is None else "siglip"
    model = VideoText(video, text, pair.config["embed_dim"], project=False, loss=loss)
    model.log_scale.data.copy_(pair.log_scale.reshape(()))
    if pair.bias is not None:
        assert model.bias is not None  # of the same loss
        model.bias.data.copy_(pair.bias.reshape(()))
    return model.eval()
