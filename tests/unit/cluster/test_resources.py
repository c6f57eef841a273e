"""What is asked of a cluster, and what is refused at once."""

import pytest

from tunesmith.cluster.resources import Request, node_beside, refuse_impossible, refuse_nothing, request_of
from tunesmith.errors import ConfigError

CPU_NODE = {"CPU": 8.0, "memory": 64e9, "node:10.0.0.1": 1.0}
GPU_NODE = {"CPU": 48.0, "memory": 192e9, "GPU": 4.0, "accelerator_type:A10G": 1.0}


@pytest.mark.parametrize(
    ("worker", "cluster", "each"),
    [
        ({}, CPU_NODE, {"CPU": 1}),
        ({"memory": 1e9}, CPU_NODE, {"CPU": 1, "memory": 1e9}),
        ({"CPU": 4}, CPU_NODE, {"CPU": 4}),
        ({}, GPU_NODE, {"CPU": 1, "GPU": 1}),  # GPUs that are there are used
        ({"GPU": 0}, GPU_NODE, {"CPU": 1, "GPU": 0}),  # unless they are not wanted
        ({"accelerator_type:A10G": 0.001}, GPU_NODE, {"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001}),
        ({"accelerator_type:A10G": 0.001}, CPU_NODE, {"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001}),
        (
            {"anyscale/accelerator_shape:4xA10G": 0.001},
            GPU_NODE,
            {"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001},
        ),
        (
            {"anyscale/accelerator_shape:4xA10G": 0.001},
            {**GPU_NODE, "anyscale/accelerator_shape:4xA10G": 1.0},
            {"CPU": 1, "GPU": 1, "anyscale/accelerator_shape:4xA10G": 0.001},
        ),
    ],
)
def test_each_worker_asks_for_a_gpu_where_there_are_any_else_for_a_cpu(worker, cluster, each):
    assert request_of(4, worker, {"memory": 5e9}, cluster) == Request(4, each, {"memory": 5e9})


def test_what_fits_is_not_refused():
    """What just fits is taken, and the same with one worker more, or on one node less, is not."""
    request = request_of(8, {"accelerator_type:A10G": 0.001}, {"memory": 53_687_091_200}, GPU_NODE)
    refuse_impossible(request, [GPU_NODE, GPU_NODE], "setting num_devices")
    with pytest.raises(ConfigError, match="asks for 8 GPUs; the cluster has 4 GPUs"):
        refuse_impossible(request, [GPU_NODE], "setting num_devices")
    refuse_impossible(Request(8, {"CPU": 1}, {}), [CPU_NODE], "setting num_devices")
    with pytest.raises(ConfigError, match="asks for 9 CPUs; the cluster has 8 CPUs"):
        refuse_impossible(Request(9, {"CPU": 1}, {}), [CPU_NODE], "setting num_devices")


@pytest.mark.parametrize(
    ("request_", "nodes", "said"),
    [
        (
            Request(16, {"CPU": 1, "GPU": 1}, {}),
            [GPU_NODE],
            "my.yaml line 3: num_devices: asks for 16 GPUs; the cluster has 4 GPUs",
        ),
        (
            Request(2, {"CPU": 1, "GPU": 1, "accelerator_type:H100": 0.001}, {}),
            [GPU_NODE],
            "asks for 0.002 accelerator_type:H100; the cluster has 0 accelerator_type:H100",
        ),
        (
            Request(2, {"CPU": 1}, {"memory": 80e9}),
            [CPU_NODE],
            "asks for 80 GB of memory; the cluster has 64 GB of memory",
        ),
        # Enough of everything in all, but no node has room for what one worker needs.
        (
            Request(2, {"CPU": 12}, {}),
            [CPU_NODE] * 4,
            "asks for 2 workers; the cluster's nodes have room for 0 (32 CPUs)",
        ),
        # The same of what is asked for once: no node has room for it beside the workers.
        (
            Request(2, {"CPU": 1, "memory": 40e9}, {"memory": 40e9}),
            [CPU_NODE] * 2,
            "asks for 2 workers and once 40 GB of memory beside them; the cluster's nodes have room for 1 worker "
            "beside that (16 CPUs, 128 GB of memory)",
        ),
        (
            Request(2, {"CPU": 1}, {"memory": 80e9}),
            [CPU_NODE] * 2,
            "asks for once 80 GB of memory on one node; the cluster's nodes have 64 GB of memory at most",
        ),
    ],
)
def test_what_can_never_be_had_is_refused_with_what_there_is(request_, nodes, said):
    with pytest.raises(ConfigError) as error:
        refuse_impossible(request_, nodes, "my.yaml line 3: num_devices")
    assert said in str(error.value)


def test_a_worker_that_asks_for_nothing_is_refused():
    """Ray Train failed on it, which was told as workers that were lost again and again."""
    refuse_nothing(request_of(2, {"CPU": 0}, {}, GPU_NODE), "--set: worker_resources")  # it has a GPU
    with pytest.raises(ConfigError) as error:
        refuse_nothing(request_of(2, {"CPU": 0}, {}, CPU_NODE), "--set: worker_resources")
    assert str(error.value) == (
        "--set: worker_resources: leaves a worker nothing (0 CPUs), and Ray places none of that kind; "
        "ask for CPU, GPU or another resource above 0"
    )


def test_all_that_is_asked_for_is_shown():
    request = Request(2, {"CPU": 1, "GPU": 0, "accelerator_type:A10G": 0.001}, {"memory": 5e9})
    assert request.shown() == "2 CPUs, 0.002 accelerator_type:A10G, 5 GB of memory"


SMALL_NODE = {"CPU": 2.0, "memory": 20e9}


@pytest.mark.parametrize(
    ("request_", "nodes", "chosen"),
    [
        (Request(2, {"CPU": 1}, {}), {"here": SMALL_NODE, "there": CPU_NODE}, "here"),
        (Request(2, {"CPU": 1}, {"memory": 10e9}), {"there": CPU_NODE, "here": SMALL_NODE}, "here"),
        (Request(2, {"CPU": 1}, {"memory": 30e9}), {"here": SMALL_NODE, "there": CPU_NODE}, "there"),
        # There would be room here, but then the workers had none.
        (
            Request(4, {"CPU": 1, "memory": 20e9}, {"memory": 4e9}),
            {"here": SMALL_NODE, "there": CPU_NODE},
            "there",
        ),
        (
            Request(3, {"CPU": 1, "memory": 40e9}, {"memory": 10e9}),
            {"here": SMALL_NODE, "there": CPU_NODE},
            None,
        ),
        (Request(2, {"CPU": 1}, {"memory": 10e9}), {"gone": CPU_NODE}, "gone"),  # a driver on no node
    ],
)
def test_what_is_asked_for_once_lies_where_all_workers_still_fit_the_drivers_node_first(
    request_, nodes, chosen
):
    assert node_beside(request_, nodes, "here") == chosen
