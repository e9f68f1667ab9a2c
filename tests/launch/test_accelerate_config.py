"""Shipped configurations are what accelerate understands; wrong ones are refused with what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from memfactory.errors import RecipeError, RecipeErrors
from memfactory.launch.accelerate_config import find_config, merged, names, precision_errors, read_config
from memfactory.launch.memory import Sharding

SHIPPED = {
    "cpu": Sharding.DDP,
    "single_gpu": Sharding.NONE,
    "ddp": Sharding.DDP,
    "fsdp2": Sharding.FSDP,
    "fsdp2_offload": Sharding.FSDP,
    "zero1": Sharding.ZERO1,
    "zero2": Sharding.ZERO2,
    "zero3": Sharding.ZERO3,
    "zero3_offload": Sharding.ZERO3,
}


def test_the_shipped_ones_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sorted(names()) == sorted(SHIPPED)
    assert find_config("launch/zero3.yaml") == find_config("zero3") == find_config("zero3.yaml")
    (tmp_path / "launch").mkdir()
    own = tmp_path / "launch" / "zero3.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert read_config("zero3").path == own, "yours come first"
    with pytest.raises(RecipeError, match=r"(?s)no such configuration.*did you mean 'zero3'"):
        find_config("zreo3")


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_takes_what_is_written(name: str, tmp_path: Path) -> None:
    settings = read_config(name)
    assert settings.sharding is SHIPPED[name]
    processes = 1 if settings.single else 16
    deepspeed = tmp_path / "deepspeed.json"
    values = merged(
        settings,
        processes=processes,
        nodes=1 if settings.single else 2,
        port=1234,
        train={"bf16": True},
        deepspeed=deepspeed,
    )
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(values))
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == processes
    assert arguments.main_process_port == 1234
    assert arguments.use_deepspeed == settings.deepspeed_engine
    assert arguments.use_fsdp == (settings.sharding is Sharding.FSDP)
    # the launcher that starts several processes, and not the simple one, which starts one
    assert arguments.multi_gpu == (settings.sharding is Sharding.DDP)
    assert not arguments.cpu
    if settings.deepspeed_engine:
        assert arguments.deepspeed_config_file == str(deepspeed)
        assert arguments.deepspeed_multinode_launcher == "standard", "pdsh would need ssh between the nodes"
        assert settings.deepspeed is not None
        assert "mixed_precision" not in values, "accelerate refuses it beside DeepSpeed's own file"
    else:
        assert values["mixed_precision"] == "bf16"
    if settings.sharding is Sharding.FSDP:
        assert arguments.fsdp_version == 2


def test_the_offloads_are_seen() -> None:
    assert read_config("zero3_offload").offloads("param")
    assert read_config("zero3_offload").offloads("optimizer")
    assert not read_config("zero3").offloads("optimizer")
    assert read_config("fsdp2_offload").offloads("param")
    assert read_config("fsdp2_offload").offloads("optimizer")
    assert not read_config("fsdp2").offloads("param")


def write(folder: Path, **values) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU"} | values))
    return str(file)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_proceses": 2}, "did you mean 'num_processes'"),
        ({"distributed_type": "MULTI_CPU"}, "use_cpu: true"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_versoin": 2}}, "did you mean 'fsdp_version'"),
        ({"distributed_type": "MEGATRON_LM"}, "use one of"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "no.json"}},
            "no file no.json",
        ),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "use 0, 1, 2 or 3"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "only LOCAL_MACHINE"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, values: dict, words: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        read_config(write(tmp_path, **values))
    assert words in str(caught.value)


def test_keys_that_accelerate_refuses_beside_deepspeeds_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    plugin = {"deepspeed_config_file": "ds.json"}
    assert (
        read_config(write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=plugin)).sharding is Sharding.ZERO1
    )
    both = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=plugin | {"zero_stage": 3})
    with pytest.raises(RecipeErrors, match=r"(?s)zero_stage: not beside.*set it in ds.json"):
        read_config(both)


@pytest.mark.parametrize(
    ("said", "train", "flag"),
    [
        ("bf16", {}, "train.bf16=true"),
        ("no", {"bf16": True}, "train.bf16=false"),
        (False, {"bf16": True}, "train.bf16=false"),  # a bare `no` in YAML
        ("fp16", {"bf16": True}, "train.fp16=true train.bf16=false"),
        ("fp8", {"bf16": True}, "leave mixed_precision out"),
    ],
)
def test_precision_is_the_recipes(tmp_path: Path, said: object, train: dict, flag: str) -> None:
    [error] = precision_errors(read_config(write(tmp_path, mixed_precision=said)), train)
    assert flag in error.fix
    assert precision_errors(read_config(write(tmp_path)), train) == []


def test_precision_in_deepspeeds_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True}}))
    file = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": "ds.json"})
    [error] = precision_errors(read_config(file), {"bf16": True})
    assert "train.fp16=true train.bf16=false" in error.fix
    assert precision_errors(read_config("zero3"), {"bf16": True}) == []
