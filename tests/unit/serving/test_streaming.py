"""Streams end in every case, and what writes long replies does not hold up other streams."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel

from tunesmith.serving.answering import Piece
from tunesmith.serving.replies import joined
from tunesmith.serving.streaming import EventStream


class Said(BaseModel):
    """An event."""

    number: int


async def endless() -> AsyncIterator[Said]:
    number = 0
    while True:
        number += 1
        yield Said(number=number)


def test_a_client_that_reads_no_further_is_waited_for_no_longer_than_the_deadline() -> None:
    closed: list[bool] = []
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:  # as uvicorn does once its buffer is full
            await asyncio.Event().wait()

    async def main() -> None:
        stream = EventStream(endless(), lambda: closed.append(True), {}, seconds=0.05)
        await asyncio.wait_for(stream({"type": "http"}, receive, send), 5)

    asyncio.run(main())
    assert closed == [True]
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 2]


class Counted(list[Piece]):
    """Counts how often all of it is gone through."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


def test_pieces_of_many_answers_are_gone_through_once() -> None:
    pieces = Counted(
        Piece(number, f"{number}.{turn} ", (), (turn,), "stop" if turn == 2 else None)
        for turn in range(3)
        for number in (2, 0, 1)
    )
    found = joined(pieces, 3)
    assert pieces.passes == 1
    assert [(piece.number, piece.text, piece.starts, piece.finish) for piece in found] == [
        (number, f"{number}.0 {number}.1 {number}.2 ", (0, 1, 2), "stop") for number in range(3)
    ]
