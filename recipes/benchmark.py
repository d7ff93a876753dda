"""Benchmark loading and training against other implementations, on this machine.

    python recipes/benchmark.py                      both halves below
    python recipes/benchmark.py --what loader        clips per second per core
    python recipes/benchmark.py --what step          a training step against transformers' model
    python recipes/benchmark.py --what frames        which attention over space and time pays when
    python recipes/benchmark.py --what decode        which decoder is the fastest here
    python recipes/benchmark.py --what stream        a pack far away against the same pack here

Loader: one clip of 16 frames at stride 4 with a random multi-scale crop to 224 pixels, from videos
of 10 s, 340x256 pixels and 30 fps (rendered here, without a download). It is compared with what
VideoMAE's and most users' code does: decord decodes, every frame becomes a Pillow image that is
cropped and resized, and the clip becomes normalised float32. Both read the raw files, and ours also
packed ones. Times are CPU times of one thread, so they are per core.

Step: forward, backward and AdamW of a VideoMAE and of transformers' VideoMAEForPreTraining with the
same weights, mask and precision; the first losses are compared, so that both do the same work. On a
GPU also compiled, with memory and the fraction of a plain bf16 matrix product's rate; with --peak,
MFU (model FLOPs utilisation), by the FLOPs of the model.

Frames: FLOPs, bytes kept for the backward pass, and clips/s of a training step for ViViT's four
models and Video Swin as clips grow from 8 to 64 frames, with a figure. All widths are 192, with
twelve blocks and 112 pixels; the Video Swin is our tiny one.

Decode: 16 frames at stride 4 of packed clips of two sizes by each `--decoder` that is installed.
Stream: an epoch of the loader from the disk; from a web server at loopback where each request waits
for 20 ms, into an empty cache; and from that cache; clips/s once the window of shards is there.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pretrain.threads  # noqa: F401 (before torch)

import av
import numpy as np
import torch

from downstream.models import build_model
from downstream.models.flops import count_flops
from downstream.report import growth_figure
from pretrain import device, log
from pretrain.data.decode import installed_decoders
from pretrain.data.pack import pack
from pretrain.data.sampling import counter_rng, dense_indices, multi_scale_box
from pretrain.data.shards import Pack, TrainClips
from pretrain.data.stream_speed import measure, rows_of
from pretrain.files import is_there
from pretrain.interop.videomae import to_transformers
from pretrain.names import did_you_mean
from pretrain.settings import SIZES, VITS
from pretrain.spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from pretrain.videomae import DECODERS, VideoMAE, draw_tokens, mask_of_view
from pretrain.vit import VideoTransformer
from recipes.options.benchmark import Config, command

SCALES = (1.0, 0.875, 0.75, 0.66)
SPEC = InputSpec(frames=16, stride=4, size=224)


def interleave(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run each candidate in turn, `rounds` times over, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(run())
    return {name: statistics.median(t) for name, t in times.items()}


# --------------------------------------------------------------------------------------- loader


def draw_video(path: Path, seed: int, frames: int = 300) -> None:
    """Write 10 s of moving texture with sensor noise, as cameras have it, by x264."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    speed = rng.integers(-3, 4, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for t in range(frames):
            y, x = 150 + 50 * np.sin(t / 40 + speed), 250 + 100 * np.cos(t / 60 - speed)
            view = texture[int(y[0]) : int(y[0]) + 256, int(x[1]) : int(x[1]) + 340].astype(
                np.int16
            )
            noise = rng.integers(-6, 7, view.shape, dtype=np.int16)
            picture = np.clip(view + noise, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def frame_by_frame(data: bytes, rng: np.random.Generator) -> torch.Tensor:
    """The common way: decord, then Pillow for every frame, then float32; (C, T, H, W)."""
    import io

    import decord
    from PIL import Image

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    indices = dense_indices(len(reader), SPEC.frames, SPEC.stride, rng)
    frames = reader.get_batch(indices).asnumpy()
    x, y, w, h = multi_scale_box(frames.shape[2], frames.shape[1], SCALES, rng)
    pictures = [
        Image.fromarray(f)
        .crop((x, y, x + w, y + h))
        .resize((SPEC.size, SPEC.size), Image.Resampling.BILINEAR)
        for f in frames
    ]
    clip = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(3, 0, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clip.float() / 255 - mean) / std


def benchmark_loader(cfg: Config, num_videos: int = 6, clips_each: int = 4) -> dict[str, float]:
    """Print CPU milliseconds per clip and the ratios; returns them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        for i in range(num_videos):
            draw_video(raw / f"{i}.mp4", i)
        pack(raw, Path(folder) / "pack", short_side=256, progress=False, near=False)
        packed = Pack(Path(folder) / "pack")
        raw_files = [p.read_bytes() for p in sorted(raw.iterdir())]
        packed_files = [packed.read(r) for r in packed.records()]

        draw = mask_of_view("tube", (8, 14, 14), 0.9, False)
        ids = np.arange(len(packed))
        one, four = (TrainClips(packed, ids, SPEC, cfg.seed, v, SCALES, draw) for v in (1, 4))

        def clock(run: Callable[[int], object], clips: int = 1) -> Callable[[], float]:
            def timed() -> float:
                start = time.process_time()
                for i in range(num_videos * clips_each):
                    run(i)
                return (time.process_time() - start) / (num_videos * clips_each * clips)

            return timed

        def common(files: list[bytes]) -> Callable[[int], object]:
            return lambda i: frame_by_frame(files[i % num_videos], counter_rng(cfg.seed, i))

        candidates = {
            "decord + Pillow per frame, raw files": clock(common(raw_files)),
            "decord + Pillow per frame, packed files": clock(common(packed_files)),
            "muybridge, packed files": clock(lambda i: one[i]),
            "muybridge, packed files, 4 crops of a decode": clock(lambda i: four[i], 4),
        }
        seconds = interleave(candidates, cfg.rounds)
    torch.set_num_threads(threads)
    reference = seconds["decord + Pillow per frame, raw files"]
    rows = {
        name: f"{1000 * s:6.1f} ms  {1 / s:6.1f} clips/s per core  {reference / s:5.2f}x"
        for name, s in seconds.items()
    }
    log.print_table("loader, one clip of 16x224x224 (CPU time)", rows)
    return {name: reference / s for name, s in seconds.items()}


# ----------------------------------------------------------------------------------------- step


def step_flops(model: VideoMAE, visible: int, masked: int) -> float:
    """Floating-point operations of one clip's step: 3 x forward, less the pixels' own gradient."""

    def block(n: int, w: int) -> int:
        return 24 * n * w**2 + 4 * n**2 * w

    encoder, width = model.encoder, model.encoder_to_decoder.out_features
    pixels = encoder.patch_embed.in_features
    embed = 2 * visible * pixels * encoder.embed_dim
    forward = embed + len(encoder.blocks) * block(visible, encoder.embed_dim)
    forward += 2 * visible * encoder.embed_dim * width
    forward += len(model.decoder_blocks) * block(visible + masked, width)
    forward += 2 * masked * width * pixels
    return 3 * forward - embed


def matmul_peak(where: torch.device) -> float:
    """The rate, in FLOP/s, of a large bf16 matrix product: what a model could reach at best."""
    a = torch.randn(8192, 8192, device=where, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.monotonic()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.monotonic() - start)


def benchmark_step(cfg: Config) -> dict[str, float]:
    """Print seconds per step of both sides at equal precision; returns the ratios."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.seed)
    if cfg.model not in VITS:
        raise ValueError(
            f"--model {cfg.model!r} is not one of {', '.join(VITS)}{did_you_mean(cfg.model, VITS)}"
        )
    size = VITS[cfg.model]
    ours = VideoMAE(VideoTransformer(*SIZES[size]), *DECODERS[size])
    theirs = to_transformers(ours).to(where).train()
    ours.to(where)
    rng = np.random.default_rng(cfg.seed)
    drawn = [draw_tokens("tube", ours.encoder.grid, 0.9, False, rng) for _ in range(cfg.batch_size)]
    visible, masked = (torch.from_numpy(np.stack(t)).to(where) for t in zip(*drawn, strict=True))
    mask = torch.zeros(cfg.batch_size, 1568, dtype=torch.bool, device=where).scatter(
        1, masked, True
    )
    video = torch.randint(
        0, 256, (cfg.batch_size, 3, 16, 224, 224), dtype=torch.uint8, device=where
    )

    def forward_theirs():
        pixels = SPEC.normalise(video).transpose(1, 2)  # as their users do it: in the step
        return theirs(pixels, bool_masked_pos=mask).loss

    precisions: dict[str, torch.dtype | None] = {"fp32": None}
    if device.has_bf16(where):
        precisions["bf16"] = torch.bfloat16
    results, rows = {}, {}
    sides = {
        "transformers": (theirs, forward_theirs),
        "muybridge": (ours, lambda: ours(video, visible, masked)[0]),
    }
    compiled = torch.compile(ours) if where.type == "cuda" else None
    if compiled is not None:
        sides["muybridge, compiled"] = (ours, lambda: compiled(video, visible, masked)[0])
    for precision, dtype in precisions.items():
        optimizers = {
            name: torch.optim.AdamW(m.parameters(), lr=0.0) for name, (m, _) in sides.items()
        }
        first: dict[str, float] = {}

        def step(name, dtype=dtype, optimizers=optimizers, first=first):
            start = time.monotonic()
            with torch.autocast(where.type, dtype, enabled=dtype is not None):
                loss = sides[name][1]()
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if where.type == "cuda":
                torch.cuda.synchronize()
            first.setdefault(name, loss.item())
            return time.monotonic() - start

        for name in sides:
            step(name)  # warm up
        seconds = interleave({n: partial(step, n) for n in sides}, cfg.rounds)
        for name, s in seconds.items():
            ratio = seconds["transformers"] / s
            results[f"{precision} {name}"] = ratio
            rows[f"{precision} {name}"] = (
                f"{s:7.3f} s  {cfg.batch_size / s:7.1f} clips/s  {ratio:5.2f}x  first loss "
                f"{first[name]:.6f}"
            )
            rate = step_flops(ours, visible.shape[1], masked.shape[1]) * cfg.batch_size / s
            if cfg.peak:
                rows[f"{precision} {name}"] += f"  MFU {rate / (cfg.peak * 1e12):.1%}"
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step(name)
                rows[f"{precision} {name}"] += (
                    f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB  {rate / 1e12:.0f} "
                    f"TFLOP/s = {rate / matmul_peak(where):.0%} of a matrix product"
                )
    title = f"step, VideoMAE {cfg.model}, batch {cfg.batch_size}, {device.describe(where)}"
    log.print_table(title, rows)
    return results


FRAMES = (8, 16, 32, 64)


def kept_bytes(model: torch.nn.Module, clips: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward one, weights not counted."""
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = model(clips)  # alive while it is counted, so that no storage is counted twice
    assert kept.requires_grad
    return sum(sizes.values())


def benchmark_frames(cfg: Config) -> dict:
    """Cost of a growing clip for every way to attend over space and time; draws frames.png."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vivit = {"dim": 192, "depth": 12, "heads": 4, "size": 112}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "joint (ViViT 1)": ("vivit_1", vivit), "encoder (ViViT 2)": ("vivit_2", vivit),
        "attention (ViViT 3)": ("vivit_3", vivit), "heads (ViViT 4)": ("vivit_4", vivit),
        "windows (Video Swin)": ("video_swin_t", {"variant": "xs", "size": 112}),
    }  # fmt: skip
    found: dict[str, dict[str, list[float]]] = {
        name: {"gflops": [], "mib": [], "clips_per_s": []} for name in kinds
    }
    for frames in FRAMES:
        models = {}
        for name, (family, changes) in kinds.items():
            torch.manual_seed(cfg.seed)
            models[name] = build_model(family, frames=frames, **changes).to(where).train()
        clips = torch.randn(1, 3, frames, 112, 112, device=where)

        def step(name: str, models=models, clips=clips) -> float:
            began = time.monotonic()
            models[name](clips).square().mean().backward()
            models[name].zero_grad()
            if where.type == "cuda":
                torch.cuda.synchronize()
            return time.monotonic() - began

        for name, model in models.items():
            found[name]["gflops"].append(count_flops(model) / 1e9)
            found[name]["mib"].append(kept_bytes(model, clips) / 2**20)
            step(name)
        for name, seconds in interleave({n: partial(step, n) for n in models}, cfg.rounds).items():
            found[name]["clips_per_s"].append(1 / seconds)
    rows = {
        f"{name}, {frames} frames": (
            f"{v['gflops'][i]:8.1f} GFLOPs  {v['mib'][i]:8.0f} MiB kept  "
            f"{v['clips_per_s'][i]:7.2f} clips/s"
        )
        for i, frames in enumerate(FRAMES)
        for name, v in found.items()
    }
    log.print_table(f"a training step of one clip, {device.describe(where)}", rows)
    picture = Path(cfg.out).with_suffix(".png") if cfg.out else Path("runs") / "frames.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"training step of one clip, {device.describe(where)}"
    print(f"figure   {growth_figure(picture, FRAMES, found, title)}", flush=True)
    return found


# ------------------------------------------------------------------------------- decoders, stream


def benchmark_decode(cfg: Config, num_clips: int = 20) -> dict[str, float]:
    """Print CPU milliseconds per clip of every decoder; returns how many times the first takes."""
    results, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side, frames in ((64, 32), (256, 300)):
            raw, out = Path(folder) / f"raw{side}", Path(folder) / f"pack{side}"
            raw.mkdir()
            for i in range(4):
                draw_video(raw / f"{i}.mp4", i, frames)
            pack(raw, out, short_side=side, progress=False, near=False)
            packs = {name: Pack(out, decoder=name) for name in installed_decoders()}

            def decode(packed: Pack) -> float:
                start = time.process_time()
                for i in range(num_clips):
                    record = packed.record(i % len(packed))
                    rng = counter_rng(cfg.seed, i)
                    packed.frames(record, dense_indices(record["frames"], 16, 4, rng))
                return (time.process_time() - start) / num_clips

            seconds = interleave({n: partial(decode, p) for n, p in packs.items()}, cfg.rounds)
            for name, s in seconds.items():
                results[f"{name} {side}"] = s / seconds["pyav"]
                what = f"{name}, {frames} frames of {side} pixels"
                rows[what] = f"{1000 * s:6.1f} ms  {s / seconds['pyav']:5.2f}x"
    log.print_table("decoding 16 frames, one clip (CPU time)", rows)
    return results


def benchmark_stream(cfg: Config) -> dict[str, list[tuple[float, float]]]:
    """Print clips/s of an epoch from here and from far away; returns all rounds."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        for i in range(6):
            draw_video(raw / f"{i}.mp4", i)
        found = measure(raw, SPEC, cfg.rounds, cfg.seed)
    log.print_table("an epoch of the loader, medians", rows_of(found))
    return found


def main(cfg: Config) -> dict:
    """Run the chosen parts; returns the ratios."""
    if cfg.out and is_there(cfg.out):
        raise ValueError(f"--out {cfg.out} exists already: give another name")
    results: dict = {"config": dataclasses.asdict(cfg)}
    parts: dict[str, Callable[[Config], dict]] = {
        "loader": benchmark_loader, "step": benchmark_step, "frames": benchmark_frames,
        "decode": benchmark_decode, "stream": benchmark_stream,
    }  # fmt: skip
    for name, part in parts.items():
        if cfg.what == name or (cfg.what == "all" and name in ("loader", "step")):
            results[name] = part(cfg)
    if cfg.out:
        log.write_json(Path(cfg.out), results)
    return results


if __name__ == "__main__":
    command(main)
