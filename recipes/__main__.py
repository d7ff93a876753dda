"""The command `muybridge`: every recipe as a subcommand, under the flags of the recipe.

    muybridge linear-probe --help    the same as python recipes/linear_probe.py --help
    python -m recipes pack           the same as muybridge pack

Help is read from the recipes' text, so that nothing of what they need is loaded for it.
"""

import ast
import os
import runpy
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from pretrain.names import did_you_mean, for_screen

HERE = Path(__file__).parent
# What a person wants, and the recipes for it in the order of use; others stand under MORE.
WISHES = {
    "Begin": ("demo", "doctor"),
    "Own videos": ("look", "pack", "convert_labels"),
    "Pretrain": ("videomae", "clip"),
    "Measure": ("linear_probe", "zero_shot", "retrieval", "fuse", "compare", "runs"),
    "Train a classifier": ("fit", "finetune"),
    "Use": ("predict", "detect", "visualize", "export", "convert"),
}
MORE = "More"


def recipes() -> dict[str, Path]:
    """The recipes' files by name, such as linear_probe."""
    return {path.stem: path for path in sorted(HERE.glob("[a-z]*.py"))}


def typed_name(name: str) -> str:
    """A recipe's name as the subcommand that is typed."""
    return name.replace("_", "-")


def about(path: Path) -> str:
    """The first line of a recipe's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]


def overview() -> str:
    """What `muybridge --help` prints: the subcommands, a line each, by what a person wants."""
    files = recipes()
    grouped = {wish: [n for n in names if n in files] for wish, names in WISHES.items()}
    known = {name for names in grouped.values() for name in names}
    grouped[MORE] = [name for name in files if name not in known]
    width = max(map(len, files))
    lines = ["usage: muybridge COMMAND [FLAGS]", "", "muybridge COMMAND --help has its flags."]
    for wish, names in grouped.items():
        if names:
            lines += ["", f"{wish}:"]
            lines += [f"  {typed_name(name):<{width}}  {about(files[name])}" for name in names]
    return "\n".join(lines)


def start(name: str) -> None:
    """Run a recipe; one that has its flags in recipes/options/ is loaded when they are right."""
    if not (HERE / "options" / f"{name}.py").exists():
        runpy.run_module(f"recipes.{name}", run_name="__main__", alter_sys=True)
        return
    # What its help shows, as if it were started by itself.
    sys.modules["__main__"].__doc__ = ast.get_docstring(ast.parse(recipes()[name].read_text()))
    options = import_module(f"recipes.options.{name}")
    options.command(lambda config: import_module(f"recipes.{name}").main(config))


def main() -> None:
    """Run the subcommand that the first word names."""
    first, *words = sys.argv[1:] or ["--help"]
    name = first.replace("-", "_")
    try:
        if first in ("-h", "--help"):
            print(overview(), flush=True)
        elif first == "--version":
            print(f"muybridge {version('muybridge')}", flush=True)
        elif name not in recipes():
            near = did_you_mean(first, map(typed_name, recipes()))
            error = f"there is no command {first!r}{near}"
            print(
                for_screen(f"error: {error}; muybridge --help lists the commands"), file=sys.stderr
            )
            sys.exit(2)
        else:
            sys.argv = [f"muybridge {typed_name(name)}", *words]
            start(name)
    except BrokenPipeError:  # the reader of the help, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:  # before the recipe began
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
