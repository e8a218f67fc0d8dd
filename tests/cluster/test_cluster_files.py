"""What lies in cluster/: each file against the fields its reader knows, and each script with stand-ins for what is not here."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from heads import BIN, ROOT, free_ports, outside_environment, ray_head, started
from typer.testing import CliRunner

from disthess.cli.main import app

# The two that start clusters take minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)
FOLDER = ROOT / "cluster"
SCRIPTS = sorted([*FOLDER.rglob("*.sh"), *FOLDER.rglob("*.sbatch")])
MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")

# Which keys a mapping may have; those with a star it must have. A list stands for a list of such mappings; str, int, bool and
# None (anything) for values. Only what our files use: a key that is not here is a slip.
MOUNT = {"*name": str, "*mountPath": str, "readOnly": bool}
CONTAINER = {
    "*name": str, "*image": str, "workingDir": str, "command": None, "args": None, "env": None,
    "*resources": {"*limits": None, "*requests": None}, "*volumeMounts": [MOUNT],
}  # fmt: skip
VOLUME = {
    "*name": str, "persistentVolumeClaim": {"*claimName": str}, "configMap": {"*name": str},
    "emptyDir": {"medium": str, "sizeLimit": str},
}  # fmt: skip
POD = {
    "spec": {
        "*terminationGracePeriodSeconds": int, "*securityContext": {"*runAsNonRoot": bool, "*runAsUser": int, "fsGroup": int},
        "*containers": [CONTAINER], "*volumes": [VOLUME], "restartPolicy": str,
    },
}  # fmt: skip
RAY_JOB = {
    "*submissionMode": str, "*entrypoint": str, "*backoffLimit": int, "*preRunningDeadlineSeconds": int,
    "*shutdownAfterJobFinishes": bool, "*ttlSecondsAfterFinished": int, "*runtimeEnvYAML": str,
    "*rayClusterSpec": {
        "*rayVersion": str, "*authOptions": {"*mode": str},
        "*headGroupSpec": {"*rayStartParams": None, "*template": POD},
        "*workerGroupSpecs": [
            {"*groupName": str, "*replicas": int, "*minReplicas": int, "*maxReplicas": int, "*rayStartParams": None,
             "*template": POD},
        ],
    },
}  # fmt: skip
CRON = {
    "*schedule": str, "*concurrencyPolicy": str, "*startingDeadlineSeconds": int, "successfulJobsHistoryLimit": int,
    "failedJobsHistoryLimit": int, "*jobTemplate": {"*spec": {"*backoffLimit": int, "*template": POD}},
}  # fmt: skip
SPECS = {
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("ray.io/v1", "RayCronJob"): {"*schedule": str, "timeZone": str, "suspend": bool, "*jobTemplate": RAY_JOB},
    ("batch/v1", "CronJob"): CRON,
}


def slips(tree: Any, model: Any, place: str = "") -> list[str]:
    """Where a tree departs from its model."""
    if model is None:
        return []
    if isinstance(model, type):
        return [] if type(tree) is model else [f"{place}: {tree!r} is no {model.__name__}"]
    if isinstance(model, list):
        if not isinstance(tree, list) or not tree:
            return [f"{place}: a list is expected"]
        return [slip for number, entry in enumerate(tree) for slip in slips(entry, model[0], f"{place}[{number}]")]
    known = {key.lstrip("*"): inner for key, inner in model.items()}
    found = [f"{place}.{key} is unknown" for key in tree if key not in known]
    found += [f"{place}.{key[1:]} is missing" for key in model if key.startswith("*") and key[1:] not in tree]
    return found + [slip for key in tree if key in known for slip in slips(tree[key], known[key], f"{place}.{key}")]


def manifest_slips(tree: dict[str, Any]) -> list[str]:
    top = {"*apiVersion": str, "*kind": str, "*metadata": {"*name": str}, "*spec": None}
    found = slips(tree, top)
    return found or slips(tree["spec"], SPECS[tree["apiVersion"], tree["kind"]], tree["kind"])


def pods(tree: Any) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        own = [tree] if "containers" in tree else []
        return own + [pod for value in tree.values() for pod in pods(value)]
    return [pod for value in tree for pod in pods(value)] if isinstance(tree, list) else []


def ray_jobs(tree: dict[str, Any]) -> list[dict[str, Any]]:
    spec = tree["spec"]
    return {"RayJob": [spec], "RayCronJob": [spec.get("jobTemplate")], "CronJob": []}[tree["kind"]]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_have_the_fields_their_reader_knows(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert manifest_slips(tree) == []
    names = [
        tree["metadata"]["name"],
        *(job["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"] for job in ray_jobs(tree)),
    ]
    for pod in pods(tree):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            names.append(container["name"])
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert all(QUANTITY.fullmatch(str(value)) for value in container["resources"]["limits"].values())
        assert pod["securityContext"]["runAsNonRoot"] is True
    assert all(LABEL.fullmatch(name) for name in names), names


def test_a_slip_in_a_manifest_would_be_noticed() -> None:
    good = yaml.safe_load((FOLDER / "kubernetes" / "rayjob.yaml").read_text())
    for wrong in ({"backofLimit": 2}, {"backoffLimit": "2"}):
        tree = copy.deepcopy(good)
        tree["spec"].update(wrong)
        assert len(manifest_slips(tree)) == 1
    del good["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert manifest_slips(good) == ["RayJob.rayClusterSpec.headGroupSpec.template is missing"]


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_ray_jobs_drain_ask_for_a_token_and_fit_their_cluster(name: str) -> None:
    (job,) = ray_jobs(yaml.safe_load((FOLDER / "kubernetes" / name).read_text()))
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["shutdownAfterJobFinishes"] is True
    waits = int(yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert all(waits < pod["terminationGracePeriodSeconds"] for pod in pods(job))
    given = dict(re.findall(r"--(workers|threads) (\d+)", job["entrypoint"]))
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) * group["replicas"]
    assert int(given["workers"]) * int(given["threads"]) <= cores


def test_the_cron_job_never_runs_twice_at_once() -> None:
    spec = yaml.safe_load((FOLDER / "kubernetes" / "cronjob.yaml").read_text())["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 0
    assert len(spec["schedule"].split()) == 5


def test_the_commands_in_the_files_are_commands_of_ours() -> None:
    """Every ``disthess ...`` that a file calls names a verb and options that exist."""
    import typer.main

    run = typer.main.get_command(app).commands["run"]
    known = {name for parameter in run.params for name in parameter.opts}
    lines = {}
    for path in [*MANIFESTS, *SCRIPTS, FOLDER / "ray" / "launcher.yaml"]:
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        code = "\n".join(line.split("# ")[0] for line in text.splitlines() if not line.lstrip().startswith("# Change"))
        lines[path.name] = re.findall(r"(?<![\w/.-])disthess run ([^\n']*)", code)
    assert all(lines[path.name] for path in MANIFESTS), lines
    for found in lines.values():
        for line in found:
            assert set(re.findall(r"--\w[\w-]*", line)) <= known, line


def test_the_launcher_file_passes_rays_own_schema() -> None:
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")
    tree = yaml.safe_load((FOLDER / "ray" / "launcher.yaml").read_text())
    # `min_workers` at the top belongs to the local provider, which Ray turns into node types before it checks.
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(prepared, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**prepared, "head_start_commands": []}, schema)
    assert tree["max_workers"] == len(tree["provider"]["worker_ips"])


def test_the_image_installs_this_checkout_for_a_user_without_rights() -> None:
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    words = [word for word, _ in steps]
    assert set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert words[0] == "FROM"
    copied = [name for word, rest in steps if word == "COPY" for name in rest.split()[:-1]]
    assert {"pyproject.toml", "disthess", "README.md", "LICENSE"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert all(f"!{name}" in kept for name in copied), "what is copied must not be ignored"
    last = max(place for place, word in enumerate(words) if word == "RUN")
    user = words.index("USER")
    assert last < user
    assert steps[user][1] != "root"
    assert json.loads(steps[-1][1])[0] == "disthess"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert path.name == "environment.sh" or "set -euo pipefail" in text


FAKE_SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do if [ "$1" = -w ]; then shift; fi; shift; done
exec "$@"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$3" | tr , '\\n'
"""
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"$RECORD"
if [ -n "${RAY_AUTH_TOKEN_PATH:-}" ]; then stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$RECORD.modes"; fi
"""


def programs(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def sbatch(script: str, tmp_path: Path, nodes: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A batch script as Slurm would start it on its first node."""
    fakes = programs(tmp_path / "slurm", srun=FAKE_SRUN, scontrol=FAKE_SCONTROL)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": str(len(nodes.split(","))), "SLURM_CPUS_PER_TASK": "2", "THREADS": "1",
        "RECORD": str(tmp_path / "record"),
    }  # fmt: skip
    environment = outside_environment(**slurm, **more)
    environment["PATH"] = f"{fakes}{os.pathsep}{environment['PATH']}"
    command = ["bash", str(FOLDER / "slurm" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


FAKE_RAY_START = (
    RECORD
    + """case " $* " in *" --block "*) trap 'exit 0' TERM; while :; do sleep 0.1; done ;; esac
"""
)
FAKE_SYMMETRIC = (
    RECORD
    + """while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""
)


@pytest.mark.parametrize(("device", "workers"), [("cpu", max(1, os.cpu_count() // 2)), ("cuda", 3)])
def test_one_machine_gets_a_worker_per_gpu_or_pair_of_cores(device: str, workers: int, tmp_path: Path) -> None:
    cores = f"#!/bin/sh\necho {os.cpu_count()}\n"
    tools = programs(
        tmp_path / "bin", disthess=RECORD, nproc=cores, **{"nvidia-smi": "#!/bin/sh\nprintf '1\\n2\\n3\\n'\n"}
    )
    (tmp_path / "run.yaml").write_text(f"compute: {{device: {device}}}\n")
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    command = [str(FOLDER / "local" / "run.sh"), str(tmp_path / "run.yaml"), "--store", "s"]
    subprocess.run(command, env=environment, check=True)
    recorded = (tmp_path / "record").read_text()
    assert f"--executor ray --workers {workers} --threads" in recorded
    assert recorded.strip().endswith("--store s")


def test_exclusive_nodes_run_symmetrically_and_drain_before_the_limit(tmp_path: Path) -> None:
    tools = programs(tmp_path / "bin", ray=FAKE_SYMMETRIC, disthess=RECORD + "exit 3\n")
    end = str(int(__import__("time").time()) + 1000)
    done = sbatch("exclusive.sbatch", tmp_path, "n1,n2", "run.yaml", DISTHESS_BIN=str(tools), SLURM_JOB_END_TIME=end)
    assert done.returncode == 3, done.stderr
    ray, disthess = (tmp_path / "record").read_text().splitlines()
    assert ray.startswith("ray symmetric-run --address n1:24711 --min-nodes 2 --num-cpus=2")
    assert re.search(r" -- timeout --signal=TERM 8[012]\d disthess run", ray)
    assert disthess == "disthess run run.yaml --executor ray --address n1:24711 --workers 4 --threads 1"
    assert set((tmp_path / "record.modes").read_text().split()) == {"600"}
    assert not list(tmp_path.glob(".ray-token*"))


def test_shared_nodes_get_ports_of_their_own_and_nobody_elses_ray_is_stopped(tmp_path: Path) -> None:
    tools = programs(
        tmp_path / "bin", ray=FAKE_RAY_START, python="#!/bin/sh\nsleep 0.5\n", disthess=RECORD + "exit 2\n",
        hostname="#!/bin/sh\necho 10.1.1.1\n",
    )  # fmt: skip
    done = sbatch("shared.sbatch", tmp_path, "n1,n2", "run.yaml", "--store", "s.zarr", DISTHESS_BIN=str(tools))
    assert done.returncode == 2, done.stderr
    head, worker, disthess = (tmp_path / "record").read_text().splitlines()
    base = 20000 + 4711 % 200 * 200
    assert f"start --head --node-ip-address=10.1.1.1 --port={base} " in head
    assert "--temp-dir=/tmp/dh-4711" in head
    assert f"start --address=10.1.1.1:{base} " in worker
    for line in (head, worker):
        ports = [int(port) for port in re.findall(r"-port=(\d+)", line)]
        assert len(ports) == len(set(ports)) >= 8
        assert all(base <= port < base + 200 for port in ports)
    assert (
        disthess
        == f"disthess run run.yaml --executor ray --address 10.1.1.1:{base} --workers 4 --threads 1 --store s.zarr"
    )
    assert set((tmp_path / "record.modes").read_text().split()) == {"600"}
    assert not list(tmp_path.glob(".ray-token*"))
    code = [line for line in (FOLDER / "slurm" / "shared.sbatch").read_text().splitlines() if not line.startswith("#")]
    assert "ray stop" not in "\n".join(code)


PROBLEM = """
import torch
import disthess

def problem():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return disthess.Problem(model, loss="cross_entropy", batches=[(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
"""
RUN = """
problem: {factory: small.py:problem}
compute: {store: run.zarr, dtype: float64}
report: {eigenvalues: 2, blocks: 2, pictures: false}
"""


def whole(store: Path) -> bool:
    done = CliRunner().invoke(app, ["verify", str(store), "--json"])
    return done.exit_code == 0 and json.loads(done.stdout)["whole"] is True


@pytest.mark.slow
def test_the_shared_slurm_script_runs_here_on_one_node(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(PROBLEM)
    (tmp_path / "run.yaml").write_text(RUN)
    # The stand-in for the environment's bin folder: the real programs.
    texts = {name: f'#!/bin/sh\nexec {shlex.quote(str(BIN / name))} "$@"\n' for name in ("ray", "python")}
    module = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -W ignore -m disthess "$@"\n'
    tools = programs(tmp_path / "bin", disthess=module, hostname="#!/bin/sh\necho 127.0.0.1\n", **texts)
    done = sbatch("shared.sbatch", tmp_path, "localhost", "run.yaml", DISTHESS_BIN=str(tools))
    shutil.rmtree("/tmp/dh-4711", ignore_errors=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "certificate hessian: passed" in done.stdout
    assert whole(tmp_path / "run.zarr")


@pytest.mark.slow
def test_a_worker_joins_the_local_head_with_the_token_the_head_made(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(PROBLEM)
    (tmp_path / "run.yaml").write_text(RUN)
    with ray_head(cpus=1, RAY_AUTH_MODE="token", HOME=str(tmp_path)) as head:
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
        names = ("node-manager-port", "object-manager-port", "metrics-export-port", "dashboard-agent-listen-port")
        ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        size = ["--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        command = [str(FOLDER / "local" / "worker.sh"), f"127.0.0.1:{head.port}", *ports, *size]
        with started(command, head.environment, tmp_path / "worker.log"):
            # Two workers of one thread fit only once the second machine is there.
            line = [sys.executable, "-W", "ignore", "-m", "disthess", "run", "run.yaml", "--executor", "ray"]
            line += ["--address", f"127.0.0.1:{head.port}", "--workers", "2", "--threads", "1"]
            for _ in range(15):
                done = subprocess.run(
                    line, cwd=tmp_path, env=head.environment, capture_output=True, text=True, timeout=200
                )
                if "do not fit" not in done.stderr:
                    break
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "worker.log").read_text()
    assert whole(tmp_path / "run.zarr")


def test_a_worker_without_a_token_says_where_it_belongs(tmp_path: Path) -> None:
    tools = programs(tmp_path / "bin", ray=RECORD)
    environment = outside_environment(HOME=str(tmp_path), RECORD=str(tmp_path / "record"), DISTHESS_BIN=str(tools))
    command = [str(FOLDER / "local" / "worker.sh"), "head:6379"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "copy the head's there" in done.stderr
    assert not (tmp_path / "record").exists()
