// Causal attention over the paged KV cache, of prompts' chunks and single tokens alike.
//
//   kv of one layer   (blocks, 2, kv_heads, block_size, head_dim), strided; a block table per sequence
//   rows              the query heads that share a kv head, of one or more tokens: token 0: head 0 … G-1 | token 1: …
//
// A task is one kv head of a sequence for MAX_ROWS rows at most; or, for a single token, several heads: they lie one
// behind the other in a block, and memory is read faster in longer pieces. It walks the context in tiles of TILE
// positions, head by head: keys are widened and transposed once for all rows, and values widened if there are many
// rows; then two products (the ones of matmul.h; of paged.h for few rows) with an online softmax in between
// (FlashAttention-2). Every SPLIT positions the running maximum, sum and values are merged into the total, so a single
// token's long context can be shared by several threads (flash decoding).
//
// Invariant: tiles and splits begin at fixed positions, and a row's numbers do not depend on the other rows. So a
// token's output is the same bits in whichever chunk or batch it is computed.
#pragma once

#include "paged.h"

namespace tandem {

constexpr int SPLIT = 512;            // positions
constexpr int NEAR = 48 << 10;        // bytes of a tile that can wait in the cache while another is computed
constexpr int MAX_ROWS = 96;          // of a task, unless a token has more heads
constexpr int PIECES = 2 * TILE + 3;  // of memory that make up a tile in blocks of any size, and one more

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
    int64_t sequence;
    int64_t kv_head, kv_heads;  // the first, and how many: one for many tokens
    int64_t first, tokens;      // of the sequence's new tokens
    int64_t from, to;           // positions of the context
    int64_t slot;               // -1: the whole context; else where this split's partial results begin
};

struct Partial {  // of some rows: maxima, sums (rows,), values (rows, width)
    float *maxima, *sums, *values;
    static size_t floats(int64_t rows, int width) { return size_t(rows) * (2 + width); }
    static Partial in(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }
    Partial behind(int64_t rows, int width) const { return {maxima + rows, sums + rows, values + rows * width}; }
    void clear(int64_t rows, int width) const {
        std::fill(maxima, maxima + rows, -std::numeric_limits<float>::infinity());
        std::fill(sums, sums + rows, 0.0f);
        std::fill(values, values + rows * width, 0.0f);
    }
};

