"""The order of samples, their views, and what happens to a broken one."""

import itertools
import multiprocessing
import resource
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.data import shards
from pretrain.data.pack import pack as pack_folder
from pretrain.data.sampling import (
    counter_rng,
    dense_indices,
    epoch_order,
    multi_scale_box,
    random_resized_box,
    spread_starts,
    uniform_indices,
)
from pretrain.data.sampling import test_boxes as eval_boxes
from pretrain.data.sampling import test_indices as eval_indices
from pretrain.data.shards import (
    EvalClips,
    Mixture,
    Pack,
    Positions,
    TrainClips,
    batch_counts,
    draw_frames,
    train_batches,
    warn_of_clips,
)
from pretrain.spec import InputSpec, Joints, Stream
from pretrain.videomae import mask_of_view

SPEC = InputSpec(frames=4, stride=2, size=16)


@pytest.fixture(scope="module")
def pack(tiny_pack) -> Pack:
    return Pack(tiny_pack)


def clips_of(pack: Pack, seed: int = 0, views: int = 1, spread: bool = False) -> TrainClips:
    draw = mask_of_view("tube", (2, 2, 2), 0.5, False)
    return TrainClips(
        pack, np.arange(len(pack)), SPEC, seed, views, (1.0, 0.75), draw, spread=spread
    )


