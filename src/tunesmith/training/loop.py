"""The one training loop, for LoRA and full-parameter, one process and many: an iterator over optimizer steps.

Whoever iterates decides what happens between steps (evaluate, save, stop); nothing is called back. The
random numbers of a micro-batch come from its place in the run, so a run can be entered at any step.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from tunesmith.data.order import step_rows, stream_seed
from tunesmith.data.rows import TokenizedRows
from tunesmith.errors import NonFiniteError
from tunesmith.models.batches import MicroBatches
from tunesmith.models.passes import Pass, Passes, unasked
from tunesmith.tracking.events import StepEvent
from tunesmith.training.schedule import StepPlan
from tunesmith.training.worker_times import tell_share
from tunesmith.training.workers import ALONE, Workers


def train_steps(
    passes: Passes,
    parameters: Sequence[torch.nn.Parameter],
    rows: TokenizedRows,
    plan: StepPlan,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate_at: Callable[[int], float],
    max_grad_norm: float,
    micro_batches: MicroBatches,
    seed: int,
    started: float,
    workers: Workers = ALONE,
    steps_done: int = 0,
    flops_per_token: Callable[[int, int], float] | None = None,
    peak_flops: float | None = None,
    check: Callable[[], None] = unasked,
) -> Iterator[StepEvent]:
    """Train, yielding after each optimizer step.

    Args:
        passes: computes losses and gradients of the model.
        parameters: the tensors that are trained.
        rows: the training rows.
        plan: epochs and rows per step.
        optimizer: over ``parameters``.
        learning_rate_at: rate of a step, from 1.
        max_grad_norm: clip to this global norm; 0: no clipping.
        micro_batches: how the rows of a step are cut; changes memory and speed, never the result. With several workers
            it yields this one's share, those numbered rank, rank + world and so on.
        seed: order of rows and dropout.
        workers: who trains together; gradients and losses are summed over them, so that all step alike.
        steps_done: steps that an earlier process has done; the first step here is the one after.
        started: ``time.perf_counter()`` at the start of the run, for ``time_total_s``.
        flops_per_token, peak_flops: for the model FLOPs utilisation; (real, trained) tokens -> FLOPs.
        check: called often while gradients are made. What it raises abandons the step: parameters and moments are as
            after the step before.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; parameters are as after the step before.
    """
    lengths, counts = rows.lengths, rows.trained_counts
    step = 0
    for epoch in range(1, plan.epochs + 1):
        for chosen in step_rows(len(rows), plan.rows_per_step, seed, epoch):
            step += 1
            if step <= steps_done:
                continue
            begun = time.perf_counter()
            trained_tokens = int(counts[chosen].sum())
            own = Pass(0.0, 0.0, 0.0)
            for turn, batch in enumerate(micro_batches(rows, chosen)):
                check()
                torch.manual_seed(stream_seed(seed, "dropout", step, workers.rank + turn * workers.world))
                # Divided here by the count of the whole step, gradients simply add up to the step's mean.
                own += passes.train(batch, 1 / trained_tokens, check)
            share_seconds = _seconds_since(begun, parameters) if own.seconds else 0.0
            workers.sum_gradients(parameters)
            shares = tell_share(workers, own.total, share_seconds, peak_memory_bytes())
            total = shares.total
            norm = _clip(parameters, max_grad_norm)
            if not (math.isfinite(total) and math.isfinite(norm)):
                optimizer.zero_grad(set_to_none=True)
                raise _non_finite(step, total, [rows.origin(i) for i in chosen])
            rate = learning_rate_at(step)
            _update(optimizer, rate)
            seconds = time.perf_counter() - begun
            real_tokens = int(lengths[chosen].sum())
            flops = flops_per_token(real_tokens, trained_tokens) if flops_per_token else None
            yield StepEvent(
                step=step,
                epoch=epoch,
                learning_rate=rate,
                train_loss_batch=total / trained_tokens,
                grad_norm=norm,
                fwd_time=own.forward_seconds,
                bwd_time=own.backward_seconds,
                train_time_per_step=seconds,
                real_tokens=real_tokens,
                trained_tokens=trained_tokens,
                trained_tokens_throughput=trained_tokens / seconds,
                mfu=flops / seconds / peak_flops if flops and peak_flops else None,
                peak_memory=max(peak_memory_bytes(), shares.peak_memory),
                time_total_s=time.perf_counter() - started,
                worker_times=shares.seconds,
                slowest_worker=shares.slowest,
                slowest_worker_time=shares.longest,
                mean_worker_time=shares.mean,
            )


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far; on a GPU, the highest allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    # Not ru_maxrss where it can be helped: that of a new process begins with the peak of the one that started it.
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seconds_since(begun: float, parameters: Sequence[torch.nn.Parameter]) -> float:
    if parameters[0].is_cuda:
        torch.cuda.synchronize()  # a GPU is still at work when the call has returned
    return time.perf_counter() - begun


def _clip(parameters: Sequence[torch.nn.Parameter], max_grad_norm: float) -> float:
    if max_grad_norm:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Of split gradients each worker has a part.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group_settings in optimizer.param_groups:
        group_settings["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _non_finite(step: int, total: float, origins: Sequence[str]) -> NonFiniteError:
    what = "gradient" if math.isfinite(total) else "loss"
    shown = ", ".join(origins[:8]) + (f" and {len(origins) - 8} more" if len(origins) > 8 else "")
    return NonFiniteError(
        f"step {step}",
        f"the {what} is not finite on rows {shown}",
        "nothing was learned from this step; lower learning_rate or look at these rows",
    )
