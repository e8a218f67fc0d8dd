"""The command line is a promise: verbs and options change only on purpose, here and in the README."""

from __future__ import annotations

import typer.main

from disthess.cli.main import app

RUN = {"config", "--store", "--executor", "--workers", "--threads"}
PROMISED = {
    "plan": {*RUN, "--json"},
    "run": {*RUN, "--address"},
    "info": {"store", "--pairs", "--of", "--metric", "--part", "--top", "--csv", "--plot", "--json"},
    "block": {"store", "a", "b", "--part", "--out", "--use"},
    "activations": {"store", "v", "w", "--part", "--per-sample", "--out"},
    "curvature": {"config", "--top", "--plot", "--json"},
    "spectrum": {"store", "--top", "--density", "--plot", "--part", "--seed", "--json"},
    "lowrank": {"store", "--rank", "--method", "--out", "--part", "--seed", "--json"},
    "compare": {"config", "--rank", "--folder", "--threads", "--plot", "--json"},
    "kronecker": {"store", "layers", "--config", "--part", "--out", "--json"},
    "stopping": {"config", "--store", "--tolerance", "--json"},
    "verify": {"store", "--repair", "--config", "--json"},
}


def names(command: object) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name not in ("--help", "-h")}


def test_verbs_and_options_are_those_promised() -> None:
    root = typer.main.get_command(app)
    assert names(root) == {"--version", "--debug"}
    assert {verb: names(command) for verb, command in root.commands.items()} == PROMISED


def test_every_verb_and_option_says_what_it_does() -> None:
    root = typer.main.get_command(app)
    for verb, command in root.commands.items():
        assert command.help, verb
        assert "xample" in command.epilog, verb
        for parameter in command.params:
            assert parameter.help, (verb, parameter.name)
