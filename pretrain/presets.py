"""The presets that a command line means when it names none."""

from collections.abc import Sequence
from typing import Any

from pretrain.data.sources import synthetic_clips
from pretrain.flags import value_of
from pretrain.names import for_shell

AUTO, TINY = "auto", "tiny"


def preset_of(words: Sequence[str]) -> str:
    """The preset of a command line that names none: `auto` where data of one's own are given.

    Args:
        words: of the command line; without --data, or with that of the synthetic dataset: `tiny`.

    Raises:
        ValueError: as `synthetic_clips`.
    """
    data = value_of(words, "data")
    return AUTO if data and not synthetic_clips(data) else TINY


def idle_minutes(config: Any) -> dict[str, str]:
    """Whether a configuration leaves --minutes without effect, and why, as `unused` says it."""
    if config.preset != AUTO:
        data = (config.data,) if isinstance(config.data, str) else config.data
        instead = f"{AUTO} --data {' '.join(map(for_shell, data))} --minutes {config.minutes:g}"
        return {"minutes": f"with the preset {config.preset} (the preset auto has it: {instead})"}
    asked = {"steps", "epochs"} & {*config.given}
    return {"minutes": "with --steps or --epochs"} if asked else {}
