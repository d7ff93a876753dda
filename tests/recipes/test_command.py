"""The command `muybridge`: subcommands, help, mistakes, and what a wheel carries."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from recipes import __main__ as command
from tests.recipes.runs import ROOT

# What takes seconds to load: never before it is needed.
HEAVY = {"torch", "matplotlib", "transformers", "timm", "open_clip", "sklearn", "scipy"}
SAYS = f"import sys; loaded = {HEAVY} & sys.modules.keys(); assert not loaded, loaded"
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("[a-z]*.py"))]
STARTS = "import sys, runpy; sys.argv[0] = 'muybridge'\ntry: runpy.run_module('recipes', "
STARTS += "run_name='__main__', alter_sys=False)\nfinally:\n    " + SAYS


# Forks for every line of words: each loads a recipe's flags, and none again what all have.
SERVES = f"""
import json, os, runpy, sys, traceback
import pretrain.log
assert not {HEAVY} & sys.modules.keys()
for line in sys.stdin:
    words, *files = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in enumerate(files, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv, status = ["muybridge", *words], 0
        try:
            runpy.run_module("recipes", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(99 if {HEAVY} & sys.modules.keys() else status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def muybridge(tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """`muybridge` as `start` starts it, in a fork of a process that has loaded nothing heavy."""
    files = [str(tmp_path_factory.mktemp("said") / name) for name in ("stdout", "stderr")]

    def run(*words: str) -> subprocess.CompletedProcess:
        for name in files:
            Path(name).unlink(missing_ok=True)
        print(json.dumps([words, *files]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        said = (Path(name).read_text() for name in files)
        return subprocess.CompletedProcess(words, status, *said)

    with subprocess.Popen(
        [sys.executable, "-c", SERVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as server:  # fmt: skip
        yield run
        server.stdin.close()


def start(*words: str, script: str = STARTS) -> subprocess.CompletedProcess:
    """`muybridge` with these words, which fails where it loads what is heavy."""
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_help_lists_every_recipe_once_with_a_line():
    run = start("--help")
    assert run.returncode == 0 and not run.stderr
    for path in (ROOT / "recipes").glob("[a-z]*.py"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        name = path.stem.replace("_", "-")
        assert re.findall(rf"^  {name} +(.*)$", run.stdout, re.M) == [first], name
    assert start().stdout == run.stdout
    assert start("--version").stdout == f"muybridge {version('muybridge')}\n"


def test_a_recipe_that_no_group_names_is_listed_too(tmp_path, monkeypatch):
    (tmp_path / "brand_new.py").write_text('"""Something new.\n\nMore of it."""\n')
    monkeypatch.setattr(command, "HERE", tmp_path)
    assert re.search(r"^  brand-new +Something new\.$", command.overview(), re.M)


@pytest.mark.parametrize(
    "typed, said",
    [
        ("vidoemae", "did you mean videomae"), ("linear-prob", "did you mean linear-probe"),
        ("probe\x1b[2J", r"probe\x1b[2J"), ("--data", "'--data'"), ("", "''"), ("-", "'-'"),
        ("__main__", "'__main__'"), ("../recipes/pack", "'../recipes/pack'"),
    ],
)  # fmt: skip
def test_a_typo_is_one_line(typed, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["muybridge", typed, "--data", "x"])
    with pytest.raises(SystemExit) as end:
        command.main()
    out, error = capsys.readouterr()
    assert end.value.code == 2 and not out
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error and "\x1b" not in error


def test_a_subcommand_has_the_recipes_flags_and_its_own_name():
    run = start("pack", "--help")
    assert run.returncode == 0, run.stderr
    help_text = re.sub(r"\x1b\[\d*m", "", run.stdout)
    assert "usage: muybridge pack" in help_text and "--short-side" in help_text
    assert "muybridge pack --data" in help_text and "python recipes/" not in help_text
    run = start("linear-probe", "--backbone", "x", "--dat", "y")
    assert run.returncode == 2 and "--data" in run.stderr
    run = start("pack", "--daat", "x")
    assert run.returncode == 2 and "--data" in run.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_loads_nothing(name, muybridge):
    run = muybridge(name.replace("_", "-"), "--help")
    assert run.returncode == 0, run.stderr
    assert f"usage: muybridge {name.replace('_', '-')}" in re.sub(r"\x1b\[\d*m", "", run.stdout)
    assert "python recipes/" not in run.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        ("videomae --motion-tokens 3", "--motion-tokens 3"),
        ("videomae --minutes 3", "auto --data synthetic --minutes 3"),
        ("videomae shrek", "shrec"), ("clip --grey 2", "--grey 2"),
        ("clip --minutes 3", "--minutes"),
        ("look clips --port 70000", "--port"), ("fit --data x --batch-size 0", "--batch-size 0"),
    ],
)  # fmt: skip
def test_a_mistake_in_flags_loads_nothing(words, said, muybridge):
    run = muybridge(*words.split())
    assert run.returncode == 2 and said in run.stderr, run.stderr


def test_the_package_alone_loads_nothing():
    assert start(script=f"import pretrain, downstream, recipes; {SAYS}").returncode == 0


def test_what_is_heavy_would_be_noticed():
    assert start(script=f"import scipy; {SAYS}").returncode == 1


@pytest.mark.slow
def test_a_wheel_brings_the_command(tmp_path):
    """In an environment of its own, outside of the repository; only what we depend on is lent."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    outside |= {"MUYBRIDGE_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}

    def call(*words: str | Path) -> str:
        run = subprocess.run(
            words, cwd=tmp_path, env=outside, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, (words, run.stdout[-2000:], run.stderr[-2000:])
        return run.stdout

    tree = tmp_path / "tree"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for name in files.splitlines():
        if (ROOT / name).exists() and not name.startswith("tests"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    call(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", tree
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    call(sys.executable, "-m", "venv", "fresh")
    bin_folder = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin")
    call(bin_folder / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    # The packages of the environment that tests, but not its muybridge: a path in a .pth file is
    # not searched for further .pth files, of which an editable installation is one.
    site = call(bin_folder / "python", "-c", "import site; print(site.getsitepackages()[0])")
    lent = Path(pytest.__file__).parents[1]
    (Path(site.strip()) / "lent.pth").write_text(f"{lent}\n")
    muybridge = bin_folder / "muybridge"
    assert "linear-probe" in call(muybridge, "--help")
    where = call(bin_folder / "python", "-c", "import recipes, pretrain; print(recipes.__file__)")
    assert where.startswith(str(tmp_path / "fresh"))
    assert "vit_b" in call(bin_folder / "python", "-m", "downstream.models")  # reads its costs.json
    train = "--data synthetic:36 --steps 2 --batch-size 8 --micro-batch 8 --knn-every 0 --out run"
    call(muybridge, "videomae", *train.split(), "--threads", "1")
    assert (tmp_path / "run" / "backbone" / "model.safetensors").exists()
    assert "--num-clips" in call(muybridge, "linear-probe", "--help")
