// The damped EMA on a CPU, as its recurrence for many channels at a time: h += rate h + gain x, y = sum of projection h;
// complex: y = Re sum of projection h.
//
// A group of W channels fills vector registers, and so do some of its averages' states while a block of TOKENS tokens
// goes by. rate = q - 1, as q itself rounds to 1 for the slowest averages. What a block adds to a state and what is left of
// the state before it are walked apart, and the latter is found anew at the block's end, by q to the power of its tokens,
// in double: so rounding counts neither tokens nor blocks. A complex number is two lanes: states keep their imaginary parts
// behind all real ones.
//
// T is the type of tokens: float, and of complex averages double, too.
//
// Legend: B batch, L length, D channels, N averages per channel, P those padded to a multiple of PADDING; G groups, M blocks;
// C parts of a number: 1, or 2 where it is complex.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "native.h"

namespace {

constexpr int W = WIDTH;  // floats of a register

// GCC knows vectors of a template's type only by name.
template <typename T>
struct Vector;
template <>
struct Vector<float> {
    typedef float Lane __attribute__((vector_size(W * sizeof(float))));
    typedef float Unaligned __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
};
template <>
struct Vector<double> {
    typedef double Lane __attribute__((vector_size(W * sizeof(double))));
    typedef double Unaligned __attribute__((vector_size(W * sizeof(double)), aligned(sizeof(double)), may_alias));
};
template <typename T>
using Lane = typename Vector<T>::Lane;

template <typename T>
inline Lane<T> load(const T *from) {
    return *reinterpret_cast<const typename Vector<T>::Unaligned *>(from);
}
template <typename T>
inline void store(T *to, Lane<T> lane) {
    *reinterpret_cast<typename Vector<T>::Unaligned *>(to) = lane;
}
template <typename T>
inline void add(T *to, Lane<T> lane) {
    store(to, load(to) + lane);
}
template <typename T>
inline Lane<T> narrow(const double *from) {
    alignas(64) T numbers[W];
    for (int w = 0; w < W; w++) numbers[w] = static_cast<T>(from[w]);
    return load(numbers);
}

// Long enough that keeping a state a block costs little, short enough that a block's rows share few pages of memory.
constexpr int TOKENS = 32, PADDING = 8;
// Averages at a time: forward they hide each other's latency, backward they leave registers for their gradients.
constexpr int forward_averages(int parts) { return 8 / parts; }
constexpr int backward_averages(int parts) { return 4 / parts; }

struct Sizes {
    int64_t batch, length, channels, averages;
    int64_t groups() const { return (channels + W - 1) / W; }
    int64_t blocks() const { return (length + TOKENS - 1) / TOKENS; }
    int64_t padded() const { return (averages + PADDING - 1) / PADDING * PADDING; }
    int64_t reals() const { return padded() * W; }           // of a group
    int64_t all_reals() const { return groups() * reals(); }  // of a sequence
};

// So many rows of numbers (D, N, C) as (G, C, P, W), filled up with zeros.
template <typename T, int C>
class Grouped {
    struct Free {
        void operator()(T *all) const { ::operator delete[](all, std::align_val_t{64}); }
    };
    const Sizes sizes;
    const int64_t rows;
    std::unique_ptr<T[], Free> all;

    template <typename Function>
    void each(Function of_pair) const {  // of places in groups and in rows
        for (int64_t row = 0; row < rows; row++)
            for (int64_t d = 0; d < sizes.channels; d++)
                for (int64_t n = 0; n < sizes.averages; n++)
                    for (int64_t c = 0; c < C; c++)
                        of_pair(row * C * sizes.all_reals() + (d / W * C + c) * sizes.reals() + n * W + d % W,
                                ((row * sizes.channels + d) * sizes.averages + n) * C + c);
    }

