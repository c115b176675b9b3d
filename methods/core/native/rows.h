// What attention over rows of scores is made of: float32, on the CPU.
//
// A head's keys are turned, so that scores of neighbouring keys lie side by side. A few queries are worked on together: what is loaded serves all of them,
// and their sums do not wait for each other. Their rows of scores stay in the nearest cache. Scores are in units of ln 2, so that weights are powers of two.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(64), aligned(4)));

// So many vectors, each in a line of the cache of its own. They hold whatever was there before: setting them to zero would take time.
class Vectors {
    struct Free {
        void operator()(Vector *memory) const { operator delete[](memory, std::align_val_t(sizeof(Vector))); }
    };
    std::unique_ptr<Vector[], Free> memory;

public:
    explicit Vectors(int64_t count) : memory(static_cast<Vector *>(operator new[](count * sizeof(Vector), std::align_val_t(sizeof(Vector))))) {}
    Vector *data() const { return memory.get(); }
};

constexpr int TOGETHER = 8;  // queries
constexpr float PER_POWER = 1.44269504f;  // 1 / ln 2

inline int64_t vectors_of(int64_t numbers) { return (numbers + LANES - 1) / LANES; }

// The halves of a vector, joined by `join`, until one number is left.
template <typename Join> inline float joined(const Vector &numbers, Join join) {
    typedef float Half __attribute__((vector_size(32), aligned(4)));
    typedef float Quarter __attribute__((vector_size(16), aligned(4)));
    Half low, high;
    std::memcpy(&low, &numbers, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char *>(&numbers) + sizeof low, sizeof high);
    low = join(low, high);
    Quarter left, right;
    std::memcpy(&left, &low, sizeof left);
    std::memcpy(&right, reinterpret_cast<const char *>(&low) + sizeof left, sizeof right);
    left = join(left, right);
    return join(join(left[0], left[2]), join(left[1], left[3]));
}

inline float added_up(const Vector &numbers) {
    return joined(numbers, [](auto a, auto b) { return a + b; });
}

inline float largest_number(const Vector &numbers) {
    return joined(numbers, [](auto a, auto b) { return a > b ? a : b; });
}

// The first `count` of a vector's numbers, or all: memcpy with a length that is not known is a call.
inline Vector load(const float *from, int64_t count) {
    Vector numbers = {};
    if (count >= LANES)
        std::memcpy(&numbers, from, sizeof numbers);
    else
        std::memcpy(&numbers, from, count * sizeof(float));
    return numbers;
}

inline void store(const Vector &numbers, float *to, int64_t count) {
    if (count >= LANES)
        std::memcpy(to, &numbers, sizeof numbers);
    else
        std::memcpy(to, &numbers, count * sizeof(float));
}

// Keys [tokens, width] of a head, `stride` apart, to [width, vectors], the padding zeros. A square at a time: a whole column of keys would not stay in the
// nearest cache.
inline void turn(const float *keys, int64_t stride, int64_t tokens, int64_t width, Vector *turned) {
    const int64_t vectors = vectors_of(tokens);
    for (int64_t strip = 0; strip < width; strip += LANES) {
        const int64_t channels = std::min(LANES, width - strip);
        for (int64_t i = 0; i < vectors; ++i) {
            Vector square[LANES] = {};
            const float *numbers = reinterpret_cast<const float *>(square);
            for (int64_t row = 0; row < std::min(LANES, tokens - i * LANES); ++row) square[row] = load(keys + (i * LANES + row) * stride + strip, width - strip);
            for (int64_t channel = 0; channel < channels; ++channel) {
                Vector one;
                for (int64_t row = 0; row < LANES; ++row) one[row] = numbers[row * LANES + channel];
                turned[(strip + channel) * vectors + i] = one;
            }
        }
    }
}

// Values [tokens, width] of a head, `stride` apart, to [tokens, PARTS vectors], filled up with zeros.
template <int PARTS> void side_by_side(const float *values, int64_t stride, int64_t tokens, int64_t width, Vector *to) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int part = 0; part < PARTS; ++part) to[token * PARTS + part] = load(values + token * stride + part * LANES, width - part * LANES);
}

// 2 to the x, x not above 0: by the bits of a float for the nearest whole number, times a series for the rest (off by 1e-7 of it).
inline Vector power_of_two(Vector x) {
    x = x < -126.0f ? Vector{} - 126.0f : x;
    const Whole whole = __builtin_convertvector(x - 0.5f, Whole);
    const Vector f = x - __builtin_convertvector(whole, Vector);
    const Vector part = 1.0f + f * (0.693146978f + f * (0.240222421f + f * (0.0555073376f + f * (0.00967151361f + f * 0.00132647248f))));
    return part * (Vector)((whole + 127) << 23);
}

