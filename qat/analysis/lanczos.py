"""Lanczos' method with full reorthogonalisation, for a matrix that is known by its products.

The space of a start and its images under the matrix holds good approximations of the eigenvectors
at both ends of the spectrum. In exact arithmetic three of its vectors at a time would do; rounding
makes them lose their orthogonality, and eigenvalues then come twice, so each new vector is made
orthogonal to all. What is left over when the matrix is applied to an approximate eigenvector bounds
the distance to an eigenvalue: it is the last off-diagonal times the last entry of the tridiagonal
matrix's eigenvector (Parlett, The Symmetric Eigenvalue Problem, 1980).

Products may be float32; all else is float64 NumPy.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

# Arrays end in their axes: N numbers of a vector, M products, K eigenvalues.
Floats = NDArray[np.float64]

_NOISE = 1e-6  # of a float32 product, relative to the largest eigenvalue


def ritz(
    apply: Callable[[Floats], Floats], rng: np.random.Generator, size: int, most: int
) -> Iterator[tuple[Floats, Floats]]:
    """Ascending Ritz values and the bounds of their errors, after each of `most` products.

    Bounds are infinite from where the space has closed until the last product.

    Args:
        apply: the matrix times a vector (N,).
        rng: of the start.
        size: N.
        most: products, at most N.
    """
    basis_MN = np.empty((most, size))
    diagonal, beside = list[float](), list[float]()
    vector_N, closed = _outside(basis_MN[:0], rng), False
    for done in range(1, most + 1):
        basis_MN[done - 1] = vector_N
        image_N = apply(vector_N)
        diagonal.append(float(vector_N @ image_N))
        rest_N = _orthogonal(basis_MN[:done], image_N)
        length = float(np.linalg.norm(rest_N))
        values_K, vectors_MK = eigh_tridiagonal(diagonal, beside)
        bounds_K = length * np.abs(vectors_MK[-1])
        closed = closed or length <= _NOISE * np.abs(values_K).max()
        yield values_K, np.full(done, np.inf) if closed and done < most else bounds_K
        if done < most:
            whole = length > _NOISE * np.abs(values_K).max()
            beside.append(length if whole else 0.0)
            vector_N = rest_N / length if whole else _outside(basis_MN[:done], rng)


def _orthogonal(basis_MN: Floats, vector_N: Floats) -> Floats:
    """What of a vector is outside the space of an orthonormal basis; twice is enough."""
    rest_N: Floats = vector_N
    for _ in range(2):
        rest_N = rest_N - basis_MN.T @ (basis_MN @ rest_N)
    return rest_N


def _outside(basis_MN: Floats, rng: np.random.Generator) -> Floats:
    """A random unit vector orthogonal to a basis."""
    vector_N: Floats = rng.standard_normal(basis_MN.shape[1:])
    rest_N = _orthogonal(basis_MN, vector_N)
    unit_N: Floats = rest_N / np.linalg.norm(rest_N)
    return unit_N
