// Times the DCNv3 kernels on the four stages of InternImage-T in FP16, and checks each against the same code on the CPU.
//
//   dcnv3_gpu [short]     prints one JSON object per measurement; `short` runs each kernel once, for compute-sanitizer
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../plugins_trt/csrc/dcnv3_launch.h"

using namespace deploycc;

namespace {

#define CUDA_OK(call)                                                                                     \
    do {                                                                                                  \
        const cudaError_t status = (call);                                                                \
        if (status != cudaSuccess) {                                                                      \
            std::printf("{\"error\": \"%s at line %d\"}\n", cudaGetErrorString(status), __LINE__);        \
            std::exit(1);                                                                                 \
        }                                                                                                 \
    } while (false)

// The published kernels' way, written afresh: one thread per channel, loops and border branches at run time, 32-bit indices.
__global__ void one_channel_per_thread(const __grid_constant__ Problem p, int total) {
    for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < total; index += gridDim.x * blockDim.x) {
        const int channel = index % p.channels, column = index / p.channels % static_cast<int>(p.columns.divisor);
        const int row = index / p.channels / p.columns.divisor % p.rows.divisor, image = index / p.channels / p.columns.divisor / p.rows.divisor;
        const int group = channel / p.channels_per_group, pixel = (image * p.rows.divisor + row) * p.columns.divisor + column;
        const __half* x = static_cast<const __half*>(p.x) + static_cast<long long>(image) * p.image_elements + channel;
        const __half* offset = static_cast<const __half*>(p.offset) + (pixel * p.groups.divisor + group) * p.offset_row;
        const __half* mask = static_cast<const __half*>(p.mask) + (pixel * p.groups.divisor + group) * p.mask_row;
        float sum = 0.0f;
        for (int i = 0; i < p.kernel_w; ++i) {
            for (int j = 0; j < p.kernel_h; ++j) {
                const int k = i * p.kernel_h + j;
                const float px = p.first_w + column * p.stride_w + (i * p.dilation_w - p.reach_w + __half2float(offset[2 * k])) * p.offset_scale;
                const float py = p.first_h + row * p.stride_h + (j * p.dilation_h - p.reach_h + __half2float(offset[2 * k + 1])) * p.offset_scale;
                if (px > -1 && py > -1 && px < p.width && py < p.height) {
                    const int x0 = floorf(px), y0 = floorf(py);
                    const float lx = px - x0, ly = py - y0;
                    float value = 0.0f;
                    for (int corner = 0; corner < 4; ++corner) {
                        const int xc = x0 + corner % 2, yc = y0 + corner / 2;
                        if (xc >= 0 && yc >= 0 && xc < p.width && yc < p.height) {
                            value += (corner % 2 ? lx : 1 - lx) * (corner / 2 ? ly : 1 - ly) * __half2float(x[(yc * p.width + xc) * p.channels]);
                        }
                    }
                    sum += __half2float(mask[k]) * value;
                }
            }
        }
        static_cast<__half*>(p.y)[index] = __float2half_rn(sum);
    }
}

struct Case {
    int size, channels, group, batch;
    std::int64_t pixels() const { return std::int64_t{batch} * size * size; }
};

std::vector<Half> numbers(std::size_t count, float spread, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, spread);
    std::vector<Half> made(count);
    for (auto& value : made) {
        value = from_float<Half>(normal(random));
    }
    return made;
}

Half* on_device(const std::vector<Half>& values) {
    void* made = nullptr;
    CUDA_OK(cudaMalloc(&made, values.size() * sizeof(Half)));
    CUDA_OK(cudaMemcpy(made, values.data(), values.size() * sizeof(Half), cudaMemcpyHostToDevice));
    return static_cast<Half*>(made);
}

Operand operand(void* data, std::int64_t n, std::int64_t h, std::int64_t w, std::int64_t c) { return {data, Type::kHalf, {n, h, w, c}}; }

template <class Launch>
float microseconds(Launch launch, int rounds) {
    for (int i = 0; i < 5; ++i) {
        launch();
    }
    cudaEvent_t start, stop;
    CUDA_OK(cudaEventCreate(&start));
    CUDA_OK(cudaEventCreate(&stop));
    CUDA_OK(cudaEventRecord(start));
    for (int i = 0; i < rounds; ++i) {
        launch();
    }
    CUDA_OK(cudaEventRecord(stop));
    CUDA_OK(cudaEventSynchronize(stop));
    float milliseconds = 0.0f;
    CUDA_OK(cudaEventElapsedTime(&milliseconds, start, stop));
    return milliseconds * 1000.0f / rounds;
}

