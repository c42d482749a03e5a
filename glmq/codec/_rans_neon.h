/* The rANS tile kernels for 64-bit ARM: a round of 32 lanes is eight registers of four. The same words as from _rans.h.
 *
 * One tile at a time: the states of a tile already take a quarter of the registers. Which words a group of eight lanes takes or
 * writes is looked up by the mask of those lanes, as in the AVX2 kernels.
 */
#ifndef GQSC_RANS_NEON_H
#define GQSC_RANS_NEON_H

#include "_rans.h"

#if GLMQ_NEON
#include <arm_neon.h>

enum { REGISTERS = LANES / 4 };

/* For each mask of 8 lanes, as byte shuffles of 8 words: which of the next words each lane takes, and how the words of the lanes
 * that emit one move to the end. */
static uint8_t spread[256][16], gather_up[256][16];

static void fill_shuffles(void) {
    for (int mask = 0; mask < 256; mask++) {
        int set = 0, next = 8;
        for (int i = 0; i < 8; i++) {
            spread[mask][2 * i] = (uint8_t)(2 * set);
            spread[mask][2 * i + 1] = (uint8_t)(2 * set + 1);
            set += mask >> i & 1;
        }
        for (int i = 7; i >= 0; i--) {
            if (!(mask >> i & 1)) continue;
            next--;
            gather_up[mask][2 * next] = (uint8_t)(2 * i);
            gather_up[mask][2 * next + 1] = (uint8_t)(2 * i + 1);
        }
    }
}

/* Of 8 lanes that are all ones or zeros: their mask in bits 0-7, and above it the bytes of as many words as are ones. */
INLINE uint32_t mask_and_bytes(uint32x4_t first, uint32x4_t second) {
    static const uint16_t weights[8] = {0x201, 0x202, 0x204, 0x208, 0x210, 0x220, 0x240, 0x280};
    const uint16x8_t lanes = vuzp1q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second));
    return vaddvq_u16(vandq_u16(lanes, vld1q_u16(weights)));
}

INLINE uint8x16_t low_halves(uint32x4_t first, uint32x4_t second) {
    return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second)));
}

INLINE uint32x4_t look_up128(const uint32_t *table, uint32x4_t index) {
    const uint64_t i01 = vgetq_lane_u64(vreinterpretq_u64_u32(index), 0), i23 = vgetq_lane_u64(vreinterpretq_u64_u32(index), 1);
    return (uint32x4_t){table[(uint32_t)i01], table[i01 >> 32], table[(uint32_t)i23], table[i23 >> 32]};
}

/* The state after a symbol of entry `e`, whose word is already written. */
INLINE uint32x4_t encode_symbols128(uint32x4_t x, uint32x4_t e) {
    const uint32x4_t f = vshrq_n_u32(e, 12);
    /* As in the AVX2 kernel: the quotient, which is < 2^20, is at most 1 low. */
    const float32x4_t ratio = vdivq_f32(vcvtq_f32_u32(x), vcvtq_f32_u32(f));
    const uint32x4_t q = vcvtq_u32_f32(vmulq_f32(ratio, vdupq_n_f32(1 - 0x1p-22f)));
    const uint32x4_t gap = vsubq_u32(vdupq_n_u32(SLOTS), f);
    uint32x4_t y = vmlaq_u32(x, q, gap); /* q * 2^11 + remainder */
    const uint32x4_t rest = vsubq_u32(y, vshlq_n_u32(q, PROB_BITS));
    y = vaddq_u32(y, vandq_u32(vcgeq_u32(rest, f), gap));
    return vaddq_u32(y, vandq_u32(e, vdupq_n_u32(SLOTS - 1)));
}

/* One round; `at` has 32 bytes, and 16 bytes below the words may be written. */
INLINE void encode_round128(EncodeTile *t, uint32x4_t x[REGISTERS], const uint8_t *at, const uint8_t *ids,
                            const uint32_t *table) {
    uint32x4_t seen = vdupq_n_u32(0);
    UNROLL for (int g = REGISTERS - 2; g >= 0; g -= 2) {
        /* class * 256 + value of 8 columns */
        const uint8x8_t value = vld1_u8(at + 4 * g), id = vld1_u8(ids + 4 * g);
        const uint16x8_t index = vreinterpretq_u16_u8(vcombine_u8(vzip1_u8(value, id), vzip2_u8(value, id)));
        const uint32x4_t e0 = look_up128(table, vmovl_u16(vget_low_u16(index)));
        const uint32x4_t e1 = look_up128(table, vmovl_high_u16(index));
        const uint32x4_t full0 = vcgeq_u32(vshrq_n_u32(x[g], 20), vshrq_n_u32(e0, 12));
        const uint32x4_t full1 = vcgeq_u32(vshrq_n_u32(x[g + 1], 20), vshrq_n_u32(e1, 12));
        const uint32_t full = mask_and_bytes(full0, full1);
        vst1q_u8(t->words - 16, vqtbl1q_u8(low_halves(x[g], x[g + 1]), vld1q_u8(gather_up[full & 0xff])));
        t->words -= full >> 8;
        x[g] = encode_symbols128(vbslq_u32(full0, vshrq_n_u32(x[g], 16), x[g]), e0);
        x[g + 1] = encode_symbols128(vbslq_u32(full1, vshrq_n_u32(x[g + 1], 16), x[g + 1]), e1);
        seen = vorrq_u32(seen, vorrq_u32(e0, e1));
    }
    if (__builtin_expect(vmaxvq_u32(vandq_u32(seen, vdupq_n_u32(ENC_ESCAPE))) != 0, 0)) {
        for (int i = LANES - 1; i >= 0; i--)
            if (table[(uint32_t)ids[i] << 8 | at[i]] & ENC_ESCAPE) *--t->escapes = at[i];
    }
}

