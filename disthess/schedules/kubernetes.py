"""Manifests for Kubernetes: a CronJob of one pod, or KubeRay's RayCronJob; the audit file travels as a ConfigMap."""

from __future__ import annotations

import shlex
from typing import Any

from disthess.schedules.request import STOP_SECONDS, Schedule
from disthess.schedules.yaml_text import yaml_text

STARTING_DEADLINE_SECONDS = 3600
RAY_VERSION = "2.60.0"

_CONFIG = "/config/audit.yaml"
_CRON_JOB = """\
# `disthess {words}` in one pod, {times}.
#   kubectl apply -f FILE
# Before: change the image, resources and the claim's name; the history and checkpoints in the audit file should lie on
# /stores or on an object store. The audit file below is a copy: write this again when it changes.
# Exit code 3 is an alert. The Job then counts as failed, and is not tried again: the checkpoint would be the same.
"""
_RAY_CRON_JOB = """\
# `disthess {words}` on a Ray cluster that lives as long as the audit, {times}.
#   kubectl apply -f FILE
# KubeRay's own schedule: operator 1.6 or later, alpha, its feature gate RayCronJob is off by default. It has no
# concurrencyPolicy and no history limit, and after an outage of the operator it may start the audits that were missed, one after
# another. That costs little, since an audit that the history has is not made again; prefer --emit k8s all the same.
# Before: change the image, resources and the claim's name; the history and checkpoints in the audit file should lie on
# /stores or on an object store. The audit file below is a copy: write this again when it changes.
# Exit code 3 is an alert. The job then counts as failed, and is not tried again: the checkpoint would be the same.
"""


def cron_job(schedule: Schedule) -> str:
    """A ConfigMap and a batch/v1 CronJob.

    Raises:
        ConfigError: Kubernetes cannot be told that time, or the audit file cannot be read.
    """
    words = schedule.command(_CONFIG)
    cpu, memory = "8", "32Gi"
    container = {
        "name": "disthess",
        "image": schedule.image,
        "workingDir": _literal(schedule.working_dir or "/app"),
        "command": ["disthess"],
        "args": [_literal(word) for word in words],
        "resources": _resources(cpu, memory),
        "volumeMounts": _mounts(),
    }
    pod = {"restartPolicy": "Never", **_pod_settings(), "containers": [container], "volumes": _volumes(schedule)}
    job = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": schedule.name},
        "spec": {
            "schedule": schedule.cron.plain(),
            "timeZone": schedule.timezone or "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": STARTING_DEADLINE_SECONDS,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 0,
                    "activeDeadlineSeconds": schedule.deadline_seconds,
                    "template": {"spec": pod},
                }
            },
        },
    }
    return _documents(_CRON_JOB, schedule, job)


def ray_cron_job(schedule: Schedule) -> str:
    """A ConfigMap and a RayCronJob of KubeRay, of one head and two workers.

    Raises:
        ConfigError: KubeRay cannot be told that time, or the audit file cannot be read.
    """
    address = schedule.address or "auto"
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": {"name": schedule.name},
        "spec": {
            "schedule": schedule.cron.plain(),
            "timeZone": schedule.timezone or "Etc/UTC",
            "suspend": False,
            "jobTemplate": {
                "submissionMode": "K8sJobMode",
                "entrypoint": f"disthess audit {_CONFIG} --address {shlex.quote(address)}",
                "backoffLimit": 0,
                "activeDeadlineSeconds": schedule.deadline_seconds,
                "preRunningDeadlineSeconds": 1800,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 600,
                "runtimeEnvYAML": yaml_text(
                    {
                        "working_dir": schedule.working_dir or "/app",
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS - 20)},
                    }
                ),
                "rayClusterSpec": {
                    "rayVersion": RAY_VERSION,
                    "authOptions": {"mode": "token"},
                    "headGroupSpec": {
                        "rayStartParams": {"num-cpus": "0"},
                        "template": {"spec": _ray_pod(schedule, "ray-head", "2", "8Gi")},
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": "workers",
                            "replicas": 2,
                            "minReplicas": 2,
                            "maxReplicas": 2,
                            "rayStartParams": {},
                            "template": {"spec": _ray_pod(schedule, "ray-worker", "4", "16Gi")},
                        }
                    ],
                },
            },
        },
    }
    return _documents(_RAY_CRON_JOB, schedule, job)


def _documents(comment: str, schedule: Schedule, job: dict[str, Any]) -> str:
    times = f"at {schedule.cron.text} ({schedule.timezone or 'UTC'})"
    head = comment.format(words=" ".join(schedule.command(_CONFIG)), times=times)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": schedule.name},
        "data": {"audit.yaml": schedule.text()},
    }
    return f"{head}---\n{yaml_text(config)}---\n{yaml_text(job)}"


def _ray_pod(schedule: Schedule, name: str, cpu: str, memory: str) -> dict[str, Any]:
    container = {
        "name": name,
        "image": schedule.image,
        "resources": _resources(cpu, memory),
        "volumeMounts": _mounts(),
    }
    return {**_pod_settings(), "containers": [container], "volumes": _volumes(schedule)}


def _pod_settings() -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
    }


def _resources(cpu: str, memory: str) -> dict[str, Any]:
    return {"limits": {"cpu": cpu, "memory": memory}, "requests": {"cpu": cpu, "memory": memory}}


def _mounts() -> list[dict[str, Any]]:
    return [
        {"name": "stores", "mountPath": "/stores"},
        {"name": "config", "mountPath": "/config", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _volumes(schedule: Schedule) -> list[dict[str, Any]]:
    return [
        {"name": "stores", "persistentVolumeClaim": {"claimName": "disthess-stores"}},
        {"name": "config", "configMap": {"name": schedule.name}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},
    ]


def _literal(text: str) -> str:
    """A text in which Kubernetes expands no ``$(NAME)``."""
    return text.replace("$", "$$")
