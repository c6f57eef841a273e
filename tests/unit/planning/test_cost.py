"""FLOPs, time and money by formula, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from tunesmith.planning.clusters import COUNTS, MicroBatch, best, clusters, micro_batch, of_size, smallest
from tunesmith.planning.cost import cpu_seconds, gpu_cost, training_flops
from tunesmith.planning.formulae import PLAIN, Sharding, gpu_footprint
from tunesmith.planning.hardware import GIB, Gpu, read_hardware
from tunesmith.planning.shapes import Adapter, ModelShape
from tunesmith.planning.workload import Workload, made_rows

SHAPE = ModelShape(
    parameters=1100, matrices=1000, head=100, layers=2, width=10, queries=10, keys=5, inner=20, is_gated=True,
    is_rms=True, vocabulary=10, largest=500,
)  # fmt: skip
ADAPTER = Adapter(parameters=50, matrices=40, head=10, layer_inputs=80, layer_ranks=14, dropout=0.0)
GPU = Gpu(
    kind="gpu", memory_gib=1, host_memory_gib=1, bandwidth_gb_s=1e9, link_gb_s=1e9, host_link_gb_s=1e9,
    peak_tflops=1e-6, efficiency=0.5, price_per_hour=2,
)  # fmt: skip


def workload(**changed: object) -> Workload:
    made = Workload(
        source="", rows=16, tokens=1600, targets=400, longest=100, most_targets=25, attended=100.0, computed=1.0,
        rows_per_step=8, num_epochs=3, min_update_steps=1, context_length=100, examples=made_rows(8, 100),
    )  # fmt: skip
    return replace(made, **changed)


def test_flops_by_hand():
    # Attention: 2 layers x 2 x 10 queries x 100 tokens = 4,000 a token forward.
    forward, head = 10 * (2 * 1000 + 4000), 3 * 2 * 100
    assert training_flops(SHAPE, None, 10, 3, 100, False) == 3 * (forward + head)
    assert training_flops(SHAPE, None, 10, 3, 100, True) == 4 * forward + 3 * head
    # LoRA has no gradient of frozen weights, and six FLOPs for each number of its own.
    lora = 10 * (4 * 1000 + 3 * 4000 + 6 * 40) + 3 * (4 * 100 + 6 * 10)
    assert training_flops(SHAPE, ADAPTER, 10, 3, 100, False) == lora
    # With checkpointing the layers' forward is done twice, the adapters' too.
    assert training_flops(SHAPE, ADAPTER, 10, 3, 100, True) == lora + 10 * (2 * 1000 + 4000 + 2 * 40)


def test_a_run_that_is_bound_by_computing_takes_its_flops_over_the_reached_rate():
    cost = gpu_cost(GPU, SHAPE, None, workload(), 800, False, PLAIN, 1)
    flops = 3 * training_flops(SHAPE, None, 1600, 400, 100, False)
    assert cost.steps == 6
    assert cost.seconds == pytest.approx(flops / (1e6 * 0.5))
    assert cost.money == pytest.approx(cost.seconds / 3600 * 2)
    four = gpu_cost(GPU, SHAPE, None, workload(), 400, False, Sharding(2), 4)
    assert four.steps == 3  # 32 rows of a step, of which there are 16
    assert four.seconds == pytest.approx(cost.seconds / 4)
    assert four.money == pytest.approx(cost.money)


def test_what_is_moved_takes_time():
    moving = GPU.model_copy(update={"peak_tflops": 1e9, "link_gb_s": 1e-6, "host_link_gb_s": 1e-6})
    # 3 steps; all-reduce of 2 bytes a gradient there and back, half of it to the other of two.
    steps = 3
    shared = gpu_cost(moving, SHAPE, None, workload(), 400, False, PLAIN, 2)
    assert shared.seconds == pytest.approx(steps * 2 * 2 * 1100 / 2 / 1000, rel=1e-6)
    # From stage 2 on gradients are reduced after each of a device's micro-batches: 2,400 tokens in 400s are 6.
    split = gpu_cost(moving, SHAPE, None, workload(), 400, False, Sharding(2), 2)
    assert split.seconds == pytest.approx((6 + 3) * 2 * 1100 / 2 / 1000, rel=1e-6)
    # Stage 3 gathers 2 bytes a weight twice for each of them, and nothing after the step.
    gathered = gpu_cost(moving, SHAPE, None, workload(), 400, False, Sharding(3), 2)
    assert gathered.seconds == pytest.approx((6 + 2 * 6) * 2 * 1100 / 2 / 1000, rel=1e-6)
    alone = gpu_cost(moving, SHAPE, None, workload(), 400, False, PLAIN, 1)
    assert alone.seconds < 1e-3
    offloaded = gpu_cost(moving, SHAPE, None, workload(), 400, False, Sharding(2, "optimizer"), 1)
    assert offloaded.seconds == pytest.approx(6 * (28 + 2 * 2) * 1100 / 1000, rel=1e-3)


def test_stage_3_sends_half_as_much_again_as_no_sharding_where_a_step_is_one_micro_batch():
    # Section 7 of the ZeRO paper: 3 numbers a parameter where plain data parallelism sends 2.
    moving = GPU.model_copy(update={"peak_tflops": 1e9, "link_gb_s": 1e-6})
    plain, third = (
        gpu_cost(moving, SHAPE, None, workload(), 800, False, sharding, 2).seconds
        for sharding in (PLAIN, Sharding(3))
    )
    assert third / plain == pytest.approx(1.5, rel=1e-6)


def test_what_only_weights_that_are_offloaded_move():
    moving = GPU.model_copy(update={"peak_tflops": 1e9, "host_link_gb_s": 1e-6})
    weights = gpu_cost(moving, SHAPE, None, workload(), 400, False, Sharding(3, "weights"), 1)
    # 4,800 tokens in micro-batches of 400 are 12, each with two ways through 2 bytes a weight.
    assert weights.seconds == pytest.approx(12 * 2 * 2 * 1100 / 1000, rel=1e-3)


def test_more_devices_go_through_more_epochs_where_steps_are_what_was_asked_for():
    asked = workload(num_epochs=None, min_update_steps=6)
    assert (asked.plan(1).epochs, asked.plan(2).epochs) == (3, 6)  # of 16 rows, 8 or 16 a step
    one, two = (gpu_cost(GPU, SHAPE, None, asked, 800, False, PLAIN, devices) for devices in (1, 2))
    assert (one.steps, two.steps) == (6, 6)
    assert two.seconds == pytest.approx(one.seconds, rel=1e-3)  # twice the work on twice the devices


def test_a_cluster_of_a_given_size_says_whether_it_fits():
    hardware = read_hardware(None)
    shape = replace(SHAPE, parameters=8 * 10**9, largest=5 * 10**8)
    gpu = hardware.devices["A100-80"]
    assert isinstance(gpu, Gpu)
    found = [
        of_size("A100-80", gpu, hardware, shape, None, workload(), MicroBatch(512, 512, False), sharding, 4)
        for sharding in (PLAIN, Sharding(3))
    ]
    assert [(c.devices, c.fits) for c in found] == [(4, False), (4, True)]
    little = of_size(
        "A100-80", gpu.model_copy(update={"host_memory_gib": 1}), hardware, shape, None, workload(),
        MicroBatch(512, 512, False), Sharding(3, "all"), 4,
    )  # fmt: skip
    assert not little.fits  # the devices hold it, main memory does not
    assert little.footprint.total < little.usable


def test_a_cpus_seconds():
    assert cpu_seconds(3e12, 0.5, 0.6) == pytest.approx(10)


def test_a_micro_batch_is_the_budget_or_one_longer_row():
    assert micro_batch(workload(), 768, False) == MicroBatch(768, 192, False)  # a quarter is predicted
    assert micro_batch(workload(longest=2000), 768, True).tokens == 2000
    assert (
        micro_batch(workload(longest=50, rows_per_step=2), 768, False).tokens == 100
    )  # there are no more rows


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_the_smallest_cluster_fits_and_half_of_it_does_not(adapter: Adapter | None):
    hardware = read_hardware(None)
    shape = replace(SHAPE, parameters=8 * 10**9, matrices=7 * 10**9, head=5 * 10**8, largest=5 * 10**8)
    work, batch = workload(), MicroBatch(512, 512, False)
    for name, found in clusters(hardware, shape, adapter, work, batch).items():
        gpu = hardware.devices[name]
        assert isinstance(gpu, Gpu)
        usable = hardware.usable(gpu)
        for sharding, cluster in found.items():
            if cluster is None:
                continue
            assert cluster.footprint.total <= usable
            assert cluster.footprint.host <= gpu.host_memory_gib * GIB
            for fewer in COUNTS[: COUNTS.index(cluster.devices)]:
                less = gpu_footprint(shape, adapter, 512, 512, False, sharding, fewer)
                assert less.total > usable or less.host > gpu.host_memory_gib * GIB
        chosen = best(found)
        assert chosen is not None
        assert chosen.devices == min(c.devices for s, c in found.items() if c and s.offload == "none")


def test_without_sharding_more_devices_are_of_no_use():
    hardware = read_hardware(None)
    shape = replace(SHAPE, parameters=10**12)
    gpu = hardware.devices["H200"]
    assert isinstance(gpu, Gpu)
    assert smallest("H200", gpu, hardware, shape, None, workload(), MicroBatch(1, 1, False), PLAIN) is None
