"""The order of rows: a pure function of seed and epoch, equal on every machine and version."""

from hashlib import blake2b


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """Row numbers in the order in which an epoch visits them.

    Rows are sorted by a hash of (seed, epoch, row). Unlike a generator's shuffle, whose stream a library may
    change between versions, this order is fixed by the definition of BLAKE2b (RFC 7693).

    Args:
        rows: number of rows.
        seed: any integer.
        epoch: from 1.
    """

    def rank(row: int) -> bytes:
        return blake2b(f"{seed}/{epoch}/{row}".encode(), digest_size=16).digest()

    return sorted(range(rows), key=rank)


def step_rows(rows: int, rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of each optimizer step of an epoch; the last step may hold fewer."""
    order = epoch_order(rows, seed, epoch)
    return [order[i : i + rows_per_step] for i in range(0, rows, rows_per_step)]


def stream_seed(seed: int, *position: int | str) -> int:
    """A 63-bit seed for one place of a run, such as a micro-batch.

    Random numbers drawn there then depend on the place alone, so that a run can be entered anywhere.
    """
    text = "/".join(map(str, (seed, *position)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
