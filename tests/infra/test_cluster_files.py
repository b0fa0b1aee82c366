"""ray-cluster.yaml by Ray's own schema; the manifests by that of Kubernetes, as far as it goes.

The schema of KubeRay's own kinds is in no package: their fields are compared with the list below,
read off its API reference (v1.6), and the pod templates in them with the schema of Pod.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from ray_jobs.parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
KUBERAY = ROOT / "infra" / "kuberay"
KUBERNETES = "1.31"
#: Fields of KubeRay's API v1 that may be used, by kind.
FIELDS = {
    "RayCluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
        "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend",
        "workerGroupSpecs",
    },
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy",
        "entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId",
        "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes",
        "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
        "ttlSecondsAfterFinished",
    },
    "autoscalerOptions": {
        "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources",
        "securityContext", "upscalingMode", "version", "volumeMounts",
    },
    "headGroupSpec": {"enableIngress", "headService", "rayStartParams", "serviceType", "template"},
    "workerGroupSpec": {
        "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts",
        "rayStartParams", "replicas", "scaleStrategy", "suspend", "template",
    },
}  # fmt: skip


def documents() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERAY.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def of_kind(kind: str) -> dict[str, Any]:
    """The only one, or of several the first."""
    return next(item for item in documents() if item["kind"] == kind)


def cluster_specs() -> list[dict[str, Any]]:
    return [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_templates() -> list[dict[str, Any]]:
    found = [group["template"] for spec in cluster_specs() for group in groups(spec)]
    found.append(of_kind("CronJob")["spec"]["jobTemplate"]["spec"]["template"])
    found += [
        item["spec"]["submitterPodTemplate"] for item in documents() if item["kind"] == "RayJob"
    ]
    return [*found, of_kind("Deployment")["spec"]["template"]]


def test_ray_cluster_is_valid_by_rays_own_schema() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text(encoding="utf-8"))
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(fillout_defaults(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"head_typ": "head"}, schema)


def test_ray_cluster_has_a_cpu_head_spot_gpus_and_the_token() -> None:
    config = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text(encoding="utf-8"))
    head = config["available_node_types"][config["head_node_type"]]
    (spot,) = (n for name, n in config["available_node_types"].items() if name != "head")
    assert head["max_workers"] == 0 and "InstanceMarketOptions" not in head["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert spot["min_workers"] == 0 < spot["max_workers"] <= config["max_workers"]
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options and "~/.ray/auth_token" in config["file_mounts"]
    (growth,) = json.loads(options.partition("SGCD_CLUSTER_MAX='")[2].partition("'")[0])
    assert growth["nodes"] == spot["max_workers"]
    assert {name: growth[name] for name in ("CPU", "GPU")} == spot["resources"]
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)


def test_no_node_of_ray_up_takes_rays_own_machine_image() -> None:
    """It is one of CUDA 11; where a node names none Ray puts it there without a word."""
    from ray.autoscaler._private.aws.config import _check_ami

    config = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text(encoding="utf-8"))
    _check_ami(config)
    images = {node["node_config"]["ImageId"] for node in config["available_node_types"].values()}
    assert images == {"GPU-AMI"}
    (pattern,) = re.findall(r"grep -rnE '(.+?)'", (ROOT / "infra" / "README.md").read_text())
    assert re.search(pattern, "ImageId: GPU-AMI"), "the README finds what is to be filled in"


def test_core_kinds_are_valid_by_kubernetes_schema() -> None:
    core = [item for item in documents() if not item["apiVersion"].startswith("ray.io/")]
    kinds = {item["kind"] for item in core}
    assert kinds == {
        "Namespace", "ServiceAccount", "ConfigMap", "NetworkPolicy", "CronJob", "Deployment",
        "Service",
    }  # fmt: skip
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    wrong = copy.deepcopy(of_kind("CronJob"))
    wrong["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_pod_templates_of_rays_kinds_are_valid_pods() -> None:
    found = pod_templates()
    assert len(found) == 9
    for number, template in enumerate(found):
        pod = {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": f"pod-{number}", **template.get("metadata", {})},
            "spec": template["spec"],
        }  # fmt: skip
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_rays_kinds_use_fields_that_kuberay_has() -> None:
    assert set(of_kind("RayJob")["spec"]) <= FIELDS["RayJob"]
    for spec in cluster_specs():
        assert set(spec) <= FIELDS["RayCluster"]
        assert set(spec["autoscalerOptions"]) <= FIELDS["autoscalerOptions"]
        assert set(spec["headGroupSpec"]) <= FIELDS["headGroupSpec"]
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["rayVersion"] == ray.__version__
        for group in spec["workerGroupSpecs"]:
            assert set(group) <= FIELDS["workerGroupSpec"]
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for group in groups(spec):  # Ray takes them as words of a command line
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_a_job_of_its_own_has_the_cluster_that_stands() -> None:
    first, second = cluster_specs()
    assert first == second


def test_the_autoscaler_beside_a_head_shares_its_logs() -> None:
    """KubeRay mounts a volume of this name into it, and makes one only where there is none."""
    for spec in cluster_specs():
        pod = spec["headGroupSpec"]["template"]["spec"]
        (head,) = pod["containers"]
        (logs,) = [m["name"] for m in head["volumeMounts"] if m["mountPath"] == "/tmp/ray"]
        assert logs == "ray-logs" and logs in {volume["name"] for volume in pod["volumes"]}


def test_who_submits_a_job_of_its_own_is_the_heads_program() -> None:
    """KubeRay takes the first container, and gives it command, address and token."""
    spec = of_kind("RayJob")["spec"]
    (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
    (head,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert submitter["image"] == head["image"] and "command" not in submitter
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_nothing_runs_as_root_or_gains_rights() -> None:
    """What the namespace enforces; KubeRay's own containers have the context of the head's."""
    enforced = of_kind("Namespace")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [spec["autoscalerOptions"]["securityContext"] for spec in cluster_specs()]
    for template in pod_templates():
        assert template["spec"]["securityContext"]["runAsUser"] == 1000
        for container in template["spec"]["containers"]:
            contexts.append(container["securityContext"])
            assert "memory" in container["resources"]["limits"]
            assert not any("SECRET" in e["name"] for e in container.get("env", []) if "value" in e)
    for context in contexts:
        assert context["runAsNonRoot"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_how_far_the_cluster_may_grow_is_said_as_it_is() -> None:
    """SGCD_CLUSTER_MAX, which the preflight believes; Ray leaves 30 % of memory to its store."""
    said = json.loads(of_kind("ConfigMap")["data"]["SGCD_CLUSTER_MAX"])
    workers = of_kind("RayCluster")["spec"]["workerGroupSpecs"]
    assert len(said) == len(workers)
    for growth, group in zip(said, workers, strict=True):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert growth["nodes"] == group["maxReplicas"]
        assert growth["CPU"] == int(limits["cpu"])
        assert growth.get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert growth["memory"] <= 0.7 * int(limits["memory"].removesuffix("Gi")) * 2**30


def test_so_is_that_of_machines_on_aws() -> None:
    """Ray's autoscaler leaves 30 % of a machine's memory out, and counts GiB."""
    cluster = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    options = " ".join(cluster["docker"]["run_options"])
    (growth,) = json.loads(re.search(r"SGCD_CLUSTER_MAX='(.*?)'", options)[1])
    worker = cluster["available_node_types"]["gpu_spot"]
    assert worker["node_config"]["InstanceType"] == "g6.2xlarge"  # 8 vCPU, 32 GiB, one GPU
    assert (growth["CPU"], growth["GPU"], growth["nodes"]) == (8, 1, worker["max_workers"])
    assert growth["memory"] <= 0.7 * 32 * 2**30


def test_the_commands_in_the_manifests_are_commands() -> None:
    entry = of_kind("RayJob")["spec"]["entrypoint"].split()
    assert entry[0] == "sgcd" and build_parser().parse_args(entry[1:]).command == "harmonize"
    job = of_kind("CronJob")["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    args = build_parser().parse_args(container["args"])
    assert (args.command, args.job, args.id) == ("submit", "new-site", "nightly")
    assert build_parser().parse_args([args.job, *args.words]).gpus
    assert of_kind("CronJob")["spec"]["concurrencyPolicy"] == "Forbid"
    rule = job["podFailurePolicy"]["rules"][0]
    # Storage out of reach (69), our own fault (70) and stopped (75) are tried again.
    assert rule["onExitCodes"]["values"] == [1, 2, 65, 78] and rule["action"] == "FailJob"
    names = {e["name"]: e for e in container["env"]}
    assert names["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"


def test_the_images_entry_point_runs_commands_and_the_programs_that_ray_needs(
    tmp_path: Path,
) -> None:
    script = ROOT / "infra" / "docker" / "entrypoint.sh"
    for name in ("sgcd", "ray", "mlflow"):
        fake = tmp_path / name
        fake.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*words: str) -> str:
        done = subprocess.run([str(script), *words], env=path, capture_output=True, text=True)
        return done.stdout.strip()

    assert os.access(script, os.X_OK)
    assert run() == "sgcd" and run("--help") == "sgcd --help"
    assert run("harmonize", "--lake", "a b") == "sgcd harmonize --lake a b"
    assert run("ray", "start") == "ray start"
    assert run("bash", "-c", "echo it runs") == "it runs"
    assert run(str(tmp_path / "ray"), "start") == "ray start"
    # As every BIDS App is called; a folder can be entered, which `test -x` takes for more.
    assert run(str(tmp_path), "/out", "participant") == f"sgcd {tmp_path} /out participant"


def test_the_image_is_pinned_and_not_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert bases and all(":" in base and not base.endswith(":latest") for base in bases)
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"] and lines.index(users[0]) > lines.index(
        next(line for line in lines if "useradd" in line or line.startswith("COPY --from"))
    )
    assert "-c constraints.txt" in "\n".join(lines)
    for line in lines:  # what is copied is not kept from the build by .dockerignore
        if line.startswith("COPY ") and "--from" not in line:
            allowed = (ROOT / ".dockerignore").read_text().splitlines()
            for source in [w for w in line.split()[1:-1] if not w.startswith("--")]:
                assert f"!{source}" in allowed and (ROOT / source).exists(), source


def test_the_image_is_not_built_without_the_viewer_unless_told() -> None:
    """setup.py fetches it by npm, and fails for want of it where SGCD_VIEWER=required."""
    build = DOCKERFILE.read_text().rpartition("\nFROM ")[0].replace("\\\n", " ")
    needed, told, installed = (
        build.find(words) for words in ("COPY setup.py ./", "ARG SGCD_VIEWER=required",
                                        "RUN pip install --no-deps --force-reinstall .")
    )  # fmt: skip
    assert -1 < needed < told < installed
    (programs,) = re.findall(r"apt-get install (.+?) &&", build)
    assert "npm" in programs.split()


def test_ray_up_mounts_the_token_where_the_images_user_looks_for_it() -> None:
    from ray.autoscaler._private.docker import docker_start_cmds

    environment = re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", DOCKERFILE.read_text(), re.M)
    home = dict(environment).get("HOME", "/root")  # as Ray reads it off an image
    config = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text(encoding="utf-8"))
    command = docker_start_cmds(
        config["auth"]["ssh_user"], config["docker"]["image"], config["file_mounts"],
        config["docker"]["container_name"], [], config["cluster_name"], home, "docker",
    )  # fmt: skip
    assert ":/home/sgcd/.ray/auth_token " in command


def test_a_head_in_the_image_can_start_workers_on_aws() -> None:
    """Ray's provider imports boto3, and its command runner calls these by name."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    (programs,) = re.findall(r"apt-get install (.+?) &&", text.rpartition("\nFROM ")[2])
    assert {"openssh-client", "rsync"} <= set(programs.split())
    (wheels,) = re.findall(r"pip install -c constraints.txt (.+)", text)
    assert "boto3" in wheels.split()
    assert re.search(r"^boto3==", (ROOT / "constraints.txt").read_text(), re.M)


