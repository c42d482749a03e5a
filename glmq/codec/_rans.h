/* The rANS tile kernels of GQSC: the same words from each of them. FORMAT.md describes the stream.
 *
 * One tile is `rows` x `cols` bytes. A round is 32 neighbouring columns of a row, one per lane; the last round of a row may have
 * fewer real columns, and its other lanes belong to the padding class, whose one symbol of frequency 2^11 costs no bits.
 * A lane's state x stays in [2^15, 2^31), so signed and unsigned comparisons agree and no product overflows 32 bits.
 *
 * The vector kernels take a round in groups of a register's lanes, each through two steps: look its entries up, then compute.
 * The first step runs some groups ahead of the second, and two tiles of one height go side by side: a tile alone is a chain of
 * dependent instructions, and one step after the other leaves a core's loads or its arithmetic idle (1.5 times the speed).
 */
#ifndef GQSC_RANS_H
#define GQSC_RANS_H

#include "../_native.h"

#if GLMQ_X86
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

enum { LANES = 32, PROB_BITS = 11, SLOTS = 1 << PROB_BITS, STATE_BYTES = 4 * LANES, SLACK = 64, MAX_COLS = 1 << 28 };
#define STATE_LOW ((uint32_t)1 << 15)
#define STATE_TOP ((uint32_t)1 << 31)

/* Encoder entry of (class, symbol): cumulative frequency in bits 0-10, "write as an escape" in bit 11, frequency in bits 12-23.
 * Decoder entry of (class, slot): symbol in bits 0-7, slot minus the symbol's first slot in bits 8-18, frequency in bits 19-30. */
#define ENC_ESCAPE ((uint32_t)1 << 11)

typedef struct {
    const uint8_t *src; /* the tile's bytes */
    uint8_t *words;     /* words are written downwards from here; afterwards the first word */
    uint8_t *escapes;   /* escaped bytes likewise */
    uint32_t state[LANES];
} EncodeTile;

typedef struct {
    uint8_t *dst;
    const uint8_t *words, *end; /* at least SLACK readable bytes follow `end` */
    uint32_t state[LANES];
} DecodeTile;

typedef struct {
    int64_t rows, cols;
    const uint8_t *ids;    /* class of each column, padded to a multiple of 32 with the padding class */
    const uint32_t *table; /* 256 encoder or 2048 decoder entries per class, padding class last */
} TileShape;

static inline uint32_t load16(const uint8_t *p) {
    uint16_t w;
    memcpy(&w, p, 2);
    return w;
}

/* ---- plain C ---------------------------------------------------------------------------------------------------------- */

/* The quotient of x < f * 2^20 by f <= 2^11 is (x * ceil(2^43 / f)) >> 43: the product stays below 2^64, and the error
 * x * (f * ceil(2^43 / f) - 2^43) < f * 2^20 * f <= 2^42 never reaches the next integer. */
static uint64_t reciprocal[SLOTS + 1];

static void fill_reciprocals(void) {
    for (uint64_t f = 1; f <= SLOTS; f++) reciprocal[f] = (((uint64_t)1 << 43) + f - 1) / f;
}

static void encode_scalar(EncodeTile *t, const TileShape *s) {
    uint8_t *p = t->words, *esc = t->escapes;
    uint32_t state[LANES];
    memcpy(state, t->state, sizeof state);
    for (int64_t r = s->rows - 1; r >= 0; r--) {
        const uint8_t *row = t->src + r * s->cols;
        /* Lanes beyond the last column keep their state, so they are simply not visited. */
        for (int64_t c = s->cols - 1; c >= 0; c--) {
            uint32_t e = s->table[(uint32_t)s->ids[c] << 8 | row[c]];
            uint32_t x = state[c & (LANES - 1)], f = e >> 12;
            if (e & ENC_ESCAPE) *--esc = row[c];
            uint16_t word = (uint16_t)x;
            uint32_t full = (x >> 20) >= f;
            memcpy(p - 2, &word, 2);
            p -= 2 * full;
            x >>= 16 * full;
            uint32_t q = (uint32_t)((x * reciprocal[f]) >> 43);
            state[c & (LANES - 1)] = x + q * (SLOTS - f) + (e & (SLOTS - 1));
        }
    }
    memcpy(t->state, state, sizeof state);
    t->words = p;
    t->escapes = esc;
}

