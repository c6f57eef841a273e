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


def training_tensors(
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, torch.nn.Parameter],
) -> dict[str, torch.Tensor]:
    """By their names in the file: the moments of ``trained``, as zeros where there are none yet, and ``kept``."""
    tensors: dict[str, torch.Tensor] = {f"weight/{name}": tensor.detach() for name, tensor in kept.items()}
    for name, parameter in trained.items():
        if not optimizer.state[parameter]:
            # In the tensor's own layout: a fused optimizer walks through all of them in the order of memory.
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        tensors |= {f"{kind}/{name}": optimizer.state[parameter][kind] for kind in _KINDS}
    return tensors


def save_training_state(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``optimizer.safetensors`` into ``folder``: what ``training_tensors`` gave, whole."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_NAME)


def read_training_state(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``save_training_state`` wrote for ``tensors``, which may be split.

    Raises:
        CheckpointError: the file is not of these tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / STATE_NAME
    try:
        saved = load_file(file)
        found = {name: saved[name] for name in tensors}
        if wrong := [name for name, tensor in tensors.items() if found[name].shape != tensor.shape]:
            raise CheckpointError(
                str(file), f"{wrong[0]} has another shape here", "resume with the run's own file"
            )
        return found
    except KeyError as error:
        raise CheckpointError(
            str(file), f"has no {error.args[0]}", "resume with the run's own file"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            str(file), f"cannot be read ({error})", "resume from an earlier checkpoint"
        ) from error
