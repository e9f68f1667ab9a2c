"""From a command to an evaluation: recipe, candidates and suites, everything checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import Progress

from memfactory import __version__
from memfactory.agents.baselines import Baseline, BaselineAgent
from memfactory.environments import build_environment
from memfactory.environments.base import Split
from memfactory.environments.overlap import asked_again, shared
from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors
from memfactory.evaluate.candidates import Candidate, apart, check_candidate, find_candidates, on_base, run_recipe
from memfactory.evaluate.evaluation import Plan, evaluate
from memfactory.evaluate.fingerprints import agent_fingerprint, beside_fingerprints
from memfactory.evaluate.folder import EvalFolder
from memfactory.evaluate.preflight import check_context, positions
from memfactory.evaluate.rows import Measured, Mode, Row
from memfactory.evaluate.suites import OWN, Loaded, labels, load_suite
from memfactory.evaluate.table import csv_table, markdown, ordered
from memfactory.policy.base import Sampling
from memfactory.policy.models import load_tokenizer
from memfactory.policy.routing import RoutedPolicy
from memfactory.recipe import EnvironmentSection, PolicySection, load_recipe
from memfactory.reward.catalogue import WeightedDimension, load_dimension
from memfactory.reward.system import RewardSystem
from memfactory.train.learners import Learners
from memfactory.train.policies import beside
from memfactory.train.prepare import Prepared, prepare
from memfactory.train.start import load_policy

VERDICT = "answer.correct_judge"
"""The dimension that `--judge` adds."""


@dataclass(frozen=True)
class Asked:
    """The command, as it was typed."""

    recipe: Path
    overrides: Sequence[str] = ()
    checkpoints: Sequence[Path] = ()
    suites: Sequence[str] = ()
    """See :func:`memfactory.evaluate.suites.load_suite`; empty: the recipe's own held-out tasks."""
    samples: int | None = None
    """Sampled episodes for each task; absent: `eval.samples` of the recipe."""
    tasks: int | None = None
    """At most so many of each suite."""
    baselines: Sequence[Baseline] = ()
    judge: bool = False
    base: bool = True
    endpoint: str | None = None
    model: str | None = None
    context: int | None = None
    """Tokens the endpoint takes."""
    fresh: bool = False
    """Run everything again, whatever the folder holds."""


@dataclass
class Done:
    """What came out, and where it lies."""

    title: str
    folder: Path
    rows: list[Row]
    ran: int
    cached: int
    notes: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    failure: MemFactoryError | None = None
    """What is to be raised now that everything is written: too much of a candidate failed."""


def run_evaluation(asked: Asked, output: Path | None, progress: Progress) -> Done:
    """Evaluate what was `asked` for, and write the evaluation folder (absent: ``evals/NAME`` of the recipe).

    Raises:
        RecipeErrors: everything that is wrong with recipe and suites.
        MemFactoryError: a checkpoint does not fit, or a file is missing. What fails while it runs is in the table and
            in :attr:`Done.failure`.
    """
    own = not asked.suites or OWN in asked.suites
    prepared = prepare(asked.recipe, asked.overrides, splits=(Split.TEST,) if own else ())
    section = None
    if asked.endpoint or asked.model:
        section = _endpoint(asked)
    try:
        tokenizer = load_tokenizer(prepared.recipe.model, prepared.vocabulary)
        candidates = _candidates(prepared, asked, section)
        for candidate in candidates:
            check_candidate(candidate, prepared.recipe, tokenizer)
        candidates = [on_base(candidate, prepared.recipe) for candidate in candidates]
        suites = _suites(prepared, asked)
        limit = asked.context if section is not None else positions(prepared.recipe, candidates)
        share = prepared.recipe.rollout.max_failed_share
        notes = check_context(prepared.agent, suites, tokenizer, limit, share)
        whole = [one.name for one in candidates if one.baseline is Baseline.FULL_CONTEXT]
        if section is not None and asked.context is None and whole:
            notes.append(
                f"{whole[0]}: nothing is left out, whatever the endpoint takes; give its limit with --context"
            )
        notes += _contamination(prepared, candidates, suites)
        folder = EvalFolder(output or Path("evals") / prepared.recipe.name)
        # what servers hold for this evaluation: a run of the recipe, and another evaluation, have names of their own
        label = f"eval-{hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:8]}-"
        plan = replace(_plan(prepared, asked, candidates, suites), room=lambda: _room(prepared, label))

        def load(candidate: Candidate, *, place: int, among: int) -> RoutedPolicy:
            if section is not None and candidate.fingerprint == _address(section):
                return _at_endpoint(prepared, section, tokenizer, asked.context)
            shared, own = _share(prepared, among), f"{label}{place}" if _held(prepared) else ""
            return load_policy(shared, candidate.checkpoint, learned=not candidate.untrained, label=own)

        with folder.held():
            found = evaluate(plan, load, folder, progress)
            rows = ordered(found.rows)
            done = Done(f"{prepared.recipe.name}: evaluation", folder.path, rows, found.ran, 0)
            done.cached = sum(row.episodes for row in rows) - found.ran
            done.notes = notes + [f"{suite.name}: {suite.differs}" for suite in suites if suite.differs]
            done.notes += found.notes
            where = [(f"{row.suite}, {row.candidate} ({row.mode})", row.reason) for row in rows]
            done.notes += [f"{place}: no mean, {reason}" for place, reason in where if reason]
            done.examples, done.failure = found.examples, found.failure
            settings = _settings(prepared, plan)
            notes = [*done.notes, *done.examples]
            told = {
                "recipe": prepared.recipe.name,
                "recipe_hash": prepared.recipe.hash(),
                "seed": plan.seed,
                "settings": settings,
                "candidates": [
                    {"name": one.name, "path": str(one.checkpoint or ""), "fingerprint": one.fingerprint}
                    for one in candidates
                ],
                "suites": [
                    {"name": one.name, "tasks": len(one.tasks), "metric": one.metric, "differs": one.differs}
                    for one in suites
                ],
                "rows": [row.record() for row in rows],
                "notes": notes,
            }
            lines = [f"{name}: {value}" for name, value in settings.items()]
            tables = {"table.md": markdown(rows, done.title, lines, notes), "table.csv": csv_table(rows)}
            folder.write(found.records.values(), told, tables)
    finally:
        prepared.rewards.close()
    return done