/* 0 if the words ran out. */
static int decode_scalar(DecodeTile *t, const TileShape *s) {
    const uint8_t *p = t->words, *const end = t->end;
    const uint32_t *const table = s->table;
    uint8_t *out = t->dst;
    uint32_t state[LANES];
    memcpy(state, t->state, sizeof state);
    for (int64_t r = 0; r < s->rows; r++) {
        for (int64_t c0 = 0; c0 < s->cols; c0 += LANES) {
            if (p > end) return 0;
            const int n = s->cols - c0 < LANES ? (int)(s->cols - c0) : LANES;
            const uint8_t *const ids = s->ids + c0;
            for (int i = 0; i < n; i++) {
                uint32_t x = state[i];
                uint32_t e = table[(uint32_t)ids[i] << PROB_BITS | (x & (SLOTS - 1))];
                *out++ = (uint8_t)e;
                x = (e >> 19) * (x >> PROB_BITS) + ((e >> 8) & (SLOTS - 1));
                /* Without a branch, which would be wrong for a quarter of the symbols. */
                uint32_t low = x < STATE_LOW, refilled = x << 16 | load16(p);
                state[i] = x ^ ((x ^ refilled) & (0u - low));
                p += 2 * low;
            }
        }
    }
    memcpy(t->state, state, sizeof state);
    t->words = p;
    return 1;
}

#if GLMQ_X86
/* ---- AVX2 --------------------------------------------------------------------------------------------------------------- */

#define TARGET_AVX2 __attribute__((target("avx2,popcnt")))

/* For each mask of 8 lanes: which of the next words each lane takes, and, as a byte shuffle of 8 words, how the words of the
 * lanes that emit one move to the end. */
static uint8_t spread[256][8], gather_up[256][16];

static void fill_shuffles(void) {
    for (int mask = 0; mask < 256; mask++) {
        int set = 0, next = 8;
        for (int i = 0; i < 8; i++) {
            spread[mask][i] = (uint8_t)set;
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

/* Eight loads: on AMD's processors a quarter to a half faster than the gather instruction, which others slow down by
 * microcode. */
TARGET_AVX2 INLINE __m256i look_up256(const uint32_t *table, __m256i index) {
    uint64_t i01 = (uint64_t)_mm256_extract_epi64(index, 0), i23 = (uint64_t)_mm256_extract_epi64(index, 1);
    uint64_t i45 = (uint64_t)_mm256_extract_epi64(index, 2), i67 = (uint64_t)_mm256_extract_epi64(index, 3);
    __m128i low = _mm_cvtsi32_si128((int)table[(uint32_t)i01]), high = _mm_cvtsi32_si128((int)table[(uint32_t)i45]);
    low = _mm_insert_epi32(low, (int)table[i01 >> 32], 1);
    high = _mm_insert_epi32(high, (int)table[i45 >> 32], 1);
    low = _mm_insert_epi32(low, (int)table[(uint32_t)i23], 2);
    high = _mm_insert_epi32(high, (int)table[(uint32_t)i67], 2);
    low = _mm_insert_epi32(low, (int)table[i23 >> 32], 3);
    high = _mm_insert_epi32(high, (int)table[i67 >> 32], 3);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

TARGET_AVX2 INLINE void load_states256(__m256i x[4], const uint32_t *state) {
    for (int g = 0; g < 4; g++) x[g] = _mm256_loadu_si256((const __m256i *)(state + 8 * g));
}

TARGET_AVX2 INLINE void store_states256(uint32_t *state, const __m256i x[4]) {
    for (int g = 0; g < 4; g++) _mm256_storeu_si256((__m256i *)(state + 8 * g), x[g]);
}

/* One group of 8 lanes of one tile; 16 bytes below `words` may be written. */
TARGET_AVX2 INLINE __m256i encode_group256(EncodeTile *t, __m256i x, __m256i e, const uint8_t *at) {
    __m256i f = _mm256_srli_epi32(e, 12);
    __m256i fits = _mm256_cmpgt_epi32(f, _mm256_srli_epi32(x, 20));
    unsigned full = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(fits)) ^ 0xff;
    __m256i low = _mm256_blend_epi16(x, _mm256_setzero_si256(), 0xaa);
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    words = _mm_shuffle_epi8(words, _mm_loadu_si128((const __m128i *)gather_up[full]));
    _mm_storeu_si128((__m128i *)(t->words - 16), words);
    t->words -= 2 * __builtin_popcount(full);
    __m256i y = _mm256_blendv_epi8(_mm256_srli_epi32(x, 16), x, fits);
    /* Three roundings of 2^-24 each cannot make up for the factor, so the quotient, which is < 2^20, is at most 1 low. */
    __m256 ratio = _mm256_div_ps(_mm256_cvtepi32_ps(y), _mm256_cvtepi32_ps(f));
    __m256i q = _mm256_cvttps_epi32(_mm256_mul_ps(ratio, _mm256_set1_ps(1 - 0x1p-22f)));
    __m256i gap = _mm256_sub_epi32(_mm256_set1_epi32(SLOTS), f);
    y = _mm256_add_epi32(y, _mm256_mullo_epi32(q, gap)); /* q * 2^11 + remainder */
    __m256i rest = _mm256_sub_epi32(y, _mm256_slli_epi32(q, PROB_BITS));
    y = _mm256_add_epi32(y, _mm256_andnot_si256(_mm256_cmpgt_epi32(f, rest), gap));
    int rare = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(e, 31 - PROB_BITS)));
    if (__builtin_expect(rare != 0, 0)) {
        for (int i = 7; i >= 0; i--)
            if (rare >> i & 1) *--t->escapes = at[i];
    }
    return _mm256_add_epi32(y, _mm256_and_si256(e, _mm256_set1_epi32(SLOTS - 1)));
}

/* One round of `count` tiles; at[i] has 32 bytes. */
TARGET_AVX2 INLINE void encode_round256(const int count, EncodeTile *t, __m256i x[][4], const uint8_t *const at[],
                                             const uint8_t *ids, const uint32_t *table) {
    enum { AHEAD = 1 };
    __m256i e[8];
    UNROLL for (int k = 0; k < 4 * count + AHEAD; k++) {
        if (k < 4 * count) {
            const int g = 3 - k / count, i = k % count;
            __m256i id = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(ids + 8 * g))), 8);
            __m256i symbol = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at[i] + 8 * g)));
            e[k] = look_up256(table, _mm256_or_si256(id, symbol));
        }
        if (k >= AHEAD) {
            const int j = k - AHEAD, g = 3 - j / count, i = j % count;
            x[i][g] = encode_group256(&t[i], x[i][g], e[j], at[i] + 8 * g);
        }
    }
}

