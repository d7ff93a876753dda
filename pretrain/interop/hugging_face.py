"""Hugging Face's VideoMAE folders (`transformers`), imported and exported."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.files import is_file, is_folder, read_json, share
from pretrain.interop.layouts import (
    AS_RECORDED,
    HF,
    PUBLISHED,
    Sizes,
    clean,
    find_classifier,
    give,
    shapes,
    take,
)
from pretrain.names import first_of
from pretrain.spec import IMAGENET_MEAN, IMAGENET_STD
from pretrain.third_party import (
    check,
    either,
    flag,
    hub_folder,
    number,
    one_of,
    several,
    text,
    whole,
)
from pretrain.weights import load_torch_file, read_safetensors, unwrap


def _labels(value: object) -> bool:
    name = either(text(1000), whole(-(2**31), 2**31))
    return isinstance(value, dict) and len(value) <= 100_000 and all(map(name, value.values()))


# What is read of a Hugging Face config.json.
_READ = {
    "use_mean_pooling": flag,
    "num_attention_heads": whole(1, 256),
    "decoder_num_attention_heads": whole(1, 256),
    "num_frames": whole(1, 4096),
    "image_size": whole(1, 2048),
    "sampling_rate": whole(0, 4096),
    "image_mean": several(number(-1e6, 1e6), 3, 3),
    "image_std": several(number(1e-6, 1e6), 3, 3),
    "target_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "fc_norm_eps": number(0, 1),
    "id2label": either(one_of(None), _labels),
}


def from_hf(
    state: dict[str, Tensor], config: dict, sizes: Sizes = AS_RECORDED
) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Convert the weights of one of transformers' VideoMAE models.

    VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification are read. The key names
    of transformers 4 (q_bias), 5.0 to 5.17 (a key bias, which must be zero: VideoMAE has none) and
    5.23 are read.

    Args:
        state: the weights.
        config: the content of config.json; "layer_norm_eps" is left to `videomae.verify`.
        sizes: override what is recorded.

    Returns:
        our weights, the arguments, and the names of what was dropped.

    Raises:
        ValueError: as `from_official`; or `config` asks for what our model does not do.
    """
    from transformers import VideoMAEConfig

    if config.get("model_type") != "videomae":
        raise ValueError(f"config.json is of a {config.get('model_type')!r} model, not a videomae")
    check({k: config[k] for k in _READ if k in config}, _READ, "config.json")
    labels = config.get("id2label")
    # What the file leaves out is transformers' default.
    config = VideoMAEConfig().to_dict() | config
    state = clean(unwrap(state))
    if any(k.startswith("embeddings.") for k in state):  # VideoMAEModel by itself
        state = {f"videomae.{k}": v for k, v in state.items()}
    tuned, dropped = find_classifier(state)
    if not tuned and ("videomae.layernorm.weight" not in state or config["use_mean_pooling"]):
        raise ValueError(
            "a Hugging Face VideoMAE with use_mean_pooling has no norm after its blocks, and this "
            "one no fc_norm either: give the whole fine-tuned model, or a pretraining checkpoint "
            "(use_mean_pooling false)"
        )
    for key in list(state):
        if key.endswith("attention.key.bias"):
            if state.pop(key).any():
                raise ValueError(f"{key} is not zero: VideoMAE's attention has no bias on its keys")
            dropped.append(key)
        elif key.endswith((".q_bias", ".v_bias")):
            new = key.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
            if new in state:
                raise ValueError(f"{key} and {new} are the same weight twice")
            state[new] = state.pop(key)
        elif key.endswith("attention.query.weight"):
            parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if not all(part in state for part in parts):
                raise ValueError(
                    f"missing {first_of([part for part in parts if part not in state], 3)}"
                )
            state[key.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    encoder, decoder = shapes(state, HF)
    if not sizes.heads and (encoder["dim"], config["num_attention_heads"]) == (384, 16):
        raise ValueError(
            "config.json says 16 attention heads at width 384. The official small VideoMAE has 6, "
            "and Hugging Face's converter wrote 16: give heads, 6 for those weights or 16 if they "
            "are yours"
        )
    encoder |= {
        "heads": sizes.heads or config["num_attention_heads"],
        "frames": sizes.frames or config["num_frames"],
        "size": sizes.size or config["image_size"],
        "stride": config.get("sampling_rate", 4),
        "mean": list(config.get("image_mean", IMAGENET_MEAN)),
        "std": list(config.get("image_std", IMAGENET_STD)),
        **PUBLISHED,
        "pool": "fc_norm" if tuned else "mean",
        "trained_grid": None,
        # transformers leaves torch's default to fc_norm, whatever layer_norm_eps says.
        "norm_eps": config.get("fc_norm_eps", 1e-5) if tuned else 1e-6,
    }
    arguments: dict[str, Any] = {"encoder": encoder}
    if tuned and "classifier.weight" in state:
        arguments["classes"] = _names(labels, len(state["classifier.weight"]))
    if decoder:
        arguments["decoder"] = decoder | {
            "decoder_heads": sizes.decoder_heads or config["decoder_num_attention_heads"],
            "target_eps": config.get("target_eps", 1e-6),
            "target": "rgb",
        }
    known_better = {
        "architectures": True, "layer_norm_eps": True, "id2label": True, "label2id": True,
        "num_frames": sizes.frames, "image_size": sizes.size, "num_attention_heads": sizes.heads,
        "decoder_num_attention_heads": sizes.decoder_heads,
    }  # fmt: skip
    others = [
        f"{key} {config[key]!r} where these weights need {value!r}"
        for key, value in _hf_config(arguments).items()
        if config.get(key, value) != value and not known_better.get(key)
    ]
    if others:
        raise ValueError(f"config.json has {'; '.join(others)}")
    return take(state, HF, arguments, dropped), arguments, dropped


def _names(labels: dict | None, num: int) -> list[str]:
    """The names of `num` classes, from a config.json's id2label."""
    labels = {str(i): f"LABEL_{i}" for i in range(num)} if labels is None else labels
    missing = [i for i in range(num) if str(i) not in labels]
    if missing or len(labels) != num:
        wrong = f"not number {missing[0]}" if missing else f"{len(labels)}"
        raise ValueError(
            f"the classifier has {num} classes, and config.json's id2label names {wrong}"
        )
    return [str(labels[str(i)]) for i in range(num)]


def to_hf(ours: dict[str, Tensor], arguments: dict) -> tuple[dict[str, Tensor], dict]:
    """Convert to Hugging Face's weights (key names of transformers 5.23) and its config.json."""
    state = {}
    for name, value in give(ours, HF, arguments).items():
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{part}.")] = rows.contiguous()
        else:
            state[name] = value
    if "decoder" not in arguments and arguments["encoder"]["pool"] != "fc_norm":
        state = {k.removeprefix("videomae."): v for k, v in state.items()}
    return state, _hf_config(arguments)


def _hf_config(arguments: dict) -> dict:
    e, decoder = arguments["encoder"], arguments.get("decoder")
    config = {
        "architectures": ["VideoMAEForPreTraining" if decoder else "VideoMAEModel"],
        "model_type": "videomae", "num_channels": 3, "hidden_act": "gelu", "qkv_bias": True,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6,
        "use_mean_pooling": False, "image_size": e["size"], "patch_size": e["patch"],
        "num_frames": e["frames"], "tubelet_size": e["tubelet"], "hidden_size": e["dim"],
        "num_hidden_layers": e["depth"], "num_attention_heads": e["heads"],
        "intermediate_size": 4 * e["dim"],
        # Unknown to transformers, which keeps them: so nothing is lost on the way back.
        "sampling_rate": e["stride"], "image_mean": list(e["mean"]), "image_std": list(e["std"]),
    }  # fmt: skip
    if e["pool"] == "fc_norm":
        # Without a classifier its logits are the embedding.
        labels = {str(i): name for i, name in enumerate(arguments.get("classes", ()))}
        config |= {
            "architectures": ["VideoMAEForVideoClassification"], "use_mean_pooling": True,
            "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()},
            "fc_norm_eps": e["norm_eps"],  # unknown to transformers too
        }  # fmt: skip
    if decoder:
        config |= {
            "norm_pix_loss": True, "decoder_hidden_size": decoder["decoder_dim"],
            "decoder_num_hidden_layers": decoder["decoder_depth"],
            "decoder_num_attention_heads": decoder["decoder_heads"],
            "decoder_intermediate_size": 4 * decoder["decoder_dim"],
            "target_eps": decoder["target_eps"],  # unknown to transformers too
        }  # fmt: skip
    return config


_SHARD = re.compile(r"((?:pytorch_)?model)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


def _refuse_missing_shards(folder: Path, files: list[Path]) -> None:
    """Refuse a folder that lacks weights files named by its index or implied by their numbers.

    Raises:
        ValueError: one is not there.
    """
    wanted = set()
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if is_file(folder / index) and (not files or files[0].suffix == Path(index[:-11]).suffix):
            of = read_json(folder / index).get("weight_map")
            of = of.values() if isinstance(of, dict) else ()
            wanted |= {name for name in of if isinstance(name, str) and _SHARD.fullmatch(name)}
    for found in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        kind, _, count, suffix = found.groups()
        wanted |= {f"{kind}-{n:05}-of-{count}.{suffix}" for n in range(1, int(count) + 1)}
    if missing := sorted(wanted - {file.name for file in files}):
        raise ValueError(
            f"{len(missing)} of its {len(wanted)} weights files (shards) are missing, "
            f"{first_of(missing, 3)}: download the folder again"
        )


def read_hf(name: str) -> tuple[dict[str, Tensor], dict]:
    """Weights and config.json of a local folder or of a repository on the hub.

    Not read by transformers, which fills missing weights with fresh values.

    Raises:
        ValueError: a file is missing or damaged, or the hub does not give the repository.
    """
    folder = Path(name)
    if not is_folder(name):
        # A second look only where there is no safetensors, for older repositories.
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = hub_folder(name, ["*config.json", weights])
            if any(folder.glob(weights)):
                break
    for pattern in ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            break
    _refuse_missing_shards(folder, files)
    if not files or not (folder / "config.json").is_file():
        raise ValueError("it holds no config.json with model.safetensors or pytorch_model.bin")
    config = read_json(folder / "config.json")
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        read = read_json(processor)
        config |= {k: read[k] for k in ("image_mean", "image_std") if k in read}
    state: dict[str, Tensor] = {}
    for file in files:
        part = load_torch_file(file) if file.suffix == ".bin" else read_safetensors(file)
        if state.keys() & part.keys():
            raise ValueError(f"{file.name} repeats weights of another file")
        state |= part
    return state, config


def write_hf(ours: dict[str, Tensor], arguments: dict, folder: Path) -> None:
    """Write a new folder that transformers' from_pretrained reads, with its image processor.

    Args:
        ours: weights, see `pretrain.interop.layouts`, likewise the arguments.
        arguments: of the model.
        folder: it must not be there.
    """
    (state, config), encoder = to_hf(ours, arguments), arguments["encoder"]
    processor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "image_mean": list(encoder["mean"]),
        "image_std": list(encoder["std"]),
        "size": {"shortest_edge": encoder["size"]},
        "crop_size": {"height": encoder["size"], "width": encoder["size"]},
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    share(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
