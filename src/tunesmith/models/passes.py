"""How losses and gradients of a micro-batch are computed: by the kernels, or by the model and autograd."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tunesmith.data.packing import PackedBatch, pack_rows
from tunesmith.data.rows import TokenizedRows
from tunesmith.models.kernels.decoder import loss_and_gradients
from tunesmith.models.kernels.decoder import token_losses as kernel_losses
from tunesmith.models.kernels.reading import UnreadableError, read_decoder
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.loss import Batch, token_losses
from tunesmith.models.probe import TOLERANCE, probe_rows
from tunesmith.native import is_compiled

BY_HAND = "kernels: each layer forward and backward by hand"


def unasked() -> None:
    """The ``check`` of a pass that nothing is to break off."""


@dataclass(frozen=True)
class Pass:
    """``total``: sum of token losses of a micro-batch. Times in seconds."""

    total: float
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """Of both directions."""
        return self.forward_seconds + self.backward_seconds

    def __add__(self, other: "Pass") -> "Pass":
        """Both micro-batches as one."""
        return Pass(
            self.total + other.total,
            self.forward_seconds + other.forward_seconds,
            self.backward_seconds + other.backward_seconds,
        )


class Passes(Protocol):
    """Evaluation and training of one model on micro-batches."""

    def losses(self, batch: Batch, check: Callable[[], None] = unasked) -> torch.Tensor:
        """-log p of every trained token, shape (trained tokens,), without dropout; ``check`` as of ``train``."""

    def train(self, batch: Batch, scale: float, check: Callable[[], None] = unasked) -> Pass:
        """Add the gradients of ``scale`` times the sum of the token losses to ``.grad`` of what is trained.

        ``check`` is called as often as the way of computing allows; what it raises leaves gradients half made.
        """

    def rest(self) -> None:
        """Hold no memory until the next call: something else needs it."""


class AutogradPasses:
    """Through the model's own forward; for any model."""

    def __init__(self, model: Any, autocast: torch.dtype | None = None) -> None:
        self._model, self._autocast = model, autocast

    def losses(self, batch: Batch, check: Callable[[], None] = unasked) -> torch.Tensor:
        was_training = self._model.training
        self._model.eval()
        try:
            # No inference mode: what a split model gathers first would not do for training later.
            with torch.no_grad(), _asked_at_layers(self._model, check):
                return token_losses(self._model, batch, self._autocast)
        finally:
            self._model.train(was_training)

    def train(self, batch: Batch, scale: float, check: Callable[[], None] = unasked) -> Pass:
        begun = time.perf_counter()
        self._model.train()
        with _asked_at_layers(self._model, check):
            loss = token_losses(self._model, batch, self._autocast).sum()
            total, between = float(loss.detach()), time.perf_counter()
            (loss * scale).backward()
        return Pass(total, between - begun, time.perf_counter() - between)

    def rest(self) -> None:
        """Autograd frees what it saved by itself."""


@contextmanager
def _asked_at_layers(model: Any, check: Callable[[], None]) -> Iterator[None]:
    """Within the block ``check`` is called after each layer of ``model``, and again on the way back."""
    if check is unasked:  # a split model gathers around its layers, and is not to be disturbed there
        yield
        return

    def ask(_layer: Any, _inputs: Any, output: Any) -> None:
        check()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: check())

    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    hooks = [layer.register_forward_hook(ask) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class KernelPasses:
    """By ``kernels``; for packed rows of a model that ``read_decoder`` reads."""

    def __init__(self, model: Any) -> None:
        self._model, self._scratch = model, Scratch()
        self._reserved: Mapping[str, int] = {}
        self._rests = False

    def reserve(self, buffers: Mapping[str, int]) -> None:
        """Make the buffers at once that micro-batches of these sizes will take in training."""
        self._reserved, self._rests = buffers, False
        self._scratch.reserve(buffers, next(self._model.parameters()))

    def rest(self) -> None:
        self._scratch.release()
        self._rests = True

    def losses(self, batch: Batch, check: Callable[[], None] = unasked) -> torch.Tensor:
        assert isinstance(batch, PackedBatch)
        # No inference mode: its tensors could not be written to again in training.
        with torch.no_grad():
            return kernel_losses(read_decoder(self._model), batch, self._scratch, check)

    def train(self, batch: Batch, scale: float, check: Callable[[], None] = unasked) -> Pass:
        assert isinstance(batch, PackedBatch)
        begun = time.perf_counter()
        if self._rests:
            self.reserve(self._reserved)
        losses = loss_and_gradients(read_decoder(self._model), batch, scale, self._scratch, check)
        return Pass(float(losses.sum()), 0.0, time.perf_counter() - begun)


def choose_passes(
    model: Any, rows: TokenizedRows, *, packs: bool, autocast: torch.dtype | None, sharded: bool = False
) -> tuple[Passes, str]:
    """The kernels where they give this model's losses on rows of this data set, and why, for people.

    Args:
        model: a causal LM as ``prepare_packing`` left it.
        packs: what ``prepare_packing`` found.
        autocast: lower precision for the matrix products, where hardware is fast at it.
        sharded: the model's tensors are split over workers; the kernels read whole ones.
    """
    plain = AutogradPasses(model, autocast)
    if sharded:
        return plain, "autograd: weights are sharded"
    if not packs:
        return plain, "autograd: rows are not packed"
    if autocast is not None:
        return plain, f"autograd: products are {autocast}"
    probe = pack_rows(probe_rows(rows), next(model.parameters()).device)
    kernels = KernelPasses(model)
    try:
        difference = float((kernels.losses(probe) - plain.losses(probe)).abs().max())
    except UnreadableError as error:
        return plain, f"autograd: {error}"
    if not difference <= TOLERANCE:
        return plain, f"autograd: the kernels would change losses by up to {difference:.1e}"
    if not is_compiled("training"):
        return kernels, f"{BY_HAND}, without C: no compiler was at hand when tunesmith was installed"
    return kernels, f"{BY_HAND}, its small parts in C"
