"""New tokens by compiled C are those of the layers by torch, for every shape, and rows know nothing of each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from engine_parts import ALL, LINEAR, ask, prompt, save_base, save_lora
from tunesmith import native
from tunesmith.models.base import BaseFolder
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.serving.base_weights import EMBEDDINGS, BaseWeights, load_base
from tunesmith.serving.engine import CpuEngine
from tunesmith.serving.forward import logits
from tunesmith.serving.kv_cache import KvCache
from tunesmith.serving.mixed_lora import Adapter, LowRank, adapter_of
from tunesmith.serving.next_tokens import NextTokenPass
from tunesmith.serving.planner import Planner
from tunesmith.serving.seam import AdapterKey

pytestmark = pytest.mark.skipif(not native.is_compiled("serving"), reason="serving.c was not compiled")
CAPACITY, SLOTS = 160, 32
# Heads, groups and head size with whole vectors and without; widths that fill no panel; few and many keys in a window.
SHAPES: dict[str, dict[str, Any]] = {
    "even": {},
    "grouped": {"hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "alike": {"num_key_value_heads": 4, "head_dim": 128},
    "one key": {"num_key_value_heads": 1, "head_dim": 160},
    "odd": {"hidden_size": 36, "intermediate_size": 75, "head_dim": 10, "vocab_size": 401},
    "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "window": {"sliding_window": 6},
    "long window": {"sliding_window": 70},
    "tied": {"tie_word_embeddings": True},
}


def make_base(folder: Path, shape: str, quantised: gguf.GGMLQuantizationType | None = None) -> BaseWeights:
    """Two layers whose outputs vary; norms and biases are not 1 and 0."""
    torch.manual_seed(0)
    given = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "tie_word_embeddings": False, **SHAPES[shape],
    }  # fmt: skip
    has_window = "sliding_window" in given
    model = (
        MistralForCausalLM(MistralConfig(**given)) if has_window else LlamaForCausalLM(LlamaConfig(**given))
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        if quantised is not None and parameter.dim() == 2:
            numbers = dequantize(quantize(parameter.detach().numpy(), quantised), quantised)
            parameter.data = torch.from_numpy(numbers)
    model.save_pretrained(folder)
    return load_base(BaseFolder("tiny", folder, None), CAPACITY)


def make_adapter(
    base: BaseWeights, seed: int, rank: int, targets: Sequence[str], layers: str = ""
) -> Adapter:
    """Random A and B for layers with one of ``targets`` and ``layers`` in their names; v_proj has twice the rank."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: (group.width, size)
        for group in base.groups
        for name, size in zip(group.names, group.sizes, strict=True)
    }
    sizes[EMBEDDINGS] = (len(base.embeddings), base.embeddings.shape[1])
    pairs = {}
    for name, (width, size) in sizes.items():
        if any(target in name for target in targets) and layers in name:
            r = rank * (2 if "v_proj" in name else 1)
            a, b = (torch.randn(r, n, generator=generator) * 0.2 for n in (width, size))
            pairs[name] = LowRank(a, b)
    return adapter_of(AdapterKey(f"{seed:064}"), pairs, base)


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing could be compiled."""
    for module in ("product", "grouped_lora", "next_tokens"):
        monkeypatch.setattr(f"tunesmith.serving.{module}.compiled", lambda *_: None)


class Decoder:
    """A base with a cache of known content."""

    def __init__(self, base: BaseWeights) -> None:
        self.base, self.scratch = base, Scratch()
        self.cache = KvCache([layer.shape for layer in base.layers], SLOTS, CAPACITY)
        generator = torch.Generator().manual_seed(5)
        for layer in self.cache.layers:
            layer.normal_(generator=generator)
        self._pass, self._planner = NextTokenPass(base, self.cache, self.scratch), Planner(base)

    @property
    def is_compiled(self) -> bool:
        return self._pass._layers is not None

    def logits(self, rows: Sequence[int], adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """(rows, vocabulary): row n is a token in slot n, at a place of its own."""
        with torch.inference_mode():
            plan = self._planner.rows([adapters[row] for row in rows])
            hidden = self._pass([3 + 7 * row for row in rows], [place(row) for row in rows], list(rows), plan)
            return logits(self.base, hidden, plan, self.scratch).clone()


def place(row: int) -> int:
    return (0, 1, 5, 63, 64, 65, 130, 159)[row % 8]


def batches(base: BaseWeights) -> dict[str, list[Adapter | None]]:
    """Adapters of rows, those of one together."""
    few, some = make_adapter(base, 1, 8, LINEAR), make_adapter(base, 2, 3, ALL)
    values, layer = (
        make_adapter(base, 3, 5, ["v_proj"]),
        make_adapter(base, 4, 2, ["o_proj", "up_proj"], ".1."),
    )
    wide, ends = make_adapter(base, 5, 21, [*LINEAR, "lm_head"]), make_adapter(base, 6, 1, ["embed_tokens"])
    return {
        "base": [None] * 16,
        "one": [few] * 7,
        "single": [some],
        "mixed": [None, None, few, some, some, some, values, layer, wide, wide, wide, wide, wide, ends],
        "many": [None] * 9 + [few] * 12 + [some] * 9,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_the_cache_are_those_of_torch(tmp_path, level, monkeypatch, shape):
    with monkeypatch.context() as patch:
        by_torch(patch)
        base = make_base(tmp_path, shape)
        wanted, kept = {}, {}
        for name, adapters in batches(base).items():
            decoder = Decoder(base)
            assert not decoder.is_compiled
            wanted[name], kept[name] = decoder.logits(range(len(adapters)), adapters), decoder.cache.layers
    base = load_base(BaseFolder("tiny", tmp_path, None), CAPACITY)
    for name, adapters in batches(base).items():
        decoder = Decoder(base)
        assert decoder.is_compiled
        found = decoder.logits(range(len(adapters)), adapters)
        assert (found - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name
        for layer, other in zip(decoder.cache.layers, kept[name], strict=True):
            assert (layer - other).abs().max() <= 1e-5 * other.abs().max(), name


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_of_fewer_bits_give_the_same_to_the_last_bit(tmp_path, level, monkeypatch, bits):
    kinds = gguf.GGMLQuantizationType
    base = make_base(tmp_path, "even", {4: kinds.Q4_1, 8: kinds.Q8_0, 16: kinds.BF16}[bits])
    assert [group.product.panels and group.product.panels[1] for group in base.groups] == [bits] * 9
    adapters = [*batches(base)["mixed"], *[None] * 16]  # more than one block of rows
    found = Decoder(base).logits(range(30), adapters)
    monkeypatch.setattr("tunesmith.serving.product._bits", lambda _: 32)
    base = load_base(BaseFolder("tiny", tmp_path, None), CAPACITY)
    assert base.groups[0].product.panels is not None
    assert base.groups[0].product.panels[1] == 32
    assert torch.equal(found, Decoder(base).logits(range(30), adapters))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_bit_whatever_is_beside_it(tmp_path, level, threads):
    base = make_base(tmp_path, "grouped")
    before = torch.get_num_threads()
    for adapters in batches(base).values():
        whole = Decoder(base).logits(range(len(adapters)), adapters)
        torch.set_num_threads(threads)
        for rows in ([0], list(range(len(adapters)))[1::2], list(range(len(adapters) // 2))):
            if rows:
                assert torch.equal(Decoder(base).logits(rows, adapters), whole[rows])
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_an_engine_without_c_answers_as_the_one_with_it(tmp_path, monkeypatch, kind):
    base = save_base(tmp_path / "base", kind)
    folders = [
        save_lora(base, tmp_path / "all", 1),
        save_lora(base, tmp_path / "few", 2, r=2, target_modules=["v_proj", "down_proj"]),
        save_lora(base, tmp_path / "layer", 3, target_modules=LINEAR, layers_to_transform=[1]),
    ]

    def answers() -> list[list[int]]:
        engine = CpuEngine(base)
        keys = [None, *(engine.load(folder) for folder in folders)]
        asked = [
            ask(
                engine,
                prompt(3 + 9 * n, n),
                keys[n % 4],
                5 + 3 * n,
                temperature=0.0 if n < 6 else 0.8,
                seed=n,
            )
            for n in range(9)
        ]
        found = [answer.ids() for answer in asked]
        engine.close()
        return found

    compiled = answers()
    by_torch(monkeypatch)
    assert answers() == compiled
