// Products of bfloat16 weights on processors with a dot product of bfloat16 pairs: twice the rate of floats.
//
//   packed weights   [outputs / 16][inputs / 2][16][2]        activations (rows, inputs / 2) pairs, rounded once
//
// As in matmul.h an output is one chain in rising order of the inputs, here two at a time.
#pragma once

#include "matmul.h"

namespace tandem {

struct PairRows {
    const int32_t* data;
    int64_t row;  // stride, in pairs
};

// sums (ROWS, PANELS panels) += x (ROWS, pairs) · weights (panels, pairs)
template <int ROWS, int PANELS>
inline void dot_tile(const PairRows& x, const int32_t* weights, int64_t pairs, const Sums& sums) {
    Vec total[ROWS][PANELS][VECS] = {};
    for (int64_t pair = 0; pair < pairs; pair++) {
        Ints weight[PANELS][VECS];
        for (int panel = 0; panel < PANELS; panel++)
            for (int vec = 0; vec < VECS; vec++)
                weight[panel][vec] = read<Ints>(weights + (panel * pairs + pair) * PANEL + vec * LANES);
        for (int row = 0; row < ROWS; row++) {
            Ints activations = Ints{} + x.data[row * x.row + pair];
            for (int panel = 0; panel < PANELS; panel++)
                for (int vec = 0; vec < VECS; vec++)
                    total[row][panel][vec] = dot(total[row][panel][vec], activations, weight[panel][vec]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int panel = 0; panel < PANELS; panel++)
            for (int vec = 0; vec < VECS; vec++)
                write(sums.data + row * sums.row + panel * PANEL + vec * LANES, total[row][panel][vec]);
}

template <int ROWS> inline void dot_group(const PairRows& x, const int32_t* weights, int64_t pairs, const Sums& sums) {
    if constexpr (ROWS * GROUP * VECS <= SUMS) return dot_tile<ROWS, GROUP>(x, weights, pairs, sums);
    for (int panel = 0; panel < GROUP; panel++)
        dot_tile<ROWS, 1>(x, weights + panel * pairs * PANEL, pairs, {sums.data + panel * PANEL, sums.row});
}

inline void dot_rows(int rows, const PairRows& x, const int32_t* weights, int64_t pairs, const Sums& sums) {
    switch (rows) {
#define TANDEM_ROWS(n) case n: return dot_group<n>(x, weights, pairs, sums);
        TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
        TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#undef TANDEM_ROWS
    }
}

// (inputs,) floats -> (pairs,), an odd last input beside a zero
inline void to_pairs(const float* x, int64_t inputs, int32_t* pairs) {
    for (int64_t input = 0; input < inputs; input += 2) {
        uint32_t first = float_to_bf16(x[input]), second = input + 1 < inputs ? float_to_bf16(x[input + 1]) : 0;
        pairs[input / 2] = int32_t(first | second << 16);
    }
}

inline void dot_product(Team& team, const Matrix& m, const float* x, int64_t rows, Then then, float* y) {
    int64_t pairs = (m.inputs + 1) / 2, y_row = then == GATE ? m.outputs / 2 : m.outputs;
    std::vector<int32_t> rounded(rows * pairs);
    each_row(team, rows, [&](int64_t row) { to_pairs(x + row * m.inputs, m.inputs, rounded.data() + row * pairs); });
    each_block(team, m, rows, [&](int64_t group, int64_t first, int64_t count, float* sums) {
        const int32_t* weights = (const int32_t*)m.data + group * GROUP * pairs * PANEL;
        int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t index = 0; index < tiles; index++) {
            int64_t begin = count * index / tiles, end = count * (index + 1) / tiles;
            PairRows activations{rounded.data() + (first + begin) * pairs, pairs};
            dot_rows(int(end - begin), activations, weights, pairs, {sums + begin * WIDTH, WIDTH});
        }
        for (int64_t row = 0; row < count; row++) finish(m, group, then, sums + row * WIDTH, y + (first + row) * y_row);
    });
}

}  // namespace tandem
