"""What `EpisodeGRPOTrainer` relies on in the installed TRL and transformers.

Each failure names what changed and which part of memfactory it breaks. Nothing compares source text: where
behaviour can be run it is run, elsewhere the syntax tree of the installed method is asked what it reads.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib.metadata import version

import pytest
import torch
import transformers
import trl
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from memfactory.train import trainer as ours
from memfactory.train.config import _OWNED, _REFUSED
from memfactory.train.rows import Row, collate
from memfactory.train.trainer import _AS_DAPO, SUPPORTED_LOSS_TYPES, EpisodeGRPOTrainer

TESTED = "1.16"
INSTALLED = f"installed: trl {trl.__version__}, transformers {transformers.__version__}"


def changed(what: str, where: str) -> str:
    return f"{what} ({INSTALLED}). This breaks {where}."


def tree(function) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def calls(function) -> set[str]:
    """Dotted names of everything `function` calls, e.g. ``self.accelerator.backward``."""
    return {ast.unparse(node.func) for node in ast.walk(tree(function)) if isinstance(node, ast.Call)}


# ---- versions ----------------------------------------------------------------------------------


def test_installed_versions_are_those_the_package_asks_for():
    asked = {
        requirement.name: requirement
        for requirement in map(Requirement, _requirements())
        if requirement.name in ("trl", "transformers", "torch")
    }
    assert set(asked) == {"trl", "transformers", "torch"}
    for name, requirement in asked.items():
        assert requirement.specifier.contains(Version(version(name)).base_version), (
            f"{name} {version(name)}: {requirement}"
        )
    assert asked["trl"].specifier.contains(f"{TESTED}.0")
    assert not asked["trl"].specifier.contains("1.17.0"), "a minor release of TRL may change private methods"


def _requirements() -> list[str]:
    from importlib.metadata import requires

    return requires("memfactory") or []


# ---- methods we override or call ---------------------------------------------------------------

METHODS = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_save_rng_state": ["self", "output_dir"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_train_sampler": ["self", "dataset"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("name", METHODS)
def test_signatures_of_overridden_methods(name):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, changed(f"GRPOTrainer.{name} is gone", f"the override in {ours.__name__}")
    found = list(inspect.signature(method).parameters)
    assert found == METHODS[name], changed(
        f"GRPOTrainer.{name} takes {found}, not {METHODS[name]}", f"EpisodeGRPOTrainer.{name}"
    )
    own = inspect.signature(getattr(EpisodeGRPOTrainer, name)).parameters
    assert [*own][: len(found)] == found, f"EpisodeGRPOTrainer.{name} names its parameters otherwise: {[*own]}"


def test_signature_of_the_log_prob_pass():
    name = "_get_per_token_logps_and_entropies"
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters
    mine = inspect.signature(getattr(EpisodeGRPOTrainer, name)).parameters
    named = [key for key, p in mine.items() if p.kind is not p.VAR_KEYWORD]
    assert list(theirs)[: len(named)] == named, changed(
        f"GRPOTrainer.{name} begins with {list(theirs)[: len(named)]}, not {named}", f"EpisodeGRPOTrainer.{name}"
    )
    for key in named[5:]:
        assert theirs[key].default == mine[key].default, changed(f"the default of {key} differs", name)


def test_every_override_exists_in_trl_or_transformers():
    """A method TRL renamed would leave our override standing there, never called."""
    own = {name for name, value in vars(EpisodeGRPOTrainer).items() if callable(value)}
    documented = {n for n in own if f"``{n}``" in (ours.__doc__ or "")}
    assert documented >= {"training_step", "_prepare_inputs", "_get_per_token_logps_and_entropies", "_compute_loss"}
    for name in documented:
        assert hasattr(GRPOTrainer, name), changed(f"GRPOTrainer.{name} is gone", f"the table in {ours.__name__}")


def test_the_order_of_a_pass_is_one_draw_from_the_sampler():
    """A resumed run makes the draws of earlier passes again, because the trainer makes a new sampler."""
    uninterrupted, resumed = (RepeatSampler(range(7), 2, batch_size=3, repeat_count=2, seed=5) for _ in range(2))
    for _ in range(2):
        list(uninterrupted)
        torch.randperm(resumed.num_samples, generator=resumed.generator)
    assert list(uninterrupted) == list(resumed), changed("RepeatSampler draws otherwise", "resuming after a pass")


def test_names_of_our_own_methods_are_free():
    """A private method of the same name in TRL would be replaced without anyone meaning it."""
    meant = {*METHODS, "_get_per_token_logps_and_entropies", "__init__", "__module__", "__doc__"}
    taken = {
        name
        for name in vars(EpisodeGRPOTrainer)
        if name not in meant and not name.startswith("__") and hasattr(GRPOTrainer, name)
    }
    assert not taken, changed(f"TRL has methods called {sorted(taken)} now", "our methods of that name")


def test_transformers_step_calls_what_we_replace():
    found = calls(Trainer.training_step)
    for name in ("self._prepare_inputs", "self.compute_loss", "self.accelerator.backward"):
        assert name in found, changed(
            f"Trainer.training_step no longer calls {name}", "EpisodeGRPOTrainer.training_step"
        )
    assert any(name.endswith("_compute_loss") for name in calls(GRPOTrainer.compute_loss)), changed(
        "GRPOTrainer.compute_loss no longer calls _compute_loss", "EpisodeGRPOTrainer._compute_loss"
    )
    assert "self._get_per_token_logps_and_entropies" in calls(GRPOTrainer._compute_loss), changed(
        "GRPOTrainer._compute_loss computes log-probs otherwise", "train/scoring.py"
    )


def test_generation_batch_reaches_the_step_whole():
    """`steps_per_generation` times the batch size, repeated `num_generations` times, each step."""
    assert "_train_batch_size * self.args.steps_per_generation" in ast.unparse(
        tree(GRPOTrainer.get_train_dataloader)
    ), changed("the train loader no longer yields whole generation batches", "EpisodeGRPOTrainer._roll_out")


# ---- a real trainer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(bench, tokenizer, tmp_path_factory):
    """A trainer that has made one step of one micro-batch, on the CPU."""
    _, trainer = bench.ours(
        bench.groups(2, 4),
        bench.make_model(),
        tokenizer,
        tmp_path_factory.mktemp("contract"),
        per_device_train_batch_size=8,
        num_generations=4,
    )
    return trainer


ATTRIBUTES = {
    "_step": "training_step",
    "_metrics": "_log_rollout",
    "_current_train_step_time": "training_step",
    "current_gradient_accumulation_steps": "training_step",
    "num_iterations": "_micro_batches",
    "loss_type": "_compute_loss",
    "scale_rewards": "_assess",
    "beta": "_compute_loss",
    "ref_model": "__init__",
    "mask_truncated_completions": "_assess",
    "max_completion_length": "TRL's dr_grpo, which `loss_weights` stands in for",
    "epsilon_low": "TRL's clipping",
    "epsilon_high": "TRL's clipping",
    "chat_template_kwargs": "__init__",
    "processing_class": "__init__",
    "_tokenizer": "_micro_batches",
    "model_wrapped": "_sampling_model",
    "accelerator": "everything",
    "compute_loss_func": "training_step: not None keeps Trainer from dividing our loss",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(trained, name):
    assert hasattr(trained, name), changed(
        f"GRPOTrainer has no attribute {name} any more", f"EpisodeGRPOTrainer ({ATTRIBUTES[name]})"
    )


def test_loss_is_not_divided_behind_our_back(trained):
    assert trained.compute_loss_func is not None, changed(
        "TRL leaves compute_loss_func at None, so Trainer.training_step divides the loss by the accumulation steps",
        "EpisodeGRPOTrainer.training_step, whose losses are complete",
    )
    guarded = [
        ast.unparse(node.test)
        for node in ast.walk(tree(Trainer.training_step))
        if isinstance(node, ast.If) and "current_gradient_accumulation_steps" in ast.unparse(node.body[0])
    ]
    assert guarded, changed("Trainer.training_step scales its loss elsewhere", "EpisodeGRPOTrainer.training_step")
    assert all("self.compute_loss_func is None" in test for test in guarded)


def test_metrics_of_a_step_are_averaged_and_logged(trained):
    logs = trained.state.log_history[-1]
    for key in ("reward", "rewards/recorded/mean", "groups/dead_share", "entropy", "step_time", "tokens/trained"):
        assert key in logs, changed(f"{key} was not logged", "EpisodeGRPOTrainer._log_rollout, which fills _metrics")


def test_a_checkpoint_is_complete_only_when_every_rank_has_written():
    """`trainer_state.json` says that it is complete; the ranks wait for each other in what is called before it."""
    source = ast.unparse(tree(Trainer._save_checkpoint))
    assert "self._save_rng_state(" in source, changed("_save_rng_state is not called", "the wait in it")
    assert source.index("self._save_rng_state(") < source.index("self.state.save_to_json("), changed(
        "trainer_state.json is written earlier", "EpisodeGRPOTrainer._save_rng_state"
    )


def test_what_loading_whole_weights_switches_off_is_there():
    from transformers.integrations import deepspeed

    assert hasattr(deepspeed, "_hf_deepspeed_config_weak_ref"), changed(
        "transformers keeps the DeepSpeed configuration elsewhere", "sharding.loaded_whole"
    )


def test_sampling_model_is_the_policy_in_evaluation_mode(trained):
    trained.model.train()
    with trained._sampling_model() as plain:
        assert not plain.training
        assert not torch.is_grad_enabled()
        assert plain is trained.accelerator.unwrap_model(trained.model)
    assert trained.model.training


# ---- the loss ----------------------------------------------------------------------------------


class Recording(dict):
    """A micro-batch that remembers what was read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


