"""Look at footage in the browser: find moments, see what is alike, label what matters.

    python recipes/look.py --data my_videos/ --backbone RUN/backbone
    python recipes/look.py --data clips.csv --backbone RUN/backbone --labels walk run fall

The videos are checked and packed, every few seconds of them are embedded, and a page is served to
the browser of this computer. With a video-text pair (recipes/clip.py, or open_clip) it finds
moments by a sentence; with any backbone it lists moments like another one, groups, and moments that
two videos share. The keys 1 to 9 label the selected moment. Every label is saved at once in
OUT/labels.csv, which --data of every recipe reads; labels that the data have already are shown, and
the user's own list is never written to. For recipes that take one label a video, the page writes
OUT/clips.csv on demand: labelled parts of long videos as files. The same command again is fast and
goes on: packed videos, embeddings and labels are kept.

Only this computer can open the page, only with the random token of its address, and the page asks
nothing of any other computer.
"""

import os
import secrets
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pretrain.threads  # noqa: F401 (before torch)

import numpy as np
from torch import nn

from downstream.features import Extraction, spec_of, start_extraction
from downstream.look.cut import CLIPS
from downstream.look.labels import Labels, check_label, marks_of, read_places, row_of, told
from downstream.look.moments import Moments, embed_moments, find_moments
from downstream.models import load_backbone, load_video_text, match_rate
from downstream.results import data_name
from downstream.zero_shot import embed_texts
from pretrain.backbones import folder_of, read_backbone_config
from pretrain.clip import VideoText, video_encoder
from pretrain.data.cache import draw_synthetic, open_data, packing_side, synthetic_clips
from pretrain.data.remote import is_address
from pretrain.data.shards import Pack
from pretrain.data.sources import Source, list_sources
from pretrain.files import is_folder, read_json
from pretrain.folders import claim, refuse_others
from pretrain.log import print_notes, print_table
from pretrain.names import counted, file_name, for_html, for_screen
from pretrain.settings import STARTER
from pretrain.text import unseen_words
from pretrain.third_party import open_clip_at_hand
from recipes.options.look import Config, command

if TYPE_CHECKING:
    from downstream.look.server import Look

MODEL, TAG = "ViT-B-32", "laion2b_s34b_b79k"  # unless another backbone is given
# Of the one that is taken where that cannot be had.
STARTER_NOTE = (
    "The starter has seen drawn figures only, in 18 actions such as walks, waves, sits down, claps "
    "or picks up a box: sentences of other things find nothing. Moments alike, groups and labels "
    "need no words."
)
SHOWN_SIDE = 256  # pixels: what a person looks at is packed larger than a small backbone needs


# ------------------------------------------------------------------------------------ the backbone


def load_model(name: str | None) -> tuple[str, nn.Module]:
    """The backbone and what it is called: a video-text pair where it has a text tower.

    Raises:
        ValueError: there is none of that name.
    """
    if name is None:
        name = f"open_clip:{MODEL}/{TAG}"
        if not open_clip_at_hand(MODEL, TAG):
            print(f"note: {name} is not here, and the hub does not answer: {STARTER} instead")
            name = STARTER
    with_text = name.startswith("open_clip:") or (
        is_folder(folder := folder_of(name))
        and read_backbone_config(Path(folder))["builder"] == "VideoText"
    )
    model = load_video_text(name) if with_text else load_backbone(name)
    assert isinstance(model, nn.Module)
    return name, model


def sentence_search(model: nn.Module, how: Extraction) -> Callable[[str], np.ndarray] | None:
    """What places a sentence among the moments; None: the backbone has no text tower."""
    if not isinstance(model, VideoText):
        return None
    return lru_cache(256)(lambda text: embed_texts(model, [text], how.device, how.precision)[0][0])


def unseen_by(model: nn.Module) -> Callable[[str], list[str]]:
    """What lists the words of a sentence that mean nothing to the text tower, if there is one."""
    return lambda text: unseen_words(model.text, [text]) if isinstance(model, VideoText) else []


# -------------------------------------------------------------------------------------- the labels


def listed_sources(config: Config) -> dict[str, Source]:
    """The files of the data by name; none of a pack whose source is not given."""
    source = config.source or config.data
    if config.source and not os.path.lexists(Path(config.data) / "index.json"):
        raise ValueError(
            f"--source is for a packed folder, and {config.data} is none: leave it out"
        )
    if num_clips := synthetic_clips(source):
        source = str(draw_synthetic(num_clips, say=False))
    elif is_address(source) or os.path.lexists(Path(source) / "index.json"):
        if config.source:
            raise ValueError(f"--source {source}: give the videos that the pack was made of")
        return {}
    return {each.name: each for each in list_sources(source).sources}