// The largest difference to the CPU on some items spread over the whole problem, in units of the largest value.
template <class Compute>
double difference(const Problem& device, const Problem& host, std::vector<Half>& y, Compute compute) {
    std::vector<Half> found(y.size());
    CUDA_OK(cudaMemcpy(found.data(), device.y, found.size() * sizeof(Half), cudaMemcpyDeviceToHost));
    double worst = 0.0, largest = 0.0;
    const int width = host.channels_per_group / static_cast<int>(host.blocks.divisor);
    for (std::int64_t item = 0; item < host.items; item += host.items / 997 + 1) {
        compute(host, item);
        for (int v = 0; v < width; ++v) {
            const double exact = to_float(y[item * width + v]);
            worst = std::max(worst, std::fabs(exact - to_float(found[item * width + v])));
            largest = std::max(largest, std::fabs(exact));
        }
    }
    return worst / std::max(largest, 1e-6);
}

void measure(const Case& c, bool brief) {
    const std::int64_t pixels = c.pixels(), values = pixels * c.channels, records = pixels * c.group * 32;
    auto x = numbers(values, 1.0f, 1), record = numbers(records, 1.0f, 2), y = numbers(values, 0.0f, 3);
    auto offset = numbers(pixels * c.group * 18, 1.0f, 4), mask = numbers(pixels * c.group * 9, 0.1f, 5);
    Half *dx = on_device(x), *dr = on_device(record), *dy = on_device(y), *doff = on_device(offset), *dm = on_device(mask);
    const int rounds = brief ? 1 : 50;
    const auto report = [&](const char* name, int tactic, double bytes, float us, double wrong) {
        std::printf("{\"size\": %d, \"channels\": %d, \"batch\": %d, \"kernel\": \"%s\", \"tactic\": %d, \"us\": %.2f, \"gbps\": %.1f, \"bytes\": %.0f, "
                    "\"difference\": %.2e}\n", c.size, c.channels, c.batch, name, tactic, us, bytes / us * 1e-3, bytes, wrong);
        std::fflush(stdout);
    };
    for (int form = 0; form < 2; ++form) {  // records with a fused softmax, then the published layout
        Attributes a;
        a.group = c.group, a.record = form == 0, a.softmax = form == 0;
        const std::int64_t wide = c.group * (form == 0 ? 32 : 18), narrow = c.group * (form == 0 ? 32 : 9);
        Half *po = form == 0 ? dr : doff, *pm = form == 0 ? dr : dm, *ho = form == 0 ? record.data() : offset.data();
        Half* hm = form == 0 ? record.data() : mask.data();
        const double bytes = 2.0 * (2.0 * values + pixels * c.group * (form == 0 ? 32.0 : 27.0));
        for (const Tactic& tactic : kTactics) {
            Problem device, host;
            const auto shaped = [&](Half* px, Half* o, Half* m, Half* py, Problem& problem) {
                return make_problem(a, operand(px, c.batch, c.size, c.size, c.channels), operand(o, c.batch, c.size, c.size, wide),
                                    operand(m, c.batch, c.size, c.size, narrow), {}, operand(py, c.batch, c.size, c.size, c.channels), tactic, problem);
            };
            if (!shaped(dx, po, pm, dy, device).empty() || !shaped(x.data(), ho, hm, y.data(), host).empty()) {
                continue;
            }
            CUDA_OK(cudaMemset(dy, 0xff, values * sizeof(Half)));
            const float us = microseconds([&] { launch(device, Type::kHalf, Type::kHalf, Type::kHalf, tactic, nullptr); }, rounds);
            double wrong = 0.0;
            dispatch(host, Type::kHalf, Type::kHalf, Type::kHalf, tactic, [&](auto instance) {
                wrong = difference(device, host, y, [](const Problem& p, std::int64_t item) { decltype(instance)::run(p, item); });
            });
            report(form == 0 ? "record" : "plain", tactic.id(), bytes, us, wrong);
        }
        if (form == 1) {
            Problem device;
            make_problem(a, operand(dx, c.batch, c.size, c.size, c.channels), operand(doff, c.batch, c.size, c.size, wide),
                         operand(dm, c.batch, c.size, c.size, narrow), {}, operand(dy, c.batch, c.size, c.size, c.channels), {1, false}, device);
            const int total = static_cast<int>(values);
            report("one channel per thread", 0, bytes,
                   microseconds([&] { one_channel_per_thread<<<(total + 255) / 256, 256>>>(device, total); }, rounds), 0.0);
        }
    }
    for (Half* each : {dx, dr, dy, doff, dm}) {
        CUDA_OK(cudaFree(each));
    }
}

}  // namespace

int main(int count, char** arguments) {
    const bool brief = count > 1 && std::strcmp(arguments[1], "short") == 0;
    for (int batch : {1, 8, 64}) {
        for (int stage = 0; stage < 4; ++stage) {
            if (!brief || batch == 1) {
                measure({56 >> stage, 64 << stage, 4 << stage, batch}, brief);
            }
        }
    }
    return 0;
}
