"""The loss against cross-entropy taken one row and one token at a time."""

import pytest
import torch

from tiny_models import tiny_model
from tunesmith.data.batching import MicroBatch, pad_rows
from tunesmith.data.rendering import TokenizedExample
from tunesmith.models.loss import token_losses

CPU = torch.device("cpu")


def rows_of(*lengths_and_trained: tuple[int, tuple[int, ...]]) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, trained in lengths_and_trained:
        ids = torch.randint(3, 400, (length,), generator=generator).numpy().astype("int32")
        mask = torch.zeros(length, dtype=torch.bool)
        mask[list(trained)] = True
        rows.append(TokenizedExample(ids, mask.numpy()))
    return rows


def one_token_at_a_time(model: torch.nn.Module, row: TokenizedExample) -> list[float]:
    losses = []
    for place in row.trained.nonzero()[0]:
        ids = torch.tensor(row.ids[:place].tolist())[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
        losses.append(-float(torch.log_softmax(logits, -1)[int(row.ids[place])]))
    return losses


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox"])
def test_equals_the_log_probability_of_each_token_given_those_before_it(kind: str):
    model = tiny_model(kind, dtype=torch.float64)
    rows = rows_of((9, (4, 5, 8)), (5, (1,)), (12, (2, 3, 11)))
    batch = pad_rows(rows, pad_token_id=2, device=CPU)
    with torch.no_grad():
        found = token_losses(model, batch)
        wanted = [loss for row in rows for loss in one_token_at_a_time(model, row)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert len(found) == batch.trained_tokens == 7
    assert float(found.sum()) == pytest.approx(sum(wanted), rel=1e-6)


def test_what_pads_does_not_matter():
    model = tiny_model(dtype=torch.float64)
    rows = rows_of((9, (4, 8)), (4, (3,)))
    with torch.no_grad():
        by_eos = token_losses(model, pad_rows(rows, 2, CPU))
        by_other = token_losses(model, pad_rows(rows, 77, CPU))
    assert torch.equal(by_eos, by_other)


def test_a_token_of_one_row_never_reaches_another_row():
    model = tiny_model(dtype=torch.float64)
    rows = rows_of((9, (4, 8)), (6, (2, 5)))
    changed = rows[0].ids.copy()
    changed[1] = (changed[1] + 1) % 400
    with torch.no_grad():
        before = token_losses(model, pad_rows(rows, 2, CPU))
        rows[0] = TokenizedExample(changed, rows[0].trained)
        after = token_losses(model, pad_rows(rows, 2, CPU))
    assert not torch.equal(before[:2], after[:2])
    assert torch.equal(before[2:], after[2:])


def test_a_model_without_logits_to_keep_gives_the_same():
    class Plain(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = tiny_model(dtype=torch.float64)
    batch = pad_rows(rows_of((9, (4, 8)), (6, (2, 5))), 2, CPU)
    with torch.no_grad():
        assert torch.allclose(token_losses(model, batch), token_losses(Plain(model), batch), rtol=1e-12)


def test_counts_are_of_real_and_trained_tokens():
    batch: MicroBatch = pad_rows(rows_of((9, (4, 8)), (6, (2, 5, 3))), 2, CPU)
    assert (batch.real_tokens, batch.trained_tokens) == (15, 5)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum() == 15
    assert pad_rows(rows_of((5, (1,)), (5, (2,))), 2, CPU).attention_mask is None
