"""Text from outside, made fit for the place where it is shown.

Whatever a stranger may have written: names of files, pictures, classes, tensors, repositories and
branches, keys and values of configuration files, messages of servers. None of it may act where it
is shown: as a control sequence of a terminal, or as markup of Markdown. In a page of HTML, whose
template escapes markup, `visible` is what remains to be done.
"""

import json
import re
from urllib.parse import quote

# characters of a line on a terminal, and of a cell of a table there
LONGEST_LINE, LONGEST_CELL = 1000, 200


def visible(text: str, longest: int = LONGEST_LINE) -> str:
    r"""A text as one line in which every character shows, and none acts.

    Control, escape, bidirectional and other invisible characters, line breaks and halves of
    characters are written as Python writes them: ``\x1b``, ``\n``, ``\u202e``, ``\ud800``.

    Args:
        text: from wherever.
        longest: characters that are shown; of a longer text, its beginning and its end are.
    """
    shown = text
    if not text.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) <= longest:
        return shown
    end = longest // 4
    return f"{shown[: longest - end - 5]} ... {shown[-end:]}"


def json_text(content: object, *, only_ascii: bool = False) -> str:
    """JSON that says all of it, in characters that show; two spaces, keys as given.

    What `visible` makes visible is escaped as JSON escapes it, so that readers get it back.

    Args:
        content: what is to be said.
        only_ascii: whether everything beyond ASCII is escaped too.
    """
    text = json.dumps(content, indent=2, ensure_ascii=only_ascii)
    return re.sub(
        r"[^ -~\n]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text
    )


class Markdown(str):
    """Text that is Markdown already: our own, or what came from outside made harmless."""

    __slots__ = ()


def prose(text: str) -> Markdown:
    """A text for a sentence or a table of Markdown, where it shows as it is written."""
    shown = _ACTIVE.sub(r"\\\g<0>", visible(text))
    return Markdown(_FIRST.sub(r"\1\\\2", shown))


# What means something within a line of Markdown, or would become a link of itself; _ between
# letters means nothing. GitHub Flavored Markdown, https://github.github.com/gfm/
_ACTIVE = re.compile(
    r"[\\`*\[\]<>|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE
)

# what means something at a line's beginning: headings and items of lists
_FIRST = re.compile(r"^(\s*|\s*\d+)([-+#=](?<!\d.)|(?<=\d)[.)])")


def code(text: str) -> Markdown:
    r"""A text as a code span of Markdown, in a sentence or a table; none for an empty one.

    Backticks and bars, which would end the span or the cell, are written as `visible` writes what
    it makes visible: ``\x60``, ``\x7c``.
    """
    shown = _without_comments(text).replace("`", r"\x60").replace("|", r"\x7c")
    return Markdown(f"`{shown}`" if shown.strip() else "")


def fenced(text: str) -> Markdown:
    """A text of one line as a block of code, whatever backticks it has."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return Markdown(f"{fence}\n{_without_comments(text)}\n{fence}")


def _without_comments(text: str) -> str:
    """A visible text in which no comment begins: a comment marks our part of a card."""
    return visible(text).replace("<!--", r"\x3c!--")


def link(text: str, address: str) -> Markdown:
    """A link of Markdown; no link, but the text, where the address is none of the web."""
    if not re.match("https?://", address):
        return prose(text)
    return Markdown(f"[{prose(text)}]({quote(address, ':/?#@%&=+,;~', errors='replace')})")
