"""Bytes of training by formula, against numbers worked out by hand for Llama-3-8B."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunesmith.planning.formulae import (
    FLOAT32,
    MIXED,
    PLAIN,
    SHARDINGS,
    Footprint,
    Sharding,
    activation_bytes,
    gpu_footprint,
    layer_token_bytes,
    model_states,
)
from tunesmith.planning.shapes import Adapter, ModelShape

# A layer: q and o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 14336, two norms.
LAYER = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
ENDS = 128256 * 4096  # embeddings, and the head as large
PARAMETERS = 32 * LAYER + 2 * ENDS + 4096
LLAMA_3_8B = ModelShape(
    parameters=PARAMETERS, matrices=32 * (LAYER - 2 * 4096), head=ENDS, layers=32, width=4096, queries=4096,
    keys=1024, inner=14336, is_gated=True, is_rms=True, vocabulary=128256, largest=ENDS,
)  # fmt: skip
# Rank 8 on every linear layer, embeddings and head: 8 x (in + out) each.
LORA = Adapter(
    parameters=32 * 8 * (2 * 8192 + 2 * 5120 + 3 * 18432) + 2 * 8 * (128256 + 4096),
    matrices=32 * 8 * (2 * 8192 + 2 * 5120 + 3 * 18432), head=8 * (128256 + 4096),
    layer_inputs=6 * 4096 + 14336, layer_ranks=7 * 8, dropout=0.05,
)  # fmt: skip


def test_the_published_parameter_count():
    assert PARAMETERS == 8_030_261_248
    assert LORA.parameters == 23_089_152


def test_full_parameter_states_of_llama_3_8b_are_16_bytes_a_parameter():
    states = model_states(PARAMETERS, 0, MIXED, 2, ENDS, PLAIN, 1)
    assert states.weights == states.gradients == 16_060_522_496
    assert states.optimizer == 96_363_134_976
    assert states.weights + states.gradients + states.optimizer == 128_484_179_968
    assert states.host == 0


# Table 1 and figure 1 of the ZeRO paper: (2 + 2 + 12/N), (2 + 14/N) and 16/N bytes a parameter.
@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, 128_484_179_968), (1, 56_211_828_736), (2, 44_166_436_864), (3, 32_121_044_992)],
)
def test_stages_on_four_devices_are_those_of_the_paper(stage: int, expected: int):
    # A model of one parameter in its largest part: nothing to speak of is gathered.
    states = model_states(PARAMETERS, 0, MIXED, 2, 0, Sharding(stage), 4)
    assert states.weights + states.gradients + states.optimizer == expected


def test_the_papers_example_of_7_5_billion_parameters_on_64_devices():
    per_stage = [model_states(7_500_000_000, 0, MIXED, 2, 0, Sharding(stage), 64) for stage in range(4)]
    found = [round((s.weights + s.gradients + s.optimizer) / 1e9, 1) for s in per_stage]
    assert found == [120.0, 31.4, 16.6, 1.9]  # figure 1


def test_stage_3_gathers_two_of_the_largest_parts_and_never_more_than_the_whole():
    states = model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(3), 8)
    assert states.weights == 16_060_522_496 // 8 + 2 * 2 * 525_336_576
    assert model_states(1000, 0, MIXED, 2, 900, Sharding(3), 2).weights == 2000
    assert model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(3), 1).weights == 16_060_522_496


def test_gradients_of_two_parts_are_there_before_they_are_shared_out():
    # A layer's gradients are whole on each device until they are reduced.
    for stage in (2, 3):
        states = model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(stage), 8)
        assert states.gradients == 16_060_522_496 // 8 + 2 * 2 * 525_336_576
    away = model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(2, "optimizer"), 64)
    assert (away.gradients, away.optimizer) == (2 * 2 * 525_336_576, 0)
    assert away.host == -(-16_060_522_496 // 64) + -(-96_363_134_976 // 64)
    assert model_states(1000, 0, MIXED, 2, 900, Sharding(2), 2).gradients == 2000
    assert model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(2), 1).gradients == 16_060_522_496


def test_lora_states_of_llama_3_8b():
    states = model_states(LORA.parameters, PARAMETERS, FLOAT32, 2, ENDS, PLAIN, 1)
    assert states.weights == 16_060_522_496 + 4 * 23_089_152
    assert states.gradients + states.optimizer == 12 * 23_089_152
    total = states.weights + states.gradients + states.optimizer
    assert total == 16_429_948_928
    assert total / 128_484_179_968 == pytest.approx(0.1279, abs=1e-4)


def test_offloading_moves_states_to_main_memory_and_loses_none():
    for sharding in SHARDINGS:
        states = model_states(PARAMETERS, 0, MIXED, 2, 0, sharding, 4)
        plain = model_states(PARAMETERS, 0, MIXED, 2, 0, Sharding(sharding.stage), 4)
        kept = states.weights + states.gradients + states.optimizer + states.host
        assert kept == plain.weights + plain.gradients + plain.optimizer
    everything = model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(3, "all"), 1)
    assert everything.host == 128_484_179_968
    assert everything.weights == 2 * 2 * ENDS  # the parts at work
    assert model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(1, "optimizer"), 1).host == 96_363_134_976
    weights = model_states(PARAMETERS, 0, MIXED, 2, ENDS, Sharding(3, "weights"), 4)
    assert (weights.host, weights.optimizer) == (16_060_522_496 // 4, 96_363_134_976 // 4)
    assert weights.weights == 2 * 2 * ENDS


def test_a_gpt_layer_keeps_korthikantis_34_bytes_less_two_masks_and_with_one_copy_of_attention():
    gpt = replace(
        LLAMA_3_8B, width=1000, queries=1000, keys=1000, inner=4000, is_gated=False, is_rms=False
    )  # fmt: skip
    assert layer_token_bytes(gpt, is_frozen=False) == (34 - 2 + 2) * 1000


def test_activations_of_llama_3_8b_at_512_tokens():
    # Bytes a token and layer: norms 16 x 4096, attention 10 x 4096, MLP 8 x 14336.
    assert layer_token_bytes(LLAMA_3_8B, is_frozen=False) == 221_184
    assert activation_bytes(LLAMA_3_8B, None, 512, False) == 32 * 512 * 221_184
    assert activation_bytes(LLAMA_3_8B, None, 512, True) == 32 * 512 * 2 * 4096 + 512 * 221_184
    # Frozen: 8 x 4096, 8 x 4096, 6 x 14336; of adapters 3 for each number that enters one, 2 for each rank.
    lora = activation_bytes(LLAMA_3_8B, LORA, 512, False)
    assert lora == 32 * 512 * (151_552 + 3 * 38_912 + 2 * 56)
    assert activation_bytes(LLAMA_3_8B, replace(LORA, dropout=0.0), 512, False) == 32 * 512 * (
        151_552 + 77_936
    )


def test_the_claim_in_numbers():
    lora, full = (gpu_footprint(LLAMA_3_8B, a, 512, 511, False).total / 2**30 for a in (LORA, None))
    assert full == pytest.approx(
        (128_484_179_968 + 32 * 512 * 221_184 + 511 * (1_282_560 + 8192)) / 2**30, abs=0.01
    )
    assert 19 < lora < 21
    assert 5.9 < full / lora < 6.3


shapes = st.builds(
    lambda layers, width, groups, inner, vocabulary: ModelShape(
        parameters=layers * (2 * width * width + 2 * width * width // groups + 3 * width * inner)
        + vocabulary * width,
        matrices=layers * (2 * width * width + 2 * width * width // groups + 3 * width * inner),
        head=vocabulary * width,
        layers=layers,
        width=width,
        queries=width,
        keys=width // groups,
        inner=inner,
        is_gated=True,
        is_rms=True,
        vocabulary=vocabulary,
        largest=max(2 * width * width + 2 * width * width // groups + 3 * width * inner, vocabulary * width),
    ),
    layers=st.integers(1, 80),
    width=st.integers(4, 128).map(lambda n: n * 64),
    groups=st.sampled_from([1, 2, 4, 8]),
    inner=st.integers(1, 300).map(lambda n: n * 64),
    vocabulary=st.integers(1, 4000).map(lambda n: n * 64),
)


def adapter_of(shape: ModelShape, rank: int, dropout: float) -> Adapter:
    """Rank ``rank`` on all linear layers, embeddings and head."""
    per_layer = rank * (4 * shape.width + 2 * (shape.width + shape.keys) + 3 * (shape.width + shape.inner))
    ends = rank * (shape.vocabulary + shape.width)
    inputs = 6 * shape.width + shape.inner
    return Adapter(
        shape.layers * per_layer + 2 * ends, shape.layers * per_layer, ends, inputs, 7 * rank, dropout
    )  # fmt: skip


def parts(footprint: Footprint) -> tuple[int, ...]:
    return (footprint.total, footprint.host)


@given(
    shapes, st.sampled_from(SHARDINGS), st.integers(1, 8192), st.integers(1, 6), st.booleans(), st.booleans()
)
def test_more_devices_never_need_more_on_each(shape, sharding, tokens, doublings, checkpointing, is_lora):
    adapter = adapter_of(shape, 8, 0.05) if is_lora else None
    before = None
    for devices in (2**n for n in range(doublings + 1)):
        now = gpu_footprint(shape, adapter, tokens, tokens, checkpointing, sharding, devices)
        if before is not None:
            assert now.total <= before.total
            assert now.host <= before.host
        before = now


@given(
    shapes,
    st.sampled_from(SHARDINGS),
    st.integers(1, 8192),
    st.integers(0, 8192),
    st.booleans(),
    st.booleans(),
)
def test_longer_contexts_never_need_less(shape, sharding, tokens, more, checkpointing, is_lora):
    adapter = adapter_of(shape, 8, 0.05) if is_lora else None
    short = gpu_footprint(shape, adapter, tokens, tokens, checkpointing, sharding, 4)
    longer = gpu_footprint(shape, adapter, tokens + more, tokens + more, checkpointing, sharding, 4)
    assert longer.total >= short.total
    if more and not checkpointing:
        assert longer.total > short.total


@given(shapes, st.integers(0, 3), st.integers(1, 64), st.sampled_from([4, 8, 16]), st.integers(1, 512))
def test_lora_never_holds_more_than_full_parameter(shape, stage, devices, rank, tokens):
    """States at every stage, for adapters of at most a twentieth of the model.

    Below stage 3 an adapter's own float32 weights stand whole on each device, so of 64 devices one of 14 / 268 of the
    model would outweigh the share of the rest. Activations are the exception that dropout makes: see the next test.
    """
    adapter = adapter_of(shape, rank, 0.0)
    assume(20 * adapter.parameters <= shape.parameters)
    lora = gpu_footprint(shape, adapter, tokens, tokens, False, Sharding(stage), devices)
    full = gpu_footprint(shape, None, tokens, tokens, False, Sharding(stage), devices)
    states = [f.weights + f.gradients + f.optimizer for f in (lora, full)]
    assert states[0] <= states[1] + devices  # a share is rounded up


def test_only_with_everything_shared_or_very_long_rows_do_dropouts_copies_outweigh_the_states_lora_saves():
    for stage, devices, tokens in ((0, 1, 16_384), (1, 8, 4096), (2, 8, 2048), (3, 8, 2048), (3, 32, 512)):
        lora, full = (
            gpu_footprint(LLAMA_3_8B, a, tokens, tokens, False, Sharding(stage), devices).total
            for a in (LORA, None)
        )
        assert lora <= full
