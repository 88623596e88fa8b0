"""Training of ReFusion models (algorithm section 6); imports no vLLM."""
