// The timestep norm on a CPU, token by token: one pass over memory forward, one backward, statistics in double.
//
// Forward, a token's sums are taken about the mean before it, so that nothing cancels. Backward, sums over later tokens are
// held about the mean of the token they have come to: Q = sum of gV / n, U = sum of (gM + 2 (mean - M) gV) / n.
//
// Legend: B batch, L length, D channels, G groups of S channels.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native.h"

namespace {

constexpr int BYTES = WIDTH * sizeof(float);  // of a register

template <typename T, int SIZE> struct Vector {
    typedef T Lane __attribute__((vector_size(SIZE)));
};
template <typename T> using Lane = typename Vector<T, BYTES>::Lane;
template <typename T> constexpr int lanes = BYTES / sizeof(T);

template <typename T> inline Lane<T> load(const T *from) {
    Lane<T> lane;
    std::memcpy(&lane, from, sizeof lane);
    return lane;
}
template <typename T> inline void store(T *to, Lane<T> lane) { std::memcpy(to, &lane, sizeof lane); }

// Sum of a register's numbers, halves first.
template <typename T, int SIZE> inline T total(typename Vector<T, SIZE>::Lane lane) {
    if constexpr (SIZE <= 16) {
        T sum = lane[0];
        for (unsigned i = 1; i < SIZE / sizeof(T); i++) sum += lane[i];
        return sum;
    } else {
        typename Vector<T, SIZE / 2>::Lane low, high;
        std::memcpy(&low, &lane, SIZE / 2);
        std::memcpy(&high, reinterpret_cast<char *>(&lane) + SIZE / 2, SIZE / 2);
        return total<T, SIZE / 2>(low + high);
    }
}

struct Sizes {
    int64_t batch, length, channels, groups, threads;
    int64_t size() const { return channels / groups; }
};

// A row's documents and padding, (L,) each or null: everything counts, nothing begins.
struct Flags {
    const uint8_t *resets, *valid;
    bool begins(int64_t t) const { return resets && resets[t]; }
    bool counts(int64_t t) const { return !valid || valid[t]; }
    Flags row(int64_t begin) const { return {resets ? resets + begin : nullptr, valid ? valid + begin : nullptr}; }
};

// Sums of x - pivot and of its square over a group of a token.
template <typename T> inline void sums(const T *x, T pivot, int64_t size, double &first, double &second) {
    Lane<T> one{}, two{};
    int64_t i = 0;
    for (; i + lanes<T> <= size; i += lanes<T>) {
        const Lane<T> d = load(x + i) - pivot;
        one += d;
        two += d * d;
    }
    T rest = 0, rest_two = 0;
    for (; i < size; i++) {
        const T d = x[i] - pivot;
        rest += d;
        rest_two += d * d;
    }
    first = total<T, BYTES>(one) + rest;
    second = total<T, BYTES>(two) + rest_two;
}

// y = (x - high - low) rstd scale + bias over a group of a token; high + low is the mean.
template <typename T>
inline void normalise(const T *x, const T *scale, const T *bias, T high, T low, T rstd, int64_t size, T *y) {
    int64_t i = 0;
    for (; i + lanes<T> <= size; i += lanes<T>)
        store(y + i, ((load(x + i) - high) - low) * rstd * load(scale + i) + load(bias + i));
    for (; i < size; i++) y[i] = ((x[i] - high) - low) * rstd * scale[i] + bias[i];
}

// Sums of dy scale and of dy scale (x - mean) over a group of a token; adds to the gradients of weight and bias.
template <typename T>
inline void slopes(const T *x, const T *dy, const T *scale, T mean, T rstd, int64_t size, T *d_weight, T *d_bias,
                   double &first, double &second) {
    Lane<T> one{}, two{};
    int64_t i = 0;
    for (; i + lanes<T> <= size; i += lanes<T>) {
        const Lane<T> up = load(dy + i), centred = load(x + i) - mean, slope = up * load(scale + i);
        one += slope;
        two += slope * centred;
        store(d_weight + i, load(d_weight + i) + up * (centred * rstd));
        store(d_bias + i, load(d_bias + i) + up);
    }
    T rest = 0, rest_two = 0;
    for (; i < size; i++) {
        const T centred = x[i] - mean, slope = dy[i] * scale[i];
        rest += slope;
        rest_two += slope * centred;
        d_weight[i] += dy[i] * (centred * rstd);
        d_bias[i] += dy[i];
    }
    first = total<T, BYTES>(one) + rest;
    second = total<T, BYTES>(two) + rest_two;
}

// dx = dy scale rstd + constant + factor (x - mean) over a group of a token.
template <typename T>
inline void descend(const T *x, const T *dy, const T *scale, T mean, T rstd, T constant, T factor, int64_t size, T *dx) {
    int64_t i = 0;
    for (; i + lanes<T> <= size; i += lanes<T>)
        store(dx + i, load(dy + i) * load(scale + i) * rstd + (constant + factor * (load(x + i) - mean)));
    for (; i < size; i++) dx[i] = dy[i] * scale[i] * rstd + (constant + factor * (x[i] - mean));
}

template <typename T> std::vector<T> scales(const T *weight, int64_t channels) {
    std::vector<T> scale(weight, weight + channels);
    for (T &one : scale) one += 1;
    return scale;
}

// Some groups of a row; mean and var (G,) go from before the row to after it. Without y only they are computed.
template <typename T>
void forward_row(const T *x, const T *scale, const T *bias, Flags flags, int64_t count, double *mean, double *var, T *y,
                 T *means, T *rstds, const Sizes &sizes, double eps, int64_t first, int64_t end) {
    const int64_t size = sizes.size(), groups = sizes.groups, some = (end - first) * size;
    std::vector<double> one(groups), two(groups);
    std::vector<T> high(groups), low(groups), rstd(groups);
    for (int64_t t = 0; t < sizes.length; t++) {
        const int64_t at = t * sizes.channels;
        if (flags.begins(t)) {
            count = 0;
            std::fill(mean + first, mean + end, 0.0);
            std::fill(var + first, var + end, 0.0);
        }
        if (flags.counts(t)) {
            for (int64_t g = first; g < end; g++) {
                const T *own = x + at + g * size;
                high[g] = count ? static_cast<T>(mean[g]) : own[0];
                sums(own, high[g], size, one[g], two[g]);
            }
            count++;
            const double part = 1.0 / count, both = part * (1.0 - part), inverse = 1.0 / size;
            for (int64_t g = first; g < end; g++) {
                const double offset = one[g] * inverse, spread = two[g] * inverse - offset * offset;
                const double step = high[g] + offset - mean[g];
                mean[g] += part * step;
                var[g] += part * (spread - var[g]) + both * (step * step);
            }
        }
        if (!y) continue;
        for (int64_t g = first; g < end; g++) {
            high[g] = static_cast<T>(mean[g]);
            low[g] = static_cast<T>(mean[g] - high[g]);
            rstd[g] = static_cast<T>(1.0 / std::sqrt(std::max(var[g], 0.0) + eps));
        }
        if (flags.counts(t)) {
            for (int64_t g = first; g < end; g++)
                normalise(x + at + g * size, scale + g * size, bias + g * size, high[g], low[g], rstd[g], size,
                          y + at + g * size);
        } else {
            std::fill(y + at + first * size, y + at + first * size + some, T(0));
        }
        if (means) {
            std::copy(high.begin() + first, high.begin() + end, means + t * groups + first);
            std::copy(rstd.begin() + first, rstd.begin() + end, rstds + t * groups + first);
        }
    }
}

template <typename T>
void forward(const T *x, const T *weight, const T *bias, const uint8_t *resets, const uint8_t *valid, int64_t *count,
             double *mean, double *var, T *y, T *means, T *rstds, const Sizes &sizes, double eps) {
    const std::vector<T> scale = scales(weight, sizes.channels);
    const Flags flags{resets, valid};
    share(sizes.groups, sizes.threads, [&](int64_t first, int64_t end) {
        for (int64_t b = 0; b < sizes.batch; b++) {
            const int64_t row = b * sizes.length, at = b * sizes.groups;
            forward_row(x + row * sizes.channels, scale.data(), bias, flags.row(row), count[b], mean + at, var + at,
                        y ? y + row * sizes.channels : nullptr, means ? means + row * sizes.groups : nullptr,
                        means ? rstds + row * sizes.groups : nullptr, sizes, eps, first, end);
        }
    });
    for (int64_t b = 0; b < sizes.batch; b++)
        for (int64_t t = 0; t < sizes.length; t++) {
            if (flags.row(b * sizes.length).begins(t)) count[b] = 0;
            count[b] += flags.row(b * sizes.length).counts(t);
        }
}

constexpr int64_t TOKENS = 64;  // whose gradients of weight and bias are added up in T

// Some groups of a row, from its last token; d_mean and d_var (G,) go from the gradients of the moments after the row to
// those of the moments before it; sums (2, D) of weight and bias. Without dx only the former are computed.
template <typename T>
void backward_row(const T *x, const T *dy, const T *scale, Flags flags, int64_t count, const double *mean,
                  const T *means, const T *rstds, double *d_mean, double *d_var, T *dx, double *sums,
                  const Sizes &sizes, int64_t first, int64_t end) {
    const int64_t size = sizes.size(), groups = sizes.groups, channels = sizes.channels, length = sizes.length;
    std::vector<int64_t> counts(length);
    int64_t n = count;
    for (int64_t t = 0; t < length; t++) counts[t] = n = (flags.begins(t) ? 0 : n) + flags.counts(t);
    std::vector<double> one(groups), two(groups), q(groups), u(groups), pivot(groups);
    std::vector<T> constant(groups), factor(groups), of_weight(channels), of_bias(channels);
    for (int64_t g = first; g < end; g++) {
        pivot[g] = means[(length - 1) * groups + g];
        q[g] = n ? d_var[g] / n : 0;
        u[g] = n ? d_mean[g] / n : 0;
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        const int64_t at = t * channels;
        const T *own = means + t * groups, *rstd = rstds + t * groups;
        if (flags.counts(t)) {
            for (int64_t g = first; g < end; g++) {
                const int64_t c = g * size;
                slopes(x + at + c, dy + at + c, scale + c, own[g], rstd[g], size, of_weight.data() + c,
                       of_bias.data() + c, one[g], two[g]);
            }
            const double part = 1.0 / counts[t], inverse = 1.0 / size;
            for (int64_t g = first; g < end; g++) {
                const double r = rstd[g], m = own[g];
                u[g] += 2 * (m - pivot[g]) * q[g] - r * one[g] * part;
                q[g] -= 0.5 * r * r * r * two[g] * part;
                pivot[g] = m;
                constant[g] = static_cast<T>(u[g] * inverse);
                factor[g] = static_cast<T>(2 * q[g] * inverse);
            }
            if (dx)
                for (int64_t g = first; g < end; g++) {
                    const int64_t c = g * size;
                    descend(x + at + c, dy + at + c, scale + c, own[g], rstd[g], constant[g], factor[g], size,
                            dx + at + c);
                }
        } else if (dx) {
            std::fill(dx + at + first * size, dx + at + end * size, T(0));
        }
        if (flags.begins(t)) {
            std::fill(q.begin() + first, q.begin() + end, 0.0);
            std::fill(u.begin() + first, u.begin() + end, 0.0);
            // Whatever this document's mean is, be it infinite.
            for (int64_t g = first; g < end; g++) pivot[g] = t ? (own - groups)[g] : 0.0;
        }
        if (t % TOKENS == 0)
            for (int64_t c = first * size; c < end * size; c++) {
                sums[c] += of_weight[c], sums[channels + c] += of_bias[c];
                of_weight[c] = of_bias[c] = 0;
            }
    }
    for (int64_t g = first; g < end; g++) {
        d_mean[g] = count * (u[g] + 2 * (mean[g] - pivot[g]) * q[g]);
        d_var[g] = count * q[g];
    }
}

template <typename T>
void backward(const T *x, const T *dy, const T *weight, const uint8_t *resets, const uint8_t *valid,
              const int64_t *count, const double *mean, const T *means, const T *rstds, double *d_mean, double *d_var,
              T *dx, double *gradients, const Sizes &sizes) {
    const std::vector<T> scale = scales(weight, sizes.channels);
    const Flags flags{resets, valid};
    std::fill(gradients, gradients + 2 * sizes.channels, 0.0);
    share(sizes.groups, sizes.threads, [&](int64_t first, int64_t end) {
        for (int64_t b = 0; b < sizes.batch; b++) {
            const int64_t row = b * sizes.length, at = b * sizes.groups;
            backward_row(x + row * sizes.channels, dy + row * sizes.channels, scale.data(), flags.row(row), count[b],
                         mean + at, means + row * sizes.groups, rstds + row * sizes.groups, d_mean + at, d_var + at,
                         dx ? dx + row * sizes.channels : nullptr, gradients, sizes, first, end);
        }
    });
}

}  // namespace

