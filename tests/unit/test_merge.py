"""A pack made in parts on several machines is the pack that one machine makes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from far import serve

from pretrain.data.cache import open_data
from pretrain.data.index import checked_lines, load_index
from pretrain.data.merge import merge
from pretrain.data.near_list import STRUCK
from pretrain.data.pack import pack, parse_part
from pretrain.data.shards import Pack
from pretrain.data.writer import Rows
from recipes.pack import Config, main, unused
from tests.unit.media import ready_video

COUNT = 3
ROOT = Path(__file__).resolve().parents[2]


def quick(source: Path, out: Path, part: int = 0, count: int = COUNT, **more) -> dict:
    given = {"workers": 1, "progress": False, "shard_bytes": 3000}
    return pack(source, out, part=(part, count) if part else None, **(given | more))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A list of eight videos, two of them broken, `parts`, and `whole`, a pack of all."""
    folder = tmp_path_factory.mktemp("made")
    good = [ready_video(folder / f"{n}.mp4", n) for n in (6, 9)]
    rows = ["path,label,split,caption"]
    for i in range(6):
        shutil.copy(good[i % 2], folder / f"v{i}.mp4")
        rows.append(f"v{i}.mp4,{'walk' if i % 2 else 'run'},{'test' if i > 3 else 'train'},nr {i}")
    for name in ("bad", "worse"):
        (folder / f"{name}.mp4").write_text("no video")
        rows.append(f"{name}.mp4,run,train,")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    quick(folder / "list.csv", folder / "whole")
    for part in range(1, COUNT + 1):
        quick(folder / "list.csv", folder / "parts" / str(part), part)
    return folder


@pytest.fixture
def parts(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "parts", tmp_path / "parts"))


