"""What will run where, and what it takes: worked out and checked before anything is started."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from memfactory.errors import MemFactoryError, RecipeError, RecipeErrors, attempt
from memfactory.launch.accelerate_config import Settings, merged, precision, precision_errors, read_config
from memfactory.launch.batch import Batch, batch, kept
from memfactory.launch.memory import Load, Memory, Sharding, estimate, packed_bytes
from memfactory.launch.ports import port_taken
from memfactory.launch.shapes import Shape, find_shape
from memfactory.policy.quantization import divided
from memfactory.recipe import Recipe
from memfactory.train.policies import trains
from memfactory.train.prepare import Prepared

_GB = 1e9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None and 0 mean not said."""

    config: str | None = None
    gpus: int | None = None
    """GPUs of each trainer node, hence processes on it."""
    processes: int | None = None
    """Processes on this machine, with or without GPUs."""
    nodes: int | None = None
    """Trainer nodes."""
    rollout_nodes: int | None = None
    slurm: bool = False
    port: int | None = None
    node_rank: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Plan:
    """A checked plan."""

    recipe: Recipe
    settings: Settings
    nodes: int
    per_node: int
    """Processes on each trainer node."""
    rollout_nodes: int
    port: int
    batch: Batch
    shape: Shape | None
    memory: Memory | None
    """None where the model's size is not known here."""
    rows: float | None = None
    """Rows (training sequences) of an episode, where the data says; an upper bound when `rows_at_most`."""
    rows_at_most: bool = False

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    def accelerate(self, deepspeed: Path) -> dict[str, Any]:
        """The configuration to be written; `deepspeed` is where DeepSpeed's own will lie."""
        return merged(
            self.settings,
            processes=self.processes,
            nodes=self.nodes,
            port=self.port,
            train=self.recipe.train,
            deepspeed=deepspeed,
        )


