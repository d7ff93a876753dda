"""Checkpoints of which every process writes what it holds: parts of tensors, and their files."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from pretrain.checkpoint import checkpoints, load_checkpoint, newest_valid, read_weights
from pretrain.saving import Saver
from pretrain.sharded import Part, Parts, to_write, write_parts
from pretrain.weights import CheckpointError, file_of
from tests.recipes.runs import in_processes

SHAPES = {"matrix": (7, 3), "scalar": (), "row": (1,), "none": (0, 4), "deep": (2, 3, 5)}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    made["half"] = made["matrix"].bfloat16()
    return made | {"flags": made["deep"] > 0, "count": torch.tensor(2**40 + seed)}


def held(whole: dict[str, torch.Tensor], place: int, processes: int) -> dict[str, Part]:
    """What a process has: of the matrix some numbers from anywhere on, of the rest all."""
    parts = {name: Part(value, 0, value.shape, shared=False) for name, value in whole.items()}
    flat = whole["matrix"].flatten()
    cuts = [0, *(5 * n + 2 for n in range(1, processes)), len(flat)]
    mine = flat[cuts[place] : cuts[place + 1]]
    return parts | {"matrix": Part(mine, cuts[place], whole["matrix"].shape)}


def write(folder: Path, whole: dict[str, torch.Tensor], processes: int) -> list[Path]:
    paths = []
    for place in range(processes):
        mine = to_write(held(whole, place, processes), {"deep", "half"}, place, processes)
        paths.append(folder / file_of("model", place, processes))
        write_parts(paths[-1], mine)
    return paths


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_range_of_any_tensor_is_read_whoever_wrote_it(tmp_path, processes):
    whole = tensors()
    paths = write(tmp_path, whole, processes)
    found = Parts(reversed(paths))
    assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in whole.items()
    }
    for name, value in whole.items():
        flat = value.flatten()
        for start in range(len(flat) + 1):
            for end in range(start, len(flat) + 1):
                assert torch.equal(found.read(name, start, end - start), flat[start:end])
    written = [p.stat().st_size for p in paths]
    assert processes == 1 or max(written) < sum(written)  # each its part


def rewrite(path: Path, content: dict[str, torch.Tensor], places: object) -> None:
    path.write_bytes(save(content, {"parts": json.dumps(places)}))


def header_of(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and its length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


HOSTILE = {
    "start": [4, 7, 3], "overlap": [0, 7, 3], "beyond": [2**40, 7, 3], "negative": [-1, 7, 3],
    "float": [7.0, 7, 3], "text": ["7", 7, 3], "true": [True, 7, 3], "huge": [7, 2**40, 2**40],
    "deep": [7, *[1] * 17], "empty": [], "none": None, "dict": {"7": 1}, "shape": [7, 3, 7],
    "digits": [10**4000, 7, 3],
}  # fmt: skip


@pytest.mark.parametrize("kind", [*HOSTILE, "missing", "twice", "stranger", "list", "dtype"])
def test_hostile_parts_are_refused(tmp_path, kind):
    first, second = write(tmp_path, tensors(), 2)
    content, paths = load_file(second), [first, second]
    places = json.loads(header_of(second)[0]["__metadata__"]["parts"])
    if kind in HOSTILE:
        places["matrix"] = HOSTILE[kind]
    elif kind == "missing":
        paths = [first]
    elif kind == "twice":
        shutil.copy(second, again := tmp_path / "model-00003-of-00003.safetensors")
        paths.append(again)
    elif kind == "stranger":
        places["nobody"] = [0, 1]
    elif kind == "list":
        places = [places]
    else:
        content["matrix"] = content["matrix"].double()
    if kind not in ("missing", "twice"):
        rewrite(second, content, places)
    with pytest.raises(CheckpointError) as refused:
        Parts(paths)
    assert len(str(refused.value)) < 1000


def test_a_file_cut_or_with_false_truth_values_is_refused_while_it_is_read(tmp_path):
    (path,) = write(tmp_path, tensors(), 1)
    found = Parts([path])
    data = path.read_bytes()
    header, length = header_of(path)
    flags = length + header["flags"]["data_offsets"][0]
    path.write_bytes(data[:flags] + b"\7" + data[flags + 1 :])
    with pytest.raises(CheckpointError, match="truth values"):
        found.read("flags", 0, 30)
    os.truncate(path, 20)
    for name, value in tensors().items():
        if value.numel():
            with pytest.raises(CheckpointError, match="shorter"):
                found.read(name, 0, value.numel())


def saved_by_several(out: str, step: int, plan: dict) -> None:
    """In each of several processes: save once, as an engine does that shards its model."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    run = Path(out)
    weights = tensors(step)
    if plan.get("elsewhere") == rank:
        run = run.with_name("elsewhere")
    if plan.get("nan") == rank:
        weights["matrix"].fill_(math.nan)
    if plan.get("full") == rank:
        usage = shutil.disk_usage(run.parent)._replace(free=10)
        shutil.disk_usage = lambda _: usage
    if plan.get("rename") == rank:

        def refuse(*_: object) -> None:
            raise OSError("no renaming here")

        os.replace = refuse
    moments = {"matrix.exp_avg": held(tensors(step + 1), rank, count)["matrix"]}
    mine = to_write(held(weights, rank, count), {"deep", "half"}, rank, count)
    saver = Saver(run, dist.new_group(backend="gloo"), plan["background"])
    about = {"step": step, "model": {}}
    try:
        saver.save(mine, to_write(moments, set(), rank, count), about)
        about["step"] = -1  # what was saved is what it was
        saver.wait()
    except CheckpointError as error:
        print(f"process {rank}: {error}", flush=True)
        raise SystemExit(3) from error