@given(
    num_samples=st.integers(1, 40),
    micro=st.integers(1, 3),
    shape=st.sampled_from([(1, 4), (2, 2), (4, 1), (1, 1)]),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
@settings(max_examples=200)
def test_positions_are_the_same_global_batches_for_any_processes_and_restarts(
    num_samples, micro, shape, cuts
):
    """Against an oracle: batch s is positions [s G, (s + 1) G), whoever reads them."""
    accumulate, world = shape
    steps, size = 12, micro * accumulate * world
    starts = [0, *sorted(cuts), steps]
    read = []
    for start, end in itertools.pairwise(starts):
        ranks = [list(Positions(start, steps, micro, accumulate, world, r)) for r in range(world)]
        for step in range(end - start):
            parts = [
                ranks[r][step * accumulate + a] for a in range(accumulate) for r in range(world)
            ]
            read.append(list(itertools.chain(*parts)))
    assert read == [list(range(s * size, (s + 1) * size)) for s in range(steps)]
    # Hence every epoch that was finished held every sample exactly once.
    flat = [p for batch in read for p in batch]
    for epoch in range(len(flat) // num_samples):
        places = flat[epoch * num_samples : (epoch + 1) * num_samples]
        order = epoch_order(5, epoch, num_samples)
        assert sorted(order[p % num_samples] for p in places) == list(range(num_samples))


def test_epochs_differ_and_depend_on_the_seed_only():
    first, second = epoch_order(0, 0, 50), epoch_order(0, 1, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_order(1, 0, 50))
    assert np.array_equal(first, epoch_order(0, 0, 50))


def test_counter_streams_do_not_overlap():
    draws = [
        tuple(counter_rng(*key).integers(0, 2**60, 4))
        for key in itertools.product(range(3), range(3), range(3), range(3))
    ]
    assert len(set(draws)) == 81


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers(pack, num_workers):
    def read(workers):
        with train_batches(clips_of(pack), Positions(0, 6, 4, 1, 1, 0), workers) as batches:
            return list(batches)

    for ours, reference in zip(read(num_workers), read(0), strict=True):
        assert ours["samples"] == reference["samples"]
        for key in ("rgb", "visible", "masked"):
            assert torch.equal(ours[key], reference[key]), key


def test_two_processes_read_the_halves_of_the_one_process_batch(pack):
    clips = clips_of(pack)
    whole = [clips[p]["sample"] for batch in Positions(0, 4, 4, 1, 1, 0) for p in batch]
    ranks = [Positions(0, 4, 2, 1, 2, rank) for rank in (0, 1)]
    halves = [
        [clips[p]["sample"] for batch in zip(*ranks, strict=True) for part in batch for p in part]
    ]
    assert halves == [whole]


def test_views_and_epochs_differ_but_repeat_exactly(pack):
    one, again = clips_of(pack, views=3)[0], clips_of(pack, views=3)[0]
    assert torch.equal(one["rgb"], again["rgb"])
    assert one["rgb"].shape == (3, 3, 4, 16, 16)
    assert not torch.equal(one["visible"][0], one["visible"][1]) or not torch.equal(
        one["visible"][0], one["visible"][2]
    )
    n = len(pack)
    seen = {clips_of(pack)[p]["sample"]: clips_of(pack)[p] for p in range(n)}
    later = {clips_of(pack)[p]["sample"]: clips_of(pack)[p] for p in range(n, 2 * n)}
    same = [torch.equal(seen[s]["rgb"], later[s]["rgb"]) for s in seen]
    assert seen.keys() == later.keys() and sum(same) < len(same) / 2


def test_broken_clip_is_replaced_by_the_next_in_order(pack, monkeypatch):
    healthy = [clips_of(pack)[p]["sample"] for p in range(len(pack))]
    victim = pack.record(healthy[2])["offset"]
    real = Pack.read

    def read(self, record):
        data = real(self, record)
        return data[:200] if record["offset"] == victim else data

    monkeypatch.setattr(Pack, "read", read)
    clips = clips_of(pack)
    item = clips[2]
    assert item["sample"] == healthy[3]
    assert [e["key"] for e in item["errors"]] == [pack.record(healthy[2])["key"]]
    assert clips[3]["errors"] == []
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(iter(EvalClips(pack, np.array([healthy[2]]), SPEC, 1, 1)[i] for i in range(1)))


def test_pack_refuses_changed_files(tiny_pack, tmp_path):
    import shutil

    broken = tmp_path / "pack"
    shutil.copytree(tiny_pack, broken)
    shard = next(broken.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match="pack again"):
        Pack(broken)
    shutil.rmtree(broken)
    shutil.copytree(tiny_pack, broken)
    (broken / "clips.jsonl").write_bytes(
        (broken / "clips.jsonl").read_bytes().replace(b"0", b"1", 1)
    )
    with pytest.raises(ValueError, match="pack again"):
        Pack(broken)
    with pytest.raises(ValueError, match="'trian'"):
        Pack(tiny_pack).split("trian")


@given(frames=st.integers(1, 60), stride=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=100)
def test_frame_numbers_are_legal_and_dense(frames, stride, seed):
    drawn = dense_indices(frames, 8, stride, counter_rng(seed, 0))
    for indices, enough in (
        (drawn, 8 * stride),
        *((shown, 7 * stride + 1) for shown in eval_indices(frames, 8, stride, 3)),
    ):
        assert indices.min() >= 0 and indices.max() < frames
        steps = np.diff(indices)
        assert set(steps.tolist()) <= {stride, 0}
        if frames >= enough:
            assert (steps == stride).all()


@given(frames=st.integers(1, 60), views=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=100)
def test_uniform_sampling_sees_the_whole_clip(frames, views, seed):
    """Training and test draw one frame of each equal part; clips shorter than that are shown as
    officially.
    """
    drawn = uniform_indices(frames, 8, counter_rng(seed, 0))
    assert (np.diff(drawn) >= 0).all() and drawn[0] >= 0 and drawn[-1] < frames
    if frames >= 8:
        assert (drawn // (frames // 8)).tolist() == list(range(8))
    else:
        assert not drawn.any()
    for k, shown in enumerate(eval_indices(frames, 8, 0, views)):
        place = k / views if views > 1 else 0.5
        assert shown.tolist() == [int(frames / 8 * place + frames / 8 * i) for i in range(8)]


@given(frames=st.integers(1, 60), seed=st.integers(0, 9))
@settings(max_examples=100)
def test_recordings_of_joints_are_seen_whole(frames, seed):
    """Of pixels the rest of whole parts is left out, as officially; of joints nothing is."""
    pose = InputSpec(8, 0, 32, {"pose": Joints("msr20", 20)})
    drawn = draw_frames(frames, pose, counter_rng(seed, 0))
    assert drawn.min() >= 0 and drawn.max() < frames and (np.diff(drawn) >= 0).all()
    ends = frames / 8 * np.arange(9)
    assert all(int(a) <= n < b for a, b, n in zip(ends, ends[1:], drawn, strict=False))
    if frames <= 8:
        assert set(drawn.tolist()) == set(range(frames))
    pixels = draw_frames(frames, InputSpec(8, 0, 32), counter_rng(seed, 0))
    assert (pixels == uniform_indices(frames, 8, counter_rng(seed, 0))).all()


def test_published_frame_numbers():
    """As VideoMAE's own classes give them (kinetics.py, ssv2.py; 14ef8d8): 16 frames, stride 4.

    All lengths from 1 to 139, 250 and 300 were compared there, at four pairs of frames and stride:
    none differs.
    """
    starts = [int(v[0]) for v in eval_indices(300, 16, 4, 5)]
    assert starts == [0, 56, 116, 176, 236]
    first = eval_indices(90, 16, 0, 2)[0]
    assert first.tolist() == [0, 5, 11, 16, 22, 28, 33, 39, 45, 50, 56, 61, 67, 73, 78, 84]
    starts = {int(dense_indices(300, 16, 4, counter_rng(i, 0))[0]) for i in range(4000)}
    assert starts == set(range(237))
    for frames, last in ((61, 56), (62, 60), (5, 0), (6, 4), (1, 0)):
        drawn = dense_indices(frames, 16, 4, counter_rng(0, 0))
        assert drawn.tolist() == np.minimum(4 * np.arange(16), last).tolist()
    assert eval_indices(5, 16, 4, 2)[1].tolist() == [0] + 15 * [4]
    assert eval_boxes(340, 256, 3) == [(0, 0, 256, 256), (42, 0, 256, 256), (84, 0, 256, 256)]


def test_random_resized_boxes_are_torchvisions():
    """8 to 100 per cent of the area, 3:4 to 4:3: the mean area of 340 x 256 is 44 % (VideoMAE's own
    draws: 44 %).
    """
    boxes = np.array([random_resized_box(340, 256, counter_rng(0, i)) for i in range(3000)])
    x, y, w, h = boxes.T
    assert (boxes >= 0).all() and (x + w <= 340).all() and (y + h <= 256).all()
    assert 0.74 < (w / h).min() < 0.77 and 1.3 < (w / h).max() < 1.35
    share = w * h / (340 * 256)
    assert share.min() < 0.1 and share.max() > 0.9 and abs(share.mean() - 0.44) < 0.02
    assert len(set(x)) > 100 and x.max() > 200  # anywhere, not at fixed places
    # Where no box fits, the largest centred one of the admitted sides: torchvision's numbers.
    for size, box in (((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))):
        assert random_resized_box(*size, counter_rng(0, 0)) == box


def test_multi_scale_boxes_lie_inside_and_cover_the_scales():
    boxes = [
        multi_scale_box(100, 60, (1, 0.875, 0.75, 0.66), counter_rng(0, i)) for i in range(400)
    ]
    assert all(x >= 0 and y >= 0 and x + w <= 100 and y + h <= 60 for x, y, w, h in boxes)
    sides = {60, 52, 45, 39}
    assert {w for _, _, w, _ in boxes} == sides == {h for _, _, _, h in boxes}
    # Never more than one scale between width and height.
    order = sorted(sides)
    assert all(abs(order.index(w) - order.index(h)) <= 1 for _, _, w, h in boxes)
    assert len(Counter(boxes)) > 60


def test_frames_kept_in_memory_are_the_decoded_ones_and_are_decoded_once(pack, monkeypatch):
    decoded = []
    read = shards.read_frames
    monkeypatch.setattr(shards, "read_frames", lambda *a: decoded.append(1) or read(*a))
    total = sum(r["frames"] * r["height"] * r["width"] * 3 for r in pack.records())
    epochs = range(3 * len(pack))
    items, counts = [], []
    for limit in (total, total - 1):  # all clips fit, or just not
        monkeypatch.setattr(shards, "KEEP_DECODED", limit)
        decoded.clear()
        clips = clips_of(pack)
        items.append([clips[position] for position in epochs])
        counts.append(len(decoded))
    assert counts == [len(pack), 3 * len(pack)]
    for kept, fresh in zip(*items, strict=True):
        assert kept["sample"] == fresh["sample"] and not kept["errors"]
        assert all(torch.equal(kept[k], fresh[k]) for k in ("rgb", "visible", "masked"))


# ---- mixtures


class Endless:
    """Stands for `TrainClips`: says which of its own positions was asked for."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, position: int) -> dict:
        return {"where": (self.name, position)}


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_every_part_of_a_mixture_runs_through_its_own_stream(counts, steps, seed):
    mixture = Mixture([Endless(str(i)) for i in range(len(counts))], counts, seed)
    size = sum(counts)
    read = [mixture[p] for p in range(steps * size)]
    for i, count in enumerate(counts):
        own = [item["where"][1] for item in read if item["part"] == i]
        assert sorted(own) == list(range(steps * count))  # hence whole epochs, each clip once
        for step in range(steps):
            batch = read[step * size : (step + 1) * size]
            assert sum(item["part"] == i for item in batch) == count
    again = Mixture([Endless(str(i)) for i in range(len(counts))], counts, seed)
    backwards = [again[p] for p in reversed(range(steps * size))]
    assert backwards[::-1] == read  # a function of the position alone


def test_parts_of_a_mixture_are_spread_over_the_batch():
    mixture = Mixture([Endless("a"), Endless("b")], [32, 32], 0)
    for step in range(4):
        half = [mixture[64 * step + i]["part"] for i in range(32)]
        assert 8 < sum(half) < 24


def test_counts_of_a_batch():
    assert batch_counts((1.0,), 10) == [10]
    assert batch_counts((3, 1), 64) == [48, 16]
    assert batch_counts((1, 1, 1), 10) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert sum(batch_counts((0.2, 0.3, 0.9), 37)) == 37
    with pytest.raises(ValueError, match="batch of 8"):
        batch_counts((100, 1), 8)
    with pytest.raises(ValueError, match="positive"):
        batch_counts((1, -1), 8)


@given(
    frames=st.integers(1, 60),
    stride=st.integers(1, 4),
    views=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_starts_of_views_are_spread_over_the_video(frames, stride, views, seed):
    first = dense_indices(frames, 8, stride, counter_rng(seed, 0))
    all_views = spread_starts(first, frames, views)
    assert len(all_views) == views and np.array_equal(all_views[0], first)
    room = frames - (first[-1] - first[0])
    starts = [x[0] for x in all_views]
    for x in all_views:
        assert np.array_equal(x - x[0], first - first[0])  # the same clip, moved
        assert x[0] >= 0 and x[-1] < frames
    assert len(set(starts)) == min(views, room)  # other frames wherever there are any


def test_views_have_their_own_frames_only_when_spread(pack):
    alone, shared, spread = clips_of(pack), clips_of(pack, views=2), clips_of(pack, 0, 2, True)
    different = 0
    for position in range(len(pack)):
        first, same, own = alone[position], shared[position], spread[position]
        assert torch.equal(first["rgb"][0], same["rgb"][0])
        assert torch.equal(first["rgb"][0], own["rgb"][0])
        assert torch.equal(same["visible"], own["visible"])  # frames change, draws do not
        different += not torch.equal(same["rgb"][1], own["rgb"][1])
    assert different == len(pack)


def test_what_sees_only_motion_refuses_pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(folder / "alone.png")
    pack_folder(folder, tmp_path / "pack", short_side=32, workers=1, progress=False)
    pictures, ids = Pack(tmp_path / "pack"), np.arange(1)
    motion = InputSpec(4, 2, 16, {"rgb": Stream(subtract_mean=True)})
    with pytest.raises(ValueError, match=r"alone.png.*single picture"):
        EvalClips(pictures, ids, motion, 1, 1)
    with pytest.raises(ValueError, match=r"alone.png.*single picture"):
        TrainClips(pictures, ids, motion, 0, 1, (1.0,), mask_of_view("tube", (2, 2, 2), 0.5, False))
    assert EvalClips(pictures, ids, SPEC, 1, 1)[0][1]["rgb"].shape == (1, 3, 4, 16, 16)


@pytest.mark.parametrize(
    ("spec", "clips", "words"),
    [
        (SPEC, 48, []),
        (InputSpec(frames=8, stride=2, size=16), 48, []),
        (SPEC, 1, ["one single clip"]),
        (
            InputSpec(frames=16, stride=4, size=16),
            48,
            ["75%", "16 frames"],
        ),  # 4 of 16 are different
        (InputSpec(frames=20, stride=1, size=16), 48, ["repeated", "20"]),
        (InputSpec(frames=512, stride=2, size=16), 1, ["one single clip", "98%", "512"]),
        (InputSpec(frames=32, stride=0, size=16), 48, ["97%", "32"]),
    ],
)
def test_what_a_backbone_would_see_again_and_again_is_said(pack, capsys, spec, clips, words):
    warn_of_clips(pack, np.arange(clips), spec)
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert said.count("warning:") == ("single" in said) + ("repeated" in said)
    assert bool(said) == bool(words)


class NoRoom(torch.utils.data.Dataset):
    """Clips whose decoding processes can write nothing, as where the memory that processes share is
    full.
    """

    def __init__(self, clips):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, position: int):
        if torch.utils.data.get_worker_info():
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return self.clips[position]


def test_no_room_in_the_memory_that_processes_share_is_said():
    try:
        with pytest.raises(shards.NoSharedMemory, match=r"(?s)shm.*--num-workers 0"):
            next(shards.eval_loader(NoRoom([torch.zeros(10_000)]), 1, num_workers=1))
    finally:  # as a recipe does at its end: Python would wait for it, and it ignores SIGTERM
        for left in multiprocessing.active_children():
            left.kill()


def test_a_training_without_room_in_shared_memory_goes_on_to_save(pack):
    def read(clips, workers):
        with train_batches(clips, Positions(0, 3, 4, 1, 1, 0), workers) as batches:
            signal.alarm(60)  # it waited for ever
            read = [batch["samples"] for batch in batches]
            signal.alarm(0)
            return read, batches.lost

    samples, lost = read(NoRoom(clips_of(pack)), 1)
    assert samples == read(clips_of(pack), 0)[0]
    assert "--num-workers 0" in lost
