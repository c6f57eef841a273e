"""The losses of single rows, however rows are put together."""

import math

import pytest
import torch

import tiny_models
from tunesmith.data.rendering import Renderer, TrainOn
from tunesmith.data.rows import tokenize_rows
from tunesmith.evaluation.row_loss import row_loss
from tunesmith.models.batches import micro_batches, prepare_packing
from tunesmith.models.passes import choose_passes


@pytest.mark.parametrize("packs", [True, False])
def test_each_row_has_the_loss_it_has_alone(tmp_path, packs):
    model = tiny_models.tiny_model()
    path = tiny_models.write_rows(tmp_path / "rows.jsonl", 11)
    renderer = Renderer(tiny_models.chatml_tokenizer())
    rows = tokenize_rows(str(path), renderer, TrainOn.ASSISTANT_TURNS, cache_dir=None)
    alone = []
    for index in range(len(rows)):
        example = rows.row(index)
        with torch.inference_mode():
            logits = model(torch.tensor([example.ids.tolist()])).logits[0].double()
        log_p = logits.log_softmax(-1)
        places = example.trained.nonzero()[0].tolist()
        alone.append(-sum(float(log_p[at - 1, int(example.ids[at])]) for at in places))
    if packs:
        assert prepare_packing(model, rows, 2)[0]
    passes, _ = choose_passes(model, rows, packs=packs, autocast=None)
    found = row_loss(
        passes, rows, micro_batches=micro_batches(packs, 64, 2, torch.device("cpu"), most_rows=3)
    )
    assert found.sums.tolist() == pytest.approx(alone, abs=1e-4)
    assert found.tokens.tolist() == [int(rows.row(i).trained.sum()) for i in range(11)]
    assert found.mean == pytest.approx(math.fsum(alone) / found.tokens.sum(), abs=1e-5)
