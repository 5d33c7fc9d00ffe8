#include "commands.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <thread>

#include "arguments.hpp"
#include "deploycc/engine.hpp"
#include "deploycc/files.hpp"
#include "deploycc/npy.hpp"
#include "deploycc/refusal.hpp"
#include "server.hpp"

namespace deploycc {
namespace {

constexpr const char* USAGE = R"(deploycc-serve: serve the bundles that `deploycc bundle` writes

  deploycc-serve verify BUNDLE                check the files and the golden outputs
  deploycc-serve run    BUNDLE [--input NAME=FILE.npy]... [--out DIR]
                                              infer once (golden inputs unless told otherwise)
  deploycc-serve bench  BUNDLE [--batch N] [--seconds S] [--clients N]
                                              latency and throughput on this machine
  deploycc-serve serve  BUNDLE [--port P] [--host H]
                                              the KServe v2 inference protocol over HTTP

Options of all: --executor auto|tensorrt|tensorrt-rtx|onnxruntime|opencv, --workers N, --batch-delay-us N.
Exit codes: 0 well, 2 the request cannot be met, 3 the bundle is damaged or gives wrong outputs, 4 nothing here runs it.
)";
constexpr std::uint64_t LARGEST_INPUT = std::uint64_t{4} << 30;
const std::vector<std::string> COMMON{"--executor", "--workers", "--batch-delay-us"};

std::vector<std::string> with_common(std::vector<std::string> known) {
    known.insert(known.end(), COMMON.begin(), COMMON.end());
    return known;
}

EngineOptions engine_options(const Arguments& arguments) {
    EngineOptions options;
    options.executor = arguments.text("--executor", "auto");
    options.workers = static_cast<std::size_t>(arguments.number("--workers", 1, 1, 64));
    options.batch_delay = std::chrono::microseconds(arguments.number("--batch-delay-us", 500, 0, 10'000'000));
    return options;
}

Engine open_engine(const Arguments& arguments) {
    if (arguments.path.empty()) throw Refusal(Kind::usage, "no bundle is named", arguments.command, "give the directory that `deploycc bundle` wrote");
    return Engine(arguments.path, engine_options(arguments));
}

void print_golden(const Engine& engine) {
    std::printf("engine   %s\n", engine.description().c_str());
    for (const GoldenResult& each : engine.golden()) {
        std::printf("golden   %s: %.1f dB (at least %.1f dB)\n", each.output.c_str(), each.sqnr_db, each.minimum_sqnr_db);
    }
}

int verify(const Arguments& arguments) {
    const Engine engine = open_engine(arguments);
    for (const auto& [path, record] : engine.bundle().files) engine.bundle().read(path);
    print_golden(engine);
    std::printf("verified %s: %zu files, all hashes as recorded\n", engine.bundle().name.c_str(), engine.bundle().files.size());
    return 0;
}

Tensors given_inputs(const Arguments& arguments, const Bundle& bundle) {
    if (arguments.inputs.empty()) return golden_inputs(bundle);
    Tensors inputs;
    for (const auto& [name, file] : arguments.inputs) inputs.push_back(parse_npy(read_file(file, LARGEST_INPUT), name));
    return inputs;
}

std::vector<std::string> read_labels(const Bundle& bundle) {
    std::vector<std::string> labels(1);
    if (bundle.labels.empty()) return {};
    for (const std::uint8_t c : bundle.read(bundle.labels)) {
        if (c == '\n') labels.emplace_back();
        else labels.back() += static_cast<char>(c);
    }
    labels.pop_back();
    return labels;
}

// The largest entries of each row of a matrix, with their labels.
void print_classes(const Tensor& output, const std::vector<std::string>& labels) {
    const std::vector<double> values = to_doubles(output);
    const std::size_t width = static_cast<std::size_t>(output.shape[1]);
    for (std::size_t row = 0; row < static_cast<std::size_t>(output.shape[0]); ++row) {
        const auto begin = values.begin() + static_cast<std::ptrdiff_t>(row * width);
        const std::size_t best = static_cast<std::size_t>(std::max_element(begin, begin + static_cast<std::ptrdiff_t>(width)) - begin);
        std::printf("%s[%zu]  class %zu%s%s, %g\n", output.name.c_str(), row, best, best < labels.size() ? " " : "", best < labels.size() ? labels[best].c_str() : "", begin[static_cast<std::ptrdiff_t>(best)]);
    }
}

int run(const Arguments& arguments) {
    Engine engine = open_engine(arguments);
    print_golden(engine);
    const std::vector<std::string> labels = read_labels(engine.bundle());
    const std::string folder = arguments.text("--out", "");
    std::size_t index = 0;
    for (const Tensor& output : engine.infer(given_inputs(arguments, engine.bundle()))) {
        if (output.shape.size() == 2 && output.shape[1] > 1) print_classes(output, labels);
        else std::printf("%s  %s %s\n", output.name.c_str(), std::string(name_of(output.type)).c_str(), to_string(output.shape).c_str());
        if (folder.empty()) continue;
        std::filesystem::create_directories(folder);
        const Bytes file = write_npy(output);
        std::ofstream stream(std::filesystem::path(folder) / ("output-" + std::to_string(index++) + ".npy"), std::ios::binary);
        if (!stream.write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()))) {
            throw Refusal(Kind::usage, "an output cannot be written", folder, "check permissions and free space");
        }
    }
    return 0;
}

