"""The page of a run, a comparison or a curve: a story of plain values, written in three ways."""
