"""Text towers and their tokenizers: captions -> tokens -> embeddings.

open_clip's text transformer, fresh or with third-party weights, or a text model of transformers.
Shapes: B captions, L tokens, D width of an embedding.
"""

import functools
import re
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain import third_party
from pretrain.names import did_you_mean

# width, layers, heads of fresh text towers; "b" is CLIP ViT-B's. A small one is mostly vocabulary.
TEXT_SIZES = {"xs": (64, 2, 2), "ti": (128, 4, 2), "s": (384, 12, 6), "b": (512, 12, 8)}
CONTEXT_LENGTH = 77  # CLIP's, tokens


def _as_utf8(text: str) -> str:
    """Text that tokenizers accept: bytes of a file's name that are no UTF-8 become "?"."""
    return text.encode("utf-8", "replace").decode()


@functools.cache
def _byte_pairs():
    """CLIP's byte pairs, read once.

    Reading takes 0.3 s; copying them with every copy of a model would take more than a second.
    """
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


class ClipTokenizer:
    """CLIP's byte-pair tokenizer, which is part of open_clip and needs no download.

    Attributes:
        context_length: tokens of a row; longer captions are cut, their end token kept.
        pad: what fills a row.
    """

    def __init__(self, context_length: int):
        self.context_length, self.pad = context_length, 0

    def __call__(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        cut, pairs = [], _byte_pairs()
        for row, text in zip(tokens, texts, strict=True):
            words = pairs.encode(_as_utf8(text))
            cut.append(len(words) > self.context_length - 2)
            words = words[: self.context_length - 2]
            words = [pairs.sot_token_id, *words, pairs.eot_token_id]
            row[: len(words)] = torch.tensor(words)
        return tokens, cut


class Tokenizer(Protocol):
    """Captions to token numbers (B, L), and which of them were cut; `pad` fills rows up."""

    context_length: int
    pad: int

    def __call__(self, texts: list[str], /) -> tuple[Tensor, list[bool]]:
        """Token numbers, and which captions were cut."""
        ...


class HubTokenizer:
    """A tokenizer of transformers, with the interface of `ClipTokenizer`.

    Args:
        fast: the tokenizer.
        vocabulary: how many tokens its model knows.
        context_length: tokens to which captions are cut.
        clean: applied to every caption before.
        blank: a token that is replaced by 0 afterwards; None: no such token.

    Raises:
        ValueError: it has no padding token.
    """

    def __init__(
        self,
        fast,
        vocabulary: int,
        context_length: int,
        clean: Callable[[str], str] = str,
        blank: int | None = None,
    ):
        if fast.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token")
        self.context_length, self.pad = context_length, fast.pad_token_id
        self._fast, self._clean, self._blank = fast, clean, blank
        self._vocabulary = vocabulary

    def __call__(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers (B, L) of captions, and which of them were cut.

        Raises:
            ValueError: the tokenizer fails, or names a token that its model does not know.
        """
        texts = [self._clean(_as_utf8(text)) for text in texts]
        with third_party.no_panic("the tokenizer that came with the text tower fails"):
            cut = [len(row) > self.context_length for row in self._fast(texts)["input_ids"]]
            rows = self._fast(
                texts,
                padding="max_length",
                truncation=True,
                max_length=self.context_length,
                return_tensors="pt",
            )
        tokens = rows["input_ids"]
        if tokens.numel() and int(tokens.max()) >= self._vocabulary:
            raise ValueError(
                f"the tokenizer names token {int(tokens.max())}, and its text tower has "
                f"{self._vocabulary}: they do not belong together"
            )
        return tokens if self._blank is None else tokens.masked_fill(tokens == self._blank, 0), cut


# What an exported tokenizer of open_clip's holds; names of tokenizers are never followed.
_TOKENIZER = {
    "json": third_party.text(2**26),
    "special": lambda v: isinstance(v, dict),  # checked where it is used
    "clean": third_party.one_of("whitespace", "lower", "canonicalize"),
    "strip_sep": third_party.flag,
}


class OpenClipText(nn.Module):
    """open_clip's text tower.

    Args:
        config: `embed_dim`, `text_cfg` and `quick_gelu` as open_clip's model configurations have
            them.
        tokenizer: as data, {"json": text of a tokenizer.json, "special": names of its special
            tokens, "clean": what is done to captions before, "strip_sep": whether 0 replaces the
            separator}; None: CLIP's own.

    Attributes:
        tokenizer: captions -> tokens.
        trims: whether rows may be cut to the longest caption among them.

    Raises:
        ValueError: a configuration is not admitted, or open_clip cannot build the tower.
    """

    def __init__(self, config: dict, tokenizer: dict | None = None):
        super().__init__()
        self.arguments = {"config": config, "tokenizer": tokenizer}
        self.tower = third_party.build_open_clip(text=config).text
        self.embed_dim, context = config["embed_dim"], self.tower.context_length
        if tokenizer:
            third_party.check(tokenizer, _TOKENIZER, "the tokenizer")
            if lacking := [key for key in _TOKENIZER if key not in tokenizer]:
                raise ValueError(f"the tokenizer lacks {', '.join(lacking)}")
            fast = third_party.build_tokenizer(tokenizer["json"], tokenizer["special"])
            blank = fast.sep_token_id if tokenizer["strip_sep"] else None
            clean = third_party.clean_caption(tokenizer["clean"])
            known = self.tower.token_embedding.num_embeddings
            self.tokenizer: Tokenizer = HubTokenizer(fast, known, context, clean, blank)
        else:
            self.tokenizer = ClipTokenizer(context)
        # Tokens after a caption's end may be cut only for causal, EOT-pooled towers.
        causal = getattr(self.tower, "attn_mask", None) is not None
        self.trims = causal and getattr(self.tower, "pool_type", None) == "argmax" and not tokenizer

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, D), not normalised."""
        whole = getattr(self.tower, "attn_mask", None)
        length = tokens.shape[1]
        if whole is None or length == len(whole):
            return self.tower(tokens)
        # open_clip applies the causal mask of the whole context, however few the tokens.
        self.tower.attn_mask = whole[:length, :length]
        try:
            return self.tower(tokens)
        finally:
            self.tower.attn_mask = whole


class HuggingFaceText(nn.Module):
    """A text model of transformers; the embedding is the mean of a caption's last hidden states.

    Args:
        config: as `pretrain.third_party.text_config` returns it, with `model_type`.
        tokenizer: the text of a tokenizer.json.
        special: names of its special tokens.
        context_length: tokens to which captions are cut.

    Raises:
        ValueError: a configuration is not admitted, or the tokenizer's data are damaged.
    """

    def __init__(self, config: dict, tokenizer: str, special: dict, context_length: int):
        super().__init__()
        self.arguments = {
            "config": config,
            "tokenizer": tokenizer,
            "special": special,
            "context_length": context_length,
        }
        self.tower = third_party.build_text_model(config)
        self.embed_dim, self.trims = self.tower.config.hidden_size, True
        fast = third_party.build_tokenizer(tokenizer, special)
        known = self.tower.get_input_embeddings()
        assert isinstance(known, nn.Embedding)
        self.tokenizer = HubTokenizer(fast, known.num_embeddings, context_length)

    @classmethod
    def from_name(cls, name: str) -> "HuggingFaceText":
        """A text model with its weights, by its hub name or folder, in evaluation mode.

        Captions are cut to `CONTEXT_LENGTH` tokens, or fewer if it knows fewer positions.

        Raises:
            ValueError: there is none, it is no text encoder, or it has no fast tokenizer or no
                padding token.
        """
        model, config, tokenizer = third_party.fetch_text_model(name)
        data = third_party.tokenizer_data(tokenizer)
        longest = getattr(model.config, "max_position_embeddings", CONTEXT_LENGTH)
        text = cls(config, data["json"], data["special"], min(CONTEXT_LENGTH, longest))
        text.tower.load_state_dict(model.state_dict())
        return text.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, D), not normalised."""
        real = tokens != self.tokenizer.pad
        states = self.tower(input_ids=tokens, attention_mask=real.long()).last_hidden_state
        weight = real.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


# A tower with `embed_dim`, `tokenizer` and `trims`.
TextTower = OpenClipText | HuggingFaceText


def unseen_words(text: TextTower, texts: list[str]) -> list[str]:
    """Words of some texts that mean nothing to a tower: the embedding of one of their tokens is 0.

    So it is in `pretrain.settings.STARTER`, of all tokens that its captions lack.
    """
    if not isinstance(text, OpenClipText) or not isinstance(text.tokenizer, ClipTokenizer):
        return []
    known = text.tower.token_embedding.weight.any(1).cpu()
    if known.all():
        return []
    words = list(dict.fromkeys(word for each in texts for word in re.findall(r"\w+", each.lower())))
    tokens, _ = text.tokenizer(words)
    return [word for word, row in zip(words, tokens, strict=True) if not known[row[row > 0]].all()]


def trim(tokens: Tensor, text: TextTower) -> Tensor:
    """Cut token rows (B, L) to the longest caption among them, if the tower allows it."""
    if not text.trims:
        return tokens
    used = (tokens != text.tokenizer.pad).any(0).nonzero()
    return tokens[:, : int(used[-1]) + 1] if len(used) else tokens[:, :1]


def fresh_text(size: str, embed_dim: int, context_length: int = CONTEXT_LENGTH) -> OpenClipText:
    """A CLIP text transformer with fresh weights.

    Raises:
        ValueError: `size` is not in `TEXT_SIZES`.
    """
    if size not in TEXT_SIZES:
        raise ValueError(
            f"--text-model {size!r} is not one of {', '.join(TEXT_SIZES)}, open_clip:MODEL/WEIGHTS "
            "or hf:NAME" + did_you_mean(size, TEXT_SIZES)
        )
    width, layers, heads = TEXT_SIZES[size]
    text_cfg = {"width": width, "layers": layers, "heads": heads, "context_length": context_length}
    return OpenClipText({"embed_dim": embed_dim, "text_cfg": text_cfg, "quick_gelu": False})