def test_a_login_shell_of_the_image_finds_its_programs(tmp_path: Path) -> None:
    """`ray up` calls no other; Debian's /etc/profile sets PATH, then reads /etc/profile.d."""
    told = re.search(r"echo '(.+)' > /etc/profile\.d/\w+\.sh", DOCKERFILE.read_text())
    profile = "PATH=/usr/local/bin:/usr/bin:/bin\nexport PATH\n" + (told[1] if told else "")
    (tmp_path / ".bash_profile").write_text(profile.replace("/opt/sgcd", str(tmp_path)))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text('#!/bin/sh\necho ray "$@"\n')
    (tmp_path / "bin" / "ray").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "--login", "-c", "ray stop"], env={"HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "ray stop\n", done.stderr


def test_mlflow_is_started_with_options_it_has() -> None:
    from mlflow.cli import server

    compose = yaml.safe_load((ROOT / "infra" / "mlflow" / "compose.yaml").read_text())
    service = compose["services"]["mlflow"]
    words = service["command"][0].partition("exec mlflow server ")[2].split()
    known = {option for parameter in server.params for option in parameter.opts}
    used = {word for word in words if word.startswith("--")}
    assert used and used <= known
    assert {"--artifacts-destination", "--app-name", "--serve-artifacts"} <= used
    assert set(service["secrets"]) == set(compose["secrets"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["depends_on"]["postgres"]["condition"] == "service_healthy"
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    assert {w.partition("=")[0] for w in container["args"][1:]} == used - {"--backend-store-uri"}
    text = (ROOT / "infra" / "mlflow" / "Dockerfile").read_text()
    assert "constraints.txt" in text and "USER 1000:1000" in text
    ignored = (ROOT / "infra" / "mlflow" / ".gitignore").read_text().split()
    for secret in compose["secrets"].values():
        assert f"/{secret['file'].removeprefix('./')}" in ignored
    # Compose mounts them with the owner they have, and mode 600 lets no other read.
    readme = (ROOT / "infra" / "README.md").read_text()
    ((owner, files),) = re.findall(r"^sudo chown (\d+) ([\w. ]+?) +#", readme, re.M)
    assert f"USER {owner}:{owner}" in text
    assert {f"./{name}" for name in files.split()} == {
        secret["file"] for secret in compose["secrets"].values()
    }


def test_shellcheck_has_nothing_to_say() -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    script = ROOT / "infra" / "docker" / "entrypoint.sh"
    done = subprocess.run([str(tool), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_cluster_finds_mlflow_and_has_a_login_for_it() -> None:
    service, deployment = of_kind("Service"), of_kind("Deployment")
    host = f"{service['metadata']['name']}.{of_kind('Namespace')['metadata']['name']}.svc"
    (port,) = service["spec"]["ports"]
    address = of_kind("ConfigMap")["data"]["MLFLOW_TRACKING_URI"]
    assert address == f"http://{host}:{port['port']}"
    template = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    assert {"name": port["targetPort"], "containerPort": 5000} in container["ports"]
    (hosts,) = (w.partition("=")[2] for w in container["args"] if w.startswith("--allowed-hosts"))
    assert f"{host}:5000" in hosts.split(",")
    for spec in cluster_specs():
        for group in groups(spec):
            (pod,) = group["template"]["spec"]["containers"]
            assert {"secretRef": {"name": "sgcd-tracking", "optional": True}} in pod["envFrom"]
