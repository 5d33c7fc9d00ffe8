"""The operator ``deploycc::DCNv3``: its attributes, its shapes, and its body in standard ONNX operators.

For each output pixel (x_o, y_o), group g and kernel point k = i kernel_h + j (the column i is the outer loop, unlike DCNv2):

    p_x = c_x - pad_w + x_o stride_w + (i dilation_w - c_x + offset[.., g, k, 0]) offset_scale
    p_y = c_y - pad_h + y_o stride_h + (j dilation_h - c_y + offset[.., g, k, 1]) offset_scale
    y[n, y_o, x_o, g, :] = sum over k of mask[.., g, k] bilinear(x[n, :, :, g, :], p_y, p_x)

with c = floor(dilation (kernel - 1) / 2). A neighbour outside the image counts as zero. Source: InternImage (arXiv 2211.05778)
and the operator its authors published; tensors are NHWC, channel c = g C/G + q.

Every node carries ``plugin_namespace``, so that TensorRT takes the plugin where one is registered and the body otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycc.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMAIN, VERSION = "deploycc", 1
# Operand 1 holds offsets: FP32 or FP16, never BF16 or INT8, whatever the type of the rest.
X, OFFSET, MASK, CENTER = range(4)
PLAIN, SCALED, DEQUANTIZED, REQUANTIZED = "DCNv3", "DCNv3Center", "DCNv3DQ", "DCNv3DQQ"
OPERATORS = (PLAIN, SCALED, DEQUANTIZED, REQUANTIZED)
_MOVES = frozenset({"Add", "Cast", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
# Types of the operands; in the forms whose name says so, x may be INT8.
TYPES = {"x": _FLOATS | {ir.DataType.BFLOAT16}, "offset": _FLOATS, "mask": _FLOATS | {ir.DataType.BFLOAT16}}
# In a record the logits follow the offsets; 32 halves are 64 bytes, four aligned vectors.
RECORD_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DCNv3:
    """The attributes of one node, in the names of the ONNX function.

    ``softmax`` says that the mask holds logits, of which the operator takes the softmax over k. ``record`` says that operands 1 and 2
    are one tensor [N, Ho, Wo, G R], R >= 3 K, of which each group holds its 2 K offsets, then its K masks, then padding.
    ``x_scale`` multiplies an INT8 x, ``y_scale`` divides an INT8 result.

    Raises:
        UsageError: naming the attribute and its value, when one makes no sense.
    """

    group: int
    kernel_h: int = 3
    kernel_w: int = 3
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 1
    pad_w: int = 1
    dilation_h: int = 1
    dilation_w: int = 1
    offset_scale: float = 1.0
    remove_center: int = 0
    softmax: int = 0
    record: int = 0
    x_scale: float = 1.0
    y_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("group", "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "x_scale", "y_scale"):
            if not 0 < getattr(self, name) < 2**31:
                raise _refused(name, getattr(self, name), "give a positive number")
        for name in ("pad_h", "pad_w"):
            if not 0 <= getattr(self, name) < 2**31:
                raise _refused(name, getattr(self, name), "give zero or a positive number")
        for name in ("remove_center", "softmax", "record"):
            if getattr(self, name) not in (0, 1):
                raise _refused(name, getattr(self, name), "give 0 or 1")
        if self.remove_center and not (self.kernel_h == self.kernel_w and self.kernel_h % 2 and self.kernel_h > 1):
            raise _refused("remove_center", 1, f"a kernel of {self.kernel_h}x{self.kernel_w} has no centre; use an odd square above 1")

    @property
    def points(self) -> int:
        """Return K, the number of kernel points."""
        return self.kernel_h * self.kernel_w - self.remove_center

    @property
    def record_width(self) -> int:
        """Return the values of one group's record: 3 K, rounded up so that records are aligned."""
        return -(-3 * self.points // RECORD_STEP) * RECORD_STEP

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (Ho, Wo) of an image of ``height`` rows and ``width`` columns.

        Raises:
            UsageError: when the kernel does not fit into the padded image.
        """
        rows = height + 2 * self.pad_h - self.dilation_h * (self.kernel_h - 1) - 1
        columns = width + 2 * self.pad_w - self.dilation_w * (self.kernel_w - 1) - 1
        if rows < 0 or columns < 0:
            raise UsageError(
                f"a kernel of {self.kernel_h}x{self.kernel_w} does not fit an image of {height}x{width}",
                at="deploycc::DCNv3",
                fix="pad more, or use a larger image",
            )
        return rows // self.stride_h + 1, columns // self.stride_w + 1

    def check_shapes(self, x: Sequence[int], offset: Sequence[int], mask: Sequence[int], *, at: str = "deploycc::DCNv3") -> None:
        """Check that the operands belong together.

        Raises:
            UsageError: naming the operand, its shape and the shape that was expected.
        """
        if len(x) != 4 or x[3] % self.group:
            raise UsageError(f"x has the shape {list(x)}", at=at, fix=f"give [N, H, W, C] with C a multiple of the {self.group} groups")
        size = self.output_size(x[1], x[2])
        for name, shape, values in (("offset", offset, 2 * self.points), ("mask", mask, self.points)):
            least = [x[0], *size, self.group * (3 * self.points if self.record else values)]
            fits = len(shape) == 4 and list(shape[:3]) == least[:3] and shape[3] % self.group == 0 and shape[3] >= least[3]
            if not fits or (not self.record and shape[3] != least[3]):
                raise UsageError(f"{name} has the shape {list(shape)}, and {least} was expected", at=at, fix=_SHAPE_FIX)

    def attributes(self, *, operator: str = PLAIN) -> list[ir.Attr]:
        """Return the attributes of a node, with those by which TensorRT finds the plugin."""
        values = asdict(self)
        if operator in (PLAIN, SCALED):
            del values["x_scale"]
        if operator != REQUANTIZED:
            del values["y_scale"]
        found = [ir.AttrFloat32(n, v) if isinstance(v, float) else ir.AttrInt64(n, v) for n, v in values.items()]
        return [*found, ir.AttrString("plugin_namespace", ""), ir.AttrString("plugin_version", str(VERSION))]


_SHAPE_FIX = "the offsets are [N, Ho, Wo, G K 2] and the mask [N, Ho, Wo, G K]: compute both at the resolution of the output"


def _refused(name: str, value: object, fix: str) -> UsageError:
    return UsageError(f"the attribute {name} of DCNv3 is {value}", at="deploycc::DCNv3", fix=fix)


def attributes_of(node: ir.Node) -> DCNv3:
    """Return the attributes of a node of the operator; those it lacks have their defaults.

    Raises:
        UsageError: when one makes no sense.
    """
    known = {f.name for f in fields(DCNv3)}
    return DCNv3(**{name: attr.value for name, attr in node.attributes.items() if name in known})


def is_dcnv3(node: ir.Node) -> bool:
    """Return whether ``node`` is one of the forms of the operator."""
    return node.domain == DOMAIN and node.op_type in OPERATORS


def nodes_of(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the operator in the main graph."""
    return [node for node in model.graph if is_dcnv3(node)]


def check_operands(node: ir.Node) -> None:
    """Check types and shapes of x, offsets and masks as far as they are known.

    Raises:
        UsageError: naming the node, the operand, and what was expected: kernels would read the wrong rows without a word.
    """
    at, operands = f"node '{node.name}'", {name: node.inputs[i] for name, i in (("x", X), ("offset", OFFSET), ("mask", MASK))}
    for name, value in operands.items():
        allowed = TYPES[name] | ({ir.DataType.INT8} if name == "x" and node.op_type in (DEQUANTIZED, REQUANTIZED) else set())
        if value is None or (value.dtype is not None and value.dtype not in allowed):
            known = ", ".join(sorted(t.name for t in allowed))
            what = f"{name} is {value.dtype}" if value is not None else f"{name} is missing"
            raise UsageError(what, at=at, fix=f"give one of {known}; offsets in BF16 or INT8 would miss their pixels")
    shapes = [list(v.shape) for v in operands.values() if v is not None and v.shape is not None]
    if len(shapes) == len(operands) and all(len(s) == 4 and all(isinstance(d, int) for d in s[1:]) for s in shapes):
        head = shapes[0][0] if isinstance(shapes[0][0], int) else 1
        x, offset, mask = ([head, *(int(d) for d in s[1:] if isinstance(d, int))] for s in shapes)
        attributes_of(node).check_shapes(x, offset, mask, at=at)


def feeds_offsets(value: ir.Value) -> bool:
    """Return whether ``value`` becomes the offsets of a node of the operator, with nothing but layout and a bias between."""
    for use in value.uses():
        if is_dcnv3(use.node):
            if use.idx == OFFSET:
                return True
        elif use.node.op_type in _MOVES and any(feeds_offsets(output) for output in use.node.outputs):
            return True
    return False


def make_node(inputs: Sequence[ir.Value], what: DCNv3, *, name: str | None, operator: str = PLAIN) -> ir.Node:
    """Return a node of the operator; the model needs its function as well (`provide_functions`)."""
    return ir.Node(DOMAIN, operator, inputs, what.attributes(operator=operator), num_outputs=1, name=name)


def replace_attributes(node: ir.Node, what: DCNv3) -> None:
    """Give ``node`` the attributes of ``what``."""
    node.attributes.update((attr.name, attr) for attr in what.attributes(operator=node.op_type))


def provide_functions(model: ir.Model) -> None:
    """Give the model the body of every form of the operator that it uses, and drop those that it does not.

    Attributes that a node lacks are written out: not every runtime knows defaults of functions.
    """
    nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if is_dcnv3(node)]
    for node in nodes:
        replace_attributes(node, attributes_of(node))
    used = {node.op_type for node in nodes}
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] in OPERATORS and key[1] not in used]:
        del model.functions[key]
    if not used:
        return
    model.graph.opset_imports[DOMAIN] = VERSION
    for operator in sorted(used):
        body = function(operator, opset=model.graph.opset_imports.get("", 20))
        model.functions[body.identifier()] = body


