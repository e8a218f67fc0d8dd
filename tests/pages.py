"""What a page of a report holds, read by the standard library's parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, name: str = "") -> list[Element]:
        """Elements of that tag (and class) below this one."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (not name or name in child.attributes.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, name)
        return found

    def everything(self) -> list[Element]:
        inner = [child for child in self.children if isinstance(child, Element)]
        return inner + [element for child in inner for element in child.everything()]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse(text: str) -> Element:
    """The page; every element must be closed where it was opened."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    assert len(builder._open) == 1, [element.tag for element in builder._open]
    return builder.root


def number_of(page: Element, term: str) -> float:
    """The number at full precision behind a term of a list."""
    for division in page.all("div"):
        terms = division.all("dt")
        if len(terms) == 1 and terms[0].text == term:
            return float(division.all("data")[0].attributes["value"])
    raise AssertionError(f"no number for {term}")


def rows_of(page: Element, name: str) -> list[list[str]]:
    """Texts of a table's body."""
    table = next(element for element in page.all("table") if element.attributes.get("id") == name)
    body = table.all("tbody")[0]
    return [
        [" ".join(cell.text.split()) for cell in row.children if isinstance(cell, Element)] for row in body.all("tr")
    ]


def check_page(text: str) -> Element:
    """The page, which is one file, well-formed, and can be read without seeing it."""
    page = parse(text)
    assert text.startswith("<!doctype html>")
    assert page.all("html")[0].attributes["lang"] == "en"
    assert page.all("title")[0].text.strip()
    assert [len(page.all(tag)) for tag in ("header", "main", "h1", "nav", "footer")] == [1] * 5
    places = [e.attributes["id"] for e in page.everything() if "id" in e.attributes]
    assert len(places) == len(set(places)), sorted({place for place in places if places.count(place) > 1})
    for element in page.everything():
        assert element.tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,", "data:,")), (element.tag, name, value[:80])
                assert not value.startswith("#") or value[1:] in places, value
            if name in ("aria-labelledby", "aria-describedby"):
                assert set(value.split()) <= set(places), value
    for style in page.all("style"):
        assert "@import" not in style.text
        assert "url(" not in style.text
    for svg in page.all("svg"):
        assert svg.attributes["role"] == "img"
        title, description = svg.all("title")[0].text, svg.all("desc")[0].text
        assert title.strip() and any(c.isdigit() for c in description), (title, description)  # noqa: PT018
    for table in page.all("table"):
        assert table.all("caption")[0].text.strip()
        heads = table.all("thead")[0].all("th")
        assert heads and all(head.attributes["scope"] == "col" for head in heads)  # noqa: PT018
        for row in table.all("tbody")[0].all("tr"):
            cells = [child for child in row.children if isinstance(child, Element)]
            assert len(cells) == len(heads)
            assert (cells[0].tag, cells[0].attributes["scope"]) == ("th", "row")
    for section in page.all("section"):
        assert section.all("h2")
    return page