TARGET_AVX2 INLINE void encode_tiles256(const int count, EncodeTile *tiles, const TileShape *s) {
    __m256i x[2][4];
    EncodeTile t[2];
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    for (int i = 0; i < count; i++) {
        t[i] = tiles[i];
        load_states256(x[i], t[i].state);
    }
    for (int64_t r = s->rows - 1; r >= 0; r--) {
        const uint8_t *row[2] = {t[0].src + r * s->cols, t[count - 1].src + r * s->cols};
        if (tail) {
            uint8_t last[2][LANES] = {{0}};
            const uint8_t *const at[2] = {last[0], last[1]};
            for (int i = 0; i < count; i++) memcpy(last[i], row[i] + whole, (size_t)tail);
            encode_round256(count, t, x, at, s->ids + whole, s->table);
        }
        for (int64_t c = whole - LANES; c >= 0; c -= LANES) {
            const uint8_t *const at[2] = {row[0] + c, row[1] + c};
            encode_round256(count, t, x, at, s->ids + c, s->table);
        }
    }
    for (int i = 0; i < count; i++) {
        store_states256(t[i].state, x[i]);
        tiles[i] = t[i];
    }
}

/* One group of 8 lanes of one tile; `e` are its entries, afterwards its symbols. */
TARGET_AVX2 INLINE __m256i decode_group256(const uint8_t **words, __m256i x, __m256i *e) {
    __m256i bias = _mm256_and_si256(_mm256_srli_epi32(*e, 8), _mm256_set1_epi32(SLOTS - 1));
    __m256i y = _mm256_mullo_epi32(_mm256_srli_epi32(*e, 19), _mm256_srli_epi32(x, PROB_BITS));
    *e = _mm256_and_si256(*e, _mm256_set1_epi32(255));
    y = _mm256_add_epi32(y, bias);
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)STATE_LOW), y);
    int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
    __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)spread[mask]));
    __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)*words));
    word = _mm256_permutevar8x32_epi32(word, order);
    *words += 2 * __builtin_popcount((unsigned)mask);
    return _mm256_blendv_epi8(y, _mm256_or_si256(_mm256_slli_epi32(y, 16), word), low);
}