# read with .get and absent: pictures
IMAGES = {
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
}  # fmt: skip


def micro_batch():
    rows = [
        Row(0, [5, 6, 7], [8, 9, 10, 11], [1, 0, 1, 1], [0.5, 0.0, -1.0, -1.0], [-3.0, 0.0, -3.1, -3.2]),
        Row(1, [5], [12, 13], [1, 1], [2.0, 2.0], [-3.3, -3.4]),
    ]
    return collate(rows, [1.0, 2.5], 0, 3) | {"num_items_in_batch": torch.tensor(5.0)}


@pytest.mark.parametrize("loss", SUPPORTED_LOSS_TYPES)
def test_loss_reads_what_we_provide_and_no_more(trained, loss):
    inputs = Recording(micro_batch())
    trained.loss_type = loss
    try:
        value = trained._compute_loss(trained.model, inputs)
    finally:
        trained.loss_type = "dapo"
    assert value.requires_grad
    provided = set(micro_batch())
    optional = {"old_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"}
    unknown = inputs.read - provided - IMAGES - optional
    assert not unknown, changed(f"TRL's {loss} loss reads {sorted(unknown)} too", "rows.collate, which lacks it")
    unread = provided - inputs.read - optional
    assert not unread, changed(f"TRL's {loss} loss no longer reads {sorted(unread)}", "rows.collate")


