// Attention that also rates keys for each query, the mean over heads: by the attention itself, or by standardised scores. float32, on the CPU.
//
// A head's keys are turned first, so that scores of neighbouring keys lie side by side. A few queries are worked on together: what is loaded serves all of
// them, and their sums do not wait for each other. Their rows of scores stay in the nearest cache; loops over a row are left to the compiler.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4)));

struct Sizes {
    int64_t images, tokens, heads, width;  // width: numbers of a head
    float scale;
    bool standardised;
    int threads;

    int64_t padded() const { return (tokens + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }
};

// Keys [tokens, width] of a head, 3 * heads * width apart, to [width, padded tokens], the padding zeros.
void turn(const float *keys, float *turned, const Sizes &sizes) {
    const int64_t stride = 3 * sizes.heads * sizes.width, padded = sizes.padded();
    for (int64_t channel = 0; channel < sizes.width; ++channel) {
        float *row = turned + channel * padded;
        for (int64_t token = 0; token < sizes.tokens; ++token) row[token] = keys[token * stride + channel];
        std::fill(row + sizes.tokens, row + padded, 0.0f);
    }
}

// Values [tokens, width] to [tokens, PARTS vectors], filled up with zeros.
template <int PARTS> void side_by_side(const float *values, Vector *to, const Sizes &sizes) {
    const int64_t stride = 3 * sizes.heads * sizes.width;
    for (int64_t token = 0; token < sizes.tokens; ++token) {
        to[token * PARTS + PARTS - 1] = Vector{};
        std::memcpy(to + token * PARTS, values + token * stride, sizes.width * sizeof(float));
    }
}

// The normal distribution function, by Abramowitz and Stegun's 7.1.26: off by less than 1e-7. power: z * z / 2 to the e, negative.
inline float normal(float z, float power) {
    const float x = std::fabs(z) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * x);
    const float tail = 0.5f * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)))) * power;
    return z > 0 ? 1.0f - tail : tail;
}

// Adds the row's rating to `rating`. row: scores of n keys, and what is in the padding; other: room for as many. Functions that the compiler has for whole
// vectors alone take the padding, too: what is left over would take as long as all the rest.
void add_standardised(const float *row, float *other, float *rating, int64_t n, int64_t padded, float share) {
    float sum = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) sum += row[i];
    const float mean = sum / n;
    for (int64_t i = 0; i < n; ++i) squares += (row[i] - mean) * (row[i] - mean);
    const float over = 1.0f / (std::sqrt(squares / n) + 1e-7f);
    for (int64_t i = 0; i < padded; ++i) {
        const float z = (row[i] - mean) * over;
        other[i] = std::exp(-0.5f * z * z);
    }
    for (int64_t i = 0; i < padded; ++i) rating[i] += share * normal((row[i] - mean) * over, other[i]);
}

// Scores to weights that are not yet divided by their sum, which is returned.
float weighed(float *row, int64_t n, int64_t padded) {
    float largest = row[0], whole = 0;
    for (int64_t i = 0; i < n; ++i) largest = row[i] > largest ? row[i] : largest;  // std::max is not made into vectors
    std::fill(row + n, row + padded, largest);  // far smaller ones would take a slow path
    for (int64_t i = 0; i < padded; ++i) row[i] = std::exp(row[i] - largest);
    for (int64_t i = 0; i < n; ++i) whole += row[i];
    return whole;
}

// Room of a thread for the rows of so many queries.
template <int TOGETHER> struct Rows {
    std::vector<float> scores, rated, other;

    explicit Rows(int64_t padded) : scores(TOGETHER * padded), rated(TOGETHER * padded), other(padded) {}
};

// Scores [TOGETHER, padded] of queries, whose numbers are `own` of them [width] each, with turned keys.
template <int TOGETHER> void score(const float *const *own, const float *turned, float *scores, int64_t padded, const Sizes &sizes) {
    for (int64_t first = 0; first < padded; first += 2 * LANES) {
        Vector left[TOGETHER] = {}, right[TOGETHER] = {};
        for (int64_t channel = 0; channel < sizes.width; ++channel) {
            Vector keys[2];
            std::memcpy(keys, turned + channel * padded + first, sizeof keys);
#pragma GCC unroll 8
            for (int query = 0; query < TOGETHER; ++query) {
                const float factor = own[query][channel] * sizes.scale;
                left[query] += factor * keys[0];
                right[query] += factor * keys[1];
            }
        }
        for (int query = 0; query < TOGETHER; ++query) {
            std::memcpy(scores + query * padded + first, &left[query], sizeof(Vector));
            std::memcpy(scores + query * padded + first + LANES, &right[query], sizeof(Vector));
        }
    }
}

