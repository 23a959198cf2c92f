"""Text from outside, made fit for the place where it is shown.

Whatever a stranger may have written: names of files, pictures, classes, tensors, repositories and
branches, keys and values of configuration files, messages of servers. None of it may act where it
is shown: as a control sequence of a terminal, or as markup of Markdown.
"""

import json
import re

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
