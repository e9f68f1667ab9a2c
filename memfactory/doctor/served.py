"""The servers that sample for a recipe: who is there, and whether it would sample from the trainer's weights.

Three things are tried on a server that answers: whether it fits the recipe (as the trainer would check it), whether
what is sent reaches it (an adapter of zeros, which must change nothing; or all weights once more, those it was started
with), and whether its log-probs are those of the trainer's own model on one prompt. Nothing is left behind: not the
adapter, not its folder.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from memfactory.doctor.check import Check, Level, of_error
from memfactory.doctor.ports import Address, Answer, free_near, look, owner
from memfactory.endpoints.failures import RequestFailed
from memfactory.errors import MemFactoryError
from memfactory.policy.models import load_checkpoint, load_model, load_tokenizer, lora_config
from memfactory.policy.vllm_needs import BASE, base_model
from memfactory.policy.vllm_policy import LOOP
from memfactory.policy.vllm_server import STARTED_WITH, VLLMServer
from memfactory.recipe import Recipe
from memfactory.train.prepare import Prepared
from memfactory.train.serving import check
from memfactory.train.weight_sync import canary_ids, score

_LAYER = ".layers.0."
"""Of the adapter that is sent only the first layer is written: all layers take the same way."""


@dataclass
class Served:
    """What is looked at.

    Args:
        prepared: the recipe; it samples with vLLM.
        typed: recipe and overrides as they were given, for commands in messages.
    """

    prepared: Prepared
    typed: str
    _answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @cached_property
    def base(self) -> str:
        """What the servers load."""
        return base_model(self.recipe, self.recipe.run_dir)

    def answers(self, url: str) -> Answer:
        if url not in self._answers:
            self._answers[url] = look(Address.of(url))
        return self._answers[url]

    def starts_here(self) -> bool:
        """Whether a server of the recipe still has to be started on this machine."""
        urls = self.recipe.rollout.vllm.base_urls
        return any(Address.of(url).local and self.answers(url) is not Answer.SERVER for url in urls)

    def checks(self) -> Iterable[Check]:
        """One line for an address where nobody answers, three where a server does."""
        for url in self.recipe.rollout.vllm.base_urls:
            address = Address.of(url)
            if self.answers(url) is not Answer.SERVER:
                yield self._absent(address, self.answers(url))
                continue
            server = VLLMServer(url, self.recipe.rollout.vllm)
            try:
                yield (fit := self._fits(server))
                if fit.level is not Level.WRONG:
                    yield self._sync(server)
                    yield self._agreement(server)
            finally:
                LOOP.start(server.aclose()).result()

    def _absent(self, address: Address, answer: Answer) -> Check:
        name = f"server {address.url}"
        first = address.url == self.recipe.rollout.vllm.base_urls[0]
        start = f"memfactory serve-rollouts {self.typed}" + ("" if first else f" --port {address.port}")
        if answer is Answer.OTHER:
            who = (owner(address.port) if address.local else "") or "another program"
            other = free_near(address.port)
            fix = f"{start.partition(' --port')[0]} --port {other}, and rollout.vllm.base_urls with that port for both"
            return Check(name, f"{who} answers, and is no vLLM server", "a vLLM server", Level.WRONG, fix)
        if answer is Answer.SILENT:
            who = owner(address.port) or "a program"
            return Check(name, f"{who} has the port and does not answer", "", Level.NOTE, "a server may be starting")
        where = "" if address.local else f" --host 0.0.0.0, on {address.host}"
        return Check(
            name,
            "nobody answers; the port is free" if address.local else "nobody answers",
            "",
            Level.NOTE,
            f"to start it: {start}{where}",
        )

    def _fits(self, server: VLLMServer) -> Check:
        name = f"server {server.url}"
        try:
            longest = check(server, self.recipe, self.recipe.run_dir).positions
            info, number = LOOP.start(_about(server)).result()
        except MemFactoryError as error:
            return of_error(name, error)
        except RequestFailed as failed:
            return Check(name, failed.why, "", Level.WRONG, failed.fix)
        found = f"vLLM {number or '(version unknown)'}, {self.base}" + (
            f", up to {longest} positions" if longest else ""
        )
        if info is None:
            fix = "VLLM_SERVER_DEV_MODE=1, as memfactory serve-rollouts does, lets its flags be read"
            return Check(name, found, "", Level.NOTE, fix)
        return Check(name, found, "its flags fit")

    # ---- the way of the weights --------------------------------------------------------------

    def _sync(self, server: VLLMServer) -> Check:
        """Whether what is sent reaches the server."""
        name, section = "  weight sync", self.recipe.rollout.vllm
        parent = Path(section.adapters) if section.adapters else self.recipe.run_dir / "adapters"
        send = self._adapter if self.recipe.model.lora is not None else self._reload
        try:
            return send(server, name, parent)
        except MemFactoryError as error:
            return of_error(name, error)
        except RequestFailed as failed:
            return Check(name, failed.why, "", Level.WRONG, failed.fix)
        except OSError as error:
            fix = "rollout.vllm.adapters=... a folder that trainer and servers share"
            return Check(name, f"{parent}: {error.strerror or error}", "", Level.WRONG, fix)

    def _adapter(self, server: VLLMServer, name: str, parent: Path) -> Check:
        """Send an adapter of zeros, and see that the server reads it and says with it what it says without."""
        tolerance = self.recipe.rollout.vllm.canary_tolerance
        adapter = f"memfactory-doctor-{secrets.token_hex(4)}"
        began = time.perf_counter()
        try:
            config, state = zero_adapter(self.recipe, self.base)
        except Exception as error:  # whatever transformers says where it lacks the model's configuration
            why = f"not tried: the configuration of {self.base} is not at hand ({type(error).__name__})"
            return Check(name, why, "", Level.NOTE, "run doctor where the trainer will run")
        with passing_folder(parent) as folder:
            config.save_pretrained(str(folder))
            save_file(state, folder / SAFETENSORS_WEIGHTS_NAME)
            with_it, without = LOOP.start(_with_adapter(server, adapter, folder, self.ids)).result()
        seconds = time.perf_counter() - began
        apart = fmean(abs(a - b) for a, b in zip(with_it, without, strict=True))
        found = f"an adapter of zeros written, loaded, scored, unloaded in {seconds:.1f} s: {apart:.1g} nats from base"
        if not apart <= tolerance:
            fix = "an adapter that changes nothing changes its log-probs: look at the server's log and version"
            return Check(name, found, f"at most {tolerance:g}", Level.WRONG, fix)
        return Check(name, found, f"at most {tolerance:g}")

    def _reload(self, server: VLLMServer, name: str, parent: Path) -> Check:
        """Have the server load the weights it was started with once more, from the folder where it will get others.

        They lie there as links. A server that a run has sent weights already is left alone.
        """
        base, began = Path(self.base), time.perf_counter()
        held = LOOP.start(server.weight_version()).result()
        if held != STARTED_WITH:
            return Check(name, f"not tried: it holds the weights '{held}' of a run", "", Level.NOTE)
        if not base.is_dir():
            return Check(
                name, f"not tried: {base} is not here", "", Level.NOTE, "run doctor where the trainer will run"
            )
        with passing_folder(parent) as folder:
            for file in base.iterdir():
                (folder / file.name).symlink_to(file.resolve())
            try:
                LOOP.start(server.reload(STARTED_WITH, str(folder.resolve()))).result()
            except (MemFactoryError, RequestFailed):
                # vLLM takes the old weights apart before it looks for others, and ends when it is asked then
                with contextlib.suppress(MemFactoryError, RequestFailed):
                    LOOP.start(server.reload(STARTED_WITH, str(base.resolve()))).result()
                raise
        seconds = time.perf_counter() - began
        return Check(name, f"the weights it was started with loaded again, by way of {parent}, in {seconds:.1f} s", "")

    # ---- log-probs ---------------------------------------------------------------------------

    def _agreement(self, server: VLLMServer) -> Check:
        name, limit = "  log-probs", self.recipe.rollout.vllm.canary_tolerance
        if self.tokenizer is None or not at_hand(self.base):
            fix = "run doctor where the model is, or let `memfactory train` compare: it does before the first turn"
            return Check(name, f"not compared: the weights of {self.base} are not here", "", Level.NOTE, fix)
        try:
            ours, seconds = self.expected
            theirs = LOOP.start(server.score(self.ids, model=BASE)).result()
        except MemFactoryError as error:
            return of_error(name, error)
        except RequestFailed as failed:
            return Check(name, failed.why, "", Level.WRONG, failed.fix)
        apart = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        found = (
            f"{apart:.2g} nats apart on {len(ours)} tokens (mean {fmean(ours):.6f} here, {fmean(theirs):.6f} there); "
            f"the model was loaded and scored here in {seconds:.1f} s"
        )
        wanted = f"at most {limit:g}"
        if not apart <= limit:
            fix = (
                f"serve the recipe's own base model in its dtype: memfactory serve-rollouts {self.typed}; with "
                "bfloat16 on one side only, raise rollout.vllm.canary_tolerance"
            )
            return Check(name, found, wanted, Level.WRONG, fix)
        return Check(name, found, wanted)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The recipe's; None where it is not at hand."""
        try:
            return load_tokenizer(self.recipe.model, self.prepared.vocabulary)
        except MemFactoryError:
            return None

    @cached_property
    def ids(self) -> list[int]:
        """The prompt that is scored."""
        return canary_ids(self.tokenizer) if self.tokenizer is not None else list(range(1, 25))

    @cached_property
    def expected(self) -> tuple[list[float], float]:
        """Log-probs of `ids` by the model as the trainer loads it, and the seconds that took."""
        began = time.perf_counter()
        section, train = self.recipe.model, self.recipe.train
        assert self.tokenizer is not None
        own = Path(self.base)
        made: Any = load_checkpoint(own, section) if own.is_dir() else load_model(section, self.tokenizer, 0)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found or torch.device("cpu")
        made.to(device).eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(train.get("bf16"))):
            return score(made, self.ids), time.perf_counter() - began


