"""The columns of a pack's clips: mapped, checked, and never trusted more than the lines."""

import json
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pretrain.data import columns, index_size, shared
from pretrain.data.index import checked_lines, load_index
from pretrain.data.sampling import epoch_order
from pretrain.data.shards import Pack, TrainClips
from pretrain.spec import InputSpec
from tests.unit.test_pack import with_lines

NAME = "clips.safetensors"


@pytest.fixture
def copied(tiny_pack, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]


def make_old(folder: Path) -> None:
    """Turns a pack into one that was made before there were columns."""
    (folder / NAME).unlink()
    index = json.loads((folder / "index.json").read_text())
    del index["columns"], index["clips_bytes"]
    (folder / "index.json").write_text(json.dumps(index))


def add_columns(folder: Path) -> None:
    """Makes the columns of the lines that are there."""
    index = load_index(folder)
    made = columns.make_columns(checked_lines(folder, index), index["classes"])
    (folder / NAME).write_bytes(columns.columns_file(made, index["clips_sha256"]))


def write_columns(folder: Path, changed: dict[str, np.ndarray]) -> None:
    """Replaces columns, with a hash that is right."""
    made = load_file(folder / NAME) | changed
    digest = load_index(folder)["clips_sha256"]
    (folder / NAME).write_bytes(columns.columns_file(made, digest))


def test_columns_say_what_the_lines_say(tiny_pack):
    pack, rows = Pack(tiny_pack), lines_of(tiny_pack)
    assert list(pack.records()) == rows
    for name in ("shard", "frames", "width", "height"):
        assert pack.column(name).tolist() == [row[name] for row in rows]
    for split in {row["split"] for row in rows}:
        assert pack.split(split).tolist() == [i for i, r in enumerate(rows) if r["split"] == split]
    labels = [None if n < 0 else pack.classes[n] for n in pack.column("label")]
    assert labels == [row["label"] for row in rows]
    assert pack.column("captions").tolist() == [len(row["captions"]) for row in rows]
    assert {*load_file(tiny_pack / NAME)} >= {"end", "crc"}  # other tools read them, too


def test_a_pack_opens_in_another_process(tiny_pack):
    """As the processes of a loader get it where they are not forked."""
    pack = Pack(tiny_pack, "a name")
    sent = pickle.dumps(pack)
    assert len(sent) < 1000
    assert pickle.loads(sent).record(1) == pack.record(1)
    assert pickle.loads(sent).name == "a name"


def test_a_pack_of_many_clips_is_opened_without_parsing_its_lines(copied):
    with_lines(copied, (copied / "clips.jsonl").read_text().splitlines()[:1] * 10_000)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        Pack(copied)
        seconds.append(time.process_time() - started)
        add_columns(copied)
    assert seconds[1] < 0.3 * seconds[0], seconds


@pytest.mark.parametrize("large", [False, True])
def test_old_packs_read_as_ever(copied, tiny_pack, monkeypatch, tmp_path, large, capsys):
    """Their columns are made from their lines; those of large ones are kept in the cache."""
    make_old(copied)
    before = sorted(os.listdir(copied))
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    if large:
        monkeypatch.setattr(columns, "KEPT", 0)
        monkeypatch.setattr(columns, "WHOLE", 0)
    for _ in range(2):
        pack = Pack(copied)
        assert list(pack.records()) == lines_of(tiny_pack)
        assert pack.split("train").tolist() == Pack(tiny_pack).split("train").tolist()
    assert sorted(os.listdir(copied)) == before  # nothing is written to a pack that is read
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == large
    if large:
        kept[0].write_bytes(kept[0].read_bytes()[:-1])
        assert list(Pack(copied).records()) == lines_of(tiny_pack)
        assert "made anew" in capsys.readouterr().err
        assert list(Pack(copied).records()) == lines_of(tiny_pack)
        assert not capsys.readouterr().err


def test_a_hash_that_leads_out_of_the_cache_is_refused(copied, monkeypatch, tmp_path):
    make_old(copied)
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(columns, "KEPT", 0)
    index = json.loads((copied / "index.json").read_text())
    (copied / "index.json").write_text(json.dumps(index | {"clips_sha256": "../../../out/x"}))
    with pytest.raises(ValueError, match="clips_sha256"):
        Pack(copied)
    assert [*tmp_path.iterdir()] == [copied]


@pytest.mark.parametrize("where", ["a file", "read only"])
def test_without_a_cache_columns_stay_in_memory(copied, tiny_pack, monkeypatch, tmp_path, where):
    make_old(copied)
    cache = tmp_path / "cache"
    cache.write_text("") if where == "a file" else cache.mkdir(mode=0o500)
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(cache / "inside" if where == "a file" else cache))
    monkeypatch.setattr(columns, "KEPT", 0)
    assert list(Pack(copied).records()) == lines_of(tiny_pack)


