"""The backend ``torch``: block Lanczos with thick restarts, on the device of the operator."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from influence_framework.protocols import LinearOperator
from influence_framework_arnoldi.pairs import ATTAINABLE, CAUTION, Eigenpairs, Wanted, random_vector

CHUNK_BYTES = 32 * 2**20
"""Part of the basis that is recombined at a time when it is compressed."""


def thick_restart_lanczos(operator: LinearOperator, wanted: Wanted) -> Eigenpairs:
    """The wanted eigenpairs by block Lanczos with thick restarts and full reorthogonalisation.

    When the basis is full it is compressed to the best Ritz vectors and goes on from its last block: Wu
    and Simon (2000), "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems"; in blocks,
    Zhou and Saad (2008), "Block Krylov-Schur Method for Large Symmetric Eigenvalue Problems".

    A Krylov space holds only as many copies of a multiple eigenvalue as a block has columns. Therefore,
    once the pairs have converged, a few blocks from new random vectors orthogonal to them are added,
    and as long as larger eigenvalues appear in those the search goes on. An eigenvalue of more than
    twice the magnitude of the smallest returned is overlooked with a probability below 1 %
    (:func:`search_steps`).
    """
    space = KrylovSpace(operator, wanted)
    space.add_random_block()
    if not space.converge(math.ceil(wanted.rank / wanted.block_size)):
        return space.pairs()
    pairs = space.pairs()
    steps = search_steps(operator.shape[0], wanted.block_size)
    while True:
        space.compress(wanted.rank, follow=False)
        space.add_random_block()
        converged = space.converge(steps)
        found = space.pairs()
        pairs = replace(pairs, lowest=found.lowest)
        # A converged value moves by less than its residual.
        limits = wanted.limits(pairs.values, operator.dtype)
        if (found.values.abs() <= pairs.values.abs() + 2 * limits).all():
            return pairs
        # What the dropped block held of the residuals is not known any more.
        pairs = replace(found, residuals=None)
        if not converged:
            return pairs


def lowest_beside(operator: LinearOperator, wanted: Wanted, pairs: Eigenpairs) -> float:
    """The least Ritz value in the space of known pairs and of :func:`search_steps` blocks from random vectors.

    With the large eigenvalues held fixed, the steps go to the ends of the spectrum that is left.
    """
    free = operator.shape[0] - len(pairs.values)
    steps = min(search_steps(operator.shape[0], wanted.block_size), free // wanted.block_size - 1)
    dimension = len(pairs.values) + steps * wanted.block_size
    space = KrylovSpace(operator, replace(wanted, krylov_dimension=dimension))
    space.hold(pairs)
    space.add_random_block()
    for _ in range(steps):
        space.extend()
    space.ritz(0)
    return space.lowest


def search_steps(size: int, block_size: int) -> int:
    """Blocks from random vectors that show an eigenvalue twice as large as all that are known.

    For a positive definite matrix, ``k`` Lanczos steps from a random vector miss the largest eigenvalue
    by a fraction above ε with a probability below ``1.648 √P exp(−√ε (2k − 1))``: Kuczyński and
    Woźniakowski (1992), "Estimating the Largest Eigenvalue by the Power and Lanczos Algorithms with a
    Random Start". With the rest of the spectrum in ``[−|θ|, |θ|]`` and the shift ``|θ|`` that makes
    it positive, an eigenvalue ``2|θ|`` stands out by ``ε = 1/3``. Each column of a block is one attempt.
    """
    epsilon, failure = 1 / 3, 0.01
    attempts = math.log(1.648 * math.sqrt(size)) - math.log(failure) / block_size
    return math.ceil((1 + attempts / math.sqrt(epsilon)) / 2)


class KrylovSpace:
    """An orthonormal basis ``V`` with ``C V_a = V_n H``: the first ``a`` of its ``n`` vectors are multiplied.

    ``H`` holds all coefficients of the products, as they came out of the orthogonalisation, so that the
    residual of a Ritz pair ``(θ, V_a s)`` is ``‖H s − θ s‖`` whatever rounding did. Ritz pairs are those of its
    upper triangle, where each entry has been measured; below row ``a`` stand the couplings to the last block.

    Attributes:
        basis: ``V`` by rows, room for ``m`` vectors and one block.
        projected: ``H``, float64 on the CPU, where small eigenproblems are quickest.
        applied: ``a``.
        size: ``n``.
        lowest: The least Ritz value seen so far, whatever restarts have dropped since.
    """

    def __init__(self, operator: LinearOperator, wanted: Wanted) -> None:
        self.operator = operator
        self.wanted = wanted
        room = wanted.krylov_dimension + wanted.block_size
        self.basis = torch.empty((room, operator.shape[0]), dtype=operator.dtype, device=operator.device)
        self.projected = torch.zeros((room, room), dtype=torch.float64, device="cpu")
        self.applied = self.size = 0
        self.lowest = math.inf
        self._fillings = 1
        self._norm = 0.0  # of C, from below
        self._generator = torch.Generator("cpu").manual_seed(wanted.seed)

    def converge(self, blocks: int) -> bool:
        """Extend by ``blocks`` blocks, then until the wanted pairs have converged; ``False`` at the limit."""
        wanted = self.wanted
        while True:
            for _ in range(blocks):
                if self.applied + wanted.block_size > wanted.krylov_dimension:
                    if self._fillings == wanted.max_iter:
                        return False
                    self._fillings += 1
                    spare = (wanted.krylov_dimension - wanted.rank) // 2
                    self.compress(min(wanted.rank + spare, wanted.krylov_dimension - wanted.block_size))
                self.extend()
            values, coordinates = self.ritz(wanted.rank)
            residuals = torch.linalg.vector_norm(self._couplings() @ coordinates, dim=0)
            if (residuals <= CAUTION * wanted.limits(values, self.operator.dtype)).all():
                return True
            # The check costs as much as a few products of a small model.
            blocks = max(1, self.applied // (16 * wanted.block_size))

    def ritz(self, count: int) -> tuple[Float[Tensor, " r"], Float[Tensor, "a r"]]:
        """Ritz values of largest magnitude, and the coordinates of their vectors in the basis."""
        values, coordinates = torch.linalg.eigh(self.projected[: self.applied, : self.applied], UPLO="U")
        self.lowest = min(self.lowest, values[0].item())
        order = values.abs().argsort(descending=True)[:count]
        return values[order], coordinates[:, order]

    def pairs(self) -> Eigenpairs:
        """The wanted Ritz pairs."""
        values, coordinates = self.ritz(self.wanted.rank)
        vectors = self.basis[: self.applied].T @ coordinates.to(self.basis)
        # C V_a s − θ V_a s in the orthonormal basis.
        remainder = self.projected[: self.size, : self.applied] @ coordinates
        remainder[: self.applied] -= coordinates * values
        residuals = torch.linalg.vector_norm(remainder, dim=0)
        device = self.basis.device
        return Eigenpairs(values.to(device), vectors, residuals.to(device), self.lowest)

    def hold(self, pairs: Eigenpairs) -> None:
        """Start from converged pairs in place of products."""
        self.applied = self.size = count = len(pairs.values)
        self.basis[:count] = pairs.vectors.T
        self.projected[:count, :count] = torch.diag(pairs.values)
        self._norm = torch.linalg.vector_norm(pairs.values, torch.inf).item() if count else 0.0

    def add_random_block(self) -> None:
        """Extend the basis by random directions that have nothing to do with it."""
        for _ in range(self.wanted.block_size):
            self._append(self._random(), None)

    def extend(self) -> None:
        """Multiply the last block and append what is new in the products."""
        columns = range(self.applied, self.size)
        products = (self.operator @ self.basis[self.applied : self.size].T).T
        self._norm = max(self._norm, torch.linalg.vector_norm(products, dim=1).max().item())
        for column, product in zip(columns, products, strict=True):
            self._append(product, column)
        self.applied = columns.stop

    def compress(self, count: int, *, follow: bool = True) -> None:
        """Keep the best ``count`` Ritz vectors and the last block.

        With ``follow=False`` the last block goes too: right where the vectors kept have converged.
        """
        values, coordinates = self.ritz(count)
        couplings = self._couplings() @ coordinates
        last = self.basis[self.applied : self.size].clone()
        rotation = coordinates.T.to(self.basis)
        width = max(1, CHUNK_BYTES // (self.applied * self.basis.element_size()))
        for part in self.basis.split(width, dim=1):
            part[:count] = rotation @ part[: self.applied]
        # Rounding adds up from one compression to the next; a step of Newton and Schulz takes it out.
        gram = self.basis[:count] @ self.basis[:count].T
        for part in self.basis[:count].split(width, dim=1):
            part.copy_(torch.addmm(part, gram, part, beta=1.5, alpha=-0.5))
        self.applied = self.size = count
        self.projected.zero_()
        self.projected[:count, :count] = torch.diag(values)
        if follow:
            self.size += len(last)
            self.basis[count : self.size] = last
            self.projected[count : self.size, :count] = couplings

    def _couplings(self) -> Float[Tensor, "b a"]:
        """Coefficients of ``C V_a`` along the last block: residuals of Ritz pairs lie in it."""
        return self.projected[self.applied : self.size, : self.applied]

    def _random(self) -> Float[Tensor, " P"]:
        return random_vector(self.operator, self._generator)

    def _append(self, vector: Float[Tensor, " P"], column: int | None) -> None:
        """Append what ``vector`` adds to the basis, normalised.

        It is orthogonalised twice, and on until that does not shorten it any more (Daniel, Gragg, Kaufman
        and Stewart 1976, "Reorthogonalization and Stable Algorithms for Updating the Gram-Schmidt QR
        Factorization"). After one pass alone, errors of the basis would grow from vector to vector. Where
        nothing but rounding is left of a product, the basis is invariant in this direction and goes on
        with a random one.

        Args:
            vector: A product, or a random vector.
            column: Index of the vector that was multiplied; ``None`` for a random vector.
        """
        known = self.basis[: self.size]
        negligible = ATTAINABLE * torch.finfo(vector.dtype).eps * self._norm
        length, passes = torch.linalg.vector_norm(vector).item(), 0
        while True:
            if column is not None and length <= negligible:
                vector, column = self._random(), None
                length, passes = torch.linalg.vector_norm(vector).item(), 0
            coefficients = known @ vector
            vector = torch.addmv(vector, known.T, coefficients, alpha=-1)
            if column is not None:
                self.projected[: self.size, column] += coefficients.to(self.projected)
            before, length, passes = length, torch.linalg.vector_norm(vector).item(), passes + 1
            if passes > 1 and length > 0.5 * before:
                break
        if column is not None:
            self.projected[self.size, column] = length
        self.basis[self.size] = vector / length
        self.size += 1
