"""The local page: what the browser may ask for, and who may ask.

The server listens on 127.0.0.1 alone. Whoever has not the random token of its address gets nothing,
not even the page. Clips are asked for by number, never by path, and everything that a name, label
or caption holds leaves here as JSON, which the page shows as text.
"""

import io
import itertools
import json
import logging
import secrets
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from downstream.look.clips import web_clip
from downstream.look.cut import write_clips
from downstream.look.index import group, near_duplicates, nearest
from downstream.look.labels import ChangedError, Labels, check_label
from downstream.look.moments import Moments
from pretrain.data.decode import DecodeError
from pretrain.data.shards import Pack
from pretrain.files import cache_folder, replacing
from pretrain.log import write_json
from pretrain.names import first_of, for_screen
from pretrain.prompts import same_words

PAGE = Path(__file__).parent / "page"
MOST_FOUND = 600  # moments that a search lists
MOST_PAIRS = 500
MOST_GROUPS = 100
MOST_ROWS = 200  # on a page
MOST_BODY = 64 * 1024  # bytes of a request
THUMBNAIL = 240  # pixels of the longer side, half of it at least
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
    "'self'; media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass
class Look:
    """What the page shows.

    Attributes:
        title: what the user called the data.
        backbone: what the user called the backbone.
        pack: the data.
        moments: of it.
        vectors: (M, D) of `embed_moments`.
        labels: of its videos.
        keys: names of labels; the first nine have the keys 1 to 9.
        embed_text: a sentence to its unit vector (D,); None: the backbone has no text tower.
        unseen: the words of a sentence that mean nothing to the text tower.
        keys_file: where these names are kept; None: nowhere.
        first: moments that somebody proposes to label first.
        notes: sentences that the page shows.
    """

    title: str
    backbone: str
    pack: Pack
    moments: Moments
    vectors: np.ndarray
    labels: Labels
    keys: list[str]
    embed_text: Callable[[str], np.ndarray] | None = None
    unseen: Callable[[str], list[str]] = lambda _: []
    keys_file: Path | None = None
    first: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()  # of the labels
        self._making = threading.RLock()  # of a view, which may take seconds
        self._views: OrderedDict[tuple[str, str], list] = OrderedDict()
        order = np.argsort(self.moments.video, kind="stable")
        edges = np.searchsorted(self.moments.video[order], np.arange(len(self.moments.videos) + 1))
        self._of_video = [order[a:b] for a, b in itertools.pairwise(edges)]

    def item(self, number: int) -> dict:
        """What the page needs to show a moment."""
        m = self.moments
        start, end, video = float(m.start[number]), float(m.end[number]), int(m.video[number])
        record = self.pack.record(int(m.sample[number]))
        return {
            "n": number,
            "video": for_screen(m.videos[video], 200),
            "start": round(start, 3),
            "end": round(end, 3),
            "from": round(int(m.first[number]) / record["fps"], 3),  # in the clip
            "to": round(int(m.stop[number]) / record["fps"], 3),
            "picture": record["frames"] == 1,
            "captions": [for_screen(text, 300) for text in record["captions"][:3]],
            "labels": [for_screen(text) for text in self.labels.of(video, start, end)],
            "refused": self.labels.rows[video].refused,
        }

    def labelled(self) -> dict[int, list[str]]:
        """The labels of every moment that has one."""
        found = {}
        with self.lock:
            every = list(enumerate(self.labels.marks))
        for video, marks in every:
            for number in self._of_video[video].tolist() if marks else ():
                start, end = self.moments.start[number], self.moments.end[number]
                if names := self.labels.of(video, float(start), float(end)):
                    found[number] = names
        return found

    def view(self, kind: str, about: str) -> list[dict]:
        """The moments that a view lists, each as {"n": number} and more, in order.

        Args:
            kind: all, unlabelled, label, first, text, like, group or near.
            about: the label, the sentence, the moment, or "groups:group".

        Raises:
            ValueError: there is no such view.
        """
        everything = range(len(self.moments))
        if kind == "all":
            return [{"n": n} for n in everything]
        if kind in ("unlabelled", "label", "first"):
            labelled = self.labelled()
            if kind == "first":
                return [{"n": n} for n in self.first if n not in labelled]
            if kind == "unlabelled":
                return [{"n": n} for n in everything if n not in labelled]
            named = lambda names: about in map(for_screen, names)
            return [{"n": n} for n, names in sorted(labelled.items()) if named(names)]
        makers = {"text": self._text, "like": self._like, "group": self._group, "near": self._near}
        if kind not in makers:
            raise ValueError(f"there is no view {kind!r:.40}")
        return self._kept(kind, about, makers[kind])

    def turned(self, kind: str, rows: list[dict], beside: int, limit: int, back: bool) -> int:
        """The place where the next page begins, or the one before, in a list that got shorter.

        Args:
            kind: unlabelled, label or first.
            rows: what is in the list now.
            beside: the last moment of the page that is shown; `back`: the first one.
            limit: moments of a page.
            back: the page before is wanted.
        """
        order = {n: i for i, n in enumerate(self.first)} if kind == "first" else {}
        places = [order.get(row["n"], row["n"]) for row in rows]
        place = order.get(beside, beside)
        if back:
            return max(0, sum(other < place for other in places) - limit)
        behind = sum(other <= place for other in places)
        return behind if behind < len(rows) else max(0, len(rows) - limit)

    def _kept(self, kind: str, about: str, make: Callable[[str], list]) -> list:
        with self._making:
            if (kind, about) not in self._views:
                self._views[kind, about] = make(about)
                if len(self._views) > 64:
                    self._views.popitem(last=False)
            self._views.move_to_end((kind, about))
            return self._views[kind, about]

    def _text(self, about: str) -> list[dict]:
        if self.embed_text is None:
            raise ValueError("this backbone has no text tower: it finds nothing by a sentence")
        if not about.strip():
            raise ValueError("write a sentence")
        return self._found(self.embed_text(about[:1000]))

    def note_on(self, sentence: str) -> str:
        """What a person has to know of what a sentence found; "": nothing."""
        words = self.unseen(sentence[:1000])
        return f"Words that the text tower never saw: {first_of(words, 20)}" if words else ""

    def _like(self, about: str) -> list[dict]:
        number = self.number(about)
        found = self._found(self.vectors[number])
        return [{"n": number}, *(f for f in found if f["n"] != number)]

    def _found(self, query: np.ndarray) -> list[dict]:
        numbers, scores = nearest(self.vectors, query, MOST_FOUND)
        found = zip(numbers.tolist(), scores.tolist(), strict=True)
        return [{"n": n, "score": round(score, 3)} for n, score in found]

    def _near(self, _: str) -> list[dict]:
        known = self.pack.near_duplicates()
        if known is None:  # an older pack: what the backbone finds alike
            pairs = near_duplicates(self.vectors, self.moments.video, MOST_PAIRS)
        else:
            pairs = []
            for clips in known[:MOST_PAIRS].tolist():
                first, second = (np.flatnonzero(self.moments.sample == clip) for clip in clips)
                similar = self.vectors[first] @ self.vectors[second].T
                i, j = np.unravel_index(similar.argmax(), similar.shape)
                pairs.append((int(first[i]), int(second[j]), float(similar[i, j])))
        return [
            {"n": n, "score": round(score, 3), "pair": i}
            for i, (a, b, score) in enumerate(pairs)
            for n in (a, b)
        ]

    def groups(self, wanted: int) -> list[list[int]]:
        """So many groups of all moments, see `downstream.look.index.group`."""
        make = lambda _: [g.tolist() for g in group(self.vectors, wanted)]
        return self._kept("groups", str(wanted), make)

    def _group(self, about: str) -> list[dict]:
        wanted, _, which = about.partition(":")
        if not (wanted.isdecimal() and which.isdecimal() and 0 < int(wanted) <= MOST_GROUPS):
            raise ValueError("there is no such group")
        groups = self.groups(int(wanted))
        if int(which) >= len(groups):
            raise ValueError("there is no such group")
        return [{"n": n} for n in groups[int(which)]]

    def number(self, text: str) -> int:
        """A moment's number.

        Raises:
            ValueError: there is no such moment.
        """
        if not (text.isascii() and text.isdecimal() and len(text) < 12):
            raise ValueError("there is no such moment")
        if int(text) >= len(self.moments):
            raise ValueError("there is no such moment")
        return int(text)

    def add_key(self, text: str) -> str:
        """A label's name among the keys, added if it is new."""
        label = check_label(text)
        label = next((k for k in self.keys if same_words(k) == same_words(label)), label)
        label = self.labels.spelled(label)
        if label not in self.keys:
            if len(self.keys) >= 200:
                raise ValueError("there are 200 labels already")
            self.keys.append(label)
            if self.keys_file:
                write_json(self.keys_file, {"keys": self.keys})
        return label

    def state(self) -> dict:
        """What stands beside the moments."""
        counts = self.labels.counts()
        names = [*self.keys, *(name for name in sorted(counts) if name not in self.keys)]
        return {
            "title": for_screen(self.title, 200),
            "backbone": for_screen(self.backbone, 200),
            "text": self.embed_text is not None,
            "moments": len(self.moments),
            "videos": len(self.moments.videos),
            "labels": [{"name": for_screen(n), "count": counts[n]} for n in names],
            "first": len(self.first),
            "near": "The same in two clips"
            if "near_duplicates" in self.pack.index
            else "Nearly the same in two videos, as the backbone sees them",
            "saved": for_screen(self.labels.path),
            "notes": [for_screen(note) for note in self.notes],
        }


