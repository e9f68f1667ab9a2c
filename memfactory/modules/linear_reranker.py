"""Reranking by two matrices that learn from what replies cite: RMM's retrospective reflection (arXiv 2503.08026).

With q (d,) the question's vector, m_i (d,) that of candidate i, and fresh noise u_i from (0, 1) for every draw:

    q' = q + W_q q      m'_i = m_i + W_m m_i      s_i = q' . m'_i
    g_i = -log(-log u_i)                          p = softmax((s + g) / tau) over the K candidates
    c_1 ... c_M drawn from p one after the other, without replacement
    log P = sum_j log p(c_j | c_1 ... c_j-1)      p(c | taken) = p_c / sum of p over what is not taken
    R_j = +1 if the reply cites c_j, else -1      d phi = lr * sum_j (R_j - b) grad_phi log p(c_j | c_1 ... c_j-1)

W_q and W_m begin at zero: an untrained reranker ranks as the vectors alone do.

What the update estimates. The distribution of the noise does not depend on phi, so the noise can be taken as given:
the mean over g of the gradient given g is the gradient of the mean. The baseline adds nothing on average, since
sum_c grad p(c | taken) = 0. Crediting each entry with its own R_j is the exact gradient for each draw on its own,
given what was taken before it; it leaves out that a draw also changes what later draws can take, and which others
stand beside an entry when the reply is written. So with M = 1 it is the gradient of the expected reward, and with
M > 1 that of a short-sighted one, which pays for taking useful entries early (with M = K, where every order draws
everything, the expected reward is flat and this is not). ``credit: draw`` credits every term with the sum over the
draw, which is unbiased for the expected sum of R whatever a reply cites, at a greater variance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from memfactory.draws import episode_seed
from memfactory.episode import Choice, Episode, StopReason, Turn
from memfactory.errors import EngineError, RecipeError, RecipeErrors
from memfactory.memory.entries import Entry
from memfactory.search.base import content
from memfactory.search.build import EmbedderOptions, build_embedder

FILE = "rerank.safetensors"


class Features(NamedTuple):
    """What a draw was made from, float32."""

    q: np.ndarray
    """(d,) the question."""
    m: np.ndarray
    """(K, d) the candidates."""
    noise: np.ndarray
    """(K,) g."""

    def __repr__(self) -> str:
        """Shapes alone: asyncio writes out the result of a finished task, and ten thousand numbers take a while."""
        return f"Features(q {self.q.shape}, m {self.m.shape}, noise {self.noise.shape})"


@dataclass(frozen=True, slots=True)
class Lesson:
    """A draw and what it was worth."""

    features: Features
    chosen: tuple[int, ...]
    """(M,) places of the candidates that were drawn, in the order of the draw."""
    credit: tuple[float, ...]
    """(M,) factor of each log p(c_j | ...)."""
    cited: int
    """How many of them the reply cites."""


@dataclass(eq=False)
class LinearReranker:
    """See the module's docstring. The defaults are the paper's.

    It needs the extra `train` as soon as it is used. It asks no language model, so its turns have no tokens.
    """

    m: int = 5
    """Entries kept. The paper: 5 of 20."""
    tau: float = 0.5
    """Temperature of the draw. Vectors have unit norm, so before training scores differ by a few tenths, and the draw
    is almost uniform: the noise has a standard deviation of 1.28."""
    baseline: float = 0.5
    """b."""
    lr: float = 1e-3
    """Learning rate."""
    batch: int = 4
    """Questions in an update, whose gradient is their mean; what is left over at the end of a rollout is a smaller
    batch, a mean as well, so that `lr` means the same in each."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """``sgd`` without momentum is the formula; ``adam`` gets there in fewer questions."""
    reward: Literal["citation", "advantage"] = "citation"
    """``citation``: R of the paper. ``advantage``: the whole draw is credited with the advantage of its turn, as the
    recipe's rewards and credit give it (needs groups: `train.num_generations` of 2 and more); a variant of ours."""
    credit: Literal["item", "draw"] = "item"
    """Of ``citation``. ``item``: each entry has its own. ``draw``: each has the sum, which is unbiased; of ours."""
    shuffle_citations: bool = False
    """Control experiment: permute R over all draws of a rollout, so that it says nothing about any entry. (Inside a
    draw is not enough: whoever is drawn together with a useful entry would still earn more on average.)"""
    embedder: EmbedderOptions = field(default_factory=EmbedderOptions)
    """Where vectors come from; give the one that `retrieve.search` has, so that each text is embedded once."""
    draw_seed: int = 0
    """Of draws before the trainer seeds anew, which it does at every rollout: those of warm-up and evaluation."""
    name: str = "rerank"

    def __post_init__(self) -> None:
        wrong = [
            RecipeError(f"agent.rerank.{key}: {getattr(self, key)}", "", f"use a number {meaning}")
            for key, fits, meaning in (
                ("m", self.m >= 1, "from 1 on"),
                ("batch", self.batch >= 1, "from 1 on"),
                ("tau", self.tau > 0, "above 0"),
                ("lr", self.lr >= 0, "from 0 on"),
            )
            if not fits
        ]
        if wrong:
            raise RecipeErrors("agent.rerank", wrong)
        self._weights: tuple[Any, Any] | None = None
        """W_q and W_m, (d, d) float32 each; made when d is known."""
        self._optimizer: Any = None
        self._generator: Any = None
        self._seed = self.draw_seed

    # ---- drawing -----------------------------------------------------------------------------

    def choose(self, question: str, entries: Sequence[Entry], *, greedy: bool) -> Turn:
        """A turn that keeps `m` of `entries`.

        Args:
            greedy: keep those with the best scores instead of drawing; equal scores in the order of `entries`.

        Raises:
            EngineError: an embedder failed, or its vectors do not fit the weights.
        """
        ids = tuple(entry.id for entry in entries)
        q, m = self._vectors(question, entries)
        scores = self._scores(q, m)  # (K,) float64
        kept = min(self.m, len(ids))
        if greedy or not kept:
            order = np.argsort(-scores, kind="stable")[:kept]
            choice = Choice(ids, tuple(order.tolist()), float("nan"))
        else:
            # rounded before it is used: what is kept is what was drawn with
            random = self._random_for(question, ids)
            noise = _gumbel(len(ids), random).astype(np.float32)
            logits = (scores + noise) / self.tau
            # the largest of log p + Gumbel noise are a draw from p without replacement (arXiv 1903.06059, eq. 6)
            order = np.argsort(-(logits + _gumbel(len(ids), random)), kind="stable")[:kept]
            torch = _library("torch")
            logprob = log_terms(torch.from_numpy(logits), order.tolist()).sum().item()
            choice = Choice(ids, tuple(order.tolist()), logprob, Features(q, m, noise))
        text = " ".join(ids[place] for place in choice.chosen)
        return Turn(self.name, [], [], [], text, StopReason.STOP, trainable=False, choice=choice)

    def _vectors(self, question: str, entries: Sequence[Entry]) -> tuple[np.ndarray, np.ndarray]:
        """q (d,) and m (K, d)."""
        options, texts = self.embedder, [content(entry) for entry in entries]
        embed = build_embedder(options).embed
        q = embed([options.query_prefix + question if question.strip() else ""])[0]
        m = embed([options.entry_prefix + text if text.strip() else "" for text in texts])
        if not (width := max(len(q), m.shape[1])):  # nothing but blanks
            width = self._width()
        # the embedder does not know how long the vector of a blank text is when it has seen nothing else
        q = q if len(q) else np.zeros(width, dtype=np.float32)
        return q, m if m.shape[1] else np.zeros((len(entries), width), dtype=np.float32)

    def _scores(self, q: np.ndarray, m: np.ndarray) -> np.ndarray:
        """s (K,). Summed as dense search sums, so that at zero weights they are its scores to the last bit."""
        torch = _library("torch")
        with torch.no_grad():
            direction = _direction(torch.from_numpy(q), *self._ready(len(q))).numpy()
        return (m.astype(np.float64) * direction).sum(axis=1)

    def _random_for(self, question: str, ids: Sequence[str]) -> Any:
        """The generator of the episode under way, or the one that all episodes share."""
        own = episode_seed(self._seed, " ".join([question, *ids]).encode("utf-8", "replace"))
        return _library("torch").Generator().manual_seed(own) if own is not None else self._random()

    # ---- learning ----------------------------------------------------------------------------

    def experience(self, episodes: Sequence[Episode]) -> list[Lesson]:
        """The draws in `episodes`, in order, with what the reply behind each says of it.

        Vectors go over from the turns to the lessons and are gone with them. Left out are greedy choices, and under
        ``citation`` those whose reply could not be read: nobody knows what it used.
        """
        found: list[tuple[Choice, list[bool], float]] = []
        for episode in episodes:
            for place, turn in enumerate(episode.turns):
                if turn.module != self.name or turn.choice is None or turn.choice.features is None:
                    continue
                if place + 1 == len(episode.turns):
                    raise EngineError(
                        f"task {episode.task.id}: no turn follows that of the reranker",
                        "it learns from what the next turn cites",
                        "let the agent append the reply behind it",
                    )
                choice, reply = turn.choice, episode.turns[place + 1]
                turn.choice = replace(choice, features=None)
                if self.reward == "advantage" or not reply.error:
                    cited = [choice.candidates[drawn] in reply.cited for drawn in choice.chosen]
                    found.append((choice, cited, turn.advantage))
        if self.shuffle_citations:
            found = self._shuffled(found)
        return [
            Lesson(choice.features, choice.chosen, self._credit(cited, advantage), sum(cited))
            for choice, cited, advantage in found
        ]

    def _credit(self, cited: Sequence[bool], advantage: float) -> tuple[float, ...]:
        if self.reward == "advantage":
            return (advantage,) * len(cited)
        values = [(1.0 if used else -1.0) - self.baseline for used in cited]
        return (sum(values),) * len(values) if self.credit == "draw" else tuple(values)

    def _shuffled(self, found: Sequence[tuple[Choice, list[bool], float]]) -> list[tuple[Choice, list[bool], float]]:
        every = [used for _, cited, _ in found for used in cited]
        order = _library("torch").randperm(len(every), generator=self._random()).tolist()
        left = iter([every[place] for place in order])
        return [(choice, [next(left) for _ in cited], advantage) for choice, cited, advantage in found]

    def learn(self, experience: Sequence[Lesson]) -> dict[str, float]:
        """Updates from `experience`, `batch` lessons each, in order.

        Returns:
            ``cited_share`` of the drawn entries, ``citing_share`` of the questions whose reply cites a drawn entry,
            mean ``logprob`` of the draws at the weights of their update, ``weight_norm`` of both matrices together.

        The draws of a rollout are all made before its first update. Where it has more than `batch` questions the later
        updates are therefore taken at weights a few updates from those that drew; with `batch` questions or fewer
        the update is RMM's to the letter.
        """
        if not experience:
            return {"questions": 0.0}
        torch = _library("torch")
        weights = self._ready(len(experience[0].features.q))
        logprobs = []
        for start in range(0, len(experience), self.batch):
            lessons = experience[start : start + self.batch]
            self._optimizer.zero_grad()
            loss = torch.zeros(())
            for lesson in lessons:
                q, m, noise = (torch.from_numpy(values) for values in lesson.features)
                logits = (m @ _direction(q, *weights) + noise) / self.tau  # (K,)
                terms = log_terms(logits, lesson.chosen)  # (M,)
                loss = loss - (terms * torch.tensor(lesson.credit)).sum() / len(lessons)
                logprobs.append(terms.sum().item())
            loss.backward()
            self._optimizer.step()
        with torch.no_grad():
            norm = torch.sqrt(sum((matrix**2).sum() for matrix in weights)).item()
        return {
            "questions": float(len(experience)),
            "cited_share": sum(lesson.cited for lesson in experience) / sum(len(one.chosen) for one in experience),
            "citing_share": sum(lesson.cited > 0 for lesson in experience) / len(experience),
            "logprob": sum(logprobs) / len(logprobs),
            "weight_norm": norm,
        }

    # ---- state -------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Begin draws anew from `seed`."""
        self._seed = seed
        self._generator = _library("torch").Generator().manual_seed(seed)

    def _random(self) -> Any:
        if self._generator is None:
            self.seed(self.draw_seed)
        return self._generator

    def _width(self) -> int:
        return build_embedder(self.embedder).embed(["width"]).shape[1]

    def _ready(self, width: int) -> tuple[Any, Any]:
        """The weights, for vectors of `width` numbers."""
        if self._weights is None:
            torch = _library("torch")
            self._take(torch.zeros(width, width), torch.zeros(width, width))
        assert self._weights is not None
        if (known := len(self._weights[0])) != width:
            raise EngineError(
                "the reranker's weights do not fit the vectors",
                f"they are for {known} numbers, the embedder {self.embedder.name} gives {width}",
                "give agent.rerank.embedder the model it was trained with, or train anew",
            )
        return self._weights

    def _take(self, query: Any, entry: Any) -> None:
        """These weights, and an optimizer that has made no step."""
        torch = _library("torch")
        self._weights = tuple(
            matrix.detach().to("cpu", torch.float32).clone().requires_grad_() for matrix in (query, entry)
        )
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        self._optimizer = kinds[self.optimizer](self._weights, lr=self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and generator: what a resumed run goes on from, to the bit."""
        state: dict[str, Any] = {"generator": self._random().get_state()}
        if self._weights is not None:
            state["weights"] = [matrix.detach().clone() for matrix in self._weights]
            state["optimizer"] = copy.deepcopy(self._optimizer.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._random().set_state(state["generator"].cpu())
        self._weights = self._optimizer = None
        if "weights" in state:
            self._take(*state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> None:
        """Write ``rerank.safetensors``: the matrices `query` and `entry`, and in its header the embedder."""
        if self._weights is None:
            self._ready(self._width())
        assert self._weights is not None
        query, entry = (matrix.detach() for matrix in self._weights)
        folder.mkdir(parents=True, exist_ok=True)
        _library("safetensors.torch").save_file(
            {"query": query, "entry": entry}, folder / FILE, {"embedder": self._embedder_record()}
        )

    def load(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            raise EngineError(
                f"{path}: no such file",
                "the agent's reranker is linear, and its weights are kept beside the model's",
                "name a checkpoint of a run with agent.rerank.kind linear, or choose another reranker",
            )
        try:
            with _library("safetensors").safe_open(path, "pt") as file:
                query, entry = (file.get_tensor(name) for name in ("query", "entry"))
                embedder = (file.metadata() or {}).get("embedder", "")
        except Exception as error:
            raise EngineError(
                f"{path}: not the weights of a linear reranker", f"{type(error).__name__}: {error}", "train anew"
            ) from error
        if query.shape != entry.shape or query.ndim != 2 or query.shape[0] != query.shape[1]:
            raise EngineError(
                f"{path}: its matrices are {tuple(query.shape)} and {tuple(entry.shape)}",
                "both must be (d, d), d the length of the embedder's vectors",
                "train anew",
            )
        if embedder and embedder != self._embedder_record():
            raise EngineError(
                f"{path}: trained on the vectors of another embedder",
                f"{embedder}; the recipe says {self._embedder_record()}",
                "give agent.rerank.embedder the one it was trained with, or train anew",
            )
        self._take(query, entry)

    def _embedder_record(self) -> str:
        """What of the embedder decides its vectors."""
        return json.dumps(self.embedder.model_dump(include={"name", "model", "query_prefix", "entry_prefix"}))


def _gumbel(count: int, generator: Any) -> np.ndarray:
    """(count,) float64"""
    torch = _library("torch")
    u = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
    return -np.log(-np.log(np.maximum(u, 2.0**-54)))  # 0 is among what torch draws


def log_terms(logits: Any, chosen: Sequence[int]) -> Any:
    """log p(c_j | c_1 ... c_j-1), (M,), of a draw without replacement from softmax(logits), logits (K,)."""
    torch = _library("torch")
    drawn = logits[list(chosen)]
    left = torch.logcumsumexp(drawn.flip(0), 0).flip(0)  # (M,) of what was drawn at j or later
    others = torch.ones(len(logits), dtype=torch.bool)
    others[list(chosen)] = False
    if others.any():
        left = torch.logaddexp(left, torch.logsumexp(logits[others], 0))
    return drawn - left


def _direction(q: Any, query: Any, entry: Any) -> Any:
    """The vector (d,) whose product with m_i is s_i: q' . (m_i + W_m m_i) = (q' + W_m^T q') . m_i."""
    moved = q + query @ q
    return moved + entry.T @ moved


def _library(name: str) -> Any:
    """A library of the extra `train`: without it memfactory is still imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} could not be imported", str(error), 'pip install "memfactory[train]"') from error
