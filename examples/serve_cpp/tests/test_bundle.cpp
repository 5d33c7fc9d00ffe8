#include <doctest/doctest.h>

#include "deploycc/bundle.hpp"
#include "deploycc/executor.hpp"
#include "scratch.hpp"

using namespace deploycc;

namespace {

std::string refusal_with(const std::string& pointer, const nlohmann::json& value) {
    nlohmann::json json = listed_bundle();
    json[nlohmann::json::json_pointer(pointer)] = value;
    return refusal_of([&] { parse_bundle(json.dump()); });
}

Tensors request(Shape shape, std::size_t floats_in) { return {floats("x", std::move(shape), std::vector<float>(floats_in, 1.0F))}; }

// A backend that is decided by its version and GPU alone; it is never asked to load.
class Present : public Backend {
public:
    Present(std::string version, std::string arch) : version_(std::move(version)), arch_(std::move(arch)) {}
    std::string name() const override { return "tensorrt"; }
    std::string kind() const override { return "tensorrt"; }
    std::string refusal(const Variant& variant) const override { return mismatch(variant.requires_, name(), version_, arch_); }
    std::unique_ptr<Model> load(const Bundle&, const Variant&) const override { return nullptr; }

private:
    std::string version_, arch_;
};

std::string choice_with(const std::string& version, const std::string& arch, const std::string& name = "auto") {
    std::vector<std::unique_ptr<Backend>> present;
    present.push_back(std::make_unique<Present>(version, arch));
    const Bundle bundle = parse_bundle(listed_bundle().dump());
    try {
        return choose(bundle, present, name).variant->path;
    } catch (const Refusal& refusal) {
        return refusal.what();
    }
}

}  // namespace

TEST_CASE("a sound bundle is read as it is") {
    const Bundle bundle = parse_bundle(listed_bundle().dump());
    CHECK(bundle.name == "net");
    CHECK(bundle.inputs.at(0).maximum == Shape{4, 2});
    CHECK(bundle.outputs.at(0).shape == Shape{-1, 1});
    CHECK(bundle.batch->maximum == 4);
    CHECK(bundle.variants.at(0).requires_.archs == std::vector<std::string>{"sm_89", "sm_90"});
    CHECK(bundle.variants.at(1).requires_.version.empty());
    CHECK(bundle.golden_inputs.at("x") == "golden/x.npy");
}

TEST_CASE("every part of bundle.json is checked, and named when it is wrong") {
    CHECK(contains(refusal_of([] { parse_bundle("{"); }), "bundle.json is no JSON"));
    CHECK(contains(refusal_of([] { parse_bundle("[]"); }), "not an object"));
    CHECK(contains(refusal_with("/schema", "deploycc.bundle/2"), "schema"));
    CHECK(contains(refusal_with("/name", "a/../b"), "letters, digits"));
    CHECK(contains(refusal_with("/inputs", nlohmann::json::array()), "distinct names"));
    CHECK(contains(refusal_with("/inputs/0/datatype", "FP12"), "'FP12' is not known"));
    CHECK(contains(refusal_with("/inputs/0/shape", {-1, 2, 3}), "one rank"));
    CHECK(contains(refusal_with("/inputs/0/shape/1", 2.5), "inputs[0].shape[1]"));
    CHECK(contains(refusal_with("/inputs/0/maximum", {4, 3}), "agree"));
    CHECK(contains(refusal_with("/inputs/0/minimum", {3, 2}), "minimum <= optimum"));
    CHECK(contains(refusal_with("/inputs/0/maximum", {2000000000, 2}), "2^31"));
    CHECK(contains(refusal_with("/batch/maximum", 8), "range of every input"));
    CHECK(contains(refusal_with("/outputs/0/shape", {4, 1}), "an output has none"));
    CHECK(contains(refusal_with("/variants/0/golden", nlohmann::json::array()), "nothing could be verified"));
    CHECK(contains(refusal_with("/variants/0/golden/0/output", "z"), "golden output of this model"));
    CHECK(contains(refusal_with("/variants/1/path", "other.onnx"), "'other.onnx' is used but not listed"));
    CHECK(contains(refusal_with("/variants/0/requires/plugins", {"p.so"}), "'p.so' is used but not listed"));
    CHECK(contains(refusal_with("/variants/0/requires/compatible", {"maybe"}), "compatibility is 'version'"));
    CHECK(contains(refusal_with("/golden/inputs", nlohmann::json::object()), "golden input of x"));
    CHECK(contains(refusal_with("/labels", "labels.txt"), "'labels.txt' is used but not listed"));
    CHECK(contains(refusal_with("/files/model.onnx/bytes", -1), "integer"));
    CHECK(contains(refusal_with("/files/model.onnx/sha256", "00"), "SHA-256"));
    nlohmann::json escaping = listed_bundle();
    escaping["files"]["../../etc/passwd"] = {{"sha256", std::string(64, '0')}, {"bytes", 1}};
    CHECK(contains(refusal_of([&] { parse_bundle(escaping.dump()); }), "inside the bundle"));
}

