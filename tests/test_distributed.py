"""How a process finds the run that it is a part of; what several of them do is in test_several.py."""

import os

import pytest
from jax._src.clusters import cloud_tpu_cluster

from ftjax import distributed
from ftjax.distributed import Cluster, find_cluster
from ftjax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
KNOWN = ("SLURM_", "FTJAX_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_COMPLETION", "KUBERNETES_", "CUDA_VIS", "JAX_COORD")


@pytest.fixture
def environment(monkeypatch):
    """Sets what it is given, with nothing else there that says anything of a cluster."""
    for name in [name for name in os.environ if name.startswith(KNOWN)]:
        monkeypatch.delenv(name)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def nobody_said():
    return find_cluster(None, None, None, timeout=1)


def test_a_process_alone_is_no_cluster(environment):
    assert nobody_said() is None
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)


def test_flags_and_variables_say_the_same_and_flags_come_first(environment):
    wanted = Cluster("10.0.0.1:8482", 4, 3)
    assert find_cluster("10.0.0.1:8482", 4, 3, timeout=1) == wanted
    environment(FTJAX_COORDINATOR="10.0.0.1:8482", FTJAX_PROCESSES="4", FTJAX_PROCESS="3")
    assert nobody_said() == wanted
    assert find_cluster(None, None, 2, timeout=1) == Cluster("10.0.0.1:8482", 4, 2)
    environment(FTJAX_PROCESSES="1")
    assert nobody_said() is None


@pytest.mark.parametrize("name", ["JOB_COMPLETION_INDEX", "SLURM_PROCID"])
def test_the_scheduler_numbers_processes_whose_coordinator_is_given(environment, name):
    environment(**{name: "2"})
    assert nobody_said() is None  # alone it says nothing of a cluster
    environment(FTJAX_COORDINATOR="train-0.train:8482", FTJAX_PROCESSES="4")
    assert nobody_said() == Cluster("train-0.train:8482", 4, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:8482", 4, None), "--process is missing.*FTJAX_PROCESS"),
        ((None, 4, 0), "--coordinator is missing.*FTJAX_COORDINATOR"),
        (("10.0.0.1:8482", None, 0), "--processes is missing"),
        (("10.0.0.1", 4, 0), "HOST:PORT"),
        (("10.0.0.1:8482", 4, 4), "numbered from 0 to 3"),
    ],
)
def test_a_description_that_is_not_whole_is_refused(environment, given, message):
    with pytest.raises(UserError, match=message):
        find_cluster(*given, timeout=1)


def test_a_variable_that_is_no_number_is_refused(environment):
    environment(FTJAX_COORDINATOR="a:1", FTJAX_PROCESSES="four", FTJAX_PROCESS="0")
    with pytest.raises(UserError, match="FTJAX_PROCESSES='four'"):
        nobody_said()


def test_slurm_with_a_process_for_each_node_leaves_it_all_gpus(environment):
    environment(**SLURM)
    cluster = nobody_said()
    assert (cluster.processes, cluster.process, cluster.devices) == (2, 1, None)
    assert cluster.coordinator.startswith("node003:")


def test_slurm_with_several_processes_on_a_node_gives_each_a_gpu(environment):
    environment(**SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"})
    environment(SLURM_STEP_TASKS_PER_NODE="4(x2)")
    assert nobody_said()[1:] == (8, 6, (2,))
    environment(CUDA_VISIBLE_DEVICES="0")  # --gpus-per-task: it sees no other
    assert nobody_said()[1:] == (8, 6, None)
    environment(CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert nobody_said()[1:] == (8, 6, (2,))


def test_a_single_task_of_slurm_is_alone(environment):
    environment(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert nobody_said() is None


def test_the_pods_of_a_jobset_on_gke(environment, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    hosts = "localhost,tpu-1.tpu,tpu-2.tpu,tpu-3.tpu"
    environment(TPU_WORKER_HOSTNAMES=hosts, TPU_WORKER_ID="3", TPU_SKIP_MDS_QUERY="1")
    environment(MEGASCALE_COORDINATOR_ADDRESS="localhost", MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1")
    assert nobody_said() == Cluster("localhost:8482", 8, 7)
    environment(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0")
    assert nobody_said() is None


def test_a_tpu_pod_is_found_by_its_metadata(environment, monkeypatch):
    known = {"agent-worker-number": "2", "worker-network-endpoints": "a:1:localhost,b:2:10.0.0.6,c:3:10.0.0.7"}
    known["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'"
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (known[key], 200))
    assert nobody_said() == Cluster("localhost:8482", 3, 2)


def test_a_tpu_without_a_metadata_server_is_alone(environment, monkeypatch):
    def unreachable(key):
        raise ConnectionError("no route to metadata.google.internal")

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unreachable)
    assert nobody_said() is None


def test_what_is_for_one_process_says_so(environment):
    distributed.refuse_several("ftjax.generate")
    environment(**SLURM)
    with pytest.raises(UserError, match=r"ftjax\.generate runs in one process, and this is one of 2"):
        distributed.refuse_several("ftjax.generate")


def test_meetings_of_one_process_are_plain():
    with distributed.together("nothing"):
        pass
    assert distributed.tell("a") == "a"
    assert distributed.collect("b") == ["b"]
    with pytest.raises(ZeroDivisionError), distributed.together("failing"):
        raise ZeroDivisionError
