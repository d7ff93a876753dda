"""open_clip's pretrained pairs of towers, by name or from local files.

open_clip:ViT-B-32/laion2b_s34b_b79k     a name and a tag of open_clip's list (downloaded once)
open_clip:ViT-B-32//data/my_weights.pt   a name and a file of weights (tensors only, never executed)
open_clip:local-dir:/data/my_model       a folder with open_clip_config.json and weights
open_clip:hf-hub:OWNER/NAME              the same on the Hugging Face hub
open_clip:RN50                           the architecture, with fresh weights
"""

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

PREFIX = "open_clip:"


@dataclass(frozen=True)
class Pair:
    """What open_clip gave.

    Attributes:
        config: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        tokenizer: name of the model whose tokenizer its text tower takes; "": CLIP's own.
        visual: image tower.
        text: text tower.
        log_scale: logarithm of the factor on similarities.
        bias: SigLIP's, else None.
        preprocess: `mean`, `std`, `interpolation` of the images it was trained on.
        trained: False for fresh weights.
    """

    config: dict
    tokenizer: str
    visual: nn.Module
    text: nn.Module
    log_scale: Tensor
    bias: Tensor | None
    preprocess: dict
    trained: bool

    @property
    def vision_config(self) -> dict:
        """What `FrameTower` takes."""
        return {k: self.config[k] for k in ("embed_dim", "vision_cfg", "quick_gelu")}

    @property
    def text_config(self) -> dict:
        """What `OpenClipText` takes."""
        return {k: self.config[k] for k in ("embed_dim", "text_cfg", "quick_gelu")}


def _read_config(model: str) -> dict:
    """The model configuration behind a name of one of the three kinds."""
    import open_clip

    kind, _, where = model.partition(":")
    if kind == "local-dir":
        file = Path(where) / "open_clip_config.json"
    elif kind == "hf-hub":
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(where, "open_clip_config.json"))
    else:
        config = open_clip.get_model_config(model)
        if config is None:
            from difflib import get_close_matches

            near = get_close_matches(model, open_clip.list_models(), 3, 0.5)
            raise ValueError(
                f"open_clip has no model {model!r}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        return config
    return json.loads(file.read_text())["model_cfg"]


def load_open_clip(name: str) -> Pair:
    """Load a pair of towers.

    Args:
        name: as above, with its prefix.

    Raises:
        ValueError: there is no such model, tag or file, it cannot be downloaded, or it is of a kind that
            has no separate towers.
    """
    import open_clip

    given = name.removeprefix(PREFIX)
    if given.startswith(("local-dir:", "hf-hub:")):
        model, weights = given, None
    else:
        model, _, weights = given.partition("/")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its own account of every step, on the root logger
    try:
        config = _read_config(model)
        if "multimodal_cfg" in config:
            raise ValueError(f"{name} is a CoCa, which has no two separate towers")
        config = {
            "embed_dim": config["embed_dim"],
            "vision_cfg": config["vision_cfg"],
            "text_cfg": config["text_cfg"],
            "quick_gelu": config.get("quick_gelu", False),
        }
        if weights and not Path(weights).is_file():
            tag = open_clip.get_pretrained_cfg(model, weights)
            if not tag:
                tags = open_clip.list_pretrained_tags_by_model(model)
                raise ValueError(
                    f"{weights!r} is neither a file nor a tag of {model}, which has "
                    f"{', '.join(tags) or 'none'}"
                )
            # open_clip only warns, and answers with the wrong activation.
            config["quick_gelu"] = config["quick_gelu"] or tag.get("quick_gelu", False)
        loaded = open_clip.create_model(
            model,
            pretrained=weights or None,
            force_quick_gelu=config["quick_gelu"],
            force_custom_text=True,
            require_pretrained=bool(weights) or ":" in model,
        )
    except ValueError:
        raise
    except Exception as error:  # a hub, a file system, a config and torch raise many kinds
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"open_clip cannot load {name}: {lines[0] if lines else type(error).__name__}"
        ) from error
    finally:
        logging.disable(level)
    text_cfg = config["text_cfg"]
    own_tokenizer = "hf_tokenizer_name" in text_cfg or "siglip" in model.lower()
    return Pair(
        config=copy.deepcopy(config),
        tokenizer=model if own_tokenizer else "",
        visual=loaded.visual,
        text=loaded.text,
        log_scale=loaded.logit_scale.detach().clone(),
        bias=None if loaded.logit_bias is None else loaded.logit_bias.detach().clone(),
        preprocess=dict(loaded.visual.preprocess_cfg),
        trained=bool(weights) or ":" in model,
    )