// Golden inputs, repeated or cut to `batch` rows.
Tensors bench_inputs(const Bundle& bundle, long batch) {
    Tensors inputs = golden_inputs(bundle);
    if (!bundle.batch || batch == 0) return inputs;
    for (Tensor& input : inputs) {
        const std::vector<const Tensor*> copies(static_cast<std::size_t>(batch / input.shape[0] + 1), &input);
        input = rows(stack(copies), 0, batch);
    }
    return inputs;
}

int bench(const Arguments& arguments) {
    using Clock = std::chrono::steady_clock;
    Engine engine = open_engine(arguments);
    print_golden(engine);
    const Tensors inputs = checked_inputs(engine.bundle(), bench_inputs(engine.bundle(), arguments.number("--batch", 0, 0, 1 << 20)));
    const std::chrono::seconds length(arguments.number("--seconds", 5, 1, 3600));
    const long clients = arguments.number("--clients", 1, 1, 1024);
    for (int i = 0; i < 3; ++i) engine.infer(inputs);
    std::vector<std::vector<double>> milliseconds(static_cast<std::size_t>(clients));
    const Clock::time_point begin = Clock::now();
    std::vector<std::thread> threads;
    for (std::vector<double>& own : milliseconds) {
        threads.emplace_back([&engine, &inputs, &own, begin, length] {
            while (Clock::now() - begin < length) {
                const Clock::time_point start = Clock::now();
                engine.infer(inputs);
                own.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    std::vector<double> all;
    for (const std::vector<double>& own : milliseconds) all.insert(all.end(), own.begin(), own.end());
    std::sort(all.begin(), all.end());
    const auto quantile = [&](double q) { return all[static_cast<std::size_t>(q * static_cast<double>(all.size() - 1))]; };
    const double samples = static_cast<double>(all.size()) * static_cast<double>(inputs[0].shape.empty() ? 1 : inputs[0].shape[0]);
    std::printf("bench    %zu requests of %s, %ld clients, %.1f s\n", all.size(), to_string(inputs[0].shape).c_str(), clients, seconds);
    std::printf("latency  median %.3f ms, 95%% %.3f ms, 99%% %.3f ms\n", quantile(0.5), quantile(0.95), quantile(0.99));
    std::printf("rate     %.1f samples/s\n", samples / seconds);
    return 0;
}

int serve_bundle(const Arguments& arguments) {
    block_stop_signals();
    Engine engine = open_engine(arguments);
    print_golden(engine);
    ServerOptions options;
    options.host = arguments.text("--host", options.host);
    options.port = static_cast<int>(arguments.number("--port", options.port, 0, 65535));
    serve(engine, options, [&](int port) {
        std::printf("serving  http://%s:%d/v2/models/%s\n", options.host.c_str(), port, engine.bundle().name.c_str());
        std::fflush(stdout);
    });
    std::printf("stopped\n");
    return 0;
}

}  // namespace

int run_command(const std::vector<std::string>& words) {
    const std::string command = words.empty() ? "--help" : words[0];
    if (command == "verify") return verify(parse_arguments(words, COMMON));
    if (command == "run") return run(parse_arguments(words, with_common({"--input", "--out"})));
    if (command == "bench") return bench(parse_arguments(words, with_common({"--batch", "--seconds", "--clients"})));
    if (command == "serve") return serve_bundle(parse_arguments(words, with_common({"--port", "--host"})));
    std::cout << USAGE;
    if (command == "--help" || command == "-h") return 0;
    throw Refusal(Kind::usage, "the command '" + command + "' is not known", "", "use verify, run, bench or serve");
}

}  // namespace deploycc
