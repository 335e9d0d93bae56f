// What all C++ files share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

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

}  // namespace
