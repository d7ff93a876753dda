"""How the processes of a launch train one model together: alone, DDP, FSDP2 or DeepSpeed's ZeRO.

    engine = Engine(cfg.machine, "adamw", model)       # before the data: refuses what it cannot
    engine.start()                     # joins the other processes
    wrapped = engine.prepare(model, make_optimizers)
    for i in range(accumulate):
        engine.sync(last=i == accumulate - 1)          # before the forward pass
        engine.backward(wrapped(...) / accumulate)
    norm = engine.step(clip_grad)

The configuration that `accelerate launch` was given decides which it is; launch/README.md has a
table. accelerate starts the processes and knows device, precision and DDP; sharding (FSDP2) is
torch's `fully_shard`, called here, and DeepSpeed is called in pretrain/zero.py.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from pretrain import zero
from pretrain.checkpoint import load_checkpoint, moments_of, moments_to_fill, weights_of
from pretrain.device import autocast_dtype
from pretrain.environment import flag_of
from pretrain.optim import update
from pretrain.processes import asked_processes, computes_on_gpu, start_accelerator
from pretrain.settings import Machine
from pretrain.sharded import Part, to_write, whole

# What the launcher's configuration may say of FSDP; nothing where nothing is listed. FSDP 2 has one
# way of some of these, which accelerate sets whatever it was asked for.
FSDP_CHOICES = {
    "FSDP_VERSION": ("2",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP",),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (),
    "FSDP_IGNORED_MODULES": (),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "false"),
    "FSDP_SHARDING_STRATEGY": ("FULL_SHARD",),
    "FSDP_MIN_NUM_PARAMS": ("100000000",),  # of a policy that is refused; accelerate's default
    "FSDP_BACKWARD_PREFETCH": ("NO_PREFETCH",),
    "FSDP_FORWARD_PREFETCH": ("false",),
    # Each process writes what it holds; accelerate says FULL_STATE_DICT where nothing is said.
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "FSDP_USE_ORIG_PARAMS": ("true",),
    # Every process reads the weights itself, then the main one's are given to all; a model is not
    # so large here that reading it once would help.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("true", "false"),
    "FSDP_SYNC_MODULE_STATES": ("true",),
}
# Of DeepSpeed: what must not be on.
DEEPSPEED_OFF = (
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES",
)
# What else a launcher may ask of accelerate that recipes decide themselves, and how.
RECIPES_DECIDE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "--batch-size and --micro-batch"),
    "ACCELERATE_GRADIENT_CLIPPING": (("none", "auto"), "--clip-grad"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "--compile of videomae.py"),
}
KINDS = {"single": "", "ddp": "DDP", "fsdp2": "FSDP2", "zero": "DeepSpeed ZeRO"}


def asked_kind(machine: Machine) -> str:
    """The engine that the launcher's configuration asks for: a name in `KINDS`.

    Args:
        machine: its precision.

    Raises:
        ValueError: the configuration asks for what these recipes cannot do, or do not decide so.
    """
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
        ("ACCELERATE_USE_TP", "tensor parallelism"),
    ):
        if flag_of(name):
            raise ValueError(
                f"the launch configuration asks for {what}, which this version does not support: "
                "use launch/fsdp2.yaml to shard a model, or launch/gpus.yaml (DDP)"
            )
    for name, (choices, flags) in RECIPES_DECIDE.items():
        _refuse_other(name, choices, f"in these recipes {flags} decide that")
    on_gpu = computes_on_gpu()
    dtype = autocast_dtype(torch.device("cuda" if on_gpu else "cpu"), machine.precision)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16" if dtype else "no"):
        raise ValueError(
            f"the launch configuration says mixed_precision: {asked} and this run computes in "
            f"{'bf16' if dtype else 'fp32'}: write 'no' there, --precision decides (bf16 or fp32)"
        )
    several = asked_processes() > 1
    sharded, deepspeed = flag_of("ACCELERATE_USE_FSDP"), flag_of("ACCELERATE_USE_DEEPSPEED")
    if sharded and deepspeed:
        raise ValueError(
            "the launch configuration asks for FSDP and for DeepSpeed: use launch/fsdp2.yaml or "
            "launch/deepspeed_zero3.yaml, and unset the other's ACCELERATE_USE_... variable"
        )
    if deepspeed:
        for name in DEEPSPEED_OFF:
            _refuse_other(name, ("false",), "launch/deepspeed_zero3.yaml has what is supported")
        return "zero" if several else "single"
    if not sharded:
        return "ddp" if several else "single"
    for name in sorted(name for name in os.environ if name.startswith("FSDP_")):
        choices = FSDP_CHOICES.get(name, ())
        _refuse_other(name, choices, "launch/fsdp2.yaml has what is supported")
    return "fsdp2" if several else "single"  # one process has nothing to share


def _refuse_other(name: str, choices: tuple[str, ...], remedy: str) -> None:
    """Refuse a value of the launcher's that is none of some; case does not matter."""
    value = os.environ.get(name)
    if value is not None and value.lower() not in ["", "none", *map(str.lower, choices)]:
        option = name.lower().removeprefix("accelerate_")
        wanted = f", not {' or '.join(choices)}" if choices else ""
        raise ValueError(f"the launch configuration says {option}: {value}{wanted}; {remedy}")


