"""Every kind of curvature against its own dense form: one suite for all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedpm_flwr.curvature import (
    KINDS,
    Curvature,
    CurvatureError,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerRight,
    LowRank,
    Spill,
    Sum,
    mean_factors,
    plus,
    weighted_sum,
)

from .helpers import COLUMNS, MAKERS, ROWS, random_curvature, relative_error, spd

SIZE = ROWS * COLUMNS
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_every_kind_is_tested() -> None:
    kinds = {random_curvature(form, torch.Generator()).kind for form in MAKERS}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("form", MAKERS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
class TestAgainstDense:
    @pytest.fixture
    def curvature(self, form: str, dtype: torch.dtype, device: str) -> Curvature:
        return random_curvature(form, torch.Generator().manual_seed(1)).to(dtype, device)

    @pytest.fixture
    def delta(self, dtype: torch.dtype, device: str) -> Tensor:
        return torch.randn(ROWS, COLUMNS, dtype=dtype, generator=torch.Generator().manual_seed(2)).to(device)

    def test_matmul(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = curvature.to_dense(SIZE).to(delta) @ delta.flatten()
        assert relative_error(curvature.matmul(delta).flatten(), expected) < tolerance

    def test_solve_and_inverse(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = torch.linalg.solve(curvature.to_dense(SIZE).to(delta), delta.flatten())
        for found in (curvature.solve(delta), curvature.inverse().matmul(delta)):
            assert relative_error(found.flatten(), expected) < tolerance
            assert found.dtype == delta.dtype

    def test_bfloat16_inputs(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        half = delta.bfloat16()
        for found, expected in (
            (curvature.matmul(half), curvature.matmul(half.to(delta))),
            (curvature.solve(half), curvature.solve(half.to(delta))),
            (curvature.inverse().matmul(half), curvature.solve(half.to(delta))),
        ):
            assert found.dtype == torch.bfloat16
            assert relative_error(found.to(delta), expected) < 1e-2

    def test_damped(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = curvature.to_dense(SIZE) + 0.7 * torch.eye(SIZE).to(curvature.to_dense(SIZE))
        assert relative_error(curvature.damped(0.7).to_dense(SIZE), expected) < tolerance

    def test_scaled(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        found = curvature.damped(0.1).scaled(0.7).to_dense(SIZE)
        assert relative_error(found, 0.7 * curvature.damped(0.1).to_dense(SIZE)) < tolerance

    def test_diagonal(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        expected = curvature.to_dense(SIZE).diagonal().reshape(ROWS, COLUMNS)
        assert relative_error(curvature.diagonal(ROWS, COLUMNS), expected) < tolerance

    @pytest.mark.parametrize("other", MAKERS)
    def test_weighted_sum(
        self, curvature: Curvature, other: str, delta: Tensor, dtype: torch.dtype, device: str, tolerance: float
    ) -> None:
        """Also its product and its solution, whichever kind it has become."""
        second = random_curvature(other, torch.Generator().manual_seed(3)).to(dtype, device)
        total = weighted_sum([0.3, 0.7], [curvature, second])
        expected = 0.3 * curvature.to_dense(SIZE).double() + 0.7 * second.to_dense(SIZE).double()
        assert relative_error(total.to_dense(SIZE).double(), expected.to(total.to_dense(SIZE).device)) < tolerance
        expected = expected.to(delta.device)
        assert (
            relative_error(total.matmul(delta).flatten().double(), expected @ delta.double().flatten()) < tolerance
        )
        solution = torch.linalg.solve(expected, delta.double().flatten())
        assert relative_error(total.solve(delta).flatten().double(), solution) < tolerance

    def test_a_copy_by_parts(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        shapes = {name: part.shape for name, part in curvature.parts().items()}
        assert type(curvature).fits(shapes, ROWS, COLUMNS)
        assert not (shapes and type(curvature).fits(shapes, ROWS + 1, COLUMNS + 1))
        if shapes:
            assert relative_error(type(curvature)(**curvature.parts()).matmul(delta), curvature.matmul(delta)) == 0

    def test_positive_definite_passes(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        curvature.damped(0.1).check_positive_definite()

    def test_nothing_is_changed(self, curvature: Curvature, delta: Tensor, tolerance: float) -> None:
        before, delta_before = curvature.to_dense(SIZE).clone(), delta.clone()
        plus(curvature.damped(1.0), curvature.scaled(2.0)).solve(curvature.matmul(delta))
        assert torch.equal(curvature.to_dense(SIZE), before)
        assert torch.equal(delta, delta_before)


@pytest.mark.parametrize("form", MAKERS)
def test_badly_scaled_matrices_are_solved_as_well_as_their_condition_lets(form: str) -> None:
    """Condition 1e12, alone and in a sum with a second one of the same form; backward error of rounding only."""
    generator = torch.Generator().manual_seed(5)
    first, second = (random_curvature(form, generator, 1e12) for _ in range(2))
    delta = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    for curvature in (first, plus(first, second)):
        rhs = curvature.matmul(delta)
        found = curvature.solve(rhs)
        size = float(curvature.to_dense(SIZE).norm() * found.norm() + rhs.norm())
        assert float((curvature.matmul(found) - rhs).norm()) < 1e-11 * size
        assert relative_error(found, delta) < 1e-3


@pytest.mark.parametrize("form", [form for form in MAKERS if form != "identity"])
def test_rank_deficient_matrices_need_damping(form: str) -> None:
    """λ = 0 is refused; with damping they are solved."""
    generator = torch.Generator().manual_seed(6)
    curvature = random_curvature(form, generator).map(without_its_least_direction)
    with pytest.raises(CurvatureError, match=r"not positive definite|a diagonal from"):
        curvature.check_positive_definite()
    delta = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    damped = curvature.damped(1e-3)
    damped.check_positive_definite()
    assert relative_error(damped.solve(damped.matmul(delta)), delta) < 1e-10


def without_its_least_direction(part: Tensor) -> Tensor:
    """A symmetric matrix without its least eigenvalue; other parts without their least number."""
    if part.ndim > 1 and part.shape[-1] == part.shape[-2]:
        values, vectors = torch.linalg.eigh(part)
        values[..., 0] = 0
        part = (vectors * values[..., None, :]) @ vectors.mT
        return part
    return torch.where(part == part.min(), torch.zeros_like(part), part)


INDEFINITE: dict[str, Curvature] = {
    "identity": Identity(0.0),
    "diagonal": Diagonal(torch.full((ROWS, 1), -1.0)),
    "dense": Dense(-torch.eye(SIZE)),
    "kronecker-right": KroneckerRight(-torch.eye(COLUMNS)),
    "kronecker": Kronecker(-torch.eye(ROWS), torch.eye(COLUMNS)),
    "low-rank": LowRank(-torch.ones(COLUMNS), torch.zeros(COLUMNS, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_not_positive_definite_is_an_error(kind: str) -> None:
    for misuse in (INDEFINITE[kind].inverse, lambda: INDEFINITE[kind].solve(torch.ones(ROWS, COLUMNS))):
        with pytest.raises(CurvatureError, match="not positive definite"):
            misuse()
    with pytest.raises(CurvatureError):
        INDEFINITE[kind].check_positive_definite()


@pytest.mark.parametrize(("least", "passes"), [(1e-12, True), (1e-14, False)])
def test_a_matrix_on_the_edge_is_refused_while_it_still_has_a_cholesky_factor(least: float, passes: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, least], dtype=torch.float64))
    KroneckerRight(matrix).solve(torch.ones(1, 2, dtype=torch.float64))
    for curvature in (
        KroneckerRight(matrix),
        Dense(matrix),
        LowRank(matrix.diagonal(), torch.zeros(2, 1).double()),
    ):
        if passes:
            curvature.check_positive_definite()
        else:
            with pytest.raises(CurvatureError, match="side 2 is not positive definite"):
                curvature.check_positive_definite()


@pytest.mark.parametrize(("damping", "passes"), [(1e-3, True), (1e-15, False)])
def test_a_kronecker_product_of_singular_factors_needs_damping(damping: float, passes: bool) -> None:
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    rounded = torch.diag(torch.tensor([1.0, -1e-7], dtype=torch.float64))  # as float32 leaves it
    for left, right in ((singular, torch.eye(2).double()), (torch.eye(2).double(), singular), (rounded, singular)):
        curvature = Kronecker(left, right).damped(damping)
        if passes:
            curvature.check_positive_definite()
        else:
            with pytest.raises(CurvatureError, match="sides 2 and 2 is not positive definite"):
                curvature.check_positive_definite()


def test_a_kronecker_product_of_two_indefinite_factors_is_refused() -> None:
    indefinite = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    for damping in (1.0, 3.0):  # however much it is damped: a second moment has no negative eigenvalue
        with pytest.raises(CurvatureError, match="not positive definite"):
            Kronecker(indefinite, indefinite).damped(damping).check_positive_definite()


def test_a_kronecker_product_with_a_factor_of_zeros_is_its_damping() -> None:
    zeros, ones = torch.zeros(2, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for curvature in (Kronecker(zeros, ones), Kronecker(ones, zeros)):
        curvature.damped(0.1).check_positive_definite()
        delta = torch.ones(len(curvature.left), len(curvature.right), dtype=torch.float64)
        torch.testing.assert_close(curvature.damped(0.1).solve(delta), 10 * delta)
        with pytest.raises(CurvatureError, match="a matrix of trace 0"):
            curvature.check_positive_definite()


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
def test_how_a_client_scales_its_two_factors_changes_nothing(
    scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(12)
    clients = [random_curvature("kronecker", generator, 1e4).damped(1e-3) for _ in range(4)]
    rhs = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    first = clients[0]
    assert isinstance(first, Kronecker)
    other = Kronecker(first.left * scale, first.right / scale, first.weight, first.shift)
    results = [weighted_sum([1.0] * 4, [one, *clients[1:]]).solve(rhs) for one in (first, other)]
    assert relative_error(results[1], results[0]) < 1e-8
    assert "solved to a residual" not in caplog.text
    means = []
    for one in (first, other):
        assert isinstance(clients[1], Kronecker)
        means.append(mean_factors(one, clients[1]).to_dense(SIZE))
    assert relative_error(means[1], means[0]) < 1e-12


def test_a_sum_that_is_singular_or_indefinite_is_an_error() -> None:
    half = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    rows = Diagonal(torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    turned = Diagonal(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
    indefinite = Kronecker(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64)), torch.eye(2).double())
    rhs = torch.ones(2, 2, dtype=torch.float64)
    for total in (plus(Kronecker(half, torch.eye(2).double()), rows), plus(indefinite, turned)):
        with pytest.raises(CurvatureError, match="not positive definite"):
            total.solve(rhs)
        with pytest.raises(CurvatureError):
            total.check_positive_definite()
    assert torch.equal(plus(indefinite.damped(3.0), turned).solve(torch.zeros(2, 2)), torch.zeros(2, 2))
    # Its diagonal tells nothing: only the direction (1, −1) does.
    hidden = Kronecker(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), torch.eye(2).double())
    with pytest.raises(CurvatureError, match=r"not positive definite: .* in one direction"):
        plus(hidden, turned.scaled(0.1)).solve(torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64))


def test_stacks_of_different_groups_are_summed_all_the_same() -> None:
    """As a broken client may send them: 2 and 3 groups of 6 rows, and none."""
    generator = torch.Generator().manual_seed(13)
    forms = [KroneckerRight(torch.stack([spd(COLUMNS, generator) for _ in range(g)])) for g in (2, 3, 1, 3, 2)]
    total = weighted_sum([1.0] * 5, forms)
    expected = torch.stack([form.to_dense(SIZE) for form in forms]).sum(0)
    assert relative_error(total.to_dense(SIZE), expected) < 1e-12
    rhs = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    assert relative_error(total.matmul(total.solve(rhs)), rhs) < 1e-10


def test_low_rank_is_solved_without_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    few = LowRank(torch.ones(8).double(), torch.randn(8, 2).double())
    rhs = torch.randn(3, 8, dtype=torch.float64)
    expected = few.to_factor().solve(rhs)
    monkeypatch.setattr(LowRank, "to_factor", None)
    torch.testing.assert_close(few.solve(rhs), expected)


def test_a_diagonal_whose_inverse_overflows_is_an_error() -> None:
    with pytest.raises(CurvatureError, match="not positive definite"):
        Diagonal(torch.tensor([[1.0, 1e-42]])).inverse()


@pytest.mark.parametrize("scale", [0.0, 1e-101, 1e101, float("inf"), float("nan")])
def test_a_matrix_of_no_size_to_compute_with_is_refused(scale: float) -> None:
    one = scale * torch.ones(1, 1, dtype=torch.float64)
    for curvature in (KroneckerRight(one), Kronecker(one, one), LowRank(one[0], one), Diagonal(one)):
        with pytest.raises(CurvatureError, match=r"a matrix of trace|a diagonal from|not positive definite"):
            curvature.check_positive_definite()


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


def test_a_kronecker_product_that_float32_cannot_tell_from_singular_is_inverted_in_float64() -> None:
    large = torch.diag(torch.tensor([1e4, 0.0]))
    P = Kronecker(large, large).damped(1.0)  # eigenvalues 1e8 and 1: of condition 1e8, too much for float32
    found = P.solve(torch.ones(2, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[1e-8, 1.0], [1.0, 1.0]]))
    with pytest.raises(CurvatureError, match="not positive definite"):
        Kronecker(large, large).damped(1e-9).inverse()


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_a_factor_must_be_square(shape: tuple[int, ...]) -> None:
    one = torch.eye(2)
    makers: list[Callable[[Tensor], Curvature]] = [
        Dense,
        KroneckerRight,
        lambda part: Kronecker(part, one),
        lambda part: Kronecker(one, part),
    ]
    for make in makers:
        with pytest.raises(CurvatureError, match="square"):
            make(torch.zeros(shape))


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(CurvatureError, match="12"):
        Dense(torch.eye(12)).matmul(torch.zeros(2, 2))
    factor, product = KroneckerRight(torch.eye(4)), Kronecker(torch.eye(2), torch.eye(4))
    grouped, few = KroneckerRight(torch.eye(4).expand(3, 4, 4)), LowRank(torch.ones(4), torch.ones(4, 1))
    misuses: list[tuple[Callable[[], object], str]] = [
        (lambda: factor.to_dense(6), "side 4 has no form of side 6"),
        (lambda: factor.matmul(torch.zeros(2, 3)), "side 4"),
        (lambda: factor.solve(torch.zeros(2, 3)), "side 4"),
        (lambda: plus(factor, KroneckerRight(torch.eye(1))), "side 4"),
        (lambda: plus(factor, Dense(torch.eye(6))), "side 4"),
        (lambda: grouped.matmul(torch.zeros(4, 4)), "side 4 in 3 groups"),
        (lambda: product.matmul(torch.zeros(3, 4)), r"\[3, 4\] met a Kronecker product"),
        (lambda: product.to_dense(12), "no form of side 12"),
        (lambda: Kronecker(torch.eye(2), torch.eye(4)[None]), "different groups"),
        (lambda: few.matmul(torch.zeros(2, 3)), r"\[2, 3\] met a low-rank matrix of side 4"),
        (lambda: plus(few, LowRank(torch.ones(3), torch.ones(3, 1))), "side 4"),
        (lambda: LowRank(torch.ones(3), torch.ones(4, 1)), r"not \[3\] and \[4, 1\]"),
        (lambda: Diagonal(torch.ones(3)), r"not torch.float32 \[3\]"),
        (lambda: Diagonal(torch.ones(3, 4)).matmul(torch.zeros(4, 4)), r"\[4, 4\] met a diagonal \[3, 4\]"),
        (lambda: Diagonal(torch.ones(3, 4)).to_dense(24), "no form of side 24"),
    ]
    for misuse, message in misuses:
        with pytest.raises(CurvatureError, match=message):
            misuse()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype: torch.dtype) -> None:
    rhs = torch.ones(1, 3, dtype=dtype)
    found = KroneckerRight(4 * torch.eye(3, dtype=dtype)).solve(rhs)
    assert found.dtype == dtype
    assert torch.equal(found, rhs / 4)


def test_sums_stay_small_where_a_kind_holds_them() -> None:
    """Running sums over many clients keep one term for each kind; only Kronecker products add up."""
    generator = torch.Generator().manual_seed(8)
    forms = ["diagonal", "kronecker-right", "low-rank", "diagonal, a number a row", "identity"] * 3
    total = weighted_sum([1.0] * len(forms), [random_curvature(form, generator) for form in forms])
    assert isinstance(total, Sum)
    assert sorted(term.kind for term in total.terms) == ["diagonal", "kronecker-right"]
    total = plus(total, random_curvature("dense", generator))
    assert total.to_dense(SIZE).shape == (SIZE, SIZE)


def test_low_rank_forms_the_matrix_once_that_is_cheaper() -> None:
    few = LowRank(torch.ones(8).double(), torch.randn(8, 2).double())
    kinds = [weighted_sum([1.0] * count, [few] * count).kind for count in (1, 2, 3)]
    assert kinds == ["low-rank", "low-rank", "kronecker-right"]


def test_the_factored_sum_is_exact_for_equal_products_and_approximate_for_others() -> None:
    generator = torch.Generator().manual_seed(9)
    one, two = (random_curvature("kronecker", generator).damped(0.1) for _ in range(2))
    assert isinstance(one, Kronecker)
    assert isinstance(two, Kronecker)
    exact = plus(one.scaled(0.3), one.scaled(0.7)).to_dense(SIZE)
    assert relative_error(mean_factors(one.scaled(0.3), one.scaled(0.7)).to_dense(SIZE), exact) < 1e-12
    exact = plus(one.scaled(0.3), two.scaled(0.7)).to_dense(SIZE)
    assert 0.01 < relative_error(mean_factors(one.scaled(0.3), two.scaled(0.7)).to_dense(SIZE), exact) < 1


def test_factors_of_the_most_different_sizes_are_brought_to_the_same() -> None:
    left, right = 1e49 * torch.eye(ROWS).double(), 1e-300 * torch.eye(COLUMNS).double()
    one, other = (factor.diagonal().mean() for factor in Kronecker(left, right).balanced())
    assert float(one) == pytest.approx(float(other))


def test_a_sum_that_is_not_solved_to_the_tolerance_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(10)
    total = plus(*(random_curvature("kronecker", generator, 1e10) for _ in range(2)))
    rhs = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    monkeypatch.setattr("fedpm_flwr.curvature.sum.MAX_ITERATIONS", 1)
    total.solve(rhs)
    assert "a sum of 2 curvatures is solved to a residual of" in caplog.text


def test_tensors_beyond_the_limit_are_kept_on_disk_and_nothing_is_left_there(tmp_path: object) -> None:
    spill = Spill(limit=1000, folder=str(tmp_path))
    tensors = [torch.randn(10, 10, dtype=torch.float64) for _ in range(3)]
    kept = [spill.keep(tensor) for tensor in tensors]
    assert spill.spilled == 1600
    assert kept[0] is tensors[0]
    assert all(torch.equal(old, new) for old, new in zip(tensors, kept, strict=True))
    assert kept[1].data_ptr() != tensors[1].data_ptr()
    assert list(__import__("pathlib").Path(str(tmp_path)).iterdir()) == []
    assert torch.equal(kept[2] @ kept[1], tensors[2] @ tensors[1])
