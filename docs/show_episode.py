"""One group of real episodes, followed from the task to TRL's loss: what docs/concepts.md shows.

python docs/show_episode.py                                              # the quickstart's model, untrained
python docs/show_episode.py --checkpoint runs/quickstart-seed0/initial   # warmed up, see docs/get-started.md
python docs/show_episode.py --checkpoint ... agent.order=shared    # any override of the recipe
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformers

from memfactory.agents.running import run_episodes
from memfactory.cli.recipes import find_recipe
from memfactory.train.passes import cut
from memfactory.train.prepare import prepare
from memfactory.train.rows import build_rows, loss_weights
from memfactory.train.start import load_policy

GROUP = 2  # episodes of one task
BUDGET = 160  # positions in one micro-batch: small, so that there are several


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", type=Path)
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    asked = arguments.parse_intermixed_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prepared = prepare(find_recipe("memagent/quickstart"), ["environment.train_tasks=512", *asked.overrides])
    policy = load_policy(prepared, asked.checkpoint)

    # The first task on which the two members differ in reward (the others would teach nothing) and, from the
    # second chunk on, in what they remember (so that the prompts show what a group shares and what it does not).
    for task in prepared.train_tasks:
        episodes = run_episodes(prepared.agent, [task] * GROUP, policy)
        prepared.rewards.score(episodes)
        credit = prepared.rewards.assess(episodes, scale_rewards=prepared.recipe.train["scale_rewards"]).advantages
        first, second = ([turn.memory_after for turn in episode.turns] for episode in episodes)
        if credit.dead_share == 0 and first[0] == second[0] != "none" and first[1] != second[1]:
            break

    print(f"TASK {task.id}")
    for index, chunk in enumerate(task.stream):
        print(f"  chunk {index}   {chunk}")
    print(f"  question  {task.probes[0].question}")
    print(f"  answer    {task.probes[0].answers[0]}")

    for number, episode in enumerate(episodes):
        print(f"\nEPISODE {number}")
        for turn in episode.turns:
            print(f"  {turn.module:6}  {len(turn.prompt_ids)} -> {len(turn.completion_ids)} tokens  {turn.text!r}")
        scores = ", ".join(f"{name} {score.value:.2f}" for name, score in episode.scores.items())
        print(f"  scores {scores}  ->  reward {episode.reward:.3f}  ->  advantage {episode.advantage:+.4f}")

    turn = episodes[0].turns[0]
    print("\nRECORDED of the first turn")
    print(f"  prompt          {policy.trained.tokenizer.decode(turn.prompt_ids)}")
    print(f"  completion_ids  {turn.completion_ids}  ({turn.stop}: the last id ends the turn)")
    print(f"  logprobs        {[round(value, 4) for value in turn.logprobs]}")

    rows = build_rows(episodes)
    tokens = [sum(row.trained_tokens for row in rows if row.episode == number) for number in range(GROUP)]
    weights = {
        loss: loss_weights(rows, tokens, loss, prepared.max_turn_tokens) for loss in ("dapo", "grpo", "dr_grpo")
    }
    print(f"\nROWS   N = {sum(tokens)} trained tokens, E = {GROUP} episodes, n = {tokens}")
    print("  row  episode  prompt  trained  shared prefix  advantage   weight of a token: dapo   grpo  dr_grpo")
    for number, row in enumerate(rows):
        print(
            f"  {number:3}  {row.episode:7}  {len(row.prompt_ids):6}  {row.trained_tokens:7}  {row.shared_prefix:13}"
            f"  {row.advantages[0]:+9.4f}"
            + f"  {weights['dapo'][number]:24.4f} {weights['grpo'][number]:6.4f}  {weights['dr_grpo'][number]:7.4f}"
        )

    print(f"\nMICRO-BATCHES of at most {BUDGET} positions (rows x longest row)")
    number_of = {id(row): number for number, row in enumerate(rows)}
    for batch in cut(rows, BUDGET):
        size = f"{len(batch)} x {batch[0].length} = {len(batch) * batch[0].length} positions"
        print(
            f"  rows {[number_of[id(row)] for row in batch]}: {size}, {sum(row.length for row in batch)} of them real"
        )

    print("\nLOSS at the weights that sampled: the ratio is 1, so a token adds -weight * advantage / N")
    for loss, weight in weights.items():
        value = -sum(w * sum(row.advantages) for row, w in zip(rows, weight, strict=True)) / sum(tokens)
        print(f"  {loss:8} {value:+.6f}")


if __name__ == "__main__":
    main()