// 0 for the numbers of a row's last vector, and very much for its padding: taken off the scores, it lets the padding weigh nothing.
inline Vector padding_of(int64_t tokens) {
    Vector padding = {};
    for (int64_t i = tokens - (vectors_of(tokens) - 1) * LANES; i < LANES; ++i) padding[i] = 1e30f;
    return padding;
}

// The largest of a row of scores, which `padding_of` was taken off.
inline float largest_in(const Vector *row, int64_t vectors) {
    Vector most = row[0];
    for (int64_t i = 1; i < vectors; ++i) most = row[i] > most ? row[i] : most;
    return largest_number(most);
}

// Scores to weights that are not yet divided by their sum, which is returned.
inline float weighed(Vector *row, int64_t vectors, float largest) {
    Vector sums = {};
    for (int64_t i = 0; i < vectors; ++i) {
        row[i] = power_of_two(row[i] - largest);
        sums += row[i];
    }
    return added_up(sums);
}

// COUNT vectors of the scores of TOGETHER queries, from `first` on.
template <int COUNT> inline void score_some(const float *queries, const Vector *turned, Vector *scores, int64_t vectors, int64_t width, int64_t first) {
    Vector sums[TOGETHER][COUNT] = {};
    for (int64_t channel = 0; channel < width; ++channel) {
        const Vector *keys = turned + channel * vectors + first;
#pragma GCC unroll 8
        for (int query = 0; query < TOGETHER; ++query)
#pragma GCC unroll 2
            for (int i = 0; i < COUNT; ++i) sums[query][i] += queries[query * width + channel] * keys[i];
    }
    for (int query = 0; query < TOGETHER; ++query)
        for (int i = 0; i < COUNT; ++i) scores[query * vectors + first + i] = sums[query][i];
}

// Scores [TOGETHER, vectors] of queries [TOGETHER, width] with turned keys [width, vectors].
inline void score(const float *queries, const Vector *turned, Vector *scores, int64_t vectors, int64_t width) {
    int64_t first = 0;
    for (; first + 1 < vectors; first += 2) score_some<2>(queries, turned, scores, vectors, width, first);
    if (first < vectors) score_some<1>(queries, turned, scores, vectors, width, first);
}

// Rows of queries, `stride` apart, times `scale`, side by side; where there are fewer than TOGETHER the last one stands for the others.
inline void take(const float *queries, int64_t stride, int64_t count, int64_t width, float scale, float *to) {
    for (int query = 0; query < TOGETHER; ++query) {
        const float *own = queries + std::min<int64_t>(query, count - 1) * stride;
        for (int64_t channel = 0; channel < width; ++channel) to[query * width + channel] = own[channel] * (scale * PER_POWER);
    }
}

// COUNT vectors from `first` on of the outputs of `count` queries.
template <int PARTS, int COUNT>
inline void put_some(const Vector *weights, int64_t vectors, const Vector *values, int64_t tokens, const float *over, int64_t count, int64_t width,
                     int64_t stride, int first, float *out) {
    const float *weight = reinterpret_cast<const float *>(weights);
    Vector sums[TOGETHER][COUNT] = {};
    for (int64_t i = 0; i < tokens; ++i)
#pragma GCC unroll 8
        for (int query = 0; query < TOGETHER; ++query)
#pragma GCC unroll 2
            for (int part = 0; part < COUNT; ++part) sums[query][part] += weight[query * vectors * LANES + i] * values[i * PARTS + first + part];
    for (int64_t query = 0; query < count; ++query)
        for (int part = 0, place = first * LANES; part < COUNT; ++part, place += LANES)
            store(sums[query][part] * over[query], out + query * stride + place, width - place);
}

// The outputs of `count` queries, `stride` apart: values [tokens, PARTS] weighed by rows of `weights`, divided by their sums.
template <int PARTS>
void put(const Vector *weights, int64_t vectors, const Vector *values, int64_t tokens, const float *over, int64_t count, int64_t width, int64_t stride, float *out) {
    int first = 0;
    for (; first + 1 < PARTS; first += 2) put_some<PARTS, 2>(weights, vectors, values, tokens, over, count, width, stride, first, out);
    if constexpr (PARTS % 2) put_some<PARTS, 1>(weights, vectors, values, tokens, over, count, width, stride, first, out);
}

}  // namespace
