"""The rANS coder of GQSC in numpy: oracle of the compiled one, and its stand-in where that could not be built.

The stream (see FORMAT.md) is a long chain of dependent steps, so one tile alone is slow here; the speed comes from stepping
the lanes of many tiles together, one round of 32 columns at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from glmq.codec.container import ESCAPE, FREQUENCY_SUM, LANES, PROB_BITS, STATE_BYTES, STATE_LOW, STATE_TOP, Tile

IntArray = NDArray[np.int64]
PartT = TypeVar("PartT", bound=np.generic)

_SLOT: Final = FREQUENCY_SUM - 1
_CHUNK: Final = 8192
"""Values whose tables are gathered at a time in encoding: a few arrays of 64 KiB, which the cache holds."""


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
    lanes = count * LANES
    flat = table.reshape(-1).astype(np.int64)
    first, frequency = flat & _SLOT, flat >> 12
    limit, gap = frequency << 20, FREQUENCY_SUM - frequency
    # The quotient of x < f * 2^20 is (x * ceil(2^43 / f)) >> 43, see _rans.h; the product stays below 2^63.
    reciprocal = -((-1 << 43) // frequency)
    is_escape = (flat >> PROB_BITS & 1).astype(bool)
    base = (ids.astype(np.intp) << 8).reshape(rounds, 1, LANES)
    values = np.zeros((count, len(ids)), dtype=np.uint8)
    emitted = np.empty((rows, rounds, lanes), dtype=bool)
    words = np.empty((rows, rounds, lanes), dtype="<u2")
    escaped = np.empty((rows, rounds, lanes), dtype=bool)
    # What depends on the values alone is gathered for several rounds at a time; only the states go round by round.
    # states[i + 1] is what the lanes hold before round i of a chunk is encoded, with the word that they may emit.
    chunk = max(_CHUNK // lanes, 1)
    states = np.full((chunk + 1, lanes), STATE_LOW, dtype=np.int64)
    word_bits, quotient_bits = np.array(16), np.array(43)
    small, quotient = np.empty(lanes, dtype=bool), np.empty(lanes, dtype=np.int64)
    for row in range(rows - 1, -1, -1):
        values[:, :cols] = tiles[:, row].view(np.uint8)
        symbols = (values.reshape(count, rounds, LANES).swapaxes(0, 1) + base).reshape(rounds, lanes)
        for stop in range(rounds, 0, -chunk):
            begin = max(stop - chunk, 0)
            symbol, size = symbols[begin:stop], stop - begin
            limits, gaps, firsts, reciprocals = (of.take(symbol) for of in (limit, gap, first, reciprocal))
            states[size] = states[0]
            for i in range(size - 1, -1, -1):
                state, after = states[i + 1], states[i]
                np.less(state, limits[i], small)
                np.right_shift(state, word_bits, after)
                np.copyto(after, state, where=small)
                np.multiply(after, reciprocals[i], quotient)
                np.right_shift(quotient, quotient_bits, quotient)
                np.multiply(quotient, gaps[i], quotient)
                np.add(after, quotient, after)
                np.add(after, firsts[i], after)
            np.greater_equal(states[1 : size + 1], limits, emitted[row, begin:stop])
            words[row, begin:stop] = states[1 : size + 1].astype("<u2")
            is_escape.take(symbol, out=escaped[row, begin:stop], mode="clip")
    return [
        _payload(tiles[i], states[0, cut], words[:, :, cut], emitted[:, :, cut], escaped[:, :, cut])
        for i, cut in enumerate(slice(at, at + LANES) for at in range(0, lanes, LANES))
    ]


def _payload(
    tile: NDArray[np.int8],
    states: IntArray,
    words: NDArray[np.uint16],
    emitted: NDArray[np.bool_],
    escaped: NDArray[np.bool_],
) -> tuple[bytes, int]:
    """Payload and number of escapes of one tile, from what its lanes held at last and emitted: [rows, rounds, lanes]."""
    rows, cols = tile.shape
    values = np.zeros((rows, words.shape[1] * LANES), dtype=np.uint8)
    values[:, :cols] = tile.view(np.uint8)
    escapes = values.reshape(words.shape)[escaped].tobytes()
    return states.astype("<u4").tobytes() + words[emitted].tobytes() + escapes, len(escapes)


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
    state = np.stack(states).astype(np.uint32)  # [tiles, lanes]
    in_range = ((state >= STATE_LOW) & (state < STATE_TOP)).all(1)
    if not in_range.all():
        return int(np.argmin(in_range))
    words, begin, end = _gather_words(file, tiles)
    stopped = _step(state, begin, words, ids, table, tiles[0].rows, tiles[-1].rows, out.view(np.uint8))
    first_row = 0
    for number, tile in enumerate(tiles):
        decoded = out[first_row : first_row + tile.rows].view(np.uint8).reshape(-1)
        first_row += tile.rows
        places = np.flatnonzero(decoded == ESCAPE)
        if stopped[number] != end[number] or (state[number] != STATE_LOW).any() or len(places) != tile.escapes:
            return number
        decoded[places] = file[tile.start + tile.size - tile.escapes : tile.start + tile.size]
    return -1


def _gather_words(file: NDArray[np.uint8], tiles: Sequence[Tile]) -> tuple[NDArray[np.uint16], IntArray, IntArray]:
    """The words of all tiles in one array, and where each tile's begin and end in it."""
    spans = [file[tile.start + STATE_BYTES : tile.start + tile.size - tile.escapes] for tile in tiles]
    words = np.concatenate([*spans, np.zeros(2, np.uint8)]).view("<u2")
    end = np.cumsum([len(span) // 2 for span in spans])
    return words, end - [len(span) // 2 for span in spans], end


def _step(
    state: NDArray[np.uint32],
    begin: IntArray,
    words: NDArray[np.uint16],
    ids: NDArray[np.uint8],
    table: NDArray[np.uint32],
    height: int,
    last_height: int,
    out: NDArray[np.uint8],
) -> NDArray[np.uint32]:
    """Run all tiles' lanes through all rounds.

    A round is a dozen numpy calls on 33 numbers a tile, so the calls themselves cost most: arrays are flat with one stride
    (others take an iterator, which costs as much as the work), outputs are positional, constants are arrays, methods stand
    for functions of the same name. Before the 32 lanes of a tile there is one more, whose running count of words is the
    tile's place among the words; it decodes the padding class.

    Lanes hold their state less 2^15, so that a negative one is one that takes a word; tables and words are shifted to suit.

    Args:
        state: uint32 [tiles, 32], changed in place to the final states.
        begin: int64 [tiles], where each tile's words begin.
        words: the words of all tiles, fewer than 2^31.
        ids: class of each column, padded to whole rounds with the padding class.
        table: uint32 [classes + 1, 2048], from `tables.decoder_table`.
        height: rows of each tile but the last.
        last_height: rows of the last tile.
        out: uint8 [rows of all tiles, cols], written; escapes not yet in place.

    Returns:
        uint32 [tiles], where each tile stopped reading; a tile that ran out of words stops beyond its end.
    """
    tiles, lanes = len(state), LANES + 1
    value_of, factor_of, term_of = _spread_tables(table)
    # Word i is number 2i + 1, and 0 between them: a lane's places before and after, added, are the number of what it takes.
    words_or_none = np.zeros((len(words), 2), dtype=np.uint32)
    words_or_none[:, 1] = words + np.uint32((STATE_LOW << 16) - STATE_LOW)
    slot_mask, prob_bits = np.array(_SLOT, dtype=np.uint16), np.array(PROB_BITS, dtype=np.int32)
    sign_bit, log_word_bits = np.array(31, dtype=np.uint32), np.array(4, dtype=np.uint32)
    class_of_lane = np.full((len(ids) // LANES, tiles, lanes), len(table) - 1)
    class_of_lane[:, :, 1:] = ids.reshape(-1, 1, LANES)
    entries = (class_of_lane << 16).reshape(-1, tiles * lanes)
    x = whole = np.zeros(tiles * lanes, dtype=np.int32)
    whole.reshape(tiles, lanes)[:, 1:] = state - np.uint32(STATE_LOW)
    place = np.zeros(len(x) + 1, dtype=np.uint32)  # of the next word; [1:] after a lane has taken its own
    place[lanes::lanes] = begin
    for row in range(height):
        if row in (0, last_height):
            live = tiles if row < last_height else tiles - 1
            x = x[: live * lanes]
            before, after = place[: len(x)], place[1 : 1 + len(x)]
            factor, term, takes, shift, word, number = (
                np.zeros(len(x), dtype) for dtype in ("i4", "i4", "u4", "u4", "u4", "i8")
            )
            # A tile's extra lane does not take a word, but holds where the tile's next one is, for the sum.
            low_number = _low_part(number, np.uint32)
            next_word, last_word = takes[::lanes], after[LANES::lanes]
            takes_of_tile, after_of_tile = takes.reshape(live, lanes), after.reshape(live, lanes)
            bits, state_slot = x.view(np.uint32), _low_part(x, np.uint16)
            live_entries = entries[:, : len(x)]
            rounds = [(entry, _low_part(entry, np.uint16)) for entry in live_entries]
            take_factor, take_term = factor_of.reshape(-1).take, term_of.reshape(-1).take
            take_words = words_or_none.reshape(-1).take
        for entry, slot in rounds:
            np.bitwise_and(state_slot, slot_mask, slot)
            take_factor(entry, None, factor, "clip")
            take_term(entry, None, term, "clip")
            np.right_shift(x, prob_bits, x)
            np.multiply(x, factor, x)
            np.add(x, term, x)
            np.right_shift(bits, sign_bit, takes)
            next_word[:] = last_word
            np.add.accumulate(takes_of_tile, 1, None, after_of_tile)
            np.left_shift(takes, log_word_bits, shift)
            np.left_shift(bits, shift, bits)
            np.add(before, after, low_number)
            take_words(number, None, word, "clip")
            np.add(bits, word, bits)
        values = value_of.reshape(-1).take(live_entries).reshape(-1, live, lanes)[:, :, 1:]
        out[row::height] = values.swapaxes(0, 1).reshape(live, -1)[:, : out.shape[1]]
    state[:] = whole.reshape(tiles, lanes)[:, 1:] + STATE_LOW
    return place[lanes::lanes]


def _spread_tables(table: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]:
    """Value, factor and term of each class and slot.

    A class has 2^16 entries, so that a slot fits beside its class without an addition; those above 2^11 are never touched.
    """
    value_of = np.zeros((len(table), 1 << 16), dtype=np.uint8)
    value_of[:, :FREQUENCY_SUM] = table
    factor_of, term_of = np.zeros((2, len(table), 1 << 16), dtype=np.int32)
    factor_of[:, :FREQUENCY_SUM] = table >> 19
    term_of[:, :FREQUENCY_SUM] = (table >> 8 & _SLOT) + (STATE_LOW >> PROB_BITS) * (table >> 19) - STATE_LOW
    return value_of, factor_of, term_of


def _low_part(numbers: NDArray[np.generic], dtype: type[PartT]) -> NDArray[PartT]:
    """The lowest bytes of each of the flat `numbers`, a view."""
    parts = numbers.view(dtype)
    each = len(parts) // len(numbers)
    return parts[each - 1 if sys.byteorder == "big" else 0 :: each]
