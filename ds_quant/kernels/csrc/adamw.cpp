// One AdamW step of many parameters, bit for bit that of numerics/adam.py. Called by cpu.py through ctypes.
//
// A tensor whose blocks are short goes in units of whole blocks: decode, step, maxima, encode, all in buffers in L1,
// one pass over memory. One with long blocks (granularity "tensor" or "channel") goes in two: the first computes new
// moments only for their maxima, the second computes them again and stores them.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "adamw.h"
#include "moment.h"
#include "threads.h"

// No floating point in here: between stages of AVX, instructions of plain x86-64 would wait for each other.
namespace {

constexpr int64_t MIN_FUSED = 64;  // blocks of the fused front are multiples of this

Moment moment_of(const Entry& e, const MomentFormat& format, int which) {
    return {format, e.codes[which], e.scale[which], e.numel, e.block_size[which], e.key + 2 * which,
            e.stream + which, static_cast<bool>(e.stochastic >> which & 1)};
}

// One parameter of the call.
struct Job {
    Dtype param_dtype, grad_dtype;
    char* param;
    const char* grad;
    int8_t* low_bits;
    uint32_t param_key[2];
    bool param_is_stochastic, param_is_master;  // masters of 16 bits that are rounded to nearest are plain bf16
    int64_t numel;
    Moment moments[2];
    Scalars scalars;

    Job(const Entry& e, const Format& f)
        : param_dtype(static_cast<Dtype>(f.param_dtype)),
          grad_dtype(static_cast<Dtype>(f.grad_dtype)),
          param(static_cast<char*>(e.param)),
          grad(static_cast<const char*>(e.grad)),
          low_bits(e.low_bits),
          param_key{e.param_key[0], e.param_key[1]},
          param_is_stochastic(e.stochastic >> 2 & 1),
          param_is_master(low_bits || param_is_stochastic),
          numel(e.numel),
          moments{moment_of(e, f.exp_avg, 0), moment_of(e, f.exp_avg_sq, 1)},
          scalars{static_cast<float>(e.beta1),     static_cast<float>(1.0 - e.beta1), static_cast<float>(e.beta2),
                  static_cast<float>(1.0 - e.beta2), static_cast<float>(e.eps),       static_cast<float>(e.decay),
                  static_cast<float>(e.step_size), static_cast<float>(e.correction)} {}

    // Elements of a unit, a multiple of both block sizes; 0: two passes are needed.
    int64_t unit() const {
        int64_t low = std::min(moments[0].block_size, moments[1].block_size);
        int64_t high = std::max(moments[0].block_size, moments[1].block_size);
        if (high > TILE || high % low) return 0;
        return std::max<int64_t>(1, UNIT / high) * high;
    }

    // fp32 values of n elements; a pointer to them, in memory or in `buffer`.
    float* load_param(const Stages& stages, int64_t element, int64_t n, float* buffer) const {
        char* from = param + element * itemsize(param_dtype);
        if (param_dtype == FLOAT32) return reinterpret_cast<float*>(from);
        if (param_is_master)
            stages.join(masters(element, n, buffer));
        else
            stages.load(param_dtype, from, buffer, n);
        return buffer;
    }

    // Rounds what `load_param` gave to where it came from.
    void store_param(const Stages& stages, int64_t element, int64_t n, float* values) const {
        if (param_dtype == FLOAT32) return;
        if (param_is_master)
            stages.split(masters(element, n, values));
        else
            stages.store(param_dtype, values, param + element * itemsize(param_dtype), n);
    }

    MastersRun masters(int64_t element, int64_t n, float* values) const {
        auto* weight = reinterpret_cast<uint16_t*>(param) + element;
        return {values, weight, low_bits ? low_bits + element : nullptr, n, {param_key[0], param_key[1]},
                static_cast<uint32_t>(element), param_is_stochastic};
    }

    const float* load_grad(const Stages& stages, int64_t element, int64_t n, float* buffer) const {
        const char* from = grad + element * itemsize(grad_dtype);
        if (grad_dtype == FLOAT32) return reinterpret_cast<const float*>(from);
        stages.load(grad_dtype, from, buffer, n);
        return buffer;
    }

    // Steps the parameter; the new moments are left where `load` said.
    void update(const Stages& stages, int64_t element, int64_t n, float* const moment[2]) const {
        alignas(64) float param_buffer[TILE], grad_buffer[TILE];
        const float* g = load_grad(stages, element, n, grad_buffer);
        float* values = load_param(stages, element, n, param_buffer);
        stages.update(values, g, moment[0], moment[1], n, scalars);
        store_param(stages, element, n, values);
    }

