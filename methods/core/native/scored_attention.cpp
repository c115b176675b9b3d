// Attention that also rates keys for each query, the mean over heads: by the attention itself, or by standardised scores. float32, on the CPU.
//
// Keys are taken less their mean: the softmax is the same, the scores of a query have the mean 0, and the padding, whose scores are 0, is never above the largest.

#include "rows.h"

namespace {

struct Sizes {
    int64_t images, tokens, heads, width;  // width: numbers of a head
    float scale;
    bool standardised;
    int threads;
};

// Takes the mean of turned keys [width, vectors] off.
void centre(Vector *turned, int64_t tokens, int64_t width) {
    const int64_t vectors = vectors_of(tokens);
    for (int64_t channel = 0; channel < width; ++channel) {
        Vector *row = turned + channel * vectors, sums = {};
        for (int64_t i = 0; i < vectors; ++i) sums += row[i];
        const float mean = added_up(sums) / tokens;
        for (int64_t i = 0; i < vectors; ++i) row[i] -= mean;
        std::fill(reinterpret_cast<float *>(row) + tokens, reinterpret_cast<float *>(row + vectors), 0.0f);
    }
}

struct Extent {
    float largest, squares;  // squares: summed up
};

// Of a row of scores whose mean and padding are 0.
inline Extent extent_of(const Vector *row, int64_t vectors) {
    Vector most = {}, squares = {};
    for (int64_t i = 0; i < vectors; ++i) {
        most = row[i] > most ? row[i] : most;
        squares += row[i] * row[i];
    }
    return {largest_number(most), added_up(squares)};
}

// The normal distribution function, by a quotient fitted to it where it is not yet 0 or 1 to 1e-7 (off by 3e-7).
inline Vector normal(Vector z) {
    z = z > 5.2f ? Vector{} + 5.2f : z < -5.2f ? Vector{} - 5.2f : z;
    const Vector s = z * z;
    const Vector above = 0.398941918f + s * (0.0495902377f + s * (0.00551849617f + s * (0.00031422625f + s * 5.83999355e-06f)));
    const Vector below = 1.0f + s * (0.290965061f + s * (0.0373378872f + s * (0.00270353598f + s * (0.000112727012f + s * 5.01854116e-07f))));
    return 0.5f + z * above / below;
}

// Adds `share` of the row's rating to `rated`. over: 1 / deviation.
inline void add_standardised(const Vector *row, Vector *rated, int64_t vectors, float over, float share) {
    for (int64_t i = 0; i < vectors; ++i) rated[i] += share * normal(row[i] * over);
}

// Room of a thread.
struct Room {
    Vectors scores, rated;  // of so many queries
    std::vector<float> queries;
    Vector padding;

    explicit Room(const Sizes &sizes)
        : scores(TOGETHER * vectors_of(sizes.tokens)), rated(TOGETHER * vectors_of(sizes.tokens)), queries(TOGETHER * sizes.width), padding(padding_of(sizes.tokens)) {}
};

// `count` queries from `first` on, of one image, at most TOGETHER. turned, values: of all heads of the image.
template <int PARTS>
void attend(const float *qkv, const Vector *turned, const Vector *values, float *out, float *rating, int64_t first, int64_t count, const Sizes &sizes,
            Room &room) {
    const int64_t n = sizes.tokens, vectors = vectors_of(n), width = sizes.width, channels = sizes.heads * width;
    const float share = 1.0f / sizes.heads;
    std::fill(room.rated.data(), room.rated.data() + TOGETHER * vectors, Vector{});
    for (int64_t head = 0; head < sizes.heads; ++head) {
        take(qkv + first * 3 * channels + head * width, 3 * channels, count, width, sizes.scale, room.queries.data());
        score(room.queries.data(), turned + head * width * vectors, room.scores.data(), vectors, width);
        float over[TOGETHER];
        for (int query = 0; query < TOGETHER; ++query) {
            Vector *row = room.scores.data() + query * vectors, *rated = room.rated.data() + query * vectors;
            const Extent extent = extent_of(row, vectors);
            if (sizes.standardised) add_standardised(row, rated, vectors, 1.0f / (std::sqrt(extent.squares / n) + 1e-7f * PER_POWER), share);
            row[vectors - 1] -= room.padding;
            over[query] = 1.0f / weighed(row, vectors, extent.largest);
            if (!sizes.standardised)
                for (int64_t i = 0; i < vectors; ++i) rated[i] += share * over[query] * row[i];
        }
        put<PARTS>(room.scores.data(), vectors, values + head * n * PARTS, n, over, count, width, channels, out + first * channels + head * width);
    }
    for (int64_t query = 0; query < count; ++query) std::memcpy(rating + (first + query) * n, room.rated.data() + query * vectors, n * sizeof(float));
}

template <int PARTS> void attend_all(const float *qkv, float *out, float *rating, const Sizes &sizes) {
    const int64_t n = sizes.tokens, vectors = vectors_of(n), channels = sizes.heads * sizes.width, chunks = (n + TOGETHER - 1) / TOGETHER;
    const Vectors turned(sizes.images * channels * vectors), values(sizes.images * sizes.heads * n * PARTS);
#pragma omp parallel num_threads(sizes.threads)
    {
        Room room(sizes);
#pragma omp for collapse(2)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t head = 0; head < sizes.heads; ++head) {
                const float *keys = qkv + image * n * 3 * channels + channels + head * sizes.width;
                Vector *own = turned.data() + (image * channels + head * sizes.width) * vectors;
                turn(keys, 3 * channels, n, sizes.width, own);
                centre(own, n, sizes.width);
                side_by_side<PARTS>(keys + channels, 3 * channels, n, sizes.width, values.data() + (image * sizes.heads + head) * n * PARTS);
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                attend<PARTS>(qkv + image * n * 3 * channels, turned.data() + image * channels * vectors,
                                        values.data() + image * sizes.heads * n * PARTS, out + image * n * channels, rating + image * n * n, chunk * TOGETHER,
                                        std::min<int64_t>(TOGETHER, n - chunk * TOGETHER), sizes, room);
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
