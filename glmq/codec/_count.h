/* How often each byte occurs; for the codec here, and for the comparison of weights in inspection. */
#ifndef GLMQ_COUNT_H
#define GLMQ_COUNT_H

#include <stdint.h>
#include <string.h>

enum { BYTE_VALUES = 256, COUNT_COPIES = 8, COUNTED_AT_ONCE = 1 << 30 /* what 32 bits can count */ };

/* Adds to `counts`, whose place of value v is v ^ flip. Eight copies of the table, so that equal neighbours do not wait for each
 * other; eight bytes are loaded together. */
static void count_bytes(const uint8_t *bytes, int64_t size, int64_t *counts, int flip) {
    while (size > 0) {
        const int64_t n = size < COUNTED_AT_ONCE ? size : COUNTED_AT_ONCE;
        uint32_t copies[COUNT_COPIES][BYTE_VALUES] = {{0}};
        int64_t i = 0;
        for (; i + COUNT_COPIES <= n; i += COUNT_COPIES) {
            uint64_t eight;
            memcpy(&eight, bytes + i, sizeof eight);
            for (int k = 0; k < COUNT_COPIES; k++) copies[k][eight >> 8 * k & 0xff]++;
        }
        for (; i < n; i++) copies[0][bytes[i]]++;
        for (int k = 0; k < COUNT_COPIES; k++)
            for (int value = 0; value < BYTE_VALUES; value++) counts[value ^ flip] += copies[k][value];
        bytes += n;
        size -= n;
    }
}
#endif