/* One round of `count` tiles; out[i] has room for 32 bytes. */
TARGET_AVX2 INLINE void decode_round256(const int count, DecodeTile *t, __m256i x[][4], uint8_t *const out[],
                                             const uint8_t *ids, const uint32_t *table) {
    enum { AHEAD = 1 };
    __m256i e[8];
    UNROLL for (int k = 0; k < 4 * count + AHEAD; k++) {
        if (k < 4 * count) {
            const int g = k / count, i = k % count;
            __m256i id = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(ids + 8 * g))), PROB_BITS);
            e[k] = look_up256(table, _mm256_or_si256(id, _mm256_and_si256(x[i][g], _mm256_set1_epi32(SLOTS - 1))));
        }
        if (k >= AHEAD) {
            const int j = k - AHEAD, g = j / count, i = j % count;
            x[i][g] = decode_group256(&t[i].words, x[i][g], &e[j]);
        }
    }
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undo the packs' crossing of 128-bit halves */
    UNROLL for (int i = 0; i < count; i++) {
        __m256i pairs = _mm256_packus_epi16(_mm256_packus_epi32(e[i], e[count + i]),
                                            _mm256_packus_epi32(e[2 * count + i], e[3 * count + i]));
        _mm256_storeu_si256((__m256i *)out[i], _mm256_permutevar8x32_epi32(pairs, lanes));
    }
}

TARGET_AVX2 INLINE int decode_tiles256(const int count, DecodeTile *tiles, const TileShape *s) {
    __m256i x[2][4];
    DecodeTile t[2];
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    for (int i = 0; i < count; i++) {
        t[i] = tiles[i];
        load_states256(x[i], t[i].state);
    }
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t row = r * s->cols;
        for (int64_t c = 0; c < s->cols; c += LANES) {
            int out = 0;
            UNROLL for (int i = 0; i < count; i++) out |= t[i].words > t[i].end;
            if (__builtin_expect(out, 0)) return 0;
            if (c < whole) {
                uint8_t *const to[2] = {t[0].dst + row + c, t[count - 1].dst + row + c};
                decode_round256(count, t, x, to, s->ids + c, s->table);
            } else {
                uint8_t last[2][LANES], *const to[2] = {last[0], last[1]};
                decode_round256(count, t, x, to, s->ids + c, s->table);
                UNROLL for (int i = 0; i < count; i++) memcpy(t[i].dst + row + c, last[i], (size_t)tail);
            }
        }
    }
    for (int i = 0; i < count; i++) {
        store_states256(t[i].state, x[i]);
        tiles[i] = t[i];
    }
    return 1;
}

TARGET_AVX2 static void encode_one_avx2(EncodeTile *t, const TileShape *s) { encode_tiles256(1, t, s); }
TARGET_AVX2 static void encode_pair_avx2(EncodeTile *t, const TileShape *s) { encode_tiles256(2, t, s); }
TARGET_AVX2 static int decode_one_avx2(DecodeTile *t, const TileShape *s) { return decode_tiles256(1, t, s); }
TARGET_AVX2 static int decode_pair_avx2(DecodeTile *t, const TileShape *s) { return decode_tiles256(2, t, s); }

/* ---- AVX-512 (F, BW, VL, DQ: Skylake-X and Zen 4 onwards) --------------------------------------------------------------- */

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,popcnt")))

TARGET_AVX512 INLINE __m512i look_up512(const int gathers, const uint32_t *table, __m512i index) {
    if (gathers) return _mm512_i32gather_epi32(index, table, 4);
    __m256i low = look_up256(table, _mm512_castsi512_si256(index));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), look_up256(table, _mm512_extracti64x4_epi64(index, 1)), 1);
}

TARGET_AVX512 INLINE void load_states512(__m512i x[2], const uint32_t *state) {
    x[0] = _mm512_loadu_si512(state);
    x[1] = _mm512_loadu_si512(state + 16);
}

TARGET_AVX512 INLINE void store_states512(uint32_t *state, const __m512i x[2]) {
    _mm512_storeu_si512(state, x[0]);
    _mm512_storeu_si512(state + 16, x[1]);
}

