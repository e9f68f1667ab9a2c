"""The models that answer for modules which are not trained, as a recipe's `modules:` and `policies:` say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from memfactory.policy.base import Policy, Sampling
from memfactory.policy.models import eos_ids, load_model, load_tokenizer
from memfactory.policy.routing import RoutedPolicy
from memfactory.policy.transformers_backend import TransformersPolicy
from memfactory.recipe import ModelSection, PolicySection, Recipe

if TYPE_CHECKING:
    from memfactory.policy.vllm_policy import VLLMPolicy


def needs_initial(recipe: Recipe) -> bool:
    """Whether a module answers with the weights as they were before GRPO."""
    return any(section.policy == "initial" for section in recipe.modules.values())


def trains(recipe: Recipe, module: str) -> bool:
    """Whether turns of `module` are trained."""
    section = recipe.modules.get(module)
    return section is None or section.policy == "trained"


def route(
    recipe: Recipe,
    trained: TransformersPolicy,
    initial: Callable[[], PreTrainedModel],
    folder: Path = Path(),
    label: str = "",
) -> RoutedPolicy:
    """`trained`, with the models beside it that `recipe` names. Each is loaded once, however many modules it serves.

    Args:
        trained: the policy that is trained, in this process; where the recipe says so, servers sample in its place.
        initial: loads the weights from before GRPO; called where they are needed and no adapter can be turned off.
        folder: of the run, where what is sent to servers is written.
        label: see :func:`memfactory.train.serving.served`.

    Raises:
        EngineError: a server does not fit the recipe.
    """
    if recipe.rollout.served:
        from memfactory.train.serving import served  # its libraries are an extra

        return _route_served(recipe, served(recipe, trained, folder, label))
    others: dict[str, Policy] = {}
    following: list[TransformersPolicy] = []
    loaded: dict[tuple[str, float], Policy] = {}
    for module, section in recipe.modules.items():
        if section.policy == "trained":
            continue
        own = section.temperature if section.policy not in recipe.policies else -1.0
        key = section.policy, own
        if key not in loaded:
            if section.policy in recipe.policies:
                loaded[key] = beside(recipe.policies[section.policy], recipe.rollout.generate_token_budget)
            else:
                adapter = hasattr(trained.model, "disable_adapter")
                frozen = section.policy == "initial" and not adapter
                model: Any = _placed(initial(), trained.model.device) if frozen else trained.model
                policy = TransformersPolicy(
                    model,
                    trained.tokenizer,
                    sampling=Sampling(section.temperature),
                    eos_ids=trained.eos_ids,
                    token_budget=trained.token_budget,
                    autocast=trained.autocast,
                    template_options=trained.template_options,
                    share_prefix=trained.share_prefix,
                )
                if section.policy == "initial" and adapter:
                    # asked anew at every pass, because the wrapped model may be another object by then
                    policy.around = lambda policy=policy: policy.model.disable_adapter()
                if not frozen:
                    following.append(policy)
                loaded[key] = policy
        others[module] = loaded[key]
    return RoutedPolicy(trained, others, following)


def _route_served(recipe: Recipe, trained: VLLMPolicy) -> RoutedPolicy:
    """Modules that are not trained are asked of the same servers: under the adapter's name, or the base model's."""
    others: dict[str, Policy] = {}
    following: list[VLLMPolicy] = []
    loaded: dict[str, Policy] = {}
    for module, section in recipe.modules.items():
        if section.policy in recipe.policies:
            name = section.policy
            loaded[name] = loaded.get(name) or beside(recipe.policies[name], recipe.rollout.generate_token_budget)
            others[module] = loaded[name]
        elif section.policy != "trained":
            policy = trained.beside(Sampling(section.temperature), base=section.policy == "initial")
            others[module] = policy
            if section.policy == "current":
                following.append(policy)
    return RoutedPolicy(trained, others, following)


def beside(section: PolicySection, token_budget: int) -> Policy:
    """A model of `policies:`."""
    if section.base_url is not None:
        from memfactory.policy.endpoint import EndpointPolicy  # its libraries are an extra

        return EndpointPolicy(section)
    wanted = ModelSection(name=section.model, dtype=section.dtype)
    tokenizer = load_tokenizer(wanted, None)
    model = load_model(wanted, tokenizer, 0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return TransformersPolicy(
        _placed(model, device or torch.device("cpu")),
        tokenizer,
        sampling=Sampling(section.temperature, section.top_p),
        eos_ids=eos_ids(model, tokenizer),
        token_budget=token_budget,
    )


def _placed(model: Any, device: Any) -> Any:
    return model.to(device).eval().requires_grad_(False)
