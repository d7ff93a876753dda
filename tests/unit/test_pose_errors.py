"""Poses made worse: how much, for how long, and that nothing else changes."""

import csv
import shutil

import numpy as np
import pytest

from pretrain.data.pack import pack
from pretrain.data.pose_errors import Config, Errors, main, stretches, worsen
from pretrain.data.poses import SKELETONS, mirror_pose
from pretrain.data.shards import Pack
from pretrain.data.synthetic import make_dataset

NONE = Errors(noise=0, missing=0, swapped=0)


def bodies(frames: int = 4000) -> np.ndarray:
    """A person who stands still, size 1, one joint never seen; and nobody."""
    joints = np.random.default_rng(0).standard_normal((20, 3))
    joints[1:] -= joints[1:].mean(0)
    joints /= np.sqrt(np.square(joints[1:]).sum(1).mean())
    values = np.zeros((frames, 2, 20, 4), np.float32)
    values[:, 0, 1:, :3], values[:, 0, 1:, 3] = joints[1:] + 5, 1
    return values


def worse(values: np.ndarray, **errors: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    return worsen(values, "synthetic20", Errors(**{**vars(NONE), **errors}), rng)


def test_noise_is_in_sizes_of_the_body():
    values = bodies()
    np.testing.assert_array_equal(worse(values), values)
    found = worse(values, noise=0.2)
    assert found.dtype == np.float32
    off = (found - values)[:, 0, 1:, :3]
    assert np.allclose(off.std((0, 1)), 0.2, rtol=0.02) and abs(off.mean()) < 0.003
    np.testing.assert_array_equal(found[..., 3], values[..., 3])
    assert not found[:, 0, 0].any() and not found[:, 1].any()  # who was not seen
    doubled = values * np.float32([2, 2, 2, 1])
    assert np.allclose(worse(doubled, noise=0.2)[..., :3], 2 * found[..., :3], atol=1e-4)


def test_joints_are_missing_for_a_while():
    values = bodies()
    found = worse(values, missing=0.25, stretch=5)
    gone = found[:, 0, 1:, 3] == 0
    assert gone.mean() == pytest.approx(0.25, abs=0.01)
    assert not found[:, 0, 1:][gone].any()
    np.testing.assert_array_equal(found[:, 0, 1:][~gone], values[:, 0, 1:][~gone])
    assert gone.sum() / (gone[1:] & ~gone[:-1]).sum() == pytest.approx(5, rel=0.05)
    assert abs(np.corrcoef(gone[:, 0], gone[:, 1])[0, 1]) < 0.1  # each by itself


def test_sides_are_swapped_for_a_while():
    values = bodies()
    found = worse(values, swapped=0.25, stretch=4)
    other = mirror_pose(values, ("confidence",), "synthetic20", 0)
    same, swapped = ((found == v).all((1, 2, 3)) for v in (values, other))
    assert (same ^ swapped).all() and swapped.mean() == pytest.approx(0.25, abs=0.05)
    assert swapped.sum() / (swapped[1:] & ~swapped[:-1]).sum() == pytest.approx(4, rel=0.2)
    middle = [i for i, name in enumerate(SKELETONS["synthetic20"].joints) if "_" not in name]
    np.testing.assert_array_equal(found[:, :, middle], values[:, :, middle])


def test_impossible_stretches_are_refused():
    rng = np.random.default_rng(0)
    for fraction, length in ((0.1, 0.5), (0.95, 8.0)):
        with pytest.raises(ValueError, match="--stretch"):
            stretches((9,), fraction, length, rng)


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "data"
    return make_dataset(folder, 2, 0, 32, 8, 8, progress=False)


def test_a_list_with_worse_poses_is_packed(listing, tmp_path, capsys):
    for name in ("once", "twice"):
        main(Config(str(tmp_path / name), str(listing), noise=0.1, missing=0.3, swapped=0))
    once, twice = (sorted((tmp_path / n).glob("*.npy")) for n in ("once", "twice"))
    assert len(once) == 2
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in twice]
    for given, out in ((listing, "exact"), (tmp_path / "once" / "clips.csv", "worse")):
        pack(given, tmp_path / out, short_side=32, workers=1, progress=False)
    exact, worse = (Pack(tmp_path / name) for name in ("exact", "worse"))
    assert len(exact) == len(worse) == 2
    records = {r["source"].split("/")[-1]: r for r in worse.records()}
    for record in exact.records():
        other, frames = records[record["source"].split("/")[-1]], np.arange(8)
        for name in ("label", "captions", "split", "subject"):
            assert record[name] == other[name]
        assert (exact.frames(record, frames) == worse.frames(other, frames)).all()
        assert (exact.flow(record, frames) == worse.flow(other, frames)).all()
        columns = record["streams"]["pose"]["columns"]
        assert columns == other["streams"]["pose"]["columns"] and "u" in columns
        true, found = (p.poses(r, frames).numpy() for p, r in ((exact, record), (worse, other)))
        seen = found[..., -1] > 0
        assert 0.4 < seen.mean() < 0.95 and not found[~seen].any()
        off = np.abs(found - true)[seen].max(0)
        assert (off[:3] > 0.01).all() and (off[:3] < 0.5).all()
        assert (off[3:5] > 0.1).all() and (off[3:5] < 10).all()  # where they are in the picture


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.mp4,up\n", "column"),
        ("path,pose\na.mp4\n", "row 1"),
        ("path,pose\na.mp4,none.npy\n", r"none\.npy"),
        ('path,pose\n"a.mp4,none.npy\n', "csv"),
        ("path,pose\na.mp4,\xff\n", "csv"),
        ("path,pose,skeleton\na.mp4,flat.npy,coco17\n", "metres"),
    ],
)
def test_other_lists_are_refused(tmp_path, text, words):
    np.save(tmp_path / "flat.npy", np.ones((3, 17, 2)))
    (tmp_path / "clips.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=words):
        main(Config(str(tmp_path / "out"), str(tmp_path / "clips.csv")))


def test_poses_that_name_their_skeleton_keep_it(listing, tmp_path):
    names = ("path", "joints")
    with open(listing, newline="") as file:
        rows = list(csv.DictReader(file))[:1]
    shutil.copy(listing.parent / rows[0]["path"], tmp_path / "a.mp4")
    from tests.unit import layouts

    name, data = next(iter(layouts.msr(layouts.people(8, 1, "msr20")).items()))
    (tmp_path / name).write_bytes(data)
    (tmp_path / "clips.csv").write_text(f"{','.join(names)},skeleton\na.mp4,{name},msr20\n")
    with open(main(Config(str(tmp_path / "o"), str(tmp_path / "clips.csv"))), newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["skeleton"] == "msr20" and row["joints"] == "00000.npy"
    assert row["path"] == str(tmp_path / "a.mp4")