class Engine:
    """One of several ways to train a model on the processes of a launch.

    Args:
        machine: precision and threads.
        optimizer: "adamw", "muon" or "sgd".
        model: what it will train, or the part that has all blocks.
        recompute: forget what happens inside blocks, and compute it again in the backward pass.
        compile: torch.compile it: the whole, or where it is sharded each block.

    Attributes:
        kind: a name in `KINDS`.
        accelerator: of accelerate: the processes, their device and precision; after `start`.
        device: where this process computes; after `start`.
        processes: how many there are; after `start`.
        place: the number of this one, from 0; after `start`.
        writers: the processes of which each writes what it holds into a checkpoint, for a `Saver`
            alone; None: the main one writes; after `start`.
        model: all that a run saves, as the recipe made it; after `prepare`.
        learns: the part of it that is trained; after `prepare`.
        optimizers: over its parameters; after `prepare`.

    Raises:
        ValueError: as `asked_kind` and `zero.asked_zero`; or the model has no blocks for that.
    """

    def __init__(
        self, machine: Machine, optimizer: str, model: nn.Module,
        recompute: bool = False, compile: bool = False,
    ):  # fmt: skip
        self.kind = asked_kind(machine)
        # One process has nothing to share, but what cannot be obeyed is refused there too.
        self._zero = zero.asked_zero(optimizer) if flag_of("ACCELERATE_USE_DEEPSPEED") else {}
        for flag, needed in (
            ("--compile of a sharded model", compile and self._shards),
            ("--checkpoint-blocks", recompute),
        ):
            if needed and not blocks_of(model):
                raise ValueError(f"{flag} needs a model of transformer blocks, and this has none")
        self._machine, self._compile, self._recompute = machine, compile, recompute
        self._wrapped: Any
        self._norms: tuple[list[str], Tensor] = [], torch.zeros(0)  # of gradients, by parameter

    @property
    def name(self) -> str:
        """In words; "" of a single process."""
        return KINDS[self.kind] + (f" {self._zero['stage']}" if self.kind == "zero" else "")

    @property
    def _shards(self) -> bool:
        return self.kind in ("fsdp2", "zero")

    def start(self) -> None:
        """Join the other processes.

        Raises:
            ValueError: as `start_accelerator`.
        """
        # accelerate's own ways run on no CPU, and save neither atomically nor across engines; it is
        # not to begin with them.
        names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        asked = {name: os.environ.pop(name) for name in names if name in os.environ}
        try:
            self.accelerator = start_accelerator(self._machine)
        finally:
            os.environ.update(asked)
        self.device = self.accelerator.device
        self.processes = self.accelerator.num_processes
        self.place = self.accelerator.process_index
        # One of its own, for what a thread tells the others while training goes on.
        self.writers: dist.ProcessGroup | None = None
        if self._shards:
            group = dist.new_group(backend="gloo")
            assert not isinstance(group, int)  # which says that this process is not in it
            self.writers = group

    def prepare(
        self, model: nn.Module, make_optimizers: Callable[[], list[Optimizer]],
        learns: nn.Module | None = None, beside: nn.Module | None = None,
    ) -> nn.Module:  # fmt: skip
        """Spread a model over the processes.

        Args:
            model: all that a run saves.
            make_optimizers: called once the parameters are where they stay.
            learns: the part of it that is trained; None: all.
            beside: a part whose parameters mirror those: their moving average.

        Returns:
            the part that learns, wrapped and in training mode: what the recipe gives batches.
        """
        self.model, self.learns = model, model if learns is None else learns
        if self._shards:
            self._begin_alike()
            # Plain, before hooks and shards, for what one process does alone. It has no numbers
            # until then.
            self._copy = copy.deepcopy(model).to("meta")
            self._shapes = {name: value.shape for name, value in model.state_dict().items()}
        for block in blocks_of(self.learns):
            if self._recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if self._compile and self._shards:
                block.compile()
        if self._shards:
            # Only autocast: accelerate leaves the spreading to this.
            self._wrapped = self.accelerator.prepare_model(self.learns, evaluation_mode=True)
        if self.kind == "zero":
            model.to(self.device)
            self.optimizers = make_optimizers()
            (optimizer,) = self.optimizers
            self._wrapped = zero.begin(self._wrapped, optimizer, self._zero, self.device)
            self._wrapped.train()  # which does not return it
            return self._wrapped
        if self.kind == "fsdp2":
            for part in (self.learns, beside) if beside else (self.learns,):
                self._shard(part)
            model.to(self.device)
            self.optimizers = make_optimizers()
            _part_whole_from_sharded(self.optimizers)
            return self._wrapped.train()
        model.to(self.device)
        self.optimizers = make_optimizers()
        called = torch.compile(self.learns) if self._compile else self.learns
        self._wrapped = self.accelerator.prepare_model(called)
        return self._wrapped.train()  # what was loaded is in evaluation mode

    @torch.no_grad()
    def _begin_alike(self) -> None:
        """Give every process the main one's weights, as DDP does: theirs may be drawn otherwise."""
        for value in (*self.model.parameters(), *self.model.buffers()):
            shared = value.detach().to(self.device)
            dist.broadcast(shared, 0)
            value.copy_(shared)

    def _shard(self, part: nn.Module) -> None:
        """Give every process its rows of each parameter; scalars, without rows, stay whole."""
        mesh = init_device_mesh(self.device.type, (self.processes,))
        scalars = {p for p in part.parameters() if p.ndim == 0}
        # Rows are gathered in float32: autocast has the rest, the same numbers as under DDP. In
        # bf16 half as much would travel, and norms, which autocast leaves in float32 on the CPU,
        # would refuse their weights.
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        for block in blocks_of(part):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard, ignored_params=scalars)
        fully_shard(part, mesh=mesh, ignored_params=scalars)

    def sync(self, last: bool) -> None:
        """Say before a forward pass whether the gradient is shared after it: of a step's last."""
        if self.kind == "ddp":
            self._wrapped.require_backward_grad_sync = last
        elif self.kind == "fsdp2":
            self._wrapped.set_requires_gradient_sync(last)
        elif self.kind == "zero":
            self._wrapped.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss."""
        if self.kind == "zero":
            self._wrapped.backward(loss)
        else:
            loss.backward()

    def step(self, clip_grad: float, factor: float = 1.0) -> float:
        """Scale and clip the gradient, take one step and free the gradient.

        Args:
            clip_grad: the largest gradient norm; 0: no clipping.
            factor: on the gradient, which is the mean over the processes.

        Returns:
            the gradient's norm over all processes; if it is not finite the weights were left alone,
            by all of them.
        """
        if self.kind == "zero":
            return zero.step(self._wrapped, clip_grad, factor)
        learning = {n: p for n, p in self.learns.named_parameters() if p.grad is not None}
        if self.kind == "fsdp2":
            return self._step_sharded(learning, clip_grad, factor)
        if factor != 1:
            gradients = [p.grad for p in learning.values() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        norm, norms = update(self.optimizers, learning.values(), clip_grad)
        self._norms = list(learning), norms
        return norm

    def _step_sharded(
        self, learning: dict[str, nn.Parameter], clip_grad: float, factor: float
    ) -> float:
        gradients = {name: p.grad for name, p in learning.items() if p.grad is not None}
        sharded: dict[str, Tensor] = {n: g for n, g in gradients.items() if isinstance(g, DTensor)}
        scalars = {n: g for n, g in gradients.items() if not isinstance(g, DTensor)}
        for gradient in scalars.values():  # nobody shared those
            dist.all_reduce(gradient)
            gradient.div_(self.processes)
        # No operation takes both kinds.
        kinds = [list(kind.values()) for kind in (sharded, scalars) if kind]
        if factor != 1:
            for kind in kinds:
                torch._foreach_mul_(kind, factor)
        norms = torch.cat([whole(torch.stack(torch._foreach_norm(kind))) for kind in kinds])
        self._norms = [*sharded, *scalars], norms
        norm = torch.linalg.vector_norm(norms).item()
        if clip_grad and norm > clip_grad:
            for kind in kinds:
                torch._foreach_mul_(kind, clip_grad / (norm + 1e-6))
        for optimizer in self.optimizers:
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
        return norm

    def gradient_norms(self) -> dict[str, float]:
        """The gradient's norm in the last step by block, before clipping, as a run's log has it.

        Parameters outside of blocks count by the part that they are in. The step knows these norms:
        they cost nothing. Under DeepSpeed there are none: it holds gradients in flat parts.
        """
        names, norms = self._norms
        squares: dict[str, float] = {}
        blocks = block_names(self.learns)
        for name, norm in zip(names, norms.tolist(), strict=True):
            part = next((b for b in blocks if name.startswith(f"{b}.")), None)
            part = part or ".".join(name.split(".")[:-1][:3]) or name
            squares[part] = squares.get(part, 0.0) + norm**2
        return {f"grad_norm/{part}": square**0.5 for part, square in squares.items()}

    def held(self) -> tuple[dict[str, Part], dict[str, Part]]:
        """What this process has to write of weights and optimizers' moments, by name; no copies."""
        if not self._shards:
            if not self.accelerator.is_main_process:
                return {}, {}
            return weights_of(self.model), moments_of(self.model, self.optimizers)
        # What all have alike they share out; buffers, such as statistics of batches, may differ.
        alike = {name for name, _ in self.model.named_parameters()}
        weights = to_write(self._weights_held(), alike, self.place, self.processes)
        return weights, to_write(self._moments_held(), set(), self.place, self.processes)

    def _weights_held(self) -> dict[str, Part]:
        if self.kind == "zero":
            return zero.weights_of(self.model.state_dict(keep_vars=True), self._shapes)
        return weights_of(self.model)

    def _moments_held(self) -> dict[str, Part]:
        if self.kind == "zero":
            return zero.moments_of(self._wrapped, self.model.named_parameters(), self._shapes)
        return moments_of(self.model, self.optimizers)

    def load(self, folder: Path) -> dict:
        """Put a checkpoint into model and optimizers; every process reads the parts that it holds.

        Args:
            folder: of a checkpoint, by whatever engine and number of processes.

        Returns:
            its state.

        Raises:
            CheckpointError: as `load_checkpoint`.
        """
        if self.kind != "zero":
            begin = moments_to_fill(self.model, self.optimizers)
            return load_checkpoint(folder, self._weights_held(), begin)
        moments: dict[str, Part] = {}

        def begin_zero(name: str) -> dict[str, Part]:
            if not moments:
                zero.begin_moments(self._wrapped)
                moments.update(self._moments_held())
            keys = ("step", *zero.MOMENTS) if f"{name}.step" in moments else ()
            return {key: moments[f"{name}.{key}"] for key in keys}

        with zero.filling(self._wrapped, list(self.model.parameters())):
            return load_checkpoint(folder, self._weights_held(), begin_zero)

    @torch.no_grad()
    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and buffers by name, whole, one at a time."""
        for name, value in self.model.state_dict(keep_vars=True).items():
            if self.kind == "zero":  # whose parameters are parts of larger tensors, or come and go
                with zero.gathered([value]):
                    yield name, value.detach().clone().reshape(self._shapes[name])
            else:
                yield name, whole(value.detach())

    def gathered(self) -> AbstractContextManager:
        """Have the parameters that learn at hand in one piece or, under FSDP2, by rows.

        Every process has to take part, and may read them.
        """
        if self.kind != "zero":
            return nullcontext()
        return zero.gathered(list(self.learns.parameters()))

    @contextmanager
    def changing(self, *parameters: nn.Parameter) -> Iterator[None]:
        """Let a recipe change parameters in place, on every process alike."""
        if self.kind != "zero":
            yield
            return
        with zero.gathered(list(parameters)):
            yield
            values = {p: p.detach().clone() for p in parameters}
        zero.write(self._wrapped, values)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its weights in one piece, to be scored and exported.

        Every process has to take part, and each gets it: the model itself where it is not sharded,
        else a copy, which has numbers while it is used. Statistics of batches are the main
        process's.
        """
        if self.kind in ("single", "ddp"):
            for buffer in self.model.buffers() if self.kind == "ddp" else ():
                dist.broadcast(buffer, 0)
            yield self.model
            return
        plain = self._copy.to_empty(device=self.device)
        target: Mapping[str, Tensor] = plain.state_dict()
        for name, value in self._weights():
            target[name].copy_(value)
        # Some buffers are constants, in no state.
        for buffer, own in zip(plain.buffers(), self.model.buffers(), strict=True):
            dist.broadcast(buffer.copy_(own), 0)
        yield plain
        plain.to("meta")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model's transformers, the largest ones where there are blocks in blocks.

    They are the elements of lists and sequences that are named `blocks` or `..._blocks`, as here
    and in timm, or `resblocks`, as in open_clip. A model without any is one block.
    """
    return [model.get_submodule(name) for name in block_names(model)]


def block_names(model: nn.Module) -> list[str]:
    """The names of `blocks_of`."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("blocks") and isinstance(module, nn.ModuleList | nn.Sequential):
            inside = any(name.startswith(f"{outer}.") for outer in found)
            found += [] if inside else [f"{name}.{n}" for n, _ in module.named_children()]
    return found


def _part_whole_from_sharded(optimizers: list[Optimizer]) -> None:
    """Give scalars, which are not sharded, groups of their own: no operation takes both kinds."""
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            scalars = [p for p in group["params"] if not isinstance(p, DTensor)]
            if scalars and len(scalars) < len(group["params"]):
                group["params"] = [p for p in group["params"] if isinstance(p, DTensor)]
                optimizer.add_param_group(group | {"params": scalars})
