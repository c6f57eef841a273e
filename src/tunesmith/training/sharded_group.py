"""Workers of which each holds a share of every tensor: PyTorch's FSDP2 behind the seam of ``workers``.

A layer's tensors are gathered when the layer is computed, and its gradients are summed into the shares as soon as they
are there (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054). The sums are those of ``ProcessGroup``: losses are divided
by the tokens of the whole step already, so nothing is averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tunesmith.errors import RunError
from tunesmith.training.process_group import ProcessGroup, peers
from tunesmith.training.workers import on_first


class ShardedGroup(ProcessGroup):
    """See ``Workers``.

    Args:
        here: how many of the workers share this machine.
        regather: what becomes of a layer's weights between its forward and its backward. True: each worker goes back to
            its share (ZeRO 3); False: they stay whole (ZeRO 2); a number: shared by so many neighbours (hpZ of ZeRO++).
        offloads: each worker's shares of weights, gradients and moments lie in its host's memory, where the optimizer
            steps too (Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840); a layer goes to the device to be computed.
    """

    in_step = True

    def __init__(self, here: int, regather: bool | int, *, offloads: bool = False) -> None:
        super().__init__(here)
        self._regather, self._offloads = regather, offloads

    def shard(self, model: Any) -> None:
        """Split every tensor along its first dimension; the unit that is gathered is a layer, then what is left.

        Raises:
            RunError: this PyTorch cannot sum where it splits.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise RunError(
                "workers", f"PyTorch {torch.__version__} cannot sum split gradients", "install torch 2.9"
            )
        mesh = init_device_mesh(self.device.type, (self.world,))
        parts = (*_layers(model), model)
        # Pinned memory is what a GPU reads from without the CPU's help; a CPU has no use for it.
        moved = {"offload_policy": CPUOffloadPolicy(self.device.type != "cpu")} if self._offloads else {}
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=self._regather, **moved)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo and NCCL then do the same

        def let_go(*_: Any) -> None:
            # Where no backward follows, weights would stay as they were gathered, whatever is trained meanwhile.
            if not torch.is_grad_enabled():
                for part in parts:
                    part.reshard()

        model.register_forward_hook(let_go)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """They were summed in the backward pass."""

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            with torch.no_grad(), peers():
                one_piece = self._gathered(tensor.detach())
            if self.rank == 0:
                found[name] = one_piece.cpu()
        return found

    def put(
        self, tensors: Mapping[str, torch.Tensor], read: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        values: dict[str, torch.Tensor] = {}
        # All that may fail comes before the first tensor goes out: later the others would wait for what never comes.
        on_first(self, lambda: values.update(read()))
        for name, tensor in tensors.items():
            value = values.pop(name) if self.rank == 0 else torch.empty(tensor.shape)
            value = value.to(self.device, tensor.dtype)
            with torch.no_grad(), peers():
                if isinstance(tensor, DTensor):
                    own = distribute_tensor(value, tensor.device_mesh, tensor.placements)
                    tensor.to_local().copy_(own.to_local())
                else:
                    dist.broadcast(value, 0)
                    tensor.copy_(value)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        # By way of the device, where a share lies in the host's memory: between GPUs it is gathered there.
        return tensor.to(self.device).full_tensor() if isinstance(tensor, DTensor) else tensor


def _layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of the decoder: its outermost list of modules."""
    return list(next((module for module in model.modules() if isinstance(module, nn.ModuleList)), []))
