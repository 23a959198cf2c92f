"""Text from outside, made safe for the place where it is shown.

Strangers may have written names of files, pictures, classes, tensors, repositories and branches,
keys and values of configuration files, and messages of servers. Such text must have no effect where
it is shown, neither as a control sequence in a terminal nor as markup in Markdown. The template of
HTML pages escapes markup itself, so text for them needs only `visible`.
"""

import json
import re
from urllib.parse import quote

# limits for a line on a terminal, and for a cell of a table there, in characters
LONGEST_LINE, LONGEST_CELL = 1000, 200


def visible(text: str, longest: int = LONGEST_LINE) -> str:
    r"""A text as one line in which every character is visible, and none has an effect.

    Control, escape, bidirectional and other invisible characters, line breaks and halves of
    characters are written as Python writes them: ``\x1b``, ``\n``, ``\u202e``, ``\ud800``.

    Args:
        text: from any source.
        longest: number of characters that are shown; a longer text is shown without its middle.
    """
    shown = text
    if not text.isprintable():
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) <= longest:
        return shown
    end = longest // 4
    return f"{shown[: longest - end - 5]} ... {shown[-end:]}"


def first_line(error: BaseException) -> str:
    """The first line of a library's message, visible; the error's kind if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return visible(lines[0].rstrip(".") if lines else type(error).__name__)


def json_text(content: object, *, only_ascii: bool = False) -> str:
    """Complete JSON in visible characters, indented by two spaces, keys in the given order.

    Characters that `visible` would change are escaped as JSON escapes them, so that a parser
    returns the original text.

    Args:
        content: the value to write.
        only_ascii: whether all characters beyond ASCII are escaped too.
    """
    text = json.dumps(content, indent=2, ensure_ascii=only_ascii)
    return re.sub(
        r"[^ -~\n]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text
    )


class Markdown(str):
    """Text that is safe as Markdown: our own, or text from outside that was escaped."""

    __slots__ = ()


def prose(text: str) -> Markdown:
    """Escapes a text for a sentence or a table of Markdown, so that it is shown literally."""
    shown = _ACTIVE.sub(r"\\\g<0>", visible(text))
    return Markdown(_FIRST.sub(r"\1\\\2", shown))


# Characters with a meaning within a line of Markdown, or that turn an address into a link; _ has
# none between letters. GitHub Flavored Markdown, https://github.github.com/gfm/
_ACTIVE = re.compile(
    r"[\\`*\[\]<>|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE
)

# characters with a meaning at the beginning of a line: for headings and items of lists
_FIRST = re.compile(r"^(\s*|\s*\d+)([-+#=](?<!\d.)|(?<=\d)[.)])")


def code(text: str) -> Markdown:
    r"""A text as a code span of Markdown, in a sentence or a table; empty for an empty text.

    Backticks and bars, which would end the span or the cell, are written in the same way as
    `visible` writes other characters: ``\x60``, ``\x7c``.
    """
    shown = _without_comments(text).replace("`", r"\x60").replace("|", r"\x7c")
    return Markdown(f"`{shown}`" if shown.strip() else "")


def fenced(text: str) -> Markdown:
    """A text as a block of code with one line, which may contain any backticks."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return Markdown(f"{fence}\n{_without_comments(text)}\n{fence}")


def _without_comments(text: str) -> str:
    """A visible text without the beginning of a comment, as comments mark our part of a card."""
    return visible(text).replace("<!--", r"\x3c!--")


def link(text: str, address: str) -> Markdown:
    """A link of Markdown; only the text if the address does not begin with http:// or https://."""
    if not re.match("https?://", address):
        return prose(text)
    return Markdown(f"[{prose(text)}]({quote(address, ':/?#@%&=+,;~', errors='replace')})")
