"""``tunesmith chat``: one question, the answers of several models side by side."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from tunesmith.data.conversation import Conversation, Message
from tunesmith.data.rendering import RenderingError
from tunesmith.errors import DataError
from tunesmith.evaluation.generate import cut_at_stop, generate_greedy
from tunesmith.models.servable import Servable

_HELP = "Type a message. /reset starts anew, /exit or Ctrl-D ends."


def chat(models: Sequence[Servable], console: Console, max_new_tokens: int, system: str | None) -> None:
    """Read messages until the input ends; every model keeps a conversation of its own."""
    console.print(Text(_HELP, style="dim"))
    opening = (Message("system", system),) if system else ()
    turns = [list(opening) for _ in models]
    for said in _messages(console):
        if said == "/reset":
            turns = [list(opening) for _ in models]
            continue
        for history in turns:
            history.append(Message("user", said))
        answers = ["…"] * len(models)
        with Live(_side_by_side(models, answers), console=console, auto_refresh=False) as live:
            for index, (servable, history) in enumerate(zip(models, turns, strict=True)):
                answers[index] = answer(servable, Conversation(tuple(history)), max_new_tokens)
                history.append(Message("assistant", answers[index] or " "))
                live.update(_side_by_side(models, answers), refresh=True)


def answer(servable: Servable, conversation: Conversation, max_new_tokens: int) -> str:
    """The greedy answer to a conversation.

    Raises:
        DataError: the model's chat template refuses the conversation, or it fills the model's context.
    """
    try:
        prompt = servable.renderer.prompt(conversation)
    except RenderingError as error:
        raise DataError("conversation", str(error), "/reset starts anew") from error
    room = int(servable.model.config.max_position_embeddings) - len(prompt)
    if room < 1:
        raise DataError("conversation", f"fills the context of {servable.name}", "/reset starts anew")
    ids = generate_greedy(
        servable.model,
        [prompt],
        stop_token_ids=servable.stops.token_ids,
        pad_token_id=servable.stops.token_ids[0],
        max_new_tokens=min(max_new_tokens, room),
        stop_strings=servable.stops.strings,
        decode=lambda new: str(servable.tokenizer.decode(new)),
    )[0]
    text = str(servable.tokenizer.decode(ids, skip_special_tokens=True))
    return cut_at_stop(text, servable.stops.strings)


def _messages(console: Console) -> Iterator[str]:
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            said = console.input("[bold cyan]you>[/] ").strip()
            if said in ("/exit", "/quit"):
                return
            if said:
                yield said


def _side_by_side(models: Sequence[Servable], answers: Sequence[str]) -> Columns:
    panels = [
        Panel(Text(text), title=Text(servable.name), title_align="left")
        for servable, text in zip(models, answers, strict=True)
    ]
    return Columns(panels, equal=True, expand=True)
