"""`launch/gke` prints a JobSet that trains on every host, and restarts and ends when it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unclip_jax.cli.main import build_parser
from unclip_jax.run.hosts import RESTART

ROOT = Path(__file__).resolve().parents[2]
SLICE = [
    "decoder",
    "--accelerator",
    "tpu-v5-lite-podslice",
    "--topology",
    "8x8",
    "--image",
    "here/unclip",
    "--bucket",
    "mine",
]
TRAIN = ["--", "configs/dalle2/decoder.py", "--workdir", "/bucket/runs/decoder", "--set", "batch_size=64"]


def gke(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "gke"), *arguments], capture_output=True, text=True
    )


def test_manifest():
    """64 chips are 16 hosts of four; two slices are two jobs; `unclip` accepts the command."""
    made = json.loads(gke(*SLICE, "--slices", "2", "--spot", *TRAIN).stdout)
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "decoder",
    )
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (
        replicated["replicas"] == 2
        and job["parallelism"] == job["completions"] == 16
        and job["completionMode"] == "Indexed"
    )
    pod = job["template"]["spec"]
    assert (
        pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
        and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    )
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    (volume,) = pod["volumes"]
    assert "rename-dir-limit=" in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert (
        volume["csi"]["volumeAttributes"]["bucketName"] == "mine"
        and container["volumeMounts"][0]["name"] == volume["name"]
    )
    args = build_parser().parse_args(container["command"][1:])
    assert (
        args.verb == "train"
        and args.distributed
        and args.workdir == "/bucket/runs/decoder"
        and args.assignments == ["batch_size=64"]
    )


def test_what_starts_it_again():
    """A run that was told to stop, or killed, restarts; a run that failed does not."""
    spec = json.loads(gke(*SLICE, *TRAIN).stdout)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (
        rule["action"] == "FailJob"
        and set(rule["onExitCodes"]["values"]) == {1, 2, 70}
        and RESTART not in rule["onExitCodes"]["values"]
    )
    assert spec["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    assert (
        job["template"]["spec"]["restartPolicy"] == "Never"
        and job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["Decoder", *SLICE[1:], *TRAIN], "is no name"),
        ([*SLICE[:3], "--topology", "8by8", *SLICE[5:], *TRAIN], "is no topology"),
        ([*SLICE[:3], "--topology", "1x1", *SLICE[5:], *TRAIN], "no slice of hosts with 4"),
        (SLICE, "say what to train"),
        (
            [*SLICE, "--", "configs/dalle2/decoder.py", "--workdir", "/tmp/runs"],
            "must lie in /bucket or in gs://",
        ),
        ([*SLICE, "--slices", "0", *TRAIN], "at least 1"),
    ],
    ids=["name", "topology", "chips", "nothing", "workdir", "slices"],
)
def test_refusals(arguments, message):
    done = gke(*arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


# ---------------------------------------------------------------------------------------------------- --serve
SERVED = [
    "web",
    "--serve",
    "--accelerator",
    "tpu-v5-lite-podslice",
    "--topology",
    "2x2",
    "--image",
    "registry/unclip",
]


def test_a_server_with_its_service_and_autoscaling():
    """The pods run `unclip serve` with the secret's key and are ready when /healthz says so."""
    made = json.loads(
        gke(
            *SERVED, "--secret", "keys", "--replicas", "2:6", "--bucket", "b", "--", "--bundle", "/bucket/x"
        ).stdout
    )
    items = {item["kind"]: item["spec"] for item in made["items"]}
    assert set(items) == {"Deployment", "Service", "PodMonitoring", "HorizontalPodAutoscaler"}
    pod = items["Deployment"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == [
        *("unclip", "serve", "--host", "0.0.0.0", "--port", "8000", "--bundle", "/bucket/x"),
    ]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    for selector in (items["Deployment"]["selector"]["matchLabels"], items["Service"]["selector"]):
        assert selector == pod["metadata"]["labels"]
    scaling = items["HorizontalPodAutoscaler"]
    assert (scaling["minReplicas"], scaling["maxReplicas"]) == (2, 6)
    assert "unclip_queue_pictures" in json.dumps(scaling["metrics"])


def test_the_command_of_the_pods_is_one_of_unclip():
    from unclip_jax.cli.main import build_parser

    made = json.loads(gke(*SERVED, "--secret", "keys", "--", "--bundle", "emoji", "--batch", "8").stdout)
    (container,) = made["items"][0]["spec"]["template"]["spec"]["containers"]
    args = build_parser().parse_args(container["command"][1:])
    assert args.verb == "serve" and args.bundles == ["emoji"] and args.batch == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SERVED, "--secret is missing"),
        ([*SERVED, "--secret", "s", "--topology", "4x4"], "more than one host has"),
        ([*SERVED, "--secret", "s", "--replicas", "4"], "write MIN:MAX"),
        ([*SERVED, "--secret", "s", "--replicas", "4:2"], "write MIN:MAX"),
        ([*SERVED, "--secret", "s", "--", "--no-auth"], "leave them out"),
        ([*SERVED[:1], *SERVED[2:], "--bucket", "b", "--secret", "s"], "are for --serve"),
    ],
)
def test_servers_that_are_refused(arguments, message):
    done = gke(*arguments)
    assert done.returncode == 2 and message in done.stderr
