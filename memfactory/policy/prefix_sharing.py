"""Sequences that begin alike are packed into one, so that what they share is computed once.

Sorted by their ids, each sequence owns what comes after the longest beginning it has in common with the one
before it, and needs nothing else computed: the keys and values of its beginning are there already. Owned pieces, one
after the other, are the packed sequence; any tree of prefixes, of any depth, takes this form:

    sequences   a b c d e      packed    a b c d e | f g | h i      (N = 9 for 13 ids)
                a b c f g      position  0 1 2 3 4   3 4   1 2
                a h i          owned by  row 0       row 1 row 2

In attention the queries of an owned piece look back along their own sequence only (:class:`Span`), which is what
the model does with each sequence by itself; everything else in a transformer works on one position at a time. So
outputs and gradients are those of separate sequences, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

KEYWORD = "prefix_plan"
"""Under this name a model's forward pass hands a :class:`Plan` down to attention."""
_ALIKE = 0.5
"""Spans are padded to a common shape where the smaller has at least this share of the larger."""
_LARGEST = 1 << 24
"""Most pairs of a query and a key in one call of the attention kernel: its mask has as many entries."""


WORTH = 0.95
"""Packing pays where it leaves at most this share of the positions,"""
LEAST = 128
"""and saves at least so many: gathering keys and masking cost something too."""


def worth(separate: int, unique: int) -> bool:
    """Whether to compute `unique` packed positions in the place of `separate` ones."""
    return unique <= WORTH * separate and separate - unique >= LEAST


@dataclass(frozen=True, slots=True)
class Span:
    """Queries that stand in a row at the end of a path of keys."""

    first: int
    """Place of the first query."""
    count: int
    """Number of queries."""
    path: Tensor
    """(L,) places of the keys, from the beginning of the sequence to the last query."""


@dataclass(slots=True)
class _Block:
    """Spans of similar shape, aligned on the right: R of them, with Q queries and L keys."""

    queries: Tensor  # (R, Q) places
    keys: Tensor  # (R, L) places
    missing_queries: Tensor  # (R,) columns of padding on the left
    missing_keys: Tensor  # (R,)
    _biases: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    @property
    def simple(self) -> bool:
        """One whole sequence: nothing is padded, and causal attention is all that is asked for."""
        return len(self.queries) == 1 and self.queries.shape == self.keys.shape

    def bias(self, dtype: torch.dtype, times: int) -> Tensor:
        """(R, 1, times Q, L), 0 where a query sees a key and -inf where not. One tensor for all layers."""
        if (dtype, times) not in self._biases:
            device = self.keys.device
            query = torch.arange(self.queries.shape[1], device=device)  # (Q,)
            key = torch.arange(self.keys.shape[1], device=device)  # (L,)
            behind = self.keys.shape[1] - self.queries.shape[1]
            seen = (key <= query[:, None] + behind)[None] & (key >= self.missing_keys[:, None, None])  # (R, Q, L)
            # padding sees everything: its output is not used, and nothing to see would be NaN
            seen |= (query < self.missing_queries[:, None])[:, :, None]
            bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
            self._biases[dtype, times] = bias[:, None].repeat(1, 1, times, 1)
        return self._biases[dtype, times]


class Joint(Protocol):
    """Where other passes over the same tree meet a pass (:mod:`memfactory.policy.stem`)."""

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (M, K D) of all places of attention layer `layer`, from those (N, K D) of this pass."""


class Plan:
    """How the queries of a forward pass attend, see the module.

    Args:
        spans: of all queries, in the order of their places.
        queries: N, their number.
        device: where the model computes.
        joint: adds the keys and values that are known from elsewhere; None: there are none.
    """

    def __init__(self, spans: Sequence[Span], queries: int, device: torch.device, joint: Joint | None = None) -> None:
        self.joint = joint
        groups = _alike(spans)
        self.blocks = [_block(group, device) for group in groups]
        inverse = torch.empty(queries, dtype=torch.long)
        start = 0
        for group in groups:
            width = max(span.count for span in group)
            for row, span in enumerate(group):
                end = start + (row + 1) * width
                inverse[span.first : span.first + span.count] = torch.arange(end - span.count, end)
            start += len(group) * width
        self.inverse = inverse.to(device)
        """(N,) where each query's output stands among the outputs of all blocks."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int | None, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention along each query's own path.

        Args:
            query: (1, H, N, D).
            key: (1, K, M, D), of all places, M >= N, or with a joint of those of this pass, M = N; K divides H.
            value: as `key`.
            layer: which one attends; a joint needs to know.

        Returns:
            (1, N, H, D).
        """
        heads, key_heads, width = query.shape[1], key.shape[1], query.shape[3]
        times = heads // key_heads
        flat_q, flat_k, flat_v = (_flat(states) for states in (query, key, value))  # (N, H D), (M, K D)
        if self.joint is not None:
            assert layer is not None, "asked of the model before (prefix_support.staged)"
            flat_k, flat_v = self.joint.join(layer, flat_k, flat_v)
        outputs = []
        for block in self.blocks:
            q = embedding(block.queries, flat_q).unflatten(-1, (key_heads, times, width))  # (R, Q, K, H / K, D)
            k, v = (
                embedding(block.keys, flat).unflatten(-1, (key_heads, width)).transpose(1, 2)  # (R, K, L, D)
                for flat in (flat_k, flat_v)
            )
            if block.simple:
                q = q.flatten(2, 3).transpose(1, 2)  # (1, H, Q, D)
                k, v = (states.repeat_interleave(times, dim=1) for states in (k, v))
                out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, is_causal=True)
                out = out.transpose(1, 2)  # (1, Q, H, D)
            else:
                # the queries of all heads that look at the same keys, one after the other: no key is repeated for them
                q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, H / K Q, D)
                bias = block.bias(q.dtype, times)
                out = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
                out = out.unflatten(2, (times, -1)).permute(0, 3, 1, 2, 4)  # (R, Q, K, H / K, D)
            outputs.append(out.reshape(-1, heads * width))  # (R Q, H D)
        return embedding(self.inverse, torch.cat(outputs)).view(1, -1, heads, width)


def _flat(states: Tensor) -> Tensor:
    """(1, H, N, D) as (N, H D): a row is gathered, and its gradients are summed, at once."""
    return states[0].transpose(0, 1).flatten(1)


def _alike(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans of similar shape together, within :data:`_LARGEST` pairs."""
    groups: list[list[Span]] = []
    keys = 0
    for span in sorted((span for span in spans if span.count), key=lambda span: -span.count):
        longest = max(keys, len(span.path))
        if (
            groups
            and span.count >= _ALIKE * groups[-1][0].count
            and min(len(span.path), keys) >= _ALIKE * longest
            and (len(groups[-1]) + 1) * groups[-1][0].count * longest <= _LARGEST
        ):
            groups[-1].append(span)
            keys = longest
        else:
            groups.append([span])
            keys = len(span.path)
    return groups


