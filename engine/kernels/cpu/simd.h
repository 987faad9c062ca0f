// Vectors of floats for whatever processor this is compiled for, by the compiler's vector extensions.
//
//   LANES   floats in a register: 16 with AVX-512, 8 with AVX2, 4 with NEON or SSE
//   PANEL   16 floats, the unit in which weights, keys and values are laid out; VECS registers of them
//
// Every result in these kernels is a chain of fused multiply-adds in an order that depends on its own row only: not
// on the batch around it, nor on the chunk it is computed in, nor on the number of threads. See matmul.h, attention.h
// and integers.h, where some of the links are exact sums of integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tandem {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PANEL = 16;
constexpr int VECS = PANEL / LANES;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

enum Kind : int32_t { F32 = 0, BF16 = 1, F16 = 2, I8 = 3, I4 = 4 };

template <class T> inline T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T> inline void write(void* to, T value) { std::memcpy(to, &value, sizeof value); }

// a · b + sum in one rounding. Said outright, and never left to the compiler (-ffp-contract=off), which may decide
// differently in two copies of one function.
inline Vec fused(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
    return (Vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

inline Vec broadcast(float value) { return value - Vec{}; }
inline Vec select(Ints mask, Vec yes, Vec no) { return (Vec)(((Ints)yes & mask) | ((Ints)no & ~mask)); }
inline Vec largest(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }  // NaN if either is

// Shuffles between lanes `distance` apart. The masks are template arguments: as variables they would be built anew.
typedef std::make_integer_sequence<int, LANES> Lanes;
template <int distance, int... lane> inline Vec swapped(Vec v, std::integer_sequence<int, lane...>) {
    return __builtin_shuffle(v, Ints{(lane ^ distance)...});
}
template <int distance, int... lane> inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
    Vec upper = __builtin_shuffle(a, b, Ints{(lane & distance ? lane - distance + LANES : lane)...});
    b = __builtin_shuffle(a, b, Ints{(lane & distance ? lane + LANES : lane + distance)...});
    a = upper;
}
template <int distance = LANES / 2> inline float sum(Vec v) {
    v += swapped<distance>(v, Lanes());
    if constexpr (distance > 1) return sum<distance / 2>(v);
    return v[0];
}
template <int distance = LANES / 2> inline float largest(Vec v) {
    v = largest(v, swapped<distance>(v, Lanes()));
    if constexpr (distance > 1) return largest<distance / 2>(v);
    return v[0];
}
// LANES vectors, in place: at each distance, blocks of that size above and below the diagonal change places.
template <int distance = 1> inline void transpose(Vec (&rows)[LANES]) {
#if defined(__AVX__) && !defined(__AVX512F__)  // as three rounds of single instructions
    Vec pairs[8], fours[8];
    for (int row = 0; row < 8; row += 2) {
        pairs[row] = (Vec)_mm256_unpacklo_ps((__m256)rows[row], (__m256)rows[row + 1]);
        pairs[row + 1] = (Vec)_mm256_unpackhi_ps((__m256)rows[row], (__m256)rows[row + 1]);
    }
    for (int row = 0; row < 8; row += 4)
        for (int half = 0; half < 2; half++) {
            __m256 upper = (__m256)pairs[row + half], lower = (__m256)pairs[row + 2 + half];
            fours[row + 2 * half] = (Vec)_mm256_shuffle_ps(upper, lower, 0x44);
            fours[row + 2 * half + 1] = (Vec)_mm256_shuffle_ps(upper, lower, 0xee);
        }
    for (int row = 0; row < 4; row++) {
        rows[row] = (Vec)_mm256_permute2f128_ps((__m256)fours[row], (__m256)fours[row + 4], 0x20);
        rows[row + 4] = (Vec)_mm256_permute2f128_ps((__m256)fours[row], (__m256)fours[row + 4], 0x31);
    }
#else
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (!(row & distance)) exchange<distance>(rows[row], rows[row + distance], Lanes());
    if constexpr (distance < LANES / 2) transpose<2 * distance>(rows);
#endif
}

inline float bf16_to_float(uint16_t bits) { return read<float>(&(const uint32_t&)(uint32_t(bits) << 16)); }
inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even, as torch does
    uint32_t bits = read<uint32_t>(&value);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// LANES numbers, widened. The intrinsics only where the compiler takes the general form apart.
inline Ints widen(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu16_epi32(read<__m256i>(from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu16_epi32(read<__m128i>(from));
#else
    return __builtin_convertvector(read<Halves>(from), Ints);
#endif
}
inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }
inline Vec load_f16(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(read<__m256i>(from));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(read<__m128i>(from));
#else
    Vec value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = float(read<_Float16>(from + lane));
    return value;
#endif
}

// Pairs of bfloat16 in 32 bits, the first in the low half: the operands of a two-element dot product. Where the
// processor has one, bfloat16 weights are packed in pairs and meet activations rounded to bfloat16. Tests of that path
// on other processors define TANDEM_DOT.
#if defined(__AVX512BF16__) || defined(TANDEM_DOT)
constexpr bool HAS_DOT = true;
#else
constexpr bool HAS_DOT = false;
#endif
inline Vec dot(Vec sum, Ints x, Ints weight) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
#else
    const Ints high = Ints{} + int32_t(0xffff0000);
    return fused((Vec)(x & high), (Vec)(weight & high), fused((Vec)(x << 16), (Vec)(weight << 16), sum));
#endif
}

// Loads LANES elements of a storage type as floats; exact.
template <Kind kind> struct Stored;
template <> struct Stored<F32> {
    typedef float Element;
    static Vec load(const float* from) { return read<Vec>(from); }
    static float one(float value) { return value; }
    static float round(float value) { return value; }
};
template <> struct Stored<BF16> {
    typedef uint16_t Element;
    static Vec load(const uint16_t* from) { return (Vec)(widen(from) << 16); }
    static float one(uint16_t value) { return bf16_to_float(value); }
    static uint16_t round(float value) { return float_to_bf16(value); }
};
template <> struct Stored<F16> {
    typedef uint16_t Element;
    static Vec load(const uint16_t* from) { return load_f16(from); }
    static float one(uint16_t value) { return float(read<_Float16>(&value)); }
    static uint16_t round(float value) { return read<uint16_t>(&(const _Float16&)(_Float16)value); }
};

// e^x to within 2 units in the last place; 0 below -87, so for -inf too; NaN stays. (Cephes' expf.)
inline Vec exponential(Vec x) {
    const Vec low = broadcast(-87.3f), high = broadcast(88.0f);
    Vec bounded = select(x < low, low, select(x > high, high, x));
    Vec turns = fused(bounded, broadcast(1.44269504f), broadcast(12582912.0f));  // 1.5 · 2^23: its low bits are the
    Ints exponent = ((Ints)turns - 0x4b400000) << 23;                              // rounded quotient
    turns -= 12582912.0f;
    Vec r = fused(turns, broadcast(2.12194440e-4f), fused(turns, broadcast(-0.693359375f), bounded));
    Vec p = broadcast(1.9875691500e-4f);
    for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, r, broadcast(coefficient));
    p = fused(p * r, r, r) + 1.0f;
    return select(x < low, Vec{}, (Vec)((Ints)p + exponent));
}

}  // namespace tandem
