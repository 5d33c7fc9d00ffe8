#include "deploycc/bundle.hpp"

#include <algorithm>
#include <set>

#include "deploycc/files.hpp"
#include "deploycc/npy.hpp"
#include "deploycc/refusal.hpp"
#include "json_reader.hpp"

namespace deploycc {
namespace {

constexpr std::string_view SCHEMA = "deploycc.bundle/1";
constexpr std::uint64_t LONGEST_MANIFEST = 16 << 20;

std::vector<std::string> texts(const JsonReader& list) {
    std::vector<std::string> found;
    for (const JsonReader& each : list.items()) found.push_back(each.text());
    return found;
}

TensorSpec read_spec(const JsonReader& json) {
    return TensorSpec{json["name"].text(), parse_datatype(json["datatype"].text()), json["shape"].shape(-1)};
}

InputSpec read_input(const JsonReader& json) {
    InputSpec spec{read_spec(json), json["minimum"].shape(1), json["optimum"].shape(1), json["maximum"].shape(1)};
    count(spec.maximum);
    for (const Shape* each : {&spec.minimum, &spec.optimum, &spec.maximum}) {
        if (each->size() != spec.shape.size()) json.fail("an input whose shapes have one rank");
    }
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const bool ordered = spec.minimum[i] <= spec.optimum[i] && spec.optimum[i] <= spec.maximum[i];
        const bool agrees = spec.shape[i] == -1 || (spec.minimum[i] == spec.shape[i] && spec.maximum[i] == spec.shape[i]);
        if (!ordered || !agrees) json.fail("an input whose shapes are minimum <= optimum <= maximum and agree with its own");
    }
    return spec;
}

BatchRange read_batch(const JsonReader& json, const Bundle& bundle) {
    BatchRange batch{json["minimum"].integer(1), json["optimum"].integer(1), json["maximum"].integer(1)};
    for (const InputSpec& input : bundle.inputs) {
        if (input.shape.empty() || input.minimum[0] != batch.minimum || input.maximum[0] != batch.maximum) json.fail("the range of every input's first dimension");
    }
    for (const TensorSpec& output : bundle.outputs) {
        if (output.shape.empty() || output.shape[0] != -1) json.fail("a batch, since an output has none");
    }
    return batch;
}

std::vector<GoldenOutput> read_golden(const JsonReader& json, const Bundle& bundle) {
    std::vector<GoldenOutput> found;
    for (const JsonReader& row : json.items()) {
        GoldenOutput golden{row["output"].text(), row["path"].text(), row["minimum_sqnr_db"].number()};
        const auto known = [&](const TensorSpec& output) { return output.name == golden.output; };
        if (std::none_of(bundle.outputs.begin(), bundle.outputs.end(), known)) row.fail("a golden output of this model");
        found.push_back(std::move(golden));
    }
    if (found.empty()) json.fail("a list of golden outputs (without one nothing could be verified)");
    return found;
}

Variant read_variant(const JsonReader& json, const Bundle& bundle) {
    Variant variant{json["kind"].text(64), json["path"].text(), {}, read_golden(json["golden"], bundle)};
    if (json.has("requires")) {
        const JsonReader needs = json["requires"];
        variant.requires_ = Requirement{needs["version"].text(64), texts(needs["archs"]), texts(needs["plugins"]), {}};
        if (needs.has("compatible")) variant.requires_.compatible = texts(needs["compatible"]);
        for (const std::string& mode : variant.requires_.compatible) {
            if (mode != "version" && mode != "ampere-plus" && mode != "same-arch") needs.fail("an engine whose compatibility is 'version', 'ampere-plus' or 'same-arch'");
        }
    }
    return variant;
}

std::map<std::string, FileRecord> read_files(const JsonReader& json) {
    std::map<std::string, FileRecord> files;
    for (const auto& [path, record] : json.entries()) {
        if (!is_inside(path)) record.fail("a path inside the bundle");
        FileRecord found{record["sha256"].text(64), static_cast<std::uint64_t>(record["bytes"].integer(0, std::int64_t{1} << 40))};
        if (found.sha256.size() != 64) record.fail("a record with a SHA-256");
        files.emplace(path, std::move(found));
    }
    return files;
}

void check_listed(const Bundle& bundle, const std::string& path) {
    if (!bundle.files.count(path)) {
        throw Refusal(Kind::contract, "'" + path.substr(0, 200) + "' is used but not listed under 'files'", "bundle.json", "bundle the build again");
    }
}

void check_files(const Bundle& bundle) {
    for (const Variant& variant : bundle.variants) {
        check_listed(bundle, variant.path);
        for (const std::string& plugin : variant.requires_.plugins) check_listed(bundle, plugin);
        for (const GoldenOutput& golden : variant.golden) check_listed(bundle, golden.path);
    }
    for (const InputSpec& input : bundle.inputs) {
        const auto found = bundle.golden_inputs.find(input.name);
        check_listed(bundle, found == bundle.golden_inputs.end() ? "golden input of " + input.name : found->second);
    }
    if (!bundle.labels.empty()) check_listed(bundle, bundle.labels);
}

template <class Spec>
void check_names(const std::vector<Spec>& specs, const JsonReader& place) {
    std::set<std::string> names;
    for (const Spec& spec : specs) names.insert(spec.name);
    if (specs.empty() || names.size() != specs.size() || names.count("")) place.fail("a list of tensors with distinct names");
}

Bundle read_bundle(const JsonReader& json) {
    if (json["schema"].text() != SCHEMA) json["schema"].fail("deploycc.bundle/1 (use the runner of that version of deploycc)");
    Bundle bundle;
    bundle.name = json["name"].text(255);
    const auto plain = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '.'; };
    if (bundle.name.empty() || !std::all_of(bundle.name.begin(), bundle.name.end(), plain)) json["name"].fail("a name of letters, digits, dot, dash and underscore");
    for (const JsonReader& each : json["inputs"].items()) bundle.inputs.push_back(read_input(each));
    for (const JsonReader& each : json["outputs"].items()) bundle.outputs.push_back(read_spec(each));
    check_names(bundle.inputs, json["inputs"]);
    check_names(bundle.outputs, json["outputs"]);
    if (json.has("batch")) bundle.batch = read_batch(json["batch"], bundle);
    for (const JsonReader& each : json["variants"].items()) bundle.variants.push_back(read_variant(each, bundle));
    for (const auto& [name, file] : json["golden"]["inputs"].entries()) bundle.golden_inputs.emplace(name, file.text());
    if (json.has("labels")) bundle.labels = json["labels"].text();
    bundle.files = read_files(json["files"]);
    check_files(bundle);
    return bundle;
}

