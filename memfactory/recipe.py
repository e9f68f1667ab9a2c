"""The schema of a recipe: one YAML file that names everything a run needs.

Importable without torch, so a recipe can be checked before anything heavy is loaded. The `train:`
section is TRL's own `GRPOConfig`; its keys are checked by :mod:`memfactory.train.config`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class TinyModel(_Section):
    """A policy small enough for a laptop CPU, built from nothing: Qwen3 architecture, word-level
    tokenizer over the environment's own vocabulary."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    """Attention heads; key-value heads are as many."""
    mlp_size: int = 128
    initializer_range: float = 0.08
    """Standard deviation of the initial weights. The usual 0.02 does not train at this width."""


class Lora(_Section):
    """Low-rank adapters instead of full fine-tuning (PEFT `LoraConfig`)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    """Zero keeps sampling and training on the same policy; anything else makes ratios noisy."""
    target_modules: str | list[str] = "all-linear"


class Quantization(_Section):
    """Frozen base weights in 4 bits under adapters (QLoRA, arXiv 2305.14314): transformers' `BitsAndBytesConfig`."""

    bits: Literal[4] = 4
    """`load_in_4bit`."""
    type: Literal["nf4", "fp4"] = "nf4"
    """`bnb_4bit_quant_type`. `nf4` has its levels where normally distributed weights are."""
    double: bool = True
    """`bnb_4bit_use_double_quant`: the scales are quantized, too, which takes .37 bits less for each weight."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """`bnb_4bit_compute_dtype`: what weights are turned into where they are multiplied. Absent: `model.dtype`."""


class ModelSection(_Section):
    """The policy. Give `name` for a pretrained model, or `tiny` for one built from nothing."""

    name: str | None = None
    """Hub id, a local folder, or `package:NAME` for a GGUF file shipped inside an installed Python package."""
    tiny: TinyModel | None = None
    gguf_file: str | None = None
    """GGUF file inside `name`, dequantized on loading. Absent: ordinary weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the stored weights. Full fine-tuning wants float32 masters; compute in bfloat16 is `train.bf16`."""
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    lora: Lora | None = None
    """Absent: full fine-tuning."""
    quantization: Quantization | None = None
    """Absent: weights are kept in `dtype`. Needs `lora` and the extra `memfactory[quant]`."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name is None) == (self.tiny is None):
            raise ValueError("give exactly one of model.name (a pretrained model) and model.tiny (built from nothing)")
        return self

    @model_validator(mode="after")
    def _quantized_under_adapters(self) -> ModelSection:
        if self.quantization is None:
            return self
        if self.lora is None:
            raise ValueError("quantized weights cannot be trained: add `lora: {r: 16}` beside `quantization`")
        if self.tiny is not None:
            raise ValueError("quantization is of a pretrained model (model.name); leave it out with model.tiny")
        return self


class AgentSection(BaseModel):
    """The agent and its own options, which are the fields of the agent class."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)

    name: str = "memagent"
    """A shipped agent, `pkg.module:Class` or `path/file.py:Class`."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class EnvironmentSection(BaseModel):
    """The environment and its own options, which are the fields of the environment class."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)

    name: str
    """A shipped environment, a dataset of `data/registry.yaml`, `pkg.module:Class` or `path/file.py:Class`."""
    train_tasks: int | None = Field(default=None, ge=1)
    """Training tasks drawn; None takes all there are (a generator needs a number)."""
    test_tasks: int | None = Field(default=None, ge=1)
    """Held-out tasks for evaluation; None takes all there are."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class PolicySection(_Section):
    """A model beside the trained one, for modules that are not trained. Give `model` for weights in this process, or
    `base_url` for an OpenAI-compatible endpoint."""

    model: str | None = None
    """Hub id, a local folder or `package:NAME`; of an endpoint, the name it serves the model under."""
    base_url: str | None = None
    """The endpoint with its version, e.g. `http://localhost:8000/v1` (vLLM). Absent: in this process."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in this process."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy, so that what is frozen adds no noise to what is trained."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; not needed for a local server."""
    concurrency: int = Field(default=64, ge=1)
    """Most requests under way at once at an endpoint."""
    deadline: float = Field(default=120.0, gt=0)
    """Seconds for one reply of an endpoint, retries included."""
    attempts: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _named(self) -> PolicySection:
        if self.model is None:
            raise ValueError("name the `model`")
        return self


class ModuleSection(_Section):
    """Who answers for a module of the agent."""

    policy: str = "trained"
    """`trained`: the policy, and its turns are trained. `current`: the same weights as they are now, not trained.
    `initial`: the weights as they were before GRPO. Or a name of `policies:`."""
    temperature: float = Field(default=0.0, ge=0)
    """Of `current` and `initial`; 0 is greedy."""


