"""What this project's own engines refuse of an adapter, said before it is trained."""

from collections.abc import Iterator

from tunesmith import __version__
from tunesmith.serving.adapter_files import MOST_RANK, UNDERSTOOD
from tunesmith.serving.findings import Finding, Subject

# A test holds this to what ``plain_adapters.py`` reads.
SERVED = UNDERSTOOD | {"use_dora", "bias", "lora_bias", "modules_to_save"}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SOURCE = f"tunesmith {__version__}, tunesmith/serving/adapter_files.py"
_MERGE = "merge the adapter into its base (tunesmith merge) and serve that"


def own_findings(subject: Subject) -> list[Finding]:
    """All that ``tunesmith serve`` would refuse."""
    return [*_settings(subject), *_numbers(subject), *_positions(subject)]


def _settings(subject: Subject) -> Iterator[Finding]:
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    for key in sorted(subject.lora.keys() & plain.keys() - SERVED):
        if subject.lora[key] not in (plain[key], None, False):
            fault = f"tunesmith serve refuses {key}, which it would compute differently"
            yield Finding(
                subject.place(f"lora_config.{key}"), fault, f"leave {key} out, or {_MERGE}", _SOURCE
            )
    start = str(subject.lora.get("init_lora_weights", True)).lower()
    if start.startswith(_MOVES_BASE):
        fault = f"tunesmith serve refuses adapters begun by {start}, which changes the base's weights"
        remedy = f"leave init_lora_weights out, or {_MERGE}"
        yield Finding(subject.place("lora_config.init_lora_weights"), fault, remedy, _SOURCE)


def _numbers(subject: Subject) -> Iterator[Finding]:
    if max(subject.ranks) > MOST_RANK:
        fault = f"tunesmith serve refuses rank {max(subject.ranks)}, at most {MOST_RANK}"
        yield Finding(subject.place("lora_config.r"), fault, "lower it", _SOURCE)


def _positions(subject: Subject) -> Iterator[Finding]:
    if subject.stretched is not None:
        fault = (
            f"tunesmith serve refuses adapters trained on positions stretched to {subject.stretched:,} tokens"
        )
        remedy = f"keep context_length within the base's, or {_MERGE}"
        yield Finding(subject.place("context_length"), fault, remedy, _SOURCE)
