// Causal attention over the paged KV cache, of prompts' chunks and single tokens alike.
//
//   kv of one layer   (blocks, 2, kv_heads, block_size, head_dim), strided; a block table per sequence
//   rows              the query heads that share a kv head, of one or more tokens: token 0: head 0 … G-1 | token 1: …
//
// A task is one kv head of a sequence for MAX_ROWS rows at most. It walks the context in tiles of TILE positions: keys are widened
// and transposed into panels of 16 positions, values widened, once for all rows; then two products (the ones of
// matmul.h) with an online softmax in between (FlashAttention-2). Every SPLIT positions the running maximum, sum and
// values are merged into the total, so a single token's long context can be shared by several threads (flash decoding).
//
// Invariant: tiles and splits begin at fixed positions, and a row's numbers do not depend on the other rows. So a
// token's output is the same bits in whichever chunk or batch it is computed.
#pragma once

#include "matmul.h"

namespace tandem {

constexpr int TILE = 64;        // positions
constexpr int SPLIT = 512;      // positions
constexpr int MAX_ROWS = 96;    // of a task, unless more heads share one kv head

struct Cache {
    void* data;  // of this layer
    int64_t block, part, head, token;  // strides, in elements
    int32_t block_size, kind;
};

struct Step {
    int64_t tokens, sequences, table_width;
    const int32_t *query_start, *context_lens, *tables;  // (S + 1,), (S,), (S, table_width)
    const int64_t *slot_blocks, *slot_offsets;           // (T,)
    const float *cosines, *sines;                        // (T, head_dim / 2)
};

struct Heads {
    int32_t heads, kv_heads, head_dim;
    int64_t window;  // tokens in sight, itself included; 0: all
    float scale;
};

struct Task {
    int64_t sequence, kv_head;
    int64_t first, tokens;  // of the sequence's new tokens
    int64_t from, to;       // positions of the context
    int64_t slot;           // -1: the whole context; else where this split's partial result goes
};

struct Partial {  // of some rows: maxima, sums (rows,), values (rows, width)
    float *maxima, *sums, *values;
    static size_t floats(int64_t rows, int width) { return size_t(rows) * (2 + width); }
    Partial(float* memory, int64_t rows) : maxima(memory), sums(memory + rows), values(memory + 2 * rows) {}
    void clear(int64_t rows, int width) {
        std::fill(maxima, maxima + rows, -std::numeric_limits<float>::infinity());
        std::fill(sums, sums + rows, 0.0f);
        std::fill(values, values + rows * width, 0.0f);
    }
};

// Keys or values of one panel of 16, as `tile` of matmul.h reads weights.
struct Panels {
    const float* data;
    int64_t panel, input;  // strides
    Vec load(int64_t index, int which, int vec) const { return read<Vec>(data + which * panel + index * input + vec * LANES); }
};

template <Kind kind> struct Attention {
    const Heads& heads;
    const Step& step;
    const Cache& cache;
    const float* query;  // (T, query_row): the heads of a token one behind the other
    int64_t query_row;
    float* output;       // (T, heads · head_dim)
    int width;           // head_dim, rounded up to whole groups of panels

    typedef typename Stored<kind>::Element Element;

    // queries (most, width) | keys (TILE, width) in panels | values (TILE, width) | scores (most, TILE) | 2 partials
    size_t scratch() const { return size_t(most()) * (width + TILE) + 2 * TILE * width + 2 * Partial::floats(most(), width); }
    int64_t most() const { return std::max<int64_t>(MAX_ROWS, group()); }

    // Where `count` positions' elements of this head begin; keys, with values `cache.part` behind.
    void find(const Task& task, int64_t position, int64_t count, const Element** found) const {
        const int32_t* table = step.tables + task.sequence * step.table_width;
        const Element* head = (const Element*)cache.data + task.kv_head * cache.head;
        int64_t block = position / cache.block_size, offset = position % cache.block_size;
        int64_t size = cache.block_size, token = cache.token, stride = cache.block;
        for (int64_t index = 0; index < count; block++, offset = 0) {
            const Element* element = head + table[block] * stride + offset * token;
            for (; offset < size && index < count; offset++, element += token) found[index++] = element;
        }
        for (int64_t index = count; index < TILE; index++) found[index] = found[count - 1];  // masked later
    }

    // Of the positions behind, which will be asked for next; they are on their way when they are.
    void fetch(const Task& task, int64_t position, int64_t count) const {
        const Element* found[TILE];
        find(task, position, count, found);
        int64_t part = cache.part, dim = heads.head_dim;
        for (int64_t index = 0; index < count; index++)
            for (int64_t at = 0; at < dim; at += 64 / sizeof(Element)) {
                __builtin_prefetch(found[index] + at);
                __builtin_prefetch(found[index] + part + at);
            }
    }

    // (TILE positions, head_dim) -> [TILE / 16][head_dim][16]
    void widen_keys(const Element* const* found, int64_t count, float* keys) const {
        int64_t dim = heads.head_dim, whole = dim / LANES * LANES;
        for (int64_t index = 0; index < count; index += LANES) {
            float* panel = keys + index / PANEL * dim * PANEL + index % PANEL;
            int64_t at = kind == BF16 ? widen_pairs(found + index, whole, panel) : 0;
            for (; at < whole; at += LANES) {
                Vec block[LANES];
                for (int lane = 0; lane < LANES; lane++) block[lane] = Stored<kind>::load(found[index + lane] + at);
                transpose(block);
                for (int lane = 0; lane < LANES; lane++) write(panel + (at + lane) * PANEL, block[lane]);
            }
            for (int lane = 0; lane < LANES; lane++)
                for (int64_t rest = at; rest < dim; rest++) panel[rest * PANEL + lane] = Stored<kind>::one(found[index + lane][rest]);
        }
    }

    // The same two elements at a time: transposed as 32 bits, taken apart behind that. How many elements it did.
    static int64_t widen_pairs(const Element* const* found, int64_t whole, float* panel) {
        const Ints high = Ints{} + int32_t(0xffff0000);
        int64_t at = 0;
        for (; at + 2 * LANES <= whole; at += 2 * LANES) {
            Vec block[LANES];
            for (int lane = 0; lane < LANES; lane++) block[lane] = read<Vec>(found[lane] + at);
            transpose(block);
            float* column = panel + at * PANEL;
            for (int lane = 0; lane < LANES; lane++) {
                write(column + 2 * lane * PANEL, (Vec)((Ints)block[lane] << 16));
                write(column + (2 * lane + 1) * PANEL, (Vec)((Ints)block[lane] & high));
            }
        }
        return at;
    }

    // (count positions, head_dim) -> [TILE][width]
    void widen_values(const Element* const* found, int64_t count, float* values) const {
        int64_t dim = heads.head_dim, whole = dim / LANES * LANES, part = cache.part, row = width;
        for (int64_t index = 0; index < count; index++, values += row) {
            const Element* value = found[index] + part;
            for (int64_t at = 0; at < whole; at += LANES) write(values + at, Stored<kind>::load(value + at));
            for (int64_t at = whole; at < dim; at++) values[at] = Stored<kind>::one(value[at]);
        }
    }

    // Scores of positions out of a row's sight become -inf; those behind `count` too.
    void mask(const Task& task, int64_t row, int64_t position, int64_t count, float* scores) const {
        int64_t token = task.first + row / group();
        int64_t length = step.query_start[task.sequence + 1] - step.query_start[task.sequence];
        int64_t self = step.context_lens[task.sequence] - length + token;  // its own position
        int64_t last = std::min(count, self + 1 - position), first = heads.window ? self - heads.window + 1 - position : 0;
        if (first <= 0 && last >= TILE) return;
        for (int64_t index = 0; index < TILE; index++)
            if (index < first || index >= last) scores[index] = -std::numeric_limits<float>::infinity();
    }

    int64_t group() const { return heads.heads / heads.kv_heads; }

    // One tile: scores, softmax in place, values.
    void tile_of(const Task& task, int64_t rows, int64_t position, int64_t to, float* memory, Partial& part) const {
        int64_t count = std::min<int64_t>(TILE, to - position), dim = heads.head_dim, panel = dim * PANEL;
        float *queries = memory, *keys = queries + most() * width, *values = keys + TILE * width, *scores = values + TILE * width;
        const Element* found[TILE];
        find(task, position, count, found);
        widen_keys(found, count, keys);
        if (position + count < to) fetch(task, position + count, std::min<int64_t>(TILE, to - position - count));
        std::fill(scores, scores + rows * TILE, 0.0f);
        for (int column = 0; column < count; column += WIDTH)
            all_rows(rows, {queries, width}, Panels{keys + column * dim, panel, PANEL}, 0, dim, {scores + column, TILE});
        for (int64_t row = 0; row < rows; row++) {
            float* score = scores + row * TILE;
            for (int column = 0; column < TILE; column += LANES) write(score + column, read<Vec>(score + column) * heads.scale);
            mask(task, row, position, count, score);
            soften(score, part.maxima[row], part.sums[row], part.values + row * width);
        }
        if (rows <= TILE_ROWS && dim % WIDTH == 0) {  // each value is used once: it is not worth widening apart
            for (int column = 0; column < width; column += WIDTH)
                all_rows(rows, {scores, TILE}, Values{found, cache.part + column}, 0, count, {part.values + column, width});
            return;
        }
        widen_values(found, count, values);
        for (int column = 0; column < width; column += WIDTH)
            all_rows(rows, {scores, TILE}, Panels{values + column, PANEL, width}, 0, count, {part.values + column, width});
    }

    struct Values {  // straight from the cache
        const Element* const* found;
        int64_t from;
        Vec load(int64_t index, int which, int vec) const {
            return Stored<kind>::load(found[index] + from + which * PANEL + vec * LANES);
        }
    };

    // Online softmax of one row's tile: scores become weights, what was summed before is scaled to the new maximum.
    void soften(float* score, float& maximum, float& total, float* values) const {
        Vec most = read<Vec>(score);
        for (int column = LANES; column < TILE; column += LANES) most = largest(read<Vec>(score + column), most);
        float grown = largest(largest(broadcast(maximum), most));
        if (grown == -std::numeric_limits<float>::infinity()) {  // it sees nothing here
            std::fill(score, score + TILE, 0.0f);
            return;
        }
        Vec added = Vec{};
        for (int column = 0; column < TILE; column += LANES) {
            Vec weight = exponential(read<Vec>(score + column) - grown);
            write(score + column, weight);
            added += weight;
        }
        if (grown != maximum) {
            float decay = exponential(broadcast(maximum - grown))[0];
            total *= decay;
            for (int column = 0; column < width; column += LANES) write(values + column, read<Vec>(values + column) * decay);
        }
        total += sum(added);
        maximum = grown;
    }

    // total <- total and part, for each row
    void merge(int64_t rows, Partial& total, const Partial& part) const {
        const float nothing = -std::numeric_limits<float>::infinity();
        for (int64_t row = 0; row < rows; row++) {
            if (part.maxima[row] == nothing) continue;
            float most = largest(broadcast(part.maxima[row]), broadcast(total.maxima[row]))[0];
            float old = exponential(broadcast(total.maxima[row] - most))[0], fresh = exponential(broadcast(part.maxima[row] - most))[0];
            total.sums[row] = total.sums[row] * old + part.sums[row] * fresh;
            for (int column = 0; column < width; column += LANES) {
                float *mine = total.values + row * width + column, *its = part.values + row * width + column;
                write(mine, fused(read<Vec>(its), broadcast(fresh), read<Vec>(mine) * old));
            }
            total.maxima[row] = most;
        }
    }

    void split(const Task& task, int64_t rows, int64_t from, int64_t to, float* memory, Partial& part) const {
        part.clear(rows, width);
        for (int64_t position = from; position < to; position += TILE)
            tile_of(task, rows, position, to, memory, part);
    }

    void gather_queries(const Task& task, float* queries) const {
        for (int64_t row = 0; row < task.tokens * group(); row++) {
            int64_t token = step.query_start[task.sequence] + task.first + row / group();
            const float* from = query + token * query_row + (task.kv_head * group() + row % group()) * heads.head_dim;
            std::memcpy(queries + row * width, from, heads.head_dim * sizeof(float));
        }
    }

    void store(const Task& task, const Partial& total) const {
        for (int64_t row = 0; row < task.tokens * group(); row++) {
            int64_t token = step.query_start[task.sequence] + task.first + row / group();
            float* to = output + (token * heads.heads + task.kv_head * group() + row % group()) * heads.head_dim;
            for (int at = 0; at < heads.head_dim; at++) to[at] = total.values[row * width + at] / total.sums[row];
        }
    }

    void compute(const Task& task, float* memory, float* partials) const {
        int64_t rows = task.tokens * group();
        gather_queries(task, memory);
        if (task.slot >= 0) {
            Partial part(partials + task.slot * Partial::floats(rows, width), rows);
            return split(task, rows, task.from, task.to, memory, part);
        }
        float* rest = memory + most() * (width + TILE) + 2 * TILE * width;
        Partial total(rest, rows), part(rest + Partial::floats(rows, width), rows);
        total.clear(rows, width);
        for (int64_t from = task.from; from < task.to; from = (from / SPLIT + 1) * SPLIT) {
            split(task, rows, from, std::min((from / SPLIT + 1) * SPLIT, task.to), memory, part);
            merge(rows, total, part);
        }
        store(task, total);
    }

    // The tasks of one sequence and kv head.
    void plan(int64_t sequence, int64_t kv_head, std::vector<Task>& tasks, int64_t& slots) const {
        int64_t length = step.query_start[sequence + 1] - step.query_start[sequence], context = step.context_lens[sequence];
        int64_t most = std::max<int64_t>(1, MAX_ROWS / group());
        for (int64_t first = 0; first < length; first += most) {
            int64_t tokens = std::min(most, length - first), past = context - length + first;
            int64_t from = heads.window ? std::max<int64_t>(0, past - heads.window + 1) / TILE * TILE : 0, to = past + tokens;
            if (length > 1 || to - from <= SPLIT) {
                tasks.push_back({sequence, kv_head, first, tokens, from, to, -1});
                continue;
            }
            for (; from < to; from = (from / SPLIT + 1) * SPLIT)
                tasks.push_back({sequence, kv_head, first, tokens, from, std::min((from / SPLIT + 1) * SPLIT, to), slots++});
        }
    }

    void run(Team& team) const {
        std::vector<Task> tasks;
        int64_t slots = 0;
        for (int64_t sequence = 0; sequence < step.sequences; sequence++)
            for (int64_t kv_head = 0; kv_head < heads.kv_heads; kv_head++) plan(sequence, kv_head, tasks, slots);
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {  // the longest first
            return a.tokens * (a.to - a.from) > b.tokens * (b.to - b.from);
        });
        std::vector<float> partials(slots * Partial::floats(group(), width));
        team.run(tasks.size(), [&](int64_t index, int thread) {
            compute(tasks[index], team.scratch(thread, scratch()), partials.data());
        });
        if (slots) combine(tasks, partials.data());
    }

    // The partial results of single tokens, in the order of their positions.
    void combine(std::vector<Task>& tasks, float* partials) const {
        std::vector<float> memory(Partial::floats(group(), width));
        Partial total(memory.data(), group());
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.slot < b.slot; });
        for (size_t index = 0; index < tasks.size(); index++) {
            const Task& task = tasks[index];
            if (task.slot < 0) continue;
            bool begins = task.slot == 0 || tasks[index - 1].sequence != task.sequence || tasks[index - 1].kv_head != task.kv_head;
            if (begins) total.clear(group(), width);
            merge(group(), total, Partial(partials + task.slot * Partial::floats(group(), width), group()));
            if (task.to == step.context_lens[task.sequence]) store(task, total);
        }
    }
};

}  // namespace tandem
