"""Text -> token ids, such that control tokens come from the chat template only, never from a message.

A row whose message contains, say, ``<|im_end|>`` must not be able to end its turn with it. Such a row is
encoded by a twin of the tokenizer in which every control token goes by a secret alias of the same length:
aliases are put in where the template wrote the control token, and the message's text stays text. Normal
rows, which are nearly all, go through the tokenizer as it is.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tunesmith.data.conversation import ROLES, Conversation, Message
from tunesmith.errors import ModelError

Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
Border = tuple[int, int]
Piece = tuple[Tokenizer, int, int]  # what encodes the text from one place up to another


class ControlTokens:
    """The control tokens of one tokenizer, and encoding that respects where they may stand.

    Args:
        tokenizer: a Hugging Face tokenizer with a Rust backend.

    Raises:
        ModelError: the tokenizer has no Rust backend, which is what knows each token's place in the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                getattr(tokenizer, "name_or_path", "tokenizer"),
                "its tokenizer has no tokenizer.json form, which exact masks need",
                "convert it with transformers' fast tokenizer conversion",
            )
        self._spec = json.loads(backend.to_str())
        # Offsets must cover every character, blanks too, and nothing may be added, cut or padded.
        self._spec |= {"post_processor": None, "truncation": None, "padding": None}
        self._tokens = [t["content"] for t in self._spec["added_tokens"] if t["special"]]
        self._tokenizer = tokenizer
        self.pattern = re.compile(_any_of(self._tokens))
        self.terminator = re.compile(rf"\s*(?:{self.pattern.pattern})")
        self.trailing = re.compile(rf"(?:\s*(?:{self.pattern.pattern}))*\s*\Z")

    @cached_property
    def identity(self) -> str:
        """Text that differs for tokenizers that could encode anything differently."""
        tokenizer = self._tokenizer
        return json.dumps([self._spec, self._adds_bos, tokenizer.bos_token_id, tokenizer.eos_token_id])

    def in_contents(self, conversation: Conversation) -> bool:
        """Whether a message's content spells a control token."""
        return any(self._spelled_in(message.content or "") for message in conversation.messages)

    def beside_contents(self, conversation: Conversation) -> bool:
        """Whether a name, an id, a tool or a tool call spells a control token."""
        if (
            self._are_field_names_harmless
            and not conversation.tools
            and all(map(_is_bare, conversation.messages))
        ):
            return False
        messages = [{**message.to_dict(), "content": ""} for message in conversation.messages]
        return any(self._spelled_in(text) for text in _strings([conversation.tools, messages]))

    def encode_rendered(
        self, text: str, messages: Sequence[Border] = (), prompt_ends: Sequence[int] = ()
    ) -> Encoded:
        """Encode rendered text.

        Args:
            text: what the chat template produced.
            messages: where messages stand in it whose control tokens are mere text; empty where no message
                spells one.
            prompt_ends: rising places at which the model is asked to go on. What stands before such a place
                is encoded apart from what follows, because serving encodes a prompt alone: joined, a token
                may lie across the border, or one before it may turn out otherwise.

        Returns:
            ids, int32 of shape (n,), and each token's character borders in ``text``, int64 of shape (n, 2).
        """
        if messages:
            text = self._aliased_outside(text, messages)
            parts = _parts(text, prompt_ends, self._twin, self._twin_going_on, self._alias_pattern)
        else:
            parts = _parts(text, prompt_ends, self._plain, self._plain_going_on, self.pattern)
        encoded = [(_encode(tokenizer, text[begin:end]), begin) for tokenizer, begin, end in parts]
        return (
            np.concatenate([part[0] for part, _ in encoded]),
            np.concatenate([part[1] + begin for part, begin in encoded]),
        )

    def pieces(self, text: str, prompt_ends: Sequence[int]) -> list[Piece]:
        """The smallest pieces that, encoded one by one, give the ids of ``encode_rendered``.

        For text in which no message spells a control token. Pieces of many rows are equal: headers, closing
        tokens, the system message.
        """
        parts = _parts(text, prompt_ends, self._plain, self._plain_going_on, self.pattern)
        if not self._can_cut:
            return parts
        pieces = []
        for tokenizer, begin, end in parts:
            cuts = [found.start() for found in self.pattern.finditer(text, begin + 1, end)]
            pieces += [(tokenizer, start, stop) for start, stop in pairwise([begin, *cuts, end])]
        return pieces

    def document(self, text: str) -> Piece | None:
        """The one piece that a plain text is; None where it spells a control token."""
        return None if self._spelled_in(text) else (self._plain, 0, len(text))

    def encode_text(self, text: str) -> NDArray[np.int32]:
        """Plain text as one document: a leading BOS where the model uses one, the text, EOS."""
        ids, _ = _encode(self._twin if self._spelled_in(text) else self._plain, text)
        return self.framed(ids)

    def framed(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids of a plain text between BOS, where the model uses one, and EOS."""
        bos = [self._tokenizer.bos_token_id] if self._adds_bos else []
        return np.concatenate(
            [np.array(bos, np.int32), ids, np.array([self._tokenizer.eos_token_id], np.int32)]
        )

    def _spelled_in(self, text: str) -> bool:
        # Some models look for control tokens after normalising, which turns other letters into theirs.
        if self.pattern.search(text):
            return True
        normalizer = self._plain.normalizer
        return normalizer is not None and bool(self.pattern.search(normalizer.normalize_str(text)))

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def _are_field_names_harmless(self) -> bool:
        return not any(self._spelled_in(text) for text in ("role", "content", *ROLES))

    @cached_property
    def _can_cut(self) -> bool:
        return _starts_afresh(self._spec["added_tokens"], self.pattern)

    @cached_property
    def _plain(self) -> Tokenizer:
        return _build(self._spec)

    @cached_property
    def _plain_going_on(self) -> Tokenizer:
        spec = _without_prefix(self._spec)
        return self._plain if spec == self._spec else _build(spec)

    @cached_property
    def _twin(self) -> Tokenizer:
        return _build(self._twin_spec)

    @cached_property
    def _twin_going_on(self) -> Tokenizer:
        return _build(_without_prefix(self._twin_spec))

    @cached_property
    def _aliases(self) -> dict[str, str]:
        # Private-use characters of Unicode plane 16, drawn anew in each process: no data can know them.
        return {t: "".join(chr(0x100000 + secrets.randbelow(0xFFFE)) for _ in t) for t in self._tokens}

    @cached_property
    def _alias_pattern(self) -> re.Pattern[str]:
        return re.compile(_any_of(list(self._aliases.values())))

    @cached_property
    def _twin_spec(self) -> dict[str, Any]:
        spec, alias = json.loads(json.dumps(self._spec)), self._aliases
        for token in spec["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            spec["model"]["vocab"] = {alias.get(t, t): i for t, i in vocab.items()}
        else:  # Unigram: a list of (piece, score)
            spec["model"]["vocab"] = [[alias.get(t, t), score] for t, score in vocab]
        unk = spec["model"].get("unk_token")
        if unk is not None:
            spec["model"]["unk_token"] = alias.get(unk, unk)
        return dict(spec)

    def _aliased_outside(self, text: str, messages: Sequence[Border]) -> str:
        pieces, position = [], 0
        for start, end in [*messages, (len(text), len(text))]:
            template = self.pattern.sub(lambda found: self._aliases[found.group()], text[position:start])
            pieces += [template, text[start:end]]
            position = end
        return "".join(pieces)


def _any_of(tokens: Sequence[str]) -> str:
    return "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)"


def _build(spec: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(spec))


def _parts(
    text: str, prompt_ends: Sequence[int], start: Tokenizer, going_on: Tokenizer, control: re.Pattern[str]
) -> list[Piece]:
    parts = [(start, 0, min(prompt_ends, default=len(text)))]
    for begin, end in pairwise([*prompt_ends, len(text)]):
        # Behind a control token the tokenizer starts afresh, as it does in the whole text.
        found = control.search(text, begin, end)
        fresh = found.start() if found else end
        parts += [(going_on, begin, fresh), (start, fresh, end)]
    return [part for part in parts if part[1] < part[2]]


def _starts_afresh(added: Sequence[Mapping[str, Any]], control: re.Pattern[str]) -> bool:
    """Whether cutting a text before each control token changes no id.

    The tokenizer itself first cuts out the added tokens, the leftmost and longest first, and then knows
    nothing beyond them. Not so where a token looks at, swallows or overlaps what stands before it, or where
    it is found only after normalising.
    """
    special = [token for token in added if token["special"]]
    if any(t["single_word"] for t in added) or any(t["lstrip"] or t["normalized"] for t in special):
        return False
    if any(t["content"][:1].isspace() for t in special):  # a token before it could swallow its blank
        return False
    starts = {t["content"][:length] for t in special for length in range(1, len(t["content"]) + 1)}
    texts = [token["content"] for token in added]
    return not any(
        control.search(text, 1) or any(text[at:] in starts for at in range(1, len(text))) for text in texts
    )


def _is_bare(message: Message) -> bool:
    return (
        not message.tool_calls
        and message.tool_call_id is None
        and message.name is None
        and message.role in ROLES
    )


def _encode(tokenizer: Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)


def _without_prefix(spec: Any) -> Any:
    """The same tokenizer, but putting no blank before its text: for text in the middle of a sentence."""
    if isinstance(spec, list):
        return [_without_prefix(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    if spec.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    # The first two are large and put no blanks, the third plays no part in encoding.
    unchanged = ("model", "added_tokens", "decoder")
    return {
        key: never[key] if key in never else value if key in unchanged else _without_prefix(value)
        for key, value in spec.items()
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