def function(operator: str = PLAIN, *, opset: int = 20) -> ir.Function:
    """Return the body of one form of the operator as a model-local function.

    Args:
        operator: one of ``OPERATORS``.
        opset: of the default domain, 16 (the first with GridSample) or later.
    """
    return _parsed(operator, max(16, opset)).clone()


@cache
def _parsed(operator: str, opset: int) -> ir.Function:
    return next(iter(ir.from_onnx_text(_text(operator, opset)).functions.values()))


def _text(operator: str, opset: int) -> str:
    """Return a model in ONNX text that holds nothing but the function."""
    attributes = DCNv3(group=1).attributes(operator=operator)
    defaults = ", ".join(f"{a.name}: {_KINDS[a.type]} = {_literal(a)}" for a in attributes if a.name != "group")
    scaled = (
        "x_s = Constant<value_float: float = @x_scale>() s_x = Cast<to=1>(x_s) xf = Mul(xn, s_x)"
        if operator in (DEQUANTIZED, REQUANTIZED)
        else "xf = Identity(xn)"
    )
    return f"""<ir_version: 10, opset_import: ["": {opset}, "{DOMAIN}": {VERSION}]> none () => () {{}}
<domain: "{DOMAIN}", opset_import: ["": {opset}]>
{operator} <group, {defaults}>(x, offset, mask{", center" if operator == SCALED else ""}) => (y)
{{ {_POINTS} {_SHAPES} xn = Cast<to=1>(x) {scaled} {_SAMPLES} {_BLEND if operator == SCALED else "blend = Identity(summed)"}
 whole = Reshape(blend, y_shape) {_RESULTS[operator]} }}"""


