// Products of few rows with a tile of keys or values, which come from memory while others are computed.
//
// Where few rows share a tile, as when single tokens are decoded, reading it takes as long as computing with it. So
// every loop also asks for a little of the tile that is next: a core can wait for a few lines of 64 bytes at a time
// only, and stops if it asks for many at once.
//
// Invariant: as in matmul.h, a sum is one chain of fused multiply-adds in rising order.
#pragma once

#include "matmul.h"

namespace tandem {

constexpr int TILE = 64;                         // positions
constexpr int MOST_SUMS = LANES == 8 ? 12 : 24;  // registers for sums, beside a factor of each row and one element

// The memory of the tile that is next, line by line: pieces of the same size, each in one place.
struct Ahead {
    const char* const* piece;
    const char* const* end;  // what it points to is read, too, and asked for again and again
    int64_t size;            // bytes of a piece
    int64_t at = 0;

    __attribute__((always_inline)) void next() {
        __builtin_prefetch(*piece + at, 0, 2);  // not into the first cache: a tile of several heads would fill it
        at += 64;
        if (at >= size) at = 0, piece += piece != end;
    }
    void rest() {
        while (piece != end) next();
    }
};

// Two bfloat16 numbers in each 32 bits, the first in the low half.
inline Vec first_of(Ints pairs) { return (Vec)(pairs << 16); }
inline Vec second_of(Ints pairs) { return (Vec)(pairs & (Ints{} + int32_t(0xffff0000))); }

struct Floats {  // (count, row), for few rows and for many: see `narrow` and `tile` of matmul.h
    static constexpr int FETCH = 2;  // a line of what is ahead for so many elements
    const float* data;
    int64_t row;
    Floats behind(int vecs) const { return {data + vecs * LANES, row}; }
    Vec load(int64_t index, int vec) const { return read<Vec>(data + index * row + vec * LANES); }
    Vec load(int64_t index, int panel, int vec) const { return load(index, panel * VECS + vec); }
};

// Values straight from the cache. Of bfloat16, 2 · LANES columns are taken as two vectors, of even and of odd columns.
template <Kind kind> struct Values {
    static constexpr int FETCH = 1;
    typedef typename Stored<kind>::Element Element;
    const Element* const* found;
    int64_t from;  // elements behind `found`
    Values behind(int vecs) const { return {found, from + vecs * LANES}; }
    Vec load(int64_t index, int vec) const {
        if constexpr (kind != BF16) return Stored<kind>::load(found[index] + from + vec * LANES);
        const Element* pair = found[index] + from + vec / 2 * 2 * LANES;
        asm volatile("" : "+r"(pair));  // read twice: kept in between, pairs would push sums out of their registers
        Ints pairs = read<Ints>(pair);
        return vec % 2 ? second_of(pairs) : first_of(pairs);
    }
    // Which column of the vectors so taken is this one.
    static uint64_t column(uint64_t at) {
        return kind == BF16 ? at / (2 * LANES) * (2 * LANES) + at % 2 * LANES + at % (2 * LANES) / 2 : at;
    }
};

// sums (ROWS, VECTORS · LANES) += x (ROWS, count) · source. By itself, for it needs all registers there are.
template <int ROWS, int VECTORS, class S>
__attribute__((noinline)) void narrow(Rows x, S source, int64_t count, const Sums& sums, Ahead& shared) {
    Ahead ahead = shared;  // in registers
    Vec total[ROWS][VECTORS];
    for (int row = 0; row < ROWS; row++)
        for (int vec = 0; vec < VECTORS; vec++) total[row][vec] = read<Vec>(sums.data + row * sums.row + vec * LANES);
    for (int64_t index = 0; index < count; index++) {
        if (index % S::FETCH == 0) ahead.next();
        Vec factors[ROWS];
        for (int row = 0; row < ROWS; row++) factors[row] = broadcast(x.data[row * x.row + index]);
        for (int vec = 0; vec < VECTORS; vec++) {
            Vec element = source.load(index, vec);
            for (int row = 0; row < ROWS; row++) total[row][vec] = fused(factors[row], element, total[row][vec]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int vec = 0; vec < VECTORS; vec++) write(sums.data + row * sums.row + vec * LANES, total[row][vec]);
    shared = ahead;
}

constexpr int vectors(int rows) {  // whose sums fit into registers; an even number
    int count = WIDTH / LANES;
    while (rows * count > MOST_SUMS) count /= 2;
    return count;
}

// sums (rows, WIDTH) += x (rows, count) · source, for ROWS rows at most
template <int ROWS = TILE_ROWS, class S>
inline void few_rows(int64_t rows, const Rows& x, const S& source, int64_t count, const Sums& sums, Ahead& ahead) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return few_rows<ROWS - 1>(rows, x, source, count, sums, ahead);
    constexpr int VECTORS = vectors(ROWS);
    for (int vec = 0; vec < WIDTH / LANES; vec += VECTORS)
        narrow<ROWS, VECTORS>(x, source.behind(vec), count, {sums.data + vec * LANES, sums.row}, ahead);
}

}  // namespace tandem
