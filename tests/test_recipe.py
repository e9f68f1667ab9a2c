"""Reading recipes: YAML as people mean it, overrides, the schema."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memfactory.errors import RecipeErrors
from memfactory.plugins import shipped
from memfactory.recipe import Recipe, apply_overrides, load_recipe, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("1e-4", 1e-4),
            ("1E5", 1e5),
            ("-3.5e-2", -0.035),
            ("1.", 1.0),
            (".5", 0.5),
            ("12", 12),
            (".inf", float("inf")),
        ),
        *(
            ("no", "no"),
            ("off", "off"),
            ("yes", "yes"),
            ("true", True),
            ("False", False),
            ("null", None),
            ("e5", "e5"),
        ),
    ],
)
def test_numbers_and_words_are_read_as_people_mean_them(text: str, value: Any) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()))
def test_values_survive_being_written_and_read(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_an_override_takes_a_number_as_python_prints_it(value: float) -> None:
    assert apply_overrides({}, [f"train.learning_rate={value!r}"]) == {"train": {"learning_rate": value}}


def test_overrides_reach_into_sections_and_report_all_that_is_wrong() -> None:
    data = {"train": {"max_steps": 1}, "name": "x", "warmup": None}
    changed = apply_overrides(data, ["train.max_steps=3", "warmup.steps=2", "rewards=[{name: a.b}]"])
    assert changed == {
        "train": {"max_steps": 3},
        "name": "x",
        "warmup": {"steps": 2},
        "rewards": [{"name": "a.b"}],
    }
    assert data["train"] == {"max_steps": 1}
    with pytest.raises(RecipeErrors) as caught:
        apply_overrides(data, ["train", "name.first=1", "=3"])
    assert len(caught.value.errors) == 3


@pytest.mark.parametrize("path", sorted(shipped("recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_open_with_how_to_run_them(path: Any) -> None:
    recipe = load_recipe(path)
    assert Recipe.model_validate(recipe.dump()) == recipe
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("memfactory train" in line for line in head)


def test_the_hash_tells_recipes_apart_and_ignores_the_folder() -> None:
    path = shipped("recipes") / "memagent" / "quickstart.yaml"
    assert load_recipe(path).hash() == load_recipe(path, ["output_dir=elsewhere"]).hash()
    assert load_recipe(path).hash() != load_recipe(path, ["seed=1"]).hash()


def test_a_model_has_one_source() -> None:
    path = shipped("recipes") / "memagent" / "quickstart.yaml"
    with pytest.raises(RecipeErrors, match="exactly one of"):
        load_recipe(path, ["model.name=gpt"])
