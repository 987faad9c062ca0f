// The two halves of a decoder layer, on float activations; between them and behind them ranks add up what they have.
//
//   attend   h = norm(x);  q | k | v = qkv · h;  rotate;  write k, v;  y += output · attention(q)
//   think    h = norm(x);  y += down · (silu(gate · h) · (up · h))
#pragma once

#include "attention.h"

namespace tandem {

constexpr int64_t STRETCH = 4 * BLOCK_ROWS;  // rows whose activations stay in the cache between two products

struct Layer {
    Matrix qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm;  // (hidden,)
    const float *query_norm, *key_norm;      // (head_dim,) or null
    Heads heads;
    float eps;
};

inline void normalize(const float* x, const float* weight, int64_t size, float eps, float* y) {
    Vec squares = Vec{};
    int64_t at = 0;
    for (; at + LANES <= size; at += LANES) squares = fused(read<Vec>(x + at), read<Vec>(x + at), squares);
    float total = sum(squares);
    for (; at < size; at++) total += x[at] * x[at];
    float scale = 1.0f / std::sqrt(total / float(size) + eps);
    for (at = 0; at + LANES <= size; at += LANES) write(y + at, read<Vec>(x + at) * scale * read<Vec>(weight + at));
    for (; at < size; at++) y[at] = x[at] * scale * weight[at];
}

// Each pair (i, i + dim / 2) of a head turned by its angle, in place.
inline void rotate(float* head, int64_t dim, const float* cosines, const float* sines) {
    int64_t half = dim / 2, at = 0;
    for (; at + LANES <= half; at += LANES) {
        Vec first = read<Vec>(head + at), second = read<Vec>(head + half + at);
        Vec cosine = read<Vec>(cosines + at), sine = read<Vec>(sines + at);
        write(head + at, first * cosine - second * sine);
        write(head + half + at, second * cosine + first * sine);
    }
    for (; at < half; at++) {
        float first = head[at], second = head[half + at];
        head[at] = first * cosines[at] - second * sines[at];
        head[half + at] = second * cosines[at] + first * sines[at];
    }
}

template <Kind kind> inline void store_head(const float* from, int64_t dim, typename Stored<kind>::Element* to) {
    for (int64_t at = 0; at < dim; at++) to[at] = Stored<kind>::round(from[at]);
}

// One token's heads, fresh from the product: rotated, keys and values into the cache.
template <Kind kind>
inline void place(const Layer& layer, const Step& step, const Cache& cache, int64_t token, float* row) {
    const Heads& heads = layer.heads;
    int64_t dim = heads.head_dim, half = dim / 2;
    for (int64_t head = 0; head < heads.heads + heads.kv_heads; head++) {
        const float* norm = head < heads.heads ? layer.query_norm : layer.key_norm;
        if (norm) normalize(row + head * dim, norm, dim, layer.eps, row + head * dim);
        rotate(row + head * dim, dim, step.cosines + token * half, step.sines + token * half);
    }
    typedef typename Stored<kind>::Element Element;
    Element* slot = (Element*)cache.data + step.slot_blocks[token] * cache.block + step.slot_offsets[token] * cache.token;
    for (int64_t head = 0; head < heads.kv_heads; head++) {
        store_head<kind>(row + (heads.heads + head) * dim, dim, slot + head * cache.head);
        store_head<kind>(row + (heads.heads + heads.kv_heads + head) * dim, dim, slot + cache.part + head * cache.head);
    }
}

// Keys and values of all tokens of the step; attention of those `asked` for, which are all or each sequence's last.
template <Kind kind>
inline void attend(Team& team, const Layer& layer, const Step& step, const Step& asked, const Cache& cache, const float* x,
                   float* memory, float* y) {
    const Heads& heads = layer.heads;
    int64_t hidden = layer.qkv.inputs, wide = layer.qkv.outputs;
    float *normed = memory, *qkv = normed + step.tokens * hidden, *seen = qkv + step.tokens * wide;
    each_row(team, step.tokens, [&](int64_t row) {
        normalize(x + row * hidden, layer.attention_norm, hidden, layer.eps, normed + row * hidden);
    });
    product(team, layer.qkv, normed, step.tokens, STORE, qkv);
    each_row(team, step.tokens, [&](int64_t row) { place<kind>(layer, step, cache, row, qkv + row * wide); });
    if (asked.tokens < step.tokens)
        for (int64_t row = 0; row < asked.tokens; row++)  // forward in place: no sequence is without tokens
            std::memmove(qkv + row * wide, qkv + (step.query_start[row + 1] - 1) * wide, wide * sizeof(float));
    int width = (heads.head_dim + WIDTH - 1) / WIDTH * WIDTH;
    Attention<kind>{heads, asked, cache, qkv, wide, seen, width}.run(team);
    product(team, layer.output, seen, asked.tokens, ADD, y);
}

inline void think(Team& team, const Layer& layer, int64_t rows, const float* x, float* memory, float* y) {
    int64_t hidden = layer.gate_up.inputs;
    for (int64_t first = 0; first < rows; first += STRETCH) {
        int64_t count = std::min(STRETCH, rows - first);
        float *normed = memory, *gated = normed + count * hidden;
        each_row(team, count, [&](int64_t row) {
            normalize(x + (first + row) * hidden, layer.mlp_norm, hidden, layer.eps, normed + row * hidden);
        });
        product(team, layer.gate_up, normed, count, GATE, gated);
        product(team, layer.down, gated, count, ADD, y + first * hidden);
    }
}

// A model's last layer, in place, of each sequence's last token: nobody asks for the others, only for their keys and values.
template <Kind kind>
inline void conclude(Team& team, const Layer& layer, const Step& step, const Cache& cache, float* memory, float* x) {
    int64_t hidden = layer.qkv.inputs;
    std::vector<float> rows(step.sequences * hidden);
    std::vector<int32_t> starts(step.sequences + 1);
    for (int64_t row = 0; row < step.sequences; row++) {
        std::memcpy(&rows[row * hidden], x + (step.query_start[row + 1] - 1) * hidden, hidden * sizeof(float));
        starts[row + 1] = int32_t(row + 1);
    }
    Step asked = step;
    asked.tokens = step.sequences, asked.query_start = starts.data();
    attend<kind>(team, layer, step, asked, cache, x, memory, rows.data());
    think(team, layer, step.sequences, rows.data(), memory, rows.data());
    for (int64_t row = 0; row < step.sequences; row++)
        std::memcpy(x + (step.query_start[row + 1] - 1) * hidden, &rows[row * hidden], hidden * sizeof(float));
}

}  // namespace tandem
