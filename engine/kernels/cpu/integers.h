// Products of weights in 8 and 4 bits, in integers: activations are rounded to 8 bits, too.
//
//   activations   rows of Blocks: 32 inputs as -127 … 127 and their scale
//   weights       [outputs / 16][groups of inputs], read from front to back; each group a head, then its blocks:
//
//      head, 64 bytes     scales of 16 outputs (float16) | zeros of 16 outputs (bfloat16)
//      I8, 512 a block    [8 quads][16 outputs][4 inputs]   bytes are code - 128, and so are zeros
//      I4, 256 a block    [4 quads][16 outputs][4 inputs]   bytes are two codes, of quad q (low) and q + 4 (high)
//
// The last block of a group is filled up with zeros. An output is, before its row's scale,
//
//      Σ groups: scale · (Σ blocks: scale of x · Σ code · x  -  zero · Σ blocks: scale of x · Σ x)
//
// Invariant: sums within a block are integers, so exact in any order and on any processor; blocks and groups follow
// each other in rising order. So a row's bits do not depend on the batch it is in, on tiles or on threads.
#pragma once

#include <memory>

#include "matmul.h"

namespace tandem {

constexpr int BLOCK = 32, QUADS = BLOCK / 4;
constexpr int HEAD = PANEL * 2 * sizeof(uint16_t);
constexpr int CODE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 5 : 4;  // whose sums fit into registers

struct Block {
    int32_t quads[QUADS];  // of four inputs each
    int32_t sum;           // of the inputs
    float scale, shift;    // -Σ scale · sum, from the first block of the group to this one
};

// Processors differ in how they multiply bytes:
//
//   TANDEM_PAIRS   unsigned by signed, two products summed in 16 bits. Nibbles cannot overflow them in a whole block,
//                  which is 8 · 2 · 15 · 127; signed codes lend their sign to x and are summed in 32 bits at once
//   SHIFTED        unsigned by signed, four products summed in 32 bits: signed codes are used with 128 added, and a sum
//                  starts with what that will be too much. Where there is neither, plain integers do the same
//   otherwise      signed by signed, four products summed in 32 bits
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool SHIFTED = true;
inline Ints dot(Ints sum, Ints codes, Ints x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#endif
}
#elif defined(__AVX512BW__)
#define TANDEM_PAIRS
inline Ints pairs(Ints codes, Ints x) { return (Ints)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x); }
inline Ints joined(Ints pairs) { return (Ints)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1)); }
inline Ints absolute(Ints codes) { return (Ints)_mm512_abs_epi8((__m512i)codes); }
inline Ints signed_as(Ints codes, Ints x) {
    return (Ints)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)codes), __m512i{}, (__m512i)x);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define TANDEM_PAIRS
