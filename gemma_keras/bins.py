"""Best-fit decreasing: lengths into as few rows of one size as can be had quickly."""

import numpy as np


def best_fit(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Puts lengths into rows of `size`: the longest first, each where it fits best.

    Args:
        lengths: integers [N] from 1 to `size`.
        size: what a row holds.

    Returns:
        The rows, each a list of indices into `lengths`.

    Raises:
        ValueError: a length is out of its range.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"Lengths must be from 1 to {size}.")
    rows: list[list[int]] = []
    # Rows by the room that is left in them, and a bit for each room that some row has.
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def usage(rows: list[list[int]], lengths: np.ndarray, size: int) -> float:
    """The part of all slots that is used, from 0 to 1."""
    return float(np.sum(lengths)) / (len(rows) * size) if rows else 0.0
