"""Trackers beside log.jsonl, asked for by --track: those of accelerate.

    tensorboard    event files in RUN/tensorboard
    wandb          offline in RUN/wandb; with WANDB_MODE=online to its server
    trackio        in its own folder of this computer; with TRACKIO_SPACE_ID or TRACKIO_SERVER_URL
                   to that place
    mlflow         where mlflow keeps runs on this computer; with MLFLOW_TRACKING_URI at that place

So nothing leaves the machine unless one of these variables says so. A run that is continued goes on
under the same tracker's run, which RUN/track.json names. Whatever a tracker does, training goes on:
the first thing that fails is said once, and that tracker gets nothing more.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.files import read_json
from pretrain.log import write_json
from pretrain.names import file_name, first_line, for_screen

PROJECT = "muybridge"
KEPT = "track.json"
KEY = re.compile(r"[\w-]{1,64}", re.ASCII)
MOST_VALUE = 500  # characters of a value of the configuration, as mlflow takes them


def refuse_missing(name: str) -> None:
    """Raise ValueError where a tracker's package is not installed."""
    if find_spec(name) is None:
        raise ValueError(f"--track {name} needs the package: pip install {name}")


class Tracker:
    """The run of a tracker.

    Args:
        name: tensorboard, wandb, trackio or mlflow.
        run: the run's folder.
        start_step: steps already done; 0: a new run of the tracker begins.
        about: the resolved configuration, and what else identifies the run.
    """

    def __init__(self, name: str, run: Path, start_step: int, about: Mapping[str, object]):
        self._name, self._run = name, run
        self._tracker: Any = None
        self._failed = False
        self._try(lambda: self._start(start_step, about))

    def _start(self, start_step: int, about: Mapping[str, object]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        known = self._key_of_before() if start_step else ""
        key = known or secrets.token_hex(4)
        project, arguments = PROJECT, self._arguments(key, bool(known))
        if self._name == "tensorboard":  # a folder, whose later steps a kill undid
            project, arguments = "tensorboard", {"logging_dir": str(self._run)}
            arguments["purge_step"] = start_step + 1
        elif self._name == "mlflow":  # which gives a name of its own
            arguments["run_id"] = known or None
        tracker = LOGGER_TYPE_TO_CLASS[self._name](project, **arguments)
        tracker.start()
        self._tracker = tracker
        if self._name == "mlflow":
            key = tracker.tracker.info.run_id
        write_json(self._run / KEPT, self._kept() | {self._name: key})
        if not known:  # mlflow refuses a second value of the same name
            tracker.store_init_configuration({n: _plain(value) for n, value in about.items()})

    def _arguments(self, key: str, goes_on: bool) -> dict[str, Any]:
        """What the tracker's start takes beside the project."""
        title, resume = file_name(self._run.resolve().name), "allow" if goes_on else "never"
        if self._name == "trackio":
            return {"name": f"{title}-{key}", "resume": resume}
        if self._name == "mlflow":
            # A server that is gone would hold up training for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            return {"run_name": title}
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        where = {"dir": str(self._run), "mode": mode, "settings": {"console": "off"}}
        return {"name": title, "id": key, "resume": resume, **where}

    def _kept(self) -> dict:
        """What trackers call this run, by their names; empty: none has begun, or it is damaged."""
        try:
            return read_json(self._run / KEPT)
        except ValueError:
            return {}

    def _key_of_before(self) -> str:
        """What the tracker calls this run; empty: it has none yet."""
        key = self._kept().get(self._name)
        return key if isinstance(key, str) and KEY.fullmatch(key) else ""

    def _try(self, action: Callable[[], object]) -> None:
        """Do something with the tracker, unless it has failed before."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of a server, a disk, a version: no reason to lose a training
            self._failed, self._tracker = True, None
            reason = for_screen(first_line(error), 300)
            print(
                f"warning: --track {self._name} fails and gets nothing more; the run goes on, and "
                f"log.jsonl has everything ({reason})",
                file=sys.stderr,
                flush=True,
            )

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hand on the values of a step."""
        known = {name: value for name, value in values.items() if value is not None}
        self._try(lambda: self._tracker.log(known, step=step))

    def figure(self, step: int, path: Path) -> None:
        """Hand on a .png file of ours."""
        self._try(lambda: self._figure(step, path))

    def _figure(self, step: int, path: Path) -> None:
        if self._name == "mlflow":
            self._tracker.log_artifact(str(path))
            return
        with Image.open(path) as image:
            picture = image.convert("RGB")
        if self._name == "trackio":
            import trackio

            self._tracker.log({path.stem: trackio.Image(picture)}, step=step)
        elif self._name == "wandb":
            self._tracker.log_images({path.stem: [picture]}, step=step)
        else:
            pictures = {path.stem: np.asarray(picture)[None]}
            self._tracker.log_images(pictures, step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Close it, once."""
        self._try(lambda: self._tracker.finish())
        self._failed = True


def _plain(value: object) -> bool | int | float | str:
    """A value of a configuration as every tracker takes it."""
    if isinstance(value, bool | int | float):
        return value
    return for_screen(value if isinstance(value, str) else json.dumps(value), MOST_VALUE)
