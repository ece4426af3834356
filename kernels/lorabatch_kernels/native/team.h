/* The parts of a decoder layer. Each `team_` function is called by all threads of a parallel region,
   shares its work among them, and returns when all of it is done. Arrays are row-major, fp32, or
   bf16 where `half`. */
#ifndef LORABATCH_TEAM_H
#define LORABATCH_TEAM_H

#include <stdint.h>

/* A linear layer's weight in panels of 32 outputs: [panel][in][32] fp32, [panel][in / 2][32][2] bf16,
   the last panel filled up with zeros; bias [out] or NULL. */
typedef struct {
    const void *panels, *bias;
    long in, out;
} Weight;

/* An adapter's share of one linear layer, as weights.py lays it out. */
typedef struct {
    const void *a; /* panels of 16 rank rows, [in][16], the last one as narrow as what is left */
    const void *b; /* [rank][out], and behind it gain and shift [out] where `affine` */
    int32_t rank, affine;
    float scale;
} Lora;

/* The adapters of one linear layer. */
typedef struct {
    const Lora *slots;
    long out;
    long column; /* where this layer's output begins in a row of y */
} Site;

typedef struct {
    const int32_t *order, *slot, *start, *len; /* tokens by slot; the tiles */
    long tiles;
} Tiles;

/* Runs of new tokens of one sequence each. */
typedef struct {
    const int64_t *start, *count, *past, *first; /* of each span; `start` among the new tokens */
    long spans;
} Spans;

typedef struct {
    const void *data;
    long head, token; /* strides */
} View;

typedef struct {
    View query, key, value;      /* of the new tokens: [head][token][width] */
    void *keys, *values;         /* pools: [kv head][position][width] */
    const int64_t *index;        /* [tokens]: where in the pools each new token goes */
    void *out;                   /* [token][head][value_width] */
    const void *sinks;           /* [head] or NULL: a logit with no value */
    long tokens, heads, kv_heads, width, value_width, positions, window;
    float scale, softcap;        /* softcap 0: none */
} Attention;

/* y [tokens][out] = x [tokens][in] W^T + bias */
void team_matmul(void *y, const void *x, const Weight *weight, long tokens, int half);

/* y[t] += the adapters' terms of all sites for x[t] */
void team_add_lora(void *y, long y_row, const void *x, long x_row, long in, const Site *sites,
                   long count, const Tiles *tiles, int half);

/* Stores new keys and values, then attends. */
void team_attention(const Attention *l, const Spans *s, int half);

/* x += more, where that is given; out = norm of x, where that is */
void team_norm(void *out, void *x, const void *more, const void *weight, long rows, long width,
               float epsilon, int half);

/* out [rows][width] = silu(x[r][0:width]) * x[r][width:2 width] */
void team_gate(void *out, const void *x, long rows, long width, int half);

/* The first heads of each row of x [tokens][row], turned; does not wait for the others. */
void team_rotary(void *x, long row, long heads, const void *cosine, const void *sine, long tokens,
                 long width, int half);

#endif
