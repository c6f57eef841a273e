"""Our rules on vLLM against vLLM's own source; run by vLLM's Python, see ``against_vllm.sh``.

For each setting ``PEFTHelper`` has to refuse what the rules say, and for each architecture that can be imported its
class has to take adapters where the lists say. Prints what differs; exit code 1 if anything does.
"""

import importlib
import sys
import typing

from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from tunesmith.serving.findings import Subject
from tunesmith.serving.vllm_models import WITHOUT_ADAPTERS, accepted_embeddings
from tunesmith.serving.vllm_rules import MAX_LORA_RANKS, vllm_findings

STARTS = [
    True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga", "pissa", "pissa_niter_4", "olora", "corda",
    "loftq",
]  # fmt: skip
SETTINGS = [
    {}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True},
    {"modules_to_save": ["lm_head"]}, {"layer_replication": [[0, 2]]}, {"alora_invocation_tokens": [1]},
    {"use_qalora": True}, {"use_bdlora": {"x": 1}}, {"r": 512}, {"r": 513}, {"rank_pattern": {"q_proj": 512}},
    {"rank_pattern": {"q_proj": 513}}, *({"init_lora_weights": start} for start in STARTS),
]  # fmt: skip


def settings_that_differ() -> list[str]:
    """Settings that vLLM refuses and the rules do not, or the other way round."""
    found = (
        [] if typing.get_args(MaxLoRARanks) == MAX_LORA_RANKS else [f"ranks: {typing.get_args(MaxLoRARanks)}"]
    )
    for settings in SETTINGS:
        lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **settings}
        subject = Subject(lora, str, "LlamaForCausalLM", 400, frozenset())
        ours = any(finding.is_fatal for finding in vllm_findings(subject))
        try:
            PEFTHelper.from_dict(lora).validate_legal(LoRAConfig(max_lora_rank=MAX_LORA_RANKS[-1]))
            theirs = False
        except ValueError:
            theirs = True
        if ours != theirs:
            found.append(f"{settings}: vLLM {'refuses' if theirs else 'takes'} it")
    return found


def architectures_that_differ() -> tuple[list[str], int]:
    """Architectures of which the class says otherwise than the lists; and how many could be looked at."""
    found, looked = [], 0
    for architecture, (module, name, *_) in _TEXT_GENERATION_MODELS.items():
        try:
            model = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
        except ImportError:  # for other processors
            continue
        looked += 1
        takes, embeddings = (
            getattr(model, "supports_lora", False),
            set(getattr(model, "embedding_modules", {})),
        )
        if takes == (architecture in WITHOUT_ADAPTERS) or (
            takes and embeddings != accepted_embeddings(architecture)
        ):
            found.append(f"{architecture}: adapters {takes}, embeddings {sorted(embeddings)}")
    return found, looked


if __name__ == "__main__":
    differ, looked = architectures_that_differ()
    differ += settings_that_differ()
    print(f"{len(SETTINGS)} settings and {looked} architectures looked at, {len(differ)} differ")
    print("\n".join(differ))
    sys.exit(bool(differ))
