"""What the values of a row of a list, or of a JSON beside a video, say of the video.

For packing (`sources.py`) and for conversion (`annotations`) alike.
"""

import json
import os
from collections.abc import Collection
from typing import Any

from pretrain.data.lists import BESIDE, OF_FILE, TIMES, split_of, times_of_recording
from pretrain.files import decimal

MAX_BOUND = 1000  # pixels of motion
# What pandas and numpy write where there is nothing; an empty field is no value either.
NOTHING = frozenset(("", "nan", "NaN", "<NA>", "NaT"))


def fields_of(
    row: dict, roles: dict[str, str], beside: Collection[str] = (), folder: str | None = None
) -> dict:
    """Sort the named values of one row into the fields of a source; everything becomes text.

    Args:
        row: by column or key.
        roles: of some of its columns, see `roles_of`.
        beside: the streams that are known to come with it.
        folder: in which folders of such streams may lie; None: there are none.

    Raises:
        ValueError: a value of a role is no text, such as a list of labels; or no bound of flow.
    """
    found: dict[str, Any] = {
        "label": None,
        "captions": (),
        "split": None,
        "subject": None,
        "extra": {},
        "beside": {},  # stream -> the file that the user named
        "about": {},  # stream -> what that file holds
        "bounds": {},  # stream -> the bound of its pictures
    }
    for name, value in row.items():
        role = roles.get(name)
        if value is None or value == "":
            continue
        if role == "caption":
            values = value if isinstance(value, list) else [value]
            texts = [text_of(name, v) for v in values]
            found["captions"] += tuple(t for t in texts if t is not None)
        elif role in ("label", "split", "subject"):
            found[role] = text_of(name, value)
        elif role in ("flow_method", "skeleton"):
            found["about"]["flow" if role == "flow_method" else "pose"] = text_of(name, value) or ""
        elif role == "flow_bound":
            found["bounds"]["flow"] = _bound(name, value)
        elif role in BESIDE and (
            str(value).lower().endswith(("/", *BESIDE[role]))
            or (folder is not None and os.path.isdir(os.path.join(folder, str(value).strip())))
        ):
            found["beside"][role] = str(value).strip()
        elif role != "path":
            found["extra"][name] = value if isinstance(value, str) else json.dumps(value)
    for name, role in roles.items():  # where there is nothing that they are about
        kind, stream = _ABOUT.get(role, ("about", ""))
        there = {*found["beside"], *beside}
        if kind == "bounds":  # of folders
            there = {
                s for s, file in found["beside"].items() if not file.lower().endswith(BESIDE[s])
            }
        if stream and stream not in there and found[kind].pop(stream, ""):
            found["extra"][name] = str(row[name])
    if found["split"]:
        found["split"] = split_of(found["split"])
    return found


# Roles that say something about another stream: of which kind, and of which stream.
_ABOUT = {
    "flow_method": ("about", "flow"),
    "skeleton": ("about", "pose"),
    "flow_bound": ("bounds", "flow"),
}


def _bound(name: str, value: object) -> float:
    try:
        bound = decimal(str(value))
    except ValueError:
        bound = 0.0
    if not 0 < bound <= MAX_BOUND:
        raise ValueError(
            f"{name} is {str(value)[:40]!r}: the bound of flow in pictures is a number of pixels "
            f"over 0 and up to {MAX_BOUND}, of TSN's and denseflow's tools 20"
        )
    return bound


def text_of(name: str, value: object) -> str | None:
    """A value as text; None for those that mean that there is none.

    Raises:
        ValueError: it is neither text nor a whole number: str() would make a class of a list or of
            True.
    """
    if isinstance(value, str):
        value = value.strip()
        return None if value in NOTHING else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes 3 as 3.0 where a neighbour is missing
    if type(value) is int:
        return str(value)
    if value is None or value != value:
        return None
    told = json.dumps(value)
    told = told if len(told) < 60 else told[:56] + " ..."
    raise ValueError(f"{name} is {told}, it has to be a text or a whole number")


def take_times(row: dict, fields: dict, key: str) -> tuple[float, float] | None:
    """Take the columns start and end, seconds, out of a row that has a label, as its segment.

    Times in the recording that the file was cut out of (see `times_of_recording`) stay what they
    are: further columns.

    Args:
        row: by column or key.
        fields: of `fields_of`.
        key: the column that names the file.

    Raises:
        ValueError: they are no times of a part, or the label cannot be one of a part.
    """
    label, extra = fields["label"], fields["extra"]
    columns = {name.lower(): name for name in row}
    if label is None or not {"start", "end"} <= columns.keys():
        return None
    start, end = (extra.get(columns[name], "") for name in ("start", "end"))
    if times_of_recording({**extra, key: "a file"}) or {start, end} <= NOTHING:
        return None
    try:
        first, last = decimal(start), decimal(end)
        if not 0 <= first < last < 2**53:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"start {start[:40]!r} and end {end[:40]!r} are no two seconds, the second later, such "
            "as 0.5 and 12; leave both empty where the label is of the whole file, or give other "
            "columns another name"
        ) from None
    if ";" in label:
        raise ValueError(
            f"label {label[:60]!r} holds a semicolon, which separates segments: rename it"
        )
    del extra[columns["start"]], extra[columns["end"]]
    if TIMES in columns and extra.get(columns[TIMES], "").strip() == OF_FILE:
        del extra[columns[TIMES]]
    return first, last
