// Vector registers, and threads that share what is wide.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace lanes {

constexpr int W = WIDTH;  // floats of a register

typedef float Lane __attribute__((vector_size(W * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(W * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(W * sizeof(int32_t))));

inline Lane load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
inline void store(float *to, Lane lane) { *reinterpret_cast<Unaligned *>(to) = lane; }

// Where a row ends within a register.
inline Lane load(const float *from, int64_t numbers) {
    Lane lane{};
    std::memcpy(&lane, from, numbers * sizeof(float));
    return lane;
}
inline void store(float *to, Lane lane, int64_t numbers) { std::memcpy(to, &lane, numbers * sizeof(float)); }

// Threads share the groups: none writes what another reads, so results don't depend on their number.
template <typename Function>
void share(int64_t groups, int64_t threads, Function of_groups) {
    threads = std::max<int64_t>(1, std::min(threads, groups));
    std::vector<std::thread> others;
    int64_t begun = 1;
    try {
        for (; begun < threads; begun++)
            others.emplace_back(of_groups, groups * begun / threads, groups * (begun + 1) / threads);
    } catch (const std::system_error &) {  // the system gives no more threads
        of_groups(groups * begun / threads, groups);
    }
    of_groups(int64_t{0}, groups / threads);
    for (auto &other : others) other.join();
}

}  // namespace lanes
