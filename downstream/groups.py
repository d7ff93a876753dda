"""Which clips may not be divided by a split: those of one person, recording, or near-duplicates.

A model that has seen one clip of such a group has seen much of the others, and a score on them says
little about new people, places and days. Splits made by the toolkit keep groups whole; those that a
list gives are checked, see `find_leaks`.

A recording is a source file, or what the columns of a list say: several files cut out of one have
the same `recording` (`youtube_id`, `video_id`, `source_file`, ...), and where they have the columns
`start` and `end`, seconds in the recording, it is known which of them overlap.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.lists import recording_of
from pretrain.names import counted, for_screen

NO_PAIRS = np.zeros((0, 2), np.int64)
LEAKS = "leaks.csv"  # in a folder of results
SUBJECT, RECORDING, OVERLAP, NEAR = "subject", "recording", "overlapping times", "near-duplicate"
WORDS = {
    RECORDING: "of one recording",
    OVERLAP: "of one recording whose times overlap",
    NEAR: "near-duplicates",
    SUBJECT: "of one subject",
}


def _join(count: int, keys: Iterable[Sequence[object]], pairs: np.ndarray) -> np.ndarray:
    """Numbers of groups (count,), in order of their first member, of all that share a key."""
    # Half a second, which only those who choose splits pay.
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first: dict[object, int] = {}
    edges = [(first.setdefault(key, i), i) for i, own in enumerate(keys) for key in own]
    joined = np.concatenate([np.array(edges, np.int64).reshape(-1, 2), pairs])
    graph = coo_matrix((np.ones(len(joined), bool), joined.T), (count, count))
    found = connected_components(graph, directed=False)[1]
    _, start, number = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(start))[number.reshape(-1)]


def group_clips(
    records: Sequence[dict], pairs: np.ndarray = NO_PAIRS, people: bool = True
) -> np.ndarray:
    """The group of every clip, numbers (N,) from 0 in order of their first clips.

    Two clips are in one group if they have the same subject, the same source file, or the same
    recording (so those that overlap in time are, too), or are near-duplicates; or if a chain of
    such clips leads from one to the other.

    Args:
        records: index entries of all N clips of a pack, also of those that have no label: chains
            may lead through them.
        pairs: (K, 2) places of near-duplicates among them, as `Pack.near_duplicates` gives them.
        people: whether subjects count.
    """

    def keys(record: dict) -> list[tuple[str, str]]:
        who = record["subject"] if people else None
        return _recordings(record) + ([("subject", who)] if who is not None else [])

    return _join(len(records), map(keys, records), pairs)


def joined_groups(
    alone: np.ndarray, joined: np.ndarray, subjects: Sequence[str | None]
) -> tuple[int, list[str]]:
    """How many groups are joined with others, and the people who are: "a and b" of each new group.

    Args:
        alone: the groups (N,) of clips without near-duplicates.
        joined: and with them.
        subjects: of each clip.
    """
    inside: dict[int, dict[int, None]] = {}
    people: dict[int, dict[str, None]] = {}
    for before, now, who in zip(alone.tolist(), joined.tolist(), subjects, strict=True):
        inside.setdefault(now, {})[before] = None
        if who is not None:
            people.setdefault(now, {})[who] = None
    several = [now for now, parts in inside.items() if len(parts) > 1]
    named = [" and ".join(people[now]) for now in several if len(people.get(now, {})) > 1]
    return sum(len(inside[now]) for now in several), named


def among(pairs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Pairs of samples that are both among some, as places in these (K, 2)."""
    order = np.argsort(ids)
    place = np.minimum(np.searchsorted(ids, pairs, sorter=order), len(ids) - 1)
    there = (ids[order[place]] == pairs).all(1)
    return order[place[there]]


def join_subjects(subjects: Sequence[str | None], recordings: np.ndarray) -> np.ndarray:
    """Groups (N,) of videos of which the recordings (N,) and subjects are known."""
    keys = [[("recording", int(r)), *([("subject", s)] if s is not None else [])]
            for s, r in zip(subjects, recordings, strict=True)]  # fmt: skip
    return _join(len(keys), keys, NO_PAIRS)


# ---- what given splits share


@dataclass(frozen=True)
class Leak:
    """Two clips of one group in different splits.

    Attributes:
        kind: `SUBJECT`, `RECORDING`, `OVERLAP` or `NEAR`.
        clips: the index entries of both.
        note: more about it.
    """

    kind: str
    clips: tuple[dict, dict]
    note: str = ""


def _times(record: dict) -> tuple[float, float]:
    """From when to when a clip lasts in its recording, seconds."""
    start = recording_of(record.get("extra", {}))[1] + record.get("start", 0.0)
    return start, start + record.get("frames", 0) / record.get("fps", math.inf)


