"""A mixture of data sets, each with its share of the tokens, as in table 1 of the LLaMA paper
(arXiv 2302.13971).

The sources take turns in a fixed order, which repeats once every share comes out as a whole number
of windows (the paper's shares: after 200). In it, window c of a source with share p comes no sooner
than window floor(c / p) of the mixture and before window ceil((c + 1) / p), the earliest deadline
first: after any number n of windows, each source has had n p of them to less than one (the
"Pfair" schedule; Baruah, Cohen, Plaxton and Varvel 1996). So the source of any window, and which of
its windows it is, is known without those before it. Dimensions: B batch size, T seq_len.
"""

import decimal
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path

from .data import Loader, TokenLoader, load_meta
from .errors import LlamaExtError

_DECIMALS = 6  # of a share at most, so that the order repeats after 10^6 windows at most


@dataclass(frozen=True)
class Source:
    """A data set of a mixture: `share` (a Fraction) of the tokens come from `folder`."""
    name: str
    folder: Path
    share: Fraction
    meta: dict  # of the folder's meta.json


def load_mixture(path):
    """The sources (list of Source) of a mixture, a JSON file:

        {"sources": {"C4": {"path": "c4", "share": 0.25}, "books": {"path": "b", "share": 0.75}}}

    path: of a folder that `prepare` wrote, relative to the JSON file's own; share: of the tokens,
    above 0, at most six decimals, all of them together 1. `llama_ext/mixtures/llama.json` has the
    LLaMA paper's. Raises LlamaExtError for a file that is none of these, a folder that is no
    complete data set, and sources of different tokenizers.
    """
    def fail(what):
        raise LlamaExtError(f"{path}: {what}") from None

    def no_repeats(pairs):
        if repeated := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
            fail(f"expected every name once, got {repeated[0]!r} twice")
        return dict(pairs)

    try:
        config = json.loads(Path(path).read_bytes(), parse_float=decimal.Decimal,
                            parse_int=decimal.Decimal, object_pairs_hook=no_repeats)
    except OSError as e:
        fail(f"cannot read the mixture: {e.strerror}")
    except ValueError as e:
        fail(f"expected a mixture in JSON: {e}")
    _expect_fields(fail, "mixture", config, {"sources"})
    if not isinstance(config["sources"], dict) or not config["sources"]:
        fail(f"sources: expected one object per source, got {config['sources']!r}")
    sources = []
    for name, entry in config["sources"].items():
        _expect_fields(fail, name, entry, {"path", "share"})
        share = entry["share"]
        if not isinstance(entry["path"], str):
            fail(f"{name}: path: expected the path of a folder, got {entry['path']!r}")
        if not isinstance(share, decimal.Decimal) or not 0 < share <= 1:
            fail(f"{name}: share: expected a number above 0 and at most 1, got {share}")
        if share.as_tuple().exponent < -_DECIMALS:
            fail(f"{name}: share: expected at most {_DECIMALS} decimals, got {share}")
        sources.append((name, Path(path).parent / entry["path"], Fraction(share)))
    if (total := sum(share for _, _, share in sources)) != 1:
        fail(f"expected shares that sum to 1, got {float(total)}")
    sources = [Source(*source, load_meta(source[1])) for source in sources]
    tokenizers = [source.meta["files"]["tokenizer.model"]["sha256"] for source in sources]
    for source, tokenizer in zip(sources, tokenizers):
        if tokenizer != tokenizers[0]:
            fail(f"expected one tokenizer in all sources, got {tokenizers[0][:12]}... in "
                 f"{sources[0].name} and {tokenizer[:12]}... in {source.name}; prepare every "
                 "source with the same --tokenizer")
    return sources


def _expect_fields(fail, name, entry, fields):
    if not isinstance(entry, dict) or entry.keys() != fields:
        got = sorted(entry) if isinstance(entry, dict) else entry
        fail(f"{name}: expected an object with {' and '.join(sorted(fields))}, got {got}")


class MixtureLoader(Loader):
    """A TokenLoader's iterator over a mixture: windows of every source, by shares of the tokens.

    Every source's windows come in the order of its own TokenLoader, epoch after epoch, and the
    sources take turns as the module says: after n windows of the mixture, each has given its share
    of n to less than one window. Ranks, batches and saved positions are as in TokenLoader.

    path: of a JSON file; see load_mixture. Raises LlamaExtError as load_mixture does, and for a
    source whose split is too short: a window for "train", two tokens for "val".
    Attributes: those of a TokenLoader that concern all sources (fingerprint, vocab_size,
    tokenizer_path, text_paths, num_bytes, num_tokens, num_targets), and loaders ({name:
    TokenLoader}).
    """

    def __init__(self, path, split="train", batch_size=8, seq_len=256, seed=0, rank=0,
                 world_size=1, shuffle=True):
        super().__init__(path, split, batch_size, seq_len, seed, rank, world_size, shuffle)
        sources = load_mixture(path)
        self.loaders = {s.name: TokenLoader(s.folder, split, batch_size, seq_len, seed, rank,
                                            world_size, shuffle) for s in sources}
        loaders = self._loaders = list(self.loaders.values())
        for loader in loaders:
            loader.check_tokens(seq_len + 1 if split == "train" else 2)
        self.fingerprint = hashlib.sha256(json.dumps(
            [(str(s.share), s.meta["fingerprint"]) for s in sources]).encode()).hexdigest()
        self.vocab_size = loaders[0].vocab_size
        self.tokenizer_path = loaders[0].tokenizer_path
        self.text_paths = [path for loader in loaders for path in loader.text_paths]
        self.num_bytes = sum(loader.num_bytes for loader in loaders)
        self.num_tokens = sum(loader.num_tokens for loader in loaders)
        self.num_targets = sum(loader.num_targets for loader in loaders)
        period = lcm(*(s.share.denominator for s in sources))
        self._parts = [int(s.share * period) for s in sources]  # windows in a period, by source
        self._turns = _turns(self._parts)

    def verify(self):
        """Compare every file of every source with its checksum (see data.verify)."""
        for loader in self._loaders:
            loader.verify()

    def counts(self):
        """{name: {"windows", "tokens", "epochs"}}: what all ranks together have taken so far."""
        periods, rest = divmod(self._position, len(self._turns))
        begun = Counter(j for j, _ in self._turns[:rest])
        return {name: loader._count(periods * self._parts[j] + begun[j])
                for j, (name, loader) in enumerate(self.loaders.items())}

    def batches(self):
        """One pass over each source in turn, as TokenLoader.batches."""
        for loader in self._loaders:
            yield from loader.batches()

    def _row(self, i):
        period, turn = divmod(i, len(self._turns))
        j, window = self._turns[turn]
        return self._loaders[j]._row(period * self._parts[j] + window)


def _turns(parts):
    """[(source, which of its windows)] of a period, in which source j has parts[j] windows."""
    period, taken, turns = sum(parts), [0] * len(parts), []
    deadlines = [-(-period // n) for n in parts]
    for now in range(period):
        j = min((j for j, n in enumerate(parts) if taken[j] * period // n <= now),
                key=deadlines.__getitem__)
        turns.append((j, taken[j]))
        taken[j] += 1
        deadlines[j] = -(-(taken[j] + 1) * period // parts[j])
    return turns


def open_loader(path, split="train", batch_size=8, seq_len=256, **options):
    """The loader of `path`: a MixtureLoader for a *.json file, else a TokenLoader for a folder.

    options: seed, rank, world_size, shuffle, as in either.
    """
    kind = MixtureLoader if str(path).endswith(".json") else TokenLoader
    return kind(path, split, batch_size, seq_len, **options)