  public:
    template <typename From>
    Grouped(const Sizes &sizes, int64_t rows, const From *from)
        : sizes(sizes), rows(rows), all(new (std::align_val_t{64}) T[rows * C * sizes.all_reals()]()) {
        if (from) each([&](int64_t in, int64_t out) { all[in] = static_cast<T>(from[out]); });
    }
    T *data() const { return all.get(); }
    template <typename To>
    void write(To *to) const {
        each([&](int64_t in, int64_t out) { to[out] = static_cast<To>(all[in]); });
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
template <typename T>
inline void take(const T *rows, int64_t channels, Place at, T *columns) {
    rows += at.row * channels + at.column;
    for (int t = 0; t < at.tokens; t++, rows += channels, columns += W) {
        if (at.width == W) {
            store(columns, load(rows));
        } else {
            std::memset(columns, 0, W * sizeof(T));
            std::memcpy(columns, rows, at.width * sizeof(T));
        }
    }
}

template <typename T>
inline void put(const T *columns, int64_t channels, Place at, T *rows) {
    rows += at.row * channels + at.column;
    for (int t = 0; t < at.tokens; t++, rows += channels, columns += W) {
        if (at.width == W)
            store(rows, load(columns));
        else
            std::memcpy(rows, columns, at.width * sizeof(T));
    }
}

// Rows of coefficients and of their gradients, in the order of Python's; the imaginary ones come last.
enum { RATE, GAIN, PROJECTION, ROTATION, PROJECTION_IMAG };
constexpr int coefficient_rows(int parts) { return parts == 2 ? 5 : 3; }

// Of some averages of a group: each row (., W), `row` numbers apart; fade is what a block leaves of a state, its
// imaginary part `row` numbers behind its real one.
template <typename T>
struct Coefficients {
    const T *all;
    const double *fade;
    int64_t row;
    Lane<T> operator()(int which, int n) const { return load(all + which * row + n * W); }
};

// Where averages' states are, doubles (C, P, W).
struct State {
    double *real, *imaginary;
    State at(int n) const { return {real + n * W, imaginary + n * W}; }
};

// A number, real or complex, of each channel.
template <typename T, int C>
struct Number {
    Lane<T> part[C];

    // To q times itself; q is rate + 1, and of complex averages rate + 1 + i rotation.
    void turn(Lane<T> rate, Lane<T> rotation) {
        const Lane<T> real = part[0];
        part[0] = real + rate * real;
        if constexpr (C == 2) {
            const Lane<T> imaginary = part[1];
            part[0] -= rotation * imaginary;
            part[1] = imaginary + rate * imaginary + rotation * real;
        }
    }
};

// What lies before a block, times what it leaves of it unless a document begins in it, plus what the block adds. For the
// adjoint, which goes backward, the fade is its conjugate: sign is -1.
template <typename T, int C>
inline void pass(State state, const double *fade, int64_t row, bool passes, const Number<T, C> &own, double sign) {
    alignas(64) T added[C][W];
    for (int c = 0; c < C; c++) store(added[c], own.part[c]);
    for (int w = 0; w < W; w++) {
        const double real = passes ? state.real[w] : 0;
        if constexpr (C == 2) {
            const double imaginary = passes ? state.imaginary[w] : 0, turned = sign * fade[row + w];
            state.real[w] = fade[w] * real - turned * imaginary + added[0][w];
            state.imaginary[w] = fade[w] * imaginary + turned * real + added[1][w];
        } else {
            state.real[w] = fade[w] * real + added[0][w];
        }
    }
}

// Some averages of a group over a block. x and y (tokens, W), y is added to; state goes from before the block to after it.
template <typename T, int C, bool RESETS>
inline void forward(const T *x, Coefficients<T> c, const uint8_t *resets, int tokens, State state, T *y) {
    constexpr int SOME = forward_averages(C);
    Number<T, C> own[SOME], left[SOME];  // the latter times the projection
    Lane<T> rate[SOME], gain[SOME], projection[SOME], rotation[SOME], imaginary[SOME];
    bool passes = true;
    for (int n = 0; n < SOME; n++) {
        own[n] = Number<T, C>{};
        rate[n] = c(RATE, n), gain[n] = c(GAIN, n), projection[n] = c(PROJECTION, n);
        const Lane<T> before = narrow<T>(state.at(n).real);
        left[n].part[0] = projection[n] * before;
        if constexpr (C == 2) {
            rotation[n] = c(ROTATION, n), imaginary[n] = c(PROJECTION_IMAG, n);
            const Lane<T> other = narrow<T>(state.at(n).imaginary);
            left[n].part[0] -= imaginary[n] * other;
            left[n].part[1] = imaginary[n] * before + projection[n] * other;
        }
    }
    for (int t = 0; t < tokens; t++) {
        if (RESETS && resets[t]) {
            passes = false;
            for (int n = 0; n < SOME; n++) own[n] = left[n] = Number<T, C>{};
        }
        const Lane<T> in = load(x + t * W);
        Lane<T> out = load(y + t * W);
        for (int n = 0; n < SOME; n++) {
            own[n].turn(rate[n], rotation[n]);
            own[n].part[0] += gain[n] * in;
            left[n].turn(rate[n], rotation[n]);
            out += left[n].part[0] + projection[n] * own[n].part[0];
            if constexpr (C == 2) out -= imaginary[n] * own[n].part[1];
        }
        store(y + t * W, out);
    }
    for (int n = 0; n < SOME; n++) pass(state.at(n), c.fade + n * W, c.row, passes, own[n], 1);
}

// The same from the last token to the first. dy and dx (tokens, W), dx is added to, and so are the coefficients' gradients d;
// before: states before the block, a row apart as d's rows are; adjoint goes from the gradient of those after it to that
// of those before it.
template <typename T, int C, bool RESETS>
inline void backward(const T *x, const T *dy, Coefficients<T> c, const T *before, int64_t before_row,
                     const uint8_t *resets, int tokens, State adjoint, T *dx, T *d) {
    constexpr int SOME = backward_averages(C);
    Lane<T> rate[SOME], gain[SOME], projection[SOME], rotation[SOME], imaginary[SOME];
    // States before the block and after each of its tokens.
    alignas(64) T states[(TOKENS + 1) * SOME * C * W];
    Number<T, C> h[SOME];
    for (int n = 0; n < SOME; n++) {
        rate[n] = c(RATE, n), gain[n] = c(GAIN, n), projection[n] = c(PROJECTION, n);
        if constexpr (C == 2) rotation[n] = c(ROTATION, n), imaginary[n] = c(PROJECTION_IMAG, n);
        for (int i = 0; i < C; i++) {
            h[n].part[i] = load(before + i * before_row + n * W);
            store(states + (n * C + i) * W, h[n].part[i]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        const Lane<T> in = load(x + t * W);
        for (int n = 0; n < SOME; n++) {
            if (RESETS && resets[t]) h[n] = Number<T, C>{};
            h[n].turn(rate[n], rotation[n]);
            h[n].part[0] += gain[n] * in;
            for (int i = 0; i < C; i++) store(states + (((t + 1) * SOME + n) * C + i) * W, h[n].part[i]);
        }
    }
    Number<T, C> own[SOME], left[SOME], of_projection[SOME], of_q[SOME];
    Lane<T> of_gain[SOME];
    bool passes = true;
    for (int n = 0; n < SOME; n++) {
        own[n] = of_projection[n] = of_q[n] = Number<T, C>{}, of_gain[n] = Lane<T>{};
        left[n].part[0] = narrow<T>(adjoint.at(n).real);
        if constexpr (C == 2) left[n].part[1] = narrow<T>(adjoint.at(n).imaginary);
    }
    for (int t = tokens - 1; t >= 0; t--) {
        const Lane<T> in = load(x + t * W), up = load(dy + t * W);
        Lane<T> down = load(dx + t * W);
        const bool opens = RESETS && resets[t];
        for (int n = 0; n < SOME; n++) {
            const T *entering = states + (t * SOME + n) * C * W, *leaving = entering + SOME * C * W;
            of_projection[n].part[0] += up * load(leaving);
            own[n].part[0] += projection[n] * up;
            const Lane<T> both = own[n].part[0] + left[n].part[0];
            down += gain[n] * both;
            of_gain[n] += both * in;
            if (!opens) of_q[n].part[0] += both * load(entering);
            if constexpr (C == 2) {  // a gradient is that by the real part plus i times that by the imaginary part
                of_projection[n].part[1] -= up * load(leaving + W);
                own[n].part[1] -= imaginary[n] * up;
                const Lane<T> other = own[n].part[1] + left[n].part[1];
                if (!opens) {
                    of_q[n].part[0] += other * load(entering + W);
                    of_q[n].part[1] += other * load(entering) - both * load(entering + W);
                }
            }
            own[n].turn(rate[n], -rotation[n]);
            left[n].turn(rate[n], -rotation[n]);
        }
        store(dx + t * W, down);
        if (opens) {
            passes = false;
            for (int n = 0; n < SOME; n++) own[n] = left[n] = Number<T, C>{};
        }
    }
    for (int n = 0; n < SOME; n++) {
        pass(adjoint.at(n), c.fade + n * W, c.row, passes, own[n], -1);
        T *of = d + n * W;
        add(of + RATE * c.row, of_q[n].part[0]), add(of + GAIN * c.row, of_gain[n]);
        add(of + PROJECTION * c.row, of_projection[n].part[0]);
        if constexpr (C == 2) {
            add(of + ROTATION * c.row, of_q[n].part[1]);
            add(of + PROJECTION_IMAG * c.row, of_projection[n].part[1]);
        }
    }
}

// Tensors of a call, as Python hands them over.
struct Tensors {
    const void *x, *dy;
    const double *coefficients;
    const uint8_t *resets;
    void *state, *out, *befores, *gradients;
};

// What both passes hold, by groups: coefficients, fades, and states before or adjoints after the block at hand.
template <typename T, int C>
struct Call {
    const Sizes sizes;
    const uint8_t *resets;
    const Grouped<T, 1> coefficients;
    const Grouped<double, 1> fades;  // of a whole block and of the last one
    const Grouped<double, C> running;

    Call(const Sizes &sizes, const Tensors &given)
        : sizes(sizes), resets(given.resets), coefficients(sizes, coefficient_rows(C), given.coefficients),
          fades(sizes, 2 * C, given.coefficients + coefficient_rows(C) * sizes.channels * sizes.averages),
          running(sizes, sizes.batch, static_cast<const T *>(given.state)) {}

    double *state(int64_t b, int64_t g) const { return running.data() + (b * sizes.groups() + g) * C * sizes.reals(); }
    int64_t before(int64_t b, int64_t m, int64_t g) const {  // of those that are kept
        return ((b * sizes.blocks() + m) * sizes.groups() + g) * C * sizes.reals();
    }
    State some_state(int64_t b, int64_t g, int64_t n) const {
        double *all = state(b, g) + n * W;
        return {all, all + sizes.reals()};
    }
    Coefficients<T> some(int64_t m, int64_t g, int64_t n) const {
        const int64_t all = sizes.all_reals(), offset = g * sizes.reals() + n * W;
        return {coefficients.data() + offset, fades.data() + (m + 1 < sizes.blocks() ? 0 : C) * all + offset, all};
    }
};

template <typename T, int C>
void forward_rows(const Sizes &sizes, const Tensors &given, int64_t threads) {
    const Call<T, C> call(sizes, given);
    const T *x = static_cast<const T *>(given.x);
    T *y = static_cast<T *>(given.out), *befores = static_cast<T *>(given.befores);
    share(sizes.groups(), threads, [&](int64_t first, int64_t end) {
        alignas(64) T in[TOKENS * W], out[TOKENS * W];
        for (int64_t b = 0; b < sizes.batch; b++)
            for (int64_t m = 0; m < sizes.blocks(); m++)
                for (int64_t g = first; g < end; g++) {
                    const Place at = place(sizes, b, m, g);
                    if (befores) {
                        T *kept = befores + call.before(b, m, g);
                        const double *own = call.state(b, g);
                        for (int64_t i = 0; i < C * sizes.reals(); i++) kept[i] = static_cast<T>(own[i]);
                    }
                    take(x, sizes.channels, at, in);
                    std::memset(out, 0, sizeof out);
                    for (int64_t n = 0; n < sizes.averages; n += forward_averages(C)) {
                        const Coefficients<T> some = call.some(m, g, n);
                        const State state = call.some_state(b, g, n);
                        if (call.resets)
                            forward<T, C, true>(in, some, call.resets + at.row, at.tokens, state, out);
                        else
                            forward<T, C, false>(in, some, nullptr, at.tokens, state, out);
                    }
                    put(out, sizes.channels, at, y);
                }
    });
    call.running.write(static_cast<T *>(given.state));
}

template <typename T, int C>
void backward_rows(const Sizes &sizes, const Tensors &given, int64_t threads) {
    const Call<T, C> call(sizes, given);
    const Grouped<T, 1> sums(sizes, coefficient_rows(C), static_cast<const T *>(nullptr));
    const T *x = static_cast<const T *>(given.x), *dy = static_cast<const T *>(given.dy);
    const T *befores = static_cast<const T *>(given.befores);
    T *dx = static_cast<T *>(given.out);
    share(sizes.groups(), threads, [&](int64_t first, int64_t end) {
        alignas(64) T in[TOKENS * W], up[TOKENS * W], down[TOKENS * W];
        for (int64_t b = 0; b < sizes.batch; b++)
            for (int64_t m = sizes.blocks() - 1; m >= 0; m--)
                for (int64_t g = first; g < end; g++) {
                    const Place at = place(sizes, b, m, g);
                    take(x, sizes.channels, at, in);
                    take(dy, sizes.channels, at, up);
                    std::memset(down, 0, sizeof down);
                    for (int64_t n = 0; n < sizes.averages; n += backward_averages(C)) {
                        const Coefficients<T> some = call.some(m, g, n);
                        const State adjoint = call.some_state(b, g, n);
                        const T *before = befores + call.before(b, m, g) + n * W;
                        T *d = sums.data() + g * sizes.reals() + n * W;
                        if (call.resets)
                            backward<T, C, true>(in, up, some, before, sizes.reals(), call.resets + at.row, at.tokens,
                                                 adjoint, down, d);
                        else
                            backward<T, C, false>(in, up, some, before, sizes.reals(), nullptr, at.tokens, adjoint, down,
                                                  d);
                    }
                    put(down, sizes.channels, at, dx);
                }
    });
    call.running.write(static_cast<T *>(given.state));
    sums.write(static_cast<T *>(given.gradients));
}

}  // namespace

extern "C" {

int mega_ema_tokens() { return TOKENS; }
// Numbers of a sequence's states before a block: (G, C, P, W).
int64_t mega_ema_states(int64_t channels, int64_t averages, int64_t parts) {
    return parts * Sizes{1, 1, channels, averages}.all_reals();
}

// x and y (B, L, D); coefficients (5, D, N): rate, gain, projection, what a whole block and what the last one leaves of a
// state; or complex (9, D, N): rate, gain, projection, imaginary part of q, of the projection, and the two fades, real and
// imaginary part each; resets (B, L) or null; state (B, D, N, C), from before x to after it; befores (B, M, G, C, P, W),
// states before every block, or null. All but coefficients are floats, or doubles if `wide`, which complex ones may be.
void mega_ema_forward(const void *x, const double *coefficients, const uint8_t *resets, void *state, void *y,
                      void *befores, int64_t batch, int64_t length, int64_t channels, int64_t averages, int64_t parts,
                      int64_t wide, int64_t threads) {
    const Sizes sizes{batch, length, channels, averages};
    const Tensors given{x, nullptr, coefficients, resets, state, y, befores, nullptr};
    (wide ? forward_rows<double, 2> : parts == 2 ? forward_rows<float, 2> : forward_rows<float, 1>)(sizes, given, threads);
}

// As above; dy and dx (B, L, D); adjoint (B, D, N, C), the gradient of the states after x, then of those before it;
// gradients (3 or 5, D, N), of the coefficients before the fades.
void mega_ema_backward(const void *x, const void *dy, const double *coefficients, void *befores, const uint8_t *resets,
                       void *adjoint, void *dx, void *gradients, int64_t batch, int64_t length, int64_t channels,
                       int64_t averages, int64_t parts, int64_t wide, int64_t threads) {
    const Sizes sizes{batch, length, channels, averages};
    const Tensors given{x, dy, coefficients, resets, adjoint, dx, befores, gradients};
    (wide ? backward_rows<double, 2> : parts == 2 ? backward_rows<float, 2> : backward_rows<float, 1>)(sizes, given, threads);
}

}  // extern "C"
