"""Each rule on vLLM and on our own engine: what is said, where, and with which remedy."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from tiny_models import save_tiny_model, tiny_config, tiny_model, write_rows
from tunesmith.config.load import load_config
from tunesmith.models.base import BaseFolder
from tunesmith.planned_adapter import planned
from tunesmith.serving import plain_adapters
from tunesmith.serving.findings import Subject, on_disk
from tunesmith.serving.own_rules import SERVED, own_findings
from tunesmith.serving.vllm_models import EMBEDDINGS_AND_HEAD, LINEAR_ONLY, WITHOUT_ADAPTERS
from tunesmith.serving.vllm_rules import needed_rank, vllm_findings

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def subject(lora=None, architecture="LlamaForCausalLM", **more):
    fields = {"vocabulary": 400, "adapted": frozenset(), "linear": tuple(LINEAR)} | more
    return Subject({"r": 8, **(lora or {})}, lambda key: f"c.yaml line 7: {key}", architecture, **fields)


def fatal(findings):
    return [(finding.place.rpartition(" ")[2], finding.fault) for finding in findings if finding.is_fatal]


@pytest.mark.parametrize(
    ("lora", "key", "words"),
    [
        ({"use_dora": True}, "use_dora", "DoRA"),
        ({"bias": "lora_only"}, "bias", "biases (bias: lora_only)"),
        ({"bias": "all"}, "bias", "biases (bias: all)"),
        ({"lora_bias": True}, "lora_bias", "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", "whole layers other than a classifier's (lm_head)"),
        ({"modules_to_save": ["score"]}, "modules_to_save", "where text is generated (score)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights", "begun by pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights", "begun by pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights", "begun by loftq"),
        ({"layer_replication": [[0, 2]]}, "layer_replication", "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens", "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora", "use_qalora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices", "the tensors that trainable_token_indices adds"),
        ({"r": 513}, "r", "rank 513, its largest max_lora_rank is 512"),
        ({"rank_pattern": {"q_proj": 600}}, "rank_pattern", "rank 600"),
    ],
)  # fmt: skip
def test_vllm_refuses_a_setting_and_says_where(lora, key, words):
    ((found_key, fault),) = fatal(vllm_findings(subject(lora)))
    assert found_key == f"lora_config.{key}"
    assert words in fault


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}, {"rank_pattern": {"q_proj": 512}}, {"r": 512},
        {"layers_to_transform": [1]}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "Orthogonal"},
        {"init_lora_weights": False}, {"use_dora": False, "bias": "none", "modules_to_save": None},
    ],
    ids=str,
)  # fmt: skip
def test_vllm_takes_the_rest(lora):
    assert fatal(vllm_findings(subject(lora))) == []


@given(st.lists(st.integers(1, 600), min_size=1, max_size=5))
def test_the_rank_to_start_with_is_the_least_that_holds_all(ranks):
    needed = needed_rank(ranks)
    choices = [1, 8, 16, 32, 64, 128, 256, 320, 512]  # MaxLoRARanks in config/lora.py of vLLM 0.32.0
    fitting = [choice for choice in choices if all(rank <= choice for rank in ranks)]
    assert needed == (min(fitting) if fitting else None)


def test_a_rank_above_the_default_is_told_but_no_fault():
    (finding,) = vllm_findings(subject({"r": 17}))
    assert not finding.is_fatal
    assert "--max-lora-rank 32" in finding.fault
    assert vllm_findings(subject({"r": 16})) == []


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [
        ("LlamaForCausalLM", None),
        ("Qwen3ForCausalLM", None),
        ("Qwen2ForCausalLM", "embed_tokens and lm_head"),
        ("MistralForCausalLM", "embed_tokens and lm_head"),
        ("CohereForCausalLM", "lm_head"),
        ("SmolLM3ForCausalLM", "lm_head"),  # through the Transformers backend
    ],
)
def test_embeddings_and_head_hang_on_the_architecture(architecture, refused):
    adapted = frozenset({"embed_tokens", "lm_head"})
    findings = vllm_findings(subject(architecture=architecture, adapted=adapted))
    if refused is None:
        assert findings == []
        return
    (finding,) = findings
    assert finding.fault == f"vLLM refuses adapters on {refused} of {architecture}"
    kept = [*LINEAR, "embed_tokens"] if refused == "lm_head" else LINEAR
    assert finding.remedy.startswith(f"set target_modules to [{', '.join(kept)}]")
    assert finding.source.startswith("vLLM 0.32.0, vllm/lora/lora_model.py")


def test_an_architecture_without_adapters_is_said_once():
    (finding,) = vllm_findings(subject(architecture="GPT2LMHeadModel", adapted=frozenset({"wte"})))
    assert finding.fault == "vLLM puts no adapters on GPT2LMHeadModel"
    assert "tunesmith merge" in finding.remedy


def test_the_vocabulary_is_bounded_where_the_head_may_be_adapted():
    assert fatal(vllm_findings(subject(vocabulary=258_048))) == []
    ((_, fault),) = fatal(vllm_findings(subject(vocabulary=258_049)))
    assert "258,049, at most 258,048" in fault
    assert fatal(vllm_findings(subject(architecture="Gemma2ForCausalLM", vocabulary=300_000))) == []


def test_embeddings_of_another_size_are_refused():
    ((_, fault),) = fatal(vllm_findings(subject(embedding_rows=401)))
    assert "401 embeddings, the base has 400" in fault
    assert vllm_findings(subject(embedding_rows=400)) == []


def test_no_architecture_is_in_two_lists():
    assert not (
        WITHOUT_ADAPTERS & LINEAR_ONLY
        | WITHOUT_ADAPTERS & EMBEDDINGS_AND_HEAD
        | LINEAR_ONLY & EMBEDDINGS_AND_HEAD
    )


def vllm_reads(name: str) -> bool:
    """As ``parse_fine_tuned_lora_name`` of vLLM 0.32.0 takes names of tensors."""
    return bool(re.search(r"\.(lora_A|lora_B)\.weight$|\.lora_embedding_[AB]$", name))


@pytest.mark.parametrize(
    ("settings", "is_read"),
    [
        ({}, True),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
        ({"lora_bias": True}, False),
        ({"use_dora": True}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"trainable_token_indices": [1, 2]}, False),
    ],
)
def test_the_names_of_tensors_that_peft_saves_are_what_the_rules_say(settings, is_read):
    config = LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(tiny_model(tied=False), config)
    names = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(map(vllm_reads, names)) == is_read
    adapted = frozenset(set(config.target_modules) & {"embed_tokens", "lm_head"})
    assert (fatal(vllm_findings(subject(config.to_dict(), adapted=adapted))) == []) == is_read


# A configuration, and a checkpoint


def config_file(tmp_path: Path, lora: str, more: str = "", kind: str = "llama") -> tuple[Path, BaseFolder]:
    base = save_tiny_model(tmp_path / "base", kind)
    rows = write_rows(tmp_path / "train.jsonl", 4)
    path = tmp_path / "c.yaml"
    path.write_text(f"model_id: {base}\ntrain_path: {rows}\n{more}lora_config:\n{lora}", encoding="utf-8")
    return path, BaseFolder(str(base), base, None)


def test_a_finding_names_file_and_line(tmp_path: Path):
    path, base = config_file(tmp_path, "  r: 8\n  use_dora: true\n")
    found = planned(load_config(str(path)), base, 64, 256)
    assert found is not None
    (finding,) = vllm_findings(found)
    assert finding.place == f"{path} line 5: lora_config.use_dora"


@pytest.mark.parametrize(
    ("lora", "adapted"),
    [
        ("  r: 8\n", {"embed_tokens", "lm_head"}),
        ("  target_modules: all-linear\n", set()),
        ("  target_modules: [q_proj, lm_head]\n", {"lm_head"}),
        ("  target_modules: '.*(embed_tokens|q_proj)'\n", {"embed_tokens"}),
        ("  target_modules: [q_proj, lm_head]\n  exclude_modules: [lm_head]\n", set()),
    ],
)
def test_which_layers_a_configuration_reaches_is_worked_out_without_weights(tmp_path: Path, lora, adapted):
    path, base = config_file(tmp_path, lora)
    (base.path / "model.safetensors").unlink()
    found = planned(load_config(str(path)), base, 64, 256)
    assert found is not None
    assert found.adapted == adapted
    assert found.architecture == "LlamaForCausalLM"
    assert found.vocabulary == 400
    assert list(found.linear) == LINEAR


def test_stretched_positions_and_templates_are_told(tmp_path: Path):
    more = "context_length: 512\nembedding_scaling_technique: linear\ngeneration_config:\n  stopping_sequences: [END]\n"
    path, base = config_file(tmp_path, "  r: 8\n", f"{more}  prompt_format:\n    user: 'U {{instruction}}'\n")
    found = planned(load_config(str(path)), base, 512, 256)
    assert found is not None
    findings = vllm_findings(found)
    assert [(f.place, f.is_fatal) for f in findings] == [
        (f"{path} line 3: context_length", True),
        (f"{path} line 8: generation_config.prompt_format.user", False),
        (f"{path} line 6: generation_config.stopping_sequences", False),
    ]
    assert [f.place for f in own_findings(found)] == [f"{path} line 3: context_length"]


def test_where_every_weight_is_trained_there_is_no_adapter(tmp_path: Path):
    path, base = config_file(tmp_path, "  r: 8\n")
    text = path.read_text().partition("lora_config")[0]
    path.write_text(text)
    assert planned(load_config(str(path)), base, 64, 256) is None


def test_a_checkpoint_is_judged_by_its_files(tmp_path: Path):
    base = BaseFolder("base", save_tiny_model(tmp_path / "base", tied=False), None)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(tied=False), config).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    found = on_disk(tmp_path / "a", base)
    assert (found.adapted, found.embedding_rows, found.vocabulary) == ({"embed_tokens", "lm_head"}, 400, 400)
    assert found.ranks == [4]
    assert vllm_findings(found) == []
    settings = json.loads((base.path / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"]}
    (base.path / "config.json").write_text(json.dumps(settings))
    (finding,) = vllm_findings(on_disk(tmp_path / "a", base))
    assert finding.place == str(tmp_path / "a")
    assert "embed_tokens and lm_head of Qwen2ForCausalLM" in finding.fault


# Our own engine


def test_own_rules_are_those_of_the_engine_that_serves_most():
    assert SERVED == plain_adapters._UNDERSTOOD


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"use_dora": True}, None),
        ({"bias": "all"}, None),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 5000}, "r"),
    ],
)
def test_what_our_own_engine_refuses(lora, key):
    found = fatal(own_findings(subject(LoraConfig(**{"r": 8, **lora}).to_dict())))
    assert [place for place, _ in found] == ([f"lora_config.{key}"] if key else [])


def test_a_plain_configuration_passes_both():
    plain = subject(LoraConfig(r=8, target_modules=LINEAR).to_dict(), vocabulary=tiny_config().vocab_size)
    assert vllm_findings(plain) == own_findings(plain) == []