class RewardSection(_Section):
    """One reward dimension. What is left out is as the function declares it."""

    name: str
    """`file.function` in `rewards/` (yours first, then the shipped ones), `pkg.module:function` or
    `path/file.py:function`; also a plain TRL reward function."""
    weight: float = 1.0
    """Share among the objectives; factor of a bonus or potential. 0 measures and logs without rewarding."""
    label: str | None = None
    """Name in logs and reports, where one function stands there twice. Absent: `name`."""
    role: Literal["gate", "objective", "shaping", "bonus"] | None = None
    """`gate` must hold, `objective` is traded by weight, `shaping` is a potential (turn scope), `bonus` is added."""
    missing: Literal["exclude", "drop", "group_mean"] | None = None
    """Of a score that is None. `exclude`: the episode gets no reward. `drop`: the other objectives' weights
    are renormalised. `group_mean`: the mean of the group stands in. A gate always fails closed."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Where a gate's score, scaled to [0, 1], starts to pass."""
    low: float | None = None
    """Smallest value; a plain TRL function declares no range."""
    high: float | None = None
    transform: str | dict[str, Any] | None = None
    """Applied to the score before aggregation: `unit` (range to [0, 1]), `clip`, or `{name: ..., option: ...}`."""
    stage: str | None = None
    """Stage in a stage-wise product. Absent: a stage of its own."""
    deadline: float | None = Field(default=None, ge=0)
    """Seconds one call may take. 0: no limit, called in the main thread. Absent: as declared (60)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""


class AggregateSection(BaseModel):
    """How dimensions become one reward; further keys are the aggregator's own options."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)

    name: str = "gated"
    """`gated`, `weighted_sum`, `normalize_then_sum`, `min_max_mean`, `stagewise_product`, or `pkg.module:Class`."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class CreditSection(_Section):
    """From rewards to the advantage of every turn."""

    assigner: str = "broadcast"
    """`broadcast` copies an episode's advantage to each of its turns (MemAgent). `last_turn` trains the answer
    alone: a control. Or `pkg.module:Class`."""
    advantage: Literal["standardized", "centered", "rloo", "batch", "none"] | None = None
    """Against what a reward is compared. Absent: as `train.scale_rewards` says (group: standardized, none:
    centered, batch: batch)."""
    std_floor: float = Field(default=0.0, ge=0)
    """Smallest standard deviation that is divided by, in units of reward: smaller differences stay small."""
    outcome_share: float = Field(default=0.8, ge=0, le=1)
    """Alpha in A = alpha A_episode + (1 - alpha) A_turn, where dimensions of turns are rewarded or writing turns are
    credited by `attribute`; else unused."""
    attribute: Literal["none", "shown", "cited"] = "none"
    """Whether turns that write entries answer for what became of them: the turn's own part of the credit is then its
    share in the answers that were shown its entries (`shown`), or that cite them (`cited`; shown where none is)."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per turn of potential-based shaping."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """Lambda of potential-based shaping: 1 is unbiased whatever the potential, less trades bias for variance."""
    shuffle_rewards: bool = False
    """Control experiment: permute rewards inside each group, so that they carry no information."""


class JudgeSection(_Section):
    """The model that grades what no rule can. Absent `base_url`: rubrics fall back to their rules."""

    base_url: str | None = None
    """An OpenAI-compatible endpoint, e.g. `http://localhost:8000/v1` (vLLM)."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; not needed for a local server."""
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = Field(default=64, ge=1)
    """Most requests under way at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    deadline: float = Field(default=60.0, gt=0)
    """Seconds for one verdict, retries included, waiting for a free place not."""
    attempts: int = Field(default=4, ge=1)
    cache: str | None = ".memfactory/judge.sqlite"
    """File that keeps verdicts, shared by processes. `null`: none are kept."""
    price_per_million: tuple[float, float] = (0.0, 0.0)
    """Price of a million prompt and completion tokens, for the cost metric."""


class WarmupSection(_Section):
    """Supervised warm-up on teacher traces before reinforcement learning."""

    steps: int = Field(ge=1)
    batch_rows: int = Field(default=64, ge=1)
    """Rows (turns of the teacher) per step."""
    muon_lr: float = 0.02
    """Learning rate of Muon, which takes the two-dimensional weights inside the layers."""
    adam_lr: float = 2e-3
    """Learning rate of AdamW, which takes embeddings and norms."""
    ramp_steps: int = 20
    """Steps of linear warm-up of the learning rates; a cosine to 10 % follows."""


class RerollSection(_Section):
    """Local re-rolls: one chunk of an episode is run again from the store before it (Memory-R2, arXiv 2605.21768)."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of a batch's episodes that are re-rolled at one of their chunks. Memory-R2: .5."""
    count: int = Field(default=4, ge=2)
    """Runs of that chunk. They form a group of their own."""