def _flip(path: Path) -> None:
    """Puts the last clip into the other split, which it could be in."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    stop = json.loads(data[8 : 8 + length])["split"]["data_offsets"][1]
    data[8 + length + stop - 4] ^= 1
    path.write_bytes(data)


def _no_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes((100).to_bytes(8, "little") + b"[" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"U32"', b'"F32"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"tables"', b'"tab1es"')),
        lambda path: path.write_bytes(path.read_bytes().replace(b"about", b"above", 1)),
        _flip,
        _no_pipe,
    ],
)
def test_damaged_columns_are_made_anew_with_a_word(copied, tiny_pack, damage, capsys):
    damage(copied / NAME)
    pack = Pack(copied)
    assert "made anew" in capsys.readouterr().err
    assert list(pack.records()) == lines_of(tiny_pack)
    assert pack.split("train").tolist() == Pack(tiny_pack).split("train").tolist()


def test_columns_of_other_lines_are_not_used(copied):
    lines = (copied / "clips.jsonl").read_text().splitlines()
    with_lines(copied, lines[::-1])
    assert list(Pack(copied).records()) == [json.loads(line) for line in lines[::-1]]


def test_columns_that_contradict_a_line_are_named(copied):
    """A test clip that a forged column puts among those of training is not trained on."""
    rows = lines_of(copied)
    made = load_file(copied / NAME)
    other = next(i for i, row in enumerate(rows) if row["split"] != rows[0]["split"])
    split = made["split"].copy()
    split[0] = split[other]
    write_columns(copied, {"split": split})
    with pytest.raises(ValueError, match=r"clips.jsonl:1 .*split.* delete that file"):
        Pack(copied).record(0)
    assert Pack(copied).record(1) == rows[1]


@pytest.mark.parametrize("change", [{"offset": 2**40}, {"sha256": 7}, {"key": "../../up"}])
def test_a_line_that_cannot_be_is_refused_though_columns_say_the_same(copied, change):
    rows = lines_of(copied)
    rows[1] |= change
    with_lines(copied, [json.dumps(row) for row in rows])
    index, lines = load_index(copied), (copied / "clips.jsonl").read_bytes().splitlines()
    made = columns.make_columns(zip(lines, rows, strict=True), index["classes"])
    (copied / NAME).write_bytes(columns.columns_file(made, index["clips_sha256"]))
    pack = Pack(copied)
    assert pack.record(0) == rows[0]
    with pytest.raises(ValueError, match=rf"jsonl:2: no usable {min(change)}"):
        pack.record(1)


def test_a_changed_line_of_a_large_pack_is_named_when_it_is_read(copied, monkeypatch):
    monkeypatch.setattr(columns, "WHOLE", 0)  # it is too large to be hashed
    data = (copied / "clips.jsonl").read_bytes()
    where = data.index(b'"start": ', data.index(b"\n")) + 9
    (copied / "clips.jsonl").write_bytes(data[:where] + b"7" + data[where + 1 :])
    pack = Pack(copied)
    assert pack.record(0) == lines_of(copied)[0]
    with pytest.raises(ValueError, match=r"clips\.jsonl:2 has changed"):
        pack.record(1)
    (copied / "clips.jsonl").write_bytes(data + b"{}\n")
    with pytest.raises(ValueError, match="pack again"):
        Pack(copied)


@given(
    st.sampled_from(["end", "crc", "shard", "frames", "width", "height", "label", "split", "kind"]),
    st.integers(0, 4),
    st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 1, 2, 200, 2**24, 2**31 - 1, 2**32 - 1, 2**62]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_columns_say_no_other_line_is_believed(tiny_pack, tmp_path_factory, name, at, to):
    folder = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("forged") / "pack"))
    made = load_file(folder / NAME)[name].copy()
    made[at] = np.array(to, dtype=object).astype(np.int64).astype(made.dtype)
    write_columns(folder, {name: made})
    pack, rows = Pack(folder), lines_of(tiny_pack)
    for i, row in enumerate(rows):
        try:
            assert pack.record(i) == row
        except ValueError as error:
            assert "clips.jsonl" in str(error)
    shutil.rmtree(folder.parent)


def test_training_keeps_no_object_of_a_clip(copied):
    """Opening a pack of many clips and choosing among them takes little memory beyond the map."""
    import tracemalloc

    first = (copied / "clips.jsonl").read_text().splitlines()[0]
    add_columns(with_lines(copied, [first] * 20_000))
    spec = InputSpec(2, 1, 16)
    tracemalloc.start()
    pack = Pack(copied)
    clips = TrainClips(pack, pack.split("all"), spec, 0, 1, None, lambda *_: {})
    assert len(clips.ids) == 20_000
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 30 * 20_000, kept


def test_large_arrays_are_mapped_and_as_good_as_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "LEAST", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for epoch in range(4):
        for _ in range(2):
            make = lambda epoch=epoch: epoch_order(7, epoch, 100)
            found = shared.shared_array("order-7-100", epoch, 100, make, np.uint32)
            assert found.tolist() == make().tolist()
            assert isinstance(found, np.memmap) and not found.flags.writeable
    (folder,) = tmp_path.iterdir()
    assert [*folder.glob("*-2.npy")] and len([*folder.glob("*.npy")]) == 2  # older ones go
    kept = folder / "order-7-100-3.npy"
    for damaged in (b"", kept.read_bytes()[:-4], kept.read_bytes().replace(b"u4", b"f4")):
        kept.unlink()
        kept.write_bytes(damaged)
        assert shared.shared_array("order-7-100", 3, 100, make, np.uint32)[:] @ np.ones(100) == 4950


def test_arrays_that_nobody_uses_any_more_go(monkeypatch, tmp_path):
    """Also where there are no numbers of users, as on Windows."""
    monkeypatch.setattr(shared, "LEAST", 0)
    monkeypatch.setattr(shared, "MOST_KEPT", 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "getuid")
    make = lambda: np.arange(5)
    for day in range(6):
        found = shared.shared_array(f"order-{day}", 0, 5, make)
        assert isinstance(found, np.memmap) and found.tolist() == [*range(5)]
        (folder,) = tmp_path.iterdir()
        os.utime(folder / f"order-{day}-0.npy", (day, day))
        (folder / "tmp-left-0.npy").write_bytes(b"half")
        os.utime(folder / "tmp-left-0.npy", (0, 0))
        shared.shared_array("order-0", 0, 5, make)  # is in use
    names = {path.name for path in folder.glob("*.npy")}
    assert {"order-0-0.npy", "order-5-0.npy"} < names and len(names) <= 4  # one was just left


def test_columns_in_the_cache_that_nobody_uses_any_more_go(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "KEPT", 0)
    monkeypatch.setattr(columns, "MOST_KEPT", 3)
    folder = tmp_path / "cache" / "columns"
    folder.mkdir(parents=True)
    for day in range(5):
        (folder / f"{day}.safetensors").write_bytes(b"")
        os.utime(folder / f"{day}.safetensors", (day, day))
    (copied / "clips.safetensors").unlink()
    Pack(copied)
    kept = {path.name for path in folder.glob("*.safetensors")}
    assert len(kept) == 3 and kept > {"3.safetensors", "4.safetensors"}


@pytest.mark.parametrize("taken", ["a file", "a link", "open to all"])
def test_a_folder_of_somebody_else_is_not_used(monkeypatch, tmp_path, taken):
    monkeypatch.setattr(shared, "LEAST", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place, other = tmp_path / f"muybridge-{os.getuid()}", tmp_path / "other"
    other.mkdir(mode=0o700)
    if taken == "a file":
        place.write_text("")
    elif taken == "a link":
        place.symlink_to(other)
    else:
        place.mkdir()
        place.chmod(0o777)
    assert shared.shared_array("a", 0, 5, lambda: np.arange(5)).tolist() == [*range(5)]
    assert not [*other.iterdir()] and (taken == "a file" or not [*place.iterdir()])


def test_training_sees_the_same_clips_with_mapped_orders(tiny_pack, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    for least in (2**20, 0):
        monkeypatch.setattr(shared, "LEAST", least)
        pack = Pack(tiny_pack)
        clips = TrainClips(pack, pack.split("train"), InputSpec(2, 1, 16), 3, 1, None, None)
        seen.append([clips.sample_at(*divmod(p, len(clips.ids))) for p in range(100)])
    assert seen[0] == seen[1] and [*tmp_path.rglob("order*.npy")] and [*tmp_path.rglob("split*")]
    assert sorted(seen[0][:32]) == sorted(pack.split("train").tolist())


@pytest.mark.slow
def test_the_price_of_an_index_is_measured(capsys):
    found = index_size.main(index_size.Config(clips=3000, processes=1, workers=2, reads=50))
    assert {"open", "choose", "read", "memory"} == found.keys() and found["memory"] < 0.5
    assert "3000 clips" in capsys.readouterr().out