Tensor read_golden_file(const Bundle& bundle, const TensorSpec& spec, const std::string& path) {
    Tensor tensor = parse_npy(bundle.read(path), spec.name);
    if (tensor.type != spec.type) {
        const std::string what = "the golden array is " + std::string(name_of(tensor.type)) + ", the model has " + std::string(name_of(spec.type));
        throw Refusal(Kind::contract, what, "'" + path + "'", "bundle the build again");
    }
    return tensor;
}

void check_shape(const InputSpec& spec, const Tensor& tensor) {
    bool fits = tensor.shape.size() == spec.shape.size();
    for (std::size_t i = 0; fits && i < spec.shape.size(); ++i) fits = spec.minimum[i] <= tensor.shape[i] && tensor.shape[i] <= spec.maximum[i];
    if (!fits) {
        const std::string range = "from " + to_string(spec.minimum) + " to " + to_string(spec.maximum);
        throw Refusal(Kind::usage, "the shape " + to_string(tensor.shape) + " is not served", "input '" + spec.name + "'", "send shapes " + range);
    }
}

}  // namespace

bool Requirement::is_compatible(const std::string& mode) const { return std::find(compatible.begin(), compatible.end(), mode) != compatible.end(); }

Bytes Bundle::read(const std::string& path) const {
    const auto record = files.find(path);
    if (record == files.end()) throw Refusal(Kind::contract, "the file is not listed in bundle.json", "'" + path + "'", "bundle the build again");
    Bytes data = read_inside(root, path, record->second.bytes);
    if (sha256(data) != record->second.sha256) {
        throw Refusal(Kind::contract, "the file is not the one that was bundled: its SHA-256 differs", "'" + path + "'", "copy the bundle again");
    }
    return data;
}

Bundle parse_bundle(std::string_view text) {
    JsonReader::Json document;
    try {
        document = JsonReader::Json::parse(text);
    } catch (const JsonReader::Json::exception& error) {
        throw Refusal(Kind::contract, std::string("bundle.json is no JSON (") + error.what() + ")", "", "bundle the build again");
    }
    return read_bundle(JsonReader(document, "", Kind::contract));
}

Bundle open_bundle(const std::filesystem::path& root) {
    const Bytes text = read_file(root / "bundle.json", LONGEST_MANIFEST);
    Bundle bundle = parse_bundle(std::string_view(reinterpret_cast<const char*>(text.data()), text.size()));
    bundle.root = root;
    return bundle;
}

Tensors golden_inputs(const Bundle& bundle) {
    Tensors found;
    for (const InputSpec& spec : bundle.inputs) found.push_back(read_golden_file(bundle, spec, bundle.golden_inputs.at(spec.name)));
    return checked_inputs(bundle, std::move(found));
}

Tensors golden_outputs(const Bundle& bundle, const Variant& variant) {
    Tensors found;
    for (const GoldenOutput& golden : variant.golden) {
        const auto spec = std::find_if(bundle.outputs.begin(), bundle.outputs.end(), [&](const TensorSpec& o) { return o.name == golden.output; });
        found.push_back(read_golden_file(bundle, *spec, golden.path));
    }
    return found;
}

Tensors checked_inputs(const Bundle& bundle, Tensors given) {
    Tensors ordered;
    for (const InputSpec& spec : bundle.inputs) {
        const auto found = std::find_if(given.begin(), given.end(), [&](const Tensor& t) { return t.name == spec.name; });
        if (found == given.end()) throw Refusal(Kind::usage, "the input '" + spec.name + "' is missing", "", "send every input of the model");
        if (found->type != spec.type) {
            const std::string what = "the datatype is " + std::string(name_of(found->type)) + ", not " + std::string(name_of(spec.type));
            throw Refusal(Kind::usage, what, "input '" + spec.name + "'", "convert it first");
        }
        check_shape(spec, *found);
        if (found->data.size() != count(found->shape) * size_of(found->type)) {
            throw Refusal(Kind::usage, "the data has " + std::to_string(found->data.size()) + " bytes for the shape " + to_string(found->shape), "input '" + spec.name + "'", "send as many elements as the shape has");
        }
        ordered.push_back(std::move(*found));
    }
    if (given.size() != bundle.inputs.size()) throw Refusal(Kind::usage, "an input is unknown or sent twice", "", "send each input of the model once");
    for (const Tensor& each : ordered) {
        if (bundle.batch && each.shape[0] != ordered[0].shape[0]) throw Refusal(Kind::usage, "the inputs have batches of different size", "", "send one batch");
    }
    return ordered;
}

}  // namespace deploycc
