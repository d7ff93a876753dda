"""Fuzzing that anyone can repeat: `python tests/fuzz/run.py --seconds 3600 --seed 0`.

Case N of a target and seed is always the same input; only how many are reached in the time differs.
They are read in another process, which is watched for crashes, hangs and memory, and for what it
opens or starts. A finding is printed with the command that shows it again, and its files are kept.
First come the inputs in `found`, once answered wrongly.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # so that the command above works without PYTHONPATH
    sys.path.insert(0, str(ROOT))

from tests.fuzz.mutate import Files  # noqa: E402
from tests.fuzz.targets import FOUND, PLANTED, TARGETS, Target  # noqa: E402

HANG_SECONDS = 20.0  # for one input of a few kilobytes
MEMORY = 3 * 2**29  # bytes an input may take beyond what the imports took
ALL = TARGETS | PLANTED


# ---- the process that reads


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod",
}  # fmt: skip
STARTS = {
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "pty.spawn", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
}  # fmt: skip


class Watch:
    """What a reader does outside its folder, seen through Python's audit events and stopped.

    Attributes:
        seen: what was tried since `start`.
    """

    def __init__(self, work: Path, box: Path):
        self.work, self.box, self.on, self.seen = str(work), str(box), False, []
        sys.addaudithook(self._hook)

    def _inside(self, path: object) -> bool:
        if isinstance(path, int):  # an open file
            return True
        where = os.path.abspath(os.fsdecode(path))
        return where == self.box or where.startswith(self.box + os.sep)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        self.on = False  # what we do here is not watched
        try:
            problem = self._problem(event, args)
        finally:
            self.on = True
        if problem:
            self.seen.append(problem)
            raise RuntimeError(f"stopped by the fuzz run: {problem}")

    def _problem(self, event: str, args: tuple) -> str | None:
        if event in STARTS:
            return f"{event} {args!r:.200}"
        if event == "open" and args[0] is not None and not self._inside(args[0]):
            path = os.path.abspath(os.fsdecode(args[0]))
            if isinstance(args[2], int) and args[2] & WRITING and path != os.devnull:
                return f"writes {path}"
            if path.startswith((self.work, "/dev/zero", "/etc/passwd")):
                return f"reads {path}"
        if event in CHANGES and not all(
            self._inside(a) for a in args[:2] if isinstance(a, str | bytes | os.PathLike)
        ):
            return f"{event} {args!r:.200}"
        return None


def peak() -> int:
    """Most bytes this process ever held; 0 where the system does not say."""
    with contextlib.suppress(OSError, AttributeError):
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return 0


def limit_memory(extra: int) -> None:
    """Refuse more than `extra` bytes beyond what is mapped now, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, hard))


def write_files(folder: Path, files: Files) -> None:
    """The files of a case, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_files(folder: Path) -> Files:
    """The files of a case that was kept."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def kept_inputs(name: str) -> list[Path]:
    """What a target once answered wrongly; these are its cases of negative numbers."""
    return sorted((FOUND / name).iterdir()) if (FOUND / name).is_dir() else []


