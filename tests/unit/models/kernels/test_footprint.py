"""The counted buffers against those really taken."""

import numpy as np
import pytest
import torch

from tiny_models import tiny_model
from tunesmith.data.packing import pack_rows
from tunesmith.data.rendering import TokenizedExample
from tunesmith.models.kernels.decoder import loss_and_gradients, token_losses
from tunesmith.models.kernels.footprint import BatchShape, evaluation_buffers, training_buffers
from tunesmith.models.kernels.reading import read_decoder
from tunesmith.models.kernels.scratch import Scratch

CPU = torch.device("cpu")


def rows(lengths: list[int], prefix: int) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 400, prefix)
    made = []
    for number, length in enumerate(lengths):
        own = np.array([5 + number, *rng.integers(3, 400, length - 1)])
        ids = np.concatenate([shared, own]).astype(np.int32)
        made.append(TokenizedExample(ids, np.arange(len(ids)) >= prefix + length // 2 + 1))
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.1])
@pytest.mark.parametrize(("lengths", "prefix"), [([9, 9, 4], 6), ([150], 0), ([140, 3, 8], 20)])
def test_every_buffer_is_counted_exactly(
    lengths: list[int], prefix: int, dropout: float | None, checkpointing: bool
):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    model.model.gradient_checkpointing = checkpointing
    if dropout is not None:
        targets = ["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
        )
    decoder, batch, scratch = read_decoder(model), pack_rows(rows(lengths, prefix), CPU), Scratch()
    loss_and_gradients(decoder, batch, 1.0, scratch)
    shape = BatchShape(batch.layout, batch.trained_tokens)
    counted = training_buffers(decoder, shape)
    assert {name: size for name, size in counted.items() if size} == scratch.elements()
    model.eval()
    decoder, scratch = read_decoder(model), Scratch()
    with torch.no_grad():
        token_losses(decoder, batch, scratch)
    counted = evaluation_buffers(decoder, shape)
    assert {name: size for name, size in counted.items() if size} == scratch.elements()
