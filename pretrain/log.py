"""The command line, progress lines, the log file and figures."""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from pretrain.files import open_regular, parse_json, reading, replacing, sync, write_synced
from pretrain.flags import (
    Config,
    flat,
    go_by_epochs,
    refuse_elsewhere,
    refuse_empty,
    refuse_numbers,
    refuse_repeated,
    refuse_several,
    refuse_unknown,
    refuse_unused,
    remember_typed,
)
from pretrain.folders import writing
from pretrain.names import clean_screen, counted, did_you_mean, for_screen, for_title

if TYPE_CHECKING:  # not imported here: packing needs none of them
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

MOST_LINE = 2**20  # bytes of a line of a log
# What a curve shows, by the name of its value in log.jsonl.
CURVES = {
    "knn": "online kNN accuracy",
    "explained": "target explained",
    "teacher_cosine": "cosine to the starting weights' tokens",
    "video_to_text": "video to text in the batch",
    "text_to_video": "text to video in the batch",
    "train_top1": "accuracy on augmented training clips",
    "val_top1": "validation accuracy",
    **{f"val_t2v_r{k}": f"text to video R@{k} on val" for k in (1, 5, 10)},
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which like Ctrl-C unwinds what is at work: locks, decoders, processes."""


def _terminate(*_) -> None:
    raise Terminated


def cli(
    main: Callable[[Config], object],
    config: type[Config] | Mapping[str, Config],
    unused: Callable[[Config], dict[str, str]] | None = None,
    about: dict[str, str] | None = None,
    elsewhere: dict[str, str] | None = None,
    preset_of: Callable[[list[str]], str] | None = None,
) -> None:
    """Parse the command line, run `main` and turn a user's or a disk's mistake into one line.

    Nothing that is printed from then on can steer the terminal (pretrain/names.py). An error's
    notes get lines of their own; whatever names are in it, it has no other line ends.

    Args:
        main: takes the config.
        config: as `parse` takes it.
        unused: of a config: the fields that its choices leave without effect, and why. Typed ones
            are refused.
        about: as `parse` takes it.
        elsewhere: flags that other recipes have and this one has not, and what to do instead.
        preset_of: as `parse` takes it.
    """
    arguments = sys.argv[1:]
    if any(for_screen(word) != word for word in arguments):
        clean_screen()  # tyro's own errors repeat what was typed
    if os.environ.get("WORLD_SIZE", "1") == "1":  # a launcher ends its processes itself
        signal.signal(signal.SIGTERM, _terminate)
    try:
        flags = config if isinstance(config, type) else type(next(iter(config.values())))
        refuse_elsewhere(arguments, flags, elsewhere or {})
        refuse_unknown(arguments, flags)
        presets = () if isinstance(config, type) else config
        refuse_several([word for word in arguments if word not in presets], flags)
        parsed = remember_typed(arguments, parse(arguments, config, about, preset_of))
        clean_screen()  # not before: help comes in colours
        refuse_repeated(arguments, parsed)
        refuse_numbers(parsed)
        refuse_empty(arguments, parsed)
        parsed = go_by_epochs(arguments, parsed)
        if unused:
            refuse_unused(arguments, parsed, unused(parsed))
        main(parsed)
    except ValueError as error:
        for line in (f"error: {error}", *getattr(error, "__notes__", ())):
            print(for_screen(line), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # For what Python would still write there, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not {"-h", "--help"} & set(arguments):
            print(
                "error: the reader of this output has ended; start the same command again to "
                "continue",
                file=sys.stderr,
            )
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # A disk or a folder that refuses; who writes into an open file says itself which one it is.
        where = f"{error.filename}: " if error.filename else ""
        reason = for_screen(f"{where}{error.strerror or error}")
        print(
            f"error: {reason}. What was written before is intact: mend that, and start the "
            "same command again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as end:
        print("interrupted; start the same command again to continue", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT))
    finally:
        try:  # not at Python's own end, which would show a traceback
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has ended, and the work is done
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # Python asks them with SIGTERM, which a loader's processes ignore for the sake of a run's
        # last save, and waits.
        for left in multiprocessing.active_children():
            left.kill()


def parse(
    words: list[str],
    config: type[Config] | Mapping[str, Config],
    about: dict[str, str] | None = None,
    preset_of: Callable[[list[str]], str] | None = None,
) -> Config:
    """A recipe's configuration from the words of its command line.

    Help, and flags that are wrong, are printed and end the process (tyro).

    Args:
        words: of the command line, without the program's name.
        config: a dataclass; or presets, name -> instance, of which the first word chooses one (the
            first preset if there is none) and the flags change single values. Help shows the values
            of the chosen one.
        about: of each preset a line for the help.
        preset_of: of words that name no preset, which one it is; None: the first.

    Raises:
        ValueError: there is no such preset.
    """
    program, description = _program()
    if isinstance(config, type):
        return tyro.cli(config, args=words, prog=program, description=description)
    chosen = preset_of(words) if preset_of else next(iter(config))
    if words and not words[0].startswith("-"):
        chosen, *words = words
    if chosen not in config:
        raise ValueError(
            f"there is no preset {chosen!r}{did_you_mean(chosen, config)}; the first word is one "
            f"of {', '.join(config)}"
        )
    width = max(map(len, config))
    lines = [f"    {name:<{width}}  {(about or {}).get(name, '')}" for name in config]
    presets = f"Presets (the values below are those of {chosen}):\n\n" + "\n".join(lines)
    try:
        return tyro.cli(
            type(config[chosen]), default=config[chosen], args=words,
            prog=f"{program} [PRESET]",
            description=f"{description}\n\n{presets}",
        )  # fmt: skip
    except SystemExit as stop:
        late = [word for word in words if word in config]
        if stop.code and late:
            print(f"a preset is the first word: {late[0]} comes before all flags", file=sys.stderr)
        raise


def _program() -> tuple[str, str | None]:
    """How this was started, and the docstring of what was: of a file, or of `muybridge NAME`."""
    started = sys.modules["__main__"]
    name, description = getattr(getattr(started, "__spec__", None), "name", ""), started.__doc__
    typed = lambda found: f"muybridge {found[1].replace('_', '-')}"
    if name.startswith("recipes.") and name != "recipes.__main__":  # python puts a path there
        program = re.sub(r"recipes\.(\w+)", typed, name)
    else:
        program = Path(sys.argv[0]).name
    if program.startswith("muybridge "):
        description = re.sub(r"python recipes/(\w+)\.py", typed, description or "")
    return program, description


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print aligned names and values."""
    width = max(map(len, rows))
    print(for_screen(title))
    for name, value in rows.items():
        print(f"  {for_screen(name):<{width}}  {for_screen(value)}")
    print(flush=True)


def print_notes(notes: Iterable[str]) -> None:
    """Print what a reader must know; a sentence that begins with WARNING says so itself."""
    for note in notes:
        print("" if note.startswith("WARNING") else "note: ", for_screen(note), sep="", flush=True)


def parameters(model: "nn.Module") -> str:
    """How many a model has, in words."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def write_json(path: Path, content: object) -> None:
    """Write JSON aside, sync and rename: neither a reader nor a power cut meets half a file.

    Raises:
        ValueError: the disk does not take it; an older file is untouched.
    """
    write_whole(path, json.dumps(content, indent=1).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and wait until it is on the disk.

    Raises:
        ValueError: the disk does not take it; an older file is untouched.
    """
    with writing(path):
        with replacing(path) as aside:
            write_synced(aside, data)
        sync(path.parent)


def read_log(path: Path) -> tuple[list[dict], int]:
    """The lines of a run's log.jsonl, and how many were damaged and are left out.

    Of a line longer than `MOST_LINE` every so many bytes count as one.

    Raises:
        ValueError: the file cannot be read.
    """
    lines, damaged = [], 0
    with reading(path), open_regular(path) as file:
        while raw := file.readline(MOST_LINE):
            try:
                line: Any = parse_json(raw, lax=True)
                whole = type(line["step"]) is int and all(
                    v is None or isinstance(v, int | float) for v in line.values()
                )
            except (ValueError, TypeError, KeyError):
                whole = False
            if whole:
                lines.append(line)
            damaged += not whole
    return lines, damaged


class RunLog:
    """log.jsonl of a run, and the clock behind the progress lines.

    Args:
        run: the run's folder.
        start_step: steps already done; lines of later steps are of work that a kill undid, and go.

    Raises:
        ValueError: the log cannot be read or written.
    """

    def __init__(self, run: Path, start_step: int):
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines, damaged = read_log(self.path)
            if damaged:
                print(
                    f"warning: {self.path}: dropped {counted(damaged, 'damaged line')} (a kill or "
                    "a full disk leaves such)",
                    file=sys.stderr,
                    flush=True,
                )
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= start_step]
            write_whole(self.path, "".join(kept).encode())
        self.started = time.monotonic()
        self.start_step = start_step

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line of values, as JSON.

        Raises:
            ValueError: the disk does not take it.
        """
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def time_left(self, step: int, num_steps: int) -> str:
        """Remaining time of the run at the mean speed so far."""
        done = max(step - self.start_step, 1)
        return duration((time.monotonic() - self.started) / done * (num_steps - step))


def config_differences(old: dict, new: "DataclassInstance", ignore: set[str]) -> list[str]:
    """The differences between a stored configuration and a new one, as `name: old -> new`."""
    fresh = json.loads(json.dumps(flat(new)))
    return [
        f"{name}: {old.get(name)!r} -> {fresh.get(name)!r}"
        for name in sorted(old.keys() | fresh.keys())
        if name not in ignore and old.get(name) != fresh.get(name)
    ]


def blank_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, to be filled and saved; nothing in it touches its edges."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def optional_figure(draw: Callable[..., str | None]) -> Callable[..., str]:
    """Make a function that draws to a path warn where it fails: no number is lost for a picture.

    The new one takes the same arguments, by place, and returns what to print of the figure: what
    `draw` returned, else its path, or that there is none. Letters that the font lacks are boxes, of
    which nothing is said.
    """

    @functools.wraps(draw)
    def careful(path: Path, *arguments) -> str:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")
                told = draw(path, *arguments)
        except Exception as error:  # of fonts, sizes, memory, the disk
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # half a picture, or an older one
            reason = for_screen(f"{type(error).__name__}: {error}", 300)
            print(f"warning: no figure {for_screen(path)}: {reason}", file=sys.stderr, flush=True)
            return f"none ({for_screen(path.name)} could not be drawn)"
        return told or for_screen(path)

    return careful


@optional_figure
def clips_figure(
    path: Path,
    rows: list[tuple[str, np.ndarray]],
    seconds: np.ndarray,
    title: str,
    caption: str,
    bar: tuple[str, list[tuple[float, ...]], tuple[float, float]] | None = None,
    max_frames: int = 8,
    weights: tuple[str, np.ndarray] | None = None,
) -> None:
    """Draw clips under each other, one row each, a column a frame.

    Args:
        path: the .png to write.
        rows: name and uint8 frames (T, H, W, 3) of each.
        seconds: (T,) when the frames were.
        title: above the picture: of what it is, and by whom.
        caption: what a reader must know, below the picture.
        bar: what a colour means, in words, the colours, and the values of the first and the last,
            for a bar at the right.
        max_frames: columns, evenly spread over the clip.
        weights: a name, and the weights of as many equal parts of the clip's time, which sum to
            one: bars under the frames, and a line where all would be alike.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    frames = len(rows[0][1])
    columns = np.unique(np.linspace(0, frames - 1, min(max_frames, frames)).astype(int))
    width = 1.5 * len(columns) + 1.2
    title, caption = for_title(title, width), for_title(caption, width, 8)
    lines = title.count("\n") + caption.count("\n")
    heights = [1.5] * len(rows) + [1.0] * bool(weights)
    figure = blank_figure(width, sum(heights) + 0.9 + 0.2 * lines)
    grid = figure.add_gridspec(len(heights), len(columns), height_ratios=heights)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    axes = np.reshape([figure.add_subplot(grid[place]) for place in places], (len(rows), -1))
    for line, (name, clip) in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            axis.imshow(clip[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, fontsize=8)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(f"frame {column}, {seconds[column]:.2f} s", fontsize=7)
    if bar:
        meaning, colours, values = bar
        scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("bar", colours))
        scale.set_clim(*values)
        figure.colorbar(scale, ax=list(axes.flat), shrink=0.8, aspect=30).set_label(
            meaning, fontsize=8
        )
    if weights:
        name, parts = weights
        axis = figure.add_subplot(grid[-1, :])
        starts = np.arange(len(parts)) * frames / len(parts) - 0.5
        axis.bar(starts, parts, frames / len(parts), align="edge", edgecolor="white")
        axis.axhline(1 / len(parts), color="grey", linestyle="--", linewidth=0.8)
        # A column's middle is above its frame.
        half = (frames - 1) / max(len(columns) - 1, 1) / 2
        axis.set_xlim(-half, frames - 1 + half)
        axis.set_xticks(columns, [f"{column}" for column in columns], fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=110)


