"""Packs far away: what comes is what was packed, and what a server does is survived or named."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from far import Store, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from media import ready_video

from pretrain.data import remote
from pretrain.data.cache import open_data
from pretrain.data.pack import pack
from pretrain.data.remote import Unreachable
from pretrain.data.sampling import window_order
from pretrain.data.shards import Pack, Positions, TrainClips, train_batches
from pretrain.settings import Machine
from pretrain.spec import InputSpec
from pretrain.videomae import mask_of_view
from recipes import pack as pack_recipe

SPEC = InputSpec(frames=4, stride=2, size=16)
ABOUT = {"index.json", "clips.jsonl", "clips.safetensors"}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """24 clips in 6 shards."""
    raw = tmp_path_factory.mktemp("raw")
    for i in range(24):
        ready_video(raw / f"{i}.mp4", 20 + i, size=(32, 32))
    out = tmp_path_factory.mktemp("packed") / "pack"
    pack(raw, out, shard_bytes=12000, workers=1, progress=False, near=False)
    index = json.loads((out / "index.json").read_text())
    assert len(index["shards"]) == 6
    return out


@pytest.fixture
def store(packed, tmp_path, monkeypatch) -> Iterator[Store]:
    """A server of it, an empty cache, and short waits."""
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setattr(remote, "AT_ONCE", 1)
    with serve(packed) as served:
        yield served


def clips_of(pack: Pack) -> TrainClips:
    draw = mask_of_view("tube", (2, 2, 2), 0.5, False)
    return TrainClips(pack, np.arange(len(pack)), SPEC, 0, 1, (1.0, 0.75), draw)


def kept(tmp_path: Path) -> list[Path]:
    """Whole files in the cache."""
    found = (tmp_path / "cache" / "remote").rglob("*")
    return [p for p in found if p.is_file() and p.suffix != ".lock"]


def test_clips_far_away_are_the_packed_ones_and_come_once(store, packed, monkeypatch):
    here, far = Pack(packed), open_data(store.url, 64)
    assert far.index == here.index and far.name == store.url
    for _ in range(2):
        for record in far.records():
            assert far.read(record) == here.read(record)
    assert set(store.asked.values()) == {1}
    # What is in the cache is used again, even another user's, and the index is looked at anew.
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError))
    again = open_data(store.url + "/", 64)
    assert again.read(again.record(3)) == here.read(here.record(3))
    assert store.asked.pop("index.json") == 2 and set(store.asked.values()) == {1}


@pytest.mark.parametrize(
    "fault",
    [
        "503", "429", "cut", "lie", "short", "long", "drip", "away",
        pytest.param("hang", marks=pytest.mark.slow),  # "for ever" below stalls, too
    ],
)  # fmt: skip
def test_what_a_server_does_wrong_now_and_then_is_survived(
    store, packed, monkeypatch, capsys, fault
):
    if fault in ("hang", "drip"):
        monkeypatch.setattr(remote, "STALL", 1.0)
    here, far = Pack(packed), open_data(store.url, 64)
    name = here.index["shards"][0]["name"]
    store.faults[name] = [fault]
    first = next(r for r in here.records() if r["shard"] == 0)
    assert far.read(first) == here.read(first)
    assert store.asked[name] == 2
    if fault != "away":
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "words", "asked"),
    [
        ("404", "404", 1),
        ("403", "credentials", 1),
        ("500", "500", 2),
        ("cut", "", 2),
        ("lie", "SHA-256", 2),
        ("short", "bytes", 2),
        ("long", "more than", 2),
        ("hang", "stalled", 2),
        ("round", "in a circle", None),
        ("file", "redirects to file:", 1),
    ],
)
def test_what_a_server_does_wrong_for_ever_is_named(
    store, tmp_path, packed, monkeypatch, fault, words, asked
):
    if fault == "hang":
        monkeypatch.setattr(remote, "STALL", 1.0)
    far = open_data(store.url, 64)
    name = far.index["shards"][0]["name"]
    store.faults[name] = [fault] * 2
    began = time.monotonic()
    with pytest.raises(Unreachable) as error:
        far.read(next(r for r in far.records() if r["shard"] == 0))
    assert time.monotonic() - began < 60
    assert f"{store.url}/{name}" in str(error.value) and words in str(error.value)
    assert asked is None or store.asked[name] == asked
    assert {p.name for p in kept(tmp_path)} == ABOUT  # no half file


def test_an_index_larger_than_any_comes_once(store, monkeypatch):
    monkeypatch.setattr(remote, "MAX_INDEX", 100)
    with pytest.raises(ValueError, match=r"index\.json: more than the 100 bytes"):
        open_data(store.url, 64)
    assert store.asked["index.json"] == 1


@pytest.mark.parametrize("name", ["index.json", "clips.jsonl", "clips.safetensors"])
def test_a_pack_that_is_not_there_is_named(store, tmp_path, name):
    store.faults[name] = ["404"]
    with pytest.raises(ValueError, match=f"{store.url}/{name}.*404"):
        open_data(store.url, 64)


@pytest.mark.parametrize(
    "shard",
    [
        {"name": "../../shard-00000-00000000.tar"},
        {"name": "/tmp/shard-00000-00000000.tar"},
        {"name": "http://elsewhere/shard-00000-00000000.tar"},
        {"bytes": 2**52},
        {"bytes": -1},
        {"sha256": "no"},
    ],
)
def test_a_hostile_index_is_refused(packed, tmp_path, monkeypatch, shard):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    lying = tmp_path / "pack"
    shutil.copytree(packed, lying)
    index = json.loads((lying / "index.json").read_text())
    index["shards"][0] |= shard
    (lying / "index.json").write_text(json.dumps(index))
    with serve(lying) as store, pytest.raises(ValueError, match=store.url):
        open_data(store.url, 64)


@pytest.mark.parametrize(
    "address",
    [
        "https://me:s3cr3t@host/pack", "https://s3cr3t@host/pack", "s3://key:s3cr3t@bucket/pack",
        "https://host/pack?X-Amz-Signature=s3cr3t", "https://host/pack#s3cr3t",
    ],
)  # fmt: skip
def test_an_address_with_a_password_is_refused_without_repeating_it(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="credentials") as error:
        open_data(address, 64)
    assert "s3cr3t" not in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/pack", "file:///tmp/pack", "pipe:curl x", "https://", "https://host/../pack",
        "https://host/a b", "hf://OWNER/NAME", "hf://datasets/OWNER", "s3a://bucket/pack",
        "https://host/pa\nck", "simplecache::s3://bucket/pack",
    ],
)  # fmt: skip
def test_what_is_no_address_of_data_is_refused(address):
    with pytest.raises(ValueError, match=r"address|no data|write"):
        open_data(address, 64)


def test_a_disk_without_room_is_named(store, tmp_path, monkeypatch):
    far = open_data(store.url, 64)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(Unreachable, match=r"10 are free.*MUYBRIDGE_CACHE"):
        far.read(far.record(0))


READ = """
import sys
from pretrain.data.index import load_index
from pretrain.data.remote import open_remote
pack = open_remote(sys.argv[1], None, True)
for shard in load_index(pack.folder)["shards"]:
    pack.open(shard).close()
