# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""A short document of a few kinds of block, as markdown and as one self-contained HTML page. Every text is escaped."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Heading:
    """The heading of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a strong one stands out."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """
    A table.

    Attributes:
        heading (`Sequence[str]`):
            Heading of each column.
        rows (`Sequence[Sequence[str]]`):
            The lines, as long as the heading; the first cell of each is its heading.
        kind (`str`, *optional*, defaults to `"words"`):
            `"numbers"` aligns the second and the third column right, `"hashes"` sets all but the first small.
    """

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: Literal["words", "numbers", "hashes"] = "words"


@dataclass(frozen=True)
class Picture:
    """
    A picture.

    Attributes:
        name (`str`):
            Its file, beside the markdown.
        png (`bytes`):
            Its content, for the HTML.
        alt (`str`):
            What it shows, in words.
    """

    name: str
    png: bytes
    alt: str


Block = Heading | Paragraph | Items | Table | Picture

# Black on white, told apart by size, weight and lines alone.
_STYLE = """\
@page { size: A4; margin: 10mm 12mm }
body { max-width: 186mm; margin: auto; font: 7.4pt/1.22 "Liberation Sans", Arial, Helvetica, sans-serif; color: #000;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 11pt; margin: 0 0 1mm }
h2 { font-size: 8.4pt; margin: 1.6mm 0 0.5mm }
p, ul { margin: 0.6mm 0 }
ul { padding-left: 4mm }
.strong { border: 0.4mm solid #000; padding: 1mm 1.6mm; font-size: 8pt; font-weight: bold }
table { width: 100%; border-collapse: collapse }
th, td { border-bottom: 0.15mm solid #888; padding: 0.2mm 1.2mm; text-align: left; vertical-align: top }
th { font-weight: normal }
thead th { border-bottom: 0.3mm solid #000; font-weight: bold }
.numbers th, .numbers td { overflow-wrap: break-word }
.numbers td { white-space: nowrap }
.numbers td:last-child { white-space: normal }
.numbers td:nth-child(2), .numbers td:nth-child(3), .numbers thead th:nth-child(2), .numbers thead th:nth-child(3) {
  text-align: right }
.words th, .hashes th { white-space: nowrap }
.hashes td { font: 5.4pt/1.4 "Liberation Mono", "Courier New", monospace }
img { display: block; width: 92%; margin: 1.2mm auto 0 }
h2, tr, img { break-inside: avoid }"""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """
    A document as markdown (GitHub's, for the tables).

    Args:
        title (`str`):
            Its title.
        blocks (`Sequence[Block]`):
            Its content.

    Returns:
        `str`:
            The text.
    """
    parts = [f"# {_escape_markdown(title)}\n", *(_block_to_markdown(block) for block in blocks)]
    return "\n".join(parts)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """
    A document as one HTML file with nothing outside it, laid out for A4.

    Args:
        title (`str`):
            Its title.
        blocks (`Sequence[Block]`):
            Its content.

    Returns:
        `str`:
            The text.
    """
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
        f"<h1>{html.escape(title)}</h1>",
        *(_block_to_html(block) for block in blocks),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def markdown_table(cells: Sequence[Sequence[str]], aligns: Sequence[Literal["<", ">"]]) -> str:
    """
    A markdown table that is also readable as plain text.

    Args:
        cells (`Sequence[Sequence[str]]`):
            The heading line and the other lines, all of one length.
        aligns (`Sequence[str]`):
            `"<"` (left) or `">"` (right) for each column.

    Returns:
        `str`:
            The table, ending in a newline.
    """
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]  # a rule of one colon is none
    lines = [
        " | ".join(f"{cell:{align}{width}}" for cell, align, width in zip(line, aligns, widths, strict=True))
        for line in cells
    ]
    rule = " | ".join(
        "-" * (width - 1) + (":" if align == ">" else "-") for align, width in zip(aligns, widths, strict=True)
    )
    return "".join(f"| {line} |\n" for line in [lines[0], rule, *lines[1:]])


def _block_to_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_escape_markdown(text)}\n"
        case Paragraph(text, strong):
            return f"**{_escape_markdown(text)}**\n" if strong else f"{_escape_markdown(text)}\n"
        case Items(texts):
            return "".join(f"- {_escape_markdown(text)}\n" for text in texts)
        case Table(heading, rows, kind):
            numbers = (1, 2) if kind == "numbers" else ()
            cells = [[_escape_markdown(cell) for cell in row] for row in (heading, *rows)]
            return markdown_table(cells, [">" if column in numbers else "<" for column in range(len(heading))])
        case Picture(name, _, alt):
            return f"![{_escape_markdown(alt)}]({name})\n"


def _block_to_html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text, strong):
            return f'<p class="strong">{html.escape(text)}</p>' if strong else f"<p>{html.escape(text)}</p>"
        case Items(texts):
            return "\n".join(["<ul>", *(f"<li>{html.escape(text)}</li>" for text in texts), "</ul>"])
        case Table(heading, rows, kind):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heading)
            body = [
                f'<tr><th scope="row">{html.escape(first)}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
                + "</tr>"
                for first, *others in rows
            ]
            lines = [f'<table class="{kind}">', f"<thead><tr>{head}</tr></thead>", "<tbody>", *body]
            return "\n".join([*lines, "</tbody>", "</table>"])
        case Picture(_, png, alt):
            data = base64.b64encode(png).decode("ascii")
            return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def _escape_markdown(text: str) -> str:
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)
