"""The parts that a configuration names, built: rows, model, plan, held-out questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tunesmith.config.load import DEFAULT_LEARNING_RATE, LoadedConfig
from tunesmith.config.schema import Evaluation, GenerationConfig, LoraMethod
from tunesmith.data.conversation import detect_task
from tunesmith.data.lengths import fit_to_length
from tunesmith.data.prompt_format import chat_template
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import TokenizedRows, tokenize_rows
from tunesmith.data.splits import Splits, choose_context_length, load_splits
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.evaluation.answers import read_questions
from tunesmith.evaluation.generation_memory import generation_bytes, sizes_of
from tunesmith.evaluation.heldout import check_expected
from tunesmith.evaluation.score import HeldOut
from tunesmith.forwarding import refuse_unusable_place
from tunesmith.memory_plan import TOKEN_BUDGETS, MemoryPlan, plan_memory
from tunesmith.models.base import (
    BaseFolder,
    choose_device,
    choose_dtype,
    find_base,
    load_model,
    load_tokenizer,
    model_limit,
)
from tunesmith.models.batches import MicroBatches, Share, micro_batches, prepare_packing
from tunesmith.models.catalog import cache_dir
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.method import (
    prepare_full,
    prepare_lora,
    set_generation_defaults,
    trainable_parameters,
)
from tunesmith.models.passes import KernelPasses, Passes, choose_passes
from tunesmith.models.stops import Stops, find_stops
from tunesmith.planning.nearest import Beside
from tunesmith.starting_points import Origin, adapter_to_continue, origin_of, weights_id
from tunesmith.training.schedule import StepPlan, plan_steps
from tunesmith.training.workers import ALONE, Workers, first_then_others

DEFAULT_TRAIN_ROWS = 8
DEFAULT_EVAL_ROWS = 16
# Computed tokens in a micro-batch through autograd: enough to keep the matrix products of a CPU efficient. At this size
# runs of the default model peaked at 3.5 GB (example data) and 4.2 GB (viggo). The kernels plan theirs: memory_plan.py.
TRAIN_TOKEN_BUDGET = 768
EVAL_TOKEN_BUDGET = 2048
Say = Callable[[str], None]


@dataclass(frozen=True)
class TextParts:
    """All that is needed to turn a row into tokens, without weights."""

    base: BaseFolder
    tokenizer: Any
    renderer: Renderer
    splits: Splits
    context_length: int
    model_limit: int | None


@dataclass(frozen=True)
class Assembly:
    """A run ready to start."""

    text: TextParts
    kind: Literal["lora", "full"]
    model: Any
    stops: Stops
    plan: StepPlan
    peak_rate: float
    heldout: HeldOut | None  # scored before and after
    valid: HeldOut | None  # scored on the checkpoint schedule
    passes: Passes
    passes_reason: str
    memory: MemoryPlan | None  # None: through autograd, whose memory is not counted
    dtype_reason: str
    train_batches: MicroBatches
    eval_batches: MicroBatches
    batches_reason: str
    origin: Origin
    world: int = 1  # workers that train together


def template_of(settings: GenerationConfig) -> str | None:
    """The chat template that replaces the model's own, or None."""
    return chat_template(settings.prompt_format) if settings.prompt_format else None


def assemble_text(loaded: LoadedConfig, *, weights: bool, skip_bad_rows: bool, say: Say) -> TextParts:
    """Tokenizer, template and tokenised rows; enough for ``tunesmith check``.

    Raises:
        ConfigError, DataError, ModelError: what the configuration names cannot be used.
    """
    model, data = loaded.config.model, loaded.config.data
    base = find_base(weights_id(model), weights=weights, say=say)
    tokenizer = load_tokenizer(base, template_of(data.generation_config))
    renderer = Renderer(tokenizer)
    if not tokenizer.chat_template and detect_task(data.train_path) == TrainOn.ASSISTANT_TURNS:
        raise ModelError(
            base.model_id,
            "has no chat template, which rows with messages need",
            "set generation_config.prompt_format, or take the model's instruction-tuned sibling",
        )
    splits = load_splits(
        data.train_path,
        data.valid_path,
        renderer,
        data.task,
        cache_dir=cache_dir() / "tokens",
        skip_bad_rows=skip_bad_rows,
        on_progress=lambda path, done: (
            say(f"{path}: {done:,} rows tokenised") if done % 10_000 == 0 else None
        ),
    )
    for rows in (splits.train, splits.valid):
        if rows is not None and rows.skipped:
            what = "1 row breaks" if rows.skipped == 1 else f"{rows.skipped:,} rows break"
            say(f"{rows.path}: {what} a rule, left out (--skip-bad-rows)")
    limit = model_limit(base)
    context_length = choose_context_length(
        model.context_length,
        limit,
        splits.longest,
        model.embedding_scaling_technique,
        loaded.place("context_length"),
    )
    return TextParts(base, tokenizer, renderer, splits, context_length, limit)


