/* Rows of queries against a chunk of keys and values, which lie as they are cached: [key][width].

   Softmax goes on from chunk to chunk in fp32, with the running maximum and sum of each row.

   Where the processor multiplies pairs of bf16, prompts in bf16 are computed with them: two lanes of a
   key, or two keys' values, side by side, and weights are rounded to bf16. */
#ifndef LORABATCH_CHUNK_H
#define LORABATCH_CHUNK_H

#include "vec.h"

#define MAX_WIDTH 256
#define KEYS 64      /* keys of a chunk */
#define ROWS 6       /* rows of queries multiplied at once */
#define MOST_ROWS 96 /* rows of a work item */
#define WEIGHED 4    /* rows weighed at once; divides MOST_ROWS */

typedef struct {
    float query[MOST_ROWS][MAX_WIDTH];
    float total[MOST_ROWS][MAX_WIDTH];
    float keys[MAX_WIDTH][KEYS];        /* transposed */
    float values[KEYS / 2][MAX_WIDTH];  /* pairs */
    float score[MOST_ROWS][KEYS];
    float highest[MOST_ROWS], share[MOST_ROWS];
} Work; /* a float may hold a pair of bf16 */

/* acc + x * y; of pairs, + x[0] * y[0] + x[1] * y[1] */
INLINE vec multiply_add(vec acc, const float *x, vec y, int pairs) {
#ifdef __AVX512BF16__
    if (pairs) {
        int32_t both;
        memcpy(&both, x, 4);
        return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(both), (__m512bh)y);
    }
#endif
    return acc + *x * y;
}

/* score[r][0:count] of `rows` rows, whose keys lie as they are cached */
INLINE void score_few(float (*score)[KEYS], const float (*query)[MAX_WIDTH], const void *keys,
                      long width, long count, int rows, int half) {
    long j = 0;
    for (; j + 4 <= count; j += 4) {
        vec acc[4][4];
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < 4; k++) acc[r][k] = (vec){0};
        for (long d = 0; d < 4 * width; d += half ? 32 : 16) fetch(keys, j * width + d, half);
        for (long d = 0; d < width; d += LANES) {
            vec key[4];
            for (int k = 0; k < 4; k++) key[k] = load(keys, (j + k) * width + d, half);
            for (int r = 0; r < rows; r++) {
                vec q = *(const vec *)&query[r][d];
                for (int k = 0; k < 4; k++) acc[r][k] += q * key[k];
            }
        }
        for (int r = 0; r < rows; r++)
            *(quad *)&score[r][j] = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    }
    for (; j < count; j++)
        for (int r = 0; r < rows; r++) {
            vec acc = {0};
            for (long d = 0; d < width; d += LANES)
                acc += *(const vec *)&query[r][d] * load(keys, j * width + d, half);
            score[r][j] = sum4(acc, acc, acc, acc)[0];
        }
}

/* score[r][0:KEYS], or its first half, of `rows` rows, with transposed keys of `width` floats */
INLINE void score_rows(float (*score)[KEYS], const float (*query)[MAX_WIDTH],
                       const float (*keys)[KEYS], long width, int rows, int parts, int pairs) {
    vec acc[ROWS][KEYS / LANES];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < parts; c++) acc[r][c] = (vec){0};
    for (long d = 0; d < width; d++) {
        vec key[KEYS / LANES];
        for (int c = 0; c < parts; c++) key[c] = *(const vec *)&keys[d][c * LANES];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < parts; c++)
                acc[r][c] = multiply_add(acc[r][c], &query[r][d], key[c], pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < parts; c++) *(vec *)&score[r][c * LANES] = acc[r][c];
}

/* total[r][d:d+64] += score[r][0:count] * values[0:count][d:d+64]; `lanes` vectors of them */
INLINE void add_values(float (*total)[MAX_WIDTH], const float (*score)[KEYS], const void *values,
                       long row, long d, long count, int rows, int lanes, int fetches, int half,
                       int pairs) {
    vec acc[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < lanes; c++) acc[r][c] = *(vec *)&total[r][d + c * LANES];
    for (long j = 0; j < count; j++) {
        vec value[4];
        for (long c = 0; fetches && c < lanes * LANES; c += half ? 32 : 16)
            fetch(values, j * row + d + c, half);
        for (int c = 0; c < lanes; c++) value[c] = load(values, j * row + d + c * LANES, half);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < lanes; c++)
                acc[r][c] = multiply_add(acc[r][c], &score[r][j], value[c], pairs);
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < lanes; c++) *(vec *)&total[r][d + c * LANES] = acc[r][c];
}

/* `rows` of them at a time, then three, then one */
INLINE void add_all_values(Work *w, long rows, const void *values, long row, long width, long count,
                           int few, int half, int pairs) {
    const float(*score)[KEYS] = (const float(*)[KEYS])w->score;
    for (long d = 0; d < width;) {
        int whole = d + 4 * LANES <= width;
#define CALL(n, lanes) \
    add_values(w->total + r, score + r, values, row, d, count, n, lanes, few && r == 0, half, pairs)
        long r = 0;
        for (; r + ROWS <= rows; r += ROWS) whole ? CALL(ROWS, 4) : CALL(ROWS, 1);
        for (; r + 3 <= rows; r += 3) whole ? CALL(3, 4) : CALL(3, 1);
        for (; r < rows; r++) whole ? CALL(1, 4) : CALL(1, 1);
#undef CALL
        d += whole ? 4 * LANES : LANES;
    }
}