template <Kind kind> struct Attention {
    const Heads& heads;
    const Step& step;
    const Cache& cache;
    const float* query;  // (T, query_row): the heads of a token one behind the other
    int64_t query_row;
    float* output;       // (T, heads · head_dim)
    int width;           // head_dim, rounded up to whole groups of panels
    int64_t group = heads.heads / heads.kv_heads;

    typedef typename Stored<kind>::Element Element;

    // queries (most, width) | keys (width, WIDTH) | values (TILE, width) | scores (most, TILE) | maxima (most,) | 2 partials
    size_t scratch() const { return tile_scratch() + 2 * Partial::floats(most(), width); }
    size_t tile_scratch() const { return size_t(most()) * (width + TILE + 1) + (WIDTH + TILE) * width; }
    int64_t most() const { return std::max<int64_t>(MAX_ROWS, heads.heads); }

    // A task's rows: kv head by kv head, token by token.
    int64_t rows_of(const Task& task) const { return task.kv_heads * task.tokens * group; }
    int64_t token_of(const Task& task, int64_t row) const {
        return step.query_start[task.sequence] + task.first + row / group % task.tokens;
    }
    int64_t head_of(const Task& task, int64_t row) const {
        return (task.kv_head + row / (task.tokens * group)) * group + row % group;
    }

    // Where keys of a tile's positions before `task.to` begin, (TILE,), of its first head; values are `cache.part` behind.
    void find(const Task& task, int64_t position, const Element** found) const {
        int64_t count = std::min<int64_t>(TILE, task.to - position);
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

    // The memory of a tile, of all heads: keys and values of each block. `pieces` has room for `PIECES`.
    Ahead memory_of(const Task& task, int64_t position, const char** pieces) const {
        const int32_t* table = step.tables + task.sequence * step.table_width;
        const Element* first = (const Element*)cache.data + task.kv_head * cache.head;
        int64_t last = (std::min(position + TILE, task.to) - 1) / cache.block_size, count = 0;
        for (int64_t block = position / cache.block_size; block <= last; block++)
            for (int64_t part : {int64_t(0), cache.part}) pieces[count++] = (const char*)(first + table[block] * cache.block + part);
        pieces[count] = pieces[count - 1];
        return {pieces, pieces + count, task.kv_heads * cache.head * int64_t(sizeof(Element))};
    }

    // (WIDTH positions, head_dim) -> [head_dim][WIDTH]
    __attribute__((noinline)) void widen_keys(const Element* const* found, float* keys, Ahead& shared) const {
        Ahead ahead = shared;  // in registers
        constexpr int STEP = kind == BF16 ? 2 * LANES : LANES;
        int64_t dim = heads.head_dim, whole = dim / STEP * STEP;
        for (int column = 0; column < WIDTH; column += LANES, found += LANES) {
            for (int64_t at = 0; at < whole; at += STEP) {
                ahead.next(), ahead.next();
                widen_block(found, at, keys + at * WIDTH + column);
            }
            for (int lane = 0; lane < LANES; lane++)
                for (int64_t at = whole; at < dim; at++) keys[at * WIDTH + column + lane] = Stored<kind>::one(found[lane][at]);
        }
        shared = ahead;
    }

    // bfloat16 two elements at a time: transposed as 32 bits, taken apart behind that.
    static void widen_block(const Element* const* found, int64_t at, float* keys) {
        Vec block[LANES];
        for (int lane = 0; lane < LANES; lane++)
            block[lane] = kind == BF16 ? read<Vec>(found[lane] + at) : Stored<kind>::load(found[lane] + at);
        transpose(block);
        for (int lane = 0; lane < LANES; lane++) {
            if (kind != BF16) {
                write(keys + lane * WIDTH, block[lane]);
                continue;
            }
            write(keys + 2 * lane * WIDTH, first_of((Ints)block[lane]));
            write(keys + (2 * lane + 1) * WIDTH, second_of((Ints)block[lane]));
        }
    }

    // (count positions, head_dim) -> [TILE][width], columns as `Values` has them
    void widen_values(const Element* const* found, int64_t count, float* values) const {
        int64_t dim = heads.head_dim, whole = dim / (2 * LANES) * (2 * LANES), row = width;
        for (int64_t index = 0; index < count; index++, values += row) {
            for (int64_t at = 0; at < whole; at += 2 * LANES)
                for (int vec = 0; vec < 2; vec++)
                    write(values + at + vec * LANES, Values<kind>{found, cache.part + at}.load(index, vec));
            for (int64_t at = whole; at < dim; at++)
                values[Values<kind>::column(at)] = Stored<kind>::one(found[index][cache.part + at]);
        }
    }

    // Scores of positions out of a row's sight become -inf; those behind `count` too.
    void mask(const Task& task, int64_t row, int64_t position, int64_t count, float* scores) const {
        int64_t token = task.first + row / group;
        int64_t length = step.query_start[task.sequence + 1] - step.query_start[task.sequence];
        int64_t self = step.context_lens[task.sequence] - length + token;  // its own position
        int64_t last = std::min(count, self + 1 - position), first = heads.window ? self - heads.window + 1 - position : 0;
        if (first <= 0 && last >= TILE) return;
        for (int64_t index = 0; index < TILE; index++)
            if (index < first || index >= last) scores[index] = -std::numeric_limits<float>::infinity();
    }

    // One tile of one head: scores, softmax in place, values.
    void tile_of(const Task& task, int64_t position, const Element* const* found, const float* queries, float* memory,
                 const Partial& part, Ahead& ahead) const {
        int64_t rows = task.tokens * group, count = std::min<int64_t>(TILE, task.to - position), dim = heads.head_dim;
        float *keys = memory, *values = keys + WIDTH * width, *scores = values + TILE * width;
        bool few = rows <= TILE_ROWS, direct = few && dim % WIDTH == 0;  // values used once are not worth widening apart
        std::fill(scores, scores + rows * TILE, 0.0f);
        for (int64_t column = 0; column < count; column += WIDTH) {
            widen_keys(found + column, keys, ahead);
            multiply(few, rows, {queries, width}, Floats{keys, WIDTH}, dim, {scores + column, TILE}, ahead);
        }
        soften(task, position, count, scores, scores + most() * TILE, part);
        if (!direct) widen_values(found, count, values);
        for (int column = 0; column < width; column += WIDTH) {
            Sums sums{part.values + column, width};
            if (direct) few_rows(rows, {scores, TILE}, Values<kind>{found, cache.part + column}, count, sums, ahead);
            else multiply(few, rows, {scores, TILE}, Floats{values + column, width}, count, sums, ahead);
        }
    }

    static void multiply(bool few, int64_t rows, const Rows& x, const Floats& source, int64_t count, const Sums& sums, Ahead& ahead) {
        few ? few_rows(rows, x, source, count, sums, ahead) : all_rows(rows, x, source, count, sums);
    }

    // Online softmax: scores become weights, what was summed before is scaled to the new maxima `grown`.
    void soften(const Task& task, int64_t position, int64_t count, float* scores, float* grown, const Partial& part) const {
        int64_t rows = task.tokens * group;
        for (int64_t row = 0; row < rows; row++) {
            mask(task, row, position, count, scores + row * TILE);
            grown[row] = largest(largest(broadcast(part.maxima[row]), highest(scores + row * TILE)));
        }
        for (int64_t row = 0; row < rows; row++) {
            float* score = scores + row * TILE;
            float base = grown[row] == -std::numeric_limits<float>::infinity() ? 0.0f : grown[row];  // it sees nothing yet
            Vec added = Vec{};
            for (int column = 0; column < TILE; column += LANES) {
                Vec weight = exponential(read<Vec>(score + column) - base);
                write(score + column, weight);
                added += weight;
            }
            if (grown[row] != part.maxima[row]) decay(row, exponential(broadcast(part.maxima[row] - base)), part);
            part.sums[row] += sum(added);
            part.maxima[row] = grown[row];
        }
    }

    static Vec highest(const float* score) {  // of TILE, by lane; in two chains that do not wait for each other
        Vec most[2] = {read<Vec>(score), read<Vec>(score + LANES)};
        for (int column = 2 * LANES; column < TILE; column += 2 * LANES)
            for (int which = 0; which < 2; which++) most[which] = largest(read<Vec>(score + column + which * LANES), most[which]);
        return largest(most[0], most[1]);
    }

    void decay(int64_t row, Vec factor, const Partial& part) const {
        float* values = part.values + row * width;
        part.sums[row] *= factor[0];
        for (int column = 0; column < width; column += LANES) write(values + column, read<Vec>(values + column) * factor);
    }

    // total <- total and part, for each row
    void merge(int64_t rows, const Partial& total, const Partial& part) const {
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

    // A task of one split, and what follows it, if anything does: its first tile is fetched behind our last.
    void split(const Task& task, const Task* next, float* memory, const Partial& part) const {
        const Element* found[TILE];
        const char* pieces[PIECES];
        const float* queries = memory;
        memory += most() * width;
        part.clear(rows_of(task), width);
        for (int64_t position = task.from; position < task.to; position += TILE) {
            int64_t then = position + TILE;
            Ahead ahead = then < task.to ? memory_of(task, then, pieces)
                          : next         ? memory_of(*next, next->from, pieces)
                                         : memory_of(task, position, pieces);
            find(task, position, found);
            for (int64_t head = 0, row = 0; head < task.kv_heads; head++, row += task.tokens * group) {
                tile_of(task, position, found, queries + row * width, memory, part.behind(row, width), ahead);
                for (auto& element : found) element += cache.head;
            }
            ahead.rest();
        }
    }

    // Queries come scaled, so that scores are.
    void gather_queries(const Task& task, float* queries) const {
        for (int64_t row = 0; row < rows_of(task); row++) {
            const float* from = query + token_of(task, row) * query_row + head_of(task, row) * heads.head_dim;
            for (int at = 0; at < heads.head_dim; at++) queries[row * width + at] = from[at] * heads.scale;
        }
    }

    void store(const Task& task, const Partial& total) const {
        for (int64_t row = 0; row < rows_of(task); row++) {
            float* to = output + (token_of(task, row) * heads.heads + head_of(task, row)) * heads.head_dim;
            const float* values = total.values + row * width;
            for (int at = 0; at < heads.head_dim; at++) to[at] = values[Values<kind>::column(at)] / total.sums[row];
        }
    }

    void compute(const Task& task, const Task* next, float* memory, float* partials) const {
        int64_t rows = rows_of(task);
        gather_queries(task, memory);
        if (task.slot >= 0) return split(task, next, memory, partial_of(task, partials));
        float* rest = memory + tile_scratch();
        Partial total = Partial::in(rest, rows), part = Partial::in(rest + Partial::floats(rows, width), rows);
        total.clear(rows, width);
        for (Task piece = task, later = task; piece.from < task.to; piece.from = later.from) {
            later.from = piece.to = std::min((piece.from / SPLIT + 1) * SPLIT, task.to);
            split(piece, later.from < task.to ? &later : next, memory, part);
            merge(rows, total, part);
        }
        store(task, total);
    }

    Partial partial_of(const Task& task, float* partials) const {
        return Partial::in(partials + task.slot * Partial::floats(group, width), rows_of(task));
    }

    // The tasks of one sequence, for single tokens of `together` kv heads.
    void plan(int64_t sequence, int64_t together, std::vector<Task>& tasks, int64_t& slots) const {
        int64_t length = step.query_start[sequence + 1] - step.query_start[sequence], context = step.context_lens[sequence];
        int64_t most = std::max<int64_t>(1, MAX_ROWS / group);
        if (length > 1) together = 1;
        for (int64_t head = 0; head < heads.kv_heads; head += together) {
            int64_t count = std::min(together, heads.kv_heads - head);
            for (int64_t first = 0; first < length; first += most) {
                int64_t tokens = std::min(most, length - first), past = context - length + first;
                int64_t from = heads.window ? std::max<int64_t>(0, past - heads.window + 1) / TILE * TILE : 0, to = past + tokens;
                if (length > 1 || to - from <= SPLIT) {
                    tasks.push_back({sequence, head, count, first, tokens, from, to, -1});
                    continue;
                }
                for (; from < to; from = (from / SPLIT + 1) * SPLIT, slots += count)
                    tasks.push_back({sequence, head, count, first, tokens, from, std::min((from / SPLIT + 1) * SPLIT, to), slots});
            }
        }
    }

    // How many kv heads of a single token a task takes: their memory is in one place. As many as leave work for all.
    int64_t together(int64_t threads) const {
        int64_t pieces = 0, size = 2 * TILE * heads.head_dim * int64_t(sizeof(Element));
        for (int64_t sequence = 0; sequence < step.sequences; sequence++) pieces += (step.context_lens[sequence] + SPLIT - 1) / SPLIT;
        int64_t count = std::min<int64_t>(heads.kv_heads, std::max<int64_t>(1, NEAR / size));
        while (threads > 1 && count > 1 && (heads.kv_heads + count - 1) / count * pieces < 2 * threads) count--;
        return count;
    }

    void run(Team& team) const {
        std::vector<Task> tasks;
        int64_t slots = 0, stride = team.welcome(nanoseconds());  // from a thread's task to its next, about
        for (int64_t sequence = 0, count = together(stride); sequence < step.sequences; sequence++) plan(sequence, count, tasks, slots);
        std::stable_sort(tasks.begin(), tasks.end(), [this](const Task& a, const Task& b) {  // the longest first
            return rows_of(a) * (a.to - a.from) > rows_of(b) * (b.to - b.from);
        });
        std::vector<float> partials(slots * Partial::floats(group, width));
        team.run(tasks.size(), [&](int64_t index, int thread) {
            const Task* next = index + stride < int64_t(tasks.size()) ? &tasks[index + stride] : nullptr;
            compute(tasks[index], next, team.scratch(thread, scratch()), partials.data());
        });
        if (slots) combine(tasks, partials.data());
    }

    // The partial results of single tokens, in the order of their positions.
    void combine(std::vector<Task>& tasks, float* partials) const {
        std::vector<float> memory(Partial::floats(most(), width));
        Partial total = Partial::in(memory.data(), most());
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.slot < b.slot; });
        for (size_t index = 0; index < tasks.size(); index++) {
            const Task& task = tasks[index];
            if (task.slot < 0) continue;
            bool begins = task.slot == 0 || tasks[index - 1].sequence != task.sequence || tasks[index - 1].kv_head != task.kv_head;
            if (begins) total.clear(rows_of(task), width);
            merge(rows_of(task), total, partial_of(task, partials));
            if (task.to == step.context_lens[task.sequence]) store(task, total);
        }
    }
};

}  // namespace tandem
