/* y[t] += scale[s] * (x[t] A[s]^T) B[s] for all tokens t of a step, s the adapter slot of t; before
   that, y[t] += gain[s] * y[t] + shift[s] where s has them.

   One work item is a tile of up to 8 tokens of one slot and one site. A's rank rows lie in panels
   of 16, [panel][in][16], so that v[0:16] is a sum of panel rows; B is [rank][out]. Of a narrower
   last panel whole vectors are read, too: what is behind its rows comes into lanes of v that nobody
   reads. Every sum runs over the same terms in the same order whatever else is in the tile. */
#include "team.h"
#include "vec.h"

#define TILE 8
#define CHUNK 256   /* columns of x that are widened at once */
#define MAX_PANELS 64

/* v[t][0:16] += sum over k of x[t][k] * panel[k][0:16], of rows of `width` */
INLINE void shrink(vec *v, const float (*x)[CHUNK], const void *panel, long width, long count,
                   int tokens, int half) {
    vec even[TILE], odd[TILE];
    for (int t = 0; t < tokens; t++) even[t] = v[t], odd[t] = (vec){0};
    long k = 0;
    for (; k + 1 < count; k += 2) {
        vec first = load(panel, k * width, half), second = load(panel, (k + 1) * width, half);
        for (long i = 0; i < 2 * LANES; i += half ? 32 : 16) fetch(panel, k * width + i, half);
        for (int t = 0; t < tokens; t++) even[t] += x[t][k] * first;
        for (int t = 0; t < tokens; t++) odd[t] += x[t][k + 1] * second;
    }
    if (k < count) {
        vec first = load(panel, k * width, half);
        for (int t = 0; t < tokens; t++) even[t] += x[t][k] * first;
    }
    for (int t = 0; t < tokens; t++) v[t] = even[t] + odd[t];
}

/* sums[t][c:c+16] += v[t][r : r + rows] times as many rank rows; `parts` times 16 columns */
INLINE void expand_at(float (*sums)[CHUNK], const float (*v)[MAX_PANELS * LANES], long r,
                      const void *b, long out, long column, long c, int parts, int rows,
                      int tokens, int half) {
    vec row[4][2];
    for (int j = 0; j < rows; j++)
        for (int p = 0; p < parts; p++)
            row[j][p] = load(b, (r + j) * out + column + c + p * LANES, half);
    for (int t = 0; t < tokens; t++) {
        vec acc[2];
        for (int p = 0; p < parts; p++) acc[p] = *(vec *)&sums[t][c + p * LANES];
        for (int j = 0; j < rows; j++)
            for (int p = 0; p < parts; p++) acc[p] += v[t][r + j] * row[j][p];
        for (int p = 0; p < parts; p++) *(vec *)&sums[t][c + p * LANES] = acc[p];
    }
}

/* sums[t][0:count] += v[t][r : r + rows] times as many rank rows */
INLINE void expand(float (*sums)[CHUNK], const float (*v)[MAX_PANELS * LANES], long r,
                   const void *b, long out, long column, long count, int rows, int tokens,
                   int half) {
    long c = 0;
    for (; c + 2 * LANES <= count; c += 2 * LANES)
        expand_at(sums, v, r, b, out, column, c, 2, rows, tokens, half);
    for (; c + LANES <= count; c += LANES)
        expand_at(sums, v, r, b, out, column, c, 1, rows, tokens, half);
    for (; c < count; c++)
        for (int t = 0; t < tokens; t++)
            for (int j = 0; j < rows; j++)
                sums[t][c] += v[t][r + j] * get(b, (r + j) * out + column + c, half);
}