def assemble(
    loaded: LoadedConfig,
    *,
    skip_bad_rows: bool,
    say: Say,
    token_budget: int | None = None,
    workers: Workers = ALONE,
) -> Assembly:
    """Everything a run needs; nothing has been written yet.

    ``token_budget`` is that of a run to go on with: another cut into micro-batches gives other last bits.

    Raises:
        ConfigError, DataError, ModelError: what the configuration names cannot be used.
        RunError: workers would compute differently.
    """
    config = loaded.config
    refuse_contradictions(loaded)

    def read() -> tuple[TextParts, Splits, HeldOut | None, HeldOut | None]:
        text = assemble_text(loaded, weights=True, skip_bad_rows=skip_bad_rows, say=say)
        fitted = text.splits.fitted(text.context_length, config.data.on_too_long)
        return text, fitted, *held_out(loaded, text, fitted, skip_bad_rows=skip_bad_rows)

    # Fetching a model and tokenising its rows is done once; the other workers find both in the caches.
    text, fitted, heldout, valid = first_then_others(workers, read)
    optimization = config.optimization
    batch = rows_per_step(
        optimization.train_batch_size_per_device,
        optimization.gradient_accumulation_steps,
        config.cluster.num_devices,
    )
    plan = plan_steps(len(fitted.train), batch, optimization.num_epochs, optimization.min_update_steps)
    kind, model, autocast, dtype_reason, origin = _load(loaded, text, workers)
    stops = find_stops(
        text.tokenizer,
        model.generation_config,
        text.renderer.end_of_turn,
        config.data.generation_config.stopping_sequences,
    )
    set_generation_defaults(model, list(stops.token_ids), list(stops.strings))
    packs, batches_reason = prepare_packing(model, fitted.train, stops.token_ids[0])
    passes, passes_reason = choose_passes(
        model, fitted.train, packs=packs, autocast=autocast, sharded=workers.in_step
    )
    ways = sorted(set(workers.gather("; ".join((dtype_reason, batches_reason, passes_reason)))))
    if len(ways) > 1:
        raise RunError("workers", f"would not compute alike ({' / '.join(ways)})", "give them equal machines")
    memory = None
    if isinstance(passes, KernelPasses):
        memory = _plan_memory(
            model,
            fitted.train,
            [rows for rows in (heldout, valid) if rows is not None],
            batch,
            optimization.seed,
            TOKEN_BUDGETS if token_budget is None else (token_budget,),
            text.context_length if optimization.padding == "max_length" else 0,
            longest_uncut(loaded, heldout, text.model_limit),
            workers,
        )
        passes.reserve(memory.buffers)
    train_batches, eval_batches = _micro_batches(
        packs,
        memory,
        stops.token_ids[0],
        choose_device(),
        config.checkpoints.eval_batch_size_per_device,
        Share(workers.rank, workers.world, workers.in_step),
    )
    return Assembly(
        text=TextParts(
            text.base, text.tokenizer, text.renderer, fitted, text.context_length, text.model_limit
        ),
        kind=kind,
        model=model,
        stops=stops,
        plan=plan,
        peak_rate=optimization.learning_rate or DEFAULT_LEARNING_RATE[kind],
        heldout=heldout,
        valid=valid,
        passes=passes,
        passes_reason=passes_reason,
        memory=memory,
        dtype_reason=dtype_reason,
        train_batches=train_batches,
        eval_batches=eval_batches,
        batches_reason=batches_reason,
        origin=origin,
        world=workers.world,
    )


