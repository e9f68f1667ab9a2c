"""A single-turn agent through our trainer makes the step that TRL's own trainer makes.

Both get the same recorded rollouts: ours through an agent that replays them, TRL's through its
`rollout_func`. Everything else is the real thing. Compared is the whole gradient as the optimizer
gets it (no clipping), so a wrong norm and a wrong direction both fail.
"""

from __future__ import annotations

import pytest
from peft import LoraConfig

from memfactory.episode import StopReason

TOLERANCE = 1e-5
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "luspo", "cispo", "vespo")


def _compare(bench, tokenizer, folder, groups, *, model="qwen3", ours=None, **options):
    batch = sum(map(len, groups.values()))
    options = {"per_device_train_batch_size": batch, "num_generations": len(next(iter(groups.values())))} | options
    own, trainer = bench.ours(groups, bench.make_model(model), tokenizer, folder / "a", **(ours or {}), **options)
    reference, original = bench.trl(groups, bench.make_model(model), tokenizer, folder / "b", **options)
    assert len(own) == len(reference) == 1
    assert reference[0].norm() > 1e-4, "the reference gradient is nothing, so the comparison says nothing"
    assert bench.relative(own[0], reference[0]) < TOLERANCE
    return trainer, original


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_trl(bench, tokenizer, tmp_path, loss, scale):
    groups = bench.groups(4, 4, seed=1, dead=1)  # TRL computes the dead group, we skip it: same gradient
    trainer, original = _compare(bench, tokenizer, tmp_path, groups, loss_type=loss, scale_rewards=scale)
    assert trainer.losses == pytest.approx(original.losses, rel=1e-5, abs=1e-7)
    logs, reference = trainer.state.log_history[-1], original.state.log_history[-1]
    assert logs["groups/dead_share"] == 0.25
    assert {key: logs[key] for key in ("reward", "reward_std")} == pytest.approx(
        {key: reference[key] for key in ("reward", "reward_std")}
    )
    if scale != "batch":  # there TRL says whether the whole batch is tied
        assert logs["frac_reward_zero_std"] == reference["frac_reward_zero_std"]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_trl_whatever_our_micro_batches(bench, tokenizer, tmp_path, loss):
    """TRL makes one pass over the batch, we make one per row."""
    groups = bench.groups(3, 4, seed=2)
    trainer, _ = _compare(bench, tokenizer, tmp_path, groups, loss_type=loss, ours={"budget": 1})
    assert len(trainer._buffer[0]) == 12