def read_labels(pack: Pack, moments: Moments, sources: dict[str, Source], out: Path) -> Labels:
    """The labels of the data and of OUT/labels.csv.

    Raises:
        ValueError: that csv cannot be read, or was made by something else.
    """
    seconds = moments.duration()
    clips = np.unique(moments.video, return_index=True)[1]
    records = [pack.record(int(moments.sample[i])) for i in clips]
    rows = [
        row_of(sources.get(name), name, float(seconds[i]), out.resolve())
        for i, name in enumerate(moments.videos)
    ]
    return Labels(out / "labels.csv", rows, [marks_of(record) for record in records])


def read_keys(config: Config, labels: Labels, kept: Path) -> list[str]:
    """Names of labels in the order of their keys: given, of the last time, and those in use.

    Raises:
        ValueError: a name cannot be a label.
    """
    before = read_json(kept).get("keys") if kept.exists() else []
    if not isinstance(before, list) or not all(isinstance(name, str) for name in before):
        raise ValueError(f"{kept} is damaged: delete it, it holds nothing but names of labels")
    names = [*map(check_label, config.labels), *before[:200]]
    return list(dict.fromkeys([*names, *(name for name, _ in labels.counts().most_common())]))


# ---------------------------------------------------------------------------------------- the page


def open_page(address: str) -> Path | None:
    """Open the browser, where there is a screen; returns a file to delete afterwards.

    Programs of other people on this computer see the words of a command, so the browser is given a
    file that only this user can read, and which leads to the address.
    """
    screen = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if not screen or not sys.stdout.isatty():
        return None
    handle, name = tempfile.mkstemp(".html", "look-")
    with open(handle, "w") as file:
        file.write(f'<meta http-equiv="refresh" content="0; url={for_html(address)}">')
    webbrowser.open(Path(name).as_uri())
    return Path(name)


def serve(look: "Look", port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: the port is taken.
    """
    from downstream.look.server import listen, server

    listener, token = listen(port), secrets.token_urlsafe(32)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={token}"
    print_table("the page is ready", {"open": address, "labels": look.labels.path, "end": "Ctrl-C"})
    redirect = open_page(address) if browser else None
    try:
        server(look, listener, token).run(sockets=[listener])
    except KeyboardInterrupt:
        path = look.labels.path
        where = f"the labels are in {for_screen(path)}" if path.exists() else "no label was given"
        print(f"ended; {where}", flush=True)
    finally:
        listener.close()
        if look.labels.unsaved:
            look.labels.save()
        if redirect:
            redirect.unlink(missing_ok=True)


def prepare(config: Config, name: str, model: nn.Module) -> "Look":
    """Everything that the page shows, by a backbone of `load_model`."""
    from downstream.look.server import Look

    how = start_extraction(config.machine, 1, config.num_crops, config.batch_size)
    side = max(packing_side(spec_of(model).size), SHOWN_SIDE)
    pack = open_data(config.data, side, machine=config.machine)
    match_rate(name, video_encoder(model), pack.rates())
    moments = find_moments(pack, config.every)
    vectors = embed_moments(model, pack, moments, how)
    out = Path(config.out or default_out(config.data))
    labels = read_labels(pack, moments, listed_sources(config), out)
    search = sentence_search(model, how)
    notes = [note for note in (told(labels),) if note]
    if search is None:
        notes.append("This backbone has no text tower, so there is no search by a sentence.")
    if name == STARTER:
        notes.append(STARTER_NOTE)
    refused = sum(bool(row.refused) for row in labels.rows)
    if refused:
        notes.append(f"{counted(refused, 'video')} cannot be labelled; each says why.")
    first = read_places(Path(config.first), moments, labels) if config.first else []
    kept = out / "look.json"
    print(
        f"{counted(len(moments), 'moment')} of {counted(len(moments.videos), 'video')}, "
        f"{sum(labels.counts().values())} labelled"
    )
    print_notes(notes)
    return Look(
        config.data, name, pack, moments, vectors, labels, read_keys(config, labels, kept), search,
        unseen_by(model), kept, first, notes,
    )  # fmt: skip


def default_out(data: str) -> str:
    """The folder of the labels of some data."""
    return f"runs/look-{file_name(data_name(data))}"


def main(config: Config) -> None:
    """Prepare the page and serve it."""
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ValueError("the page needs starlette and uvicorn: pip install 'muybridge[look]'")
    out = Path(config.out or default_out(config.data))
    copies = [p.name for p in out.glob("labels-*-*.csv")] if out.is_dir() else []
    listed_sources(config)  # refuses data that are not there, or hold no video
    refuse_others(out, ("labels.csv", "look.json", "clips.csv", CLIPS, *copies))
    name, model = load_model(config.backbone)
    lock = claim(out)
    serve(prepare(config, name, model), config.port, config.open)
    lock.release(force=True)


if __name__ == "__main__":
    command(main)
