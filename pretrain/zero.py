"""DeepSpeed's ZeRO behind `pretrain.engine`: what a launch may ask of it, and what it needs.

Stage 1 shares out the optimizer's moments, stage 2 the gradients too, stage 3 the weights too.
Weights are float32 and autocast computes in bf16, as under the other engines. Tried with DeepSpeed
0.19.8, two gaps of which are filled here: it cannot write a state whose last part is padded (stage
3), nor find the moments of a second group of parameters (stages 1 and 2).
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.files import read_json
from pretrain.sharded import Part

# Of the section zero_optimization: what changes how long a step takes and nothing else; true or
# false, or else the least that a number of values may be.
SWITCHES = {
    "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions",
    "round_robin_gradients",
}  # fmt: skip
SIZES = {
    "reduce_bucket_size": 1,
    "allgather_bucket_size": 1,
    "sub_group_size": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def asked_zero(optimizer: str) -> dict[str, Any]:
    """The section zero_optimization that the launch configuration asks for.

    Args:
        optimizer: of the run.

    Raises:
        ValueError: it asks for something else too, or for what is not supported; DeepSpeed is not
            installed or cannot take this optimizer.
    """
    if optimizer != "adamw":
        raise ValueError(
            f"DeepSpeed trains with --optimizer adamw here, not with {optimizer}: give that, or "
            "use launch/fsdp2.yaml"
        )
    section: dict[str, Any] = {}
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() != "none":
        asked = {k: v for k, v in read_json(Path(file)).items() if v != "auto"}
        section = asked.pop("zero_optimization", {})
        if asked or not isinstance(section, dict):
            raise ValueError(
                f"{file}: {next(iter(asked), 'zero_optimization')!r:.60} is not supported; recipes "
                "decide precision, optimizer, schedule, clipping and batches by their flags: leave "
                "zero_optimization alone there"
            )
        section = {k: v for k, v in section.items() if v != "auto"}
    elif "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ:
        text = os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]
        section = {"stage": int(text) if text in ("1", "2", "3") else text}
    if other := sorted(map(str, section.keys() - {"stage", *SWITCHES, *SIZES})):
        raise ValueError(
            f"DeepSpeed's {other[0]!r:.60} is not supported here: "
            "launch/deepspeed_zero3.yaml has what is"
        )
    stage = section.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed with zero_stage: {stage!r:.20}: give 1, 2 or 3, as in "
            "launch/deepspeed_zero2.yaml"
        )
    for name, value in section.items():
        if name in SWITCHES and type(value) is not bool:
            raise ValueError(f"DeepSpeed's {name}: {value!r:.40}: write true or false")
        if name in SIZES and not _is_size(value, SIZES[name]):
            raise ValueError(
                f"DeepSpeed's {name}: {value!r:.40}: give a whole number from {SIZES[name]}"
            )
    if not find_spec("deepspeed"):
        raise ValueError("DeepSpeed is not installed: pip install 'muybridge[deepspeed]'")
    return section


def _is_size(value: object, least: int) -> bool:
    """Whether this is a whole number of at least `least`; DeepSpeed's files write 5e8, too."""
    if type(value) not in (int, float) or not isinstance(value, int | float):
        return False
    return least <= value < 2**63 and value == int(value)


def begin(
    model: nn.Module, optimizer: torch.optim.Optimizer, section: dict[str, Any],
    device: torch.device,
) -> Any:  # fmt: skip
    """Hand a model and its optimizer to DeepSpeed, in the processes that have met already.

    Args:
        model: on the device.
        optimizer: over its parameters, AdamW.
        section: as `asked_zero` gave it.
        device: of this process.

    Returns:
        its engine; scalars of the model have shape (1,) from now on, since it knows no others.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it guesses, and warns
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A faster gloo, at the price of minutes of compiling in every new environment.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    for parameter in model.parameters():
        if parameter.ndim == 0:
            parameter.data = parameter.data.reshape(1)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it only multiplies this
        "gradient_accumulation_steps": 1,  # `sync` says where a step ends
        "zero_optimization": section,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, clip_grad: float, factor: float) -> float:
    """What `Engine.step` does."""
    zero = engine.optimizer
    if factor != 1:
        for gradients in zero.averaged_gradients.values():
            if gradients:
                torch._foreach_mul_([g for g in gradients if g is not None], factor)
    zero.clip_grad = clip_grad
    engine.step()
    return math.nan if zero.overflow else float(engine.get_global_grad_norm())


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager:
    """Have parameters in one piece on every process; all have to call this."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def weights_of(values: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Part]:
    """What this process holds of weights and buffers.

    Args:
        values: those of the model in `begin`, by name.
        shapes: those they had before.
    """
    return {
        name: _own(value.ds_tensor.detach(), shapes[name])
        if hasattr(value, "ds_tensor")
        else Part(value.detach(), 0, shapes[name], shared=False)
        for name, value in values.items()
    }


