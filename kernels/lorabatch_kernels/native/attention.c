/* Attention of one layer's new tokens over cached keys and values, which it stores first.

   A span is a run of new tokens of one sequence: one token (decode) or a chunk of a prompt. Its keys
   lie side by side in the pool, [kv head][position][width], from `first` on; token i of the span is
   at position `past` + i and sees positions up to its own, the last `window` of them if window > 0.
   Keys are taken chunk by chunk (chunk.h). Only a sequence's own positions are read, so nothing that
   others left in memory can reach it.

   Widths of keys and values are multiples of 16, at most MAX_WIDTH (checked by the caller). */
#include "chunk.h"
#include "team.h"
#include "vec.h"

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

/* Tokens [begin, end) of a span, for all query heads of one kv head; rows are (token, head). */
INLINE void attend(const Attention *l, const Spans *s, long span, long kv_head, long begin, long end,
                   Work *w, long width, long value_width, int few, int half, int pairs) {
    long group = l->heads / l->kv_heads, rows = (end - begin) * group;
    long past = s->past[span], start = s->start[span];
    const void *keys = at(l->keys, (kv_head * l->positions + s->first[span]) * width, half);
    const void *values =
        at(l->values, (kv_head * l->positions + s->first[span]) * value_width, half);
    for (long r = 0; r < rows; r++) {
        long head = kv_head * group + r % group, token = start + begin + r / group;
        const void *query = at(l->query.data, head * l->query.head + token * l->query.token, half);
        for (long d = 0; d < width; d += LANES)
            store(w->query[r], d, load(query, d, half), pairs);
        for (long d = 0; d < value_width; d += LANES) *(vec *)&w->total[r][d] = (vec){0};
        w->highest[r] = l->sinks ? get(l->sinks, head, half) : -INFINITY;
        w->share[r] = l->sinks ? 1 : 0;
    }
    long lowest = l->window ? past + begin + 1 - l->window : 0;
    for (long k = lowest > 0 ? lowest : 0; k < past + end; k += KEYS) {
        long count = past + end - k < KEYS ? past + end - k : KEYS;
        score_chunk(w, rows, at(keys, k * width, half), width, count, few, half, pairs);
        for (long r = 0; r < rows; r += WEIGHED) { /* maybe some rows more: nobody reads them */
            long from[WEIGHED], to[WEIGHED];
            for (int i = 0; i < WEIGHED; i++) {
                long position = past + begin + (r + i) / group;
                to[i] = within(position + 1 - k, 0, count);
                from[i] = l->window ? within(position + 1 - l->window - k, 0, KEYS) : 0;
            }
            weigh(w, r, from, to, value_width, l->scale, l->softcap, pairs);
        }
        add_chunk(w, rows, at(values, k * value_width, half), value_width, count, few, half, pairs);
    }
    for (long r = 0; r < rows; r++) {
        long head = kv_head * group + r % group, token = start + begin + r / group;
        long to = (token * l->heads + head) * value_width;
        for (long d = 0; d < value_width; d += LANES)
            store(l->out, to + d, *(vec *)&w->total[r][d] / w->share[r], half);
    }
}

/* Each a copy of its own, compiled for its widths and types. */
INLINE void attend_any(const Attention *l, const Spans *s, long span, long kv_head, long begin, long end,
                       Work *w, int half) {
    int few = end - begin == 1, usual = l->width == 64 && l->value_width == 64;
#define CALL(width, value_width, few, pairs) \
    attend(l, s, span, kv_head, begin, end, w, width, value_width, few, half, pairs)
#ifdef __AVX512BF16__
    if (half && !few && l->width % 32 == 0) {
        usual ? CALL(64, 64, 0, 1) : CALL(l->width, l->value_width, 0, 1);
        return;
    }
#endif
    if (usual) few ? CALL(64, 64, 1, 0) : CALL(64, 64, 0, 0);
    else CALL(l->width, l->value_width, few, 0);
#undef CALL
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
