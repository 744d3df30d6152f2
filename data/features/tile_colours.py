"""Colours of tiles by their embeddings, the same for every slide of a cohort: principal components, or clusters."""

from typing import Self

import numpy as np

from .tile_index import TileIndex

SAMPLE = 20_000
"""Tiles of the cohort that the colours are made from, or all if there are fewer."""

ENDS = 0.01, 0.99
"""Quantiles of the sample at which a component's colour ends: a few odd tiles do not take all the contrast."""

MOST_CLUSTERS = 16
"""More would not be told apart by their colours."""


class TileColours:
    """Colours by embedding, made from a sample of the cohort's tiles; embeddings are scaled to length 1, as for a cosine.

    Attributes:
        index: The cohort's tiles.
        shares: `(clusters,)` share of the sample's tiles in each cluster; the largest first.
        explained: `(3,)` share of the sample's variance that each of the three components holds.
    """

    def __init__(
        self,
        index: TileIndex,
        mean: np.ndarray,
        components: np.ndarray,
        ends: np.ndarray,
        explained: np.ndarray,
        centres: np.ndarray,
        shares: np.ndarray,
    ) -> None:
        self.index = index
        self._mean, self._components, self._ends, self._centres = mean, components, ends, centres
        self.explained, self.shares = explained, shares

    @classmethod
    def of(cls, index: TileIndex, clusters: int = 8, seed: int = 0) -> Self:
        """Find principal components, and clusters by k-means.

        Args:
            index: The tiles of a cohort, one or more.
            clusters: How many, 2 to 16; fewer where there are not as many different tiles.
            seed: Chooses the sample and begins the clusters.

        Raises:
            ValueError: Not 2 to 16 clusters, or no tiles.
        """
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        if not 2 <= clusters <= MOST_CLUSTERS:
            raise ValueError(f"{clusters} clusters are not 2 to {MOST_CLUSTERS}")
        if not len(index):
            raise ValueError("there are no tiles to colour")
        random = np.random.default_rng(seed)
        chosen = np.sort(random.choice(len(index), min(SAMPLE, len(index)), replace=False))
        sample = _of_length_one(index, chosen)
        mean = sample.mean(0)
        components, explained = np.zeros((3, sample.shape[1]), np.float32), np.zeros(3)
        if len(sample) > 1:
            number = min(3, *sample.shape)
            solver = "full" if min(sample.shape) < 500 else "randomized"
            pca = PCA(number, svd_solver=solver, random_state=seed).fit(sample)
            components[:number] = pca.components_
            explained[:number] = np.nan_to_num(pca.explained_variance_ratio_)
        ends = np.quantile((sample - mean) @ components.T, ENDS, axis=0)
        found = KMeans(min(clusters, len(np.unique(sample, axis=0))), n_init=3, random_state=seed).fit(sample)
        sizes = np.bincount(found.labels_, minlength=len(found.cluster_centers_))
        order = np.argsort(-sizes, kind="stable")
        return cls(index, mean, components, ends, explained, found.cluster_centers_[order], sizes[order] / len(sample))

    def components(self, slide_id: str) -> np.ndarray:
        """The first three principal components of a slide's tiles as red, green and blue: `(N, 3)` uint8.

        Raises:
            LongslideError: No such slide.
        """
        low, high = self._ends
        places = ((self._embeddings(slide_id) - self._mean) @ self._components.T - low) / np.maximum(high - low, 1e-12)
        return np.asarray(np.rint(255 * places.clip(0, 1)), np.uint8)

    def clusters(self, slide_id: str) -> np.ndarray:
        """The cluster of each of a slide's tiles: `(N,)` int64, 0 for the cohort's largest.

        Raises:
            LongslideError: No such slide.
        """
        embeddings = self._embeddings(slide_id)
        # The nearest centre: the squared length of the embedding is the same for all.
        distances = (self._centres**2).sum(1) - 2 * embeddings @ self._centres.T
        return np.asarray(distances.argmin(1), np.int64)

    def _embeddings(self, slide_id: str) -> np.ndarray:
        rows = self.index.rows(slide_id)
        return _of_length_one(self.index, np.arange(rows.start, rows.stop))


def _of_length_one(index: TileIndex, rows: np.ndarray) -> np.ndarray:
    embeddings = index.embeddings[rows].float().numpy()
    return np.asarray(embeddings / np.maximum(index.norms[rows], 1e-12)[:, None], np.float32)
