"""One sample of a call, for rules without a closed per-sample form."""

from __future__ import annotations

from collections.abc import Mapping

from disthess.graph.batch import take_samples
from disthess.graph.ir import BatchAxis
from disthess.rules.base import Call, Stack
from disthess.sweep.frame import Frame
from disthess.types import Span


def one_sample(
    frame: Frame, index: int, sample: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
) -> tuple[Call, Stack | None, dict[int, Stack]]:
    """The node's call, cotangent and tangents on one sample of the frame (an axis of one sample stays)."""
    alone = frame.alone(sample).call(index)
    node = frame.node(index)
    refs = frame.slots(index)
    part = None if cotangent is None else _pick(cotangent, node.batch, sample, frame.samples)
    parts = {
        slot: _pick(stack, frame.node(refs[slot]).batch, sample, frame.samples) for slot, stack in tangents.items()
    }
    return alone, part, parts


def _pick(stack: Stack, axis: BatchAxis | None, sample: int, samples: int) -> Stack:
    if axis is None:
        return stack
    shifted = BatchAxis(axis.dim + 1, axis.outer, axis.inner)
    return take_samples(stack, shifted, Span(sample, sample + 1), samples)