async def _about(server: VLLMServer) -> tuple[dict[str, Any] | None, str]:
    return await server.info(), await server.version()


async def _with_adapter(
    server: VLLMServer, name: str, folder: Path, ids: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Log-probs of `ids` with the adapter in `folder` and without; the server forgets it again."""
    try:
        await server.load(name, str(folder.resolve()))
        return await server.score(ids, model=name), await server.score(ids, model=BASE)
    finally:
        with contextlib.suppress(RequestFailed):  # it is gone, and with it what it held
            await server.unload(name)


def zero_adapter(recipe: Recipe, base: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """PEFT's configuration of the recipe's adapter, and tensors of zeros for its first layer.

    Made from the model's configuration alone, whatever its size.
    """
    assert recipe.model.lora is not None
    config = AutoConfig.from_pretrained(base, trust_remote_code=recipe.model.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        adapted = get_peft_model(model, lora_config(recipe.model.lora))
    state = {name: torch.zeros(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
    first = {name: value for name, value in state.items() if _LAYER in name}
    return adapted.peft_config["default"], first or state


@contextlib.contextmanager
def passing_folder(parent: Path) -> Iterator[Path]:
    """A folder below `parent`, which is made where it is not there; on leaving all that was made is gone."""
    made = [place for place in (parent, *parent.parents) if not place.exists()]  # the deepest first
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for place in made:
            with contextlib.suppress(OSError):  # somebody else has begun to use it
                place.rmdir()


def at_hand(base: str) -> bool:
    """Whether the weights of `base` (folder or Hub id) are on this machine as a whole."""
    if Path(base).is_dir():
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(base, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return False
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
