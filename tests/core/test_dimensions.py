import onnx_ir as ir
import pytest

from deploycc.core.dimensions import Dim, Size, dimensions, divide, is_anonymous, product, symbol, to_shape

N, M = symbol("N"), symbol("M")


def test_arithmetic_is_that_of_polynomials() -> None:
    assert N + M - N == M
    assert 2 * N * 3 == 6 * N
    assert (N + 1) * (N - 1) + 1 == N * N
    assert N - N == 0
    assert product([N, 4, 2]) == 8 * N


@pytest.mark.parametrize(
    ("total", "part", "quotient"),
    [(24 * N, 6, 4 * N), (24 * N, N, 24), (24 * N * M, 8 * M, 3 * N), (24, 6, 4), (N * 0, 4, 0), (6 * N + 3, 3, 2 * N + 1)],
)
def test_division_without_a_remainder(total: Size, part: Size, quotient: Size) -> None:
    assert divide(total, part) == quotient


@pytest.mark.parametrize(("total", "part"), [(24 * N, 7), (7, 2), (N, M), (N, N * N), (24, 0), (N * M, N + M), (N + 1, N)])
def test_a_division_that_may_leave_a_remainder_is_refused(total: Size, part: Size) -> None:
    assert divide(total, part) is None


@pytest.mark.parametrize(("text", "size"), [("N", N), ("64*N", 64 * N), ("N + 1", N + 1), ("(N - 1)*2", 2 * N - 2)])
def test_names_of_exporters_are_read_and_written(text: str, size: Size) -> None:
    value = ir.Value(name="v", shape=ir.Shape([text, 3]))
    assert dimensions(value) == (size, 3)
    assert dimensions(ir.Value(name="w", shape=to_shape([size, 3]))) == (size, 3)


def test_what_is_no_polynomial_is_a_symbol_of_its_own() -> None:
    first, second = dimensions(ir.Value(name="v", shape=ir.Shape(["N//2", None])))
    assert first == symbol("N//2")
    assert first != second
    assert is_anonymous(second)
    assert not is_anonymous(first)
    assert list(to_shape([second])) == [None]


def test_signs() -> None:
    assert isinstance(N + 1, Dim)
    assert (N + 1).is_nonnegative
    assert not (N - 1).is_nonnegative
