// How the drivers share work out to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1 << 15;  // elements that a thread takes at a time

// GOMP_parallel of the OpenMP runtime that torch has loaded, so that the process has one pool of threads.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

struct Threads {
    Parallel parallel;  // null: one thread
    int count;

    // Calls body(i) for i = 0 to count - 1, each once, in no order.
    template <class Body>
    void for_each(int64_t num_items, const Body& body) const {
        struct Shared {
            const Body& body;
            int64_t num_items;
            std::atomic<int64_t> next;
        } shared{body, num_items, {0}};
        auto run = [](void* data) {
            auto& s = *static_cast<Shared*>(data);
            for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.num_items;) s.body(i);
        };
        auto num_threads = static_cast<unsigned>(std::min<int64_t>(count, num_items));
        if (parallel && num_threads > 1)
            parallel(run, &shared, num_threads, 0);
        else
            run(&shared);
    }
};

// Rows in chunks of about `elements`.
struct RowChunks {
    int64_t num_rows, size, count;

    RowChunks(int64_t rows, int64_t columns, int64_t elements)
        : num_rows(rows), size(std::max<int64_t>(1, elements / std::max<int64_t>(1, columns))),
          count((rows + size - 1) / size) {}

    template <class Body>
    void for_each(const Threads& threads, const Body& body) const {
        threads.for_each(count, [&](int64_t chunk) { body(chunk * size, std::min(num_rows, (chunk + 1) * size)); });
    }

    // Calls body(slot, begin, end), at no time twice at once with one of the slots from 0 to num_slots - 1.
    template <class Body>
    void for_each_in_slots(const Threads& threads, int64_t num_slots, const Body& body) const {
        std::atomic<int64_t> next{0};
        threads.for_each(num_slots, [&](int64_t slot) {
            for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                body(slot, chunk * size, std::min(num_rows, (chunk + 1) * size));
        });
    }
};

// Items of any number of elements, cut into chunks of about CHUNK: a part of an item, or many small ones. A cut within
// an item is at a multiple of its unit.
class Chunks {
public:
    template <class Numel, class Unit>
    Chunks(int64_t num_items, const Numel& numel, const Unit& unit) {
        int64_t filled = CHUNK;
        for (int64_t item = 0; item < num_items; ++item) {
            int64_t size = unit(item), step = std::max<int64_t>(1, CHUNK / size) * size;
            for (int64_t element = 0; element < numel(item); element += step) {
                if (filled >= CHUNK) {
                    starts.push_back({item, element});
                    filled = 0;
                }
                filled += std::min(step, numel(item) - element);
            }
        }
        starts.push_back({num_items, 0});
    }

    int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }

    // Calls body(item, begin, end) for the ranges of elements of a chunk.
    template <class Numel, class Body>
    void for_each_range(int64_t chunk, const Numel& numel, const Body& body) const {
        Start at = starts[chunk], end = starts[chunk + 1];
        for (; at.item < end.item; ++at.item, at.element = 0) body(at.item, at.element, numel(at.item));
        if (at.element < end.element) body(at.item, at.element, end.element);
    }

private:
    struct Start {
        int64_t item, element;
    };

    std::vector<Start> starts;  // chunk i reaches from starts[i] to starts[i + 1]
};

}  // namespace
