"""The head and the loss, on trained tokens only, in chunks: the logits of all tokens never exist at once.

loss_t = -log p_t[y_t] with p_t = softmax(W h_t). Its gradient of the logits, p_t - onehot(y_t), needs nothing but the
logits, so it is made while a chunk is at hand: dh_t = W' (p_t - onehot), dW = sum (p_t - onehot) h_t'.
"""

import torch

from tunesmith.models.kernels.dropout import draw_dropped
from tunesmith.models.kernels.linear import Linear, adapter_dropout, project, project_backward
from tunesmith.models.kernels.scratch import Scratch
from tunesmith.models.kernels.thin import drop

_CHUNK = 384  # tokens: large enough for efficient products, 75 MB of logits for a vocabulary of 49,152
_SMALLEST = 1e-20


def chunk_size(tokens: int) -> int:
    """Tokens of a chunk, all but the last of which are of one size: a small one would be an inefficient product."""
    return -(-tokens // max(1, -(-tokens // _CHUNK))) or 1


def head_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Linear,
    scratch: Scratch,
    *,
    gradient_scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token losses and, where asked for, the gradient of ``gradient_scale`` times their sum.

    Args:
        hidden: shape (trained tokens, width): normed states that predict ``targets``, int64, (trained tokens,).
        gradient_scale: None: losses alone, without dropout. Else gradients of the head are added to ``.grad``.

    Returns:
        Losses, shape (trained tokens,), and the gradient of ``hidden``.
    """
    losses = torch.empty(len(targets), dtype=hidden.dtype, device=hidden.device)
    dhidden = None if gradient_scale is None else scratch.take("dhidden", tuple(hidden.shape), hidden)
    size = chunk_size(len(targets))
    for begin in range(0, len(targets), size):
        part = slice(begin, begin + size)
        x, wanted = hidden[part], targets[part][:, None]
        logits = scratch.take("logits", (len(x), len(head.weight)), hidden)
        rate = adapter_dropout([head]) if gradient_scale is not None else 0.0
        dropped = draw_dropped(x.numel(), rate) if rate else None
        state = project(x, [head], [logits], dropped, scratch)
        losses[part] = _to_probabilities(logits, wanted)
        if gradient_scale is not None and dhidden is not None:
            logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
            drop(x, dropped)
            project_backward([logits], x, [head], state, scratch, dhidden[part], scale=gradient_scale)
    return losses, dhidden


def _to_probabilities(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Turn logits into probabilities in place; returns -log of those at ``wanted``, shape (rows,)."""
    below_top = logits.amax(1) - logits.gather(1, wanted).squeeze(1)
    torch.ops.aten._softmax.out(logits, -1, False, out=logits)
    found = logits.gather(1, wanted).squeeze(1)
    if bool((found > _SMALLEST).all()):
        return -found.log()
    # Where p is too small for its type, -log p is taken from the largest: -log p_max + (top - logit).
    return torch.where(found > _SMALLEST, -found.log(), below_top - logits.amax(1).log())
