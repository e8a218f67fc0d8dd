"""A page as a value: sections of numbers, tables, pictures and sentences. What it looks like is the template's matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

Tone = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of a table or list.

    Attributes:
        text: As people read it; escaped by the template.
        value: The number behind it at full precision, where there is one.
        link: Name of a place on the page, or nothing.
        note: Small print behind it.
        tone: ``bad`` stands out.
        title: The whole of what ``text`` shortens.
    """

    text: str
    value: float | None = None
    link: str = ""
    note: str = ""
    tone: Tone = "plain"
    title: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """One column; ``numeric`` ones are set flush right."""

    title: str
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A table in a box of its own; the first column names the rows.

    Attributes:
        name: Of the place.
        caption: What it shows.
        columns: Their heads.
        rows: One cell per column each.
        note: Under it: what was left out, say.
        tall: Whether it scrolls in its box on a screen.
        places: Names of the rows, to link to; none, or one each.
    """

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    tall: bool = False
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """The numbers that matter, in large type."""

    kind: ClassVar[str] = "figures"
    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing.

    Attributes:
        svg: The element, with a name and a description; trusted.
        caption: Under it.
        narrow: The same for narrow screens, if that is another.
        title: Above it.
    """

    svg: str
    caption: str
    narrow: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Pictures:
    """Drawings, side by side where there is room."""

    kind: ClassVar[str] = "pictures"
    rows: tuple[Picture, ...]
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing explained: a place to link to."""

    name: str
    title: str
    rows: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True, slots=True)
class Entries:
    """Several of them."""

    kind: ClassVar[str] = "entries"
    rows: tuple[Entry, ...]


Part: TypeAlias = Table | Facts | Figures | Text | Pictures | Entries


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading and a name to link to."""

    name: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to know first.

    Attributes:
        tone: How good it is.
        title: In a few words.
        text: In a sentence or two.
        items: More of them, each with where it is on the page, or nothing.
    """

    tone: Tone
    title: str
    text: str
    items: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """All of it."""

    title: str
    about: str
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]
    footer: str
