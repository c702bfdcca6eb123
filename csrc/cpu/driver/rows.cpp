// What lies around the pass and its finish: unit rows before, the chain rule of the normalization
// after. One thread: 256 rows of 128 columns take some 20 us. In torch they wake the threads of
// OpenMP, which then spin for 8 ms where those of the pass should run: measured, 4 of its 54 ms.

#include <cmath>
#include <limits>

#include "cpu.h"

namespace psm::cpu {
namespace {

float dot(const float* a, const float* b, int64_t dim) {
    constexpr int kLanes = 16;  // sums that the compiler keeps in vectors
    float lanes[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes)
        for (int n = 0; n < kLanes; ++n) lanes[n] += a[d + n] * b[d + n];
    for (int n = 0; d < dim; ++d, ++n) lanes[n] += a[d] * b[d];
    float total = 0;
    for (int n = 0; n < kLanes; ++n) total += lanes[n];
    return total;
}

// The squares of rows as long as 1e30 or as short as 1e-30 are numbers in double alone.
float length(const float* row, int64_t dim) {
    const float square = dot(row, row, dim);
    if (square > 1e-30f && square < 1e30f) return std::sqrt(square);
    double total = 0;
    for (int64_t d = 0; d < dim; ++d) total += double(row[d]) * double(row[d]);
    return float(std::sqrt(total));
}

float normalize(const float* row, int64_t dim, float* unit) {
    float norm = length(row, dim);
    if (norm < std::numeric_limits<float>::min()) norm = 1.0f;  // as rows.py: zeros stay zeros
    for (int64_t d = 0; d < dim; ++d) unit[d] = row[d] / norm;
    return norm;
}

}  // namespace

void unit_pair(const UnitPair& pair) {
    for (int64_t i = 0, at = 0; i < pair.batch; ++i, at += pair.dim) {
        pair.norms[i] = normalize(pair.query + at, pair.dim, pair.unit_query + at);
        normalize(pair.key + at, pair.dim, pair.unit_key + at);
        pair.s_pos[i] = dot(pair.unit_query + at, pair.unit_key + at, pair.dim);
    }
}

void through_norm(const float* unit, const float* norms, int64_t batch, int64_t dim,
                  float* gradient) {
    for (int64_t i = 0; i < batch; ++i, unit += dim, gradient += dim) {
        const float along = dot(gradient, unit, dim);
        for (int64_t d = 0; d < dim; ++d) gradient[d] = (gradient[d] - along * unit[d]) / norms[i];
    }
}

}  // namespace psm::cpu