def _endpoint(asked: Asked) -> PolicySection:
    """The endpoint, which answers.

    Raises:
        RecipeError: address or model is missing.
        ServiceError: it does not answer, or does not serve the model.
    """
    if not asked.endpoint or not asked.model:
        missing = "--model" if asked.endpoint else "--endpoint"
        raise RecipeError(missing, "an endpoint needs both", "e.g. --endpoint http://localhost:8000/v1 --model NAME")
    from memfactory.policy.endpoint_model import check_endpoint  # its libraries are an extra

    section = PolicySection(model=asked.model, base_url=asked.endpoint)
    check_endpoint(section)
    return section


def _candidates(prepared: Prepared, asked: Asked, section: PolicySection | None) -> list[Candidate]:
    found = []
    if section is None or asked.checkpoints:
        found = find_candidates(prepared.recipe, asked.checkpoints, base=asked.base)
    if section is not None:
        limit = "" if asked.context is None else f"context {asked.context}"
        found.append(Candidate(str(section.model), None, _address(section), limit))
        found = apart(found)
    if asked.baselines:
        # of the first, and so of the same weights that the others are compared with
        kinds = [found[0].as_baseline(kind) for kind in asked.baselines]
        BaselineAgent(prepared.agent, Baseline.NO_MEMORY)  # raises where the agent has no such thing
        found += kinds
    return found


def _address(section: PolicySection) -> str:
    return hashlib.sha256(f"{section.base_url} {section.model}".encode()).hexdigest()[:16]


def _at_endpoint(prepared: Prepared, section: PolicySection, tokenizer: Any, limit: int | None) -> RoutedPolicy:
    """The endpoint for every module but those that the recipe gives to another model."""
    from memfactory.policy.endpoint_model import EndpointModel

    recipe = prepared.recipe
    others = {
        module: beside(recipe.policies[own.policy], recipe.rollout.generate_token_budget)
        for module, own in recipe.modules.items()
        if own.policy in recipe.policies
    }
    return RoutedPolicy(EndpointModel(section, tokenizer, limit), others)


def _suites(prepared: Prepared, asked: Asked) -> list[Measured]:
    """What is measured on what.

    Raises:
        RecipeErrors: several are wrong; a single error is raised as it is.
    """
    if asked.judge and not prepared.recipe.judge.base_url:
        fix = "judge.base_url=http://localhost:8000/v1 judge.model=NAME"
        raise RecipeError("--judge", "the recipe names no judge", fix)
    errors: list[MemFactoryError] = []
    found: list[Measured] = []
    loaded: dict[int, Loaded] = {}  # by place in `found`
    for name in list(dict.fromkeys(asked.suites)) or [OWN]:
        try:
            if name == OWN:
                options = prepared.eval_options
                tasks = prepared.eval_tasks[: asked.tasks]
                found.append(Measured(OWN, tasks, options.rewards, options.metric))
            else:
                suite = loaded[len(found)] = load_suite(name, asked.tasks)
                rewards = _rewards(prepared, suite)
                found.append(Measured(suite.name, suite.tasks, rewards, suite.metric, suite.suite.differs))
        except MemFactoryError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RecipeErrors("--suite", errors)
    for place, label in zip(loaded, labels(list(loaded.values())), strict=True):
        found[place] = replace(found[place], name=label)
    return [_measured(suite, asked.judge) for suite in found]


def _rewards(prepared: Prepared, loaded: Loaded) -> RewardSystem:
    """The metrics of a suite; the first alone makes the reward."""
    dimensions = [
        WeightedDimension(name, load_dimension(name), float(not place))
        for place, name in enumerate(loaded.suite.metrics)
    ]
    return RewardSystem(dimensions, judge=prepared.rewards.judge)


