"""What a launch configuration asks for: which engine it gets, and what is refused."""

import pytest

from pretrain.engine import Engine, blocks_of
from pretrain.settings import Machine

MACHINE = Machine(precision="fp32", threads=1)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def asked(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Engine(MACHINE).kind


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "ddp"),
        ({"WORLD_SIZE": "1"}, "single"),
        (FSDP2, "fsdp2"),
        (FSDP2 | {"WORLD_SIZE": "1"}, "single"),
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
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*fsdp2.yaml"),
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


def test_the_precision_of_both_may_be_the_same(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert Engine(Machine(precision="bf16")).kind == "ddp"


def test_blocks_are_those_of_the_transformers_not_blocks_within_blocks():
    import torch
    from torch import nn

    from pretrain.videomae import VideoMAE
    from pretrain.vit import VideoTransformer

    model = VideoMAE(VideoTransformer(16, 2, 2, 4, 16, 8), 8, 1, 2)
    assert blocks_of(model) == [*model.encoder.blocks, *model.decoder_blocks]
    stages = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    outer = nn.Module()
    outer.blocks = stages
    outer.blocks[0].blocks = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of(outer) == [*stages]
    assert blocks_of(torch.nn.Linear(2, 2)) == []
