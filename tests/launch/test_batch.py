"""The arithmetic is TRL's: what it takes, we take; what it refuses, we refuse with the numbers that work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOConfig

from memfactory.launch import batch as ours
from memfactory.launch.batch import batch, kept


def test_defaults_are_those_of_the_installed_trl() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert defaults["num_generations"] == ours.GENERATIONS
    assert defaults["gradient_accumulation_steps"] == ours.ACCUMULATION
    assert defaults["per_device_train_batch_size"] == ours.PER_DEVICE


@settings(max_examples=150, deadline=None)
@given(
    processes=st.integers(1, 9),
    train=st.fixed_dictionaries(
        {
            "per_device_train_batch_size": st.integers(1, 12),
            "gradient_accumulation_steps": st.integers(1, 4),
            "num_generations": st.integers(2, 8),
        },
        optional={
            "steps_per_generation": st.integers(1, 4),
            "generation_batch_size": st.sampled_from([8, 12, 16, 24, 48, 96]),
            "eval_strategy": st.sampled_from(["no", "steps"]),
            "per_device_eval_batch_size": st.integers(1, 9),
        },
    ),
)
def test_it_is_trls_arithmetic(train: dict, processes: int) -> None:
    found, errors = batch(train, processes)
    world = GRPOConfig.world_size
    values = dict(train)
    if values.get("eval_strategy", "no") != "no":  # as train/config.py fills it in
        values.setdefault("per_device_eval_batch_size", values["num_generations"])
        values["eval_steps"] = 1
    GRPOConfig.world_size = property(lambda self: processes)
    try:
        config = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **values)
    except ValueError:
        assert found is None
        assert errors
        assert all(error.fix for error in errors)
        return
    finally:
        GRPOConfig.world_size = world
    assert errors == []
    assert found is not None
    assert found.generation_batch == config.generation_batch_size
    assert found.steps_per_generation == config.steps_per_generation


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_numbers_it_names_do_work() -> None:
    train = {"per_device_train_batch_size": 4, "num_generations": 16}
    found, [error] = batch(train, 6)
    assert found is None
    processes, size = error.fix.split(" processes, or ")
    for number in numbers(processes.removesuffix(", ...")):
        assert batch(train, number)[1] == []
    assert batch(train | {"per_device_train_batch_size": int(size.split("=")[1])}, 6)[1] == []


def test_a_kept_batch_is_the_same_on_any_number_of_processes() -> None:
    train = {"per_device_train_batch_size": 128, "gradient_accumulation_steps": 2, "num_generations": 8}
    for processes in (1, 2, 4, 8):
        changes, errors = kept(train, processes, 256)
        found, wrong = batch(train | changes, processes)
        assert errors == wrong == []
        assert found is not None
        assert found.optimizer_batch == 256
    changes, [error] = kept(train, 3, 256)
    assert changes == {}
    assert error.fix == "use 1, 2, 4, 8, 16, 32, 64, 128 processes, or --batch 240 or 264"
    assert kept(train, 3, 240)[1] == kept(train, 3, 264)[1] == []


def test_one_episode_a_group_needs_no_groups(tmp_path: Path) -> None:
    from memfactory.train.config import build_config

    train = {"per_device_train_batch_size": 12, "num_generations": 1, "eval_strategy": "steps", "eval_steps": 1}
    found, errors = batch(train, 1)
    config = build_config(train, checkpoints=tmp_path, seed=0, max_completion_length=8)
    assert errors == []
    assert found is not None
    assert found.groups == config.generation_batch_size // config.num_generations == 12
