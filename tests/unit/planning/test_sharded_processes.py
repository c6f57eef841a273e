"""The formula of sharding against 2 to 4 processes that shard a tiny model with PyTorch's own means."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_config
from tunesmith.models.base import BaseFolder
from tunesmith.planned_adapter import skeleton
from tunesmith.planning.formulae import FLOAT32, Sharding, model_states
from tunesmith.planning.shapes import model_shape

# One rank: a training step in float32, then the bytes of weights, gradients and Adam's moments that it holds.
# Stage 1: ZeroRedundancyOptimizer; stage 3: FSDP2, each layer a unit.
RANK = """
import json, os, sys
import torch, torch.distributed as dist
sys.path[:0] = {folders!r}
from tiny_models import tiny_model

rank, world, stage, address = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
model = tiny_model(tied=False).train()

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

if stage == 1:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    inner = optimizer.optim
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (world,))
    for part in (model.model.embed_tokens, *model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    inner = optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(input_ids=torch.arange(3, 19)[None] + rank).logits.logsumexp(-1).sum().backward()
gradients = sum(local(p.grad).nbytes for p in model.parameters())
weights = sum(local(p).nbytes for p in model.parameters())
optimizer.step()
moments = sum(local(v).nbytes for s in inner.state.values() for k, v in s.items() if k.startswith("exp_avg"))
print(json.dumps([weights, gradients, moments]), flush=True)
dist.barrier()
# Ends without C++ destructors: a thread of gloo that is still joinable there aborts the process, one time in some tens.
os._exit(0)
"""


def on_ranks(folder: Path, world: int, stage: int) -> list[list[int]]:
    here = Path(__file__).parents[2]
    code, address = RANK.format(folders=[str(here)]), f"file://{folder / 'meeting'}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), str(stage), address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, said[0][1][-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.flow
@pytest.mark.parametrize(("world", "stage"), [(2, 1), (2, 3), (4, 3)])
def test_what_each_rank_holds_is_the_formulas_share(tmp_path: Path, world: int, stage: int):
    tiny_config(tied=False).save_pretrained(tmp_path / "m")
    shape = model_shape(skeleton(BaseFolder("tiny", tmp_path / "m", None)), "tiny")
    # Nothing is gathered between steps, when this is taken.
    states = model_states(shape.parameters, 0, FLOAT32, 4, 0, Sharding(stage), world)
    found = on_ranks(tmp_path, world, stage)
    wanted = (states.weights, states.gradients, states.optimizer)
    for number, name in enumerate(("weights", "gradients", "optimizer")):
        held = [rank[number] for rank in found]
        # ZeroRedundancyOptimizer deals out whole tensors, so its shares are equal only in the mean.
        assert sum(held) / world == pytest.approx(wanted[number], rel=1e-3), name
        if stage == 3:
            assert max(held) == pytest.approx(wanted[number], rel=0.02), name
