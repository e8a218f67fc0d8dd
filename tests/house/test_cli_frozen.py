"""The command line is a promise: verbs and options change only on purpose, here and in the README."""

from __future__ import annotations

import typer.main

from disthess.cli.main import app

RUN = {"config", "--store", "--executor", "--workers", "--threads"}
PROMISED = {
    "plan": {*RUN, "--device", "--tflops", "--json"},
    "run": {*RUN, "--address"},
    "info": {"store", "--pairs", "--of", "--metric", "--part", "--top", "--csv", "--plot", "--json"},
    "block": {"store", "a", "b", "--part", "--out", "--use", "--rows", "--cols", "--compute", "--config"},
    "activations": {"store", "v", "w", "--part", "--per-sample", "--out"},
    "curvature": {"config", "--top", "--plot", "--json"},
    "spectrum": {"store", "--top", "--density", "--plot", "--part", "--seed", "--json"},
    "lowrank": {"store", "--rank", "--method", "--out", "--part", "--seed", "--json"},
    "compare": {"config", "--rank", "--folder", "--threads", "--plot", "--json"},
    "kronecker": {"store", "layers", "--config", "--part", "--out", "--json"},
    "couplings": {"config", "--of", "--probes", "--top", "--csv", "--plot", "--seed", "--json"},
    "diff": {"a", "b", "--csv", "--json"},
    "schedule": {
        *("config", "--cron", "--emit", "--watch", "--state", "--once", "--name", "--image", "--address"),
        *("--working-dir", "--timezone", "--deadline", "--out"),
    },
    "stopping": {"config", "--store", "--tolerance", "--json"},
    "report": {"path", "--out", "--title", "--top", "--seconds"},
    "verify": {"store", "--repair", "--config", "--json"},
    "submit": {
        *("config", "--address", "--working-dir", "--no-upload", "--store", "--workers", "--threads"),
        *("--env", "--python", "--submission-id", "--wait-seconds", "--no-follow"),
    },
    "audit run": {"config", "--history", "--force", "--address", "--json"},
    "audit history": {"path", "--metric", "--block", "--csv", "--plot", "--json"},
    "job status": {"name", "--address", "--json"},
    "job logs": {"name", "--address", "--follow"},
    "job stop": {"name", "--address", "--no-wait"},
}


def names(command: object) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name not in ("--help", "-h")}


def verbs(group: object, before: str = "") -> dict[str, object]:
    """Every command by its words, those of groups among them."""
    found: dict[str, object] = {}
    for word, command in group.commands.items():
        inner = verbs(command, f"{before}{word} ") if hasattr(command, "commands") else {f"{before}{word}": command}
        found.update(inner)
    return found


def test_verbs_and_options_are_those_promised() -> None:
    root = typer.main.get_command(app)
    assert names(root) == {"--version", "--debug"}
    assert {verb: names(command) for verb, command in verbs(root).items()} == PROMISED


def test_every_verb_and_option_says_what_it_does() -> None:
    root = typer.main.get_command(app)
    for verb, command in verbs(root).items():
        assert command.help, verb
        assert "xample" in command.epilog, verb
        for parameter in command.params:
            assert parameter.help, (verb, parameter.name)
