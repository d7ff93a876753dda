"""A web server of a folder that can be slow, cut connections, lie and forget."""

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store:
    """What a server was asked for, and what it is to do wrong.

    Attributes:
        url: of the folder.
        asked: how often each file was asked for.
        faults: by a file's name, what happens at the next times it is asked for, in turn: a status
            ("404", "503"), "cut" (half of the bytes), "lie" (other bytes), "long" (more bytes),
            "short" (fewer, as if they were all), "hang", "drip" (a byte now and then), "away" (a
            redirect to the same file under another path), "abroad" (one to another host),
            "round" (one to itself) or "file" (one to a file of the reader's).
        delay: seconds before each answer.
    """

    def __init__(self, folder: Path):
        self.folder, self.delay = folder, 0.0
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.url = ""
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.ended = threading.Event()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Store]:
    """Serve a folder at loopback."""
    store = Store(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].rsplit("/", 1)[-1]
            store.asked[name] += self.command == "GET"
            store.paths.append(self.path)
            store.headers.append(dict(self.headers))
            time.sleep(store.delay)
            faults = store.faults.get(name) if self.command == "GET" else None
            fault = (faults or [""]).pop(0)
            path = folder / name
            if fault.isdecimal() or not path.is_file():
                return self._answer(int(fault or 404), b"no")
            data = path.read_bytes()
            if fault in ("away", "abroad", "round", "file"):
                port = self.headers["Host"].rpartition(":")[2]
                abroad = f"http://localhost:{port}/{name}?Signature=s3cr3t"
                there = {"away": f"/elsewhere/{name}", "abroad": abroad, "round": self.path}
                there["file"] = f"file:///etc/{name}"
                where = there[fault]
                if fault == "round":
                    store.faults[name].insert(0, "round")
                return self._answer(302, b"", Location=where)
            if fault == "lie":
                data = data[:600] + bytes(b ^ 1 for b in data[600:700]) + data[700:]
            if fault == "long":
                data += bytes(2**20)
            if fault == "short":
                data = data[: len(data) // 2]
            if fault in ("cut", "hang", "drip"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                while fault != "cut" and not store.ended.wait(0.2):
                    if fault == "drip":
                        self.wfile.write(b"\0")
                        self.wfile.flush()
                self.close_connection = True
                return None
            return self._answer(200, data)

        def _answer(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", hashlib.sha256(data).hexdigest())
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed, which is what is tested

    server = Server(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_address[1]}/pack"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.ended.set()
        server.shutdown()
        server.server_close()
