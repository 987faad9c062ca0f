// Products of activations with packed weights: y (rows, outputs) = x (rows, inputs) · Wᵀ, and what follows in one go.
//
//   packed weights   [outputs / 16][inputs][16]   a panel is 16 outputs, streamed from its first input to its last
//
// A task computes GROUP panels for a block of rows, TILE_ROWS at a time. Weights go from memory or cache straight into
// the products, widened to floats in registers: that costs less than floats of twice the size in the cache would.
//
// dot.h has another way for bfloat16 where the processor does, integers.h that of 8 and 4 bits.
//
// Invariant: an output is one chain of fused multiply-adds over the inputs in rising order, however many rows there
// are. So a row's result does not depend on the batch it is in.
#pragma once

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace tandem {

constexpr int GROUP = 2;                           // panels of a task
constexpr int WIDTH = GROUP * PANEL;               // its outputs
constexpr int TILE_ROWS = LANES == 8 ? 6 : 12;     // rows whose sums fit into registers beside one panel's weights
constexpr int SUMS = LANES == 8 ? 8 : 24;          // registers for sums while the weights of a whole group are held
constexpr int BLOCK_ROWS = 120;                    // of a task; its activations stay in the cache
constexpr int AHEAD = 1536;                        // bytes that are fetched before they are needed

struct Matrix {
    const void* data;     // packed
    const float* scales;  // (outputs,) or null: of the whole row
    const float* bias;    // (outputs,) or null
    int64_t outputs, inputs, group;  // I8, I4: how many inputs share a scale and a zero
    int32_t kind;                    // of storage
};

enum Then : int32_t {
    STORE = 0,
    ADD = 1,   // y += the product: the residual stream
    GATE = 2,  // panels alternate between gate and up; y (rows, outputs / 2) = silu(gate) · up
};

// How LANES weights of one input are found and widened. Exact.
template <Kind kind> struct Weights {
    typedef typename Stored<kind>::Element Element;
    const Element* data;
    int64_t inputs;
    Weights(const Matrix& m, int64_t group) : data((const Element*)m.data + group * GROUP * m.inputs * PANEL), inputs(m.inputs) {}
    Vec load(int64_t input, int panel, int vec) const {
        return Stored<kind>::load(data + (panel * inputs + input) * PANEL + vec * LANES);
    }
};

// Asks for weights that will be needed soon: by itself the processor stops doing so at the end of each page.
template <class W> inline void fetch(const W&, int64_t, int) {}
template <Kind kind> inline void fetch(const Weights<kind>& weights, int64_t input, int panel) {
    __builtin_prefetch((const char*)(weights.data + (panel * weights.inputs + input) * PANEL) + AHEAD);
}

struct Rows {  // of activations
    const float* data;
    int64_t row;  // stride
};
struct Sums {  // WIDTH or more columns
    float* data;
    int64_t row;
};

// sums (ROWS, PANELS panels) += x (ROWS, count) · weights (count, …)
template <int ROWS, int PANELS, class W>
inline void tile(const Rows& x, const W& weights, int first_panel, int64_t count, const Sums& sums) {
    Vec total[ROWS][PANELS][VECS];
    for (int row = 0; row < ROWS; row++)
        for (int panel = 0; panel < PANELS; panel++)
            for (int vec = 0; vec < VECS; vec++)
                total[row][panel][vec] = read<Vec>(sums.data + row * sums.row + panel * PANEL + vec * LANES);
    for (int64_t input = 0; input < count; input++) {
        Vec weight[PANELS][VECS];
        for (int panel = 0; panel < PANELS; panel++) fetch(weights, input, first_panel + panel);
        for (int panel = 0; panel < PANELS; panel++)
            for (int vec = 0; vec < VECS; vec++) weight[panel][vec] = weights.load(input, first_panel + panel, vec);
        for (int row = 0; row < ROWS; row++) {
            Vec activation = broadcast(x.data[row * x.row + input]);
            for (int panel = 0; panel < PANELS; panel++)
                for (int vec = 0; vec < VECS; vec++) total[row][panel][vec] = fused(activation, weight[panel][vec], total[row][panel][vec]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int panel = 0; panel < PANELS; panel++)
            for (int vec = 0; vec < VECS; vec++)
                write(sums.data + row * sums.row + panel * PANEL + vec * LANES, total[row][panel][vec]);
}

// The panels of the group together if their sums fit into registers, else one after the other.
template <int ROWS, class W>
inline void group_tile(const Rows& x, const W& weights, int64_t count, const Sums& sums) {
    if constexpr (ROWS * GROUP * VECS <= SUMS) {
        tile<ROWS, GROUP>(x, weights, 0, count, sums);
    } else {
        for (int panel = 0; panel < GROUP; panel++)
            tile<ROWS, 1>(x, weights, panel, count, Sums{sums.data + panel * PANEL, sums.row});
    }
}

template <class W>
inline void rows_tile(int rows, const Rows& x, const W& weights, int64_t count, const Sums& sums) {
    switch (rows) {
#define TANDEM_ROWS(n) case n: return group_tile<n>(x, weights, count, sums);
        TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
#if defined(__AVX512F__) || !defined(__AVX__)
        TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#endif
#undef TANDEM_ROWS
    }
}

// All rows, in tiles of nearly equal height.
template <class W>
inline void all_rows(int64_t rows, const Rows& x, const W& weights, int64_t count, const Sums& sums) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t index = 0; index < tiles; index++) {
        int64_t first = rows * index / tiles, last = rows * (index + 1) / tiles;
        rows_tile(int(last - first), {x.data + first * x.row, x.row}, weights, count, {sums.data + first * sums.row, sums.row});
    }
}

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

// What follows the product, for one row of a group: `sums` (WIDTH,) into the row `y` of the result.
inline void finish(const Matrix& m, int64_t group, Then then, const float* sums, float* y) {
    float done[WIDTH];
    for (int column = 0; column < WIDTH; column += LANES) {
        Vec value = read<Vec>(sums + column);
        if (m.scales) value *= read<Vec>(m.scales + group * WIDTH + column);
        if (m.bias) value += read<Vec>(m.bias + group * WIDTH + column);
        write(done + column, value);
    }
    int64_t first = group * WIDTH, count = std::min<int64_t>(WIDTH, m.outputs - first);
    if (then == GATE) {
        first = group * PANEL, count = PANEL;
        for (int column = 0; column < PANEL; column += LANES)
            write(done + column, silu(read<Vec>(done + column)) * read<Vec>(done + PANEL + column));
    } else if (then == ADD) {
        for (int64_t column = 0; column < count; column++) done[column] += y[first + column];
    }
    std::memcpy(y + first, done, count * sizeof(float));
}

// work(group, first row, rows, sums) for each group of panels and block of rows.
template <class F> inline void each_block(Team& team, const Matrix& m, int64_t rows, F&& work) {
    int64_t groups = (m.outputs + WIDTH - 1) / WIDTH, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    team.run(groups * blocks, [&](int64_t task, int thread) {
        int64_t index = task % blocks, first = rows * index / blocks, last = rows * (index + 1) / blocks;
        work(task / blocks, first, last - first, team.scratch(thread, BLOCK_ROWS * WIDTH));
    });
}

constexpr int64_t ROWS_OF_A_TASK = 16;  // of work that is done row by row

template <class F> inline void each_row(Team& team, int64_t rows, F&& work) {  // work(row)
    team.run((rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK, [&](int64_t task, int) {
        for (int64_t row = task * ROWS_OF_A_TASK; row < std::min(rows, (task + 1) * ROWS_OF_A_TASK); row++) work(row);
    });
}

template <Kind kind>
inline void product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y) {
    int64_t y_row = then == GATE ? m.outputs / 2 : m.outputs;
    each_block(team, m, rows, [&](int64_t group, int64_t first, int64_t count, float* sums) {
        std::fill(sums, sums + count * WIDTH, 0.0f);
        all_rows(count, {x + first * m.inputs, m.inputs}, Weights<kind>(m, group), m.inputs, {sums, WIDTH});
        for (int64_t row = 0; row < count; row++) finish(m, group, then, sums + row * WIDTH, y + (first + row) * y_row);
    });
}

// in dot.h and integers.h
void dot_product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y);
template <Kind kind> void code_product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y);

inline void product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y) {
    switch (m.kind) {
        case F32: return product<F32>(team, m, x, rows, then, y);
        case BF16: return HAS_DOT ? dot_product(team, m, x, rows, then, y) : product<BF16>(team, m, x, rows, then, y);
        case F16: return product<F16>(team, m, x, rows, then, y);
        case I8: return code_product<I8>(team, m, x, rows, then, y);
        case I4: return code_product<I4>(team, m, x, rows, then, y);
    }
}

}  // namespace tandem