class VLLMSection(_Section):
    """vLLM servers that sample for the trainer (`rollout.engine: vllm`).

    After every update the adapter, or all weights where the recipe has no `model.lora`, is written to a folder they
    can read, and loaded by them: an adapter under a name of its own, weights in the place of the old ones.
    `memfactory serve-rollouts RECIPE` starts one with the flags it needs.
    """

    mode: Literal["server", "colocate"] = "server"
    """`server`: servers that were started, at `base_urls`. `colocate`: every training process starts one of its own
    beside itself, on its device, and ends it."""
    base_urls: list[str] = Field(default=["http://localhost:8000"], min_length=1)
    """Addresses without a path, e.g. `http://node7:8000`. Requests are spread over all of them."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and completion together, in tokens (`--max-model-len`). Absent: the model's own."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory the server takes. Absent: 0.9, colocated 0.3; see `gpu_share`."""
    concurrency: int = Field(default=256, ge=1)
    """Most requests under way at once at one server."""
    deadline: float = Field(default=600.0, gt=0)
    """Seconds for one turn, retries included."""
    attempts: int = Field(default=4, ge=1)
    """Tries of a request that a server refuses for a moment (429, 500); a server that is gone is waited for."""
    outage: float = Field(default=300.0, ge=0)
    """Seconds without any server before the run stops, at the start and in the middle."""
    canary_tolerance: float = Field(default=0.05, gt=0)
    """Largest mean difference between log-probs of trainer and server on one prompt, in nats. More means that they do
    not hold the same weights: in float32 they differ by some 1e-6, in bfloat16 by some 1e-2."""
    adapters: str | None = None
    """Folder of what is sent, adapters or weights, readable under this path by every server; in memory (`/dev/shm`)
    where servers are on the trainer's machine and all weights are sent. Absent: `adapters` in the run folder."""

    @property
    def gpu_share(self) -> float:
        """`gpu_memory_utilization`, or what stands for it."""
        return self.gpu_memory_utilization or (0.3 if self.mode == "colocate" else 0.9)


class AsyncSection(_Section):
    """How far sampling may run ahead of training (`rollout.engine: async`). Named as in TRL's `AsyncGRPOConfig`."""

    max_staleness: int = Field(default=4, ge=0)
    """Most updates between the weights that sampled a turn and those it trains. 0: sampling and training take turns.
    So many generation batches, and one more, are under way at once."""
    weight_sync_steps: int = Field(default=1, ge=1)
    """Updates between two times that the servers are sent the adapter; at most `max_staleness` + 1."""


class RolloutSection(_Section):
    """How and where turns are sampled, and limits of training micro-batches: speed and memory, not results."""

    engine: Literal["transformers", "vllm", "async"] = "transformers"
    """`transformers`: in this process. `vllm`: on servers, see `vllm`. `async`: on servers, and while training goes
    on, see `async_grpo`."""
    vllm: VLLMSection = VLLMSection()
    async_grpo: AsyncSection = AsyncSection()
    generate_token_budget: int = Field(default=65536, ge=1)
    """Most key-value cache positions (sequences x longest sequence) in one generation batch."""
    train_token_budget: int = Field(default=16384, ge=1)
    """Most token positions in one forward and backward pass: rows x longest row, or unique ones where
    `train.share_prefix` packs rows that begin alike."""
    max_failed_share: float = Field(default=0.25, ge=0, le=1)
    """Share of a batch's episodes that may be unscorable, or on which one reward function may fail, before the run
    stops; of an evaluation's, share that a store or an endpoint may fail. They never count as zero."""
    rerolls: RerollSection = RerollSection()
    log_episodes: int = Field(default=16, ge=0)
    """Training episodes written to `episodes.jsonl` at every log step."""

    @property
    def served(self) -> bool:
        """Whether turns come from vLLM servers."""
        return self.engine in ("vllm", "async")