"""


def reader(store: Store, stderr: int | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ, store.url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_without_the_extra_it_is_named(store, tmp_path, monkeypatch):
    (tmp_path / "aiohttp.py").write_text("raise ImportError('no module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "muybridge[remote]" in reader(store, stderr=subprocess.PIPE).communicate()[1]


def test_the_size_of_a_cache_is_for_data_far_away(packed):
    with pytest.raises(ValueError, match="--cache-gib"):
        open_data(str(packed), 64, machine=Machine(cache_gib=1))


@pytest.mark.parametrize("gib", [1e300, float("inf"), float("nan"), 0.0, 1e-300, -1.0])
def test_a_cache_of_no_possible_size_is_refused(gib):
    for work in (
        lambda: open_data("https://localhost/pack", 64, machine=Machine(cache_gib=gib)),
        lambda: remote.bring_tars("https://localhost/a.tar", gib),
    ):
        with pytest.raises(ValueError, match=r"--cache-gib .*: give"):
            work()


def test_the_cache_keeps_within_its_bounds_and_clears_what_a_killed_process_left(
    store, packed, tmp_path
):
    here = Pack(packed)
    sizes = [shard["bytes"] for shard in here.index["shards"]]
    about = sum((packed / name).stat().st_size for name in ABOUT)
    limit = about + sum(sizes) + 100
    far = open_data(store.url, 64, machine=Machine(cache_gib=limit / 2**30))
    others = tmp_path / "cache" / "remote" / "other-0123456789abcdef"
    others.mkdir()
    left = others / ".tmp-0123-5000-shard-00000-00000000.tar"
    (others / "shard-00001-00000000.tar").write_bytes(bytes(20000))
    left.write_bytes(bytes(300))
    os.utime(others / "shard-00001-00000000.tar", (1, 1))
    for _ in range(2):
        for record in far.records():
            assert far.read(record) == here.read(record)
            assert sum(p.stat().st_size for p in kept(tmp_path)) <= limit
    assert not left.exists() and not (others / "shard-00001-00000000.tar").exists()
    assert max(store.asked.values()) == 1
    with pytest.raises(ValueError, match="--cache-gib"):
        open_data(store.url, 64, machine=Machine(cache_gib=max(sizes) / 2**30))


def test_an_index_that_a_killed_process_began_to_bring_goes(store, packed, tmp_path):
    store.faults["index.json"] = ["hang"]
    killed = reader(store)
    while not store.asked["index.json"]:
        time.sleep(0.05)
    left = tmp_path / "cache" / "remote"
    (begun,) = left.glob("tmp-*")
    open_data(store.url, 64)
    assert begun.is_dir()  # of a process that lives
    mine = tmp_path / "mine"
    mine.mkdir()
    (left / "tmp-link").symlink_to(mine)
    (left / "tmp-file").write_text("")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    open_data(store.url, 64)
    assert {path.name for path in left.glob("tmp-*")} == {"tmp-link", "tmp-file"}
    assert not [*mine.iterdir()]


def test_two_processes_share_a_cache_and_a_killed_one_leaves_nothing(store, packed, tmp_path):
    name = Pack(packed).index["shards"][0]["name"]
    store.faults[name] = ["hang"]
    store.delay = 0.05
    killed = reader(store)
    assert killed.stdout and killed.stdout.readline()  # what is printed on the cache
    while not store.asked[name]:
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    both = [reader(store) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    shards = {name: n for name, n in store.asked.items() if name.startswith("shard")}
    assert shards.pop(name) == 2 and set(shards.values()) == {1}
    assert not [p for p in kept(tmp_path) if "tmp-" in p.name]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    lanes=st.integers(1, 12),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100)
def test_an_order_of_windows_holds_every_clip_once_and_wants_few_shards(counts, lanes, epoch):
    shards = np.repeat(10 + np.arange(len(counts)), counts)
    order = window_order(3, epoch, shards, lanes)
    assert sorted(order) == list(range(len(shards)))
    assert np.array_equal(order, window_order(3, epoch, shards, lanes))
    for lane in range(lanes):
        # Each sub-list ends with a shard before it begins the next one.
        seen = [shard for shard, _ in itertools.groupby(shards[order[lane::lanes]])]
        assert len(seen) == len(set(seen))
    epochs = [window_order(3, e, np.repeat(np.arange(40), 5), 4).tolist() for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


@given(
    micro=st.integers(1, 3),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]),
    num=st.integers(1, 50),
    lanes=st.sampled_from([1, 4, 8]),
)
def test_processes_share_the_same_global_batches_and_each_reads_some_of_the_lanes(
    micro, shape, num, lanes
):
    accumulate, world = shape
    lane = lambda position: position % num % lanes / lanes
    size = micro * accumulate * world
    ranks = [list(Positions(2, 7, micro, accumulate, world, r, lane)) for r in range(world)]
    for step in range(5):
        parts = [rank[step * accumulate : (step + 1) * accumulate] for rank in ranks]
        flat = sorted(p for part in parts for some in part for p in some)
        assert flat == list(range((step + 2) * size, (step + 3) * size))
    if num % lanes == 0 and size % lanes == 0:
        read = [{lane(p) for some in rank for p in some} for rank in ranks]
        assert all(len(lanes_of) <= max(1, lanes // world) for lanes_of in read)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_training_is_fed_ahead_and_a_resumed_one_fetches_its_window_only(
    store, packed, monkeypatch, num_workers
):
    largest = max(shard["bytes"] for shard in Pack(packed).index["shards"])
    monkeypatch.setattr(remote, "WINDOW_BYTES", 2 * largest)
    monkeypatch.setattr(remote, "MOST_AHEAD", 1)

    def read(start: int, end: int) -> list[list[int]]:
        far = clips_of(open_data(store.url, 64))
        assert far.pack.remote and far.pack.remote.lanes == 2
        positions = Positions(start, end, 4, 1, 1, 0, far.lane)
        with train_batches(far, positions, num_workers) as batches:
            return [batch["samples"] for batch in batches]

    whole = read(0, 12)
    assert all(n == 1 for name, n in store.asked.items() if name.startswith("shard"))
    for epoch in (whole[:6], whole[6:]):
        assert sorted(itertools.chain(*epoch)) == list(range(24))
    shutil.rmtree(os.environ["MUYBRIDGE_CACHE"])
    store.asked.clear()
    assert read(3, 5) == whole[3:5]
    assert sum(name.startswith("shard") for name in store.asked) < 6


def test_an_outage_ends_a_training_in_plain_words(store, packed):
    far = clips_of(open_data(store.url, 64))
    for shard in far.pack.index["shards"]:
        store.faults[shard["name"]] = ["503"] * 99
    positions = Positions(0, 6, 4, 1, 1, 0, far.lane)
    with train_batches(far, positions, 2) as batches, pytest.raises(Unreachable) as error:
        next(batches)
    assert "503" in str(error.value) and "Traceback" not in str(error.value)


def test_a_pack_on_the_hub_is_read_and_its_token_goes_nowhere_else(store, packed, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", store.url.removesuffix("/pack"))
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    here = Pack(packed)
    name = here.index["shards"][0]["name"]
    store.faults[name] = ["abroad"]
    with ThreadPoolExecutor(1) as apart:  # with a helper of its own, which knows these
        far = apart.submit(open_data, "hf://datasets/me/clips@v1/packs/mine", 64).result()
        record = next(r for r in here.records() if r["shard"] == 0)
        assert apart.submit(far.read, record).result() == here.read(record)
    assert store.paths[0] == "/datasets/me/clips/resolve/v1/packs/mine/index.json"
    told = [(headers["Host"], headers.get("Authorization")) for headers in store.headers]
    assert told[-1][0].startswith("localhost") and told[-1][1] is None
    assert {token for _, token in told[:-1]} == {"Bearer hf_s3cr3t"}


# In place of gcsfs: what it is asked for, as fsspec asks it; `bucket` is a folder.
GCSFS = """
import os
from fsspec import AbstractFileSystem
class HttpError(Exception):
    code = 401  # as gcsfs has it