static void encode_neon(EncodeTile *tile, const TileShape *s) {
    uint32x4_t x[REGISTERS];
    EncodeTile t = *tile;
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    for (int g = 0; g < REGISTERS; g++) x[g] = vld1q_u32(t.state + 4 * g);
    for (int64_t r = s->rows - 1; r >= 0; r--) {
        const uint8_t *row = t.src + r * s->cols;
        if (tail) {
            uint8_t last[LANES] = {0};
            memcpy(last, row + whole, (size_t)tail);
            encode_round128(&t, x, last, s->ids + whole, s->table);
        }
        for (int64_t c = whole - LANES; c >= 0; c -= LANES) encode_round128(&t, x, row + c, s->ids + c, s->table);
    }
    for (int g = 0; g < REGISTERS; g++) vst1q_u32(t.state + 4 * g, x[g]);
    *tile = t;
}

/* One group of 8 lanes; returns their symbols in the low bytes of its words. */
INLINE uint8x16_t decode_group128(const uint8_t **words, uint32x4_t x[2], const uint8_t *ids, const uint32_t *table) {
    const uint16x8_t id = vmovl_u8(vld1_u8(ids));
    const uint32x4_t slots = vdupq_n_u32(SLOTS - 1);
    const uint32x4_t e0 = look_up128(table, vbslq_u32(slots, x[0], vshll_n_u16(vget_low_u16(id), PROB_BITS)));
    const uint32x4_t e1 = look_up128(table, vbslq_u32(slots, x[1], vshll_high_n_u16(id, PROB_BITS)));
    const uint32x4_t y0 = vmlaq_u32(vandq_u32(vshrq_n_u32(e0, 8), slots), vshrq_n_u32(e0, 19), vshrq_n_u32(x[0], PROB_BITS));
    const uint32x4_t y1 = vmlaq_u32(vandq_u32(vshrq_n_u32(e1, 8), slots), vshrq_n_u32(e1, 19), vshrq_n_u32(x[1], PROB_BITS));
    const uint32x4_t low0 = vcltq_u32(y0, vdupq_n_u32(STATE_LOW)), low1 = vcltq_u32(y1, vdupq_n_u32(STATE_LOW));
    const uint32_t low = mask_and_bytes(low0, low1);
    const uint16x8_t word = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(*words), vld1q_u8(spread[low & 0xff])));
    *words += low >> 8;
    const uint16x8_t high = vreinterpretq_u16_u8(low_halves(y0, y1)); /* y * 2^16 + word, side by side */
    x[0] = vbslq_u32(low0, vreinterpretq_u32_u16(vzip1q_u16(word, high)), y0);
    x[1] = vbslq_u32(low1, vreinterpretq_u32_u16(vzip2q_u16(word, high)), y1);
    return low_halves(e0, e1);
}

/* One round; `out` has room for 32 bytes. */
INLINE void decode_round128(DecodeTile *t, uint32x4_t x[REGISTERS], uint8_t *out, const uint8_t *ids, const uint32_t *table) {
    UNROLL for (int g = 0; g < REGISTERS; g += 4) {
        const uint8x16_t first = decode_group128(&t->words, x + g, ids + 4 * g, table);
        const uint8x16_t second = decode_group128(&t->words, x + g + 2, ids + 4 * g + 8, table);
        vst1q_u8(out + 4 * g, vuzp1q_u8(first, second));
    }
}

/* 0 if the words ran out. */
static int decode_neon(DecodeTile *tile, const TileShape *s) {
    uint32x4_t x[REGISTERS];
    DecodeTile t = *tile;
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    for (int g = 0; g < REGISTERS; g++) x[g] = vld1q_u32(t.state + 4 * g);
    for (int64_t r = 0; r < s->rows; r++) {
        uint8_t *row = t.dst + r * s->cols;
        for (int64_t c = 0; c < whole; c += LANES) {
            if (__builtin_expect(t.words > t.end, 0)) return 0;
            decode_round128(&t, x, row + c, s->ids + c, s->table);
        }
        if (tail) {
            uint8_t last[LANES];
            if (t.words > t.end) return 0;
            decode_round128(&t, x, last, s->ids + whole, s->table);
            memcpy(row + whole, last, (size_t)tail);
        }
    }
    for (int g = 0; g < REGISTERS; g++) vst1q_u32(t.state + 4 * g, x[g]);
    *tile = t;
    return 1;
}
#endif
#endif
