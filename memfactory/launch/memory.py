"""Estimated peak memory of one device, part by part.

What training a parameter takes, in bytes (P trained, F frozen parameters, N processes):

===================  ========  =========  =================  ==========================================
how                  weights   gradients  optimizer (AdamW)  sharded over N
===================  ========  =========  =================  ==========================================
plain, float32       4 (P+F)   4 P        8 P                nothing (DDP: and 4 P in its buckets)
FSDP2, float32       4 (P+F)   4 P        8 P                everything
ZeRO-1, bf16         2 (P+F)   2 P        12 P               optimizer
ZeRO-2, bf16         2 (P+F)   2 P        12 P               optimizer, gradients
ZeRO-3, bf16         2 (P+F)   2 P        12 P               everything
===================  ========  =========  =================  ==========================================

12 = float32 master weights and AdamW's two moments: ZeRO (arXiv 1910.02054, section 3.1 and figure 1), K = 12. With
plain autocast the stored weights are the masters; their moments have their type. DeepSpeed without bf16 keeps
float32 weights and gradients and still its own masters (4, 4, 12).

Activations of one layer and one token, a bytes an element (2 in bfloat16, else 4), h hidden, q query, k key-value and
m MLP elements, counted over the modules of a decoder with RMSNorm, fused attention and a gated MLP as Korthikanti et
al. (arXiv 2205.05198, section 4.1) do for GPT:

    a (2 h + 2 q + 2 k + 4 m) + 16 h

(the inputs of the matrices, query, key, value, the attention's output, four tensors of the MLP; RMSNorm keeps its
input and the normalised input in float32, twice). Query and key norms (Qwen3) keep theirs, 8 (q + k). With gradient
checkpointing a layer keeps its input, 4 h (autocast) or a h, and one layer at a time has the rest. Logits are never
whole: TRL's fused head computes tiles of 4096 x 32768, and holds the head's gradient in float32.

4-bit base weights (QLoRA, arXiv 2305.14314): the matrices of the layers take half a byte and their scales (4 bytes for
64 weights; quantized once more 1 byte for 64 and 4 for 256 of these), all else float32. Norms in float32 make what
lies between the matrices float32 too, key-value cache included, also under autocast; each matrix is unpacked while it
is used.

A test measures these against what PyTorch keeps: within 2 % in float32, 15 % in bfloat16.

Not counted: the CUDA context (about half a GiB), fragmentation, and what libraries reserve. Add a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from memfactory.launch.shapes import Shape

GIB = 1024**3
DEVICES = (16, 24, 32, 40, 48, 80, 94, 141, 180)
"""Memory of common GPUs, in GB as they are sold."""
_TILE_TOKENS, _TILE_WIDTH = 4096, 32768
_RESERVE = 1.1


class Sharding(StrEnum):
    """What is divided over the processes."""

    NONE = "none"
    DDP = "ddp"
    FSDP = "fsdp"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"

    @property
    def deepspeed(self) -> bool:
        return self in (Sharding.ZERO1, Sharding.ZERO2, Sharding.ZERO3)

    @property
    def everything(self) -> bool:
        """Whether the weights are divided too."""
        return self in (Sharding.FSDP, Sharding.ZERO3)


@dataclass(frozen=True, slots=True)
class Load:
    """What memory depends on."""

    shape: Shape
    processes: int
    sharding: Sharding
    stored: int = 4
    """Bytes of a stored weight (`model.dtype`)."""
    mixed: bool = False
    """Computed in 16 bits (`train.bf16` or `train.fp16`)."""
    adapters: int | None = None
    """Parameters of LoRA; None trains all."""
    packed: float | None = None
    """Bytes of one 4-bit weight and its scales (:func:`packed_bytes`); None: all are stored in `stored`."""
    trained: bool = True
    """False: the model only generates."""
    copies: int = 0
    """Frozen copies of the weights beside the trained model: KL reference, modules answered by `initial`."""
    checkpointing: bool = False
    pass_tokens: int = 16384
    """Positions of one forward and backward pass (`rollout.train_token_budget`)."""
    cache_tokens: int = 65536
    """Positions of the key-value cache (`rollout.generate_token_budget`); 0 where others generate."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 500_000_000
    """Elements of DeepSpeed's reduce and gather buckets (its default)."""
    live: int = 1_000_000_000
    """Most gathered elements under ZeRO-3 (`stage3_max_live_parameters`, its default)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part; `host` is what one process keeps in the machine's memory."""

    states: dict[str, float] = field(default_factory=dict)
    """There all the time."""
    training: dict[str, float] = field(default_factory=dict)
    generation: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes at the larger of the two phases: an optimizer step's states stay while episodes are generated."""
        return sum(self.states.values()) + max(sum(self.training.values()), sum(self.generation.values()))

    @property
    def device(self) -> int | None:
        """The smallest common GPU that holds the peak and a tenth more, in GB; None if there is none."""
        return next((size for size in DEVICES if size * 1e9 >= self.peak * _RESERVE), None)