def moments_of(
    engine: Any, parameters: Iterable[tuple[str, nn.Parameter]], shapes: dict[str, torch.Size]
) -> dict[str, Part]:
    """What this process holds of what the optimizer remembers, by `parameter.key`.

    Args:
        engine: of `begin`.
        parameters: all that it has, by name.
        shapes: those they had before `begin`.
    """
    states = engine.optimizer.optimizer.state
    if not states:
        return {}
    _link(engine)
    steps = next(iter(states.values()))["step"]
    found = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            found[f"{name}.step"] = Part(steps, 0, steps.shape, shared=False)
            for key in MOMENTS:
                found[f"{name}.{key}"] = _moment(engine, parameter, key, shapes[name])
    return found


def _moment(engine: Any, parameter: Any, key: str, shape: torch.Size) -> Part:
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_optimizer_state

        return _own(safe_get_local_optimizer_state(parameter, key), shape)
    if (mapping := parameter._hp_mapping) is None:  # others have all of it
        return Part(torch.empty(0), 0, shape)
    return Part(mapping.get_optim_state_fragment(key), mapping.lp_fragment_address.start, shape)


def _own(values: Tensor, shape: torch.Size) -> Part:
    """This process's part of what stage 3 divides into equal parts; the last ones have padding."""
    whole = math.prod(shape)
    start = min(values.numel() * dist.get_rank(), whole)
    return Part(values[: whole - start], start, shape)


@contextmanager
def filling(engine: Any, parameters: Iterable[Any]) -> Iterator[None]:
    """Let what `weights_of` and `moments_of` gave be written to; all processes have to call this.

    Args:
        engine: of `begin`.
        parameters: all that it has.
    """
    from deepspeed import utils as tools

    zero = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    kept = zero.persistent_parameters if sharded else []  # small ones, whole on every process
    if kept:
        kept[0].partition(kept)
    yield
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if sharded:
            tools.safe_get_local_fp32_param(parameter).data.copy_(parameter.ds_tensor)
        else:
            tools.safe_set_full_fp32_param(parameter, parameter.data)
    if kept:
        kept[0].all_gather(kept)
    states = list(zero.optimizer.state.values())
    for state in states[1:]:
        state["step"].copy_(states[0]["step"])


def begin_moments(engine: Any) -> None:
    """Make what the optimizer remembers, which is nothing before a first step."""
    zero = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    flat = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    for part in flat:
        zero.optimizer.state[part] = {
            "step": torch.zeros((), device=part.device),
            **{key: torch.zeros_like(part) for key in MOMENTS},
        }


def write(engine: Any, values: dict[nn.Parameter, Tensor]) -> None:
    """Give parameters values, whole, on every process alike; all processes have to call this."""
    from deepspeed import utils as tools
    from deepspeed import zero as zeros

    parameter: Any
    for parameter, value in values.items():
        if engine.zero_optimization_stage() < 3:
            parameter.data.copy_(value)
            if parameter.requires_grad:
                tools.safe_set_full_fp32_param(parameter, parameter.data)
            continue
        with zeros.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            tools.safe_get_local_fp32_param(parameter).data.copy_(parameter.ds_tensor)


def _link(engine: Any) -> None:
    """Let parameters find their moments: DeepSpeed does so after the first group's first step."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