class EvalSection(_Section):
    """Evaluation on held-out tasks, before and after training and every `train.eval_steps`."""

    samples: int = Field(default=1, ge=1)
    """Episodes per task in the sampled evaluation; accuracy is their mean (avg@samples)."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    greedy: bool = True
    """Also evaluate with greedy decoding."""
    metric: str = "answer.exact_match"
    """Reward dimension whose mean is reported as accuracy."""


SAME_WEIGHTS = frozenset({"trained", "current", "initial"})
"""What `modules.NAME.policy` may say beside a name of `policies:`."""


class Recipe(_Section):
    """Everything a run needs, by name."""

    name: str
    """Short name, used for the run folder."""
    seed: int = 0
    """Seeds the model's initial weights, task order, warm-up and sampling."""
    model: ModelSection
    agent: AgentSection = AgentSection()
    policies: dict[str, PolicySection] = Field(default_factory=dict)
    """Models beside the trained one, by names of your choice."""
    modules: dict[str, ModuleSection] = Field(default_factory=dict)
    """By name of a module of the agent: who answers for it. A module that is not named here is trained."""
    environment: EnvironmentSection
    rewards: list[RewardSection] = Field(min_length=1)
    aggregate: AggregateSection = AggregateSection()
    credit: CreditSection = CreditSection()
    judge: JudgeSection = JudgeSection()
    warmup: WarmupSection | None = None
    """Absent: no warm-up."""
    rollout: RolloutSection = RolloutSection()
    eval: EvalSection = EvalSection()
    train: dict[str, Any] = Field(default_factory=dict)
    """Fields of TRL's `GRPOConfig`, under their own names, and `share_prefix`."""
    output_dir: str | None = None
    """Run folder. Absent: `runs/NAME-seedN`."""

    @model_validator(mode="after")
    def _known_policies(self) -> Recipe:
        for name in sorted(SAME_WEIGHTS & self.policies.keys()):
            raise ValueError(f"policies.{name}: the name stands for the trained model; choose another")
        for module, section in self.modules.items():
            if section.policy not in (known := [*sorted(SAME_WEIGHTS), *self.policies]):
                raise ValueError(f"modules.{module}.policy: no '{section.policy}'; {nearest(section.policy, known)}")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}-seed{self.seed}")

    def dump(self) -> dict[str, Any]:
        """Plain data, every default filled in: what is stored in the run folder."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the resolved recipe, without its output folder."""
        data = {key: value for key, value in self.dump().items() if key != "output_dir"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-4`` is a number, and ``no`` and ``off`` are words (as in YAML 1.2)."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, read safely; see :class:`_Loader` for how numbers and booleans are read."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`.

    Raises:
        RecipeError: no such file, not YAML (line named), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read", error.strerror or str(error), "see `memfactory recipes` for the shipped recipes"
        ) from error
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML", getattr(error, "problem", None) or str(error)) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: not a mapping of sections", "", "start from `memfactory recipes copy`")
    return data


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`data` with ``a.b=value`` set for each override; values are read as YAML.

    Raises:
        RecipeErrors: an override is not of the form ``key=value`` or goes through a value that is no section.
    """
    errors: list[MemFactoryError] = []
    data = json.loads(json.dumps(data))
    for override in overrides:
        key, separator, raw = override.partition("=")
        if not separator or not key:
            errors.append(
                RecipeError(f"override '{override}'", "not of the form key=value", "e.g. train.max_steps=10")
            )
            continue
        *sections, last = key.split(".")
        target = data
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                errors.append(RecipeError(f"override '{override}'", f"'{section}' is a value, not a section"))
                break
        else:
            try:
                target[last] = parse_yaml(raw)
            except yaml.YAMLError:
                target[last] = raw
    if errors:
        raise RecipeErrors("command line", errors)
    return data


def nearest(key: str, known: list[str]) -> str:
    """``did you mean ...`` for an unknown `key`, or the list of what is known."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    if close:
        # a slip changes letters rather than the length: `modle` is model, though it shares more letters with modules
        best = max(
            close, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio() - 0.05 * abs(len(name) - len(key))
        )
        return f"did you mean '{best}'?"
    if len(known) > 40:  # a list nobody would read
        return "see the documentation for the known keys"
    return f"known keys: {', '.join(sorted(known))}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at `location` in the schema."""
    model: type[BaseModel] = Recipe
    for part in location:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        for candidate in [*candidates, *(inner for outer in candidates for inner in get_args(outer))]:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
                break
    return list(model.model_fields)


def schema_errors(data: dict[str, Any]) -> tuple[Recipe | None, list[MemFactoryError]]:
    """Check `data` against the schema: the recipe, or every error at once."""
    try:
        return Recipe.model_validate(data), []
    except ValidationError as error:
        problems: list[MemFactoryError] = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                fix = nearest(str(item["loc"][-1]), _fields_at(item["loc"][:-1]))
                problems.append(RecipeError(f"{where}: unknown key", "", fix))
            elif item["type"] == "missing":
                problems.append(RecipeError(f"{where}: missing", "", f"add `{item['loc'][-1]}:`"))
            else:
                value = item.get("input")
                shown = f" (got {value!r})" if not isinstance(value, dict | list) else ""
                problems.append(RecipeError(f"{where or 'recipe'}: {item['msg']}{shown}"))
        return None, problems


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides. `train:` keys are not looked at here.

    Raises:
        RecipeError: the file cannot be read.
        RecipeErrors: one or more entries are wrong; all are listed.
    """
    recipe, errors = schema_errors(apply_overrides(read_yaml(Path(path)), overrides or []))
    if recipe is None:
        raise RecipeErrors(str(path), errors)
    return recipe
