"""The episodes of a report: which are taken, and how many thousands of them fit into a page that opens at once.

The page gets an *index* (a few numbers of every episode, by which it filters and sorts) and *blocks* (what the
episodes say). A block is compressed, and the browser inflates it when one of its episodes is opened. Inside a block
every text is written once: a memory is what the turn before wrote, and a prompt repeats chunk, memory and question.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memfactory.runs import Record, RunFolder

MAX_EPISODES = 10_000
"""Most episodes in a page, over all its runs."""
MAX_BYTES = 150_000_000
"""Rough limit for what they say, before it is compressed to about a third. Unit: characters."""
BLOCK = 750_000
"""Text of a block before it is compressed: what a browser inflates when an episode is opened. Unit: characters."""
_INDEXED = 300
"""Longest text in the index, which is for finding. Unit: characters."""
_REPEATED = 24
"""Shorter texts are not looked for in prompts. Unit: characters."""
_LEFT_OUT = {"prompt_ids", "completion_ids", "logprobs", "prefix_key", "policy_version", "choice"}

COLUMNS = (
    *("source", "split", "step", "id", "group", "task", "question", "gold", "answer", "reward", "advantage"),
    *("scores", "unmeasured", "tokens", "turns", "errors", "cut", "failed"),
    *("candidate", "mode", "sample", "block", "place"),
)
"""Fields of a line of the index. `scores` are in the order of :attr:`Packed.dimensions`, None where there is none, and
`unmeasured` are the places of those that were asked for and could not be measured."""


@dataclass
class Packed:
    """Episodes as the page holds them."""

    dimensions: list[str] = field(default_factory=list)
    index: list[list[Any]] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    """Each the base64 of zlib-compressed JSON ``{"texts": [...], "episodes": [...]}``."""
    _texts: dict[str, int] = field(default_factory=dict)
    _episodes: list[Record] = field(default_factory=list)
    _size: int = 0

    def add(self, source: int, record: Record) -> None:
        """Append an episode record of the run number `source`."""
        for name in record["scores"]:
            if name not in self.dimensions:
                self.dimensions.append(name)
        self.index.append(self._line(source, record))
        self._episodes.append(self._detail(record))
        if self._size > BLOCK:
            self.close()

    def close(self) -> None:
        """Compress what was added since the last block."""
        if self._episodes:
            data = plain_json({"texts": list(self._texts), "episodes": self._episodes})
            self.blocks.append(base64.b64encode(zlib.compress(data, 5)).decode())
        self._texts, self._episodes, self._size = {}, [], 0

    def _line(self, source: int, record: Record) -> list[Any]:
        turns, probes = record["turns"], record["task"]["probes"]
        scores = record["scores"]
        values = {
            **{key: record.get(key) for key in ("split", "step", "id", "group", "reward", "advantage")},
            **{key: record.get(key, "") for key in ("candidate", "mode", "sample", "failed")},
            "source": source,
            "task": record["task"]["id"],
            "question": _joined(probe["question"] for probe in probes),
            "gold": _joined(answer for probe in probes for answer in probe["answers"]),
            "answer": _joined(answer["text"] or "" for answer in record["answers"]),
            "scores": [_rounded(scores[name]["value"]) if name in scores else None for name in self.dimensions],
            "unmeasured": [
                k for k, name in enumerate(self.dimensions) if name in scores and scores[name]["value"] is None
            ],
            "tokens": sum(turn["prompt_tokens"] + turn["completion_tokens"] for turn in turns),
            "turns": len(turns),
            "errors": sum(bool(turn["error"]) for turn in turns),
            "cut": sum(turn["stop"] == "length" for turn in turns),
            "block": len(self.blocks),
            "place": len(self._episodes),
        }
        return [values[name] for name in COLUMNS]

    def _detail(self, record: Record) -> Record:
        task = record["task"]
        return {
            "probes": task["probes"],
            "answers": [{"text": answer["text"], "turn": answer.get("turn")} for answer in record["answers"]],
            "scores": record["scores"],
            "failed": record.get("failed", ""),
            "metadata": {
                key: value for key, value in task["metadata"].items() if isinstance(value, str | int | float)
            },
            "turns": [self._turn(turn, task["stream"], task["probes"]) for turn in record["turns"]],
        }

    def _turn(self, turn: Record, stream: list[str], probes: list[Record]) -> Record:
        shown = {key: value for key, value in turn.items() if key not in _LEFT_OUT and value not in ([], {}, "")}
        chunk = turn["chunk"]
        text = stream[chunk] if chunk is not None and chunk < len(stream) else None
        # an agent may cut the stream into chunks of its own: then this one is not what the turn has read
        if text is not None and not any(text in message["content"] for message in turn["messages"]):
            text = None
        known = [text or "", turn["memory_before"], *(probe["question"] for probe in probes)]
        parts = sorted({part for part in known if len(part) > _REPEATED}, key=len, reverse=True)
        if turn.get("retrieved"):
            shown["retrieved"] = [{**entry, "text": self._intern(entry["text"])} for entry in turn["retrieved"]]
        return {
            **shown,
            "chunk_text": None if text is None else self._intern(text),
            "text": self._intern(turn["text"]),
            "memory_before": self._intern(turn["memory_before"]),
            "memory_after": self._intern(turn["memory_after"]),
            "messages": [
                {
                    "role": message["role"],
                    "content": [self._intern(piece) for piece in _pieces(message["content"], parts)],
                }
                for message in turn["messages"]
            ],
        }

    def _intern(self, text: str) -> int:
        """Place of `text` in the texts of the block."""
        place = self._texts.setdefault(text, len(self._texts))
        if place == len(self._texts) - 1:
            self._size += len(text) + 4
        return place


def sample_episodes(
    folder: RunFolder, packed: Packed, source: int = 0, wanted: Sequence[tuple[int, str]] = (), share: int = 1
) -> int:
    """Add episodes of a run to `packed`; returns how many were logged.

    The first ones of every (step, split), so that whole groups stay together, and of evenly spaced
    steps where there are too many.

    Args:
        folder: of the run.
        packed: what they are added to.
        source: number of the run on the page.
        wanted: step and id of training episodes to take in any case, the most wanted first. Where only
            few episodes fit, these get at most half of the places.
        share: runs that the page is divided among.
    """
    newest: dict[Any, int] = {}  # an evaluation that was done twice at one step counts once
    size = 0
    for number, record in enumerate(folder.read_episodes(tokens=False)):
        newest[_key(record, number)] = number
        size += sum(map(_size, record["turns"]))
    logged = len(newest)
    if not logged:
        return 0
    limit = max(1, min(MAX_EPISODES, int(MAX_BYTES * logged / max(1, size))) // share)
    linked = [key for step, id in wanted if (key := (step, "train", id)) in newest]
    kept = {newest[key] for key in linked[: (limit + 1) // 2]}
    counts = Counter(key[:2] for key, number in newest.items() if number not in kept)
    limit -= len(kept)
    places = sorted(counts)
    if len(places) > limit:
        # both ends are kept: before and after are what one looks at first
        places = [places[round(i * (len(places) - 1) / max(1, limit - 1))] for i in range(limit)]
    quota = _quota(counts, places, limit)
    taken: Counter[tuple[int, str]] = Counter()
    for number, record in enumerate(folder.read_episodes(tokens=False)):
        place = record["step"], record["split"]
        if number in kept:
            packed.add(source, record)
        elif taken[place] < quota[place] and newest[_key(record, number)] == number:
            taken[place] += 1
            packed.add(source, record)
    packed.close()
    return logged


def plain_json(data: Any) -> bytes:
    """`data` as compact JSON. Half of a surrogate pair, which no browser can show, becomes ``?``."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _key(record: Record, number: int) -> Any:
    """What makes an episode of a folder another one: of an evaluation also who ran it, and how."""
    name = record.get("key") or record["id"] or number
    who = (record["candidate"], record["mode"], record.get("sample")) if "candidate" in record else ()
    return (record["step"], record["split"], name, *who)


def _size(turn: Record) -> int:
    """Roughly the characters of `turn` in a block: its memories and its chunk are written elsewhere too."""
    return len(turn["text"]) + len(turn["memory_after"]) + sum(len(m["content"]) for m in turn["messages"]) // 3 + 200


def _quota(counts: Counter[tuple[int, str]], places: list[tuple[int, str]], limit: int) -> dict[Any, int]:
    """Episodes to take from each place: an equal share, and what small places leave goes to larger ones."""
    quota: dict[Any, int] = defaultdict(int)
    for index, place in enumerate(sorted(places, key=counts.__getitem__)):
        quota[place] = min(counts[place], (limit - sum(quota.values())) // (len(places) - index))
    return quota


def _pieces(text: str, parts: Sequence[str]) -> list[str]:
    """`text` cut around every occurrence of the `parts`, the first ones first."""
    for number, part in enumerate(parts):
        before, found, after = text.partition(part)
        if found:
            rest = parts[number:]
            return [*_pieces(before, parts[number + 1 :]), part, *_pieces(after, rest)]
    return [text] if text else []


def _joined(texts: Any) -> str:
    return " | ".join(texts)[:_INDEXED]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
