"""What goes with 4-bit base weights (`model.quantization`), and how such a model is loaded and got ready for adapters.

Importable without torch: what a recipe may not combine is said before anything heavy is loaded.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from memfactory.errors import MemFactoryError, RecipeError
from memfactory.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unfit(recipe: Recipe) -> list[MemFactoryError]:
    """What in a recipe does not go with quantized base weights; empty without them."""
    if recipe.model.quantization is None:
        return []
    errors: list[MemFactoryError] = []
    if recipe.warmup is not None:
        why = "the warm-up trains all weights, and quantized ones cannot be trained"
        fix = "leave one of them out, or warm up first and quantize what that run saved (model.name: RUN/initial)"
        errors.append(RecipeError("model.quantization with warmup", why, fix))
    if recipe.rollout.served:
        why = "vLLM serves the weights as they are stored: turns would come from another model than the trained one"
        fix = "rollout.engine=transformers, or leave model.quantization out"
        errors.append(RecipeError("model.quantization with rollout.engine: vllm", why, fix))
    for key in ("fsdp", "deepspeed"):
        if recipe.train.get(key):
            errors.append(divided(f"train.{key}"))
    return errors


def divided(by: str) -> RecipeError:
    """Why quantized weights are not spread over processes.

    Args:
        by: what was to divide them.
    """
    return RecipeError(
        f"model.quantization with {by}",
        "4-bit weights are packed bytes with scales beside them: gathered and reduced as numbers they would be noise, "
        "and adapters leave little else to divide",
        "--config ddp (every process has the small weights), or leave model.quantization out",
    )


def check_installed(section: ModelSection) -> None:
    """Fail before a model is loaded where the library is missing.

    Raises:
        RecipeError: it is.
    """
    if section.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "model.quantization: bitsandbytes is not installed",
            "it packs and unpacks the 4-bit weights",
            "pip install 'memfactory[quant]'",
        )


def load_quantized(section: ModelSection, source: str) -> PreTrainedModel:
    """The model in 4 bits on this process's device, ready for adapters.

    Every process loads it where it will train: bitsandbytes packs weights as they arrive there.

    Args:
        source: folder or Hub id of ordinary weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = section.quantization
    assert quantization is not None
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype or section.dtype),
        ),
        device_map={"": _device()},
        dtype=getattr(torch, section.dtype),
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )
    return _ready(model)


def _device() -> Any:
    """The accelerator that accelerate has chosen for this process, or the CPU."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(found.type, torch.accelerator.current_device_index()) if found else torch.device("cpu")


def _ready(model: Any) -> Any:
    """Frozen, and everything that is not packed in float32, as adapters on quantized weights want it.

    Gradient checkpointing is left to the trainer, which turns it on where the recipe asks, with what it needs of the
    inputs.
    """
    from bitsandbytes.nn import Linear4bit
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first pass without gradients repacks the weights for good, and later passes
            # with gradients go through a kernel that has none: adapters below such a layer would learn nothing.
            module.support_avx512bf16_for_cpu = False
    return model


def adapters_in_float32(model: Any) -> None:
    """Trained weights of a quantized model in float32, as they are without quantization.

    TRL turns them into bfloat16, whose steps are 1/256 of a weight: an update of AdamW at the rates of reinforcement
    learning (1e-5 on weights of 1e-2) is smaller, and would be lost.
    """
    import torch

    if not getattr(model, "is_loaded_in_4bit", False):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