    void step_unit(const Stages& stages, int64_t begin, int64_t n) const {
        alignas(64) float buffers[2][TILE];
        uint32_t absmax[2][TILE / MIN_FUSED];
        alignas(64) uint32_t words[2][TILE / 2];
        if (step_fused(stages, begin, n, buffers, absmax, words)) {
            for (int w = 0; w < 2; ++w) moments[w].store_fused(stages, begin, n, buffers[w], absmax[w], words[w]);
            return;
        }
        float* moment[2];
        for (int w = 0; w < 2; ++w) moment[w] = moments[w].load(stages, begin, n, buffers[w]);
        update(stages, begin, n, moment);
        for (int w = 0; w < 2; ++w) moments[w].store_blocks(stages, begin, n, moment[w], nullptr);
    }

    // What is read of the elements from `begin` on. A line is fetched twice where there are fewer streams.
    void set_streams(Stream (&streams)[STREAMS], int64_t begin) const {
        Stream* to = streams;
        auto add = [&](const void* from, int64_t bytes) {
            for (int64_t line = 0; line < bytes; line += 64)
                *to++ = {static_cast<const char*>(from) + begin * bytes / 32 + line, bytes};
        };
        add(param, 32 * itemsize(param_dtype));
        add(grad, 32 * itemsize(grad_dtype));
        if (low_bits) add(low_bits, 32);
        for (const Moment& m : moments) add(m.codes, 4 * m.format.bits);
        while (to < streams + STREAMS) *to++ = streams[0];
    }