def test_dapo_loss_is_weight_times_advantage_over_n(trained):
    """The identity all weightings rest on: tool_mask multiplies, advantages are per token, N divides.

    On-policy every ratio is 1, so the loss is -sum(w A) / N.
    """
    inputs = micro_batch()
    loss = trained._compute_loss(trained.model, dict(inputs)).detach()
    weights = inputs["tool_mask"] * inputs["completion_mask"]
    expected = -(weights * inputs["advantages"]).sum() / 5
    message = changed(
        "TRL's dapo loss is no longer sum(tool_mask * A * ratio) / num_items_in_batch",
        "rows.loss_weights, and with it every loss type",
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5), message

    # each weight acts on its own token alone
    for place in ((0, 0), (0, 3), (1, 1)):
        other = {key: value.clone() for key, value in inputs.items()}
        other["tool_mask"][place] *= 3
        difference = float(trained._compute_loss(trained.model, other).detach() - loss)
        assert difference == pytest.approx(-2 * float(weights[place] * inputs["advantages"][place]) / 5, rel=1e-4), (
            message
        )


def test_accumulation_enters_the_divisor_as_expected(trained):
    """N x accumulation / steps_per_generation: one optimizer step is one window of the generation batch."""
    inputs = micro_batch()
    plain = trained._compute_loss(trained.model, dict(inputs)).item()
    before = trained.current_gradient_accumulation_steps
    try:
        trained.current_gradient_accumulation_steps = 4 * before
        scaled = trained._compute_loss(trained.model, dict(inputs)).item()
    finally:
        trained.current_gradient_accumulation_steps = before
    assert scaled == pytest.approx(plain / 4), changed("the divisor of dapo differs", "_micro_batches' windows")


