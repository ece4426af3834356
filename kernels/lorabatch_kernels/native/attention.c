/* Attention of one layer's new tokens over cached keys and values, which it stores first.

   A span is a run of new tokens of one sequence: one token (decode) or a chunk of a prompt. Its keys
   lie side by side in the pool, [kv head][position][width], from `first` on; token i of the span is
   at position `past` + i and sees positions up to its own, the last `window` of them if window > 0.
   Softmax runs over chunks of keys in fp32, with the running maximum and sum of each row. Only a
   sequence's own positions are read, so nothing that others left in memory can reach it.

   Widths of keys and values are multiples of 16, at most MAX_WIDTH (checked by the caller). */
#include "team.h"
#include "vec.h"

#define MAX_WIDTH 256
#define KEYS 64      /* keys of a chunk */
#define ROWS 6       /* rows of queries multiplied at once */
#define MOST_ROWS 96 /* rows of a work item */

typedef struct {
    float query[MOST_ROWS][MAX_WIDTH];
    float total[MOST_ROWS][MAX_WIDTH];
    float keys[MAX_WIDTH][KEYS]; /* transposed */
    float score[MOST_ROWS][KEYS];
    float highest[MOST_ROWS], share[MOST_ROWS];
} Work;

INLINE void store_token(const Attention *l, long t, int half) {
    long key_bytes = l->width * (half ? 2 : 4), value_bytes = l->value_width * (half ? 2 : 4);
    for (long h = 0; h < l->kv_heads; h++) {
        long to = h * l->positions + l->index[t];
        memcpy((char *)l->keys + to * key_bytes,
               at(l->key.data, h * l->key.head + t * l->key.token, half), key_bytes);
        memcpy((char *)l->values + to * value_bytes,
               at(l->value.data, h * l->value.head + t * l->value.token, half), value_bytes);
    }
}

/* score[r][0:count] of `rows` rows, whose keys lie as they are cached */
INLINE void score_few(float (*score)[KEYS], const float (*query)[MAX_WIDTH], const void *keys,
                      long width, long count, int rows, int half) {
    long j = 0;
    for (; j + 4 <= count; j += 4) {
        vec acc[4][4];
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < 4; k++) acc[r][k] = (vec){0};
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

/* score[r][0:KEYS] of `rows` rows, with transposed keys */
INLINE void score_rows(float (*score)[KEYS], const float (*query)[MAX_WIDTH],
                       const float (*keys)[KEYS], long width, int rows) {
    vec acc[ROWS][KEYS / LANES];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < KEYS / LANES; c++) acc[r][c] = (vec){0};
    for (long d = 0; d < width; d++) {
        vec key[KEYS / LANES];
        for (int c = 0; c < KEYS / LANES; c++) key[c] = *(const vec *)&keys[d][c * LANES];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < KEYS / LANES; c++) acc[r][c] += query[r][d] * key[c];
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < KEYS / LANES; c++) *(vec *)&score[r][c * LANES] = acc[r][c];
}

/* total[r][d:d+64] += score[r][0:count] * values[0:count][d:d+64]; `lanes` vectors of them */
INLINE void add_values(float (*total)[MAX_WIDTH], const float (*score)[KEYS], const void *values,
                       long row, long d, long count, int rows, int lanes, int half) {
    vec acc[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < lanes; c++) acc[r][c] = *(vec *)&total[r][d + c * LANES];
    for (long j = 0; j < count; j++) {
        vec value[4];
        for (int c = 0; c < lanes; c++) value[c] = load(values, j * row + d + c * LANES, half);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < lanes; c++) acc[r][c] += score[r][j] * value[c];
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < lanes; c++) *(vec *)&total[r][d + c * LANES] = acc[r][c];
}

INLINE void add_all_values(float (*total)[MAX_WIDTH], const float (*score)[KEYS],
                           const void *values, long width, long count, int rows, int half) {
    long d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        add_values(total, score, values, width, d, count, rows, 4, half);
    for (; d < width; d += LANES) add_values(total, score, values, width, d, count, rows, 1, half);
}

/* Scores of keys [from, to) of a chunk become weights; the others' weights are 0. */
INLINE void weigh(Work *w, long r, long from, long to, long width, float softcap) {
    float *score = w->score[r];
    if (softcap > 0)
        for (long j = from; j < to; j++) score[j] = softcap * tanhf(score[j] / softcap);
    for (long j = 0; j < from; j++) score[j] = -INFINITY;
    for (long j = to > from ? to : from; j < KEYS; j++) score[j] = -INFINITY;
    vec most = *(vec *)score;
    for (long j = LANES; j < KEYS; j += LANES) most = larger(most, *(vec *)&score[j]);
    float before = w->highest[r], highest = largest(larger(most, all(before)));
    if (highest == -INFINITY) {
        memset(score, 0, sizeof w->score[r]);
        return;
    }
    vec shares = {0};
    for (long j = 0; j < KEYS; j += LANES) {
        vec weight = expv(*(vec *)&score[j] - highest);
        *(vec *)&score[j] = weight;
        shares += weight;
    }
    if (highest != before) {
        float keep = before == -INFINITY ? 0 : expf(before - highest);
        w->share[r] *= keep;
        for (long d = 0; d < width; d += LANES) *(vec *)&w->total[r][d] *= keep;
        w->highest[r] = highest;
    }
    w->share[r] += sum4(shares, shares, shares, shares)[0];
}

