"""Text for a terminal, of which another machine may have written a part."""


def printable(text: str) -> str:
    """Return *text* as one line that no terminal obeys: a blank for a tab or a line's end, ``?`` for what is worse."""
    return "".join(char if char.isprintable() else " " if char in "\t\r\n" else "?" for char in text)