_KINDS = {ir.AttributeType.INT: "int", ir.AttributeType.FLOAT: "float", ir.AttributeType.STRING: "string"}


def _literal(attr: ir.Attr) -> str:
    return f'"{attr.value}"' if attr.type == ir.AttributeType.STRING else repr(attr.value)


# The body. Names follow the formula above. Whatever is computed in floating point is FP32, by Cast, whatever the operands are.
# GridSample has no attributes on purpose: bilinear, zeros outside and align_corners=0 are the defaults of every opset, while the name
# of the mode changed in opset 20 and TensorRT up to 11.1 reads the new one as nearest.
_POINTS = """
 groups = Constant<value_int: int = @group>() kh = Constant<value_int: int = @kernel_h>() kw = Constant<value_int: int = @kernel_w>()
 sh = Constant<value_int: int = @stride_h>() sw = Constant<value_int: int = @stride_w>()
 ph = Constant<value_int: int = @pad_h>() pw = Constant<value_int: int = @pad_w>()
 dh = Constant<value_int: int = @dilation_h>() dw = Constant<value_int: int = @dilation_w>()
 without = Constant<value_int: int = @remove_center>() logits = Constant<value_int: int = @softmax>()
 record = Constant<value_int: int = @record>()
 scale_s = Constant<value_float: float = @offset_scale>() scale = Cast<to=1>(scale_s)
 zero = Constant<value_int=0>() one = Constant<value_int=1>() two = Constant<value_int=2>()
 v1 = Constant<value_ints=[1]>() v2 = Constant<value_ints=[2]>() v4 = Constant<value_ints=[4]>() v0 = Constant<value_ints=[0]>()
 rest = Constant<value_ints=[-1]>() one_f = Cast<to=1>(one) two_f = Cast<to=1>(two)
 area = Mul(kh, kw) points = Sub(area, without) count = Range(zero, points, one)
 half = Div(area, two) behind_b = GreaterOrEqual(count, half) behind = Cast<to=7>(behind_b)
 skipped = Mul(behind, without) t = Add(count, skipped) i = Div(t, kh) full = Mul(i, kh) j = Sub(t, full)
 kw_1 = Sub(kw, one) reach_w = Mul(dw, kw_1) cx = Div(reach_w, two) i_dw = Mul(i, dw) kx_i = Sub(i_dw, cx) kx = Cast<to=1>(kx_i)
 kh_1 = Sub(kh, one) reach_h = Mul(dh, kh_1) cy = Div(reach_h, two) j_dh = Mul(j, dh) ky_i = Sub(j_dh, cy) ky = Cast<to=1>(ky_i)"""