    // Decodes, steps and finds the maxima at once; false where formats or blocks are not made for that.
    bool step_fused(
        const Stages& stages, int64_t begin, int64_t n, float (&buffers)[2][TILE],
        uint32_t (&absmax)[2][TILE / MIN_FUSED], uint32_t (&words)[2][TILE / 2]) const {
        FrontStage* stage = nullptr;
        for (const Moment& m : moments)
            if (m.is_fp32() || m.block_size % MIN_FUSED || n % m.block_size) return false;
        int64_t runs[2] = {moments[0].run(), moments[1].run()};
        if (std::max(runs[0], runs[1]) % std::min(runs[0], runs[1])) return false;
        if (!(stage = stages.front(moments[0].format, moments[1].format))) return false;
        alignas(64) float param_buffer[TILE], grad_buffer[TILE];
        const float* g = load_grad(stages, begin, n, grad_buffer);
        float* values = load_param(stages, begin, n, param_buffer);
        Front front{values, g, n, {}, &scalars, {}};
        set_streams(front.streams, begin);
        for (int w = 0; w < 2; ++w) {
            const Moment& m = moments[w];
            const float* scale = m.scale + begin / m.block_size * m.scales();
            uint32_t* draw_to = m.stochastic && m.back(stages, begin, n) ? words[w] : nullptr;
            Draws draws{{m.key[0], m.key[1]}, static_cast<uint64_t>(begin)};
            const uint8_t* codes = m.place(begin).codes;
            front.moments[w] = {&m.format, m.block_size, codes, scale, buffers[w], absmax[w], draw_to, draws};
        }
        stage(front);
        store_param(stages, begin, n, values);
        return true;
    }
};

// ---- one pass ------------------------------------------------------------------------------------------------------

void step_in_units(
    const Stages& stages, const Threads& threads, const Entry* entries, const Format* formats,
    const std::vector<int64_t>& chosen) {
    auto numel = [&](int64_t k) { return entries[chosen[k]].numel; };
    auto job_of = [&](int64_t k) {
        const Entry& e = entries[chosen[k]];
        return Job(e, formats[e.format]);
    };
    auto num_chosen = static_cast<int64_t>(chosen.size());
    Chunks chunks(num_chosen, numel, [&](int64_t k) { return job_of(k).unit(); });
    threads.for_each(chunks.count(), [&](int64_t i) {
        chunks.for_each_range(i, numel, [&](int64_t k, int64_t begin, int64_t end) {
            Job job = job_of(k);
            int64_t unit = job.unit();
            for (int64_t element = begin; element < end; element += unit)
                job.step_unit(stages, element, std::min(unit, end - element));
        });
    });
}

// ---- two passes ----------------------------------------------------------------------------------------------------

// Part of a tensor for one thread: two ranges of elements that share the bytes of 4-bit codes with each other only.
struct Piece {
    int64_t entry;
    int64_t begin[2], end[2];
    int64_t first_absmax;  // index of the tensor's first block in the array of maxima, exp_avg before exp_avg_sq
};

void add_pieces(std::vector<Piece>& pieces, const Job& job, int64_t entry, int64_t first_absmax) {
    int64_t sizes[2] = {job.moments[0].block_size, job.moments[1].block_size};
    int64_t block_size = std::max(sizes[0], sizes[1]);
    if (sizes[0] != sizes[1] && std::min(sizes[0], sizes[1]) > 1) {
        pieces.push_back({entry, {0, 0}, {job.numel, 0}, first_absmax});  // nobody has this; halves may overlap
        return;
    }
    for (int64_t begin = 0; begin < job.numel; begin += block_size) {
        int64_t length = std::min(block_size, job.numel - begin), half = ceil_div(length, 2);
        for (int64_t a = 0; a < half; a += CHUNK / 2) {
            int64_t b = std::min(half, a + CHUNK / 2);
            int64_t high_end = std::min(half + b, length);
            pieces.push_back({entry, {begin + a, begin + half + a}, {begin + b, begin + high_end}, first_absmax});
        }
    }
}

void raise_to(uint32_t& most, uint32_t value) {
    uint32_t seen = __atomic_load_n(&most, __ATOMIC_RELAXED);
    while (seen < value &&
           !__atomic_compare_exchange_n(&most, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

// n elements, within one block and one half of each moment. The first pass collects maxima, the second stores.
void step_run(
    const Stages& stages, const Job& job, int64_t element, int64_t n, const Place at[2], uint32_t* const absmax[2],
    bool store) {
    alignas(64) float buffers[2][TILE], grad_buffer[TILE];
    float* moment[2];
    for (int w = 0; w < 2; ++w) {
        moment[w] = job.moments[w].load(stages, element, n, buffers[w]);
        if (!store && job.moments[w].is_fp32()) {
            std::memcpy(buffers[w], moment[w], sizeof(float) * n);
            moment[w] = buffers[w];
        }
    }
    if (store)
        job.update(stages, element, n, moment);
    else
        stages.moments(job.load_grad(stages, element, n, grad_buffer), moment[0], moment[1], n, job.scalars);
    for (int w = 0; w < 2; ++w) {
        if (job.moments[w].is_fp32()) continue;
        uint32_t& most = absmax[w][at[w].block];
        if (store)
            job.moments[w].store_run(stages, at[w], element, moment[w], n, most);
        else
            raise_to(most, stages.absmax(moment[w], n));
    }
}

void step_in_two_passes(
    const Stages& stages, const Threads& threads, const Entry* entries, const Format* formats,
    const std::vector<int64_t>& chosen) {
    std::vector<Piece> pieces;
    int64_t num_blocks = 0;
    for (int64_t entry : chosen) {
        Job job(entries[entry], formats[entries[entry].format]);
        add_pieces(pieces, job, entry, num_blocks);
        num_blocks += job.moments[0].num_blocks() + job.moments[1].num_blocks();
    }
    std::vector<uint32_t> absmax(num_blocks, 0);
    for (bool store : {false, true}) {
        threads.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
            const Piece& piece = pieces[i];
            Job job(entries[piece.entry], formats[entries[piece.entry].format]);
            uint32_t* first = absmax.data() + piece.first_absmax;
            uint32_t* const maxima[2] = {first, first + job.moments[0].num_blocks()};
            for (int range = 0; range < 2; ++range) {
                for (int64_t element = piece.begin[range]; element < piece.end[range];) {
                    Place at[2] = {};
                    int64_t n = std::min(TILE, piece.end[range] - element);
                    for (int w = 0; w < 2; ++w) {
                        if (job.moments[w].is_fp32()) continue;
                        at[w] = job.moments[w].place(element);
                        n = std::min(n, at[w].length);
                    }
                    step_run(stages, job, element, n, at, maxima, store);
                    element += n;
                }
            }
        });
    }
    int64_t done = 0;
    for (int64_t entry : chosen) {
        Job job(entries[entry], formats[entries[entry].format]);
        for (const Moment& moment : job.moments)
            for (int64_t block = 0; block < moment.num_blocks(); ++block) moment.set_scale(block, absmax[done++]);
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The widest instruction set that this processor and system have: 0 plain, 1 avx2, 2 avx512.
int ds_quant_widest_isa() {
#ifdef DS_QUANT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// Sizes of the structures, for cpu.py to compare with what it packs.
int64_t ds_quant_entry_size() { return sizeof(Entry); }
int64_t ds_quant_format_size() { return sizeof(Format); }

// 0, or 1 where memory ran out.
int ds_quant_adamw(
    const Entry* entries, int64_t num_entries, const Format* formats, int isa, Parallel parallel, int num_threads) try {
    const Stages& stages = *ds_quant_stages(isa);
    Threads threads{parallel, num_threads};
    std::vector<int64_t> in_units, in_two_passes;
    for (int64_t i = 0; i < num_entries; ++i) {
        if (entries[i].numel == 0) continue;
        bool fits = Job(entries[i], formats[entries[i].format]).unit() > 0;
        (fits ? in_units : in_two_passes).push_back(i);
    }
    step_in_two_passes(stages, threads, entries, formats, in_two_passes);
    step_in_units(stages, threads, entries, formats, in_units);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// For tests: random numbers of n elements from `index` on, and a subkey in place of a key.
void ds_quant_uniform16(int isa, const uint32_t* key, uint64_t index, uint32_t* to, int64_t n) {
    ds_quant_stages(isa)->uniform16(Draws{{key[0], key[1]}, index}, to, n);
}

void ds_quant_derive_key(uint32_t* key, uint64_t stream) { derive_key(key, stream); }
}
#pragma GCC visibility pop