/* to[d][j] = keys[j][d], zeros from `count` on */
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

/* Tokens [begin, end) of a span, for all query heads of one kv head; rows are (token, head). */
INLINE void attend(const Attention *l, const Spans *s, long span, long kv_head, long begin, long end,
                   Work *w, long width, long value_width, int half) {
    long group = l->heads / l->kv_heads, rows = (end - begin) * group;
    long past = s->past[span], start = s->start[span];
    const void *keys = at(l->keys, (kv_head * l->positions + s->first[span]) * width, half);
    const void *values =
        at(l->values, (kv_head * l->positions + s->first[span]) * value_width, half);
    for (long r = 0; r < rows; r++) {
        long head = kv_head * group + r % group, token = start + begin + r / group;
        const void *query = at(l->query.data, head * l->query.head + token * l->query.token, half);
        for (long d = 0; d < width; d += LANES)
            *(vec *)&w->query[r][d] = load(query, d, half) * l->scale;
        for (long d = 0; d < value_width; d += LANES) *(vec *)&w->total[r][d] = (vec){0};
        w->highest[r] = l->sinks ? get(l->sinks, head, half) : -INFINITY;
        w->share[r] = l->sinks ? 1 : 0;
    }
    long lowest = l->window ? past + begin + 1 - l->window : 0;
    for (long k = lowest > 0 ? lowest : 0; k < past + end; k += KEYS) {
        long count = past + end - k < KEYS ? past + end - k : KEYS;
        const void *chunk = at(keys, k * width, half);
        const void *its_values = at(values, k * value_width, half);
        int few = end - begin == 1;
        if (few) {
            long r = 0;
            const float(*query)[MAX_WIDTH] = (const float(*)[MAX_WIDTH])w->query;
            for (; r + 3 <= rows; r += 3)
                score_few(w->score + r, query + r, chunk, width, count, 3, half);
            for (; r < rows; r++) score_few(w->score + r, query + r, chunk, width, count, 1, half);
        } else {
            transpose(w->keys, chunk, width, count, half);
            long r = 0;
            for (; r + ROWS <= rows; r += ROWS)
                score_rows(w->score + r, (const float(*)[MAX_WIDTH])w->query + r,
                           (const float(*)[KEYS])w->keys, width, ROWS);
            for (; r < rows; r++)
                score_rows(w->score + r, (const float(*)[MAX_WIDTH])w->query + r,
                           (const float(*)[KEYS])w->keys, width, 1);
        }
        for (long r = 0; r < rows; r++) {
            long position = past + begin + r / group;
            long from = l->window ? position + 1 - l->window - k : 0, to = position + 1 - k;
            weigh(w, r, from < 0 ? 0 : from > KEYS ? KEYS : from, to > count ? count : to < 0 ? 0 : to,
                  value_width, l->softcap);
        }
        long r = 0;
        const float(*score)[KEYS] = (const float(*)[KEYS])w->score;
        for (; r + ROWS <= rows; r += ROWS)
            add_all_values(w->total + r, score + r, its_values, value_width, count,
                           ROWS, half);
        for (; r + 3 <= rows; r += 3)
            add_all_values(w->total + r, score + r, its_values, value_width, count,
                           3, half);
        for (; r < rows; r++)
            add_all_values(w->total + r, score + r, its_values, value_width, count,
                           1, half);
    }
    for (long r = 0; r < rows; r++) {
        long head = kv_head * group + r % group, token = start + begin + r / group;
        long to = (token * l->heads + head) * value_width;
        for (long d = 0; d < value_width; d += LANES)
            store(l->out, to + d, *(vec *)&w->total[r][d] / w->share[r], half);
    }
}

INLINE void attend_any(const Attention *l, const Spans *s, long span, long kv_head, long begin, long end,
                       Work *w, int half) {
    if (l->width == 64 && l->value_width == 64)
        attend(l, s, span, kv_head, begin, end, w, 64, 64, half);
    else attend(l, s, span, kv_head, begin, end, w, l->width, l->value_width, half);
}

void team_attention(const Attention *l, const Spans *s, int half) {
    static __thread Work work;
    long group = l->heads / l->kv_heads, block = MOST_ROWS / group, most = 1;
    for (long i = 0; i < s->spans; i++) {
        long blocks = (s->count[i] + block - 1) / block;
        if (blocks > most) most = blocks;
    }
#pragma omp for schedule(static)
    for (long t = 0; t < l->tokens; t++) store_token(l, t, half);
    /* All are stored: the loop above ends with a barrier. */
#pragma omp for schedule(dynamic)
    for (long item = 0; item < s->spans * l->kv_heads * most; item++) {
        long span = item / (l->kv_heads * most), kv_head = item / most % l->kv_heads;
        long begin = item % most * block, end = begin + block;
        if (begin >= s->count[span]) continue;
        if (end > s->count[span]) end = s->count[span];
        /* In the loop, so that each is compiled for its type. */
        if (half) attend_any(l, s, span, kv_head, begin, end, &work, 1);
        else attend_any(l, s, span, kv_head, begin, end, &work, 0);
    }
}

void lorabatch_attention(const Attention *l, const Spans *s, int half) {
#pragma omp parallel
    team_attention(l, s, half);
}