/* One group of 16 lanes of one tile. */
TARGET_AVX512 INLINE __m512i encode_group512(EncodeTile *t, __m512i x, __m512i e, const uint8_t *at) {
    __m512i f = _mm512_srli_epi32(e, 12);
    __mmask16 full = _mm512_cmpge_epi32_mask(_mm512_srli_epi32(x, 20), f);
    int n = __builtin_popcount(full);
    __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x));
    t->words -= 2 * n;
    _mm256_mask_storeu_epi16(t->words, (__mmask16)_bzhi_u32(0xffff, (unsigned)n), words);
    x = _mm512_mask_srli_epi32(x, full, x, 16);
    /* x < 2^31 rounded toward zero, divided toward zero, is at most 1 below the true quotient, which is < 2^20. */
    __m512 ratio = _mm512_div_round_ps(_mm512_cvt_roundepi32_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC),
                                       _mm512_cvtepi32_ps(f), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m512i q = _mm512_cvttps_epi32(ratio);
    __m512i gap = _mm512_sub_epi32(_mm512_set1_epi32(SLOTS), f);
    __m512i y = _mm512_add_epi32(x, _mm512_mullo_epi32(q, gap)); /* q * 2^11 + remainder */
    __m512i rest = _mm512_sub_epi32(y, _mm512_slli_epi32(q, PROB_BITS));
    y = _mm512_mask_add_epi32(y, _mm512_cmpge_epi32_mask(rest, f), y, gap);
    __mmask16 rare = _mm512_test_epi32_mask(e, _mm512_set1_epi32(ENC_ESCAPE));
    if (__builtin_expect(rare != 0, 0)) {
        for (int i = 15; i >= 0; i--)
            if (rare >> i & 1) *--t->escapes = at[i];
    }
    return _mm512_add_epi32(y, _mm512_and_si512(e, _mm512_set1_epi32(SLOTS - 1)));
}

/* One round of `count` tiles, `at` bytes into each; `live` are its real columns. */
TARGET_AVX512 INLINE void encode_round512(const int gathers, const int count, EncodeTile *t, __m512i x[][2], int64_t at,
                                               const uint8_t *ids, __mmask32 live, const uint32_t *table) {
    enum { AHEAD = 2 };
    __m512i e[4];
    UNROLL for (int k = 0; k < 2 * count + AHEAD; k++) {
        if (k < 2 * count) {
            const int half = 1 - k / count, i = k % count;
            __m512i id = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(ids + 16 * half))), 8);
            __m128i symbol = _mm_maskz_loadu_epi8((__mmask16)(live >> (16 * half)), t[i].src + at + 16 * half);
            e[k] = look_up512(gathers, table, _mm512_or_si512(id, _mm512_cvtepu8_epi32(symbol)));
        }
        if (k >= AHEAD) {
            const int j = k - AHEAD, half = 1 - j / count, i = j % count;
            x[i][half] = encode_group512(&t[i], x[i][half], e[j], t[i].src + at + 16 * half);
        }
    }
}

TARGET_AVX512 INLINE void encode_tiles512(const int gathers, const int count, EncodeTile *tiles, const TileShape *s) {
    __m512i x[2][2];
    EncodeTile t[2];
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    const __mmask32 tail_live = ((__mmask32)1 << tail) - 1;
    for (int i = 0; i < count; i++) {
        t[i] = tiles[i];
        load_states512(x[i], t[i].state);
    }
    for (int64_t r = s->rows - 1; r >= 0; r--) {
        const int64_t row = r * s->cols;
        if (tail) encode_round512(gathers, count, t, x, row + whole, s->ids + whole, tail_live, s->table);
        for (int64_t c = whole - LANES; c >= 0; c -= LANES)
            encode_round512(gathers, count, t, x, row + c, s->ids + c, (__mmask32)-1, s->table);
    }
    for (int i = 0; i < count; i++) {
        store_states512(t[i].state, x[i]);
        tiles[i] = t[i];
    }
}

