"""The model card: YAML that the Hub reads, and what a person wants to know before using the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from memfactory.environments.registry import datasets as registered
from memfactory.evaluate.report_compare import shown_number
from memfactory.evaluate.report_numbers import results
from memfactory.evaluate.report_source import EvaluationRow
from memfactory.push.source import Pushed, candidates, on_hub
from memfactory.runs import flat

_HUB_FILE = re.compile(r"hf://datasets/([^/@\s]+/[^/@\s]+)")


def make_card(pushed: Pushed, *, repo: str | None = None, license: str | None = None) -> ModelCard:
    """The card of `pushed`.

    Args:
        repo: its name on the Hub; None: a placeholder stands where it is needed.
        license: as the Hub writes it, e.g. ``apache-2.0``; None: the card says that it is not set.
    """
    recipe = pushed.recipe
    trained_on = hub_datasets(pushed)
    rows = _own_rows(pushed)
    data = ModelCardData(
        base_model=pushed.base,
        datasets=trained_on or None,
        eval_results=[_result(row) for row in rows if row.mean is not None] or None,
        library_name="peft" if pushed.adapter else "transformers",
        license=license,
        model_name=recipe.name,
        pipeline_tag="text-generation",
        tags=["memfactory", "memory", "trl", "grpo", *(["lora"] if pushed.adapter else [])],
    )
    template = resources.files("memfactory.push").joinpath("card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        name=recipe.name,
        base=pushed.base,
        adapter=pushed.adapter,
        repo=repo or "OWNER/NAME",
        license=license,
        agent=recipe.agent.name,
        environment=recipe.environment.name,
        datasets=trained_on,
        rewards=[(cell(reward.name), reward.role or "", reward.weight) for reward in recipe.rewards],
        aggregate=recipe.aggregate.name,
        steps=pushed.summary.get("steps"),
        settings=[(key, value) for key, value in flat(recipe.train).items()],
        before_after=_before_after(pushed),
        head=_head(pushed),
        evaluation=_table(pushed),
        notes=[cell(note) for note in pushed.evaluation.notes] if pushed.evaluation else [],
        versions=list((pushed.summary.get("versions") or {}).items()),
        recipe=yaml.safe_dump(clean_recipe(pushed), sort_keys=False, allow_unicode=True),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # what was left out leaves its lines empty
    return card


def clean_recipe(pushed: Pushed) -> dict[str, Any]:
    """The resolved recipe without the places where it ran: its folder, and the servers it sampled from."""
    recipe = pushed.recipe.dump()
    recipe.pop("output_dir", None)
    recipe.get("rollout", {}).get("vllm", {}).pop("base_urls", None)
    return recipe


def hub_datasets(pushed: Pushed) -> list[str]:
    """Datasets of the Hub that the recipe's environment reads, by name."""
    section = pushed.recipe.environment
    known = registered().get(section.name)
    leaves = list(flat({**(known.options if known else {}), **section.options}).values())
    named = [match for leaf in leaves for match in _HUB_FILE.findall(leaf)]
    path = section.options.get("path") if section.name == "hub" else None
    if isinstance(path, str) and "/" in path and on_hub(path):
        named.append(path)
    return list(dict.fromkeys(named))


def cell(text: object) -> str:
    """`text` as it can stand in a cell of a Markdown table and is not read as HTML or as another cell."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _own_rows(pushed: Pushed) -> list[EvaluationRow]:
    if pushed.evaluation is None:
        return []
    own = candidates(pushed.evaluation, pushed.fingerprint)
    return [row for row in pushed.evaluation.rows if row.candidate in own]


def _result(row: EvaluationRow) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=row.suite,
        dataset_name=row.suite,
        dataset_args={"tasks": row.tasks, "samples": row.samples, "drawn": row.mode},
        metric_type=row.metric,
        metric_name=f"{row.metric}, {row.mode}",
        metric_value=round(float(row.mean or 0), 6),
        metric_args={"low": row.low, "high": row.high, "interval": 0.95},
    )


_HEAD = ("suite", "model", "drawn", "tasks", "metric", "mean [95 %]", "tokens")


def _head(pushed: Pushed) -> list[str]:
    """Columns of the table; those of a judge and of failures only where there is something in them."""
    rows = pushed.evaluation.rows if pushed.evaluation else []
    judged, failed = any(row.judge for row in rows), any(row.failed or row.faults for row in rows)
    return [*_HEAD, *(("judge", "disagree") if judged else ()), *(("failed", "faults") if failed else ())]


def _table(pushed: Pushed) -> list[list[str]]:
    """Every row of the evaluation: the base and baselines are what the numbers are to be read against."""
    head = _head(pushed)
    return [[cells[name] for name in head] for cells in _cells(pushed)]


def _cells(pushed: Pushed) -> Iterable[dict[str, str]]:
    own = candidates(pushed.evaluation, pushed.fingerprint) if pushed.evaluation else []
    for row in pushed.evaluation.rows if pushed.evaluation else []:
        yield {
            "suite": cell(row.suite),
            "model": f"**{cell(row.candidate)}**" if row.candidate in own else cell(row.candidate),
            "drawn": row.mode,
            "tasks": str(row.tasks),
            "metric": cell(row.metric),
            "mean [95 %]": f"{shown_number(row.mean)} [{shown_number(row.low)}, {shown_number(row.high)}]",
            "tokens": f"{row.tokens:.0f}",
            "judge": shown_number(row.judge.get("mean")),
            "disagree": shown_number(row.judge.get("disagree")),
            "failed": f"{row.failed} of {row.episodes}",
            "faults": ", ".join(f"{cell(fault)} {number}" for fault, number in row.faults.items()) or "–",
        }


def _before_after(pushed: Pushed) -> list[tuple[str, str, str]]:
    """What the run itself measured; only of the model that it ended with."""
    if pushed.checkpoint.name != "model":
        return []
    return list(_pairs(results(pushed.summary, [])["modes"]))


def _pairs(modes: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    for mode in modes:
        for row in mode["rows"]:
            name = "accuracy" if row["name"] == "em" else row["name"]
            yield f"{cell(name)}, {mode['mode']}", shown_number(row["before"]), shown_number(row["after"])
