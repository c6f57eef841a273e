"""The settings of a ``lora_config`` group: names and documented defaults.

The names are those of PEFT's ``LoraConfig``. PEFT itself takes seconds to import, and checking a file must
not: hence this list, which a test holds against the installed PEFT. Left out are names that PEFT fills in by
itself when it saves (base model, version).
"""

from collections.abc import Mapping
from typing import Any

# What is used where ``lora_config`` leaves a setting out. The target modules depend on the model: all linear
# layers, the input embeddings and the head.
LORA_DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}

LORA_CONFIG_KEYS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "monteclora_config",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
)
