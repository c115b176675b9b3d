// What attention over rows of scores is made of: float32, on the CPU.
//
// A head's keys are turned, so that scores of neighbouring keys lie side by side. A few queries are worked on together: what is loaded serves all of them,
// and their sums do not wait for each other. Their rows of scores stay in the nearest cache.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(64), aligned(4)));

// Of a row of so many numbers, padding included: pairs.
inline int64_t vectors_of(int64_t numbers) { return (numbers + 2 * LANES - 1) / (2 * LANES) * 2; }

// As many queries as there are registers for their sums, of heads of PARTS vectors.
template <int PARTS> constexpr int together() { return PARTS <= 2 ? 8 : 4; }

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

inline float largest_of(const Vector &numbers) {
    return joined(numbers, [](auto a, auto b) { return a > b ? a : b; });
}

// Keys [tokens, width] of a head, `stride` apart, to [width, vectors], the padding zeros.
inline void turn(const float *keys, int64_t stride, int64_t tokens, int64_t width, Vector *turned) {
    const int64_t vectors = vectors_of(tokens);
    for (int64_t channel = 0; channel < width; ++channel) {
        float *row = reinterpret_cast<float *>(turned + channel * vectors);
        for (int64_t token = 0; token < tokens; ++token) row[token] = keys[token * stride + channel];
        std::fill(row + tokens, row + vectors * LANES, 0.0f);
    }
}

// Values [tokens, width] of a head, `stride` apart, to [tokens, PARTS vectors], filled up with zeros.
template <int PARTS> void side_by_side(const float *values, int64_t stride, int64_t tokens, int64_t width, Vector *to) {
    for (int64_t token = 0; token < tokens; ++token) {
        to[token * PARTS + PARTS - 1] = Vector{};
        std::memcpy(to + token * PARTS, values + token * stride, width * sizeof(float));
    }
}

// 1 for the numbers of a row, 0 for its padding.
inline void mark(Vector *valid, int64_t tokens) {
    std::fill(valid, valid + vectors_of(tokens), Vector{});
    for (int64_t i = 0; i < tokens; ++i) valid[i / LANES][i % LANES] = 1.0f;
}

// e to the x, x not above 0: 2 to the nearest whole number of x / ln 2, by the bits of a float, times a series for the rest (off by 1e-6 of it).
inline Vector exponential(Vector x) {
    Vector power = x * 1.44269504f;
    power = power < -126.0f ? Vector{} - 126.0f : power;
    const Whole whole = __builtin_convertvector(power - 0.5f, Whole);
    const Vector f = power - __builtin_convertvector(whole, Vector);
    const Vector part = 1.0f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f * (0.00133335581f + f * 0.000154035304f)))));
    return part * (Vector)((whole + 127) << 23);
}

// Loops go over whole vectors, since what is left over would take as long as all the rest: `valid` is 1 for the keys and 0 for the padding, where scores
// are 0.

// Scores to weights that are not yet divided by their sum, which is returned.
float weighed(Vector *row, const Vector *valid, int64_t vectors) {
    Vector most = row[0] - (1.0f - valid[0]) * 1e30f, sums = {};
    for (int64_t i = 1; i < vectors; ++i) {
        const Vector one = row[i] - (1.0f - valid[i]) * 1e30f;
        most = one > most ? one : most;
    }
    const float largest = largest_of(most);
    for (int64_t i = 0; i < vectors; ++i) {
        const Vector below = row[i] - largest;
        row[i] = exponential(below > 0.0f ? Vector{} : below) * valid[i];
        sums += row[i];
    }
    return added_up(sums);
}

// Scores [TOGETHER, vectors] of queries [TOGETHER, width] with turned keys [width, vectors].
template <int TOGETHER> void score(const float *queries, const Vector *turned, Vector *scores, int64_t vectors, int64_t width) {
    for (int64_t first = 0; first < vectors; first += 2) {
        Vector left[TOGETHER] = {}, right[TOGETHER] = {};
        for (int64_t channel = 0; channel < width; ++channel) {
            const Vector *keys = turned + channel * vectors + first;
#pragma GCC unroll 8
            for (int query = 0; query < TOGETHER; ++query) {
                left[query] += queries[query * width + channel] * keys[0];
                right[query] += queries[query * width + channel] * keys[1];
            }
        }
        for (int query = 0; query < TOGETHER; ++query) {
            scores[query * vectors + first] = left[query];
            scores[query * vectors + first + 1] = right[query];
        }
    }
}

// Rows of queries, `stride` apart, times `scale`, side by side; where there are fewer than TOGETHER the last one stands for the others.
template <int TOGETHER> void take(const float *queries, int64_t stride, int64_t count, int64_t width, float scale, float *to) {
    for (int query = 0; query < TOGETHER; ++query) {
        const float *own = queries + std::min<int64_t>(query, count - 1) * stride;
        for (int64_t channel = 0; channel < width; ++channel) to[query * width + channel] = own[channel] * scale;
    }
}

// The outputs of `count` queries, `stride` apart: values [tokens, PARTS] weighed by rows of `weights`, divided by their sums.
template <int PARTS, int TOGETHER>
void put(const Vector *weights, int64_t vectors, const Vector *values, int64_t tokens, const float *over, int64_t count, int64_t width, int64_t stride, float *out) {
    const float *weight = reinterpret_cast<const float *>(weights);
    Vector sum[TOGETHER][PARTS] = {};
    for (int64_t i = 0; i < tokens; ++i)
#pragma GCC unroll 8
        for (int query = 0; query < TOGETHER; ++query)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part) sum[query][part] += weight[query * vectors * LANES + i] * values[i * PARTS + part];
    for (int64_t query = 0; query < count; ++query) {
        for (int part = 0; part < PARTS; ++part) sum[query][part] *= over[query];
        std::memcpy(out + query * stride, sum[query], width * sizeof(float));
    }
}

}  // namespace