// Tokens x, y and their gradients (B, L, D), weight and bias (D,), means and rstds (B, L, G) are float or double; resets and
// valid (B, L) or null; count (B,), mean and var (B, G), from before x to after it. y may be null, or means and rstds.
// Backward, mean is that before x; d_mean and d_var go from after x to before it; gradients (2, D) of weight and bias.
#define EXPORT(NAME, T)                                                                                                \
    extern "C" void mega_timestep_norm_forward_##NAME(                                                                 \
        const T *x, const T *weight, const T *bias, const uint8_t *resets, const uint8_t *valid, int64_t *count,       \
        double *mean, double *var, T *y, T *means, T *rstds, int64_t batch, int64_t length, int64_t channels,          \
        int64_t groups, int64_t threads, double eps) {                                                                 \
        forward(x, weight, bias, resets, valid, count, mean, var, y, means, rstds,                                     \
                Sizes{batch, length, channels, groups, threads}, eps);                                                 \
    }                                                                                                                  \
    extern "C" void mega_timestep_norm_backward_##NAME(                                                                \
        const T *x, const T *dy, const T *weight, const uint8_t *resets, const uint8_t *valid, const int64_t *count,   \
        const double *mean, const T *means, const T *rstds, double *d_mean, double *d_var, T *dx, double *gradients,   \
        int64_t batch, int64_t length, int64_t channels, int64_t groups, int64_t threads) {                            \
        backward(x, dy, weight, resets, valid, count, mean, means, rstds, d_mean, d_var, dx, gradients,                \
                 Sizes{batch, length, channels, groups, threads});                                                     \
    }

EXPORT(float32, float)
EXPORT(float64, double)
