"""Small tokenizers in the files of the Llama releases, trained here."""

import base64
import inspect
import io
import json
import random

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_ext import release_tokenizers
from llama_ext.release_tokenizers import read_ranks

LLAMA3_SPLIT = inspect.signature(TikTokenConverter).parameters["pattern"].default
CODE = ("def area(self, r):\n    if r < 0:\n\t\traise ValueError('it's')\n"
        "    return 3.14159 * r * r\r\n\n\n")
TEXTS = [CODE.replace("area", f"area_{i}") + "We've NAÏVE naïve cafés, 2023年\u3000日本語 😀  " * 3
         for i in range(60)]
PARTS = [CODE, "    ", "\t\t", "\n\n", "\r\n ", "\0", "\ufffd", "\u3000", "\x85", "\u2028",
         "\xa0", "\U0001f468\u200d\U0001f469", "e\u0301", "\ufb01", "12345", "  ", "日本",
         "It'S we'Ve", "\u017f", "def area", " return", "<0x41>", "café,", "?!\n", "'", "\u2047",
         ""]


def random_text(rng, parts=PARTS):
    """Text of every kind: words, digits, runs of spaces, characters of all planes."""
    def char():
        c = chr(rng.randrange(rng.choice([0x80, 0x3000, 0x110000])))
        return c if not "\ud800" <= c <= "\udfff" and c != "\u2581" else " "
    return "".join(rng.choice(parts) if rng.random() < 0.6 else char()
                   for _ in range(rng.randrange(1, 12)))


def random_texts(count, seed=0):
    rng = random.Random(seed)
    return ["", " ", "  x", "\n", "x ", "\t", "\0", *(random_text(rng) for _ in range(count))]


def write_sentencepiece(folder, **options):
    """FOLDER/tokenizer.model with the options of Llama 2's, for ones that are not given."""
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **{
            **dict(vocab_size=420, model_type="bpe", split_digits=True, byte_fallback=True,
                   normalization_rule_name="identity", remove_extra_whitespaces=False,
                   allow_whitespace_only_pieces=True, unk_surface=" \u2047 "), **options})
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def write_json_tokenizer(folder, eos="<|eot_id|>", generation=(1, 2)):
    """FOLDER/tokenizer.json and the files beside it, as Llama 3's on Hugging Face; generation:
    numbers of the special tokens that end a text in generation_config.json."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    count = tokenizer.get_vocab_size()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", count)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": {"__type": "AddedToken", "content": special[0], "lstrip": False,
                      "normalized": False, "rstrip": False, "single_word": False},
        "eos_token": eos})
    write(folder, "generation_config.json", {
        "bos_token_id": count, "eos_token_id": [count + i for i in generation]})
    return folder


def write_ranks(folder, source):
    """FOLDER/tokenizer.model in tiktoken's format, of the BPE in source/tokenizer.json."""
    folder.mkdir()
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    order = sorted(vocabulary, key=vocabulary.get)
    letters = {c: b for b, c in enumerate(release_tokenizers._byte_characters())}
    lines = [base64.b64encode(bytes(letters[c] for c in token)) + b" %d" % vocabulary[token]
             for token in order]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    assert len(read_ranks(folder / "tokenizer.model")) == len(order)
    return folder


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def change(folder, name, **entries):
    """Replace entries of a JSON file."""
    write(folder, name, {**json.loads((folder / name).read_text()), **entries})
