// The damped EMA on a CPU, as its recurrence for many channels at a time: h += rate h + gain x, y = sum of projection h.
//
// A group of W channels fills vector registers, and so do some of its averages' states while a block of TOKENS tokens
// goes by. rate = q - 1, as q itself rounds to 1 for the slowest averages. What a block adds to a state and what is left of
// the state before it are walked apart, and the latter is found anew at the block's end, by q to the power of its tokens:
// so rounding counts blocks and not tokens.
//
// Legend: B batch, L length, D channels, N averages per channel, P those padded to a multiple of PADDING; G groups, M blocks.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "native.h"

namespace {

constexpr int W = WIDTH;  // floats of a register

typedef float Lane __attribute__((vector_size(W * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Lane load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
inline void store(float *to, Lane lane) { *reinterpret_cast<Unaligned *>(to) = lane; }

// Where a row ends within a register.
inline Lane load(const float *from, int64_t numbers) {
    Lane lane{};
    std::memcpy(&lane, from, numbers * sizeof(float));
    return lane;
}
inline void store(float *to, Lane lane, int64_t numbers) { std::memcpy(to, &lane, numbers * sizeof(float)); }

// Long enough that keeping a state a block costs little, short enough that a block's rows share few pages of memory.
constexpr int TOKENS = 32;
// Averages at a time: forward they hide each other's latency, backward they leave registers for three gradients each.
constexpr int FORWARD = 8, BACKWARD = 4, PADDING = 8;

// Of one group: (P, W) each; fade is what a block leaves of a state.
struct Coefficients {
    const float *rate, *gain, *projection, *fade;
};
struct Gradients {
    float *rate, *gain, *projection;
};

struct Sizes {
    int64_t batch, length, channels, averages;
    int64_t groups() const { return (channels + W - 1) / W; }
    int64_t blocks() const { return (length + TOKENS - 1) / TOKENS; }
    int64_t padded() const { return (averages + PADDING - 1) / PADDING * PADDING; }
    int64_t state() const { return padded() * W; }             // of a group
    int64_t all_states() const { return groups() * state(); }  // of a sequence
};

// Coefficients or states of so many rows (D, N) as (G, P, W), filled up with zeros.
class Grouped {
    struct Free {
        void operator()(float *all) const { ::operator delete[](all, std::align_val_t{64}); }
    };
    const Sizes sizes;
    const int64_t rows;
    std::unique_ptr<float[], Free> all;

    template <typename Function>
    void each(Function of_pair) const {  // of places in groups and in rows
        for (int64_t row = 0; row < rows; row++)
            for (int64_t d = 0; d < sizes.channels; d++)
                for (int64_t n = 0; n < sizes.averages; n++)
                    of_pair(row * sizes.all_states() + d / W * sizes.state() + n * W + d % W,
                            (row * sizes.channels + d) * sizes.averages + n);
    }

  public:
    Grouped(const Sizes &sizes, int64_t rows, const float *from)
        : sizes(sizes), rows(rows), all(new (std::align_val_t{64}) float[rows * sizes.all_states()]()) {
        if (from) each([&](int64_t in, int64_t out) { all[in] = from[out]; });
    }
    float *data() const { return all.get(); }
    void write(float *to) const {
        each([&](int64_t in, int64_t out) { to[out] = all[in]; });
    }
};

// One block of one group of one sequence.
struct Place {
    int64_t row, column;  // of its first token and channel
    int tokens, width;    // the last group may have fewer than W channels
};

Place place(const Sizes &sizes, int64_t sequence, int64_t block, int64_t group) {
    const int64_t first = block * TOKENS, column = group * W;
    return {sequence * sizes.length + first, column, static_cast<int>(std::min<int64_t>(TOKENS, sizes.length - first)),
            static_cast<int>(std::min<int64_t>(W, sizes.channels - column))};
}

// The columns of a group out of rows of D channels, to (TOKENS, W), and back.
inline void take(const float *rows, int64_t channels, Place at, float *columns) {
    rows += at.row * channels + at.column;
    for (int t = 0; t < at.tokens; t++, rows += channels, columns += W)
        store(columns, at.width == W ? load(rows) : load(rows, at.width));
}

inline void put(const float *columns, int64_t channels, Place at, float *rows) {
    rows += at.row * channels + at.column;
    for (int t = 0; t < at.tokens; t++, rows += channels, columns += W) {
        if (at.width == W)
            store(rows, load(columns));
        else
            store(rows, load(columns), at.width);
    }
}

// Some averages of a group over a block. x and y (tokens, W), y is added to; state goes from before the block to after it.
template <bool RESETS>
inline void forward(const float *x, Coefficients c, const uint8_t *resets, int tokens, float *state, float *y) {
    Lane own[FORWARD], left[FORWARD], rate[FORWARD], gain[FORWARD], projection[FORWARD];
    bool passes = true;
    for (int n = 0; n < FORWARD; n++) {
        own[n] = Lane{}, left[n] = load(state + n * W);
        rate[n] = load(c.rate + n * W), gain[n] = load(c.gain + n * W), projection[n] = load(c.projection + n * W);
    }
    for (int t = 0; t < tokens; t++) {
        if (RESETS && resets[t]) {
            passes = false;
            for (int n = 0; n < FORWARD; n++) own[n] = left[n] = Lane{};
        }
        const Lane in = load(x + t * W);
        Lane out = load(y + t * W);
        for (int n = 0; n < FORWARD; n++) {
            own[n] = own[n] + rate[n] * own[n] + gain[n] * in;
            left[n] += rate[n] * left[n];
            out += projection[n] * (own[n] + left[n]);
        }
        store(y + t * W, out);
    }
    for (int n = 0; n < FORWARD; n++) {
        if (passes) own[n] += load(c.fade + n * W) * load(state + n * W);
        store(state + n * W, own[n]);
    }
}

// The same from the last token to the first. dy and dx (tokens, W), dx is added to, and so are the coefficients' gradients;
// before: states before the block; adjoint goes from the gradient of those after it to that of those before it.
template <bool RESETS>
inline void backward(const float *x, const float *dy, Coefficients c, const float *before, const uint8_t *resets,
                     int tokens, float *adjoint, float *dx, Gradients d) {
    Lane rate[BACKWARD], gain[BACKWARD], projection[BACKWARD];
    for (int n = 0; n < BACKWARD; n++)
        rate[n] = load(c.rate + n * W), gain[n] = load(c.gain + n * W), projection[n] = load(c.projection + n * W);
    // States that enter a token (none where a document begins), and those that leave it.
    alignas(64) float entering[TOKENS * BACKWARD * W], leaving[TOKENS * BACKWARD * W];
    Lane h[BACKWARD];
    for (int n = 0; n < BACKWARD; n++) h[n] = load(before + n * W);
    for (int t = 0; t < tokens; t++) {
        const Lane in = load(x + t * W);
        for (int n = 0; n < BACKWARD; n++) {
            if (RESETS && resets[t]) h[n] = Lane{};
            store(entering + (t * BACKWARD + n) * W, h[n]);
            h[n] = h[n] + rate[n] * h[n] + gain[n] * in;
            store(leaving + (t * BACKWARD + n) * W, h[n]);
        }
    }
    Lane own[BACKWARD], left[BACKWARD], of_rate[BACKWARD], of_gain[BACKWARD], of_projection[BACKWARD];
    bool passes = true;
    for (int n = 0; n < BACKWARD; n++) {
        own[n] = Lane{}, left[n] = load(adjoint + n * W);
        of_rate[n] = of_gain[n] = of_projection[n] = Lane{};
    }
    for (int t = tokens - 1; t >= 0; t--) {
        const Lane in = load(x + t * W), up = load(dy + t * W);
        Lane down = load(dx + t * W);
        for (int n = 0; n < BACKWARD; n++) {
            const int at = (t * BACKWARD + n) * W;
            of_projection[n] += up * load(leaving + at);
            own[n] += projection[n] * up;
            const Lane both = own[n] + left[n];
            down += gain[n] * both;
            of_gain[n] += both * in;
            of_rate[n] += both * load(entering + at);
            own[n] += rate[n] * own[n];
            left[n] += rate[n] * left[n];
        }
        store(dx + t * W, down);
        if (RESETS && resets[t]) {
            passes = false;
            for (int n = 0; n < BACKWARD; n++) own[n] = left[n] = Lane{};
        }
    }
    for (int n = 0; n < BACKWARD; n++) {
        if (passes) own[n] += load(c.fade + n * W) * load(adjoint + n * W);
        store(adjoint + n * W, own[n]);
        store(d.rate + n * W, load(d.rate + n * W) + of_rate[n]);
        store(d.gain + n * W, load(d.gain + n * W) + of_gain[n]);
        store(d.projection + n * W, load(d.projection + n * W) + of_projection[n]);
    }
}

}  // namespace

extern "C" {

int mega_ema_tokens() { return TOKENS; }
// Numbers of a sequence's states before a block: (G, P, W).
int64_t mega_ema_states(int64_t channels, int64_t averages) { return Sizes{1, 1, channels, averages}.all_states(); }

// x and y (B, L, D); coefficients (5, D, N): rate, gain, projection, what a whole block and what the last one leaves of a
// state; resets (B, L) or null; state (B, D, N), from before x to after it; befores (B, M, G, P, W), states before every
// block, or null.
void mega_ema_forward(const float *x, const float *coefficients, const uint8_t *resets, float *state, float *y,
                      float *befores, int64_t batch, int64_t length, int64_t channels, int64_t averages,
                      int64_t threads) {
    const Sizes sizes{batch, length, channels, averages};
    const Grouped grouped(sizes, 5, coefficients), running(sizes, batch, state);
    const int64_t all = sizes.all_states();
    share(sizes.groups(), threads, [&](int64_t first, int64_t end) {
        alignas(64) float in[TOKENS * W], out[TOKENS * W];
        for (int64_t b = 0; b < sizes.batch; b++)
            for (int64_t m = 0; m < sizes.blocks(); m++)
                for (int64_t g = first; g < end; g++) {
                    const Place at = place(sizes, b, m, g);
                    float *own = running.data() + b * all + g * sizes.state();
                    if (befores)
                        std::memcpy(befores + (b * sizes.blocks() + m) * all + g * sizes.state(), own,
                                    sizes.state() * sizeof(float));
                    take(x, sizes.channels, at, in);
                    std::memset(out, 0, sizeof out);
                    for (int64_t n = 0; n < sizes.averages; n += FORWARD) {
                        const float *c = grouped.data() + g * sizes.state() + n * W;
                        const Coefficients some{c, c + all, c + 2 * all, c + (m + 1 < sizes.blocks() ? 3 : 4) * all};
                        if (resets)
                            forward<true>(in, some, resets + at.row, at.tokens, own + n * W, out);
                        else
                            forward<false>(in, some, nullptr, at.tokens, own + n * W, out);
                    }
                    put(out, sizes.channels, at, y);
                }
    });
    running.write(state);
}

// As above; dy and dx (B, L, D); adjoint (B, D, N), the gradient of the states after x, then of those before it;
// gradients (3, D, N), of the first three.
void mega_ema_backward(const float *x, const float *dy, const float *coefficients, const float *befores,
                       const uint8_t *resets, float *adjoint, float *dx, float *gradients, int64_t batch, int64_t length,
                       int64_t channels, int64_t averages, int64_t threads) {
    const Sizes sizes{batch, length, channels, averages};
    const Grouped grouped(sizes, 5, coefficients), running(sizes, batch, adjoint), sums(sizes, 3, nullptr);
    const int64_t all = sizes.all_states();
    share(sizes.groups(), threads, [&](int64_t first, int64_t end) {
        alignas(64) float in[TOKENS * W], up[TOKENS * W], down[TOKENS * W];
        for (int64_t b = 0; b < sizes.batch; b++)
            for (int64_t m = sizes.blocks() - 1; m >= 0; m--)
                for (int64_t g = first; g < end; g++) {
                    const Place at = place(sizes, b, m, g);
                    take(x, sizes.channels, at, in);
                    take(dy, sizes.channels, at, up);
                    std::memset(down, 0, sizeof down);
                    for (int64_t n = 0; n < sizes.averages; n += BACKWARD) {
                        const int64_t offset = g * sizes.state() + n * W;
                        const float *c = grouped.data() + offset;
                        const float *before = befores + (b * sizes.blocks() + m) * all + offset;
                        const Coefficients some{c, c + all, c + 2 * all, c + (m + 1 < sizes.blocks() ? 3 : 4) * all};
                        float *d = sums.data() + offset, *own = running.data() + b * all + offset;
                        const Gradients of_some{d, d + all, d + 2 * all};
                        if (resets)
                            backward<true>(in, up, some, before, resets + at.row, at.tokens, own, down, of_some);
                        else
                            backward<false>(in, up, some, before, nullptr, at.tokens, own, down, of_some);
                    }
                    put(down, sizes.channels, at, dx);
                }
    });
    running.write(adjoint);
    sums.write(gradients);
}

}  // extern "C"
