"""What is asked of Ray, for machines we do not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.cluster.options import Device, ServeOptions
from tandem.cluster.plan import Endpoint, launch_spec
from tandem.cluster.ray_session import RaySession
from tandem.common.errors import ConfigError

LAPTOP = RaySession(address="127.0.0.1:1", dashboard_url="", local=True, nodes=1, resources={"CPU": 3.0})
KUBERAY = RaySession(
    address="ray://head", dashboard_url="", local=False, nodes=3,
    resources={"CPU": 64.0, "GPU": 8.0, "prefill": 2.0, "decode": 2.0},
)  # fmt: skip
ENDPOINT = Endpoint("redis://:secret@redis:6379", b"k" * 32)
REMOTE = ServeOptions(redis_url="redis://:secret@redis:6379")


def with_gpus(count: float) -> RaySession:
    return replace(LAPTOP, resources={"GPU": count})


def test_a_laptop_has_room_for_any_number_of_workers() -> None:
    spec = launch_spec(ServeOptions(prefill=3, decode=3), "dir", LAPTOP, ENDPOINT)
    for place in spec.placement.values():
        assert (place.num_cpus, place.num_gpus, place.resources, place.sharing) == (0.0, 0.0, {}, 0)
    assert spec.placement["prefill"].niceness > spec.placement["decode"].niceness == 0
    assert spec.host == "127.0.0.1"


def test_a_worker_gets_a_gpu_per_rank() -> None:
    spec = launch_spec(replace(REMOTE, tensor_parallel_size=4), "dir", KUBERAY, ENDPOINT)
    assert [place.num_gpus for place in spec.placement.values()] == [4.0, 4.0]
    assert spec.engine.gpu_memory_utilization == 0.9
    assert spec.placement["prefill"].niceness == 0


def test_node_groups_are_chosen_by_their_custom_resource() -> None:
    spec = launch_spec(REMOTE, "dir", KUBERAY, ENDPOINT)
    assert spec.placement["prefill"].resources == {"prefill": 1.0}
    assert spec.placement["decode"].resources == {"decode": 1.0}
    assert spec.placement["decode"].sharing == 1, "a node made for a role gives its cores to one worker"
    assert spec.host == "", "each worker listens on its own node's address"


def test_workers_on_plain_nodes_divide_their_cores() -> None:
    """By the node's count of cores, which only the worker knows: not by those of the machine that asks."""
    plain = replace(KUBERAY, resources={"CPU": 64.0})
    spec = launch_spec(replace(REMOTE, prefill=2, decode=2), "dir", plain, ENDPOINT)
    assert {place.sharing for place in spec.placement.values()} == {2}, "four workers on three nodes"


@pytest.mark.parametrize(("gpus", "workers", "share"), [(1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (2, 4, 0.5)])
def test_workers_share_gpus_that_are_too_few(gpus: int, workers: int, share: float) -> None:
    options = ServeOptions(prefill=1, decode=workers - 1)
    spec = launch_spec(options, "dir", with_gpus(gpus), ENDPOINT)
    assert spec.placement["decode"].num_gpus == share
    per_gpu = round(1 / share)
    assert per_gpu * gpus >= workers
    assert spec.engine.gpu_memory_utilization * per_gpu == pytest.approx(0.9)


def test_ranks_do_not_share() -> None:
    with pytest.raises(ConfigError, match="need 4 GPUs, Ray has 2"):
        launch_spec(ServeOptions(tensor_parallel_size=2), "dir", with_gpus(2), ENDPOINT)


def test_device_cpu_leaves_the_gpus_alone() -> None:
    spec = launch_spec(ServeOptions(device=Device.cpu), "dir", with_gpus(8), ENDPOINT)
    assert spec.placement["decode"].num_gpus == 0.0


def test_workers_on_other_machines_need_a_redis_they_can_reach() -> None:
    with pytest.raises(ConfigError, match="--redis-url"):
        launch_spec(ServeOptions(), "dir", KUBERAY, ENDPOINT)


def test_secrets_are_not_in_the_repr() -> None:
    text = repr(launch_spec(REMOTE, "dir", KUBERAY, ENDPOINT))
    assert "secret" not in text and "kkkk" not in text