/* `tokens` is known to the compiler; the last tokens - filled of them are zeros. */
INLINE void tile(void *y, long y_row, const void *x, long x_row, long in, const Site *site,
                 const int32_t *order, const Lora *lora, int filled, int tokens, int half) {
    long rank = lora->rank;
    const void *a = lora->a, *b = lora->b;
    float v[TILE][MAX_PANELS * LANES];
    float wide[TILE][CHUNK];
    long used = (rank + LANES - 1) / LANES;
    for (long i = 0; i < rank * site->out; i += half ? 32 : 16) /* B comes while A is summed */
        __builtin_prefetch(at(b, i, half), 0, 2);
    for (int t = 0; t < tokens; t++) memset(v[t], 0, used * LANES * sizeof(float));
    for (int t = filled; t < tokens; t++) memset(wide[t], 0, sizeof wide[t]);
    for (long k = 0; k < in; k += CHUNK) {
        long count = in - k < CHUNK ? in - k : CHUNK;
        for (int t = 0; t < filled; t++) {
            long first = order[t] * x_row + k, c = 0;
            for (; c + LANES <= count; c += LANES)
                *(vec *)&wide[t][c] = load(x, first + c, half);
            for (; c < count; c++) wide[t][c] = get(x, first + c, half);
        }
        for (long p = 0; p < used; p++) {
            vec part[TILE];
            for (int t = 0; t < tokens; t++) part[t] = *(vec *)&v[t][p * LANES];
            long width = within(rank - p * LANES, 0, LANES);
            const void *panel = at(a, p * in * LANES + k * width, half);
            if (width == LANES) shrink(part, wide, panel, LANES, count, tokens, half);
            else shrink(part, wide, panel, width, count, tokens, half);
            for (int t = 0; t < tokens; t++) *(vec *)&v[t][p * LANES] = part[t];
        }
    }
    long gain = rank * site->out, shift = gain + site->out;
    int affine = lora->affine;
    float scale = lora->scale;
    for (int t = 0; t < tokens; t++)
        for (long r = 0; r < rank; r++) v[t][r] *= scale;
    for (long n = 0; n < site->out; n += CHUNK) {
        long count = site->out - n < CHUNK ? site->out - n : CHUNK;
        for (int t = 0; t < tokens; t++) memset(wide[t], 0, sizeof wide[t]);
        long r = 0;
        for (; r + 4 <= rank; r += 4)
            expand(wide, (const float(*)[MAX_PANELS * LANES])v, r, b, site->out, n, count, 4,
                   tokens, half);
        for (; r < rank; r++)
            expand(wide, (const float(*)[MAX_PANELS * LANES])v, r, b, site->out, n, count, 1,
                   tokens, half);
        for (int t = 0; t < filled; t++) {
            long first = order[t] * y_row + site->column + n;
            long c = 0;
            for (; c + LANES <= count; c += LANES) {
                vec own = load(y, first + c, half);
                if (affine)
                    own += own * load(b, gain + n + c, half) + load(b, shift + n + c, half);
                store(y, first + c, own + *(vec *)&wide[t][c], half);
            }
            for (; c < count; c++) {
                float own = get(y, first + c, half);
                if (affine)
                    own += own * get(b, gain + n + c, half) + get(b, shift + n + c, half);
                put(y, first + c, own + wide[t][c], half);
            }
        }
    }
}

INLINE void any_tile(void *y, long y_row, const void *x, long x_row, long in, const Site *site,
                     const int32_t *order, const Lora *lora, int filled, int half) {
    if (filled == 1) tile(y, y_row, x, x_row, in, site, order, lora, filled, 1, half);
    else if (filled <= 4) tile(y, y_row, x, x_row, in, site, order, lora, filled, 4, half);
    else tile(y, y_row, x, x_row, in, site, order, lora, filled, TILE, half);
}

void team_add_lora(void *y, long y_row, const void *x, long x_row, long in, const Site *sites,
                   long count, const Tiles *tiles, int half) {
#pragma omp for schedule(dynamic)
    for (long item = 0; item < tiles->tiles * count; item++) {
        long i = item / count;
        const Site *site = &sites[item % count];
        int filled = tiles->len[i];
        if (!filled) continue; /* and its slot means nothing */
        const Lora *lora = &site->slots[tiles->slot[i]];
        const int32_t *order = tiles->order + tiles->start[i];
        if (!(lora->rank || lora->affine)) continue;
        /* In the loop, so that each is compiled for its type. */
        if (half) any_tile(y, y_row, x, x_row, in, site, order, lora, filled, 1);
        else any_tile(y, y_row, x, x_row, in, site, order, lora, filled, 0);
    }
}

void lorabatch_add_lora(void *y, long y_row, const void *x, long x_row, long in, const Site *sites,
                        long count, const Tiles *tiles, int half) {
#pragma omp parallel
    team_add_lora(y, y_row, x, x_row, in, sites, count, tiles, half);
}
