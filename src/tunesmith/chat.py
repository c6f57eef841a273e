"""``tunesmith chat``: one question, the answers of several models side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

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
from tunesmith.tracking.formats import visible

_HELP = "Type a message. /reset starts anew, /exit or Ctrl-D ends."


def chat(models: Sequence[Servable], console: Console, max_new_tokens: int, system: str | None) -> None:
    """Read messages until the input ends; every model keeps a conversation of its own.

    Raises:
        DataError: what is read is no text.
    """
    console.print(Text(_HELP, style="dim"))
    opening = (Message("system", system),) if system else ()
    turns = [list(opening) for _ in models]
    for said in _messages(console):
        if said == "/reset":
            turns = [list(opening) for _ in models]
            continue
        shown = ["…"] * len(models)
        with _display(console) as show:
            for index, (servable, history) in enumerate(zip(models, turns, strict=True)):
                asked = [*history, Message("user", said)]
                try:
                    text = answer(servable, Conversation(tuple(asked)), max_new_tokens)
                except DataError as error:
                    shown[index] = (
                        f"(no answer: {error})"  # the others, and the next question, still get theirs
                    )
                else:
                    shown[index] = visible(text)
                    history[:] = [*asked, Message("assistant", text or " ")]
                show(_side_by_side(models, shown))


def answer(servable: Servable, conversation: Conversation, max_new_tokens: int) -> str:
    """The greedy answer to a conversation.

    Raises:
        DataError: the model's chat template refuses the conversation, or it fills the model's context.
    """
    try:
        prompt = servable.renderer.prompt(conversation)
    except RenderingError as error:
        raise DataError("conversation", str(error), "/reset starts anew") from error
    room = servable.context_length - len(prompt)
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


@contextmanager
def _display(console: Console) -> Iterator[Callable[[Columns], None]]:
    """On a terminal each state replaces the one before; elsewhere only the last is printed, as whole lines."""
    last: list[Columns] = []
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None

        def show(panels: Columns) -> None:
            last[:] = [panels]
            if live is not None:
                live.update(panels, refresh=True)

        yield show
    if live is None and last:
        console.print()
        console.print(last[0])


def _messages(console: Console) -> Iterator[str]:
    with suppress(KeyboardInterrupt):
        while True:
            try:
                said = console.input("[bold cyan]you>[/] ").strip()
            except EOFError:
                console.print()  # the shell's prompt belongs on a line of its own
                return
            except UnicodeDecodeError as error:
                raise DataError(
                    "standard input", f"is not UTF-8 (byte {error.start})", "send text as UTF-8"
                ) from error
            # Under some locales Python reads bytes that are no text as halves of surrogate pairs.
            said = said.encode("utf-8", "replace").decode("utf-8")
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
