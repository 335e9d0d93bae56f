// The elementwise arithmetic of a block on a CPU, and its gradients: memory is read and written once.
//
// Every function takes rows to rows of the same width, with a few numbers a column beside them, and may sum over rows. A
// register goes through all of a function's inputs at one place, so that nothing in between is stored.
#include "lanes.h"

using namespace lanes;

namespace {

// Rows whose sums are added to the others' as one: rounding then counts blocks, and not rows.
constexpr int64_t ROWS = 64;

// e^x to within 2 units of the last place: 2^k e^r with |r| <= ln 2 / 2, and e^r as 1 + r + r^2 p(r), p being a least-maximum
// fit whose error stays below 4e-9 of e^r. NaN stays.
inline Lane exponential(Lane x) {
    const Lane least = Lane{} - 87.0f, most = Lane{} + 88.0f;
    x = least > x ? least : x;
    x = most < x ? most : x;
    // Adding 1.5 x 2^23 rounds to whole numbers, which stand in the last bits of the sum.
    const Lane magic = Lane{} + 12582912.0f;
    const Lane sum = x * 1.44269504088896f + magic;
    const Lane k = sum - magic;
    const Lane r = x - k * 0.693145751953125f - k * 1.42860682030941723e-6f;  // ln 2 in two parts
    Lane p = Lane{} + 1.38146e-3f;
    p = p * r + 8.36872e-3f;
    p = p * r + 4.166839e-2f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999993f;
    p = p * (r * r) + (r + 1.0f);
    Integers bits;
    std::memcpy(&bits, &sum, sizeof bits);
    // 2^k: the sum's upper bits, the same for all k, leave with the shift.
    bits = (bits + 127) << 23;
    Lane two;
    std::memcpy(&two, &bits, sizeof two);
    return p * two;
}

inline Lane sigmoid(Lane x) { return 1.0f / (1.0f + exponential(-x)); }

// silu and its slope.
struct Silu {
    Lane value, slope;
    explicit Silu(Lane x) {
        const Lane s = sigmoid(x);
        value = x * s;
        slope = s + value * (1.0f - s);
    }
};

// rows[i] starts row r at r strides[i]; outs (count, width); columns (C, width); sums (S, width), added to.
struct Call {
    const float *const *rows;
    const int64_t *strides;
    float *const *outs;
    const float *columns;
    float *sums;
    int64_t count, width, threads;
};

// function(in, out, column, sum): a register of each row, output, column and sum, which is added to.
template <int IN, int OUT, int COLUMNS, int SUMS, typename Function>
void each(const Call *given, Function function) {
    const Call call = *given;
    share((call.width + W - 1) / W, call.threads, [=](int64_t first, int64_t end) {
        std::vector<Lane> partial(SUMS * (end - first));
        for (int64_t begin = 0; begin < call.count; begin += ROWS) {
            std::fill(partial.begin(), partial.end(), Lane{});
            const int64_t stop = std::min(begin + ROWS, call.count);
            for (int64_t row = begin; row < stop; row++)
                for (int64_t group = first; group < end; group++) {
                    const int64_t place = group * W, numbers = std::min<int64_t>(W, call.width - place);
                    const bool whole = numbers == W;
                    Lane in[IN], out[OUT], column[COLUMNS + 1], *sum = partial.data() + (group - first) * SUMS;
                    const auto get = [=](const float *from) { return whole ? load(from) : load(from, numbers); };
                    for (int i = 0; i < IN; i++) in[i] = get(call.rows[i] + row * call.strides[i] + place);
                    for (int i = 0; i < COLUMNS; i++) column[i] = get(call.columns + i * call.width + place);
                    function(in, out, column, sum);
                    for (int i = 0; i < OUT; i++) {
                        float *to = call.outs[i] + row * call.width + place;
                        if (whole)
                            store(to, out[i]);
                        else
                            store(to, out[i], numbers);
                    }
                }
            for (int64_t group = first; group < end; group++)
                for (int i = 0; i < SUMS; i++) {
                    const int64_t place = group * W, numbers = std::min<int64_t>(W, call.width - place);
                    float *to = call.sums + i * call.width + place;
                    store(to, load(to, numbers) + partial[(group - first) * SUMS + i], numbers);
                }
        }
    });
}

}  // namespace

