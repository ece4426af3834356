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

INLINE vec load(const void *from, long i, int half) {
    if (!half) return *(const vec *)((const float *)from + i);
    const uint16_t *bits = (const uint16_t *)from + i;
#ifdef __AVX512F__ /* gcc 12 makes six instructions of the line below */
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bits));
    return (vec)_mm512_slli_epi32(wide, 16);
#else
    return (vec)(__builtin_convertvector(*(const hvec *)bits, uvec) << 16);
#endif
}

INLINE void store(void *to, long i, vec value, int half) {
    if (!half) {
        *(vec *)((float *)to + i) = value;
        return;
    }
    uvec bits = (uvec)value;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uvec nan = (uvec)((bits & 0x7fffffff) > 0x7f800000);
    *(hvec *)((uint16_t *)to + i) =
        __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), hvec);
}

/* {sum(a), sum(b), sum(c), sum(d)} */
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

INLINE quad sum4(vec a, vec b, vec c, vec d) {
#define HALVES(x, y)                                                                            \
    (__builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +     \
     __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    vec ab = HALVES(a, b), cd = HALVES(c, d);
#undef HALVES
    vec all4 =
        __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all4 += __builtin_shufflevector(all4, all4, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12,
                                    13);
    all4 += __builtin_shufflevector(all4, all4, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15,
                                    14);
    return __builtin_shufflevector(all4, all4, 0, 4, 8, 12);
}

INLINE vec larger(vec a, vec b) { /* NaN where either is */
    ivec first = (a > b) | (a != a);
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

INLINE float largest(vec v) {
    v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6,
                                          7));
    v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10,
                                          11));
    v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12,
                                          13));
    v = larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15,
                                          14));
    return v[0];
}

/* e^x within 2 units in the last place for x <= 0 (and up to 88); below -87 it is 0. NaN stays. */
INLINE vec expv(vec x) {
    vec small = (vec)((ivec)(x < -87.0f));
    vec safe = (vec)(((ivec)x & ~(ivec)small) | ((ivec)all(-87.0f) & (ivec)small));
    vec shifted = safe * 1.44269504088896f + 12582912.0f; /* 1.5 * 2^23: the integer is in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = safe - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = ((ivec)shifted - 0x4b400000 + 127) << 23;
    vec result = p * (vec)power;
    return (vec)((ivec)result & ~(ivec)small);
}

#endif
