"""Small pieces of HTML. Whatever text comes in is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;
max-width:1120px;padding:24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:36px 0 8px;border-top:1px solid #ddd;
padding-top:18px}h3{font-size:16px;margin:22px 0 6px}
p{margin:6px 0;max-width:86ch}.muted{color:#5a5a5a;font-size:13px}
.card{border:1px solid #ddd;border-left:8px solid #888;border-radius:4px;padding:12px 16px;
margin:14px 0}.good{border-left-color:#2e7d32}.bad{border-left-color:#c62828}
.unsure{border-left-color:#f9a825}.card h3{margin:0 0 4px}.card ul{margin:6px 0 0;padding-left:20px}
.claim{font-size:18px;font-weight:600;margin:2px 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:560px;margin:8px 0;font-size:13px}
caption{text-align:left;font-size:13px;color:#5a5a5a;padding-bottom:4px}
th,td{padding:3px 10px;border-bottom:1px solid #e4e4e4;text-align:right;vertical-align:top}
th{font-weight:600;background:#f6f6f6}th:first-child,td:first-child{text-align:left}
td{white-space:nowrap}td.text{text-align:left;white-space:normal}
tr.reference td{color:#5a5a5a;font-style:italic}
img{max-width:100%;height:auto}.strip{display:flex;flex-wrap:wrap;gap:6px;margin:4px 0 10px}
.strip figure{margin:0}.strip figcaption{font-size:12px;color:#5a5a5a}
nav a{margin-right:14px;font-size:13px}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document that needs nothing from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # an empty icon: browsers would ask a server for one otherwise
        '<link rel="icon" href="data:,">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, anchor: str) -> str:
    return f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'


def subheading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, style: str = "") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if style else f"<p>{escape(text)}</p>"


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    text_columns: Sequence[int] = (0,),
    references: Sequence[str] = (),
) -> str:
    """A table.

    Args:
        caption: above it.
        columns: headings.
        rows: cells.
        text_columns: those that are not numbers.
        references: first cells of the rows that others are compared with.
    """
    cells = []
    for row in rows:
        style = ' class="reference"' if row[0] in references else ""
        line = "".join(
            f'<td class="text">{escape(cell)}</td>' if k in text_columns
            else f"<td>{escape(cell)}</td>"
            for k, cell in enumerate(row)
        )  # fmt: skip
        cells.append(f"<tr{style}>{line}</tr>")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
    )


def picture(data: str, alt: str, kind: str = "png") -> str:
    """A picture in base64."""
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'


def strip(images: Sequence[tuple[str, str]]) -> str:
    """Small JPEGs in a row, (caption, base64) each."""
    figures = "".join(
        f"<figure>{picture(data, caption, 'jpeg')}<figcaption>{escape(caption)}</figcaption>"
        "</figure>"
        for caption, data in images
    )
    return f'<div class="strip">{figures}</div>'


def card(grade: str, title: str, claim: str, details: Iterable[str]) -> str:
    """A verdict; `grade` is one of its colours."""
    items = "".join(f"<li>{escape(detail)}</li>" for detail in details)
    return (
        f'<section class="card {grade}"><h3>{escape(title)}</h3>'
        f'<p class="claim">{escape(claim)}</p><ul>{items}</ul></section>'
    )
