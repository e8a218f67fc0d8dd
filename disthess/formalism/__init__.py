"""The paper's formalism as readable mathematics: small, dense, float64, and independent of the engine. See PAPER.md."""
