"""The files for other schedulers are valid there: against the schemas of their own projects."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from memfactory.plugins import shipped

SCHEMAS = Path(__file__).parent / "schemas"
FILES = {"kubernetes-job.yaml": "kubernetes-job-1.37.json", "skypilot.yaml": "skypilot-task-0.14.1.json"}


def problems(file: dict, schema: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads((SCHEMAS / schema).read_text(encoding="utf-8")))
    return [error.message for error in validator.iter_errors(file)]


def load(name: str) -> dict:
    return yaml.safe_load((shipped("launch") / "cluster" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_valid(name: str) -> None:
    assert problems(load(name), FILES[name]) == []


def test_the_schemas_see_a_slip() -> None:
    job = load("kubernetes-job.yaml")
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    assert problems(job, FILES["kubernetes-job.yaml"])
    task = load("skypilot.yaml")
    task["resources"]["acelerators"] = "H100"
    assert problems(task, FILES["skypilot.yaml"])


def test_the_container_file_names_files_that_are_there() -> None:
    root = Path(__file__).parents[2]
    text = (shipped("launch") / "cluster" / "Containerfile").read_text(encoding="utf-8")
    copied = [line.split()[1] for line in text.splitlines() if line.startswith("COPY")]
    assert copied
    assert all((root / name).exists() for name in copied)
