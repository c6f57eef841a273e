"""What a run must keep beside the served weights to go on as if it had never stopped.

That is AdamW's moments and counts, and the trained tensors as they are in memory. Nothing else has a memory: the rows
and the dropout of a step follow from its place in the run (``data/order.py``), its learning rate from its number.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from tunesmith.errors import CheckpointError

STATE_NAME = "optimizer.safetensors"
_KINDS = ("step", "exp_avg", "exp_avg_sq")


def named_trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The tensors that are trained, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_training_state(
    folder: Path,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, torch.nn.Parameter],
) -> None:
    """Write ``optimizer.safetensors`` into ``folder``: the moments of ``trained``, and the tensors ``kept``."""
    from safetensors.torch import save_file

    tensors = {f"weight/{name}": tensor.detach().contiguous() for name, tensor in kept.items()}
    for name, parameter in trained.items():
        state = optimizer.state[parameter]
        tensors |= {f"{kind}/{name}": state[kind].contiguous() for kind in _KINDS}
    save_file(tensors, folder / STATE_NAME)


def load_training_state(
    folder: Path, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what ``save_training_state`` wrote.

    Raises:
        CheckpointError: the file is not of these tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / STATE_NAME
    try:
        saved = load_file(file)
        for name, parameter in trained.items():
            moments = {kind: saved[f"{kind}/{name}"] for kind in _KINDS}
            if moments["exp_avg"].shape != parameter.shape:
                raise CheckpointError(
                    str(file), f"{name} has another shape here", "resume with the run's own file"
                )
            # In the tensor's own layout: a fused optimizer walks through all of them in the order of memory.
            optimizer.state[parameter] = {
                "step": moments["step"],
                "exp_avg": torch.empty_like(parameter).copy_(moments["exp_avg"]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(moments["exp_avg_sq"]),
            }
            if (weight := saved.get(f"weight/{name}")) is not None:
                parameter.data.copy_(weight)
    except KeyError as error:
        raise CheckpointError(
            str(file), f"has no {error.args[0]}", "resume with the run's own file"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            str(file), f"cannot be read ({error})", "resume from an earlier checkpoint"
        ) from error
