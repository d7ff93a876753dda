"""Text towers and their tokenizers: captions -> tokens -> embeddings.

open_clip's text transformer, fresh or with anybody's weights, or a text model of transformers. Shapes: B
captions, L tokens, D width of an embedding.
"""

import json

import torch
from torch import Tensor, nn

from pretrain.frames import build_open_clip

# width, layers, heads of fresh text towers; "b" is that of CLIP ViT-B.
TEXT_SIZES = {"ti": (128, 4, 2), "s": (384, 12, 6), "b": (512, 12, 8)}


class OpenClipText(nn.Module):
    """open_clip's text tower.

    Args:
        config: `embed_dim`, `text_cfg` and `quick_gelu` as open_clip's model configurations have them.
        tokenizer: name of the open_clip model whose tokenizer it takes; "": CLIP's own, which is part of
            open_clip and needs no download.

    Raises:
        ValueError: the tokenizer cannot be had, or open_clip cannot build the tower.
    """

    def __init__(self, config: dict, tokenizer: str = ""):
        super().__init__()
        import open_clip

        self.arguments = {"config": config, "tokenizer": tokenizer}
        self.tower = build_open_clip(text=config).text
        self.embed_dim, self.context_length = config["embed_dim"], self.tower.context_length
        self._simple = not tokenizer
        if self._simple:
            self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        else:
            try:
                self.tokenizer = open_clip.get_tokenizer(tokenizer)
            except (
                Exception
            ) as error:  # a hub, a file system and a tokenizer library raise many kinds
                raise ValueError(
                    f"the tokenizer of {tokenizer} cannot be loaded: {error}"
                ) from error
        # Tokens after a caption's end change nothing only where nothing looks ahead.
        pool = getattr(self.tower, "pool_type", None)
        mask = getattr(self.tower, "attn_mask", None)
        self.pad = 0 if self._simple and pool == "argmax" and mask is not None else None

    def tokenize(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut to the context length."""
        if not self._simple:
            tokens = self.tokenizer(texts)
            pad = tokens[:, -1:].mode(0).values if len(texts) else 0
            return tokens, [bool(t[-1] != pad and t[-1] != t[-2]) for t in tokens]
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        cut = []
        for row, text in zip(tokens, texts, strict=True):
            words = self.tokenizer.encode(text)
            cut.append(len(words) > self.context_length - 2)
            words = words[: self.context_length - 2]
            words = [self.tokenizer.sot_token_id, *words, self.tokenizer.eot_token_id]
            row[: len(words)] = torch.tensor(words)
        return tokens, cut

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, D), not normalised."""
        whole = getattr(self.tower, "attn_mask", None)
        length = tokens.shape[1]
        if whole is None or length == len(whole):
            return self.tower(tokens)
        # open_clip applies the causal mask of the whole context whatever the tokens' number.
        self.tower.attn_mask = whole[:length, :length]
        try:
            return self.tower(tokens)
        finally:
            self.tower.attn_mask = whole


class HuggingFaceText(nn.Module):
    """A text model of transformers; the embedding is the mean of its last states over a caption's tokens.

    Args:
        config: what `AutoConfig` saved, with `model_type`.
        tokenizer: the text of a tokenizer.json.
        special: names of its special tokens.
        context_length: tokens to which captions are cut.
    """

    def __init__(self, config: dict, tokenizer: str, special: dict, context_length: int):
        super().__init__()
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

        self.arguments = {
            "config": config, "tokenizer": tokenizer, "special": special, "context_length": context_length,
        }  # fmt: skip
        built = AutoConfig.for_model(**config)
        self.tower = AutoModel.from_config(built)
        self.embed_dim, self.context_length = built.hidden_size, context_length
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer), **special
        )
        self.pad = self.tokenizer.pad_token_id
        assert self.pad is not None

    @classmethod
    def from_name(cls, name: str, context_length: int = 77) -> "HuggingFaceText":
        """A text model with its weights, by its hub name or folder.

        Raises:
            ValueError: it is not there, is no text encoder, or has no fast tokenizer or padding token.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"transformers cannot load a text model {name!r}: {str(error).splitlines()[0]}"
            ) from error
        if getattr(model.config, "hidden_size", None) is None or model.config.is_encoder_decoder:
            raise ValueError(f"{name!r} is not a plain text encoder (such as a BERT)")
        if not tokenizer.is_fast or tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {name!r} has no tokenizer.json or no padding token")
        special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        longest = getattr(model.config, "max_position_embeddings", context_length)
        # to_json_string drops what equals the defaults and keeps JSON to plain types.
        config = json.loads(model.config.to_json_string(use_diff=False))
        text = cls(
            config, tokenizer.backend_tokenizer.to_str(), special, min(context_length, longest)
        )
        text.tower.load_state_dict(model.state_dict())
        return text

    def tokenize(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut to the context length."""
        full = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        cut = [len(row) > self.context_length for row in full]
        out = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )  # fmt: skip
        return out["input_ids"], cut

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, D), not normalised."""
        real = tokens != self.pad
        states = self.tower(input_ids=tokens, attention_mask=real.long()).last_hidden_state
        weight = real.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def trim(tokens: Tensor, pad: int | None) -> Tensor:
    """Cut token rows (B, L) to the longest caption among them; as they are if `pad` is None."""
    if pad is None:
        return tokens
    used = (tokens != pad).any(0).nonzero()
    return tokens[:, : int(used[-1]) + 1] if len(used) else tokens[:, :1]


def fresh_text(size: str, embed_dim: int, context_length: int = 77) -> OpenClipText:
    """A CLIP text transformer with fresh weights.

    Raises:
        ValueError: `size` is not in `TEXT_SIZES`.
    """
    if size not in TEXT_SIZES:
        raise ValueError(
            f"--text-tower {size!r} is not one of {', '.join(TEXT_SIZES)}, open_clip:MODEL/WEIGHTS or hf:NAME"
        )
    width, layers, heads = TEXT_SIZES[size]
    text_cfg = {"width": width, "layers": layers, "heads": heads, "context_length": context_length}
    return OpenClipText({"embed_dim": embed_dim, "text_cfg": text_cfg, "quick_gelu": False})
