"""Networks of flow and of joints, and of several streams: their equations, written out again."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from downstream.classifier import Classifier
from downstream.export import lengths_of, program_of
from downstream.features import spec_of
from downstream.finetune import StepLoss, record_method
from downstream.models import build_model, builders, load_backbone, load_classifier
from downstream.models.i3d import I3D
from downstream.models.images import ImageNetwork
from downstream.models.skeleton import SkeletonLSTM
from downstream.models.stgcn import STGCN, GraphBlock, bones_of, partition
from downstream.models.two_stream import FeatureFusion, FlowStack
from downstream.training import Given, resolve_training
from pretrain.backbones import export_backbone
from pretrain.data.poses import SKELETONS, Skeleton
from pretrain.data.shards import draw_frames
from pretrain.data.transforms import Augment
from pretrain.processes import start_accelerator
from pretrain.settings import Machine
from pretrain.spec import InputSpec
from pretrain.weights import CheckpointError

# A star with a tail, whose root is in the middle of nothing: 0 - 1 - 2, 1 - 3, 3 - 4.
STAR = Skeleton(tuple("abcde"), ((0, 1), (1, 2), (1, 3), (3, 4)), 1)
SMALL = {"network": "test_resnet", "size": 32}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_pose(model: nn.Module, num: int = 2) -> torch.Tensor:
    """Joints of which some are not seen, normalised."""
    spec = model.input_spec
    stream = spec.streams["pose"]
    pose = random(num, *stream.shape(spec.frames, spec.size))
    pose[:, -1] = (pose[:, -1] > -0.5).float()
    pose[:, :-1] *= pose[:, -1:]
    return stream.normalise(pose)


# ---- two streams


def test_the_temporal_stream_sees_flows_stacked_without_their_means():
    model = FlowStack(**SMALL, frames=3)
    seen = []
    model.images.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    flow = random(2, 2, 3, 32, 32) + 1
    model.eval()(flow)
    assert seen[0].shape == (2, 6, 32, 32)
    for frame in range(3):
        for axis in range(2):
            field = flow[:, axis, frame]
            still = field - field.mean((1, 2), keepdim=True)
            assert torch.allclose(seen[0][:, 2 * frame + axis], still, atol=1e-6)
    # A camera that moves at a steady speed changes nothing.
    assert torch.allclose(model(flow), model(flow + 0.3), atol=1e-5)


def first_filters(network: nn.Module) -> torch.Tensor:
    return next(p for p in network.parameters() if p.ndim == 4)


@pytest.mark.parametrize("name", ["flow_stack", "early_streams"])
def test_flow_starts_from_filters_averaged_over_colour(tmp_path, name):
    colour = ImageNetwork("test_resnet", 32)
    torch.save(colour.net.state_dict(), tmp_path / "colour.pth")
    model = build_model(name, **SMALL, frames=2, weights=str(tmp_path / "colour.pth"))
    before, after = first_filters(colour), first_filters(model.images)
    mean = before.mean(1) * 127 / 255 / (sum(colour.pixels.std) / 3)
    if name == "flow_stack":
        expected = torch.stack([mean] * 4, 1)
    else:
        expected = torch.cat([before, before, torch.stack([mean] * 4, 1)], 1) / 2
    assert torch.allclose(after, expected, atol=1e-6)
    theirs, ours = colour.net.state_dict(), model.images.net.state_dict()
    same = [torch.equal(theirs[k], ours[k]) for k in theirs if theirs[k].shape == ours[k].shape]
    assert all(same) and len(same) == len(theirs) - 1


def test_the_spatial_stream_sees_the_frame_in_the_middle():
    model = build_model("two_stream", **SMALL)
    clip = {"rgb": random(2, 3, 10, 32, 32), "flow": random(2, 2, 10, 32, 32, seed=1)}
    with torch.no_grad():
        both = model(clip)
        alone = [model.first(clip["rgb"][:, :, 5:6]), model.second(clip["flow"])]
        assert torch.equal(both, torch.cat(alone, 1))
        # A linear classifier of both adds the logits of one of each.
        head = Classifier(model, ["a", "b", "c"]).eval()
        weight, width = head.head.weight, model.first.embed_dim
        added = alone[0] @ weight[:, :width].T + alone[1] @ weight[:, width:].T
        assert torch.allclose(head(clip), added + head.head.bias, atol=1e-5)


def test_frames_of_a_shorter_network_are_spread_over_the_clip():
    model = build_model("feature_fusion", parts=("frame_mean", "stgcn"), network="test_resnet",
                        frames=4, size=32, width=0.05)  # fmt: skip
    assert model.input_spec.frames == 4
    longer = build_model("feature_fusion", parts=("frame_late", "flow_stack"), **SMALL)
    clip = {"rgb": random(1, 3, 10, 32, 32), "flow": random(1, 2, 10, 32, 32)}
    with torch.no_grad():
        width = longer.first.embed_dim
        expected = longer.first(clip["rgb"][:, :, [2, 7]])
        assert torch.equal(longer(clip)[:, :width], expected)
    with pytest.raises(ValueError, match="size"):
        build_model("feature_fusion", parts=("frame_mean", "c3d"), network="test_resnet")
    with pytest.raises(ValueError, match="2 networks"):
        build_model("two_stream", parts=("frame_mean",))
    with pytest.raises(ValueError, match="--hidden"):
        build_model("two_stream", **SMALL, hidden=3)
    with pytest.raises(ValueError, match="one network"):
        build_model("frame_mean", parts=("lstm",))


def test_i3d_of_flow_starts_from_i3d_of_colour(tmp_path):
    clip = {"width": 0.1, "frames": 8, "size": 32}
    colour = I3D(momentum=0.01, **clip).eval()
    export_backbone(colour, tmp_path / "backbone", {})
    where = str(tmp_path / "backbone")
    flow = build_model("i3d_flow", weights=where, **clip)
    early = build_model("i3d_early", weights=where, **clip)
    assert flow.arguments["momentum"] == early.arguments["momentum"] == 0.01
    first = "features.Conv3d_1a_7x7.conv.weight"
    before = colour.state_dict()[first]
    mean = before.mean(1, keepdim=True)
    assert torch.allclose(flow.state_dict()[first], torch.cat([mean, mean], 1))
    assert torch.allclose(early.state_dict()[first], torch.cat([before, mean, mean], 1))
    last = "features.Mixed_5c.branch0.conv.weight"
    assert torch.equal(flow.state_dict()[last], colour.state_dict()[last])
    # A still clip is to both what colour alone is.
    pixels = random(1, 3, 8, 32, 32)
    with torch.no_grad():
        still = {"rgb": pixels, "flow": torch.zeros(1, 2, 8, 32, 32)}
        assert torch.allclose(early(still), colour(pixels), atol=1e-5)
    both = build_model("i3d_two_stream", weights=where, **clip)
    assert torch.equal(both.second.state_dict()[first], flow.state_dict()[first])
    export_backbone(flow, tmp_path / "flow", {})
    with pytest.raises(ValueError, match="colour"):
        build_model("i3d_flow", weights=str(tmp_path / "flow"), **clip)
    with pytest.raises(ValueError, match="flow"):
        build_model("i3d", method="tvl1")
    for momentum in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="momentum"):
            I3D(momentum=momentum, **clip)


def test_published_i3d_of_flow_is_read_and_refuses_other_flow(tmp_path):
    """In the names of pytorch-i3d, with a scale behind every convolution, as it can have."""
    flow = I3D(channels=2, frames=8, size=32).eval()
    names = {"conv": "conv3d", "norm": "bn", "0.": "a.", "1.": "b."}
    theirs = {}
    for name, value in flow.state_dict().items():
        parts = name.split(".")[1:]
        unit, (kind, leaf) = parts[:-2], parts[-2:]
        if len(unit) > 1:
            branch = unit[1].replace("branch", "b")
            unit = [unit[0], branch + ("" if branch == "b0" else "ab"[int(unit[2])])]
        unit = ".".join(unit)
        theirs[f"{unit}.{names[kind]}.{leaf}"] = value.clone()
    for unit in {name.removesuffix(".bn.bias") for name in theirs if name.endswith(".bn.bias")}:
        scale = 0.5 + torch.rand(len(theirs[f"{unit}.bn.bias"]))
        theirs[f"{unit}.bn.weight"] = scale
        theirs[f"{unit}.bn.num_batches_tracked"] = torch.tensor(3)
        theirs[f"{unit}.conv3d.weight"] /= scale.view(-1, 1, 1, 1, 1)
        theirs[f"{unit}.bn.running_mean"] /= scale
    head = random(400, 1024, 1, 1, 1)
    theirs |= {"logits.conv3d.weight": head, "logits.conv3d.bias": torch.zeros(400)}
    torch.save(theirs, tmp_path / "flow_imagenet.pt")
    model = load_classifier("i3d_flow_k400", str(tmp_path / "flow_imagenet.pt"))
    stream = model.input_spec.streams["flow"]
    assert (stream.method, stream.bound) == ("tvl1", 20)
    assert model.backbone.arguments["momentum"] == 0.01  # as pytorch-i3d trains it on
    small = I3D(channels=2, frames=8, size=32).eval()
    small.load_state_dict(model.backbone.state_dict())
    clip = random(1, 2, 8, 32, 32)
    with torch.no_grad():
        assert torch.allclose(small(clip), flow(clip), rtol=1e-3, atol=1e-5)
    assert torch.equal(model.head.weight, head.flatten(1))
    torch.save({f"x.{k}": v for k, v in theirs.items()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no layer|missing|lacks"):
        load_classifier("i3d_flow_k400", str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"flow_imagenet\.pt"):
        load_classifier("i3d_flow_k400")


def test_the_method_of_flow_travels_with_the_weights(tmp_path):
    model = build_model("flow_stack", **SMALL, frames=2, method="tvl1", bound=7.5)
    export_backbone(model, tmp_path / "backbone", {})
    spec = load_backbone(str(tmp_path / "backbone")).input_spec
    assert (spec.streams["flow"].method, spec.streams["flow"].bound) == ("tvl1", 7.5)
    with pytest.raises(ValueError, match=r"tvl1.*dis"):
        spec.refuse_other_kinds({"flow": "dis"}, "it")


def test_a_network_refuses_flow_of_another_method_than_it_learned_from(tmp_path):
    index = {"streams": {"flow": {"methods": {"dis": 7}}}}
    model = build_model("two_stream", **SMALL, frames=2)
    record_method(model, index)
    export_backbone(model, tmp_path / "backbone", {})
    spec = load_backbone(str(tmp_path / "backbone")).input_spec
    assert spec == model.input_spec and spec.streams["flow"].method == "dis"
    with pytest.raises(ValueError, match="raft"):
        spec.refuse_other_kinds({"flow": "raft_small"}, "it")
    record_method(model, {"streams": {"flow": {"methods": {"raft_small": 7}}}})
    assert model.input_spec == spec  # what it has learned from first
    for several in ({"dis": 1, "tvl1": 2}, {}):
        plain = build_model("flow_stack", **SMALL, frames=2)
        record_method(plain, {"streams": {"flow": {"methods": several}}})
        record_method(build_model("frame_mean", **SMALL, frames=2), index)
        assert not plain.input_spec.streams["flow"].method


# ---- skeletons


def steps(skeleton: Skeleton, start: int, end: int) -> int:
    """Bones on the way, by trying ever longer walks."""
    at = {start}
    for length in range(len(skeleton.joints)):
        if end in at:
            return length
        at |= {b for a in at for bone in skeleton.bones for b in bone if a in bone}
    raise AssertionError("not connected")


@pytest.mark.parametrize("strategy", ["uniform", "distance", "spatial"])
@pytest.mark.parametrize("skeleton", [STAR, *SKELETONS.values()], ids=["star", *SKELETONS])
def test_neighbours_are_parted_as_the_paper_says(skeleton, strategy):
    joints = range(len(skeleton.joints))
    weights = partition(skeleton, strategy)
    assert len(weights) == {"uniform": 1, "distance": 2, "spatial": 3}[strategy]
    expected = torch.zeros_like(weights)
    for joint in joints:
        neighbours = [n for n in joints if steps(skeleton, joint, n) <= 1]
        for n in neighbours:
            to_root = [steps(skeleton, j, skeleton.root) for j in (n, joint)]
            part = {
                "uniform": 0,
                "distance": int(n != joint),
                "spatial": 0 if n == joint else 2 if to_root[0] < to_root[1] else 1,
            }[strategy]
            expected[part, n, joint] = 1 / len(neighbours)
    assert torch.allclose(weights, expected)


def test_a_graph_convolution_is_the_papers_sum():
    """Equation 3: over the neighbours, each with its part's weights, over their number."""
    torch.manual_seed(0)
    graph = partition(STAR, "spatial")
    block = GraphBlock(2, 3, graph, 1, 0.0, False)
    nn.init.uniform_(block.importance, 0.5, 1.5)
    x = random(1, 2, 4, 5)
    seen = []
    block.temporal.register_forward_hook(lambda module, given, _: seen.append(given[0]))
    with torch.no_grad():
        y = block.eval()(x)
        weight = block.spatial.weight.view(3, 3, 2)  # part, output, input
        bias = block.spatial.bias.view(3, 3)
        for t in range(4):
            for joint in range(5):
                total = torch.zeros(3)
                for part in range(3):
                    for n in range(5):
                        factor = graph[part, n, joint] * block.importance[part, n, joint]
                        total += factor * (weight[part] @ x[0, :, t, n] + bias[part])
                assert torch.allclose(seen[0][0, :, t, joint], total, atol=1e-5)
    assert y.shape == (1, 3, 4, 5)


