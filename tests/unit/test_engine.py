"""What a launch configuration asks for: which engine it gets, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils import launch as environments
from torch import nn

from pretrain.engine import Engine, blocks_of
from pretrain.settings import Machine
from pretrain.videomae import VideoMAE
from pretrain.vit import VideoTransformer

LAUNCH = Path(__file__).parents[2] / "launch"
MACHINE = Machine(precision="fp32", threads=1)
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def asked(monkeypatch, environment, optimizer="adamw"):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Engine(MACHINE, optimizer, nn.Identity()).kind


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "ddp"),
        ({"WORLD_SIZE": "1"}, "single"),
        (FSDP2, "fsdp2"),
        (FSDP2 | {"WORLD_SIZE": "1"}, "single"),
        (ZERO, "zero"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "none"}, "zero"),
        (ZERO | {"WORLD_SIZE": "1"}, "single"),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp2"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "False", "FSDP_OFFLOAD_PARAMS": "False"}, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "ddp"),
    ],
)
def test_the_launch_configuration_chooses_the_engine(environment, kind, monkeypatch):
    assert asked(monkeypatch, environment) == kind


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1.*fsdp2.yaml"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "True"}, "fsdp_activation_checkpointing"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy"),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, "fsdp_transformer_cls_to_wrap: Block"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "FULL_SHARD, not true or false"),
        (FSDP2 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "HYBRID_SHARD, not FULL_SHARD"),
        (FSDP2 | {"FSDP_MIN_NUM_PARAMS": "1000"}, "fsdp_min_num_params: 1000"),
        (FSDP2 | {"FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE"}, "fsdp_backward_prefetch"),
        (FSDP2 | {"FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch"),
        (FSDP2 | {"FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "fsdp_state_dict_type"),
        (FSDP2 | {"FSDP_USE_ORIG_PARAMS": "false"}, "fsdp_use_orig_params: false"),
        (FSDP2 | {"FSDP_WHAT_COMES_NEXT": "5", "WORLD_SIZE": "1"}, "fsdp_what_comes_next: 5"),
        (ZERO | FSDP2, "FSDP and for DeepSpeed"),
        ({"ACCELERATE_USE_TP": "true"}, "tensor parallelism"),
        ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP='maybe': write true or false"),
        ({"ACCELERATE_USE_CPU": ""}, "ACCELERATE_USE_CPU=''"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero_stage: None"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "1"}, "zero_stage: None"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage: '0'"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "²"}, "zero_stage: '²'"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "optimizer_device: cpu"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init: true"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--clip-grad"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "steps: 4, not 1.*--micro-batch"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: 1.0.*--clip-grad"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: INDUCTOR.*--compile"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16.*--precision"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16 .* in fp32"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(environment, words, monkeypatch):
    with pytest.raises(ValueError, match=words):
        asked(monkeypatch, environment)


@pytest.mark.parametrize("text", ["x", "", "2.5", "0", "-1", "²", "1e1", " 2"])
def test_a_number_of_processes_that_is_none_is_refused(text, monkeypatch):
    with pytest.raises(ValueError, match=f"WORLD_SIZE={text!r}, which is no number of processes"):
        asked(monkeypatch, {"WORLD_SIZE": text})


def test_what_accelerate_sets_by_itself_is_taken(monkeypatch, tmp_path):
    file = tmp_path / "asked.yaml"
    more = "auto_wrap_policy: TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap: ''"
    more += "state_dict_type: FULL_STATE_DICT", "cpu_ram_efficient_loading: true"
    more += "activation_checkpointing: false", "offload_params: false"
    lines = [(LAUNCH / "fsdp2.yaml").read_text(), *(f"  fsdp_{line}" for line in more)]
    file.write_text("\n".join(lines))
    given = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    given, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    assert asked(monkeypatch, environments.prepare_multi_gpu_env(given)) == "fsdp2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reduce_bucket_size", -1), ("reduce_bucket_size", "x"), ("allgather_bucket_size", 0),
        ("sub_group_size", 0), ("sub_group_size", True), ("stage3_max_live_parameters", 0.5),
        ("stage3_prefetch_bucket_size", None), ("overlap_comm", "maybe"), ("reduce_scatter", 1),
        ("stage", True), ("stage", 2.0), ("stage", "2"), ("stage", [2]),
    ],
)  # fmt: skip
def test_a_value_of_deepspeed_that_is_none_is_refused(name, value, monkeypatch, tmp_path):
    monkeypatch.setattr("pretrain.zero.find_spec", lambda name: True)
    file = tmp_path / "ds.json"
    environment = ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    good = {"stage": 3, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 0}
    file.write_text(json.dumps({"zero_optimization": good}))
    assert asked(monkeypatch, environment) == "zero"
    file.write_text(json.dumps({"zero_optimization": good | {name: value}}))
    with pytest.raises(ValueError, match=f"{name}: "):
        asked(monkeypatch, environment)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_comm": True}, "bf16": "auto"}, ""),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "'fp16'.*--|flags"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload"),
        ({"zero_optimization": [2]}, "zero_optimization"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_stage: None"),
        ({"train_batch_size": 64}, "train_batch_size"),
    ],
)
def test_a_configuration_file_of_deepspeed(content, words, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }  # fmt: skip
    if not words:
        assert asked(monkeypatch, environment) == "zero"
        return
    with pytest.raises(ValueError, match=words):
        asked(monkeypatch, environment)


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_deepspeed_takes_adamw_alone(optimizer, monkeypatch):
    with pytest.raises(ValueError, match=f"{optimizer}.*fsdp2.yaml"):
        asked(monkeypatch, ZERO, optimizer)
    assert asked(monkeypatch, FSDP2 | {"ACCELERATE_USE_DEEPSPEED": "false"}, optimizer) == "fsdp2"


def test_deepspeed_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("pretrain.zero.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\[deepspeed\]"):
        asked(monkeypatch, ZERO)


ENGINE_OF = {
    "cpu": "single", "cpu_2": "ddp", "gpus": "ddp", "multi_node": "ddp", "fsdp2": "fsdp2",
    "deepspeed_zero1": "zero", "deepspeed_zero2": "zero", "deepspeed_zero3": "zero",
}  # fmt: skip


@pytest.mark.parametrize("file", sorted(p.stem for p in LAUNCH.glob("*.yaml")))
def test_every_launch_file_is_obeyed(file, monkeypatch):
    """As accelerate reads it and tells its processes."""
    path = str(LAUNCH / f"{file}.yaml")
    words = ["--config_file", path, "--main_process_port", "0"]  # that of the file may be taken
    words += [] if ENGINE_OF[file] == "single" else ["--num_processes", "2"]
    words += ["recipes/videomae.py"]
    given, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if ENGINE_OF[file] == "zero":
        pytest.importorskip("deepspeed")
        given.deepspeed_fields_from_accelerate_config = "zero_stage"
        _, told = environments.prepare_deepspeed_cmd_env(given)
        assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == file[-1]
    elif ENGINE_OF[file] == "single":
        _, told = environments.prepare_simple_launcher_cmd_env(given)
        told["WORLD_SIZE"] = "1"
    else:
        told = environments.prepare_multi_gpu_env(given)
    assert asked(monkeypatch, told) == ENGINE_OF[file]


def test_the_precision_of_both_may_be_the_same(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert Engine(Machine(precision="bf16"), "adamw", nn.Identity()).kind == "ddp"


def test_blocks_are_those_of_the_transformers_not_blocks_within_blocks():
    model = VideoMAE(VideoTransformer(16, 2, 2, 4, 16, 8), 8, 1, 2)
    assert blocks_of(model) == [*model.encoder.blocks, *model.decoder_blocks]
    stages = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    outer = nn.Module()
    outer.blocks = stages
    outer.blocks[0].blocks = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of(outer) == [*stages]
    assert blocks_of(torch.nn.Linear(2, 2)) == []


def test_a_model_without_blocks_has_none_to_compile_or_to_compute_again(monkeypatch):
    bare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="--checkpoint-blocks"):
        Engine(MACHINE, "adamw", bare, recompute=True)
    assert Engine(MACHINE, "adamw", bare, compile=True).kind == "ddp"  # which compiles the whole
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--compile"):
        Engine(MACHINE, "adamw", bare, compile=True)


def test_blocks_computed_again_keep_less_and_give_the_same_gradients(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE")
    video = torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)
    order = torch.rand(2, 8).argsort(1)
    kept, gradients = [], []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[-1] += value.numel()
        return value

    for recompute in (False, True):
        torch.manual_seed(0)
        model = VideoMAE(VideoTransformer(16, 3, 2, 4, 16, 8), 8, 1, 2)
        engine = Engine(MACHINE, "adamw", model, recompute)
        engine.start()
        wrapped = engine.prepare(model, list)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss, _ = wrapped(video, order[:, :3], order[:, 3:])
        engine.backward(loss)
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
