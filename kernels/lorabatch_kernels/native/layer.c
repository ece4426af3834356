/* Decoder layers of the Llama kind over a step's tokens, one after another in one call:

       h += o(attention(rotated q, k, v of norm(h)));  h += down(silu(gate) * up of norm(h))

   each product with its adapters' terms. One team of threads goes through all of it. The last one
   does what follows attention for kept tokens alone. */
#include "team.h"
#include <stddef.h>
#include <string.h>
#include <time.h>

/* A product and the adapters of the layers whose outputs lie side by side in it. */
typedef struct {
    Weight weight;
    const Site *sites;
    long count;
} Product;

typedef struct {
    Product qkv, o, gate_up, down;
    const void *first_norm, *second_norm; /* [hidden] */
    void *keys, *values;                  /* as in Attention */
    long heads, kv_heads, width, positions, window;
    float scale, first_epsilon, second_epsilon;
} Decoder;

enum { PRODUCTS, LORA, ATTENTION, REST };

/* What a step's layers share. tiles: NULL where no token has an adapter. seconds: of each part, or
   NULL. */
typedef struct {
    void *x, *qkv, *attended, *gate_up, *gated, *y; /* [tokens][...], room to work in */
    const void *cosine, *sine;                      /* [tokens][width] */
    const int64_t *index;
    const Spans *spans;
    const Tiles *tiles;
    double *seconds;
    const int64_t *kept; /* [kept_count]: tokens whose hidden states are needed in the end */
    void *kept_hidden;   /* [kept_count][hidden] */
    const Tiles *kept_tiles;
    long tokens, kept_count; /* kept_count -1: all */
} Step;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* What was done since `*since` was this part. */
static void lap(const Step *s, double *since, int part) {
#pragma omp master
    if (s->seconds) {
        double then = *since;
        s->seconds[part] += (*since = now()) - then;
    }
}

static void multiply(void *y, const void *x, const Product *p, const Step *s, long tokens,
                     const Tiles *tiles, double *since, int half) {
    team_matmul(y, x, &p->weight, tokens, half);
    lap(s, since, PRODUCTS);
    if (!tiles) return;
    team_add_lora(y, p->weight.out, x, p->weight.in, p->weight.in, p->sites, p->count, tiles, half);
    lap(s, since, LORA);
}

/* Kept rows of `width` bytes, to the front (or from there back to their places). */
static void team_gather(void *front, void *places, const Step *s, long width, int back) {
#pragma omp for schedule(static)
    for (long i = 0; i < s->kept_count; i++) {
        char *one = (char *)front + i * width, *other = (char *)places + s->kept[i] * width;
        if (back) memcpy(other, one, width);
        else memcpy(one, other, width);
    }
}

/* All that follows attention, for the first `tokens` rows. */
static void finish(void *hidden, const void *attended, const Decoder *l, const Step *s, long tokens,
                   const Tiles *tiles, double *since, int half) {
    long in = l->qkv.weight.in, inner = l->down.weight.in;
    multiply(s->y, attended, &l->o, s, tokens, tiles, since, half);
    team_norm(s->x, hidden, s->y, l->second_norm, tokens, in, l->second_epsilon, half);
    lap(s, since, REST);
    multiply(s->gate_up, s->x, &l->gate_up, s, tokens, tiles, since, half);
    team_gate(s->gated, s->gate_up, tokens, inner, half);
    lap(s, since, REST);
    multiply(s->y, s->gated, &l->down, s, tokens, tiles, since, half);
    team_norm(NULL, hidden, s->y, NULL, tokens, in, 0, half);
    lap(s, since, REST);
}

static void team_layer(void *hidden, const Decoder *l, int last, const Step *s, double *since,
                       int half) {
    long size = half ? 2 : 4, row = l->qkv.weight.out, width = l->width, heads = l->heads;
    long in = l->qkv.weight.in;
    const char *key = (char *)s->qkv + heads * width * size;
    const char *value = key + l->kv_heads * width * size;
    Attention attention = {
        .query = {s->qkv, width, row},
        .key = {key, width, row},
        .value = {value, width, row},
        .keys = l->keys,
        .values = l->values,
        .index = s->index,
        .out = s->attended,
        .tokens = s->tokens,
        .heads = heads,
        .kv_heads = l->kv_heads,
        .width = width,
        .value_width = width,
        .positions = l->positions,
        .window = l->window,
        .scale = l->scale,
    };
    team_norm(s->x, hidden, NULL, l->first_norm, s->tokens, in, l->first_epsilon, half);
    lap(s, since, REST);
    multiply(s->qkv, s->x, &l->qkv, s, s->tokens, s->tiles, since, half);
    team_rotary(s->qkv, row, heads + l->kv_heads, s->cosine, s->sine, s->tokens, width, half);
    team_attention(&attention, s->spans, half);
    lap(s, since, ATTENTION);
    if (!last || s->kept_count < 0) {
        finish(hidden, s->attended, l, s, s->tokens, s->tiles, since, half);
        return;
    }
    team_gather(s->kept_hidden, hidden, s, in * size, 0);
    team_gather(s->qkv, s->attended, s, heads * width * size, 0); /* qkv is done with */
    finish(s->kept_hidden, s->qkv, l, s, s->kept_count, s->kept_tiles, since, half);
    team_gather(s->kept_hidden, hidden, s, in * size, 1);
}

void lorabatch_decoder_layers(void *hidden, const Decoder *layers, long count, const Step *s,
                              int half) {
#pragma omp parallel
    {
        double since = s->seconds ? now() : 0;
        for (long i = 0; i < count; i++) team_layer(hidden, &layers[i], i == count - 1, s, &since, half);
    }
}
