"""Numbers as people write them on a command line: 4M, 1.4T, 312T."""

import argparse
from decimal import Decimal, InvalidOperation

_POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}


def tokens(text):
    """A batch's tokens, an int: k, M, G, T are powers of 1024, so that the paper's "4M" is 2,048
    sequences of 2,048 tokens. Raises argparse.ArgumentTypeError for anything else."""
    return _whole(text, 1024)


def count(text):
    """A count, an int: k, M, G, T are powers of 1000. Raises as tokens() does."""
    return _whole(text, 1000)


def rate(text):
    """A float, with the suffixes of count(). Raises as tokens() does."""
    return float(_parse(text, 1000))


def _whole(text, base):
    value = _parse(text, base)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(value)


def _parse(text, base):
    number, suffix = (text[:-1], text[-1]) if text[-1:] in tuple("kMGT") else (text, "")
    try:
        value = Decimal(number) * base ** _POWERS[suffix]  # exact, as 1.1T is not in binary
        if value.is_finite():
            return value
    except InvalidOperation:
        pass
    raise argparse.ArgumentTypeError("expected a finite number, with k, M, G or T behind it or "
                                     f"not, got {text!r}")
