"""What the plain engine loads is exactly right, comes and goes by content, and waits for its requests."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from engine_parts import LINEAR, ask, expected, plain_model, prompt, save_base
from plain_parts import save_any
from tunesmith.checkpoints.manifest import (
    FORMAT,
    BaseWeights,
    Manifest,
    fingerprint_weights,
    hash_files,
    write_manifest,
)
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.plain_engine import PlainEngine
from tunesmith.serving.seam import UnknownAdapter

TENSORS = "adapter_model.safetensors"
AT = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseFolder:
    return save_base(tmp_path_factory.mktemp("base"), "untied")


@pytest.fixture(scope="module")
def shared(base):
    engine = PlainEngine(base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    return save_any(
        base, tmp_path_factory.mktemp("adapter"), target_modules=LINEAR, use_dora=True, bias="lora_only",
        modules_to_save=["lm_head"],
    )  # fmt: skip


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def spoil(name: str, value: float = float("nan")):
    return lambda folder: change_tensors(folder, lambda t: t[name].view(-1)[3:4].fill_(value))


def drop(name: str):
    return lambda folder: change_tensors(folder, lambda t: t.pop(name))


def prompt_tuning(folder: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = BaseFolder("tiny", folder.parent / "base", None)
    get_peft_model(plain_model(save_base(base.path)), config).save_pretrained(folder)


FAULTS = {
    "NaN in A": (spoil(f"{AT}.lora_A.weight"), "not finite"),
    "infinite magnitude": (spoil(f"{AT}.lora_magnitude_vector", float("inf")), "not finite"),
    "NaN in a bias": (spoil(f"{AT}.base_layer.bias"), "not finite"),
    "NaN in a module": (spoil(HEAD), "not finite"),
    "no B": (drop(f"{AT}.lora_B.weight"), f"lacks {AT}.lora_B.weight"),
    "no magnitude": (drop(f"{AT}.lora_magnitude_vector"), f"lacks {AT}.lora_magnitude_vector"),
    "no bias": (drop(f"{AT}.base_layer.bias"), f"lacks {AT}.base_layer.bias"),
    "no module": (drop(HEAD), f"lacks {HEAD}"),
    "stranger": (lambda f: change_tensors(f, lambda t: t.update(x=torch.zeros(2))), "x has no place"),
    "shape": (
        lambda f: change_tensors(f, lambda t: t.update({HEAD: torch.zeros(401, 32)})),
        r"has shape \(401, 32\), this base wants \(400, 32\)",
    ),
    "dtype": (
        lambda f: change_tensors(f, lambda t: t.update({HEAD: t[HEAD].to(torch.int32)})),
        "is I32",
    ),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-7]), "cannot be read"),
    "pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), f"has no {TENSORS}"),
    "target": (lambda f: change_config(f, target_modules=[*LINEAR, "nose"]), "target nose has no place"),
    "module": (lambda f: change_config(f, modules_to_save=["lm_head", "nose"]), "module to save nose has no"),
    "no hit": (lambda f: change_config(f, target_modules="nothing"), "PEFT cannot put it on this base"),
    "pattern": (lambda f: change_config(f, target_modules="(("), "cannot"),
    "rank": (lambda f: change_config(f, r=10**9), "its rank"),
    "alpha": (lambda f: change_config(f, lora_alpha="much"), "its lora_alpha"),
    "other rank": (lambda f: change_config(f, r=5), "this base wants"),
    "other module": (lambda f: change_config(f, modules_to_save=["embed_tokens"]), "lacks .*embed_tokens.weight"),
    "parts": (lambda f: change_config(f, modules_to_save=["mlp"]), "lacks .*mlp.down_proj.bias"),
    "PiSSA": (lambda f: change_config(f, init_lora_weights="pissa_niter_4"), "changes the base's weights"),
    "tokens": (
        lambda f: change_config(f, trainable_token_indices=[3]),
        "has trainable_token_indices .*, which no engine here serves",
    ),
    "future": (lambda f: change_config(f, use_wonder=True), "use_wonder is unknown"),
    "prompt tuning": (prompt_tuning, "its peft_type is PROMPT_TUNING"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_adapter_is_refused_in_one_line_and_changes_nothing(shared, adapter, name):
    damage, reason = FAULTS[name]
    damage(adapter)
    before = shared.facts()
    with pytest.raises(ModelError, match=reason) as error:
        shared.load(adapter)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(adapter))
    assert shared.facts() == before


def test_equal_content_has_one_key_and_outlives_its_files(shared, base, adapter, tmp_path):
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    key = shared.load(adapter)
    assert shared.load(copy) == key
    assert len(key) == 64
    change_config(copy, lora_alpha=9)
    other = shared.load(copy)
    assert other != key
    wanted = expected(base, adapter, prompt(5), 6)
    shutil.rmtree(adapter)
    assert ask(shared, prompt(5), key, 6).ids() == wanted
    for loaded in (key, key, other):
        shared.unload(loaded)
    with pytest.raises(UnknownAdapter):
        shared.unload(key)
    assert (shared.facts().loaded, shared.facts().adapter_bytes) == ((), 0)


def test_bytes_of_the_loaded_adapters_are_those_of_their_tensors(shared, adapter):
    key = shared.load(adapter)
    assert shared.facts().adapter_bytes == sum(t.nbytes for t in load_file(adapter / TENSORS).values())
    shared.unload(key)


def test_unload_waits_for_running_requests(shared, base, adapter):
    key = shared.load(adapter)
    answers = [ask(shared, prompt(4, n), key, 30) for n in range(3)]
    first = answers[0].next().id
    shared.unload(key)
    with pytest.raises(UnknownAdapter):
        ask(shared, prompt(4), key)
    assert shared.facts().loaded == ()
    assert [first, *answers[0].ids()] == expected(base, adapter, prompt(4, 0), 30)
    for n in (1, 2):
        assert answers[n].ids() == expected(base, adapter, prompt(4, n), 30)
    assert shared.facts().adapter_bytes == 0


def test_many_loads_and_unloads_leave_no_tensor_behind_and_the_base_as_it_was(shared, base, adapter):
    def cycle() -> None:
        key = shared.load(adapter)
        for answer in [ask(shared, prompt(6), which, 2) for which in (key, None)]:
            answer.tokens()
        shared.unload(key)
        ask(shared, prompt(6), None, 2).tokens()

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    cycle()
    before = tensors()
    for _ in range(5):
        cycle()
    assert tensors() <= before + 5  # this adapter has 57
    assert ask(shared, prompt(6), None, 10).ids() == expected(base, None, prompt(6), 10)


def stamp(folder: Path, fingerprint: str, **settings: object) -> None:
    manifest = Manifest(
        format=FORMAT, method="lora", tag="tiny:a:b", run="run", model_id="tiny", step=1, epoch=1.0, eval_loss=None,
        base=BaseWeights("tiny", None, {"model.safetensors": "ab" * 32}, fingerprint), metrics={}, config=settings,
        data={}, versions={}, created="2026-01-02T03:04:05+00:00", parent=None, files=hash_files(folder),
    )  # fmt: skip
    write_manifest(folder, manifest)


def test_a_checkpoint_must_be_of_the_served_base_and_whole(shared, base, adapter):
    _, fingerprint = fingerprint_weights(base.weight_files)
    stamp(adapter, "cd" * 32)
    with pytest.raises(ModelError, match="was trained on other weights"):
        shared.load(adapter)
    stamp(adapter, fingerprint, context_length=512)
    with pytest.raises(ModelError, match="positions stretched to 512 tokens"):
        shared.load(adapter)
    stamp(adapter, fingerprint, context_length=256)
    shared.unload(shared.load(adapter))
    change_config(adapter, lora_alpha=9)
    with pytest.raises(CheckpointError):
        shared.load(adapter)