def test_loss_types_are_the_ones_we_know():
    """A new loss of TRL is refused until someone has said how it averages."""
    text = next(f for f in GRPOConfig.__dataclass_fields__.values() if f.name == "loss_type").metadata["help"]
    for loss in (*SUPPORTED_LOSS_TYPES, "sapo"):
        assert loss in text, changed(f"TRL no longer documents loss_type {loss}", "SUPPORTED_LOSS_TYPES")
    tests = [
        ast.literal_eval(node.comparators[0])
        for node in ast.walk(tree(GRPOTrainer._compute_loss))
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type"
        if isinstance(node.comparators[0], ast.List | ast.Constant)
    ]
    known = {loss for test in tests for loss in ([test] if isinstance(test, str) else test)}
    assert known == {*SUPPORTED_LOSS_TYPES, "sapo"}, changed(f"TRL's losses are {sorted(known)}", "loss_weights")
    together = [set(test) for test in tests if isinstance(test, list)]
    assert {*_AS_DAPO, "dapo"} in together, changed(
        f"{_AS_DAPO} no longer share dapo's clipped term", "EpisodeGRPOTrainer._compute_loss, which runs them as dapo"
    )


# ---- the fused head ----------------------------------------------------------------------------


def test_fused_head_takes_shifted_labels(bench):
    """`CompletionScorer` hands it kept hidden states and the ids they predict, already shifted."""
    model, plain = bench.make_model(), bench.make_model()
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    ids = torch.randint(5, 47, (2, 7), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], fused_lm_head=True)
    logp = (plain(input_ids=ids[:, :-1]).logits / 0.5).log_softmax(-1)
    where = "scoring.CompletionScorer.score"
    torch.testing.assert_close(
        out.log_probs,
        logp.gather(2, ids[:, 1:, None]).squeeze(2),
        msg=lambda m: changed(f"shift_labels are not scored as they stand: {m}", where),
    )
    torch.testing.assert_close(
        out.entropy, -(logp.exp() * logp).sum(-1), msg=lambda m: changed(f"entropy is another one: {m}", where)
    )


def test_fused_head_calls_the_backbone_as_a_module(bench):
    """`CompletionScorer` cuts its output in a forward hook."""
    model = bench.make_model()
    add_fused_lm_head(model)
    seen = []
    model.base_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape))
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, shift_labels=ids, fused_lm_head=True)
    assert seen == [(1, 3, 32)], changed("the backbone's forward hooks do not run", "scoring.CompletionScorer")
    assert model(input_ids=ids).logits.shape == (1, 3, 48)  # without the flag the model is as it was


def test_trainer_puts_the_fused_head_on_the_model(trained):
    ids = torch.tensor([[5, 6, 7]])
    output = trained.model(input_ids=ids, shift_labels=ids, fused_lm_head=True)
    message = changed("GRPOTrainer no longer adds a fused LM head that gives entropies", "scoring.CompletionScorer")
    assert output.log_probs.shape == ids.shape, message
    assert output.entropy is not None, message


# ---- configuration -----------------------------------------------------------------------------


def test_options_we_own_or_refuse_still_exist():
    """A key TRL renamed would slip through the check of `train:`."""
    known = set(GRPOConfig.__dataclass_fields__)
    gone = (
        (set(_OWNED) | set(_REFUSED)) - known - {"max_prompt_length"}
    )  # dropped by TRL before; people still write it
    assert not gone, changed(f"GRPOConfig has no {sorted(gone)} any more", "train/config.py")
    for key, (allowed, _) in _REFUSED.items():
        default = GRPOConfig.__dataclass_fields__[key].default
        assert default == allowed, changed(f"the default of {key} is {default!r} now", "train/config.py: _REFUSED")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_type", "dapo"),
        ("scale_rewards", "group"),
        ("beta", 0.0),
        ("num_generations", 8),
        ("num_iterations", 1),
        ("temperature", 1.0),
        ("importance_sampling_level", "token"),
        ("mask_truncated_completions", False),
    ],
)
def test_defaults_that_recipes_and_docs_rely_on(key, value):
    default = GRPOConfig.__dataclass_fields__[key].default
    assert default == value, changed(
        f"GRPOConfig.{key} defaults to {default!r}, not {value!r}", "recipes that leave it out"
    )


def test_epsilon_of_the_standard_deviation():
    """`reward.credit` adds TRL's 1e-4."""
    text = ast.unparse(tree(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    assert "(std_rewards + 0.0001)" in text, changed("TRL's advantage adds another epsilon", "reward/credit.py")