extern "C" {

// Legend: g gradients of outputs, which come first among the rows, and then what the function itself takes.

void mega_silu(const Call *call) {
    each<1, 1, 0, 0>(call, [](const Lane *x, Lane *out, const Lane *, Lane *) { out[0] = Silu(x[0]).value; });
}

void mega_silu_backward(const Call *call) {
    each<2, 1, 0, 0>(call, [](const Lane *in, Lane *out, const Lane *, Lane *) {
        const Lane g = in[0], x = in[1];
        out[0] = g * Silu(x).slope;
    });
}

// silu(y + omega x)
void mega_average(const Call *call) {
    each<2, 1, 1, 0>(call, [](const Lane *in, Lane *out, const Lane *omega, Lane *) {
        const Lane y = in[0], x = in[1];
        out[0] = Silu(y + omega[0] * x).value;
    });
}

void mega_average_backward(const Call *call) {
    each<3, 2, 1, 1>(call, [](const Lane *in, Lane *out, const Lane *omega, Lane *sum) {
        const Lane g = in[0], y = in[1], x = in[2];
        out[0] = g * Silu(y + omega[0] * x).slope;
        out[1] = omega[0] * out[0];
        sum[0] += x * out[0];
    });
}

// kappa silu(z) + mu, twice; columns: both kappa, then both mu.
void mega_queries_and_keys(const Call *call) {
    each<1, 2, 4, 0>(call, [](const Lane *z, Lane *out, const Lane *column, Lane *) {
        const Lane active = Silu(z[0]).value;
        out[0] = column[0] * active + column[2];
        out[1] = column[1] * active + column[3];
    });
}

void mega_queries_and_keys_backward(const Call *call) {
    each<3, 1, 4, 4>(call, [](const Lane *in, Lane *out, const Lane *column, Lane *sum) {
        const Lane of_queries = in[0], of_keys = in[1];
        const Silu silu(in[2]);
        out[0] = (column[0] * of_queries + column[1] * of_keys) * silu.slope;
        sum[0] += of_queries * silu.value;
        sum[1] += of_keys * silu.value;
        sum[2] += of_queries;
        sum[3] += of_keys;
    });
}

// attended silu(gate)
void mega_gate(const Call *call) {
    each<2, 1, 0, 0>(call, [](const Lane *in, Lane *out, const Lane *, Lane *) { out[0] = in[0] * Silu(in[1]).value; });
}

void mega_gate_backward(const Call *call) {
    each<3, 2, 0, 0>(call, [](const Lane *in, Lane *out, const Lane *, Lane *) {
        const Lane g = in[0], attended = in[1];
        const Silu silu(in[2]);
        out[0] = g * silu.value;
        out[1] = g * attended * silu.slope;
    });
}

// x + sigmoid(update) (silu(candidate) - x)
void mega_update(const Call *call) {
    each<3, 1, 0, 0>(call, [](const Lane *in, Lane *out, const Lane *, Lane *) {
        const Lane x = in[0], update = in[1], candidate = in[2];
        out[0] = x + sigmoid(update) * (Silu(candidate).value - x);
    });
}

void mega_update_backward(const Call *call) {
    each<4, 3, 0, 0>(call, [](const Lane *in, Lane *out, const Lane *, Lane *) {
        const Lane g = in[0], x = in[1], share = sigmoid(in[2]);
        const Silu silu(in[3]);
        const Lane through = g * share;
        out[0] = g - through;
        out[1] = through * (1.0f - share) * (silu.value - x);
        out[2] = through * silu.slope;
    });
}

}  // extern "C"
