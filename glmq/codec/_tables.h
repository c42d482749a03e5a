/* Which class each column belongs to, and the frequencies of each class. Integers only: tables.py computes the same, and its
 * docstring says how and why. */
#ifndef GQSC_TABLES_H
#define GQSC_TABLES_H

#include "../_native.h"

enum {
    MAX_CLASSES = 8,
    FOLDS = 64,
    SCALE_GROUPS = 128,
    SAMPLE = 1 << 20,
    LEAST_SAMPLE = 3 << 14,
    MAX_SAMPLED_ROWS = 32767,
    MIN_CLASSIFIED_ROWS = 8,
    MAX_CLASSIFIED_COLS = 1 << 16,
    TABLE_COST = 600,
    ROUNDS = 2,
    BLOCK = 128,
    LOG_STEPS = 1024,
    FREQUENCY_SUM = 2048,
    ESCAPE = 0x80
};

static uint8_t fold_of[256];
static uint32_t log_fraction[LOG_STEPS + 1];

static int magnitude_fold(int m) {
    if (m < 16) return m;
    if (m < 32) return 16 + (m - 16) / 2;
    if (m < 64) return 24 + (m - 32) / 8;
    return m < 128 ? 28 + (m - 64) / 16 : 31;
}

static int fold_magnitude(int fold) {
    if (fold < 16) return fold;
    if (fold < 24) return 16 + (fold - 16) * 2;
    if (fold < 28) return 32 + (fold - 24) * 8;
    return 64 + (fold - 28) * 16;
}

static void fill_tables(void) {
    for (int s = 0; s < 256; s++) fold_of[s] = (uint8_t)(s < 128 ? magnitude_fold(s) : 32 + magnitude_fold(256 - s));
    for (uint64_t i = 0; i <= LOG_STEPS; i++) {
        uint64_t y = (LOG_STEPS + i) << 21; /* in [2^31, 2^32] */
        uint32_t bits = 0;
        if (i == LOG_STEPS) {
            log_fraction[i] = 1 << 16;
            break;
        }
        for (int b = 0; b < 16; b++) {
            y = y * y >> 31;
            bits <<= 1;
            if (y >> 32) {
                bits |= 1;
                y >>= 1;
            }
        }
        log_fraction[i] = bits;
    }
}

/* log2(n) * 2^16, and 0 for n = 0. */
static int64_t log2_fixed(uint32_t n) {
    if (n == 0) return 0;
    int e = 31 - __builtin_clz(n);
    uint32_t m = n << (31 - e);
    uint32_t i = (m >> 21) & (LOG_STEPS - 1);
    uint64_t rise = log_fraction[i + 1] - log_fraction[i];
    return ((int64_t)e << 16) + log_fraction[i] + (int64_t)(rise * (m & 0x1fffff) >> 21);
}

typedef struct {
    const uint8_t *matrix;
    int64_t rows, cols, sampled;
} Sample;

