/* Vectors of 16 floats by the compiler's own vector types, so that one source serves AVX-512, AVX2
   and NEON, and loads and stores of fp32 and bf16. Sums are always fp32. */
#ifndef LORABATCH_VEC_H
#define LORABATCH_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));

INLINE vec all(float value) { return value - (vec){0}; }

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Element `i` of an array of fp32, or of bf16 where `half`. */
INLINE float get(const void *from, long i, int half) {
    return half ? widen(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void put(void *to, long i, float value, int half) {
    if (half) ((uint16_t *)to)[i] = narrow(value);
    else ((float *)to)[i] = value;
}

INLINE const void *at(const void *from, long i, int half) {
    return (const char *)from + i * (half ? 2 : 4);
}

/* To bf16, to the nearest, ties to even; NaN stays NaN. Where the processor has it as one instruction,
   magnitudes below 1.2e-38 become 0. */
INLINE hvec narrow_all(vec value) {
#ifdef __AVX512BF16__
    return (hvec)_mm512_cvtneps_pbh((__m512)value);
#else
    uvec bits = (uvec)value;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (uvec)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), hvec);
#endif
}

INLINE vec widen_all(hvec halves) {
#ifdef __AVX512F__ /* gcc 12 makes six instructions of the line below */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (vec)(__builtin_convertvector(halves, uvec) << 16);
#endif
}

/* The cache line a page on from element `i` comes from memory meanwhile. Processors fetch what is
   read in order by themselves, but not beyond the end of a page. */
INLINE void fetch(const void *from, long i, int half) {
    __builtin_prefetch((const char *)at(from, i, half) + 4096, 0, 2);
}

INLINE vec load(const void *from, long i, int half) {
    if (half) return widen_all(*(const hvec *)((const uint16_t *)from + i));
    return *(const vec *)((const float *)from + i);
}

INLINE void store(void *to, long i, vec value, int half) {
    if (half) *(hvec *)((uint16_t *)to + i) = narrow_all(value);
    else *(vec *)((float *)to + i) = value;
}

/* As it comes back after a store. */
INLINE vec rounded(vec value, int half) { return half ? widen_all(narrow_all(value)) : value; }

/* {0, 1, 2, ...} */
INLINE ivec lane_numbers(void) {
    return (ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

/* `a` where all bits of the lane are set, `b` where none is. */
INLINE vec choose(ivec first, vec a, vec b) {
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

INLINE vec larger(vec a, vec b) { /* b where either is NaN */
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#define HALVES(x, y, with)                                                                        \
    with(__builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),   \
         __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,  \
                                 31))
#define QUARTERS(x, y, with)                                                                      \
    with(__builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), \
         __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,    \
                                 31))
#define PAIRS_OF(x, with)                                                                         \
    with(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13))
#define SINGLES_OF(x, with)                                                                       \
    with(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))

INLINE vec plus(vec a, vec b) { return a + b; }

/* {sum(a), sum(b), sum(c), sum(d)} */
INLINE quad sum4(vec a, vec b, vec c, vec d) {
    vec ab = HALVES(a, b, plus), cd = HALVES(c, d, plus), all4 = QUARTERS(ab, cd, plus);
    all4 = PAIRS_OF(all4, plus);
    all4 = SINGLES_OF(all4, plus);
    return __builtin_shufflevector(all4, all4, 0, 4, 8, 12);
}

/* {max(a), max(b), max(c), max(d)} */
INLINE quad largest4(vec a, vec b, vec c, vec d) {
    vec ab = HALVES(a, b, larger), cd = HALVES(c, d, larger), all4 = QUARTERS(ab, cd, larger);
    all4 = PAIRS_OF(all4, larger);
    all4 = SINGLES_OF(all4, larger);
    return __builtin_shufflevector(all4, all4, 0, 4, 8, 12);
}

INLINE float largest(vec v) { return largest4(v, v, v, v)[0]; }

INLINE long within(long value, long least, long most) {
    return value < least ? least : value > most ? most : value;
}

/* e^x within 2 units in the last place for x <= 0 (and up to 88); below -87 it is 0. NaN stays. */
INLINE vec expv(vec x) {
    vec shifted = x * 1.44269504088896f + 12582912.0f; /* 1.5 * 2^23: the integer is in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = ((ivec)shifted - 0x4b400000 + 127) << 23;
    return choose(x < -87.0f, (vec){0}, p * (vec)power);
}

#endif
