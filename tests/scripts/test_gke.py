"""scripts/gke: the manifest against the published schema, and what its failure rules make of every exit status."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from support import ROOT, SUPPORT

SCHEMA = json.loads((SUPPORT / "jobset.schema.json").read_text())
RUN = ["--config", "configs/x.py", "--workdir", "/mnt/ftjax/my run"]
ASKED = {"--name": "support", "--image": "eu-docker.pkg.dev/p/r/ftjax:1", "--claim": "ftjax"}


def command(*arguments, type="v5e", topology="4x4", flags=(), **changed):
    asked = ASKED | {"--type": type, "--topology": topology} | {f"--{key}": value for key, value in changed.items()}
    words = [word for pair in asked.items() for word in pair]
    script = [sys.executable, "-IS", str(ROOT / "scripts/gke/render.py"), *words, *flags]  # -IS: it needs no package
    return subprocess.run([*script, "--", *(arguments or RUN)], capture_output=True, text=True, timeout=30, check=False)


def render(*arguments, **options):
    done = command(*arguments, **options)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    jsonschema.validate(manifest, SCHEMA)
    assert "${" not in re.sub(r"(?m)^ *#.*$", "", done.stdout)
    return manifest


def job(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest):
    return job(manifest)["template"]["spec"]


def container(manifest):
    (only,) = pod(manifest)["containers"]
    return only


@pytest.mark.parametrize(
    ("type", "topology", "accelerator", "hosts", "chips"),
    [
        ("v5e", "1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e", "2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e", "4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v6e", "8x8", "tpu-v6e-slice", 16, 4),
        ("v5p", "2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5p", "4x4x4", "tpu-v5p-slice", 16, 4),
        ("v4", "2x2x4", "tpu-v4-podslice", 4, 4),
    ],
)
def test_every_topology_gets_its_hosts_chips_and_node_pool(type, topology, accelerator, hosts, chips):
    manifest = render(type=type, topology=topology)
    assert (job(manifest)["completions"], job(manifest)["parallelism"]) == (hosts, hosts)
    assert container(manifest)["resources"] == {
        "requests": {"google.com/tpu": chips},
        "limits": {"google.com/tpu": chips},
    }
    assert pod(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert pod(manifest)["hostNetwork"] is False


def test_machines_of_another_size_spot_and_several_slices():
    assert job(render(topology="2x4", flags=["--chips-per-host", "4"]))["parallelism"] == 2
    manifest = render(flags=["--spot", "--slices", "3", "--queue", "tpu", "--max-restarts", "0"])
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert pod(manifest)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod(manifest)["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert (pod(manifest)["hostNetwork"], pod(manifest)["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpu"}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0


def expanded(word):
    """What Kubernetes makes of an argument: `$$` is a `$`, `$(NAME)` a variable, and any other `$` itself."""
    return re.sub(r"\$\$|\$\([^)]*\)", lambda match: "$" if match[0] == "$$" else "VALUE", word)


def test_arguments_and_environment_arrive_as_they_were_given():
    nasty = [
        "a b",
        'it\'s "x" $HOME $(HOME) $$(HOME)',
        "- x: {y}",
        "# no comment",
        "yes",
        "",
        "1e3",
        "line\nline",
        "é\U0001f600",
    ]
    manifest = render(*RUN, *nasty, flags=["--env", "NOTE=a: 'b' $(c)", "--env", "HF_HOME=/x", "--token-secret", "hf"])
    assert [expanded(word) for word in container(manifest)["args"]] == [*RUN, *nasty]
    assert container(manifest)["command"] == ["python", "-u", "-m", "ftjax.train"]
    assert container(manifest)["env"] == [
        {"name": "NOTE", "value": "a: 'b' $$(c)"},  # $(c), expanded
        {"name": "HF_HOME", "value": "/x"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
    ]


def outcome(manifest, exit_code=0, condition=None):
    """What JobSet does when a pod ends so, by the rules of Kubernetes (message formats included) and of JobSet."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        where = f"matching FailJob rule at index {index}"
        codes = rule.get("onExitCodes")
        if codes and exit_code in codes["values"]:
            assert codes["containerName"] == container(manifest)["name"]
            reason = "PodFailurePolicy"
            message = f"Container train for pod ns/support-slice-0-2-75 failed with exit code {exit_code} {where}"
            break
        if not codes and condition in [pattern["type"] for pattern in rule["onPodConditions"]]:
            reason, message = "PodFailurePolicy", f"Pod ns/support-slice-0-2-75 has condition {condition} {where}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("exit_code", "condition", "action"),
    [
        (75, None, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (137, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (2, None, "FailJobSet"),
        (1, None, "RestartJobSet"),
        (134, None, "RestartJobSet"),
        (137, None, "RestartJobSet"),
        (130, None, "RestartJobSet"),
    ],
)
def test_exit_statuses_decide_what_is_started_again(exit_code, condition, action):
    assert outcome(render(), exit_code, condition) == action


def test_what_kubernetes_demands_of_a_pod_failure_policy():
    manifest = render()
    assert job(manifest)["podReplacementPolicy"] == "Failed"
    assert pod(manifest)["restartPolicy"] == "Never"
    assert job(manifest)["completionMode"] == "Indexed"
    assert pod(manifest)["terminationGracePeriodSeconds"] == 600
    (mount,), (volume,) = container(manifest)["volumeMounts"], pod(manifest)["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/mnt/ftjax"}
    assert volume["persistentVolumeClaim"] == {"claimName": "ftjax"}


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: m["spec"].update(failurPolicy={}),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda m: job(m).update(parallelism="4"),
        lambda m: job(m)["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("operator"),
        lambda m: container(m).pop("name"),
        lambda m: container(m)["args"].append(1),
        lambda m: container(m)["resources"]["limits"].update({"google.com/tpu": "four"}),
    ],
)
def test_the_schema_notices(break_it):
    manifest = copy.deepcopy(render())
    break_it(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    ("options", "arguments", "told"),
    [
        ({"topology": "4x4x4"}, RUN, "v5e has 2 axes"),
        ({"topology": "4by4"}, RUN, "v5e has 2 axes"),
        ({"topology": "3x3"}, RUN, "9 chips, not hosts of 4"),
        ({"name": "My_Run"}, RUN, "--name My_Run"),
        ({"name": "a" * 41}, RUN, "40 at most"),
        ({"topology": "2x2", "slices": "2"}, RUN, "slices of several hosts only"),
        ({"slices": "0"}, RUN, "--slices must be 1 or more"),
        ({"env": "NOTE"}, RUN, "not KEY=VALUE"),
        ({}, ["--config", "x.py"], "give --workdir"),
        ({}, ["--workdir", "gs://bucket/x"], "does not lie below /mnt/ftjax"),
        ({}, ["--workdir=/mnt/ftjax"], "does not lie below /mnt/ftjax"),
        ({}, [*RUN, "\x7f"], "YAML cannot hold"),
    ],
)
def test_mistakes_are_told_before_the_cluster_sees_them(options, arguments, told):
    done = command(*arguments, **options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"error: {done.stderr.removeprefix('error: ')}" == done.stderr
    assert told in done.stderr


@pytest.mark.slow
def test_a_sweep_is_a_jobset_for_each_of_its_runs():
    page = (ROOT / "docs/gke.md").read_text()
    (script,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {
        "IMAGE": ASKED["--image"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = script.replace("kubectl apply -f -", "cat")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    manifests = list(filter(None, yaml.safe_load_all(done.stdout)))
    for manifest in manifests:
        jsonschema.validate(manifest, SCHEMA)
    names = [manifest["metadata"]["name"] for manifest in manifests]
    assert names == ["sweep-0", "sweep-1", "sweep-2", "sweep-3"]
    workdirs = [container(manifest)["args"][-1] for manifest in manifests]
    assert workdirs[3] == "--workdir=/mnt/ftjax/runs/sweep/learning_rate=3e-4,rank=16"