def save_by(tmp_path: Path, processes: int, step: int, background: bool = False, **plan: int):
    given = str(tmp_path / "run"), step, plan | {"background": background}
    return in_processes(tmp_path, processes, "tests.unit.test_sharded", "saved_by_several", *given)


def loaded(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The state of a checkpoint, and all that it holds, as one process loads it."""
    whole = {name: torch.zeros_like(value) for name, value in tensors().items()}
    moment = torch.zeros(7, 3)
    weights = {name: Part(value, 0, value.shape) for name, value in whole.items()}
    state = load_checkpoint(folder, weights, lambda _: {"exp_avg": Part(moment, 0, moment.shape)})
    return state, whole | {"moment": moment}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a checkpoint of three processes, and one of two that was written in a thread."""
    folder = tmp_path_factory.mktemp("sharded")
    for processes, step, background in ((3, 1, False), (2, 2, True)):
        done = save_by(folder, processes, step, background)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_processes_write_one_checkpoint_that_one_process_reads(run):
    assert [p.name for p in checkpoints(run)] == ["step-00000002", "step-00000001"]
    for step, folder in enumerate(reversed(checkpoints(run)), 1):
        state, found = loaded(folder)
        expected = tensors(step) | {"moment": tensors(step + 1)["matrix"]}
        assert state["step"] == step
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert all(torch.equal(value, expected[n]) for n, value in read_weights(folder).items())
    names = {p.name for p in checkpoints(run)[0].iterdir()}
    assert "model-00002-of-00002.safetensors" in names and len(names) == 6


@pytest.mark.parametrize("kind", ["missing", "cut", "changed", "unlisted"])
def test_damage_to_the_file_of_any_process_is_found(run, tmp_path, kind):
    for file in sorted(p.name for p in checkpoints(run)[0].iterdir()):
        again = Path(shutil.copytree(run, tmp_path / file))
        newest = checkpoints(again)[0]
        data = bytearray((newest / file).read_bytes())
        manifest = json.loads((newest / "manifest.json").read_text())
        if kind == "missing":
            (newest / file).unlink()
        elif kind == "unlisted":  # by somebody with intent
            manifest.pop(file, None) or manifest.pop("state.json")
            (newest / "manifest.json").write_text(json.dumps(manifest))
        else:
            data[-2] ^= 1
            (newest / file).write_bytes(data if kind == "changed" else data[: len(data) // 2])
        found, problems = newest_valid(again)
        assert found.name == "step-00000001" and "step-00000002" in problems[0], file


def test_a_checkpoint_of_other_shapes_or_names_is_refused(run):
    weights = {name: Part(value, 0, value.shape) for name, value in tensors().items()}
    for wrong in (
        weights | {"matrix": Part(torch.zeros(3, 7), 0, torch.Size((3, 7)))},
        weights | {"more": weights["row"]},
        {name: part for name, part in weights.items() if name != "none"},
    ):
        with pytest.raises(CheckpointError, match="does not fit the model"):
            load_checkpoint(checkpoints(run)[0], wrong, lambda _: {})
    with pytest.raises(CheckpointError, match="does not fit the optimizer"):
        load_checkpoint(checkpoints(run)[0], weights, lambda _: {})


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"full": 1}, "process 1: cannot write.*10 are free"),
        ({"nan": 0}, "process 0: not saved: matrix"),
        ({"elsewhere": 1}, "process 1: not saved.*share a disk"),
        ({"rename": 0}, "process 0: cannot write.*no renaming here"),
    ],
)
def test_what_fails_in_one_process_is_said_once_and_nothing_is_lost(run, tmp_path, plan, said):
    shutil.copytree(run, tmp_path / "run")
    background = "nan" in plan
    done = save_by(tmp_path, 2, 3, background, **plan)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert re.search(said, done.stdout) and len(done.stdout.splitlines()) == 1
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002"}
