"""What launchers write into the environment, checked: anybody may have set it."""

import os
import re


def count_of(name: str) -> int:
    """A number of processes, 1 where it is not set.

    Raises:
        ValueError: it is none.
    """
    text = os.environ.get(name, "1")
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise ValueError(
            f"the environment says {name}={text!r:.40}, which is no number of processes (1, 2, "
            "...): start this with `accelerate launch` or torchrun, which set it, or unset it"
        )
    return int(text)


def flag_of(name: str) -> bool:
    """A choice of yes and no, written as accelerate takes it; no where it is not set.

    Raises:
        ValueError: it is neither.
    """
    text = os.environ.get(name, "false").lower()
    if text in ("1", "true", "yes", "on", "y", "t"):
        return True
    if text in ("0", "false", "no", "off", "n", "f"):
        return False
    raise ValueError(f"the environment says {name}={text!r:.40}: write true or false, or unset it")