@optional_figure
def curve_figure(
    path: Path, log_file: Path, losses: tuple[str, ...], fractions: tuple[str, ...], title: str
) -> None:
    """Draw what a run's log says over its steps: losses on the left axis, fractions on the right.

    Of a value that has a value `NAME_chance` beside it, that is drawn as a level. Where the log has
    effective ranks (pretrain/health.py), they are drawn below, over the steps at which the run was
    not healthy.

    Args:
        path: the .png to write.
        log_file: log.jsonl of the run.
        losses: names of values for the left axis.
        fractions: names of values between 0 and 1 for the right axis.
        title: above it.
    """
    from matplotlib.ticker import MaxNLocator

    lines, _ = read_log(log_file)
    ranked = any(line.get("effective_rank") for line in lines)
    figure = blank_figure(7, 4.4 + 1.4 * ranked)
    left, *below = figure.subplots(
        1 + ranked, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + ranked]
    )[:, 0]
    right = left.twinx()
    for axis, names, first, scale in ((left, losses, 0, 1), (right, fractions, len(losses), 100)):
        for i, name in enumerate(names):
            points = [
                (line["step"], scale * line[name]) for line in lines if line.get(name) is not None
            ]
            level = [scale * line[f"{name}_chance"] for line in lines if line.get(f"{name}_chance")]
            if points:
                words = CURVES.get(name, name.replace("_", " "))
                _curve(axis, points, words, f"C{first + i}")
            if level:
                of = f"chance {level[-1]:.1f} %" if axis is right else f"chance {level[-1]:.2f}"
                axis.axhline(level[-1], color=f"C{first + i}", linewidth=0.8, linestyle=":",
                             label=of)  # fmt: skip
    for axis in below:
        _draw_health(axis, lines, f"C{len(losses) + len(fractions)}")
    (below or [left])[-1].set_xlabel("step")
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set_ylabel("loss")
    right.set_ylabel("per cent")
    least = min((y for line in right.lines for y in np.asarray(line.get_ydata())), default=0)
    right.set_ylim(max(min(float(least), 0), -100), 100)
    right.set_visible(bool(right.lines))
    handles, labels = [], []
    for axis, unit in ((left, "loss"), (right, "per cent"), *((axis, "") for axis in below)):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.append(handle)
            named = label == unit or label.startswith("chance") or not unit
            labels.append(label if named else f"{label} ({unit})")
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    figure.suptitle(for_title(title, 7), fontsize=10)
    figure.savefig(path, dpi=110)


def _curve(axis: "Axes", points: list[tuple[int, float]], name: str, colour: str) -> None:
    marker = "o" if len(points) < 20 else None
    axis.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=3,
              linewidth=1)  # fmt: skip


def _draw_health(axis: "Axes", lines: list[dict], colour: str) -> None:
    """Effective ranks over the stretches of steps with another word than healthy."""
    ranks = [(x["step"], x["effective_rank"]) for x in lines if x.get("effective_rank")]
    _curve(axis, ranks, "effective rank", colour)
    axis.set_ylabel("rank")
    axis.set_ylim(0, 1.15 * max((rank for _, rank in ranks), default=1))
    for name, shade in (("collapsing", "#f4b6b6"), ("not_learning", "#d4d4d4")):
        label = name.replace("_", " ")
        for before, line in zip([{"step": 0}, *lines], lines, strict=False):
            if line.get(name):
                axis.axvspan(before["step"], line["step"], color=shade, linewidth=0, label=label)
                label = "_" + label.lstrip("_")  # once in the legend
