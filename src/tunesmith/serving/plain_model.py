"""Any decoder that transformers can load, as the plain engine wants it: adapters for one pass, rows of a cache."""

import copy
import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import torch

from tunesmith.models.base import BaseFolder, load_model
from tunesmith.serving.base_weights import BaseWeights, hashed_beside
from tunesmith.serving.changes import Changes, applied
from tunesmith.serving.padded_rows import Rows, joined
from tunesmith.serving.shared_base import SharedLinear, shared_model

# together: rows of one cache, padded. alone: each with a cache of the model's own kind. anew: without a cache.
Way = Literal["together", "alone", "anew"]
_PROBE = (3, 12)  # tokens of the two rows
_TOLERANCE = 1e-3  # of the largest logit: far above rounding, far below what a token more or less changes


class PlainModel:
    """The model; for one thread at a time, ``skeleton`` and ``weight`` for any.

    ``way``: how requests run on it, found out by trying. ``limit``: its positions, None where they have no end.
    """

    def __init__(self, model: Any, skeleton: Any, fingerprint: str) -> None:
        self._model = model
        self._skeleton = skeleton
        self.fingerprint = fingerprint
        self.modules = dict(model.named_modules())
        # As they are now: a pass puts an adapter's own in their places, also while another thread loads one.
        self._weights = {name: getattr(module, "weight", None) for name, module in self.modules.items()}
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self.limit = int(limit) if limit else None
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        known = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in known
        self._extra = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.way: Way = "anew"
        with torch.inference_mode():
            self.way = self._find_way()

    def skeleton(self) -> Any:
        """The model without memory for its tensors, a new one for each call."""
        return copy.deepcopy(self._skeleton)

    def weight(self, name: str) -> torch.Tensor:
        """The base's weight of a linear layer, (out, in), or embedding, (vocabulary, width); from any thread."""
        module, weight = self.modules[name], self._weights[name]
        if isinstance(module, SharedLinear):
            return module.dense()
        assert isinstance(weight, torch.Tensor)
        return weight.t() if type(module).__name__ == "Conv1D" else weight

    def read(
        self, sequences: Sequence[Sequence[int]], rows: Rows | None, changes: Changes | None
    ) -> tuple[torch.Tensor, Rows]:
        """Read what of each sequence is not in ``rows`` yet.

        Args:
            sequences: tokens from the start, all with as many that are new; several only together.
            rows: a row for each sequence; None: nothing of them is read. Used up.
            changes: the adapter of all of them; None: the base.

        Returns:
            Logits (rows, vocabulary) of the token after the last one, and the rows with all tokens.
        """
        past = rows.lengths if rows is not None else (0,) * len(sequences)
        ids = torch.tensor([list(tokens[start:]) for tokens, start in zip(sequences, past, strict=True)])
        starts, width = torch.tensor(past)[:, None], max(past)
        mask = (torch.arange(width + ids.shape[1])[None] >= width - starts).long()
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self._extra}
        if self._takes_positions:
            given["position_ids"] = starts + torch.arange(ids.shape[1])[None]
        if self.way != "anew":
            given["use_cache"] = True
            given["past_key_values"] = rows.cache if rows is not None else self._new_cache()
        with applied(changes, self.modules):
            found = self._model(**given)
        logits = found.logits[:, -1].float()
        if self.way == "anew":
            return logits, Rows(None, past)
        return logits, Rows(found.past_key_values, tuple(start + ids.shape[1] for start in past))

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        # Without the configuration every layer keeps all tokens, which those with a sliding window then mask.
        return DynamicCache() if self.way == "together" else DynamicCache(config=self._model.config)

    def _find_way(self) -> Way:
        """The fastest way that gives the logits of reading everything anew."""
        texts = [[(7 * place + row) % self.vocabulary for place in range(n)] for row, n in enumerate(_PROBE)]
        wanted = torch.cat([self.read([text], None, None)[0] for text in texts])
        most = _TOLERANCE * (1 + float(wanted.abs().max()))
        for way in ("together", "alone"):
            self.way = way
            try:
                found = self._probe(texts)
            except Exception:  # models that lack this kind of cache fail in ways of their own
                continue
            if found.shape == wanted.shape and float((found - wanted).abs().max()) <= most:
                return self.way
        return "anew"

    def _probe(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits after each text, of which the last token is read from the cache."""
        rows = [self.read([text[:-1]], None, None)[1] for text in texts]
        if self.way == "together":
            return self.read(texts, joined(rows), None)[0]
        return torch.cat([self.read([text], row, None)[0] for text, row in zip(texts, rows, strict=True)])


def load_plain(base: BaseFolder, fingerprint: "Future[str] | None" = None) -> PlainModel:
    """Load a base of its own for the plain engine, in float32; ``fingerprint`` as of ``load_base``.

    Raises:
        ModelError: it cannot be loaded as a causal language model.
    """
    fingerprint = fingerprint or hashed_beside(base)
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"), context_length=None)
    model.eval().requires_grad_(False)
    return PlainModel(model, _skeleton(copy.deepcopy(model.config)), fingerprint.result())


def share_plain(base: BaseWeights, config: Any) -> PlainModel:
    """The model with the transformers ``config`` on the tensors of ``base``."""
    skeleton = _skeleton(config)
    return PlainModel(shared_model(base, copy.deepcopy(skeleton)), skeleton, base.fingerprint)


def _skeleton(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
