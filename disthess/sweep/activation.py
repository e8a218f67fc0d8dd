"""Activation blocks ``H^f``: unit vectors of one node's output, and what the reverse wave brings to other nodes.

With ``f_v = g_v(...) + eps_v`` at every node, the block of v and w for one sample n is ``d2 L / d eps_v^n d eps_w^n`` (the
perturbation semantics: symmetric, and independent of the order in which nodes are taken). The same unit vector starts at
every sample at once, since independent samples do not see each other; the sum over samples is the mean of the per-sample
blocks of a mean loss, whose ``1/N`` is in delta. Where samples are coupled the whole batch is one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from typing_extensions import override

from disthess.errors import GraphError
from disthess.graph.batch import rows_by_sample, rows_from_sample
from disthess.graph.ir import Graph
from disthess.rules.base import Stack
from disthess.store.layout import PanelSpec
from disthess.sweep.buffers import AbstractWindow, Block
from disthess.sweep.frame import Frame
from disthess.sweep.wave import AbstractSink
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of one microbatch go.

    Attributes:
        samples: Samples that rows are kept for, entry-major; 0 where they are summed.
        first: Number of the microbatch's first sample among them.
    """

    samples: int
    first: int


@final
class ActivationSink(AbstractSink):
    """Adds what arrives at asked nodes to a window, summed over samples or apart.

    Args:
        targets: Node name by index.
        window: Where rows add up, by node name.
        place: Where in it.
    """

    def __init__(self, targets: Mapping[int, str], window: AbstractWindow, place: Place) -> None:
        self._targets = targets
        self._window = window
        self._place = place

    @property
    @override
    def per_sample(self) -> bool:
        return False

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        raise GraphError("an activation sweep ran into a parameter; this is a planning fault.")

    @override
    def see(self, frame: Frame, index: int, cotangent: Stack) -> None:
        name = self._targets.get(index)
        if name is None:
            return
        rows = rows_by_sample(cotangent, frame.node(index).batch, frame.samples, lead=1, tail=0)
        count, samples, entries = rows.shape
        block, place = self._window.take(Block(name, entries)), self._place
        if not place.samples:
            block += rows.sum(1)
            return
        apart = block.view(count, place.samples, entries)
        apart[:, place.first : place.first + samples] += rows


def activation_targets(graph: Graph, panel: PanelSpec) -> tuple[int, dict[int, str]]:
    """Index of the panel's source node, and the names of its targets by index."""
    wanted = {name for name, _ in panel.targets}
    found = {node.index: node.name for node in graph.nodes if node.asked and node.name in wanted}
    return next(index for index, name in found.items() if name == panel.source), found


def unit_activations(frame: Frame, index: int, block: Span) -> Stack:
    """Unit vectors ``block`` of one sample's value, at every sample at once: ``[K, *value]``."""
    value, node = frame.value(index), frame.node(index)
    samples = 1 if node.batch is None else frame.samples
    seed = value.new_zeros(block.size, samples, value.numel() // samples)
    seed[torch.arange(block.size), :, torch.arange(block.start, block.stop)] = 1
    return rows_from_sample(seed, tuple(value.shape), node.batch, samples)