def rows_per_step(
    batch_size: int | Literal["auto"], gradient_accumulation_steps: int, num_devices: int = 1
) -> int:
    """Rows that one optimizer step covers, on all devices together."""
    rows = DEFAULT_TRAIN_ROWS if batch_size == "auto" else batch_size
    return rows * gradient_accumulation_steps * num_devices


def refuse_contradictions(loaded: LoadedConfig) -> None:
    """Settings that would train something else than was asked, or whose result could not be left anywhere.

    Raises:
        ConfigError, OutputError: naming the first.
    """
    config = loaded.config
    is_lora = isinstance(config.method, LoraMethod)
    refuse_unusable_place(config.output, forwards=is_lora)
    if config.model.initial_adapter_model_ckpt_path is not None and not is_lora:
        raise ConfigError(
            loaded.place("initial_adapter_model_ckpt_path"),
            "continues an adapter, but the file has no lora_config and so trains every weight",
            "add lora_config, or merge the adapter first and set initial_base_model_ckpt_path",
        )
    metric = config.checkpoints.best_metric
    evaluation = config.checkpoints.evaluation
    if metric != "eval_loss" and (evaluation is None or evaluation.metric != metric):
        raise ConfigError(
            loaded.place("best_metric"),
            f"is {metric}, which is not measured",
            f"set evaluation.metric to {metric}, or best_metric to eval_loss",
        )
    if metric != "eval_loss" and config.data.valid_path is None:
        raise ConfigError(
            loaded.place("best_metric"), f"is {metric}, but valid_path is absent", "set valid_path"
        )


def longest_uncut(loaded: LoadedConfig, scored: HeldOut | None, limit: int | None) -> int:
    """Tokens of the longest row of a test file, which is cut at the model's ``limit`` and not at ``context_length``."""
    evaluation = loaded.config.checkpoints.evaluation
    if scored is None or evaluation is None or evaluation.test_path is None or limit is None:
        return 0
    return min(int(scored.rows.lengths.max()), limit)


def rows_beside(heldout: Sequence[HeldOut], padded: int, uncut: int) -> Beside:
    """What must fit beside the rows that are trained on, but for answers.

    Args:
        padded: the length that every row is padded to; 0: none is.
        uncut: see ``longest_uncut``.
    """
    return Beside(
        padded,
        evaluated=max((int(split.rows.lengths.max()) for split in heldout), default=0),
        predicted=max((int(split.rows.trained_counts.max()) for split in heldout), default=0),
        kept=uncut,
    )


def held_out(
    loaded: LoadedConfig, text: TextParts, fitted: Splits, *, skip_bad_rows: bool
) -> tuple[HeldOut | None, HeldOut | None]:
    """What is scored before and after the run, and what on its checkpoint schedule.

    Raises:
        ConfigError, DataError: there are no rows, or the metric cannot score them.
    """
    settings = loaded.config.checkpoints.evaluation
    valid_path, data = loaded.config.data.valid_path, loaded.config.data
    if settings is None:
        valid = HeldOut(fitted.valid, (), None, 0) if fitted.valid is not None else None
        return valid, valid
    if valid_path is None and settings.test_path is None:
        raise ConfigError(
            loaded.place("evaluation.metric"),
            "evaluation has no rows to score",
            "set valid_path or test_path",
        )
    valid = None
    if fitted.valid is not None and valid_path is not None:
        valid = _questions(valid_path, settings, text, fitted.valid)
    # Answers take longer than losses: the checkpoint schedule asks for them only where the metric decides.
    scheduled = valid
    if valid is not None and loaded.config.checkpoints.best_metric == "eval_loss":
        scheduled = HeldOut(valid.rows, (), None, 0)
    if settings.test_path is None:
        return valid, scheduled
    rows = tokenize_rows(
        settings.test_path,
        text.renderer,
        fitted.train_on,
        cache_dir=cache_dir() / "tokens",
        skip_bad_rows=skip_bad_rows,
    )
    rows = fit_to_length(rows, max(text.context_length, text.model_limit or 0), data.on_too_long)
    return _questions(settings.test_path, settings, text, rows), scheduled