def test_merged_parts_are_the_pack_that_one_machine_makes(made, parts, tmp_path):
    index = merge(parts, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(made / "whole")
    assert index == load_index(made / "whole") and len(index["shards"]) > 2
    assert index["num_clips"] == 6 and index["num_refused"] == 2
    assert sum(load_index(part)["num_clips"] for part in parts.iterdir()) == 6
    shutil.rmtree(parts)
    pack = Pack(tmp_path / "out")
    assert len(pack.read(pack.record(0))) == pack.record(0)["bytes"]


def test_lines_that_wait_for_their_turn_take_no_memory(made, tmp_path):
    """Of ten million clips there would be 23 GB of objects."""
    pack = Pack(made / "whole")
    row = pack.record(0) | {"captions": ["somebody walks along a busy street"] * 5}
    wait = Rows(tmp_path / "rows.jsonl")
    with contextlib.closing(wait):
        tracemalloc.start()
        for number in range(5000):
            wait.add(row | {"key": f"{number}-0"}, number % 3)
        order, taken = wait.order(), tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < 200 * 5000
        assert sorted(order) == list(range(5000)) and wait.twice() is None
        assert wait.get(order[7])["key"] == f"{order[7]}-0" and wait.of(7) == 1
        has = wait.finder()
        assert has("4999-0") and not has("5000-0") and not has("")
        wait.close()
    assert not (tmp_path / "rows.jsonl").exists()


def test_links_in_a_folder_that_is_there_lead_nowhere(made, parts, tmp_path):
    """A folder may be anybody's, and what is written aside is written there."""
    mine, work = tmp_path / "mine", tmp_path / "out" / ".pack"
    mine.mkdir()
    work.mkdir(parents=True)
    for name in ("rows.jsonl", "shard.tar"):
        (mine / name).write_text("mine")
        (work / name).symlink_to(mine / name)
    (mine / "clips.jsonl").write_text("mine")
    (work / "new").symlink_to(mine)
    merge(parts, tmp_path / "out", progress=False)
    assert {path.read_text() for path in mine.iterdir()} == {"mine"}
    assert files_of(tmp_path / "out") == files_of(made / "whole")


def test_what_was_merged_is_packed_further(made, parts, tmp_path, capsys):
    out = tmp_path / "out"
    merge(parts, out)
    before = times_of(out)
    quick(made / "list.csv", out, progress=True)
    assert "nothing new to decode" in capsys.readouterr().err
    assert times_of(out) == before
    merge(parts, out)
    assert times_of(out) == before


def test_estimated_streams_are_merged(made, tmp_path):
    pytest.importorskip("cv2")
    source = tmp_path / "in"
    source.mkdir()
    for name in ("v0.mp4", "v1.mp4", "v2.mp4"):
        shutil.copy(made / name, source / name)
    shutil.copy(made / "bad.mp4", source)
    quick(source, tmp_path / "whole", flow="dis")
    for part in (1, 2):
        quick(source, tmp_path / "parts" / f"{part}", part, 2, flow="dis")
    index = merge(tmp_path / "parts", tmp_path / "out", progress=False)
    assert index["streams"]["flow"]["num_clips"] == 3
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    before = times_of(tmp_path / "out")
    quick(source, tmp_path / "out")
    assert times_of(tmp_path / "out") == before


def test_a_part_may_be_empty_and_is_no_data(made, tmp_path):
    for part in range(1, 10):
        quick(made / "list.csv", tmp_path / "parts" / f"{part}", part, 9)
    counts = [load_index(each)["num_clips"] for each in (tmp_path / "parts").iterdir()]
    assert 0 in counts and sum(counts) == 6
    merge(tmp_path / "parts", tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(made / "whole")
    empty = next(p for p in (tmp_path / "parts").iterdir() if not load_index(p)["num_clips"])
    with pytest.raises(ValueError, match=r"part \d/9 of a pack.*--merge"):
        Pack(empty)


def test_a_part_is_not_taken_for_the_whole(parts, tmp_path, monkeypatch):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    words = r"part 1/3 of a pack.*--merge"
    with pytest.raises(ValueError, match=f"{parts / '1'} is {words}"):
        open_data(str(parts / "1"), 64)
    with serve(parts / "1") as store:
        with pytest.raises(ValueError, match=f"{store.url} is {words}"):
            open_data(store.url, 64)
        assert set(store.asked) == {"index.json"}  # nothing more of it came


def test_a_merge_that_was_interrupted_anywhere_begins_anew(made, parts, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    left, replace = 0, os.replace

    def dying(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(*paths)

    for moment in range(100):
        left = moment
        monkeypatch.setattr(os, "replace", dying)
        try:
            merge(parts, tmp_path / f"{moment}", progress=False)
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            merge(parts, tmp_path / f"{moment}", progress=False)
            assert files_of(tmp_path / f"{moment}") == files_of(made / "whole")
            continue
        break
    assert moment > 5


def _edit(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def _repack(made: Path, parts: Path, other: tuple[int, str | None] | None = None, **more) -> None:
    """Make the second part anew; `other`: of a list in which a line has gone, or another label."""
    shutil.rmtree(parts / "2")
    source = made / "list.csv"
    if other:
        lines = source.read_text().splitlines()
        line = lines.pop(other[0])
        if other[1]:
            lines.insert(other[0], line.replace("run", other[1]))
        source = made / f"other{other[0]}.csv"
        source.write_text("\n".join(lines) + "\n")
    quick(source, parts / "2", 2, **more)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda made, parts: shutil.rmtree(parts / "2"), "1 of 3 parts are missing: 2/3"),
        (lambda made, parts: (parts / "2/index.json").unlink(), "unfinished: 2;"),
        (lambda made, parts: shutil.copytree(parts / "2", parts / "4"), "both part 2/3"),
        (lambda made, parts: _repack(made, parts, count=4), "2/4: pack all with the same N"),
        (lambda made, parts: _repack(made, parts, short_side=16), "short_side"),
        (lambda made, parts: _repack(made, parts, shard_bytes=99), "shard_bytes"),
        (lambda made, parts: _repack(made, parts, other=(6, None)), "1 and .*2 are parts of other"),
        (lambda made, parts: _repack(made, parts, other=(1, "jump")), "parts of other --data"),
        (lambda made, parts: shutil.copytree(made / "whole", parts / "4"), "4 is a whole pack"),
        (lambda made, parts: (parts / "4").mkdir(), "4 is no pack"),
        (lambda made, parts: next(parts.glob("1/shard*")).unlink(), "shard-.* is missing"),
        (lambda made, parts: (parts / "1/refused.jsonl").write_text("{}\n"), "jsonl:1 is damaged"),
        (lambda made, parts: (parts / "1/clips.jsonl").write_text("{}\n"), "1/clips.jsonl"),
        (lambda made, parts: _edit(parts / "1", part=[4, 3]), "no usable .part"),
        (lambda made, parts: _edit(parts / "1", part="1/3"), "no usable .part"),
        (
            lambda made, parts: [
                shutil.rmtree(parts / "2"),
                shutil.copytree(parts / "1", parts / "2"),
                _edit(parts / "2", part=[2, 3]),
            ],
            "is in another part",
        ),
        (lambda made, parts: shutil.rmtree(parts), "is no folder"),
        (lambda made, parts: [shutil.rmtree(p) for p in [*parts.iterdir()]], "holds no parts"),
    ],
)
def test_parts_that_are_not_one_pack_are_named(made, parts, tmp_path, damage, words):
    damage(made, parts)
    with pytest.raises(ValueError, match=words):
        merge(parts, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_clip_that_changed_in_its_part_is_named_and_made_anew(made, parts, tmp_path):
    index, shard = load_index(parts / "1"), next((parts / "1").glob("shard-00000-*"))
    record = next(row for _, row in checked_lines(parts / "1", index))
    data = bytearray(shard.read_bytes())
    data[record["offset"] + 40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"1/shard-.* has changed on the disk"):
        merge(parts, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="run the command of that part again"):
        merge(parts, tmp_path / "out", progress=False)
    quick(made / "list.csv", parts / "1", 1)
    merge(parts, tmp_path / "out", progress=False)
    assert files_of(tmp_path / "out") == files_of(made / "whole")


def test_nothing_else_is_merged_into(made, parts, tmp_path):
    ready_video(tmp_path / "in.mp4", 5)
    other = tmp_path / "other"
    quick(tmp_path / "in.mp4", other)
    before = files_of(other)
    line = "a,b,copy,9.0,2.0,a.mp4,0.0,0.0,b.mp4,0.0,0.0\n"
    (parts / "1" / STRUCK).write_text(line)
    with pytest.raises(ValueError, match=r"other is a pack already, of in\.mp4"):
        merge(parts, other, progress=False)
    assert files_of(other) == before and not (other / STRUCK).exists()
    with pytest.raises(ValueError, match=r"other is part 1/1"):
        merge(parts, shutil.copytree(other, tmp_path / "o") and _part(other), progress=False)
    with pytest.raises(ValueError, match="lies inside the source"):
        merge(parts, parts / "out", progress=False)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="something else than a pack"):
        merge(parts, tmp_path / "text", progress=False)


def _part(folder: Path) -> Path:
    _edit(folder, part=[1, 1])
    return folder


def test_a_folder_stays_the_part_that_it_is(made, parts, tmp_path):
    for folder, part in ((parts / "1", 2), (parts / "1", 0), (made / "whole", 1)):
        with pytest.raises(ValueError, match="give each part a folder of its own"):
            quick(made / "list.csv", folder, part)
    (parts / "1/index.json").unlink()  # an unfinished one, too
    with pytest.raises(ValueError, match="holds part 1/3, not part 1/4"):
        quick(made / "list.csv", parts / "1", 1, 4)


@pytest.mark.parametrize(
    "text", ["4/3", "0/3", "3", "a/b", "-1/3", "1/0", "1/3/5", "1 / 3", "²/3", "１/3"]
)
def test_a_part_that_there_is_not_is_refused(made, tmp_path, text):
    with pytest.raises(ValueError, match="part"):
        pack(made / "list.csv", tmp_path / "out", part=parse_part(text))
    assert not (tmp_path / "out").exists()


def test_the_recipe_packs_parts_and_merges_them(made, tmp_path, capsys):
    source = str(made / "list.csv")
    for part in ("1/2", "2/2"):
        main(Config(source, str(tmp_path / "parts" / part[0]), part=part, workers=1))
    out = tmp_path / "out"
    index = main(Config(str(tmp_path / "parts"), str(out), merge=True))
    assert index["num_clips"] == 6 and f"--data {out}" in capsys.readouterr().out
    useless = unused(Config("in", "out", merge=True))
    assert {"part", "short_side", "flow"} <= useless.keys() and "source" not in useless
    assert {*unused(Config("in", "out", part="1/2"))} == {"near_duplicates"}


@pytest.mark.slow
def test_the_array_of_jobs_packs_all_parts_and_queues_the_merge(made, tmp_path):
    """Slurm is a script that notes what it was asked for, which is then done."""
    script = (ROOT / "launch" / "pack_array.sbatch").read_text()
    assert script.count("16") >= 4  # two of them are numbers of parts
    (tmp_path / "job").write_text(script.replace("=16 ", "=2 "))
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$MERGE $@" >> queued\n')
    (tmp_path / "sbatch").chmod(0o755)
    os.symlink(ROOT / "recipes", tmp_path / "recipes")
    python = Path(sys.executable).parent
    known = {"PATH": f"{tmp_path}:{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    known |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_MIN": "1"}
    given = [str(made / "list.csv"), "out"]
    for more in ({"SLURM_ARRAY_TASK_ID": "1"}, {"SLURM_ARRAY_TASK_ID": "2"}, {"MERGE": "1"}):
        words = [] if "MERGE" in more else ["--workers", "1"]
        subprocess.run(
            ["bash", "job", *given, *words], cwd=tmp_path, env=os.environ | known | more, check=True
        )
    (queued,) = (tmp_path / "queued").read_text().splitlines()
    assert queued.startswith("1 ") and "afterok:7" in queued and queued.endswith(" ".join(given))
    assert (tmp_path / "out" / "clips.jsonl").is_file()
    assert load_index(tmp_path / "out")["num_clips"] == 6