/* Row i of the sample; `second` takes other rows of the same stretches. */
static const uint8_t *sampled_row(const Sample *s, int64_t i, int second) {
    int64_t stride = s->rows / s->sampled;
    int64_t start = i * stride + i * (s->rows % s->sampled) / s->sampled;
    return s->matrix + (start + (i + (second ? stride / 2 : 0)) % stride) * s->cols;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t count_sampled_rows(int64_t rows, int64_t cols) {
    int64_t wanted = smaller((SAMPLE + cols - 1) / cols, rows / 3), least = (LEAST_SAMPLE + cols - 1) / cols;
    return smaller(smaller(wanted > least ? wanted : least, MAX_SAMPLED_ROWS), rows);
}

/* Bits * 2^16 of coding `hist` with its own frequencies. */
static int64_t code_bits(const uint32_t *hist) {
    int64_t bits = 0, total = 0;
    for (int b = 0; b < FOLDS; b++) {
        total += hist[b];
        bits -= hist[b] * log2_fixed(hist[b]);
    }
    return bits + total * log2_fixed((uint32_t)total);
}

static int64_t merge_loss(const uint32_t *a, const uint32_t *b, int64_t bits_a, int64_t bits_b) {
    uint32_t both[FOLDS];
    for (int i = 0; i < FOLDS; i++) both[i] = a[i] + b[i];
    return code_bits(both) - bits_a - bits_b;
}

static int bits_for(int classes) {
    int bits = 0;
    while (1 << bits < classes) bits++;
    return bits;
}

/* Merge neighbouring scale groups into classes: `klass` of each of SCALE_GROUPS; returns how many. */
static int merge_groups(const Sample *s, uint32_t group[SCALE_GROUPS][FOLDS], const int64_t *columns, uint8_t *klass) {
    uint32_t hist[SCALE_GROUPS][FOLDS];
    int64_t bits[SCALE_GROUPS], loss[SCALE_GROUPS], total = 0;
    uint8_t at[SCALE_GROUPS] = {0};
    int n = 0;
    for (int g = 0; g < SCALE_GROUPS; g++) {
        if (columns[g]) {
            memcpy(hist[n], group[g], sizeof hist[n]);
            bits[n] = code_bits(hist[n]);
            total += bits[n++];
        }
        at[g] = (uint8_t)(n ? n - 1 : 0);
    }
    for (int i = 0; i + 1 < n; i++) loss[i] = merge_loss(hist[i], hist[i + 1], bits[i], bits[i + 1]);
    int best = 0;
    int64_t best_cost = 0;
    for (;;) {
        if (n <= MAX_CLASSES) {
            int64_t side = ((int64_t)n * TABLE_COST + bits_for(n) * s->cols) << 16;
            int64_t cost = total + side * s->sampled / s->rows;
            if (best == 0 || cost <= best_cost) {
                best = n;
                best_cost = cost;
                memcpy(klass, at, sizeof at);
            }
        }
        if (n == 1) return best;
        int i = 0;
        for (int j = 1; j + 1 < n; j++)
            if (loss[j] < loss[i]) i = j;
        total += loss[i];
        bits[i] += bits[i + 1] + loss[i];
        for (int b = 0; b < FOLDS; b++) hist[i][b] += hist[i + 1][b];
        n--;
        memmove(hist[i + 1], hist[i + 2], sizeof hist[0] * (size_t)(n - i - 1));
        memmove(bits + i + 1, bits + i + 2, sizeof bits[0] * (size_t)(n - i - 1));
        if (n - i - 1 > 0) memmove(loss + i + 1, loss + i + 2, sizeof loss[0] * (size_t)(n - i - 1));
        for (int g = 0; g < SCALE_GROUPS; g++) at[g] -= at[g] > i;
        if (i > 0) loss[i - 1] = merge_loss(hist[i - 1], hist[i], bits[i - 1], bits[i]);
        if (i + 1 < n) loss[i] = merge_loss(hist[i], hist[i + 1], bits[i], bits[i + 1]);
    }
}

static void sum_classes(const int16_t *hist, const uint8_t *klass, int64_t cols, uint32_t sums[MAX_CLASSES][FOLDS]) {
    memset(sums, 0, sizeof(uint32_t) * MAX_CLASSES * FOLDS);
    for (int64_t c = 0; c < cols; c++) {
        uint32_t *sum = sums[klass[c]];
        const int16_t *h = hist + c * FOLDS;
        for (int b = 0; b < FOLDS; b++) sum[b] += (uint32_t)h[b];
    }
}

/* Move each column to the class that codes it in the fewest bits; `klass` is in and out. */
static void reassign(const int16_t *hist, uint8_t *klass, int64_t cols, int classes) {
    uint32_t sums[MAX_CLASSES][FOLDS];
    int16_t length[MAX_CLASSES][FOLDS];
    sum_classes(hist, klass, cols, sums);
    for (int k = 0; k < classes; k++) {
        uint32_t total = 0;
        for (int b = 0; b < FOLDS; b++) total += sums[k][b];
        int64_t whole = log2_fixed(2 * total + FOLDS);
        for (int b = 0; b < FOLDS; b++) length[k][b] = (int16_t)((whole - log2_fixed(2 * sums[k][b] + 1)) >> 8);
    }
    for (int64_t c = 0; c < cols; c++) {
        const int16_t *h = hist + c * FOLDS;
        int32_t least = INT32_MAX;
        for (int k = 0; k < classes; k++) {
            int32_t bits = 0;
            for (int b = 0; b < FOLDS; b++) bits += (int32_t)h[b] * length[k][b];
            if (bits < least) {
                least = bits;
                klass[c] = (uint8_t)k;
            }
        }
    }
}

/* Class of every column; returns how many classes, or 0 if there is no memory. */
static int choose_classes(const Sample *s, uint8_t *klass) {
    memset(klass, 0, (size_t)s->cols);
    if (s->rows < MIN_CLASSIFIED_ROWS || s->cols > MAX_CLASSIFIED_COLS) return 1;
    int16_t *hist = calloc((size_t)s->cols * FOLDS, sizeof *hist);
    if (!hist) return 0;
    for (int64_t c0 = 0; c0 < s->cols; c0 += BLOCK) {
        int64_t n = s->cols - c0 < BLOCK ? s->cols - c0 : BLOCK;
        int16_t *block = hist + c0 * FOLDS;
        for (int64_t i = 0; i < s->sampled; i++) {
            const uint8_t *row = sampled_row(s, i, 0) + c0;
            int16_t *h = block;
            int64_t c = 0;
            for (; c + 4 <= n; c += 4, h += 4 * FOLDS) { /* unrolled by hand: a quarter faster */
                h[fold_of[row[c]]]++;
                h[FOLDS + fold_of[row[c + 1]]]++;
                h[2 * FOLDS + fold_of[row[c + 2]]]++;
                h[3 * FOLDS + fold_of[row[c + 3]]]++;
            }
            for (; c < n; c++, h += FOLDS) h[fold_of[row[c]]]++;
        }
    }
    uint32_t group[SCALE_GROUPS][FOLDS] = {{0}};
    int64_t columns[SCALE_GROUPS] = {0};
    int16_t magnitude[FOLDS];
    for (int b = 0; b < FOLDS; b++) magnitude[b] = (int16_t)fold_magnitude(b & 31);
    for (int64_t c = 0; c < s->cols; c++) {
        const int16_t *h = hist + c * FOLDS;
        int32_t sum = 0;
        for (int b = 0; b < FOLDS; b++) sum += (int32_t)h[b] * magnitude[b];
        int g = (int)(log2_fixed((uint32_t)((int64_t)sum * 256 / s->sampled + 1)) >> 13);
        klass[c] = (uint8_t)g;
        columns[g]++;
        for (int b = 0; b < FOLDS; b++) group[g][b] += (uint32_t)h[b];
    }
    uint8_t of_group[SCALE_GROUPS];
    int classes = merge_groups(s, group, columns, of_group);
    for (int64_t c = 0; c < s->cols; c++) klass[c] = of_group[klass[c]];
    for (int round = 0; round < ROUNDS && classes > 1; round++) reassign(hist, klass, s->cols, classes);
    free(hist);
    int used[MAX_CLASSES] = {0}, kept = 0;
    uint8_t renumber[MAX_CLASSES];
    for (int64_t c = 0; c < s->cols; c++) used[klass[c]] = 1;
    for (int k = 0; k < MAX_CLASSES; k++) {
        renumber[k] = (uint8_t)kept;
        kept += used[k];
    }
    for (int64_t c = 0; c < s->cols; c++) klass[c] = renumber[klass[c]];
    return kept;
}

/* Frequencies of sum 2048 from counts; 0 for what is written as an escape. */
static void normalise(const uint32_t *counts, uint16_t *frequencies) {
    uint64_t total = 0, n[256];
    for (int s = 0; s < 256; s++) total += counts[s];
    total += 1;
    uint64_t escaped = 1;
    for (int s = 0; s < 256; s++) {
        int rare = s == ESCAPE || (uint64_t)counts[s] * 4 * FREQUENCY_SUM < total;
        n[s] = rare ? 0 : counts[s];
        if (rare) escaped += counts[s];
    }
    n[ESCAPE] = escaped;
    int left = FREQUENCY_SUM, live[256], count = 0;
    for (int s = 0; s < 256; s++) {
        uint64_t f = (n[s] * 2 * FREQUENCY_SUM + total) / (2 * total);
        frequencies[s] = (uint16_t)(n[s] && !f ? 1 : f);
        left -= frequencies[s];
        if (n[s]) live[count++] = s;
    }
    /* Give or take single slots where that changes the coded size least: n * log2((f + 1) / f) is about n / (f + 1/2). */
    for (; left != 0; left += left > 0 ? -1 : 1) {
        int best = -1;
        uint64_t best_key = 0;
        for (int i = 0; i < count; i++) {
            int s = live[i];
            uint64_t f = frequencies[s];
            if (left < 0 && f == 1) continue;
            uint64_t key = (n[s] << 24) / (left > 0 ? 2 * f + 1 : 2 * f - 1);
            if (best < 0 || (left > 0 ? key > best_key : key < best_key)) {
                best = s;
                best_key = key;
            }
        }
        frequencies[best] = (uint16_t)(frequencies[best] + (left > 0 ? 1 : -1));
    }
}

/* Classes and frequencies of a matrix; returns how many classes, or 0 if there is no memory. */
static int choose_tables(const uint8_t *matrix, int64_t rows, int64_t cols, uint8_t *klass, uint16_t frequencies[][256]) {
    Sample s = {matrix, rows, cols, count_sampled_rows(rows, cols)};
    int classes = choose_classes(&s, klass);
    /* Neighbouring columns count into different copies, so that equal symbols do not wait for each other. */
    uint32_t counts[2][MAX_CLASSES][256];
    memset(counts, 0, sizeof counts);
    for (int64_t i = 0; i < s.sampled; i++) {
        const uint8_t *row = sampled_row(&s, i, 1);
        int64_t c = 0;
        for (; c + 4 <= cols; c += 4) {
            counts[0][klass[c]][row[c]]++;
            counts[1][klass[c + 1]][row[c + 1]]++;
            counts[0][klass[c + 2]][row[c + 2]]++;
            counts[1][klass[c + 3]][row[c + 3]]++;
        }
        for (; c < cols; c++) counts[0][klass[c]][row[c]]++;
    }
    for (int k = 0; k < classes; k++) {
        for (int b = 0; b < 256; b++) counts[0][k][b] += counts[1][k][b];
        normalise(counts[0][k], frequencies[k]);
    }
    return classes;
}

/* encoder_table of tables.py: per class and value, and for the padding class after them. */
static void fill_encoder_table(const uint16_t frequencies[][256], int classes, uint32_t table[][256]) {
    for (int k = 0; k < classes; k++) {
        uint32_t first = 0;
        for (int s = 0; s < 256; s++) {
            table[k][s] = (uint32_t)frequencies[k][s] << 12 | first;
            first += frequencies[k][s];
        }
        uint32_t escape = table[k][ESCAPE] | 1 << 11;
        for (int s = 0; s < 256; s++)
            if (s == ESCAPE || !frequencies[k][s]) table[k][s] = escape;
    }
    for (int s = 0; s < 256; s++) table[classes][s] = (uint32_t)FREQUENCY_SUM << 12;
}
#endif