@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo", "grpo", "dr_grpo", "luspo"])
def test_gradient_accumulation_equals_trl(bench, tokenizer, tmp_path, loss):
    """Four training steps to one optimizer step. (bnpo is left out: TRL's own value depends on its micro-batches.)"""
    groups = bench.groups(4, 4, seed=3)
    trainer, original = _compare(
        bench,
        tokenizer,
        tmp_path,
        groups,
        loss_type=loss,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        ours={"budget": 60},
    )
    assert len(trainer.losses) == len(original.losses) == 4
    assert sum(trainer.losses) == pytest.approx(sum(original.losses), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo"])
def test_several_generation_batches_in_one_optimizer_step_equal_trl(bench, tokenizer, tmp_path, loss):
    groups = bench.groups(4, 4, seed=4)
    trainer, _ = _compare(
        bench,
        tokenizer,
        tmp_path,
        groups,
        loss_type=loss,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        shuffle_dataset=False,
    )
    assert trainer.totals["episodes"] == 16


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_kl_term_equals_trl(bench, tokenizer, tmp_path, loss):
    """With a reference model that is not the policy, where no group is dead.

    (Dead groups differ by design: their KL term is skipped with them.)
    """
    reference = tmp_path / "reference"
    bench.make_model(seed=7).save_pretrained(reference)
    groups = bench.groups(3, 4, seed=5)

    def with_reference(kind):
        model = bench.make_model(kind)
        model.config._name_or_path = str(reference)  # TRL loads the reference model from there
        return model

    options = {"per_device_train_batch_size": 12, "num_generations": 4, "loss_type": loss, "beta": 0.04}
    own, _ = bench.ours(groups, with_reference("qwen3"), tokenizer, tmp_path / "a", budget=50, **options)
    expected, _ = bench.trl(groups, with_reference("qwen3"), tokenizer, tmp_path / "b", **options)
    without, _ = bench.ours(groups, with_reference("qwen3"), tokenizer, tmp_path / "c", **(options | {"beta": 0.0}))
    assert bench.relative(own[0], without[0]) > 1e-3, "the KL term changed nothing, so the comparison says nothing"
    assert bench.relative(own[0], expected[0]) < TOLERANCE


def test_lora_with_kl_equals_trl(bench, tokenizer, tmp_path):
    """The reference is the model without its adapter; only adapter weights have a gradient."""
    groups = bench.groups(3, 4, seed=6)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"per_device_train_batch_size": 12, "num_generations": 4, "beta": 0.04, "peft_config": lora}
    own, trainer = bench.ours(groups, bench.make_model(), tokenizer, tmp_path / "a", budget=50, **options)
    expected, _ = bench.trl(groups, bench.make_model(), tokenizer, tmp_path / "b", **options)
    assert 0 < len(own[0]) < sum(p.numel() for p in trainer.model.parameters())
    assert bench.relative(own[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"importance_sampling_level": "sequence", "loss_type": "dapo"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "dr_grpo", "max_completion_length": 400},
        {"temperature": 0.7},
        {"delta": 1.5},
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_other_options_of_trl_mean_the_same(bench, tokenizer, tmp_path, options):
    _compare(bench, tokenizer, tmp_path, bench.groups(3, 4, seed=8), **options)


def test_llama_equals_trl(bench, tokenizer, tmp_path):
    _compare(bench, tokenizer, tmp_path, bench.groups(3, 4, seed=9), model="llama", loss_type="grpo")


def test_mask_truncated_completions_equals_trl(bench, tokenizer, tmp_path):
    groups = bench.groups(3, 4, seed=10)
    for number, episodes in enumerate(groups.values()):
        for index, episode in enumerate(episodes):
            turn = episode.turns[0]
            if (index + number) % 3:
                turn.completion_ids[-1] = tokenizer.eos_token_id  # TRL looks for it, we record why a turn ended
            else:
                turn.stop = StopReason.LENGTH
    _compare(bench, tokenizer, tmp_path, groups, mask_truncated_completions=True)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "cispo", "vespo"])
def test_second_iteration_on_the_same_episodes_equals_trl(bench, tokenizer, tmp_path, loss):
    """Off-policy: ratios have moved and some are clipped. Ours are against the sampler's log-probs."""
    groups = bench.groups(3, 4, seed=11)
    bench.fill_in_logprobs(groups, bench.make_model())
    options = {
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "loss_type": loss,
        "num_iterations": 2,
        "max_steps": 2,
        "optim": "sgd",  # Adam's first step is the sign of the gradient, which turns rounding into differences
        "learning_rate": 0.5,
    }
    own, _ = bench.ours(groups, bench.make_model(), tokenizer, tmp_path / "a", budget=60, **options)
    expected, original = bench.trl(groups, bench.make_model(), tokenizer, tmp_path / "b", **options)
    assert len(own) == len(expected) == 2
    if loss in ("dapo", "grpo"):
        assert original.state.log_history[-1]["clip_ratio/region_mean"] > 0.05
    assert bench.relative(own[0], own[1]) > 1e-2
    assert bench.relative(own[0], expected[0]) < TOLERANCE
    assert bench.relative(own[1], expected[1]) < 5 * TOLERANCE  # the weights differ by rounding already


@pytest.mark.parametrize(
    ("steps", "accumulation", "iterations"),
    [(1, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (3, 2, 1), (2, 3, 1), (1, 2, 2)],
)
def test_ratios_are_taken_against_the_sampler_exactly_when_trl_does(
    bench, tokenizer, tmp_path, steps, accumulation, iterations
):
    """With 3 steps per generation and 2 per update, the third step trains on episodes of older weights."""
    groups = bench.groups(6, 4, seed=12)
    options = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "steps_per_generation": steps,
        "gradient_accumulation_steps": accumulation,
        "num_iterations": iterations,
    }
    _, ours = bench.ours(groups, bench.make_model(), tokenizer, tmp_path / "a", **options)
    _, theirs = bench.trl(groups, bench.make_model(), tokenizer, tmp_path / "b", **options)
    expected = any("old_per_token_logps" in inputs for inputs in theirs._buffered_inputs)
    assert any("old_per_token_logps" in micro for step in ours._buffer for micro in step) == expected
