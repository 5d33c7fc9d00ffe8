#include <doctest/doctest.h>

#include "deploycc/protocol.hpp"
#include "scratch.hpp"

using namespace deploycc;
using Json = nlohmann::json;

namespace {

const Bundle& bundle() {
    static const Bundle parsed = parse_bundle(listed_bundle().dump());
    return parsed;
}

std::string body_with(const std::string& data, const std::string& datatype = "FP32", const std::string& shape = "[2,2]") {
    return R"({"id":"a","inputs":[{"name":"x","datatype":")" + datatype + R"(","shape":)" + shape + R"(,"data":)" + data + "}]}";
}

InferRequest parsed(const std::string& body) { return parse_request(body, std::nullopt, bundle()); }
std::string refused(const std::string& body) {
    return refusal_of([&] { parsed(body); });
}

}  // namespace

TEST_CASE("data may be flat or nested") {
    for (const char* data : {"[1,2,3,4.5]", "[[1,2],[3,4.5]]"}) {
        const InferRequest request = parsed(body_with(data));
        CHECK(request.id == "a");
        CHECK(to_doubles(request.inputs.at(0)) == std::vector<double>{1, 2, 3, 4.5});
        CHECK(request.outputs == std::vector<std::string>{"y"});
        CHECK(request.raw_outputs.empty());
    }
}

TEST_CASE("integers keep their value or are refused") {
    CHECK(to_doubles(parsed(body_with("[-128,127,0,1]", "INT8")).inputs[0]) == std::vector<double>{-128, 127, 0, 1});
    CHECK(to_doubles(parsed(body_with("[18446744073709551615,0,1,2]", "UINT64")).inputs[0])[0] == doctest::Approx(18446744073709551615.0));
    CHECK(to_doubles(parsed(body_with("[true,false,0,1]", "BOOL")).inputs[0]) == std::vector<double>{1, 0, 0, 1});
    CHECK(contains(refused(body_with("[128,0,0,0]", "INT8")), "out of range"));
    CHECK(contains(refused(body_with("[-1,0,0,0]", "UINT8")), "out of range"));
    CHECK(contains(refused(body_with("[-129,0,0,0]", "INT8")), "out of range"));
    CHECK(contains(refused(body_with("[1.5,0,0,0]", "INT32")), "not an integer"));
    CHECK(contains(refused(body_with("[2,0,0,0]", "BOOL")), "neither true nor false"));
}

TEST_CASE("malformed requests are refused with the place") {
    CHECK(contains(refused(""), "no JSON"));
    CHECK(contains(refused("{}"), "'inputs' is missing"));
    CHECK(contains(refused(R"({"inputs":[{}]})"), "'datatype' is missing. Where: inputs[0]"));
    CHECK(contains(refused(body_with("[1,2,3]")), "fewer elements"));
    CHECK(contains(refused(body_with("[1,2,3,4,5]")), "more elements"));
    CHECK(contains(refused(body_with("[1,2,\"3\",4]")), "not a number"));
    CHECK(contains(refused(body_with("\"abcd\"")), "fewer elements"));
    CHECK(contains(refused(body_with("[1,2]", "FP16", "[2]")), "raw bytes only"));
    CHECK(contains(refused(body_with("[]", "FP32", "[2147483647,2147483647]")), "2^31"));
    CHECK(contains(refused(body_with("[]", "FP32", "[2147483647]")), "fewer elements"));
    CHECK(contains(refused(body_with("[1]", "FP32", "[-1]")), "integer from 0"));
    CHECK(contains(refused(std::string(100, '[')), "nested too deeply"));
    CHECK(contains(refused(R"({"inputs":[],"outputs":[{"name":"z"}]})"), "no output 'z'"));
    CHECK(contains(refused(R"({"inputs":[{"name":"x","datatype":"FP32","shape":[0],"data":[]},{}]})"), "more inputs"));
}

TEST_CASE("raw tensors follow the JSON") {
    const std::string json = R"({"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}],"parameters":{"binary_data_output":true}})";
    const float values[]{1.5F, -2};
    const std::string raw(reinterpret_cast<const char*>(values), sizeof values);
    const InferRequest request = parse_request(json + raw, json.size(), bundle());
    CHECK(to_doubles(request.inputs[0]) == std::vector<double>{1.5, -2});
    CHECK(request.raw_outputs.count("y") == 1);
    CHECK(contains(refusal_of([&] { parse_request(json + raw.substr(1), json.size(), bundle()); }), "not as long as the shape needs (8 bytes)"));
    CHECK(contains(refusal_of([&] { parse_request(json + raw + "z", json.size(), bundle()); }), "1 raw bytes belong to no input"));
    CHECK(contains(refusal_of([&] { parse_request(json, json.size() + 1, bundle()); }), "longer than the body"));
}

TEST_CASE("responses carry numbers that read back as they were") {
    InferRequest request;
    request.id = "\xff\"quoted";
    request.outputs = {"y"};
    const Tensors outputs{floats("y", {2, 1}, {0.1F, -3e38F})};
    const Body body = write_response(request, outputs, bundle());
    CHECK(!body.json_length);
    const Json json = Json::parse(body.text);
    CHECK(json["model_name"] == "net");
    CHECK(json["outputs"][0]["shape"] == Json({2, 1}));
    CHECK(json["outputs"][0]["data"][0].get<float>() == 0.1F);
    CHECK(json["outputs"][0]["data"][1].get<float>() == -3e38F);
    request.raw_outputs.insert("y");
    const Body raw = write_response(request, outputs, bundle());
    CHECK(raw.text.size() == *raw.json_length + 8);
    CHECK(Json::parse(raw.text.substr(0, *raw.json_length))["outputs"][0]["parameters"]["binary_data_size"] == 8);
    request.raw_outputs.clear();
    CHECK(contains(refusal_of([&] { write_response(request, {floats("y", {1}, {1.0F / 0.0F})}, bundle()); }), "not finite"));
}

TEST_CASE("metadata is what the protocol asks for") {
    const Json json = Json::parse(model_metadata(bundle(), "tensorrt"));
    CHECK(json["name"] == "net");
    CHECK(json["inputs"][0] == Json({{"name", "x"}, {"datatype", "FP32"}, {"shape", {-1, 2}}}));
    CHECK(Json::parse(server_metadata())["extensions"][0] == "binary_tensor_data");
    CHECK(Json::parse(error_body("a \"b\""))["error"] == "a \"b\"");
    CHECK(largest_body(bundle()) == 4 * 2 * 32 + (1 << 20));
}
