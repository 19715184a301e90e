"""Every kind of curvature against its own dense form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedpm_flwr.curvature import KINDS, Curvature, CurvatureError, Dense, Identity, KroneckerRight, weighted_sum

from .helpers import COLUMNS, MAKERS, ROWS, random_curvature, relative_error

SIZE = ROWS * COLUMNS


def test_every_kind_is_tested() -> None:
    assert set(MAKERS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
class TestAgainstDense:
    @pytest.fixture
    def curvature(self, kind: str, dtype: torch.dtype) -> Curvature:
        return random_curvature(kind, torch.Generator().manual_seed(1)).to(dtype)

    @pytest.fixture
    def delta(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(ROWS, COLUMNS, dtype=dtype, generator=torch.Generator().manual_seed(2))

    def test_matmul(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = curvature.to_dense(SIZE).to(delta) @ delta.flatten()
        assert relative_error(curvature.matmul(delta).flatten(), expected) < tolerance

    def test_solve(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = torch.linalg.solve(curvature.to_dense(SIZE).to(delta), delta.flatten())
        assert relative_error(curvature.solve(delta).flatten(), expected) < tolerance
        assert curvature.solve(delta).dtype == delta.dtype

    def test_damped(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = curvature.to_dense(SIZE) + 0.7 * torch.eye(SIZE).to(curvature.to_dense(SIZE))
        assert relative_error(curvature.damped(0.7).to_dense(SIZE), expected) < tolerance

    @pytest.mark.parametrize("other", KINDS)
    def test_weighted_sum(self, curvature: Curvature, other: str, dtype: torch.dtype, tolerance: float) -> None:
        second = random_curvature(other, torch.Generator().manual_seed(3)).to(dtype)
        found = weighted_sum([0.3, 0.7], [curvature, second]).to_dense(SIZE).double()
        expected = 0.3 * curvature.to_dense(SIZE).double() + 0.7 * second.to_dense(SIZE).double()
        assert relative_error(found, expected) < tolerance

    def test_nothing_is_changed(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        before, delta_before = curvature.to_dense(SIZE).clone(), delta.clone()
        curvature.damped(1.0).plus(curvature.scaled(2.0)).solve(curvature.matmul(delta))
        assert torch.equal(curvature.to_dense(SIZE), before)
        assert torch.equal(delta, delta_before)


def indefinite(kind: str) -> Curvature:
    match kind:
        case Identity.kind:
            return Identity(0.0)
        case Dense.kind:
            return Dense(-torch.eye(SIZE))
    return KroneckerRight(-torch.eye(COLUMNS))


@pytest.mark.parametrize("kind", KINDS)
def test_not_positive_definite_is_an_error(kind: str) -> None:
    with pytest.raises(CurvatureError, match="not positive definite"):
        indefinite(kind).solve(torch.ones(ROWS, COLUMNS))


@pytest.mark.parametrize(("least", "passes"), [(1e-12, True), (1e-14, False)])
def test_a_matrix_on_the_edge_is_refused_while_it_still_has_a_cholesky_factor(least: float, passes: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, least], dtype=torch.float64))
    KroneckerRight(matrix).solve(torch.ones(1, 2, dtype=torch.float64))
    for curvature in (KroneckerRight(matrix), Dense(matrix)):
        if passes:
            curvature.check_positive_definite()
        else:
            with pytest.raises(CurvatureError, match="side 2 is not positive definite"):
                curvature.check_positive_definite()


@pytest.mark.parametrize("scale", [0.0, 1e-101, 1e101, float("inf"), float("nan")])
def test_a_matrix_of_no_size_to_compute_with_is_refused(scale: float) -> None:
    with pytest.raises(CurvatureError, match="a matrix of trace"):
        KroneckerRight(scale * torch.ones(1, 1, dtype=torch.float64)).check_positive_definite()


def test_float32_that_fails_is_solved_in_float64() -> None:
    # A Gram matrix of whole numbers: exact in float32, of determinant 1, and too badly conditioned
    # (4e10) for float32 arithmetic.
    generator = torch.Generator().manual_seed(3)
    lower = torch.tril(torch.randint(-20, 21, (5, 5), generator=generator), diagonal=-1) + torch.eye(5)
    matrix = (lower @ lower.T).flip(0, 1)
    _, failed_in_float32 = torch.linalg.cholesky_ex(matrix)
    assert failed_in_float32, "the matrix must be one that float32 cannot factorise"
    found = KroneckerRight(matrix).solve(matrix[:1])  # its first row times its inverse: a unit vector
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.eye(5)[:1], atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_a_factor_must_be_square(shape: tuple[int, ...]) -> None:
    for kind in (Dense, KroneckerRight):
        with pytest.raises(CurvatureError, match="square"):
            kind(torch.zeros(shape))


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(CurvatureError, match="12"):
        Dense(torch.eye(12)).matmul(torch.zeros(2, 2))
    factor = KroneckerRight(torch.eye(4))
    misuses: list[Callable[[], object]] = [
        lambda: factor.to_dense(6),
        lambda: factor.matmul(torch.zeros(2, 3)),
        lambda: factor.solve(torch.zeros(2, 3)),
        lambda: factor.plus(KroneckerRight(torch.eye(1))),
        lambda: factor.plus(Dense(torch.eye(6))),
    ]
    for misuse in misuses:
        with pytest.raises(CurvatureError, match="side 4"):
            misuse()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype: torch.dtype) -> None:
    rhs = torch.ones(1, 3, dtype=dtype)
    found = KroneckerRight(4 * torch.eye(3, dtype=dtype)).solve(rhs)
    assert found.dtype == dtype
    assert torch.equal(found, rhs / 4)
