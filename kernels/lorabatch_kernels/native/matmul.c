/* y = x W^T + bias over weights in panels.

   One work item is a panel of 32 outputs and a block of tokens. The weights of a panel pass through
   the registers once for every ROWS tokens; sums stay there in fp32. Every sum runs over the same
   terms in the same order whatever else is in the batch. In bf16, where a panel is multiplied faster
   than it is read, the panel that the thread likely takes next is fetched while this one, which is in
   the cache after the first ROWS tokens, is used again. */
#include "team.h"
#include "vec.h"
#include <omp.h>
#include <stddef.h>

#define COLUMNS 32
#define BLOCK 192 /* tokens of a work item */

/* As wide as the processor's own registers: gcc keeps wider ones in memory. */
#if defined __AVX512F__
#define WIDE 16
#define ROWS 12
#elif defined __AVX__
#define WIDE 8
#define ROWS 3
#else
#define WIDE 4
#define ROWS 3
#endif
#define PARTS (COLUMNS / WIDE)
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint32_t uwide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

/* acc + x[0] * w[.][0] + x[1] * w[.][1] of WIDE outputs */
INLINE wide dot2(wide acc, const uint16_t *x, const uint16_t *w) {
#if defined __AVX512BF16__ && WIDE == 16
    uint32_t pair;
    memcpy(&pair, x, 4);
    return (wide)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair),
                                  (__m512bh)_mm512_loadu_si512(w));
#else
    uwide bits = *(const uwide *)w;
    acc += widen(x[0]) * (wide)(bits << 16);
    return acc + widen(x[1]) * (wide)(bits & 0xffff0000);
#endif
}

/* A row of sums, with the bias, to `columns` outputs from `column` on. */
INLINE void put_row(void *y, const float *sums, const Weight *weight, long column, long columns,
                    int half) {
    const void *bias = weight->bias;
    long c = 0;
    for (; c + LANES <= columns; c += LANES) {
        vec sum = *(const vec *)(sums + c);
        if (bias) sum += load(bias, column + c, half);
        store(y, c, sum, half);
    }
    for (; c < columns; c++) put(y, c, bias ? sums[c] + get(bias, column + c, half) : sums[c], half);
}

/* `rows` is known to the compiler; columns: how many of the panel's outputs there are; ahead: in / 2
   cache lines to fetch, or NULL. */
INLINE void tile(void *y, const void *x, const Weight *weight, const void *panel, long column,
                 long columns, const char *ahead, int rows, int half) {
    long in = weight->in;
    wide acc[ROWS][PARTS];
    for (int t = 0; t < rows; t++)
        for (int p = 0; p < PARTS; p++) acc[t][p] = (wide){0};
    if (half) {
        const uint16_t *w = panel;
        for (long k = 0; k < in; k += 2, w += 2 * COLUMNS) {
            __builtin_prefetch(w + 48 * COLUMNS);
            __builtin_prefetch(w + 49 * COLUMNS);
            if (ahead) __builtin_prefetch(ahead + 32 * k, 0, 2);
            for (int t = 0; t < rows; t++) /* outside, so that gcc needs one register for x */
                for (int p = 0; p < PARTS; p++)
                    acc[t][p] = dot2(acc[t][p], (const uint16_t *)x + t * in + k, w + 2 * WIDE * p);
        }
    } else {
        const float *w = panel;
        for (long k = 0; k < in; k++, w += COLUMNS)
            for (int p = 0; p < PARTS; p++) {
                wide part = *(const wide *)(w + WIDE * p);
                for (int t = 0; t < rows; t++) acc[t][p] += ((const float *)x)[t * in + k] * part;
            }
    }
    for (int t = 0; t < rows; t++) {
        float sums[COLUMNS];
        for (int p = 0; p < PARTS; p++) *(wide *)(sums + WIDE * p) = acc[t][p];
        put_row((void *)at(y, t * weight->out + column, half), sums, weight, column, columns, half);
    }
}

INLINE void any_tile(void *y, const void *x, const Weight *weight, const void *panel, long column,
                     long columns, const char *ahead, long rows, int half) {
    switch (rows) {
#define CASE(n)                                                     \
    case n:                                                         \
        tile(y, x, weight, panel, column, columns, ahead, n, half); \
        return;
        CASE(1) CASE(2) CASE(3)
#if ROWS > 3
        CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

/* Tokens [begin, end) times panel p; next: another panel, or p. */
INLINE void block(void *y, const void *x, const Weight *weight, long p, long next, long begin,
                  long end, int half) {
    const void *panel = at(weight->panels, p * weight->in * COLUMNS, half);
    const char *ahead = at(weight->panels, next * weight->in * COLUMNS, half);
    long column = p * COLUMNS, columns = weight->out - column, tiles = (end - begin + ROWS - 1) / ROWS;
    if (columns > COLUMNS) columns = COLUMNS;
    for (long i = 0; i < tiles; i++) {
        long first = begin + (end - begin) * i / tiles, last = begin + (end - begin) * (i + 1) / tiles;
        int fetches = next != p && (i == 1 || i == 2); /* half of it each */
        any_tile((void *)at(y, first * weight->out, half), at(x, first * weight->in, half), weight,
                 panel, column, columns, fetches ? ahead + (i - 1) * weight->in * COLUMNS : NULL,
                 last - first, half);
    }
}

void team_matmul(void *y, const void *x, const Weight *weight, long tokens, int half) {
    long panels = (weight->out + COLUMNS - 1) / COLUMNS, blocks = (tokens + BLOCK - 1) / BLOCK;
    long items = panels * blocks, threads = omp_get_num_threads();
#pragma omp for schedule(dynamic)
    for (long item = 0; item < items; item++) {
        long i = item % blocks, begin = tokens * i / blocks, end = tokens * (i + 1) / blocks;
        long p = item / blocks, next = item + threads < items ? (item + threads) / blocks : p;
        /* In the loop, so that each is compiled for its type. */
        if (half) block(y, x, weight, p, next, begin, end, 1);
        else block(y, x, weight, p, p, begin, end, 0);
    }
}

void lorabatch_matmul(void *y, const void *x, const Weight *weight, long tokens, int half) {
#pragma omp parallel
    team_matmul(y, x, weight, tokens, half);
}
