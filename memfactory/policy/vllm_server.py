"""One vLLM server: token ids in, token ids and their log-probs out, and the adapters it holds.

Everything goes through vLLM's OpenAI-compatible server (`/v1/completions` with `return_token_ids`) and its endpoints
for adapters; the trainer needs neither CUDA nor NCCL to use it. Checked against vLLM 0.31.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from memfactory.endpoints.endpoint import Endpoint, certificates
from memfactory.endpoints.failures import Failure, Fixes, RequestFailed, of_error, of_status, of_transport
from memfactory.endpoints.tally import Tally
from memfactory.errors import EngineError
from memfactory.policy.base import Sampling
from memfactory.recipe import VLLMSection

QUICK = 30.0
"""Seconds for an answer that needs no generation: health, names, loading of an adapter."""
PATIENT = 180.0
"""Seconds for its configuration: when first asked, vLLM looks the whole system over (30 s on two busy cores)."""

LONG = 600.0
"""Seconds for loading all weights of a model."""

STARTED_WITH = "default"
"""Name of the weights that a server has been started with."""

_SHARED = "the server must see the trainer's folder under the same path: set rollout.vllm.adapters to a shared one"

FIXES = Fixes(
    {
        Failure.RATE_LIMIT: "lower rollout.vllm.concurrency",
        Failure.TIMEOUT: "raise rollout.vllm.deadline, or lower rollout.vllm.concurrency",
        Failure.SERVER: "look at the server's log",
        Failure.CONNECTION: "start it: memfactory serve-rollouts RECIPE, and check rollout.vllm.base_urls",
        Failure.CUT: "look at the server's log",
        Failure.GARBAGE: "rollout.vllm.base_urls must name vLLM servers, without /v1, e.g. http://localhost:8000",
        Failure.EMPTY: "look at the server's log, and check that it is a tested version: memfactory doctor",
        Failure.REFUSED: "see the server's message",
        Failure.ADDRESS: "check rollout.vllm.base_urls, e.g. http://localhost:8000",
        Failure.DEADLINE: "raise rollout.vllm.deadline, or lower rollout.vllm.concurrency",
    }
)


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion that is asked for."""

    prompt_ids: Sequence[int]
    """(P,)"""
    sampling: Sampling
    max_tokens: int
    """Most tokens to draw."""
    stop: Sequence[int]
    """Token ids that end it; the one that did is the last of the completion."""
    seed: int
    """Of the draws of this completion alone."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion, in the sampler's own tokens."""

    ids: list[int]
    logprobs: list[float]
    """Of each of `ids`, under the distribution it was drawn from."""
    finish: str
    """``stop`` or ``length``."""
    usage: Mapping[str, Any] = field(default_factory=dict)
    version: int | None = None
    """Of the weights it was drawn from; None where they have none."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probs of given tokens."""

    logprobs: list[float]
    """Of every token but the first, which nothing precedes."""
    usage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class VLLMServer:
    """Speaks with one server; any number of requests at the same time, from any event loop.

    Args:
        url: without a path.
        section: the recipe's `rollout.vllm`.
        tally: counts requests and failures; one for all servers.
    """

    url: str
    section: VLLMSection
    tally: Tally = field(default_factory=Tally)
    _http: Endpoint = field(init=False)

    def __post_init__(self) -> None:
        self._http = Endpoint(
            base_url=self.url,
            settings="rollout.vllm.",
            fixes=FIXES,
            tally=self.tally,
            api_key_env="VLLM_API_KEY",
            concurrency=self.section.concurrency,
            deadline=self.section.deadline,
            attempts=self.section.attempts,
        )

    # ---- tokens ------------------------------------------------------------------------------

    async def sample(self, draw: Draw, *, model: str, engine: int | None = None) -> Sampled:
        """Draw one completion.

        Args:
            model: name of an adapter, or of the base model (:data:`memfactory.policy.vllm_needs.BASE`).
            engine: which of its copies of the model (`--data-parallel-size`) is asked; None: the one that is free.

        Raises:
            RequestFailed: no completion came.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(draw.prompt_ids),
            "max_tokens": draw.max_tokens,
            "temperature": draw.sampling.temperature,
            "top_p": draw.sampling.top_p,
            "top_k": draw.sampling.top_k,
            "min_p": draw.sampling.min_p,
            "repetition_penalty": draw.sampling.repetition_penalty,
            "seed": draw.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(draw.stop),
            # a server started with the model's own generation config must not mix it in
            "stop": None,
            "ignore_eos": False,
        }
        # never min_tokens: with it vLLM masks the end token and renormalises, and its log-probs are of another policy
        return await self._http.post("/v1/completions", body, _sampled, lambda sampled: sampled, headers=_to(engine))

    async def score(self, ids: Sequence[int], *, model: str, engine: int | None = None) -> list[float]:
        """Log-probs of ``ids[1:]``, each given what stands before it. Nothing of it comes from the prefix cache.

        Args:
            engine: see :meth:`sample`.

        Raises:
            RequestFailed: they did not come.
        """
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        scored = await self._http.post(
            "/v1/completions", body, lambda reply: _scored(reply, ids), lambda own: own, headers=_to(engine)
        )
        return scored.logprobs

    # ---- adapters ----------------------------------------------------------------------------

    async def models(self) -> list[dict[str, Any]]:
        """What it serves, as ``/v1/models`` lists it.

        Raises:
            RequestFailed: it does not answer.
        """
        data = (await self._quick("GET", "/v1/models")).json()
        return list(data["data"])

    async def load(self, name: str, path: str) -> None:
        """Load the adapter in the folder `path`, as the server sees it, under `name`.

        Raises:
            EngineError: the server cannot take it; says which flag it lacks.
            RequestFailed: it does not answer.
        """
        try:
            await self._quick("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except RequestFailed as failed:
            if failed.kind is Failure.REFUSED and "already" in failed.why:
                return  # loaded by an attempt whose reply was lost: names are never used for two adapters
            if failed.kind not in (Failure.REFUSED, Failure.SERVER):
                raise
            raise EngineError(
                f"the server at {self.url} did not load the adapter {name}", failed.why, _flag(failed)
            ) from failed

    async def unload(self, name: str) -> None:
        """Forget the adapter `name`; one that it does not have is forgotten already.

        Raises:
            RequestFailed: it does not answer.
        """
        try:
            await self._quick("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except RequestFailed as failed:
            if failed.kind is not Failure.REFUSED:
                raise

    # ---- whole weights -----------------------------------------------------------------------

    async def weight_version(self) -> str:
        """The name of the weights it was given last; :data:`STARTED_WITH` where there were none.

        Raises:
            EngineError: it was started without ``VLLM_SERVER_DEV_MODE=1``, or is too old.
            RequestFailed: it does not answer.
        """
        try:
            return str((await self._quick("GET", "/weight_info")).json()["weight_version"])
        except RequestFailed as failed:
            if failed.status != 404:
                raise
            raise EngineError(
                f"the server at {self.url} takes no other weights than those it was started with",
                failed.why,
                "start it with VLLM_SERVER_DEV_MODE=1, as memfactory serve-rollouts does, or train an adapter "
                "(model.lora)",
            ) from failed

    async def reload(self, name: str, path: str) -> None:
        """Put the weights in the folder `path`, as the server sees it, in the place of those it has.

        Requests that are under way are finished first, and nothing that was cached is used again.

        Args:
            name: what :meth:`weight_version` says from then on.

        Raises:
            EngineError: the server cannot take them.
            RequestFailed: it does not answer.
        """
        wanted = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        await self._quick("POST", "/pause?mode=wait", {}, LONG)
        try:
            await self._quick("POST", "/collective_rpc", wanted, LONG)
            reset = (await self._quick("POST", "/reset_prefix_cache", {})).json()
            if not reset["success"]:
                why = f"{self.url}: its prefix cache is still in use, and would answer from the weights before"
                raise RequestFailed(Failure.SERVER, why)
            await self._quick("POST", "/update_weight_version", {"new_version": name})
        except RequestFailed as failed:
            if failed.kind not in (Failure.REFUSED, Failure.SERVER):
                raise
            what = f"the server at {self.url} did not load the weights {name}"
            raise EngineError(what, failed.why, _SHARED) from failed
        finally:
            await self._quick("POST", "/resume", {})

    # ---- the server itself -------------------------------------------------------------------

    async def unwell(self) -> str:
        """Why nothing can be asked of it; empty where it is up and its engine lives."""
        try:
            await self._quick("GET", "/health", seconds=5.0)
        except RequestFailed as failed:
            return failed.why
        return ""

    async def engines(self) -> int:
        """Copies of the model behind its address (`--data-parallel-size`), each of which counts for itself; 1 where it
        does not say.

        Raises:
            RequestFailed: it does not answer.
        """
        try:
            text = (await self._quick("GET", "/metrics")).text
        except RequestFailed as failed:
            if failed.kind is Failure.REFUSED:
                return 1
            raise
        return max(len(set(re.findall(r'^vllm:num_requests_running\{[^}]*engine="(\d+)"', text, re.MULTILINE))), 1)

    async def info(self) -> dict[str, Any] | None:
        """Its whole configuration; None where it was started without ``VLLM_SERVER_DEV_MODE=1``.

        Raises:
            RequestFailed: it does not answer.
        """
        try:
            reply = await self._quick("GET", "/server_info?config_format=json", seconds=PATIENT)
        except RequestFailed as failed:
            if failed.status == 404:
                return None
            raise
        found: dict[str, Any] = reply.json()
        return found

    async def version(self) -> str:
        """Of vLLM; empty where it does not say.

        Raises:
            RequestFailed: it does not answer.
        """
        try:
            return str((await self._quick("GET", "/version")).json()["version"])
        except RequestFailed as failed:
            if failed.kind is Failure.REFUSED:
                return ""
            raise
        except (ValueError, LookupError, TypeError):
            return ""

    async def counters(self) -> dict[str, float]:
        """Its counters as Prometheus names them, summed over labels.

        Raises:
            RequestFailed: it does not answer.
        """
        totals: dict[str, float] = {}
        for line in (await self._quick("GET", "/metrics")).text.splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0].removeprefix("vllm:")
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def aclose(self) -> None:
        """Close the running loop's connections."""
        await self._http.aclose()

    async def _quick(self, method: str, path: str, body: Any = None, seconds: float = QUICK) -> httpx.Response:
        """One request, tried once, that must not wait behind generation."""
        try:
            # a client of its own, so that any event loop may ask
            async with httpx.AsyncClient(
                timeout=seconds, trust_env=not self._http.local, verify=certificates()
            ) as client:
                response = await client.request(method, self.url.rstrip("/") + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failed = of_transport(error)
            raise RequestFailed(failed.kind, f"{self.url}: {failed.why}", FIXES.of(failed)) from error
        if not response.is_success:
            failed = of_status(response)
            raise RequestFailed(
                failed.kind, f"{self.url}: {failed.why}", FIXES.of(failed), status=response.status_code
            )
        return response


def _to(engine: int | None) -> dict[str, str] | None:
    """Headers by which vLLM asks one of its copies of the model, whoever is free."""
    return None if engine is None else {"X-data-parallel-rank": str(engine)}


def _choice(response: httpx.Response) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The only choice of a completion, and the usage.

    Raises:
        RequestFailed: the body is something else, or speaks of an error.
    """
    try:
        data = response.json()
        if data.get("error"):
            raise of_error(data["error"], response)
        return data["choices"][0], data.get("usage") or {}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        shown = " ".join(response.text[:200].split())
        raise RequestFailed(Failure.GARBAGE, f"the reply is no completion: {shown!r}") from error


def _sampled(response: httpx.Response) -> Sampled:
    choice, usage = _choice(response)
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):  # an aborted request answers with what it had: that is no turn
        raise RequestFailed(Failure.CUT, f"the completion ended by {finish!r}")
    if not isinstance(ids, list) or not isinstance(logprobs, list) or not ids or len(ids) != len(logprobs):
        why = f"token ids and log-probs do not fit together: {len(ids or ())} and {len(logprobs or ())}"
        raise RequestFailed(Failure.EMPTY, why)
    if any(value is None or value != value for value in logprobs):
        raise RequestFailed(Failure.EMPTY, "a log-prob is no number: the served weights may hold NaN")
    return Sampled(ids, logprobs, finish, usage)


def _scored(response: httpx.Response, ids: Sequence[int]) -> Scored:
    choice, usage = _choice(response)
    places = choice.get("prompt_logprobs") or []
    try:
        values = [float(place[str(id)]["logprob"]) for place, id in zip(places[1:], ids[1:], strict=True)]
    except (LookupError, TypeError, ValueError) as error:
        raise RequestFailed(Failure.EMPTY, "the reply lacks the log-probs of the prompt") from error
    return Scored(values, usage)


def _flag(failed: RequestFailed) -> str:
    """What to type where a server refused an adapter, told from its message."""
    if failed.status == 404 and "lora" not in failed.why.lower():
        return "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, as memfactory serve-rollouts does"
    if "rank" in failed.why:
        return "start it with --max-lora-rank of at least model.lora.r, as memfactory serve-rollouts does"
    if "No adapter found" in failed.why or "adapter_config" in failed.why or failed.status == 404:
        return _SHARED
    return "see the server's log"