class GCSFileSystem(AbstractFileSystem):
    protocol = ("gs", "gcs")
    def __init__(self, **options):
        assert not options and os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
        super().__init__()
    def _here(self, path):
        bucket, name = self._strip_protocol(path).split("/", 1)
        if bucket != "bucket":
            error = HttpError if bucket == "private" else OSError
            raise error("Forbidden: you do not have storage.objects.get access")
        return os.environ["BUCKET"] + "/" + name
    def info(self, path, **more):
        return {"name": path, "type": "file", "size": os.stat(self._here(path)).st_size,
                "etag": "x"}
    def _open(self, path, mode="rb", **more):
        return open(self._here(path), mode)
"""


def test_a_bucket_of_google_is_read_and_who_may_not_is_told_about_credentials(
    store, packed, tmp_path, monkeypatch
):
    (tmp_path / "gcsfs").mkdir()
    (tmp_path / "gcsfs" / "__init__.py").write_text(GCSFS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("BUCKET", str(packed.parent))
    here = Pack(packed)
    with ThreadPoolExecutor(1) as pool:  # whose process begins now
        far = pool.submit(open_data, f"gs://bucket/{packed.name}/", 64).result()
        assert far.address == f"gs://bucket/{packed.name}"
        record = far.record(5)
        assert pool.submit(far.read, record).result() == here.read(record)
        for place, words in (("bucket/none", "404"), ("private/a", "cred"), ("other/a", "cred")):
            with pytest.raises(Unreachable, match=words) as error:
                pool.submit(open_data, f"gs://{place}", 64).result()
            assert "attempts" not in str(error.value)  # at once


def test_what_signs_an_address_is_not_told(store, packed, monkeypatch, capsys):
    far = open_data(store.url, 64)
    name = far.index["shards"][0]["name"]
    store.faults[name] = ["abroad", "503"] * 2
    with pytest.raises(Unreachable) as error:
        far.read(next(r for r in far.records() if r["shard"] == 0))
    assert "503" in str(error.value) and "s3cr3t" not in str(error.value) + capsys.readouterr().err


def tar_of(path: Path, *numbers: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            video = ready_video(path.with_name(f"{number}.mp4"), 20 + number, size=(32, 32))
            tar.add(video, f"{number}.mp4")


def test_tars_far_away_are_packed_and_come_again_only_where_they_changed(store, tmp_path, capsys):
    """Also those that are named like what is still coming."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in (8, 9, 10):
        tar_of(raw / f"tmp-v-1-{number:03}.tar", number)
    with serve(raw) as tars:
        source = tars.url + "/tmp-v-1-{008..010}.tar"
        pack_recipe.main(pack_recipe.Config(source, str(out), workers=1))
        assert [r["frames"] for r in sorted(Pack(out).records(), key=lambda r: r["source"])] == [
            28, 29, 30,
        ]  # fmt: skip
        pack_recipe.main(pack_recipe.Config(source, str(out), workers=1))
        assert set(tars.asked.values()) == {1}
        tar_of(raw / "tmp-v-1-009.tar", 7, 9)
        pack_recipe.main(pack_recipe.Config(source, str(out), workers=1))
        assert len(Pack(out)) == 4
        assert sorted(tars.asked.items()) == [
            ("tmp-v-1-008.tar", 1), ("tmp-v-1-009.tar", 2), ("tmp-v-1-010.tar", 1),
        ]  # fmt: skip
        assert "all tars" not in capsys.readouterr().out
        part = pack_recipe.main(
            pack_recipe.Config(source, str(tmp_path / "1"), workers=1, part="1/2")
        )
        assert "all tars" in capsys.readouterr().out and part["part"] == [1, 2]
        with pytest.raises(ValueError, match="--cache-gib"):
            pack_recipe.main(pack_recipe.Config(source, str(out), cache_gib=1e-6))
        with pytest.raises(ValueError, match="404"):
            pack_recipe.main(pack_recipe.Config(tars.url + "/none.tar", str(out)))
        with pytest.raises(ValueError, match=r"muybridge pack"):
            open_data(tars.url + "/tmp-v-1-008.tar", 64)


