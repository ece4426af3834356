/* Row by row work between the products of a decoder layer. Widths are any; sums are fp32. */
#include "team.h"
#include "vec.h"
#include <stddef.h>

/* out = weight * (x / sqrt(mean(x^2) + epsilon)), the quotient rounded to the type of x */
INLINE void norm(void *out, const void *x, const void *weight, long width, float epsilon,
                 int half) {
    vec squares = {0};
    float tail = 0;
    long d = 0;
    for (; d + LANES <= width; d += LANES) {
        vec v = load(x, d, half);
        squares += v * v;
    }
    for (; d < width; d++) tail += get(x, d, half) * get(x, d, half);
    float factor = 1 / sqrtf((sum4(squares, squares, squares, squares)[0] + tail) / width + epsilon);
    for (d = 0; d + LANES <= width; d += LANES) {
        vec v = rounded(load(x, d, half) * factor, half);
        store(out, d, v * load(weight, d, half), half);
    }
    for (; d < width; d++) {
        float v = get(x, d, half) * factor;
        put(out, d, (half ? widen(narrow(v)) : v) * get(weight, d, half), half);
    }
}

INLINE void add_and_norm(void *out, void *x, const void *more, const void *weight, long width,
                         float epsilon, int half) {
    if (more) {
        long d = 0;
        for (; d + LANES <= width; d += LANES)
            store(x, d, load(x, d, half) + load(more, d, half), half);
        for (; d < width; d++) put(x, d, get(x, d, half) + get(more, d, half), half);
    }
    if (out) norm(out, x, weight, width, epsilon, half);
}

void team_norm(void *out, void *x, const void *more, const void *weight, long rows, long width,
               float epsilon, int half) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        long from = r * width * (half ? 2 : 4);
        void *to = out ? (char *)out + from : NULL, *row = (char *)x + from;
        const void *added = more ? (const char *)more + from : NULL;
        if (half) add_and_norm(to, row, added, weight, width, epsilon, 1);
        else add_and_norm(to, row, added, weight, width, epsilon, 0);
    }
}

void lorabatch_rms_norm(void *out, void *x, const void *weight, long rows, long width,
                        float epsilon, int half) {
#pragma omp parallel if (rows * width > 16384)
    team_norm(out, x, NULL, weight, rows, width, epsilon, half);
}

/* out[r] = silu(x[r][0:width]) * x[r][width:2 width], silu rounded to the type of x */
INLINE void gate(void *out, const void *x, long width, int half) {
    long d = 0;
    for (; d + LANES <= width; d += LANES) {
        vec g = load(x, d, half);
        vec negative = (vec)((ivec)g | (int32_t)0x80000000), e = expv(negative);
        /* 1 / (1 + e^-g), from e^-|g| so that nothing overflows */
        vec above = 1 / (1 + e), below = e * above;
        vec s = g * choose(g < 0, below, above);
        store(out, d, rounded(s, half) * load(x, width + d, half), half);
    }
    for (; d < width; d++) {
        float g = get(x, d, half), s = g / (1 + expf(-g));
        put(out, d, (half ? widen(narrow(s)) : s) * get(x, width + d, half), half);
    }
}

void team_gate(void *out, const void *x, long rows, long width, int half) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        if (half) gate((char *)out + r * width * 2, at(x, r * 2 * width, 1), width, 1);
        else gate((char *)out + r * width * 4, at(x, r * 2 * width, 0), width, 0);
    }
}

void lorabatch_silu_gate(void *out, const void *x, long rows, long width, int half) {
#pragma omp parallel if (rows * width > 8192)
    team_gate(out, x, rows, width, half);
}

/* In place: the first `width` of each head of x[token] turned by its cos and sin [token][width];
   lane d pairs with lane d + width / 2. */
INLINE void turn(void *x, const void *cosine, const void *sine, long width, int half) {
    long middle = width / 2, d = 0;
    for (; d + LANES <= middle; d += LANES) {
        vec a = load(x, d, half), b = load(x, middle + d, half);
        store(x, d, a * load(cosine, d, half) - b * load(sine, d, half), half);
        store(x, middle + d,
              b * load(cosine, middle + d, half) + a * load(sine, middle + d, half), half);
    }
    for (; d < middle; d++) {
        float a = get(x, d, half), b = get(x, middle + d, half);
        put(x, d, a * get(cosine, d, half) - b * get(sine, d, half), half);
        put(x, middle + d, b * get(cosine, middle + d, half) + a * get(sine, middle + d, half),
            half);
    }
}

void team_rotary(void *x, long row, long heads, const void *cosine, const void *sine, long tokens,
                 long width, int half) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            char *one = (char *)x + (t * row + h * width) * (half ? 2 : 4);
            if (half) turn(one, at(cosine, t * width, 1), at(sine, t * width, 1), width, 1);
            else turn(one, at(cosine, t * width, 0), at(sine, t * width, 0), width, 0);
        }
}

void lorabatch_rotary(void *x, long row, long heads, const void *cosine, const void *sine,
                      long tokens, long width, int half) {
#pragma omp parallel if (tokens * heads * width > 16384)
    team_rotary(x, row, heads, cosine, sine, tokens, width, half);
}

#define SPAN 512 /* columns whose highest value is found before any is compared with the row's */

/* The first of the highest values of x; -1 where that is not finite, or there is a NaN. */
INLINE long highest(const void *x, long width, int half) {
    float best = -INFINITY;
    long place = 0;
    for (long first = 0; first < width; first += SPAN) {
        long last = first + SPAN < width ? first + SPAN : width, c = first;
        vec most = all(-INFINITY);
        ivec unsound = {0};
        for (; c + LANES <= last; c += LANES) {
            vec values = load(x, c, half);
            unsound |= values != values;
            most = larger(most, values);
        }
        float top = largest(most);
        int32_t any = 0;
        for (int lane = 0; lane < LANES; lane++) any |= unsound[lane];
        for (; c < last; c++) {
            float value = get(x, c, half);
            any |= value != value;
            if (value > top) top = value;
        }
        if (any) return -1;
        if (top > best) best = top, place = first;
    }
    if (!isfinite(best)) return -1;
    while (get(x, place, half) != best) place++;
    return place;
}

void lorabatch_argmax(int64_t *out, const void *x, long rows, long width, int half) {
#pragma omp parallel for schedule(static) if (rows * width > 65536)
    for (long r = 0; r < rows; r++)
        out[r] = half ? highest(at(x, r * width, 1), width, 1) : highest(at(x, r * width, 0), width, 0);
}
