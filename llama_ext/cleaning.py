"""Repairing documents, and leaving out repeated ones, repeated lines, and what is no text."""

import codecs
import hashlib
import re
from array import array

_LONGEST = 1 << 16  # characters: what a line is cut into when it is longer
_SURROGATES = re.compile("[\ud800-\udfff]")

INVALID = ("skip", "replace")
DEDUP = ("none", "documents", "lines")


class HashSet:
    """A set of 64-bit integers in 11 to 22 bytes each (a table with open addressing).

    That two of n different texts have the same hash, so that one is taken for the other, has a
    probability of n^2 / 2^65: one in 3,700 for a hundred million.
    """

    def __init__(self):
        self._table, self._count = array("Q", bytes(8 * 1024)), 0

    def __contains__(self, value):
        return self._table[self._slot(value)] != 0

    def add(self, value):
        slot = self._slot(value)
        if self._table[slot]:
            return
        self._table[slot] = value or 1  # 0 is an empty slot
        self._count += 1
        if 4 * self._count > 3 * len(self._table):
            old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
            for value in old:
                if value:
                    self._table[self._slot(value)] = value

    def _slot(self, value):
        """Where `value` is, or the empty slot where it belongs."""
        table, value = self._table, value or 1
        slot = value % len(table)
        while table[slot] and table[slot] != value:
            slot = (slot + 1) % len(table)
        return slot


class Cleaner:
    """Cleans documents in turn, and decides which are kept; what it decides depends on the
    documents before, and on their order with dedup="lines".

    fix_text: repair each line by ftfy.fix_text: mojibake, entities of HTML, control characters,
        ligatures, line ends, curly quotes; NFC.
    invalid: "skip" documents that are not UTF-8, or "replace" the invalid bytes by U+FFFD. One that
        holds a NUL byte is not text and is always skipped.
    dedup: "none"; "documents": skip one whose text an earlier one has; "lines": leave out lines
        that came before, in any document (but for white space around them; blank ones stay), and
        so also documents in which every line did.
    min_chars: skip shorter documents (as they are after the above); empty ones always are.

    Attributes, of what it has seen: skipped, {reason: documents}; cleaned, of documents that were
    kept: how many were repaired, lines removed, bytes removed with them.
    """

    def __init__(self, fix_text=False, invalid="skip", dedup="documents", min_chars=0):
        if invalid not in INVALID:
            raise ValueError(f"prepare: invalid must be one of {', '.join(INVALID)}, got "
                             f"{invalid!r}")
        if dedup not in DEDUP:
            raise ValueError(f"prepare: dedup must be one of {', '.join(DEDUP)}, got {dedup!r}")
        if min_chars < 0:
            raise ValueError(f"prepare: min_chars must be at least 0, got {min_chars}")
        self._fix = _load_ftfy() if fix_text else None
        self._repairs = fix_text or invalid == "replace"
        self._errors = "strict" if invalid == "skip" else "surrogateescape"
        self._dedup, self._min_chars = dedup, min_chars
        self._seen = HashSet()  # the texts of documents, or lines
        self.skipped = {"not_text": 0, "empty": 0, "duplicate": 0, "short": 0}
        self.cleaned = {"repaired_documents": 0, "removed_lines": 0, "removed_bytes": 0}

    @property
    def rewrites(self):
        """Whether a document that is kept can differ from what it was."""
        return self._repairs or self._dedup == "lines"

    def clean(self, blocks, write):
        """Clean the document that is these blocks of bytes; (bytes, sha256), or None to skip it.

        `write`, unless it is None, gets the text in blocks of bytes as they come, also of one that
        turns out to be skipped.
        """
        document = _Document(blocks)
        try:
            for text in self._cleaned(document):
                data = text.encode()
                document.size += len(data)
                document.chars += len(text)
                document.digest.update(data)
                if write:
                    write(data)
        except (UnicodeDecodeError, _NotText):
            reason = "not_text"
        else:
            reason = self._reason(document)
        if reason:
            self.skipped[reason] += 1
            return None
        for value in document.new:
            self._seen.add(value)
        self.cleaned["repaired_documents"] += document.repaired
        self.cleaned["removed_lines"] += document.removed_lines
        self.cleaned["removed_bytes"] += document.removed_bytes
        return document.size, document.digest.digest()

    def _reason(self, document):
        """Why a document that is text is skipped; None when it is not."""
        if document.removed_lines and not document.new:
            return "duplicate"  # nothing is left but blank lines
        if not document.size:
            return "empty"
        if document.chars < self._min_chars:
            return "short"
        if self._dedup == "documents":
            value = int.from_bytes(document.digest.digest()[:8], "little")
            if value in self._seen:
                return "duplicate"
            document.new.add(value)
        return None

    def _cleaned(self, document):
        texts = _decode(document.blocks, self._errors)
        if self.rewrites:
            texts = _lines(texts)
        if self._repairs:
            texts = self._repair(texts, document)
        if self._dedup == "lines":
            texts = self._without_repeats(texts, document)
        return texts

    def _repair(self, lines, document):
        for line in lines:
            fixed = _SURROGATES.sub("\ufffd", line)  # what _decode made of invalid bytes
            if self._fix:
                fixed = self._fix(fixed)
            document.repaired |= fixed != line
            yield fixed

    def _without_repeats(self, lines, document):
        for line in lines:
            if key := line.strip():
                digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
                value = int.from_bytes(digest, "little")
                if value in self._seen or value in document.new:
                    document.removed_lines += 1
                    document.removed_bytes += len(line.encode())
                    continue
                document.new.add(value)
            yield line


class _NotText(Exception):
    """A NUL byte in a document."""


class _Document:
    """What is known of a document while it is being cleaned."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.digest, self.size, self.chars = hashlib.sha256(), 0, 0
        self.repaired, self.removed_lines, self.removed_bytes = False, 0, 0
        self.new = set()  # hashes that are in no document before


def _load_ftfy():
    import ftfy

    return ftfy.fix_text


def _decode(blocks, errors):
    """The text of blocks of bytes; raises UnicodeDecodeError or _NotText."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for block in blocks:
        if b"\0" in block:
            raise _NotText
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _lines(texts):
    """The lines of a text that comes in parts, each with its end; long ones in pieces."""
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield from _pieces(line + "\n")
        *pieces, rest = _pieces(rest) or [""]
        yield from pieces
    yield rest


def _pieces(line):
    return [line[i:i + _LONGEST] for i in range(0, len(line), _LONGEST)]
