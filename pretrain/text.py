"""Text towers and their tokenizers: captions -> tokens -> embeddings.

open_clip's text transformer, fresh or with anybody's weights, or a text model of transformers. Shapes: B
captions, L tokens, D width of an embedding.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.frames import build_open_clip

# width, layers, heads of fresh text towers; "b" is that of CLIP ViT-B. Most of a small one is its vocabulary.
TEXT_SIZES = {"xs": (64, 2, 2), "ti": (128, 4, 2), "s": (384, 12, 6), "b": (512, 12, 8)}


def _sayable(text: str) -> str:
    """Text that tokenizers take: what a file's name held that is no UTF-8 becomes "?"."""
    return text.encode("utf-8", "replace").decode()


class ClipTokenizer:
    """CLIP's byte-pair tokenizer, which is part of open_clip and needs no download.

    Attributes:
        context_length: tokens of a row; longer captions are cut, their end token kept.
        pad: what fills a row.
    """

    def __init__(self, context_length: int):
        from open_clip import SimpleTokenizer

        self.context_length, self.pad = context_length, 0
        self._simple = SimpleTokenizer(context_length=context_length)

    def __call__(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        cut = []
        for row, text in zip(tokens, texts, strict=True):
            words = self._simple.encode(_sayable(text))
            cut.append(len(words) > self.context_length - 2)
            words = words[: self.context_length - 2]
            words = [self._simple.sot_token_id, *words, self._simple.eot_token_id]
            row[: len(words)] = torch.tensor(words)
        return tokens, cut


class HubTokenizer:
    """A tokenizer of transformers, with the interface of `ClipTokenizer`.

    Args:
        fast: the tokenizer.
        context_length: tokens to which captions are cut.
        clean: applied to every caption before.

    Raises:
        ValueError: it has no padding token.
    """

    def __init__(self, fast, context_length: int, clean: Callable[[str], str] = str):
        if fast.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token")
        self.context_length, self.pad = context_length, fast.pad_token_id
        self._fast, self._clean = fast, clean

    def __call__(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut."""
        texts = [self._clean(_sayable(text)) for text in texts]
        cut = [len(row) > self.context_length for row in self._fast(texts)["input_ids"]]
        rows = self._fast(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return rows["input_ids"], cut


class OpenClipText(nn.Module):
    """open_clip's text tower.

    Args:
        config: `embed_dim`, `text_cfg` and `quick_gelu` as open_clip's model configurations have them.
        tokenizer: name of the open_clip model whose tokenizer it takes; "": CLIP's own.

    Attributes:
        tokenizer: captions -> tokens.
        trims: whether rows may be cut to the longest caption among them.

    Raises:
        ValueError: the tokenizer cannot be had, or open_clip cannot build the tower.
    """

    def __init__(self, config: dict, tokenizer: str = ""):
        super().__init__()
        import open_clip

        self.arguments = {"config": config, "tokenizer": tokenizer}
        self.tower = build_open_clip(text=config).text
        self.embed_dim, context = config["embed_dim"], self.tower.context_length
        if tokenizer:
            try:
                theirs = open_clip.get_tokenizer(tokenizer)
                self.tokenizer = HubTokenizer(theirs.tokenizer, context, theirs.clean_fn)
            except (
                Exception
            ) as error:  # a hub, a file system and a tokenizer library raise many kinds
                reason = f"the tokenizer of {tokenizer} cannot be loaded: {error}"
                raise ValueError(reason) from error
        else:
            self.tokenizer = ClipTokenizer(context)
        # What follows a caption's end changes nothing only where nothing looks ahead.
        causal = getattr(self.tower, "attn_mask", None) is not None
        self.trims = causal and getattr(self.tower, "pool_type", None) == "argmax" and not tokenizer

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
        self.embed_dim, self.trims = built.hidden_size, True
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer), **special)
        self.tokenizer = HubTokenizer(fast, context_length)

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

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, D), not normalised."""
        real = tokens != self.tokenizer.pad
        states = self.tower(input_ids=tokens, attention_mask=real.long()).last_hidden_state
        weight = real.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def trim(tokens: Tensor, text: nn.Module) -> Tensor:
    """Cut token rows (B, L) to the longest caption among them, if the tower allows it."""
    if not text.trims:
        return tokens
    used = (tokens != text.tokenizer.pad).any(0).nonzero()
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