def test_bones_go_from_the_root_outwards():
    pose = random(1, 4, 3, 2, 5)
    pose[:, -1] = pose[:, -1].abs() + 0.1
    pose[:, :, 0, 0, 3] = 0  # not seen
    bones = bones_of(pose, STAR)
    before = {0: 1, 2: 1, 3: 1, 4: 3}
    for t, p in ((0, 0), (0, 1), (2, 0)):
        assert not bones[0, :-1, t, p, 1].any()  # of the root
        for joint, other in before.items():
            end, start = pose[0, :, t, p, joint], pose[0, :, t, p, other]
            seen = end[-1] > 0 and start[-1] > 0
            expected = (end - start)[:-1] if seen else torch.zeros(3)
            assert torch.allclose(bones[0, :-1, t, p, joint], expected)
            assert bones[0, -1, t, p, joint] == min(end[-1], start[-1])


def test_st_gcn_sees_joints_bones_or_both():
    common = {"skeleton": "kinect20", "width": 0.05, "frames": 9}
    torch.manual_seed(0)
    both = STGCN(**common, data="both").eval()
    pose = random_pose(both)
    assert both.grid == (3, 1, 20)
    with torch.no_grad():
        tokens = both.forward_features(pose)
        width = both.embed_dim // 2
        for i, data in enumerate(("joint", "bone")):
            alone = STGCN(**common, data=data).eval()
            alone.networks[data].load_state_dict(both.networks[data].state_dict())
            assert torch.equal(
                alone.forward_features(pose), tokens[..., i * width : (i + 1) * width]
            )
        # Two people are averaged, whoever is the first.
        swapped = both(pose.flip(3))
        assert torch.allclose(swapped, both(pose), atol=1e-5)
        # 2-D joints come with their confidence, 3-D joints without.
        pose[:, -1] *= 0.5
        assert torch.equal(both.forward_features(pose), tokens)
        flat = STGCN(**common, coordinates=2).eval()
        flat_pose = random_pose(flat)
        less = flat_pose.clone()
        less[:, -1] *= 0.5
        assert not torch.equal(flat(flat_pose), flat(less))
    for wrong in ({"strategy": "other"}, {"data": "other"}, {"skeleton": "kinect"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            STGCN(**common | wrong)


def test_the_stacked_lstm_is_its_equations_on_joints_around_the_root():
    torch.manual_seed(0)
    model = SkeletonLSTM("kinect20", people=2, hidden=6, frames=4).eval()
    nn.init.uniform_(model.norm.running_mean, -1, 1)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    pose = random_pose(model)
    root = SKELETONS["kinect20"].root
    pose[0, :, :2, 0, root] = 0  # first seen in the third frame
    pose[0, -1, 2, 0, root] = 1
    pose[1, -1, 0, 0, root] = 1
    with torch.no_grad():
        found, embedding = model.forward_features(pose), model(pose)
        for clip, first in ((0, 2), (1, 0)):
            origin = pose[clip, :-1, first, 0, root]
            frames = []
            for t in range(4):
                values = []
                for p in range(2):
                    for j in range(20):
                        seen = pose[clip, -1, t, p, j] > 0
                        values.append((pose[clip, :-1, t, p, j] - origin) * seen)
                spread = (model.norm.running_var + 1e-5).sqrt()
                frames.append((torch.cat(values) - model.norm.running_mean) / spread)
            for layer in range(3):
                w, u, b, c = (getattr(model.rnn, f"{name}_l{layer}") for name in
                              ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
                state, cell = torch.zeros(6), torch.zeros(6)
                for t, x in enumerate(frames):
                    i, f, g, o = (w @ x + b + u @ state + c).chunk(4)
                    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                    state = o.sigmoid() * cell.tanh()
                    frames[t] = state
            assert torch.allclose(found[clip], torch.stack(frames), atol=1e-5)
    assert torch.equal(embedding, found[:, -1])
    # Where the person stands does not matter.
    there = pose[:, -1:] > 0
    moved = torch.cat([(pose[:, :-1] + 3) * there, pose[:, -1:]], 1)
    with torch.no_grad():
        assert torch.allclose(model(moved), embedding, atol=1e-4)


def test_joints_are_turned_about_the_vertical():
    """Lengths stay, and so does height; what is seen in a picture cannot be turned."""
    spec = SkeletonLSTM("kinect20", frames=3).input_spec
    pose = random(4, 3, 1, 20)
    pose[:, 0, 0, 7] = 0  # not seen
    turn = Augment(turn=30.0)
    turn.check(spec)
    angles = []
    for seed in range(40):
        turned = turn({"pose": pose}, np.random.default_rng(seed), spec)["pose"]
        assert torch.equal(turned[[1, 3]], pose[[1, 3]]) and not turned[:, 0, 0, 7].any()
        assert torch.allclose(turned[:3].norm(dim=0), pose[:3].norm(dim=0), atol=1e-5)
        x, z = pose[[0, 2], 1, 0, 0]
        there = torch.atan2(*turned[[0, 2], 1, 0, 0]) - torch.atan2(x, z)
        angles.append((math.degrees(there) + 180) % 360 - 180)
    assert -30.01 < min(angles) < -15 and 15 < max(angles) < 30.01
    for other in ("two_stream", "skeleton_lstm"):
        flat = {"coordinates": 2} if other == "skeleton_lstm" else SMALL
        with pytest.raises(ValueError, match="turn"):
            turn.check(build_model(other, **flat).input_spec)


@pytest.mark.parametrize("coordinates", [2, 3])
def test_joints_are_seen_as_of_other_bodies(coordinates):
    """One matrix for all joints of a clip, near the identity, another for the next clip."""
    spec = SkeletonLSTM("kinect20", coordinates, frames=3).input_spec
    pose = random(coordinates + 1, 3, 1, 20)
    pose[:, 0, 0, 7] = 0  # not seen
    change = Augment(affine=0.2)
    change.check(spec)
    found = []
    for seed in range(20):
        other = change({"pose": pose}, np.random.default_rng(seed), spec)["pose"]
        assert torch.equal(other[-1], pose[-1]) and not other[:, 0, 0, 7].any()
        before, after = (x[:-1].flatten(1).T for x in (pose, other))
        matrix = torch.linalg.lstsq(before, after).solution
        assert torch.allclose(before @ matrix, after, atol=1e-4)
        found.append(matrix - torch.eye(coordinates))
    assert 0.15 < torch.stack(found).abs().max() < 0.2001
    assert (torch.stack(found).std(0) > 0.05).all()
    with pytest.raises(ValueError, match="affine"):
        change.check(build_model("two_stream", **SMALL).input_spec)


def test_recordings_of_joints_are_seen_in_part():
    """At least the span of their time, begun anywhere; the whole in test and by default."""
    spec = SkeletonLSTM("kinect20", frames=8).input_spec
    ends = []
    for seed in range(200):
        drawn = draw_frames(100, spec, np.random.default_rng(seed), 0.5)
        assert (np.diff(drawn) >= 0).all() and drawn[0] >= 0 and drawn[-1] < 100
        assert drawn[-1] - drawn[0] > 50 * 6 / 8
        ends.append((drawn[0], drawn[-1]))
    assert min(ends)[0] < 5 and max(ends)[0] > 25 and min(last for _, last in ends) < 70
    Augment(span=0.5).check(spec)
    for other in (replace(spec, stride=2), InputSpec(8, 0, 32)):
        with pytest.raises(ValueError, match="span"):
            Augment(span=0.5).check(other)


@pytest.mark.parametrize(
    ("name", "stride", "wanted"),
    [("stgcn", 0, (0.2, 0.75, False)), ("skeleton_lstm", 2, (0.2, 1.0, False)),
     ("frame_mean", 0, (0.0, 1.0, True)), ("feature_fusion", 0, (0.0, 1.0, True))],
)  # fmt: skip
def test_networks_of_joints_see_other_bodies_and_no_mirror_by_default(name, stride, wanted):
    with torch.device("meta"):
        model = build_model(name, small=True)
    model.input_spec = replace(model.input_spec, stride=stride)
    training = resolve_training("tiny", Given(), model, name, True)
    assert (training.affine, training.span, training.flip) == wanted
    assert ("none mirrored" in training.in_words()["augmented"]) is not training.flip
    training.check(model.input_spec, False)
    published = resolve_training("paper", Given(), model, name, True)
    # Of the published trainings, too, those of joints mirror nothing.
    assert (published.affine, published.span, published.flip) == (0.0, 1.0, wanted[2])
    given = Given(affine=0.0, span=1.0, flip=not wanted[2])
    for preset in ("tiny", "paper"):
        kept = resolve_training(preset, given, model, name, True)
        assert (kept.affine, kept.span, kept.flip) == (0.0, 1.0, not wanted[2])


# ---- pose-driven attention


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    model = build_model("pose_attention", width=0.05, frames=16, size=64, hidden=8)
    for branch in (model.space, model.time):  # trained a little
        nn.init.normal_(branch[-1].weight)
        nn.init.normal_(branch[-1].bias)
    return model


def test_a_part_called_video_makes_no_pair_of_towers(attention):
    """Features and exports see poses, too."""
    assert [*spec_of(attention).streams] == ["rgb", "pose"]
    assert len(program_of(attention, lengths_of(attention)).graph_signature.user_inputs) == 2


@pytest.fixture
def watched(attention):
    spec = attention.input_spec
    return {"rgb": random(2, *spec.streams["rgb"].shape(16, 64)), "pose": random_pose(attention)}


@pytest.mark.parametrize("training", [False, True])
def test_separable_attention_is_its_equations(attention, watched, training):
    attention.train(training)
    with torch.no_grad():
        tokens = attention.forward_features(watched)
        penalised = attention.regulariser.item()
        embedding = attention(watched)
        features = attention.video.forward_features(watched["rgb"])  # statistics of the same batch
        space, time = attention.attentions(watched)
        attention.eval()
        states = attention.pose(watched["pose"])  # stays as it was trained
    t, h, w = attention.grid
    assert (t, h, w) == (2, 2, 2) and space.shape == (2, h, w) and time.shape == (2, t)
    penalty = 0.0
    for clip in range(2):
        weights = {}
        for name in ("space", "time"):
            inner, _, outer = getattr(attention, name)
            weights[name] = outer.weight @ (inner.weight @ states[clip] + inner.bias).tanh()
            weights[name] = (weights[name] + outer.bias).tolist()
        alpha = [1 / (1 + math.exp(-z)) for z in weights["space"]]
        total = sum(math.exp(z) for z in weights["time"])
        beta = [math.exp(z) / total for z in weights["time"]]
        assert space[clip].flatten().tolist() == pytest.approx(alpha, abs=1e-5)
        assert time[clip].tolist() == pytest.approx(beta, abs=1e-5)
        g = features[clip].view(t, h * w, -1)
        by_place = sum(g[i, j] * alpha[j] for i in range(t) for j in range(h * w)) / (t * h * w)
        by_time = sum(g[i, j] * beta[i] for i in range(t) for j in range(h * w)) / (t * h * w)
        assert torch.allclose(embedding[clip], torch.cat([by_place, by_time]), atol=1e-5)
        penalty += 1e-5 * math.sqrt(sum(a * a for a in alpha)) / 2
        penalty += 1e-5 * sum((1 - b) ** 2 for b in beta) / 2
    assert penalised == pytest.approx(penalty, rel=1e-4)
    assert torch.allclose(tokens.mean(1), embedding, atol=1e-6)


def test_attention_starts_alike_everywhere_and_leaves_the_poses_network_alone(watched):
    model = build_model("pose_attention", width=0.05, frames=16, size=64, hidden=8, space=0.1)
    space, time = model.attentions(watched)
    assert (space == 0.5).all() and torch.allclose(time, torch.full((2, 2), 0.5))
    model.train()
    assert not model.pose.training and model.video.training
    assert not any(p.requires_grad for p in model.pose.parameters())
    both = build_model("pose_attention", width=0.05, frames=16, size=64, freeze_pose=False)
    assert both.train().pose.training and all(p.requires_grad for p in both.parameters())
    with pytest.raises(ValueError, match="3-D"):
        build_model("pose_attention", parts=("frame_late", "skeleton_lstm"), **SMALL)
    with pytest.raises(ValueError, match="joints"):
        build_model("pose_attention", parts=("i3d", "i3d"), width=0.05)


@pytest.mark.parametrize("within", [False, True])
def test_the_regulariser_is_part_of_the_loss(attention, watched, within):
    """Also of a network of which the attention is a part."""
    backbone = (
        FeatureFusion(attention, FlowStack("test_resnet", size=64, frames=16))
        if within
        else attention
    )
    model = Classifier(backbone, ["a", "b"]).train()
    accelerator = start_accelerator(Machine(precision="fp32"))
    batch = {
        "rgb": torch.zeros(2, 3, 16, 64, 64, dtype=torch.uint8), "pose": watched["pose"],
        "flow": torch.full((2, 2, 16, 64, 64), 128, dtype=torch.uint8),
        "labels": torch.tensor([0, 1]),
    }  # fmt: skip
    loss_of = StepLoss(accelerator, 2, None, 0.0, 0.0, 0.0, 0)
    losses = []
    for space in (0.0, 7.0):
        attention.arguments["space"] = space
        losses.append(loss_of(model, batch, 0)[0].item())
    attention.arguments["space"] = 1e-5
    spec = attention.input_spec
    seen, _ = attention.attentions(spec.normalise(spec.take(batch)))
    assert losses[1] - losses[0] == pytest.approx(
        7 * seen.flatten(1).norm(dim=1).sum().item(), rel=1e-3
    )


# ---- hostile exports


def export_changed(folder, model, change) -> str:
    export_backbone(model, folder, {})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"skeleton": "nobody"},
        {"people": 10**9},
        {"coordinates": 10**9},
        {"frames": 10**9},
        {"width": 1e9},
        {"data": 3},
        {"strategy": "x" * 10**5},
    ],
)
def test_hostile_arguments_of_joints_are_refused(tmp_path, change, monkeypatch):
    model = STGCN("kinect20", width=0.05, frames=4)
    where = tmp_path / "backbone"
    name = export_changed(where, model, lambda c: c["arguments"].update(change))
    manifest = json.loads((where / "manifest.json").read_text())
    monkeypatch.setattr("pretrain.backbones.verify_folder", lambda folder: manifest)
    with pytest.raises((ValueError, CheckpointError)) as refused:
        load_backbone(name)
    assert len(str(refused.value)) < 3000