def find_leaks(
    first: dict[int, dict], second: dict[int, dict], pairs: np.ndarray = NO_PAIRS
) -> list[Leak]:
    """What two splits share: each pair of clips once.

    Of what may have very many pairs there is one: of a subject, of two files of one recording
    whose clips do not overlap, and of a clip that is a near-duplicate by way of others.

    Args:
        first: index entries of one split's clips, by sample id.
        second: of the other's.
        pairs: (K, 2) sample ids of near-duplicates, of the whole pack.
    """
    leaks: dict[tuple[int, int], Leak] = {}
    for a, b in [*pairs.tolist(), *pairs[:, ::-1].tolist()]:
        if a in first and b in second:
            leaks[a, b] = Leak(NEAR, (first[a], second[b]))
    leaks |= _linked(first, second, pairs, {y for _, y in leaks})
    by_recording: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for side, records in enumerate((first, second)):
        for i, record in records.items():
            for key in _recordings(record):
                by_recording.setdefault(key, ([], []))[side].append(i)
    for ours, theirs in by_recording.values():
        times = np.array([_times(first[i]) for i in ours]).reshape(-1, 2)
        told = set()
        for j in theirs:
            start, end = _times(second[j])
            over = np.minimum(times[:, 1], end) > np.maximum(times[:, 0], start)
            for i, overlaps in zip(ours, over.tolist(), strict=True):
                sources = first[i]["source"], second[j]["source"]
                if overlaps:
                    leaks[i, j] = Leak(OVERLAP, (first[i], second[j]))
                elif sources not in told:
                    leaks.setdefault((i, j), Leak(RECORDING, (first[i], second[j])))
                told.add(sources)
    return [leaks[key] for key in sorted(leaks)] + _subjects(first, second)


def _recordings(record: dict) -> list[tuple[str, str]]:
    """What names the recording of a clip."""
    named = recording_of(record.get("extra", {}))[0]
    return [("source", record["source"])] + ([("recording", named)] if named else [])


def _linked(
    first: dict[int, dict], second: dict[int, dict], pairs: np.ndarray, known: set[int]
) -> dict[tuple[int, int], Leak]:
    """A leak of each clip of the second split that only a chain of near-duplicates leads to."""
    ids, places = np.unique(pairs, return_inverse=True)
    chain = _join(len(ids), ([] for _ in ids), places.reshape(-1, 2))
    number = dict(zip(ids.tolist(), chain.tolist(), strict=True))
    member = {number[i]: i for i in sorted(first, reverse=True) if i in number}
    found = {}
    for j in second:
        if j in number and j not in known and number[j] in member and j != member[number[j]]:
            i = member[number[j]]
            found[i, j] = Leak(NEAR, (first[i], second[j]), "by way of other clips")
    return found


def _subjects(first: dict[int, dict], second: dict[int, dict]) -> list[Leak]:
    clips: list[dict[str, list[dict]]] = [{}, {}]
    for side, records in zip(clips, (first, second), strict=True):
        for record in records.values():
            if record["subject"] is not None:
                side.setdefault(record["subject"], []).append(record)
    return [
        Leak(SUBJECT, (clips[0][who][0], clips[1][who][0]),
             f"{who}: {len(clips[0][who])} and {len(clips[1][who])} clips")
        for who in sorted(clips[0].keys() & clips[1].keys())
    ]  # fmt: skip


def leak_notes(leaks: list[Leak], names: tuple[str, str]) -> list[str]:
    """Sentences a reader of a result must see, with counts and a few examples.

    Args:
        leaks: of `find_leaks`.
        names: of both splits.
    """
    notes = []
    both = f"{names[0]} and {names[1]}"
    for kind, words in WORDS.items():
        found = [leak for leak in leaks if leak.kind == kind]
        if not found:
            continue
        if kind == SUBJECT:
            notes.append(
                f"WARNING: both splits ({both}) have {counted(len(found), 'subject')}: the numbers "
                "say little about new people"
            )
            continue
        examples = dict.fromkeys(" = ".join(map(_name, leak.clips)) for leak in found)
        videos = len({leak.clips[1]["source"] for leak in found})
        notes.append(
            f"WARNING: both splits ({both}) have {counted(videos, 'video')} {words} (first: "
            f"{for_screen('; '.join([*examples][:3]))}; {counted(len(found), 'pair')} in all): the "
            "numbers are too good"
        )
    return notes


def _name(record: dict) -> str:
    start = record.get("start", 0)
    return record["source"] + (f" at {start:g} s" if start else "")
