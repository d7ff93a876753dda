"""What works on this machine, what does not and why, and what to do about it.

    python recipes/doctor.py
    python recipes/doctor.py --data my_videos/    also reads the list or folder, and the containers
                                                  of up to 200 videos; nothing is packed
    python recipes/doctor.py --network            also asks one server for its headers
    python recipes/doctor.py --json               for programs

Looked at: Python and the packages beside their bounds, cores and memory, devices and bf16, codecs
(a tiny clip is encoded and decoded again), the optional packages and what each is for, and the
cache folder. Nothing is downloaded, and nothing is written but an empty file in the cache folder,
which is removed again. The exit status is 1 where something fails that the basic commands need
(packing, pretraining, probing, fine-tuning on this machine's CPU) or where --data cannot be read.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import pretrain.threads  # noqa: F401 (before torch)

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pretrain.data.index import load_index
from pretrain.data.pool import usable_cores
from pretrain.data.remote import is_address, writing_cache
from pretrain.data.sources import Source, list_sources
from pretrain.files import cache_folder
from pretrain.log import cli
from pretrain.names import counted, first_line, first_of, for_screen, for_shell

State = Literal["works", "does not work", "not here", "not tried"]
STATES: tuple[State, State] = ("does not work", "works")  # by truth


@dataclass(frozen=True)
class Config:
    """What is looked at beside the machine."""

    data: str | None = None
    """A packed folder, a folder of videos, a list file or tars: what would be packed of it."""
    network: bool = False
    """Ask the hub from which weights are downloaded for its headers: one request."""
    json: bool = False
    """Print JSON: a list of findings."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: to which it belongs, such as codecs.
        name: what it is.
        state: how it is; "not here": optional, and this machine has none.
        said: details, or why it does not work.
        remedy: what to do.
        needed: the basic commands do not run without it.
    """

    area: str
    name: str
    state: State
    said: str
    remedy: str = ""
    needed: bool = False


# What the extras of pyproject.toml are for.
EXTRAS = {
    "pose": "poses of people: pack --pose blazepose",
    "torchcodec": "another decoder: --decoder torchcodec",
    "remote": "data far away: --data s3://, gs://, https://, hf://",
    "deepspeed": "ZeRO on several GPUs: launch/deepspeed_zero3.yaml",
    "flow": "optical flow: pack --flow dis",
    "parquet": "VideoFolder metadata in parquet: --data FOLDER",
    "export": "ONNX: export --to onnx",
    "look": "the local page: look FOLDER",
    "tensorboard": "curves in a browser: --track tensorboard",
    "test": "the test suite",
}
LEAST_SHARED = 2**28  # bytes of /dev/shm for a batch of each of a few decoding processes
MOST_OPENED = 200  # videos whose containers are looked at
LEAST_FREE = 2**30  # bytes of the cache's disk: the synthetic dataset and some packs


# ------------------------------------------------------------------------------- the environment


def find_package(requirement: Requirement, area: str, needed: bool) -> Finding:
    """An installed package beside its bounds."""
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    bounds = f" (needs {requirement.specifier})" if str(requirement.specifier) else ""
    try:
        found = version(requirement.name)
        fits = requirement.specifier.contains(found, prereleases=True)
    except PackageNotFoundError:
        said = f"not installed{bounds}"
        return Finding(area, requirement.name, "does not work", said, remedy, needed)
    except (TypeError, ValueError):  # a damaged installation
        said = f"its version cannot be read{bounds}"
        return Finding(area, requirement.name, "does not work", said, remedy, needed)
    said = f"{found}{bounds}"
    return Finding(area, requirement.name, STATES[fits], said, remedy * (not fits), needed)


def requirements(extra: str = "") -> list[Requirement]:
    """What pyproject.toml names, for this platform: without an extra, or of one alone."""
    listed = [Requirement(line) for line in requires("muybridge") or []]
    plain = [r for r in listed if not r.marker or r.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [
        r for r in listed if r not in plain and r.marker and r.marker.evaluate({"extra": extra})
    ]


def look_at_environment() -> Iterator[Finding]:
    """Python, and every package that is needed."""
    area = "environment"
    try:
        bounds = metadata("muybridge")["Requires-Python"]
    except PackageNotFoundError:
        said, remedy = "it is not installed, so that no bounds are known", "pip install -e ."
        yield Finding(area, "muybridge", "not tried", said, remedy)
        return
    python = platform.python_version()
    fits = SpecifierSet(bounds).contains(python, prereleases=True)
    yield Finding(
        area, "python", STATES[fits],
        f"{python} on {platform.platform()}; needs {bounds}",
        "make the environment with such a Python" * (not fits), True,
    )  # fmt: skip
    for requirement in requirements():
        # A second opinion on decoding, and not everywhere to be had.
        yield find_package(requirement, area, requirement.name != "decord")


def look_at_extras() -> Iterator[Finding]:
    """The optional packages."""
    with contextlib.suppress(PackageNotFoundError):
        for extra in metadata("muybridge").get_all("Provides-Extra") or []:
            packages = {r: find_package(r, "extras", False) for r in requirements(extra)}
            missing = {r: f for r, f in packages.items() if f.state != "works"}
            names = ", ".join(f"{f.name} {f.said}" for f in (missing or packages).values())
            said = f"{EXTRAS[extra]}; {names}" if extra in EXTRAS else names
            wanted = " ".join(f"'{r.name}{r.specifier}'" for r in missing)
            remedy = f"pip install {wanted}"
            state: State = "not here" if missing else "works"
            yield Finding("extras", extra, state, said, remedy * bool(missing))


# ----------------------------------------------------------------------------------- the machine


def look_at_machine() -> Iterator[Finding]:
    """Cores, memory and the memory that processes share."""
    area, cores = "machine", usable_cores()
    yield Finding(area, "cores", "works", f"{cores} of {os.cpu_count()} may be used")
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding(area, "memory", "works", f"{total / 2**30:.1f} GiB{_bounded(total)}")
    except (AttributeError, ValueError, OSError):
        yield Finding(area, "memory", "not tried", "this system does not tell how much there is")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= LEAST_SHARED
        yield Finding(
            area, "shared memory", STATES[enough],
            f"{free / 2**20:.0f} MiB of {shared} are free, for batches of decoding processes",
            "give --num-workers 0, or more of it (docker run --shm-size 8g)" * (not enough),
        )  # fmt: skip


def _bounded(total: int) -> str:
    """What a container leaves of the memory, in words; nothing where it leaves all."""
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return ""
    return f", of which this container may use {limit / 2**30:.1f} GiB" if limit < total else ""


def look_at_devices() -> Iterator[Finding]:
    """Where torch computes."""
    area = "devices"
    try:
        import torch

        from pretrain.device import describe, has_bf16
    except (ImportError, OSError) as error:
        said = f"torch cannot be loaded: {first_line(error)}"
        remedy = "pip install --force-reinstall torch"
        yield Finding(area, "cpu", "does not work", said, remedy, True)
        return

    def computes(device: "torch.device", name: str, about: str, needed: bool) -> Finding:
        low = "bf16" if has_bf16(device) else "no bf16, so that --precision auto is float32"
        try:
            ones = torch.ones(64, 64, device=device)
            right = bool((ones @ ones == 64).all())
        except RuntimeError as error:  # of the driver
            return Finding(
                area, name, "does not work", f"{about}: {first_line(error)}",
                "update the driver, or hide it with CUDA_VISIBLE_DEVICES= to use the CPU", needed,
            )  # fmt: skip
        if not right:
            remedy = "run another program on it: it may be broken"
            return Finding(area, name, "does not work", f"{about}: miscounts", remedy, needed)
        return Finding(area, name, "works", f"{about}; {low}", "", needed)

    yield computes(torch.device("cpu"), "cpu", describe(torch.device("cpu")), True)
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        words = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        yield computes(torch.device("cuda", number), f"cuda:{number}", words, False)
    if not torch.cuda.device_count():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        said = f"torch {torch.__version__}, built {built}, sees no GPU: the CPU computes"
        driver = Path("/proc/driver/nvidia/version").exists()
        remedy = "there is a driver: install a torch that is built for its CUDA, or update it"
        state: State = "does not work" if driver else "not here"
        yield Finding(area, "cuda", state, said, remedy * driver)
    if torch.backends.mps.is_available():
        yield computes(torch.device("mps"), "mps", "Apple's GPU", False)


def look_at_codecs() -> Iterator[Finding]:
    """What is read of raw videos, by PyAV, and the other decoders of packed ones."""
    area = "codecs"
    try:
        from pretrain.data.codecs import CODECS, try_codec, try_decoder
    except (ImportError, OSError) as error:
        said, remedy = f"PyAV cannot be loaded: {first_line(error)}", "pip install 'av>=18.0'"
        yield Finding(area, "h264", "does not work", said, remedy, True)
        return
    for codec in CODECS:
        works, said = try_codec(codec)
        needed = codec == "h264"  # packs are written in it
        state: State = "not tried" if works is None and not needed else STATES[bool(works)]
        remedy = "convert such files first: ffmpeg -i FILE -c:v libx264 FILE.mp4"
        remedy = "pip install --force-reinstall av" if needed else remedy
        yield Finding(area, codec, state, said, remedy * (state == "does not work"), needed)
    for decoder in ("decord", "torchcodec"):
        works, said = try_decoder(decoder)
        state = "not here" if works is None else STATES[works]
        remedy = "" if works else "none is needed, PyAV decodes"
        yield Finding(area, decoder, state, said, remedy)


# ----------------------------------------------------------------------- folders, network, data


def look_at_cache() -> Iterator[Finding]:
    """The folder of what is derived: drawn datasets, packs of raw data, embeddings."""
    cache = cache_folder()
    remedy = "set MUYBRIDGE_CACHE to a folder that can be written to and has room"
    try:
        with writing_cache(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=cache):
                free = shutil.disk_usage(cache).free
    except ValueError as error:
        said = first_line(error).partition("; set MUYBRIDGE_CACHE")[0]
        yield Finding("cache", "folder", "does not work", said, remedy, True)
        return
    enough = free >= LEAST_FREE
    said = f"{cache} can be written to, {free / 2**30:.1f} GiB are free"
    yield Finding("cache", "folder", STATES[enough], said, remedy * (not enough), True)


def look_at_network() -> Finding:
    """One request to the hub, through the proxy that the environment names, if any."""
    from http.client import HTTPException
    from urllib.request import Request, build_opener

    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    remedy = "without it, give weights and data as local files"
    if not server.startswith(("https://", "http://")):
        said = f"HF_ENDPOINT={server!r:.80} is no address of a server"
        return Finding("network", "hub", "does not work", said, "unset HF_ENDPOINT")
    try:
        request = Request(server, method="HEAD")
        with build_opener().open(request, timeout=10) as answer:
            return Finding("network", "hub", "works", f"{server} answers {answer.status}")
    # Its own too: no host, refused, status 500, too slow, no address, an answer that is no HTTP.
    except (OSError, ValueError, HTTPException) as error:
        said = f"{server}: {getattr(error, 'reason', error)}"
        return Finding("network", "hub", "does not work", said, remedy)


def look_at_data(source: str) -> Finding:
    """What would be packed of raw data, or is in a pack; containers are read, nothing decoded."""
    from pretrain.data.cache import synthetic_clips

    area, name = "data", for_screen(source, 60)
    try:
        if num_clips := synthetic_clips(source):
            said = f"{counted(num_clips, 'clip')} are drawn when they are first used"
            return Finding(area, name, "works", said, "", True)
        if is_address(source):
            said = "it is far away, and nothing was asked for"
            return Finding(
                area, name, "not tried", said, "any command with this --data asks for it"
            )
        if os.path.lexists(Path(source) / "index.json"):
            index = load_index(source)
            said = f"a pack of {counted(index['num_clips'], 'clip')}, ready"
            return Finding(area, name, "works", f"{said}; {_split(index['splits'])}", "", True)
        listing = list_sources(source)
    except ValueError as error:
        words = [str(error), *getattr(error, "__notes__", ())]
        remedy = "mend that; pretrain/data/README.md says what is read"
        return Finding(area, name, "does not work", "; ".join(words), remedy, True)
    found = listing.sources
    kinds = " and ".join(counted(n, kind) for kind, n in Counter(s.kind for s in found).items())
    labels = {s.label for s in found if s.label is not None}
    labelled = sum(s.label is not None for s in found)
    people = {s.subject for s in found if s.subject}
    told = [
        f"{kinds or 'nothing'} would be read, {_size(found)}",
        f"{counted(len(labels), 'class')}, {labelled} labelled",
        f"{counted(len(people), 'subject')}" if people else "no subjects are named",
        _split(Counter(s.split for s in found if s.split)),
    ]
    num_videos, looked, damaged = unreadable(found)
    if looked:
        bad = f"{len(damaged)} cannot be used: {first_of(damaged, 3, '; ')}"
        of = f"{looked} of {counted(num_videos, 'video')}"
        told.append(f"the containers of {of} were read, {bad if damaged else 'all are whole'}")
    if refused := listing.refused:
        reasons = "; ".join(f"{n}: {why}" for n, why in refused[:3])
        told.append(f"{counted(len(refused), 'file')} refused already: {reasons}")
    if listing.skipped:
        told.append(f"{counted(len(listing.skipped), 'file')} of no known kind left out")
    if listing.lists:
        told.append(listing.unread)
    usable = len(found) > len(damaged)
    remedy = "packing leaves those out, each with the reason" * bool(damaged)
    remedy = remedy if usable else "give files of a kind that is read"
    return Finding(area, name, STATES[usable], "; ".join(told), remedy, True)


def unreadable(found: list[Source]) -> tuple[int, int, list[str]]:
    """Videos whose first bytes are no container's, or which are cut short; nothing is decoded.

    Args:
        found: what would be packed.

    Returns:
        how many are videos; how many of them were looked at, evenly spread; those that cannot be
        read, as "name: reason".
    """
    from pretrain.data.guard import Refused, check_container
    from pretrain.data.ingest import DiskError, payload

    videos = [source for source in found if source.kind == "video"]
    some = videos[:: -(-len(videos) // MOST_OPENED) or 1]
    damaged = []
    for source in some:
        try:
            with payload(str(source.path), source.member) as file:
                check_container(file)
        except (Refused, DiskError) as error:
            damaged.append(f"{source.name}: {error}")
    return len(videos), len(some), damaged


def _split(splits: dict[str, int]) -> str:
    """Splits and their sizes in words."""
    if not splits:
        return "no splits"
    return "splits: " + ", ".join(f"{name} {number}" for name, number in sorted(splits.items()))


def _size(found: list) -> str:
    """Bytes of the files, each once, in words."""
    total = 0
    for path in {source.path for source in found}:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return f"{total / 2**20:.1f} MiB" if total < 2**30 else f"{total / 2**30:.1f} GiB"


# ------------------------------------------------------------------------------------------- main


def look(config: Config) -> Iterator[Finding]:
    """Everything, one after the other."""
    steps: list[Callable[[], Iterator[Finding]]] = [
        look_at_environment, look_at_machine, look_at_devices, look_at_codecs, look_at_extras,
        look_at_cache,
    ]  # fmt: skip
    for step in steps:
        yield from step()
    if config.network:
        yield look_at_network()
    else:
        yield Finding("network", "hub", "not tried", "nothing was sent", "--network asks")
    if config.data is not None:
        yield look_at_data(config.data)


def main(config: Config) -> list[Finding]:
    """Look at everything, print it, and end with status 1 where something needed fails."""
    findings: list[Finding] = []
    for finding in look(config):
        if not config.json:
            if not findings or findings[-1].area != finding.area:
                print(f"\n{finding.area}")
            print(for_screen(f"  {finding.state:<13}  {finding.name:<16}  {finding.said}"))
            if finding.remedy:
                print(for_screen(f"{'':17}{'':18}-> {finding.remedy}"), flush=True)
        findings.append(finding)
    broken = [f.name for f in findings if f.needed and f.state == "does not work"]
    if config.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    elif broken:
        print(f"\nneeded, and does not work: {for_screen(', '.join(broken))}")
    else:
        page = any(f.name == "look" and f.state == "works" for f in findings)
        command = "look " if page else "videomae --data "
        then = command + for_shell(config.data) if config.data else "demo"
        print(f"\nwhat the basic commands need works here; next: muybridge {then}")
    if broken:
        sys.exit(1)
    return findings


if __name__ == "__main__":
    cli(main, Config)
