// What loading the library does in a process that has TensorRT, which this program plays: it exports getPluginRegistry and getLogger.
//
//   library_test LIBRARY
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace {

class Registry final : public IPluginRegistry {
public:
    ~Registry() noexcept override = default;
    std::vector<IPluginCreatorInterface*> creators;

    bool registerCreator(IPluginCreatorInterface& creator, const char* const) noexcept override { return creators.push_back(&creator), true; }
    bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept override {
        const auto at = std::find(creators.begin(), creators.end(), &creator);
        return at != creators.end() && (creators.erase(at), true);
    }
    IPluginCreatorInterface* getCreator(const char* const name, const char* const version, const char* const) noexcept override {
        for (auto* each : creators) {
            auto* creator = static_cast<IPluginCreatorV3One*>(each);
            if (!std::strcmp(creator->getPluginName(), name) && !std::strcmp(creator->getPluginVersion(), version)) {
                return each;
            }
        }
        return nullptr;
    }
    // What the library must not need.
#if NV_TENSORRT_MAJOR < 11
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    bool registerCreator(IPluginCreator&, const char* const) noexcept override { return false; }
    bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(std::int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(const char* const, const char* const, const char* const) noexcept override { return nullptr; }
#pragma GCC diagnostic pop
#endif
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(std::int32_t* const) const noexcept override { return nullptr; }
    IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
    std::int32_t releasePluginResource(const char*) noexcept override { return 0; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(std::int32_t* const) noexcept override { return nullptr; }
};

class Logger final : public ILogger {
public:
    std::vector<std::string> errors;
    void log(Severity severity, const char* text) noexcept override {
        if (severity == Severity::kERROR) {
            errors.emplace_back(text);
        }
    }
};

class Finder final : public ILoggerFinder {
public:
    Logger logger;
    ILogger* findLogger() override { return &logger; }
};

Registry registry;
Logger global_logger;

#define CHECK(condition)                                                \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                   \
        }                                                               \
    } while (false)

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
extern "C" ILogger* getLogger() noexcept { return &global_logger; }

int main(int, char** arguments) {
    // As Triton does it: nothing but dlopen.
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    CHECK(registry.creators.size() == 4);
    auto* found = static_cast<IPluginCreatorV3One*>(registry.getCreator("DCNv3", "1", ""));
    CHECK(found != nullptr);
    CHECK(found->createPlugin("wrong", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK(global_logger.errors.size() == 1 && global_logger.errors[0].find("no attributes were given") != std::string::npos);

    // As IPluginRegistry::loadLibrary does it: it asks for the creators and registers them itself.
    auto* set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto* get_creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
    CHECK(set_finder != nullptr && get_creators != nullptr);
    std::int32_t count = 0;
    auto* const* list = get_creators(count);
    CHECK(count == 4 && registry.creators.empty());
    CHECK(list == get_creators(count) && count == 4);
    Finder finder;
    set_finder(&finder);
    CHECK(static_cast<IPluginCreatorV3One*>(list[1])->createPlugin("wrong", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK(finder.logger.errors.size() == 1 && global_logger.errors.size() == 1);
    std::printf("all checks passed\n");
    return 0;
}
