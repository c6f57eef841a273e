"""Real fast tokenizers, trained on a few lines in milliseconds, with chat templates in the style of families.

Each ``Family`` also says, in plain Python, which text its template makes an assistant turn say.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import tiny_templates as templates

CORPUS = [
    "What is the capital of France? The capital of France is Paris.\n\n\nYes.\n\n",
    "user\n\nassistant\nsystem\n model\n\n  hello world  hello, you\n",
    "[INST] hello [/INST] hi [/INST](a) [/INST][1, 2] [/INST] [INST] x [/INST]hello",
    "<|user|>\nhello\n<|assistant|>\n\nhi\n\n### Question: a\n### Answer: b.\n",
    '{"name": "f", "arguments": {"x": 1}} <think>\n\n</think>\n\n',
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True)
class Family:
    """A tokenizer with its template, and what an assistant turn of it says.

    Attributes:
        said: (content, whether it is the last turn) -> text that the model has to say, its end included.
        end_of_turn: the control token that ends a turn.
        has_system: whether the template takes a system message.
        drops_first_blank: decoding a piece of text alone takes a leading blank away, as in SentencePiece.
    """

    name: str
    build: Callable[[], Any]
    said: Callable[[str, bool], str]
    end_of_turn: str | None
    has_system: bool = True
    drops_first_blank: bool = False

    @cached_property
    def tokenizer(self) -> Any:
        return self.build()

    def __repr__(self) -> str:
        return self.name


def byte_level(
    special: list[Any],
    template: str | None,
    *,
    words: tuple[str, ...] = (),
    normalizer: Any = None,
    bos_first: bool = False,
    **names: Any,
) -> Any:
    """Byte-level BPE in the manner of GPT-2.

    Args:
        special: the control tokens.
        template: the chat template.
        words: added tokens that are no control tokens.
        normalizer: applied to the text.
        bos_first: the tokenizer itself puts the first control token before a text.
        names: bos_token and so on.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(words))
    # Offsets without blanks: what many tokenizers ship, and what a mask by offsets must not fall for.
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if bos_first:
        parts.append(processors.TemplateProcessing(f"{special[0]} $A", special_tokens=[(special[0], 0)]))
    tokenizer.post_processor = processors.Sequence(parts)
    return _wrapped(tokenizer, template, names)


def unigram(
    special: list[str], template: str | None, *, scheme: str, normalizer: Any = None, **names: Any
) -> Any:
    """SentencePiece's Unigram; control tokens are among its pieces, bytes stand in for unknown letters.

    Args:
        special: the control tokens.
        template: the chat template.
        scheme: where Metaspace puts a blank: "first", "always" or "never".
        normalizer: applied to the text.
        names: bos_token and so on.
    """
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in special)]
    pieces += [pair for pair in learned if pair[0] != "<unk>"]
    pieces += [("▁[/INST](", -1.0), *((byte, -20.0) for byte in BYTES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _sentencepiece(tokenizer, special, template, names)


def prepending_bpe(special: list[str], template: str | None, **names: Any) -> Any:
    """BPE in the manner of Llama-2's tokenizer.json: a normalizer puts a blank before each piece of text."""
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = blanks
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    vocab = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    for piece in ["<unk>", *special, *BYTES]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = blanks
    return _sentencepiece(tokenizer, special, template, names)


def _sentencepiece(
    tokenizer: Tokenizer, special: list[str], template: str | None, names: dict[str, Any]
) -> Any:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *special])
    return _wrapped(tokenizer, template, {"unk_token": "<unk>", **names})


def _wrapped(tokenizer: Tokenizer, template: str | None, names: dict[str, Any]) -> Any:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    wrapped.chat_template = template
    return wrapped


def _chatml(template: str, **more: Any) -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    return byte_level(special, template, words=words, eos_token="<|im_end|>", pad_token="<|im_end|>", **more)


def _llama3() -> Any:
    special = [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ]
    return byte_level(special, templates.LLAMA3, bos_first=True, bos_token=special[0], eos_token=special[-1])


def _gemma() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    return byte_level(special, templates.GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def phi3() -> Any:
    """Control tokens that swallow the blanks behind them, so that decoding cannot give the text back."""
    names = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    special = [AddedToken(name, rstrip=True, special=True, normalized=False) for name in names]
    return byte_level(special, templates.PHI3, eos_token="<|end|>")


def _qwen3_said(content: str, is_last: bool) -> str:
    if not is_last:
        return content + "<|im_end|>"
    thought, found, answer = content.rpartition("</think>")
    thought = thought.split("<think>")[-1].strip("\n") if found else ""
    return f"<think>\n{thought}\n</think>\n\n" + answer.lstrip("\n") + "<|im_end|>"


ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
S = ["<s>", "</s>"]
FAMILIES = (
    Family("chatml", lambda: _chatml(templates.CHATML), lambda c, _: c + "<|im_end|>", "<|im_end|>"),
    Family("llama3", _llama3, lambda c, _: c.strip() + "<|eot_id|>", "<|eot_id|>"),
    Family(
        "mistral",
        lambda: byte_level([*S, "[INST]", "[/INST]"], templates.MISTRAL, **ENDS),
        lambda c, _: f" {c}</s>",
        "</s>",
    ),
    Family("gemma", _gemma, lambda c, _: c.strip() + "<end_of_turn>", "<end_of_turn>", has_system=False),
    Family(
        "qwen2.5",
        lambda: _chatml(templates.QWEN25, normalizer=normalizers.NFC()),
        lambda c, _: c + "<|im_end|>",
        "<|im_end|>",
    ),
    Family("qwen3", lambda: _chatml(templates.QWEN3), _qwen3_said, "<|im_end|>"),
    Family(
        "zephyr",
        lambda: prepending_bpe(S, templates.ZEPHYR, **ENDS),
        lambda c, _: c + "</s>",
        "</s>",
        drops_first_blank=True,
    ),
    Family(
        "llama2",
        lambda: unigram(S, templates.LLAMA2, scheme="always", **ENDS),
        lambda c, _: f" {c.strip()} </s>",
        "</s>",
        drops_first_blank=True,
    ),
    Family(
        "mistral v1",
        lambda: unigram(S, templates.MISTRAL_V1, scheme="first", **ENDS),
        lambda c, _: c + "</s>",
        "</s>",
        drops_first_blank=True,
    ),
    Family(
        "mistral v1, BPE",
        lambda: prepending_bpe(S, templates.MISTRAL_V1, **ENDS),
        lambda c, _: c + "</s>",
        "</s>",
        drops_first_blank=True,
    ),
)
BARE = Family(
    "bare", lambda: byte_level(["<|end|>"], templates.BARE, eos_token="<|end|>"), lambda c, _: c, None
)
HEADERS_ONLY = Family(
    "headers only",
    lambda: byte_level(["<|end|>", "<|user|>", "<|assistant|>"], templates.HEADERS_ONLY, eos_token="<|end|>"),
    lambda c, _: c,
    None,
    has_system=False,
)