@pytest.mark.parametrize(
    "pattern", ["{3..1}.tar", "{0..99999999}.tar", "{a,b}.tar", "*.tar", "a.tar.gz", "", ".tar"]
)
def test_patterns_that_name_no_tars_are_refused(pattern, tmp_path):
    with pytest.raises(ValueError, match="tar"):
        remote.bring_tars(f"https://host/{pattern}", None)


@pytest.mark.slow
def test_an_object_store_that_speaks_s3(packed, tmp_path, monkeypatch):
    server_of = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MUYBRIDGE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.client("s3")
    bucket.create_bucket(Bucket="data")
    for path in packed.iterdir():
        if path.is_file():
            bucket.upload_file(str(path), "data", f"packs/mine/{path.name}")
    with ThreadPoolExecutor(1) as apart:
        far = apart.submit(open_data, "s3://data/packs/mine", 64).result()
        for record in far.records():
            assert apart.submit(far.read, record).result() == Pack(packed).read(record)
        for nowhere in ("s3://data/packs/none", "s3://none/packs/mine"):
            with pytest.raises(Unreachable, match="404"):
                apart.submit(open_data, nowhere, 64).result()
    server.stop()


SOAK = """
import os, sys
import numpy as np
import psutil
from pretrain.data import remote, shards
from pretrain.data.cache import open_data
from pretrain.data.shards import Positions, train_batches
from pretrain.data.shards import TrainClips
from pretrain.settings import Machine
from pretrain.spec import InputSpec
address, clips, limit, rank = sys.argv[1], *map(int, sys.argv[2:])
remote.WINDOW_BYTES = limit // 6
shards.KEEP_DECODED = 0  # as of data that do not fit
pack = open_data(address, 64, machine=Machine(cache_gib=limit / 2**30))
spec, draw = InputSpec(frames=4, stride=2, size=16), lambda *_: {}
data = TrainClips(pack, np.arange(len(pack)), spec, 0, 1, (1.0,), draw)
with train_batches(data, Positions(0, clips // 20, 10, 1, 2, rank, data.lane), 0) as batches:
    for number, _ in enumerate(batches):
        if number % (clips // 200) == 0:
            process = psutil.Process()
            family = [process, *process.children(recursive=True)]
            memory = sum(each.memory_info().rss for each in family)
            print(memory, sum(each.num_fds() for each in family), flush=True)
"""


@pytest.mark.slow
def test_memory_and_files_stay_flat_while_fifty_thousand_clips_are_streamed(
    tmp_path, packed, monkeypatch
):
    pytest.importorskip("psutil")
    monkeypatch.setenv("MUYBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    sizes = [shard["bytes"] for shard in Pack(packed).index["shards"]]
    about = sum((packed / name).stat().st_size for name in ABOUT)
    limit = about + sum(sizes) - 2 * max(sizes)  # so that no epoch finds all of the last one
    with serve(packed) as store:
        both = [
            subprocess.Popen(
                [sys.executable, "-c", SOAK, store.url, "50000", str(limit), str(rank)],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert sum(store.asked.values()) > 50
    for text in said:
        lines = [line.split() for line in text.splitlines() if line[0].isdecimal()]
        memory, files = np.array(lines, dtype=float).T
        assert len(memory) == 10
        assert memory[3:].max() < 1.05 * memory[2] and files[3:].max() <= files[2] + 2, text
