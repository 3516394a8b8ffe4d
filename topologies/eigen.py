"""Norms and eigenvalues of mixing matrices, from a handful of ranks to many thousands.

Circulant rounds (ring, exponential, EquiTopo, complete) are normal and diagonal in the Fourier
basis: one FFT. Small matrices are solved densely. Large sparse ones go to Lanczos, which needs few
products where the gap is wide, and to a sparse factorisation next to the wanted end of the spectrum
where the gap is tiny (paths, rings, long grids), since there Lanczos alone stalls.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh_tridiagonal
from scipy.sparse import linalg

from gossamer.topologies.round import Floats, Round

DENSE_LIMIT = 512  # below it a dense solve takes less than a tenth of a second
_TOLERANCE = 1e-11
_BESIDE = 1e-8  # how far from the end of the spectrum to factorise; at the end it is singular
_KRYLOV_STEPS = 100

End = Literal["LA", "SA"]  # largest or smallest algebraic, as ARPACK calls them


def circulant_eigenvalues(round_: Round) -> NDArray[np.complex128] | None:
    """Return the (n,) eigenvalues of a circulant W, that of the ones vector first.

    Row i of a circulant matrix holds c_o in column (i + o) mod n; its eigenvalues are
    sum_o c_o exp(2 pi i k o / n). Returns None if W is not circulant.
    """
    n, edges = round_.n, round_.num_messages
    degrees = np.diff(round_.indptr)
    if np.any(degrees != degrees[0]) or np.any(round_.self_weight != round_.self_weight[0]):
        return None
    offsets = ((round_.sources - round_.targets) % n).reshape(n, edges // n)
    order = np.argsort(offsets, axis=1)
    offsets = np.take_along_axis(offsets, order, axis=1)
    weights = np.take_along_axis(round_.weights.reshape(offsets.shape), order, axis=1)
    if np.any(offsets != offsets[0]) or np.any(weights != weights[0]):
        return None
    first_row = np.zeros(n)
    first_row[offsets[0]] = weights[0]
    first_row[0] = round_.self_weight[0]
    return np.asarray(np.fft.ifft(first_row) * n)


def second_eigenvalue(round_: Round) -> float:
    """Return the largest eigenvalue of a symmetric W apart from that of the ones vector."""
    if round_.n == 1:
        return 0.0
    eigenvalues = circulant_eigenvalues(round_)
    if eigenvalues is not None:
        return float(eigenvalues[1:].real.max())
    return largest_off_mean(round_.sparse())


def smallest_eigenvalue(round_: Round) -> float:
    """Return the smallest eigenvalue of a symmetric W."""
    eigenvalues = circulant_eigenvalues(round_)
    if eigenvalues is not None:
        return float(eigenvalues.real.min())
    if round_.n <= DENSE_LIMIT:
        return float(np.linalg.eigvalsh(round_.matrix())[0])
    matrix = round_.sparse()
    radius = np.bincount(round_.targets, np.abs(round_.weights), minlength=round_.n)
    gershgorin = float((round_.self_weight - radius).min())  # no eigenvalue is smaller
    return _end("SA", lambda x: matrix @ x, matrix, gershgorin - _BESIDE, num_beside=1)


def distance_to_mean(rounds: Sequence[Round]) -> float:
    """Return ||W_{T-1} .. W_0 - J||_2 of the rounds in the order of their use, J = 11^T/n."""
    n = rounds[0].n
    if n == 1:
        return 0.0
    eigenvalues = _product_of_circulants(rounds)
    if eigenvalues is not None:
        return float(np.abs(eigenvalues[1:]).max())
    if n <= DENSE_LIMIT:
        return float(np.linalg.norm(_product(rounds) - 1 / n, 2))
    matrices = [round_.sparse() for round_ in rounds]
    if len(rounds) == 1 and _keeps_mean(matrices[0]):
        gram = sparse.csr_array(matrices[0].T @ matrices[0])
        return float(np.sqrt(max(largest_off_mean(gram), 0.0)))

    def gram_off_mean(x: Floats) -> Floats:
        image = x
        for matrix in matrices:
            image = matrix @ image
        image = image - x.mean()
        back = image
        for matrix in reversed(matrices):
            back = matrix.T @ back
        return np.asarray(back - image.mean())

    largest = _krylov("LA", gram_off_mean, n)
    if largest is None:
        largest = _arpack("LA", gram_off_mean, n, ncv=100, maxiter=10 * n)
    return float(np.sqrt(max(largest, 0.0)))


def second_modulus(rounds: Sequence[Round]) -> float:
    """Return the second largest modulus of an eigenvalue of W_{T-1} .. W_0.

    The rate at which values approach their limit, whatever that limit is.
    """
    n = rounds[0].n
    if n == 1:
        return 0.0
    eigenvalues = _product_of_circulants(rounds)
    if eigenvalues is not None:
        return float(np.abs(eigenvalues[1:]).max())
    if n <= DENSE_LIMIT:
        return float(np.sort(np.abs(np.linalg.eigvals(_product(rounds))))[-2])
    matrices = [round_.sparse() for round_ in rounds]

    def product(x: Floats) -> Floats:
        for matrix in matrices:
            x = matrix @ x
        return x

    operator = linalg.LinearOperator((n, n), matvec=product, dtype=np.float64)
    found = linalg.eigs(operator, k=2, v0=_start(n), return_eigenvectors=False)
    return float(np.abs(found).min())


def _product_of_circulants(rounds: Sequence[Round]) -> NDArray[np.complex128] | None:
    product = np.ones(rounds[0].n, np.complex128)
    for round_ in rounds:
        eigenvalues = circulant_eigenvalues(round_)
        if eigenvalues is None:
            return None
        product *= eigenvalues
    return product


def _product(rounds: Sequence[Round]) -> Floats:
    product = np.eye(rounds[0].n)
    for round_ in rounds:
        product = round_.apply(product)
    return product


def _keeps_mean(matrix: sparse.csr_array) -> bool:
    sums = matrix.sum(axis=0), matrix.sum(axis=1)
    return all(bool(np.allclose(each, 1.0, rtol=0, atol=_BESIDE)) for each in sums)


def largest_off_mean(matrix: sparse.csr_array) -> float:
    """Return lambda_max((I-J) S (I-J)) of a symmetric S (n, n) that maps the ones to themselves."""
    n = matrix.shape[0]
    if n == 1:
        return 0.0
    if n <= DENSE_LIMIT:
        return float(np.linalg.eigvalsh(matrix.toarray() - 2 / n)[-1])
    # The ones vector has eigenvalue 1 of S, and -1 of S - 2J: no longer the largest.
    return _end("LA", lambda x: matrix @ x - 2 * x.mean(), matrix, 1 + _BESIDE, num_beside=2)


def _end(
    which: End,
    product: Callable[[Floats], Floats],
    matrix: sparse.csr_array,
    beside: float,
    num_beside: int,
) -> float:
    """Return the largest (LA) or smallest (SA) eigenvalue, by whatever converges first.

    Args:
        which: the end of the spectrum.
        product: x -> the matrix, possibly deflated, times x.
        matrix: the matrix itself, to factorise.
        beside: a number just outside the spectrum's end.
        num_beside: eigenvalues to take next to it; the smallest of them is the one wanted.
    """
    n = matrix.shape[0]
    if (end := _krylov(which, product, n)) is not None:
        return end
    with suppress(linalg.ArpackNoConvergence):  # expanders: wide gap, factors that fill up
        return _arpack(which, product, n, ncv=40, maxiter=40)
    with suppress(linalg.ArpackNoConvergence):  # paths and the like: tiny gap, sparse factors
        found = linalg.eigsh(
            sparse.csc_array(matrix),
            k=num_beside,
            sigma=beside,
            v0=_start(n),
            ncv=100,
            maxiter=100,
            tol=_TOLERANCE,
            return_eigenvectors=False,
        )
        return float(found.min())
    return _arpack(which, product, n, ncv=200, maxiter=10 * n)


def _krylov(which: End, product: Callable[[Floats], Floats], n: int) -> float | None:
    """Lanczos with full reorthogonalisation, None if it has not converged in a bounded time.

    A matrix with few distinct eigenvalues (pairs, stars, hypercubes) exhausts the Krylov space
    early. Then the Ritz values are all of them; ARPACK, which would start over with random vectors,
    may return an inner one there (scipy 1.17).
    """
    steps = min(_KRYLOV_STEPS, n)
    basis = np.zeros((steps, n))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    vector = _start(n)
    length = np.linalg.norm(vector)
    for step in range(steps):
        basis[step] = vector / length
        vector = product(basis[step])
        diagonal[step] = basis[step] @ vector
        for _ in range(2):  # once is not enough: rounding leaves a part along the basis
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        beside[step] = length = np.linalg.norm(vector)
        exhausted = length <= _TOLERANCE
        if exhausted or (step + 1) % 20 == 0 or step + 1 == steps:
            values, vectors = eigh_tridiagonal(diagonal[: step + 1], beside[:step])
            end, inner = (-1, -2) if which == "LA" else (0, 1)
            residual = length * abs(vectors[-1, end])
            spacing = abs(values[end] - values[inner]) if step else np.inf
            # Kato and Temple: the error of the value is at most residual^2 / spacing.
            if residual * min(1.0, residual / spacing) <= _TOLERANCE:
                return float(values[end])
    return None


def _arpack(
    which: End, product: Callable[[Floats], Floats], n: int, ncv: int, maxiter: int
) -> float:
    found = linalg.eigsh(
        linalg.LinearOperator((n, n), matvec=product, dtype=np.float64),
        k=1,
        which=which,
        v0=_start(n),
        ncv=ncv,
        maxiter=maxiter,
        tol=_TOLERANCE,
        return_eigenvectors=False,
    )
    return float(found[0])


def _start(n: int) -> Floats:
    return np.random.default_rng(0).standard_normal(n)  # fixed: the same figures every time