@dataclass(frozen=True)
class Layout:
    """Which configuration, on how many processes."""

    settings: Settings
    nodes: int
    per_node: int

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def gpus_here() -> int:
    """GPUs that torch can see on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def lay_out(request: Request) -> Layout:
    """The configuration, the trainer nodes and the processes on each, from the command line and this machine.

    Raises:
        RecipeErrors: everything about them that cannot be.
    """
    errors: list[MemFactoryError] = []
    if request.gpus is not None and request.processes is not None:
        errors.append(RecipeError("--gpus and --processes", "each says how many processes there are", "keep one"))
    asked = request.gpus or request.processes
    on_cpu = request.gpus is None and not request.slurm and gpus_here() < (request.processes or 1)
    default = "cpu" if on_cpu else "single_gpu" if asked == 1 and (request.nodes or 1) == 1 else "ddp"
    settings = attempt(lambda: read_config(request.config or default), errors)
    if settings is None:
        raise RecipeErrors("launch", errors)
    nodes = request.nodes or int(settings.values.get("num_machines", 1))
    stated = settings.values.get("num_processes")
    here = 1 if settings.single else gpus_here()
    per_node = (
        asked or (stated and max(1, int(stated) // nodes)) or here or (1 if on_cpu and not request.config else 0)
    )
    name = f"--config {settings.name}"
    if not per_node:
        fix = "--processes 2" if settings.cpu else "--gpus 8 (GPUs of each node)"
        errors.append(
            RecipeError(f"{name}: for how many processes?", "this machine has no GPU to count", f"add {fix}")
        )
    if settings.single and max(per_node, nodes) > 1:
        errors.append(RecipeError(f"{name}: one process only", f"{per_node * nodes} are asked for", "--config ddp"))
    if settings.cpu and request.gpus is not None:
        fix = f"--processes {request.gpus}, or --config ddp"
        errors.append(RecipeError(f"{name}: runs on CPUs", f"--gpus {request.gpus} is asked for", fix))
    if not settings.cpu and request.processes is not None and gpus_here() < request.processes and not request.slurm:
        silently = settings.sharding in (Sharding.FSDP, Sharding.ZERO1, Sharding.ZERO2, Sharding.ZERO3)
        why = f"--processes {request.processes}, and this machine has {gpus_here()} GPUs"
        why += ": accelerate would not divide anything on a CPU" if silently else ""
        fix = f"--config cpu, or --gpus {request.processes} to plan for a machine that has them"
        errors.append(RecipeError(name, why, fix))
    if errors:
        raise RecipeErrors("launch", errors)
    return Layout(settings, nodes, per_node)


def make_plan(prepared: Prepared, request: Request, layout: Layout, episodes: int | None = None) -> Plan:
    """Work out and check a plan.

    Args:
        prepared: the checked recipe; with its tasks the plan knows how many rows an episode has.
        request: the command line.
        layout: of that request.
        episodes: in one optimizer step, kept whatever the number of processes; None takes the recipe's for each.

    Raises:
        RecipeErrors: everything that cannot work, in one message, each with what to type instead.
    """
    settings, nodes, per_node = layout.settings, layout.nodes, layout.per_node
    wrong: list[MemFactoryError] = []
    if episodes is not None:
        changes, wrong = kept(prepared.recipe.train, layout.processes, episodes)
        changed = prepared.recipe.model_copy(update={"train": prepared.recipe.train | changes})
        prepared = dataclasses.replace(prepared, recipe=changed)
    recipe = prepared.recipe
    engine = recipe.rollout.engine
    rollout_nodes = request.rollout_nodes or 0
    errors = precision_errors(settings, recipe.train)
    found, divided = batch(recipe.train, layout.processes)
    errors += (wrong or divided) + _unfit(recipe, settings)
    if nodes > 1 and request.port == 0:
        errors.append(
            RecipeError("--port 0", "nodes must agree on a port beforehand", "give a number, e.g. --port 29500")
        )
    if engine == "async" and layout.processes > 1:
        from memfactory.train.async_config import several_processes

        errors.append(several_processes(layout.processes))
    if rollout_nodes and not request.slurm:
        fix = "add --slurm, or start `memfactory serve-rollouts RECIPE` there and name it in rollout.vllm.base_urls"
        errors.append(RecipeError(f"--rollout-nodes {rollout_nodes}", "only a SLURM job can start them", fix))
    if rollout_nodes and not recipe.rollout.served:
        why = f"episodes are generated by {engine}, in the training processes"
        errors.append(RecipeError(f"--rollout-nodes {rollout_nodes}", why, "rollout.engine=vllm, or leave it out"))
    if rollout_nodes and recipe.rollout.vllm.mode == "colocate":
        why = "rollout.vllm.mode is colocate: each training process starts a server beside itself"
        errors.append(
            RecipeError(f"--rollout-nodes {rollout_nodes}", why, "rollout.vllm.mode=server, or leave it out")
        )
    if errors or found is None:
        raise RecipeErrors(f"{recipe.name} on {layout.processes} processes", errors)
    shape = find_shape(recipe.model, prepared.vocabulary)
    memory = estimate(_load(prepared, settings, shape, found.processes)) if shape is not None else None
    rows, at_most = _rows(prepared)
    port = request.port if request.port is not None else settings.values.get("main_process_port")
    port = int(port) if port is not None else (29500 if nodes > 1 else 0)
    return Plan(recipe, settings, nodes, per_node, rollout_nodes, port, found, shape, memory, rows, at_most)


def _unfit(recipe: Recipe, settings: Settings) -> list[MemFactoryError]:
    """What the recipe and the configuration cannot do together."""
    errors: list[MemFactoryError] = []
    for key in ("deepspeed", "fsdp", "fsdp_config"):
        if recipe.train.get(key):
            why = "the launch configuration decides how the model is divided, and two would contradict each other"
            errors.append(RecipeError(f"train.{key}", why, f"train.{key}=null, and --config zero3 or fsdp2"))
    if settings.sharding is Sharding.FSDP and recipe.model.dtype == "float16":
        errors.append(
            RecipeError("model.dtype: float16 with FSDP", "its optimizer would run in float16", "model.dtype=float32")
        )
    if recipe.model.quantization is not None and settings.sharding not in (Sharding.NONE, Sharding.DDP):
        errors.append(divided(f"--config {settings.name}"))
    return errors


def caveats(recipe: Recipe, settings: Settings) -> list[MemFactoryError]:
    """What works and is seldom what was meant."""
    found: list[MemFactoryError] = []
    if recipe.model.lora is not None and settings.sharding is Sharding.ZERO3:
        why = (
            "gradients and optimizer states of adapters are small, so little but the frozen weights is divided, and "
            "these are gathered whole for every generation"
        )
        found.append(RecipeError("model.lora with ZeRO-3", why, "--config ddp, unless the model does not fit one GPU"))
    if recipe.model.lora is not None and recipe.model.dtype == "float32" and precision(recipe.train) == "bf16":
        why = "frozen weights need no float32 masters"
        found.append(RecipeError("model.lora with model.dtype=float32", why, "model.dtype=bfloat16 halves them"))
    if recipe.rollout.served and recipe.rollout.vllm.mode == "colocate" and not settings.cpu:
        why = "the servers take their share of the same devices, which the estimate of memory leaves out"
        found.append(RecipeError("rollout.vllm.mode: colocate", why, "rollout.vllm.gpu_memory_utilization sets it"))
    if settings.cpu and precision(recipe.train) == "fp16":
        found.append(RecipeError("train.fp16 on a CPU", "few CPUs compute in it", "train.fp16=false"))
    return found


def _load(prepared: Prepared, settings: Settings, shape: Shape, processes: int) -> Load:
    """What the memory of one process depends on."""
    recipe = prepared.recipe
    lora, quantization = recipe.model.lora, recipe.model.quantization
    asked = [module.name for module in getattr(prepared.agent, "modules", ()) if hasattr(module, "render")]
    trained = not asked or any(trains(recipe, name) for name in asked)
    full = lora is None
    reference = full and trained and float(recipe.train.get("beta", 0.0)) != 0
    initial = full and any(section.policy == "initial" for section in recipe.modules.values())
    return Load(
        shape=shape,
        processes=processes,
        sharding=Sharding.NONE if processes == 1 and not settings.deepspeed_engine else settings.sharding,
        stored=_BYTES[recipe.model.dtype],
        mixed=precision(recipe.train) != "no",
        adapters=None if lora is None else shape.adapters(lora),
        packed=None if quantization is None else packed_bytes(quantization.double),
        trained=trained,
        copies=reference + initial,
        checkpointing=bool(recipe.train.get("gradient_checkpointing")),
        pass_tokens=recipe.rollout.train_token_budget,
        cache_tokens=0 if recipe.rollout.served else recipe.rollout.generate_token_budget,
        offload_optimizer=settings.offloads("optimizer"),
        offload_weights=settings.offloads("param"),
        bucket=int(settings.zero("reduce_bucket_size", 500_000_000)),
        live=int(float(settings.zero("stage3_max_live_parameters", 1_000_000_000))),
    )


def _rows(prepared: Prepared) -> tuple[float | None, bool]:
    """Rows of an episode (one for each piece that is read and each question), and whether that is an upper bound."""
    from memfactory.agents import MemAgent

    agent: Any = prepared.agent
    tasks = prepared.train_tasks[:256]
    if tasks and isinstance(agent, MemAgent) and agent.chunk_tokens is None:
        return sum(len(task.stream) + len(task.probes) for task in tasks) / len(tasks), False
    limit = getattr(agent, "max_chunks", None)
    return (limit + 1.0, True) if limit is not None else (None, False)


# --- before it starts -------------------------------------------------------------------------------------


def start_errors(plan: Plan, request: Request, *, start_over: bool = False) -> list[MemFactoryError]:
    """What this machine lacks to start the plan now. A dry run, and a job for other machines, can do without it."""
    errors: list[MemFactoryError] = []
    if plan.nodes > 1 and (request.node_rank is None or request.address is None):
        why = "nothing here starts processes on other machines"
        fix = "--slurm, or run this on every node with --node-rank 0, 1, ... and --address HOST of the first"
        errors.append(RecipeError(f"--nodes {plan.nodes}", why, fix))
    elif request.node_rank is not None and not 0 <= request.node_rank < plan.nodes:
        errors.append(RecipeError(f"--node-rank {request.node_rank}", f"there are {plan.nodes} nodes, from 0 on"))
    have = gpus_here()
    if not plan.settings.cpu and have < plan.per_node:
        fits = f"--gpus {have}, " if have else "--processes 2 --config cpu, "
        what = f"{plan.per_node} GPUs are asked for and this machine has {have}"
        errors.append(
            RecipeError(f"--config {plan.settings.name}", what, f"{fits}or --dry-run to only write the files")
        )
    if plan.settings.deepspeed_engine and importlib.util.find_spec("deepspeed") is None:
        fix = "pip install deepspeed, or --config fsdp2 (the same without it)"
        errors.append(RecipeError(f"--config {plan.settings.name}", "DeepSpeed is not installed", fix))
    first = request.node_rank in (None, 0)
    if first and plan.port and port_taken(plan.port):
        free = "--port 0 takes a free one" if plan.nodes == 1 else f"--port {plan.port + 1}, the same on every node"
        errors.append(RecipeError(f"--port {plan.port}", "another program listens there", free))
    if first and not start_over:
        errors += folder_errors(plan.recipe)
    return errors


def folder_errors(recipe: Recipe) -> list[MemFactoryError]:
    """Whether a run of another recipe lies in the run folder."""
    from memfactory.runs import RunFolder

    errors: list[MemFactoryError] = []
    attempt(lambda: RunFolder(recipe.run_dir).refuse_other(recipe), errors)
    return errors


# --- showing ----------------------------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    console.rule("processes")
    console.print(_processes_table(plan))
    for caveat in caveats(plan.recipe, plan.settings):
        console.print(f"note: {caveat}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.rule("batch arithmetic")
    console.print(_batch_table(plan))
    console.rule("estimated memory of one device")
    console.print(_memory_table(plan))


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _processes_table(plan: Plan) -> Table:
    table = _table()
    where = f" ({plan.nodes} nodes x {plan.per_node})" if plan.nodes > 1 else ""
    device = "on the CPU, joined by gloo" if plan.settings.cpu else "one for each GPU"
    table.add_row("training processes", f"{plan.processes}{where}, {device}")
    divided = {
        Sharding.NONE: "nothing: one process has everything",
        Sharding.DDP: "the batch; every process has the whole model",
        Sharding.FSDP: "the batch; weights, gradients and optimizer states (FSDP2)",
        Sharding.ZERO1: "the batch; optimizer states (ZeRO-1)",
        Sharding.ZERO2: "the batch; gradients and optimizer states (ZeRO-2)",
        Sharding.ZERO3: "the batch; weights, gradients and optimizer states (ZeRO-3)",
    }[plan.settings.sharding if plan.processes > 1 else Sharding.NONE]
    table.add_row("divided", divided)
    table.add_row("configuration", str(plan.settings.path))
    table.add_row("computed in", {"no": plan.recipe.model.dtype}.get(p := precision(plan.recipe.train), p))
    if plan.recipe.rollout.served and plan.recipe.rollout.vllm.mode == "colocate":
        served = "vLLM, a server beside each training process"
    elif plan.recipe.rollout.served:
        served = (
            f"vLLM on {plan.rollout_nodes} nodes of their own"
            if plan.rollout_nodes
            else "vLLM at rollout.vllm.base_urls"
        )
    else:
        served = (
            f"each of the {plan.processes} training processes, for its own episodes"
            if plan.processes > 1
            else "the training process"
        )
    table.add_row("rollouts come from", served)
    return table


def _batch_table(plan: Plan) -> Table:
    table, b = _table(), plan.batch
    table.add_row(
        "episodes per generation batch",
        f"{b.per_device} x {b.steps_per_generation} steps x {b.processes} processes = {b.generation_batch}",
    )
    table.add_row("  of them on one process", f"{b.per_process}")
    table.add_row("groups (tasks)", f"{b.generation_batch} / {b.generations} = {b.groups}")
    if plan.rows is not None:
        most = "at most " if plan.rows_at_most else ""
        total = f"{b.generation_batch} x {plan.rows:.3g} = {most}{b.generation_batch * plan.rows:.0f}"
        table.add_row("rows", f"{total} ({most}{plan.rows:.3g} an episode)")
    table.add_row(
        "episodes per optimizer step",
        f"{b.per_device} x {b.accumulation} accumulated x {b.processes} processes = [bold]{b.optimizer_batch}[/bold]",
    )
    alone = b.per_device * b.accumulation
    if b.processes > 1 and alone % (b.processes * b.accumulation) == 0:
        table.add_row("", f"(one process alone has {alone}; --batch {alone} keeps it at that)")
    table.add_row("positions per forward pass", f"at most {plan.recipe.rollout.train_token_budget} on each process")
    return table


def _memory_table(plan: Plan) -> Table:
    table, memory, shape = _table(), plan.memory, plan.shape
    if memory is None or shape is None:
        table.add_row("unknown", f"the size of {plan.recipe.model.name} is not known on this machine")
        table.add_row("to know it", "download the model (or its config.json) and name its folder in model.name")
        return table
    lora = plan.recipe.model.lora
    how = f"LoRA, {shape.adapters(lora) / 1e6:.3g} M trained" if lora is not None else "all trained"
    how += ", the others in 4 bits" if plan.recipe.model.quantization is not None else ""
    table.add_row("parameters", f"{shape.parameters / 1e6:,.6g} M, {how}")
    for title, parts in (
        ("always", memory.states),
        ("while training", memory.training),
        ("while generating", memory.generation),
    ):
        for name, size in parts.items():
            table.add_row(f"{title}: {name}", size_text(size))
    fits = (
        f"fits a GPU of {memory.device} GB"
        if memory.device
        else "fits no single GPU: divide more, or --config zero3_offload"
    )
    verdict = "" if plan.settings.cpu else f"; with a tenth more it {fits}"
    table.add_row("[bold]peak[/bold]", f"[bold]{size_text(memory.peak)}[/bold]{verdict}")
    loading = shape.parameters * _BYTES[plan.recipe.model.dtype] * plan.per_node
    if not plan.settings.cpu:
        table.add_row("memory of each machine", f"{size_text(loading)} while {plan.per_node} processes load the model")
    if memory.host:
        table.add_row("", f"{size_text(memory.host * plan.per_node)} for what is kept there while training")
    return table


def size_text(size: float) -> str:
    """Bytes in GB, or MB below one."""
    return f"{size / _GB:.1f} GB" if size >= _GB else f"{size / 1e6:.1f} MB"
