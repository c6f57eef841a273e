"""How one model is spoken with: messages to prompt tokens by the training's own renderer, tokens to text.

The adapter's own tokenizer, chat template and stop tokens decide; what it does not bring is the base's.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tunesmith.data.conversation import PlainText, conversation_from_row
from tunesmith.data.problems import BrokenRule
from tunesmith.data.rendering import Renderer, RenderingError, TrainOn
from tunesmith.models.base import BaseFolder, load_tokenizer
from tunesmith.models.stops import Stops, find_stops
from tunesmith.serving.faults import bad_request
from tunesmith.serving.templates import bound_rendering

_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_SPEECH_FILES = (
    *_TOKENIZER_MARKS, "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no whole character


@dataclass(frozen=True, eq=False)
class Voice:
    """Tokenizer, chat template and stops of one model; shared by all adapters that have the same files."""

    tokenizer: Any
    renderer: Renderer
    stops: Stops
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def chat_prompt(self, messages: Sequence[Any], tools: Sequence[Any] | None) -> list[int]:
        """Tokens of a conversation up to where the model answers: those that training renders before it.

        Raises:
            Refusal: 400: it breaks a rule of training rows, or the template refuses it.
        """
        try:
            row = {"messages": [_without_nulls(m) for m in messages], "tools": list(tools or ()) or None}
            conversation = conversation_from_row(row)
            if conversation.messages[-1].role == "assistant":
                raise bad_request(
                    "messages: the last one is the assistant's; nothing is left to answer", "messages"
                )
            with self._lock:  # the renderer keeps what it has worked out
                return self.renderer.prompt(conversation)
        except BrokenRule as broken:
            text = f": {broken.text}" if broken.text else ""
            raise bad_request(f"messages: {broken.rule}{text}", "messages") from None
        except RenderingError as error:
            raise bad_request(f"messages: {error}", "messages") from None

    def text_prompt(self, text: str) -> list[int]:
        """Tokens of a plain text, as training encodes it but without its end: a control token in it is text."""
        with self._lock:
            ids = self.renderer.example(PlainText(text), TrainOn.ALL_TOKENS).ids
        return [int(i) for i in ids[:-1]]

    def stops_with(self, strings: Sequence[str], ignore_eos: bool) -> Stops:
        """The model's own stops (unless ``ignore_eos``) and a request's; control tokens among them by id."""
        known = self.tokenizer.get_added_vocab()
        own = Stops((), ()) if ignore_eos else self.stops
        ids = dict.fromkeys([*own.token_ids, *(int(known[text]) for text in strings if text in known)])
        texts = dict.fromkeys([*own.strings, *(text for text in strings if text not in known)])
        return Stops(tuple(ids), tuple(texts))

    def token_text(self, token: int) -> str:
        """One token alone as text; with replacement characters where it is part of a character."""
        return str(self.tokenizer.decode([token]))


def _without_nulls(message: Any) -> Any:
    """A message as clients send back what they got: ``"refusal": null`` is as good as nothing."""
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}


class VoiceBox:
    """Reads voices from folders; equal files give one object, so that 64 adapters need one tokenizer."""

    def __init__(self) -> None:
        self._voices: WeakValueDictionary[str, Voice] = WeakValueDictionary()
        self._lock = threading.Lock()

    def of_base(self, base: BaseFolder) -> Voice:
        """The base's own voice; ModelError where its tokenizer cannot be read."""
        return self._voice(base.path, base.model_id, None)

    def of_adapter(self, folder: Path, name: str, base: Voice) -> Voice:
        """The adapter's voice, the base's where the folder has no tokenizer; ModelError as ``of_base``."""
        if not any((folder / mark).is_file() for mark in _TOKENIZER_MARKS):
            return base
        return self._voice(folder, name, base)

    def _voice(self, folder: Path, name: str, base: Voice | None) -> Voice:
        digest = _digest(folder)
        if not (folder / "generation_config.json").is_file():
            digest += str(id(base))  # whose stops are then taken over
        with self._lock:
            voice = self._voices.get(digest)
            if voice is None:
                voice = _read(folder, name, base)
                self._voices[digest] = voice
            return voice


def _read(folder: Path, name: str, base: Voice | None) -> Voice:
    from transformers import GenerationConfig

    tokenizer = bound_rendering(load_tokenizer(BaseFolder(name, folder, None)))
    renderer = Renderer(tokenizer)
    has_settings = (folder / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(folder) if has_settings else None
    inherited = list(base.stops.strings) if base is not None and settings is None else []
    end = renderer.end_of_turn if tokenizer.chat_template else None
    stops = find_stops(tokenizer, settings, end, inherited)
    if base is not None and settings is None:
        stops = Stops(tuple(dict.fromkeys([*stops.token_ids, *base.stops.token_ids])), stops.strings)
    return Voice(tokenizer, renderer, stops)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _SPEECH_FILES:
        content = (folder / name).read_bytes() if (folder / name).is_file() else None
        digest.update(f"{name}:{-1 if content is None else len(content)}:".encode())
        digest.update(content or b"")
    return digest.hexdigest()


class Speaker:
    """The tokens of one answer as text, piece by piece: no piece splits a character or shows part of a stop.

    What the last tokens mean as text depends on those before them, so each new token is decoded together
    with the ones since the last piece, and the text they had before is taken off (the method of Hugging Face's
    text-generation-inference). Text that could be the start of a stop string is held back.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer and are not part of it.
        shows_control: whether control tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, shows_control: bool = False) -> None:
        self._tokenizer, self._shows_control = tokenizer, shows_control
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._begin = 0  # tokens from here on are decoded, those up to _read are said already
        self._read = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that ``token`` makes certain; "" while it is none. Sets ``is_stopped`` at a stop string."""
        self._ids.append(token)
        text = self._decode(self._ids[self._begin :])
        said = self._decode(self._ids[self._begin : self._read])
        if len(text) <= len(said) or text.endswith(_UNFINISHED):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._past_stops(text[len(said) :])

    def end(self) -> str:
        """What was held back; the answer has no more tokens."""
        if self.is_stopped:
            return ""
        text = self._decode(self._ids[self._begin :])
        said = self._decode(self._ids[self._begin : self._read])
        self._begin = self._read = len(self._ids)
        rest = self._past_stops(text[len(said) :])
        held, self._held = self._held, ""
        return rest + held

    def _past_stops(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        kept = next(
            (n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not self._shows_control))