def chain(error: BaseException) -> list[BaseException]:
    """An exception and those that it came of."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def read(target: Target, box: Path, watch: Watch) -> str | None:
    """Lets a target read its folder; says what was wrong with how it went, if anything was."""
    watch.seen.clear()
    before = peak()
    error, watch.on = None, True
    try:
        target.check(box)
    except Exception as caught:
        error = caught
    finally:
        watch.on = False
    if watch.seen:
        return f"touches what it must not: {watch.seen[0]}"
    names = {type(error).__name__} | {t.__name__ for t in type(error).__mro__}
    if error is not None and not names & {"ValueError", *target.allowed}:
        lines = traceback.format_exception(error)
        place = [
            line.split("\n")[0].strip()
            for line in lines
            if str(ROOT) in line and "/tests/" not in line
        ]
        return (
            f"{type(error).__name__}: {str(error)[:200]} ({place[-1] if place else 'in the check'})"
        )
    hungry = [e for e in chain(error) if isinstance(e, MemoryError) or "allocate memory" in str(e)]
    if hungry and "MemoryError" not in target.allowed:
        return f"memory: {type(hungry[0]).__name__}: {str(hungry[0])[:200]}"
    if peak() - before > MEMORY // 2:
        return f"memory: {(peak() - before) >> 20} MB more"
    return None


def child(
    names: list[str],
    seed: int,
    first: dict[str, int],
    spent: dict[str, float],
    folder: Path,
    seconds: float,
    given: Path | None,
    goal: dict[str, int],
) -> None:
    """Reads cases until the time is over and each target has come to its goal, and tells of each on
    standard output before and after it.
    """
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not read as an answer
    tell = lambda **message: say.write(json.dumps(message) + "\n")
    work = folder.resolve()
    box = work / "box"
    (work / "outside").mkdir(exist_ok=True)
    (work / "outside" / "secret").write_text("secret")
    (work / "outside" / "secret.mp4").write_text("secret")
    watch = Watch(work, box)
    seeds = {}
    for name in names:
        seeds[name] = ALL[name].seeds()
        for files in seeds[name] * (
            name in TARGETS
        ):  # also imports what is imported late, before memory is counted
            write_files(box, files)
            ALL[name].check(box)
    limit_memory(MEMORY)
    counts = dict(first)
    tell(ready=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end or any(counts[name] < goal[name] for name in names):
        late = (
            [name for name in names if counts[name] < goal[name]]
            if time.monotonic() > end
            else names
        )
        name = min(late, key=spent.get)  # the one that has had the least time
        number = counts[name]
        if given or number < 0:
            files = read_files(given or kept_inputs(name)[number])
        else:
            files = ALL[name].case(seeds[name], random.Random(f"{name} {seed} {number}"))
        write_files(box, files)
        tell(case=[name, number])
        started = time.monotonic()
        problem = read(ALL[name], box, watch)
        took = time.monotonic() - started
        spent[name] += took
        counts[name] += 1
        if problem:
            write_files(work / "found" / f"{name}-{seed}-{number}", files)
        tell(done=[name, number], problem=problem, took=took)
        if given or (problem and problem.startswith("memory")):  # what was taken may stay taken
            break


# ---- the process that watches it


def start_reading(
    options: dict,
) -> tuple[subprocess.Popen, queue.SimpleQueue, list[str], list[threading.Thread]]:
    """Start the process that reads: with what it says, line by line, and at last None; what it
    complains of; and the threads that listen.
    """
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    messages: queue.SimpleQueue = queue.SimpleQueue()
    complaints: list[str] = []
    listen = lambda: [*map(messages.put, process.stdout or ()), messages.put(None)]
    complain = lambda: complaints.extend(process.stderr or ())
    threads = [threading.Thread(target=t, daemon=True) for t in (listen, complain)]
    for thread in threads:
        thread.start()
    return process, messages, complaints, threads


def fuzz(
    names: list[str],
    seconds: float,
    seed: int,
    keep: Path,
    first: int | None = None,
    most: int | None = None,
    given: Path | None = None,
    hang: float = HANG_SECONDS,
    least: int = 0,
) -> tuple[dict[str, int], list[dict]]:
    """Runs cases of the named targets for so many seconds.

    Args:
        names: of `TARGETS` or `PLANTED`.
        seconds: in all, the first start of the reading process left out.
        seed: decides every case.
        keep: the folder to which the files of findings are written.
        first: number of the first case of each target; None: those once answered wrongly, then 0.
        most: stop after so many findings.
        given: one input, a folder, instead of made ones.
        hang: seconds for one input.
        least: new cases of each target that are read however long that takes.

    Returns:
        how many cases of each target were read, and the findings: target, case, problem, kept.
    """
    begin = {name: -len(kept_inputs(name)) if first is None else first for name in names}
    counts, spent, findings = dict(begin), dict.fromkeys(names, 0.0), []
    left, again = seconds, False
    while left > 0 and (most is None or len(findings) < most):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
            options = {
                "names": names,
                "seed": seed,
                "first": counts,
                "spent": spent,
                "folder": work,
                "seconds": left,
            }
            options["goal"] = {name: max(number, 0) + least for name, number in begin.items()}
            options["given"] = str(given) if given else None
            started = time.monotonic()
            process, messages, complaints, threads = start_reading(options)
            current, began, problem = None, None, None
            try:
                while True:
                    try:
                        line = messages.get(timeout=hang if began else 300)
                    except queue.Empty:
                        problem = f"hang: no answer for {hang:g} s"
                        break
                    if line is None:
                        break
                    message = json.loads(line)
                    if "ready" in message:
                        began = time.monotonic()
                    elif "case" in message:
                        current = message["case"]
                    else:
                        (name, number), current = current, None
                        counts[name] = number + 1
                        spent[name] += message["took"]
                        if message["problem"]:
                            files = Path(work) / "found" / f"{name}-{seed}-{number}"
                            findings.append(_keep(files, keep, name, number, message["problem"]))
                            if most is not None and len(findings) >= most:
                                break
            finally:
                process.kill()
                process.wait()
            for thread in threads:
                thread.join()
            if began is None:
                raise RuntimeError(
                    f"the reading process does not start: {''.join(complaints)[-3000:]}"
                )
            left -= time.monotonic() - (started if again else began)
            again = True
            if current:
                name, number = current
                if not problem:
                    said = "".join(complaints)[-300:].strip()
                    problem = f"crash: exit status {process.returncode}; {said}"
                spent[name] += 1.0  # it has had its turn
                findings.append(_keep(Path(work) / "box", keep, name, number, problem))
                counts[name] = number + 1
        if given:
            break
    return {name: counts[name] - begin[name] for name in names}, findings


def _keep(files: Path, keep: Path, name: str, number: int, problem: str) -> dict:
    shutil.copytree(files, keep / f"{name}-{number}", symlinks=True, dirs_exist_ok=True)
    return {
        "target": name,
        "case": number,
        "problem": problem,
        "kept": str(keep / f"{name}-{number}"),
    }


def main() -> int:
    """The command; 1 if anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", action="append", choices=[*ALL], help="one of them; all where not given"
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, help="the first case of each target")
    parser.add_argument("--case", type=int, help="only this case of the one --target")
    parser.add_argument("--input", type=Path, help="a kept folder, read by the one --target")
    parser.add_argument(
        "--keep", type=Path, help="where findings go; default: a new temporary folder"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        options = json.loads(args.child)
        given = options.pop("given")
        child(**options | {"folder": Path(options["folder"]), "given": given and Path(given)})
        return 0
    names = args.target or [*TARGETS]
    if (args.case is not None or args.input) and len(names) != 1:
        parser.error("--case and --input need one --target")
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    if args.case is not None:  # made here, read as any other
        target = ALL[names[0]]
        given = keep / f"input-{names[0]}-{args.seed}-{args.case}"
        write_files(
            given, target.case(target.seeds(), random.Random(f"{names[0]} {args.seed} {args.case}"))
        )
    else:
        given = args.input
    counts, findings = fuzz(names, args.seconds, args.seed, keep, args.first, given=given)
    seen = {}
    for finding in findings:
        kind = (
            finding["target"],
            re.sub(r"\d+|/\S*", "", finding["problem"])[:25],
            finding["problem"][-60:],
        )
        seen.setdefault(kind, []).append(finding)
    for alike in seen.values():
        example = alike[0]
        print(f"\n{len(alike)} x {example['target']}: {example['problem']}")
        print(
            f"  again: python tests/fuzz/run.py --target {example['target']} --input "
            f"{example['kept']}"
        )
    print("\ncases read: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    print(
        f"{len(findings)} findings of {len(seen)} kinds" + (f", kept in {keep}" if findings else "")
    )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