inline Ints pairs(Ints codes, Ints x) { return (Ints)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
inline Ints joined(Ints pairs) { return (Ints)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)); }
inline Ints absolute(Ints codes) { return (Ints)_mm256_abs_epi8((__m256i)codes); }
inline Ints signed_as(Ints codes, Ints x) { return (Ints)_mm256_sign_epi8((__m256i)x, (__m256i)codes); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool SHIFTED = false;
inline Ints dot(Ints sum, Ints codes, Ints x) {
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
}
#else
constexpr bool SHIFTED = true;
inline Ints dot(Ints sum, Ints codes, Ints x) {
    for (int bit = 0; bit < 32; bit += 8) sum += (codes >> bit & 255) * (x << (24 - bit) >> 24);
    return sum;
}
#endif

#if defined(TANDEM_PAIRS)
constexpr bool SHIFTED = false;
typedef int16_t Pairs __attribute__((vector_size(LANES * 4)));

// The compiler would add up products first, and push sums out of their registers for it.
inline Ints kept(Ints sum) {
    asm("" : "+v"(sum));
    return sum;
}
#endif

// How LANES quads of codes are read, multiplied with activations, and summed over a block.
template <Kind kind> struct Codes;

template <> struct Codes<I4> {
    static constexpr int BYTES = BLOCK * PANEL / 2;  // of a block
    static constexpr int LAYERS = 2;                 // codes in a byte
    static Ints load(const uint8_t* from, int layer) {
        Ints both = read<Ints>(from);
        return (layer ? both >> 4 : both) & 0x0f0f0f0f;
    }
    static Ints start(int32_t) { return Ints{}; }
#if defined(TANDEM_PAIRS)
    static Ints add(Ints sum, Ints codes, Ints x) { return kept((Ints)((Pairs)sum + (Pairs)pairs(codes, x))); }
    static Ints whole(Ints sum) { return joined(sum); }
#else
    static Ints add(Ints sum, Ints codes, Ints x) { return dot(sum, codes, x); }
    static Ints whole(Ints sum) { return sum; }
#endif
};

template <> struct Codes<I8> {
    static constexpr int BYTES = BLOCK * PANEL;
    static constexpr int LAYERS = 1;
    static Ints load(const uint8_t* from, int) {
        return SHIFTED ? read<Ints>(from) ^ int32_t(0x80808080) : read<Ints>(from);
    }
    static Ints start(int32_t sum) { return Ints{} - (SHIFTED ? 128 * sum : 0); }
#if defined(TANDEM_PAIRS)
    static Ints add(Ints sum, Ints codes, Ints x) {
        return kept(sum + joined(pairs(absolute(codes), signed_as(codes, x))));
    }
#else
    static Ints add(Ints sum, Ints codes, Ints x) { return dot(sum, codes, x); }
#endif
    static Ints whole(Ints sum) { return sum; }
};

struct CodeRows {  // of activations
    const Block* data;
    int64_t row;  // stride
};

// totals (ROWS, 16) += the products of block `index` of each row with one panel's codes
template <Kind kind, int ROWS>
inline void code_block(const CodeRows& x, int64_t index, const uint8_t* codes, Vec (&totals)[ROWS][VECS]) {
    constexpr int LAYERS = Codes<kind>::LAYERS;
    Ints sums[ROWS][VECS];
    for (int row = 0; row < ROWS; row++)
        for (int vec = 0; vec < VECS; vec++) sums[row][vec] = Codes<kind>::start(x.data[row * x.row + index].sum);
#pragma GCC unroll 1  // else the compiler loads all codes first, and has no registers for the sums
    for (int step = 0; step < QUADS / LAYERS; step++)
        for (int layer = 0; layer < LAYERS; layer++) {
            Ints found[VECS];
            for (int vec = 0; vec < VECS; vec++)
                found[vec] = Codes<kind>::load(codes + (step * PANEL + vec * LANES) * sizeof(int32_t), layer);
            for (int row = 0; row < ROWS; row++) {
                Ints quad = Ints{} + x.data[row * x.row + index].quads[layer * (QUADS / LAYERS) + step];
                for (int vec = 0; vec < VECS; vec++) sums[row][vec] = Codes<kind>::add(sums[row][vec], found[vec], quad);
            }
        }
    for (int row = 0; row < ROWS; row++) {
        Vec scale = broadcast(x.data[row * x.row + index].scale);
        for (int vec = 0; vec < VECS; vec++)
            totals[row][vec] = fused(to_floats(Codes<kind>::whole(sums[row][vec])), scale, totals[row][vec]);
    }
}

// sums (ROWS, 16) = x (ROWS, groups of blocks) · one panel
template <Kind kind, int ROWS>
inline void code_tile(const CodeRows& x, const uint8_t* panel, int64_t groups, int64_t blocks, const Sums& sums) {
    Vec totals[ROWS][VECS] = {};
    for (int64_t group = 0; group < groups; group++) {
        const uint16_t* head = (const uint16_t*)panel;
        int64_t next = (group + 1) * blocks;
        Vec parts[ROWS][VECS] = {};
        panel += HEAD;
        for (int64_t index = group * blocks; index < next; index++, panel += Codes<kind>::BYTES) {
            for (int line = 0; line < Codes<kind>::BYTES; line += 64) __builtin_prefetch(panel + AHEAD + line);
            code_block<kind>(x, index, panel, parts);
        }
        for (int vec = 0; vec < VECS; vec++) {
            Vec scale = Stored<F16>::load(head + vec * LANES), zero = Stored<BF16>::load(head + PANEL + vec * LANES);
            for (int row = 0; row < ROWS; row++) {
                Vec part = fused(zero, broadcast(x.data[row * x.row + next - 1].shift), parts[row][vec]);
                totals[row][vec] = fused(scale, part, totals[row][vec]);
            }
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int vec = 0; vec < VECS; vec++) write(sums.data + row * sums.row + vec * LANES, totals[row][vec]);
}

template <Kind kind, int ROWS = CODE_ROWS>
inline void code_rows(int64_t rows, const CodeRows& x, const uint8_t* panel, int64_t groups, int64_t blocks,
                      const Sums& sums) {
    if (rows == ROWS) return code_tile<kind, ROWS>(x, panel, groups, blocks, sums);
    if constexpr (ROWS > 1) code_rows<kind, ROWS - 1>(rows, x, panel, groups, blocks, sums);
}

// The low byte of each lane. (The compiler would convert one lane after the other.)
template <int... byte> inline void write_bytes(int8_t* to, Ints v, std::integer_sequence<int, byte...>) {
    typedef int8_t All __attribute__((vector_size(LANES * 4)));
    All low = __builtin_shuffle((All)v, All{(byte % LANES * 4)...});
    std::memcpy(to, &low, LANES);
}

// BLOCK floats. What is no number makes a scale that is none either.
inline void round_block(const float* x, Block& block) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 · 2^23: its low byte becomes the nearest integer, ties to even
    Ints most = Ints{};                        // without sign, floats are in the order of their bits, NaN above all
    for (int at = 0; at < BLOCK; at += LANES) {
        Ints bits = read<Ints>(x + at) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float peak = largest((Vec)most), steps = peak > 0 ? 127 / peak : 0;
    Ints total = Ints{};
    for (int at = 0; at < BLOCK; at += LANES) {
        Ints rounded = (Ints)(read<Vec>(x + at) * broadcast(steps) + magic) << 24 >> 24;
        total += rounded;
        write_bytes((int8_t*)block.quads + at, rounded, std::make_integer_sequence<int, LANES * 4>());
    }
    block.sum = int32_t(sum(to_floats(total)));
    block.scale = peak / 127;
}

// A row of activations, group by group.
inline void round_row(const float* x, int64_t groups, int64_t group, Block* block) {
    for (; groups > 0; groups--, x += group) {
        float shift = 0;
        for (int64_t at = 0; at < group; at += BLOCK, block++) {
            float filled[BLOCK] = {};
            bool whole = group - at >= BLOCK;
            if (!whole) std::memcpy(filled, x + at, (group - at) * sizeof(float));
            round_block(whole ? x + at : filled, *block);
            shift -= block->scale * float(block->sum);
            block->shift = shift;
        }
    }
}

template <Kind kind>
inline void code_product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y) {
    int64_t groups = m.inputs / m.group, blocks = (m.group + BLOCK - 1) / BLOCK, x_row = groups * blocks;
    int64_t panel = groups * (HEAD + blocks * Codes<kind>::BYTES), y_row = then == GATE ? m.outputs / 2 : m.outputs;
    std::unique_ptr<Block[]> rounded(new Block[rows * x_row]);
    each_row(team, rows, [&](int64_t row) { round_row(x + row * m.inputs, groups, m.group, rounded.get() + row * x_row); });
    each_block(team, m, rows, [&](int64_t group, int64_t first, int64_t count, float* sums) {
        const uint8_t* weights = (const uint8_t*)m.data + group * GROUP * panel;
        int64_t tiles = (count + CODE_ROWS - 1) / CODE_ROWS;
        for (int column = 0; column < WIDTH; column += PANEL, weights += panel)
            for (int64_t index = 0; index < tiles; index++) {
                int64_t begin = count * index / tiles, end = count * (index + 1) / tiles;
                CodeRows activations{rounded.get() + (first + begin) * x_row, x_row};
                code_rows<kind>(end - begin, activations, weights, groups, blocks, {sums + begin * WIDTH + column, WIDTH});
            }
        for (int64_t row = 0; row < count; row++) finish(m, group, then, sums + row * WIDTH, y + (first + row) * y_row);
    });
}

}  // namespace tandem
