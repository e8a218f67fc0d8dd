"""What other schedulers are told: read back by YAML, by a shell with stand-ins, and by systemd itself; odd names among it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from disthess.cli.main import app
from disthess.errors import ConfigError
from disthess.schedules.cron import Cron
from disthess.schedules.kubernetes import cron_job, ray_cron_job
from disthess.schedules.machine import crontab_line, systemd_units, unit_word
from disthess.schedules.request import Schedule, default_name, seconds_of
from disthess.schedules.yaml_text import yaml_text

TEXT = "# an audit file: ü\nproblem: {factory: 'a:b'}\n\n  \nhistory:\n  \"x\"\n"
ODD = '100% o\'dd $(id) $HOME "dir" \\ ü: #x'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "audit.yaml").write_text(TEXT)
    return folder / "audit.yaml"


def make(config: Path, cron: str = "0 3 * * MON-FRI", **fields: Any) -> Schedule:
    return Schedule(config, Cron(cron), **fields)


def test_kubernetes_gets_a_config_map_and_a_cron_job(config: Path) -> None:
    text = cron_job(
        make(config, timezone="Europe/Berlin", deadline_seconds=7200, image="r.io/x:1", working_dir="/$(A)/b")
    )
    files, job = yaml.safe_load_all(text)
    assert (files["kind"], files["data"]) == ("ConfigMap", {"audit.yaml": TEXT})
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    spec = job["spec"]
    inner = spec.pop("jobTemplate")["spec"]
    assert spec == {
        "schedule": "0 3 * * 1-5",
        "timeZone": "Europe/Berlin",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
    }
    assert (inner["backoffLimit"], inner["activeDeadlineSeconds"]) == (0, 7200)
    pod = inner["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == ["disthess", "audit", "/config/audit.yaml"]
    assert container["image"] == "r.io/x:1"
    assert container["workingDir"] == "/$$(A)/b"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["config"] == "/config"
    assert volumes["config"]["configMap"]["name"] == files["metadata"]["name"] == job["metadata"]["name"]


def test_kuberay_gets_a_job_of_the_shape_of_the_one_in_cluster(config: Path) -> None:
    """Every key but the deadline is one of cluster/kubernetes/raycronjob.yaml, at its place."""
    _, job = yaml.safe_load_all(ray_cron_job(make(config)))
    known = yaml.safe_load((Path(__file__).parents[3] / "cluster" / "kubernetes" / "raycronjob.yaml").read_text())

    def keys(tree: Any, place: str = "") -> set[str]:
        if isinstance(tree, dict):
            return {f"{place}.{key}" for key in tree}.union(
                *(keys(value, f"{place}.{key}") for key, value in tree.items())
            )
        return set().union(*(keys(entry, place) for entry in tree)) if isinstance(tree, list) else set()

    assert keys(job) - keys(known) == {".spec.jobTemplate.activeDeadlineSeconds"}
    assert keys(known) - keys(job) == set()
    inner = job["spec"]["jobTemplate"]
    assert inner["entrypoint"] == "disthess audit /config/audit.yaml --address auto"
    assert inner["backoffLimit"] == 0
    assert inner["rayClusterSpec"]["rayVersion"] == known["spec"]["jobTemplate"]["rayClusterSpec"]["rayVersion"]
    waits = int(yaml.safe_load(inner["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert waits < inner["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    _, other = yaml.safe_load_all(ray_cron_job(make(config, address="ray://h 'x':1")))
    assert other["spec"]["jobTemplate"]["entrypoint"].endswith("""--address 'ray://h '"'"'x'"'"':1'""")


def stand_ins(folder: Path, **scripts: str) -> dict[str, str]:
    """Commands that are not to be run, with what they do instead."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/nowhere"}


def as_cron_reads(line: str) -> str:
    """The command of a crontab's line: what cron hands to the shell (a bare % would end it)."""
    command = re.sub(r"^(\S+ ){5}", "", line)
    assert re.search(r"(?<!\\)%", command) is None
    return command.replace("\\%", "%")