# --------------------------------------------------------------------------------------- pictures


def thumbnail(look: Look, number: int) -> bytes:
    """A JPEG of the middle of a moment, made once."""
    m = look.moments
    record = look.pack.record(int(m.sample[number]))
    frame = int(m.first[number] + m.stop[number]) // 2
    folder = cache_folder() / "thumbnails" / record["sha256"][:2]
    path = folder / f"{record['sha256']}-{frame}.jpg"
    try:
        return path.read_bytes()
    except OSError:
        pass
    image = Image.fromarray(look.pack.frames(record, np.array([frame]))[0].numpy())
    scale = THUMBNAIL / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=82)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as aside:
            aside.write_bytes(target.getvalue())
    except OSError:
        pass  # a full disk costs time next time, nothing else
    return target.getvalue()


# ------------------------------------------------------------------------------------- who may ask


class Guard:
    """Lets only the page of this server, in the browser that was given the token, ask for anything.

    Args:
        app: what answers.
        port: the server listens on.
        token: of the address that was printed.
    """

    def __init__(self, app: ASGIApp, port: int, token: str):
        self.app, self.token, self.cookie = app, token, f"look-{port}"
        # Of a port's cookie every other port of this computer is told, so it is not the token.
        self.session = secrets.token_urlsafe(32)
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                kept = {} if b"cache-control" in given else {"Cache-Control": "no-store"}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in (HEADERS | kept).items()),
                ]
            await send(message)

        answer = self._refusal(Request(scope)) or self.app
        await answer(scope, receive, send_safely)

    def _refusal(self, request: Request) -> ASGIApp | None:
        no = lambda why: PlainTextResponse(f"{why}\n", 403)
        headers = request.headers
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or hosts[0] not in self.hosts:  # a name that leads here is a stranger's
            return no("this is another computer's page")
        ours = f"http://{hosts[0]}"
        given = parse_qs(request.url.query).get("token", [""])[0] if request.url.path == "/" else ""
        if request.method == "GET" and _same(given, self.token):
            # From wherever it was opened; the page takes the token out of the address bar.
            page = FileResponse(PAGE / "index.html")
            page.set_cookie(self.cookie, self.session, httponly=True, samesite="strict")
            return page
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return no("another page asks")
        if origin is not None and origin != ours:
            return no("another page asks")
        if request.method not in ("GET", "HEAD") and (
            origin != ours or headers.get("content-type") != "application/json"
        ):
            return no("only this page may change anything")
        if not _same(request.cookies.get(self.cookie, ""), self.session):
            return no("open the address that the program printed, with its token")
        return None


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode())


