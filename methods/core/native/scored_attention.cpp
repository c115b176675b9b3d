// Attention that also rates keys for each query, the mean over heads: by the attention itself, or by standardised scores. float32, on the CPU.

#include "rows.h"

namespace {

struct Sizes {
    int64_t images, tokens, heads, width;  // width: numbers of a head
    float scale;
    bool standardised;
    int threads;
};

// The normal distribution function, by a quotient fitted to it where it is not yet 0 or 1 to 1e-8.
inline Vector normal(Vector z) {
    z = z > 5.6f ? Vector{} + 5.6f : z < -5.6f ? Vector{} - 5.6f : z;
    const Vector s = z * z;
    const Vector above = 0.398942222f + s * (0.0343752041f + s * (0.00470720079f + s * (0.000173841306f + s * (6.35644429e-06f + s * 2.21458433e-08f))));
    const Vector below = 1.0f + s * (0.252831572f + s * (0.0289395627f + s * (0.00191292437f + s * (7.50988011e-05f + s * 1.18022125e-06f))));
    return 0.5f + z * above / below;
}

// Adds the row's rating to `rated`.
void add_standardised(const Vector *row, const Vector *valid, Vector *rated, int64_t vectors, int64_t n, float share) {
    Vector sums = {}, squares = {};
    for (int64_t i = 0; i < vectors; ++i) sums += row[i];
    const float mean = added_up(sums) / n;
    for (int64_t i = 0; i < vectors; ++i) squares += (row[i] - mean) * (row[i] - mean) * valid[i];
    const float over = 1.0f / (std::sqrt(added_up(squares) / n) + 1e-7f);
    for (int64_t i = 0; i < vectors; ++i) rated[i] += share * normal((row[i] - mean) * over);
}

// Room of a thread for the rows of so many queries.
template <int TOGETHER> struct Rows {
    std::vector<Vector> scores, rated, valid;
    std::vector<float> queries;

    explicit Rows(const Sizes &sizes)
        : scores(TOGETHER * vectors_of(sizes.tokens)), rated(scores.size()), valid(vectors_of(sizes.tokens)), queries(TOGETHER * sizes.width) {
        mark(valid.data(), sizes.tokens);
    }
};

// `count` queries from `first` on, of one image, at most TOGETHER. turned, values: of all heads of the image.
template <int PARTS, int TOGETHER>
void attend(const float *qkv, const Vector *turned, const Vector *values, float *out, float *rating, int64_t first, int64_t count, const Sizes &sizes,
            Rows<TOGETHER> &rows) {
    const int64_t n = sizes.tokens, vectors = vectors_of(n), width = sizes.width, channels = sizes.heads * width;
    const float share = 1.0f / sizes.heads;
    const Vector *valid = rows.valid.data();
    std::fill(rows.rated.begin(), rows.rated.end(), Vector{});
    for (int64_t head = 0; head < sizes.heads; ++head) {
        take<TOGETHER>(qkv + first * 3 * channels + head * width, 3 * channels, count, width, sizes.scale, rows.queries.data());
        score<TOGETHER>(rows.queries.data(), turned + head * width * vectors, rows.scores.data(), vectors, width);
        float over[TOGETHER];
        for (int query = 0; query < TOGETHER; ++query) {
            Vector *row = rows.scores.data() + query * vectors, *rated = rows.rated.data() + query * vectors;
            if (sizes.standardised) add_standardised(row, valid, rated, vectors, n, share);
            over[query] = 1.0f / weighed(row, valid, vectors);
            if (!sizes.standardised)
                for (int64_t i = 0; i < vectors; ++i) rated[i] += share * over[query] * row[i];
        }
        put<PARTS, TOGETHER>(rows.scores.data(), vectors, values + head * n * PARTS, n, over, count, width, channels, out + first * channels + head * width);
    }
    for (int64_t query = 0; query < count; ++query) std::memcpy(rating + (first + query) * n, rows.rated.data() + query * vectors, n * sizeof(float));
}

template <int PARTS> void attend_all(const float *qkv, float *out, float *rating, const Sizes &sizes) {
    constexpr int TOGETHER = together<PARTS>();
    const int64_t n = sizes.tokens, vectors = vectors_of(n), channels = sizes.heads * sizes.width, chunks = (n + TOGETHER - 1) / TOGETHER;
    std::vector<Vector> turned(sizes.images * channels * vectors), values(sizes.images * sizes.heads * n * PARTS);
#pragma omp parallel num_threads(sizes.threads)
    {
        Rows<TOGETHER> rows(sizes);
#pragma omp for collapse(2)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t head = 0; head < sizes.heads; ++head) {
                const float *keys = qkv + image * n * 3 * channels + channels + head * sizes.width;
                turn(keys, 3 * channels, n, sizes.width, turned.data() + (image * channels + head * sizes.width) * vectors);
                side_by_side<PARTS>(keys + channels, 3 * channels, n, sizes.width, values.data() + (image * sizes.heads + head) * n * PARTS);
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t chunk = 0; chunk < chunks; ++chunk)
                attend<PARTS, TOGETHER>(qkv + image * n * 3 * channels, turned.data() + image * channels * vectors,
                                        values.data() + image * sizes.heads * n * PARTS, out + image * n * channels, rating + image * n * n, chunk * TOGETHER,
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
