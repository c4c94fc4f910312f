"""Plain English prose from the markup of Wikipedia's articles."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import IO

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# What stands between these tags is no prose: notes, formulas, pictures, code.
_TAGGED = re.compile(
    r"<(ref|math|gallery|timeline|code|syntaxhighlight|source|pre|imagemap|score|table)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Innermost first: both may be nested, and are removed until nothing changes.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_PLAIN_LINK = re.compile(r"\[\[(?![A-Za-z-]+:)([^\[\]|]*)(?:\|([^\[\]]*))?\]\]")
_OTHER_LINK = re.compile(r"\[\[[^\[\]]*\]\]")
_OUTER_LINK = re.compile(r"\[(?:https?:|//)\S+\s*([^\]]*)\]")
_QUOTES = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$")
_MARKS = "*#:;"
# From here on an article lists sources and links.
_LAST_PARTS = {"references", "external links", "see also", "further reading", "notes", "bibliography", "sources"}
_REDIRECT = re.compile(r"\s*#redirect", re.IGNORECASE)


def articles(dump: IO[bytes]) -> Iterator[str]:
    """The text of each article of an XML dump, in its order; redirects and other pages are left out."""
    name_space = text = ""
    for _, element in ElementTree.iterparse(dump):
        tag = element.tag.rpartition("}")[2]
        if tag == "ns":
            name_space = element.text or ""
        elif tag == "text":
            text = element.text or ""
        elif tag == "page":
            if name_space == "0" and not _REDIRECT.match(text):
                yield prose(text)
            element.clear()


def prose(markup: str) -> str:
    """Paragraphs of an article, a line each; headings, lists, tables, notes and links to sources are left out."""
    text = _COMMENT.sub("", markup)
    text = _TAGGED.sub("", text)
    for pattern in (_TEMPLATE, _TABLE):
        text = _until_settled(pattern, "", text)
    # A caption of a picture may have links in it: plain ones become text first.
    before = None
    while before != text:
        before = text
        text = _PLAIN_LINK.sub(lambda match: match[2] if match[2] is not None else match[1], text)
        text = _OTHER_LINK.sub("", text)
    text = _OUTER_LINK.sub(r"\1", text)
    text = _QUOTES.sub("", _TAG.sub("", text))
    text = html.unescape(text).replace("\xa0", " ")
    lines = []
    for line in text.split("\n"):
        heading = _HEADING.match(line)
        if heading is not None:
            if heading[1].strip().lower() in _LAST_PARTS:
                break
            continue
        plain = " ".join(line.split())
        if plain and plain[0] not in _MARKS and _is_prose(plain):
            lines.append(plain)
    return "\n".join(lines)


def _is_prose(line: str) -> bool:
    # What is left of a broken table or template has other marks, or no end of a sentence.
    return len(line) >= 40 and not set("{}|[]") & set(line) and line.rstrip("\"')")[-1:] in {".", "!", "?", ":"}


def _until_settled(pattern: re.Pattern[str], by: str, text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn(by, text)
    return text