def test_models_within_models_end(tmp_path, monkeypatch):
    """Two within a classifier are admitted, a file that nests them for ever is not."""
    pair = build_model("feature_fusion", parts=("frame_mean", "flow_stack"), frames=2, **SMALL)
    export_backbone(pair, tmp_path / "pair", {})
    three = build_model(
        "feature_fusion", parts=(str(tmp_path / "pair"), "stgcn"), frames=2, size=32, width=0.05
    )
    model = Classifier(three, ["a", "b"])
    export_backbone(model, tmp_path / "three", {})
    again = load_backbone(str(tmp_path / "three"))
    clip = {k: v.zero_() for k, v in again.input_spec.empty(1).items()}
    assert set(clip) == {"rgb", "flow", "pose"}
    with torch.no_grad():
        assert torch.equal(again(clip), three(clip))
    monkeypatch.setattr("pretrain.backbones.verify_folder", lambda folder: None)

    def bury(config: dict) -> None:
        inner = config["arguments"]["first"]
        for _ in range(200):
            inner = {"builder": "FeatureFusion", "arguments": {"first": inner, "second": inner}}
            inner["arguments"]["second"] = config["arguments"]["second"]
        config["arguments"]["first"] = inner

    name = export_changed(tmp_path / "deep", pair, bury)
    with pytest.raises(ValueError, match="deep"):
        load_backbone(name)
    assert "FeatureFusion" in builders()
