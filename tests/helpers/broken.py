"""Broken versions of the sources: a test is known to notice what it is for by going red on one."""

import re
from typing import NamedTuple

from helpers import ROOT


class Broken(NamedTuple):
    """What is broken, and what must then be said of it.

    `place` is code as it stands in the file, with «what is replaced» marked; nothing between the marks is a
    place to put something. How the file breaks its lines doesn't matter, and it must stand there once.
    """

    file: str
    place: str
    becomes: str
    red: str  # a regular expression

    def apply(self, name, root=ROOT):
        """The file's text, broken."""
        text = (root / self.file).read_text()
        before, cut, after = map(_pattern, re.split("[«»]", self.place))
        found = list(re.finditer(rf"{before}\s*({cut})\s*{after}", text))
        assert len(found) == 1, (
            f"{name}: {len(found)} places in {self.file} are `{self.place}`, it must be one. "
            "If the source has changed, so must the broken version."
        )
        begin, end = found[0].span(1)
        if not self.becomes:  # nor does the space after it stay, or a line might be indented
            return text[:begin] + text[end:].lstrip()
        return f"{text[:begin]} {self.becomes} {text[end:]}"


def _pattern(code):
    """A regular expression of the code's tokens, with any whitespace between them."""
    tokens = re.findall(r"(\w+)|([^\w\s])", code)
    return r"\s*".join(rf"\b{word}\b" if word else re.escape(mark) for word, mark in tokens)
