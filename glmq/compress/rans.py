"""The rANS coder of GQSC in numpy: oracle of the compiled one, and its stand-in where that could not be built.

The stream (see container.py) is a long chain of dependent steps, so one tile alone is slow here; the speed comes from stepping
the lanes of many tiles together, one round of 32 columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from glmq.compress.container import ESCAPE, FREQUENCY_SUM, LANES, PROB_BITS, STATE_BYTES, STATE_LOW, STATE_TOP, Tile

IntArray = NDArray[np.int64]

_SLOT: Final = FREQUENCY_SUM - 1


def encode_tiles(tiles: NDArray[np.int8], ids: NDArray[np.uint8], table: NDArray[np.uint32]) -> list[tuple[bytes, int]]:
    """Encode tiles of equal height.

    Args:
        tiles: int8 [tiles, rows, cols].
        ids: class of each column, padded to whole rounds with the padding class.
        table: from `tables.encoder_table`.

    Returns:
        payload and number of escapes of each tile.
    """
    count, rows, cols = tiles.shape
    rounds = len(ids) // LANES
    values = np.zeros((count, rows, len(ids)), dtype=np.uint8)
    values[:, :, :cols] = tiles.view(np.uint8)
    base = ids.astype(np.intp) << 8
    flat = table.reshape(-1).astype(np.int64)
    state = np.full((count, LANES), STATE_LOW, dtype=np.int64)
    emitted = np.empty((rows * rounds, count, LANES), dtype=bool)
    words = np.empty((rows * rounds, count, LANES), dtype="<u2")
    escaped = np.empty((rows * rounds, count, LANES), dtype=bool)
    for step in range(rows * rounds - 1, -1, -1):
        row, begin = step // rounds, step % rounds * LANES
        entry = flat[base[begin : begin + LANES] + values[:, row, begin : begin + LANES]]
        frequency = entry >> 12
        full = state >> 20 >= frequency
        emitted[step] = full
        words[step] = state & 0xFFFF
        escaped[step] = entry & (1 << PROB_BITS)
        state = np.where(full, state >> 16, state)
        state += state // frequency * (FREQUENCY_SUM - frequency) + (entry & _SLOT)
    results = []
    for i in range(count):
        in_order = values[i].reshape(rows * rounds, LANES)
        escapes = in_order[escaped[:, i]].tobytes()
        payload = state[i].astype("<u4").tobytes() + words[:, i][emitted[:, i]].tobytes() + escapes
        results.append((payload, len(escapes)))
    return results


def decode_tiles(
    file: NDArray[np.uint8],
    tiles: Sequence[Tile],
    ids: NDArray[np.uint8],
    table: NDArray[np.uint32],
    out: NDArray[np.int8],
) -> int:
    """Decode tiles that follow each other; all of one height, except that the last may be lower.

    Args:
        file: uint8, the whole file.
        tiles: RANS tiles, payload bounds and escapes checked.
        ids: class of each column, padded to whole rounds with the padding class.
        table: from `tables.decoder_table`.
        out: int8 [rows of all tiles, cols], written.

    Returns:
        index of the first tile that no encoder wrote, or -1.
    """
    states = [np.frombuffer(file[tile.start : tile.start + STATE_BYTES], dtype="<u4") for tile in tiles]
    state = np.stack(states).astype(np.int64)  # [tiles, lanes]
    in_range = ((state >= STATE_LOW) & (state < STATE_TOP)).all(1)
    if not in_range.all():
        return int(np.argmin(in_range))
    words, begin, end = _gather_words(file, tiles)
    offsets = (ids.astype(np.int64) << PROB_BITS).reshape(-1, LANES)
    stopped = _step(state, begin, words, offsets, table.reshape(-1), tiles[0].rows, tiles[-1].rows, out.view(np.uint8))
    first_row = 0
    for number, tile in enumerate(tiles):
        decoded = out[first_row : first_row + tile.rows].view(np.uint8).reshape(-1)
        first_row += tile.rows
        places = np.flatnonzero(decoded == ESCAPE)
        if stopped[number] != end[number] or (state[number] != STATE_LOW).any() or len(places) != tile.escapes:
            return number
        decoded[places] = file[tile.start + tile.size - tile.escapes : tile.start + tile.size]
    return -1


def _gather_words(file: NDArray[np.uint8], tiles: Sequence[Tile]) -> tuple[IntArray, IntArray, IntArray]:
    """The words of all tiles in one array, and where each tile's begin and end in it."""
    spans = [file[tile.start + STATE_BYTES : tile.start + tile.size - tile.escapes] for tile in tiles]
    words = np.concatenate([*spans, np.zeros(2, np.uint8)]).view("<u2").astype(np.int64)
    end = np.cumsum([len(span) // 2 for span in spans])
    return words, end - [len(span) // 2 for span in spans], end


def _step(
    state: IntArray,
    begin: IntArray,
    words: IntArray,
    offsets: IntArray,
    table: NDArray[np.uint32],
    height: int,
    last_height: int,
    out: NDArray[np.uint8],
) -> IntArray:
    """Run all tiles' lanes through all rounds.

    A round is some twenty numpy calls on arrays of 32 numbers a tile, so the calls themselves cost most: outputs are
    positional, constants are arrays, methods stand for functions of the same name.

    Args:
        state: int64 [tiles, 32], changed in place to the final states.
        begin: int64 [tiles], where each tile's words begin.
        words: int64, the words of all tiles.
        offsets: int64 [rounds, 32], where each column's table begins in `table`.
        table: uint32, flat, from `tables.decoder_table`.
        height: rows of each tile but the last.
        last_height: rows of the last tile.
        out: uint8 [rows of all tiles, cols], written; escapes not yet in place.

    Returns:
        int64 [tiles], where each tile stopped reading; a tile that ran out of words stops beyond its end.
    """
    value_of = table.astype(np.uint8)
    offset_of = (table >> 8 & _SLOT).astype(np.int64)
    frequency_of = (table >> 19).astype(np.int64)
    slot_mask, prob_bits, state_low, word_bits = (np.array(n) for n in (_SLOT, PROB_BITS, STATE_LOW, 16))
    one_per_byte, top_byte = np.array(0x0101010101010101), np.array(56)
    stopped: IntArray = begin.copy()
    slot, factor, word = (np.empty_like(state) for _ in range(3))
    values = np.empty((len(offsets), *state.shape), dtype=np.uint8)
    low = np.empty(state.shape, dtype=bool)
    # Which word a lane takes: its running count among the lanes of its tile that take one. Multiplying eight flags, one a
    # byte, by 0x01...01 counts within the eight; `counts` carries on from the last word read to each next eight.
    counts = np.zeros((len(state), 5), dtype=np.int64)
    counts[:, 0] = begin - 1
    carried = np.empty_like(counts)
    running = np.empty((len(state), 4), dtype="<i8")
    position = np.empty((len(state), 4, 8), dtype=np.int64)
    for row in range(height):
        if row == last_height:
            stopped[-1] = counts[-1, 0] + 1
            state, slot, factor, word, low, values = (
                state[:-1],
                slot[:-1],
                factor[:-1],
                word[:-1],
                low[:-1],
                values[:, :-1],
            )
            counts, carried, running, position = counts[:-1], carried[:-1], running[:-1], position[:-1]
        flags, of_eights, carry = low.view("<i8"), counts[:, 1:], carried[:, :4, None]
        of_lanes, flat_position = running.view(np.uint8).reshape(position.shape), position.reshape(state.shape)
        for offset, value in zip(offsets, values):
            np.bitwise_and(state, slot_mask, slot)
            np.add(slot, offset, slot)
            value_of.take(slot, None, value, "clip")
            np.right_shift(state, prob_bits, state)
            frequency_of.take(slot, None, factor, "clip")
            np.multiply(state, factor, state)
            offset_of.take(slot, None, factor, "clip")
            np.add(state, factor, state)
            np.less(state, state_low, low)
            np.multiply(flags, one_per_byte, running)
            np.right_shift(running, top_byte, of_eights)
            np.add.accumulate(counts, 1, None, carried)
            np.add(of_lanes, carry, position)
            words.take(flat_position, None, word, "clip")
            np.left_shift(state, word_bits, factor)
            np.bitwise_or(word, factor, word)
            np.copyto(state, word, where=low)
            counts[:, 0] = carried[:, 4]
        out[row::height] = values.swapaxes(0, 1).reshape(len(state), -1)[:, : out.shape[1]]
    stopped[: len(counts)] = counts[:, 0] + 1
    return stopped