TEST_CASE("a file is read only when its hash is the recorded one") {
    const Folder folder;
    folder.write("model.onnx", std::string("12345"));
    nlohmann::json json = listed_bundle();
    json["files"]["model.onnx"] = {{"sha256", sha256({'1', '2', '3', '4', '5'})}, {"bytes", 5}};
    folder.write("bundle.json", json.dump());
    const Bundle bundle = open_bundle(folder.path());
    CHECK(bundle.read("model.onnx").size() == 5);
    folder.write("model.onnx", std::string("12346"));
    CHECK(contains(refusal_of([&] { bundle.read("model.onnx"); }), "its SHA-256 differs"));
    CHECK(contains(refusal_of([&] { bundle.read("bundle.json"); }), "not listed"));
}

TEST_CASE("requests are checked against the profiles") {
    const Bundle bundle = parse_bundle(listed_bundle().dump());
    CHECK(checked_inputs(bundle, request({4, 2}, 8)).size() == 1);
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, request({5, 2}, 10)); }), "send shapes from [1, 2] to [4, 2]"));
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, request({2}, 2)); }), "is not served"));
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, {}); }), "'x' is missing"));
    Tensors twice = request({1, 2}, 2);
    twice.push_back(twice[0]);
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, twice); }), "sent twice"));
    Tensors wrong = request({1, 2}, 2);
    wrong[0].type = DataType::INT32;
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, wrong); }), "INT32, not FP32"));
    Tensors brief = request({1, 2}, 2);
    brief[0].data.pop_back();
    CHECK(contains(refusal_of([&] { checked_inputs(bundle, brief); }), "7 bytes"));
}

TEST_CASE("an engine of another version or architecture is refused before it is opened, and the reason is readable") {
    CHECK(choice_with("10.16.1.11", "sm_90") == "engines/a.engine");
    CHECK(choice_with("10.16.1.99", "sm_89") == "engines/a.engine");
    CHECK(contains(choice_with("10.15.1.11", "sm_90"), "built by tensorrt 10.16.1.11, this machine has 10.15.1.11"));
    CHECK(contains(choice_with("11.0.0.1", "sm_90"), "engines run with the version that built them"));
    CHECK(contains(choice_with("10.16.1.11", "sm_80"), "built for sm_89, sm_90, this GPU is sm_80"));
    CHECK(contains(choice_with("10.16.1.11", ""), "this machine has no GPU"));
    CHECK(contains(choice_with("10.16.1.11", "sm_90", "opencv"), "no executor 'opencv'"));
}

TEST_CASE("a version-compatible engine runs under later releases of its major version") {
    const Requirement needs{"10.16.1.11", {}, {}, {"version"}};
    CHECK(mismatch(needs, "tensorrt", "10.16.1.11", "sm_90").empty());
    CHECK(mismatch(needs, "tensorrt", "10.17.0.2", "sm_90").empty());
    CHECK(contains(mismatch(needs, "tensorrt", "10.3.0.26", "sm_90"), "under that version and later ones"));
    CHECK(contains(mismatch(needs, "tensorrt", "11.0.0.1", "sm_90"), "of the same major version"));
}

TEST_CASE("a hardware-compatible engine runs on every GPU that its mode names") {
    const Requirement ampere{"10.16.1.11", {"sm_86"}, {}, {"ampere-plus"}}, same{"10.16.1.11", {"sm_86"}, {}, {"same-arch"}};
    for (const char* arch : {"sm_80", "sm_86", "sm_90", "sm_120"}) CHECK(mismatch(ampere, "tensorrt", "10.16.1.11", arch).empty());
    CHECK(contains(mismatch(ampere, "tensorrt", "10.16.1.11", "sm_75"), "built for sm_86 and every GPU from sm_80 on, this GPU is sm_75"));
    CHECK(contains(mismatch(ampere, "tensorrt", "10.17.0.2", "sm_86"), "engines run with the version that built them"));
    CHECK(contains(mismatch(ampere, "tensorrt", "10.16.1.11", ""), "this machine has no GPU"));
    CHECK(mismatch(same, "tensorrt", "10.16.1.11", "sm_86").empty());
    CHECK(contains(mismatch(same, "tensorrt", "10.16.1.11", "sm_90"), "built for sm_86, this GPU is sm_90"));
}