def _block(spans: Sequence[Span], device: torch.device) -> _Block:
    width, length = max(span.count for span in spans), max(len(span.path) for span in spans)
    queries = torch.zeros(len(spans), width, dtype=torch.long)
    keys = torch.zeros(len(spans), length, dtype=torch.long)
    for row, span in enumerate(spans):
        queries[row, width - span.count :] = torch.arange(span.first, span.first + span.count)
        keys[row, length - len(span.path) :] = span.path
    return _Block(
        queries.to(device),
        keys.to(device),
        torch.tensor([width - span.count for span in spans], device=device),
        torch.tensor([length - len(span.path) for span in spans], device=device),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring places of a packed sequence, computed in one forward pass."""

    first: int
    ids: Tensor
    """(1, N)"""
    positions: Tensor
    """(1, N)"""
    plan: Plan

    def arguments(self) -> dict[str, Any]:
        """What the model's forward pass wants; the mask is there so that transformers makes none of its own."""
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.ids.device)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask, KEYWORD: self.plan}


class Packed:
    """Sequences, packed as the module says.

    Args:
        sequences: lists of ids, none empty.
        known: ids of a beginning whose keys and values come from elsewhere. They have the first places in paths, and
            sequences that begin so own only what comes after.
    """

    def __init__(self, sequences: Sequence[list[int]], known: Sequence[int] = ()) -> None:
        self.raw = sum(map(len, sequences))
        """Ids of all sequences."""
        self.known = list(known)
        ids: list[int] = []
        positions: list[int] = []
        self.paths: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(sequences)
        """(L,) where the ids of each sequence stand in the packed one."""
        self._owned: list[tuple[int, int, int]] = []
        """Sequence, first place and number of ids of each piece that is owned."""
        before = self.known
        path = torch.arange(len(known))
        for index in _order(sequences, self.known):
            own = sequences[index]
            shared = common(before, own)
            first = len(ids)
            ids += own[shared:]
            positions += range(shared, len(own))
            path = torch.cat([path[:shared], len(known) + torch.arange(first, len(ids))])
            self.paths[index] = path
            self._owned.append((index, first, len(ids) - first))
            before = own
        self.ids, self.positions = torch.tensor(ids), torch.tensor(positions)

    @property
    def unique(self) -> int:
        """N, ids that are computed."""
        return len(self.ids)

    def pieces(self, device: torch.device, most: int | None = None, joint: Joint | None = None) -> Iterator[Piece]:
        """The packed sequence in pieces of at most `most` places; all in one without."""
        step = most or self.unique
        for first in range(0, self.unique, step):
            end = min(first + step, self.unique)
            spans = []
            for index, start, count in self._owned:
                low, high = max(start, first), min(start + count, end)
                if low < high:
                    path = self.paths[index]
                    spans.append(Span(low - first, high - low, path[: len(path) - (start + count - high)]))
            plan = Plan(spans, end - first, device, joint)
            ids, positions = self.ids[first:end].to(device), self.positions[first:end].to(device)
            yield Piece(first, ids[None], positions[None], plan)

    def whole(self, device: torch.device, joint: Joint | None = None) -> Piece:
        """The packed sequence in one piece."""
        return next(self.pieces(device, joint=joint))


def common(one: list[int], other: list[int]) -> int:
    """Ids at the beginning of both."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low, high = 0, most  # alike up to `low`, not up to `high`
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def unique_ids(sequences: Sequence[list[int]], known: Sequence[int] = ()) -> int:
    """Ids that :class:`Packed` would compute."""
    unique, before = 0, list(known)
    for index in _order(sequences, before):
        own = sequences[index]
        unique += len(own) - common(before, own)
        before = own
    return unique


def _order(sequences: Sequence[list[int]], known: list[int]) -> list[int]:
    """By ids, so that those that begin alike are neighbours; what begins with the known ids comes first."""
    return sorted(range(len(sequences)), key=lambda index: (sequences[index] < known, sequences[index]))