// `count` queries from `first` on, of one image, at most TOGETHER. turned, values: of all heads of the image.
template <int PARTS, int TOGETHER>
void attend(const float *qkv, const float *turned, const Vector *values, float *out, float *rating, int64_t first, int64_t count, const Sizes &sizes,
            Rows<TOGETHER> &rows) {
    const int64_t n = sizes.tokens, padded = sizes.padded(), channels = sizes.heads * sizes.width;
    const float share = 1.0f / sizes.heads;
    std::fill(rows.rated.begin(), rows.rated.end(), 0.0f);
    for (int64_t head = 0; head < sizes.heads; ++head) {
        const float *own[TOGETHER];  // where there are fewer queries the last one stands for the others
        for (int query = 0; query < TOGETHER; ++query)
            own[query] = qkv + (first + std::min<int64_t>(query, count - 1)) * 3 * channels + head * sizes.width;
        score<TOGETHER>(own, turned + head * sizes.width * padded, rows.scores.data(), padded, sizes);
        float over[TOGETHER];
        for (int query = 0; query < TOGETHER; ++query) {
            float *row = rows.scores.data() + query * padded, *rated = rows.rated.data() + query * padded;
            if (sizes.standardised) add_standardised(row, rows.other.data(), rated, n, padded, share);
            over[query] = 1.0f / weighed(row, n, padded);
            if (!sizes.standardised)
                for (int64_t i = 0; i < n; ++i) rated[i] += share * over[query] * row[i];
        }
        Vector sum[TOGETHER][PARTS] = {};
        const Vector *value = values + head * n * PARTS;
        for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 8
            for (int query = 0; query < TOGETHER; ++query)
#pragma GCC unroll 8
                for (int part = 0; part < PARTS; ++part) sum[query][part] += rows.scores[query * padded + i] * value[i * PARTS + part];
        for (int64_t query = 0; query < count; ++query) {
            for (int part = 0; part < PARTS; ++part) sum[query][part] *= over[query];
            std::memcpy(out + (first + query) * channels + head * sizes.width, sum[query], sizes.width * sizeof(float));
        }
    }
    for (int64_t query = 0; query < count; ++query)
        std::memcpy(rating + (first + query) * n, rows.rated.data() + query * padded, n * sizeof(float));
}

template <int PARTS> void attend_all(const float *qkv, float *out, float *rating, const Sizes &sizes) {
    constexpr int TOGETHER = PARTS <= 2 ? 8 : 4;  // as many sums as there are registers
    const int64_t n = sizes.tokens, padded = sizes.padded(), channels = sizes.heads * sizes.width, chunks = (n + TOGETHER - 1) / TOGETHER;
    std::vector<float> turned(sizes.images * channels * padded), values(sizes.images * sizes.heads * n * PARTS * LANES);
    Vector *beside = reinterpret_cast<Vector *>(values.data());
#pragma omp parallel num_threads(sizes.threads)
    {
        Rows<TOGETHER> rows(padded);
#pragma omp for collapse(2)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t head = 0; head < sizes.heads; ++head) {
                const float *keys = qkv + image * n * 3 * channels + channels + head * sizes.width;
                turn(keys, turned.data() + (image * channels + head * sizes.width) * padded, sizes);
                side_by_side<PARTS>(keys + channels, beside + (image * sizes.heads + head) * n * PARTS, sizes);
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                attend<PARTS, TOGETHER>(qkv + image * n * 3 * channels, turned.data() + image * channels * padded, beside + image * sizes.heads * n * PARTS,
                                        out + image * n * channels, rating + image * n * n, chunk * TOGETHER,
                                        std::min<int64_t>(TOGETHER, n - chunk * TOGETHER), sizes, rows);
    }
}

}  // namespace

// qkv [images, tokens, 3, heads, width]; out [images, tokens, heads, width]; rating [images, tokens, tokens]: each query's of the keys. Returns 0, or 1 where
// `width` is more than 128.
extern "C" int scored_attention(const float *qkv, float *out, float *rating, int64_t images, int64_t tokens, int64_t heads, int64_t width, float scale,
                                int standardised, int threads) {
    const Sizes sizes{images, tokens, heads, width, scale, standardised != 0, threads};
    switch ((width + LANES - 1) / LANES) {
        case 1: attend_all<1>(qkv, out, rating, sizes); return 0;
        case 2: attend_all<2>(qkv, out, rating, sizes); return 0;
        case 3: attend_all<3>(qkv, out, rating, sizes); return 0;
        case 4: attend_all<4>(qkv, out, rating, sizes); return 0;
        case 5: attend_all<5>(qkv, out, rating, sizes); return 0;
        case 6: attend_all<6>(qkv, out, rating, sizes); return 0;
        case 7: attend_all<7>(qkv, out, rating, sizes); return 0;
        case 8: attend_all<8>(qkv, out, rating, sizes); return 0;
        default: return 1;
    }
}
