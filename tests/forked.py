"""Programs that need not import everything again: they are forked from this process."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any


def start(work: Callable[[], object], **streams: Any) -> subprocess.Popen:
    """`subprocess.Popen(..., **streams)` of a fork of this process, which calls `work` and ends."""

    def run() -> None:
        status = 1
        try:
            os.closerange(3, 4096)  # and with them the pipe on which Popen waits for a program
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            sys.stdin, sys.stdout, sys.stderr = (open(i, mode) for i, mode in enumerate("rww"))  # noqa: SIM115
            work()
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return subprocess.Popen([sys.executable], preexec_fn=run, **streams)