# ------------------------------------------------------------------------------------- what to ask


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MOST_BODY:
            raise HTTPException(413, "too long")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "no JSON") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "no object")
    return content


def _whole(request: Request, name: str, otherwise: int, most: int) -> int:
    text = request.query_params.get(name, str(otherwise))
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise ValueError(f"{name} has to be a whole number")
    return min(int(text), most)


def _answers(look: Look) -> list[Route]:
    """What the page asks for without changing anything."""

    def index(_: Request):
        return FileResponse(PAGE / "index.html")

    def state(_: Request):
        with look.lock:
            return JSONResponse(look.state())

    def view(request: Request):
        asked = request.query_params
        kind, about = asked.get("kind", "all"), asked.get("q", "")
        offset, limit = _whole(request, "offset", 0, 2**31), _whole(request, "limit", 48, MOST_ROWS)
        rows = look.view(kind, about)
        if "beside" in asked:
            beside = look.number(asked["beside"])
            offset = look.turned(kind, rows, beside, limit, back=asked.get("step") == "-1")
        elif offset >= len(rows):
            offset = max(0, len(rows) - limit)
        with look.lock:
            shown = [{**look.item(row["n"]), **row} for row in rows[offset : offset + limit]]
            note = look.note_on(about) if kind == "text" else ""
            page = {"total": len(rows), "offset": offset, "items": shown, "note": note}
            return JSONResponse(page)

    def groups(request: Request):
        wanted = max(1, _whole(request, "k", 12, MOST_GROUPS))
        found = look.groups(wanted)
        return JSONResponse(
            {"k": wanted, "groups": [{"size": len(g), "examples": g[:6]} for g in found]}
        )

    def picture(request: Request):
        data = thumbnail(look, look.number(request.path_params["number"]))
        kept = {"Cache-Control": "private, max-age=600"}
        return Response(data, headers=kept, media_type="image/jpeg")

    def clip(request: Request):
        number = look.number(request.path_params["number"])
        record = look.pack.record(int(look.moments.sample[number]))
        ending = request.path_params["ending"]
        if ending not in ("mp4", "webm"):
            raise HTTPException(404)
        path = web_clip(look.pack, record, ending)
        return FileResponse(path, media_type=f"video/{ending}")

    return [
        Route("/", index),
        Route("/api/state", state),
        Route("/api/view", view),
        Route("/api/groups", groups),
        Route("/thumbnail/{number}.jpg", picture),
        Route("/clip/{number}.{ending}", clip),
    ]