def packed_bytes(double: bool) -> float:
    """Bytes of a 4-bit weight with its share of the scales.

    Args:
        double: whether the scales are quantized too.
    """
    return 0.5 + ((1 + 4 / 256) / 64 if double else 4 / 64)


def estimate(load: Load) -> Memory:
    """Memory of one process; see the module for the formulas."""
    shape, n = load.shape, load.processes
    packed, unpacked = 0.0, 0
    if load.packed is not None:  # what is saved on the matrices; how all else is kept
        matrices, unpacked = shape.layers * shape.matrices, 2 if load.mixed or load.stored == 2 else 4
        packed = (4 - load.packed) * matrices
        load = replace(load, stored=4, mixed=False)
    lora = load.adapters is not None
    trained = 0 if not load.trained else load.adapters if load.adapters is not None else shape.parameters
    frozen = shape.parameters if lora or not load.trained else 0
    # PEFT keeps adapters in float32 whatever the type of the model
    own = 4 if lora else load.stored
    zero = load.sharding.deepspeed
    if zero:
        weight = gradient = 2 if load.mixed else 4
        weights, gradients, optimizer = weight * (trained + frozen), gradient * trained, 12 * trained
    else:
        weight = load.stored
        weights, gradients, optimizer = own * trained + load.stored * frozen, own * trained, 2 * own * trained
    over_all = n if load.sharding.everything else 1
    over_gradients = n if load.sharding in (Sharding.ZERO2, Sharding.ZERO3, Sharding.FSDP) else 1
    over_optimizer = n if zero or load.sharding is Sharding.FSDP else 1
    states: dict[str, float] = {
        "weights": (weights - packed) / over_all,
        "gradients": gradients / over_gradients,
        "optimizer states": optimizer / over_optimizer,
        "frozen copies of the model": load.copies * shape.parameters * weight / over_all,
    }
    host = 0.0
    if load.offload_optimizer:
        host += states.pop("optimizer states") + states.pop("gradients")
    if load.offload_weights:
        host += states.pop("weights") + states.pop("frozen copies of the model")
    if load.sharding is Sharding.DDP:
        states["DDP's buckets"] = gradients  # gradient_as_bucket_view is off: a second copy of all gradients

    training: dict[str, float] = {}
    if load.trained:
        training = _training(load, trained)
        if unpacked:
            training["a matrix unpacked"] = float(unpacked * shape.hidden * max(shape.mlp, shape.query))
    generation: dict[str, float] = {}
    compute = 2 if load.mixed else load.stored
    if load.cache_tokens:
        generation["key-value cache"] = load.cache_tokens * shape.layers * 2 * shape.key_value * compute
        if load.sharding is Sharding.ZERO3:
            generation["weights gathered for generation"] = shape.parameters * weight
        elif load.sharding is Sharding.FSDP:
            generation["weights gathered for generation"] = shape.parameters * compute
    return Memory(
        {name: size for name, size in states.items() if size},
        {name: size for name, size in training.items() if size},
        generation,
        host,
    )


def _gathered(shape: Shape, compute: int) -> float:
    """Two layers (one computed, one fetched) and what lies outside of the layers."""
    return (2 * shape.layer + shape.embedding * (1 if shape.tied else 2)) * compute


def activation_bytes(shape: Shape, mixed: bool, stored: int = 4) -> int:
    """Bytes that one layer keeps for the backward pass of one token; see the module."""
    a = 2 if mixed else stored
    norms = 16 * shape.hidden + (8 * (shape.query + shape.key_value) if shape.qk_norm else 0)
    return a * (2 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 4 * shape.mlp) + norms


def _training(load: Load, trained: int) -> dict[str, float]:
    shape, tokens = load.shape, load.pass_tokens
    compute = 2 if load.mixed else load.stored
    layer = activation_bytes(shape, load.mixed, load.stored) * tokens
    # autocast leaves the residual stream in the type of the weights; DeepSpeed turns the model itself into bfloat16
    residual = 2 if load.mixed and load.sharding.deepspeed else load.stored
    kept = layer + shape.layers * residual * shape.hidden * tokens if load.checkpointing else shape.layers * layer
    parts = {"activations": float(kept)}
    tile = min(tokens, _TILE_TOKENS) * _TILE_WIDTH
    head_gradient = 0 if load.adapters is not None else 4 * shape.embedding
    parts["head: logit tile, gradient"] = tile * compute + head_gradient + 4.0 * shape.hidden * tokens
    if load.mixed and load.stored == 4 and load.sharding in (Sharding.NONE, Sharding.DDP):
        # autocast's bfloat16 copies of the weights live until the backward pass has used them
        copied = shape.layer if load.checkpointing else shape.layers * shape.layer
        parts["bfloat16 copies of weights"] = 2.0 * copied
    if load.sharding is Sharding.FSDP:
        parts["weights gathered for a layer"] = _gathered(shape, compute)
    elif load.sharding is Sharding.ZERO3:
        parts["weights gathered for a pass"] = float(compute * min(load.live, shape.parameters))
    if load.sharding.deepspeed:
        parts["DeepSpeed's buckets"] = 2.0 * compute * min(load.bucket, trained)
    return parts