_SHAPES = """
 n = Shape<start=0, end=1>(x) h = Shape<start=1, end=2>(x) w = Shape<start=2, end=3>(x) c = Shape<start=3, end=4>(x)
 ho = Shape<start=1, end=2>(offset) wo = Shape<start=2, end=3>(offset) ho_s = Squeeze(ho) wo_s = Squeeze(wo)
 g = Reshape(groups, v1) k = Reshape(points, v1) k2 = Mul(k, v2) cg = Div(c, g) ng = Mul(n, g)
 from_mask = Mul(record, k2) to_mask = Add(from_mask, k)
 row_shape = Concat<axis=0>(n, ho, wo, g, rest) off_shape = Concat<axis=0>(n, ho, wo, g, k, v2)
 x_shape = Concat<axis=0>(n, h, w, g, cg) image_shape = Concat<axis=0>(ng, cg, h, w) grid_shape = Concat<axis=0>(ng, rest, k, v2)
 mask_shape = Concat<axis=0>(ng, v1, rest, k) sum_shape = Concat<axis=0>(n, g, cg, ho, wo) y_shape = Concat<axis=0>(n, ho, wo, c)
 column = Constant<value_ints=[1, 1, -1, 1, 1]>() line = Constant<value_ints=[1, -1, 1, 1, 1]>()"""
_SAMPLES = """
 off_n = Cast<to=1>(offset) off_r = Reshape(off_n, row_shape) off_k = Slice(off_r, v0, k2, v4) off6 = Reshape(off_k, off_shape)
 dx = Gather<axis=5>(off6, zero) dy = Gather<axis=5>(off6, one)
 xo = Range(zero, wo_s, one) xo_s = Mul(xo, sw) shift_w = Sub(cx, pw) bx_i = Add(xo_s, shift_w) bx_f = Cast<to=1>(bx_i)
 yo = Range(zero, ho_s, one) yo_s = Mul(yo, sh) shift_h = Sub(cy, ph) by_i = Add(yo_s, shift_h) by_f = Cast<to=1>(by_i)
 bx = Reshape(bx_f, column) by = Reshape(by_f, line)
 moved_x = Add(dx, kx) far_x = Mul(moved_x, scale) px = Add(bx, far_x)
 moved_y = Add(dy, ky) far_y = Mul(moved_y, scale) py = Add(by, far_y)
 wf = Cast<to=1>(w) hf = Cast<to=1>(h)
 px2 = Mul(px, two_f) px21 = Add(px2, one_f) px_w = Div(px21, wf) gx = Sub(px_w, one_f)
 py2 = Mul(py, two_f) py21 = Add(py2, one_f) py_h = Div(py21, hf) gy = Sub(py_h, one_f)
 five = Constant<value_ints=[5]>() gx6 = Unsqueeze(gx, five) gy6 = Unsqueeze(gy, five) grid6 = Concat<axis=5>(gx6, gy6)
 grid_t = Transpose<perm=[0, 3, 1, 2, 4, 5]>(grid6) grid = Reshape(grid_t, grid_shape)
 x5 = Reshape(xf, x_shape) x_t = Transpose<perm=[0, 3, 4, 1, 2]>(x5) image = Reshape(x_t, image_shape)
 samples = GridSample(image, grid)
 mask_n = Cast<to=1>(mask) mask_r = Reshape(mask_n, row_shape) mask_k = Slice(mask_r, from_mask, to_mask, v4)
 soft = Softmax<axis=-1>(mask_k) is_logits = Cast<to=9>(logits) m5 = Where(is_logits, soft, mask_k)
 mask_t = Transpose<perm=[0, 3, 1, 2, 4]>(m5) m4 = Reshape(mask_t, mask_shape)
 weighted = Mul(samples, m4) three = Constant<value_ints=[3]>() total = ReduceSum<keepdims=0>(weighted, three)
 total5 = Reshape(total, sum_shape) summed = Transpose<perm=[0, 3, 4, 1, 2]>(total5)"""
_BLEND = """
 c_n = Cast<to=1>(center) c5 = Unsqueeze(c_n, v4) c_1 = Sub(one_f, c5) kept = Mul(summed, c_1) own = Mul(x5, c5) blend = Add(kept, own)"""
_RESULTS = {
    PLAIN: "y = CastLike(whole, x)",
    SCALED: "y = CastLike(whole, x)",
    DEQUANTIZED: "y = CastLike(whole, mask)",
    REQUANTIZED: "y_s = Constant<value_float: float = @y_scale>() s_y = Cast<to=1>(y_s) steps = Div(whole, s_y) "
    "lowest = Constant<value_float=-128.0>() highest = Constant<value_float=127.0>() "
    "code = Round(steps) code_1 = Max(code, lowest) code_2 = Min(code_1, highest) y = Cast<to=3>(code_2)",
}
