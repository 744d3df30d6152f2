"""Tiles of a slide: the grid they lie on, and streams of their pixels."""