def _questions(path: str, settings: Evaluation, text: TextParts, rows: Any) -> HeldOut:
    if text.splits.train_on is not TrainOn.ASSISTANT_TURNS:
        raise ConfigError("evaluation.metric", "plain text has no answers to score", "leave evaluation out")
    limit = text.model_limit or text.context_length
    questions = read_questions(path, text.renderer, settings.max_rows, limit)
    check_expected([question.expected for question in questions], settings.metric)
    return HeldOut(rows, questions, settings.metric, settings.max_new_tokens)


def _load(
    loaded: LoadedConfig, text: TextParts, workers: Workers
) -> tuple[Literal["lora", "full"], Any, torch.dtype | None, str, Origin]:
    settings, method = loaded.config.model, loaded.config.method
    device = choose_device()
    dtype, reason = choose_dtype(settings.precision, device)
    autocast = None if dtype == torch.float32 else dtype
    # Trained weights stay float32: in bfloat16 a small step would round to nothing.
    weights_dtype = dtype if isinstance(method, LoraMethod) else torch.float32
    # What is going to be split may be too large for a device as a whole.
    place = torch.device("cpu") if workers.in_step else device
    model = load_model(text.base, dtype=weights_dtype, device=place, context_length=text.context_length)
    folder = None
    if isinstance(method, LoraMethod):
        start = settings.initial_adapter_model_ckpt_path
        given, line = method.lora_config, loaded.place("lora_config")
        folder = adapter_to_continue(start, text.base, given, line) if start is not None else None
        model = prepare_lora(
            model,
            given,
            seed=loaded.config.optimization.seed,
            place=line,
            continue_from=folder,
        )
    else:
        model = prepare_full(model)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    workers.share(trainable_parameters(model))  # all begin with the same, whatever their machines draw
    workers.shard(model)
    kind: Literal["lora", "full"] = "lora" if isinstance(method, LoraMethod) else "full"
    return kind, model, autocast, reason, origin_of(settings, text.base, folder)


def _plan_memory(
    model: Any, train: TokenizedRows, heldout: Sequence[HeldOut], batch: int, seed: int,
    budgets: Sequence[int], padded: int, uncut: int, workers: Workers,
) -> MemoryPlan:  # fmt: skip
    """What fits on every worker's machine, agreed among them."""
    decoder = read_decoder(model)
    trained_bytes = sum(p.numel() * p.element_size() for p in trainable_parameters(model))
    answering = max((_answering_bytes(model, rows) for rows in heldout), default=0)
    beside = replace(rows_beside(heldout, padded, uncut), answering=answering)

    def plan_for(budgets: Sequence[int]) -> MemoryPlan:
        return plan_memory(decoder, train, batch, seed, trained_bytes, budgets, beside, workers.here)

    workers.barrier()  # until all models of a machine are loaded, what is free there is not known
    memory = plan_for(budgets)
    if (smallest := min(workers.gather(memory.token_budget))) != memory.token_budget:
        memory = plan_for((smallest,))
    workers.barrier()
    return memory


def _answering_bytes(model: Any, heldout: HeldOut) -> int:
    sizes = sizes_of(model)
    return generation_bytes(sizes, [len(q.prompt_ids) for q in heldout.questions], heldout.max_new_tokens)


def _micro_batches(
    packs: bool,
    memory: MemoryPlan | None,
    pad_token_id: int,
    device: torch.device,
    eval_batch: int | Literal["auto"],
    share: Share,
) -> tuple[MicroBatches, MicroBatches]:
    eval_rows = DEFAULT_EVAL_ROWS if eval_batch == "auto" else eval_batch
    train, evaluation = (
        (memory.token_budget, memory.evaluation_budget) if memory else (TRAIN_TOKEN_BUDGET, EVAL_TOKEN_BUDGET)
    )
    return (
        micro_batches(packs, train, pad_token_id, device, share=share),
        micro_batches(packs, evaluation, pad_token_id, device, eval_rows, share),
    )
