// Attention of several images of different lengths, whose tokens lie one after the other. float32, on the CPU.

#include "rows.h"

namespace {

struct Sizes {
    int64_t images, heads, width, query_stride, key_stride;  // width: numbers of a head; strides: between tokens
    float scale;
    int threads;
};

// Room of a thread for one head of the longest image.
struct Room {
    Vectors turned, values, scores;
    std::vector<float> queries;

    Room(int64_t longest, int64_t width, int parts)
        : turned(width * vectors_of(longest)), values(longest * parts), scores(TOGETHER * vectors_of(longest)), queries(TOGETHER * width) {}
};

// One head of one image: its m queries, and its n keys and values.
template <int PARTS>
void attend(const float *q, const float *k, const float *v, float *out, int64_t m, int64_t n, const Sizes &sizes, Room &room) {
    const int64_t vectors = vectors_of(n), width = sizes.width, stride = sizes.heads * width;
    turn(k, sizes.key_stride, n, width, room.turned.data());
    side_by_side<PARTS>(v, sizes.key_stride, n, width, room.values.data());
    const Vector padding = padding_of(n);
    for (int64_t first = 0; first < m; first += TOGETHER) {
        const int64_t count = std::min<int64_t>(TOGETHER, m - first);
        take(q + first * sizes.query_stride, sizes.query_stride, count, width, sizes.scale, room.queries.data());
        score(room.queries.data(), room.turned.data(), room.scores.data(), vectors, width);
        float over[TOGETHER];
        for (int query = 0; query < TOGETHER; ++query) {
            Vector *row = room.scores.data() + query * vectors;
            row[vectors - 1] -= padding;
            over[query] = 1.0f / weighed(row, vectors, largest_in(row, vectors));
        }
        put<PARTS>(room.scores.data(), vectors, room.values.data(), n, over, count, width, stride, out + first * stride);
    }
}

template <int PARTS>
void attend_all(const float *q, const float *k, const float *v, float *out, const int32_t *q_starts, const int32_t *k_starts, const Sizes &sizes) {
    int64_t longest = 0;
    for (int64_t image = 0; image < sizes.images; ++image) longest = std::max<int64_t>(longest, k_starts[image + 1] - k_starts[image]);
#pragma omp parallel num_threads(sizes.threads)
    {
        Room room(longest, sizes.width, PARTS);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t image = 0; image < sizes.images; ++image)
            for (int64_t head = 0; head < sizes.heads; ++head) {
                const int64_t first_query = q_starts[image], first_key = k_starts[image], place = head * sizes.width;
                attend<PARTS>(q + first_query * sizes.query_stride + place, k + first_key * sizes.key_stride + place,
                                        v + first_key * sizes.key_stride + place, out + first_query * sizes.heads * sizes.width + place,
                                        q_starts[image + 1] - first_query, k_starts[image + 1] - first_key, sizes, room);
            }
    }
}

}  // namespace

// Whether the images' parts begin at 0 and follow each other, and no queries are without keys.
bool fit(const int32_t *q_starts, const int32_t *k_starts, int64_t images) {
    bool found = q_starts[0] == 0 && k_starts[0] == 0;
    for (int64_t image = 0; image < images; ++image) {
        const int32_t queries = q_starts[image + 1] - q_starts[image], keys = k_starts[image + 1] - k_starts[image];
        found = found && queries >= 0 && keys >= 0 && (keys > 0 || queries == 0);
    }
    return found;
}

// q, out [all queries, heads, width]; k, v [all keys, heads, width], tokens at strides of their own; starts [images + 1]: where each image's begin. Returns 0, 1
// where `width` is more than 128, or 2 where the starts do not fit.
extern "C" int packed_attention(const float *q, const float *k, const float *v, float *out, const int32_t *q_starts, const int32_t *k_starts, int64_t images,
                                int64_t heads, int64_t width, int64_t query_stride, int64_t key_stride, float scale, int threads) {
    if (!fit(q_starts, k_starts, images)) return 2;
    const Sizes sizes{images, heads, width, query_stride, key_stride, scale, threads};
    switch ((width + LANES - 1) / LANES) {
        case 1: attend_all<1>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 2: attend_all<2>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 3: attend_all<3>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 4: attend_all<4>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 5: attend_all<5>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 6: attend_all<6>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 7: attend_all<7>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        case 8: attend_all<8>(q, k, v, out, q_starts, k_starts, sizes); return 0;
        default: return 1;
    }
}
