"""HTML and SVG as strings that escape whatever is not markup already: a policy's reason can be anything. Pure."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias


class Markup(str):
    """Text that is HTML; made by `tag` and `joined` only."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | None"
_VOID = frozenset({"meta", "br", "hr", "line", "path", "rect", "circle", "polyline", "polygon", "use", "col"})


def text(value: str) -> Markup:
    """Any text as HTML shows it: escaped, without characters that HTML does not allow; line breaks stay."""
    return Markup(escape("".join(c if c.isprintable() or c == "\n" else "�" for c in value)))


def tag(element: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Attribute names: ``class_`` for class, ``_`` for ``-``; None and False are left out."""
    words = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        words.append(plain if value is True else f'{plain}="{text(_number(value))}"')
    start = " ".join(words)
    if element in _VOID and not children:
        return Markup(f"<{start}/>")
    return Markup(f"<{start}>{joined(children)}</{element}>")


def joined(children: Iterable[Child]) -> Markup:
    """Several children, one after the other; text is escaped."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children if c is not None))


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Child]], *, caption: str, ids: Sequence[str] = (), class_: str = ""
) -> Markup:
    """A table whose first column heads its row; columns of figures are set right. ``ids``: one for each row."""
    numeric = [all(_is_figure(row[i]) for row in rows) for i in range(len(heads))]
    kinds = ["num" if each else None for each in numeric]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in zip(heads, kinds, strict=True)))
    body = []
    for number, row in enumerate(rows):
        first = tag("th", row[0], scope="row", class_=kinds[0])
        rest = (
            tag("td", cell, class_=kind, data_head=name)
            for cell, kind, name in zip(row[1:], kinds[1:], heads[1:], strict=True)
        )
        body.append(tag("tr", first, *rest, id=ids[number] if ids else None))
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_=class_ or None)
    # Scrolls by itself on a narrow screen, also for those who use the keyboard.
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def folded(summary: str, *children: Child) -> Markup:
    """Something to unfold."""
    return tag("details", tag("summary", summary), *children)


def _is_figure(cell: Child) -> bool:
    plain = (cell or "").strip().removesuffix("%").replace(",", "").replace("–", "0")
    return not plain or plain.lstrip("+-").replace(".", "").replace("e+", "").replace("e-", "").isdigit()


def _number(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
