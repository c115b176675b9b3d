// Attention over listed keys: each query of each head has a list of its own, the same for all images. float32, on the CPU.
//
// A head's keys, and then its values, are copied side by side first, so that what many queries read stays in the nearest cache. Numbers are worked on
// sixteen at a time, in GCC's and Clang's vector types: left to themselves, compilers add up products one after the other, which takes three times
// as long.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4)));
typedef float Half __attribute__((vector_size(32), aligned(4)));
typedef float Quarter __attribute__((vector_size(16), aligned(4)));

inline float added_up(const Vector &numbers) {
    Half low, high;
    std::memcpy(&low, &numbers, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char *>(&numbers) + sizeof low, sizeof high);
    low += high;
    Quarter left, right;
    std::memcpy(&left, &low, sizeof left);
    std::memcpy(&right, reinterpret_cast<const char *>(&low) + sizeof left, sizeof right);
    left += right;
    return (left[0] + left[2]) + (left[1] + left[3]);
}

struct Sizes {
    int64_t images, tokens, heads, width;  // width: numbers of a head
    float scale;
    int threads;
};

// Rows of `width` numbers, `stride` apart, to rows of PARTS vectors side by side, filled up with zeros.
template <int PARTS> void gather(const float *from, int64_t stride, int64_t tokens, int64_t width, Vector *to) {
    for (int64_t token = 0; token < tokens; ++token) {
        to[token * PARTS + PARTS - 1] = Vector{};
        std::memcpy(to + token * PARTS, from + token * stride, width * sizeof(float));
    }
}

// One head of one image. first: of the head's queries, where their lists begin in `keys`; scratch: of this thread.
template <int PARTS>
void attend(const float *queries, const int32_t *first, const int32_t *keys, float *out, const Sizes &sizes, Vector *scratch, float *weights) {
    const int64_t channels = sizes.heads * sizes.width, stride = 3 * channels;
    gather<PARTS>(queries + channels, stride, sizes.tokens, sizes.width, scratch);
    for (int64_t query = 0; query < sizes.tokens; ++query) {
        Vector own[PARTS] = {};
        std::memcpy(own, queries + query * stride, sizes.width * sizeof(float));
        const int64_t count = first[query + 1] - first[query];
        const int32_t *list = keys + first[query];
        float *scores = weights + (first[query] - first[0]);
        for (int64_t i = 0; i < count; ++i) {
            const Vector *key = scratch + list[i] * PARTS;
            Vector products = own[0] * key[0];
            for (int part = 1; part < PARTS; ++part) products += own[part] * key[part];
            scores[i] = added_up(products) * sizes.scale;
        }
        float largest = std::numeric_limits<float>::lowest();
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, scores[i]);
        for (int64_t i = 0; i < count; ++i) scores[i] -= largest;
    }
    // Of all queries at once: a short list alone would not fill vectors, and what is left over takes ten times as long.
    const int64_t entries = first[sizes.tokens] - first[0];
    for (int64_t i = 0; i < entries; ++i) weights[i] = std::exp(weights[i]);
    gather<PARTS>(queries + 2 * channels, stride, sizes.tokens, sizes.width, scratch);
    for (int64_t query = 0; query < sizes.tokens; ++query) {
        const int64_t count = first[query + 1] - first[query];
        const int32_t *list = keys + first[query];
        const float *shares = weights + (first[query] - first[0]);
        Vector sum[PARTS] = {};
        float whole = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Vector *value = scratch + list[i] * PARTS;
            for (int part = 0; part < PARTS; ++part) sum[part] += shares[i] * value[part];
            whole += shares[i];
        }
        const float share = count ? 1 / whole : 0;  // an empty list gives zeros
        for (int part = 0; part < PARTS; ++part) sum[part] *= share;
        std::memcpy(out + query * channels, sum, sizes.width * sizeof(float));
    }
}

template <int PARTS> void attend_all(const float *qkv, const int32_t *starts, const int32_t *keys, float *out, const Sizes &sizes) {
    const int64_t channels = sizes.heads * sizes.width;
    int64_t longest = 0;
    for (int64_t head = 0; head < sizes.heads; ++head)
        longest = std::max<int64_t>(longest, starts[(head + 1) * sizes.tokens] - starts[head * sizes.tokens]);
#pragma omp parallel num_threads(sizes.threads)
    {
        std::vector<float> weights(longest), scratch(sizes.tokens * PARTS * LANES);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t head = 0; head < sizes.heads; ++head)
                attend<PARTS>(qkv + image * sizes.tokens * 3 * channels + head * sizes.width, starts + head * sizes.tokens, keys,
                              out + image * sizes.tokens * channels + head * sizes.width, sizes, reinterpret_cast<Vector *>(scratch.data()),
                              weights.data());
    }
}

}  // namespace

// qkv [images, tokens, 3, heads, width]; starts [heads * tokens + 1]: where the list of each head's queries begins in `keys`, whose entries are tokens;
// out [images, tokens, heads, width]. Returns 0, or 1 where `width` is more than 128.
extern "C" int listed_attention(const float *qkv, const int32_t *starts, const int32_t *keys, float *out, int64_t images, int64_t tokens,
                                int64_t heads, int64_t width, float scale, int threads) {
    const Sizes sizes{images, tokens, heads, width, scale, threads};
    switch ((width + LANES - 1) / LANES) {
        case 1: attend_all<1>(qkv, starts, keys, out, sizes); return 0;
        case 2: attend_all<2>(qkv, starts, keys, out, sizes); return 0;
        case 3: attend_all<3>(qkv, starts, keys, out, sizes); return 0;
        case 4: attend_all<4>(qkv, starts, keys, out, sizes); return 0;
        case 5: attend_all<5>(qkv, starts, keys, out, sizes); return 0;
        case 6: attend_all<6>(qkv, starts, keys, out, sizes); return 0;
        case 7: attend_all<7>(qkv, starts, keys, out, sizes); return 0;
        case 8: attend_all<8>(qkv, starts, keys, out, sizes); return 0;
        default: return 1;
    }
}
