"""Who is who from frame to frame, in scenes where the right answer is known."""

import numpy as np

from pretrain.data.tracks import GAP, Tracks, link, overlaps, region_of


def boxes(*centres, size=20.0):
    return np.array([[x - size / 2, y - size, x + size / 2, y + size] for x, y in centres])


def test_overlap_of_boxes():
    a = np.array([[0, 0, 2, 2], [0, 0, 0, 0]])
    b = np.array([[1, 0, 3, 2], [0, 0, 2, 2], [5, 5, 6, 6]])
    np.testing.assert_allclose(overlaps(a, b), [[1 / 3, 1, 0], [0, 0, 0]])


def test_people_who_pass_each_other_keep_their_identities():
    tracks, names = Tracks(), []
    for t in range(60):  # they meet at t = 30, at another height
        regions = boxes((3 * t, 50), (180 - 3 * t, 62))
        order = [0, 1] if t % 3 else [1, 0]  # the detector lists them as it likes
        found = tracks.update(regions[order])
        names.append([found[order.index(0)], found[order.index(1)]])
    assert {tuple(pair) for pair in names} == {tuple(names[0])} and tracks.count == 2


def test_all_pairs_are_decided_together():
    tracks = Tracks()
    first = tracks.update(boxes((0, 0), (12, 0)))
    # The nearest pair would be the second person and the first box: alone, the other is then lost.
    again = tracks.update(boxes((7, 0), (19, 0)))
    assert again == first


def test_a_short_gap_keeps_the_identity_and_a_long_one_does_not():
    for gap, same in ((GAP, True), (GAP + 1, False)):
        tracks = Tracks()
        for t in range(5):
            (name,) = tracks.update(boxes((2 * t, 0)))
        for _ in range(gap):
            assert tracks.update(np.zeros((0, 4))) == []
        # It went on at the same pace behind what hid it.
        (after,) = tracks.update(boxes((2 * (4 + gap + 1), 0)))
        assert (after == name) is same


def test_somebody_elsewhere_is_somebody_else():
    tracks = Tracks()
    (first,) = tracks.update(boxes((0, 0)))
    assert tracks.update(boxes((300, 0))) != [first]


def test_nobody_and_people_of_no_seen_joint_are_followed_without_harm():
    person = np.zeros((5, 3))
    assert (region_of(person) == 0).all()
    assert link([]) == [] and link([[], [person, person], []])[0] == []
    alone = person.copy()
    alone[2] = (7, 9, 1)
    box = region_of(alone)
    assert (box[:2] < (7, 9)).all() and (box[2:] > (7, 9)).all()
    names = link([[alone], [alone], [alone]])
    assert names[0] == names[1] == names[2]
