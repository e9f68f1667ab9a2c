"""The ledger of a run: which prompts were issued, and what became of each of them.

A prompt is a task that a generation batch asks `num_generations` times; in one pass over the tasks each has its turn
once. It ends as *trained*, at the first update that its rows enter, or as *dropped*, with a reason. So at any time

    issued = trained + dropped + open

and after a whole pass the prompts that ended in it are the tasks, each once. The lines go to ``ledger.jsonl``, and
what is open is part of every checkpoint: a run that was killed goes on with the lines it would have written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfactory.episode import Episode, StopReason
from memfactory.reward.advantage import GroupState

REASONS = {
    "solved": "all its episodes got the best reward of the batch",
    "failed": "all its episodes got the worst reward of the batch",
    "tied": "all its episodes got the same reward, in between",
    "zero": "no turn of it got an advantage",
    "unscored": "fewer episodes than can be compared could be scored",
    "truncated": "what could be learned from stands in turns that were cut, which are masked",
    "frozen": "no turn of it is the trained model's",
    "stale": "the weights that sampled it were too many updates old by its turn",
    "no room": "it was left over at the end of a pass: too few for a generation batch",
    "run ended": "the last update came before it was its turn",
}
"""Why a prompt was dropped."""


@dataclass(frozen=True)
class Played:
    """What its rank knows of one episode when the batch is finished; small, because it is sent to all ranks."""

    prompt: int
    """Index of its task. That of the original for a re-roll."""
    group: str
    """Episodes of one group are compared with each other."""
    scored: bool
    fault: str
    """Why it has no reward."""
    steps: tuple[int, ...]
    """Training steps of the batch that rows of it enter."""
    cut: bool
    """A turn of it reached its token limit."""
    trainable: bool
    """A turn of it is trained, were its advantage not 0."""

    @classmethod
    def of(cls, episode: Episode, prompt: int, steps: Sequence[int]) -> Played:
        return cls(
            prompt,
            episode.group,
            episode.reward is not None,
            _fault(episode),
            tuple(steps),
            any(turn.stop is StopReason.LENGTH for turn in episode.turns),
            any(turn.trainable for turn in episode.turns),
        )


def _fault(episode: Episode) -> str:
    if episode.reward is not None:
        return ""
    missing = (f"{name}: {score.reason}" for name, score in episode.scores.items() if score.value is None)
    return (episode.failed or next(missing, "no reason given"))[:200]


def reason(
    own: Sequence[Played], state: GroupState, *, enough: int = 2, masked: bool = False, learned: bool = False
) -> str:
    """Why the prompt of the episodes `own` is dropped; empty where it is trained.

    Args:
        own: all of its episodes, of all ranks, re-rolls included.
        state: of its group.
        enough: episodes that must be scored for a comparison.
        masked: turns that were cut are not trained.
        learned: something that learns beside the policy learned from it, where its group has a signal.
    """
    if any(episode.steps for episode in own):
        return ""
    if sum(episode.scored for episode in own) < enough:
        return "unscored"
    if state in (GroupState.SOLVED, GroupState.FAILED, GroupState.TIED):
        return str(state)
    if learned and state is GroupState.SIGNAL:
        return ""
    if masked and any(episode.cut for episode in own):
        return "truncated"
    return "zero" if any(episode.trainable for episode in own) else "frozen"


class Ledger:
    """See the module's docstring. Every rank keeps the same one; `write` is given to the first alone.

    Args:
        names: ids of all tasks, by index.
        per_batch: prompts in a generation batch, over all ranks.
        write: takes a line, a mapping with ``step``.
    """

    def __init__(
        self, names: Sequence[str], per_batch: int, write: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.names = names
        self.per_pass = max(len(names) // max(per_batch, 1), 1)
        """Generation batches in a pass: what is left over makes none."""
        self.issued = self.trained = self.repeated = 0
        self.dropped: Counter[str] = Counter()
        self.batch = -1
        """Number of the newest batch."""
        self._write = write
        self._seen: set[int] = set()
        """Prompts issued in this pass."""
        self._open: set[tuple[int, int]] = set()
        """(batch, prompt) of those that have not ended; a prompt of the last pass can wait for its update in this."""
        self._enter: list[list[int]] = []
        """Prompts by training step of the newest batch that rows of them enter."""
        self._entered: list[tuple[int, int]] = []
        """(batch, prompt) whose rows entered since the last update."""

    def _line(self, step: int, event: str, batch: int | None, prompts: Sequence[int] | None, **more: Any) -> None:
        if self._write is not None and (prompts or prompts is None):
            number = (self.batch if batch is None else batch) // self.per_pass
            listed = {} if prompts is None else {"prompts": [self.names[prompt] for prompt in prompts]}
            self._write({"step": step, "pass": number, "event": event, "batch": batch} | more | listed)

    def issue(self, step: int, prompts: Sequence[int]) -> None:
        """A batch of `prompts` begins, for update `step`. With the last batch of a pass go those left over."""
        self.batch += 1
        if self.batch % self.per_pass == 0:
            self._seen = set()
        prompts = list(dict.fromkeys(prompts))
        self.repeated += sum(prompt in self._seen for prompt in prompts)
        self._seen.update(prompts)
        self._open.update((self.batch, prompt) for prompt in prompts)
        self.issued += len(prompts)
        self._line(step, "issued", self.batch, prompts)
        if (self.batch + 1) % self.per_pass == 0:
            over = [prompt for prompt in range(len(self.names)) if prompt not in self._seen]
            self.issued += len(over)
            self._line(step, "issued", None, over)
            self._drop(step, None, over, "no room")

    def finish(self, step: int, why: Mapping[int, str], steps: Mapping[int, Sequence[int]], **more: Any) -> None:
        """All episodes of the batch are done.

        Args:
            step: the update they are for.
            why: reason by prompt that is dropped.
            steps: training steps of the batch by prompt that is trained.
            more: what else to say about the batch.
        """
        self._line(step, "finished", self.batch, None, **more)
        for name in REASONS:
            self._drop(step, self.batch, [prompt for prompt, own in why.items() if own == name], name)
        size = 1 + max((place for places in steps.values() for place in places), default=-1)
        self._enter = [[prompt for prompt, places in steps.items() if place in places] for place in range(size)]

    def _drop(self, step: int, batch: int | None, prompts: Sequence[int], why: str) -> None:
        self.dropped[why] += len(prompts)
        self._open.difference_update((batch, prompt) for prompt in prompts)
        self._line(step, "dropped", batch, prompts, reason=why)

    def enter(self, place: int) -> None:
        """The training step `place` of the newest batch was made."""
        if place < len(self._enter):
            self._entered += [(self.batch, prompt) for prompt in self._enter[place]]

    def update(self, step: int, *, last: bool = False) -> None:
        """Update `step` was made; `last` if none will follow."""
        done: dict[int, list[int]] = {}
        for batch, prompt in dict.fromkeys(self._entered):
            if (batch, prompt) in self._open:  # else it entered an earlier update too
                self._open.remove((batch, prompt))
                done.setdefault(batch, []).append(prompt)
        self._entered = []
        for batch, prompts in done.items():
            self.trained += len(prompts)
            self._line(step, "trained", batch, prompts)
        for batch in sorted({batch for batch, _ in self._open}) if last else ():
            self._drop(step, batch, sorted(prompt for own, prompt in self._open if own == batch), "run ended")

    def totals(self) -> dict[str, Any]:
        """For `summary.json`: prompts by what became of them."""
        dropped = {name: number for name in REASONS if (number := self.dropped[name])}
        totals = {"issued": self.issued, "trained": self.trained, "dropped": dropped, "open": len(self._open)}
        return totals | ({"repeated": self.repeated} if self.repeated else {})

    # ---- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counts and what is open, as plain data: its size depends on the tasks, not on the length of the run."""
        return {
            "issued": self.issued,
            "trained": self.trained,
            "repeated": self.repeated,
            "dropped": dict(self.dropped),
            "batch": self.batch,
            "seen": sorted(self._seen),
            "open": sorted(self._open),
            "enter": self._enter,
            "entered": self._entered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.issued, self.trained, self.repeated = state["issued"], state["trained"], state["repeated"]
        self.dropped, self.batch = Counter(state["dropped"]), state["batch"]
        self._seen, self._open = set(state["seen"]), {(batch, prompt) for batch, prompt in state["open"]}
        self._enter = [list(prompts) for prompts in state["enter"]]
        self._entered = [(batch, prompt) for batch, prompt in state["entered"]]


def play(
    played: Sequence[Played],
    states: Mapping[str, GroupState],
    names: Sequence[str],
    **rules: Any,
) -> tuple[dict[int, str], dict[int, list[int]], dict[str, str]]:
    """What a finished batch comes to.

    Args:
        played: the episodes of all ranks.
        states: by group.
        names: ids of the tasks, by index.
        rules: passed on to :func:`reason`.

    Returns:
        why, by prompt that is dropped; training steps by prompt that is trained; the first fault by id of each prompt
        that could not be scored.
    """
    by_prompt: dict[int, list[Played]] = {}
    for episode in played:
        by_prompt.setdefault(episode.prompt, []).append(episode)
    why: dict[int, str] = {}
    steps: dict[int, list[int]] = {}
    faults: dict[str, str] = {}
    for prompt, own in by_prompt.items():
        dropped = reason(own, states.get(names[prompt], GroupState.UNMEASURED), **rules)
        if dropped:
            why[prompt] = dropped
        else:  # what only a learner learned from counts as the first step's
            steps[prompt] = sorted({place for episode in own for place in episode.steps}) or [0]
        if dropped == "unscored":
            faults[names[prompt]] = next((episode.fault for episode in own if episode.fault), "")
    return why, steps, faults
