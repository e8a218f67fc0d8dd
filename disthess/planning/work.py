"""How much work a step is: multiply-adds as a function of tangents and samples, and a sweep's share of them."""

from __future__ import annotations

from dataclasses import dataclass

from disthess.types import Part


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds for K tangents on n samples: ``once + per_sample n + per_tangent K + per_pair K n``.

    >>> (Work(once=5, per_pair=2) + Work(per_tangent=1)).at(tangents=3, samples=10)
    68
    """

    once: int = 0
    per_sample: int = 0
    per_tangent: int = 0
    per_pair: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.once + other.once,
            self.per_sample + other.per_sample,
            self.per_tangent + other.per_tangent,
            self.per_pair + other.per_pair,
        )

    def at(self, tangents: int, samples: int) -> int:
        """Multiply-adds for so many tangents and samples."""
        return self.once + self.per_sample * samples + tangents * (self.per_tangent + self.per_pair * samples)


@dataclass(frozen=True, slots=True)
class SharedWork:
    """Multiply-adds on the own block of a source with several uses (output basis), per sample and output that it is computed for.

    Attributes:
        forward: Per tangent of a unit.
        back: Per tangent of an input, of the waves back from inputs.
        per_unit: Per unit, of what they are multiplied by.
    """

    forward: int = 0
    back: int = 0
    per_unit: int = 0

    def __add__(self, other: SharedWork) -> SharedWork:
        return SharedWork(self.forward + other.forward, self.back + other.back, self.per_unit + other.per_unit)


@dataclass(frozen=True, slots=True)
class ReverseWork:
    """Matrix products of one reverse wave, panel products included.

    Attributes:
        part: The part whose S it keeps.
        first: On a batch's first microbatch, which accounts for curvature shared by all samples.
        later: On the others.
        repeated: (entries, multiply-adds) of leaves whose rows are formed sample by sample: what is done anew for each
            sample and each group of units.
        own: Whether the source's own block is formed from its curvature (output basis): `cost` counts that.
        per_unit: Multiply-adds per unit, whatever its rows, and sample (output basis).
        back: Of waves back from all inputs of a source with several uses (output basis): once a tile.
        shared: What its own block takes where several uses add up in it.
    """

    part: Part
    first: Work
    later: Work
    repeated: tuple[tuple[int, int], ...] = ()
    own: bool = False
    per_unit: int = 0
    back: Work = Work()
    shared: SharedWork = SharedWork()

    def __add__(self, other: ReverseWork) -> ReverseWork:
        """Both, of the same part."""
        return ReverseWork(
            self.part,
            self.first + other.first,
            self.later + other.later,
            self.repeated + other.repeated,
            self.own or other.own,
            self.per_unit + other.per_unit,
            self.back + other.back,
            self.shared + other.shared,
        )


@dataclass(frozen=True, slots=True)
class SweepWork:
    """Matrix products of one sweep on one graph.

    Attributes:
        forward: Forward tangents.
        reverse: One wave per part.
        rows: Tangents per unit and sample (output basis; else 1): rows of one sample at the source's output, or places that they
            are pooled to.
        layer_rows: Rows of one sample at the source's output.
        apart: Rows of a sample that are taken for samples of their own, and that no other number here counts (output basis).
    """

    forward: Work
    reverse: tuple[ReverseWork, ...]
    rows: int = 1
    layer_rows: int = 1
    apart: int = 1

    def __add__(self, other: SweepWork) -> SweepWork:
        """One after the other, from uses of one source: of the same rows."""
        waves = tuple(mine + its for mine, its in zip(self.reverse, other.reverse, strict=True))
        return SweepWork(self.forward + other.forward, waves, self.rows, self.layer_rows, self.apart)