/* Scores of keys [from, to) of a chunk become weights, of WEIGHED rows at once; the others' weights are 0.
   A NaN stays one. */
INLINE void weigh(Work *w, long r, const long *from, const long *to, long width, float scale,
                  float softcap, int pairs) {
    vec most[WEIGHED], shares[WEIGHED];
    for (int i = 0; i < WEIGHED; i++) {
        float *score = w->score[r + i];
        for (long j = 0; j < KEYS; j += LANES) *(vec *)&score[j] *= scale;
        if (softcap > 0)
            for (long j = from[i]; j < to[i]; j++) score[j] = softcap * tanhf(score[j] / softcap);
        if (from[i] > 0 || to[i] < KEYS)
            for (long j = 0; j < KEYS; j += LANES) {
                ivec key = lane_numbers() + (int32_t)j;
                ivec seen = (key >= (int32_t)from[i]) & (key < (int32_t)to[i]);
                *(vec *)&score[j] = choose(seen, *(vec *)&score[j], all(-INFINITY));
            }
        most[i] = *(vec *)score;
        for (long j = LANES; j < KEYS; j += LANES) most[i] = larger(most[i], *(vec *)&score[j]);
    }
    quad before = *(quad *)&w->highest[r], highest = largest4(most[0], most[1], most[2], most[3]);
    vec keep = {0};
    float limit[WEIGHED];
    for (int i = 0; i < WEIGHED; i++) {
        if (before[i] > highest[i]) highest[i] = before[i];
        limit[i] = highest[i] == -INFINITY ? 0 : highest[i]; /* nothing seen yet: weights are 0 */
        keep[i] = before[i] - limit[i];
    }
    keep = expv(keep);
    for (int i = 0; i < WEIGHED; i++) {
        float *score = w->score[r + i];
        shares[i] = (vec){0};
        for (long j = 0; j < KEYS; j += LANES) {
            vec weight = expv(*(vec *)&score[j] - limit[i]);
            store(score, j, weight, pairs);
            shares[i] += weight;
        }
        if (highest[i] != before[i])
            for (long d = 0; d < width; d += LANES) *(vec *)&w->total[r + i][d] *= keep[i];
    }
    *(quad *)&w->highest[r] = highest;
    quad sums = sum4(shares[0], shares[1], shares[2], shares[3]);
    for (int i = 0; i < WEIGHED; i++) w->share[r + i] = w->share[r + i] * keep[i] + sums[i];
}

/* to[d][j] = keys[j][d], zeros from `count` on; `width` floats each */
INLINE void transpose(float (*to)[KEYS], const void *keys, long width, long count, int half) {
    for (long j = 0; j < KEYS; j += 4)
        for (long d = 0; d < width; d += LANES) {
            vec row[4];
            for (int k = 0; k < 4; k++)
                row[k] = j + k < count ? load(keys, (j + k) * width + d, half) : (vec){0};
            for (int lane = 0; lane < LANES; lane++)
                *(quad *)&to[d + lane][j] =
                    (quad){row[0][lane], row[1][lane], row[2][lane], row[3][lane]};
        }
}

/* to[j][d] = the pair values[2 j][d], values[2 j + 1][d], the second zero from `count` on */
INLINE void pair(float (*to)[MAX_WIDTH], const uint16_t *values, long width, long count) {
    for (long j = 0; j < count; j += 2)
        for (long d = 0; d < width; d += LANES) {
            const uint16_t *first = values + j * width + d, *second = first + width;
            uvec both = __builtin_convertvector(*(const hvec *)first, uvec);
            if (j + 1 < count) both |= __builtin_convertvector(*(const hvec *)second, uvec) << 16;
            *(uvec *)&to[j / 2][d] = both;
        }
}

/* `few`: keys and values are used as they are cached. */
INLINE void score_chunk(Work *w, long rows, const void *keys, long width, long count, int few,
                        int half, int pairs) {
    const float(*query)[MAX_WIDTH] = (const float(*)[MAX_WIDTH])w->query;
    const float(*turned)[KEYS] = (const float(*)[KEYS])w->keys;
    long r = 0;
    if (few) {
        for (; r + 3 <= rows; r += 3)
            score_few(w->score + r, query + r, keys, width, count, 3, half);
        for (; r < rows; r++) score_few(w->score + r, query + r, keys, width, count, 1, half);
        return;
    }
    long floats = pairs ? width / 2 : width;
    transpose(w->keys, keys, floats, count, half && !pairs);
    int most = KEYS / LANES, some = count <= KEYS / 2;
#define CALL(n, parts) score_rows(w->score + r, query + r, turned, floats, n, parts, pairs)
    for (; r + ROWS <= rows; r += ROWS) some ? CALL(ROWS, most / 2) : CALL(ROWS, most);
    for (; r + 3 <= rows; r += 3) CALL(3, most);
    for (; r < rows; r++) CALL(1, most);
#undef CALL
}

INLINE void add_chunk(Work *w, long rows, const void *values, long width, long count, int few,
                      int half, int pairs) {
    if (!pairs) {
        add_all_values(w, rows, values, width, width, count, few, half, 0);
        return;
    }
    pair(w->values, values, width, count);
    add_all_values(w, rows, w->values, MAX_WIDTH, width, (count + 1) / 2, 0, 0, 1);
}

#endif
