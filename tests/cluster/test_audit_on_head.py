"""An audit whose products a running Ray cluster takes: the same numbers as here, and the cluster lives on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from heads import ROOT, outside_environment, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = {
    "problem": {
        "factory": str(ROOT / "examples" / "digits_mlp.py") + ":problem",
        "arguments": {"hidden": 8, "steps": 0, "samples": 64},
    },
    "measure": {"metrics": ["loss", "gradient_norm", "lambda_max", "lambda_min", "trace"], "dtype": "float64"},
    "couplings": {"of": "modules", "probes": 8},
}


def audit(folder: Path, name: str, environment: dict[str, str], *options: str, **measure: Any) -> dict[str, float]:
    config = folder / f"{name}.yaml"
    history = {"history": str(folder / f"{name}.zarr")}
    config.write_text(yaml.safe_dump({**CONFIG, **history, "measure": {**CONFIG["measure"], **measure}}))
    command = [sys.executable, "-m", "disthess", "audit", str(config), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["audits"]
    return {f"{entry['metric']} {entry['block']}": entry["value"] for entry in record["estimates"]}


def test_an_audit_on_a_running_head_finds_what_one_here_does(tmp_path: Path) -> None:
    here = audit(tmp_path, "here", outside_environment())
    with ray_head() as head:
        options = ("--address", f"127.0.0.1:{head.port}")
        found = [
            audit(tmp_path, f"there{turn}", head.environment, *options, executor="ray", workers=2) for turn in (1, 2)
        ]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(here, rel=1e-9)