def _changes(look: Look) -> list[Route]:
    """What the page asks for to change labels, or to write files."""

    def changed(work: Callable[[dict], int | None], content: dict) -> JSONResponse:
        with look.lock:
            number, problem = None, ""
            try:
                number = work(content)
            except ChangedError as error:
                problem = str(error)
                number = look.number(str(content["n"])) if "n" in content else None
            answer = look.state() | {"changed": for_screen(problem)}
            items = [look.item(number)] if number is not None else []
            return JSONResponse(answer | {"items": items}, 409 if problem else 200)

    def label(content: dict) -> int:
        number = look.number(str(content.get("n")))
        name = content.get("label")
        if not isinstance(name, str):
            raise ValueError("a label is a text")
        known = {for_screen(k): k for k in (*look.labels.counts(), *look.keys)}
        name = known.get(name) or look.add_key(name)
        m, video = look.moments, int(look.moments.video[number])
        start, end = float(m.start[number]), float(m.end[number])
        look.labels.toggle(video, start, end, len(look._of_video[video]) == 1, name)
        return number

    def undo(_: dict) -> None:
        look.labels.undo()

    def keys(content: dict) -> None:
        if isinstance(content.get("add"), str):
            look.add_key(content["add"])

    def reload(_: dict) -> None:
        look.labels.reload()

    def cut(_: dict) -> JSONResponse:
        return JSONResponse({"told": write_clips(look.pack, look.moments, look.labels)})

    async def cut_clips(request: Request):
        return await run_in_threadpool(cut, await _body(request))

    def post(work: Callable[[dict], int | None]):
        async def endpoint(request: Request):
            return await run_in_threadpool(changed, work, await _body(request))

        return endpoint

    works = {"label": label, "undo": undo, "keys": keys, "reload": reload}
    return [
        *(Route(f"/api/{name}", post(work), methods=["POST"]) for name, work in works.items()),
        Route("/api/cut", cut_clips, methods=["POST"]),
    ]


def _refuse(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": for_screen(error, 500)}, 400)


def build_app(look: Look, port: int, token: str) -> ASGIApp:
    """The page and its answers, behind a `Guard`."""
    static = Mount("/page", StaticFiles(directory=PAGE))
    app = Starlette(
        routes=[*_answers(look), *_changes(look), static],
        exception_handlers=dict.fromkeys((ValueError, DecodeError, OSError), _refuse),
    )
    return Guard(app, port, token)


def listen(port: int) -> socket.socket:
    """A socket of this computer alone.

    Args:
        port: 0: one that is free.

    Raises:
        ValueError: it is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ValueError(f"--port {port} cannot be had: {error.strerror or error}") from error
    return listener


class Server(uvicorn.Server):
    """Once it is to end, requests that this cuts off are no errors to print."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def server(look: Look, listener: socket.socket, token: str) -> uvicorn.Server:
    """A server that `run(sockets=[listener])` starts."""
    app = build_app(look, listener.getsockname()[1], token)
    return Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, proxy_headers=False, server_header=False,
            lifespan="off", ws="none", limit_concurrency=64, timeout_graceful_shutdown=2,
        )
    )  # fmt: skip