def _measured(suite: Measured, judged: bool) -> Measured:
    """`suite`, with a judge's verdicts where they are wanted."""
    if not judged:
        return suite
    rewards = suite.rewards
    if VERDICT not in [weighted.name for weighted in rewards.dimensions]:
        rewards = rewards.also(WeightedDimension(VERDICT, load_dimension(VERDICT), 0.0))
    return Measured(suite.name, suite.tasks, rewards, suite.metric, suite.differs, VERDICT)


def _contamination(prepared: Prepared, candidates: Sequence[Candidate], suites: Sequence[Measured]) -> list[str]:
    """What must be said where tasks of a suite stand in the training data, or where nobody could look."""
    notes = []
    for whose, section in _training_data(prepared, candidates):
        try:
            environment = build_environment(section.name, section.options)
            train = environment.tasks(Split.TRAIN, section.train_tasks)
        except MemFactoryError as error:
            notes.append(f"not compared with the training data of {whose}, which could not be read: {error.what}")
            continue
        for suite in suites:
            both, again = shared(train, suite.tasks), asked_again(train, suite.tasks)
            of = f"of {len(suite.tasks)} tasks"
            if both:
                notes.append(
                    f"CONTAMINATED: {suite.name}: {len(both)} {of} stand in the training data of {whose}: {both[0]}"
                )
            if again > len(both):
                notes.append(
                    f"{suite.name}: questions of {again} {of} are also asked in the training data of {whose}, "
                    f"{again - len(both)} of them about other documents"
                )
    return notes


def _training_data(prepared: Prepared, candidates: Sequence[Candidate]) -> list[tuple[str, EnvironmentSection]]:
    """Whose, and where its tasks come from: the recipe's, and those of checkpoints whose run had other ones."""
    found = [("the recipe", prepared.recipe.environment)]
    for candidate in candidates:
        path = run_recipe(candidate.checkpoint) if candidate.checkpoint is not None else None
        if path is not None:
            own = load_recipe(path).environment.model_copy(update={"test_tasks": found[0][1].test_tasks})
            if own not in [section for _, section in found]:
                found.append((f"run {path.parent.name}", own))
    return found


def _plan(prepared: Prepared, asked: Asked, candidates: Sequence[Candidate], suites: Sequence[Measured]) -> Plan:
    recipe = prepared.recipe
    samples = asked.samples or recipe.eval.samples
    modes = [Mode("sampled", Sampling(recipe.eval.temperature, recipe.eval.top_p), samples)]
    if recipe.eval.greedy:
        modes.append(Mode("greedy", Sampling(0.0)))
    stored = recipe.dump()
    return Plan(
        agent=prepared.agent,
        suites=suites,
        candidates=candidates,
        modes=modes,
        seed=recipe.seed,
        asked={
            **{name: stored[name] for name in ("agent", "modules", "policies")},
            "prompts and code": agent_fingerprint(prepared.agent),
            "version": __version__,
            "beside": beside_fingerprints(recipe),
            "model": [recipe.model.dtype, stored["model"].get("quantization")],
            "engine": recipe.rollout.engine,
            "context": recipe.rollout.vllm.max_model_len if recipe.rollout.served else None,
        },
        max_failed_share=recipe.rollout.max_failed_share,
        fresh=asked.fresh,
    )


def _held(prepared: Prepared) -> bool:
    """Whether servers hold candidates as adapters, several beside each other if they have the places."""
    recipe = prepared.recipe
    return recipe.rollout.served and recipe.model.lora is not None and recipe.rollout.vllm.mode == "server"


def _room(prepared: Prepared, label: str) -> int:
    """How many models may be asked at the same time."""
    recipe = prepared.recipe
    # there once in this process: what learns, with the weights of one checkpoint, and models beside the trained one
    alone = bool(Learners(prepared.agent)) or any(own.policy in recipe.policies for own in recipe.modules.values())
    if alone or not _held(prepared):
        return 1
    from memfactory.train.serving import make_room  # its libraries are an extra

    return max(1, make_room(recipe, label))


def _share(prepared: Prepared, models: int) -> Prepared:
    """For one of several models that are asked at the same time: its part of the requests a server may have."""
    recipe = prepared.recipe
    vllm = recipe.rollout.vllm
    own = vllm.model_copy(update={"concurrency": max(1, vllm.concurrency // models)})
    return replace(
        prepared, recipe=recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"vllm": own})})
    )


def _settings(prepared: Prepared, plan: Plan) -> dict[str, str]:
    recipe = prepared.recipe
    sampled = plan.modes[0]
    versions = [f"memfactory {__version__}"]
    for package in ("torch", "transformers", "vllm"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return {
        "recipe": f"{recipe.name} ({recipe.hash()})",
        "agent": json.dumps(recipe.dump()["agent"]),
        "model": recipe.model.name or "tiny",
        "engine": "vllm" if recipe.rollout.served else "transformers",
        "sampled": f"temperature {sampled.sampling.temperature:g}, top-p {sampled.sampling.top_p:g}, "
        f"{sampled.samples} for each task, seed {plan.seed}",
        "intervals": "95 %, bootstrap over tasks (BCa); differences are paired by task, to the first candidate",
        "versions": ", ".join(versions),
    }