/* One group of 16 lanes of one tile; `live` are its real columns. */
TARGET_AVX512 INLINE __m512i decode_group512(const uint8_t **words, __m512i x, __m512i e, uint8_t *at, __mmask16 live) {
    if (live == 0xffff)
        _mm_storeu_si128((__m128i *)at, _mm512_cvtepi32_epi8(e));
    else
        _mm_mask_storeu_epi8(at, live, _mm512_cvtepi32_epi8(e));
    __m512i bias = _mm512_and_si512(_mm512_srli_epi32(e, 8), _mm512_set1_epi32(SLOTS - 1));
    x = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(e, 19), _mm512_srli_epi32(x, PROB_BITS)), bias);
    __mmask16 low = _mm512_cmplt_epi32_mask(x, _mm512_set1_epi32((int)STATE_LOW));
    __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)*words));
    *words += 2 * __builtin_popcount(low);
    return _mm512_mask_or_epi32(x, low, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(low, word));
}

TARGET_AVX512 INLINE int decode_round512(const int gathers, const int count, DecodeTile *t, __m512i x[][2], int64_t at,
                                              const uint8_t *ids, __mmask32 live, const uint32_t *table) {
    enum { AHEAD = 1 };
    __m512i e[4], id[2];
    int out = 0;
    UNROLL for (int i = 0; i < count; i++) out |= t[i].words > t[i].end;
    if (__builtin_expect(out, 0)) return 0;
    for (int half = 0; half < 2; half++)
        id[half] = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(ids + 16 * half))), PROB_BITS);
    UNROLL for (int k = 0; k < 2 * count + AHEAD; k++) {
        if (k < 2 * count) {
            const int half = k / count, i = k % count;
            __m512i slot = _mm512_and_si512(x[i][half], _mm512_set1_epi32(SLOTS - 1));
            e[k] = look_up512(gathers, table, _mm512_or_si512(id[half], slot));
        }
        if (k >= AHEAD) {
            const int j = k - AHEAD, half = j / count, i = j % count;
            x[i][half] = decode_group512(&t[i].words, x[i][half], e[j], t[i].dst + at + 16 * half,
                                         (__mmask16)(live >> (16 * half)));
        }
    }
    return 1;
}

/* 0 if the words of any of the tiles ran out. */
TARGET_AVX512 INLINE int decode_tiles512(const int gathers, const int count, DecodeTile *tiles, const TileShape *s) {
    __m512i x[2][2];
    DecodeTile t[2];
    const int64_t tail = s->cols % LANES, whole = s->cols - tail;
    const __mmask32 tail_live = ((__mmask32)1 << tail) - 1;
    for (int i = 0; i < count; i++) {
        t[i] = tiles[i];
        load_states512(x[i], t[i].state);
    }
    for (int64_t r = 0; r < s->rows; r++) {
        const int64_t row = r * s->cols;
        for (int64_t c = 0; c < whole; c += LANES)
            if (!decode_round512(gathers, count, t, x, row + c, s->ids + c, (__mmask32)-1, s->table)) return 0;
        if (tail && !decode_round512(gathers, count, t, x, row + whole, s->ids + whole, tail_live, s->table)) return 0;
    }
    for (int i = 0; i < count; i++) {
        store_states512(t[i].state, x[i]);
        tiles[i] = t[i];
    }
    return 1;
}

TARGET_AVX512 static void encode_one_avx512(EncodeTile *t, const TileShape *s) { encode_tiles512(0, 1, t, s); }
TARGET_AVX512 static void encode_pair_avx512(EncodeTile *t, const TileShape *s) { encode_tiles512(0, 2, t, s); }
TARGET_AVX512 static int decode_one_avx512(DecodeTile *t, const TileShape *s) { return decode_tiles512(0, 1, t, s); }
TARGET_AVX512 static int decode_pair_avx512(DecodeTile *t, const TileShape *s) { return decode_tiles512(0, 2, t, s); }
TARGET_AVX512 static void encode_one_avx512_gather(EncodeTile *t, const TileShape *s) { encode_tiles512(1, 1, t, s); }
TARGET_AVX512 static void encode_pair_avx512_gather(EncodeTile *t, const TileShape *s) { encode_tiles512(1, 2, t, s); }
TARGET_AVX512 static int decode_one_avx512_gather(DecodeTile *t, const TileShape *s) { return decode_tiles512(1, 1, t, s); }
TARGET_AVX512 static int decode_pair_avx512_gather(DecodeTile *t, const TileShape *s) { return decode_tiles512(1, 2, t, s); }
#endif
#endif
