"""Brings files from an object store or a web server, in a process that may be killed.

`python -m pretrain.data.fetch` reads one job a line (JSON) from standard input and answers with one
line a message on standard output: `ready` when the store's library is loaded, `beat` whenever more
bytes have come, then `ok` or `failed`. `remote.py` starts it, watches it and kills it when nothing
comes any more; it ends with the process that started it. A process of its own, because fsspec's
thread does not survive a fork, and data loaders are forked; and hashing takes no time from
training.

fsspec finds its credentials where the stores' own tools do: the environment, the files below home.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import sys
import threading
from typing import Any

BEAT = 2**16  # bytes: fewer than these in STALL seconds (`remote.py`) are no progress
CONNECT_SECONDS, READ_SECONDS = 10, 25  # less than STALL: then the store's own words are told
IDLE_SECONDS = 60
EXTRA = "needs the extra `remote`: pip install 'muybridge[remote]'"


# By which the stores tell one version of a file from another.
STATE = ("ETag", "etag", "LastModified", "Last-Modified", "updated", "generation", "Content-MD5")


class Final(Exception):
    """It cannot be brought, and trying again would not help; the message says why."""


def split_hub(address: str) -> tuple[str, str, str]:
    """Repository, revision and path of hf://datasets/OWNER/NAME[@REVISION]/PATH."""
    owner, name, *path = address.removeprefix("hf://datasets/").split("/")
    name, _, revision = name.partition("@")
    return f"{owner}/{name}", revision or "main", "/".join(path)


def _store(address: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the address as that has it.

    Raises:
        Final: a library is missing.
    """
    scheme = address.split(":", 1)[0]
    try:
        import fsspec

        if scheme == "s3":
            limits: dict[str, Any] = {
                "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": 1},
            }  # fmt: skip
            # One stream a file, whose progress is seen; several files come at once.
            return fsspec.filesystem("s3", config_kwargs=limits, max_concurrency=1), address
        if scheme == "gs":
            # Its plain interface; by default it tries another one first, over gRPC.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            return fsspec.filesystem("gs"), address
        import aiohttp

        headers = {}
        if scheme == "hf":
            from huggingface_hub import get_token, hf_hub_url

            repository, revision, path = split_hub(address)
            address = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
            if token := get_token():
                headers["Authorization"] = f"Bearer {token}"
        limit = aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        # trust_env: passwords of ~/.netrc, and proxies.
        client = {"timeout": limit, "trust_env": True}
        return fsspec.filesystem("http", client_kwargs=client, headers=headers), address
    except ImportError as error:
        raise Final(f"{scheme}:// {EXTRA} ({error})") from error


def bring(address: str, to: str, limit: int, sized: bool = True) -> dict:
    """Copy a file from far away to a new local one, which is on the disk then.

    Args:
        address: what to bring.
        to: the file to write.
        limit: bytes that it may have at most.
        sized: whether it has to have that many: more are a fault that may pass.

    Returns:
        Its `bytes` and `sha256`.

    Raises:
        Final: there is no such file, it may not be read or is too large, or a library is missing.
        Exception: whatever else a store's library raises.
    """
    store, path = _store(address)
    say({"ready": True})
    from fsspec.callbacks import Callback

    class Beats(Callback):
        """Says that bytes have come, and ends a file that has too many."""

        told = 0

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            if self.value > limit:
                why = f"more than the {limit} bytes that it may have were sent"
                raise OSError(why) if sized else Final(why)
            if self.value - self.told >= BEAT:
                self.told = self.value
                say({"beat": self.value})

    try:
        store.get_file(path, to, callback=Beats())
    except (FileNotFoundError, PermissionError) as error:
        raise Final(_reason(error)) from error
    size, digest = 0, hashlib.sha256()
    with open(to, "r+b") as file:
        while block := file.read(2**24):
            digest.update(block)
            size += len(block)
            say({"beat": size})
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def describe(address: str) -> dict:
    """What a store knows of a file: its `bytes`, -1 if it does not say, and a `state` of its own.

    Raises:
        Exception: as `bring`.
    """
    store, path = _store(address)
    say({"ready": True})
    try:
        found = store.info(path)
    except (FileNotFoundError, PermissionError) as error:
        raise Final(_reason(error)) from error
    size = found.get("size")
    told = [size, *(str(found.get(name)) for name in STATE)]
    state = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:7]  # a date, so no more
    return {"bytes": size if type(size) is int and size >= 0 else -1, "state": state}


def _locked(error: BaseException) -> bool:
    """Whether a store wants to know who asks."""
    kinds = ("NoCredentialsError", "DefaultCredentialsError", "RefreshError")
    if isinstance(error, PermissionError) or type(error).__name__ in kinds:
        return True
    # gcsfs says some of it in numbers, and 403 in a word.
    status = getattr(error, "status", 0) or getattr(error, "code", 0)
    return str(status) in ("401", "403") or str(error).startswith("Forbidden:")


def _redirects(error: BaseException) -> str:
    """Why a redirect of a web server was not followed; "" if that is not what is wrong."""
    kinds = [kind.__name__ for kind in type(error).__mro__]  # aiohttp may not be installed
    if "TooManyRedirects" in kinds:
        return "the server redirects in a circle, or too many times"
    if "RedirectClientError" in kinds:
        scheme = re.match("[a-z][a-z0-9+.-]{0,20}:", str(error))
        where = f"{scheme[0] if scheme else ''}..., "
        return f"the server redirects to {where}which is no web address"
    return ""


def _reason(error: BaseException) -> str:
    """An error of a store's library in one line, without what signs an address."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        text = "there is no such file (404)"
    elif text := _redirects(error):
        pass
    elif isinstance(status, int):  # aiohttp's text repeats the address
        text = f"the server answers {status} {getattr(error, 'message', '')}".strip()
    elif isinstance(error, TimeoutError):
        text = f"no answer within {READ_SECONDS} s"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
        text = re.sub(r"(\w+://)[^/\s@'\"]*@", r"\1", text)
        text = re.sub(r"(\w+://[^\s?#'\"]*)[?#][^\s'\")]*", r"\1", text)[:500]
    if _locked(error):
        text += ": give credentials as the store's own tools take them (pretrain/data/README.md)"
    return text


def _answer(job: dict) -> dict:
    try:
        return {"ok": describe(job["address"]) if job.pop("about", False) else bring(**job)}
    except Final as error:
        return {"failed": str(error), "final": True}
    except Exception as error:
        # Which errors a store's library raises is nowhere listed; each is told, none is hidden.
        number = getattr(error, "errno", None)
        final = _locked(error) or bool(_redirects(error))
        return {"failed": _reason(error), "final": final, "errno": number}


def say(message: dict) -> None:
    """Write one message."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Bring files until standard input ends, also in the middle of one, or no job comes."""
    jobs: queue.Queue[dict] = queue.Queue()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                say(_answer(jobs.get(timeout=IDLE_SECONDS)))
        os._exit(0)

    threading.Thread(target=work, daemon=True).start()
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
