"""From a page's value to its text: one file, nothing from anywhere else, every given string escaped."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from disthess.errors import ConfigError
from disthess.reports.page import Page


def to_html(page: Page) -> str:
    """The whole text. The same page gives the same text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("disthess.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["drawn"] = Markup
    style = Markup((Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(page=page, style=style)


def write_page(text: str, out: str | os.PathLike[str]) -> Path:
    """Write it whole or not at all; its folder is made if need be.

    Raises:
        ConfigError: It cannot be written there.
    """
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n", errors="replace") as file:
                file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {path}: {error.strerror or error}. Name a file in a folder that can be written."
        ) from error
    return path
