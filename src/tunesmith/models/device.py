"""Where a model computes."""

from typing import Any

import torch


def computing_device(model: Any) -> torch.device:
    """The device that rows have to go to.

    Weights that are split over workers may lie elsewhere, in the host's memory, and go there a layer at a time.
    """
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.device if mesh is None else torch.device(mesh.device_type)