def test_a_crontab_line_runs_the_audit_whatever_its_name(config: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    environment = stand_ins(
        tmp_path / "bin", python=f'pwd > {said}; printf "%s\\n" "$@" >> {said}; echo printed; exit 3'
    )
    text = crontab_line(make(config, working_dir=str(config.parent), python="python", deadline_seconds=5))
    *comments, line = text.splitlines()
    assert all(comment.startswith("#") for comment in comments)
    assert line.startswith("0 3 * * 1-5 ")
    done = subprocess.run(["sh", "-c", as_cron_reads(line)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    assert said.read_text().splitlines() == [str(config.parent), "-m", "disthess", "audit", str(config)]
    assert Path(f"{config}.log").read_text() == "printed\n"


def test_a_crontab_line_stops_late_audits_and_never_runs_two(config: Path, tmp_path: Path) -> None:
    environment = stand_ins(tmp_path / "bin", python="sleep 30")
    line = crontab_line(make(config, working_dir="/", python="python", deadline_seconds=1)).splitlines()[-1]
    first = subprocess.Popen(["sh", "-c", as_cron_reads(line)], env=environment)
    lock = Path(f"{config}.lock")
    while not lock.exists() or subprocess.run(["flock", "-n", lock, "true"]).returncode == 0:
        assert first.poll() is None
    assert subprocess.run(["sh", "-c", as_cron_reads(line)], env=environment).returncode == 1
    assert first.wait() == 124


def test_a_crontab_knows_no_zones(config: Path) -> None:
    with pytest.raises(ConfigError, match="leave --timezone Europe/Berlin out"):
        crontab_line(make(config, timezone="Europe/Berlin"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to be asked")
def test_systemd_finds_nothing_wrong_and_reads_the_same_words(config: Path, tmp_path: Path) -> None:
    python = tmp_path / "py th$on"
    python.symlink_to(sys.executable)
    units = systemd_units(make(config, working_dir=str(config.parent), python=str(python), timezone="Europe/Berlin"))
    assert sorted(units) == ["disthess-audit.service", "disthess-audit.timer"]
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:/usr/lib/systemd/system"},
    )
    complaints = [line for line in said.stderr.splitlines() if "disthess-audit" in line or str(tmp_path) in line]
    assert complaints == []
    service = units["disthess-audit.service"]
    assert "Type=exec" in service
    assert "RuntimeMaxSec=86400" in service
    timer = units["disthess-audit.timer"]
    assert "OnCalendar=Mon,Tue,Wed,Thu,Fri *-*-* 03:00:00 Europe/Berlin" in timer
    assert "Persistent=true" in timer
    wrong = units["disthess-audit.service"].replace("RuntimeMaxSec=86400", "RuntimeMaxSec=soon")
    (tmp_path / "disthess-audit.service").write_text(wrong)
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "disthess-audit.service")],
        capture_output=True,
        text=True,
    )
    assert "soon" in said.stderr


def test_words_of_units_are_read_back_by_systemds_rules() -> None:
    def read(text: str) -> str:
        inner = text.removeprefix('"').removesuffix('"')
        return re.sub(r'\\(["\\])', r"\1", inner).replace("%%", "%")

    for word in (ODD, "a\\\\b", '"', "%", "", "%%h"):
        assert read(unit_word(word)) == word


@given(
    st.recursive(
        st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=2), inner, max_size=3),
        max_leaves=12,
    )
)
def test_yaml_reads_back_what_was_written(tree: Any) -> None:
    assert yaml.safe_load(yaml_text({"top": tree})) == {"top": tree}


@given(st.text(alphabet="a \n\t#:-|'\"\\\r\x85\u2028ü", max_size=30))
def test_texts_of_several_lines_keep_every_letter(text: str) -> None:
    tree = {"a": [{"b": text, "c": text}], "d": text}
    assert yaml.safe_load(yaml_text(tree)) == tree


def test_what_cannot_be_told_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no audit file"):
        make(tmp_path / "none.yaml")
    for name in ("Upper", "a" * 48, "-a", "a/b", "ü"):
        with pytest.raises(ConfigError, match="cannot name"):
            make(config, name=name)
    for fields in ({"image": "a\nb"}, {"address": " x"}, {"working_dir": "/a\x00"}, {"image": ""}):
        with pytest.raises(ConfigError, match="cannot be told"):
            make(config, **fields)
    (tmp_path / "a\nb.yaml").write_text("")
    with pytest.raises(ConfigError, match="cannot be told"):
        make(tmp_path / "a\nb.yaml")
    for duration in ("", "x", "0s", "-1", "2h30", "1.5h", "400d", "h", "9" * 9):
        if duration == "2h30":
            assert seconds_of(duration) == 7230
            continue
        with pytest.raises(ConfigError, match="duration"):
            seconds_of(duration)
    for odd in ("Ünï", "..", "a" * 99, "--"):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", default_name(Path(f"{odd}.yaml")))


def test_the_command_prints_one_thing_and_says_the_next_times(config: Path, tmp_path: Path) -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["schedule", str(config), "--cron", "0 3 * * *", *words])

    k8s = call("--emit", "k8s", "--deadline", "90m")
    assert k8s.exit_code == 0
    assert len(list(yaml.safe_load_all(k8s.stdout))) == 2
    assert "activeDeadlineSeconds: 5400" in k8s.stdout
    assert k8s.stderr.count("next: ") == 5
    assert k8s.stderr.count("03:00:00 UTC") == 5
    assert call("--emit", "systemd", "--out", str(tmp_path / "units")).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "units").iterdir()) == [
        "disthess-audit.service",
        "disthess-audit.timer",
    ]
    for words, said in {
        (): "give either --emit",
        ("--emit", "k8s", "--watch"): "give either --emit",
        ("--emit", "k8s", "--once"): "belong to --watch",
        ("--emit", "crontab", "--image", "x"): "--image belongs",
        ("--watch", "--out", "x"): "--out belongs",
        ("--emit", "k8s", "--timezone", "Mars"): "no time zone",
    }.items():
        refused = call(*words)
        assert refused.exit_code == 2, words
        assert said in refused.stderr
    assert json.dumps(refused.stderr).count("\\n") == 1
    config.write_text("problem: {factory: 'a:b'}\nhistry: x\n")
    misspelt = call("--emit", "k8s")
    assert (misspelt.exit_code, misspelt.stdout) == (2, "")
    assert "unknown key 'histry'" in misspelt.stderr


def test_the_options_that_are_given_to_the_audit_are_its_own(config: Path) -> None:
    pytest.importorskip("disthess.audits.run", reason="the verb audit is not here")
    audit: Any = get_command(app).commands["audit"]  # type: ignore[attr-defined]
    run = audit.commands["run"] if hasattr(audit, "commands") else audit
    known = {option for parameter in run.params for option in parameter.opts}
    entry = yaml.safe_load_all(ray_cron_job(make(config, address="auto")))
    words = [*make(config, address="auto").command("x"), *list(entry)[1]["spec"]["jobTemplate"]["entrypoint"].split()]
    assert {word for word in words if word.startswith("--")} <= known
