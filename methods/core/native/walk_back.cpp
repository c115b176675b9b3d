// The walk back from the output through all blocks' ratings, by concrete masks: which tokens does each block keep? float32, on the CPU.
//
// The formulas are those of methods/sttabt/backtracking.py, with sigmoid((logit p + logit r) / temperature) as 1 / (1 + x to the tenth), x the odds against
// r times those against p: no logarithm.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Constants {
    float eps, propagated, floor, threshold;
};

// Scores [tokens] of one image, from the masks and scores of `queries` of its tokens, which these are replaced by. rating [queries, tokens].
void walk(const float *rating, int64_t queries, int64_t tokens, float odds, const Constants &constants, float *mask, float *score, float *wanted) {
    const float eps = constants.eps;
    float weights = 0.0f, largest = 0.0f, check = 0.0f;
    std::fill(wanted, wanted + tokens, 0.0f);
    for (int64_t query = 0; query < queries; ++query) {
        const float weight = mask[query] * (1.0f - constants.propagated + constants.propagated * score[query]);
        weights += mask[query];
        for (int64_t token = 0; token < tokens; ++token) wanted[token] += weight * rating[query * tokens + token];
    }
    for (int64_t token = 0; token < tokens; ++token) {
        wanted[token] /= weights + eps;
        largest = wanted[token] > largest ? wanted[token] : largest;
        check += wanted[token];
    }
    if (check != check) largest = check;  // what is no number is larger than none
    for (int64_t token = 0; token < tokens; ++token) {
        const float r = constants.floor + (1.0f - constants.floor) * wanted[token] / (largest + eps);
        const float x = (1.0f - r + eps) / (r + eps) * odds, x2 = x * x, x4 = x2 * x2;
        const float own = 1.0f / (1.0f + x4 * x4 * x2);
        mask[token] = own < mask[token] ? mask[token] : own;
        score[token] = r;
    }
}

}  // namespace

// ratings: of each block, [images, tokens, tokens], of the last one [images, outputs, tokens]. odds [blocks]: against p. constants: eps, propagated, floor,
// threshold. kept [blocks + 1, images, tokens]: 0 or 1. Returns 0.
extern "C" int walk_back(const float *const *ratings, const float *odds, const float *constants, uint8_t *kept, int64_t blocks, int64_t images, int64_t tokens,
                         int64_t outputs, int threads) {
    const Constants own{constants[0], constants[1], constants[2], constants[3]};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> mask(tokens), score(tokens), wanted(tokens);
#pragma omp for
        for (int64_t image = 0; image < images; ++image) {
            for (int64_t token = 0; token < tokens; ++token) mask[token] = score[token] = token < outputs ? 1.0f : 0.0f;
            for (int64_t block = blocks; block >= 0; --block) {
                if (block < blocks) {
                    const int64_t queries = block == blocks - 1 ? outputs : tokens;
                    walk(ratings[block] + image * queries * tokens, queries, tokens, odds[block], own, mask.data(), score.data(), wanted.data());
                }
                uint8_t *row = kept + (block * images + image) * tokens;
                for (int64_t token = 0; token < tokens; ++token) row[token] = !(mask[token] < own.threshold);
            }
        }
    }
    return 0;
}
