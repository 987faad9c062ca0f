// The C interface of the CPU kernels; engine/kernels/native.py has the same declarations for ctypes. Nothing throws
// into the caller but std::bad_alloc, which ends the process: the engine has no use for half a step.

#include "dot.h"
#include "integers.h"
#include "layer.h"

using namespace tandem;

// work() with the kind of the cache's elements as a constant: KV is kept in floats of some size.
template <class F> static void with_kind(const Cache& cache, F&& work) {
    if (cache.kind == F32) work(std::integral_constant<Kind, F32>());
    if (cache.kind == BF16) work(std::integral_constant<Kind, BF16>());
    if (cache.kind == F16) work(std::integral_constant<Kind, F16>());
}

extern "C" {

Team* tandem_team(int threads, int cores, int niceness, void* table, int lines, int mine) {
    Line* all = (Line*)table;
    if (all) all[mine].seen.store(0), all[mine].cores.store(cores), all[mine].prompts.store(0);
    return new Team(threads, niceness, all, lines, mine);
}
int tandem_pairs() { return HAS_DOT; }  // whether bfloat16 weights are packed in pairs: dot.h
void tandem_disband(Team* team) { delete team; }
void tandem_begin(Team* team) { team->begin(); }
void tandem_end(Team* team) { team->end(); }

// y (rows, outputs) = x (rows, inputs) · Wᵀ, all float; `then` as in matmul.h.
void tandem_product(Team* team, const Matrix* matrix, const float* x, int64_t rows, int32_t then, float* y) {
    product(*team, *matrix, x, rows, Then(then), y);
}

void tandem_normalize(Team* team, const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* y) {
    each_row(*team, rows, [&](int64_t row) { normalize(x + row * size, weight, size, eps, y + row * size); });
}

// seen (T, heads, head_dim) = attention of query (T, heads, head_dim) over the cache, which holds the new tokens' KV.
void tandem_attention(Team* team, const Heads* heads, const Step* step, const Cache* cache, const float* query, float* seen) {
    int width = (heads->head_dim + WIDTH - 1) / WIDTH * WIDTH;
    int64_t row = int64_t(heads->heads) * heads->head_dim;
    with_kind(*cache, [&](auto kind) { Attention<kind()>{*heads, *step, *cache, query, row, seen, width}.run(*team); });
}

// y (T, hidden) += the attention half of `x`; `memory`: T · (hidden + q, k and v + q) floats.
void tandem_attend(Team* team, const Layer* layer, const Step* step, const Cache* cache, const float* x, float* memory, float* y) {
    with_kind(*cache, [&](auto kind) { attend<kind()>(*team, *layer, *step, *step, *cache, x, memory, y); });
}

// y (rows, hidden) += the MLP half of `x`; `memory`: rows · (hidden + inner) floats.
void tandem_think(Team* team, const Layer* layer, int64_t rows, const float* x, float* memory, float* y) {
    think(*team, *layer, rows, x, memory, y);
}

// x (T, hidden), through layers first … end - 1, in place; through layer `last`, only each sequence's last token.
void tandem_layers(Team* team, const Layer* layers, const Cache* caches, int64_t first, int64_t end, int64_t last, const Step* step,
                   float* memory, float* x) {
    for (; first < end; first++) {
        const Layer& layer = layers[first];
        const Cache& cache = caches[first];
        if (first != last) {
            tandem_attend(team, &layer, step, &cache, x, memory, x);
            think(*team, layer, step->tokens, x, memory, x);
            continue;
        }
        with_kind(cache, [&](auto kind) { conclude<kind()>(*team, layer, *step, cache, memory, x); });
    }
}
}
