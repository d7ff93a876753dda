"""From `--data` to an open pack; raw data are packed into a cache first."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from pretrain.data.methods import METHODS, check_method
from pretrain.data.pack import pack
from pretrain.data.remote import is_address, open_remote, writing_cache
from pretrain.data.shards import Pack, no_split
from pretrain.data.sources import BUILT_IN, Listing, Source, list_sources, synthetic_clips
from pretrain.data.synthetic import SYNTHETIC_VERSION, make_dataset
from pretrain.files import cache_folder
from pretrain.names import counted, file_name, first_of, for_screen
from pretrain.settings import MACHINE, Machine
from pretrain.spec import InputSpec, Joints


def packing_side(size: int) -> int:
    """The short side at which raw data are packed for a model that sees `size` pixels.

    An eighth more, to leave room for crops: 224 -> 256.

    Raises:
        ValueError: the clips would be smaller than what is packed.
    """
    if size < 8:
        raise ValueError(f"clips of {size} x {size} pixels are too small: give --size 8 or more")
    return 2 * round(size * 8 / 7 / 2)


def raw_sources(source: str, split: str) -> list[Source]:
    """The videos and images of a split of raw data, listed but not read yet.

    None of a pack, here or far away, or of the synthetic dataset, which open without packing files.

    Args:
        source: as `open_data` takes it.
        split: of the data; "all", or of data without splits, everything.

    Raises:
        ValueError: there is nothing of the kind or of this split, or as `list_sources`.
    """
    if (
        is_address(source)
        or synthetic_clips(source)
        or os.path.lexists(Path(source) / "index.json")
    ):
        return []
    _refuse_missing(source)
    listed = list_sources(source).sources
    splits = {s.split for s in listed if s.split}
    chosen = [s for s in listed if split == "all" or not splits or s.split == split]
    if not chosen:
        raise no_split(source, split, splits)
    return chosen


def _refuse_missing(source: str) -> None:
    if not os.path.exists(source):
        raise ValueError(
            f"no data at {source!r}: give a packed folder, the address of one, a folder of videos, "
            f"a list file, WebDataset tars, or {BUILT_IN!r} for the synthetic dataset"
        )


def methods_for(spec: InputSpec, listed: Iterable[Source], who: str) -> dict[str, str]:
    """By which methods streams are estimated that a model takes and raw videos do not bring.

    Flow by the method of the model's own data, DIS where they name none; poses by BlazePose. What
    this needs is fetched.

    Args:
        spec: the clip that the model takes.
        listed: the videos; what came with any of them is not estimated.
        who: what the model is called in the message.

    Raises:
        ValueError: nothing here estimates such a stream, or what is needed for it is not there.
    """
    found: dict[str, str] = {}
    brought = {name for source in listed for name in source.beside}
    for name, stream in spec.streams.items():
        if name == "rgb" or name in brought:
            continue
        if isinstance(stream, Joints):
            made, found[name] = stream.skeleton, "blazepose"
            known = made == "blazepose33"
        else:
            made = found[name] = stream.method or "dis"
            known = made in METHODS["flow"]
        if not known:
            raise ValueError(
                f"{who} takes {name} {for_screen(made, 60)}, which nothing here estimates from "
                f"videos: give a list with columns path and {name}"
            )
        check_method(found[name])
    return found


def open_data(
    source: str,
    short_side: int,
    say: bool = True,
    machine: Machine = MACHINE,
    labels: bool = False,
) -> Pack:
    """Open a pack, packing raw data first.

    Packing is incremental and locked, so every process of a run may call this: one works, the
    others wait and find it done.

    Args:
        source: a packed folder, here or at an address far away (`pretrain/data/remote.py`);
            anything `pretrain/data/sources.py` reads; "synthetic", the synthetic dataset; or
            "synthetic:3600", one of that many clips.
        short_side: pixels to which raw data are packed.
        say: print what is done and show progress.
        machine: how frames are decoded, and how much of a pack far away is kept here.
        labels: refuse raw data without any before they are packed, which may take minutes.

    Raises:
        ValueError: there is nothing of the kind, or nothing in it can be used.
    """
    decoder = machine.decoder or "pyav"
    if is_address(source):
        return _open_far(source, machine.cache_gib, say, decoder)
    if machine.cache_gib is not None:
        raise ValueError(
            f"--cache-gib {machine.cache_gib:g}: {source} is not far away, leave it out"
        )
    path, num_clips = Path(source), synthetic_clips(source)
    if not num_clips and os.path.lexists(path / "index.json"):
        return Pack(path, decoder=decoder)
    if not num_clips:
        _refuse_missing(source)
        if labels:
            _refuse_unlabelled(path)
    cache = cache_folder()
    with writing_cache(cache):
        (cache / "packs").mkdir(parents=True, exist_ok=True)
        if num_clips:
            path = draw_synthetic(num_clips, say)
    identity = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    name = source.replace(":", "-") if num_clips else file_name(path.resolve().stem)
    folder = cache / "packs" / f"{name}-{short_side}px-{identity}"
    if say:
        kept = os.path.lexists(folder / "index.json")
        what = f"packed before: {folder}" if kept else f"packing into {folder}, kept for next time"
        print(for_screen(f"{source}: {what}"), flush=True)
    pack(path, folder, short_side=short_side, progress=say, anew=True)
    return Pack(folder, source, decoder=decoder)


def _refuse_unlabelled(path: Path) -> None:
    """Refuse raw data none of which has a label, or segments that have.

    Raises:
        ValueError: saying how to give some; or the data cannot be listed.
    """
    listing = list_sources(path)
    sources = listing.sources
    if sources and not any(s.label is not None or s.extra.get("segments") for s in sources):
        others = first_of(sorted({repr(name) for s in sources for name in s.extra}), 10)
        raise ValueError(
            f"{path}: none of its {counted(len(sources), 'file')} has a label, and nothing was "
            f"packed: {how_to_label(listing)}"
            + f" (read as something else: the columns {others})"
            * bool(others)
        )


def how_to_label(listing: Listing) -> str:
    """What to give where raw data have no label."""
    unread = f" ({listing.unread})" * bool(listing.lists)
    return f"give a list file with a label column{unread}, or a folder with one subfolder a class"


def open_all(sources: Sequence[str], short_side: int, say: bool, machine: Machine) -> list[Pack]:
    """`open_data` of several, of which one at least has to be far away if a cache is given."""
    far = [is_address(source) for source in sources]
    near = replace(machine, cache_gib=None) if any(far) else machine
    return [
        open_data(source, short_side, say, machine if there else near)
        for source, there in zip(sources, far, strict=True)
    ]


def _open_far(address: str, cache_gib: float | None, say: bool, decoder: str) -> Pack:
    """Open a pack far away; its shards come when they are wanted.

    Raises:
        ValueError: there is none, it is damaged or cannot be reached, or the cache is too small.
    """
    remote = open_remote(address, cache_gib, say)
    try:
        return Pack(remote.folder, remote.address, remote, decoder)
    except ValueError as error:
        raise ValueError(str(error).replace(str(remote.folder), remote.address)) from error


def draw_synthetic(num_clips: int, say: bool) -> Path:
    """The list of the synthetic dataset of so many clips, drawn into the cache if it is not there.

    Args:
        num_clips: how many.
        say: print where, and show progress.

    Raises:
        ValueError: the cache cannot be written.
    """
    cache = cache_folder()
    with writing_cache(cache):
        cache.mkdir(parents=True, exist_ok=True)
        drawn = cache / f"synthetic-{SYNTHETIC_VERSION}-{num_clips}"
        if say:
            print(f"synthetic dataset: {num_clips} clips in {drawn}", flush=True)
        with FileLock(f"{drawn}.lock"):  # one process of a run makes it
            return make_dataset(drawn, num_clips=num_clips, progress=say)


def pack_file(path: Path, folder: Path, short_side: int, flow: str = "", pose: str = "") -> Pack:
    """Pack a single file into a new folder, with optical flow and poses by these methods, if any.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    try:
        pack(
            path, folder, short_side=short_side, workers=1, progress=False, flow=flow, pose=pose,
            near=False,
        )  # fmt: skip
    except ValueError as error:
        if not (folder / "refused.jsonl").exists():
            raise
        raise ValueError(f"{path} cannot be used: {first_refusal(folder)}") from error
    return Pack(folder)


def refusals(folder: Path, spec: InputSpec) -> dict[str, str]:
    """Source -> why it, or a stream of it that a model takes, was refused when it was packed.

    Args:
        folder: of the pack.
        spec: the clip that the model takes.
    """
    ledger = folder / "refused.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return {
        entry["source"]: f"{entry['stream']}: {entry['reason']}" if stream else entry["reason"]
        for entry in map(json.loads, lines)
        if (stream := entry.get("stream")) is None or stream in spec.streams
    }


def first_refusal(folder: Path) -> str:
    """Why the first file, or stream of a file, in a pack's ledger was refused; "": none was."""
    lines = (folder / "refused.jsonl").read_text().splitlines()
    return json.loads(lines[0])["reason"] if lines else ""
